// Attention over gathered rows, compiled once per instruction set.
//
// Queries stand in lanes: a block of 1 to 3 vectors of queries attends to all keys of its head, 96 keys at a time. Logits
// come out as S^T[key][query], so the row maximum and sum are vertical, P feeds the product with V as it is, and K and V are
// only ever read as broadcast scalars: they need no transpose, and packing them absorbs the gather.
// The maximum is lazy (FlashAttention-4, Shah et al.): sums are rescaled only when a logit exceeds the running maximum by 2^8.
#include "sparse_attention.h"

#include "pack.h"

namespace tokenops {
namespace TOKENOPS_ISA {
namespace {

constexpr int L = kLanes;
constexpr int64_t kKeyBlock = 96;  // flat from 48 to 128; a multiple of every tile height and of a bf16 pair
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kLowest = -3.402823466e38f, kInfinity = __builtin_inff();
constexpr float kLazy = 8.f;

int64_t query_vectors(int64_t queries) { return (queries + L - 1) / L; }
// at least one block, so that a list without rows still gets its empty slots written
int64_t query_blocks(int64_t queries) { return queries ? (query_vectors(queries) + kTileVectors - 1) / kTileVectors : 1; }

// log2 for finite x >= 0.5 by two Halley steps from the exponent and the raw mantissa (error 0.09): cubic, then at float precision
VecF<L> log2(VecF<L> x) {
  VecF<L> y = __builtin_convertvector((VecI<L>)x - 0x3f800000, VecF<L>) * 0x1p-23f;
  for (int i = 0; i < 2; ++i) {
    VecF<L> ratio = x * exp2<L, 5>(-y);
    y += 2.f * kLog2e * (ratio - 1.f) / (ratio + 1.f);
  }
  return y;
}

// natural units to units of log2; a finite bias stays finite, so that a row of the lowest float is not an empty row
TOKENOPS_INLINE float to_log2(float bias) {
  float scaled = bias * kLog2e;
  return scaled < kLowest && bias >= kLowest ? kLowest : scaled;
}

template <class T>
T* head_of(const Grid& grid, int64_t s, int64_t h) {
  return (T*)grid.data + s * grid.sequence + h * grid.head;
}

template <class T>
Rows<T> rows_of(const Grid& grid, int64_t s, int64_t h, const int32_t* row, int64_t count) {
  return {head_of<T>(grid, s, h), grid.row, row, count};
}

template <class T>
float dot_rows(const T* a, const T* b, int64_t width) {
  VecF<L> sum{};
  for (int64_t c = 0; c < width; c += L) {
    const int64_t columns = smaller(L, width - c);
    sum += columns == L ? load<L>(a + c) * load<L>(b + c) : load_first<L>(a + c, columns) * load_first<L>(b + c, columns);
  }
  return sum_lanes(sum);
}

float mask_value(const SparseAttention& p, int64_t at) {
  switch (p.mask) {
    case Mask::none: return 0.f;
    case Mask::boolean: return ((const uint8_t*)p.mask_data)[at] ? 0.f : -kInfinity;
    case Mask::f32: return to_log2(((const float*)p.mask_data)[at]);
    case Mask::bf16: return to_log2(bf16_to_float(((const bf16*)p.mask_data)[at].bits));
    case Mask::f16: return to_log2(half_to_float(((const f16*)p.mask_data)[at].bits));
  }
  return 0.f;
}

enum class Visible { nothing, partly, all };

// What attn_mask and causality add to the logits of queries [first, last) and keys [from, to): added[key][lane], in units of
// log2. Left alone if all or nothing of the block is visible. Rows that fill up the last tile are hidden by the key bias.
Visible fill_mask(float* added, const SparseAttention& p, int64_t s, int64_t h, const RowList& queries, int64_t first, int64_t last,
                  const RowList& keys, int64_t from, int64_t to, int64_t lanes) {
  const int32_t *q_rank = queries.rank + first, *k_rank = keys.rank + from;
  const int64_t count = last - first, size = to - from;
  bool compare = false;
  if (p.causal) {
    int32_t q_low = q_rank[0], q_high = q_low, k_low = k_rank[0], k_high = k_low;
    for (int64_t i = 1; i < count; ++i) {
      q_low = q_rank[i] < q_low ? q_rank[i] : q_low;
      q_high = q_rank[i] > q_high ? q_rank[i] : q_high;
    }
    for (int64_t j = 1; j < size; ++j) {
      k_low = k_rank[j] < k_low ? k_rank[j] : k_low;
      k_high = k_rank[j] > k_high ? k_rank[j] : k_high;
    }
    if (k_low > q_high) return Visible::nothing;
    compare = k_high > q_low;
  }
  if (!compare && p.mask == Mask::none) return Visible::all;
  memset(added, 0, round_up(size, kTileRows) * lanes * sizeof(float));
  if (compare)
    for (int64_t j = 0; j < size; ++j)
      for (int64_t i = 0; i < count; ++i) added[j * lanes + i] = k_rank[j] > q_rank[i] ? -kInfinity : 0.f;
  if (p.mask != Mask::none)
    for (int64_t i = 0; i < count; ++i) {
      const int64_t base = s * p.mask_sequence + h * p.mask_head + queries.row[first + i] * p.mask_row;
      for (int64_t j = 0; j < size; ++j) added[j * lanes + i] += mask_value(p, base + keys.row[from + j] * p.mask_column);
    }
  return Visible::partly;
}

// kv_bias of the listed keys in units of log2, then -inf for the rows that fill up the last tile; null if that is all zeros
const float* pack_bias(float* to, const SparseAttention& p, int64_t s, int64_t h, const int32_t* row, int64_t keys, int64_t padded) {
  if (!p.bias && keys == padded) return nullptr;
  for (int64_t j = 0; j < keys; ++j) to[j] = p.bias ? to_log2(p.bias[s * p.bias_sequence + h * p.bias_head + row[j] * p.bias_row]) : 0.f;
  for (int64_t j = keys; j < padded; ++j) to[j] = -kInfinity;
  return to;
}

// S^T of one tile of keys in units of log2
template <class Dot, int V, class Also = Nothing>
TOKENOPS_INLINE void logit_tile(const typename Dot::Scalar* keys, int64_t key_row, int64_t scalars, const typename Dot::Scalar* query_lanes,
                                float scale, const float* bias, const float* added, VecF<L> (&s)[kTileRows][V], Also&& also = {}) {
  clear<L>(s);
  multiply_tile<Dot, L, kTileRows, V>(keys, key_row, 1, query_lanes, V * L, scalars, s, also);
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) s[r][v] *= scale;
  if (bias)
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) s[r][v] += bias[r];
  if (added)
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) s[r][v] += load<L>(added + (r * V + v) * L);
}

