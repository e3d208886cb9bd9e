// Which storage type runs on which dot product.
#pragma once

#include "gemm.h"
#include "storage.h"

namespace tokenops {
namespace TOKENOPS_ISA {

#if defined(__AVX512BF16__)
typedef Bf16Dot DotOfBf16;
#else
typedef FloatDot DotOfBf16;
#endif

template <class T, class Dot>
struct Types {};
template <class F>
auto with_types(Storage storage, F&& f) {
  switch (storage) {
    case Storage::bf16: return f(Types<bf16, DotOfBf16>{});
    case Storage::f16: return f(Types<f16, FloatDot>{});
    case Storage::f32: break;
  }
  return f(Types<float, FloatDot>{});
}

}  // namespace TOKENOPS_ISA
}  // namespace tokenops
