// Layers on listed rows: a product of tiles whose rows are gathered as they are loaded and scattered as they are stored. Each tile of the
// result has one block, which adds up in ascending order: no atomics, the same bits in every run.
#pragma once

#include "../delta_matmul.h"
#include "delta_matmul_rows.cuh"
#include "tiles.cuh"

namespace tokenops {
namespace {

__device__ __forceinline__ float activated(float h, Activation activation) {
  constexpr float kLog2e = 1.4426950408889634f;
  switch (activation) {
    case Activation::gelu: return 0.5f * h * (1.0f + erff(h * 0.7071067811865476f));
    // tanh(u) = 2 sigmoid(2 u) - 1
    case Activation::gelu_tanh: return __fdividef(h, 1.0f + exp2_fast(-kLog2e * 1.5957691216057308f * (h + 0.044715f * h * h * h)));
    // and not fmaxf, which swallows NaN
    case Activation::relu: return h < 0.0f ? 0.0f : h;
    case Activation::silu: return __fdividef(h, 1.0f + exp2_fast(-kLog2e * h));
    default: return h;
  }
}
// the derivative of that
__device__ __forceinline__ float slope(float h, Activation activation) {
  constexpr float kLog2e = 1.4426950408889634f;
  switch (activation) {
    // h times the normal density
    case Activation::gelu:
      return 0.5f * (1.0f + erff(h * 0.7071067811865476f)) + h * exp2_fast(-0.5f * kLog2e * h * h) * 0.3989422804014327f;
    case Activation::gelu_tanh: {
      const float s = __fdividef(1.0f, 1.0f + exp2_fast(-kLog2e * 1.5957691216057308f * (h + 0.044715f * h * h * h)));
      return s + h * s * (1.0f - s) * 1.5957691216057308f * (1.0f + 3.0f * 0.044715f * h * h);
    }
    case Activation::relu: return h > 0.0f ? 1.0f : 0.0f;
    case Activation::silu: {
      const float s = __fdividef(1.0f, 1.0f + exp2_fast(-kLog2e * h));
      return s * (1.0f + h * (1.0f - s));
    }
    default: return 1.0f;
  }
}

// What becomes of a layer's sums. Backward, a gradient goes through the transposed weight as rows go through the weight.
enum class Form {
  plain,     // through the activation
  gradient,  // the slope of the activation there, times what comes back to it
  inner      // what comes back to an activation, times its slope at the rows that went into it
};

template <class T>
struct Layer {
  TokenGrid<const T> in;     // [B, N, C], or [B, K, C] by slot
  TokenGrid<const T> other;  // [B, K, O], see Form; none where that is plain
  TokenGrid<T> out;          // [B, N, O], where empty slots write nothing; or [B, K, O] by slot, where they write zeros
  float* single;             // [B, K, O] dense, of the sums themselves and whatever in empty slots, instead of out; or null
  SampleLists lists;
  const T* weight;  // [O, C]
  int64_t weight_row;
  const T* bias;  // [O], or null
  int width, outputs, slot_blocks;
  bool gather, scatter;
  bool wide;  // rows of the result and what else it takes begin at multiples of 16 bytes
  Form form;
  Activation activation;
};

// A block has a tile of Slots x Outputs of the result, a warp WarpSlots x WarpOutputs of that; `Stages` steps of channels are in flight.
template <class Number, int Slots, int Outputs, int WarpSlots, int WarpOutputs, int Stages>
struct LayerShape {
  using T = Number;
  static constexpr int kSlots = Slots, kOutputs = Outputs, kWarpSlots = WarpSlots, kWarpOutputs = WarpOutputs, kStages = Stages;
  static constexpr int kWarpsAcross = Outputs / WarpOutputs, kThreads = Slots / WarpSlots * kWarpsAcross * kWarp;
  // channels of a step: 128 bytes of a row
  static constexpr int kDepth = 128 / sizeof(T);
  using In = TileRows<T, kDepth>;
  using Sums = TileRows<float, WarpOutputs>;
  struct Stage {
    alignas(128) T rows[Slots * In::kPitch];
    alignas(128) T weight[Outputs * In::kPitch];
  };
  struct Shared {
    union {
      Stage stage[Stages];
      // each warp's, on their way to 16-byte stores
      alignas(128) float sums[kThreads / kWarp][WarpSlots * Sums::kPitch];
    };
    int32_t row[Slots];
  };
};

// A warp's part of the product. Float: a thread has slots lane / 4 + 8 i and outputs lane % 4 + 4 j.
template <class Shape, class T = typename Shape::T>
struct LayerProduct {
  static constexpr int kAcross = Shape::kWarpOutputs / 4, kDown = Shape::kWarpSlots / 8;
  float sum[kDown][kAcross] = {};

