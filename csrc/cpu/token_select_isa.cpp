// Choosing, halting and gathering tokens, compiled once per instruction set: the loops, as a table.
#include "storage_types.h"
#include "token_select.h"
#include "token_select_best.h"
#include "token_select_halt.h"

namespace tokenops {
namespace TOKENOPS_ISA {
namespace {

int64_t select(const Scores& p, int32_t* index, char* scratch) {
  return with_types(p.storage, [&]<class T, class Dot>(Types<T, Dot>) { return select_best<T>(p, index, scratch); });
}
void halt(const HaltStep& p, int64_t first, int64_t last) {
  with_types(p.gate.storage, [&]<class T, class Dot>(Types<T, Dot>) { halt_rows<T>(p, first, last); });
}
void halt_backward(const HaltBackward& p, int64_t first, int64_t last) {
  with_types(p.gate.storage, [&]<class T, class Dot>(Types<T, Dot>) { halt_backward_rows<T>(p, first, last); });
}

// rows of one number: a call of memcpy each would cost more than they do
template <class Number>
void gather_numbers(const RowGather& p, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) {
    Number number{};
    if (p.source[i] >= 0) memcpy(&number, p.from + p.source[i], sizeof(Number));
    memcpy(p.to + i * sizeof(Number), &number, sizeof(Number));
  }
}

void gather(const RowGather& p, int64_t first, int64_t last) {
  switch (p.row_bytes) {
    case 1: return gather_numbers<uint8_t>(p, first, last);
    case 2: return gather_numbers<uint16_t>(p, first, last);
    case 4: return gather_numbers<uint32_t>(p, first, last);
    case 8: return gather_numbers<uint64_t>(p, first, last);
  }
  constexpr int64_t kStep = kLanes * sizeof(float);
  for (int64_t i = first; i < last; ++i) {
    char* to = p.to + i * p.row_bytes;
    const char* from = p.source[i] < 0 ? nullptr : p.from + p.source[i];
    int64_t b = 0;
    if (p.past_caches)
      for (; b + kStep <= p.row_bytes; b += kStep)
        stream<kLanes>((float*)(to + b), from ? load_bits<VecF<kLanes>>(from + b) : VecF<kLanes>{});
    if (from)
      memcpy(to + b, from + b, p.row_bytes - b);
    else
      memset(to + b, 0, p.row_bytes - b);
  }
  stream_fence();
}

}  // namespace

template <>
const TokenSelectLoops& loops() {
  static constexpr TokenSelectLoops table{select_scratch, select, halt, halt_backward, gather};
  return table;
}

}  // namespace TOKENOPS_ISA
}  // namespace tokenops
