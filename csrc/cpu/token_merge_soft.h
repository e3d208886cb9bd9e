// Soft merging: every token is shared out over M meta tokens by a softmax of its similarities, and each meta token collects the
// mean of what it got. Scores live in scratch memory for one block of tokens at a time and are computed again in the backward pass.
//
// Tokens stand in lanes, 1 to 3 vectors of them; meta tokens are broadcast. So the softmax over meta tokens is vertical, and the
// block of weights [meta][lane] feeds both products with it as it is: over tokens into the sums, over meta tokens into gradients.
#pragma once

#include "row_norms.h"
#include "token_merge.h"

namespace tokenops {
namespace TOKENOPS_ISA {
namespace {

constexpr int64_t kBlockLanes = kTileVectors * kLanes;

int64_t padded_metas(const SoftMerge& p) { return round_up(p.metas, kTileRows); }
int64_t padded_width(const SoftMerge& p) { return round_up(p.width, kLanes); }
int64_t padded_metric(const SoftMerge& p) { return round_up(p.metric_width, kLanes); }

// ids that name the rows of a grid one after another, for the packing that takes a list
struct Range {
  int32_t* id;
  Range(Arena& arena) { id = arena.take<int32_t>(kBlockLanes); }
  template <class T>
  Rows<T> rows(const void* data, int64_t row, int64_t first, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) id[i] = (int32_t)i;
    return {(const T*)data + first * row, row, id, count};
  }
};

// directions of the meta tokens, and what takes a gradient with respect to a direction to one of the row
struct Metas {
  float* rows;   // [padded metas][padded metric]
  float* slope;  // [padded metas]

  Metas(Arena& arena, const SoftMerge& p) {
    rows = arena.take<float>(padded_metas(p) * padded_metric(p));
    slope = arena.take<float>(padded_metas(p));
  }

  template <class T>
  bool pack(const SoftMerge& p, const SoftSample& s) {
    const int64_t to_row = padded_metric(p);
    memset(rows, 0, padded_metas(p) * to_row * sizeof(float));
    bool finite = true;
    for (int64_t m = 0; m < p.metas; ++m) {
      const T* from = (const T*)s.meta + m * s.meta_row;
      const RowNorm norm = norm_of(from, p.metric_width);
      finite &= norm.finite;
      slope[m] = p.normalize ? norm.inverse * norm.by : 1.f;
      for (int64_t f = 0; f < p.metric_width; ++f) {
        const float x = to_float(from[f]);
        rows[m * to_row + f] = p.normalize ? x * norm.by * norm.inverse : x;
      }
    }
    return finite;
  }
};

// a block of tokens as the similarities see it
struct TokenBlock {
  float* lanes;      // [metric][lane], rows of a usual magnitude
  float* direction;  // [lane] factor from there to the direction
  float* slope;      // [lane] gradient with respect to a direction -> to the row
  float* mass;       // [lane], 0 past the end
  int64_t first, count;

  TokenBlock(Arena& arena, const SoftMerge& p) {
    lanes = arena.take<float>(p.metric_width * kBlockLanes);
    direction = arena.take<float>(kBlockLanes), slope = arena.take<float>(kBlockLanes), mass = arena.take<float>(kBlockLanes);
  }

