// SIMD vectors over the GCC/Clang vector extensions. Included only by the translation units that are compiled once per
// instruction set, inside namespace TOKENOPS_ISA: plain C types, no std:: templates, so that nothing compiled for a newer
// instruction set can be merged by the linker into code that runs on an older machine.
#pragma once

#include <stdint.h>
#include <string.h>

#include <utility>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace tokenops {
namespace TOKENOPS_ISA {

#define TOKENOPS_INLINE inline __attribute__((always_inline))

// the table of loops by which the baseline code reaches a room's code for this instruction set (isa.h)
template <class Loops>
const Loops& loops();

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

template <int L>
struct VecTypes {
  typedef float f32 __attribute__((vector_size(L * 4)));
  typedef int32_t i32 __attribute__((vector_size(L * 4)));
  typedef uint32_t u32 __attribute__((vector_size(L * 4)));
  typedef uint16_t u16 __attribute__((vector_size(L * 2)));
};
template <int L>
using VecF = typename VecTypes<L>::f32;
template <int L>
using VecI = typename VecTypes<L>::i32;
template <int L>
using VecU = typename VecTypes<L>::u32;
template <int L>
using VecH = typename VecTypes<L>::u16;

// storage types: bits only, arithmetic is always float
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class V, class T>
TOKENOPS_INLINE V load_bits(const T* p) {
  V v;
  memcpy(&v, p, sizeof(V));
  return v;
}
template <class V, class T>
TOKENOPS_INLINE void store_bits(T* p, V v) {
  memcpy(p, &v, sizeof(V));
}
template <int L>
TOKENOPS_INLINE VecF<L> load(const float* p) {
  return load_bits<VecF<L>>(p);
}
template <int L>
TOKENOPS_INLINE void store(float* p, VecF<L> v) {
  store_bits(p, v);
}
template <int L>
TOKENOPS_INLINE VecF<L> splat(float x) {
  return x - VecF<L>{};
}

// ---- conversion between storage and float; to half types round to nearest even, NaN stays NaN ----

template <int L>
TOKENOPS_INLINE VecF<L> load(const bf16* p) {
  VecU<L> wide = __builtin_convertvector(load_bits<VecH<L>>(p), VecU<L>) << 16;
  return (VecF<L>)wide;
}

TOKENOPS_INLINE float bf16_to_float(uint16_t h) {
  uint32_t bits = (uint32_t)h << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
TOKENOPS_INLINE float half_to_float(uint16_t h) {
  // exponent re-biased by one multiplication, which also makes half denormals right; inf and NaN patched
  uint32_t magnitude = (uint32_t)(h & 0x7fff) << 13;
  float f;
  memcpy(&f, &magnitude, 4);
  f *= 0x1p112f;
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if ((h & 0x7c00) == 0x7c00) bits = 0x7f800000u | (uint32_t)(h & 0x3ff) << 13;
  bits |= (uint32_t)(h & 0x8000) << 16;
  memcpy(&f, &bits, 4);
  return f;
}
TOKENOPS_INLINE uint16_t float_to_half(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;  // rounds to 65536 or more
  if (bits < 0x38800000) {                       // half denormal: let the float adder round at the right bit
    float magnitude;
    memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    memcpy(&bits, &magnitude, 4);
    return sign | (uint16_t)(bits - 0x3f000000);
  }
  bits += 0xc8000fff + (bits >> 13 & 1);
  return sign | (uint16_t)(bits >> 13);
}

TOKENOPS_INLINE float to_float(float x) { return x; }
TOKENOPS_INLINE float to_float(bf16 x) { return bf16_to_float(x.bits); }
TOKENOPS_INLINE float to_float(f16 x) { return half_to_float(x.bits); }

template <int L>
TOKENOPS_INLINE VecF<L> load(const f16* p) {
#if defined(__AVX512F__)
  if constexpr (L == 16) return (VecF<L>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#endif
#if defined(__F16C__)
  if constexpr (L == 8) return (VecF<L>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#endif
  VecF<L> v;
  for (int i = 0; i < L; ++i) v[i] = half_to_float(p[i].bits);
  return v;
}

template <int L>
TOKENOPS_INLINE VecH<L> to_bf16(VecF<L> v) {
#if defined(__AVX512BF16__)
  if constexpr (L == 16) return (VecH<L>)_mm512_cvtneps_pbh((__m512)v);
#endif
  VecU<L> bits = (VecU<L>)v;
  VecU<L> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  rounded = v != v ? (bits >> 16) | 0x40 : rounded;
  return __builtin_convertvector(rounded, VecH<L>);
}

#if defined(__AVX512BF16__)
// lane i holds (even[i], odd[i]) as two bf16
TOKENOPS_INLINE VecU<16> interleave_bf16(VecF<16> even, VecF<16> odd) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3,
                                         18, 2, 17, 1, 16, 0);
  return (VecU<16>)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even));
}
#endif