// a tile as the vector side of a product over its keys: to[key / kPerScalar][lane]
template <class Dot, int V>
TOKENOPS_INLINE void store_steps(typename Dot::Scalar* to, const VecF<L> (&x)[kTileRows][V]) {
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; r += Dot::kPerScalar)
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v)
      if constexpr (Dot::kPerScalar == 1)
        store<L>(to + (r * V + v) * L, x[r][v]);
      else
        store_bits(to + (r / 2 * V + v) * L, interleave_bf16(x[r][v], x[r + 1][v]));
}

// the denominator sums the weights of a tile as the product will read them, rounded if they are
template <class Dot, int V>
TOKENOPS_INLINE void add_weights(VecF<L> (&total)[V], const typename Dot::Scalar* tile) {
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows / Dot::kPerScalar; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) total[v] = Dot::template multiply_add<L>(Dot::kOne, load_bits<VecF<L>>(tile + (r * V + v) * L), total[v]);
}

// a tile as the broadcast side of a product over its lanes: to[key][lane / kPerScalar]
template <class Dot, int V>
TOKENOPS_INLINE void store_rows(typename Dot::Scalar* to, const VecF<L> (&x)[kTileRows][V]) {
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v)
      if constexpr (Dot::kPerScalar == 1)
        store<L>(to + (r * V + v) * L, x[r][v]);
      else
        store_bits(to + (r * V + v) * L / 2, to_bf16<L>(x[r][v]));
}

// lse and row_sq of queries [first, last) from their running maximum and sums; 1 / sum, or 0 for a row without visible keys
template <int V>
TOKENOPS_INLINE void write_statistics(const SparseAttention& p, int64_t s, int64_t h, const RowList& queries, int64_t first, int64_t last,
                                      const VecF<L> (&top)[V], const VecF<L> (&total)[V], const VecF<L> (&squares)[V], float* inverse) {
  float lse[V * L], row_sq[V * L];
  for (int v = 0; v < V; ++v) {
    const VecF<L> by = total[v] == 0.f ? VecF<L>{} : 1.f / total[v];
    store<L>(inverse + v * L, by);
    // what to_log2 clamped to the lowest float stays the lowest float; a sum that is NaN stays NaN
    const VecF<L> natural = (top[v] == kLowest) & (total[v] == total[v]) ? top[v] : (top[v] + log2(total[v])) * kLn2;
    store<L>(lse + v * L, total[v] == 0.f ? splat<L>(-kInfinity) : natural);
    store<L>(row_sq + v * L, squares[v] * by * by);
  }
  const int64_t at = s * p.stat_sequence + h * p.stat_head;
  const int32_t* slot = queries.slot + first;
  for (int64_t i = 0; i < last - first; ++i) p.lse[at + slot[i]] = lse[i];
  if (p.row_sq)
    for (int64_t i = 0; i < last - first; ++i) p.row_sq[at + slot[i]] = row_sq[i];
}

// calls f with the number of vectors as a constant
template <class F>
TOKENOPS_INLINE void with_vectors(int64_t vectors, F&& f) {
  switch (vectors) {
    case 1: return f(std::integral_constant<int, 1>{});
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
  }
}

// calls f(query head, first query, last query) for the blocks [first_block, last_block) of a head, counted through its group
template <class F>
void for_query_blocks(const SparseAttention& p, int64_t s, int64_t kv_head, int64_t first_block, int64_t last_block, F&& f) {
  int64_t before = 0;
  for (int64_t h = kv_head * p.group(); h < (kv_head + 1) * p.group(); ++h) {
    const int64_t count = p.queries.at(s, h).count, blocks = query_blocks(count), vectors = query_vectors(count);
    for (int64_t i = 0; i < blocks; ++i)
      if (before + i >= first_block && before + i < last_block)
        f(h, vectors * i / blocks * L, smaller(vectors * (i + 1) / blocks * L, count));
    before += blocks;
  }
}

