// Attention over a cache in pages, and writing into it: each byte of a page that a query sees is read once.
//
// Work is dealt out as pieces: a run of pages of one kv head of one sequence, for some queries. The queries that share a
// piece, and the heads that share its kv head, are rows of small products with what the piece reads. A page in few bits
// becomes float a block at a time, which stays in the first cache.
//
// What a query gets depends on itself, its keys and their positions alone, to the last bit: sums have one order,
// pieces begin at the same positions and are merged from the first to the last, whatever other queries, sequences or
// threads there are. This file is therefore compiled without -ffast-math.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "pieces.h"

namespace {

constexpr int64_t kPieceTokens = 512;
constexpr int64_t kBlockRows = 32;   // keys, or components of values, that are made float at once
constexpr int64_t kRowsAsTheyLie = 6;
constexpr int64_t kMostRows = 64;    // queries times heads of a piece, but for heads of one query

struct Int4 {
  int8_t pair;  // component i in the low half, i + size / 2 in the high half
};

template <typename T>
constexpr int64_t kNumbers = std::is_same_v<T, Int4> ? 2 : 1;  // of an element

// The halves of pairs, each alone.
struct Low {
  int8_t pair;
};
struct High {
  int8_t pair;
};

constexpr int64_t whole(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

inline float exponential(float x) { return exponential(Vec{} + x)[0]; }

// Asks for memory that is read soon: the processor's own guess ends where a page of a head does. Worth it for float32
// alone, where memory is what is waited for.
template <typename T>
inline void fetch(const T* p, int64_t count) {
  if constexpr (std::is_same_v<T, float>)
    for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(p + i);
}

// `count` numbers as float.
template <typename T>
inline void widen(const T* from, int64_t count, float* to, float*) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = value_of(from[i]);
}

// kLanes of them as float.
#if defined(__AVX512F__)
inline Vec of_four_bits(Ints index) {  // by their lowest four
  const Vec value = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
  return (Vec)_mm512_permutexvar_ps((__m512i)index, (__m512)value);
}
#else
inline Vec of_four_bits(Ints index) { return converted((index << 28) >> 28); }
#endif
inline Vec load(const Low* p) { return of_four_bits(ints(reinterpret_cast<const int8_t*>(p))); }
inline Vec load(const High* p) { return of_four_bits(ints(reinterpret_cast<const int8_t*>(p)) >> 4); }

template <>
inline void widen(const Int4* from, int64_t count, float* low, float* high) {
  const int8_t* bytes = reinterpret_cast<const int8_t*>(from);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    Ints both = ints(bytes + i);
    store(low + i, of_four_bits(both));
    store(high + i, of_four_bits(both >> 4));
  }
  for (; i < count; ++i) {
    low[i] = static_cast<int8_t>(static_cast<uint8_t>(bytes[i]) << 4) >> 4;
    high[i] = bytes[i] >> 4;
  }
}

// All of a row: the low halves, behind them the high ones.
template <int B, int R>
inline void add_products(const float* x, int64_t xs, const Int4* w, int64_t ws, int64_t k, Vec (&acc)[B][R]) {
  add_products(x, xs, reinterpret_cast<const Low*>(w), ws, k, acc);
  add_products(x + k, xs, reinterpret_cast<const High*>(w), ws, k, acc);
}

// y[b, r] = sum x[b] w[r], or what was there and that, for B rows of x and `count` rows of w.
template <int B, typename W>
void rows_of_products(const float* x, int64_t xs, const W* w, int64_t ws, int64_t count, int64_t length, float* y,
                      int64_t ys, bool add) {
  auto some = [=](auto constant, int64_t r) {
    constexpr int R = decltype(constant)::value;
    Vec acc[B][R] = {};
    add_products(x, xs, w + r * ws, ws, length, acc);
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
      float found[R];
      sums_of(acc[b], found);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) y[b * ys + r + i] = add ? y[b * ys + r + i] + found[i] : found[i];
    }
  };
  int64_t r = 0;
  if constexpr (B == 1 || kLanes == 16)  // sums enough for the multipliers to work on, as far as registers go
    for (; r + 8 <= count; r += 8) some(std::integral_constant<int, 8>{}, r);
  for (; r + 4 <= count; r += 4) some(std::integral_constant<int, 4>{}, r);
  for (; r < count; ++r) some(std::integral_constant<int, 1>{}, r);
}

