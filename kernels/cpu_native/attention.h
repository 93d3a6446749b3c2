// What attention of whole sequences is made of: its shapes, who sees whom, keys and values laid out for products.

#ifndef MAXSTACK_ATTENTION_H_
#define MAXSTACK_ATTENTION_H_

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "panels.h"

namespace {

using Ids = ffi::Buffer<ffi::S32>;

constexpr int64_t kKeys = 64;            // of a block
constexpr int64_t kRows = 96;            // queries times heads of a block, about
constexpr int64_t kColumns = kPanel;     // of a product at once: with more, sums leave the registers
constexpr int64_t kPartKeys = 512;       // least keys whose gradients one thread adds up
constexpr int64_t kMostParts = 4;

inline void put(float* to, float value) { *to = value; }
inline void put(Bf16* to, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  to->bits = value != value ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

constexpr int64_t blocks_of(int64_t n, int64_t block) { return (n + block - 1) / block; }
constexpr int64_t vectors_of(int64_t n) { return blocks_of(n, kLanes) * kLanes; }

struct Call {
  int64_t batch, queries, keys, kv, group, size, width, window;  // window 0: none
  float scale, softcap;                                          // softcap 0: none
  bool causal;
  int64_t heads() const { return kv * group; }
  int64_t deep() const { return vectors_of(size); }   // floats of a row of queries or keys
  int64_t wide() const { return vectors_of(width); }  // of values
  int64_t queries_a_block() const { return std::max<int64_t>(1, kRows / group); }
  int64_t rows() const { return queries_a_block() * group; }
  int64_t query_blocks() const { return blocks_of(queries, queries_a_block()); }
  int64_t key_blocks() const { return blocks_of(keys, kKeys); }
  int64_t rows_of(int64_t i) const { return std::min(rows(), (queries - i * queries_a_block()) * group); }
  // Where a row of block i stands among [b, t, n].
  int64_t row_at(int64_t b, int64_t k, int64_t i, int64_t m) const {
    return (b * queries + i * queries_a_block() + m / group) * heads() + k * group + m % group;
  }
};

// Who sees whom. Of each block least and most are held; positions and segments of keys lie in whole blocks.
class Sight {
 public:
  enum Seen { kNothing, kPart, kAll };

  Sight(const Call& c, Ids q_segments, Ids kv_segments, Ids q_positions, Ids kv_positions)
      : c_(c), packed_(given(q_segments)) {
    lay(q_positions, c.queries, c.queries_a_block(), &q_positions_, &q_places_);
    lay(kv_positions, c.keys, kKeys, &kv_positions_, &kv_places_);
    if (packed_) lay(q_segments, c.queries, c.queries_a_block(), &q_segments_, &q_documents_);
    if (packed_) lay(kv_segments, c.keys, kKeys, &kv_segments_, &kv_documents_);
  }

  // What queries of block i see of the keys of block j.
  Seen of(int64_t b, int64_t i, int64_t j) const {
    Span q = q_places_[b * c_.query_blocks() + i], k = kv_places_[b * c_.key_blocks() + j];
    bool some = true, all = true;
    if (c_.causal) some = k.least <= q.most, all = k.most <= q.least;
    if (c_.window > 0) some = some && q.least - k.most < c_.window, all = all && q.most - k.least < c_.window;
    if (packed_) {
      Span own = q_documents_[b * c_.query_blocks() + i], theirs = kv_documents_[b * c_.key_blocks() + j];
      some = some && theirs.least <= own.most && theirs.most >= own.least && theirs.most > 0;
      all = all && own.least == own.most && theirs.least == theirs.most && own.least == theirs.least && own.least > 0;
    }
    return !some ? kNothing : all && (j + 1) * kKeys <= c_.keys ? kAll : kPart;
  }

  bool sees(int64_t b, int64_t i, int64_t from, int64_t to) const {
    for (int64_t j = from; j < to; ++j)
      if (of(b, i, j) != kNothing) return true;
    return false;
  }

  // -inf in place of the logits that a query does not see of block j.
  void hide(int64_t b, int64_t query, int64_t j, float* logits) const {
    const Vec hidden = Vec{} - std::numeric_limits<float>::infinity();
    int64_t at = b * c_.key_blocks() * kKeys + j * kKeys, row = b * whole_queries() + query;
    Ints lane;
    for (int l = 0; l < kLanes; ++l) lane[l] = l;
    for (int64_t s = 0; s < kKeys; s += kLanes) {
      Ints seen = lane + static_cast<int32_t>(j * kKeys + s) < static_cast<int32_t>(c_.keys);
      Ints distance = q_positions_[row] - wide(kv_positions_, at + s);
      if (c_.causal) seen &= distance >= 0;
      if (c_.window > 0) seen &= distance < static_cast<int32_t>(std::min<int64_t>(c_.window, 1 << 30));
      if (packed_) {
        Ints document = wide(kv_segments_, at + s);
        seen &= (document == q_segments_[row]) & (document > 0);
      }
      store(logits + s, seen ? load(logits + s) : hidden);
    }
  }

 private:
  struct Span {
    int64_t least, most;
  };

  static Ints wide(const std::vector<int32_t>& of, int64_t at) { return *reinterpret_cast<const Ints*>(&of[at]); }
  int64_t whole_queries() const { return c_.query_blocks() * c_.queries_a_block(); }

  // Ids [b, size] or none (indices), filled up to whole blocks, and the span of each block.
  void lay(Ids ids, int64_t size, int64_t block, std::vector<int32_t>* to, std::vector<Span>* spans) const {
    int64_t blocks = blocks_of(size, block), whole = blocks * block;
    to->resize(c_.batch * whole);
    spans->resize(c_.batch * blocks);
    for (int64_t b = 0; b < c_.batch; ++b)
      for (int64_t i = 0; i < whole; ++i) {
        int64_t at = std::min(i, size - 1);
        int32_t id = (*to)[b * whole + i] = given(ids) ? ids.typed_data()[b * size + at] : static_cast<int32_t>(at);
        Span& span = (*spans)[b * blocks + i / block];
        span = i % block == 0 ? Span{id, id} : Span{std::min<int64_t>(span.least, id), std::max<int64_t>(span.most, id)};
      }
  }

  const Call c_;
  bool packed_;
  std::vector<int32_t> q_positions_, kv_positions_, q_segments_, kv_segments_;
  std::vector<Span> q_places_, kv_places_, q_documents_, kv_documents_;
};

// Keys and values in float32, block after block of each kv head, and zeros up to whole blocks. `across` has a block's
// keys (in the backward pass values too) as columns of products, [columns / kColumns, size, kColumns]; `along` its
// values (in the backward pass keys) as rows.
class Packed {
 public:
  Packed(const Call& c, bool backward)
      : c_(c), backward_(backward), along_row_(backward ? c.deep() : c.wide()),
        keys_(memory(c.size)), values_(backward ? memory(c.width) : nullptr), along_(memory(along_row_)) {}

  template <typename T>
  void fill(ffi::ThreadPool& pool, const T* keys, const T* values) {
    int64_t blocks = c_.key_blocks();
    deal(pool, c_.batch * c_.kv * blocks, [&](int64_t piece) {
      int64_t j = piece % blocks, k = piece / blocks % c_.kv, b = piece / blocks / c_.kv;
      const T *own_keys = first(keys, b, k, j, c_.size), *own_values = first(values, b, k, j, c_.width);
      lay_across(own_keys, j, c_.size, keys_.get() + at(b, k, j) * c_.size);
      if (backward_) lay_across(own_values, j, c_.width, values_.get() + at(b, k, j) * c_.width);
      float* rows = along_.get() + at(b, k, j) * along_row_;
      if (backward_)
        lay_along(own_keys, j, c_.size, rows);
      else
        lay_along(own_values, j, c_.width, rows);
    });
  }

  const float* keys_across(int64_t b, int64_t k, int64_t j) const { return keys_.get() + at(b, k, j) * c_.size; }
  const float* values_across(int64_t b, int64_t k, int64_t j) const { return values_.get() + at(b, k, j) * c_.width; }
  const float* along(int64_t b, int64_t k, int64_t j) const { return along_.get() + at(b, k, j) * along_row_; }
  int64_t count(int64_t j) const { return std::min(kKeys, c_.keys - j * kKeys); }

 private:
  std::unique_ptr<float[]> memory(int64_t row) const {
    return std::unique_ptr<float[]>(new float[c_.batch * c_.kv * c_.key_blocks() * kKeys * row]);
  }
  int64_t at(int64_t b, int64_t k, int64_t j) const { return ((b * c_.kv + k) * c_.key_blocks() + j) * kKeys; }
  template <typename T>
  const T* first(const T* from, int64_t b, int64_t k, int64_t j, int64_t row) const {
    return from + ((b * c_.keys + j * kKeys) * c_.kv + k) * row;
  }

  template <typename T>
  void lay_across(const T* from, int64_t j, int64_t row, float* to) const {
    if (count(j) < kKeys) std::fill_n(to, kKeys * row, 0.0f);
    for (int64_t s = 0; s < count(j); ++s)
      for (int64_t i = 0; i < row; ++i)
        to[(s / kColumns * row + i) * kColumns + s % kColumns] = value_of(from[s * c_.kv * row + i]);
  }

  template <typename T>
  void lay_along(const T* from, int64_t j, int64_t row, float* to) const {
    for (int64_t s = 0; s < kKeys; ++s)
      for (int64_t i = 0; i < along_row_; ++i)
        to[s * along_row_ + i] = s < count(j) && i < row ? value_of(from[s * c_.kv * row + i]) : 0.0f;
  }

  const Call c_;
  bool backward_;
  int64_t along_row_;
  std::unique_ptr<float[]> keys_, values_, along_;
};

template <int B, int V>
inline void sums_of_products(const float* x, int64_t x_row, int64_t x_step, const float* w, int64_t w_step, int64_t k,
                             float* y, int64_t y_row, bool add) {
  Vec acc[B][V];
#pragma GCC unroll 16
  for (int b = 0; b < B; ++b)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[b][v] = add ? load(y + b * y_row + v * kLanes) : Vec{};
  for (int64_t i = 0; i < k; ++i) {
    Vec column[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) column[v] = load(w + i * w_step + v * kLanes);
#pragma GCC unroll 16
    for (int b = 0; b < B; ++b) {
      Vec one = spread(x[b * x_row + i * x_step]);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[b][v] = add_product(one, column[v], acc[b][v]);
    }
  }
#pragma GCC unroll 16
  for (int b = 0; b < B; ++b)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) store(y + b * y_row + v * kLanes, acc[b][v]);
}

// y [rows, columns] = or += x [rows, k] w [k, columns] for whole vectors of columns; x has steps of its own both ways.
inline void product(const float* x, int64_t x_row, int64_t x_step, int64_t rows, const float* w, int64_t w_step,
                    int64_t columns, int64_t k, float* y, int64_t y_row, bool add) {
  for (int64_t o = 0; o < columns; o += kColumns)
    blocks_of_rows(rows, [&](auto constant, int64_t b) {
      constexpr int B = decltype(constant)::value;
      const float* own = x + b * x_row;
      float* to = y + b * y_row + o;
      if (columns - o >= kColumns)
        sums_of_products<B, kVecs>(own, x_row, x_step, w + o, w_step, k, to, y_row, add);
      else
        sums_of_products<B, 1>(own, x_row, x_step, w + o, w_step, k, to, y_row, add);
    });
}

}  // namespace

#endif  // MAXSTACK_ATTENTION_H_