// ---- forward ----

template <class Dot>
struct ForwardKeys {
  typedef typename Dot::Scalar Scalar;
  Scalar *rows, *value_steps;  // [key][D / kPerScalar], [key / kPerScalar][Dv]
  float* bias;

  ForwardKeys(Arena& arena, const SparseAttention& p, int64_t keys) {
    const int64_t padded = round_up(keys, kTileRows);
    rows = arena.take<Scalar>(padded * p.width / Dot::kPerScalar);
    value_steps = arena.take<Scalar>(padded / Dot::kPerScalar * p.value_width);
    bias = arena.take<float>(padded);
  }
};

template <class T, class Dot, int V>
struct ForwardBlock {
  typedef typename Dot::Scalar Scalar;
  static constexpr int lanes = V * L;
  Scalar *query, *weights;  // [D / kPerScalar][lane], [key / kPerScalar][lane]
  float *sums, *added;      // [Dv][lane], [key][lane]

  ForwardBlock(Arena arena, const SparseAttention& p) { take(arena, p); }
  void take(Arena& arena, const SparseAttention& p) {
    query = arena.take<Scalar>(p.width / Dot::kPerScalar * lanes);
    weights = arena.take<Scalar>(kKeyBlock / Dot::kPerScalar * lanes);
    sums = arena.take<float>(p.value_width * lanes);
    added = arena.take<float>(kKeyBlock * lanes);
  }

  void run(const SparseAttention& p, int64_t s, int64_t h, int64_t first, int64_t last, const ForwardKeys<Dot>& panel, const float* bias) {
    const RowList &queries = p.queries.at(s, h), &keys = p.keys.at(s, h / p.group());
    const int64_t scalars = p.width / Dot::kPerScalar, padded = round_up(keys.count, kTileRows);
    const float scale = p.scale * kLog2e;
    const bool want_squares = p.row_sq != nullptr;
    pack_lanes<Dot>(query, V, rows_of<T>(p.query, s, h, queries.row + first, last - first), p.width);
    memset(sums, 0, p.value_width * lanes * sizeof(float));
    VecF<L> top[V], total[V], squares[V];
    for (int v = 0; v < V; ++v) top[v] = splat<L>(kLowest), total[v] = squares[v] = VecF<L>{};

    for (int64_t block = 0; block < padded; block += kKeyBlock) {
      const int64_t size = smaller(kKeyBlock, padded - block);
      const Visible visible = fill_mask(added, p, s, h, queries, first, last, keys, block, smaller(block + size, keys.count), lanes);
      if (visible == Visible::nothing) continue;
      int64_t pending = 0;  // weights from here on are not in the sums yet
      auto flush = [&](int64_t end) {
        multiply_block<Dot, L, V>(panel.value_steps + (block + pending) / Dot::kPerScalar * p.value_width, 1, p.value_width,
                                  weights + pending / Dot::kPerScalar * lanes, lanes, (end - pending) / Dot::kPerScalar, sums, lanes,
                                  p.value_width);
        pending = end;
      };
      for (int64_t j = 0; j < size; j += kTileRows) {
        VecF<L> x[kTileRows][V];
        logit_tile<Dot, V>(panel.rows + (block + j) * scalars, scalars, scalars, query, scale, bias ? bias + block + j : nullptr,
                           visible == Visible::partly ? added + j * lanes : nullptr, x);
        VecF<L> high[V];
        bool grown = false;
#pragma GCC unroll 3
        for (int v = 0; v < V; ++v) {
          high[v] = x[0][v];
#pragma GCC unroll 8
          for (int r = 1; r < kTileRows; ++r) high[v] = max(high[v], x[r][v]);
          grown |= any_greater(high[v], top[v] + kLazy);
        }
        if (__builtin_expect(grown, 0)) {
          flush(j);
          for (int v = 0; v < V; ++v) {
            const VecF<L> risen = max(high[v], top[v]), shrink = exp2<L, 5>(top[v] - risen);
            top[v] = risen;
            total[v] *= shrink;
            squares[v] *= shrink * shrink;
            for (int64_t c = 0; c < p.value_width; ++c) store<L>(sums + c * lanes + v * L, load<L>(sums + c * lanes + v * L) * shrink);
          }
        }
#pragma GCC unroll 8
        for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
          for (int v = 0; v < V; ++v) x[r][v] = exp2<L, Dot::kExpDegree>(x[r][v] - top[v]);
        Scalar* tile = weights + j / Dot::kPerScalar * lanes;
        store_steps<Dot, V>(tile, x);
        add_weights<Dot, V>(total, tile);
        if (want_squares)
          for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
            for (int v = 0; v < V; ++v) squares[v] += x[r][v] * x[r][v];
      }
      flush(size);
    }

    float inverse[lanes];
    write_statistics<V>(p, s, h, queries, first, last, top, total, squares, inverse);
    unpack_lanes(head_of<T>(p.out, s, h), p.out.row, (p.out_by_row ? queries.row : queries.slot) + first, last - first, sums, V, inverse,
                 p.value_width, p.past_caches);
  }
};

