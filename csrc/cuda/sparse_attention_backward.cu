// The tensor side of sparse_attention's gradients on a GPU: tensors -> a problem -> kernels of a shape that fits it.
#include "sparse_attention_backward.cuh"
#include "sparse_attention_tensors.h"

namespace tokenops {
namespace {

// How work is cut. None was chosen by time: that takes a GPU. A thread holds two tiles of logits and, of its rows, one or two sums as wide
// as a head. What counted were registers (32 rows a warp, which read the other side from shared memory half as often, as long as nothing
// spills), shared memory (two blocks beside each other on sm_80) and copies under way (three stages where they fit).
template <class T, int W>
struct BackwardShapes {
  static constexpr bool kFloat = sizeof(T) == 4;
  static constexpr int kQueryTiles = W == 128 ? 1 : 2, kKeyTiles = W >= 96 ? 1 : 2;
  template <Gradient Of>
  using Large = std::conditional_t<Of == Gradient::query, BackwardShape<T, W, Of, 4, kQueryTiles, 32, W == 128 ? 2 : 3, false>,
                                   BackwardShape<T, W, Of, 4, kKeyTiles, W == 64 ? 16 : 32, W == 128 ? 2 : 3, false>>;
  template <Gradient Of>
  using Full = BackwardShape<T, W, Of, kFloat && W == 128 ? 2 : 4, 1, kFloat && W == 128 ? 16 : 32, 2, true>;
  // one warp each: 8 to 16 frames
  template <Gradient Of>
  using Short = BackwardShape<T, W, Of, 1, 1, 16, 2, true>;
};

template <class Shape>
void launch_backward(const Tensor& on, BackwardArguments a, int64_t batch) {
  const AttentionProblem& p = a.p;
  const bool packed = p.cu_seqlens_q != nullptr;
  a.blocks = static_cast<int>(blocks_of(Shape::kOwnsKeys ? p.key_slots : p.query_slots, Shape::kRows, packed, p.sequences));
  a.pieces = Shape::kOf == Gradient::rel_pos ? (p.rel_width + Shape::kKeys - 1) / Shape::kKeys : 1;
  a.teams = static_cast<int64_t>(a.blocks) * a.pieces * batch * (Shape::kOwnsKeys ? p.heads / p.group : p.heads);
  launch(on, attention_backward<Shape>, (a.teams + Shape::kTeams - 1) / Shape::kTeams, Shape::kThreads, sizeof(typename Shape::Shared), a);
}

// `own`: slots of the owning side that a head or sequence has at most
template <class T, int W, Gradient Of>
void backward_of(const Tensor& on, const BackwardArguments& a, int64_t batch, int64_t own) {
  using Shapes = BackwardShapes<T, W>;
  if (own > Shapes::template Short<Of>::kRows && a.p.mask == Kind::none && a.p.rel == Kind::none) {
    // float's large blocks would hold as much as its full ones
    if constexpr (!Shapes::kFloat) {
      using Large = typename Shapes::template Large<Of>;
      // where two for each processor are left
      const int64_t heads = batch * (Large::kOwnsKeys ? a.p.heads / a.p.group : a.p.heads);
      if ((own + Large::kRows - 1) / Large::kRows * heads >= 2 * processors(on)) return launch_backward<Large>(on, a, batch);
    }
  }
  if constexpr (W == 96)
    // only the products of large blocks gain by a width between 64 and 128
    backward_of<T, 128, Of>(on, a, batch, own);
  else if (own <= Shapes::template Short<Of>::kRows)
    launch_backward<typename Shapes::template Short<Of>>(on, a, batch);
  else
    launch_backward<typename Shapes::template Full<Of>>(on, a, batch);
}

template <class T>
void launch_row_terms(const Tensor& on, const RowTermArguments& a) {
  launch(on, row_terms<T>, (a.rows + kRowTermRows - 1) / kRowTermRows, kRowTermThreads, 0, a);
}

void backward(OptionalTensor grad_query, OptionalTensor grad_key, OptionalTensor grad_value, OptionalTensor grad_bias,
              OptionalTensor grad_rel_h, OptionalTensor grad_rel_w, Tensor row_terms, OptionalTensor cells, Tensor grad_out, Tensor out,
              Tensor lse, Tensor query, Tensor key, Tensor value, OptionalTensor q_index, OptionalTensor kv_index, OptionalTensor kv_bias,
              OptionalTensor attn_mask, OptionalTensor rel_h, OptionalTensor rel_w, OptionalTensor cu_seqlens_q,
              OptionalTensor cu_seqlens_k, bool is_causal, double scale, int64_t most_queries, int64_t most_keys) {
  BackwardArguments a{};
  a.p = problem_of(query, key, value, q_index, kv_index, kv_bias, attn_mask, rel_h, rel_w, cu_seqlens_q, cu_seqlens_k, is_causal, scale);
  AttentionProblem& p = a.p;
  const ScalarType dtype = query.scalar_type();
  const int64_t batch = query.size(0), kv_heads = key.size(1);

  RowTermArguments rows{};
  rows.grad_out = a.grad_out = grid_of("grad_out", grad_out, dtype, batch, p.heads, p.query_slots, p.value_width);
  rows.out = grid_of("out", out, dtype, batch, p.heads, p.query_slots, p.value_width);
  rows.lse = statistic_of("lse", lse, p, batch);
  rows.aligned = is_aligned(grad_out) && is_aligned(out);
  rows.rows = batch * p.heads * p.query_slots;
  rows.heads = p.heads;
  rows.slots = p.query_slots;
  rows.width = p.value_width;
  check_rank("row_terms", row_terms, 4);
  check_dtype("row_terms", row_terms, ScalarType::Float);
  STD_TORCH_CHECK(row_terms.is_contiguous() && row_terms.numel() == 2 * rows.rows, "row_terms must be contiguous, [2, B, H, K]");
  a.lse = rows.lse_out = row_terms.mutable_data_ptr<float>();
  a.delta = rows.delta = rows.lse_out + rows.rows;

  const auto gradient_of = [&](const char* name, const OptionalTensor& grad, int64_t heads, int64_t rows, int64_t width) {
    if (!grad) return Grid{};
    p.aligned &= is_aligned(*grad);
    return grid_of(name, *grad, dtype, batch, heads, rows, width);
  };
  p.aligned &= is_aligned(grad_out);
  a.grad_query = gradient_of("grad_query", grad_query, p.heads, p.rows, p.width);
  a.grad_key = gradient_of("grad_key", grad_key, kv_heads, p.keys, p.width);
  a.grad_value = gradient_of("grad_value", grad_value, kv_heads, p.keys, p.value_width);
  if (grad_bias) {
    check_rank("grad_bias", *grad_bias, 3);
    check_dtype("grad_bias", *grad_bias, ScalarType::Float);
    STD_TORCH_CHECK(grad_bias->is_contiguous() && grad_bias->numel() == batch * kv_heads * p.keys,
                    "grad_bias must be contiguous, [B, kv heads, M]");
    a.grad_bias = grad_bias->mutable_data_ptr<float>();
  }

  with_float("query", query, [&](auto number) {
    using T = decltype(number);
    launch_row_terms<T>(query, rows);
    with_width(p, [&](auto width) {
      constexpr int W = decltype(width)::value;
      if (grad_query) backward_of<T, W, Gradient::query>(query, a, batch, std::min<int64_t>(most_queries, p.query_slots));
      if (grad_key || grad_value || grad_bias)
        backward_of<T, W, Gradient::key_value>(query, a, batch, std::min<int64_t>(most_keys, p.key_slots));
    });
  });
  if (!grad_rel_h && !grad_rel_w) return;

  STD_TORCH_CHECK(rel_h.has_value(), "rel_pos has gradients only where it is given");
  if (grad_rel_h) {
    // in parts, one for each piece of a row of cells
    check_rank("grad_rel_h", *grad_rel_h, 5);
    check_size("grad_rel_h", *grad_rel_h, 0, (p.rel_width + kRelPosColumns - 1) / kRelPosColumns);
    check_dense_rows("grad_rel_h", *grad_rel_h);
    for (int i = 0; i < 4; ++i) check_size("grad_rel_h", *grad_rel_h, i + 1, rel_h->size(i));
    a.grad_rel_h_kind = kind_of("grad_rel_h", *grad_rel_h);
    a.grad_rel_h = {const_cast<void*>(grad_rel_h->const_data_ptr()), grad_rel_h->stride(1), grad_rel_h->stride(2), grad_rel_h->stride(3)};
    a.grad_rel_h_part = grad_rel_h->stride(0);
  }
  if (grad_rel_w) a.grad_rel_w = grid_of("grad_rel_w", *grad_rel_w, rel_w->scalar_type(), batch, p.heads, p.rows, p.rel_width);
  if (kv_index && !p.cu_seqlens_q) {
    STD_TORCH_CHECK(cells.has_value(), "with a kv_index the gradient of rel_pos needs cells");
    check_dense("cells", *cells, ScalarType::Int, {kv_index->size(0), kv_index->size(1), p.keys});
    CellArguments c{p.kv_index, cells->mutable_data_ptr<int32_t>(), kv_index->numel(), static_cast<int>(kv_index->size(1)), p.key_slots,
                    p.keys};
    launch(query, list_cells, (c.count + kCellThreads - 1) / kCellThreads, kCellThreads, 0, c);
    p.kv_index = lists_of("cells", cells, batch, kv_heads);
    p.key_slots = p.keys;
  }
  with_float("query", query, [&](auto number) {
    with_width(p, [&](auto width) {
      constexpr int W = decltype(width)::value == 96 ? 128 : decltype(width)::value;
      constexpr int kWarps = sizeof(number) == 4 && W == 128 ? 1 : 4;
      launch_backward<BackwardShape<decltype(number), W, Gradient::rel_pos, kWarps, 1, kRelPosColumns, 2, true>>(query, a, batch);
    });
  });
}

}  // namespace

TOKENOPS_CUDA_OPERATORS(m) { m.impl("sparse_attention_cuda_backward", TOKENOPS_CUDA_OPERATOR(backward)); }

}  // namespace tokenops
