// Any number of float32 rows times a matrix that lies in panels of sixteen outputs: [n / 16, k, 16], float32, bfloat16,
// or int8 with a scale for each output.
//
// Few rows are read at the speed of memory; many at that of the multipliers, with a panel in fewer bits made float32
// once for all of them.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "panels.h"

namespace {

constexpr int64_t kRun = 512;               // inputs summed at once: a widened panel of them stays in the first cache
constexpr int64_t kPieceBytes = 1 << 17;    // of weights: some tens of microseconds
constexpr int64_t kAhead = 1024;            // bytes that are fetched before they are needed

inline void keep(float* y, Vec sum, bool first) { store(y, first ? sum : load(y) + sum); }

// y [B, 16] of each of P panels = or += x [B, k] w [k, 16], for one run; of the panels, `panels` are there. Unrolled, or
// the compiler keeps the sums in memory.
template <int B, int P, typename W>
inline void block(const float* x, int64_t x_stride, const W* w, int64_t w_stride, int64_t panels, int64_t k, float* y,
                  int64_t y_stride, bool first, bool fetch) {
  const W* own[P];
  for (int64_t p = 0; p < P; ++p) own[p] = w + std::min(p, panels - 1) * w_stride;
  Vec acc[P][B][kVecs];
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 16
    for (int b = 0; b < B; ++b)
#pragma GCC unroll 16
      for (int v = 0; v < kVecs; ++v) acc[p][b][v] = Vec{};
  for (int64_t i = 0; i < k; ++i) {
    if (P == 1 && fetch) __builtin_prefetch(reinterpret_cast<const char*>(own[0] + i * kPanel) + kAhead);
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
      Vec column[kVecs];
#pragma GCC unroll 16
      for (int v = 0; v < kVecs; ++v) column[v] = load(own[p] + i * kPanel + v * kLanes);
#pragma GCC unroll 16
      for (int b = 0; b < B; ++b) {
        Vec one = spread(x[b * x_stride + i]);
#pragma GCC unroll 16
        for (int v = 0; v < kVecs; ++v) acc[p][b][v] = add_product(one, column[v], acc[p][b][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p)
    if (p < panels)
#pragma GCC unroll 16
      for (int b = 0; b < B; ++b)
#pragma GCC unroll 16
        for (int v = 0; v < kVecs; ++v) keep(y + b * y_stride + p * kPanel + v * kLanes, acc[p][b][v], first);
}

template <typename W>
void panels_product(ffi::ThreadPool& pool, const float* x, const W* w, const float* scale, float* y, int64_t rows,
                    int64_t k, int64_t panels) {
  int64_t n = panels * kPanel, bytes = k * kPanel * sizeof(W);
  int64_t piece_bytes = kPieceBytes * sizeof(W) / 4;
  deal_panels(pool, rows, panels, bytes, piece_bytes, [=](int64_t top, int64_t count, int64_t from, int64_t few) {
    const float* own_x = x + top * k;
    float* own_y = y + top * n;
    auto few_rows = [=](auto constant) {
      constexpr int B = decltype(constant)::value, P = kAtOnce<B>;
      for (int64_t p = from; p < from + few; p += P)
        for (int64_t i = 0; i < k; i += kRun)
          block<B, P>(own_x + i, k, w + (p * k + i) * kPanel, k * kPanel, std::min<int64_t>(P, from + few - p),
                      std::min(kRun, k - i), own_y + p * kPanel, n, i == 0, true);
    };
    if (count <= kMostRows) {
      constant_rows<kMostRows>(count, few_rows);
    } else {
      static thread_local std::vector<float> wide;
      wide.resize(kRun * kPanel);
      bool widen = !std::is_same_v<W, float> && count >= kWidenedFrom;
      for (int64_t p = from; p < from + few; ++p)
        for (int64_t i = 0; i < k; i += kRun) {
          int64_t run = std::min(kRun, k - i);
          const W* own = w + (p * k + i) * kPanel;
          for (int64_t e = 0; widen && e < run * kPanel; e += kLanes) store(wide.data() + e, load(own + e));
          blocks_of_rows(count, [&](auto constant, int64_t b) {
            constexpr int B = decltype(constant)::value;
            float* to = own_y + b * n + p * kPanel;
            if (widen)
              block<B, 1>(own_x + b * k + i, k, wide.data(), 0, 1, run, to, n, i == 0, false);
            else
              block<B, 1>(own_x + b * k + i, k, own, 0, 1, run, to, n, i == 0, b == 0);
          });
        }
    }
    for (int64_t b = 0; scale && b < count; ++b)
      for (int64_t o = from * kPanel; o < (from + few) * kPanel; o += kLanes)
        store(own_y + b * n + o, load(own_y + b * n + o) * load(scale + o));
  });
}

}  // namespace

// x [t, k], w [n / 16, k, 16], scale [n] or none -> y [t, n] = x w scale; of several matrices w [e, n / 16, k, 16] the
// `which` th; with sizes [e] each row, sorted by group, with its group's, and scale [e, n].
static ffi::Error product_with(ffi::ThreadPool& pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer w, int64_t which,
                               const float* by, const int32_t* sizes, ffi::ResultBuffer<ffi::F32> y) {
  auto shape = w.dimensions();
  int64_t rows = x.dimensions()[0], k = x.dimensions()[1], panels = shape[shape.size() - 3], n = panels * kPanel;
  if (rows == 0 || k == 0) {
    std::fill_n(y->typed_data(), y->element_count(), 0.0f);
    return ffi::Error::Success();
  }
  const float* xp = x.typed_data();
  float* yp = y->typed_data();
  auto run = [&](const auto* numbers) {
    auto one = [&](int64_t g, int64_t start, int64_t own) {
      panels_product(pool, xp + start * k, numbers + g * n * k, by ? by + g * n : nullptr, yp + start * n, own, k,
                     panels);
    };
    if (sizes)
      each_group(sizes, shape[0], rows, n, yp, one);
    else
      one(which, 0, rows);
  };
  if (w.element_type() == ffi::F32)
    run(w.typed_data<float>());
  else if (w.element_type() == ffi::S8)
    run(w.typed_data<int8_t>());
  else
    run(static_cast<const Bf16*>(w.untyped_data()));
  return ffi::Error::Success();
}

static ffi::Error PanelProduct(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer w,
                               ffi::Buffer<ffi::F32> scale, ffi::Buffer<ffi::S32> sizes,
                               ffi::ResultBuffer<ffi::F32> y) {
  return product_with(pool, x, w, 0, given(scale) ? scale.typed_data() : nullptr,
                      given(sizes) ? sizes.typed_data() : nullptr, y);
}

// The same with one of many matrices, which are not copied: w [l, n / 16, k, 16], at [].
static ffi::Error PanelProductAt(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer w,
                                 ffi::Buffer<ffi::S32> at, ffi::ResultBuffer<ffi::F32> y) {
  int64_t which = at.typed_data()[0];
  if (which < 0 || which >= w.dimensions()[0]) return ffi::Error::InvalidArgument("there is no such matrix");
  return product_with(pool, x, w, which, nullptr, nullptr, y);
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
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
