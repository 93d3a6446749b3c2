// Softmax attention of whole sequences, forward and backward, in blocks: rows of queries (the heads that share a kv head
// side by side) against blocks of keys. Blocks that no query sees are skipped, row of the batch by row.
//
// Forward and backward follow FlashAttention-2 (Dao 2023, arXiv:2307.08691). Every sum has one order, set by the shapes
// alone: a query's result is the same to the last bit in any company and on any number of threads, and gradients repeat.
// This file is therefore compiled without -ffast-math.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "attention.h"

namespace {

// One thread's memory: rows of queries and of what they get, and two tiles of logits.
struct Desk {
  std::vector<float> held;
  float *queries, *dqueries;  // [rows, deep]
  float* out;                 // [rows, wide]; in the backward pass the gradients of that
  float *logits, *dlogits;    // [rows, kKeys]
  float *top, *total;         // [rows]
  explicit Desk(const Call& c) {
    int64_t rows = c.rows(), steps[] = {c.deep(), c.deep(), c.wide(), kKeys, kKeys, 1, 1}, all = 0;
    for (int64_t step : steps) all += rows * step;
    held.resize(all);
    float *at = held.data(), **each[] = {&queries, &dqueries, &out, &logits, &dlogits, &top, &total};
    for (int i = 0; i < 7; ++i) *each[i] = at, at += rows * steps[i];
  }
};

// Rows of block i among [b, t, n, size], each `step` floats here, times `scale`.
template <typename T>
void lay_rows(const Call& c, const T* from, int64_t b, int64_t k, int64_t i, int64_t size, int64_t step, float scale,
              float* to) {
  for (int64_t m = 0; m < c.rows_of(i); ++m, to += step) {
    const T* row = from + c.row_at(b, k, i, m) * size;
    for (int64_t d = 0; d < size; ++d) to[d] = value_of(row[d]) * scale;
    std::fill(to + size, to + step, 0.0f);
  }
}

template <typename T>
void put_rows(const Call& c, const float* from, int64_t b, int64_t k, int64_t i, int64_t size, int64_t step,
              float scale, T* to) {
  for (int64_t m = 0; m < c.rows_of(i); ++m, from += step) {
    T* row = to + c.row_at(b, k, i, m) * size;
    for (int64_t d = 0; d < size; ++d) put(row + d, from[d] * scale);
  }
}

// Logits of the rows of block i with the keys of block j; hidden ones are -inf.
void logits_of(const Call& c, const Sight& sight, const Desk& desk, const float* keys, int64_t b, int64_t i, int64_t j) {
  int64_t rows = c.rows_of(i);
  for (int64_t s = 0; s < kKeys; s += kColumns)
    product(desk.queries, c.deep(), 1, rows, keys + s * c.size, kColumns, kColumns, c.size, desk.logits + s, kKeys,
            false);
  bool whole = sight.of(b, i, j) == Sight::kAll;
  for (int64_t m = 0; m < rows && (c.softcap > 0 || !whole); ++m) {
    float* row = desk.logits + m * kKeys;
    for (int64_t s = 0; s < kKeys && c.softcap > 0; s += kLanes)
      store(row + s, c.softcap * hyperbolic_tangent(load(row + s) / c.softcap));
    if (!whole) sight.hide(b, i * c.queries_a_block() + m / c.group, j, row);
  }
}

// A row's logits become weights; what it got from earlier keys is brought to the same largest logit.
void weigh(const Call& c, float* row, float* out, float* top, float* total) {
  Vec most = load(row);
  for (int64_t s = kLanes; s < kKeys; s += kLanes) {
    Vec next = load(row + s);
    most = next > most ? next : most;
  }
  float largest = *top;
  for (int l = 0; l < kLanes; ++l) largest = std::max(largest, most[l]);
  if (largest != *top) {
    float keep = exponential(Vec{} + (*top - largest))[0];
    for (int64_t w = 0; w < c.wide(); w += kLanes) store(out + w, load(out + w) * keep);
    *total *= keep;
    *top = largest;
  }
  Vec all = {}, least = Vec{} + finite(largest);
  for (int64_t s = 0; s < kKeys; s += kLanes) {
    Vec weights = exponential(load(row + s) - least);
    all += weights;
    store(row + s, weights);
  }
  *total += sum(all);
}

template <typename T>
void attend_block(const Call& c, const Sight& sight, const Packed& packed, const T* q, int64_t b, int64_t k, int64_t i,
                  T* y, float* lse) {
  Desk desk(c);
  int64_t rows = c.rows_of(i);
  std::fill_n(desk.top, rows, kHidden);
  lay_rows(c, q, b, k, i, c.size, c.deep(), c.scale, desk.queries);
  for (int64_t j = 0; j < c.key_blocks(); ++j) {
    if (sight.of(b, i, j) == Sight::kNothing) continue;
    logits_of(c, sight, desk, packed.keys_across(b, k, j), b, i, j);
    for (int64_t m = 0; m < rows; ++m)
      weigh(c, desk.logits + m * kKeys, desk.out + m * c.wide(), desk.top + m, desk.total + m);
    product(desk.logits, kKeys, 1, rows, packed.along(b, k, j), c.wide(), c.wide(), packed.count(j), desk.out, c.wide(),
            true);
  }
  for (int64_t m = 0; m < rows; ++m) {
    bool nothing = desk.total[m] == 0;
    float share = nothing ? 0 : 1 / desk.total[m];
    for (int64_t w = 0; w < c.width; ++w) desk.out[m * c.wide() + w] *= share;
    lse[c.row_at(b, k, i, m)] = nothing ? kHidden : desk.top[m] + std::log(desk.total[m]);
  }
  put_rows(c, desk.out, b, k, i, c.width, c.wide(), 1, y);
}

template <typename T>
void attend(ffi::ThreadPool& pool, const Call& c, const Sight& sight, const T* q, const T* keys, const T* values, T* y,
            float* lse) {
  Packed packed(c, false);
  packed.fill(pool, keys, values);
  int64_t blocks = c.query_blocks(), pairs = c.batch * c.kv;
  deal(pool, pairs * blocks, [&](int64_t piece) {
    int64_t pair = piece % pairs, i = blocks - 1 - piece / pairs;  // later blocks see more: they begin
    attend_block(c, sight, packed, q, pair / c.kv, pair % c.kv, i, y, lse);
  });
}

template <typename T>
struct Arrays {
  const T *q, *keys, *values, *dout;
  const float *lse, *delta;
  T *dq, *dk, *dv;
};

// Weights, and the gradients of logits over the scale, of a row with a block of keys.
void row_gradients(const Call& c, float* logits, float* dlogits, float lse, float delta) {
  for (int64_t s = 0; s < kKeys; s += kLanes) {
    Vec logit = load(logits + s), weight = exponential(logit - lse), change = weight * (load(dlogits + s) - delta);
    if (c.softcap > 0) {
      Vec share = logit / c.softcap;
      change = logit == Vec{} + kHidden ? Vec{} : change * (1.0f - share * share);
    }
    store(logits + s, weight);
    store(dlogits + s, change);
  }
}

// Block i of queries against block j of keys: adds to the gradients of both.
template <typename T>
void add_gradients(const Call& c, const Sight& sight, const Packed& packed, const Arrays<T>& a, const Desk& desk,
                   int64_t b, int64_t k, int64_t i, int64_t j, float* dk, float* dv) {
  int64_t rows = c.rows_of(i), count = packed.count(j);
  logits_of(c, sight, desk, packed.keys_across(b, k, j), b, i, j);
  for (int64_t s = 0; s < kKeys; s += kColumns)
    product(desk.out, c.wide(), 1, rows, packed.values_across(b, k, j) + s * c.width, kColumns, kColumns, c.width,
            desk.dlogits + s, kKeys, false);
  for (int64_t m = 0; m < rows; ++m) {
    int64_t at = c.row_at(b, k, i, m);
    row_gradients(c, desk.logits + m * kKeys, desk.dlogits + m * kKeys, a.lse[at], a.delta[at]);
  }
  product(desk.dlogits, kKeys, 1, rows, packed.along(b, k, j), c.deep(), c.deep(), count, desk.dqueries, c.deep(), true);
  product(desk.logits, 1, kKeys, count, desk.out, c.wide(), c.wide(), rows, dv, c.wide(), true);
  product(desk.dlogits, 1, kKeys, count, desk.queries, c.deep(), c.deep(), rows, dk, c.deep(), true);
}

// Gradients of the keys and values of blocks [first, last), and what these give to those of the queries.
template <typename T>
void part_gradients(const Call& c, const Sight& sight, const Packed& packed, const Arrays<T>& a, int64_t b, int64_t k,
                    int64_t first, int64_t last, float* dq) {
  Desk desk(c);
  int64_t keys = (last - first) * kKeys;
  std::vector<float> held(keys * (c.deep() + c.wide()));
  float *dk = held.data(), *dv = dk + keys * c.deep();
  for (int64_t i = 0; i < c.query_blocks(); ++i) {
    if (!sight.sees(b, i, first, last)) continue;
    std::fill_n(desk.dqueries, c.rows_of(i) * c.deep(), 0.0f);
    lay_rows(c, a.q, b, k, i, c.size, c.deep(), c.scale, desk.queries);
    lay_rows(c, a.dout, b, k, i, c.width, c.wide(), 1, desk.out);
    for (int64_t j = first; j < last; ++j)
      if (sight.of(b, i, j) != Sight::kNothing)
        add_gradients(c, sight, packed, a, desk, b, k, i, j, dk + (j - first) * kKeys * c.deep(),
                      dv + (j - first) * kKeys * c.wide());
    put_rows(c, desk.dqueries, b, k, i, c.size, c.deep(), c.scale, dq);
  }
  for (int64_t s = 0; s < std::min(keys, c.keys - first * kKeys); ++s) {
    int64_t at = (b * c.keys + first * kKeys + s) * c.kv + k;
    for (int64_t d = 0; d < c.size; ++d) put(a.dk + at * c.size + d, dk[s * c.deep() + d]);
    for (int64_t w = 0; w < c.width; ++w) put(a.dv + at * c.width + w, dv[s * c.wide() + w]);
  }
}

template <typename T>
void attend_backward(ffi::ThreadPool& pool, const Call& c, const Sight& sight, const Arrays<T>& a) {
  Packed packed(c, true);
  packed.fill(pool, a.keys, a.values);
  // The keys are dealt out in parts, as many as the shapes tell; what parts give to the queries is added in order. A
  // part writes where queries see it, and memory that nobody writes need not be there.
  int64_t blocks = c.key_blocks(), each = std::max(kPartKeys / kKeys, blocks_of(blocks, kMostParts));
  int64_t parts = blocks_of(blocks, each), pairs = c.batch * c.kv, all = c.batch * c.queries * c.heads() * c.size;
  std::unique_ptr<float[]> dq(new float[parts * all]);
  deal(pool, parts * pairs, [&](int64_t piece) {
    int64_t pair = piece % pairs, part = piece / pairs;
    part_gradients(c, sight, packed, a, pair / c.kv, pair % c.kv, part * each, std::min(blocks, (part + 1) * each),
                   dq.get() + part * all);
  });
  deal(pool, c.query_blocks() * pairs, [&](int64_t piece) {
    int64_t i = piece / pairs, b = piece % pairs / c.kv, k = piece % c.kv, floats = c.rows_of(i) * c.size;
    std::vector<float> total(floats), more(floats);
    for (int64_t part = 0; part < parts; ++part) {
      if (!sight.sees(b, i, part * each, std::min(blocks, (part + 1) * each))) continue;
      lay_rows(c, dq.get() + part * all, b, k, i, c.size, c.size, 1, more.data());
      for (int64_t n = 0; n < floats; ++n) total[n] += more[n];
    }
    put_rows(c, total.data(), b, k, i, c.size, c.size, 1, a.dq);
  });
}

Call call_of(ffi::AnyBuffer q, ffi::AnyBuffer keys, ffi::AnyBuffer values, bool causal, float scale, float softcap,
             int64_t window) {
  auto qd = q.dimensions(), kd = keys.dimensions();
  int64_t width = values.dimensions()[3];
  return {qd[0], qd[1], kd[1], kd[2], qd[2] / kd[2], qd[3], width, window, scale, softcap, causal};
}

template <typename T>
T* numbers(ffi::AnyBuffer buffer) {
  return static_cast<T*>(buffer.untyped_data());
}

}  // namespace

