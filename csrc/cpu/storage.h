// What the elements of a tensor are, as the tensor side tells the loops.
#pragma once

namespace tokenops {

enum class Storage { f32, bf16, f16 };

}  // namespace tokenops
