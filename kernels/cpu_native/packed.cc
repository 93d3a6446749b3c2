// Any number of float32 rows times a matrix of 4 bits that lies in panels of sixteen outputs.
//
// A word of 32 bits holds the values of eight inputs of an output, and a panel is [k / 8, 16] words. Values are kept as
// u = q + 8, from 0. Value j of a word stands where it has its bits 4j to 4j + 3: masked and converted as it stands it is
// u 16^j, and x has been divided by 16^j, a power of two, once. What is too much, 8 times the sum of x, is where the sum
// of a group begins. A group's sum takes its scale when it is whole, so unpacking is one mask and one conversion for the
// weights of a vector.
//
// Each output is summed group after group and within a group over the inputs in order, whatever the number of rows: a
// row's result is the same in any company.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "panels.h"

namespace {

typedef uint32_t Words __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

constexpr int kWord = 8;                    // values of a word
constexpr int64_t kPieceBytes = 1 << 15;    // of weights: some microseconds
constexpr int64_t kRun = 512;               // inputs of a panel that are float32 at once
constexpr int64_t kLaidAtOnce = 16;         // rows of x that a thread lays out

// u 16^J, but for the last one u: its mask would be a sign.
template <int J>
inline Vec value(const uint32_t* p) {
  Words words = *reinterpret_cast<const Words*>(p);
  if constexpr (J == kWord - 1)
    return converted((Ints)(words >> 28));
  else
    return converted((Ints)(words & (0xFu << (4 * J))));
}

struct Int4 {
  int64_t rows, words, groups, panels;   // of x, of an output, of an output, of the matrix
  int64_t laid() const { return words * kWord + groups; }
  int64_t n() const { return panels * kPanel; }
};

// x over 16^j, and behind it -8 times the sum of each group.
void lay_out(const float* x, int64_t k, int64_t group, const Int4& s, float* to) {
  constexpr float kFactors[kWord] = {1.0f, 0x1p-4f, 0x1p-8f, 0x1p-12f, 0x1p-16f, 0x1p-20f, 0x1p-24f, 1.0f};
  float* sums = to + s.words * kWord;
  for (int64_t g = 0; g < s.groups; ++g) {
    int64_t from = g * group, end = std::min(k, from + group), i = from;
    float eight[kWord] = {};
    for (; i + kWord <= end; i += kWord)
      for (int j = 0; j < kWord; ++j) {
        eight[j] += x[i + j];
        to[i + j] = x[i + j] * kFactors[j];
      }
    for (int64_t j = 0; i < end; ++i, ++j) {
      eight[j] += x[i];
      to[i] = x[i] * kFactors[j];
    }
    float total = ((eight[0] + eight[4]) + (eight[1] + eight[5])) + ((eight[2] + eight[6]) + (eight[3] + eight[7]));
    sums[g] = -8.0f * total;
  }
  std::fill(to + k, sums, 0.0f);
}

// Adds to acc the products of B rows of x and the words of P panels, for the inputs of one word.
template <int J, int B, int P>
[[gnu::always_inline]] inline void add_value(const float* x, int64_t x_stride, const uint32_t* const (&w)[P], int64_t at,
                      Vec (&acc)[P][B][kVecs]) {
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) {
    Vec u[kVecs];
#pragma GCC unroll 16
    for (int v = 0; v < kVecs; ++v) u[v] = value<J>(w[p] + at + v * kLanes);
#pragma GCC unroll 16
    for (int b = 0; b < B; ++b) {
      Vec one = spread(x[b * x_stride + J]);
#pragma GCC unroll 16
      for (int v = 0; v < kVecs; ++v) acc[p][b][v] = add_product(one, u[v], acc[p][b][v]);
    }
  }
  if constexpr (J + 1 < kWord) add_value<J + 1, B, P>(x, x_stride, w, at, acc);
}

// The same with a panel whose values are float32 already.
template <int B>
[[gnu::always_inline]] inline void add_floats(const float* x, int64_t x_stride, const float* w, int64_t count, Vec (&acc)[1][B][kVecs]) {
  for (int64_t i = 0; i < count; ++i) {
    Vec column[kVecs];
#pragma GCC unroll 16
    for (int v = 0; v < kVecs; ++v) column[v] = load(w + i * kPanel + v * kLanes);
#pragma GCC unroll 16
    for (int b = 0; b < B; ++b) {
      Vec one = spread(x[b * x_stride + i]);
#pragma GCC unroll 16
      for (int v = 0; v < kVecs; ++v) acc[0][b][v] = add_product(one, column[v], acc[0][b][v]);
    }
  }
}

