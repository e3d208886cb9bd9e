// Linear layers on listed rows. Rows are packed into lanes, which absorbs their gather and their normalisation; weights are read where
// they lie, as the broadcast side of the tile product. So few rows cost one pass over the weights and no more.
#pragma once

#include "delta_matmul_rows.h"

namespace tokenops {
namespace TOKENOPS_ISA {
namespace {

// a panel's part of so many steps stays in the first-level cache while the weights of a chunk pass by
constexpr int64_t kPanelBytes = 36 << 10, kMostSteps = kPanelBytes / (kLanes * sizeof(float));
// weights of so many outputs and steps stay in the second-level cache while panels pass by
constexpr int64_t kChunk = 256;
constexpr int64_t kPanelsAtOnce = 4;
constexpr int64_t kMostLanes = kPanelsAtOnce * kTileVectors * kLanes;

template <class Dot>
TOKENOPS_INLINE int64_t scalars_of(int64_t width) {
  return (width + Dot::kPerScalar - 1) / Dot::kPerScalar;
}

// rows spread evenly over panels: vectors [first, last) are the panel's
struct Panel {
  int64_t first, last;
  int64_t vectors() const { return last - first; }
};
inline int64_t vectors_of(int64_t rows) { return (rows + kLanes - 1) / kLanes; }
inline int64_t panels(int64_t rows) { return (vectors_of(rows) + kTileVectors - 1) / kTileVectors; }
inline Panel panel_of(int64_t rows, int64_t at) {
  const int64_t vectors = vectors_of(rows), count = panels(rows);
  return {vectors * at / count, vectors * (at + 1) / count};
}

template <class Dot, class T>
struct PanelsOf {
  typedef typename Dot::Scalar Scalar;
  Scalar* data;
  int64_t scalars;
  Scalar* at(Panel panel) const { return data + panel.first * kLanes * scalars; }
};

// ---- packing ----

// L scalars of a row from `column` on, normalised if asked for
template <class Dot, class T>
TOKENOPS_INLINE VecF<kLanes> packed_scalars(const T* row, int64_t column, int64_t width, const RowNormalization& norm, Moments m) {
  constexpr int L = kLanes;
  if constexpr (Dot::kPerScalar == 1) {
    return norm.weight ? normalized<L>(row, column, width, norm, m) : read<L>(row, column, width);
#if defined(__AVX512BF16__)
  } else {
    if (!norm.weight) {
      if (width - column >= 2 * L) return load_bits<VecF<L>>(row + column);
      VecF<L> bits{};
      memcpy(&bits, row + column, (width - column) * sizeof(T));
      return bits;
    }
    const VecF<L> low = normalized<L>(row, column, width, norm, m);
    const VecF<L> high = width - column > L ? normalized<L>(row, column + L, width, norm, m) : VecF<L>{};
    VecF<L> bits = (VecF<L>)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    if (width - column < 2 * L) {
      VecF<L> inside{};
      memcpy(&inside, &bits, (width - column) * sizeof(T));
      bits = inside;
    }
    return bits;
#endif
  }
}

template <class Dot, class T>
void pack_panel(const PackedRows& p, int64_t at) {
  constexpr int L = kLanes;
  const Panel panel = panel_of(p.rows, at);
  const int64_t scalars = scalars_of<Dot>(p.width), step = panel.vectors() * L;
  const PanelsOf<Dot, T> panels{(typename Dot::Scalar*)p.packed, scalars};
  for (int64_t v = panel.first; v < panel.last; ++v) {
    const T* row[L];
    Moments m[L];
    const int64_t count = smaller(L, p.rows - v * L);
    for (int64_t i = 0; i < count; ++i) {
      row[i] = (const T*)p.row[v * L + i];
      m[i] = p.norm.weight ? moments_of(row[i], p.width, p.norm.eps) : Moments{0.f, 0.f};
    }
    typename Dot::Scalar* to = panels.at(panel) + (v - panel.first) * L;
    for (int64_t c = 0; c < scalars; c += L) {
      VecF<L> tile[L];
      for (int64_t i = 0; i < L; ++i)
        tile[i] = i < count ? packed_scalars<Dot>(row[i], c * Dot::kPerScalar, p.width, p.norm, m[i]) : VecF<L>{};
      transpose<L>(tile);
      for (int64_t i = 0; i < smaller(L, scalars - c); ++i) store_bits(to + (c + i) * step, tile[i]);
    }
  }
}

// ---- activations ----

// Phi(-|x|) = exp(-x^2 / 2) t P(t) with t = 1 / (1 + 0.31 |x|): least squares reweighted to minimax, relative error 1.7e-7 for |x| < 20
template <int L>
TOKENOPS_INLINE VecF<L> normal_tail(VecF<L> x) {
  const VecF<L> t = 1.f / (1.f + 0.31f * x);
  VecF<L> y = 0.03591811656951904f * t - 0.14193958044052124f;
  y = y * t + 0.1556781679391861f;
  y = y * t - 0.01550006028264761f;
  y = y * t + 0.11044689267873764f;
  y = y * t + 0.10766183584928513f;
  y = y * t + 0.12407913938522339f;
  y = y * t + 0.12365559488534927f;
  return y * t * exp2<L, 5>(x * x * (-0.5f * kLog2e));
}

// 1 / (1 + e^-x); 2^126 stands for what would overflow
template <int L>
TOKENOPS_INLINE VecF<L> logistic(VecF<L> x) {
  return 1.f / (1.f + exp2<L, 5>(min(splat<L>(126.f), x * -kLog2e)));
}

template <int L>
TOKENOPS_INLINE VecF<L> activated(Activation activation, VecF<L> x) {
  switch (activation) {
    case Activation::none: return x;
    case Activation::relu: return max(VecF<L>{}, x);
    // x Phi(x), from the tail on either side; beyond 20 the tail is 0, and an infinity must not meet it
    case Activation::gelu: {
      const VecF<L> size = min(splat<L>(20.f), max(x, -x));
      return max(VecF<L>{}, x) - size * normal_tail<L>(size);
    }
    // x (1 + tanh(u)) / 2 = x / (1 + e^(-2 u)); below -100 both are 0 to the last bit
    case Activation::gelu_tanh: {
      const VecF<L> low = max(splat<L>(-100.f), x);
      return low * logistic<L>(low * (1.5957691216057308f + 0.07135481282452988f * low * low));
    }
    case Activation::silu: {
      const VecF<L> low = max(splat<L>(-100.f), x);
      return low * logistic<L>(low);
    }
  }
  return x;
}

// ---- the product ----

// Fetches the next tile of weights while this one is multiplied: rows from all over memory are more streams than the hardware follows.
struct FetchTile {
  const char* at;
  int64_t row;  // in bytes
  int64_t step = 0;
  // a tile's row is a cache line every 16 steps
  TOKENOPS_INLINE void operator()() {
    __builtin_prefetch(at + step / (16 / kTileRows) % kTileRows * row + step / 16 * 64);
    ++step;
  }
};

template <class Dot, class T>
struct Weights {
  typedef typename Dot::Scalar Scalar;
  const T* data;
  int64_t row, width, outputs;
  bool in_place;  // they can be read as scalars where they lie

