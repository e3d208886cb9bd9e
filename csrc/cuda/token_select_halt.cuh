// A halting step and its backward pass: a warp for a few rows. Each of its first lanes works out the gate of one row and keeps that row's
// numbers, so that state is read and written along N; then all lanes go through the rows' channels together. No block-wide barriers, and no
// shared memory: the kernels are bound by memory, and many independent warps keep it busy.
//
// The output of class tokens [S, C] is not one of rows: there a launch over samples deals with their first rows, and a launch over rows
// with everything else. So nobody searches for the sample of a row.
#pragma once

#include "device.cuh"

namespace tokenops {
namespace {

// a number for each token, [B, N]; data is null where there is none
template <class T>
struct PerToken {
  T* data;
  int64_t sample, row;  // strides
};

// a dense row for each token [B, N, C], or for each sample [S, C], which has no stride of rows
template <class T>
struct TokenRows {
  T* data;
  int64_t sample, row;
};

// what the step and its backward pass know of a call
struct HaltGate {
  const void* x;  // [B, N, C]
  int64_t x_sample, x_row;
  PerToken<const float> remain;  // before the step; null: 1
  PerToken<const bool> active;   // before the step; null: all
  const int32_t* bounds;         // [S + 1] of packed rows, or null
  int64_t bounds_stride;
  int samples, rows, channels;
  int jobs;         // rows, or samples
  bool first_rows;  // a job is the first row of a sample
  bool last;
  float scale, center, limit;
};

struct HaltStep {
  HaltGate gate;
  PerToken<const float> cum, rho, counter;  // before the step; null: the first
  TokenRows<const float> out;
  // after it; may be the same memory. Null: another launch's affair
  PerToken<float> new_cum, new_remain, new_rho, new_counter;
  PerToken<bool> new_active;
  TokenRows<float> new_out;
  bool in_place;  // rows of out that take no part stay as they are
};

struct HaltBackward {
  HaltGate gate;
  PerToken<const float> cum;  // after the step
  PerToken<const float> grad_cum, grad_remain, grad_rho;
  TokenRows<const float> grad_out;
  void* new_grad_x;  // [B, N, C] or null
  int64_t grad_x_sample, grad_x_row;
  PerToken<float> new_grad_remain;
};

// as many rows as keep a warp's lanes from idling at the gate, and few enough that small calls have warps for all processors
constexpr int kHaltRows = 8, kHaltWarps = 4, kHaltThreads = kHaltWarps * kWarp;

struct HaltRow {
  int sample, row;
  bool exists, inside;  // inside: it belongs to a sample
};
__device__ __forceinline__ HaltRow halt_row(const HaltGate& gate, int64_t job) {
  if (job >= gate.jobs) return {0, 0, false, false};
  const int j = static_cast<int>(job);
  const int end = gate.bounds ? gate.bounds[gate.samples * gate.bounds_stride] : gate.rows;
  if (!gate.first_rows) {
    const int sample = j / gate.rows, row = j - sample * gate.rows;
    return {sample, row, true, row < end};
  }
  if (!gate.bounds) return {j, 0, true, true};
  const int row = gate.bounds[j * gate.bounds_stride];
  // a sample without rows has none, whatever its bounds say
  const bool exists = row >= 0 && row < gate.rows && row < gate.bounds[(j + 1) * gate.bounds_stride];
  return {0, exists ? row : 0, exists, exists && row < end};
}

// a class token's output is the sample's own; samples of a packed call are the jobs
template <class T>
__device__ __forceinline__ T* output_row(const HaltGate& gate, const TokenRows<T>& out, int64_t job, int sample, int row) {
  return out.data + (gate.first_rows ? job * out.sample : sample * out.sample + row * out.row);
}

template <class T>
__device__ __forceinline__ T read(const PerToken<const T>& from, const HaltRow& at, T absent) {
  return from.data && at.exists ? from.data[at.sample * from.sample + at.row * from.row] : absent;
}
template <class T>
__device__ __forceinline__ void write(const PerToken<T>& to, const HaltRow& at, T value) {
  if (to.data && at.exists) to.data[at.sample * to.sample + at.row * to.row] = value;
}

template <class T>
__device__ __forceinline__ const T* token_at(const HaltGate& gate, int sample, int row) {
  return static_cast<const T*>(gate.x) + sample * gate.x_sample + row * gate.x_row;
}

// what becomes of a row
struct Gate {
  bool active, reached, going, taking;
  float weight;
};
// by the score accumulated up to this step
__device__ __forceinline__ Gate gate_of(const HaltGate& p, const HaltRow& at, float score, float cum, float remain) {
  Gate g;
  g.active = at.inside && read(p.active, at, true);
  g.reached = g.active && cum > p.limit;
  g.going = at.inside && cum < p.limit;
  g.taking = g.active && (g.reached || g.going);
  g.weight = g.reached ? remain : g.taking ? score : 0.0f;
  return g;
}
template <class T>
__device__ __forceinline__ float score_of(const HaltGate& p, const HaltRow& at) {
  if (!at.inside) return 0.0f;
  if (p.last) return 1.0f;
  return 1.0f / (1.0f + expf(p.center - p.scale * to_float(*token_at<T>(p, at.sample, at.row))));
}

// The numbers of a run of x as two runs of float, or one.
template <class T>
struct FloatRun {
  static constexpr int kCount = Wide<T>::kCount, kQuarters = kCount / Wide<float>::kCount;
  Wide<float> part[kQuarters];