template <class T>
void forward_empty_slots(const SparseAttention& p, int64_t s, int64_t h) {
  const RowList& queries = p.queries.at(s, h);
  if (!p.out_by_row) zero_rows(head_of<T>(p.out, s, h), p.out.row, queries.empty, queries.empties, p.value_width);
  for (int64_t i = 0; i < queries.empties; ++i) {
    const int64_t at = s * p.stat_sequence + h * p.stat_head + queries.empty[i];
    p.lse[at] = -kInfinity;
    if (p.row_sq) p.row_sq[at] = 0.f;
  }
}

template <class T, class Dot>
void forward_head(const SparseAttention& p, int64_t s, int64_t kv_head, int64_t first_block, int64_t last_block, bool packed,
                  char* scratch) {
  const RowList& keys = p.keys.at(s, kv_head);
  const int64_t padded = round_up(keys.count, kTileRows);
  Arena arena{scratch};
  ForwardKeys<Dot> panel(arena, p, keys.count);
  if (!packed) {
    pack_rows<Dot>(panel.rows, p.width / Dot::kPerScalar, rows_of<T>(p.key, s, kv_head, keys.row, keys.count), padded, p.width,
                   Fill::last_row);
    pack_steps<Dot>(panel.value_steps, p.value_width, rows_of<T>(p.value, s, kv_head, keys.row, keys.count), padded, p.value_width);
  }
  const float* bias = pack_bias(panel.bias, p, s, kv_head, keys.row, keys.count, padded);
  for_query_blocks(p, s, kv_head, first_block, last_block, [&](int64_t h, int64_t first, int64_t last) {
    with_vectors(query_vectors(last - first),
                 [&](auto vectors) { ForwardBlock<T, Dot, decltype(vectors)::value>(arena, p).run(p, s, h, first, last, panel, bias); });
    if (first == 0) forward_empty_slots<T>(p, s, h);
  });
  stream_fence();
}

// ---- forward of short sequences: up to 32 queries and keys, thousands of heads ----
//
// A head stays in L1 and registers: one softmax over all its logits, no lazy maximum, no transpose of the result (P is the
// broadcast side of P V here), K and V read where they stand if they can be, and the next head's rows fetched meanwhile.

constexpr int64_t kShort = 32;

bool is_short(const SparseAttention& p, int64_t queries, int64_t keys) {
  return queries <= smaller(kShort, kTileVectors * L) && keys <= kShort && p.mask == Mask::none && !p.causal;
}

// Walks over the rows that the next head will read, a cache line at a time. The largest lever of this path: without it every
// head starts with misses. The lines are spread over all steps of the head's products, because a core has only a few dozen
// misses under way at once: prefetches in bursts wait, and the loads of the products wait behind them.
struct RowSpan {
  const char* row;
  int64_t rows, stride, bytes;
};
class Prefetcher {
 public:
  // spans end with one of no rows
  TOKENOPS_INLINE explicit Prefetcher(const RowSpan* spans) : span_(spans), left_(spans->rows) { next_row(); }
  TOKENOPS_INLINE void line() {
    __builtin_prefetch(at_, 0, 2);
    at_ += step_;
    if (__builtin_expect(--lines_ == 0, 0)) next_row();
  }

 private:
  TOKENOPS_INLINE void next_row() {
    while (left_ == 0 && span_->bytes) ++span_, row_ = 0, left_ = span_->rows;
    if (span_->bytes == 0) {
      step_ = 0, lines_ = INT64_MAX;  // nothing left: stay on the last line
      return;
    }
    at_ = span_->row + row_ * span_->stride, step_ = 64, lines_ = (span_->bytes + 63) / 64;
    ++row_, --left_;
  }

  const RowSpan* span_;
  int64_t left_, row_ = 0;
  const char* at_ = nullptr;
  int64_t step_ = 0, lines_ = 0;
};

template <class T, class Dot, int V>
struct ShortHead {
  typedef typename Dot::Scalar Scalar;
  static constexpr int lanes = V * L;
  Scalar *query, *key_rows, *value_steps, *weights;  // [D / kPerScalar][lane], [key][D / kPerScalar], [key / kPerScalar][Dv], ...
  float *logits, *bias;                              // [key][lane], [key]

  ShortHead(Arena arena, const SparseAttention& p) { take(arena, p); }
  void take(Arena& arena, const SparseAttention& p) {
    query = arena.take<Scalar>(p.width / Dot::kPerScalar * lanes);
    key_rows = arena.take<Scalar>(kShort * p.width / Dot::kPerScalar);
    value_steps = arena.take<Scalar>(kShort / Dot::kPerScalar * round_up(p.value_width, L));
    weights = arena.take<Scalar>(kShort / Dot::kPerScalar * lanes);
    logits = arena.take<float>(kShort * lanes);
    bias = arena.take<float>(kShort);
  }

  static RowSpan span_of(const Grid& grid, int64_t s, int64_t h, const RowList& list, int64_t width) {
    const T* first = head_of<T>(grid, s, h) + (list.count ? list.row[0] * grid.row : 0);
    const int64_t bytes = width * (int64_t)sizeof(T), rows = list.range ? list.count : 0;
    if (grid.row == width) return {(const char*)first, rows > 0, 0, rows ? rows * bytes : bytes};
    return {(const char*)first, rows, grid.row * (int64_t)sizeof(T), bytes};
  }

