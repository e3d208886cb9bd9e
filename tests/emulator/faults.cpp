// Kernels that are wrong on purpose: what the emulator is there to notice. Each is told by its name.
#include <string>

#include "../../csrc/cuda/device.cuh"
#include "../../csrc/tensors.h"

namespace tokenops {
namespace {

struct FaultShared {
  alignas(16) float numbers[64];
};

// each thread writes a number and reads its neighbour's
void race(float* out, bool waits) {
  auto& shared = shared_memory<FaultShared>();
  shared.numbers[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (waits) __syncthreads();
  out[threadIdx.x] = shared.numbers[(threadIdx.x + 33) % 64];
}

void copy(float* out, const float* in, bool waits) {
  auto& shared = shared_memory<FaultShared>();
  if (threadIdx.x < 16) cp_async_16(&shared.numbers[threadIdx.x * 4], in + threadIdx.x * 4);
  cp_async_commit();
  if (waits) cp_async_wait<0>();
  __syncthreads();
  out[threadIdx.x] = shared.numbers[63 - threadIdx.x];
  cp_async_wait<0>();
}

void unfinished_copy(float* out, const float* in) {
  cp_async_16(shared_memory<FaultShared>().numbers, in);
  out[threadIdx.x] = 0.0f;
}

void divergent_block(float* out) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  out[threadIdx.x] = 0.0f;
}

void divergent_warp(float* out) {
  float value = static_cast<float>(threadIdx.x);
  if (threadIdx.x % 32 != 7) value = __shfl_xor_sync(kAllLanes, value, 1);
  out[threadIdx.x] = value;
}

void divergent_lanes(float* out) {
  float value = static_cast<float>(threadIdx.x);
  if (threadIdx.x % 2)
    value = __shfl_xor_sync(kAllLanes, value, 1);
  else
    value = __shfl_xor_sync(kAllLanes, value, 3);
  out[threadIdx.x] = value;
}

void overlapping_masks(float* out) {
  const unsigned mask = threadIdx.x % 32 < 16 ? 0x0001ffffu : 0xffff8000u;
  out[threadIdx.x] = __shfl_sync(mask, 1.0f, 0);
}

void misaligned(float* out, const float* in) {
  cp_async_16(&shared_memory<FaultShared>().numbers[1], in);
  out[threadIdx.x] = 0.0f;
}

void outside(float* out, const float* in) {
  cp_async_16(&shared_memory<FaultShared>().numbers[64], in);
  out[threadIdx.x] = 0.0f;
}

void too_much_shared(float* out) { out[threadIdx.x] = shared_memory<FaultShared[2]>()[1].numbers[0]; }

// sums of float depend on their order
void order(float* out, const float* in) { atomicAdd(out, in[threadIdx.x]); }

// out [64], in [64]: one block of 64 threads
void fault(Tensor out, Tensor in, std::string name) {
  float* to = out.mutable_data_ptr<float>();
  const float* from = in.const_data_ptr<float>();
  bool known = true;
  emulator::run(1, 64, sizeof(FaultShared), [&] {
    if (name == "barrier" || name == "no barrier") return race(to, name == "barrier");
    if (name == "wait" || name == "no wait") return copy(to, from, name == "wait");
    if (name == "unfinished copy") return unfinished_copy(to, from);
    if (name == "divergent block") return divergent_block(to);
    if (name == "divergent warp") return divergent_warp(to);
    if (name == "divergent lanes") return divergent_lanes(to);
    if (name == "overlapping masks") return overlapping_masks(to);
    if (name == "misaligned") return misaligned(to, from);
    if (name == "outside") return outside(to, from);
    if (name == "too much shared memory") return too_much_shared(to);
    if (name == "order") return order(to, from);
    known = false;
  });
  STD_TORCH_CHECK(known, "there is no fault ", name);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tokenops_emulator, m) { m.def("fault(Tensor(a!) out, Tensor input, str name) -> ()"); }
STABLE_TORCH_LIBRARY_IMPL(tokenops_emulator, CPU, m) { m.impl("fault", TORCH_BOX(&fault)); }

}  // namespace tokenops