  __device__ __forceinline__ void step(const float* rows, const float* weight) {
    using Tile = typename Shape::In;
    const int lane = lane_id();
    // all of a step unrolled would be too much code
#pragma unroll 2
    for (int piece = 0; piece < Tile::kPieces; ++piece) {
      Wide<float> a[kDown];
#pragma unroll
      for (int i = 0; i < kDown; ++i) a[i] = load_wide(rows + Tile::at(lane / 4 + 8 * i, piece));
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
        const Wide<float> b = load_wide(weight + Tile::at(lane % 4 + 4 * j, piece));
#pragma unroll
        for (int i = 0; i < kDown; ++i)
#pragma unroll
          for (int k = 0; k < 4; ++k) sum[i][j] += a[i].at[k] * b.at[k];
      }
    }
  }
  // calls f(slot of the warp, output of the warp, sum)
  template <class F>
  __device__ __forceinline__ void each(F&& f) const {
#pragma unroll
    for (int j = 0; j < kAcross; ++j)
#pragma unroll
      for (int i = 0; i < kDown; ++i) f(lane_id() / 4 + 8 * i, lane_id() % 4 + 4 * j, sum[i][j]);
  }
};

template <class Shape, class T>
struct HalfProduct {
  static constexpr int kAcross = Shape::kWarpOutputs / 8, kDown = Shape::kWarpSlots / 16;
  float sum[kDown][kAcross][4] = {};

  __device__ __forceinline__ void step(const T* rows, const T* weight) {
    using Tile = typename Shape::In;
    const int lane = lane_id();
#pragma unroll
    for (int k = 0; k < Shape::kDepth / 16; ++k) {
      uint32_t a[kDown][4];
#pragma unroll
      for (int i = 0; i < kDown; ++i) ldmatrix(a[i], rows + Tile::at(lane % 16, k * 2 + lane / 16, i * 16));
#pragma unroll
      for (int j = 0; j < kAcross; j += 2) {
        uint32_t b[4];
        ldmatrix(b, weight + Tile::at(lane / 16 * 8 + lane % 8, k * 2 + lane / 8 % 2, j * 8));
#pragma unroll
        for (int i = 0; i < kDown; ++i) {
          mma<T>(sum[i][j], a[i], b[0], b[1]);
          mma<T>(sum[i][j + 1], a[i], b[2], b[3]);
        }
      }
    }
  }
  template <class F>
  __device__ __forceinline__ void each(F&& f) const {
    const int lane = lane_id();
#pragma unroll
    for (int j = 0; j < kAcross; ++j)
#pragma unroll
      for (int i = 0; i < kDown; ++i)
#pragma unroll
        for (int c = 0; c < 4; ++c) f(i * 16 + lane / 4 + c / 2 * 8, j * 8 + lane % 4 * 2 + c % 2, sum[i][j][c]);
  }
};
template <class Shape>
struct LayerProduct<Shape, bf16> : HalfProduct<Shape, bf16> {};
template <class Shape>
struct LayerProduct<Shape, f16> : HalfProduct<Shape, f16> {};

// Sixteen bytes of a row to shared memory, zeros behind its end and where there is no row. Rows that begin at multiples of 16 bytes are on
// their way until they are waited for; `anywhere` is memory for a copy that reads nothing.
template <bool Aligned, class T>
__device__ __forceinline__ void copy_run(T* to, const T* row, int c, int width, const T* anywhere) {
  const bool valid = row && c < width;
  if constexpr (Aligned)
    cp_async_16(to, valid ? row + c : anywhere, valid);
  else
    store_wide(to, valid ? load_run<false>(row, c, width) : Wide<T>{});
}

// What a thread copies of the tiles of rows: always the same piece of the 128 bytes, of several rows.
template <int Rows, class Shape, bool Aligned>
struct TileSource {
  using T = typename Shape::T;
  using Tile = typename Shape::In;
  static constexpr int kApart = Shape::kThreads / Tile::kPieces, kCount = Rows / kApart;
  static_assert(Rows % kApart == 0);
  const T* row[kCount];  // null: zeros
  int width;

