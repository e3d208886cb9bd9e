// Merging rows into the output row that owns them, the way back, and the gradients. An *output row* s owns the tokens
// order[offsets[s] : offsets[s + 1]], its members, the destination first. A sum runs over them in that order in float, and every result has
// one thread that writes it. Whatever a plan holds, only rows of the grids are touched: bounds are cut to the order, and an id or a slot
// out of range is nobody.
#pragma once

#include "../token_merge.h"
#include "device.cuh"

namespace tokenops {
namespace {

constexpr int kSegmentThreads = 128;

// rows of a grid [B, rows, width]
template <class T>
struct Rows {
  T* base;
  int64_t sample, row;
  __device__ T* at(int64_t s, int64_t i) const { return base + s * sample + i * row; }
};

template <class T>
struct SegmentArguments {
  const int32_t *slot, *order, *offsets;  // [1|B, tokens], [1|B, tokens], [1|B, n_out + 1]
  int64_t slot_sample, order_sample, offsets_sample;
  const float* size;  // or null: every member weighs 1
  int64_t size_sample, size_token;
  Rows<const T> x;    // [B, tokens, width]
  Rows<const T> y;    // [B, n_out, width]: what is merged or, for gradients, its gradient
  Rows<const T> out;  // [B, n_out, width]: what was merged
  Rows<T> result;     // rows of output, or of tokens; null base: not wanted
  float* grad_size;   // [B, tokens] or null
  MergeMode mode;
  int samples, tokens, n_out, width;
  int lanes;  // neighbouring threads that have a row, a power of two up to 32
};

template <class T>
struct Segment {
  const SegmentArguments<T>& p;
  int64_t s;
  const int32_t* order;
  int count;

