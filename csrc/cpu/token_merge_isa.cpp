// Matching and merging, compiled once per instruction set: the loops as a table.
#include "token_merge.h"

#include "storage_types.h"
#include "token_merge_pairs.h"
#include "token_merge_segments.h"

namespace tokenops {
namespace TOKENOPS_ISA {
namespace {

int64_t pair_scratch(const Pairs& p, int64_t candidates) {
  return with_types(p.storage, [&]<class T, class Dot>(Types<T, Dot>) { return pair_bytes<T, Dot>(p, candidates); });
}
bool pair(const Pairs& p, const PairSample& s, int64_t first_block, int64_t last_block, bool packed, char* scratch) {
  return with_types(p.storage,
                    [&]<class T, class Dot>(Types<T, Dot>) { return pair_sample<T, Dot>(p, s, first_block, last_block, packed, scratch); });
}
bool merge(const Segments& p, const SegmentSample& s, int64_t first, int64_t last) {
  return with_types(p.storage, [&]<class T, class Dot>(Types<T, Dot>) { return merge_rows<T>(p, s, first, last); });
}
bool merge_backward(const Segments& p, const SegmentSample& s, int64_t first, int64_t last) {
  return with_types(p.storage, [&]<class T, class Dot>(Types<T, Dot>) { return merge_rows_backward<T>(p, s, first, last); });
}
void unmerge(const Segments& p, const SegmentSample& s, int64_t first, int64_t last) {
  with_types(p.storage, [&]<class T, class Dot>(Types<T, Dot>) { unmerge_rows<T>(p, s, first, last); });
}

}  // namespace

template <>
const TokenMergeLoops& loops() {
  static constexpr TokenMergeLoops table{pair_blocks, pair_scratch, pair, merge, merge_backward, unmerge};
  return table;
}

}  // namespace TOKENOPS_ISA
}  // namespace tokenops