template <int L>
TOKENOPS_INLINE void store(bf16* p, VecF<L> v) {
  store_bits(p, to_bf16<L>(v));
}
template <int L>
TOKENOPS_INLINE void store(f16* p, VecF<L> v) {
#if defined(__AVX512F__)
  if constexpr (L == 16) return _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#endif
#if defined(__F16C__)
  if constexpr (L == 8) return _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#endif
  for (int i = 0; i < L; ++i) p[i].bits = float_to_half(v[i]);
}

// a whole vector past the caches, if it lies on its own boundary; threads that wrote so call stream_fence() before they are done
template <int L>
TOKENOPS_INLINE void stream(float* p, VecF<L> v) {
#if defined(__AVX512F__)
  if constexpr (L == 16)
    if ((uintptr_t)p % 64 == 0) return _mm512_stream_ps(p, (__m512)v);
#endif
#if defined(__AVX2__)
  if constexpr (L == 8)
    if ((uintptr_t)p % 32 == 0) return _mm256_stream_ps(p, (__m256)v);
#endif
  store<L>(p, v);
}
template <int L>
TOKENOPS_INLINE void stream(bf16* p, VecF<L> v) {
#if defined(__AVX512F__)
  if constexpr (L == 16)
    if ((uintptr_t)p % 32 == 0) return _mm256_stream_si256((__m256i*)(void*)p, (__m256i)to_bf16<L>(v));
#endif
  store<L>(p, v);
}
template <int L>
TOKENOPS_INLINE void stream(f16* p, VecF<L> v) {
  store<L>(p, v);
}
TOKENOPS_INLINE void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// the first n of L elements; the rest read as zero and are not written. Without masks through the stack: for ragged ends only.
template <int L, class T>
TOKENOPS_INLINE VecF<L> load_first(const T* p, int64_t n) {
#if defined(__AVX512F__)
  const __mmask16 first = (__mmask16)((1u << n) - 1);
  if constexpr (L == 16 && sizeof(T) == 4) return (VecF<L>)_mm512_maskz_loadu_ps(first, p);
  if constexpr (L == 16 && sizeof(T) == 2) {
    T half[L];
    store_bits(half, _mm256_maskz_loadu_epi16(first, p));
    return load<L>(half);
  }
#endif
  T part[L];
  memset(part, 0, sizeof(part));
  memcpy(part, p, n * sizeof(T));
  return load<L>(part);
}
template <int L, class T>
TOKENOPS_INLINE void store_first(T* p, VecF<L> v, int64_t n) {
  T part[L];
  store<L>(part, v);
  memcpy(p, part, n * sizeof(T));
}

// ---- arithmetic beyond the operators ----

// b where either is NaN: max(x, y) keeps a NaN that stands in y
template <class V>
TOKENOPS_INLINE V max(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return (V)_mm512_max_ps((__m512)a, (__m512)b);
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32) return (V)_mm256_max_ps((__m256)a, (__m256)b);
#endif
  return a > b ? a : b;
}
// b where either is NaN, like max
template <class V>
TOKENOPS_INLINE V min(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return (V)_mm512_min_ps((__m512)a, (__m512)b);
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32) return (V)_mm256_min_ps((__m256)a, (__m256)b);
#endif
  return a < b ? a : b;
}
template <class V>
TOKENOPS_INLINE bool any_greater(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32) return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)) != 0;
#endif
  auto greater = a > b;
  bool any = false;
  for (int i = 0; i < (int)(sizeof(V) / 4); ++i) any |= greater[i] != 0;
  return any;
}
template <class V, int... i>
TOKENOPS_INLINE auto add_halves(V v, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(v, v, i...) + __builtin_shufflevector(v, v, (i + (int)sizeof...(i))...);
}
// halving, in a fixed order: the same bits on every call
template <class V>
TOKENOPS_INLINE float sum_lanes(V v) {
  if constexpr (sizeof(V) == 8)
    return v[0] + v[1];
  else
    return sum_lanes(add_halves(v, std::make_integer_sequence<int, sizeof(V) / 8>{}));
}