// q [b, t, n, h], keys [b, s, k, h], values [b, s, k, w] in float32 or bfloat16; segments and positions [b, t], [b, s]
// or none: one document, indices. -> y [b, t, n, w], lse [b, t, n]
static ffi::Error Attention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                            Ids q_segments, Ids kv_segments, Ids q_positions, Ids kv_positions,
                            ffi::Result<ffi::AnyBuffer> y, ffi::ResultBuffer<ffi::F32> lse, bool causal, float scale,
                            float softcap, int64_t window) {
  Call c = call_of(q, keys, values, causal, scale, softcap, window);
  Sight sight(c, q_segments, kv_segments, q_positions, kv_positions);
  auto run = [&](auto one) {
    using T = decltype(one);
    attend(pool, c, sight, numbers<T>(q), numbers<T>(keys), numbers<T>(values), numbers<T>(*y), lse->typed_data());
  };
  if (q.element_type() == ffi::F32)
    run(float{});
  else
    run(Bf16{});
  return ffi::Error::Success();
}

// The same with dout [b, t, n, w], lse and delta [b, t, n] -> the gradients of q, keys and values. lse is inf for a query
// that saw nothing.
static ffi::Error AttentionBackward(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                                    Ids q_segments, Ids kv_segments, Ids q_positions, Ids kv_positions,
                                    ffi::AnyBuffer dout, ffi::Buffer<ffi::F32> lse, ffi::Buffer<ffi::F32> delta,
                                    ffi::Result<ffi::AnyBuffer> dq, ffi::Result<ffi::AnyBuffer> dk,
                                    ffi::Result<ffi::AnyBuffer> dv, bool causal, float scale, float softcap,
                                    int64_t window) {
  Call c = call_of(q, keys, values, causal, scale, softcap, window);
  Sight sight(c, q_segments, kv_segments, q_positions, kv_positions);
  auto run = [&](auto one) {
    using T = decltype(one);
    Arrays<T> a{numbers<T>(q),   numbers<T>(keys), numbers<T>(values), numbers<T>(dout), lse.typed_data(),
                delta.typed_data(), numbers<T>(*dq), numbers<T>(*dk),  numbers<T>(*dv)};
    attend_backward(pool, c, sight, a);
  };
  if (q.element_type() == ffi::F32)
    run(float{});
  else
    run(Bf16{});
  return ffi::Error::Success();
}

#define MAXSTACK_ARRAYS           \
  ffi::Ffi::Bind()                \
      .Ctx<ffi::ThreadPool>()     \
      .Arg<ffi::AnyBuffer>()      \
      .Arg<ffi::AnyBuffer>()      \
      .Arg<ffi::AnyBuffer>()      \
      .Arg<Ids>()                 \
      .Arg<Ids>()                 \
      .Arg<Ids>()                 \
      .Arg<Ids>()

XLA_FFI_DEFINE_HANDLER_SYMBOL(attention, Attention,
                              MAXSTACK_ARRAYS.Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<bool>("causal")
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Attr<int64_t>("window"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(attention_backward, AttentionBackward,
                              MAXSTACK_ARRAYS.Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<bool>("causal")
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Attr<int64_t>("window"));