// Where the sums of a group begin: at -8 times the sum of x, or with zero points at -(8 + zero) times it.
template <int B, int P>
[[gnu::always_inline]] inline void begin(const float* sums, int64_t x_stride, const Bf16* zero, int64_t stride, int64_t panels,
                  Vec (&acc)[P][B][kVecs]) {
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 16
    for (int b = 0; b < B; ++b)
#pragma GCC unroll 16
      for (int v = 0; v < kVecs; ++v) {
        acc[p][b][v] = spread(sums[b * x_stride]);
        if (zero) acc[p][b][v] *= load(zero + std::min<int64_t>(p, panels - 1) * stride + v * kLanes);
      }
}

// A group's sums with their scales, added to y.
template <int B, int P>
[[gnu::always_inline]] inline void finish(const Bf16* scale, int64_t stride, const Vec (&acc)[P][B][kVecs], int64_t panels, float* y,
                   int64_t n, bool first) {
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p)
    if (p < panels)
#pragma GCC unroll 16
      for (int v = 0; v < kVecs; ++v) {
        Vec by = load(scale + p * stride + v * kLanes);
#pragma GCC unroll 16
        for (int b = 0; b < B; ++b) {
          float* to = y + b * n + p * kPanel + v * kLanes;
          store(to, add_product(acc[p][b][v], by, first ? Vec{} : load(to)));
        }
      }
}

// What a matrix holds, from one panel on.
struct Matrix {
  const uint32_t* words;
  const Bf16 *scale, *zero;   // zero null: none
};

// y [B, 16] of up to P panels, words converted in registers. `x` is laid out.
template <int B, int P, int kGroup>
void few_rows(const Int4& s, const float* x, const Matrix& m, int64_t panels, float* y) {
  int64_t width = s.words * kPanel, scales = s.groups * kPanel;
  const uint32_t* own[P];
  for (int64_t p = 0; p < P; ++p) own[p] = m.words + std::min(p, panels - 1) * width;
  for (int64_t g = 0; g < s.groups; ++g) {
    Vec acc[P][B][kVecs];
    int64_t at = g * kPanel, c = g * (kGroup / kWord), end = std::min(s.words, c + kGroup / kWord);
    begin<B, P>(x + s.words * kWord + g, s.laid(), m.zero ? m.zero + at : nullptr, scales, panels, acc);
    for (; c < end; ++c) add_value<0, B, P>(x + c * kWord, s.laid(), own, c * kPanel, acc);
    finish<B, P>(m.scale + at, scales, acc, panels, y, s.n(), g == 0);
  }
}

// y [rows, 16] of one panel, made float32 a run at a time.
template <int kGroup>
void many_rows(const Int4& s, const float* x, int64_t rows, const Matrix& m, float* y) {
  constexpr int64_t kWords = kRun / kWord;
  static thread_local std::vector<float> held;
  held.resize(kRun * kPanel);
  for (int64_t c = 0; c < s.words; c += kWords) {
    int64_t end = std::min(s.words, c + kWords);
    float* to = held.data();
    for (int64_t i = c; i < end; ++i)
      for (int v = 0; v < kVecs; ++v) {
        const uint32_t* from = m.words + i * kPanel + v * kLanes;
        float* own = to + (i - c) * kWord * kPanel + v * kLanes;
        store(own, value<0>(from)), store(own + kPanel, value<1>(from));
        store(own + 2 * kPanel, value<2>(from)), store(own + 3 * kPanel, value<3>(from));
        store(own + 4 * kPanel, value<4>(from)), store(own + 5 * kPanel, value<5>(from));
        store(own + 6 * kPanel, value<6>(from)), store(own + 7 * kPanel, value<7>(from));
      }
    blocks_of_rows(rows, [&](auto constant, int64_t b) {
      constexpr int B = decltype(constant)::value;
      const float* own = x + b * s.laid();
      for (int64_t first = c; first < end; first += kGroup / kWord) {
        int64_t g = first * kWord / kGroup, count = std::min<int64_t>(end - first, kGroup / kWord) * kWord;
        Vec acc[1][B][kVecs];
        begin<B, 1>(own + s.words * kWord + g, s.laid(), m.zero ? m.zero + g * kPanel : nullptr, 0, 1, acc);
        add_floats<B>(own + first * kWord, s.laid(), to + (first - c) * kWord * kPanel, count, acc);
        finish<B, 1>(m.scale + g * kPanel, 0, acc, 1, y + b * s.n(), s.n(), g == 0);
      }
    });
  }
}