  __device__ Segment(const SegmentArguments<T>& p, int64_t s, int row) : p(p), s(s) {
    const int32_t* offsets = p.offsets + s * p.offsets_sample + row;
    const int begin = min(max(offsets[0], 0), p.tokens);
    order = p.order + s * p.order_sample + begin;
    count = min(max(offsets[1], begin), p.tokens) - begin;
  }
  // the k-th member, -1: nobody
  __device__ int member(int k) const {
    const int id = order[k];
    return id >= 0 && id < p.tokens ? id : -1;
  }
  __device__ float size(int id) const { return id < 0 ? 0.0f : p.size ? p.size[s * p.size_sample + id * p.size_token] : 1.0f; }
  __device__ float mass() const {
    float mass = 0.0f;
#pragma unroll 4
    for (int k = 0; k < count; ++k) mass += size(member(k));
    return mass;
  }
};

// The row of a thread, and its first column of it.
template <class T>
struct Share {
  int64_t s;
  int row, column, step;
  __device__ Share(const SegmentArguments<T>& p, int rows) {
    const int64_t at = (blockIdx.x * static_cast<int64_t>(kSegmentThreads) + threadIdx.x) / p.lanes;
    s = at / rows, row = static_cast<int>(at % rows);
    column = threadIdx.x % p.lanes * Wide<T>::kCount, step = p.lanes * Wide<T>::kCount;
  }
};

template <class T>
using Numbers = float[Wide<T>::kCount];

template <bool kAligned, class T>
__device__ __forceinline__ void read(Numbers<T>& numbers, const T* row, int column, int width) {
  const Wide<T> run = load_run<kAligned>(row, column, width);
  for (int k = 0; k < Wide<T>::kCount; ++k) numbers[k] = to_float(run.at[k]);
}
template <bool kAligned, class T>
__device__ __forceinline__ void write(T* row, int column, int width, const Numbers<T>& numbers) {
  Wide<T> run;
  for (int k = 0; k < Wide<T>::kCount; ++k) run.at[k] = from_float<T>(numbers[k]);
  store_run<kAligned>(row, column, width, run);
}

constexpr float kLowestNormal = 0x1p-126f;  // reciprocals of what is below may overflow

template <class T, bool kAligned>
__global__ void __launch_bounds__(kSegmentThreads) merge_rows(const SegmentArguments<T> p) {
  const Share<T> mine(p, p.n_out);
  if (mine.s >= p.samples) return;
  Segment<T> segment(p, mine.s, mine.row);
  if (p.mode == MergeMode::keep) segment.count = min(segment.count, 1);
  // the only member is copied: times its size and divided by it would round
  const bool weighs = p.mode != MergeMode::amax && p.size && segment.count > 1;
  float mass = p.mode == MergeMode::mean ? segment.mass() : segment.count;
  if (segment.count == 1 && mass != 0.0f) mass = 1.0f;
  const bool is_mean = p.mode == MergeMode::mean && segment.count > 1, tiny = mass < kLowestNormal;
  const float by = 1.0f / mass;
  T* const to = p.result.at(mine.s, mine.row);
  for (int column = mine.column; column < p.width; column += mine.step) {
    Numbers<T> merged{};
    if (p.mode == MergeMode::amax && segment.count > 0)
      for (float& x : merged) x = __int_as_float(0xff800000);
    // members are loaded ahead, and added one after the other
#pragma unroll 4
    for (int k = 0; k < segment.count; ++k) {
      const int id = segment.member(k);
      if (id < 0) continue;
      Numbers<T> row;
      read<kAligned>(row, p.x.at(mine.s, id), column, p.width);
      const float weight = weighs ? segment.size(id) : 1.0f;
      for (int i = 0; i < Wide<T>::kCount; ++i) {
        if (p.mode == MergeMode::amax)
          // no number is the maximum wherever it stands, as in torch
          merged[i] = row[i] > merged[i] || row[i] != row[i] ? row[i] : merged[i];
        else
          merged[i] += row[i] * weight;
      }
    }
    for (float& x : merged) x = mass == 0.0f ? 0.0f : !is_mean ? x : tiny ? x / mass : x * by;
    write<kAligned>(to, column, p.width, merged);
  }
}

// Gradients of the members of an output row. The tokens that no row owns get their zeros here too: from the thread of the row whose number
// is theirs.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kSegmentThreads, 4) merge_backward(const SegmentArguments<T> p) {
  const Share<T> mine(p, max(p.tokens, p.n_out));
  if (mine.s >= p.samples) return;
  const int token = mine.row, slot = token < p.tokens ? p.slot[mine.s * p.slot_sample + token] : 0;
  if (slot < 0 || slot >= p.n_out) {
    if (p.result.base)
      for (int column = mine.column; column < p.width; column += mine.step)
        write<kAligned>(p.result.at(mine.s, token), column, p.width, Numbers<T>{});
    if (p.grad_size && mine.column == 0) p.grad_size[mine.s * p.tokens + token] = 0.0f;
  }
  if (mine.row >= p.n_out) return;
  const Segment<T> segment(p, mine.s, mine.row);
  const float mass = p.mode == MergeMode::mean ? segment.mass() : 1.0f;
  const T *grad = p.y.at(mine.s, mine.row), *out = p.out.at(mine.s, mine.row);
  if (p.grad_size)
    // d out / d size = (token - out) / mass, along the gradient; here a whole warp has the row
    for (int k = 0; k < segment.count; ++k) {
      const int id = segment.member(k);
      if (id < 0) continue;
      float sum = 0.0f;
      for (int column = mine.column; column < p.width; column += mine.step) {
        Numbers<T> g, x, o;
        read<kAligned>(g, grad, column, p.width), read<kAligned>(x, p.x.at(mine.s, id), column, p.width);
        read<kAligned>(o, out, column, p.width);
        for (int i = 0; i < Wide<T>::kCount; ++i) sum += g[i] * (x[i] - o[i]);
      }
      sum = sum_lanes(sum);
      // nothing depends on tokens of a row without mass
      if (mine.column == 0) p.grad_size[mine.s * p.tokens + id] = mass == 0.0f ? 0.0f : sum * (1.0f / mass);
    }
  if (!p.result.base) return;
  for (int column = mine.column; column < p.width; column += mine.step) {
    Numbers<T> g, top, row;
    read<kAligned>(g, grad, column, p.width);
    if (p.mode == MergeMode::amax) {
      // the members that reach the maximum share its gradient
      read<kAligned>(top, out, column, p.width);
      Numbers<T> reached{};
      for (int k = 0; k < segment.count; ++k) {
        const int id = segment.member(k);
        if (id < 0) continue;
        read<kAligned>(row, p.x.at(mine.s, id), column, p.width);
        for (int i = 0; i < Wide<T>::kCount; ++i) reached[i] += row[i] == top[i];
      }
      // not reached by anyone: the maximum is NaN
      for (int i = 0; i < Wide<T>::kCount; ++i) g[i] /= fmaxf(reached[i], 1.0f);
    }
    for (int k = 0; k < segment.count; ++k) {
      const int id = segment.member(k);
      if (id < 0) continue;
      Numbers<T> result;
      float weight = 1.0f;
      if (p.mode == MergeMode::mean) weight = mass == 0.0f ? 0.0f : segment.size(id) / mass;
      if (p.mode == MergeMode::keep && k > 0) weight = 0.0f;
      if (p.mode == MergeMode::amax) read<kAligned>(row, p.x.at(mine.s, id), column, p.width);
      for (int i = 0; i < Wide<T>::kCount; ++i) {
        if (p.mode == MergeMode::amax)
          result[i] = row[i] == top[i] ? g[i] : 0.0f;
        else
          result[i] = weight == 0.0f ? 0.0f : g[i] * weight;
      }
      write<kAligned>(p.result.at(mine.s, id), column, p.width, result);
    }
  }
}

// To each token the row of its slot; in mode keep to the destination only.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kSegmentThreads) unmerge_rows(const SegmentArguments<T> p) {
  const Share<T> mine(p, p.tokens);
  if (mine.s >= p.samples) return;
  const int slot = p.slot[mine.s * p.slot_sample + mine.row];
  bool here = slot >= 0 && slot < p.n_out;
  if (here && p.mode == MergeMode::keep) {
    const Segment<T> segment(p, mine.s, slot);
    here = segment.count > 0 && segment.member(0) == mine.row;
  }
  const T* from = p.y.at(mine.s, here ? slot : 0);
  for (int column = mine.column; column < p.width; column += mine.step)
    store_run<kAligned>(p.result.at(mine.s, mine.row), column, p.width, here ? load_run<kAligned>(from, column, p.width) : Wide<T>{});
}

}  // namespace
}  // namespace tokenops
