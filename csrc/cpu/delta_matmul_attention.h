// What the tensor side (delta_matmul_attention.cpp) and the loops (delta_matmul_attention_isa.cpp) of delta_attention share.
#pragma once

#include "sparse_attention.h"

namespace tokenops {

// One sample's lists. A RowList's rank is the cell of a key on the grid of cells, for rel_pos.
struct DeltaLists {
  RowList rows;   // every token
  RowList kept;   // exact: tokens whose sums go on
  RowList cells;  // changed keys; every key in a first frame
  RowList every;  // every key
};

struct DeltaAttention {
  SparseAttention grids;  // query, key, value, out, rel_pos and scale; there is a key head for every query head
  int64_t tokens, cells;
  bool first;               // nothing is known of the state
  const DeltaLists* lists;  // [sample]

  // the state: dense, [sample, head, ...], [cell, width] and the like
  float* output;   // [token, Dv]
  float* maximum;  // [token], as are the next two
  float* total;
  float* peak;
  void *old_key, *old_value;  // [cell, D] and [cell, Dv]; of the storage of the keys, of `stored`
  void* probability;          // paper: [cell, token] of `stored`
  Storage stored;

  float guard;
  uint8_t* again;  // [sample, head, token]: the sums of a kept row came out unsound

  int64_t head(int64_t s, int64_t h) const { return s * grids.query_heads + h; }
};

// The loops of one instruction set. A block is 1 to 3 vectors of tokens; blocks of a list are counted from 0.
struct DeltaAttentionLoops {
  int64_t (*blocks)(int64_t rows);
  // bytes of scratch memory that any of the passes needs, for up to that many keys at a time
  int64_t (*scratch)(const DeltaAttention&, int64_t keys);
  // packed: scratch still holds the keys of this head from the call before
  // exact: blocks of kept rows let the changed keys go and come
  void (*advance)(const DeltaAttention&, int64_t s, int64_t h, int64_t first_block, int64_t last_block, bool packed, char* scratch);
  // exact: blocks of these rows are computed from all keys
  void (*afresh)(const DeltaAttention&, int64_t s, int64_t h, const RowList& rows, int64_t first_block, int64_t last_block, bool packed,
                 char* scratch);
  // paper: blocks of all rows
  void (*publish)(const DeltaAttention&, int64_t s, int64_t h, int64_t first_block, int64_t last_block, bool packed, char* scratch);
  // the changed keys and values of a head go into the state; the passes above must be done with it
  void (*remember)(const DeltaAttention&, int64_t s, int64_t h);
};

}  // namespace tokenops