  // of(i) is row i of the tile
  template <class Of>
  __device__ __forceinline__ TileSource(int width, Of&& of) : width(width) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) row[i] = of(threadIdx.x / Tile::kPieces + i * kApart);
  }
  __device__ __forceinline__ void start(T* tile, int channel, const T* anywhere) const {
    const int piece = threadIdx.x % Tile::kPieces, c = channel + piece * Tile::kPiece;
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      copy_run<Aligned>(tile + Tile::at(threadIdx.x / Tile::kPieces, piece, i * kApart), row[i], c, width, anywhere);
  }
};

// A run of the result from its sums, rounded.
template <class T>
__device__ __forceinline__ Wide<T> finished(const Layer<T>& p, const Wide<float> (&sums)[Wide<T>::kCount / 4], const T* other, int o) {
  constexpr int kRun = Wide<T>::kCount;
  const bool whole = p.wide && o + kRun <= p.outputs;
  const auto load = [&](const T* row) { return !row ? Wide<T>{} : whole ? load_wide(row + o) : load_run<false>(row, o, p.outputs); };
  const Wide<T> bias = load(p.bias), factors = load(other);
  Wide<T> result;
#pragma unroll
  for (int j = 0; j < kRun; ++j) {
    const float h = sums[j / 4].at[j % 4] + to_float(bias.at[j]), factor = to_float(factors.at[j]);
    const bool inner = p.form == Form::inner;
    result.at[j] =
        from_float<T>(p.form == Form::plain ? activated(h, p.activation) : slope(inner ? factor : h, p.activation) * (inner ? h : factor));
  }
  return result;
}

template <class Shape, bool Aligned>
__global__ void __launch_bounds__(Shape::kThreads, 1) layer(Layer<typename Shape::T> p) {
  using T = typename Shape::T;
  using Sums = typename Shape::Sums;
  auto& shared = shared_memory<typename Shape::Shared>();
  // blocks that run at the same time share so many blocks of rows and, in turn, blocks of weights, which then come from L2
  constexpr int kTogether = 8;
  const int parts = (p.outputs + Shape::kOutputs - 1) / Shape::kOutputs;
  const int group = blockIdx.x / (kTogether * parts), members = min(p.slot_blocks - group * kTogether, kTogether);
  const int place = blockIdx.x % (kTogether * parts);
  const int first = (group * kTogether + place % members) * Shape::kSlots, from = place / members * Shape::kOutputs;

  bool filled = false;
  for (int i = threadIdx.x; i < Shape::kSlots; i += Shape::kThreads) {
    const int row = first + i < p.lists.total() ? slot_at(p.lists, first + i).row : -1;
    shared.row[i] = row;
    filled |= row >= 0;
  }
  // a block of nothing but empty slots multiplies nothing
  const int steps = __syncthreads_or(filled) ? (p.width + Shape::kDepth - 1) / Shape::kDepth : 0;
  const auto sample_of = [&](int i) { return (first + i) / p.lists.slots; };
  const auto place_of = [&](int i) { return (first + i) % p.lists.slots; };
  const TileSource<Shape::kSlots, Shape, Aligned> rows(p.width, [&](int i) -> const T* {
    const int row = shared.row[i];
    return row < 0 ? nullptr : p.in.at(sample_of(i), p.gather ? row : place_of(i));
  });
  const TileSource<Shape::kOutputs, Shape, Aligned> weights(
      p.width, [&](int i) -> const T* { return from + i < p.outputs ? p.weight + (from + i) * p.weight_row : nullptr; });
  const auto start = [&](int step) {
    if (step < steps) {
      auto& stage = shared.stage[step % Shape::kStages];
      rows.start(stage.rows, step * Shape::kDepth, p.weight);
      weights.start(stage.weight, step * Shape::kDepth, p.weight);
    }
    // an empty group too is a group to count
    cp_async_commit();
  };
  const int down = warp_id() / Shape::kWarpsAcross * Shape::kWarpSlots, across = warp_id() % Shape::kWarpsAcross * Shape::kWarpOutputs;

  LayerProduct<Shape> product;
#pragma unroll
  for (int step = 0; step < Shape::kStages - 1; ++step) start(step);
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<Shape::kStages - 2>();
    // and everybody is through with the step before, whose memory is written next
    __syncthreads();
    start(step + Shape::kStages - 1);
    auto& stage = shared.stage[step % Shape::kStages];
    product.step(stage.rows + down * Shape::In::kPitch, stage.weight + across * Shape::In::kPitch);
  }
  // The sums take the place of the tiles. What becomes of them is worked out by a short loop: unrolled over a thread's sums it would be
  // most of the kernel.
  __syncthreads();
  constexpr int kRun = Wide<T>::kCount, kRuns = Shape::kWarpOutputs / kRun;
  float* const sums = shared.sums[warp_id()];
  product.each([&](int i, int j, float sum) { sums[Sums::at(i, 0) + j] = sum; });
  __syncwarp();