// 2^x: x = n + r with |r| <= 1/2, 2^r by a minimax polynomial (Remez, relative error 7.5e-8 at degree 5, 7.5e-5 at degree 3;
// bf16 keeps 8 bits, so degree 3 serves it). Zero or denormal below -126 and zero for -inf; NaN stays NaN. x must stay below 127.
template <int L, int kDegree>
TOKENOPS_INLINE VecF<L> exp2(VecF<L> x) {
  static_assert(kDegree == 3 || kDegree == 5);
  VecF<L> n;
#if defined(__AVX512F__)
  if constexpr (L == 16) {
    x = (VecF<L>)_mm512_max_ps(_mm512_set1_ps(-160.f), (__m512)x);
    n = (VecF<L>)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  } else
#endif
  {
    // adding 1.5 * 2^23 rounds to an integer; -inf is clamped first and masked to zero at the end
    VecF<L> clamped = x < -127.f ? splat<L>(-127.f) : x;
    n = (clamped + 0x1.8p23f) - 0x1.8p23f;
  }
  VecF<L> r = x - n;
  VecF<L> y;
  if constexpr (kDegree == 5) {
    y = 0.001327647245f * r + 0.009675540961f;
    y = y * r + 0.05550713092f;
    y = y * r + 0.2402212024f;
    y = y * r + 0.693146944f;
    y = y * r + 1.000000119f;
  } else {
    y = 0.05517166853f * r + 0.2426111251f;
    y = y * r + 0.6932609677f;
    y = y * r + 0.9999280572f;
  }
#if defined(__AVX512F__)
  if constexpr (L == 16) return (VecF<L>)_mm512_scalef_ps((__m512)y, (__m512)n);
#endif
  VecI<L> exponent = (__builtin_convertvector(n, VecI<L>) + 127) << 23;
  VecF<L> scaled = y * (VecF<L>)exponent;
  return x < -126.f ? VecF<L>{} : scaled;
}

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// log2 for finite x >= 0.5 by two Halley steps from the exponent and the raw mantissa (error 0.09): cubic, then at float precision
template <int L>
TOKENOPS_INLINE VecF<L> log2(VecF<L> x) {
  VecF<L> y = __builtin_convertvector((VecI<L>)x - 0x3f800000, VecF<L>) * 0x1p-23f;
  for (int i = 0; i < 2; ++i) {
    VecF<L> ratio = x * exp2<L, 5>(-y);
    y += 2.f * kLog2e * (ratio - 1.f) / (ratio + 1.f);
  }
  return y;
}

// Shuffles of a transpose, each one cheap instruction: units of kUnit floats of a and b alternate within every 128 bits, from their
// low or high half; then whole 128-bit lanes, the even or the odd ones of a and then of b.
template <int kUnit, int kHigh, class V, int... i>
TOKENOPS_INLINE V interleave(V a, V b, std::integer_sequence<int, i...>) {
  constexpr int L = sizeof...(i);
  return __builtin_shufflevector(a, b, (i / 4 * 4 + 2 * kHigh + i % kUnit + (i % 4 / (2 * kUnit)) * kUnit + i / kUnit % 2 * L)...);
}
template <int kOdd, class V, int... i>
TOKENOPS_INLINE V pick_lanes(V a, V b, std::integer_sequence<int, i...>) {
  constexpr int L = sizeof...(i);
  return __builtin_shufflevector(a, b, (i % (L / 2) / 4 * 8 + 4 * kOdd + i % 4 + i / (L / 2) * L)...);
}
template <class V, int L, class Order>
TOKENOPS_INLINE void transpose_lanes(V* rows, int stride, std::integral_constant<int, L>, Order order) {
  // rows[0], rows[stride], ...: as many 128-bit lanes as rows
  V x0 = pick_lanes<0>(rows[0], rows[stride], order), x1 = pick_lanes<1>(rows[0], rows[stride], order);
  if constexpr (L == 8) {
    rows[0] = x0, rows[stride] = x1;
  } else {
    V y0 = pick_lanes<0>(rows[2 * stride], rows[3 * stride], order), y1 = pick_lanes<1>(rows[2 * stride], rows[3 * stride], order);
    rows[0] = pick_lanes<0>(x0, y0, order), rows[stride] = pick_lanes<0>(x1, y1, order);
    rows[2 * stride] = pick_lanes<1>(x0, y0, order), rows[3 * stride] = pick_lanes<1>(x1, y1, order);
  }
}
// rows[i][j] <-> rows[j][i] in registers: 4 x 4 blocks within 128-bit lanes, then the lanes
template <int L>
TOKENOPS_INLINE void transpose(VecF<L> (&rows)[L]) {
  constexpr std::make_integer_sequence<int, L> order{};
#pragma GCC unroll 4
  for (int i = 0; i < L; i += 4) {
    VecF<L> a = interleave<1, 0>(rows[i], rows[i + 1], order), b = interleave<1, 1>(rows[i], rows[i + 1], order);
    VecF<L> c = interleave<1, 0>(rows[i + 2], rows[i + 3], order), d = interleave<1, 1>(rows[i + 2], rows[i + 3], order);
    rows[i] = interleave<2, 0>(a, c, order), rows[i + 1] = interleave<2, 1>(a, c, order);
    rows[i + 2] = interleave<2, 0>(b, d, order), rows[i + 3] = interleave<2, 1>(b, d, order);
  }
  if constexpr (L > 4)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) transpose_lanes(rows + i, 4, std::integral_constant<int, L>{}, order);
}

}  // namespace TOKENOPS_ISA
}  // namespace tokenops
