// What delta_matmul asks of its arguments on every device.
#pragma once

#include <string>

#include "delta_matmul.h"
#include "tensors.h"

namespace tokenops {

inline Activation activation_of(const std::string& name) {
  if (name == "none") return Activation::none;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "relu") return Activation::relu;
  STD_TORCH_CHECK(name == "silu", "activation must be none, gelu, gelu_tanh, relu or silu, got ", name);
  return Activation::silu;
}

}  // namespace tokenops
