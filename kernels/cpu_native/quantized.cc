// Few rows of float32 times weights of 8 or 4 bits: each byte of the weights is loaded once and used for all rows.
//
// Weights are converted in registers and multiplied with activations as they are; nothing else is rounded.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "pieces.h"

namespace {

constexpr int64_t kPieceBytes = 1 << 15;   // of weights: some microseconds
constexpr int64_t kCachedBytes = 3 << 13;  // of activations: most of a first cache

}  // namespace

// x [t, k], w [n, k], scale [1, n] -> y [t, n] = x (w scale)^T
static ffi::Error Int8Product(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S8> w,
                              ffi::Buffer<ffi::F32> scale, ffi::ResultBuffer<ffi::F32> y) {
  few_rows<int8_t>(pool, x.typed_data(), w.typed_data(), scale.typed_data(), y->typed_data(), x.dimensions()[0],
                   x.dimensions()[1], w.dimensions()[0], kPieceBytes);
  return ffi::Error::Success();
}

// x [t, k] sorted by group, w [e, n, k], scale [e, 1, n], sizes [e] -> y [t, n], each row with its group's matrix
static ffi::Error GroupedInt8Product(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S8> w,
                                     ffi::Buffer<ffi::F32> scale, ffi::Buffer<ffi::S32> sizes,
                                     ffi::ResultBuffer<ffi::F32> y) {
  int64_t rows = x.dimensions()[0], k = x.dimensions()[1], n = w.dimensions()[1];
  const float *xp = x.typed_data(), *sp = scale.typed_data();
  const int8_t* wp = w.typed_data();
  float* yp = y->typed_data();
  each_group(sizes.typed_data(), w.dimensions()[0], rows, n, yp, [&](int64_t g, int64_t start, int64_t own) {
    few_rows<int8_t>(pool, xp + start * k, wp + g * n * k, sp + g * n, yp + start * n, own, k, n, kPieceBytes);
  });
  return ffi::Error::Success();
}

namespace {

// int4. A word of 32 bits holds the eight values of inputs 8i to 8i + 7, so that a vector of words is a chunk of
// 8 * kLanes inputs. With its sign bit flipped, value j is q + 8 and stands where the word has its bits 4j to 4j + 3:
// masked and converted as it stands it is (q + 8) 16^j, and x has been divided by 16^j, a power of two, once. What is
// too much, 8 times the sum of x, is where the sum begins; so x is laid out as [chunk, row, j, lane] with -8 times
// the sum over j behind.

typedef uint32_t Words __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

constexpr int64_t kChunk = 8 * kLanes, kChunkBytes = kChunk / 2;
constexpr int64_t kLaid = 9 * kLanes;  // floats of x a chunk
constexpr uint32_t kSigns = 0x88888888u;

// (q + 8) 16^J, but for the last one q + 8: its mask would be a sign.
template <int J>
inline Vec value(Words words) {
  if constexpr (J == 7)
    return converted((Ints)(words >> 28));
  else
    return converted((Ints)(words & (0xFu << (4 * J))));
}

inline Words words_at(const uint8_t* p, int64_t bytes) {
  if (bytes >= kChunkBytes) return *reinterpret_cast<const Words*>(p);
  Words words = {};
  std::memcpy(&words, p, bytes);
  return words;
}

// Each lane's scale in a chunk, of a row's scales one after the other.
template <int kGroup>
inline Vec of_lanes(const float* scales, int64_t chunk) {
  if constexpr (kGroup >= kChunk) {
    return Vec{} + scales[chunk / (kGroup / kChunk)];
  } else {
    const float* own = scales + chunk * (kChunk / kGroup);
#if defined(__AVX512F__)
    static_assert(kGroup == 32);
    __m512 four = _mm512_castps128_ps512(_mm_loadu_ps(own));
    return (Vec)_mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3), four);
#elif defined(__AVX2__)
    static_assert(kGroup == 32);
    return (Vec)_mm256_set_m128(_mm_set1_ps(own[1]), _mm_set1_ps(own[0]));
#else
    Vec v;
    for (int i = 0; i < kLanes; ++i) v[i] = own[i * 8 / kGroup];
    return v;
#endif
  }
}

struct Int4 {
  int64_t rows, k, n, chunks, bytes;  // bytes: of a row of weights
  int64_t first, last;                // chunks of the run that is added
  int64_t groups;               // of a row of scales, as laid out for a piece
};

template <int J, int B, int R>
inline void add_values(Vec (&acc)[B][R], const Words (&words)[R], const float* x) {
  for (int r = 0; r < R; ++r) {
    Vec q = value<J>(words[r]);
    for (int b = 0; b < B; ++b) acc[b][r] = add_product(load(x + b * kLaid + J * kLanes), q, acc[b][r]);
  }
}

