// Attention over gathered rows, compiled once per instruction set: the loops of the three passes, as a table.
#include "sparse_attention.h"

#include "sparse_attention_backward.h"
#include "sparse_attention_forward.h"
#include "sparse_attention_short.h"
#include "storage_types.h"

namespace tokenops {
namespace TOKENOPS_ISA {
namespace {

template <class T, class Dot>
int64_t forward_bytes(const SparseAttention& p, int64_t keys) {
  Arena arena{nullptr};
  ForwardKeys<Dot>(arena, p, keys);
  ForwardBlock<T, Dot, kTileVectors>(arena, p);
  ShortHead<T, Dot, kTileVectors>(arena, p);
  return arena.used;
}

int64_t forward_scratch(const SparseAttention& p, int64_t keys) {
  return with_types(p.storage, [&]<class T, class Dot>(Types<T, Dot>) { return forward_bytes<T, Dot>(p, keys); });
}
void forward(const SparseAttention& p, int64_t s, int64_t h, int64_t first, int64_t last, bool packed, char* scratch) {
  with_types(p.storage, [&]<class T, class Dot>(Types<T, Dot>) { forward_head<T, Dot>(p, s, h, first, last, packed, scratch); });
}
void forward_short(const SparseAttention& p, int64_t first, int64_t last, char* scratch) {
  with_types(p.storage, [&]<class T, class Dot>(Types<T, Dot>) { forward_short_heads<T, Dot>(p, first, last, scratch); });
}
int64_t backward_scratch(const SparseAttention& p, int64_t keys) {
  return with_types(p.storage, [&]<class T, class Dot>(Types<T, Dot>) { return backward_bytes<T, Dot>(p, keys); });
}
void backward(const SparseAttention& p, int64_t s, int64_t h, int64_t part, int64_t first_key, int64_t last_key, char* scratch) {
  with_types(p.storage, [&]<class T, class Dot>(Types<T, Dot>) { backward_head<T, Dot>(p, s, h, part, first_key, last_key, scratch); });
}
void sum_parts(const SparseAttention& p, int64_t s, int64_t h, int64_t parts) {
  with_types(p.storage, [&]<class T, class Dot>(Types<T, Dot>) { sum_query_parts<T>(p, s, h, parts); });
}

}  // namespace

template <>
const SparseAttentionLoops& loops() {
  static constexpr SparseAttentionLoops table{query_blocks,  forward_scratch,  forward,  is_short,
                                              forward_short, backward_scratch, backward, sum_parts};
  return table;
}

}  // namespace TOKENOPS_ISA
}  // namespace tokenops
