// What the tensor side (delta_matmul.cpp) and the loops (delta_matmul_isa.cpp, compiled once per instruction set) share.
// Pointers, sizes and strides only. Letters: B samples, N tokens, K slots, C channels, O output channels; strides count elements.
#pragma once

#include <stdint.h>

#include "../delta_matmul.h"
#include "storage.h"

namespace tokenops {

// layer normalisation of rows; weight is null where there is none
struct RowNormalization {
  const float *weight, *bias;  // [C]
  float eps;
};

// rows of one sample
struct GateRows {
  void* data;  // null where there are none
  int64_t row;
};

// ---- the gate: current = norm(x + skip), change = current - reference ----

struct Gate {
  Storage storage;
  int64_t width;
  RowNormalization norm;
  float order;       // of the norm of a change
  bool past_caches;  // grids that are written exceed the caches: stream them
};
struct GateSample {
  GateRows x, skip;
  GateRows reference;  // before the frame
  GateRows total;      // receives x + skip; null where there is no skip
  GateRows renewed;    // the new reference; may be the same memory
  float* norms;        // [N] receives norms of changes, NaN where a change is; null: they decide nothing
  bool whole;          // renewed receives the current rows, else a copy of the reference
  const int32_t* index;
  GateRows values, delta;  // of the slots of index
};
// A gradient that is null is zero, or is not wanted.
struct GateBackward {
  Storage storage;
  int64_t width;
  RowNormalization norm;
};
struct GateBackwardSample {
  GateRows x;           // the residual sum
  const int32_t* slot;  // [N] slot of each token, -1 = not chosen
  bool all;             // every current row went into the new reference, not only the chosen
  GateRows grad_values, grad_delta, grad_renewed, grad_total;
  GateRows grad_x, grad_reference;  // results
};

// ---- layers on listed rows ----

// Rows that go into a layer, packed: `lanes` rows make a vector, up to three vectors a panel, and a panel stands as
// [contracted dimension][lanes]. So a layer's result can be written as the next layer's packed rows.
struct Layer {
  Storage storage;
  int64_t rows, width, outputs;
  const void* weight;  // [outputs, width], read in place
  int64_t weight_row;
  const void* bias;  // or null
  Activation activation;
  const void* packed;
  void* next;        // packed rows of the next layer, or null:
  void* const* out;  // a row of the result for each row
  bool past_caches;
};
struct PackedRows {
  Storage storage;
  int64_t rows, width;
  RowNormalization norm;
  const void* const* row;
  void* packed;
};

// copies of rows to and from anywhere
struct RowCopy {
  char* const* to;
  const char* const* from;  // null: a row of zeros
  int64_t row_bytes;
  bool past_caches;
};

struct DeltaMatmulLoops {
  // tokens [first, last): total, norms and the new reference, as far as each is asked for
  int64_t (*gate_scratch)(int64_t width);
  void (*gate)(const Gate&, const GateSample&, int64_t first, int64_t last, char* scratch);
  // slots [first, last): values, delta, and (renew) the rows of the new reference
  void (*gate_chosen)(const Gate&, const GateSample&, bool renew, int64_t first, int64_t last, char* scratch);
  // tokens [first, last); sums [2][C] receives the part of these tokens in the gradients of the norm's weight and bias, or is null
  void (*gate_backward)(const GateBackward&, const GateBackwardSample&, int64_t first, int64_t last, float* sums, char* scratch);

  int64_t (*packed_bytes)(Storage, int64_t rows, int64_t width);
  int64_t (*panels)(int64_t rows);
  void (*pack)(const PackedRows&, int64_t panel);
  // outputs [first, last) of panels [first_panel, last_panel); first is a multiple of output_unit, and so is last but for the end
  int64_t output_unit, panels_at_once;
  int64_t (*layer_scratch)(Storage);
  void (*layer)(const Layer&, int64_t first_panel, int64_t last_panel, int64_t first, int64_t last, char* scratch);

  void (*copy)(const RowCopy&, int64_t first, int64_t last);
};

}  // namespace tokenops
