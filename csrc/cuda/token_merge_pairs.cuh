// For each row of a the most similar row of b. Scores live in registers: a thread keeps the best of its own columns, and threads with the
// same rows agree at the end. Columns ascend and must be strictly better to win, so ties go to the lowest index; NaN is not better.
#pragma once

#include <type_traits>

#include "token_merge_tiles.cuh"

namespace tokenops {

constexpr int kPlaces = 3;       // t, y, x
constexpr int kRowLanes = 8;     // that read one row together, to find its length
constexpr int kUsual = 40;       // largest numbers from 2^-40 to 2^40: squares and products of such rows neither overflow nor vanish
constexpr int kEachSlot = 5;     // words of a description: factor, shrink, place
constexpr int kEachBlock = 7;    // unusual, bounds
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
struct PairArguments {
  PairSide<T> a, b;
  int samples, width;
  bool normalize, shrinks, windowed;
  int64_t low[kPlaces], high[kPlaces];  // where b may be, seen from a
  float* best;                          // [splits, B, slots of a]
  int32_t* index;
  int splits, first_id, id_step;  // slot s of b without a list is token first_id + s id_step, and row r of it with one
};

struct DescribeShared {
  int partial[kTileWarps];
};

// A block of slots of a, or one of b.
template <class T>
__global__ void __launch_bounds__(kTileThreads) describe(const PairArguments<T> p) {
  auto& shared = shared_memory<DescribeShared>();
  const int blocks_a = p.samples * p.a.of.blocks;
  const bool is_a = static_cast<int>(blockIdx.x) < blocks_a;
  const PairSide<T>& side = is_a ? p.a : p.b;
  const int at = is_a ? blockIdx.x : blockIdx.x - blocks_a, size = side.of.pitch / side.of.blocks;
  const int64_t s = at / side.of.blocks;
  const int block = at % side.of.blocks, first = block * size;
  const Grid<T> grid = side.grid(s, p.width, false);
  bool odd = false;
  for (int slot = first + threadIdx.x / kRowLanes; slot < first + size; slot += kTileThreads / kRowLanes) {
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
      if (p.shrinks && largest > 0.0f && (exponent < 127 - kUsual || exponent > 127 + kUsual)) {
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
  if (p.shrinks) {
    odd = __syncthreads_or(odd);
    if (threadIdx.x == 0) side.of.unusual[s * side.of.blocks + block] = odd;
  }
  if (!p.windowed) return;
  const int slot = first + threadIdx.x, id = static_cast<int>(threadIdx.x) < size ? grid.id(slot) : -1;
  const bool takes_part = side.takes_part(s, id);
  for (int axis = 0; axis < kPlaces; ++axis) {
    int place = 0;
    if (takes_part) place = side.place[s * side.place_sample + id * side.place_row + axis * side.place_axis];
    if (static_cast<int>(threadIdx.x) < size) side.of.place[(s * kPlaces + axis) * side.of.pitch + slot] = place;
    const int least = fold_block(takes_part ? place : kHighestInt, shared.partial, [](int x, int y) { return min(x, y); });
    const int greatest = fold_block(takes_part ? place : kLowestInt, shared.partial, [](int x, int y) { return max(x, y); });
    if (threadIdx.x) continue;
    int* bounds = side.of.bounds + s * 2 * kPlaces * side.of.blocks + block;
    bounds[axis * side.of.blocks] = least, bounds[(kPlaces + axis) * side.of.blocks] = greatest;
  }
}

struct Interval {
  int low, high;
};

// Which places are near enough, both ends included; empty where there is no such int32.
__device__ __forceinline__ Interval interval(int place, int64_t below, int64_t above) {
  const int64_t low = place + below, high = place + above;
  if (high < kLowestInt || low > kHighestInt) return {kHighestInt, kLowestInt};
  return {static_cast<int>(max(low, static_cast<int64_t>(kLowestInt))), static_cast<int>(min(high, static_cast<int64_t>(kHighestInt)))};
}

template <class T>
struct SearchShared {
  TileShared<T> tiles;
  alignas(16) float factor[kStages][kRowsB];
};
template <class T>
struct WindowShared : SearchShared<T> {
  alignas(16) int place[kStages][kPlaces][kRowsB];
  Interval near[kPlaces][kRowsA];
  int partial[kTileWarps];
};
// how many blocks a processor has memory for
template <bool kWindowed>
constexpr int kSearchBlocks = kWindowed ? 2 : 3;

// A block of slots of a, and a share of the tiles of b.
template <class T, bool kWindowed>
__global__ void __launch_bounds__(kTileThreads, kSearchBlocks<kWindowed>) search(const PairArguments<T> p) {
  using Own = Products<T>;
  auto& shared = shared_memory<std::conditional_t<kWindowed, WindowShared<T>, SearchShared<T>>>();
  const int block = blockIdx.x % p.a.of.blocks, share = blockIdx.x / p.a.of.blocks % p.splits;
  const int64_t s = blockIdx.x / p.a.of.blocks / p.splits;
  const Grid<T> a = p.a.grid(s, p.width, p.shrinks), b = p.b.grid(s, p.width, p.shrinks);
  const int a_first = block * kRowsA, tiles = (b.end + kRowsB - 1) / kRowsB, length = (tiles + p.splits - 1) / p.splits;
  const int first = share * length;
  const float* factor = p.b.of.factor + s * p.b.of.pitch;
  const int* place = p.b.of.place + s * kPlaces * p.b.of.pitch;
  const int* bounds = p.b.of.bounds + s * 2 * kPlaces * p.b.of.blocks;

  // one row a thread: who takes part, and what is near
  const int mine = a_first + threadIdx.x;
  const bool takes_part = p.a.takes_part(s, a.id(mine));
  // lane l stands for row l of the warp
  const unsigned wanted = __ballot_sync(kAllLanes, takes_part);
  const int last = __syncthreads_or(takes_part) ? min(tiles, first + length) : first;
  Interval reach[kPlaces] = {};
  if constexpr (kWindowed) {
    for (int axis = 0; axis < kPlaces; ++axis) {
      const int at = p.a.of.place[(s * kPlaces + axis) * p.a.of.pitch + mine];
      const Interval near = takes_part ? interval(at, p.low[axis], p.high[axis]) : Interval{kHighestInt, kLowestInt};
      shared.near[axis][threadIdx.x] = near;
      reach[axis].low = fold_block(near.low, shared.partial, [](int x, int y) { return min(x, y); });
      reach[axis].high = fold_block(near.high, shared.partial, [](int x, int y) { return max(x, y); });
    }
  }
  const auto meets = [&](int tile) {
    bool meets = true;
    if constexpr (kWindowed)
      for (int axis = 0; axis < kPlaces; ++axis) {
        const int *least = bounds + axis * p.b.of.blocks, *greatest = least + kPlaces * p.b.of.blocks;
        meets &= least[tile] <= reach[axis].high && greatest[tile] >= reach[axis].low;
      }
    return meets;
  };
  bool shrinks = false;
  if (p.shrinks) {
    int odd = threadIdx.x == 0 && p.a.of.unusual[s * p.a.of.blocks + block];
    for (int tile = first + threadIdx.x; tile < last; tile += kTileThreads) odd |= p.b.of.unusual[s * p.b.of.blocks + tile];
    shrinks = __syncthreads_or(odd);
  }

  float best[Own::kOwnRows];
  int winner[Own::kOwnRows];
#pragma unroll
  for (int i = 0; i < Own::kOwnRows; ++i) best[i] = -infinity(), winner[i] = kHighestInt;
  const auto load = [&](int tile, int stage) {
    constexpr int kEach = kRowsB / 4;
    const int i = threadIdx.x, plane = i / kEach - 1, column = i % kEach * 4;
    if (plane < 0) cp_async_16(&shared.factor[stage][column], factor + tile * kRowsB + column);
    if constexpr (kWindowed)
      if (plane >= 0 && plane < kPlaces)
        cp_async_16(&shared.place[stage][plane][column], place + plane * p.b.of.pitch + tile * kRowsB + column);
  };
  const auto compare = [&](int tile, int stage, Own& products) {
#pragma unroll
    for (int i = 0; i < Own::kOwnRows; ++i) {
      Interval near[kPlaces] = {};
      if constexpr (kWindowed)
        for (int axis = 0; axis < kPlaces; ++axis) near[axis] = shared.near[axis][warp_id() * kWarpRows + Own::row(i)];
#pragma unroll
      for (int j = 0; j < Own::kOwnColumns; ++j) {
        const int column = Own::column(j);
        const float score = products.at(i, j) * shared.factor[stage][column];
        bool better = score > best[i];
        if constexpr (kWindowed)
          for (int axis = 0; axis < kPlaces; ++axis) {
            const int at = shared.place[stage][axis][column];
            better &= at >= near[axis].low && at <= near[axis].high;
          }
        best[i] = better ? score : best[i];
        winner[i] = better ? tile * kRowsB + column : winner[i];
      }
    }
  };
  for_tiles(shared.tiles, a, a_first, b, first, last, wanted != 0, shrinks, meets, load, compare);

#pragma unroll
  for (int i = 0; i < Own::kOwnRows; ++i) {
    const float top = max_lanes<Own::kSharers>(best[i]);
    const int lowest = fold_lanes<Own::kSharers>(best[i] == top ? winner[i] : kHighestInt, [](int x, int y) { return min(x, y); });
    const int row = Own::row(i), slot = a_first + warp_id() * kWarpRows + row;
    if (lane_id() % Own::kSharers || slot >= p.a.slots) continue;
    const bool won = wanted >> row & 1 && lowest < kHighestInt;
    const int64_t at = (share * static_cast<int64_t>(p.samples) + s) * p.a.slots + slot;
    const float scale = p.splits == 1 ? p.a.of.factor[s * p.a.of.pitch + slot] : 1.0f;
    p.best[at] = won ? top * scale : -infinity();
    p.index[at] = won ? p.first_id + b.id(lowest) * p.id_step : -1;
  }
}

struct ShareArguments {
  const float *share_best, *factor;
  const int32_t* share_index;  // [splits, B, slots]
  float* best;
  int32_t* index;
  int samples, slots, pitch, splits;
};

// The winner of the shares' winners, the first of several. A thread a row.
__global__ void __launch_bounds__(kTileThreads) best_of_shares(const ShareArguments p) {
  const int64_t count = static_cast<int64_t>(p.samples) * p.slots, at = blockIdx.x * static_cast<int64_t>(kTileThreads) + threadIdx.x;
  if (at >= count) return;
  float best = -infinity();
  int32_t index = -1;
  for (int share = 0; share < p.splits; ++share) {
    const float other = p.share_best[share * count + at];
    if (other > best) best = other, index = p.share_index[share * count + at];
  }
  p.best[at] = index < 0 ? best : best * p.factor[at / p.slots * p.pitch + at % p.slots];
  p.index[at] = index;
}

}  // namespace tokenops
