// What the tensor side (token_select.cpp) and the loops (token_select_isa.cpp, compiled once per instruction set) share.
#pragma once

#include <stdint.h>

#include "storage.h"

namespace tokenops {

// one list of scores: which of them are kept
struct Scores {
  Storage storage;
  const void* data;  // dense
  int64_t tokens, protect, k;
  bool bounded;  // only scores greater than the threshold, beside the protected
  float threshold;
};

// one number for each token, [sample, row]; data is null where there is none
template <class T>
struct PerToken {
  T* data;
  int64_t sample, row;
  T& at(int64_t s, int64_t n) const { return data[s * sample + n * row]; }
};

// a dense row for each token, [sample, row, channel]
struct TokenRows {
  void* data;
  int64_t sample, row;
};

// what the step and its backward pass know of a call
struct HaltGate {
  Storage storage;  // of x; everything else is float
  int64_t rows, channels;
  int64_t inside;                // rows before it belong to a sample
  const int32_t* sample_of_row;  // output of class tokens: the row of out that a row adds to, or -1; null: every row to its own
  TokenRows x;
  float scale, center, limit;
  bool last;
};

struct HaltStep {
  HaltGate gate;
  // before the step; all null: the first
  PerToken<const float> cum, remain, rho, counter;
  PerToken<const bool> active;
  TokenRows out;
  // after it; may be the same memory
  PerToken<float> new_cum, new_remain, new_rho, new_counter;
  PerToken<bool> new_active;
  TokenRows new_out;
  bool in_place;     // rows of out that take no part stay as they are
  bool past_caches;  // the output exceeds the caches: stream it
};

struct HaltBackward {
  HaltGate gate;
  PerToken<const float> remain;  // before the step; null: 1
  PerToken<const bool> active;   // before the step; null: all
  PerToken<const float> cum;     // after the step
  PerToken<const float> grad_cum, grad_remain, grad_rho;
  TokenRows grad_out;
  TokenRows new_grad_x;  // in x's storage, or null
  PerToken<float> new_grad_remain;
};

// to[i] = from[source[i]]
struct RowGather {
  char* to;  // rows without gaps
  const char* from;
  const int64_t* source;  // in bytes; -1: a row of zeros
  int64_t row_bytes;
  bool past_caches;
};

struct TokenSelectLoops {
  int64_t (*select_scratch)(int64_t tokens);  // bytes
  // the kept ids, ascending, and -1 behind them; how many there are, or -1 if a score is NaN
  int64_t (*select)(const Scores&, int32_t* index, char* scratch);
  // rows are numbered through the samples
  void (*halt)(const HaltStep&, int64_t first_row, int64_t last_row);
  void (*halt_backward)(const HaltBackward&, int64_t first_row, int64_t last_row);
  void (*gather)(const RowGather&, int64_t first_row, int64_t last_row);
};

}  // namespace tokenops
