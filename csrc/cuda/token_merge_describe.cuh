// What products of rows need to know of the rows beforehand: who takes part, lengths, and numbers so large or small that squares of them
// would overflow or vanish.
#pragma once

#include "../token_merge.h"
#include "token_merge_tiles.cuh"

namespace tokenops {
namespace {

constexpr int kDescribeThreads = kRowsA;  // a slot each, for what is one number a slot
constexpr int kRowLanes = 8;              // that read one row together, to find its length
constexpr int kLowestInt = INT32_MIN, kHighestInt = INT32_MAX;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }
__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fc00000); }

// What the search has to know of a grid beside its rows, by slot. A sample has `pitch` slots in `blocks` blocks.
struct Description {
  float* factor;  // scale over length; NaN where nobody takes part
  float* shrink;  // the power of two that makes a row's numbers usual ones
  int* place;     // [3] planes
  int* unusual;   // by block: whether one shrink is not 1
  int* bounds;    // by block: least t, y, x and greatest t, y, x
  int pitch, blocks;
};

template <class T>
struct PairSide {
  const T* x;
  int64_t sample, row;
  bool wide;
  int rows, slots;        // of a sample; slots are rows without a list
  const int32_t* list;    // [B, rows] row ids, or null
  const int32_t* listed;  // [B] how many
  const bool* mask;
  int64_t mask_sample, mask_row;
  const float* scale;
  int64_t scale_sample, scale_row;
  const int32_t* place;
  int64_t place_sample, place_row, place_axis;
  Description of;

  __device__ Grid<T> grid(int64_t s, int width, bool shrinks) const {
    const int end = list ? min(listed[s], slots) : slots;
    return {x + s * sample, row, list ? list + s * rows : nullptr, end, rows, width, wide, shrinks ? of.shrink + s * of.pitch : nullptr};
  }
  __device__ bool takes_part(int64_t s, int id) const { return id >= 0 && (!mask || mask[s * mask_sample + id * mask_row]); }
};

template <class T>
struct DescribeArguments {
  PairSide<T> a, b;
  int samples, width;
  bool normalize, windowed;
  int usual;  // largest numbers of rows from 2^-usual to 2^usual are; 0: all are
};

struct Interval {
  int low, high;
};
template <int kWarps>
using PartialBox = Interval[kPlaces][kWarps];

// The smallest box around the boxes of all threads of a block. `partial` is shared memory that nobody uses before or after.
template <int kWarps>
__device__ __forceinline__ void cover(Interval (&box)[kPlaces], PartialBox<kWarps>& partial) {
  const auto lower = [](int x, int y) { return min(x, y); };
  const auto higher = [](int x, int y) { return max(x, y); };
#pragma unroll
  for (int axis = 0; axis < kPlaces; ++axis) {
    box[axis] = {fold_lanes(box[axis].low, lower), fold_lanes(box[axis].high, higher)};
    if (lane_id() == 0) partial[axis][warp_id()] = box[axis];
  }
  __syncthreads();
#pragma unroll
  for (int axis = 0; axis < kPlaces; ++axis)
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      const Interval other = partial[axis][warp];
      box[axis] = {lower(box[axis].low, other.low), higher(box[axis].high, other.high)};
    }
}

struct DescribeShared {
  PartialBox<kDescribeThreads / kWarp> partial;
};

// A block of slots of a, or one of b.
template <class T>
__global__ void __launch_bounds__(kDescribeThreads, 8) describe(const DescribeArguments<T> p) {
  auto& shared = shared_memory<DescribeShared>();
  const int blocks_a = p.samples * p.a.of.blocks;
  const bool is_a = static_cast<int>(blockIdx.x) < blocks_a;
  const PairSide<T>& side = is_a ? p.a : p.b;
  const int at = is_a ? blockIdx.x : blockIdx.x - blocks_a, size = side.of.pitch / side.of.blocks;
  const int64_t s = at / side.of.blocks;
  const int block = at % side.of.blocks, first = block * size;
  const Grid<T> grid = side.grid(s, p.width, false);
  bool odd = false;
  for (int slot = first + threadIdx.x / kRowLanes; slot < first + size; slot += kDescribeThreads / kRowLanes) {
    const int id = grid.id(slot);
    const bool takes_part = side.takes_part(s, id);
    float factor = takes_part && side.scale ? side.scale[s * side.scale_sample + id * side.scale_row] : 1.0f, usual = 1.0f;
    if (p.normalize) {
      const T* row = grid.base + (takes_part ? id * grid.row : 0);
      const int pieces = takes_part ? p.width / Wide<T>::kCount : 0;
      const auto for_numbers = [&](const auto& use) {
        for (int piece = threadIdx.x % kRowLanes; piece < pieces; piece += kRowLanes) {
          const T* from = row + piece * Wide<T>::kCount;
          Wide<T> numbers;
          if (grid.wide)
            numbers = load_wide(from);
          else
            for (int k = 0; k < Wide<T>::kCount; ++k) numbers.at[k] = from[k];
          for (int k = 0; k < Wide<T>::kCount; ++k) use(to_float(numbers.at[k]));
        }
      };
      float largest = 0.0f, squares = 0.0f;
      for_numbers([&](float x) { largest = fmaxf(largest, fabsf(x)), squares += x * x; });
      largest = max_lanes<kRowLanes>(largest);
      const int exponent = __float_as_int(largest) >> 23;
      if (p.usual && largest > 0.0f && (exponent < 127 - p.usual || exponent > 127 + p.usual)) {
        odd = true;
        // the reciprocal of the greatest power of two in it, as far as that is a number
        usual = __int_as_float((254 - min(max(exponent, 1), 253)) << 23);
        squares = 0.0f;
        for_numbers([&](float x) { squares += x * usual * (x * usual); });
      }
      squares = sum_lanes<kRowLanes>(squares);
      // a row of zeros is like nothing
      factor *= squares == 0.0f ? 0.0f : 1.0f / sqrtf(squares);
    }
    if (threadIdx.x % kRowLanes) continue;
    // a row of a that takes no part is known by its mask: its factor may be NaN for other reasons
    side.of.factor[s * side.of.pitch + slot] = takes_part ? factor : not_a_number();
    side.of.shrink[s * side.of.pitch + slot] = usual;
  }
  if (p.usual) {
    odd = __syncthreads_or(odd);
    if (threadIdx.x == 0) side.of.unusual[s * side.of.blocks + block] = odd;
  }
  if (!p.windowed) return;
  const int slot = first + threadIdx.x, id = static_cast<int>(threadIdx.x) < size ? grid.id(slot) : -1;
  const bool takes_part = side.takes_part(s, id);
  Interval box[kPlaces];
  for (int axis = 0; axis < kPlaces; ++axis) {
    int place = 0;
    if (takes_part) place = side.place[s * side.place_sample + id * side.place_row + axis * side.place_axis];
    if (static_cast<int>(threadIdx.x) < size) side.of.place[(s * kPlaces + axis) * side.of.pitch + slot] = place;
    box[axis] = takes_part ? Interval{place, place} : Interval{kHighestInt, kLowestInt};
  }
  cover(box, shared.partial);
  if (threadIdx.x) return;
  int* bounds = side.of.bounds + s * 2 * kPlaces * side.of.blocks + block;
  for (int axis = 0; axis < kPlaces; ++axis) {
    bounds[axis * side.of.blocks] = box[axis].low;
    bounds[(kPlaces + axis) * side.of.blocks] = box[axis].high;
  }
}

}  // namespace
}  // namespace tokenops