  // (ahead_s, ahead_h): the head whose rows are fetched meanwhile
  void run(const SparseAttention& p, int64_t s, int64_t h, int64_t ahead_s, int64_t ahead_h) {
    const RowList &ahead_queries = p.queries.at(ahead_s, ahead_h), &ahead_keys = p.keys.at(ahead_s, ahead_h / p.group());
    const RowSpan spans[4] = {span_of(p.query, ahead_s, ahead_h, ahead_queries, p.width),
                              span_of(p.key, ahead_s, ahead_h / p.group(), ahead_keys, p.width),
                              span_of(p.value, ahead_s, ahead_h / p.group(), ahead_keys, p.value_width),
                              {nullptr, 0, 0, 0}};
    Prefetcher ahead(spans);
    const int64_t kv_head = h / p.group();
    const RowList &queries = p.queries.at(s, h), &keys = p.keys.at(s, kv_head);
    const int64_t scalars = p.width / Dot::kPerScalar, count = queries.count, padded = round_up(keys.count, kTileRows);
    const float scale = p.scale * kLog2e;
    pack_lanes<Dot>(query, V, rows_of<T>(p.query, s, h, queries.row, count), p.width);

    const Rows<T> k_rows = rows_of<T>(p.key, s, kv_head, keys.row, keys.count),
                  v_rows = rows_of<T>(p.value, s, kv_head, keys.row, keys.count);
    // a range of floats is read where it stands, unless the last tile would read past its end
    const bool in_place = std::is_same<T, float>::value && keys.range && keys.count == padded && keys.count;
    const Scalar *k_data = key_rows, *v_data = value_steps;
    int64_t k_step = scalars, v_step = round_up(p.value_width, L);
    if (in_place) {
      k_data = (const Scalar*)(const void*)k_rows.at(0);
      k_step = k_rows.stride;
    } else {
      pack_rows<Dot>(key_rows, scalars, k_rows, padded, p.width, Fill::last_row);
    }
    if (in_place && p.value_width % L == 0) {
      v_data = (const Scalar*)(const void*)v_rows.at(0);
      v_step = v_rows.stride;
    } else {
      pack_steps<Dot>(value_steps, v_step, v_rows, padded, p.value_width);
    }
    const float* added = pack_bias(bias, p, s, kv_head, keys.row, keys.count, padded);

    VecF<L> top[V], total[V], squares[V];
    for (int v = 0; v < V; ++v) top[v] = splat<L>(kLowest), total[v] = squares[v] = VecF<L>{};
    for (int64_t j = 0; j < padded; j += kTileRows) {
      VecF<L> x[kTileRows][V];
      logit_tile<Dot, V>(k_data + j * k_step, k_step, scalars, query, scale, added ? added + j : nullptr, nullptr, x,
                         [&] { ahead.line(); });
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
        for (int v = 0; v < V; ++v) {
          top[v] = max(top[v], x[r][v]);
          store<L>(logits + ((j + r) * V + v) * L, x[r][v]);
        }
    }
    for (int64_t j = 0; j < padded; j += kTileRows) {
      VecF<L> x[kTileRows][V];
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
        for (int v = 0; v < V; ++v) {
          x[r][v] = exp2<L, Dot::kExpDegree>(load<L>(logits + ((j + r) * V + v) * L) - top[v]);
          if (p.row_sq) squares[v] += x[r][v] * x[r][v];
        }
      Scalar* tile = weights + j / Dot::kPerScalar * lanes;
      store_steps<Dot, V>(tile, x);
      add_weights<Dot, V>(total, tile);
    }
    const bool twice = padded <= 8;  // so few steps are left then that a line each would not fetch the whole head
    float inverse[lanes];
    write_statistics<V>(p, s, h, queries, 0, count, top, total, squares, inverse);

    T* to = head_of<T>(p.out, s, h);
    const int32_t* place = p.out_by_row ? queries.row : queries.slot;
    const int64_t vectors = round_up(p.value_width, L) / L, steps = padded / Dot::kPerScalar;
    for (int64_t i = 0; i < count; i += kTileRows)
      for (int64_t c = 0; c < vectors; c += 2)
        with_vectors(smaller(2, vectors - c), [&](auto n) {
          constexpr int W = decltype(n)::value;
          VecF<L> sums[kTileRows][W];
          clear<L>(sums);
          multiply_tile<Dot, L, kTileRows, W>(weights + i, 1, lanes, v_data + c * L, v_step, steps, sums, [&] {
            ahead.line();
            if (twice) ahead.line();
          });
          for (int r = 0; r < smaller(kTileRows, count - i); ++r)
            for (int w = 0; w < W; ++w)
              write<L>(to + place[i + r] * p.out.row, (c + w) * L, p.value_width, sums[r][w] * inverse[i + r], p.past_caches);
        });
    forward_empty_slots<T>(p, s, h);
  }
};

template <class T, class Dot>
void forward_short_heads(const SparseAttention& p, int64_t first, int64_t last, char* scratch) {
  for (int64_t i = first; i < last; ++i) {
    const int64_t s = i / p.query_heads, h = i % p.query_heads, next = smaller(i + 1, last - 1);
    const int64_t vectors = query_vectors(p.queries.at(s, h).count);
    with_vectors(vectors ? vectors : 1, [&](auto vectors) {
      ShortHead<T, Dot, decltype(vectors)::value>(Arena{scratch}, p).run(p, s, h, next / p.query_heads, next % p.query_heads);
    });
  }
  stream_fence();
}

