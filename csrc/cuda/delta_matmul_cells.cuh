// What changed goes into the state of delta_attention, for the next frame.
#pragma once

#include "sparse_attention.cuh"

namespace tokenops {
namespace {

struct CellReplacement {
  Grid key, value;          // of the tokens' type
  Grid old_key, old_value;  // [B, H, M, D] of the same, [B, H, M, Dv] of the type that is stored; no old_key in mode "paper"
  const int32_t* cells;     // [1|B, J]
  int64_t cells_sample;
  int samples, heads, keys, slots, width, value_width;
  int32_t* turn;  // [] or null
  int turns;      // the next slice of so many has its turn
  bool aligned;   // rows of key and value begin at multiples of 16 bytes; those of the state do
};

constexpr int kCellThreads = 256;

// Eight numbers of a row, which a thread copies.
template <class From, class To>
__device__ __forceinline__ void copy_eight(To* to, const From* from, bool aligned) {
  constexpr int kFrom = Wide<From>::kCount, kTo = Wide<To>::kCount;
  Wide<From> eight[8 / kFrom];
#pragma unroll
  for (int i = 0; i < 8 / kFrom; ++i)
    if (aligned)
      eight[i] = load_wide(from + i * kFrom);
    else
      eight[i] = load_run<false>(from, i * kFrom, 8);
#pragma unroll
  for (int i = 0; i < 8 / kTo; ++i) {
    Wide<To> numbers;
#pragma unroll
    for (int j = 0; j < kTo; ++j) numbers.at[j] = from_float<To>(to_float(eight[(i * kTo + j) / kFrom].at[(i * kTo + j) % kFrom]));
    store_wide(to + i * kTo, numbers);
  }
}

// Listed keys and values into the state, and the next slice of rows has its turn.
template <class T, class Stored>
__global__ void __launch_bounds__(kCellThreads) replace_cells(CellReplacement p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kCellThreads + threadIdx.x;
  if (i == 0 && p.turn) *p.turn = (*p.turn + 1) % p.turns;
  const int pieces = ((p.old_key.data ? p.width : 0) + p.value_width) / 8;
  const int64_t slot = i / pieces;
  if (slot >= static_cast<int64_t>(p.samples) * p.heads * p.slots) return;
  const int b = slot / p.slots / p.heads, h = slot / p.slots % p.heads, id = p.cells[b * p.cells_sample + slot % p.slots];
  if (!names(id, p.keys)) return;
  int c = i % pieces * 8;
  if (c < p.value_width)
    return copy_eight(p.old_value.at<Stored>(b, h) + id * p.old_value.row + c, p.value.at<const T>(b, h) + id * p.value.row + c, p.aligned);
  c -= p.value_width;
  copy_eight(p.old_key.at<T>(b, h) + id * p.old_key.row + c, p.key.at<const T>(b, h) + id * p.key.row + c, p.aligned);
}

}  // namespace
}  // namespace tokenops
