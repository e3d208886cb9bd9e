#include "token_merge_plan.h"

#include <string.h>

#include <algorithm>

namespace tokenops {
namespace {

// integers in the order of the floats; -0 equals 0
uint32_t ordered(float x) {
  x += 0.f;
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// offsets and order from slots whose range was checked; `first` of a row stands before its other tokens
template <class IsFirst>
void list_members(const PlanOut& plan, const IsFirst& is_first) {
  int32_t* offsets = plan.offsets;
  std::fill(offsets, offsets + plan.n_out + 1, 0);
  for (int64_t i = 0; i < plan.tokens; ++i)
    if (plan.slot[i] >= 0) ++offsets[plan.slot[i] + 1];
  int32_t filled = 0, total = 0;
  // offsets[s + 1] is where row s is to be written next, so that it ends as the end of the row
  for (int64_t s = 0; s < plan.n_out; ++s) {
    const int32_t members = offsets[s + 1];
    filled += members > 0;
    offsets[s + 1] = total;
    total += members;
  }
  *plan.count = filled;
  std::fill(plan.order + total, plan.order + plan.tokens, -1);
  for (int64_t i = 0; i < plan.tokens; ++i)
    if (plan.slot[i] >= 0 && is_first(i)) plan.order[offsets[plan.slot[i] + 1]++] = static_cast<int32_t>(i);
  for (int64_t i = 0; i < plan.tokens; ++i)
    if (plan.slot[i] >= 0 && !is_first(i)) plan.order[offsets[plan.slot[i] + 1]++] = static_cast<int32_t>(i);
}

}  // namespace

void adopt_sources(int32_t* parent, const int32_t* sources, int64_t count, const float* best, const int32_t* index, int64_t r,
                   float threshold, uint64_t* scratch) {
  // the smaller the key, the sooner the source goes
  int64_t candidates = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t id = sources[i];
    if (index[id] >= 0 && best[id] > threshold)
      scratch[candidates++] = static_cast<uint64_t>(~ordered(best[id])) << 32 | static_cast<uint32_t>(id);
  }
  if (r < candidates) {
    std::nth_element(scratch, scratch + r, scratch + candidates);
    candidates = r;
  }
  for (int64_t i = 0; i < candidates; ++i) {
    const int32_t id = static_cast<int32_t>(scratch[i] & 0xffffffffu);
    parent[id] = index[id];
  }
}

bool plan_from_parents(int32_t* parent, const PlanOut& plan) {
  const int64_t n = plan.tokens;
  for (int64_t i = 0; i < n; ++i)
    if (parent[i] < -1 || parent[i] >= n) return false;
  for (int64_t i = 0; i < n; ++i) {
    int32_t root = static_cast<int32_t>(i);
    for (int64_t steps = 0; root >= 0 && parent[root] != root; ++steps) {
      if (steps == n) return false;
      root = parent[root];
    }
    // everything on the way now points at the root, so that long chains are walked once
    for (int32_t at = static_cast<int32_t>(i); at != root;) {
      const int32_t next = parent[at];
      parent[at] = root;
      at = next;
    }
  }
  int32_t owners = 0;
  for (int64_t i = 0; i < n; ++i)
    if (parent[i] == i) plan.slot[i] = owners++;
  if (owners > plan.n_out) return false;
  for (int64_t i = 0; i < n; ++i)
    if (parent[i] != i) plan.slot[i] = parent[i] < 0 ? -1 : plan.slot[parent[i]];
  list_members(plan, [&](int64_t i) { return parent[i] == i; });
  return true;
}

bool plan_from_slots(const int32_t* target, const PlanOut& plan) {
  for (int64_t i = 0; i < plan.tokens; ++i) {
    if (target[i] < -1 || target[i] >= plan.n_out) return false;
    plan.slot[i] = target[i];
  }
  list_members(plan, [](int64_t) { return true; });
  return true;
}

bool plan_is_sound(const int32_t* slot, const int32_t* order, const int32_t* offsets, int64_t tokens, int64_t n_out) {
  int64_t owned = 0;
  for (int64_t i = 0; i < tokens; ++i) {
    if (slot[i] < -1 || slot[i] >= n_out) return false;
    owned += slot[i] >= 0;
  }
  if (offsets[0] != 0 || offsets[n_out] != owned) return false;
  for (int64_t s = 0; s < n_out; ++s) {
    if (offsets[s + 1] < offsets[s]) return false;
    for (int32_t k = offsets[s]; k < offsets[s + 1]; ++k) {
      if (k >= tokens || order[k] < 0 || order[k] >= tokens || slot[order[k]] != s) return false;
      // ascending but for the destination in front: no token stands twice
      if (k >= offsets[s] + 2 && order[k] <= order[k - 1]) return false;
      if (k > offsets[s] && order[k] == order[offsets[s]]) return false;
    }
  }
  return true;
}

}  // namespace tokenops
