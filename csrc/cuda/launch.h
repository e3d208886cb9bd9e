// The tensor side of the CUDA kernels: where a kernel runs, and how it is launched and registered.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "../tensors.h"
#include "device.cuh"

namespace tokenops {

// Calls f with a number of the type that a tensor holds.
template <class F>
void with_half(const char* name, const Tensor& t, F&& f) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16: return f(bf16{});
    case ScalarType::Half: return f(f16{});
    default: STD_TORCH_CHECK(false, name, " must be bfloat16 or float16");
  }
}
template <class F>
void with_float(const char* name, const Tensor& t, F&& f) {
  if (t.scalar_type() == ScalarType::Float) return f(float{});
  with_half(name, t, f);
}

constexpr int64_t kMostBlocks = INT32_MAX;  // of a grid's first dimension

#ifdef __CUDACC__

#define TOKENOPS_CUDA_KEY CUDA

// Runs a kernel on the device of a tensor and its current stream. `shared` is in bytes. Nothing happens for an empty grid.
template <class... Parameters, class... Arguments>
void launch(const Tensor& on, void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared, const Arguments&... arguments) {
  STD_TORCH_CHECK(blocks <= kMostBlocks, "a problem of ", blocks, " blocks is too large for one launch");
  if (blocks == 0) return;
  const int32_t device = on.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  // the static runtime in this library has a current device of its own
  STD_CUDA_CHECK(cudaSetDevice(device));
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  // what a block may have without asking
  if (shared > 48 << 10)
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
  kernel<<<static_cast<unsigned>(blocks), threads, shared, static_cast<cudaStream_t>(stream)>>>(arguments...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

inline int processors(const Tensor& on) {
  int count = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, on.get_device_index()));
  return count;
}

#else

// the emulated kernels serve CPU tensors
#define TOKENOPS_CUDA_KEY CPU

template <class... Parameters, class... Arguments>
void launch(const Tensor&, void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared, const Arguments&... arguments) {
  STD_TORCH_CHECK(blocks <= kMostBlocks, "a problem of ", blocks, " blocks is too large for one launch");
  emulator::run(static_cast<unsigned>(blocks), threads, shared, [&] { kernel(arguments...); });
}

// as many as let a test share out a block
inline int processors(const Tensor&) { return 4; }

#endif

// A function whose tensors must all be on one device. To the dispatcher a single GPU tensor is enough, and a kernel would read the others
// wherever they are.
template <auto Function>
struct OnOneDevice;
template <class Result, class... Arguments, Result (*Function)(Arguments...)>
struct OnOneDevice<Function> {
  static Result call(Arguments... arguments) {
    const Tensor* first = nullptr;
    (check(first, arguments), ...);
    return Function(arguments...);
  }

 private:
  static void check(const Tensor*& first, const Tensor& t) {
    if (!first) first = &t;
    STD_TORCH_CHECK(t.is_cuda() == first->is_cuda() && t.get_device_index() == first->get_device_index(),
                    "all tensors must be on one device");
  }
  static void check(const Tensor*& first, const OptionalTensor& t) {
    if (t) check(first, *t);
  }
  template <class Number>
  static void check(const Tensor*&, const Number&) {}
};

// TOKENOPS_CUDA_OPERATORS(m) { m.impl("name", TOKENOPS_CUDA_OPERATOR(function)); } at the end of a file
#define TOKENOPS_CUDA_OPERATOR(function) TORCH_BOX(&OnOneDevice<&function>::call)
#define TOKENOPS_REGISTER(key, m) STABLE_TORCH_LIBRARY_IMPL(tokenops, key, m)
#define TOKENOPS_CUDA_OPERATORS(m) TOKENOPS_REGISTER(TOKENOPS_CUDA_KEY, m)

}  // namespace tokenops
