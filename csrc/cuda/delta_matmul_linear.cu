// The tensor side of delta_matmul's layers: tensors -> arguments -> launches.
#include "delta_matmul_linear.cuh"

#include <optional>
#include <string>

#include "delta_matmul.h"

namespace tokenops {
namespace {

Activation activation_of(const std::string& name) {
  if (name == "none") return Activation::none;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "relu") return Activation::relu;
  STD_TORCH_CHECK(name == "silu", "activation must be none, gelu, gelu_tanh, relu or silu, got ", name);
  return Activation::silu;
}

template <class Shape>
int64_t blocks_of(const SampleLists& lists, int outputs) {
  return (static_cast<int64_t>(lists.total()) + Shape::kSlots - 1) / Shape::kSlots * ((outputs + Shape::kOutputs - 1) / Shape::kOutputs);
}
template <class Shape, bool Aligned>
void launch_shape(const Tensor& on, Layer<typename Shape::T> p) {
  p.slot_blocks = (p.lists.total() + Shape::kSlots - 1) / Shape::kSlots;
  launch(on, layer<Shape, Aligned>, blocks_of<Shape>(p.lists, p.outputs), Shape::kThreads, sizeof(typename Shape::Shared), p);
}

// Large tiles read less from L2 for each product; small ones where large ones would leave processors without work. Rows that begin anywhere
// are read number by number whatever the tile.
template <class T>
void launch_layer(const Tensor& on, const Layer<T>& p, bool aligned) {
  constexpr bool kHalf = sizeof(T) == 2;
  using Large = LayerShape<T, 128, 128, 64, 32, kHalf ? 3 : 2>;
  using Small = LayerShape<T, 64, 64, 32, 32, kHalf ? 3 : 2>;
  if (!aligned) return launch_shape<Small, false>(on, p);
  if (blocks_of<Large>(p.lists, p.outputs) < processors(on)) return launch_shape<Small, true>(on, p);
  launch_shape<Large, true>(on, p);
}

// `in` and `out` by row or by slot
template <class T>
void run_layer(const Tensor& out, const Tensor& in, const SampleLists& lists, const Tensor& weight, const OptionalTensor& bias,
               Activation activation, bool gather, bool scatter) {
  const int64_t batch = out.size(0), width = in.size(2), outputs = weight.size(0);
  check_grid("in", in, weight.scalar_type(), batch, gather ? lists.rows : lists.slots, width);
  check_grid("out", out, weight.scalar_type(), batch, scatter ? lists.rows : lists.slots, outputs);
  check_rank("weight", weight, 2);
  check_size("weight", weight, 1, width);
  check_dense_rows("weight", weight);
  if (bias) {
    check_rank("bias", *bias, 1);
    check_dtype("bias", *bias, weight.scalar_type());
    check_size("bias", *bias, 0, outputs);
    check_dense_rows("bias", *bias);
  }
  Layer<T> p{};
  p.in = grid_of<const T>(in);
  p.out = grid_of<T>(out);
  p.lists = lists;
  p.weight = static_cast<const T*>(weight.const_data_ptr());
  p.weight_row = weight.stride(0);
  p.bias = bias ? static_cast<const T*>(bias->const_data_ptr()) : nullptr;
  p.width = static_cast<int>(width), p.outputs = static_cast<int>(outputs);
  p.gather = gather, p.scatter = scatter;
  p.wide_out = begins_at_16(out);
  p.activation = activation;
  launch_layer(out, p, fits_16(in) && fits_16(weight));
}

// normalized [B, K, C] and hidden [B, K, O] are scratch, for a normalisation and for a second layer
void linear(Tensor out, OptionalTensor normalized, OptionalTensor hidden, Tensor x, Tensor index, Tensor weight, OptionalTensor bias,
            OptionalTensor norm_weight, OptionalTensor norm_bias, double norm_eps, std::string activation, OptionalTensor weight_2,
            OptionalTensor bias_2, bool into) {
  check_rank("x", x, 3);
  const int64_t batch = x.size(0), width = x.size(2);
  check_grid("x", x, x.scalar_type(), batch, x.size(1), width);
  check_dtype("weight", weight, x.scalar_type());
  const SampleLists lists = sample_lists_of(index, batch, x.size(1));
  const Activation bend = activation_of(activation);
  STD_TORCH_CHECK(normalized.has_value() == norm_weight.has_value(), "normalized is scratch for a normalisation");
  STD_TORCH_CHECK(hidden.has_value() == weight_2.has_value(), "hidden is scratch for a second layer");
  if (normalized) {
    check_grid("normalized", *normalized, x.scalar_type(), batch, lists.slots, width);
    STD_TORCH_CHECK(normalized->is_contiguous(), "normalized must be contiguous");
  }
  if (hidden) check_dtype("second weight", *weight_2, x.scalar_type());
  with_float("x", x, [&](auto number) {
    using T = decltype(number);
    if (normalized) {
      const NormalizedRows<T> p{grid_of<const T>(x), static_cast<T*>(normalized->mutable_data_ptr()),
                                normalization_of(norm_weight, norm_bias, norm_eps, x), lists, static_cast<int>(width)};
      const int64_t blocks = blocks_of_rows(lists.total());
      if (fits_16(x) && fits_16(norm_weight) && fits_16(norm_bias))
        launch(x, normalize_rows<T, true>, blocks, kRowThreads, 0, p);
      else
        launch(x, normalize_rows<T, false>, blocks, kRowThreads, 0, p);
    }
    const Tensor& in = normalized ? *normalized : x;
    run_layer<T>(hidden ? *hidden : out, in, lists, weight, bias, bend, !normalized, into && !hidden);
    if (hidden) run_layer<T>(out, *hidden, lists, *weight_2, bias_2, Activation::none, false, into);
  });
}

}  // namespace

TOKENOPS_CUDA_OPERATORS(m) { m.impl("delta_matmul_cuda_linear", TORCH_BOX(&linear)); }

}  // namespace tokenops
