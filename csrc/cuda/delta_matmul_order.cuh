// Which rows delta_attention computes afresh. N rows, K listed ones; M cells that are keys, J listed ones.
#pragma once

#include "sparse_attention.cuh"

namespace tokenops {
namespace {

struct RowOrder {
  const int32_t *rows, *cells;  // [1|B, K] their query changed; [1|B, J] their key or value changed
  int64_t rows_sample, cells_sample;
  int row_slots, cell_slots, tokens, keys;
  const int32_t* turn;  // [] this slice of rows has its turn
  int slice, most;      // rows of a slice; with more changed cells than `most` all rows are computed afresh
  int32_t* order;       // [B, N] the rows to compute afresh, then the others, both ascending
  int32_t* fresh;       // [B] how many are to be computed afresh
  uint8_t* marks;       // [B, N] scratch
};

constexpr int kOrderWarps = 16, kOrderThreads = kOrderWarps * kWarp;
struct OrderShared {
  int changed[kOrderWarps], count[kOrderWarps];
  // of one round and the next
  int partial[2][kOrderWarps];
};

// One block a sample.
__global__ void __launch_bounds__(kOrderThreads) order_rows(RowOrder p) {
  auto& shared = shared_memory<OrderShared>();
  const int thread = threadIdx.x;
  const int32_t *rows = p.rows + blockIdx.x * p.rows_sample, *cells = p.cells + blockIdx.x * p.cells_sample;
  int32_t* const order = p.order + static_cast<int64_t>(blockIdx.x) * p.tokens;
  uint8_t* const marks = p.marks + static_cast<int64_t>(blockIdx.x) * p.tokens;

  int changed = 0;
  for (int j = thread; j < p.cell_slots; j += kOrderThreads) changed += names(cells[j], p.keys);
  const bool all = sum_warps(sum_lanes(changed), shared.changed).all > p.most;
  // a turn out of range is nobody's: another `refresh` may be asked for than in the frame before
  const int64_t turn = static_cast<int64_t>(*p.turn) * p.slice;
  for (int n = thread; n < p.tokens; n += kOrderThreads) marks[n] = all || (n >= turn && n < turn + p.slice);
  // the listed are written a second time
  __syncthreads();
  for (int k = thread; k < p.row_slots; k += kOrderThreads)
    if (names(rows[k], p.tokens)) marks[rows[k]] = 1;
  __syncthreads();
  int count = 0;
  for (int n = thread; n < p.tokens; n += kOrderThreads) count += marks[n];
  count = sum_warps(sum_lanes(count), shared.count).all;
  if (thread == 0) p.fresh[blockIdx.x] = count;
  int before = 0;
  for (int start = 0, round = 0; start < p.tokens; start += kOrderThreads, ++round) {
    const int n = start + thread;
    const bool afresh = n < p.tokens && marks[n];
    const unsigned votes = __ballot_sync(kAllLanes, afresh);
    const WarpSums<int> warps = sum_warps(__popc(votes), shared.partial[round % 2]);
    // how many of those before this row are to be computed afresh
    const int rank = before + warps.before + __popc(votes & ((1u << lane_id()) - 1));
    if (n < p.tokens) order[afresh ? rank : count + n - rank] = n;
    before += warps.all;
  }
}

}  // namespace
}  // namespace tokenops
