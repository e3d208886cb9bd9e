// The tensor side of sparse_attention on the CPU: tensors -> pointers -> pieces of work -> the loops of one instruction set.
#include "sparse_attention.h"

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "call.h"
#include "grid.h"
#include "isa.h"
#include "row_lists.h"
#include "threads.h"

namespace tokenops {

namespace {

Mask mask_of(const Tensor& t) {
  if (t.scalar_type() == ScalarType::Bool) return Mask::boolean;
  switch (storage_of("attn_mask", t)) {
    case Storage::f32: return Mask::f32;
    case Storage::bf16: return Mask::bf16;
    case Storage::f16: return Mask::f16;
  }
  return Mask::none;
}

// one call: the problem as the loops see it, and what its pointers point into
struct Call {
  SparseAttention p{};
  RowListTable queries, keys;
  int64_t batch, slots;
  bool packed, on_grid = true;  // there is a cell of rel_pos for each key

  Call(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& q_index, const OptionalTensor& kv_index,
       const OptionalTensor& kv_bias, const OptionalTensor& attn_mask, const OptionalTensor& rel_h, const OptionalTensor& rel_w,
       const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k, bool causal, double scale, bool unique_queries,
       bool unique_keys)
      : queries("q_index", q_index, cu_seqlens_q, rows_of("query", query), query.size(0), query.size(1), unique_queries),
        keys("kv_index", kv_index, cu_seqlens_k, rows_of("key", key), query.size(0), key.size(1), unique_keys),
        batch(query.size(0)),
        slots(q_index ? q_index->size(2) : query.size(2)),
        packed(cu_seqlens_q.has_value()) {
    const ScalarType dtype = query.scalar_type();
    STD_TORCH_CHECK(packed == cu_seqlens_k.has_value(), "cu_seqlens_q and cu_seqlens_k must be given together");
    STD_TORCH_CHECK(!packed || batch == 1, "packed sequences must have a batch of 1");
    STD_TORCH_CHECK(!packed || cu_seqlens_q->size(0) == cu_seqlens_k->size(0), "cu_seqlens_q and cu_seqlens_k must have the same length");
    p.storage = storage_of("query", query);
    p.sequences = packed ? queries.sequences() : batch;
    p.query_heads = query.size(1);
    p.kv_heads = key.size(1);
    check_rank("value", value, 4);
    p.width = query.size(3);
    p.value_width = value.size(3);
    check_heads(p.query_heads, p.kv_heads);
    check_widths(p);
    p.queries = queries.lists();
    p.keys = keys.lists();
    p.query = grid_of("query", query, dtype, batch, p.query_heads, query.size(2), p.width);
    p.key = grid_of("key", key, dtype, batch, p.kv_heads, key.size(2), p.width);
    p.value = grid_of("value", value, dtype, batch, p.kv_heads, key.size(2), p.value_width);
    p.scale = static_cast<float>(scale);
    p.causal = causal;
    if (kv_bias) {
      check_bias(*kv_bias, batch, p.kv_heads, key.size(2));
      p.bias = kv_bias->const_data_ptr<float>();
      p.bias_sequence = broadcast_stride(*kv_bias, 0);
      p.bias_head = broadcast_stride(*kv_bias, 1);
      p.bias_row = kv_bias->stride(2);
    }
    if (attn_mask) {
      check_mask(*attn_mask, batch, p.query_heads, query.size(2), key.size(2));
      p.mask = mask_of(*attn_mask);
      p.mask_data = attn_mask->const_data_ptr();
      p.mask_sequence = broadcast_stride(*attn_mask, 0);
      p.mask_head = broadcast_stride(*attn_mask, 1);
      p.mask_row = broadcast_stride(*attn_mask, 2);
      p.mask_column = broadcast_stride(*attn_mask, 3);
    }
    set_rel_pos(p, rel_h, rel_w, batch, query.size(2), key.size(2), packed);
    on_grid = !rel_h || !packed || keys.longest_span() <= p.rel_height * p.rel_width;
  }

  bool valid() const { return queries.valid() && keys.valid() && on_grid; }

  // of `width` elements for each listed query
  int64_t result_bytes(int64_t width) const {
    int64_t rows = 0;
    for (int64_t s = 0; s < p.sequences; ++s)
      for (int64_t h = 0; h < p.query_heads; ++h) rows += p.queries.at(s, h).count;
    return rows * width * bytes_of(p.storage);
  }