  template <class T, int V>
  bool pack(const SoftMerge& p, const SoftSample& s, const Range& range, int64_t from, int64_t to) {
    first = from, count = to - from;
    const Rows<T> rows = range.rows<T>(s.metric, s.metric_row, first, count);
    pack_lanes<FloatDot>(lanes, V, rows, p.metric_width, Fill::last_row);
    bool right = true;
    for (int64_t i = 0; i < V * kLanes; ++i) {
      const RowNorm norm = norm_of(rows.at(smaller(i, count - 1)), p.metric_width);
      const bool scaled = p.normalize && norm.by != 1.f;
      if (scaled) scale_packed<FloatDot>(lanes + i, V * kLanes, p.metric_width, norm.by);
      direction[i] = p.normalize ? norm.inverse : 1.f;
      slope[i] = p.normalize ? norm.inverse * norm.by : 1.f;
      mass[i] = i >= count ? 0.f : s.mass ? s.mass[(first + i) * s.mass_row] : 1.f;
      right &= norm.finite && mass[i] >= 0.f;
    }
    return right;
  }
};

// similarities over temperature of a block, in units of log2: to[meta][lane]; -inf in the rows that fill up the last tile
template <int V>
void block_logits(float* to, const SoftMerge& p, const Metas& metas, const TokenBlock& block) {
  constexpr int L = kLanes;
  VecF<L> factor[V];
  for (int v = 0; v < V; ++v) factor[v] = load<L>(block.direction + v * L) * (kLog2e / p.temperature);
  for (int64_t m = 0; m < p.metas; m += kTileRows) {
    VecF<L> tile[kTileRows][V];
    clear<L>(tile);
    multiply_tile<FloatDot, L, kTileRows, V>(metas.rows + m * padded_metric(p), padded_metric(p), 1, block.lanes, V * L, p.metric_width,
                                             tile);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v)
        store<L>(to + ((m + r) * V + v) * L, m + r < p.metas ? tile[r][v] * factor[v] : splat<L>(-__builtin_inff()));
  }
}

// c[row][0, columns) += sum over steps of a(row, step) * b[step], in vectors across the columns
TOKENOPS_INLINE void multiply_columns(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step, int64_t steps,
                                      float* c, int64_t c_row, int64_t rows, int64_t columns) {
  for (int64_t from = 0; from < columns; from += kBlockLanes)
    with_vectors(smaller(columns - from, kBlockLanes) / kLanes, [&](auto constant) {
      multiply_block<FloatDot, kLanes, decltype(constant)::value>(a, a_row, a_step, b + from, b_step, steps, c + from, c_row, rows);
    });
}

// rows of x for a product across their channels: in place where vectors fit, else packed
template <class T>
const float* rows_across(float* packed, const Rows<T>& rows, int64_t width, int64_t* step) {
  if constexpr (sizeof(T) == sizeof(float))
    if (width % kLanes == 0) {
      *step = rows.stride;
      return rows.base;
    }
  *step = round_up(width, kLanes);
  pack_steps<FloatDot>(packed, *step, rows, rows.count, width);
  return packed;
}

// calls f(first, last, vectors) for blocks of tokens of even size
template <class F>
void for_token_blocks(int64_t first, int64_t last, F&& f) {
  const int64_t vectors = (last - first + kLanes - 1) / kLanes, blocks = (vectors + kTileVectors - 1) / kTileVectors;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t from = vectors * i / blocks, to = vectors * (i + 1) / blocks;
    with_vectors(to - from, [&](auto constant) { f(first + from * kLanes, smaller(first + to * kLanes, last), constant); });
  }
}

// ---- forward ----

struct SoftScratch {
  Range range;
  Metas metas;
  TokenBlock block;
  float* weights;  // [padded metas][lane]
  float* x;        // [lane][padded width]

  SoftScratch(Arena arena, const SoftMerge& p) : range(arena), metas(arena, p), block(arena, p) {
    weights = arena.take<float>(padded_metas(p) * kBlockLanes);
    x = arena.take<float>(kBlockLanes * padded_width(p));
    bytes = arena.used;
  }
  int64_t bytes;
};

int64_t soft_scratch(const SoftMerge& p) { return SoftScratch(Arena{nullptr}, p).bytes; }
// sums [padded metas][padded width], then masses [padded metas]
int64_t soft_part(const SoftMerge& p) { return padded_metas(p) * (padded_width(p) + 1); }

template <class T>
bool soft_tokens(const SoftMerge& p, const SoftSample& s, int64_t first, int64_t last, float* part, char* memory) {
  constexpr int L = kLanes;
  const int64_t metas = padded_metas(p), width = padded_width(p);
  SoftScratch scratch(Arena{memory}, p);
  float *sums = part, *masses = part + metas * width;
  memset(part, 0, soft_part(p) * sizeof(float));
  bool right = scratch.metas.pack<T>(p, s);
  for_token_blocks(first, last, [&](int64_t from, int64_t to, auto vectors) {
    constexpr int V = decltype(vectors)::value;
    TokenBlock& block = scratch.block;
    right &= block.template pack<T, V>(p, s, scratch.range, from, to);
    float* weights = scratch.weights;
    block_logits<V>(weights, p, scratch.metas, block);
    VecF<L> top[V], total[V];
    for (int v = 0; v < V; ++v) top[v] = splat<L>(-__builtin_inff()), total[v] = VecF<L>{};
    for (int64_t m = 0; m < p.metas; ++m)
      for (int v = 0; v < V; ++v) top[v] = max(load<L>(weights + (m * V + v) * L), top[v]);
    for (int64_t m = 0; m < metas; ++m)
      for (int v = 0; v < V; ++v) {
        const VecF<L> weight = exp2<L, 5>(load<L>(weights + (m * V + v) * L) - top[v]);
        total[v] += weight;
        store<L>(weights + (m * V + v) * L, weight);
      }
    VecF<L> by[V];
    float lse[V * L];
    for (int v = 0; v < V; ++v) {
      by[v] = load<L>(block.mass + v * L) / total[v];
      store<L>(lse + v * L, (top[v] + log2<L>(total[v])) * kLn2);
    }
    memcpy(s.lse + from, lse, block.count * sizeof(float));
    for (int64_t m = 0; m < metas; ++m) {
      VecF<L> sum{};
      for (int v = 0; v < V; ++v) {
        const VecF<L> weight = load<L>(weights + (m * V + v) * L) * by[v];
        sum += weight;
        store<L>(weights + (m * V + v) * L, weight);
      }
      masses[m] += sum_lanes(sum);
    }
    int64_t step;
    const float* x = rows_across(scratch.x, scratch.range.template rows<T>(s.x, s.x_row, from, block.count), p.width, &step);
    multiply_columns(weights, V * L, 1, x, step, block.count, sums, width, metas, width);
  });
  return right;
}