  explicit Weights(const Layer& p) : data((const T*)p.weight), row(p.weight_row), width(p.width), outputs(p.outputs) {
    in_place = sizeof(T) * Dot::kPerScalar == sizeof(Scalar) && p.width % Dot::kPerScalar == 0 && row % Dot::kPerScalar == 0 &&
               (uintptr_t)data % sizeof(Scalar) == 0;
  }
  // steps [from, from + steps) of a tile of outputs as scalars; converted, or filled up with zeros, they stand in `room`
  TOKENOPS_INLINE const Scalar* tile(int64_t output, int64_t from, int64_t steps, Scalar* room, int64_t& scalar_row) const {
    if (in_place && outputs - output >= kTileRows) {
      scalar_row = row / Dot::kPerScalar;
      return (const Scalar*)(const void*)(data + output * row) + from;
    }
    scalar_row = steps;
    for (int64_t r = 0; r < kTileRows; ++r, room += steps) {
      if (output + r >= outputs)
        memset(room, 0, steps * sizeof(Scalar));
      else
        copy(room, data + (output + r) * row, from, steps);
    }
    return room - kTileRows * steps;
  }
  TOKENOPS_INLINE FetchTile after(int64_t output, int64_t from) const {
    return {(const char*)(const void*)(data + (output + kTileRows) * row + from * Dot::kPerScalar), row * (int64_t)sizeof(T)};
  }

 private:
  void copy(Scalar* to, const T* from, int64_t first, int64_t steps) const {
    constexpr int L = kLanes;
    if constexpr (Dot::kPerScalar == 1) {
      for (int64_t c = 0; c < steps; c += L) write<L>(to, c, steps, read<L>(from + first, c, width - first), false);
    } else {
      const int64_t elements = smaller(steps * Dot::kPerScalar, width - first * Dot::kPerScalar);
      if (elements % 2 != 0) to[steps - 1] = 0;
      memcpy(to, from + first * Dot::kPerScalar, elements * sizeof(T));
    }
  }
};

// scratch of a piece: sums of a chunk of outputs [kChunk][lanes], and room for a tile of weights
template <class Dot>
struct LayerScratch {
  float* sums;
  typename Dot::Scalar* room;
  int64_t bytes;

