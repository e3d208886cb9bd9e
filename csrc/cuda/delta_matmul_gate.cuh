// The gate on the device: how much each token changed; the rows of the chosen; its backward pass. The choice is token_select's.
#pragma once

#include "delta_matmul_rows.cuh"

namespace tokenops {
namespace {

// norms that need no power have names of their own
enum class Order { two, one, zero, inf, any };

template <class T>
struct Comparison {
  TokenGrid<const T> x, skip, old;
  TokenGrid<T> sums;           // x + skip, given if and only if skip is
  TokenGrid<T> next;           // the new reference, or its beginning
  TokenGrid<T> values, delta;  // every token, in a first frame
  float* change;               // [B, N] how much each token changed, or null
  Normalization norm;
  Order order;
  float power;  // read where order is any
  bool keep;    // next is old, until the chosen rows are sent; else the whole frame
  int samples, tokens, width;
};

// A vector norm of the numbers that a lane adds.
struct ChangeNorm {
  float sum = 0.0f;
  unsigned top = 0;  // magnitudes are in the order of their bits, in which NaN comes last

  template <int Run>
  __device__ __forceinline__ void add(Order order, const float (&change)[Run]) {
    switch (order) {
      case Order::two:
#pragma unroll
        for (float x : change) sum += x * x;
        break;
      case Order::one:
#pragma unroll
        for (float x : change) sum += fabsf(x);
        break;
      case Order::zero:
#pragma unroll
        for (float x : change) sum += x != 0.0f ? 1.0f : 0.0f;
        // a NaN counts in no order
#pragma unroll
        for (float x : change) top = max(top, __float_as_uint(fabsf(x)));
        break;
      default:
#pragma unroll
        for (float x : change) top = max(top, __float_as_uint(fabsf(x)));
    }
  }
  __device__ __forceinline__ float greatest() const { return __uint_as_float(__reduce_max_sync(kAllLanes, top)); }
};

template <class T, bool Aligned>
__global__ void __launch_bounds__(kRowThreads, 1) compare(Comparison<T> p) {
  constexpr int kRun = Wide<T>::kCount;
  const int64_t i = row_of_warp();
  if (i >= static_cast<int64_t>(p.samples) * p.tokens) return;
  const int b = static_cast<int>(i) / p.tokens, n = static_cast<int>(i) - b * p.tokens;
  const Row<T, Aligned> row(p.x.at(b, n), p.skip.data ? p.skip.at(b, n) : nullptr, p.width);
  const Moments moments = p.norm.weight.data ? row.moments(p.norm) : Moments{};
  const auto change_of = [&](int c, const Wide<T>& now, Wide<T>& before, float (&change)[kRun]) {
    before = load_run<Aligned>(p.old.at(b, n), c, p.width);
#pragma unroll
    for (int j = 0; j < kRun; ++j) change[j] = row.has(c + j) ? to_float(now.at[j]) - to_float(before.at[j]) : 0.0f;
  };

  ChangeNorm norm;
  row.each([&](int c, const Wide<T>& sum) {
    const Wide<T> now = normalized<Aligned>(sum, p.norm, moments, c, p.width);
    Wide<T> before;
    if (p.old.data) {
      float change[kRun];
      change_of(c, now, before, change);
      norm.add(p.order, change);
    }
    if (p.sums.data) store_run<Aligned>(p.sums.at(b, n), c, p.width, sum);
    // a choice of one of them would put both into memory
    if (p.next.data && p.keep) store_run<Aligned>(p.next.at(b, n), c, p.width, before);
    if (p.next.data && !p.keep) store_run<Aligned>(p.next.at(b, n), c, p.width, now);
    if (p.values.data) {
      store_run<Aligned>(p.values.at(b, n), c, p.width, now);
      store_run<Aligned>(p.delta.at(b, n), c, p.width, now);
    }
  });
  if (!p.change) return;
  float size;
  if (p.order == Order::inf) {
    size = norm.greatest();
  } else if (p.order == Order::any) {
    // relative to the greatest change no power overflows; a second pass, for orders that are seldom asked for
    const float top = norm.greatest();
    float sum = 0.0f;
    if (top > 0.0f && top < INFINITY)
      row.each([&](int c, const Wide<T>& run) {
        float change[kRun];
        Wide<T> before;
        change_of(c, normalized<Aligned>(run, p.norm, moments, c, p.width), before, change);
#pragma unroll
        for (float x : change) sum += x == 0.0f ? 0.0f : exp2_fast(p.power * log2_fast(fabsf(x) / top));
      });
    // between 1 and the width where there is a change
    sum = sum_lanes(sum);
    size = top > 0.0f && top < INFINITY ? exp2_fast(log2_fast(sum) / p.power) * top : top;
  } else {
    size = sum_lanes(norm.sum);
    if (p.order == Order::two) size = sqrtf(size);
    if (p.order == Order::zero && norm.greatest() != norm.greatest()) size = NAN;
  }
  if (lane_id() == 0) p.change[i] = size;
}

template <class T>
struct Sending {
  TokenGrid<const T> x;  // with the skip in it
  TokenGrid<const T> old;
  TokenGrid<T> values, delta;
  TokenGrid<T> next;  // may be the old one, or none
  Normalization norm;
  SampleLists lists;
  int width;
};

// The chosen tokens, and their change. A lane reads of the old reference what it writes of the new one.
template <class T, bool Aligned>
__global__ void __launch_bounds__(kRowThreads, 1) send(Sending<T> p) {
  constexpr int kRun = Wide<T>::kCount;
  const int64_t i = row_of_warp();
  if (i >= p.lists.total()) return;
  const Slot slot = slot_at(p.lists, static_cast<int>(i));
  T *values = p.values.at(slot.sample, slot.place), *delta = p.delta.at(slot.sample, slot.place);
  if (slot.row < 0) {
    for (int c = lane_id() * kRun; c < p.width; c += kWarp * kRun) {
      store_run<Aligned>(values, c, p.width, Wide<T>{});
      store_run<Aligned>(delta, c, p.width, Wide<T>{});
    }
    return;
  }
  const Row<T, Aligned> row(p.x.at(slot.sample, slot.row), nullptr, p.width);
  const Moments moments = p.norm.weight.data ? row.moments(p.norm) : Moments{};
  row.each([&](int c, const Wide<T>& run) {
    const Wide<T> now = normalized<Aligned>(run, p.norm, moments, c, p.width);
    const Wide<T> before = load_run<Aligned>(p.old.at(slot.sample, slot.row), c, p.width);
    Wide<T> change;
#pragma unroll
    for (int j = 0; j < kRun; ++j) change.at[j] = from_float<T>(to_float(now.at[j]) - to_float(before.at[j]));
    store_run<Aligned>(values, c, p.width, now);
    store_run<Aligned>(delta, c, p.width, change);
    if (p.next.data) store_run<Aligned>(p.next.at(slot.sample, slot.row), c, p.width, now);
  });
}

// ---- backward ----

// the slot that names each row, for lists that name each at most once; -1 stands there before
struct ListInversion {
  SampleLists lists;
  int32_t* slot_of;  // [B, N]
};
__global__ void __launch_bounds__(kRowThreads, 1) invert_lists(ListInversion p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (i >= p.lists.total()) return;
  const Slot slot = slot_at(p.lists, static_cast<int>(i));
  if (slot.row >= 0) p.slot_of[static_cast<int64_t>(slot.sample) * p.lists.rows + slot.row] = slot.place;
}

// With J the chosen: dcurrent[J] = dvalues + ddelta + dnext[J], dold[J] = -ddelta, elsewhere dold = dnext. Where every row went into the
// new reference, all of dnext goes to current. dx is that through the normalisation, plus dtotal. A gradient without data is zero, or is
// not wanted.
template <class T>
struct GateGradient {
  TokenGrid<const T> x;  // the residual sum
  TokenGrid<const T> of_delta, of_next, of_total;
  TokenGrid<const void> of_values;
  bool single;  // of_values is float32
  TokenGrid<T> to_x, to_old;
  Normalization norm;
  const int32_t* slot_of;  // [B, N], -1 = not chosen
  Moments* moments;        // [B, N] of the rows that went on: from the first kernel to the second; null: no second one
  bool whole;              // every row went into the new reference
  int samples, tokens, width;
  // the second kernel
  float *parts_weight, *parts_bias;  // [strips, C]
  int strip;                         // rows of all samples in each
};

// What reaches one row.
template <class T, bool Aligned>
struct RowGradient {
  static constexpr int kRun = Wide<T>::kCount;
  ChannelVector values;
  const T *delta, *next;
  int width;
  bool sent;

