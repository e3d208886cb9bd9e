// The tensor side of token_select on the CPU: tensors -> pointers -> pieces of work -> the loops of one instruction set.
#include "token_select.h"

#include <string.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "../tensors.h"
#include "call.h"
#include "id_lists.h"
#include "isa.h"
#include "threads.h"

namespace tokenops {
namespace {

// ---- choosing ----

int64_t select(Tensor index, Tensor count, Tensor score, std::optional<double> threshold, int64_t protect, std::string isa) {
  const TokenSelectLoops& loops = loops_of<TokenSelectLoops>(isa);
  check_rank("score", score, 2);
  check_dense_rows("score", score);
  const int64_t lists = score.size(0), tokens = score.size(1), k = index.size(1);
  check_rank("index", index, 2);
  check_size("index", index, 0, lists);
  check_dtype("index", index, ScalarType::Int);
  check_dense_rows("index", index);
  check_rank("count", count, 1);
  check_size("count", count, 0, lists);
  check_dtype("count", count, ScalarType::Int);
  STD_TORCH_CHECK(tokens < INT32_MAX, "score must have fewer than 2^31 - 1 tokens");
  STD_TORCH_CHECK(0 <= protect && protect <= std::min(k, tokens), "protect must be in [0, min(k, N)], got ", protect);
  STD_TORCH_CHECK(!threshold || *threshold == *threshold, "threshold must not be NaN");
  const Storage storage = storage_of("score", score);
  const char* scores = static_cast<const char*>(score.const_data_ptr());
  int32_t *ids = index.mutable_data_ptr<int32_t>(), *counts = count.mutable_data_ptr<int32_t>();
  const int64_t score_list = score.stride(0) * bytes_of(storage), index_list = index.stride(0), count_list = count.stride(0);
  std::atomic<bool> numbers{true};
  const bool done = run_parallel(lists, loops.select_scratch(tokens), [&](int64_t i, Lease& lease) {
    const Scores list{
        storage, scores + i * score_list, tokens, protect, k, threshold.has_value(), static_cast<float>(threshold.value_or(0))};
    const int64_t found = loops.select(list, ids + i * index_list, lease.memory);
    counts[i * count_list] = static_cast<int32_t>(found);
    if (found < 0) numbers = false;
  });
  if (!done) return kNoMemory;
  return numbers ? kOk : kBadContents;
}

// ---- halting ----

template <class T>
PerToken<T> per_token(const char* name, const Tensor& t, ScalarType dtype, int64_t batch, int64_t rows) {
  check_rank(name, t, 2);
  check_dtype(name, t, dtype);
  check_size(name, t, 0, batch);
  check_size(name, t, 1, rows);
  return {const_cast<std::remove_const_t<T>*>(t.const_data_ptr<std::remove_const_t<T>>()), t.stride(0), t.stride(1)};
}

template <class T>
PerToken<const T> per_token_or_none(const char* name, const OptionalTensor& t, ScalarType dtype, int64_t batch, int64_t rows) {
  return t ? per_token<const T>(name, *t, dtype, batch, rows) : PerToken<const T>{nullptr, 0, 0};
}

// cu_seqlens ascends from 0 to at most `rows`
bool in_order(const OptionalTensor& cu_seqlens, int64_t rows) {
  if (!cu_seqlens) return true;
  const int32_t* bounds = cu_seqlens->const_data_ptr<int32_t>();
  const int64_t stride = cu_seqlens->stride(0);
  if (bounds[0] != 0) return false;
  for (int64_t s = 1; s < cu_seqlens->size(0); ++s)
    if (bounds[s * stride] < bounds[(s - 1) * stride]) return false;
  return bounds[(cu_seqlens->size(0) - 1) * stride] <= rows;
}

// one call: the gate as the loops see it, and what its pointers point into
struct HaltCall {
  HaltGate gate{};
  int64_t batch, samples;
  bool valid;
  std::vector<int32_t> sample_of_row;

