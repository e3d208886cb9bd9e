// Work on changed tokens, compiled once per instruction set: the loops, as a table.
#include "delta_matmul.h"

#include "delta_matmul_gate.h"
#include "delta_matmul_linear.h"
#include "storage_types.h"

namespace tokenops {
namespace TOKENOPS_ISA {
namespace {

void gate(const Gate& p, const GateSample& s, int64_t first, int64_t last, char* scratch) {
  with_types(p.storage, [&]<class T, class Dot>(Types<T, Dot>) { gate_tokens<T>(p, s, first, last, (float*)(void*)scratch); });
}
void gate_chosen(const Gate& p, const GateSample& s, bool renew, int64_t first, int64_t last, char* scratch) {
  with_types(p.storage, [&]<class T, class Dot>(Types<T, Dot>) { gate_slots<T>(p, s, renew, first, last, (float*)(void*)scratch); });
}
void gate_backward(const GateBackward& p, const GateBackwardSample& s, int64_t first, int64_t last, float* sums, char* scratch) {
  with_types(p.storage, [&]<class T, class Dot>(Types<T, Dot>) { gate_backward_rows<T>(p, s, first, last, sums, (float*)(void*)scratch); });
}

int64_t packed_bytes(Storage storage, int64_t rows, int64_t width) {
  return with_types(storage, [&]<class T, class Dot>(Types<T, Dot>) {
    return vectors_of(rows) * kLanes * scalars_of<Dot>(width) * (int64_t)sizeof(typename Dot::Scalar);
  });
}
void pack(const PackedRows& p, int64_t panel) {
  with_types(p.storage, [&]<class T, class Dot>(Types<T, Dot>) { pack_panel<Dot, T>(p, panel); });
}
int64_t layer_scratch(Storage storage) {
  return with_types(storage, [&]<class T, class Dot>(Types<T, Dot>) { return LayerScratch<Dot>(nullptr).bytes; });
}
void layer(const Layer& p, int64_t first_panel, int64_t last_panel, int64_t first, int64_t last, char* scratch) {
  with_types(p.storage,
             [&]<class T, class Dot>(Types<T, Dot>) { layer_outputs<Dot, T>(p, first_panel, last_panel, first, last, scratch); });
}

void copy(const RowCopy& p, int64_t first, int64_t last) {
  constexpr int64_t kStep = kLanes * sizeof(float);
  for (int64_t i = first; i < last; ++i) {
    char* to = p.to[i];
    const char* from = p.from[i];
    int64_t b = 0;
    if (p.past_caches)
      for (; b + kStep <= p.row_bytes; b += kStep)
        stream<kLanes>((float*)(void*)(to + b), from ? load_bits<VecF<kLanes>>(from + b) : VecF<kLanes>{});
    if (from)
      memcpy(to + b, from + b, p.row_bytes - b);
    else
      memset(to + b, 0, p.row_bytes - b);
  }
  stream_fence();
}

}  // namespace

template <>
const DeltaMatmulLoops& loops() {
  static constexpr DeltaMatmulLoops table{gate_scratch, gate,   gate_chosen,   gate_backward, packed_bytes, panels,
                                          pack,         kLanes, kPanelsAtOnce, layer_scratch, layer,        copy};
  return table;
}

}  // namespace TOKENOPS_ISA
}  // namespace tokenops