template <class T, class Dot>
int64_t forward_bytes(const SparseAttention& p, int64_t keys) {
  Arena arena{nullptr};
  ForwardKeys<Dot>(arena, p, keys);
  ForwardBlock<T, Dot, kTileVectors>(arena, p).take(arena, p);
  ShortHead<T, Dot, kTileVectors>(arena, p).take(arena, p);
  return arena.used;
}

// ---- backward: all queries of a head against a range of its keys, whose gradients nobody else adds to ----

// c[row][column] += a . b over a width of whole vectors
template <class Dot>
void multiply_wide(const typename Dot::Scalar* a, int64_t a_row, const typename Dot::Scalar* b, int64_t steps, float* c, int64_t rows,
                   int64_t columns) {
  const int64_t vectors = columns / L, blocks = (vectors + kTileVectors - 1) / kTileVectors;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t from = vectors * i / blocks;
    with_vectors(vectors * (i + 1) / blocks - from, [&](auto n) {
      multiply_block<Dot, L, decltype(n)::value>(a, a_row, 1, b + from * L, columns, steps, c + from * L, columns, rows);
    });
  }
}

template <class Dot>
struct BackwardKeys {
  typedef typename Dot::Scalar Scalar;
  Scalar *rows, *steps, *value_rows;                 // [key][D / kPerScalar], [key / kPerScalar][D], [key][Dv / kPerScalar]
  float *bias, *grad_rows, *grad_value, *grad_bias;  // [key], [key][D rounded up to vectors], [key][Dv likewise], [key]

  BackwardKeys(Arena& arena, const SparseAttention& p, int64_t keys) {
    const int64_t padded = round_up(keys, kTileRows);
    rows = arena.take<Scalar>(padded * p.width / Dot::kPerScalar);
    steps = Dot::kPerScalar == 1 ? rows : arena.take<Scalar>(padded / Dot::kPerScalar * p.width);
    value_rows = arena.take<Scalar>(padded * p.value_width / Dot::kPerScalar);
    bias = arena.take<float>(padded);
    grad_rows = arena.take<float>(padded * round_up(p.width, L));
    grad_value = arena.take<float>(padded * round_up(p.value_width, L));
    grad_bias = arena.take<float>(padded);
  }
};

template <class T, class Dot, int V>
struct BackwardBlock {
  typedef typename Dot::Scalar Scalar;
  static constexpr int lanes = V * L, lane_scalars = lanes / Dot::kPerScalar;
  Scalar *query, *grad_out;              // [D / kPerScalar][lane], [Dv / kPerScalar][lane]
  Scalar *query_steps, *grad_out_steps;  // [lane / kPerScalar][D rounded up to vectors], [lane / kPerScalar][Dv likewise]
  Scalar *weights, *slopes;              // P and dS as [key][lane / kPerScalar]
  Scalar* slope_steps;                   // dS as [key / kPerScalar][lane]
  float *grad_query, *added;             // [D][lane], [key][lane]

  BackwardBlock(Arena arena, const SparseAttention& p) { take(arena, p); }
  void take(Arena& arena, const SparseAttention& p) {
    query = arena.take<Scalar>(p.width / Dot::kPerScalar * lanes);
    grad_out = arena.take<Scalar>(p.value_width / Dot::kPerScalar * lanes);
    query_steps = arena.take<Scalar>(lane_scalars * round_up(p.width, L));
    grad_out_steps = arena.take<Scalar>(lane_scalars * round_up(p.value_width, L));
    weights = arena.take<Scalar>(kKeyBlock * lane_scalars);
    slopes = arena.take<Scalar>(kKeyBlock * lane_scalars);
    slope_steps = Dot::kPerScalar == 1 ? slopes : arena.take<Scalar>(kKeyBlock * lane_scalars);
    grad_query = arena.take<float>(p.width * lanes);
    added = arena.take<float>(kKeyBlock * lanes);
  }

