// Rows of token grids, a warp for each: what the kernels of delta_matmul share. B samples, N tokens, K slots of a list, C channels.
#pragma once

#include "device.cuh"

namespace tokenops {
namespace {

// [B, N, C] of dense rows; strides in elements
template <class T>
struct TokenGrid {
  T* data;  // null: there is none
  int64_t sample, row;
  __device__ __forceinline__ int64_t offset(int b, int n) const { return b * sample + n * row; }
  __device__ __forceinline__ T* at(int b, int n) const { return data + offset(b, n); }
};

// ids [1|B, K] of rows of a grid. What is no row of it is an empty slot.
struct SampleLists {
  const int32_t* index;  // null: slot k names row k
  int64_t sample;        // stride; one list for all: 0
  int samples, rows, slots;
  __host__ __device__ int total() const { return samples * slots; }
};
struct Slot {
  int sample, place, row;  // row -1: empty
};
// Of a slot counted through all samples.
__device__ __forceinline__ Slot slot_at(const SampleLists& lists, int i) {
  const int sample = i / lists.slots, place = i - sample * lists.slots;
  if (!lists.index) return {sample, place, place};
  const int id = lists.index[sample * lists.sample + place];
  return {sample, place, id >= 0 && id < lists.rows ? id : -1};
}

// [C] in float32 or the grids' type: one for all rows, or a row
struct ChannelVector {
  const void* data;  // null: there is none
  bool single;       // float32
};
template <bool Aligned, class T>
__device__ __forceinline__ void load_channels(float (&to)[Wide<T>::kCount], ChannelVector from, int c, int width) {
  constexpr int kRun = Wide<T>::kCount, kSingle = Wide<float>::kCount;
  if (from.single) {
#pragma unroll
    for (int part = 0; part < kRun; part += kSingle) {
      const Wide<float> four = load_run<Aligned>(static_cast<const float*>(from.data), c + part, width);
#pragma unroll
      for (int j = 0; j < kSingle; ++j) to[part + j] = four.at[j];
    }
  } else {
    const Wide<T> run = load_run<Aligned>(static_cast<const T*>(from.data), c, width);
#pragma unroll
    for (int j = 0; j < kRun; ++j) to[j] = to_float(run.at[j]);
  }
}

// layer normalisation of rows; no weight: none
struct Normalization {
  ChannelVector weight, bias;
  float eps, share;  // share: 1 / C
};
struct Moments {
  float mean, inverse;  // one over the standard deviation
};

// A row of x or of x + skip, the sum rounded to the grids' type: what is compared is what is returned.
template <class T, bool Aligned>
struct Row {
  static constexpr int kRun = Wide<T>::kCount;
  // So many runs are kept in registers, as they are in memory. Rows of up to 1024 half or 512 float numbers are read once; of longer
  // ones the rest is read again in every pass, from the caches.
  static constexpr int kHeld = 4;

  const T *x, *skip;
  int width;
  Wide<T> held[kHeld];

  __device__ __forceinline__ Row(const T* x, const T* skip, int width) : x(x), skip(skip), width(width) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (const int c = column(i); c < width) held[i] = read(c);
  }
  __device__ __forceinline__ static int column(int i) { return (i * kWarp + lane_id()) * kRun; }
  __device__ __forceinline__ Wide<T> read(int c) const {
    Wide<T> run = load_run<Aligned>(x, c, width);
    if (skip) {
      const Wide<T> more = load_run<Aligned>(skip, c, width);
#pragma unroll
      for (int j = 0; j < kRun; ++j) run.at[j] = from_float<T>(to_float(run.at[j]) + to_float(more.at[j]));
    }
    return run;
  }
  // calls f(column, run) for this lane's runs
  template <class F>
  __device__ __forceinline__ void each(F&& f) const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (const int c = column(i); c < width) f(c, held[i]);
    for (int c = column(kHeld); c < width; c += kWarp * kRun) f(c, read(c));
  }
  __device__ __forceinline__ bool has(int c) const { return Aligned || c < width; }

  __device__ __forceinline__ Moments moments(const Normalization& norm) const {
    float sum = 0.0f;
    each([&](int, const Wide<T>& run) {
#pragma unroll
      for (int j = 0; j < kRun; ++j) sum += to_float(run.at[j]);
    });
    const float mean = sum_lanes(sum) * norm.share;
    float squares = 0.0f;
    each([&](int c, const Wide<T>& run) {
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        const float centered = has(c + j) ? to_float(run.at[j]) - mean : 0.0f;
        squares += centered * centered;
      }
    });
    return {mean, rsqrtf(sum_lanes(squares) * norm.share + norm.eps)};
  }
};

// A run of a row after the normalisation, rounded as it is sent; as it is without one.
template <bool Aligned, class T>
__device__ __forceinline__ Wide<T> normalized(const Wide<T>& run, const Normalization& norm, Moments moments, int c, int width) {
  if (!norm.weight.data) return run;
  float weight[Wide<T>::kCount], bias[Wide<T>::kCount];
  load_channels<Aligned, T>(weight, norm.weight, c, width);
  load_channels<Aligned, T>(bias, norm.bias, c, width);
  Wide<T> result;
#pragma unroll
  for (int j = 0; j < Wide<T>::kCount; ++j)
    result.at[j] = from_float<T>((to_float(run.at[j]) - moments.mean) * moments.inverse * weight[j] + bias[j]);
  return result;
}

// Kernels with a warp for each row. Their launch bounds say one block a processor: or the compiler spills a few registers to fit one more.
constexpr int kRowWarps = 8;
constexpr int kRowThreads = kRowWarps * kWarp;
__device__ __forceinline__ int64_t row_of_warp() { return static_cast<int64_t>(blockIdx.x) * kRowWarps + warp_id(); }

// ---- moving rows ----

// Rows of bytes in units of 16, or of as many as their places in memory allow
template <class Unit>
struct RowMove {
  TokenGrid<const Unit> from;  // none: zeros
  TokenGrid<Unit> to;
  SampleLists lists;
  int width;
  bool take;  // from listed rows to slots, where empty ones become 0; else from slots to listed rows
};

template <class Unit>
__global__ void __launch_bounds__(kRowThreads) move_rows(RowMove<Unit> p) {
  const int64_t i = row_of_warp();
  if (i >= p.lists.total()) return;
  const Slot slot = slot_at(p.lists, static_cast<int>(i));
  if (slot.row < 0 && !p.take) return;
  Unit* to = p.to.at(slot.sample, p.take ? slot.place : slot.row);
  const bool nothing = !p.from.data || slot.row < 0;
  const Unit* from = nothing ? nullptr : p.from.at(slot.sample, p.take ? slot.row : slot.place);
#pragma unroll 4
  for (int c = lane_id(); c < p.width; c += kWarp) to[c] = from ? from[c] : Unit{};
}

}  // namespace
}  // namespace tokenops
