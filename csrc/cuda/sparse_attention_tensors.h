// From tensors to the problem that the attention kernels see, checked.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../sparse_attention_tensors.h"
#include "launch.h"
#include "sparse_attention.cuh"

namespace tokenops {
namespace {

Kind kind_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Kind::f32;
    case ScalarType::BFloat16: return Kind::bf16;
    case ScalarType::Half: return Kind::f16;
    default: STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16"); return Kind::none;
  }
}

int size_of(const char* name, int64_t size) {
  // slots are counted in int, and a block may begin behind the last one
  STD_TORCH_CHECK(size < INT32_MAX - 1024, name, " must be smaller than 2^31 - 1024, got ", size);
  return static_cast<int>(size);
}

Grid grid_of(const char* name, const Tensor& t, ScalarType dtype, int64_t batch, int64_t heads, int64_t rows, int64_t width) {
  check_grid(name, t, dtype, batch, heads, rows, width);
  const int64_t apart = broadcast_stride(t, 2);
  STD_TORCH_CHECK(apart <= INT32_MAX / static_cast<int64_t>(t.element_size()), name, " has rows of one head more than 2 GiB apart");
  return {const_cast<void*>(t.const_data_ptr()), broadcast_stride(t, 0), broadcast_stride(t, 1), apart};
}

// Whether every row of a grid begins at a multiple of 16 bytes.
bool is_aligned(const Tensor& t) {
  bool aligned = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int dim = 0; dim < 3; ++dim) aligned &= broadcast_stride(t, dim) * t.element_size() % 16 == 0;
  return aligned;
}

Lists lists_of(const char* name, const OptionalTensor& index, int64_t batch, int64_t heads) {
  if (!index) return {};
  check_index(name, *index, batch, heads);
  return {index->const_data_ptr<int32_t>(), broadcast_stride(*index, 0), broadcast_stride(*index, 1), index->stride(2)};
}

float* statistic_of(const char* name, const Tensor& t, const AttentionProblem& p, int64_t batch) {
  check_statistic(name, t, batch, p.heads, p.query_slots);
  check_contiguous(name, t);
  return const_cast<float*>(t.const_data_ptr<float>());
}

AttentionProblem problem_of(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& q_index,
                            const OptionalTensor& kv_index, const OptionalTensor& kv_bias, const OptionalTensor& attn_mask,
                            const OptionalTensor& rel_h, const OptionalTensor& rel_w, const OptionalTensor& cu_seqlens_q,
                            const OptionalTensor& cu_seqlens_k, bool causal, double scale) {
  AttentionProblem p{};
  check_rank("query", query, 4);
  check_rank("key", key, 4);
  check_rank("value", value, 4);
  const int64_t batch = query.size(0), heads = query.size(1), kv_heads = key.size(1);
  const ScalarType dtype = query.scalar_type();
  check_heads(heads, kv_heads);
  check_widths({query.size(3), value.size(3)}, 128);
  p.rows = size_of("query", query.size(2));
  p.keys = size_of("key", key.size(2));
  p.heads = static_cast<int>(heads);
  p.group = static_cast<int>(heads / kv_heads);
  p.width = static_cast<int>(query.size(3));
  p.value_width = static_cast<int>(value.size(3));
  p.query = grid_of("query", query, dtype, batch, heads, p.rows, p.width);
  p.key = grid_of("key", key, dtype, batch, kv_heads, p.keys, p.width);
  p.value = grid_of("value", value, dtype, batch, kv_heads, p.keys, p.value_width);
  p.aligned = is_aligned(query) && is_aligned(key) && is_aligned(value);
  p.q_index = lists_of("q_index", q_index, batch, heads);
  p.kv_index = lists_of("kv_index", kv_index, batch, kv_heads);
  p.query_slots = q_index ? size_of("q_index", q_index->size(2)) : p.rows;
  p.key_slots = kv_index ? size_of("kv_index", kv_index->size(2)) : p.keys;
  p.scale = static_cast<float>(scale) * kLog2e;
  p.causal = causal;
  if (kv_bias) {
    check_bias(*kv_bias, batch, kv_heads, p.keys);
    p.bias = kv_bias->const_data_ptr<float>();
    p.bias_batch = broadcast_stride(*kv_bias, 0);
    p.bias_head = broadcast_stride(*kv_bias, 1);
    p.bias_row = kv_bias->stride(2);
  }
  if (attn_mask) {
    check_mask(*attn_mask, batch, heads, p.rows, p.keys);
    p.mask = attn_mask->scalar_type() == ScalarType::Bool ? Kind::boolean : kind_of("attn_mask", *attn_mask);
    p.mask_data = attn_mask->const_data_ptr();
    p.mask_batch = broadcast_stride(*attn_mask, 0);
    p.mask_head = broadcast_stride(*attn_mask, 1);
    p.mask_row = broadcast_stride(*attn_mask, 2);
    p.mask_column = broadcast_stride(*attn_mask, 3);
  }
  check_rel_pos(rel_h, rel_w, batch, heads, p.rows, p.keys, cu_seqlens_q.has_value());
  if (rel_h) {
    p.rel = kind_of("rel_h", *rel_h);
    p.rel_height = static_cast<int>(rel_h->size(3));
    p.rel_width = static_cast<int>(rel_w->size(3));
    p.rel_h = grid_of("rel_h", *rel_h, rel_h->scalar_type(), batch, heads, p.rows, p.rel_height);
    p.rel_w = grid_of("rel_w", *rel_w, rel_h->scalar_type(), batch, heads, p.rows, p.rel_width);
  }
  STD_TORCH_CHECK(cu_seqlens_q.has_value() == cu_seqlens_k.has_value(), "cu_seqlens_q and cu_seqlens_k must be given together");
  if (cu_seqlens_q) {
    STD_TORCH_CHECK(batch == 1, "packed sequences must have a batch of 1");
    for (const auto& [name, t] : {std::pair("cu_seqlens_q", &*cu_seqlens_q), std::pair("cu_seqlens_k", &*cu_seqlens_k)}) {
      check_rank(name, *t, 1);
      check_dtype(name, *t, ScalarType::Int);
      STD_TORCH_CHECK(t->size(0) > 0 && t->is_contiguous(), name, " must be contiguous and not empty");
      check_size(name, *t, 0, cu_seqlens_q->size(0));
    }
    p.sequences = size_of("cu_seqlens_q", cu_seqlens_q->size(0)) - 1;
    p.cu_seqlens_q = cu_seqlens_q->const_data_ptr<int32_t>();
    p.cu_seqlens_k = cu_seqlens_k->const_data_ptr<int32_t>();
  }
  return p;
}

// Calls f with the padded head width as a constant. Both heads are padded alike: widths that differ much are rare.
template <class F>
void with_width(const AttentionProblem& p, F&& f) {
  const int width = std::max(p.width, p.value_width);
  if (width <= 32) return f(std::integral_constant<int, 32>{});
  if (width <= 64) return f(std::integral_constant<int, 64>{});
  if (width <= 96) return f(std::integral_constant<int, 96>{});
  f(std::integral_constant<int, 128>{});
}

}  // namespace
}  // namespace tokenops
