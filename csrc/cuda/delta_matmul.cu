// The tensor side of delta_matmul's gate and buffers: tensors -> arguments -> launches.
#include <cmath>
#include <optional>

#include "delta_matmul.h"
#include "delta_matmul_gate.cuh"

namespace tokenops {
namespace {

Order order_of(double order) {
  STD_TORCH_CHECK(order >= 0, "order must not be negative");
  if (order == 2) return Order::two;
  if (order == 1) return Order::one;
  if (order == 0) return Order::zero;
  return std::isinf(order) ? Order::inf : Order::any;
}

void compare_frames(OptionalTensor change, OptionalTensor total, OptionalTensor renewed, OptionalTensor values, OptionalTensor delta,
                    Tensor x, OptionalTensor skip, OptionalTensor reference, OptionalTensor norm_weight, OptionalTensor norm_bias,
                    double norm_eps, double order, bool keep) {
  check_rank("x", x, 3);
  const int64_t batch = x.size(0), tokens = x.size(1), width = x.size(2);
  check_grid("x", x, x.scalar_type(), batch, tokens, width);
  STD_TORCH_CHECK(skip.has_value() == total.has_value(), "skip and total must be given both or not at all");
  STD_TORCH_CHECK(values.has_value() == delta.has_value(), "values and delta must be given both or not at all");
  STD_TORCH_CHECK(reference || !(change || keep), "without a reference nothing changed and nothing is kept");
  if (change) check_dense("change", *change, ScalarType::Float, {batch, tokens});
  bool aligned = fits_16(x);
  for (const OptionalTensor* t : {&skip, &total, &renewed, &values, &delta, &reference, &norm_weight, &norm_bias}) aligned &= fits_16(*t);
  with_rows(x, aligned, [&](auto number, auto wide) {
    using T = decltype(number);
    const Comparison<T> p{grid_of<const T>(x),
                          grid_of<const T>("skip", skip, x, tokens),
                          grid_of<const T>("reference", reference, x, tokens),
                          grid_of<T>("total", total, x, tokens),
                          grid_of<T>("new reference", renewed, x, tokens),
                          grid_of<T>("values", values, x, tokens),
                          grid_of<T>("delta", delta, x, tokens),
                          change ? change->mutable_data_ptr<float>() : nullptr,
                          normalization_of(norm_weight, norm_bias, norm_eps, x),
                          order_of(order),
                          static_cast<float>(order),
                          keep,
                          static_cast<int>(batch),
                          static_cast<int>(tokens),
                          static_cast<int>(width)};
    launch(x, compare<T, decltype(wide)::value>, blocks_of_rows(batch * tokens), kRowThreads, 0, p);
  });
}

void send_chosen(Tensor values, Tensor delta, OptionalTensor renewed, Tensor x, Tensor reference, OptionalTensor norm_weight,
                 OptionalTensor norm_bias, double norm_eps, Tensor index) {
  check_rank("x", x, 3);
  const int64_t batch = x.size(0), tokens = x.size(1), width = x.size(2);
  check_grid("x", x, x.scalar_type(), batch, tokens, width);
  const SampleLists lists = sample_lists_of(index, batch, tokens);
  bool aligned = fits_16(x) && fits_16(values) && fits_16(delta) && fits_16(reference);
  for (const OptionalTensor* t : {&renewed, &norm_weight, &norm_bias}) aligned &= fits_16(*t);
  with_rows(x, aligned, [&](auto number, auto wide) {
    using T = decltype(number);
    const Sending<T> p{grid_of<const T>(x),
                       grid_of<const T>("reference", reference, x, tokens),
                       grid_of<T>("values", values, x, lists.slots),
                       grid_of<T>("delta", delta, x, lists.slots),
                       grid_of<T>("new reference", renewed, x, tokens),
                       normalization_of(norm_weight, norm_bias, norm_eps, x),
                       lists,
                       static_cast<int>(width)};
    launch(x, send<T, decltype(wide)::value>, blocks_of_rows(batch * lists.slots), kRowThreads, 0, p);
  });
}

// moments [B, N, 2] and parts [2, strips, C] are scratch, given if and only if gradients of the norm are wanted: the sums of strips.
// grad_values may be float32 beside half types.
void gate_backward(OptionalTensor grad_x, OptionalTensor grad_reference, OptionalTensor parts, Tensor slot_of, OptionalTensor moments,
                   Tensor x, OptionalTensor norm_weight, OptionalTensor norm_bias, double norm_eps, Tensor index, bool whole,
                   OptionalTensor grad_values, OptionalTensor grad_delta, OptionalTensor grad_renewed, OptionalTensor grad_total) {
  check_rank("x", x, 3);
  const int64_t batch = x.size(0), tokens = x.size(1), width = x.size(2);
  check_grid("x", x, x.scalar_type(), batch, tokens, width);
  const SampleLists lists = sample_lists_of(index, batch, tokens);
  check_dense("slot_of", slot_of, ScalarType::Int, {batch, tokens});
  STD_TORCH_CHECK(moments.has_value() == parts.has_value() && (norm_weight || !parts), "moments and parts go together, with a norm");
  int64_t strips = 0;
  if (parts) {
    check_rank("parts", *parts, 3);
    strips = parts->size(1);
    check_dense("parts", *parts, ScalarType::Float, {2, strips, width});
    check_dense("moments", *moments, ScalarType::Float, {batch, tokens, 2});
    STD_TORCH_CHECK(strips > 0, "parts must have a strip");
  }
  launch(x, invert_lists, (static_cast<int64_t>(lists.total()) + kRowThreads - 1) / kRowThreads, kRowThreads, 0,
         ListInversion{lists, slot_of.mutable_data_ptr<int32_t>()});
  bool aligned = fits_16(x);
  for (const OptionalTensor* t : {&grad_x, &grad_reference, &grad_values, &grad_delta, &grad_renewed, &grad_total, &norm_weight})
    aligned &= fits_16(*t);
  with_rows(x, aligned, [&](auto number, auto wide) {
    using T = decltype(number);
    GateGradient<T> p{};
    p.x = grid_of<const T>(x);
    if (grad_values) {
      p.single = grad_values->scalar_type() == ScalarType::Float;
      check_grid("grad_values", *grad_values, p.single ? ScalarType::Float : x.scalar_type(), batch, lists.slots, width);
      p.of_values = {grad_values->const_data_ptr(), broadcast_stride(*grad_values, 0), grad_values->stride(1)};
    }
    p.of_delta = grid_of<const T>("grad_delta", grad_delta, x, lists.slots);
    p.of_next = grid_of<const T>("grad_reference", grad_renewed, x, tokens);
    p.of_total = grid_of<const T>("grad_total", grad_total, x, tokens);
    p.to_x = grid_of<T>("new grad_x", grad_x, x, tokens);
    p.to_old = grid_of<T>("new grad_reference", grad_reference, x, tokens);
    p.norm = normalization_of(norm_weight, norm_bias, norm_eps, x);
    p.slot_of = slot_of.const_data_ptr<int32_t>();
    p.whole = whole;
    p.samples = static_cast<int>(batch), p.tokens = static_cast<int>(tokens), p.width = static_cast<int>(width);
    if (parts) {
      p.moments = reinterpret_cast<Moments*>(moments->mutable_data_ptr<float>());
      p.parts_weight = parts->mutable_data_ptr<float>();
      p.parts_bias = p.parts_weight + strips * width;
      p.strip = static_cast<int>((batch * tokens + strips - 1) / strips);
    }
    launch(x, gate_gradient<T, decltype(wide)::value>, blocks_of_rows(batch * tokens), kRowThreads, 0, p);
    constexpr int kColumns = NormGradientShared<T>::kColumns;
    if (parts)
      launch(x, norm_gradient<T, decltype(wide)::value>, strips * ((width + kColumns - 1) / kColumns), kRowThreads,
             sizeof(NormGradientShared<T>), p);
  });
}

template <class Unit>
void move_units(const Tensor& to, const OptionalTensor& from, const SampleLists& lists, bool take, int64_t unit) {
  const int64_t size = static_cast<int64_t>(to.element_size());
  const auto grid = [&](const Tensor& t, auto* data) {
    return TokenGrid<std::remove_pointer_t<decltype(data)>>{data, broadcast_stride(t, 0) * size / unit, t.stride(1) * size / unit};
  };
  RowMove<Unit> p{};
  if (from) p.from = grid(*from, static_cast<const Unit*>(from->const_data_ptr()));
  p.to = grid(to, static_cast<Unit*>(to.mutable_data_ptr()));
  p.lists = lists;
  p.width = static_cast<int>(to.size(2) * size / unit);
  p.take = take;
  launch(to, move_rows<Unit>, blocks_of_rows(lists.total()), kRowThreads, 0, p);
}

// take: to [B, K, C] from the listed rows of `from` [B, N, C], 0 in empty slots. Else the listed rows of to [B, N, C] from `from`
// [B, K, C], or 0.
void move(Tensor to, OptionalTensor from, Tensor index, bool take) {
  check_rank("to", to, 3);
  STD_TORCH_CHECK(from || !take, "there must be rows to take from");
  if (from) check_rank("from", *from, 3);
  const int64_t batch = to.size(0), width = to.size(2), rows = take ? from->size(1) : to.size(1);
  const SampleLists lists = sample_lists_of(index, batch, rows);
  check_grid("to", to, to.scalar_type(), batch, take ? lists.slots : rows, width);
  if (from) check_grid("from", *from, to.scalar_type(), batch, take ? rows : lists.slots, width);
  if (fits_16(to) && fits_16(from)) return move_units<uint4>(to, from, lists, take, 16);
  switch (to.element_size()) {
    case 2: return move_units<uint16_t>(to, from, lists, take, 2);
    case 4: return move_units<uint32_t>(to, from, lists, take, 4);
    case 8: return move_units<uint64_t>(to, from, lists, take, 8);
    default: STD_TORCH_CHECK(false, "rows must be of numbers of 2, 4 or 8 bytes");
  }
}

}  // namespace

TOKENOPS_CUDA_OPERATORS(m) {
  m.impl("delta_matmul_cuda_compare", TOKENOPS_CUDA_OPERATOR(compare_frames));
  m.impl("delta_matmul_cuda_send", TOKENOPS_CUDA_OPERATOR(send_chosen));
  m.impl("delta_matmul_cuda_gate_backward", TOKENOPS_CUDA_OPERATOR(gate_backward));
  m.impl("delta_matmul_cuda_move", TOKENOPS_CUDA_OPERATOR(move));
}

}  // namespace tokenops
