// Gathering rows of a grid into the layouts that the tile product reads. The gather costs nothing extra: any fast product
// packs its operands anyway. Scalars are those of gemm.h: floats, or pairs of bf16 along the contracted dimension.
#pragma once

#include "gemm.h"

namespace tokenops {
namespace TOKENOPS_ISA {

TOKENOPS_INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
TOKENOPS_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
float dot_rows(const T* a, const T* b, int64_t width) {
  constexpr int L = kLanes;
  VecF<L> sum{};
  for (int64_t c = 0; c < width; c += L) {
    const int64_t columns = smaller(L, width - c);
    sum += columns == L ? load<L>(a + c) * load<L>(b + c) : load_first<L>(a + c, columns) * load_first<L>(b + c, columns);
  }
  return sum_lanes(sum);
}

// rows of one (sequence, head) of a grid, picked by a list; past its end there are rows of zeros
template <class T>
struct Rows {
  const T* base;
  int64_t stride;
  const int32_t* row;
  int64_t count;

  const T* at(int64_t i) const { return base + row[i] * stride; }
};

// L scalars of a row from `from` on, or only the first n of them and then zeros
template <class Dot, int L, class T>
TOKENOPS_INLINE VecF<L> load_scalars(const T* row, int64_t from) {
  return Dot::kPerScalar == 1 ? load<L>(row + from) : load<L>((const float*)(const void*)row + from);
}
template <class Dot, int L, class T>
TOKENOPS_INLINE VecF<L> load_first_scalars(const T* row, int64_t from, int64_t n) {
  return Dot::kPerScalar == 1 ? load_first<L>(row + from, n) : load_first<L>((const float*)(const void*)row + from, n);
}

// What stands in the rows that fill up the last tile. A product that is masked afterwards wants a row that occurs anyway: zeros
// would turn an infinite partner into NaN, which no mask can hide.
enum class Fill { zeros, last_row };

// to[i][c]: rows as they are. Contracted over the width when rows are broadcast.
template <class Dot, class T>
void pack_rows(typename Dot::Scalar* to, int64_t to_row, const Rows<T>& rows, int64_t count, int64_t width, Fill fill) {
  constexpr int L = kLanes;
  const int64_t scalars = width / Dot::kPerScalar;
  for (int64_t i = 0; i < count; ++i, to += to_row) {
    if (i >= rows.count && fill == Fill::zeros) {
      memset(to, 0, scalars * sizeof(*to));
      continue;
    }
    const T* row = rows.at(smaller(i, rows.count - 1));
    int64_t c = 0;
    for (; c + L <= scalars; c += L) store_bits(to + c, load_scalars<Dot, L>(row, c));
    if (c == scalars) continue;
    const VecF<L> last = load_first_scalars<Dot, L>(row, c, scalars - c);
    memcpy(to + c, &last, (scalars - c) * sizeof(*to));
  }
}

template <int L>
TOKENOPS_INLINE VecH<L> load_half(const uint16_t* row, int64_t from, int64_t width) {
  VecH<L> v{};
  if (!row || from >= width) return v;
  if (width - from >= L) return load_bits<VecH<L>>(row + from);
  memcpy(&v, row + from, (width - from) * sizeof(uint16_t));
  return v;
}

// a[kFrom], b[kFrom], a[kFrom + 1], ...
template <int kFrom, class V, int... i>
TOKENOPS_INLINE V alternate(V a, V b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, (kFrom + i / 2 + i % 2 * (int)sizeof...(i))...);
}

// to[i / kPerScalar][c]: rows that will be contracted over. Columns from width up to to_row are zeros.
template <class Dot, class T>
void pack_steps(typename Dot::Scalar* to, int64_t to_row, const Rows<T>& rows, int64_t count, int64_t width) {
  constexpr int L = kLanes;
  if constexpr (Dot::kPerScalar == 1) {
    pack_rows<Dot>(to, to_row, rows, count, width, Fill::zeros);
    if (to_row > width)
      for (int64_t i = 0; i < count; ++i) memset(to + i * to_row + width, 0, (to_row - width) * sizeof(*to));
  } else {
    for (int64_t i = 0; i < count; i += 2, to += to_row) {
      const uint16_t* even = i < rows.count ? (const uint16_t*)(const void*)rows.at(i) : nullptr;
      const uint16_t* odd = i + 1 < rows.count ? (const uint16_t*)(const void*)rows.at(i + 1) : nullptr;
      int64_t c = 0;
      if (even && odd)
        for (; c + 2 * L <= width; c += 2 * L) {
          const VecH<2 * L> a = load_bits<VecH<2 * L>>(even + c), b = load_bits<VecH<2 * L>>(odd + c);
          store_bits(to + c, alternate<0>(a, b, std::make_integer_sequence<int, 2 * L>{}));
          store_bits(to + c + L, alternate<L>(a, b, std::make_integer_sequence<int, 2 * L>{}));
        }
      for (; c < to_row; c += L) {
        VecH<L> low = load_half<L>(even, c, width), high = load_half<L>(odd, c, width);
        VecU<L> pair = __builtin_convertvector(low, VecU<L>) | __builtin_convertvector(high, VecU<L>) << 16;
        memcpy(to + c, &pair, smaller(L, to_row - c) * sizeof(*to));
      }
    }
  }
}

// to[c][i]: rows into lanes, `vectors` vectors of them; zeros serve widths up to 256
template <class Dot, class T>
void pack_lanes(typename Dot::Scalar* to, int64_t vectors, const Rows<T>& rows, int64_t width, Fill fill) {
  constexpr int L = kLanes;
  static const T zeros[256] = {};
  const T* missing = fill == Fill::zeros ? zeros : rows.at(rows.count - 1);
  const int64_t scalars = width / Dot::kPerScalar, to_row = vectors * L;
  for (int64_t v = 0; v < vectors; ++v) {
    const T* from[L];
    for (int i = 0; i < L; ++i) from[i] = v * L + i < rows.count ? rows.at(v * L + i) : missing;
    typename Dot::Scalar* column = to + v * L;
    int64_t c = 0;
    for (; c + L <= scalars; c += L) {
      VecF<L> tile[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) tile[i] = load_scalars<Dot, L>(from[i], c);
      transpose<L>(tile);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) store_bits(column + (c + i) * to_row, tile[i]);
    }
    if (c == scalars) continue;
    VecF<L> tile[L];
    for (int i = 0; i < L; ++i) tile[i] = load_first_scalars<Dot, L>(from[i], c, scalars - c);
    transpose<L>(tile);
    for (int i = 0; i < scalars - c; ++i) store_bits(column + (c + i) * to_row, tile[i]);
  }
}

