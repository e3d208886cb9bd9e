// Soft merging. Token n gives meta token m the weight w[n, m] = exp2(z[n, m] - origin[n]) * weight[n], where z is the similarity over the
// temperature, in base 2. Scores live in registers: every kernel that needs a tile of them, 128 tokens by 64 meta tokens, multiplies it
// anew, always in the same way, for at low temperatures the last bit of a score decides over a weight.
//
// A result is a sum over tokens or over meta tokens of weights, or of gradients, times rows. Each of its tiles has one block, which walks
// in ascending order. Sums over tokens are shared out among blocks, whose parts are added up in order: no atomics, the same bits in every
// run.
#pragma once

#include "token_merge_describe.cuh"

namespace tokenops {
namespace {

constexpr int kTokens = kRowsA, kMetas = kRowsB;
template <class T, int kStages>
using SoftTiles = TileShared<T, kStages, 1>;
template <class T>
using Scores = Products<T, 1>;
constexpr int kSoftThreads = SoftTiles<float, 1>::kThreads, kSoftWarps = kSoftThreads / kWarp, kWarpRows = SoftTiles<float, 1>::kWarpRows;
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// rows of a grid that are not compared
template <class T>
struct PlainRows {
  const T* base;
  int64_t sample, row;
  int rows, width;
  bool wide;
  __device__ Grid<T> grid(int64_t s) const { return {base + s * sample, row, nullptr, rows, rows, width, wide, nullptr}; }
};

template <class T>
struct SoftArguments : DescribeArguments<T> {  // a: metric [B, N, F], b: meta [B, M, F]
  PlainRows<T> x, grad_out;                    // [B, N, C], [B, M, C]
  int tokens, metas;
  float temperature;
  const float* learned;  // instead, or null
  const float* mass;     // or null: ones
  int64_t mass_sample, mass_token;
  float* lse;                      // [B, N]
  float *origin, *weight, *share;  // [B, N]; the share is what a softmax takes off every weight's gradient
  float *divisor, *added, *open;   // [B, M]: mass, what a weight's gradient has beside <grad_out, x>, whether that counts
  T* result;                       // [B, N, columns] or null
  float* warmth;                   // [B, token blocks] or null: parts of the temperature's gradient
  float *part, *part_sum;          // [splits, B, M, columns], [2, splits, B, M]
  int columns, blocks, splits;     // of a result; blocks of its columns

