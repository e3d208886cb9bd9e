// Attention by what changed, compiled once per instruction set: the loops of its passes, as a table.
#include "delta_matmul_attention.h"

#include "delta_matmul_exact.h"
#include "delta_matmul_paper.h"
#include "storage_types.h"

namespace tokenops {
namespace TOKENOPS_ISA {
namespace {

int64_t scratch_bytes(const DeltaAttention& p, int64_t keys) {
  return with_types(p.grids.storage, [&]<class T, class Dot>(Types<T, Dot>) {
    return p.probability ? paper_bytes<T, Dot>(p, keys) : exact_bytes<T, Dot>(p, keys);
  });
}
void advance(const DeltaAttention& p, int64_t s, int64_t h, int64_t first, int64_t last, bool packed, char* scratch) {
  with_types(p.grids.storage, [&]<class T, class Dot>(Types<T, Dot>) { advance_rows<T, Dot>(p, s, h, first, last, packed, scratch); });
}
void afresh(const DeltaAttention& p, int64_t s, int64_t h, const RowList& rows, int64_t first, int64_t last, bool packed, char* scratch) {
  with_types(p.grids.storage, [&]<class T, class Dot>(Types<T, Dot>) { afresh_rows<T, Dot>(p, s, h, rows, first, last, packed, scratch); });
}
void publish(const DeltaAttention& p, int64_t s, int64_t h, int64_t first, int64_t last, bool packed, char* scratch) {
  with_types(p.grids.storage, [&]<class T, class Dot>(Types<T, Dot>) { publish_rows<T, Dot>(p, s, h, first, last, packed, scratch); });
}

void remember(const DeltaAttention& p, int64_t s, int64_t h) {
  const SparseAttention& grids = p.grids;
  const RowList& cells = p.lists[s].cells;
  const int64_t base = p.head(s, h) * p.cells;
  with_types(grids.storage, [&]<class T, class Dot>(Types<T, Dot>) {
    const Rows<T> keys = rows_of<T>(grids.key, s, h, cells.row, cells.count),
                  values = rows_of<T>(grids.value, s, h, cells.row, cells.count);
    for (int64_t j = 0; j < cells.count; ++j) {
      const int64_t row = base + cells.row[j];
      if (p.old_key) memcpy((T*)p.old_key + row * grids.width, keys.at(j), grids.width * sizeof(T));
      float value[256];
      to_floats(grids.storage, values.at(j), value, grids.value_width);
      from_floats(p.stored, value, element(p.old_value, p.stored, row * grids.value_width), grids.value_width);
    }
  });
}

}  // namespace

template <>
const DeltaAttentionLoops& loops() {
  static constexpr DeltaAttentionLoops table{query_blocks, scratch_bytes, advance, afresh, publish, remember};
  return table;
}

}  // namespace TOKENOPS_ISA
}  // namespace tokenops
