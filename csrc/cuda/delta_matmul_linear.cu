// The tensor side of delta_matmul's layers: tensors -> arguments -> launches.
#include "delta_matmul_linear.cuh"

#include <algorithm>
#include <string>

#include "../delta_matmul_tensors.h"
#include "delta_matmul.h"
#include "delta_matmul_linear_backward.cuh"

namespace tokenops {
namespace {

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

Form form_of(const std::string& name) {
  if (name == "plain") return Form::plain;
  if (name == "gradient") return Form::gradient;
  STD_TORCH_CHECK(name == "inner", "form must be plain, gradient or inner, got ", name);
  return Form::inner;
}

// `in` by row where gather, `out` where scatter; else they are by slot. tokens: rows of a grid. An out in float32 beside half types is
// given the sums themselves.
void run_layer(Tensor out, Tensor in, Tensor index, int64_t tokens, Tensor weight, OptionalTensor bias, OptionalTensor other,
               std::string form, std::string activation, bool gather, bool scatter) {
  check_rank("in", in, 3);
  check_rank("weight", weight, 2);
  const ScalarType dtype = in.scalar_type();
  const int64_t batch = in.size(0), width = in.size(2), outputs = weight.size(0);
  const SampleLists lists = sample_lists_of(index, batch, tokens);
  check_grid("in", in, dtype, batch, gather ? lists.rows : lists.slots, width);
  check_dtype("weight", weight, dtype);
  check_size("weight", weight, 1, width);
  check_dense_rows("weight", weight);
  const bool single = dtype != ScalarType::Float && out.scalar_type() == ScalarType::Float;
  check_grid("out", out, single ? ScalarType::Float : dtype, batch, scatter ? lists.rows : lists.slots, outputs);
  if (bias) {
    check_rank("bias", *bias, 1);
    check_dtype("bias", *bias, dtype);
    check_size("bias", *bias, 0, outputs);
    check_dense_rows("bias", *bias);
  }
  const Form what = form_of(form);
  const Activation bend = activation_of(activation);
  STD_TORCH_CHECK(other.has_value() == (what != Form::plain), "other goes with a form that is not plain");
  if (other) check_grid("other", *other, dtype, batch, lists.slots, outputs);
  if (single) {
    STD_TORCH_CHECK(!bias && !other && bend == Activation::none && !scatter, "sums in float32 are as they are");
    check_contiguous("sums in float32", out);
  }
  with_float("in", in, [&](auto number) {
    using T = decltype(number);
    Layer<T> p{};
    p.in = grid_of<const T>(in);
    if (other) p.other = grid_of<const T>(*other);
    if (single)
      p.single = out.mutable_data_ptr<float>();
    else
      p.out = grid_of<T>(out);
    p.lists = lists;
    p.weight = static_cast<const T*>(weight.const_data_ptr());
    p.weight_row = weight.stride(0);
    p.bias = bias ? static_cast<const T*>(bias->const_data_ptr()) : nullptr;
    p.width = static_cast<int>(width), p.outputs = static_cast<int>(outputs);
    p.gather = gather, p.scatter = scatter;
    p.wide = begins_at_16(out) && (!bias || begins_at_16(*bias)) && (!other || begins_at_16(*other));
    p.form = what, p.activation = bend;
    launch_layer(out, p, fits_16(in) && fits_16(weight));
  });
}

// normalized [B, K, C]: nothing is written into empty slots
void normalize(Tensor normalized, Tensor x, Tensor norm_weight, Tensor norm_bias, double norm_eps, Tensor index) {
  check_rank("x", x, 3);
  const int64_t batch = x.size(0), tokens = x.size(1), width = x.size(2);
  check_grid("x", x, x.scalar_type(), batch, tokens, width);
  const SampleLists lists = sample_lists_of(index, batch, tokens);
  check_grid("normalized", normalized, x.scalar_type(), batch, lists.slots, width);
  check_contiguous("normalized", normalized);
  const bool aligned = fits_16(x) && fits_16(normalized) && fits_16(norm_weight) && fits_16(norm_bias);
  with_rows(x, aligned, [&](auto number, auto wide) {
    using T = decltype(number);
    const NormalizedRows<T> p{grid_of<const T>(x), static_cast<T*>(normalized.mutable_data_ptr()),
                              normalization_of(norm_weight, norm_bias, norm_eps, x), lists, static_cast<int>(width)};
    launch(x, normalize_rows<T, decltype(wide)::value>, blocks_of_rows(lists.total()), kRowThreads, 0, p);
  });
}

template <class Shape, bool Aligned>
void launch_parameters(const Tensor& on, const LayerParameters<typename Shape::T>& p, int64_t tiles) {
  launch(on, layer_parameters<Shape, Aligned>, tiles, Shape::kThreads, sizeof(typename Shape::Shared), p);
}

// Gradients of a layer's weight and bias, where wanted, from grad [B, K, O] and the rows that went in, by row where gather.
void parameters(OptionalTensor of_weight, OptionalTensor of_bias, Tensor grad, Tensor in, Tensor index, int64_t tokens, bool gather) {
  check_rank("grad", grad, 3);
  check_rank("in", in, 3);
  const ScalarType dtype = grad.scalar_type();
  const int64_t batch = grad.size(0), outputs = grad.size(2), width = in.size(2);
  const SampleLists lists = sample_lists_of(index, batch, tokens);
  check_grid("grad", grad, dtype, batch, lists.slots, outputs);
  check_grid("in", in, dtype, batch, gather ? lists.rows : lists.slots, width);
  if (of_weight) check_dense("gradient of weight", *of_weight, dtype, {outputs, width});
  if (of_bias) check_dense("gradient of bias", *of_bias, dtype, {outputs});
  with_float("grad", grad, [&](auto number) {
    using T = decltype(number);
    LayerParameters<T> p{};
    p.grad = grid_of<const T>(grad);
    p.in = grid_of<const T>(in);
    p.lists = lists;
    p.of_weight = of_weight ? static_cast<T*>(of_weight->mutable_data_ptr()) : nullptr;
    p.of_bias = of_bias ? static_cast<T*>(of_bias->mutable_data_ptr()) : nullptr;
    p.outputs = static_cast<int>(outputs);
    // without a gradient of weight no row is read
    p.width = of_weight ? static_cast<int>(width) : 0;
    p.gather = gather;
    using Large = ParametersShape<T, 128, 32, 64, sizeof(T) == 2 ? 3 : 2>;
    using Small = ParametersShape<T, 64, 32, 32, sizeof(T) == 2 ? 3 : 2>;
    // the first column of tiles has the bias
    const auto tiles = [&](int64_t side) { return (outputs + side - 1) / side * std::max<int64_t>((p.width + side - 1) / side, 1); };
    if (!(fits_16(grad) && fits_16(in) && fits_16(of_weight)))
      launch_parameters<Small, false>(grad, p, tiles(Small::kSide));
    else if (tiles(Large::kSide) < processors(grad))
      launch_parameters<Small, true>(grad, p, tiles(Small::kSide));
    else
      launch_parameters<Large, true>(grad, p, tiles(Large::kSide));
  });
}

}  // namespace

TOKENOPS_CUDA_OPERATORS(m) {
  m.impl("delta_matmul_cuda_layer", TOKENOPS_CUDA_OPERATOR(run_layer));
  m.impl("delta_matmul_cuda_normalize", TOKENOPS_CUDA_OPERATOR(normalize));
  m.impl("delta_matmul_cuda_layer_parameters", TOKENOPS_CUDA_OPERATOR(parameters));
}

}  // namespace tokenops