  explicit LayerScratch(char* memory) {
    Arena arena{memory};
    sums = arena.take<float>(kChunk * kMostLanes);
    room = arena.take<typename Dot::Scalar>(kTileRows * kMostSteps);
    bytes = arena.used;
  }
};

template <class T>
TOKENOPS_INLINE float bias_of(const Layer& p, int64_t output) {
  return p.bias && output < p.outputs ? to_float(((const T*)p.bias)[output]) : 0.f;
}

// finished sums of outputs [first, last) of one panel into rows of the result
template <class T>
void write_rows(const Layer& p, Panel panel, const float* sums, int64_t sums_row, int64_t first, int64_t last) {
  constexpr int L = kLanes;
  for (int64_t v = panel.first; v < panel.last; ++v, sums += L)
    for (int64_t o = first; o < last; o += L) {
      VecF<L> tile[L];
      for (int64_t i = 0; i < L; ++i)
        tile[i] = o + i < last ? activated<L>(p.activation, load<L>(sums + (o + i - first) * sums_row) + bias_of<T>(p, o + i)) : VecF<L>{};
      transpose<L>(tile);
      for (int64_t i = 0; i < smaller(L, p.rows - v * L); ++i) write<L>((T*)p.out[v * L + i], o, last, tile[i], p.past_caches);
    }
}

// and into packed rows of the next layer
template <class Dot, class T>
void write_panel(const Layer& p, Panel panel, const float* sums, int64_t sums_row, int64_t first, int64_t last) {
  constexpr int L = kLanes;
  const PanelsOf<Dot, T> next{(typename Dot::Scalar*)p.next, scalars_of<Dot>(p.outputs)};
  const int64_t step = panel.vectors() * L;
  for (int64_t o = first; o < last; o += Dot::kPerScalar) {
    typename Dot::Scalar* to = next.at(panel) + o / Dot::kPerScalar * step;
    const float* from = sums + (o - first) * sums_row;
    for (int64_t v = 0; v < panel.vectors(); ++v) {
      const VecF<L> even = activated<L>(p.activation, load<L>(from + v * L) + bias_of<T>(p, o));
      if constexpr (Dot::kPerScalar == 1) {
        store<L>(to + v * L, even);
#if defined(__AVX512BF16__)
      } else {
        VecF<L> odd{};
        if (o + 1 < last) odd = activated<L>(p.activation, load<L>(from + sums_row + v * L) + bias_of<T>(p, o + 1));
        store_bits(to + v * L, interleave_bf16(even, odd));
#endif
      }
    }
  }
}

// sums[o][lanes] (+)= weights[o] . panel over `steps` scalars, for outputs [first, last)
template <class Dot, class T, int V>
TOKENOPS_INLINE void multiply_chunk(const Weights<Dot, T>& weights, const typename Dot::Scalar* panel, int64_t from, int64_t steps,
                                    int64_t first, int64_t last, float* sums, int64_t sums_row, typename Dot::Scalar* room) {
  constexpr int L = kLanes;
  for (int64_t o = first; o < last; o += kTileRows, sums += kTileRows * sums_row) {
    int64_t scalar_row;
    const typename Dot::Scalar* a = weights.tile(o, from, steps, room, scalar_row);
    VecF<L> tile[kTileRows][V];
    clear<L>(tile);
    if (from > 0)
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
        for (int v = 0; v < V; ++v) tile[r][v] = load<L>(sums + r * sums_row + v * L);
    multiply_tile<Dot, L, kTileRows, V>(a, scalar_row, 1, panel, V * L, steps, tile, weights.after(o, from));
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) store<L>(sums + r * sums_row + v * L, tile[r][v]);
  }
}

template <class Dot, class T>
void layer_outputs(const Layer& p, int64_t first_panel, int64_t last_panel, int64_t first, int64_t last, char* memory) {
  constexpr int L = kLanes;
  const LayerScratch<Dot> scratch(memory);
  const Weights<Dot, T> weights(p);
  const int64_t scalars = scalars_of<Dot>(p.width), first_vector = panel_of(p.rows, first_panel).first;
  const int64_t sums_row = (panel_of(p.rows, last_panel - 1).last - first_vector) * L;
  const PanelsOf<Dot, T> panels{(typename Dot::Scalar*)const_cast<void*>(p.packed), scalars};
  const int64_t most = kMostSteps / panel_of(p.rows, first_panel).vectors();
  for (int64_t o = first; o < last; o += kChunk) {
    const int64_t end = smaller(last, o + kChunk);
    for (int64_t from = 0; from < scalars || from == 0; from += most) {
      const int64_t steps = smaller(most, scalars - from);
      for (int64_t at = first_panel; at < last_panel; ++at) {
        const Panel panel = panel_of(p.rows, at);
        float* sums = scratch.sums + (panel.first - first_vector) * L;
        with_vectors(panel.vectors(), [&]<int V>(std::integral_constant<int, V>) {
          multiply_chunk<Dot, T, V>(weights, panels.at(panel) + from * V * L, from, steps, o, end, sums, sums_row, scratch.room);
        });
      }
    }
    for (int64_t at = first_panel; at < last_panel; ++at) {
      const Panel panel = panel_of(p.rows, at);
      const float* sums = scratch.sums + (panel.first - first_vector) * L;
      if (p.next)
        write_panel<Dot, T>(p, panel, sums, sums_row, o, end);
      else
        write_rows<T>(p, panel, sums, sums_row, o, end);
    }
  }
  stream_fence();
}

}  // namespace
}  // namespace TOKENOPS_ISA
}  // namespace tokenops
