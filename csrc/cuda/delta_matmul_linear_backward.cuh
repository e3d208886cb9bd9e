// Gradients of a layer's weight and bias: for each tile of the weight one block, which walks over the slots of all samples in ascending
// order.
#pragma once

#include "delta_matmul_linear.cuh"

namespace tokenops {
namespace {

template <class T>
struct LayerParameters {
  TokenGrid<const T> grad;  // [B, K, O]
  TokenGrid<const T> in;    // rows that went in: of [B, N, C], or of [B, K, C] by slot
  SampleLists lists;
  T* of_weight;  // [O, C] dense, or null: then width is 0
  T* of_bias;    // [O], or null
  int width, outputs;
  bool gather;
};

// A block has a tile of Side x Side of the weight, a warp WarpOutputs x WarpChannels of that; `Stages` steps of slots are in flight.
template <class Number, int Side, int WarpOutputs, int WarpChannels, int Stages>
struct ParametersShape {
  using T = Number;
  static constexpr int kSide = Side, kWarpOutputs = WarpOutputs, kWarpChannels = WarpChannels, kStages = Stages;
  static constexpr int kWarpsAcross = Side / WarpChannels, kThreads = Side / WarpOutputs * kWarpsAcross * kWarp;
  // slots of a step
  static constexpr int kDepth = 128 / sizeof(T);
  // of one side and the other, so that a thread copies the same pieces of the same slots of both
  using Tile = TileRows<T, Side>;
  struct Stage {
    alignas(128) T grad[kDepth * Tile::kPitch];
    alignas(128) T rows[kDepth * Tile::kPitch];
  };
  // rows of a slot, null where it is empty
  struct alignas(16) Slot {
    const T *grad, *row;
  };
  struct Shared {
    Stage stage[Stages];
    Slot slots[Stages][kDepth];
  };
};

// A warp's part of the tile, which begins at output `down` and channel `across` of it. Float: a thread has pieces lane / 8 + 4 i of outputs
// and lane % 8 + 8 j of channels.
template <class Shape, class T = typename Shape::T>
struct ParametersProduct {
  using Tile = typename Shape::Tile;
  static constexpr int kDown = Shape::kWarpOutputs / 16, kAcross = Shape::kWarpChannels / 32;
  const int down, across;
  float sum[kDown * 4][kAcross][4] = {}, bias[kDown * 4] = {};

  __device__ __forceinline__ ParametersProduct(int down, int across) : down(down), across(across) {}
  __device__ __forceinline__ void step(const float* grad, const float* rows, bool with_bias) {
    const int lane = lane_id();
#pragma unroll 2
    for (int k = 0; k < Shape::kDepth; ++k) {
      Wide<float> a[kDown];
#pragma unroll
      for (int i = 0; i < kDown; ++i) a[i] = load_wide(grad + Tile::at(k, down / 4 + lane / 8 + 4 * i));
      if (with_bias)
#pragma unroll
        for (int i = 0; i < kDown * 4; ++i) bias[i] += a[i / 4].at[i % 4];
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
        const Wide<float> b = load_wide(rows + Tile::at(k, across / 4 + lane % 8 + 8 * j));
#pragma unroll
        for (int i = 0; i < kDown * 4; ++i)
#pragma unroll
          for (int c = 0; c < 4; ++c) sum[i][j][c] += a[i / 4].at[i % 4] * b.at[c];
      }
    }
  }
  // calls f(output of the tile, first channel of the tile, sums of as many channels as there are)
  template <class F>
  __device__ __forceinline__ void each(F&& f) const {
#pragma unroll
    for (int i = 0; i < kDown * 4; ++i)
#pragma unroll
      for (int j = 0; j < kAcross; ++j) f(output(i), across + (lane_id() % 8 + 8 * j) * 4, sum[i][j]);
  }
  // calls f(output of the tile, sum), once for each of the warp's
  template <class F>
  __device__ __forceinline__ void each_bias(F&& f) const {
    if (lane_id() % 8) return;
#pragma unroll
    for (int i = 0; i < kDown * 4; ++i) f(output(i), bias[i]);
  }

 private:
  __device__ __forceinline__ int output(int i) const { return down + (lane_id() / 8 + i / 4 * 4) * 4 + i % 4; }
};

template <class Shape, class T>
struct HalfParametersProduct {
  using Tile = typename Shape::Tile;
  static constexpr int kDown = Shape::kWarpOutputs / 16, kAcross = Shape::kWarpChannels / 8;
  const int down, across;
  float sum[kDown][kAcross][4] = {}, bias[kDown][4] = {};