// y[b, r], over a run of chunks, for B rows of x, laid out, and R rows of w; `scales` and `zeros` are those of the R rows.
template <int B, int R, int kGroup, bool kZeros>
inline void int4_tile(const Int4& s, const float* x, const uint8_t* w, const float* scales, const float* zeros,
                      float* y) {
  Vec total[B][R] = {};
  for (int64_t c = s.first; c < s.last; ++c) {
    const float* own = x + c * s.rows * kLaid;
    Words words[R];
    for (int r = 0; r < R; ++r)
      words[r] = words_at(w + r * s.bytes + c * kChunkBytes, s.bytes - c * kChunkBytes) ^ kSigns;
    Vec acc[B][R];
    for (int b = 0; b < B; ++b)
      for (int r = 0; r < R; ++r) acc[b][r] = load(own + b * kLaid + 8 * kLanes);
    add_values<0>(acc, words, own);
    add_values<1>(acc, words, own);
    add_values<2>(acc, words, own);
    add_values<3>(acc, words, own);
    add_values<4>(acc, words, own);
    add_values<5>(acc, words, own);
    add_values<6>(acc, words, own);
    add_values<7>(acc, words, own);
    for (int r = 0; r < R; ++r) {
      Vec scale = of_lanes<kGroup>(scales + r * s.groups, c);
      for (int b = 0; b < B; ++b) {
        Vec part = acc[b][r];
        // An eighth of what stands there is minus the sum of x.
        if constexpr (kZeros)
          part += load(own + b * kLaid + 8 * kLanes) * (of_lanes<kGroup>(zeros + r * s.groups, c) * (1.0f / 8));
        total[b][r] += part * scale;
      }
    }
  }
  for (int b = 0; b < B; ++b)
    for (int r = 0; r < R; ++r) y[b * s.n + r] = sum(total[b][r]) + (s.first > 0 ? y[b * s.n + r] : 0);
}

template <int R, int kGroup, bool kZeros>
void int4_columns(const Int4& s, const float* x, const uint8_t* w, const float* scales, const float* zeros, float* y) {
  int64_t b = 0;
  auto run = [&](auto step) {
    constexpr int B = decltype(step)::value;
    for (; b + B <= s.rows; b += B)
      int4_tile<B, R, kGroup, kZeros>(s, x + b * kLaid, w, scales, zeros, y + b * s.n);
  };
  // The more rows of x, the less often a weight is converted; sums of many rows of both do not fit into registers.
  if constexpr (R == 1) {
    run(std::integral_constant<int, 8>{});
    run(std::integral_constant<int, 4>{});
  }
  if constexpr (R == 2) run(std::integral_constant<int, 4>{});
  if constexpr (R <= 2) run(std::integral_constant<int, 2>{});
  run(std::integral_constant<int, 1>{});
}

// By what value j of a word is too large, upside down.
constexpr float kPart[8] = {1,           1.0f / 16,        1.0f / 256,        1.0f / 4096, 1.0f / 65536,
                            1.0f / 1048576, 1.0f / 16777216, 1};

// x as the tiles read it. Past the last input it is 0.
std::vector<float> laid_out(const float* x, const Int4& s) {
  std::vector<float> laid(s.rows * s.chunks * kLaid, 0.0f);
  for (int64_t b = 0; b < s.rows; ++b)
    for (int64_t c = 0; c < s.chunks; ++c) {
      float* own = laid.data() + (c * s.rows + b) * kLaid;
      const float* from = x + b * s.k + c * kChunk;
      int64_t here = std::min(kChunk, s.k - c * kChunk);
      for (int64_t i = 0; i < here; ++i) {
        own[i % 8 * kLanes + i / 8] = from[i] * kPart[i % 8];
        own[8 * kLanes + i / 8] -= 8 * from[i];
      }
    }
  return laid;
}

// Numbers [groups, n] of the outputs [o, end) as [output, group], padded to whole chunks.
void turned(const Bf16* from, int64_t from_groups, const Int4& s, int64_t o, int64_t end,
            std::vector<float>& to) {
  to.assign((end - o) * s.groups + kLanes, 0.0f);
  for (int64_t g = 0; g < from_groups; ++g)
    for (int64_t r = o; r < end; ++r) to[(r - o) * s.groups + g] = value_of(from[g * s.n + r]);
}

