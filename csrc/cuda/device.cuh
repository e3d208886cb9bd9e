// What kernels of all rooms share on the device. Compiles with nvcc, and with g++ for the emulator.
#pragma once

#ifdef __CUDACC__
#include "ptx.cuh"
#else
#include "emulator.h"
#endif

namespace tokenops {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// bytes that a block may have on every architecture: 8.6 and 8.9, which run what is built for 8.0, and 12.0, which runs what is built for
// 10.0, have no more
constexpr size_t kMostShared = 99 << 10;

// All shared memory of a kernel is one struct, whose size the launch is given.
template <class T>
__device__ __forceinline__ T& shared_memory() {
  static_assert(sizeof(T) <= kMostShared, "more shared memory than there is");
  return *static_cast<T*>(shared_begin(sizeof(T)));
}

__device__ __forceinline__ int lane_id() { return threadIdx.x % kWarp; }
__device__ __forceinline__ int warp_id() { return threadIdx.x / kWarp; }

template <class T>
__device__ __forceinline__ T from_float(float x) {
  return T{static_cast<uint16_t>(pack<T>(x, 0.0f))};
}
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}

// 16 bytes at once: both addresses are multiples of 16
template <class T>
struct alignas(16) Wide {
  static constexpr int kCount = 16 / sizeof(T);
  T at[kCount];
};
template <class T>
__device__ __forceinline__ Wide<T> load_wide(const T* from) {
  return *reinterpret_cast<const Wide<T>*>(from);
}
template <class T>
__device__ __forceinline__ void store_wide(T* to, const Wide<T>& values) {
  *reinterpret_cast<Wide<T>*>(to) = values;
}

// Numbers c ... of a row of `width`, as many as 16 bytes hold, 0 behind its end. Aligned: all of them are in the row, and the first is at a
// multiple of 16 bytes. A lane has the same numbers either way, so that sums have the same bits for every layout.
template <bool Aligned, class T>
__device__ __forceinline__ Wide<T> load_run(const T* row, int c, int width) {
  if constexpr (Aligned) {
    return load_wide(row + c);
  } else {
    Wide<T> run;
#pragma unroll
    for (int j = 0; j < Wide<T>::kCount; ++j) run.at[j] = c + j < width ? row[c + j] : T{};
    return run;
  }
}
template <bool Aligned, class T>
__device__ __forceinline__ void store_run(T* row, int c, int width, const Wide<T>& run) {
  if constexpr (Aligned) {
    store_wide(row + c, run);
  } else {
#pragma unroll
    for (int j = 0; j < Wide<T>::kCount; ++j)
      if (c + j < width) row[c + j] = run.at[j];
  }
}

// Folds over `Lanes` neighbouring lanes (a power of two); every lane is given the result. All 32 lanes of the warp must call.
template <int Lanes = kWarp, class T, class Fold>
__device__ __forceinline__ T fold_lanes(T value, Fold fold) {
#pragma unroll
  for (int step = Lanes / 2; step > 0; step /= 2) value = fold(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
}
template <int Lanes = kWarp, class T>
__device__ __forceinline__ T sum_lanes(T value) {
  return fold_lanes<Lanes>(value, [](T a, T b) { return a + b; });
}
template <int Lanes = kWarp>
__device__ __forceinline__ float max_lanes(float value) {
  return fold_lanes<Lanes>(value, [](float a, float b) { return fmaxf(a, b); });
}

// The sum over the lanes before this one.
template <class T>
__device__ __forceinline__ T sum_before(T value) {
  T sum = value;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const T other = __shfl_up_sync(kAllLanes, sum, step);
    if (lane_id() >= step) sum += other;
  }
  return sum - value;
}

// Of one number a warp: the sum over the warps before this one, and over all. `partial` is shared memory that nobody reads any more. A
// block may have fewer than `Warps` warps.
template <class T>
struct WarpSums {
  T before, all;
};
template <int Warps, class T>
__device__ __forceinline__ WarpSums<T> sum_warps(T value, T (&partial)[Warps], int warps = Warps) {
  static_assert(Warps <= kWarp, "a lane reads the number of a warp");
  if (lane_id() == 0) partial[warp_id()] = value;
  __syncthreads();
  value = lane_id() < warps ? partial[lane_id()] : T{};
  const T before = sum_before(value);
  return {__shfl_sync(kAllLanes, before, warp_id()), __shfl_sync(kAllLanes, before + value, kWarp - 1)};
}

}  // namespace tokenops