  void set_statistics(const Tensor& lse, const OptionalTensor& row_sq) {
    check_statistic("lse", lse, batch, p.query_heads, slots);
    check_dense_rows("lse", lse);
    p.lse = const_cast<float*>(lse.const_data_ptr<float>());
    p.stat_sequence = broadcast_stride(lse, 0);
    p.stat_head = lse.stride(1);
    if (!row_sq) return;
    check_statistic("row_sq", *row_sq, batch, p.query_heads, slots);
    check_contiguous("row_sq", *row_sq);
    check_contiguous("lse", lse);
    p.row_sq = row_sq->mutable_data_ptr<float>();
  }

 private:
  static int64_t rows_of(const char* name, const Tensor& t) {
    check_rank(name, t, 4);
    STD_TORCH_CHECK(t.size(2) < INT32_MAX, name, " must have fewer than 2^31 - 1 rows");
    return t.size(2);
  }
};

int64_t forward(Tensor out, Tensor lse, OptionalTensor row_sq, Tensor query, Tensor key, Tensor value, OptionalTensor q_index,
                OptionalTensor kv_index, OptionalTensor kv_bias, OptionalTensor attn_mask, OptionalTensor rel_h, OptionalTensor rel_w,
                OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, bool is_causal, double scale, bool by_row, std::string isa) {
  const SparseAttentionLoops& loops = loops_of<SparseAttentionLoops>(isa);
  Call call(query, key, value, q_index, kv_index, kv_bias, attn_mask, rel_h, rel_w, cu_seqlens_q, cu_seqlens_k, is_causal, scale, by_row,
            false);
  if (!call.valid()) return kBadContents;
  SparseAttention& p = call.p;
  call.set_statistics(lse, row_sq);
  p.out = grid_of("out", out, query.scalar_type(), call.batch, p.query_heads, by_row ? query.size(2) : call.slots, p.value_width);
  p.out_by_row = by_row;
  p.past_caches = call.result_bytes(p.value_width) > kCaches;

  const int64_t scratch_bytes = loops.forward_scratch(p, call.keys.longest());
  if (loops.is_short(p, call.queries.longest(), call.keys.longest())) {
    const int64_t heads = p.sequences * p.query_heads,
                  pieces = std::min<int64_t>(heads, kPiecesPerThread * torch::stable::get_num_threads());
    const bool done = run_parallel(pieces, scratch_bytes, [&](int64_t i, Lease& lease) {
      loops.forward_short(p, heads * i / pieces, heads * (i + 1) / pieces, lease.memory);
    });
    return done ? kOk : kNoMemory;
  }

  // a thread that goes on with the same head keeps its packed keys
  BlockRow heads;
  for (int64_t s = 0; s < p.sequences; ++s)
    for (int64_t h = 0; h < p.kv_heads; ++h) {
      int64_t blocks = 0;
      for (int64_t g = 0; g < p.group(); ++g) blocks += loops.query_blocks(p.queries.at(s, h * p.group() + g).count);
      heads.add(blocks, p.keys.at(s, h).count + 16);
    }
  const int64_t pieces = std::min<int64_t>(kPiecesPerThread * torch::stable::get_num_threads(), heads.work());
  const bool done = run_parallel(pieces, scratch_bytes, [&](int64_t piece, Lease& lease) {
    heads.for_piece(piece, pieces, [&](int64_t i, int64_t from, int64_t to) {
      loops.forward(p, i / p.kv_heads, i % p.kv_heads, from, to, lease.holds == i, lease.memory);
      lease.holds = i;
    });
  });
  return done ? kOk : kNoMemory;
}

int64_t backward(OptionalTensor grad_query, OptionalTensor grad_key, OptionalTensor grad_value, OptionalTensor grad_bias,
                 OptionalTensor grad_rel_h, OptionalTensor grad_rel_w, Tensor grad_out, Tensor out, Tensor lse, Tensor query, Tensor key,
                 Tensor value, OptionalTensor q_index, OptionalTensor kv_index, OptionalTensor kv_bias, OptionalTensor attn_mask,
                 OptionalTensor rel_h, OptionalTensor rel_w, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, bool is_causal,
                 double scale, std::string isa) {
  const SparseAttentionLoops& loops = loops_of<SparseAttentionLoops>(isa);
  Call call(query, key, value, q_index, kv_index, kv_bias, attn_mask, rel_h, rel_w, cu_seqlens_q, cu_seqlens_k, is_causal, scale, true,
            true);
  if (!call.valid()) return kBadContents;
  SparseAttention& p = call.p;
  const ScalarType dtype = query.scalar_type();
  const int64_t rows = query.size(2), columns = key.size(2);
  call.set_statistics(lse, std::nullopt);
  p.out = grid_of("out", out, dtype, call.batch, p.query_heads, call.slots, p.value_width);
  p.past_caches = call.result_bytes(p.width) > kCaches;
  p.grad_out = grid_of("grad_out", grad_out, dtype, call.batch, p.query_heads, call.slots, p.value_width);
  if (grad_query) p.grad_query = grid_of("grad_query", *grad_query, dtype, call.batch, p.query_heads, rows, p.width);
  if (grad_key) p.grad_key = grid_of("grad_key", *grad_key, dtype, call.batch, p.kv_heads, columns, p.width);
  if (grad_value) p.grad_value = grid_of("grad_value", *grad_value, dtype, call.batch, p.kv_heads, columns, p.value_width);
  if (grad_bias) {
    check_rank("grad_bias", *grad_bias, 3);
    check_dtype("grad_bias", *grad_bias, ScalarType::Float);
    check_size("grad_bias", *grad_bias, 0, call.batch);
    check_size("grad_bias", *grad_bias, 1, p.kv_heads);
    check_size("grad_bias", *grad_bias, 2, columns);
    check_dense_rows("grad_bias", *grad_bias);
    p.grad_bias = grad_bias->mutable_data_ptr<float>();
    p.grad_bias_sequence = broadcast_stride(*grad_bias, 0);
    p.grad_bias_head = grad_bias->stride(1);
  }
  STD_TORCH_CHECK(rel_h || !(grad_rel_h || grad_rel_w), "a gradient of rel_pos needs rel_h and rel_w");
  if (grad_rel_h) p.grad_rel_h = grid_of("grad_rel_h", *grad_rel_h, rel_h->scalar_type(), call.batch, p.query_heads, rows, p.rel_height);
  if (grad_rel_w) p.grad_rel_w = grid_of("grad_rel_w", *grad_rel_w, rel_h->scalar_type(), call.batch, p.query_heads, rows, p.rel_width);

  // A part is a range of keys of one head: it alone adds to their gradients. Few heads are cut into several parts, whose shares
  // of the queries' gradients are then added up in order. The cut follows from the shapes, so the bits do not depend on threads.
  struct Part {
    int64_t sequence, kv_head, part, first, last, cost;
  };
  constexpr int64_t kEnoughHeads = 32, kSmallestPart = 128;
  const int64_t heads = p.sequences * p.kv_heads;
  const auto parts_of = [&](int64_t s, int64_t h) {
    const int64_t count = p.keys.at(s, h).count;
    return std::max<int64_t>(1, std::min((kEnoughHeads + heads - 1) / std::max<int64_t>(heads, 1), count / kSmallestPart));
  };
  std::vector<Part> parts;
  int64_t most_parts = 1, most_keys = 0;
  for (int64_t s = 0; s < p.sequences; ++s)
    for (int64_t h = 0; h < p.kv_heads; ++h) {
      const int64_t n = parts_of(s, h), count = p.keys.at(s, h).count;
      int64_t queries = 0;
      for (int64_t g = 0; g < p.group(); ++g) queries += p.queries.at(s, h * p.group() + g).count;
      most_parts = std::max(most_parts, n);
      for (int64_t i = 0; i < n; ++i) {
        parts.push_back({s, h, i, count * i / n, count * (i + 1) / n, (count / n + 1) * (queries + 1)});
        most_keys = std::max(most_keys, parts.back().last - parts.back().first);
      }
    }
  std::stable_sort(parts.begin(), parts.end(), [](const Part& a, const Part& b) { return a.cost > b.cost; });
  std::optional<Workspace> shares;
  if (most_parts > 1 && (p.grad_query.data || p.wants_rel())) {
    p.part_row = p.width + (p.wants_rel() ? p.rel_height + p.rel_width : 0);
    p.part_head = call.slots * p.part_row;
    p.part_sequence = call.packed ? 0 : p.part_head * p.query_heads;
    p.part_stride = p.part_head * p.query_heads * call.batch;
    // not zeroed: only what a part wrote is read
    p.grad_query_parts = shares.emplace(p.part_stride * most_parts * sizeof(float)).floats();
    if (!p.grad_query_parts) return kNoMemory;
  }
  bool done = run_parallel(parts.size(), loops.backward_scratch(p, most_keys), [&](int64_t i, Lease& lease) {
    const Part& part = parts[i];
    loops.backward(p, part.sequence, part.kv_head, part.part, part.first, part.last, lease.memory);
  });
  if (p.grad_query_parts)
    done &= run_parallel(p.sequences * p.query_heads, 0, [&](int64_t i, Lease&) {
      const int64_t s = i / p.query_heads, h = i % p.query_heads;
      loops.sum_query_parts(p, s, h, parts_of(s, h / p.group()));
    });
  return done ? kOk : kNoMemory;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tokenops, CPU, m) {
  m.impl("sparse_attention_cpu_forward", TORCH_BOX(&forward));
  m.impl("sparse_attention_cpu_backward", TORCH_BOX(&backward));
}

}  // namespace tokenops
