// Panels of sixteen outputs: any number of rows of x times some of them, each output summed over the inputs in order,
// whatever the number of rows, so that a row's result is the same in any company.

#ifndef MAXSTACK_PANELS_H_
#define MAXSTACK_PANELS_H_

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "pieces.h"

namespace {

constexpr int kPanel = 16, kVecs = kPanel / kLanes;
constexpr int kMostRows = 12 / kVecs;     // of a tile: twelve sums stay in registers
constexpr int64_t kPieceRows = 96;        // of x, where panels alone are too few pieces
constexpr int64_t kWidenedFrom = 13;      // rows from which making a panel float32 once pays

inline Vec spread(float x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (Vec)_mm256_set1_ps(x);
#else
  return Vec{} + x;
#endif
}

// Panels that B rows are multiplied with at once, so that there are sums enough for the multipliers to work on, and
// streams enough from memory.
template <int B>
constexpr int kAtOnce = B <= 2 ? 4 / B : std::max(1, 6 / (B * kVecs));

// run(B) with B, a constant, for as many rows.
template <int B, typename Run>
inline void constant_rows(int64_t rows, Run run) {
  if (rows == B)
    run(std::integral_constant<int, B>{});
  else if constexpr (B > 1)
    constant_rows<B - 1>(rows, run);
}

// run(B, first row) for all rows, in blocks as even as can be.
template <typename Run>
inline void blocks_of_rows(int64_t rows, Run run) {
  if (rows == 0) return;
  int64_t blocks = (rows + kMostRows - 1) / kMostRows, size = rows / blocks, larger = rows % blocks;
  for (int64_t i = 0, b = 0; i < blocks; ++i) {
    int64_t own = size + (i < larger);
    constant_rows<kMostRows>(own, [&](auto count) { run(count, b); });
    b += own;
  }
}

// piece(first row, rows, first panel, panels) of all rows and panels. A panel has `bytes`, and a piece has about
// `piece_bytes` of them.
template <typename Piece>
inline void deal_panels(ffi::ThreadPool& pool, int64_t rows, int64_t panels, int64_t bytes, int64_t piece_bytes,
                        Piece piece) {
  int64_t few = std::max<int64_t>(4, piece_bytes / std::max<int64_t>(1, bytes));
  int64_t across = (panels + few - 1) / few;
  int64_t down = across >= 4 * pool.num_threads() ? 1 : (rows + kPieceRows - 1) / kPieceRows;
  int64_t tall = (rows + down - 1) / std::max<int64_t>(1, down);
  deal(pool, across * down, [=](int64_t i) {
    int64_t top = i / across * tall, p = i % across * few;
    piece(top, std::min(rows - top, tall), p, std::min(panels - p, few));
  });
}

}  // namespace

#endif  // MAXSTACK_PANELS_H_
