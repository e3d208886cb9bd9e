// Attention over gathered rows, compiled once per instruction set: the loops of the three passes, as a table.
#include "sparse_attention.h"

#include "sparse_attention_backward.h"
#include "sparse_attention_forward.h"
#include "sparse_attention_short.h"

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

// which storage type runs on which dot product

#if defined(__AVX512BF16__)
typedef Bf16Dot DotOfBf16;
#else
typedef FloatDot DotOfBf16;
#endif

template <class T, class Dot>
struct Types {};
template <class F>
auto with_types(Storage storage, F&& f) {
  switch (storage) {
    case Storage::bf16: return f(Types<bf16, DotOfBf16>{});
    case Storage::f16: return f(Types<f16, FloatDot>{});
    case Storage::f32: break;
  }
  return f(Types<float, FloatDot>{});
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

const SparseAttentionLoops& sparse_attention() {
  static constexpr SparseAttentionLoops loops{query_blocks,  forward_scratch,  forward,  is_short,
                                              forward_short, backward_scratch, backward, sum_parts};
  return loops;
}

}  // namespace TOKENOPS_ISA
}  // namespace tokenops
