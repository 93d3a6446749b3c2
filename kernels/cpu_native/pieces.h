// What the operations share: vectors as wide as the processor's, products of few rows, and work dealt out on XLA's own
// threads.

#ifndef MAXSTACK_PIECES_H_
#define MAXSTACK_PIECES_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <thread>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
typedef float Vec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

struct Bf16 {
  uint16_t bits;
};

inline float value_of(float x) { return x; }
inline float value_of(int8_t x) { return x; }
inline float value_of(Bf16 x) {
  uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

// Whether an array that may be left out is there: a number stands for none.
template <typename Buffer>
inline bool given(const Buffer& array) {
  return array.dimensions().size() > 0;
}

// kLanes int8 as int32.
inline Ints ints(const int8_t* p) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  Ints v;
  for (int i = 0; i < kLanes; ++i) v[i] = p[i];
  return v;
#endif
}

inline Vec converted(Ints v) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtepi32_ps((__m512i)v);
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtepi32_ps((__m256i)v);
#else
  return (Vec)__builtin_convertvector(v, Vec);
#endif
}

// kLanes numbers as float.
inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline Vec load(const int8_t* p) { return converted(ints(p)); }
inline Vec load(const Bf16* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
#elif defined(__AVX2__)
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16);
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = value_of(p[i]);
  return v;
#endif
}

inline void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }

// a b + c. Not left to the compiler, which may take an addition apart under -ffast-math.
inline Vec add_product(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// 2^n of whole n, as the float whose bits they are.
inline Vec power(Ints n) { return (Vec)((n + 127) << 23); }

// e^x, of nan nan. Polynomial of Cephes, within 2 units of the last place; 0 below the least normal number.
inline Vec exponential(Vec x) {
  const Vec least = Vec{} - 87.3f, most = Vec{} + 88.7f, magic = Vec{} + 12582912.0f;
  Vec clipped = x < least ? least : x;
  clipped = clipped > most ? most : clipped;
  Vec shifted = add_product(clipped, Vec{} + 1.44269504088896341f, magic), n = shifted - magic;
  Vec r = add_product(n, Vec{} - 0.693359375f, clipped);
  r = add_product(n, Vec{} + 2.12194440e-4f, r);
  Vec p = Vec{} + 1.9875691500e-4f;
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = add_product(p, r, Vec{} + c);
  p = add_product(p * r, r, r) + 1.0f;
  Vec e = p * power((Ints)shifted - (Ints)magic);
  return x < least ? Vec{} : e;
}

constexpr float kHidden = -std::numeric_limits<float>::infinity();  // the logit of a key that is not seen

inline float finite(float top) { return top == kHidden ? 0.0f : top; }

inline Vec hyperbolic_tangent(Vec x) {
  Vec size = x < Vec{} ? -x : x, square = x * x, p = Vec{} - 5.70498872745e-3f;
  for (float c : {2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f})
    p = add_product(p, square, Vec{} + c);
  Vec small = add_product(p * square, x, x);
  Vec large = 1.0f - 2.0f / (exponential(size + size) + 1.0f);
  large = x < Vec{} ? -large : large;
  return size < Vec{} + 0.625f ? small : large;
}

#if defined(__AVX2__)
inline __m256 folded(Vec v) {
#if defined(__AVX512F__)
  __m512d wide = _mm512_castps_pd((__m512)v);
  return _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm256_castpd_ps(_mm512_extractf64x4_pd(wide, 1)));
#else
  return (__m256)v;
#endif
}
#endif

// The sums of four vectors, each in the same order.
inline void sums(Vec a, Vec b, Vec c, Vec d, float* to) {
#if defined(__AVX2__)
  __m256 ab = _mm256_hadd_ps(folded(a), folded(b)), cd = _mm256_hadd_ps(folded(c), folded(d));
  __m256 all = _mm256_hadd_ps(ab, cd);
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
#else
  Vec from[4] = {a, b, c, d};
  for (int i = 0; i < 4; ++i)
    for (int step = kLanes / 2; step > 0; step /= 2) {
      for (int j = 0; j < step; ++j) from[i][j] += from[i][j + step];
      to[i] = from[i][0];
    }
#endif
}

inline float sum(Vec v) {
  float four[4];
  sums(v, v, v, v, four);
  return four[0];
}

// The sums of R vectors, each in that order.
template <int R>
inline void sums_of(const Vec (&from)[R], float* to) {
  if constexpr (R >= 4)
    for (int r = 0; r < R; r += 4) sums(from[r], from[r + 1], from[r + 2], from[r + 3], to + r);
  else
    for (int r = 0; r < R; ++r) to[r] = sum(from[r]);
}