// The same for any number of rows of x; `length` is one of whole vectors.
template <typename W>
void products(const float* x, int64_t xs, int64_t rows, const W* w, int64_t ws, int64_t count, int64_t length,
              float* y, int64_t ys, bool add) {
  int64_t b = 0;
  for (; rows - b == 3 || rows - b > 4; b += 3)  // four are better two and two than three and one
    rows_of_products<3>(x + b * xs, xs, w, ws, count, length, y + b * ys, ys, add);
  for (; rows - b >= 2; b += 2)
    rows_of_products<2>(x + b * xs, xs, w, ws, count, length, y + b * ys, ys, add);
  if (rows - b == 1) rows_of_products<1>(x + b * xs, xs, w, ws, count, length, y + b * ys, ys, add);
}

struct Shape {
  int64_t batch, queries, kv, group, size, page, pool, entries, window;  // window 0: none
  float scale, softcap;                                                  // softcap 0: none
  int64_t heads() const { return kv * group; }
  int64_t row() const { return whole(size); }    // floats of a query
  int64_t line() const { return whole(page); }   // floats of a row of logits
};

struct Pages {
  const void *keys, *values;
  const float *key_scale, *value_scale;  // null: none
  const int32_t *table, *lengths;
};

// What `rows` queries have got so far: weighted values, the largest logit, the sum of weights.
struct Sums {
  float *out, *top, *total;
  static int64_t floats(int64_t rows, int64_t size) { return rows * (size + 2); }
  static Sums at(float* p, int64_t rows, int64_t size) { return {p, p + rows * size, p + rows * (size + 1)}; }
  void clear(int64_t rows, int64_t size) const {
    std::fill(out, out + rows * size, 0.0f);
    std::fill(top, top + rows, kHidden);
    std::fill(total, total + rows, 0.0f);
  }
};

void scale_by(float* p, int64_t n, float factor) {
  for (int64_t i = 0; i < n; ++i) p[i] *= factor;
}

// Adds what was found over later keys. Nothing and a part are that part, bit for bit.
void merge(const Sums& into, const Sums& part, int64_t rows, int64_t size) {
  for (int64_t m = 0; m < rows; ++m) {
    float top = std::max(into.top[m], part.top[m]);
    float old = exponential(into.top[m] - finite(top)), fresh = exponential(part.top[m] - finite(top));
    for (int64_t i = 0; i < size; ++i)
      into.out[m * size + i] = into.out[m * size + i] * old + part.out[m * size + i] * fresh;
    into.total[m] = into.total[m] * old + part.total[m] * fresh;
    into.top[m] = top;
  }
}

// Queries [first, first + count) of a sequence and the heads of one kv head, over its pages [from, to).
struct Tile {
  int64_t sequence, kv, first, count, from, to;
  int64_t position;              // of the first query
  int64_t pages, pieces, parts;  // pages of a piece, pieces, and where their results begin
};

// One thread's memory.
struct Desk {
  std::vector<float> held;
  float *queries, *logits, *block, *scales;
  void lay(const Shape& s, int64_t rows) {
    int64_t queries_end = rows * s.row(), logits_end = queries_end + rows * s.line();
    int64_t block_end = logits_end + 2 * kBlockRows * std::max(s.row(), s.line());
    held.resize(block_end + 2 * s.line());
    queries = held.data(), logits = queries + queries_end, block = queries + logits_end, scales = queries + block_end;
  }
};

// Logits of a row in a page, of which the tokens [lo, hi) are visible, become weights of values; the rest of [from, to),
// whole vectors, gets 0.
void weigh(const Shape& s, float* row, const Desk& desk, bool scaled, int64_t from, int64_t to, int64_t lo, int64_t hi,
           float* out, float* top, float* total) {
  if (lo >= hi) {
    std::fill(row + from, row + to, 0.0f);
    return;
  }
  Ints lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  auto seen = [&](int64_t i) {
    Ints at = lane + static_cast<int32_t>(i);
    return (at >= static_cast<int32_t>(lo)) & (at < static_cast<int32_t>(hi));
  };
  const Vec hidden = Vec{} + kHidden;
  Vec most = hidden;
  for (int64_t i = from; i < to; i += kLanes) {
    Vec logits = load(row + i);
    if (scaled) logits *= load(desk.scales + i);
    if (s.softcap > 0) logits = s.softcap * hyperbolic_tangent(logits / s.softcap);
    logits = seen(i) ? logits : hidden;
    store(row + i, logits);
    most = logits > most ? logits : most;
  }
  float largest = *top;
  for (int i = 0; i < kLanes; ++i) largest = std::max(largest, most[i]);
  float keep = exponential(*top - finite(largest));
  if (*top != largest) scale_by(out, s.size, keep);
  Vec all = {};
  for (int64_t i = from; i < to; i += kLanes) {
    Vec weights = exponential(load(row + i) - finite(largest));
    all += weights;
    if (scaled) weights = seen(i) ? weights * load(desk.scales + s.line() + i) : Vec{};
    store(row + i, weights);
  }
  *total = *total * keep + sum(all);
  *top = largest;
}

