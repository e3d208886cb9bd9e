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

// How work is cut. None was chosen by time: that takes a GPU. What counted were registers (a warp of 32 rows reads keys and values from
// shared memory half as often as one of 16; at 255 registers two blocks run beside each other), shared memory (the same two blocks on
// sm_80) and copies under way (three stages where they fit). Not every shape is built for every width and type: where one is missing the
// next serves.
template <class T, int W>
struct ForwardShapes {
  static constexpr bool kFloat = sizeof(T) == 4;
  static constexpr bool kHasLarge = W >= 64 && !(kFloat && W > 64), kHasSmall = !kFloat;
  static constexpr int kKeys = kFloat && W == 128 ? 16 : 32;
  using Large = ForwardShape<T, W, 4, 2, kFloat || W >= 96 ? 32 : 64, kFloat || W >= 96 ? 2 : 3, false>;
  using Small = ForwardShape<T, W, 4, 1, 64, 2, false>;
  using Full = ForwardShape<T, W, 4, 1, kKeys, 2, true>;
  // one warp each: 8 to 32 frames
  using Short = ForwardShape<T, W, 1, 2, 16, 3, true>;
  using Shortest = ForwardShape<T, W, 1, 1, 16, 2, true>;
  // four warps for the same few queries: a class token that alone looks at many keys
  using Few = ForwardShape<T, W, 4, 1, 64, 2, false, true>;
};

// `queries`: slots that a head or sequence has at most
template <class T, int W>
void forward_of_width(const Tensor& on, const ForwardArguments& a, int64_t batch, int64_t queries) {
  using Shapes = ForwardShapes<T, W>;
  const bool full = a.p.mask != Kind::none || a.p.rel != Kind::none || a.row_sq;
  if constexpr (W == 96) {
    // only the products of long sequences gain by a width between 64 and 128
    if (Shapes::kFloat || full || queries <= Shapes::Shortest::kRows) return forward_of_width<T, 128>(on, a, batch, queries);
  } else {
    if constexpr (Shapes::kHasSmall)
      if (queries <= Shapes::Few::kRows && !full && a.p.key_slots > Shapes::Few::kTileKeys)
        return launch_forward<typename Shapes::Few>(on, a, batch);
    if (queries <= Shapes::Shortest::kRows) return launch_forward<typename Shapes::Shortest>(on, a, batch);
    if constexpr (!Shapes::kFloat && W <= 64)
      if (queries <= Shapes::Short::kRows) return launch_forward<typename Shapes::Short>(on, a, batch);
    if (full) return launch_forward<typename Shapes::Full>(on, a, batch);
  }
  if constexpr (Shapes::kHasLarge) {
    // where two large blocks for each processor are left, and they are not much emptier than small ones
    constexpr int64_t kLarge = Shapes::Large::kRows, kSmall = Shapes::Full::kRows;
    const int64_t large = (queries + kLarge - 1) / kLarge, small = (queries + kSmall - 1) / kSmall;
    const int64_t blocks = blocks_of(a.p.query_slots, kLarge, false, 0) * batch * a.p.heads;
    if (blocks >= 2 * processors(on) && 4 * large * kLarge <= 5 * small * kSmall)
      return launch_forward<typename Shapes::Large>(on, a, batch);
  }
  if constexpr (Shapes::kHasSmall)
    launch_forward<typename Shapes::Small>(on, a, batch);
  else if constexpr (W != 96)
    launch_forward<typename Shapes::Full>(on, a, batch);
}

void forward(Tensor out, Tensor lse, OptionalTensor row_sq, Tensor query, Tensor key, Tensor value, OptionalTensor q_index,
             OptionalTensor kv_index, OptionalTensor kv_bias, OptionalTensor attn_mask, OptionalTensor rel_h, OptionalTensor rel_w,
             OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, bool is_causal, double scale, int64_t most_queries, bool by_row) {
  ForwardArguments a{};
  a.p = problem_of(query, key, value, q_index, kv_index, kv_bias, attn_mask, rel_h, rel_w, cu_seqlens_q, cu_seqlens_k, is_causal, scale);
  const int64_t batch = query.size(0);
  a.out = grid_of("out", out, query.scalar_type(), batch, a.p.heads, by_row ? a.p.rows : a.p.query_slots, a.p.value_width);
  a.p.aligned &= is_aligned(out);
  a.by_row = by_row;
  a.lse = statistic_of("lse", lse, a.p, batch);
  a.row_sq = row_sq ? statistic_of("row_sq", *row_sq, a.p, batch) : nullptr;
  with_float("query", query, [&](auto number) {
    using T = decltype(number);
    with_width(a.p, [&](auto width) {
      forward_of_width<T, decltype(width)::value>(query, a, batch, std::min<int64_t>(most_queries, a.p.query_slots));
    });
  });
}

}  // namespace

TOKENOPS_CUDA_OPERATORS(m) { m.impl("sparse_attention_cuda_forward", TOKENOPS_CUDA_OPERATOR(forward)); }

}  // namespace tokenops
