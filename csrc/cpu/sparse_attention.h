// What the tensor side (sparse_attention.cpp) and the loops (sparse_attention_isa.cpp, compiled once per instruction set) share.
// Pointers, sizes and strides only. Letters: H heads, D head width, K kept rows; strides count elements.
#pragma once

#include <stdint.h>

#include "storage.h"

namespace tokenops {

enum class Mask { none, boolean, f32, bf16, f16 };

// One list of grid rows: an index list without its empty slots, or a plain range.
struct RowList {
  const int32_t* row;   // [count] rows of the grid
  const int32_t* slot;  // [count] where each stands in the list as it was given: its row in a compact result
  const int32_t* rank;  // [count] what causal compares: the grid row, or the place within a packed sequence
  int64_t count;
  bool range;            // rows follow one another without a gap
  const int32_t* empty;  // [empties] slots that name no row
  int64_t empties;
  const int32_t* rest;  // [rests] grid rows that no list names and that this list's owner fills with zeros in a backward pass
  int64_t rests;
};

struct RowLists {
  const RowList* list;
  int64_t sequence, head;  // strides in lists, 0 = shared

  const RowList& at(int64_t s, int64_t h) const { return list[s * sequence + h * head]; }
};

struct Grid {
  void* data;
  int64_t sequence, head, row;  // the last dimension is dense; a packed grid has sequence = 0
};

struct SparseAttention {
  Storage storage;
  int64_t sequences, query_heads, kv_heads;
  int64_t width, value_width;  // D, Dv: multiples of 8
  RowLists queries, keys;
  Grid query, key, value;
  float scale;
  bool causal;

  const float* bias;  // [sequence, kv head, M] or null
  int64_t bias_sequence, bias_head, bias_row;
  Mask mask;  // [sequence, query head, N, M]
  const void* mask_data;
  int64_t mask_sequence, mask_head, mask_row, mask_column;
  Storage rel_storage;
  Grid rel_h, rel_w;  // [sequence, query head, N, gh | gw], or null: a key of rank r lies in row r / gw and column r % gw
  int64_t rel_height, rel_width;

  // results, and in a backward pass inputs. Statistics are [sequence, query head, slot] with a dense last dimension.
  Grid out;
  bool past_caches;  // the results exceed the caches: stream them
  bool out_by_row;   // out is a grid and a result goes to its query's row, not to its slot
  float* lse;
  float* row_sq;  // or null
  int64_t stat_sequence, stat_head;

  // backward only; data is null where no gradient is wanted
  Grid grad_out, grad_query, grad_key, grad_value, grad_rel_h, grad_rel_w;
  float* grad_bias;  // [sequence, kv head, M] dense, or null
  int64_t grad_bias_sequence, grad_bias_head;
  // [part, slot rows, part_row] partial sums of what each query gets where the keys of a head are split, else null: D numbers for
  // grad_query, then gh and gw for rel_pos if its gradient is wanted
  float* grad_query_parts;
  int64_t part_stride, part_sequence, part_head, part_row;

  int64_t group() const { return query_heads / kv_heads; }
  bool wants_rel() const { return grad_rel_h.data || grad_rel_w.data; }
};

// The loops of one instruction set. A head is a (sequence, kv head) with the query heads that share it; its query blocks are
// counted through the group. Every function only writes what belongs to the block, head or key range it was given.
struct SparseAttentionLoops {
  int64_t (*query_blocks)(int64_t queries);                          // blocks of one query head
  int64_t (*forward_scratch)(const SparseAttention&, int64_t keys);  // bytes, for heads of up to that many keys
  // packed: scratch still holds the keys of this head from the call before
  void (*forward)(const SparseAttention&, int64_t sequence, int64_t kv_head, int64_t first_block, int64_t last_block, bool packed,
                  char* scratch);
  bool (*is_short)(const SparseAttention&, int64_t queries, int64_t keys);  // heads of up to that many may take the short path:
  void (*forward_short)(const SparseAttention&, int64_t first_head, int64_t last_head, char* scratch);  // all query heads in a row
  int64_t (*backward_scratch)(const SparseAttention&, int64_t keys);
  void (*backward)(const SparseAttention&, int64_t sequence, int64_t kv_head, int64_t part, int64_t first_key, int64_t last_key,
                   char* scratch);
  void (*sum_query_parts)(const SparseAttention&, int64_t sequence, int64_t query_head, int64_t parts);
};

}  // namespace tokenops