  __device__ float coolness() const { return 1.0f / (learned ? *learned : temperature); }
  __device__ float mass_of(int64_t s, int n) const { return mass ? mass[s * mass_sample + n * mass_token] : 1.0f; }
  __device__ bool shrinks(int64_t s, int token_block, int meta_block) const {
    return this->usual &&
           (this->a.of.unusual[s * this->a.of.blocks + token_block] || this->b.of.unusual[s * this->b.of.blocks + meta_block]);
  }
};

// Kernels must round a score alike: nothing may be fused with what follows in one of them.
__device__ __forceinline__ float similarity(float product, float token_factor, float meta_factor) {
  return __fmul_rn(__fmul_rn(product, token_factor), meta_factor);
}

struct NoLoad {
  __device__ void operator()(int, int) const {}
};
struct All {
  __device__ bool operator()(int) const { return true; }
};

// What tokens know of all their scores: origin, weight, lse. A block of tokens.
template <class T>
__global__ void __launch_bounds__(kSoftThreads) token_softmax(const SoftArguments<T> p) {
  using Own = Scores<T>;
  auto& shared = shared_memory<SoftTiles<T, 3>>();
  const int block = blockIdx.x % p.a.of.blocks, n_first = block * kTokens;
  const int64_t s = blockIdx.x / p.a.of.blocks;
  const float cool = p.coolness() * kLog2e;
  bool shrinks = false;
  for (int i = 0; i < p.b.of.blocks; ++i) shrinks |= p.shrinks(s, block, i);
  const auto token = [&](int i) { return n_first + warp_id() * kWarpRows + Own::row(i); };
  const float *token_factor = p.a.of.factor + s * p.a.of.pitch, *meta_factor = p.b.of.factor + s * p.b.of.pitch;
  float factor[Own::kOwnRows], highest[Own::kOwnRows], total[Own::kOwnRows];
#pragma unroll
  for (int i = 0; i < Own::kOwnRows; ++i) {
    highest[i] = -infinity(), total[i] = 0.0f;
    factor[i] = token(i) < p.tokens ? token_factor[token(i)] : 0.0f;
  }
  const auto use = [&](int tile, int, Own& products) {
    const int m_first = tile * kMetas;
#pragma unroll
    for (int i = 0; i < Own::kOwnRows; ++i) {
      float above = highest[i];
#pragma unroll
      for (int j = 0; j < Own::kOwnColumns; ++j) {
        const int m = m_first + Own::column(j);
        float& score = products.at(i, j);
        score = m < p.metas ? __fmul_rn(similarity(score, factor[i], meta_factor[m]), cool) : -infinity();
        above = fmaxf(above, score);
      }
      // no meta token of this thread's yet
      if (above == -infinity()) continue;
      total[i] *= exp2_fast(highest[i] - above);
#pragma unroll
      for (int j = 0; j < Own::kOwnColumns; ++j) total[i] += exp2_fast(products.at(i, j) - above);
      highest[i] = above;
    }
  };
  for_tiles(shared, p.a.grid(s, p.width, p.usual), n_first, p.b.grid(s, p.width, p.usual), 0, p.b.of.blocks, true, shrinks, All{}, NoLoad{},
            use);
#pragma unroll
  for (int i = 0; i < Own::kOwnRows; ++i) {
    const float top = max_lanes<Own::kSharers>(highest[i]);
    const float sum = sum_lanes<Own::kSharers>(total[i] * exp2_fast(highest[i] - top));
    const int n = token(i);
    if (lane_id() % Own::kSharers || n >= p.tokens) continue;
    const int64_t at = s * p.tokens + n;
    p.lse[at] = (top + log2_fast(sum)) * kLn2, p.origin[at] = top, p.weight[at] = p.mass_of(s, n) / sum;
  }
}

// What a tile of weights needs of its tokens and of its meta tokens.
struct TileTerms {
  float factor[kTokens], origin[kTokens], weight[kTokens], share[kTokens];
  float meta_factor[kMetas], divisor[kMetas], added[kMetas], open[kMetas];
};

template <class T, bool kGradient>
__device__ __forceinline__ void load_terms(TileTerms& terms, const SoftArguments<T>& p, int64_t s, int n_first, int m_first,
                                           bool of_results) {
  static_assert(kSoftThreads >= kTokens + kMetas);
  if (static_cast<int>(threadIdx.x) < kTokens) {
    const int i = threadIdx.x, n = n_first + i;
    const bool is_token = n < p.tokens;
    // outside, a weight of 0
    terms.factor[i] = is_token ? p.a.of.factor[s * p.a.of.pitch + n] : 0.0f;
    terms.origin[i] = is_token ? p.origin[s * p.tokens + n] : 0.0f;
    terms.weight[i] = is_token ? p.weight[s * p.tokens + n] : 0.0f;
    if (kGradient) terms.share[i] = is_token ? p.share[s * p.tokens + n] : 0.0f;
    return;
  }
  const int i = threadIdx.x - kTokens, m = m_first + i;
  if (i >= kMetas) return;
  const bool is_meta = m < p.metas;
  terms.meta_factor[i] = is_meta ? p.b.of.factor[s * p.b.of.pitch + m] : 0.0f;
  if (!of_results) return;
  terms.divisor[i] = is_meta ? p.divisor[s * p.metas + m] : 1.0f;
  terms.added[i] = is_meta ? p.added[s * p.metas + m] : 0.0f;
  terms.open[i] = is_meta ? p.open[s * p.metas + m] : 0.0f;
}

// Products of 128 rows of a with 64 of b. The block's warps may still be at what was in shared memory before.
template <class T, int kStages>
__device__ __forceinline__ void multiply(Scores<T>& result, SoftTiles<T, kStages>& shared, const Grid<T>& a, int a_first, const Grid<T>& b,
                                         int tile, bool shrinks) {
  for_tiles(shared, a, a_first, b, tile, tile + 1, true, shrinks, All{}, NoLoad{}, [&](int, int, Scores<T>& products) {
#pragma unroll
    for (int i = 0; i < Scores<T>::kOwnRows; ++i)
#pragma unroll
      for (int j = 0; j < Scores<T>::kOwnColumns; ++j) result.at(i, j) = products.at(i, j);
  });
}

// of meta tokens, for the backward pass: a warp each
template <class T>
struct MetaArguments {
  const T* grad_out;
  int64_t grad_sample, grad_row;
  const float *out, *mass_out, *grad_mass;  // [B, M, C], [B, M], [B, M], dense
  float *divisor, *added, *open;
  int samples, metas, channels;
};
template <class T>
__global__ void __launch_bounds__(kSoftThreads) meta_terms(const MetaArguments<T> p) {
  const int64_t at = blockIdx.x * static_cast<int64_t>(kSoftWarps) + warp_id();
  if (at >= static_cast<int64_t>(p.samples) * p.metas) return;
  const T* grad = p.grad_out + at / p.metas * p.grad_sample + at % p.metas * p.grad_row;
  float product = 0.0f;
  for (int c = lane_id(); c < p.channels; c += kWarp) product += to_float(grad[c]) * p.out[at * p.channels + c];
  product = sum_lanes(product);
  if (lane_id()) return;
  const float mass = p.mass_out[at];
  // nothing depends on the row of a meta token without mass
  const bool open = mass != 0.0f;
  p.divisor[at] = open ? mass : 1.0f, p.open[at] = open ? 1.0f : 0.0f;
  p.added[at] = open ? p.grad_mass[at] * mass - product : p.grad_mass[at];
}

template <class T>
struct TermsShared {
  SoftTiles<T, 3> tiles;
  TileTerms terms;
};

// What the softmax's gradient needs of all scores of a token. A block of tokens.
template <class T>
__global__ void __launch_bounds__(kSoftThreads) token_terms(const SoftArguments<T> p) {
  using Own = Scores<T>;
  auto& shared = shared_memory<TermsShared<T>>();
  const TileTerms& terms = shared.terms;
  const int block = blockIdx.x % p.a.of.blocks, n_first = block * kTokens;
  const int64_t s = blockIdx.x / p.a.of.blocks;
  const float cool = p.coolness() * kLog2e;
  // the origin is lse, so that weights are shares of one; a thread loads the term that it wrote
  const int mine = n_first + threadIdx.x;
  if (static_cast<int>(threadIdx.x) < kTokens && mine < p.tokens) p.origin[s * p.tokens + mine] = p.lse[s * p.tokens + mine] * kLog2e;
  float total[Own::kOwnRows] = {}, along[Own::kOwnRows] = {};
  for (int tile = 0; tile < p.b.of.blocks; ++tile) {
    const int m_first = tile * kMetas;
    Own scores, grads;
    __syncthreads();
    load_terms<T, false>(shared.terms, p, s, n_first, m_first, true);
    multiply(scores, shared.tiles, p.a.grid(s, p.width, p.usual), n_first, p.b.grid(s, p.width, p.usual), tile, p.shrinks(s, block, tile));
    __syncthreads();
    multiply(grads, shared.tiles, p.x.grid(s), n_first, p.grad_out.grid(s), tile, false);
#pragma unroll
    for (int i = 0; i < Own::kOwnRows; ++i) {
      const int row = warp_id() * kWarpRows + Own::row(i);
#pragma unroll
      for (int j = 0; j < Own::kOwnColumns; ++j) {
        const int m = Own::column(j);
        const float score = __fmul_rn(similarity(scores.at(i, j), terms.factor[row], terms.meta_factor[m]), cool);
        const float part = m_first + m < p.metas ? exp2_fast(score - terms.origin[row]) : 0.0f;
        total[i] += part;
        // a weight may be as small as the mass: the two are divided first
        along[i] += part / terms.divisor[m] * (grads.at(i, j) * terms.open[m] + terms.added[m]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < Own::kOwnRows; ++i) {
    const float sum = sum_lanes<Own::kSharers>(total[i]), share = sum_lanes<Own::kSharers>(along[i]);
    const int n = n_first + warp_id() * kWarpRows + Own::row(i);
    if (lane_id() % Own::kSharers || n >= p.tokens) continue;
    // a token's weights sum to one only up to rounding: what is taken off must match them, or it does not cancel
    const float by = sum == 0.0f ? 0.0f : 1.0f / sum;
    p.weight[s * p.tokens + n] = p.mass_of(s, n) * by, p.share[s * p.tokens + n] = share * by;
  }
}

// A warp's sums over `depth` of left [16, depth] times right [depth, a chunk]: a thread has rows as of Products, and some columns.
template <class T>
struct Sums {
  static constexpr int kOwnRows = Scores<T>::kOwnRows, kOwnColumns = 16;
  float sum[8][4] = {};
  __device__ static int row(int i) { return Scores<T>::row(i); }
  __device__ static int column(int j) { return Scores<T>::column(j); }
  __device__ float at(int i, int j) const { return sum[j / 2][i * 2 + j % 2]; }

  template <int kRows, int kDepth>
  __device__ void add(const Chunk<T, kRows>* left, int first, const Chunk<T, kDepth>& right) {
    const int lane = lane_id();
    // unrolled further, the compiler would load ahead and spill
#pragma unroll 2
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t of_left[4], of_right[4];
      const int at = first + lane % 16;
      ldmatrix(of_left, &left[k / kChunk<T>][at][swizzled(at, k % kChunk<T> / 8 + lane / 16) * 8]);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int row = k + lane % 16;
        ldmatrix_transposed(of_right, &right[row][swizzled(row, n * 2 + lane / 16) * 8]);
        mma<T>(sum[n * 2], of_left, of_right[0], of_right[1]);
        mma<T>(sum[n * 2 + 1], of_left, of_right[2], of_right[3]);
      }
    }
  }
};

template <>
struct Sums<float> {
  static constexpr int kOwnRows = Scores<float>::kOwnRows, kOwnColumns = 4;
  float sum[kOwnRows][kOwnColumns] = {};
  __device__ static int row(int i) { return Scores<float>::row(i); }
  __device__ static int column(int j) { return lane_id() % 8 * 4 + j; }
  __device__ float at(int i, int j) const { return sum[i][j]; }

  template <int kRows, int kDepth>
  __device__ void add(const Chunk<float, kRows>* left, int first, const Chunk<float, kDepth>& right) {
#pragma unroll 1
    for (int k = 0; k < kDepth; k += 4) {
      Wide<float> of_left[kOwnRows];
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i) {
        const int at = first + row(i);
        of_left[i] = load_wide(&left[k / kChunk<float>][at][swizzled(at, k % kChunk<float> / 4) * 4]);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const Wide<float> of_right = load_wide(&right[k + e][swizzled(k + e, lane_id() % 8) * 4]);
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i)
#pragma unroll
          for (int j = 0; j < kOwnColumns; ++j) sum[i][j] += of_left[i].at[e] * of_right.at[j];
      }
    }
  }
};

template <class T, int kRows>
__device__ __forceinline__ void put(Chunk<T, kRows>* tile, int row, int column, float x) {
  constexpr int kCount = Wide<T>::kCount;
  const int within = column % kChunk<T>;
  tile[column / kChunk<T>][row][swizzled(row, within / kCount) * kCount + within % kCount] = from_float<T>(x);
}

// Of a result by meta tokens a block has 64 rows and two chunks of columns, which leaves each warp 16 rows and a chunk, as it has of a
// result by tokens: there a block has 128 rows and one chunk.
template <bool kByMeta>
constexpr int kResultRows = kByMeta ? kMetas : kTokens;
template <bool kByMeta>
constexpr int kDepth = kByMeta ? kTokens : kMetas;
template <bool kByMeta>
constexpr int kResultChunks = kByMeta ? 2 : 1;

template <class T, bool kByMeta>
struct GatherShared {
  SoftTiles<T, 2> tiles;
  TileTerms terms;
  alignas(128) Chunk<T, kResultRows<kByMeta>> left[kDepth<kByMeta> / kChunk<T>];
  alignas(128) Chunk<T, kDepth<kByMeta>> right[kResultChunks<kByMeta>];
  float sums[2][kSoftWarps][kMetas];
  float partial[kSoftWarps];
};

// Sums of rows times weights, or times gradients of similarities:
// by meta token, over tokens: merged rows (of x), gradients of meta (of metric); by token, over meta tokens: gradients of x (of grad_out),
// of metric (of meta).
template <class T, bool kByMeta, bool kGradient>
__global__ void __launch_bounds__(kSoftThreads) gather(const SoftArguments<T> p) {
  using Own = Scores<T>;
  auto& shared = shared_memory<GatherShared<T, kByMeta>>();
  const TileTerms& terms = shared.terms;
  constexpr int kChunks = kResultChunks<kByMeta>;
  const int part = blockIdx.x % p.blocks, share = blockIdx.x / p.blocks % p.splits;
  const int of_results = kByMeta ? p.b.of.blocks : p.a.of.blocks, of_sums = kByMeta ? p.a.of.blocks : p.b.of.blocks;
  const int block = blockIdx.x / p.blocks / p.splits % of_results;
  const int64_t s = blockIdx.x / p.blocks / p.splits / of_results;
  const int length = (of_sums + p.splits - 1) / p.splits, first = share * length, last = min(of_sums, first + length);
  const Grid<T> metric = p.a.grid(s, p.width, p.usual), meta = p.b.grid(s, p.width, p.usual), x = p.x.grid(s),
                grad_out = p.grad_out.grid(s);
  const Grid<T>& right = kByMeta ? (kGradient ? metric : x) : (kGradient ? meta : grad_out);
  const float cool = p.coolness();
  Sums<T> sums;
  // of gradients times similarities, by row of the result; where there are no gradients of weights, and of weights as products round them
  float along[kByMeta ? Own::kOwnColumns : Own::kOwnRows] = {}, rounded[Own::kOwnColumns] = {}, warmth = 0.0f;
  const int my_chunk = warp_id() * kWarpRows / kResultRows<kByMeta>, my_rows = warp_id() * kWarpRows % kResultRows<kByMeta>;

  for (int tile = first; tile < last; ++tile) {
    const int token_block = kByMeta ? tile : block, meta_block = kByMeta ? block : tile;
    const int n_first = token_block * kTokens, m_first = meta_block * kMetas;
    const bool shrinks = p.shrinks(s, token_block, meta_block);
    // shared memory is free again
    __syncthreads();
    load_terms<T, kGradient>(shared.terms, p, s, n_first, m_first, !kByMeta || kGradient);
    // belongs to the first group of the products' copies
    for (int c = 0; c < kChunks; ++c) load_chunk<kSoftThreads>(shared.right[c], right, tile * kDepth<kByMeta>, part * kChunks + c);
    Own scores, grads;
    multiply(scores, shared.tiles, metric, n_first, meta, meta_block, shrinks);
    if constexpr (kGradient) {
      if (shrinks)
        for (int c = 0; c < kChunks; ++c) shrink_chunk<kSoftThreads>(shared.right[c], right.shrink + tile * kDepth<kByMeta>);
      __syncthreads();
      multiply(grads, shared.tiles, x, n_first, grad_out, meta_block, false);
    }
#pragma unroll
    for (int i = 0; i < Own::kOwnRows; ++i) {
      const int n = warp_id() * kWarpRows + Own::row(i);
#pragma unroll
      for (int j = 0; j < Own::kOwnColumns; ++j) {
        const int m = Own::column(j);
        const float similar = similarity(scores.at(i, j), terms.factor[n], terms.meta_factor[m]);
        const float below = __fmul_rn(similar, cool * kLog2e) - terms.origin[n];
        float w = m_first + m < p.metas ? exp2_fast(below) * terms.weight[n] : 0.0f;
        if constexpr (kGradient) {
          const float grad = grads.at(i, j) * terms.open[m] + terms.added[m] - terms.divisor[m] * terms.share[n];
          w = w / terms.divisor[m] * grad;
          along[kByMeta ? j : i] += w * similar;
          // a token's gradients sum to zero, so its scores may count from anywhere: from here they are small where weights are large
          if constexpr (!kByMeta) warmth += w * below;
          w *= kByMeta ? terms.factor[n] : terms.meta_factor[m];
        } else if constexpr (kByMeta) {
          along[j] += w, rounded[j] += to_float(from_float<T>(w));
        } else {
          w = w / terms.divisor[m] * terms.open[m];
        }
        put<T, kResultRows<kByMeta>>(shared.left, kByMeta ? m : n, kByMeta ? n : m, w);
      }
    }
    __syncthreads();
    sums.template add<kResultRows<kByMeta>, kDepth<kByMeta>>(shared.left, my_rows, shared.right[my_chunk]);
  }

  const int c_first = (part * kChunks + my_chunk) * kChunk<T>;
  if constexpr (kByMeta) {
    const int64_t sample = (share * static_cast<int64_t>(p.samples) + s) * p.metas;
#pragma unroll
    for (int i = 0; i < Sums<T>::kOwnRows; ++i) {
      const int m = block * kMetas + my_rows + Sums<T>::row(i);
#pragma unroll
      for (int j = 0; j < Sums<T>::kOwnColumns; ++j) {
        const int c = c_first + Sums<T>::column(j);
        if (m < p.metas && c < p.columns) p.part[(sample + m) * p.columns + c] = sums.at(i, j);
      }
    }
    // by column of the tiles: over the lanes that share it, then over warps
    const auto share_out = [&](float sum, float& to) {
#pragma unroll
      for (int step = Own::kSharers; step < kWarp; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
      if (lane_id() < Own::kSharers) to = sum;
    };
#pragma unroll
    for (int j = 0; j < Own::kOwnColumns; ++j) {
      share_out(along[j], shared.sums[0][warp_id()][Own::column(j)]);
      if constexpr (!kGradient) share_out(rounded[j], shared.sums[1][warp_id()][Own::column(j)]);
    }
    __syncthreads();
    const int which = threadIdx.x / kMetas, column = threadIdx.x % kMetas, m = block * kMetas + column;
    if (part || which >= (kGradient ? 1 : 2) || m >= p.metas) return;
    float sum = 0.0f;
    for (int warp = 0; warp < kSoftWarps; ++warp) sum += shared.sums[which][warp][column];
    p.part_sum[static_cast<int64_t>(which) * p.splits * p.samples * p.metas + sample + m] = sum;
  } else {
#pragma unroll
    for (int i = 0; i < Own::kOwnRows; ++i) {
      if (kGradient) along[i] = sum_lanes<Own::kSharers>(along[i]);
      const int n = block * kTokens + my_rows + Sums<T>::row(i);
      if (!p.result || n >= p.tokens) continue;
      const float factor = kGradient ? p.a.of.factor[s * p.a.of.pitch + n] : 1.0f,
                  power = p.usual ? p.a.of.shrink[s * p.a.of.pitch + n] : 1.0f;
#pragma unroll
      for (int j = 0; j < Sums<T>::kOwnColumns; ++j) {
        const int c = c_first + Sums<T>::column(j);
        if (c >= p.columns) continue;
        float value = sums.at(i, j);
        if constexpr (kGradient) {
          // only what turns the row changes its direction
          if (p.normalize) value = (value - along[i] * (to_float(metric.base[n * metric.row + c]) * power * factor)) * (factor * power);
          value *= cool;
        }
        p.result[(s * p.tokens + n) * p.columns + c] = from_float<T>(value);
      }
    }
    if constexpr (kGradient) {
      if (!p.warmth || part) return;
      warmth = sum_lanes(warmth);
      if (lane_id() == 0) shared.partial[warp_id()] = warmth;
      __syncthreads();
      if (threadIdx.x) return;
      for (int warp = 1; warp < kSoftWarps; ++warp) warmth += shared.partial[warp];
      p.warmth[s * of_results + block] = -warmth * kLn2 * cool;
    }
  }
}

template <class T>
struct FinishArguments {
  SoftArguments<T> p;
  float *out, *mass_out;  // [B, M, columns], [B, M]; or
  T* grad_meta;           // [B, M, columns]
};

// Adds up the parts of a row, which is a warp's.
template <class T>
__global__ void __launch_bounds__(kSoftThreads) finish(const FinishArguments<T> f) {
  const SoftArguments<T>& p = f.p;
  const int64_t rows = static_cast<int64_t>(p.samples) * p.metas, at = blockIdx.x * static_cast<int64_t>(kSoftWarps) + warp_id();
  if (at >= rows) return;
  const int64_t s = at / p.metas, m = at % p.metas;
  // means are divided by the sum of the rounded weights: else they are off by its rounding, and gradients are differences of means
  float sum = 0.0f, rounded = 0.0f;
  for (int share = 0; share < p.splits; ++share) {
    sum += p.part_sum[share * rows + at];
    if (f.out) rounded += p.part_sum[(p.splits + share) * rows + at];
  }
  const float factor = f.out ? 1.0f : p.b.of.factor[s * p.b.of.pitch + m],
              power = f.out || !p.usual ? 1.0f : p.b.of.shrink[s * p.b.of.pitch + m];
  const float cool = p.coolness();
  if (f.out && lane_id() == 0) f.mass_out[at] = sum;
  for (int c = lane_id(); c < p.columns; c += kWarp) {
    float value = 0.0f;
    for (int share = 0; share < p.splits; ++share) value += p.part[(share * rows + at) * p.columns + c];
    if (f.out) {
      // no reciprocal, which overflows where a meta token resembles nothing
      f.out[at * p.columns + c] = rounded == 0.0f ? 0.0f : value / rounded;
      continue;
    }
    if (p.normalize) value = (value - sum * (to_float(p.b.x[s * p.b.sample + m * p.b.row + c]) * power * factor)) * (factor * power);
    f.grad_meta[at * p.columns + c] = from_float<T>(value * cool);
  }
}

}  // namespace
}  // namespace tokenops