#pragma unroll 1
  for (int at = lane_id(); at < Shape::kWarpSlots * kRuns; at += kWarp) {
    const int i = at / kRuns, o = from + across + at % kRuns * kRun, slot = down + i, row = shared.row[slot];
    if (first + slot >= p.lists.total() || o >= p.outputs || (p.scatter && row < 0)) continue;
    Wide<float> run[kRun / 4];
#pragma unroll
    for (int j = 0; j < kRun / 4; ++j) run[j] = load_wide(sums + Sums::at(i, at % kRuns * kRun / 4 + j));
    if (p.single) {
      float* to = p.single + static_cast<int64_t>(first + slot) * p.outputs;
#pragma unroll
      for (int j = 0; j < kRun / 4; ++j) {
        const int c = o + 4 * j;
        if (p.wide && c + 4 <= p.outputs)
          store_wide(to + c, run[j]);
        else
          store_run<false>(to, c, p.outputs, run[j]);
      }
      continue;
    }
    const int b = sample_of(slot), k = place_of(slot);
    T* to = p.out.at(b, p.scatter ? row : k);
    const Wide<T> numbers = row < 0 ? Wide<T>{} : finished(p, run, p.other.data ? p.other.at(b, k) : nullptr, o);
    if (p.wide && o + kRun <= p.outputs)
      store_wide(to + o, numbers);
    else
      store_run<false>(to, o, p.outputs, numbers);
  }
}

// Listed rows after the layer normalisation, by slot. A pass of its own: what the product reads of them it reads many times.
template <class T>
struct NormalizedRows {
  TokenGrid<const T> x;
  T* out;  // [B, K, C] dense
  Normalization norm;
  SampleLists lists;
  int width;
};

template <class T, bool Aligned>
__global__ void __launch_bounds__(kRowThreads, 1) normalize_rows(NormalizedRows<T> p) {
  const int64_t i = row_of_warp();
  if (i >= p.lists.total()) return;
  const Slot slot = slot_at(p.lists, static_cast<int>(i));
  // nobody reads the rows of empty slots
  if (slot.row < 0) return;
  const Row<T, Aligned> row(p.x.at(slot.sample, slot.row), nullptr, p.width);
  const Moments moments = row.moments(p.norm);
  row.each([&](int c, const Wide<T>& run) {
    store_run<Aligned>(p.out + i * p.width, c, p.width, normalized<Aligned>(run, p.norm, moments, c, p.width));
  });
}

}  // namespace
}  // namespace tokenops
