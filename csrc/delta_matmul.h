// What delta_matmul calls things on every device.
#pragma once

namespace tokenops {

// between two layers, or behind one
enum class Activation { none, gelu, gelu_tanh, relu, silu };

}  // namespace tokenops