template <int kGroup, bool kZeros>
void int4_pieces(ffi::ThreadPool& pool, Int4 s, const float* x, const uint8_t* w, const Bf16* scale,
                  const Bf16* zero, float* y) {
  int64_t groups = (s.k + kGroup - 1) / kGroup;
  s.groups = std::max<int64_t>(groups, s.chunks * std::max<int64_t>(1, kChunk / kGroup));
  auto laid = std::make_shared<std::vector<float>>(laid_out(x, s));
  int64_t block = std::max<int64_t>(4, kPieceBytes / s.bytes / 4 * 4), pieces = (s.n + block - 1) / block;
  // So many chunks of x stay in the first cache while all outputs of a piece go through them.
  int64_t at_once = std::max<int64_t>(8, kCachedBytes / (4 * kLaid * s.rows));
  deal(pool, pieces, [=](int64_t i) {
    int64_t first = i * block, o = first, end = std::min(s.n, o + block);
    Int4 part = s;
    thread_local std::vector<float> scales, zeros;
    turned(scale, groups, s, o, end, scales);
    if (kZeros) turned(zero, groups, s, o, end, zeros);
    auto run = [&](auto step) {
      constexpr int R = decltype(step)::value;
      for (; o + R <= end; o += R) {
        int64_t at = (o - first) * s.groups;
        int4_columns<R, kGroup, kZeros>(part, laid->data(), w + o * s.bytes, scales.data() + at,
                                        kZeros ? zeros.data() + at : nullptr, y + o);
      }
    };
    for (; part.first < s.chunks; part.first = part.last) {
      part.last = std::min(s.chunks, part.first + at_once);
      o = first;
      if (s.rows == 1) run(std::integral_constant<int, 4>{});
      // Of many rows each load of x is worth more than each conversion.
      if (s.rows < 4 || s.rows > 8) run(std::integral_constant<int, 2>{});
      run(std::integral_constant<int, 1>{});
    }
  });
}

}  // namespace

// x [t, k], w [n, ceil(k / 2)] with two values a byte, scale [ceil(k / group), n], zero the same or none
// -> y [t, n] = x ((w - zero) scale)^T
static ffi::Error Int4Product(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::U8> w,
                              ffi::Buffer<ffi::BF16> scale, ffi::Buffer<ffi::BF16> zero,
                              ffi::ResultBuffer<ffi::F32> y, int64_t group) {
  int64_t rows = x.dimensions()[0], k = x.dimensions()[1], n = w.dimensions()[0];
  Int4 s{rows, k, n, (k + kChunk - 1) / kChunk, (k + 1) / 2, 0, 0, 0};
  const auto* sp = reinterpret_cast<const Bf16*>(scale.untyped_data());
  const auto* zp = reinterpret_cast<const Bf16*>(zero.untyped_data());
  bool zeros = given(zero);
  auto run = [&](auto of_group) {
    constexpr int kGroup = decltype(of_group)::value;
    if (zeros)
      int4_pieces<kGroup, true>(pool, s, x.typed_data(), w.typed_data(), sp, zp, y->typed_data());
    else
      int4_pieces<kGroup, false>(pool, s, x.typed_data(), w.typed_data(), sp, zp, y->typed_data());
  };
  if (group == 32)
    run(std::integral_constant<int, 32>{});
  else if (group == 128)
    run(std::integral_constant<int, 128>{});
  else
    return ffi::Error::InvalidArgument("int4_product: groups of 32 or 128");
  return ffi::Error::Success();
}

// The same with w [e, n, ceil(k / 2)], two values a byte, and scale [e, ceil(k / group), n]
static ffi::Error GroupedInt4Product(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::U8> w,
                                     ffi::Buffer<ffi::BF16> scale, ffi::Buffer<ffi::S32> sizes,
                                     ffi::ResultBuffer<ffi::F32> y, int64_t group) {
  int64_t rows = x.dimensions()[0], k = x.dimensions()[1], n = w.dimensions()[1], scales = scale.dimensions()[1] * n;
  const float* xp = x.typed_data();
  const uint8_t* wp = w.typed_data();
  const Bf16* sp = reinterpret_cast<const Bf16*>(scale.untyped_data());
  float* yp = y->typed_data();
  if (group != 32 && group != 128)
    return ffi::Error::InvalidArgument("grouped_int4_product: groups of 32 or 128");
  each_group(sizes.typed_data(), w.dimensions()[0], rows, n, yp, [&](int64_t g, int64_t start, int64_t own) {
    Int4 s{own, k, n, (k + kChunk - 1) / kChunk, (k + 1) / 2, 0, 0, 0};
    const uint8_t* of_group = wp + g * n * s.bytes;
    if (group == 32)
      int4_pieces<32, false>(pool, s, xp + start * k, of_group, sp + g * scales, nullptr, yp + start * n);
    else
      int4_pieces<128, false>(pool, s, xp + start * k, of_group, sp + g * scales, nullptr, yp + start * n);
  });
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(grouped_int8_product, GroupedInt8Product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(grouped_int4_product, GroupedInt4Product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("group"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(int8_product, Int8Product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(int4_product, Int4Product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("group"));
