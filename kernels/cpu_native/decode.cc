// Attention of one token against a cache in one piece, read at the speed of memory, for float32.
//
// XLA:CPU packs operands first. Here each cached key is loaded once and used for all queries that need it. Work is dealt
// out in pieces on XLA's own threads: whichever thread is free takes the next one.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "pieces.h"

namespace {

struct Heads {
  int64_t slots, group, size, width;
  float scale, softcap;
  float capped(float logit) const { return softcap > 0 ? softcap * std::tanh(logit / softcap) : logit; }
};

// Weighted values of slots [lo, hi) for the `group` queries of one kv head: out [group, width], and for each query the
// largest logit and the sum of weights.
void part(const Heads& h, const float* q, const float* keys, const float* values, int64_t lo, int64_t hi, float* out,
          float* top, float* total) {
  int64_t count = hi - lo;
  std::vector<float> logits(h.group * count);
  for (int64_t s = 0; s < count; ++s) {
    const float* key = keys + (lo + s) * h.size;
    for (int64_t g = 0; g < h.group; ++g) {
      float dot = 0;
      for (int64_t i = 0; i < h.size; ++i) dot += q[g * h.size + i] * key[i];
      logits[g * count + s] = h.capped(dot * h.scale);
    }
  }
  std::fill(out, out + h.group * h.width, 0.0f);
  for (int64_t g = 0; g < h.group; ++g) {
    float* row = logits.data() + g * count;
    float most = row[0], all = 0;
    for (int64_t s = 1; s < count; ++s) most = std::max(most, row[s]);
    for (int64_t s = 0; s < count; ++s) all += row[s] = std::exp(row[s] - most);
    top[g] = most;
    total[g] = all;
  }
  for (int64_t s = 0; s < count; ++s) {
    const float* value = values + (lo + s) * h.width;
    for (int64_t g = 0; g < h.group; ++g) {
      float weight = logits[g * count + s];
      for (int64_t i = 0; i < h.width; ++i) out[g * h.width + i] += weight * value[i];
    }
  }
}

constexpr int64_t kSlotsAPiece = 256;

}  // namespace

// q [b, k, g, h] and the new token's k [b, k, 1, h], v [b, k, 1, w] against keys [b, k, s, h], values [b, k, s, w], of
// which a row's first `lengths` are filled; sinks [k, g], -inf for none; window 0 for none. -> y [b, k, g, w]
static ffi::Error CachedAttention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::F32> new_k,
                                  ffi::Buffer<ffi::F32> new_v, ffi::Buffer<ffi::F32> keys,
                                  ffi::Buffer<ffi::F32> values, ffi::Buffer<ffi::S32> lengths,
                                  ffi::Buffer<ffi::F32> sinks, ffi::ResultBuffer<ffi::F32> y, float scale,
                                  float softcap, int64_t window) {
  auto qd = q.dimensions(), kd = keys.dimensions();
  int64_t kv = qd[1], pairs = qd[0] * kv;
  Heads h{kd[2], qd[2], qd[3], values.dimensions()[3], scale, softcap};
  const float *qp = q.typed_data(), *nk = new_k.typed_data(), *nv = new_v.typed_data();
  const float *kp = keys.typed_data(), *vp = values.typed_data(), *sp = sinks.typed_data();
  const int32_t* lp = lengths.typed_data();
  float* yp = y->typed_data();
  auto range = [=](int64_t pair, int64_t* lo, int64_t* hi) {
    *hi = std::min<int64_t>(lp[pair / kv], h.slots);
    *lo = window > 0 ? std::max<int64_t>(0, lp[pair / kv] - window + 1) : 0;
  };
  struct Piece {
    int64_t pair, lo, hi;
  };
  auto pieces = std::make_shared<std::vector<Piece>>();
  std::vector<int64_t> first(pairs + 1, 0);
  for (int64_t pair = 0; pair < pairs; ++pair) {
    int64_t lo, hi;
    range(pair, &lo, &hi);
    for (; lo < hi; lo += kSlotsAPiece) pieces->push_back({pair, lo, std::min(hi, lo + kSlotsAPiece)});
    first[pair + 1] = pieces->size();
  }
  int64_t stride = h.group * (h.width + 2), count = pieces->size();
  auto parts = std::make_shared<std::vector<float>>(count * stride);
  deal(pool, count, [=](int64_t i) {
    const Piece& p = (*pieces)[i];
    float* out = parts->data() + i * stride;
    part(h, qp + p.pair * h.group * h.size, kp + p.pair * h.slots * h.size, vp + p.pair * h.slots * h.width, p.lo,
         p.hi, out, out + h.group * h.width, out + h.group * (h.width + 1));
  });
  for (int64_t pair = 0; pair < pairs; ++pair)
    for (int64_t g = 0; g < h.group; ++g) {
      float own = 0, sink = sp[(pair % kv) * h.group + g];
      for (int64_t i = 0; i < h.size; ++i) own += qp[(pair * h.group + g) * h.size + i] * nk[pair * h.size + i];
      own = h.capped(own * scale);
      float top = std::max(own, sink);
      for (int64_t i = first[pair]; i < first[pair + 1]; ++i)
        top = std::max(top, (*parts)[i * stride + h.group * h.width + g]);
      float share = std::exp(own - top), total = share + std::exp(sink - top);
      float* out = yp + (pair * h.group + g) * h.width;
      for (int64_t w = 0; w < h.width; ++w) out[w] = share * nv[pair * h.width + w];
      for (int64_t i = first[pair]; i < first[pair + 1]; ++i) {
        const float* found = parts->data() + i * stride;
        float scaled = std::exp(found[h.group * h.width + g] - top);
        total += scaled * found[h.group * (h.width + 1) + g];
        for (int64_t w = 0; w < h.width; ++w) out[w] += scaled * found[g * h.width + w];
      }
      for (int64_t w = 0; w < h.width; ++w) out[w] /= total;
    }
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(cached_attention, CachedAttention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Attr<int64_t>("window"));
