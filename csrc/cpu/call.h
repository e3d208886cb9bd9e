// What the tensor sides of the rooms have in common: what a call answers, and what it tells the loops about its tensors.
#pragma once

#include "../tensors.h"
#include "storage.h"

namespace tokenops {

// Results beyond this size are streamed: they would push the inputs out of the second-level caches and be gone from them anyway.
constexpr int64_t kCaches = 4 << 20;

// Python explains bad contents to people: here is only found that there are some
enum Status : int64_t { kOk = 0, kBadContents = 1, kNoMemory = 2 };

inline Storage storage_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Storage::f32;
    case ScalarType::BFloat16: return Storage::bf16;
    case ScalarType::Half: return Storage::f16;
    default: STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16"); return Storage::f32;
  }
}

}  // namespace tokenops