// Whether numbers in few bits are made float in the products themselves, to the same bits: few rows have no use for a
// float copy. Whole vectors only.
template <typename T>
inline bool as_they_lie(int64_t rows, int64_t elements) {
  return !std::is_same_v<T, float> && rows <= kRowsAsTheyLie && elements % kLanes == 0;
}

// Logits of all rows with the tokens [lo, hi) of a page.
template <typename T>
void with_keys(const Shape& s, const Desk& desk, int64_t rows, const T* keys, int64_t lo, int64_t hi) {
  int64_t elements = s.size / kNumbers<T>, row = s.row();
  for (int64_t at = lo; at < hi; at += kBlockRows) {
    int64_t count = std::min(kBlockRows, hi - at);
    fetch(keys + (at + count) * elements, std::min(kBlockRows, s.page - at - count) * elements);
    const float* block = desk.block;
    if (as_they_lie<T>(rows, elements)) {
      products(desk.queries, row, rows, keys + at * elements, elements, count, elements, desk.logits + at, s.line(),
               false);
      continue;
    }
    bool as_it_is = std::is_same_v<T, float> && s.size == row;
    if (as_it_is) block = reinterpret_cast<const float*>(keys + at * s.size);
    for (int64_t r = 0; r < count && !as_it_is; ++r) {
      float* to = desk.block + r * row;
      widen(keys + (at + r) * elements, elements, to, to + elements);
      std::fill(to + s.size, to + row, 0.0f);
    }
    products(desk.queries, row, rows, block, row, count, row, desk.logits + at, s.line(), false);
  }
}

// 0 in place of what is not finite.
inline void make_finite(float* p, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (!std::isfinite(p[i])) p[i] = 0.0f;
}

// Adds the values of the tokens [lo, hi) of a page, by weights that are 0 in the rest of [from, to). Of the tokens
// outside [sure_lo, sure_hi) some queries see nothing; others may be padding, so that nobody has written there.
template <typename T>
void with_values(const Shape& s, const Desk& desk, int64_t rows, const T* values, int64_t lo, int64_t hi,
                 int64_t sure_lo, int64_t sure_hi, int64_t from, int64_t to, float* out) {
  int64_t elements = s.size / kNumbers<T>, held = std::min(to, s.page) - from, length = to - from;
  const float* weights = desk.logits + from;
  // What no query sees may be anything, in floats nan too, and 0 nan is nan.
  bool partial = lo > from || hi < to || sure_lo > lo || sure_hi < hi;
  bool as_it_is = std::is_same_v<T, float> ? !partial : as_they_lie<T>(rows, held) && held == length;
  if (std::is_same_v<T, Bf16> && partial) as_it_is = false;
  float *low = desk.block, *high = low + kBlockRows * length;
  for (int64_t w = 0; w < elements; w += kBlockRows) {
    int64_t count = std::min(kBlockRows, elements - w);
    fetch(values + (w + count) * s.page, std::min(kBlockRows, elements - w - count) * s.page);
    const T* block = values + w * s.page + from;
    if (as_it_is) {
      if constexpr (kNumbers<T> == 1) {
        products(weights, s.line(), rows, block, s.page, count, length, out + w, s.size, true);
      } else {
        auto *low = reinterpret_cast<const Low*>(block);
        products(weights, s.line(), rows, low, s.page, count, length, out + w, s.size, true);
        auto *high = reinterpret_cast<const High*>(block);
        products(weights, s.line(), rows, high, s.page, count, length, out + elements + w, s.size, true);
      }
      continue;
    }
    for (int64_t r = 0; r < count; ++r) {
      widen(values + (w + r) * s.page + from, held, low + r * length, high + r * length);
      if (!partial) continue;
      for (float* block = low; block <= (kNumbers<T> == 2 ? high : low); block += kBlockRows * length) {
        float *row = block + r * length, *end = row + length;
        std::fill(row, row + lo - from, 0.0f);
        std::fill(row + hi - from, end, 0.0f);
        make_finite(row + lo - from, sure_lo - lo);
        make_finite(row + sure_hi - from, hi - sure_hi);
      }
    }
    products(weights, s.line(), rows, low, length, count, length, out + w, s.size, true);
    if (kNumbers<T> == 2)
      products(weights, s.line(), rows, high, length, count, length, out + elements + w, s.size, true);
  }
}