  void run(const SparseAttention& p, int64_t s, int64_t h, int64_t part, int64_t first, int64_t last, int64_t first_key, int64_t last_key,
           const BackwardKeys<Dot>& panel, const float* bias) {
    const RowList &queries = p.queries.at(s, h), &keys = p.keys.at(s, h / p.group());
    const int64_t scalars = p.width / Dot::kPerScalar, value_scalars = p.value_width / Dot::kPerScalar;
    const int64_t columns = round_up(p.width, L), value_columns = round_up(p.value_width, L);
    const int64_t count = last - first, padded = round_up(last_key - first_key, kTileRows);
    const float scale = p.scale * kLog2e;
    const Rows<T> query_rows = rows_of<T>(p.query, s, h, queries.row + first, count);
    const Rows<T> grad_rows = rows_of<T>(p.grad_out, s, h, queries.slot + first, count);
    pack_lanes<Dot>(query, V, query_rows, p.width);
    pack_lanes<Dot>(grad_out, V, grad_rows, p.value_width);
    pack_steps<Dot>(query_steps, columns, query_rows, lanes, p.width);
    pack_steps<Dot>(grad_out_steps, value_columns, grad_rows, lanes, p.value_width);
    memset(grad_query, 0, p.width * lanes * sizeof(float));

    float lse[lanes], delta[lanes], factor[lanes];
    const Rows<T> out_rows = rows_of<T>(p.out, s, h, queries.slot + first, count);
    for (int64_t i = 0; i < lanes; ++i) {
      factor[i] = p.scale;
      const float natural = i < count ? p.lse[s * p.stat_sequence + h * p.stat_head + queries.slot[first + i]] : -kInfinity;
      lse[i] = natural == -kInfinity ? kInfinity : to_log2(natural);  // a row without visible keys gets weights of zero
      delta[i] = i < count ? dot_rows(grad_rows.at(i), out_rows.at(i), p.value_width) : 0.f;
    }

    for (int64_t block = 0; block < padded; block += kKeyBlock) {
      const int64_t size = smaller(kKeyBlock, padded - block), from = first_key + block;
      const Visible visible = fill_mask(added, p, s, h, queries, first, last, keys, from, smaller(from + size, last_key), lanes);
      if (visible == Visible::nothing) continue;
      for (int64_t j = 0; j < size; j += kTileRows) {
        VecF<L> x[kTileRows][V], slope[kTileRows][V];
        logit_tile<Dot, V>(panel.rows + (block + j) * scalars, scalars, scalars, query, scale, bias ? bias + block + j : nullptr,
                           visible == Visible::partly ? added + j * lanes : nullptr, x);
#pragma GCC unroll 8
        for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
          for (int v = 0; v < V; ++v) {
            // huge logits: a float lse that was rounded below one of them must not make a weight of more than one
            x[r][v] = exp2<L, Dot::kExpDegree>(min(VecF<L>{}, x[r][v] - load<L>(lse + v * L)));
            slope[r][v] = VecF<L>{};
          }
        store_rows<Dot, V>(weights + j * lane_scalars, x);
        multiply_tile<Dot, L, kTileRows, V>(panel.value_rows + (block + j) * value_scalars, value_scalars, 1, grad_out, lanes,
                                            value_scalars, slope);
#pragma GCC unroll 8
        for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
          for (int v = 0; v < V; ++v) slope[r][v] = x[r][v] * (slope[r][v] - load<L>(delta + v * L));
        store_rows<Dot, V>(slopes + j * lane_scalars, slope);
        if constexpr (Dot::kPerScalar > 1) store_steps<Dot, V>(slope_steps + j * lane_scalars, slope);
        if (p.grad_bias)
          for (int r = 0; r < kTileRows; ++r) {
            VecF<L> sum = slope[r][0];
            for (int v = 1; v < V; ++v) sum += slope[r][v];
            panel.grad_bias[block + j + r] += sum_lanes(sum);
          }
      }
      if (p.grad_value.data)
        multiply_wide<Dot>(weights, lane_scalars, grad_out_steps, lane_scalars, panel.grad_value + block * value_columns, size,
                           value_columns);
      if (p.grad_key.data)
        multiply_wide<Dot>(slopes, lane_scalars, query_steps, lane_scalars, panel.grad_rows + block * columns, size, columns);
      if (p.grad_query.data)
        multiply_block<Dot, L, V>(panel.steps + block / Dot::kPerScalar * p.width, 1, p.width, slope_steps, lanes, size / Dot::kPerScalar,
                                  grad_query, lanes, p.width);
    }
    if (!p.grad_query.data) return;
    if (p.grad_query_parts)
      unpack_lanes(p.grad_query_parts + part * p.part_stride + s * p.part_sequence + h * p.part_head, p.width, queries.slot + first, count,
                   grad_query, V, factor, p.width, false);
    else
      unpack_lanes(head_of<T>(p.grad_query, s, h), p.grad_query.row, queries.row + first, count, grad_query, V, factor, p.width,
                   p.past_caches);
  }
};

