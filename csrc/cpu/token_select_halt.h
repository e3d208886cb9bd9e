// A halting step and its backward pass. Rows are taken a vector at a time: the gate is worked out for all of them at once, then each row is
// added to the output, or left alone.
#pragma once

#include "token_select.h"
#include "vec.h"

namespace tokenops {
namespace TOKENOPS_ISA {
namespace {

constexpr int kGate = kLanes;

// the tokens of one vector, by sample and row
struct GateRows {
  int64_t sample[kGate], row[kGate];
  int count;

  // rows numbered through the samples, from `first` on
  static GateRows at(const HaltGate& gate, int64_t first, int64_t last) {
    GateRows rows;
    rows.count = (int)(last - first < kGate ? last - first : kGate);
    int64_t s = first / gate.rows, n = first % gate.rows;
    for (int i = 0; i < rows.count; ++i) {
      rows.sample[i] = s;
      rows.row[i] = n;
      if (++n == gate.rows) n = 0, ++s;
    }
    return rows;
  }
  // one lane for each token; `absent` where nothing is given
  template <class T>
  VecF<kGate> read(const PerToken<T>& from, float absent) const {
    VecF<kGate> v{};
    for (int i = 0; i < count; ++i) v[i] = from.data ? (float)from.at(sample[i], row[i]) : absent;
    return v;
  }
  template <class T>
  VecF<kGate> scores(const HaltGate& gate) const {
    VecF<kGate> v{};
    for (int i = 0; i < count; ++i) v[i] = to_float(*token<T>(gate.x, i));
    return v;
  }
  // lanes are all ones where the row belongs to a sample
  VecI<kGate> inside(const HaltGate& gate) const {
    VecI<kGate> v{};
    for (int i = 0; i < count; ++i) v[i] = row[i] < gate.inside ? -1 : 0;
    return v;
  }
  template <class T>
  T* token(const TokenRows& rows, int i) const {
    return (T*)rows.data + sample[i] * rows.sample + row[i] * rows.row;
  }
  // the row of the output that a token adds to, or null
  float* output(const HaltGate& gate, const TokenRows& out, int i) const {
    if (!gate.sample_of_row) return token<float>(out, i);
    const int64_t to = gate.sample_of_row[sample[i] * gate.rows + row[i]];
    return to < 0 ? nullptr : (float*)out.data + to * out.row;
  }
};

// 1 / (1 + exp(-t)). Far below zero the exponential is held where it is still finite.
TOKENOPS_INLINE VecF<kGate> sigmoid(VecF<kGate> t) { return 1.f / (1.f + exp2<kGate, 5>(min(splat<kGate>(126.f), -kLog2e * t))); }

// what becomes of each token. Lanes of masks are all ones or zero.
struct Gate {
  VecI<kGate> inside, active, reached, going;
  VecF<kGate> h;

  VecI<kGate> taking() const { return active & (reached | going); }
  VecF<kGate> weight(VecF<kGate> remain) const { return reached ? remain : going & active ? h : VecF<kGate>{}; }

