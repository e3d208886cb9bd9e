// The tensor side of sparse_attention on a GPU: tensors -> a problem -> kernels of a shape that fits it.
#include "sparse_attention_forward.cuh"
#include "sparse_attention_tensors.h"

namespace tokenops {
namespace {

template <class Shape>
void launch_forward(const Tensor& on, ForwardArguments a, int64_t batch) {
  a.blocks = static_cast<int>(blocks_of(a.p.query_slots, Shape::kRows, a.p.cu_seqlens_q != nullptr, a.p.sequences));
  a.teams = a.blocks * batch * a.p.heads;
  launch(on, attention_forward<Shape>, (a.teams + Shape::kTeams - 1) / Shape::kTeams, Shape::kThreads, sizeof(typename Shape::Shared), a);
}

template <class T, int W>
void forward_of_width(const Tensor& on, const ForwardArguments& a, int64_t batch) {
  launch_forward<ForwardShape<T, W, 4, 1, 64, 2, true>>(on, a, batch);
}

void forward(Tensor out, Tensor lse, OptionalTensor row_sq, Tensor query, Tensor key, Tensor value, OptionalTensor q_index,
             OptionalTensor kv_index, OptionalTensor kv_bias, OptionalTensor attn_mask, OptionalTensor rel_h, OptionalTensor rel_w,
             OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, bool is_causal, double scale, bool by_row) {
  ForwardArguments a{};
  a.p = problem_of(query, key, value, q_index, kv_index, kv_bias, attn_mask, rel_h, rel_w, cu_seqlens_q, cu_seqlens_k, is_causal, scale);
  const int64_t batch = query.size(0);
  a.out = grid_of("out", out, query.scalar_type(), batch, a.p.heads, by_row ? a.p.rows : a.p.query_slots, a.p.value_width);
  a.p.aligned &= is_aligned(out);
  a.by_row = by_row;
  a.lse = statistic_of("lse", lse, a.p, batch);
  a.row_sq = row_sq ? statistic_of("row_sq", *row_sq, a.p, batch) : nullptr;
  with_half("query", query, [&](auto number) {
    using T = decltype(number);
    with_width(a.p, [&](auto width) { forward_of_width<T, decltype(width)::value>(query, a, batch); });
  });
}

}  // namespace

TOKENOPS_CUDA_OPERATORS(m) { m.impl("sparse_attention_cuda_forward", TORCH_BOX(&forward)); }

}  // namespace tokenops