#if defined(__AVX512F__)
// Of eight at once: halves are added, then neighbours, pairs, and fours, as above.
inline void sums_of(const Vec (&from)[8], float* to) {
  __m512 half[4], pairs[2];
  for (int i = 0; i < 4; ++i) {
    __m512 a = (__m512)from[i], b = (__m512)from[i + 4];
    half[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }
  auto neighbours = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
  };
  for (int i = 0; i < 2; ++i) pairs[i] = neighbours(half[2 * i], half[2 * i + 1]);
  __m512 fours = neighbours(pairs[0], pairs[1]);
  __m512 all = _mm512_add_ps(_mm512_shuffle_f32x4(fours, fours, 0x08), _mm512_shuffle_f32x4(fours, fours, 0x0d));
  _mm256_storeu_ps(to, _mm512_castps512_ps256(all));
}
#endif

// Adds to `acc` the products of B rows of x and R rows of w, lane by lane, as far as whole vectors of the `k` numbers
// go. Returns how far.
template <int B, int R, typename W>
inline int64_t add_products(const float* x, int64_t x_stride, const W* w, int64_t w_stride, int64_t k,
                            Vec (&acc)[B][R]) {
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) {
    Vec part[B];
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) part[b] = load(x + b * x_stride + i);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Vec row = load(w + r * w_stride + i);
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) acc[b][r] = add_product(part[b], row, acc[b][r]);
    }
  }
  return i;
}

// Runs piece(0) ... piece(pieces - 1), each once, on this thread and those of the pool that are free.
template <typename Piece>
void deal(ffi::ThreadPool& pool, int64_t pieces, Piece piece) {
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto shared = std::make_shared<Shared>();
  auto work = [shared, pieces, piece] {
    for (int64_t i; (i = shared->next.fetch_add(1)) < pieces;) {
      piece(i);
      shared->done.fetch_add(1);
    }
  };
  int64_t threads = std::min<int64_t>(pool.num_threads(), pieces);
  for (int64_t t = 1; t < threads; ++t) pool.Schedule([work] { work(); });
  work();
  // A late thread finds no piece left and touches nothing but the counters, which it shares.
  for (int turns = 0; shared->done.load() < pieces; ++turns) {
    if (turns > 1000) std::this_thread::yield();
  }
}

// product(group, first row, rows) of each group that has rows; rows of no group give 0.
template <typename Product>
void each_group(const int32_t* sizes, int64_t groups, int64_t rows, int64_t n, float* y, Product product) {
  int64_t start = 0;
  for (int64_t g = 0; g < groups; ++g) {
    int64_t own = std::clamp<int64_t>(sizes[g], 0, rows - start);
    if (own > 0) product(g, start, own);
    start += own;
  }
  std::fill(y + start * n, y + rows * n, 0.0f);
}

// y[b, r] = scale[r] sum x[b] w[r] for B rows of x and R rows of w; no scale: 1.
template <int B, int R, typename W>
inline void tile(const float* x, const W* w, const float* scale, float* y, int64_t k, int64_t n) {
  Vec acc[B][R] = {};
  int64_t end = add_products(x, k, w, k, k, acc);
  for (int b = 0; b < B; ++b)
    for (int r = 0; r < R; ++r) {
      float s = sum(acc[b][r]);
      for (int64_t i = end; i < k; ++i) s += x[b * k + i] * value_of(w[r * k + i]);
      y[b * n + r] = scale ? s * scale[r] : s;
    }
}

template <int R, typename W>
void columns(const float* x, const W* w, const float* scale, float* y, int64_t rows, int64_t k, int64_t n) {
  int64_t b = 0;
  for (; b + 4 <= rows; b += 4) tile<4, R>(x + b * k, w, scale, y + b * n, k, n);
  for (; b + 2 <= rows; b += 2) tile<2, R>(x + b * k, w, scale, y + b * n, k, n);
  for (; b < rows; ++b) tile<1, R>(x + b * k, w, scale, y + b * n, k, n);
}

// y [rows, n] = x [rows, k] w^T [n, k], each row of w times its scale if there are any. Each row of w is loaded once
// for all rows of x, as pieces of `piece_bytes` are small enough to stay in a cache.
template <typename W>
void few_rows(ffi::ThreadPool& pool, const float* x, const W* w, const float* scale, float* y, int64_t rows, int64_t k,
              int64_t n, int64_t piece_bytes) {
  int64_t row_bytes = std::max<int64_t>(1, k * sizeof(W));
  int64_t block = std::max<int64_t>(4, piece_bytes / row_bytes / 4 * 4), pieces = (n + block - 1) / block;
  deal(pool, pieces, [=](int64_t i) {
    int64_t o = i * block, end = std::min(n, o + block);
    auto at = [&](int64_t r) { return scale ? scale + r : nullptr; };
    if (rows == 1)
      for (; o + 4 <= end; o += 4) columns<4>(x, w + o * k, at(o), y + o, rows, k, n);
    for (; o + 2 <= end; o += 2) columns<2>(x, w + o * k, at(o), y + o, rows, k, n);
    for (; o < end; ++o) columns<1>(x, w + o * k, at(o), y + o, rows, k, n);
  });
}

}  // namespace

#endif  // MAXSTACK_PIECES_H_
