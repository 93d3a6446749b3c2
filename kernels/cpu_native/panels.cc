// Any number of float32 rows times a matrix that lies in panels of sixteen outputs: [n / 16, k, 16], float32 or bfloat16.
//
// Each output is summed over runs of k one after the other, whatever the number of rows: a row's result is the same in
// any company. Few rows are read at the speed of memory; many at that of the multipliers, with a panel of bfloat16 widened
// once for all of them.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "pieces.h"

namespace {

constexpr int kPanel = 16, kVecs = kPanel / kLanes;
constexpr int kMostRows = 12 / kVecs;       // of a tile: twelve sums stay in registers
constexpr int64_t kRun = 512;               // inputs summed at once: a widened panel of them stays in the first cache
constexpr int64_t kPieceBytes = 1 << 17;    // of weights: some tens of microseconds
constexpr int64_t kPieceRows = 96;          // of x, where panels alone are too few pieces
constexpr int64_t kAhead = 1024;            // bytes that are fetched before they are needed
constexpr int64_t kWidenedFrom = 13;        // rows from which widening a panel once pays

inline Vec spread(float x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (Vec)_mm256_set1_ps(x);
#else
  return Vec{} + x;
#endif
}

inline void keep(float* y, Vec sum, bool first) { store(y, first ? sum : load(y) + sum); }

// y [B, 16] = or += x [B, k] w [k, 16], for one run. Unrolled, or the compiler keeps the sums in memory.
template <int B, typename W>
inline void block(const float* x, int64_t x_stride, const W* w, int64_t k, float* y, int64_t y_stride, bool first,
                  bool fetch) {
  Vec acc[B][kVecs];
#pragma GCC unroll 16
  for (int b = 0; b < B; ++b)
#pragma GCC unroll 16
    for (int v = 0; v < kVecs; ++v) acc[b][v] = Vec{};
  for (int64_t i = 0; i < k; ++i) {
    if (fetch) __builtin_prefetch(reinterpret_cast<const char*>(w + i * kPanel) + kAhead);
    Vec column[kVecs];
#pragma GCC unroll 16
    for (int v = 0; v < kVecs; ++v) column[v] = load(w + i * kPanel + v * kLanes);
#pragma GCC unroll 16
    for (int b = 0; b < B; ++b) {
      Vec one = spread(x[b * x_stride + i]);
#pragma GCC unroll 16
      for (int v = 0; v < kVecs; ++v) acc[b][v] = add_product(one, column[v], acc[b][v]);
    }
  }
#pragma GCC unroll 16
  for (int b = 0; b < B; ++b)
#pragma GCC unroll 16
    for (int v = 0; v < kVecs; ++v) keep(y + b * y_stride + v * kLanes, acc[b][v], first);
}

template <int B, typename... Arguments>
inline void block_of(int64_t rows, Arguments... arguments) {
  if (rows == B)
    block<B>(arguments...);
  else if constexpr (B > 1)
    block_of<B - 1>(rows, arguments...);
}

// All rows of x with one panel, in blocks as even as can be.
template <typename W>
void all_rows(const float* x, int64_t x_stride, const W* w, int64_t k, float* y, int64_t y_stride, int64_t rows,
              bool first) {
  int64_t blocks = (rows + kMostRows - 1) / kMostRows, size = rows / blocks, larger = rows % blocks;
  for (int64_t i = 0, b = 0; i < blocks; ++i) {
    int64_t own = size + (i < larger);
    block_of<kMostRows>(own, x + b * x_stride, x_stride, w, k, y + b * y_stride, y_stride, first, i == 0);
    b += own;
  }
}

// One row with up to four panels: as many streams from memory.
template <typename W>
void one_row(const float* x, const W* w, int64_t k, float* y, int64_t panels) {
  const W* own[4];
  for (int64_t j = 0; j < 4; ++j) own[j] = w + std::min(j, panels - 1) * k * kPanel;
  for (int64_t from = 0; from < k; from += kRun) {
    Vec acc[4][kVecs] = {};
    for (int64_t i = from; i < std::min(k, from + kRun); ++i) {
      Vec one = spread(x[i]);
#pragma GCC unroll 16
      for (int j = 0; j < 4; ++j)
#pragma GCC unroll 16
        for (int v = 0; v < kVecs; ++v)
          acc[j][v] = add_product(one, load(own[j] + i * kPanel + v * kLanes), acc[j][v]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      if (j < panels)
#pragma GCC unroll 16
        for (int v = 0; v < kVecs; ++v) keep(y + j * kPanel + v * kLanes, acc[j][v], from == 0);
  }
}

template <typename W>
void panels_product(ffi::ThreadPool& pool, const float* x, const W* w, float* y, int64_t rows, int64_t k,
                    int64_t panels) {
  int64_t n = panels * kPanel;
  int64_t few = std::max<int64_t>(4, kPieceBytes / std::max<int64_t>(1, k * kPanel * sizeof(W)));
  int64_t across = (panels + few - 1) / few;
  int64_t down = across >= 4 * pool.num_threads() ? 1 : (rows + kPieceRows - 1) / kPieceRows;
  int64_t tall = (rows + down - 1) / std::max<int64_t>(1, down);
  deal(pool, across * down, [=](int64_t piece) {
    int64_t top = piece / across * tall, count = std::min(rows - top, tall);
    int64_t p = piece % across * few, end = std::min(panels, p + few);
    if (rows == 1) {
      for (; p < end; p += 4) one_row(x, w + p * k * kPanel, k, y + p * kPanel, std::min<int64_t>(4, end - p));
      return;
    }
    static thread_local std::vector<float> wide;
    for (; p < end; ++p)
      for (int64_t i = 0; i < k; i += kRun) {
        int64_t run = std::min(kRun, k - i);
        const W* own = w + (p * k + i) * kPanel;
        const float* from = x + top * k + i;
        float* to = y + top * n + p * kPanel;
        if (std::is_same_v<W, float> || count < kWidenedFrom) {
          all_rows(from, k, own, run, to, n, count, i == 0);
          continue;
        }
        wide.resize(kRun * kPanel);
        for (int64_t e = 0; e < run * kPanel; e += kLanes) store(wide.data() + e, load(own + e));
        all_rows<float>(from, k, wide.data(), run, to, n, count, i == 0);
      }
  });
}

}  // namespace

// x [t, k], the `which` th of the matrices w [.., n / 16, k, 16] -> y [t, n] = x w
static ffi::Error product_with(ffi::ThreadPool& pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer w, int64_t which,
                               ffi::ResultBuffer<ffi::F32> y) {
  int64_t rows = x.dimensions()[0], k = x.dimensions()[1], panels = w.dimensions()[w.dimensions().size() - 3];
  if (rows == 0 || k == 0) {
    std::fill_n(y->typed_data(), y->element_count(), 0.0f);
    return ffi::Error::Success();
  }
  int64_t before = which * panels * k * kPanel;
  if (w.element_type() == ffi::F32)
    panels_product(pool, x.typed_data(), w.typed_data<float>() + before, y->typed_data(), rows, k, panels);
  else
    panels_product(pool, x.typed_data(), static_cast<const Bf16*>(w.untyped_data()) + before, y->typed_data(), rows, k,
                   panels);
  return ffi::Error::Success();
}

static ffi::Error PanelProduct(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer w,
                               ffi::ResultBuffer<ffi::F32> y) {
  return product_with(pool, x, w, 0, y);
}

// The same with one of many matrices, which are not copied: w [l, n / 16, k, 16], at [].
static ffi::Error PanelProductAt(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer w,
                                 ffi::Buffer<ffi::S32> at, ffi::ResultBuffer<ffi::F32> y) {
  int64_t which = at.typed_data()[0];
  if (which < 0 || which >= w.dimensions()[0]) return ffi::Error::InvalidArgument("there is no such matrix");
  return product_with(pool, x, w, which, y);
}

// x [t, n] -> y [t], the sum of each row, in one order whatever the number of rows.
static ffi::Error RowSums(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::ResultBuffer<ffi::F32> y) {
  int64_t rows = x.dimensions()[0], n = x.dimensions()[1];
  const float* from = x.typed_data();
  float* to = y->typed_data();
  int64_t block = std::max<int64_t>(1, kPieceBytes / 4 / std::max<int64_t>(1, n));
  deal(pool, (rows + block - 1) / block, [=](int64_t piece) {
    for (int64_t r = piece * block; r < std::min(rows, (piece + 1) * block); ++r) {
      Vec acc[4] = {};
      int64_t i = 0;
      for (; i + 4 * kLanes <= n; i += 4 * kLanes)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) acc[j] += load(from + r * n + i + j * kLanes);
      float total = sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
      for (; i < n; ++i) total += from[r * n + i];
      to[r] = total;
    }
  });
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    row_sums, RowSums,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::F32>>());

// x [t, n] -> y [t, n] = e^(x - its row's largest), the sums of its rows, and the logarithms of the sums of e^x. The
// vectors of a row are the same whatever the number of rows; a row of -inf alone, or with a nan, gives nans.
static ffi::Error RowExponentials(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::ResultBuffer<ffi::F32> y,
                                  ffi::ResultBuffer<ffi::F32> sums, ffi::ResultBuffer<ffi::F32> lse) {
  int64_t rows = x.dimensions()[0], n = x.dimensions()[1];
  const float* from = x.typed_data();
  float *to = y->typed_data(), *totals = sums->typed_data(), *logs = lse->typed_data();
  deal(pool, rows, [=](int64_t r) {
    const float* row = from + r * n;
    float top = row[0];
    for (int64_t i = 1; i < n; ++i) top = row[i] > top || row[i] != row[i] ? row[i] : top;
    Vec all = {};
    for (int64_t i = 0; i < n; i += kLanes) {
      float held[kLanes];
      int64_t count = std::min<int64_t>(kLanes, n - i);
      for (int64_t l = 0; l < kLanes; ++l) held[l] = l < count ? row[i + l] - top : -std::numeric_limits<float>::infinity();
      Vec e = exponential(load(held));
      all += e;
      store(held, e);
      std::copy(held, held + count, to + r * n + i);
    }
    totals[r] = sum(all);
    logs[r] = top + std::log(totals[r]);
  });
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(row_exponentials, RowExponentials,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

// x [t, d], scale [d] -> y [t, d]: each row over its root mean square, times scale + offset. One order of summing,
// whatever the number of rows.
static ffi::Error RmsNorm(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> scale,
                          ffi::ResultBuffer<ffi::F32> y, float eps, float offset) {
  constexpr int64_t kRows = 32;
  int64_t rows = x.dimensions()[0], d = x.dimensions()[1];
  const float *from = x.typed_data(), *factor = scale.typed_data();
  float* to = y->typed_data();
  deal(pool, (rows + kRows - 1) / kRows, [=](int64_t piece) {
    for (int64_t r = piece * kRows; r < std::min(rows, (piece + 1) * kRows); ++r) {
      const float* row = from + r * d;
      Vec acc[4] = {};
      int64_t i = 0;
      for (; i + 4 * kLanes <= d; i += 4 * kLanes)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) acc[j] = add_product(load(row + i + j * kLanes), load(row + i + j * kLanes), acc[j]);
      float total = sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
      for (; i < d; ++i) total += row[i] * row[i];
      float inverse = 1.0f / std::sqrt(total / d + eps);
      for (int64_t j = 0; j < d; ++j) to[r * d + j] = row[j] * inverse * (factor[j] + offset);
    }
  });
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(rms_norm, RmsNorm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("eps")
                                  .Attr<float>("offset"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(panel_product_at, PanelProductAt,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(panel_product, PanelProduct,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