template <class T, class Dot>
void backward_head(const SparseAttention& p, int64_t s, int64_t kv_head, int64_t part, int64_t first_key, int64_t last_key, char* scratch) {
  const RowList& keys = p.keys.at(s, kv_head);
  const int32_t* row = keys.row + first_key;
  const int64_t count = last_key - first_key, padded = round_up(count, kTileRows);
  const int64_t columns = round_up(p.width, L), value_columns = round_up(p.value_width, L);
  Arena arena{scratch};
  BackwardKeys<Dot> panel(arena, p, count);
  const Rows<T> key_rows = rows_of<T>(p.key, s, kv_head, row, count);
  pack_rows<Dot>(panel.rows, p.width / Dot::kPerScalar, key_rows, padded, p.width, Fill::last_row);
  if constexpr (Dot::kPerScalar > 1) pack_steps<Dot>(panel.steps, p.width, key_rows, padded, p.width);
  pack_rows<Dot>(panel.value_rows, p.value_width / Dot::kPerScalar, rows_of<T>(p.value, s, kv_head, row, count), padded, p.value_width,
                 Fill::zeros);
  const float* bias = pack_bias(panel.bias, p, s, kv_head, row, count, padded);
  memset(panel.grad_rows, 0, padded * columns * sizeof(float));
  memset(panel.grad_value, 0, padded * value_columns * sizeof(float));
  memset(panel.grad_bias, 0, padded * sizeof(float));

  for_query_blocks(p, s, kv_head, 0, INT64_MAX, [&](int64_t h, int64_t first, int64_t last) {
    with_vectors(query_vectors(last - first), [&](auto vectors) {
      BackwardBlock<T, Dot, decltype(vectors)::value>(arena, p).run(p, s, h, part, first, last, first_key, last_key, panel, bias);
    });
    const RowList& queries = p.queries.at(s, h);
    if (first == 0 && part == 0 && p.grad_query.data)
      zero_rows(head_of<T>(p.grad_query, s, h), p.grad_query.row, queries.rest, queries.rests, p.width);
  });

  const bool whole = part == 0;  // the first part also writes the rows that no list names
  if (p.grad_key.data) {
    T* to = head_of<T>(p.grad_key, s, kv_head);
    unpack_rows(to, p.grad_key.row, row, count, panel.grad_rows, columns, p.scale, p.width, p.past_caches);
    if (whole) zero_rows(to, p.grad_key.row, keys.rest, keys.rests, p.width);
  }
  if (p.grad_value.data) {
    T* to = head_of<T>(p.grad_value, s, kv_head);
    unpack_rows(to, p.grad_value.row, row, count, panel.grad_value, value_columns, 1.f, p.value_width, p.past_caches);
    if (whole) zero_rows(to, p.grad_value.row, keys.rest, keys.rests, p.value_width);
  }
  if (p.grad_bias) {
    float* to = p.grad_bias + s * p.grad_bias_sequence + kv_head * p.grad_bias_head;
    for (int64_t j = 0; j < count; ++j) to[row[j]] = panel.grad_bias[j];
    if (whole)
      for (int64_t j = 0; j < keys.rests; ++j) to[keys.rest[j]] = 0.f;
  }
  stream_fence();
}

template <class T, class Dot>
int64_t backward_bytes(const SparseAttention& p, int64_t keys) {
  Arena arena{nullptr};
  BackwardKeys<Dot>(arena, p, keys);
  BackwardBlock<T, Dot, kTileVectors>(arena, p).take(arena, p);
  return arena.used;
}

// adds up what the parts of a head found for its queries, in their order
template <class T>
void sum_query_parts(const SparseAttention& p, int64_t s, int64_t h, int64_t parts) {
  const RowList& queries = p.queries.at(s, h);
  const float* from = p.grad_query_parts + s * p.part_sequence + h * p.part_head;
  T* to = head_of<T>(p.grad_query, s, h);
  for (int64_t i = 0; i < queries.count; ++i)
    for (int64_t c = 0; c < p.width; c += L) {
      const float* share = from + queries.slot[i] * p.width + c;
      const int64_t columns = smaller(L, p.width - c);
      VecF<L> sum{};
      for (int64_t part = 0; part < parts; ++part, share += p.part_stride)
        sum += columns == L ? load<L>(share) : load_first<L>(share, columns);
      write<L>(to + queries.row[i] * p.grad_query.row, c, p.width, sum, p.past_caches);
    }
  stream_fence();
}

// ---- the table: which storage type runs on which dot product ----

#if defined(__AVX512BF16__)
typedef Bf16Dot DotOfBf16;
#else
typedef FloatDot DotOfBf16;
#endif

template <class T, class Dot>
struct Types {};
template <class F>
auto with_types(Storage storage, F&& f) {
  switch (storage) {
    case Storage::bf16: return f(Types<bf16, DotOfBf16>{});
    case Storage::f16: return f(Types<f16, FloatDot>{});
    case Storage::f32: break;
  }
  return f(Types<float, FloatDot>{});
}

int64_t forward_scratch(const SparseAttention& p, int64_t keys) {
  return with_types(p.storage, [&]<class T, class Dot>(Types<T, Dot>) { return forward_bytes<T, Dot>(p, keys); });
}
void forward(const SparseAttention& p, int64_t s, int64_t h, int64_t first, int64_t last, bool packed, char* scratch) {
  with_types(p.storage, [&]<class T, class Dot>(Types<T, Dot>) { forward_head<T, Dot>(p, s, h, first, last, packed, scratch); });
}
void forward_short(const SparseAttention& p, int64_t first, int64_t last, char* scratch) {
  with_types(p.storage, [&]<class T, class Dot>(Types<T, Dot>) { forward_short_heads<T, Dot>(p, first, last, scratch); });
}
int64_t backward_scratch(const SparseAttention& p, int64_t keys) {
  return with_types(p.storage, [&]<class T, class Dot>(Types<T, Dot>) { return backward_bytes<T, Dot>(p, keys); });
}
void backward(const SparseAttention& p, int64_t s, int64_t h, int64_t part, int64_t first_key, int64_t last_key, char* scratch) {
  with_types(p.storage, [&]<class T, class Dot>(Types<T, Dot>) { backward_head<T, Dot>(p, s, h, part, first_key, last_key, scratch); });
}
void sum_parts(const SparseAttention& p, int64_t s, int64_t h, int64_t parts) {
  with_types(p.storage, [&]<class T, class Dot>(Types<T, Dot>) { sum_query_parts<T>(p, s, h, parts); });
}

}  // namespace

const SparseAttentionLoops& sparse_attention() {
  static constexpr SparseAttentionLoops loops{query_blocks,  forward_scratch,  forward,  is_short,
                                              forward_short, backward_scratch, backward, sum_parts};
  return loops;
}

}  // namespace TOKENOPS_ISA
}  // namespace tokenops
