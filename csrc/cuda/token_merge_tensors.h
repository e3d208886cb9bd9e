// What both files of this room do with tensors: workspaces, the two grids of a search.
#pragma once

#include "../token_merge_tensors.h"
#include "launch.h"
#include "token_merge_describe.cuh"

namespace tokenops {
namespace {

// [2, B, N] ids
inline void check_lists(const Tensor& lists, int64_t batch, int64_t tokens) {
  check_rank("lists", lists, 3);
  check_dtype("lists", lists, ScalarType::Int);
  check_size("lists", lists, 0, 2);
  check_size("lists", lists, 1, batch);
  check_size("lists", lists, 2, tokens);
  check_contiguous("lists", lists);
}

// Whether every row begins where 16 bytes can be read at once, and ends with such a piece.
inline bool is_wide(const Tensor& t) {
  const int64_t count = 16 / static_cast<int64_t>(t.element_size());
  const auto fits = [&](int64_t dim) { return t.size(dim) <= 1 || t.stride(dim) % count == 0; };
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 && t.size(2) % count == 0 && fits(0) && fits(1);
}

// pieces of a buffer of 32-bit words, one after the other
struct Words {
  int32_t* next;
  int64_t left;

  explicit Words(const Tensor& scratch) : next(scratch.mutable_data_ptr<int32_t>()), left(scratch.numel()) {
    check_contiguous("scratch", scratch);
  }
  template <class T>
  T* take(int64_t count) {
    STD_TORCH_CHECK(count <= left, "scratch is too small");
    T* const words = reinterpret_cast<T*>(next);
    next += count, left -= count;
    return words;
  }
};

// One of the two grids of a search: `which` of the lists is its. A block of its description has `block` slots.
template <class T>
PairSide<T> side_of(const char* name, const Tensor& x, const OptionalTensor& mask, const OptionalTensor& scale, const OptionalTensor& place,
                    const OptionalTensor& lists, const OptionalTensor& listed, int which, int block, bool windowed, Words& words) {
  const int64_t batch = x.size(0), rows = x.size(1);
  check_tokens(name, x);
  PairSide<T> side{};
  side.x = static_cast<const T*>(x.const_data_ptr());
  side.sample = x.stride(0), side.row = x.stride(1), side.wide = is_wide(x);
  side.rows = side.slots = static_cast<int>(rows);
  if (lists) {
    check_lists(*lists, batch, rows);
    check_new("listed", *listed, ScalarType::Int, 2, batch);
    side.list = lists->const_data_ptr<int32_t>() + which * batch * rows;
    side.listed = listed->const_data_ptr<int32_t>() + which * batch;
  }
  if (mask) {
    check_per_token("a mask", *mask, ScalarType::Bool, batch, rows);
    side.mask = mask->const_data_ptr<bool>(), side.mask_sample = broadcast_stride(*mask, 0), side.mask_row = mask->stride(1);
  }
  if (scale) {
    check_per_token("a scale", *scale, ScalarType::Float, batch, rows);
    side.scale = scale->const_data_ptr<float>(), side.scale_sample = broadcast_stride(*scale, 0), side.scale_row = scale->stride(1);
  }
  check_place(place, windowed, batch, rows);
  if (place) {
    side.place = place->const_data_ptr<int32_t>(), side.place_sample = broadcast_stride(*place, 0);
    side.place_row = place->stride(1), side.place_axis = place->stride(2);
  }
  Description& of = side.of;
  of.blocks = static_cast<int>((rows + block - 1) / block), of.pitch = of.blocks * block;
  // copies of 16 bytes begin at factors and places: they come first, and a pitch is a multiple of 64
  of.factor = words.take<float>(batch * of.pitch), of.shrink = words.take<float>(batch * of.pitch);
  of.place = words.take<int>(batch * of.pitch * kPlaces);
  return side;
}

inline void take_blocks(Description& of, int64_t batch, Words& words) {
  of.unusual = words.take<int>(batch * of.blocks), of.bounds = words.take<int>(batch * of.blocks * 2 * kPlaces);
}

// squares and products of rows with such exponents neither overflow nor vanish
constexpr int kUsual = 40;

}  // namespace
}  // namespace tokenops
