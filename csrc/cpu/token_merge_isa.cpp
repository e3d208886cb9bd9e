// Matching and merging, compiled once per instruction set: the loops as a table.
#include "token_merge.h"

#include "storage_types.h"
#include "token_merge_pairs.h"
#include "token_merge_segments.h"
#include "token_merge_soft.h"

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

bool soft(const SoftMerge& p, const SoftSample& s, int64_t first, int64_t last, float* part, char* scratch) {
  return with_types(p.storage, [&]<class T, class Dot>(Types<T, Dot>) { return soft_tokens<T>(p, s, first, last, part, scratch); });
}
void soft_backward(const SoftMerge& p, const SoftSample& s, const float* prepared, int64_t first, int64_t last, float* part,
                   char* scratch) {
  with_types(p.storage, [&]<class T, class Dot>(Types<T, Dot>) { soft_tokens_backward<T>(p, s, prepared, first, last, part, scratch); });
}
void soft_backward_sum(const SoftMerge& p, const SoftSample& s, float* parts, int64_t count, char* scratch) {
  with_types(p.storage, [&]<class T, class Dot>(Types<T, Dot>) { soft_gradients<T>(p, s, parts, count, scratch); });
}

}  // namespace

template <>
const TokenMergeLoops& loops() {
  static constexpr TokenMergeLoops table{pair_blocks,
                                         pair_scratch,
                                         pair,
                                         merge,
                                         merge_backward,
                                         unmerge,
                                         soft_scratch,
                                         soft_part,
                                         soft,
                                         soft_results,
                                         soft_backward_scratch,
                                         soft_prepared,
                                         soft_backward_part,
                                         prepare_sample,
                                         soft_backward,
                                         soft_backward_sum};
  return table;
}

}  // namespace TOKENOPS_ISA
}  // namespace tokenops
