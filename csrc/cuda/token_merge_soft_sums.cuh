// The results of soft merging: sums over tokens or over meta tokens of weights, or of gradients of similarities, times rows. Each tile of a
// result has one block, which walks in ascending order. Sums over tokens are shared out among blocks, whose parts are added up in order: no
// atomics, the same bits in every run.
#pragma once

#include "token_merge_soft.cuh"

namespace tokenops {
namespace {

// A warp's sums over `depth` of left [16, depth] times right [depth, a chunk]: a thread has rows as of Products, and some columns.
template <class T>
struct Sums {
  static constexpr int kOwnRows = Scores<T>::kOwnRows, kOwnColumns = 16;
  float sum[8][4] = {};
  __device__ static int row(int i) { return Scores<T>::row(i); }
  __device__ static int column(int j) { return Scores<T>::column(j); }
  __device__ float& at(int i, int j) { return sum[j / 2][i * 2 + j % 2]; }

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
  __device__ float& at(int i, int j) { return sum[i][j]; }

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
  // weights are written where the tiles of their products were
  union {
    SoftTiles<T, 2> tiles;
    Chunk<T, kResultRows<kByMeta>> left[kDepth<kByMeta> / kChunk<T>];
  };
  TileTerms terms;
  alignas(128) Chunk<T, kDepth<kByMeta>> right[kResultChunks<kByMeta>];
  float sums[2][kSoftWarps][kMetas];
  float partial[kSoftWarps];
};

// A number for each column of a tile of scores, folded over the lanes that share the column: a warp's.
template <class Own, class Fold>
__device__ __forceinline__ void share_column(float number, Fold fold, float& to) {
#pragma unroll
  for (int step = Own::kSharers; step < kWarp; step *= 2) number = fold(number, __shfl_xor_sync(kAllLanes, number, step));
  if (lane_id() < Own::kSharers) to = number;
}

// The highest weight of a meta token so far.
struct Highest {
  float number = 0.0f;

  // Takes in what the warps found in a tile; what was counted in the old one is to be multiplied by the result.
  __device__ float rise(const float (&found)[kSoftWarps][kMetas], int m) {
    const float before = number;
    for (int warp = 0; warp < kSoftWarps; ++warp) number = fmaxf(number, found[warp][m]);
    return before / unit();
  }
  __device__ float unit() const { return number == 0.0f ? 1.0f : number; }
};

// Sums of rows times weights, or times gradients of similarities:
// by meta token, over tokens: merged rows (of x), gradients of meta (of metric); by token, over meta tokens: gradients of x (of grad_out),
// of metric (of meta).
template <class T, bool kByMeta, bool kGradient>
__global__ void __launch_bounds__(kSoftThreads) gather(const SoftArguments<T> p) {
  using Own = Scores<T>;
  // float16 loses the weights of a meta token that resembles no token: there they count in its highest one so far
  constexpr bool kRelative = std::is_same_v<T, f16> && kByMeta && !kGradient;
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
  Highest highest[kRelative ? Own::kOwnColumns : 1] = {}, highest_row[kRelative ? Sums<T>::kOwnRows : 1] = {};
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
          along[j] += w;
        } else {
          w = w / terms.divisor[m] * terms.open[m];
        }
        scores.at(i, j) = w;
      }
    }
    if constexpr (kRelative) {
#pragma unroll
      for (int j = 0; j < Own::kOwnColumns; ++j) {
        float top = 0.0f;
#pragma unroll
        for (int i = 0; i < Own::kOwnRows; ++i) top = fmaxf(top, scores.at(i, j));
        share_column<Own>(top, [](float a, float b) { return fmaxf(a, b); }, shared.sums[0][warp_id()][Own::column(j)]);
      }
    }
    // all warps have read the tiles
    __syncthreads();
    if constexpr (kRelative) {
#pragma unroll
      for (int j = 0; j < Own::kOwnColumns; ++j) rounded[j] *= highest[j].rise(shared.sums[0], Own::column(j));
#pragma unroll
      for (int i = 0; i < Sums<T>::kOwnRows; ++i) {
        const float shrink = highest_row[i].rise(shared.sums[0], my_rows + Sums<T>::row(i));
#pragma unroll
        for (int j = 0; j < Sums<T>::kOwnColumns; ++j) sums.at(i, j) *= shrink;
      }
    }
#pragma unroll
    for (int i = 0; i < Own::kOwnRows; ++i) {
      const int n = warp_id() * kWarpRows + Own::row(i);
#pragma unroll
      for (int j = 0; j < Own::kOwnColumns; ++j) {
        const int m = Own::column(j);
        const float w = kRelative ? scores.at(i, j) / highest[j].unit() : scores.at(i, j);
        if constexpr (kByMeta && !kGradient) rounded[j] += to_float(from_float<T>(w));
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
        if (m < p.metas && c < p.columns) p.part[(sample + m) * p.columns + c] = sums.at(i, j) * (kRelative ? highest_row[i].unit() : 1.0f);
      }
    }
    const auto add = [](float a, float b) { return a + b; };
#pragma unroll
    for (int j = 0; j < Own::kOwnColumns; ++j) {
      share_column<Own>(along[j], add, shared.sums[0][warp_id()][Own::column(j)]);
      if constexpr (!kGradient)
        share_column<Own>(rounded[j] * (kRelative ? highest[j].unit() : 1.0f), add, shared.sums[1][warp_id()][Own::column(j)]);
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
