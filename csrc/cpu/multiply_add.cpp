// Runs the multiply-add loops on all threads. The caller takes the time.
#include "multiply_add.h"

#include <atomic>

#include "../tensors.h"
#include "isa.h"

namespace tokenops {

namespace {

// steps on every thread at once; how many multiplications and additions that were in all
int64_t multiply_add(int64_t steps, bool bf16, std::string isa) {
  const MultiplyAddLoops& loops = loops_of<MultiplyAddLoops>(isa);
  const bool pairs = bf16 && loops.bf16_chains;
  const int64_t threads = torch::stable::get_num_threads();
  std::atomic<float> sink{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      sink.store(pairs ? loops.bf16_chains(steps) : loops.float_chains(steps), std::memory_order_relaxed);
    }
  });
  return threads * steps * (pairs ? loops.bf16_flops_per_step : loops.flops_per_step);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tokenops, CompositeExplicitAutograd, m) { m.impl("cpu_multiply_add", TORCH_BOX(&multiply_add)); }

}  // namespace tokenops
