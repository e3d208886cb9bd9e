// What the elements of a tensor are, as the tensor side tells the loops.
#pragma once

#include <stdint.h>

namespace tokenops {

enum class Storage { f32, bf16, f16 };

inline int64_t bytes_of(Storage storage) { return storage == Storage::f32 ? 4 : 2; }

}  // namespace tokenops
