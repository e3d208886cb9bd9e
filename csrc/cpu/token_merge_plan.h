// The integer side of merging: which sources go, who owns whom, and the output rows in order. One sample at a time.
#pragma once

#include <stdint.h>

namespace tokenops {

struct PlanOut {
  int64_t tokens, n_out;
  int32_t* slot;     // [tokens]
  int32_t* count;    // [1]
  int32_t* order;    // [tokens]
  int32_t* offsets;  // [n_out + 1]
};

// The listed tokens whose best score is greater than the threshold (and has a candidate) become children of their index: of those at
// most r, the best first, ties to the lowest id. scratch: [count].
void adopt_sources(int32_t* parent, const int32_t* sources, int64_t count, const float* best, const int32_t* index, int64_t r,
                   float threshold, uint64_t* scratch);

// parent[i] = i: owns an output row, j: goes where j goes, -1: dropped. Overwrites parent by the root of each token.
// False: a parent is out of range, there is a cycle, or there are more than n_out owners.
bool plan_from_parents(int32_t* parent, const PlanOut& plan);

// slot[i] = output row, -1: dropped. The first token of each row counts as its destination. False: a slot is out of range.
bool plan_from_slots(const int32_t* target, const PlanOut& plan);

// Whether slot, order and offsets describe the same assignment and stay within their bounds.
bool plan_is_sound(const int32_t* slot, const int32_t* order, const int32_t* offsets, int64_t tokens, int64_t n_out);

}  // namespace tokenops