  __device__ __forceinline__ RowGradient(const GateGradient<T>& p, int b, int n, int64_t i) : width(p.width) {
    const int slot = p.slot_of[i];
    sent = slot >= 0 || p.whole;
    values = {nullptr, p.single};
    if (slot >= 0 && p.of_values.data)
      values.data = static_cast<const char*>(p.of_values.data) + p.of_values.offset(b, slot) * (p.single ? sizeof(float) : sizeof(T));
    delta = slot >= 0 && p.of_delta.data ? p.of_delta.at(b, slot) : nullptr;
    next = p.of_next.data ? p.of_next.at(b, n) : nullptr;
  }
  __device__ __forceinline__ void add(float (&to)[kRun], const T* from, int c, float sign) const {
    if (!from) return;
    const Wide<T> run = load_run<Aligned>(from, c, width);
#pragma unroll
    for (int j = 0; j < kRun; ++j) to[j] += sign * to_float(run.at[j]);
  }
  // of what was compared
  __device__ __forceinline__ void current(float (&to)[kRun], int c) const {
#pragma unroll
    for (float& g : to) g = 0.0f;
    if (values.data) load_channels<Aligned, T>(to, values, c, width);
    add(to, delta, c, 1.0f);
    if (sent) add(to, next, c, 1.0f);
  }
};

template <class T, bool Aligned>
__global__ void __launch_bounds__(kRowThreads, 1) gate_gradient(GateGradient<T> p) {
  constexpr int kRun = Wide<T>::kCount;
  const int64_t i = row_of_warp();
  if (i >= static_cast<int64_t>(p.samples) * p.tokens) return;
  const int b = static_cast<int>(i) / p.tokens, n = static_cast<int>(i) - b * p.tokens;
  const RowGradient<T, Aligned> grad(p, b, n, i);
  const auto store = [&](T* to, int c, const float (&from)[kRun]) {
    Wide<T> run;
#pragma unroll
    for (int j = 0; j < kRun; ++j) run.at[j] = from_float<T>(from[j]);
    store_run<Aligned>(to, c, p.width, run);
  };
  if (p.to_old.data)
    for (int c = lane_id() * kRun; c < p.width; c += kWarp * kRun) {
      float old[kRun] = {};
      if (!grad.sent) grad.add(old, grad.next, c, 1.0f);
      grad.add(old, grad.delta, c, -1.0f);
      store(p.to_old.at(b, n), c, old);
    }
  if (!p.to_x.data && !p.moments) return;
  const T* of_total = p.of_total.data ? p.of_total.at(b, n) : nullptr;
  if (!grad.sent || !p.norm.weight.data) {
    if (!p.to_x.data) return;
    for (int c = lane_id() * kRun; c < p.width; c += kWarp * kRun) {
      float sum[kRun] = {};
      if (grad.sent) grad.current(sum, c);
      grad.add(sum, of_total, c, 1.0f);
      store(p.to_x.at(b, n), c, sum);
    }
    return;
  }
  const Row<T, Aligned> row(p.x.at(b, n), nullptr, p.width);
  const Moments moments = row.moments(p.norm);
  if (p.moments && lane_id() == 0) p.moments[i] = moments;
  if (!p.to_x.data) return;
  // with y = (x - mean) r and d = grad weight: dx = r (d - mean(d) - y mean(d y))
  const auto weighted = [&](float (&d)[kRun], int c) {
    float weight[kRun];
    load_channels<Aligned, T>(weight, p.norm.weight, c, p.width);
    grad.current(d, c);
#pragma unroll
    for (int j = 0; j < kRun; ++j) d[j] *= weight[j];
  };
  float sum_d = 0.0f, sum_dy = 0.0f;
  row.each([&](int c, const Wide<T>& x) {
    float d[kRun];
    weighted(d, c);
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      sum_d += d[j];
      sum_dy += d[j] * ((to_float(x.at[j]) - moments.mean) * moments.inverse);
    }
  });
  const float mean_d = sum_lanes(sum_d) * p.norm.share, mean_dy = sum_lanes(sum_dy) * p.norm.share;
  row.each([&](int c, const Wide<T>& x) {
    float d[kRun];
    weighted(d, c);
#pragma unroll
    for (int j = 0; j < kRun; ++j)
      d[j] = moments.inverse * (d[j] - mean_d - (to_float(x.at[j]) - moments.mean) * moments.inverse * mean_dy);
    grad.add(d, of_total, c, 1.0f);
    store(p.to_x.at(b, n), c, d);
  });
}

template <class T>
struct NormGradientShared {
  static constexpr int kColumns = kWarp * Wide<T>::kCount;
  float weight[kRowWarps][kColumns], bias[kRowWarps][kColumns];
};

// Sums over a strip of rows for the gradients of the norm's weight and bias; strips are added up afterwards.
template <class T, bool Aligned>
__global__ void __launch_bounds__(kRowThreads, 1) norm_gradient(GateGradient<T> p) {
  constexpr int kRun = Wide<T>::kCount, kColumns = NormGradientShared<T>::kColumns;
  auto& shared = shared_memory<NormGradientShared<T>>();
  const int blocks = (p.width + kColumns - 1) / kColumns, strip = blockIdx.x / blocks, from = blockIdx.x % blocks * kColumns;
  const int first = from + lane_id() * kRun;
  const int64_t rows = static_cast<int64_t>(p.samples) * p.tokens, begin = static_cast<int64_t>(strip) * p.strip;
  float weight[kRun] = {}, bias[kRun] = {};
  if (first < p.width)
    for (int64_t i = begin + warp_id(); i < min(begin + p.strip, rows); i += kRowWarps) {
      const int b = static_cast<int>(i) / p.tokens, n = static_cast<int>(i) - b * p.tokens;
      const RowGradient<T, Aligned> grad(p, b, n, i);
      if (!grad.sent) continue;
      const Moments moments = p.moments[i];
      const Wide<T> x = load_run<Aligned>(p.x.at(b, n), first, p.width);
      float g[kRun];
      grad.current(g, first);
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        weight[j] += g[j] * ((to_float(x.at[j]) - moments.mean) * moments.inverse);
        bias[j] += g[j];
      }
    }
#pragma unroll
  for (int j = 0; j < kRun; ++j) {
    shared.weight[warp_id()][lane_id() * kRun + j] = weight[j];
    shared.bias[warp_id()][lane_id() * kRun + j] = bias[j];
  }
  __syncthreads();
  for (int c = threadIdx.x; c < kColumns && from + c < p.width; c += kRowThreads) {
    float sum_weight = 0.0f, sum_bias = 0.0f;
#pragma unroll
    for (int w = 0; w < kRowWarps; ++w) sum_weight += shared.weight[w][c], sum_bias += shared.bias[w][c];
    p.parts_weight[static_cast<int64_t>(strip) * p.width + from + c] = sum_weight;
    p.parts_bias[static_cast<int64_t>(strip) * p.width + from + c] = sum_bias;
  }
}

}  // namespace
}  // namespace tokenops