  HaltCall(const Tensor& x, const OptionalTensor& cu_seqlens, double scale, double center, double limit, bool last, bool class_only) {
    check_rank("x", x, 3);
    check_dense_rows("x", x);
    STD_TORCH_CHECK(x.size(2) > 0, "x must have at least one channel");
    batch = x.size(0);
    gate.storage = storage_of("x", x);
    gate.rows = gate.inside = x.size(1);
    gate.channels = x.size(2);
    gate.x = {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1)};
    gate.scale = static_cast<float>(scale);
    gate.center = static_cast<float>(center);
    gate.limit = static_cast<float>(limit);
    gate.last = last;
    samples = batch;
    if (cu_seqlens) {
      check_rank("cu_seqlens", *cu_seqlens, 1);
      check_dtype("cu_seqlens", *cu_seqlens, ScalarType::Int);
      STD_TORCH_CHECK(batch == 1 && cu_seqlens->size(0) > 0, "packed rows must have a batch of 1 and bounds");
      samples = cu_seqlens->size(0) - 1;
    }
    valid = in_order(cu_seqlens, gate.rows);
    if (!valid) return;
    if (cu_seqlens) gate.inside = bound(*cu_seqlens, samples);
    if (class_only) {
      sample_of_row.assign(batch * gate.rows, -1);
      for (int64_t s = 0; s < samples; ++s) {
        if (!cu_seqlens && gate.rows > 0) sample_of_row[s * gate.rows] = static_cast<int32_t>(s);
        if (cu_seqlens && bound(*cu_seqlens, s) < bound(*cu_seqlens, s + 1)) sample_of_row[bound(*cu_seqlens, s)] = static_cast<int32_t>(s);
      }
      gate.sample_of_row = sample_of_row.data();
    }
  }

  template <class T>
  PerToken<const T> vector(const char* name, const OptionalTensor& t, ScalarType dtype) const {
    return per_token_or_none<T>(name, t, dtype, batch, gate.rows);
  }
  template <class T>
  PerToken<T> result(const char* name, const Tensor& t, ScalarType dtype) const {
    return per_token<T>(name, t, dtype, batch, gate.rows);
  }
  // the output of every token [B, N, C], or of class tokens [S, C]
  TokenRows output(const char* name, const OptionalTensor& t, bool class_only) const {
    if (!t) return {nullptr, 0, 0};
    check_dtype(name, *t, ScalarType::Float);
    check_rank(name, *t, class_only ? 2 : 3);
    check_size(name, *t, 0, class_only ? samples : batch);
    if (!class_only) check_size(name, *t, 1, gate.rows);
    check_size(name, *t, class_only ? 1 : 2, gate.channels);
    check_dense_rows(name, *t);
    return {const_cast<void*>(t->const_data_ptr()), class_only ? 0 : t->stride(0), t->stride(class_only ? 0 : 1)};
  }

