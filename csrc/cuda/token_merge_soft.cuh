// Soft merging. Token n gives meta token m the weight w[n, m] = exp2(z[n, m] - origin[n]) * weight[n], where z is the similarity over the
// temperature, in base 2. Scores live in registers: every kernel that needs a tile of them, 128 tokens by 64 meta tokens, multiplies it
// anew, always in the same way, for at low temperatures the last bit of a score decides over a weight.
//
// Here are the scores, and what tokens and meta tokens know of all of theirs; token_merge_soft_sums.cuh has the results.
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

}  // namespace
}  // namespace tokenops