// One page, for the rows of a tile.
template <typename T>
void attend_page(const Shape& s, const Pages& pages, const Tile& tile, const Desk& desk, int64_t entry,
                 const Sums& sums) {
  int64_t page = pages.table[tile.sequence * s.entries + entry], rows = tile.count * s.group;
  if (page < 0 || page >= s.pool) return;
  // Positions as they count within the page.
  int64_t first = tile.position - entry * s.page;
  auto begins = [&](int64_t query) { return s.window > 0 ? std::max<int64_t>(0, first + query - s.window + 1) : 0; };
  auto ends = [&](int64_t query) { return std::min(s.page, first + query + 1); };
  int64_t lo = begins(0), hi = ends(tile.count - 1);
  if (lo >= hi) return;
  int64_t from = lo / kLanes * kLanes, to = whole(hi), head = page * s.kv + tile.kv;
  int64_t floats = std::min(to, s.page) - from;
  bool scaled = pages.key_scale != nullptr;
  if (scaled) {
    std::memcpy(desk.scales + from, pages.key_scale + head * s.page + from, floats * 4);
    std::memcpy(desk.scales + s.line() + from, pages.value_scale + head * s.page + from, floats * 4);
  }
  int64_t elements = s.size / kNumbers<T> * s.page;
  with_keys(s, desk, rows, static_cast<const T*>(pages.keys) + head * elements, lo, hi);
  const T* values = static_cast<const T*>(pages.values) + head * elements;
  fetch(values, std::min(kBlockRows * s.page, elements));
  for (int64_t m = 0; m < rows; ++m)
    weigh(s, desk.logits + m * s.line(), desk, scaled, from, to, std::max(lo, begins(m / s.group)),
          ends(m / s.group), sums.out + m * s.size, sums.top + m, sums.total + m);
  // The first query sees the least, the last one begins last.
  int64_t sure_hi = std::clamp(ends(0), lo, hi), sure_lo = std::min(std::max(lo, begins(tile.count - 1)), sure_hi);
  with_values(s, desk, rows, values, lo, hi, sure_lo, sure_hi, from, to, sums.out);
}

// Queries times `scale`, a row each, filled up with zeros.
void lay_queries(const Shape& s, const Tile& tile, const float* q, float* to) {
  for (int64_t j = 0; j < tile.count; ++j)
    for (int64_t g = 0; g < s.group; ++g, to += s.row()) {
      int64_t query = tile.sequence * s.queries + tile.first + j;
      const float* from = q + ((query * s.heads()) + tile.kv * s.group + g) * s.size;
      for (int64_t i = 0; i < s.size; ++i) to[i] = from[i] * s.scale;
      std::fill(to + s.size, to + s.row(), 0.0f);
    }
}

template <typename T>
void attend_piece(const Shape& s, const Pages& pages, const Tile& tile, const Desk& desk, int64_t piece,
                  const Sums& sums) {
  sums.clear(tile.count * s.group, s.size);
  // Pieces begin at multiples of their pages: which other keys a query does not see decides nothing.
  int64_t start = (tile.from / tile.pages + piece) * tile.pages;
  for (int64_t e = std::max(start, tile.from); e < std::min(start + tile.pages, tile.to); ++e)
    attend_page<T>(s, pages, tile, desk, e, sums);
}

void finish(const Shape& s, const Tile& tile, const Sums& sums, float* y, float* lse) {
  for (int64_t m = 0; m < tile.count * s.group; ++m) {
    int64_t query = tile.sequence * s.queries + tile.first + m / s.group;
    int64_t at = query * s.heads() + tile.kv * s.group + m % s.group;
    bool nothing = sums.total[m] == 0;
    float total = nothing ? 1 : sums.total[m];
    for (int64_t i = 0; i < s.size; ++i) y[at * s.size + i] = sums.out[m * s.size + i] / total;
    lse[at] = nothing ? kHidden : finite(sums.top[m]) + std::log(total);
  }
}