template <int kGroup>
void int4_product(ffi::ThreadPool& pool, const Int4& s, const float* laid, const Matrix& m, float* y) {
  int64_t bytes = s.words * kPanel * 4;
  deal_panels(pool, s.rows, s.panels, bytes, kPieceBytes, [=](int64_t top, int64_t count, int64_t from, int64_t few) {
    const float* x = laid + top * s.laid();
    auto part = [&](int64_t p) {
      int64_t scales = p * s.groups * kPanel;
      return Matrix{m.words + p * s.words * kPanel, m.scale + scales, m.zero ? m.zero + scales : nullptr};
    };
    float* own_y = y + top * s.n();
    if (count < kWidenedFrom) {
      blocks_of_rows(count, [&](auto constant, int64_t b) {
        constexpr int B = decltype(constant)::value, P = kAtOnce<B>;
        for (int64_t p = from; p < from + few; p += P)
          few_rows<B, P, kGroup>(s, x + b * s.laid(), part(p), std::min<int64_t>(P, from + few - p),
                                 own_y + b * s.n() + p * kPanel);
      });
      return;
    }
    for (int64_t p = from; p < from + few; ++p) many_rows<kGroup>(s, x, count, part(p), own_y + p * kPanel);
  });
}

}  // namespace

// x [t, k], words [n / 16, ceil(k / 8), 16], scale [n / 16, ceil(k / group), 16], zero the same as (8 + zero) / 8 or [0]
// -> y [t, n] = x (q - zero) scale, and x as it was laid out; with sizes [e] each row, sorted by group, with the matrix of
// its group, of which there are e one after the other.
static ffi::Error Int4PanelProduct(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::U32> words,
                                   ffi::Buffer<ffi::BF16> scale, ffi::Buffer<ffi::BF16> zero,
                                   ffi::Buffer<ffi::S32> sizes, ffi::ResultBuffer<ffi::F32> y,
                                   ffi::ResultBuffer<ffi::F32> laid, int64_t group) {
  if (group != 32 && group != 128) return ffi::Error::InvalidArgument("int4_panel_product: groups of 32 or 128");
  if (x.dimensions()[0] == 0) return ffi::Error::Success();
  auto shape = words.dimensions();
  int64_t rows = x.dimensions()[0], k = x.dimensions()[1], last = shape.size() - 3;
  Int4 s{rows, shape[last + 1], scale.dimensions()[last + 1], shape[last]};
  const auto* scales = reinterpret_cast<const Bf16*>(scale.untyped_data());
  const auto* zeros = given(zero) ? reinterpret_cast<const Bf16*>(zero.untyped_data()) : nullptr;
  const float* from = x.typed_data();
  float *to = laid->typed_data(), *yp = y->typed_data();
  deal(pool, (rows + kLaidAtOnce - 1) / kLaidAtOnce, [=](int64_t i) {
    for (int64_t b = i * kLaidAtOnce; b < std::min(rows, (i + 1) * kLaidAtOnce); ++b)
      lay_out(from + b * k, k, group, s, to + b * s.laid());
  });
  auto one = [&](int64_t g, int64_t start, int64_t own) {
    Int4 part{own, s.words, s.groups, s.panels};
    int64_t at = g * s.n() * s.groups;
    Matrix m{words.typed_data() + g * s.n() * s.words, scales + at, zeros ? zeros + at : nullptr};
    if (group == 32)
      int4_product<32>(pool, part, to + start * s.laid(), m, yp + start * s.n());
    else
      int4_product<128>(pool, part, to + start * s.laid(), m, yp + start * s.n());
  };
  if (given(sizes))
    each_group(sizes.typed_data(), shape[0], rows, s.n(), yp, one);
  else
    one(0, 0, rows);
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(int4_panel_product, Int4PanelProduct,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("group"));