  __device__ __forceinline__ HalfParametersProduct(int down, int across) : down(down), across(across) {}
  __device__ __forceinline__ void step(const T* grad, const T* rows, bool with_bias) {
    const int lane = lane_id();
#pragma unroll
    for (int k = 0; k < Shape::kDepth; k += 16) {
      // both lie in memory slot by slot, and are multiplied along the slots
      uint32_t a[kDown][4];
#pragma unroll
      for (int i = 0; i < kDown; ++i)
        ldmatrix_transposed(a[i], grad + Tile::at(lane / 16 * 8 + lane % 8, down / 8 + i * 2 + lane / 8 % 2, k));
      // the product with a matrix of ones
      if (with_bias)
#pragma unroll
        for (int i = 0; i < kDown; ++i) mma<T>(bias[i], a[i], pack<T>(1.0f, 1.0f), pack<T>(1.0f, 1.0f));
#pragma unroll
      for (int j = 0; j < kAcross; j += 2) {
        uint32_t b[4];
        ldmatrix_transposed(b, rows + Tile::at(lane % 16, across / 8 + j + lane / 16, k));
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
    for (int i = 0; i < kDown; ++i)
#pragma unroll
      for (int j = 0; j < kAcross; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float pair[2] = {sum[i][j][half * 2], sum[i][j][half * 2 + 1]};
          f(down + i * 16 + lane / 4 + half * 8, across + j * 8 + lane % 4 * 2, pair);
        }
  }
  template <class F>
  __device__ __forceinline__ void each_bias(F&& f) const {
    if (lane_id() % 4) return;
#pragma unroll
    for (int i = 0; i < kDown * 2; ++i) f(down + i * 8 + lane_id() / 4, bias[i / 2][i % 2 * 2]);
  }
};
template <class Shape>
struct ParametersProduct<Shape, bf16> : HalfParametersProduct<Shape, bf16> {
  using HalfParametersProduct<Shape, bf16>::HalfParametersProduct;
};
template <class Shape>
struct ParametersProduct<Shape, f16> : HalfParametersProduct<Shape, f16> {
  using HalfParametersProduct<Shape, f16>::HalfParametersProduct;
};

template <class Shape, bool Aligned>
__global__ void __launch_bounds__(Shape::kThreads, 1) layer_parameters(LayerParameters<typename Shape::T> p) {
  using T = typename Shape::T;
  using Tile = typename Shape::Tile;
  auto& shared = shared_memory<typename Shape::Shared>();
  const int parts = (p.outputs + Shape::kSide - 1) / Shape::kSide, total = p.lists.total();
  const int first_output = blockIdx.x % parts * Shape::kSide, first_channel = blockIdx.x / parts * Shape::kSide;
  const int steps = (total + Shape::kDepth - 1) / Shape::kDepth;

  // Where a slot's rows are one thread finds out, for all that copy them: its id is under way during one product, and the rows during the
  // next.
  static_assert(Shape::kDepth <= Shape::kThreads);
  struct Found {
    int sample, place, id;
  };
  const auto find = [&](int step) -> Found {
    const int slot = step * Shape::kDepth + threadIdx.x;
    if (threadIdx.x >= Shape::kDepth || slot >= total) return {0, 0, -1};
    const int sample = slot / p.lists.slots, place = slot - sample * p.lists.slots;
    return {sample, place, p.lists.index[sample * p.lists.sample + place]};
  };
  const auto put = [&](int step, const Found& found) {
    if (threadIdx.x >= Shape::kDepth) return;
    const bool filled = found.id >= 0 && found.id < p.lists.rows;
    auto& slot = shared.slots[step % Shape::kStages][threadIdx.x];
    slot.grad = filled ? p.grad.at(found.sample, found.place) : nullptr;
    slot.row = filled ? p.in.at(found.sample, p.gather ? found.id : found.place) : nullptr;
  };
  const auto start = [&](int step) {
    if (step < steps) {
      constexpr int kApart = Shape::kThreads / Tile::kPieces;
      static_assert(Shape::kDepth % kApart == 0 && kApart % 8 == 0);
      auto& stage = shared.stage[step % Shape::kStages];
      const int mine = threadIdx.x / Tile::kPieces, piece = threadIdx.x % Tile::kPieces, from = piece * Tile::kPiece;
#pragma unroll
      for (int i = 0; i < Shape::kDepth; i += kApart) {
        const auto slot = shared.slots[step % Shape::kStages][mine + i];
        const int to = Tile::at(mine, piece, i);
        copy_run<Aligned>(stage.grad + to, slot.grad, first_output + from, p.outputs, p.grad.data);
        copy_run<Aligned>(stage.rows + to, slot.row, first_channel + from, p.width, p.grad.data);
      }
    }
    // an empty group too is a group to count
    cp_async_commit();
  };

  ParametersProduct<Shape> product(warp_id() / Shape::kWarpsAcross * Shape::kWarpOutputs,
                                   warp_id() % Shape::kWarpsAcross * Shape::kWarpChannels);
  const bool with_bias = p.of_bias && first_channel == 0 && product.across == 0;
  for (int step = 0; step < Shape::kStages; ++step) put(step, find(step));
  __syncthreads();
#pragma unroll
  for (int step = 0; step < Shape::kStages - 1; ++step) start(step);
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<Shape::kStages - 2>();
    // and everybody is through with the step before, whose memory is written next
    __syncthreads();
    start(step + Shape::kStages - 1);
    const Found found = find(step + Shape::kStages);
    const auto& stage = shared.stage[step % Shape::kStages];
    product.step(stage.grad, stage.rows, with_bias);
    put(step + Shape::kStages, found);
  }
  if (with_bias)
    product.each_bias([&](int i, float sum) {
      if (first_output + i < p.outputs) p.of_bias[first_output + i] = from_float<T>(sum);
    });
  if (!p.of_weight) return;
  product.each([&](int i, int j, const auto& sums) {
    constexpr int kRun = sizeof(sums) / sizeof(sums[0]);
    struct alignas(kRun * sizeof(T)) Run {
      T at[kRun];
    } run;
#pragma unroll
    for (int c = 0; c < kRun; ++c) run.at[c] = from_float<T>(sums[c]);
    const int o = first_output + i, from = first_channel + j;
    if (o >= p.outputs) return;
    T* to = p.of_weight + static_cast<int64_t>(o) * p.width + from;
    if constexpr (Aligned) {
      if (from < p.width) *reinterpret_cast<Run*>(to) = run;
    } else {
#pragma unroll
      for (int c = 0; c < kRun; ++c)
        if (from + c < p.width) to[c] = run.at[c];
    }
  });
}

}  // namespace
}  // namespace tokenops
