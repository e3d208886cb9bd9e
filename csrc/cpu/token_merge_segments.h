// Merging rows into the output row that owns them, the way back, and the gradients. Sums are float32 and run in the order of the
// plan: the destination first, then the others ascending. Each result row is written once, by whoever was given it.
#pragma once

#include "pack.h"
#include "row_norms.h"
#include "token_merge.h"

namespace tokenops {
namespace TOKENOPS_ISA {
namespace {

// Calls f(column, columns) for a row, a vector at a time and then element by element: the sizes of tokens are a row of one.
template <class F>
TOKENOPS_INLINE void for_columns(int64_t width, F&& f) {
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes) f(c, std::integral_constant<int, kLanes>{});
  for (; c < width; ++c) f(c, std::integral_constant<int, 1>{});
}

// one element or a vector of them, as float
template <int n, class T>
TOKENOPS_INLINE auto load_columns(const T* from) {
  if constexpr (n == 1)
    return to_float(*from);
  else
    return load<n>(from);
}

template <int n>
TOKENOPS_INLINE auto same_everywhere(float x) {
  if constexpr (n == 1)
    return x;
  else
    return splat<n>(x);
}

TOKENOPS_INLINE void store_element(float* to, float x) { *to = x; }
TOKENOPS_INLINE void store_element(bf16* to, float x) { to->bits = to_bf16<4>(splat<4>(x))[0]; }
TOKENOPS_INLINE void store_element(f16* to, float x) { to->bits = float_to_half(x); }

template <int n, class T, class V>
TOKENOPS_INLINE void store_columns(T* to, V x, bool past_caches) {
  if constexpr (n == 1)
    store_element(to, x);
  else if (past_caches)
    stream<n>(to, x);
  else
    store<n>(to, x);
}

struct Members {
  const int32_t* id;
  int64_t count;
};
Members members_of(const SegmentSample& s, int64_t slot) { return {s.order + s.offsets[slot], s.offsets[slot + 1] - s.offsets[slot]}; }

constexpr float kLowestNormal = 0x1p-126f;  // reciprocals of what is below may overflow

// what a row of a mean is divided by; zero for a row without mass
float mass_of(const Segments& p, const SegmentSample& s, Members members) {
  if (p.mode != MergeMode::mean) return 1.f;
  if (!s.size) return (float)members.count;
  float mass = 0.f;
  for (int64_t k = 0; k < members.count; ++k) mass += s.size[members.id[k] * s.size_row];
  return mass;
}
float size_of(const SegmentSample& s, int32_t id) { return s.size ? s.size[id * s.size_row] : 1.f; }

template <class T>
const T* token_of(const SegmentSample& s, int32_t id) {
  return (const T*)s.tokens + id * s.token_row;
}

template <class T>
void copy_row(T* to, const T* from, int64_t width, bool past_caches) {
  if (past_caches)
    for_columns(width, [&](int64_t c, auto n) { store_columns<n()>(to + c, load_columns<n()>(from + c), true); });
  else
    memcpy(to, from, width * sizeof(T));
}

template <class T>
bool merge_rows(const Segments& p, const SegmentSample& s, int64_t first, int64_t last) {
  bool sizes_right = true;
  for (int64_t slot = first; slot < last; ++slot) {
    T* to = (T*)s.result + slot * s.result_row;
    const Members members = members_of(s, slot);
    if (s.size)
      for (int64_t k = 0; k < members.count; ++k) sizes_right &= s.size[members.id[k] * s.size_row] >= 0.f;
    const float mass = mass_of(p, s, members);
    if (members.count == 0 || mass == 0.f) {
      memset(to, 0, p.width * sizeof(T));
      continue;
    }
    const T* destination = token_of<T>(s, members.id[0]);
    if (members.count == 1 || p.mode == MergeMode::keep) {
      copy_row(to, destination, p.width, p.past_caches);
      continue;
    }
    const float by = 1.f / mass, own = size_of(s, members.id[0]);
    const bool tiny = mass < kLowestNormal;
    if (p.mode == MergeMode::amax)
      for_columns(p.width, [&](int64_t c, auto n) {
        auto top = load_columns<n()>(destination + c);
        for (int64_t k = 1; k < members.count; ++k) {
          const auto x = load_columns<n()>(token_of<T>(s, members.id[k]) + c);
          // no number is the maximum wherever it stands, as in torch
          top = (x > top) | (x != x) ? x : top;
        }
        store_columns<n()>(to + c, top, p.past_caches);
      });
    else
      for_columns(p.width, [&](int64_t c, auto n) {
        auto sum = load_columns<n()>(destination + c) * own;
        for (int64_t k = 1; k < members.count; ++k) sum += load_columns<n()>(token_of<T>(s, members.id[k]) + c) * size_of(s, members.id[k]);
        store_columns<n()>(to + c, tiny ? sum / mass : sum * by, p.past_caches);
      });
  }
  stream_fence();
  return sizes_right;
}

// d out / d size = (token - out) / mass, along grad_out
template <class T>
float grad_size_of(const T* grad, const T* token, const T* merged, int64_t width, float by) {
  VecF<kLanes> sum{};
  float rest = 0.f;
  for_columns(width, [&](int64_t c, auto n) {
    const auto part = load_columns<n()>(grad + c) * (load_columns<n()>(token + c) - load_columns<n()>(merged + c));
    if constexpr (n() == 1)
      rest += part;
    else
      sum += part;
  });
  return (sum_lanes(sum) + rest) * by;
}

// A maximum shares its gradient among all that reach it.
template <class T>
void share_maximum(const Segments& p, const SegmentSample& s, Members members, const T* grad, const T* merged) {
  for_columns(p.width, [&](int64_t c, auto n) {
    const auto top = load_columns<n()>(merged + c), zero = same_everywhere<n()>(0.f), one = same_everywhere<n()>(1.f);
    auto reached = zero;
    for (int64_t k = 0; k < members.count; ++k) reached += load_columns<n()>(token_of<T>(s, members.id[k]) + c) == top ? one : zero;
    const auto share = load_columns<n()>(grad + c) / reached;
    for (int64_t k = 0; k < members.count; ++k) {
      const auto x = load_columns<n()>(token_of<T>(s, members.id[k]) + c);
      store_columns<n()>((T*)s.result + members.id[k] * s.result_row + c, x == top ? share : zero, p.past_caches);
    }
  });
}

template <class T>
bool merge_rows_backward(const Segments& p, const SegmentSample& s, int64_t first, int64_t last) {
  bool sizes_right = true;
  for (int64_t slot = first; slot < last; ++slot) {
    const Members members = members_of(s, slot);
    const T* grad = (const T*)s.grad_merged + slot * s.grad_merged_row;
    const T* merged = (const T*)s.merged + slot * s.merged_row;
    if (p.mode == MergeMode::amax && s.result && members.count > 0) {
      share_maximum(p, s, members, grad, merged);
      continue;
    }
    const float mass = mass_of(p, s, members), by = mass == 0.f ? 0.f : 1.f / mass;
    for (int64_t k = 0; k < members.count; ++k) {
      const int32_t id = members.id[k];
      const float size = size_of(s, id), weight = mass == 0.f ? 0.f : size / mass;
      sizes_right &= size >= 0.f;
      if (s.grad_size) s.grad_size[id] = grad_size_of(grad, token_of<T>(s, id), merged, p.width, by);
      if (!s.result) continue;
      T* to = (T*)s.result + id * s.result_row;
      if (p.mode == MergeMode::keep && k > 0)
        memset(to, 0, p.width * sizeof(T));
      else if (weight == 1.f)
        copy_row(to, grad, p.width, p.past_caches);
      else
        for_columns(p.width, [&](int64_t c, auto n) { store_columns<n()>(to + c, load_columns<n()>(grad + c) * weight, p.past_caches); });
    }
  }
  stream_fence();
  return sizes_right;
}

// each token gets its owner's row; in mode keep only the destination does
template <class T>
void unmerge_rows(const Segments& p, const SegmentSample& s, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) {
    T* to = (T*)s.result + i * s.result_row;
    const int32_t slot = s.slot[i];
    if (slot < 0 || (p.mode == MergeMode::keep && s.order[s.offsets[slot]] != i))
      memset(to, 0, p.width * sizeof(T));
    else
      copy_row(to, (const T*)s.merged + slot * s.merged_row, p.width, p.past_caches);
  }
  stream_fence();
}

}  // namespace
}  // namespace TOKENOPS_ISA
}  // namespace tokenops