 private:
  static int64_t bound(const Tensor& cu_seqlens, int64_t s) { return cu_seqlens.const_data_ptr<int32_t>()[s * cu_seqlens.stride(0)]; }
};

// a row of so many channels is worth about as much work as one of its vectors of state
constexpr int64_t kShortestStretch = 64;

int64_t halt(Tensor new_cum, Tensor new_remain, Tensor new_active, Tensor new_rho, Tensor new_counter, Tensor new_out, Tensor x,
             OptionalTensor cum, OptionalTensor remain, OptionalTensor active, OptionalTensor rho, OptionalTensor counter,
             OptionalTensor out, OptionalTensor cu_seqlens, double scale, double center, double limit, bool last, bool class_only,
             std::string isa) {
  const TokenSelectLoops& loops = loops_of<TokenSelectLoops>(isa);
  const HaltCall call(x, cu_seqlens, scale, center, limit, last, class_only);
  if (!call.valid) return kBadContents;
  const bool first = !cum;
  for (const OptionalTensor* t : {&remain, &active, &rho, &counter, &out})
    STD_TORCH_CHECK(t->has_value() != first, "the state must be given whole or not at all");
  HaltStep p{};
  p.gate = call.gate;
  p.cum = call.vector<float>("cum", cum, ScalarType::Float);
  p.remain = call.vector<float>("remain", remain, ScalarType::Float);
  p.rho = call.vector<float>("rho", rho, ScalarType::Float);
  p.counter = call.vector<float>("counter", counter, ScalarType::Float);
  p.active = call.vector<bool>("active", active, ScalarType::Bool);
  p.out = call.output("out", out, class_only);
  p.new_cum = call.result<float>("new_cum", new_cum, ScalarType::Float);
  p.new_remain = call.result<float>("new_remain", new_remain, ScalarType::Float);
  p.new_rho = call.result<float>("new_rho", new_rho, ScalarType::Float);
  p.new_counter = call.result<float>("new_counter", new_counter, ScalarType::Float);
  p.new_active = call.result<bool>("new_active", new_active, ScalarType::Bool);
  p.new_out = call.output("new_out", new_out, class_only);
  p.in_place = p.out.data == p.new_out.data;
  if (class_only && !p.in_place) {
    // samples without rows have an output too: it is carried over first, and then added to in place
    for (int64_t s = 0; s < call.samples; ++s) {
      float* to = static_cast<float*>(p.new_out.data) + s * p.new_out.row;
      if (first)
        memset(to, 0, call.gate.channels * sizeof(float));
      else
        memcpy(to, static_cast<float*>(p.out.data) + s * p.out.row, call.gate.channels * sizeof(float));
    }
    p.out = p.new_out;
    p.in_place = true;
  }
  const int64_t rows = call.batch * call.gate.rows;
  p.past_caches = !p.in_place && rows * call.gate.channels * static_cast<int64_t>(sizeof(float)) > kCaches;
  in_stretches(rows, kShortestStretch, [&](int64_t from, int64_t to) { loops.halt(p, from, to); });
  return kOk;
}

int64_t halt_backward(OptionalTensor new_grad_x, OptionalTensor new_grad_remain, Tensor x, OptionalTensor grad_cum,
                      OptionalTensor grad_remain, OptionalTensor grad_rho, OptionalTensor grad_out, OptionalTensor remain,
                      OptionalTensor active, Tensor cum, OptionalTensor cu_seqlens, double scale, double center, double limit, bool last,
                      bool class_only, std::string isa) {
  const TokenSelectLoops& loops = loops_of<TokenSelectLoops>(isa);
  const HaltCall call(x, cu_seqlens, scale, center, limit, last, class_only);
  if (!call.valid) return kBadContents;
  HaltBackward p{};
  p.gate = call.gate;
  p.remain = call.vector<float>("remain", remain, ScalarType::Float);
  p.active = call.vector<bool>("active", active, ScalarType::Bool);
  p.cum = call.vector<float>("cum", cum, ScalarType::Float);
  p.grad_cum = call.vector<float>("grad_cum", grad_cum, ScalarType::Float);
  p.grad_remain = call.vector<float>("grad_remain", grad_remain, ScalarType::Float);
  p.grad_rho = call.vector<float>("grad_rho", grad_rho, ScalarType::Float);
  p.grad_out = call.output("grad_out", grad_out, class_only);
  if (new_grad_x) {
    check_rank("new_grad_x", *new_grad_x, 3);
    check_dtype("new_grad_x", *new_grad_x, x.scalar_type());
    for (int64_t d = 0; d < 3; ++d) check_size("new_grad_x", *new_grad_x, d, x.size(d));
    check_dense_rows("new_grad_x", *new_grad_x);
    p.new_grad_x = {new_grad_x->mutable_data_ptr(), new_grad_x->stride(0), new_grad_x->stride(1)};
  }
  if (new_grad_remain) p.new_grad_remain = call.result<float>("new_grad_remain", *new_grad_remain, ScalarType::Float);
  in_stretches(call.batch * call.gate.rows, kShortestStretch, [&](int64_t from, int64_t to) { loops.halt_backward(p, from, to); });
  return kOk;
}

// ---- packing ----

struct RowGrid {
  char* data;
  int64_t grids, rows, grid, row, row_bytes;  // strides in bytes