// the elements of a result row from `column` on
template <int L, class T>
TOKENOPS_INLINE void write(T* row, int64_t column, int64_t width, VecF<L> values, bool past_caches) {
  if (width - column < L)
    store_first<L>(row + column, values, width - column);
  else if (past_caches)
    stream<L>(row + column, values);
  else
    store<L>(row + column, values);
}

// to.at(i)[c] = from[c][i] * factor[i]: lanes back into rows
template <class T>
void unpack_lanes(T* to, int64_t to_row, const int32_t* row, int64_t count, const float* from, int64_t vectors, const float* factor,
                  int64_t width, bool past_caches) {
  constexpr int L = kLanes;
  for (int64_t v = 0; v * L < count; ++v) {
    VecF<L> by = load<L>(factor + v * L);
    for (int64_t c = 0; c < width; c += L) {
      int64_t columns = smaller(L, width - c);
      VecF<L> tile[L];
      for (int i = 0; i < L; ++i) tile[i] = i < columns ? load<L>(from + ((c + i) * vectors + v) * L) * by : VecF<L>{};
      transpose<L>(tile);
      for (int i = 0; i < smaller(L, count - v * L); ++i) {
        write<L>(to + row[v * L + i] * to_row, c, width, tile[i], past_caches);
      }
    }
  }
}

// to.at(i)[c] = from[i][c] * factor; from_row is a multiple of the lanes
template <class T>
void unpack_rows(T* to, int64_t to_row, const int32_t* row, int64_t count, const float* from, int64_t from_row, float factor, int64_t width,
                 bool past_caches) {
  constexpr int L = kLanes;
  for (int64_t i = 0; i < count; ++i, from += from_row)
    for (int64_t c = 0; c < width; c += L) write<L>(to + row[i] * to_row, c, width, load<L>(from + c) * factor, past_caches);
}

template <class T>
void zero_rows(T* to, int64_t to_row, const int32_t* row, int64_t count, int64_t width) {
  for (int64_t i = 0; i < count; ++i) memset(to + row[i] * to_row, 0, width * sizeof(T));
}

// scratch memory handed out in aligned pieces; run once without memory to learn the size
struct Arena {
  char* base;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* piece = base ? (T*)(void*)(base + used) : nullptr;
    used += round_up(count * (int64_t)sizeof(T), 64);
    return piece;
  }
};

}  // namespace TOKENOPS_ISA
}  // namespace tokenops
