// What the tensor side (token_merge.cpp) and the loops (token_merge_isa.cpp, compiled once per instruction set) share.
// Pointers, sizes and strides only. Letters: B samples, N tokens, M meta tokens, C channels; strides count elements.
#pragma once

#include <stdint.h>

#include "../token_merge.h"
#include "storage.h"

namespace tokenops {

// rows of one sample that take part in a match
struct PairSide {
  const void* data;
  int64_t row;
  const int32_t* list;  // [count] row ids, ascending
  int64_t count;
  const float* scale;  // by row id, or null
  int64_t scale_row;
  const int32_t* place;  // [row id][3] dense (t, y, x), or null
};

// For each row of a the best row of b. Pieces of work are blocks of rows of a.
struct Pairs {
  Storage storage;
  int64_t width;
  bool normalize;
  bool windowed;
  int64_t t_low, t_high, reach_y, reach_x;
};
struct PairSample {
  PairSide a, b;
  float* best;     // by row id of a; only listed rows are written
  int32_t* index;  // a row id of b
};

// Token rows and the output rows that own them: a plan that was checked.
struct Segments {
  Storage storage;
  MergeMode mode;
  int64_t width;
  bool past_caches;
};
struct SegmentSample {
  const int32_t* slot;     // [N]
  const int32_t* order;    // [N]
  const int32_t* offsets;  // [n_out + 1]
  const float* size;       // [N] or null
  int64_t size_row;
  const void* tokens;  // [N] rows
  int64_t token_row;
  const void* merged;  // [n_out] rows
  int64_t merged_row;
  const void* grad_merged;  // backward only
  int64_t grad_merged_row;
  void* result;  // rows of tokens, or of output
  int64_t result_row;
  float* grad_size;  // [N] or null
};

// Soft assignment of tokens to meta tokens. Sums over tokens are taken part by part, a part being a range of tokens of one sample,
// and added up in order: the parts follow from the shapes, so the bits do not depend on threads.
struct SoftMerge {
  Storage storage;
  int64_t width, metric_width, metas;
  bool normalize;
  float temperature;
};
struct SoftSample {
  const void *x, *metric, *meta;
  int64_t x_row, metric_row, meta_row;
  const float* mass;  // [N] or null: ones
  int64_t mass_row;
  float* out;  // [M] rows: not rounded to the storage type, for the backward pass takes differences of it
  int64_t out_row;
  float* mass_out;  // [M]
  float* lse;       // [N]
  // backward only; null where no gradient is wanted
  const float* grad_out;  // [M] rows
  int64_t grad_out_row;
  const float* grad_mass_out;  // [M]
  void *grad_x, *grad_metric, *grad_meta;
  int64_t grad_x_row, grad_metric_row, grad_meta_row;
  float* grad_mass;         // [N]
  float* grad_temperature;  // [1]
};

struct TokenMergeLoops {
  int64_t (*pair_blocks)(int64_t rows);
  int64_t (*pair_scratch)(const Pairs&, int64_t candidates);
  // packed: scratch still holds this sample's b from the call before. False: a row is not finite.
  bool (*pair)(const Pairs&, const PairSample&, int64_t first_block, int64_t last_block, bool packed, char* scratch);
  // output rows [first, last); false: a size is negative or no number
  bool (*merge)(const Segments&, const SegmentSample&, int64_t first, int64_t last);
  bool (*merge_backward)(const Segments&, const SegmentSample&, int64_t first, int64_t last);
  // token rows [first, last)
  void (*unmerge)(const Segments&, const SegmentSample&, int64_t first, int64_t last);
  // tokens [first, last) into a part, then all parts of a sample into its results (the sums run in place). False: a metric or a mass is out
  // of range.
  int64_t (*soft_scratch)(const SoftMerge&);
  int64_t (*soft_part)(const SoftMerge&);  // floats of a part
  bool (*soft)(const SoftMerge&, const SoftSample&, int64_t first, int64_t last, float* part, char* scratch);
  void (*soft_sum)(const SoftMerge&, const SoftSample&, float* parts, int64_t count);
  // backward: what all parts of a sample read is prepared first
  int64_t (*soft_backward_scratch)(const SoftMerge&);
  int64_t (*soft_prepared)(const SoftMerge&);       // floats of it
  int64_t (*soft_backward_part)(const SoftMerge&);  // floats of a part
  void (*soft_prepare)(const SoftMerge&, const SoftSample&, float* prepared);
  void (*soft_backward)(const SoftMerge&, const SoftSample&, const float* prepared, int64_t first, int64_t last, float* part,
                        char* scratch);
  void (*soft_backward_sum)(const SoftMerge&, const SoftSample&, float* parts, int64_t count, char* scratch);
};

}  // namespace tokenops