// a row of float results in the storage type
template <class T>
void write_row(T* to, const float* from, int64_t width) {
  for (int64_t c = 0; c < width; c += kLanes) write<kLanes>(to, c, width, load<kLanes>(from + c), false);
}

// adds up the parts of a sample in order
TOKENOPS_INLINE void sum_row(float* to, const float* parts, int64_t at, int64_t part, int64_t count, int64_t columns) {
  for (int64_t c = 0; c < columns; c += kLanes) {
    VecF<kLanes> sum = load<kLanes>(parts + at + c);
    for (int64_t i = 1; i < count; ++i) sum += load<kLanes>(parts + i * part + at + c);
    store<kLanes>(to + c, sum);
  }
}
float sum_element(const float* parts, int64_t at, int64_t part, int64_t count) {
  float sum = parts[at];
  for (int64_t i = 1; i < count; ++i) sum += parts[i * part + at];
  return sum;
}

// What rows are divided by: no reciprocal, which overflows where a meta token resembles nothing and has a denormal mass.
float divisor_of(float mass) { return mass == 0.f ? 1.f : mass; }

void soft_results(const SoftMerge& p, const SoftSample& s, float* parts, int64_t count) {
  const int64_t width = padded_width(p), part = soft_part(p), masses = padded_metas(p) * width;
  for (int64_t m = 0; m < p.metas; ++m) {
    const float mass = sum_element(parts, masses + m, part, count), by = divisor_of(mass);
    s.mass_out[m] = mass;
    // the first part has been read by then, and is no longer needed
    float* row = parts + m * width;
    sum_row(row, parts, m * width, part, count, width);
    for (int64_t c = 0; c < width; c += kLanes) store<kLanes>(row + c, mass == 0.f ? VecF<kLanes>{} : load<kLanes>(row + c) / by);
    write_row(s.out + m * s.out_row, row, p.width);
  }
}

// ---- backward ----

// Gradient of the rows out [padded metas][padded width], what comes from elsewhere [padded metas], divisors [padded metas]. A weight's
// gradient is (<grad_out, x> + the second) / divisor: a weight may be as small as its mass, so the two are divided first.
int64_t soft_prepared(const SoftMerge& p) { return soft_part(p) + padded_metas(p); }
// gradient of the directions [padded metas][padded metric], its part along the direction [padded metas], temperature [1]
int64_t soft_backward_part(const SoftMerge& p) { return padded_metas(p) * (padded_metric(p) + 1) + kLanes; }

void prepare_sample(const SoftMerge& p, const SoftSample& s, float* prepared) {
  const int64_t width = padded_width(p);
  float *masses = prepared + padded_metas(p) * width, *divisors = masses + padded_metas(p);
  memset(prepared, 0, soft_prepared(p) * sizeof(float));
  for (int64_t m = 0; m < padded_metas(p); ++m) {
    divisors[m] = divisor_of(m < p.metas ? s.mass_out[m] : 0.f);
    if (m >= p.metas) continue;
    const float *grad = s.grad_out + m * s.grad_out_row, *out = s.out + m * s.out_row;
    masses[m] = s.grad_mass_out[m] * divisors[m];
    // nothing depends on the row of a meta token without mass
    if (s.mass_out[m] == 0.f) continue;
    memcpy(prepared + m * width, grad, p.width * sizeof(float));
    masses[m] -= dot_rows(grad, out, p.width);
  }
}