  template <class T>
  static VecF<kGate> score(const HaltGate& gate, const GateRows& rows) {
    return gate.last ? splat<kGate>(1.f) : sigmoid(gate.scale * rows.scores<T>(gate) - gate.center);
  }
  // by the score accumulated up to this step
  static Gate of(const HaltGate& gate, VecI<kGate> inside, VecF<kGate> active, VecF<kGate> h, VecF<kGate> cum) {
    Gate g;
    g.inside = inside;
    g.active = (active != 0.f) & inside;
    g.reached = (cum > gate.limit) & g.active;
    g.going = (cum < gate.limit) & inside;
    g.h = h;
    return g;
  }
};

// out = old + weight x; old may be out itself. kOld: there is one, kTakes: x is read.
template <class T, bool kOld, bool kTakes, bool kStream>
TOKENOPS_INLINE void add_row(float* out, const float* old, const T* x, float weight, int64_t channels) {
  constexpr int L = kLanes;
  const VecF<L> w = splat<L>(weight);
  int64_t c = 0;
  for (; c + L <= channels; c += L) {
    VecF<L> sum{};
    if constexpr (kOld) sum = load<L>(old + c);
    if constexpr (kTakes) sum += w * load<L>(x + c);
    if constexpr (kStream)
      stream<L>(out + c, sum);
    else
      store<L>(out + c, sum);
  }
  if (c < channels) {
    VecF<L> sum{};
    if constexpr (kOld) sum = load_first<L>(old + c, channels - c);
    if constexpr (kTakes) sum += w * load_first<L>(x + c, channels - c);
    store_first<L>(out + c, sum, channels - c);
  }
}

template <class T, bool kStream>
void write_row(float* out, const float* old, const T* x, float weight, bool takes, int64_t channels) {
  if (old && takes) return add_row<T, true, true, kStream>(out, old, x, weight, channels);
  if (old) return add_row<T, true, false, kStream>(out, old, x, weight, channels);
  if (takes) return add_row<T, false, true, kStream>(out, old, x, weight, channels);
  add_row<T, false, false, kStream>(out, old, x, weight, channels);
}

template <class T>
void halt_rows(const HaltStep& p, int64_t first, int64_t last) {
  for (int64_t start = first; start < last; start += kGate) {
    const GateRows rows = GateRows::at(p.gate, start, last);
    const VecI<kGate> inside = rows.inside(p.gate);
    const VecF<kGate> active = rows.read(p.active, 1.f), remain = rows.read(p.remain, 1.f), rho = rows.read(p.rho, 0.f),
                      counter = rows.read(p.counter, 1.f), before = rows.read(p.cum, 0.f), none{}, one = splat<kGate>(1.f);
    const VecF<kGate> h = Gate::score<T>(p.gate, rows), cum = inside ? before + h : before;
    const Gate g = Gate::of(p.gate, inside, active, h, cum);
    const VecF<kGate> weight = g.weight(remain), new_remain = g.going ? remain - h : remain,
                      new_rho = rho + (g.active ? one : none) + (g.reached ? remain : none),
                      new_counter = g.going ? counter + 1.f : counter;
    const VecI<kGate> taking = g.taking();
    for (int i = 0; i < rows.count; ++i) {
      const int64_t s = rows.sample[i], n = rows.row[i];
      const T* x = rows.token<const T>(p.gate.x, i);
      if (float* out = rows.output(p.gate, p.new_out, i)) {
        const float* old = p.out.data ? rows.output(p.gate, p.out, i) : nullptr;
        if (p.past_caches)
          write_row<T, true>(out, old, x, weight[i], taking[i], p.gate.channels);
        else if (taking[i] || !p.in_place)
          write_row<T, false>(out, old, x, weight[i], taking[i], p.gate.channels);
      }
      p.new_cum.at(s, n) = cum[i];
      p.new_remain.at(s, n) = new_remain[i];
      p.new_active.at(s, n) = g.going[i] != 0;
      p.new_rho.at(s, n) = new_rho[i];
      p.new_counter.at(s, n) = new_counter[i];
    }
  }
  stream_fence();
}

template <class T>
TOKENOPS_INLINE float dot_rows(const float* a, const T* b, int64_t channels) {
  constexpr int L = kLanes;
  VecF<L> even{}, odd{};
  int64_t c = 0;
  for (; c + 2 * L <= channels; c += 2 * L) {
    even += load<L>(a + c) * load<L>(b + c);
    odd += load<L>(a + c + L) * load<L>(b + c + L);
  }
  for (; c < channels; c += L) {
    const int64_t n = channels - c < L ? channels - c : L;
    even += load_first<L>(a + c, n) * load_first<L>(b + c, n);
  }
  return sum_lanes(even + odd);
}

// to = weight from, but for the first channel, which gets `extra` on top; from null: zeros
template <class T>
TOKENOPS_INLINE void scale_row(T* to, const float* from, float weight, float extra, int64_t channels) {
  constexpr int L = kLanes;
  const VecF<L> w = splat<L>(weight);
  for (int64_t c = 0; c < channels; c += L) {
    const int64_t n = channels - c < L ? channels - c : L;
    VecF<L> v{};
    if (from) v = w * (n == L ? load<L>(from + c) : load_first<L>(from + c, n));
    if (c == 0) v[0] += extra;
    if (n == L)
      store<L>(to + c, v);
    else
      store_first<L>(to + c, v, n);
  }
}

template <class T>
void halt_backward_rows(const HaltBackward& p, int64_t first, int64_t last) {
  const HaltGate& gate = p.gate;
  for (int64_t start = first; start < last; start += kGate) {
    const GateRows rows = GateRows::at(gate, start, last);
    const VecI<kGate> inside = rows.inside(gate);
    const VecF<kGate> remain = rows.read(p.remain, 1.f), none{};
    const Gate g = Gate::of(gate, inside, rows.read(p.active, 1.f), Gate::score<T>(gate, rows), rows.read(p.cum, 0.f));
    const VecF<kGate> weight = g.weight(remain), grad_remain = rows.read(p.grad_remain, 0.f);
    const VecI<kGate> taking = g.taking();
    const float* grad_out[kGate];
    VecF<kGate> grad_weight{};
    for (int i = 0; i < rows.count; ++i) {
      grad_out[i] = taking[i] && p.grad_out.data ? rows.output(gate, p.grad_out, i) : nullptr;
      if (grad_out[i]) grad_weight[i] = dot_rows(grad_out[i], rows.token<const T>(gate.x, i), gate.channels);
    }
    const VecF<kGate> grad_h =
        (inside ? rows.read(p.grad_cum, 0.f) : none) - (g.going ? grad_remain : none) + (g.going & g.active ? grad_weight : none);
    const VecF<kGate> of_score = inside ? gate.scale * g.h * (1.f - g.h) * grad_h : none;
    const VecF<kGate> new_grad_remain = grad_remain + (g.reached ? rows.read(p.grad_rho, 0.f) + grad_weight : none);
    for (int i = 0; i < rows.count; ++i) {
      if (p.new_grad_x.data)
        scale_row(rows.token<T>(p.new_grad_x, i), grad_out[i], weight[i], gate.last ? 0.f : of_score[i], gate.channels);
      if (p.new_grad_remain.data) p.new_grad_remain.at(rows.sample[i], rows.row[i]) = new_grad_remain[i];
    }
  }
}

}  // namespace
}  // namespace TOKENOPS_ISA
}  // namespace tokenops