  __device__ __forceinline__ float& at(int j) { return part[j / Wide<float>::kCount].at[j % Wide<float>::kCount]; }
  template <bool Aligned>
  __device__ __forceinline__ static FloatRun load(const float* row, int c, int width) {
    FloatRun run;
#pragma unroll
    for (int i = 0; i < kQuarters; ++i) run.part[i] = load_run<Aligned>(row, c + i * Wide<float>::kCount, width);
    return run;
  }
  template <bool Aligned>
  __device__ __forceinline__ void store(float* row, int c, int width) const {
#pragma unroll
    for (int i = 0; i < kQuarters; ++i) store_run<Aligned>(row, c + i * Wide<float>::kCount, width, part[i]);
  }
};

// The 1: left to itself, the assembler spills a few registers to fit one more block beside the others.
template <class T, bool Aligned>
__global__ void __launch_bounds__(kHaltThreads, 1) halt_step(HaltStep p) {
  using Run = FloatRun<T>;
  const HaltGate& gate = p.gate;
  const int lane = lane_id();
  const int64_t first = (int64_t{blockIdx.x} * kHaltWarps + warp_id()) * kHaltRows;
  const HaltRow at = lane < kHaltRows ? halt_row(gate, first + lane) : HaltRow{0, 0, false, false};
  const float score = score_of<T>(gate, at), cum = read(p.cum, at, 0.0f) + score, remain = read(gate.remain, at, 1.0f),
              rho = read(p.rho, at, 0.0f), counter = read(p.counter, at, 1.0f);
  const Gate g = gate_of(gate, at, score, cum, remain);
  write(p.new_cum, at, cum);
  write(p.new_remain, at, g.going ? remain - score : remain);
  write(p.new_active, at, g.going);
  write(p.new_rho, at, rho + (g.active ? 1.0f : 0.0f) + (g.reached ? remain : 0.0f));
  write(p.new_counter, at, g.going ? counter + 1.0f : counter);

  if (!p.new_out.data) return;
  for (int r = 0; r < kHaltRows && first + r < gate.jobs; ++r) {
    const int sample = __shfl_sync(kAllLanes, at.sample, r), row = __shfl_sync(kAllLanes, at.row, r);
    const float weight = __shfl_sync(kAllLanes, g.weight, r);
    const bool taking = __shfl_sync(kAllLanes, static_cast<int>(g.taking), r) != 0;
    if (p.in_place && !taking) continue;
    const T* const x = token_at<T>(gate, sample, row);
    const float* const old = p.out.data ? output_row(gate, p.out, first + r, sample, row) : nullptr;
    float* const out = output_row(gate, p.new_out, first + r, sample, row);
    for (int c = lane * Run::kCount; c < gate.channels; c += kWarp * Run::kCount) {
      Run sum{};
      if (old) sum = Run::template load<Aligned>(old, c, gate.channels);
      if (taking) {
        const Wide<T> token = load_run<Aligned>(x, c, gate.channels);
#pragma unroll
        for (int j = 0; j < Run::kCount; ++j) sum.at(j) += weight * to_float(token.at[j]);
      }
      sum.template store<Aligned>(out, c, gate.channels);
    }
  }
}

template <class T, bool Aligned>
__global__ void __launch_bounds__(kHaltThreads, 1) halt_backward(HaltBackward p) {
  using Run = FloatRun<T>;
  const HaltGate& gate = p.gate;
  const int lane = lane_id();
  const int64_t first = (int64_t{blockIdx.x} * kHaltWarps + warp_id()) * kHaltRows;
  const HaltRow at = lane < kHaltRows ? halt_row(gate, first + lane) : HaltRow{0, 0, false, false};
  const float score = score_of<T>(gate, at), remain = read(gate.remain, at, 1.0f), grad_remain = read(p.grad_remain, at, 0.0f);
  const Gate g = gate_of(gate, at, score, read(p.cum, at, 0.0f), remain);
  const bool has_slope = at.inside && !gate.last;
  const float grad_cum = (at.inside ? read(p.grad_cum, at, 0.0f) : 0.0f) - (g.going ? grad_remain : 0.0f);

  float grad_weight = 0.0f;
  for (int r = 0; r < kHaltRows && first + r < gate.jobs; ++r) {
    if (!__shfl_sync(kAllLanes, static_cast<int>(at.exists), r)) continue;
    const int sample = __shfl_sync(kAllLanes, at.sample, r), row = __shfl_sync(kAllLanes, at.row, r);
    const float weight = __shfl_sync(kAllLanes, g.weight, r);
    const bool taking = p.grad_out.data && __shfl_sync(kAllLanes, static_cast<int>(g.taking), r) != 0;
    const T* const x = token_at<T>(gate, sample, row);
    const float* const grad_out = taking ? output_row(gate, p.grad_out, first + r, sample, row) : nullptr;
    T* const to = p.new_grad_x ? static_cast<T*>(p.new_grad_x) + sample * p.grad_x_sample + row * p.grad_x_row : nullptr;
    float product = 0.0f;
    for (int c = lane * Run::kCount; c < gate.channels; c += kWarp * Run::kCount) {
      Run grad{};
      if (taking) {
        grad = Run::template load<Aligned>(grad_out, c, gate.channels);
        const Wide<T> token = load_run<Aligned>(x, c, gate.channels);
#pragma unroll
        for (int j = 0; j < Run::kCount; ++j) product += grad.at(j) * to_float(token.at[j]);
      }
      if (to) {
        Wide<T> result;
#pragma unroll
        for (int j = 0; j < Run::kCount; ++j) result.at[j] = from_float<T>(weight * grad.at(j));
        store_run<Aligned>(to, c, gate.channels, result);
      }
    }
    product = sum_lanes(product);
    if (lane == r) grad_weight = product;
    // the score is channel 0, and its gradient needs the products of all channels: so it is written again, by who wrote it before
    const float grad_score = grad_cum + (g.going && g.active ? product : 0.0f);
    const float extra = __shfl_sync(kAllLanes, has_slope ? gate.scale * score * (1.0f - score) * grad_score : 0.0f, r);
    if (to && lane == 0) to[0] = from_float<T>((taking ? weight * grad_out[0] : 0.0f) + extra);
  }
  write(p.new_grad_remain, at, grad_remain + (g.reached ? read(p.grad_rho, at, 0.0f) + grad_weight : 0.0f));
}

}  // namespace
}  // namespace tokenops
