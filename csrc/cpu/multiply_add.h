// How fast multiply-adds can be at all: the roof that the benchmark measures the kernels against.
#pragma once

#include <stdint.h>

namespace tokenops {

// The loops of one instruction set: independent chains of multiply-adds that touch no memory. Each returns something that
// depends on every chain, so that none can be left out.
struct MultiplyAddLoops {
  int64_t flops_per_step;  // of one thread
  float (*float_chains)(int64_t steps);
  int64_t bf16_flops_per_step;
  float (*bf16_chains)(int64_t steps);  // null where bf16 is multiplied as float
};

}  // namespace tokenops
