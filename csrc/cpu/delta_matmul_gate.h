// The gate: how much each token changed, in one pass over the frame; then the rows of the chosen; and its backward pass.
#pragma once

#include "delta_matmul_rows.h"

namespace tokenops {
namespace TOKENOPS_ISA {
namespace {

template <class T>
TOKENOPS_INLINE T* row_of(GateRows rows, int64_t n) {
  return rows.data ? (T*)rows.data + n * rows.row : nullptr;
}

inline int64_t gate_scratch(int64_t width) { return round_up(width, kLanes) * (int64_t)sizeof(float); }

// x + skip as the storage type keeps it; total is written where it is asked for. Behind the end stand zeros.
template <class T>
TOKENOPS_INLINE void add_rows(float* sum, const T* x, const T* skip, T* total, int64_t width, bool past_caches) {
  constexpr int L = kLanes;
  for (int64_t c = 0; c < width; c += L) {
    VecF<L> v = read<L>(x, c, width);
    if (skip) v = rounded<L, T>(v + read<L>(skip, c, width));
    store<L>(sum + c, v);
    if (total) write<L>(total, c, width, v, past_caches);
  }
}

// what the gate compares, from the sums of a row
template <class T>
struct Current {
  const float* sum;
  int64_t width;
  const RowNormalization& norm;
  Moments moments;

