// The tensor side of delta_attention: tensors -> lists -> launches.
#include "delta_matmul_attention.cuh"

#include <algorithm>

#include "delta_matmul_cells.cuh"
#include "delta_matmul_order.cuh"
#include "delta_matmul_paper.cuh"
#include "sparse_attention_tensors.h"

namespace tokenops {
namespace {

// a part of the state: dense, of these sizes; rows of numbers begin at multiples of 16 bytes
void* part_of_state(const char* name, const Tensor& t, ScalarType dtype, std::initializer_list<int64_t> sizes) {
  check_dense(name, t, dtype, sizes);
  return const_cast<void*>(t.const_data_ptr());
}
Grid rows_of_state(const char* name, const Tensor& t, ScalarType dtype, int64_t batch, int64_t heads, int64_t rows, int64_t width) {
  void* data = part_of_state(name, t, dtype, {batch, heads, rows, width});
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(data) % 16 == 0, name, " must begin at a multiple of 16 bytes");
  return {data, heads * rows * width, rows * width, width};
}

// [1|B, slots] ids of each sample
const int32_t* ids_of(const char* name, const Tensor& t, int64_t batch) {
  check_rank(name, t, 2);
  check_dtype(name, t, ScalarType::Int);
  check_broadcast(name, t, 0, batch);
  check_dense_rows(name, t);
  return t.const_data_ptr<int32_t>();
}

void order(Tensor order, Tensor fresh, Tensor marks, Tensor rows, Tensor cells, Tensor turn, int64_t keys, int64_t slice, int64_t most) {
  RowOrder p{};
  check_rank("order", order, 2);
  const int64_t batch = order.size(0), tokens = order.size(1);
  p.rows = ids_of("rows", rows, batch);
  p.cells = ids_of("cells", cells, batch);
  p.rows_sample = broadcast_stride(rows, 0), p.cells_sample = broadcast_stride(cells, 0);
  p.row_slots = size_of("rows", rows.size(1)), p.cell_slots = size_of("cells", cells.size(1));
  p.tokens = size_of("order", tokens), p.keys = size_of("keys", keys);
  p.turn = static_cast<const int32_t*>(part_of_state("turn", turn, ScalarType::Int, {}));
  p.slice = static_cast<int>(std::clamp<int64_t>(slice, 0, tokens));
  p.most = static_cast<int>(std::clamp<int64_t>(most, 0, keys));
  p.order = static_cast<int32_t*>(part_of_state("order", order, ScalarType::Int, {batch, tokens}));
  p.fresh = static_cast<int32_t*>(part_of_state("fresh", fresh, ScalarType::Int, {batch}));
  p.marks = static_cast<uint8_t*>(part_of_state("marks", marks, ScalarType::Byte, {batch, tokens}));
  launch(order, order_rows, batch, kOrderThreads, sizeof(OrderShared), p);
}

template <class Shape>
void launch_exact(const Tensor& on, ExactArguments a, int64_t heads) {
  a.blocks = (a.p.rows + Shape::kRows - 1) / Shape::kRows;
  launch(on, attention_exact<Shape>, a.blocks * heads, Shape::kThreads, sizeof(typename Shape::Team), a);
}

// order and fresh as `order` finds them, for a frame that is not the first: then cells are the keys that changed
void exact(Tensor out, Tensor query, Tensor key, Tensor value, OptionalTensor order, OptionalTensor fresh, OptionalTensor cells,
           OptionalTensor rel_h, OptionalTensor rel_w, double scale, double guard, Tensor output, Tensor old_value, Tensor old_key,
           Tensor maximum, Tensor total, Tensor peak) {
  ExactArguments a{};
  a.p = problem_of(query, key, value, {}, {}, {}, {}, rel_h, rel_w, {}, {}, false, scale);
  const ScalarType dtype = query.scalar_type();
  const int64_t batch = query.size(0), heads = query.size(1), tokens = query.size(2), keys = key.size(2), width = value.size(3);
  check_size("key", key, 1, heads);
  a.old_key = rows_of_state("state.key", old_key, dtype, batch, heads, keys, query.size(3));
  a.old_value = rows_of_state("state.value", old_value, dtype, batch, heads, keys, width);
  a.out = rows_of_state("out", out, dtype, batch, heads, tokens, width);
  a.output = static_cast<float*>(rows_of_state("state.output", output, ScalarType::Float, batch, heads, tokens, width).data);
  a.maximum = statistic_of("state.maximum", maximum, a.p, batch);
  a.total = statistic_of("state.total", total, a.p, batch);
  a.peak = statistic_of("state.peak", peak, a.p, batch);
  STD_TORCH_CHECK(order.has_value() == fresh.has_value() && order.has_value() == cells.has_value(), "order, fresh and cells go together");
  if (order) {
    a.order = static_cast<int32_t*>(part_of_state("order", *order, ScalarType::Int, {batch, tokens}));
    a.fresh = static_cast<int32_t*>(part_of_state("fresh", *fresh, ScalarType::Int, {batch}));
    a.cells = ids_of("cells", *cells, batch);
    a.cells_sample = broadcast_stride(*cells, 0);
    a.changed = size_of("cells", cells->size(1));
  }
  a.guard = static_cast<float>(guard);
  with_float("query", query, [&](auto number) {
    using T = decltype(number);
    with_width(a.p, [&](auto head_width) {
      constexpr int kWidth = decltype(head_width)::value;
      if (a.p.rel == Kind::none) return launch_exact<ChangeShape<T, kWidth, false>>(query, a, batch * heads);
      launch_exact<ChangeShape<T, kWidth, true>>(query, a, batch * heads);
    });
  });
}

template <class Shape, bool Cast>
void launch_paper(const Tensor& on, PaperArguments a, int64_t heads) {
  a.blocks = (a.p.rows + Shape::kRows - 1) / Shape::kRows;
  launch(on, attention_paper<Shape, Cast>, a.blocks * heads, Shape::kThreads, sizeof(typename Shape::Team), a);
}

// without cells it is a first frame
void paper(Tensor out, Tensor query, Tensor key, Tensor value, OptionalTensor cells, OptionalTensor rel_h, OptionalTensor rel_w,
           double scale, Tensor output, Tensor old_value, Tensor probability) {
  PaperArguments a{};
  a.p = problem_of(query, key, value, {}, {}, {}, {}, rel_h, rel_w, {}, {}, false, scale);
  const ScalarType dtype = query.scalar_type(), stored = old_value.scalar_type();
  const int64_t batch = query.size(0), heads = query.size(1), tokens = query.size(2), keys = key.size(2), width = value.size(3);
  check_size("key", key, 1, heads);
  a.old_value = rows_of_state("state.value", old_value, stored, batch, heads, keys, width);
  a.out = rows_of_state("out", out, dtype, batch, heads, tokens, width);
  a.output = static_cast<float*>(rows_of_state("state.output", output, ScalarType::Float, batch, heads, tokens, width).data);
  a.probability = part_of_state("state.probability", probability, stored, {batch, heads, keys, tokens});
  if (cells) {
    a.cells = ids_of("cells", *cells, batch);
    a.cells_sample = broadcast_stride(*cells, 0);
    a.changed = size_of("cells", cells->size(1));
  }
  a.token = kind_of("query", query);
  a.stored = kind_of("state.value", old_value);
  with_width(a.p, [&](auto head_width) {
    // this mode is there for comparison: widths up to 96 have no kernel of their own
    constexpr int kWidth = decltype(head_width)::value == 96 ? 128 : decltype(head_width)::value;
    // what is stored in another type than the tokens' is computed in float32, with which all of them agree
    if (dtype != stored) return launch_paper<ChangeShape<float, kWidth, true>, true>(query, a, batch * heads);
    with_float("query", query,
               [&](auto number) { launch_paper<ChangeShape<decltype(number), kWidth, true>, false>(query, a, batch * heads); });
  });
}

// the listed cells of the state, which in mode "paper" has values only, of the type that it stores; and the next of so many turns
void replace(Tensor old_value, OptionalTensor old_key, OptionalTensor turn, Tensor key, Tensor value, Tensor cells, int64_t turns) {
  CellReplacement p{};
  check_rank("key", key, 4);
  check_rank("value", value, 4);
  const int64_t batch = key.size(0), heads = key.size(1), keys = key.size(2);
  const ScalarType dtype = key.scalar_type();
  p.key = grid_of("key", key, dtype, batch, heads, keys, key.size(3));
  p.value = grid_of("value", value, dtype, batch, heads, keys, value.size(3));
  p.aligned = is_aligned(key) && is_aligned(value);
  p.old_value = rows_of_state("state.value", old_value, old_value.scalar_type(), batch, heads, keys, value.size(3));
  if (old_key) p.old_key = rows_of_state("state.key", *old_key, dtype, batch, heads, keys, key.size(3));
  p.cells = ids_of("cells", cells, batch);
  p.cells_sample = broadcast_stride(cells, 0);
  p.samples = static_cast<int>(batch), p.heads = static_cast<int>(heads);
  p.keys = size_of("key", keys), p.slots = size_of("cells", cells.size(1));
  p.width = static_cast<int>(key.size(3)), p.value_width = static_cast<int>(value.size(3));
  for (int width : {p.width, p.value_width}) STD_TORCH_CHECK(width % 8 == 0 && width > 0, "head widths must be multiples of 8");
  if (turn) p.turn = static_cast<int32_t*>(part_of_state("turn", *turn, ScalarType::Int, {}));
  STD_TORCH_CHECK(turns > 0 && turns <= INT32_MAX, "there must be a turn");
  p.turns = static_cast<int>(turns);
  const int64_t pieces = batch * heads * p.slots * ((old_key ? p.width : 0) + p.value_width) / 8;
  // without a slot the turn goes on all the same
  const int64_t blocks = std::max<int64_t>(1, (pieces + kCellThreads - 1) / kCellThreads);
  with_float("key", key, [&](auto number) {
    with_float("state.value", old_value,
               [&](auto stored) { launch(key, replace_cells<decltype(number), decltype(stored)>, blocks, kCellThreads, 0, p); });
  });
}

}  // namespace

TOKENOPS_CUDA_OPERATORS(m) {
  m.impl("delta_matmul_cuda_order", TOKENOPS_CUDA_OPERATOR(order));
  m.impl("delta_matmul_cuda_exact", TOKENOPS_CUDA_OPERATOR(exact));
  m.impl("delta_matmul_cuda_paper", TOKENOPS_CUDA_OPERATOR(paper));
  m.impl("delta_matmul_cuda_replace", TOKENOPS_CUDA_OPERATOR(replace));
}

}  // namespace tokenops
