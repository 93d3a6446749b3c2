// What the operations share: vectors as wide as the processor's, and work dealt out on XLA's own threads.

#ifndef MAXSTACK_PIECES_H_
#define MAXSTACK_PIECES_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
typedef float Vec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }

inline float sum(Vec v) {
  float s = 0;
  for (int i = 0; i < kLanes; ++i) s += v[i];
  return s;
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
  // A late helper finds no piece left and touches nothing but the counters, which it shares.
  for (int turns = 0; shared->done.load() < pieces; ++turns) {
    if (turns > 1000) std::this_thread::yield();
  }
}

}  // namespace

#endif  // MAXSTACK_PIECES_H_