  Current(const float* sum, int64_t width, const RowNormalization& norm)
      : sum(sum), width(width), norm(norm), moments(norm.weight ? moments_of(sum, width, norm.eps) : Moments{0.f, 0.f}) {}
  TOKENOPS_INLINE VecF<kLanes> at(int64_t c) const {
    return norm.weight ? rounded<kLanes, T>(normalized<kLanes>(sum, c, width, norm, moments)) : load<kLanes>(sum + c);
  }
};

// (sum of (|change| / top)^order)^(1 / order) * top: no power overflows
inline float norm_of_order(const float* change, int64_t width, float top, float order) {
  constexpr int L = kLanes;
  if (top == 0.f || top > 3.402823466e38f) return top;
  VecF<L> sum{};
  const auto power = [](VecF<L> x, float exponent) {
    const VecI<L> bits = (VecI<L>)x;
    const VecF<L> whole = __builtin_convertvector((bits >> 23) - 127, VecF<L>);
    const VecF<L> log = whole + log2<L>((VecF<L>)((bits & 0x007fffff) | 0x3f800000));
    return log * exponent;
  };
  for (int64_t c = 0; c < width; c += L) {
    const VecF<L> ratio = load<L>(change + c) / top;
    const VecF<L> term = exp2<L, 5>(min(power(ratio, order), VecF<L>{}));
    sum += ratio == 0.f ? VecF<L>{} : term;
  }
  // the sum is between 1 and the width
  const VecF<L> root = power(splat<L>(sum_lanes(sum)), 1.f / order);
  return root[0] < 126.f ? exp2<L, 5>(root)[0] * top : __builtin_inff();
}

// norms of changes of one order, collected over a row
struct Square {
  TOKENOPS_INLINE static VecF<kLanes> add(VecF<kLanes> sum, VecF<kLanes> x) { return sum + x * x; }
};
struct Absolute {
  TOKENOPS_INLINE static VecF<kLanes> add(VecF<kLanes> sum, VecF<kLanes> x) { return sum + max(x, -x); }
};
struct Greatest {
  TOKENOPS_INLINE static VecF<kLanes> add(VecF<kLanes> sum, VecF<kLanes> x) { return max(max(x, -x), sum); }
};
struct Count {
  TOKENOPS_INLINE static VecF<kLanes> add(VecF<kLanes> sum, VecF<kLanes> x) {
    return sum + (x != 0.f ? splat<kLanes>(1.f) : VecF<kLanes>{});
  }
};
// the greatest, and changes are kept for a second pass
struct Power : Greatest {};

inline float greatest_lane(VecF<kLanes> v) {
  float top = v[0];
  for (int i = 1; i < kLanes; ++i) top = v[i] > top ? v[i] : top;
  return top;
}

template <class T, class Order>
void gate_rows(const Gate& p, const GateSample& s, int64_t first, int64_t last, float* sum) {
  constexpr int L = kLanes;
  const int64_t width = p.width;
  for (int64_t n = first; n < last; ++n) {
    const T* old = row_of<const T>(s.reference, n);
    T* renewed = row_of<T>(s.renewed, n);
    add_rows(sum, row_of<const T>(s.x, n), row_of<const T>(s.skip, n), row_of<T>(s.total, n), width, p.past_caches);
    if (!s.norms && !(s.whole && renewed)) {
      if (renewed)
        for (int64_t c = 0; c < width; c += L) write<L>(renewed, c, width, read<L>(old, c, width), p.past_caches);
      continue;
    }
    const Current<T> current(sum, width, p.norm);
    VecF<L> collected{};
    VecI<L> nan{};
    for (int64_t c = 0; c < width; c += L) {
      VecF<L> now = current.at(c);
      if (s.norms) {
        const VecF<L> before = read<L>(old, c, width);
        VecF<L> change = now - before;
        if (width - c < L) change = load_first<L>((const float*)&change, width - c);
        nan |= change != change;
        collected = Order::add(collected, change);
        if (renewed) write<L>(renewed, c, width, s.whole ? now : before, p.past_caches);
        // in its own place: at(c) has been read
        if constexpr (std::is_same_v<Order, Power>) store<L>(sum + c, max(change, -change));
      } else {
        write<L>(renewed, c, width, now, p.past_caches);
      }
    }
    if (!s.norms) continue;
    bool number = true;
    for (int i = 0; i < L; ++i) number &= nan[i] == 0;
    float norm;
    if constexpr (std::is_same_v<Order, Power>)
      norm = norm_of_order(sum, width, greatest_lane(collected), p.order);
    else if constexpr (std::is_same_v<Order, Greatest>)
      norm = greatest_lane(collected);
    else
      norm = std::is_same_v<Order, Square> ? __builtin_sqrtf(sum_lanes(collected)) : sum_lanes(collected);
    s.norms[n] = number ? norm : __builtin_nanf("");
  }
  stream_fence();
}

template <class T>
void gate_tokens(const Gate& p, const GateSample& s, int64_t first, int64_t last, float* sum) {
  if (p.order == 2.f) return gate_rows<T, Square>(p, s, first, last, sum);
  if (p.order == 1.f) return gate_rows<T, Absolute>(p, s, first, last, sum);
  if (p.order == 0.f) return gate_rows<T, Count>(p, s, first, last, sum);
  if (p.order > 3.402823466e38f) return gate_rows<T, Greatest>(p, s, first, last, sum);
  return gate_rows<T, Power>(p, s, first, last, sum);
}

template <class T>
void gate_slots(const Gate& p, const GateSample& s, bool renew, int64_t first, int64_t last, float* sum) {
  constexpr int L = kLanes;
  const int64_t width = p.width;
  for (int64_t slot = first; slot < last; ++slot) {
    const int64_t n = s.index[slot];
    T *values = row_of<T>(s.values, slot), *delta = row_of<T>(s.delta, slot);
    if (n < 0) {
      memset(values, 0, width * sizeof(T));
      memset(delta, 0, width * sizeof(T));
      continue;
    }
    const T* old = row_of<const T>(s.reference, n);
    T* renewed = renew ? row_of<T>(s.renewed, n) : nullptr;
    add_rows(sum, row_of<const T>(s.x, n), row_of<const T>(s.skip, n), (T*)nullptr, width, false);
    const Current<T> current(sum, width, p.norm);
    for (int64_t c = 0; c < width; c += L) {
      const VecF<L> now = current.at(c);
      const VecF<L> change = old ? now - read<L>(old, c, width) : now;
      write<L>(values, c, width, now, false);
      write<L>(delta, c, width, change, false);
      if (renewed) write<L>(renewed, c, width, now, false);
    }
  }
}

// With J the chosen: dcurrent[J] = dvalues + ddelta + drenewed[J], dreference[J] = -ddelta, elsewhere drenewed. Where every current row
// went into the new reference, all of drenewed goes to current. dx is that through the normalisation, plus dtotal.
template <class T>
void gate_backward_rows(const GateBackward& p, const GateBackwardSample& s, int64_t first, int64_t last, float* sums, float* grad) {
  constexpr int L = kLanes;
  const int64_t width = p.width;
  const auto part = [&](const T* row, int64_t c) { return row ? read<L>(row, c, width) : VecF<L>{}; };
  float *weight_sum = sums, *bias_sum = sums ? sums + round_up(width, L) : nullptr;
  if (sums) memset(sums, 0, 2 * round_up(width, L) * sizeof(float));
  for (int64_t n = first; n < last; ++n) {
    const int64_t slot = s.slot[n];
    const T* of_values = slot < 0 ? nullptr : row_of<const T>(s.grad_values, slot);
    const T* of_delta = slot < 0 ? nullptr : row_of<const T>(s.grad_delta, slot);
    const T *of_renewed = row_of<const T>(s.grad_renewed, n), *of_total = row_of<const T>(s.grad_total, n);
    const bool sent = slot >= 0 || s.all;
    if (T* to = row_of<T>(s.grad_reference, n))
      for (int64_t c = 0; c < width; c += L) {
        const VecF<L> through = sent ? VecF<L>{} : part(of_renewed, c);
        write<L>(to, c, width, through - part(of_delta, c), false);
      }
    T* to = row_of<T>(s.grad_x, n);
    if (!sent) {
      if (to)
        for (int64_t c = 0; c < width; c += L) write<L>(to, c, width, part(of_total, c), false);
      continue;
    }
    for (int64_t c = 0; c < width; c += L) store<L>(grad + c, part(of_values, c) + part(of_delta, c) + part(of_renewed, c));
    if (!p.norm.weight) {
      for (int64_t c = 0; to && c < width; c += L) write<L>(to, c, width, load<L>(grad + c) + part(of_total, c), false);
      continue;
    }
    // with y = (x - mean) r and d = grad weight: dx = r (d - mean(d) - y mean(d y)); behind the end d is 0
    const T* x = row_of<const T>(s.x, n);
    const Moments m = moments_of(x, width, p.norm.eps);
    VecF<L> sum_d{}, sum_dy{};
    for (int64_t c = 0; c < width; c += L) {
      const VecF<L> y = (read<L>(x, c, width) - m.mean) * m.inverse, g = load<L>(grad + c), d = g * read<L>(p.norm.weight, c, width);
      sum_d += d;
      sum_dy += d * y;
      if (sums) {
        store<L>(weight_sum + c, load<L>(weight_sum + c) + g * y);
        store<L>(bias_sum + c, load<L>(bias_sum + c) + g);
      }
    }
    const float mean_d = sum_lanes(sum_d) / (float)width, mean_dy = sum_lanes(sum_dy) / (float)width;
    for (int64_t c = 0; to && c < width; c += L) {
      const VecF<L> y = (read<L>(x, c, width) - m.mean) * m.inverse, d = load<L>(grad + c) * read<L>(p.norm.weight, c, width);
      write<L>(to, c, width, m.inverse * (d - mean_d - y * mean_dy) + part(of_total, c), false);
    }
  }
}

}  // namespace
}  // namespace TOKENOPS_ISA
}  // namespace tokenops