// How many queries from sequence b on are those of one sequence, one behind the other, though each came as a sequence of
// its own: together they read a page once.
int64_t run_of(const Shape& s, const Pages& pages, int64_t b) {
  int64_t count = 1;
  const int32_t* table = pages.table + b * s.entries;
  while (s.queries == 1 && b + count < s.batch && pages.lengths[b + count] == pages.lengths[b] + count &&
         std::equal(table, table + s.entries, table + count * s.entries))
    ++count;
  return s.queries == 1 ? count : s.queries;
}

// All tiles of a call, and how many pieces they are. `splits` parts of each sequence, or 0: pieces of kPieceTokens.
std::vector<Tile> tiles_of(const Shape& s, const Pages& pages, int64_t splits, int64_t* pieces) {
  std::vector<Tile> tiles;
  int64_t each = std::max<int64_t>(1, kMostRows / s.group), queries;
  *pieces = 0;
  for (int64_t b = 0; b < s.batch; b += s.queries == 1 ? queries : 1) {
    queries = run_of(s, pages, b);
    for (int64_t first = 0; first < queries; first += each)
      for (int64_t k = 0; k < s.kv; ++k) {
        Tile tile{b, k, first, std::min(each, queries - first), 0, 0, 0, 0, 0, *pieces};
        int64_t position = tile.position = pages.lengths[b] - s.queries + first;
        int64_t end = std::min(position + tile.count, s.entries * s.page);
        tile.to = end > 0 ? (end + s.page - 1) / s.page : 0;
        if (s.window > 0) tile.from = std::min(tile.to, std::max<int64_t>(0, position - s.window + 1) / s.page);
        tile.pages = std::max<int64_t>(1, kPieceTokens / s.page);
        if (splits > 0) tile.pages = std::max<int64_t>(1, (tile.to - tile.from + splits - 1) / splits);
        tile.pieces = tile.to > tile.from ? (tile.to - 1) / tile.pages - tile.from / tile.pages + 1 : 0;
        *pieces += tile.pieces;
        tiles.push_back(tile);
      }
  }
  return tiles;
}

template <typename T>
void attend(ffi::ThreadPool& pool, const Shape& s, const Pages& pages, const float* q, float* y, float* lse,
            int64_t splits) {
  int64_t pieces = 0, most = 0, largest = 1;
  auto tiles = std::make_shared<std::vector<Tile>>(tiles_of(s, pages, splits, &pieces));
  for (const Tile& tile : *tiles) most = std::max(most, tile.pieces), largest = std::max(largest, tile.count);
  auto lay = [=](const Tile& tile, Desk& desk) {
    desk.lay(s, tile.count * s.group);
    lay_queries(s, tile, q, desk.queries);
  };
  int64_t floats = Sums::floats(largest * s.group, s.size);
  auto of_tile = [=](float* p, const Tile& tile) { return Sums::at(p, tile.count * s.group, s.size); };

  // Where there are tiles enough for all threads, one thread takes a tile's pieces one after the other.
  if (most <= 1 || most * 4 * static_cast<int64_t>(pool.num_threads()) <= pieces) {
    deal(pool, tiles->size(), [=](int64_t i) {
      const Tile& tile = (*tiles)[i];
      thread_local Desk desk;
      thread_local std::vector<float> held;
      lay(tile, desk);
      held.resize(2 * floats);
      Sums all = of_tile(held.data(), tile), part = of_tile(held.data() + floats, tile);
      all.clear(tile.count * s.group, s.size);
      for (int64_t piece = 0; piece < tile.pieces; ++piece) {
        attend_piece<T>(s, pages, tile, desk, piece, part);
        merge(all, part, tile.count * s.group, s.size);
      }
      finish(s, tile, all, y, lse);
    });
    return;
  }
  auto owners = std::make_shared<std::vector<int64_t>>();
  for (size_t t = 0; t < tiles->size(); ++t) owners->insert(owners->end(), (*tiles)[t].pieces, t);
  auto parts = std::make_shared<std::vector<float>>(pieces * floats);
  deal(pool, pieces, [=](int64_t i) {
    const Tile& tile = (*tiles)[(*owners)[i]];
    thread_local Desk desk;
    lay(tile, desk);
    attend_piece<T>(s, pages, tile, desk, i - tile.parts, of_tile(parts->data() + i * floats, tile));
  });
  for (const Tile& tile : *tiles) {
    std::vector<float> held(floats);
    Sums all = of_tile(held.data(), tile);
    all.clear(tile.count * s.group, s.size);
    for (int64_t i = tile.parts; i < tile.parts + tile.pieces; ++i)
      merge(all, of_tile(parts->data() + i * floats, tile), tile.count * s.group, s.size);
    finish(s, tile, all, y, lse);
  }
}

}  // namespace