  RowGrid(const char* name, const Tensor& t, int64_t rank) {
    check_rank(name, t, rank);
    check_dense_rows(name, t);
    const int64_t size = static_cast<int64_t>(t.element_size());
    data = static_cast<char*>(const_cast<void*>(t.const_data_ptr()));
    grids = rank == 3 ? t.size(0) : 1;
    rows = t.size(rank - 2);
    grid = rank == 3 ? t.stride(0) * size : 0;
    row = t.stride(rank - 2) * size;
    row_bytes = t.size(rank - 1) * size;
    STD_TORCH_CHECK(rows < INT32_MAX, name, " must have fewer than 2^31 - 1 rows");
  }
};

void gather(const TokenSelectLoops& loops, char* to, const char* from, const std::vector<int64_t>& source, int64_t row_bytes) {
  const int64_t rows = static_cast<int64_t>(source.size());
  const RowGather p{to, from, source.data(), row_bytes, rows * row_bytes > kCaches};
  // a piece moves at least as much as a thread can while another is woken
  constexpr int64_t kShortestBytes = 32 << 10;
  if (row_bytes > 0)
    in_stretches(rows, std::max<int64_t>(1, kShortestBytes / row_bytes), [&](int64_t a, int64_t b) { loops.gather(p, a, b); });
}

int64_t pack(Tensor tokens, Tensor cu_seqlens, Tensor x, OptionalTensor index, OptionalTensor count, std::string isa) {
  const TokenSelectLoops& loops = loops_of<TokenSelectLoops>(isa);
  const RowGrid grid("x", x, 3), packed("tokens", tokens, 2);
  check_contiguous("tokens", tokens);
  check_dtype("tokens", tokens, x.scalar_type());
  check_size("tokens", tokens, 1, x.size(2));
  check_rank("cu_seqlens", cu_seqlens, 1);
  check_dtype("cu_seqlens", cu_seqlens, ScalarType::Int);
  check_contiguous("cu_seqlens", cu_seqlens);
  STD_TORCH_CHECK(index.has_value() != count.has_value(), "exactly one of index and count must be given");
  STD_TORCH_CHECK(cu_seqlens.size(0) > 0, "cu_seqlens must not be empty");
  const int64_t lists = cu_seqlens.size(0) - 1;
  STD_TORCH_CHECK(grid.grids == lists || (grid.grids == 1 && index), "x must have a grid for each list, or one for all");
  const bool shared = grid.grids == 1;
  int32_t* bounds = cu_seqlens.mutable_data_ptr<int32_t>();
  // rows behind the last sample stay zero
  std::vector<int64_t> source(packed.rows, -1);
  int64_t filled = 0;
  const auto add = [&](int64_t b, int64_t id) {
    if (filled == packed.rows) return false;
    source[filled++] = (shared ? 0 : b * grid.grid) + id * grid.row;
    return true;
  };
  bounds[0] = 0;
  if (index) {
    const IdLists ids(*index, lists);
    Seen seen(grid.rows, shared);
    for (int64_t b = 0; b < lists; ++b) {
      for (int64_t j = 0; j < ids.slots; ++j) {
        const int64_t id = ids.at(b, j);
        if (id == -1) continue;
        if (id < 0 || id >= grid.rows || seen.again(id, b) || !add(b, id)) return kBadContents;
      }
      bounds[b + 1] = static_cast<int32_t>(filled);
    }
  } else {
    check_rank("count", *count, 1);
    check_dtype("count", *count, ScalarType::Int);
    check_size("count", *count, 0, lists);
    const int32_t* counts = count->const_data_ptr<int32_t>();
    for (int64_t b = 0; b < lists; ++b) {
      const int64_t rows = counts[b * count->stride(0)];
      if (rows < 0 || rows > grid.rows) return kBadContents;
      for (int64_t id = 0; id < rows; ++id)
        if (!add(b, id)) return kBadContents;
      bounds[b + 1] = static_cast<int32_t>(filled);
    }
  }
  gather(loops, packed.data, grid.data, source, packed.row_bytes);
  return kOk;
}

int64_t unpack(Tensor x, Tensor tokens, Tensor cu_seqlens, OptionalTensor index, std::string isa) {
  const TokenSelectLoops& loops = loops_of<TokenSelectLoops>(isa);
  const RowGrid grid("x", x, 3), packed("tokens", tokens, 2);
  check_contiguous("x", x);
  check_dtype("x", x, tokens.scalar_type());
  check_size("x", x, 2, tokens.size(1));
  check_rank("cu_seqlens", cu_seqlens, 1);
  check_dtype("cu_seqlens", cu_seqlens, ScalarType::Int);
  STD_TORCH_CHECK(cu_seqlens.size(0) > 0, "cu_seqlens must not be empty");
  const int64_t lists = cu_seqlens.size(0) - 1;
  STD_TORCH_CHECK(grid.grids == lists || (grid.grids == 1 && index), "x must have a grid for each list, or one for all");
  if (!in_order(cu_seqlens, packed.rows)) return kBadContents;
  const bool shared = grid.grids == 1;
  const int32_t* bounds = cu_seqlens.const_data_ptr<int32_t>();
  const int64_t stride = cu_seqlens.stride(0);
  std::vector<int64_t> source(grid.grids * grid.rows, -1);
  std::optional<IdLists> ids;
  if (index) ids.emplace(*index, lists);
  Seen seen(index ? grid.rows : 0, shared);
  for (int64_t b = 0; b < lists; ++b) {
    int64_t token = bounds[b * stride];
    const int64_t end = bounds[(b + 1) * stride];
    int64_t* rows = source.data() + (shared ? 0 : b * grid.rows);
    if (!index) {
      if (end - token > grid.rows) return kBadContents;
      for (; token < end; ++token) *rows++ = token * packed.row;
      continue;
    }
    for (int64_t j = 0; j < ids->slots; ++j) {
      const int64_t id = ids->at(b, j);
      if (id == -1) continue;
      if (id < 0 || id >= grid.rows || seen.again(id, b) || token == end) return kBadContents;
      rows[id] = token++ * packed.row;
    }
    if (token != end) return kBadContents;
  }
  gather(loops, grid.data, packed.data, source, grid.row_bytes);
  return kOk;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tokenops, CPU, m) {
  m.impl("token_select_cpu_select", TORCH_BOX(&select));
  m.impl("token_select_cpu_halt", TORCH_BOX(&halt));
  m.impl("token_select_cpu_halt_backward", TORCH_BOX(&halt_backward));
  m.impl("token_select_cpu_pack", TORCH_BOX(&pack));
  m.impl("token_select_cpu_unpack", TORCH_BOX(&unpack));
}

}  // namespace tokenops