struct SoftBackwardScratch {
  Range range;
  Metas metas;
  TokenBlock block;
  float *logits, *weights, *grads;  // [padded metas][lane]
  float* x;                         // [width][lane]
  float* tokens;                    // [lane][padded metric] directions
  float* columns;                   // [padded width or metric][lane] gradients of tokens
  float* ones;

  SoftBackwardScratch(Arena arena, const SoftMerge& p) : range(arena), metas(arena, p), block(arena, p) {
    const int64_t tile = padded_metas(p) * kBlockLanes, wide = padded_width(p), narrow = padded_metric(p);
    logits = arena.take<float>(tile), weights = arena.take<float>(tile), grads = arena.take<float>(tile);
    x = arena.take<float>(p.width * kBlockLanes);
    tokens = arena.take<float>(kBlockLanes * narrow);
    columns = arena.take<float>((wide > narrow ? wide : narrow) * kBlockLanes);
    ones = arena.take<float>(kBlockLanes);
    bytes = arena.used;
  }
  int64_t bytes;
};

int64_t soft_backward_scratch(const SoftMerge& p) { return SoftBackwardScratch(Arena{nullptr}, p).bytes; }

template <class T>
void soft_tokens_backward(const SoftMerge& p, const SoftSample& s, const float* prepared, int64_t first, int64_t last, float* part,
                          char* memory) {
  constexpr int L = kLanes;
  const int64_t metas = padded_metas(p), width = padded_width(p), metric = padded_metric(p);
  const float *grad_out = prepared, *grad_masses = grad_out + metas * width, *divisors = grad_masses + metas;
  float *directions = part, *along_metas = part + metas * metric, *temperature = along_metas + metas;
  SoftBackwardScratch scratch(Arena{memory}, p);
  memset(part, 0, soft_backward_part(p) * sizeof(float));
  scratch.metas.pack<T>(p, s);
  for (int64_t i = 0; i < kBlockLanes; ++i) scratch.ones[i] = 1.f;
  VecF<L> warmth{};
  for_token_blocks(first, last, [&](int64_t from, int64_t to, auto vectors) {
    constexpr int V = decltype(vectors)::value;
    TokenBlock& block = scratch.block;
    float *logits = scratch.logits, *weights = scratch.weights, *grads = scratch.grads;
    block.template pack<T, V>(p, s, scratch.range, from, to);
    block_logits<V>(logits, p, scratch.metas, block);
    const Rows<T> x = scratch.range.template rows<T>(s.x, s.x_row, from, block.count);
    pack_lanes<FloatDot>(scratch.x, V, x, p.width, Fill::last_row);
    VecF<L> lse[V], mass[V], total[V], share[V];  // share: what the softmax takes off every weight's gradient
    float lse_of[V * L];
    // lanes past the end get no weight
    for (int64_t i = 0; i < V * L; ++i) lse_of[i] = i < block.count ? s.lse[from + i] * kLog2e : __builtin_inff();
    for (int v = 0; v < V; ++v) lse[v] = load<L>(lse_of + v * L), mass[v] = load<L>(block.mass + v * L), total[v] = share[v] = VecF<L>{};
    for (int64_t m = 0; m < metas; m += kTileRows) {
      VecF<L> tile[kTileRows][V];
      clear<L>(tile);
      multiply_tile<FloatDot, L, kTileRows, V>(grad_out + m * width, width, 1, scratch.x, V * L, p.width, tile);
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
        for (int v = 0; v < V; ++v) {
          const int64_t at = ((m + r) * V + v) * L;
          const VecF<L> weight = exp2<L, 5>(load<L>(logits + at) - lse[v]), ratio = weight / divisors[m + r];
          const VecF<L> grad = tile[r][v] + grad_masses[m + r];
          total[v] += weight, share[v] += ratio * grad;
          store<L>(weights + at, ratio), store<L>(grads + at, grad);
        }
    }
    for (int v = 0; v < V; ++v) {
      // the weights of a token sum to one only up to rounding: what is taken off must match them, or it does not cancel
      const VecF<L> by = total[v] == 0.f ? VecF<L>{} : 1.f / total[v];
      share[v] *= by, mass[v] *= by;
    }
    if (s.grad_mass) {
      float grad_mass[V * L];
      for (int v = 0; v < V; ++v) store<L>(grad_mass + v * L, share[v]);
      memcpy(s.grad_mass + from, grad_mass, block.count * sizeof(float));
    }
    // weights become those of the rows out, grads those of the similarities
    VecF<L> along[V];
    for (int v = 0; v < V; ++v) along[v] = VecF<L>{};
    const float cool = 1.f / p.temperature;
    for (int64_t m = 0; m < p.metas; ++m) {
      VecF<L> along_meta{};
      for (int v = 0; v < V; ++v) {
        const int64_t at = (m * V + v) * L;
        const VecF<L> weight = load<L>(weights + at) * mass[v];
        const VecF<L> grad = weight * (load<L>(grads + at) - divisors[m] * share[v]) * cool;
        const VecF<L> similar = load<L>(logits + at) * (kLn2 * p.temperature);
        along[v] += grad * similar, along_meta += grad * similar;
        store<L>(weights + at, weight), store<L>(grads + at, grad);
      }
      along_metas[m] += sum_lanes(along_meta);
    }
    for (int v = 0; v < V; ++v) warmth -= along[v] * cool;
    if (s.grad_x) {
      memset(scratch.columns, 0, width * V * L * sizeof(float));
      multiply_columns(grad_out, 1, width, weights, V * L, p.metas, scratch.columns, V * L, width, V * L);
      const Rows<T> rows = scratch.range.template rows<T>(s.x, s.x_row, 0, block.count);
      unpack_lanes((T*)s.grad_x + from * s.grad_x_row, s.grad_x_row, rows.row, block.count, scratch.columns, V, scratch.ones, p.width,
                   false);
    }
    if (s.grad_metric) {
      memset(scratch.columns, 0, metric * V * L * sizeof(float));
      multiply_columns(scratch.metas.rows, 1, metric, grads, V * L, p.metas, scratch.columns, V * L, metric, V * L);
      if (p.normalize)
        for (int64_t f = 0; f < p.metric_width; ++f)
          for (int v = 0; v < V; ++v) {
            const VecF<L> direction = load<L>(block.lanes + (f * V + v) * L) * load<L>(block.direction + v * L);
            store<L>(scratch.columns + (f * V + v) * L, load<L>(scratch.columns + (f * V + v) * L) - along[v] * direction);
          }
      const Rows<T> rows = scratch.range.template rows<T>(s.metric, s.metric_row, 0, block.count);
      unpack_lanes((T*)s.grad_metric + from * s.grad_metric_row, s.grad_metric_row, rows.row, block.count, scratch.columns, V, block.slope,
                   p.metric_width, false);
    }
    if (s.grad_meta) {
      const Rows<T> rows = scratch.range.template rows<T>(s.metric, s.metric_row, from, block.count);
      pack_steps<FloatDot>(scratch.tokens, metric, rows, block.count, p.metric_width);
      for (int64_t i = 0; i < block.count; ++i) scale_packed<FloatDot>(scratch.tokens + i * metric, 1, p.metric_width, block.slope[i]);
      multiply_columns(grads, V * L, 1, scratch.tokens, metric, block.count, directions, metric, metas, metric);
    }
  });
  *temperature = sum_lanes(warmth);
}

template <class T>
void soft_gradients(const SoftMerge& p, const SoftSample& s, float* parts, int64_t count, char* memory) {
  const int64_t metas = padded_metas(p), metric = padded_metric(p), part = soft_backward_part(p);
  if (s.grad_temperature) *s.grad_temperature = sum_element(parts, metas * (metric + 1), part, count);
  if (!s.grad_meta) return;
  SoftBackwardScratch scratch(Arena{memory}, p);
  scratch.metas.pack<T>(p, s);
  for (int64_t m = 0; m < p.metas; ++m) {
    const float along = p.normalize ? sum_element(parts, metas * metric + m, part, count) : 0.f;
    float* row = parts + m * metric;
    sum_row(row, parts, m * metric, part, count, metric);
    const float* direction = scratch.metas.rows + m * metric;
    for (int64_t f = 0; f < metric; f += kLanes)
      store<kLanes>(row + f, (load<kLanes>(row + f) - along * load<kLanes>(direction + f)) * scratch.metas.slope[m]);
    write_row((T*)s.grad_meta + m * s.grad_meta_row, row, p.metric_width);
  }
}

}  // namespace
}  // namespace TOKENOPS_ISA
}  // namespace tokenops