// q [b, t, n, h] of the last t positions of each sequence; keys [P, k, page, h] and values [P, k, h, page] in float32,
// bfloat16, int8 or two int4 a byte, their scales [P, k, page] or none; table [b, entries]; lengths [b]
// -> y [b, t, n, h], lse [b, t, n]
static ffi::Error PagedAttention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer keys,
                                 ffi::AnyBuffer values, ffi::Buffer<ffi::F32> key_scale,
                                 ffi::Buffer<ffi::F32> value_scale, ffi::Buffer<ffi::S32> table,
                                 ffi::Buffer<ffi::S32> lengths, ffi::ResultBuffer<ffi::F32> y,
                                 ffi::ResultBuffer<ffi::F32> lse, float scale, float softcap, int64_t window,
                                 int64_t splits) {
  auto qd = q.dimensions(), kd = keys.dimensions();
  Shape s{qd[0], qd[1], kd[1], qd[2] / kd[1], qd[3], kd[2], kd[0], table.dimensions()[1], window, scale, softcap};
  bool scaled = given(key_scale);
  Pages pages{keys.untyped_data(), values.untyped_data(), scaled ? key_scale.typed_data() : nullptr,
              scaled ? value_scale.typed_data() : nullptr, table.typed_data(), lengths.typed_data()};
  auto run = [&](auto number) {
    attend<decltype(number)>(pool, s, pages, q.typed_data(), y->typed_data(), lse->typed_data(), splits);
    return ffi::Error::Success();
  };
  switch (keys.element_type()) {
    case ffi::F32:
      return run(float{});
    case ffi::BF16:
      return run(Bf16{});
    case ffi::S8:
      return run(int8_t{});
    case ffi::U8:
      return run(Int4{});
    default:
      return ffi::Error::InvalidArgument("paged_attention: pages are float32, bfloat16, int8 or uint8");
  }
}

// Writes rows into pools in place: rows [r, a..., c...] at place[r] of page[r] of pools [P, a..., page, c...], of any
// type; `axes` says where each pool counts the places of a page. A page that is none of the pool drops its row.
static ffi::Error WriteRows(ffi::Buffer<ffi::S32> page, ffi::Buffer<ffi::S32> place, ffi::RemainingArgs pools_and_rows,
                            ffi::RemainingRets written, ffi::Span<const int64_t> axes) {
  int64_t count = page.element_count(), pools = axes.size();
  for (int64_t i = 0; i < pools; ++i) {
    auto pool = pools_and_rows.get<ffi::AnyBuffer>(i), rows = pools_and_rows.get<ffi::AnyBuffer>(pools + i);
    auto result = written.get<ffi::AnyBuffer>(i);
    if (!pool.has_value() || !rows.has_value() || !result.has_value())
      return ffi::Error::InvalidArgument("write_rows: pools, as many rows, as many results");
    auto dims = pool->dimensions();
    char* to = static_cast<char*>((*result)->untyped_data());
    const char* from = static_cast<const char*>(rows->untyped_data());
    if (to != pool->untyped_data()) std::memcpy(to, pool->untyped_data(), pool->size_bytes());
    if (pool->element_count() == 0 || count == 0) continue;
    int64_t outer = 1, inner = pool->size_bytes() / pool->element_count();  // bytes
    for (int64_t d = 1; d < axes[i]; ++d) outer *= dims[d];
    for (size_t d = axes[i] + 1; d < dims.size(); ++d) inner *= dims[d];
    int64_t places = dims[axes[i]];
    for (int64_t r = 0; r < count; ++r) {
      int64_t p = page.typed_data()[r], at = place.typed_data()[r];
      if (p < 0 || p >= dims[0] || at < 0 || at >= places) continue;
      char* start = to + (p * outer * places + at) * inner;
      for (int64_t o = 0; o < outer; ++o)
        std::memcpy(start + o * places * inner, from + (r * outer + o) * inner, inner);
    }
  }
  return ffi::Error::Success();
}

// Writes nothing: what is allocated for the results is given out as it is.
static ffi::Error Untouched(ffi::RemainingRets) { return ffi::Error::Success(); }

XLA_FFI_DEFINE_HANDLER_SYMBOL(untouched, Untouched, ffi::Ffi::Bind().RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(paged_attention, PagedAttention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("splits"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(write_rows, WriteRows,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<ffi::Span<const int64_t>>("axes"));
