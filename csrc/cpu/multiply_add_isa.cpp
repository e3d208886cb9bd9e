// Chains of multiply-adds in registers, compiled once per instruction set.
#include "multiply_add.h"

#include "gemm.h"

namespace tokenops {
namespace TOKENOPS_ISA {
namespace {

constexpr int L = kLanes;
// two units with a latency of up to 6 need 12; more must still fit the registers
constexpr int kChains = kLanes == 16 ? 24 : 12;

template <class Dot>
TOKENOPS_INLINE VecF<L> next(typename Dot::Scalar a, VecF<L> b, VecF<L> sum) {
  // through the factor, not the sum: the product of two constants would be taken out of the loop and an addition remain
  if constexpr (Dot::kPerScalar == 1) return Dot::template multiply_add<L>(a, sum, b);
  return Dot::template multiply_add<L>(a, b, sum);
}

template <class Dot>
float chains(int64_t steps, typename Dot::Scalar factor, VecF<L> b) {
  // volatile: a chain that starts at its fixed point would be worked out by the compiler
  const volatile typename Dot::Scalar hidden = factor;
  const typename Dot::Scalar a = hidden;
  VecF<L> sum[kChains];
#pragma GCC unroll 64
  for (int c = 0; c < kChains; ++c) sum[c] = splat<L>((float)c);
  for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 64
    for (int c = 0; c < kChains; ++c) sum[c] = next<Dot>(a, b, sum[c]);
  }
#pragma GCC unroll 64
  for (int c = 1; c < kChains; ++c) sum[0] += sum[c];
  return sum_lanes(sum[0]);
}

float float_chains(int64_t steps) { return chains<FloatDot>(steps, 0.5f, splat<L>(1.f)); }
#if defined(__AVX512BF16__)
float bf16_chains(int64_t steps) { return chains<Bf16Dot>(steps, Bf16Dot::kOne, (VecF<L>)(VecU<L>{} + Bf16Dot::kOne)); }
constexpr int64_t kBf16Flops = 4 * L * kChains;
#else
constexpr float (*bf16_chains)(int64_t) = nullptr;
constexpr int64_t kBf16Flops = 0;
#endif

}  // namespace

template <>
const MultiplyAddLoops& loops() {
  static constexpr MultiplyAddLoops table{2 * L * kChains, float_chains, kBf16Flops, bf16_chains};
  return table;
}

}  // namespace TOKENOPS_ISA
}  // namespace tokenops
