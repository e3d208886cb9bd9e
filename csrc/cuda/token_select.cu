// The tensor side of token_select on a GPU: tensors -> pointers and strides -> launches. Contents are not read here: nothing waits for the
// device.
#include <algorithm>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>

#include "launch.h"
#include "token_select_best.cuh"
#include "token_select_halt.cuh"
#include "token_select_pack.cuh"

namespace tokenops {
namespace {

// ---- choosing ----

template <class T, int Threads, int Items>
void launch_select(const Tensor& on, const SelectLists& lists, int64_t blocks) {
  launch(on, select_best<T, Threads, Items>, blocks, Threads, sizeof(SelectShared<Threads / kWarp>), lists);
}

void select(Tensor index, Tensor count, Tensor score, std::optional<double> threshold, int64_t protect) {
  check_rank("score", score, 2);
  const int64_t lists = score.size(0), tokens = score.size(1);
  check_rank("index", index, 2);
  check_size("index", index, 0, lists);
  check_dtype("index", index, ScalarType::Int);
  check_dense_rows("index", index);
  check_rank("count", count, 1);
  check_size("count", count, 0, lists);
  check_dtype("count", count, ScalarType::Int);
  const int64_t slots = index.size(1);
  // ids are counted in chunks beyond the end of a list
  constexpr int64_t kMost = INT32_MAX - (1 << 16);
  STD_TORCH_CHECK(tokens <= kMost && slots <= kMost, "score must have at most ", kMost, " tokens, and index as many slots");
  STD_TORCH_CHECK(0 <= protect && protect <= std::min(slots, tokens), "protect must be in [0, min(k, N)], got ", protect);
  STD_TORCH_CHECK(!threshold || *threshold == *threshold, "threshold must not be NaN");
  SelectLists p{};
  p.score = score.const_data_ptr();
  p.score_list = score.stride(0);
  p.score_token = score.stride(1);
  p.index = index.mutable_data_ptr<int32_t>();
  p.index_list = index.stride(0);
  p.count = count.mutable_data_ptr<int32_t>();
  p.count_list = count.stride(0);
  p.tokens = static_cast<int>(tokens);
  p.slots = static_cast<int>(slots);
  p.protect = static_cast<int>(protect);
  p.bounded = threshold.has_value();
  p.threshold = static_cast<float>(threshold.value_or(0));
  with_float("score", score, [&](auto number) {
    using T = decltype(number);
    // as many threads as have something to do: a barrier of few warps is a short one
    if (tokens <= 128 * 4) return launch_select<T, 128, 4>(score, p, lists);
    if (tokens <= 512 * 8) return launch_select<T, 512, 8>(score, p, lists);
    launch_select<T, 1024, 16>(score, p, lists);
  });
}

// ---- halting ----

// whether all rows of a tensor with a dense last dimension begin at a multiple of 16 bytes and end at one
bool has_aligned_rows(const Tensor& t) {
  const int64_t size = static_cast<int64_t>(t.element_size());
  bool aligned = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 && t.size(t.dim() - 1) * size % 16 == 0;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) aligned = aligned && t.stride(d) * size % 16 == 0;
  return aligned;
}
bool has_aligned_rows(const OptionalTensor& t) { return !t || has_aligned_rows(*t); }

// one call: what its tensors must be, and the gate as the kernels see it
struct HaltCall {
  HaltGate gate{};
  int64_t batch, samples, rows;
  bool class_only;

  HaltCall(const Tensor& x, const OptionalTensor& cu_seqlens, const OptionalTensor& remain, const OptionalTensor& active, double scale,
           double center, double limit, bool last, bool class_only)
      : batch(x.size(0)), samples(batch), rows(0), class_only(class_only) {
    check_rank("x", x, 3);
    check_dense_rows("x", x);
    rows = x.size(1);
    STD_TORCH_CHECK(0 < x.size(2) && x.size(2) <= 1 << 30, "x must have 1 to 2^30 channels, got ", x.size(2));
    STD_TORCH_CHECK(batch * rows < INT32_MAX, "x must have fewer than 2^31 - 1 rows, got ", batch * rows);
    if (cu_seqlens) {
      check_rank("cu_seqlens", *cu_seqlens, 1);
      check_dtype("cu_seqlens", *cu_seqlens, ScalarType::Int);
      STD_TORCH_CHECK(batch == 1 && cu_seqlens->size(0) > 0, "packed rows must have a batch of 1 and bounds");
      samples = cu_seqlens->size(0) - 1;
      gate.bounds = cu_seqlens->const_data_ptr<int32_t>();
      gate.bounds_stride = cu_seqlens->stride(0);
    }
    gate.x = x.const_data_ptr();
    gate.x_sample = x.stride(0);
    gate.x_row = x.stride(1);
    gate.remain = vector<float>("remain", remain, ScalarType::Float);
    gate.active = vector<bool>("active", active, ScalarType::Bool);
    gate.samples = static_cast<int>(samples);
    gate.rows = static_cast<int>(rows);
    gate.channels = static_cast<int>(x.size(2));
    gate.last = last;
    gate.scale = static_cast<float>(scale);
    gate.center = static_cast<float>(center);
    gate.limit = static_cast<float>(limit);
  }

  template <class T>
  PerToken<const T> vector(const char* name, const OptionalTensor& t, ScalarType dtype) const {
    if (!t) return {nullptr, 0, 0};
    check_vector(name, *t, dtype);
    return {t->const_data_ptr<T>(), t->stride(0), t->stride(1)};
  }
  template <class T>
  PerToken<T> result(const char* name, const Tensor& t, ScalarType dtype) const {
    check_vector(name, t, dtype);
    return {t.mutable_data_ptr<T>(), t.stride(0), t.stride(1)};
  }
  // the output of every token [B, N, C], or of class tokens [S, C]
  TokenRows<const float> output(const char* name, const OptionalTensor& t) const {
    if (!t) return {nullptr, 0, 0};
    check_dtype(name, *t, ScalarType::Float);
    check_rank(name, *t, class_only ? 2 : 3);
    check_size(name, *t, 0, class_only ? samples : batch);
    if (!class_only) check_size(name, *t, 1, rows);
    check_size(name, *t, class_only ? 1 : 2, gate.channels);
    check_dense_rows(name, *t);
    return {t->const_data_ptr<float>(), t->stride(0), class_only ? 0 : t->stride(1)};
  }

  HaltGate of_rows() const { return of(batch * rows, false); }
  HaltGate of_first_rows() const { return of(samples, true); }

 private:
  void check_vector(const char* name, const Tensor& t, ScalarType dtype) const {
    check_rank(name, t, 2);
    check_dtype(name, t, dtype);
    check_size(name, t, 0, batch);
    check_size(name, t, 1, rows);
  }
  HaltGate of(int64_t jobs, bool first_rows) const {
    HaltGate one = gate;
    one.jobs = static_cast<int>(jobs);
    one.first_rows = first_rows;
    return one;
  }
};

constexpr int64_t kHaltBlock = kHaltRows * kHaltWarps;

// Calls f with a number of x's type, and whether the rows are read and written 16 bytes at once.
template <class F>
void with_rows(const Tensor& x, bool aligned, F&& f) {
  with_float("x", x, [&](auto number) { aligned ? f(number, std::true_type{}) : f(number, std::false_type{}); });
}

void halt(Tensor new_cum, Tensor new_remain, Tensor new_active, Tensor new_rho, Tensor new_counter, Tensor new_out, Tensor x,
          OptionalTensor cum, OptionalTensor remain, OptionalTensor active, OptionalTensor rho, OptionalTensor counter, OptionalTensor out,
          OptionalTensor cu_seqlens, double scale, double center, double limit, bool last, bool class_only) {
  const HaltCall call(x, cu_seqlens, remain, active, scale, center, limit, last, class_only);
  for (const OptionalTensor* t : {&remain, &active, &rho, &counter, &out})
    STD_TORCH_CHECK(t->has_value() == cum.has_value(), "the state must be given whole or not at all");
  // two parts of a step: the state, and the output
  HaltStep state{}, output{};
  state.cum = output.cum = call.vector<float>("cum", cum, ScalarType::Float);
  state.rho = call.vector<float>("rho", rho, ScalarType::Float);
  state.counter = call.vector<float>("counter", counter, ScalarType::Float);
  state.new_cum = call.result<float>("new_cum", new_cum, ScalarType::Float);
  state.new_remain = call.result<float>("new_remain", new_remain, ScalarType::Float);
  state.new_rho = call.result<float>("new_rho", new_rho, ScalarType::Float);
  state.new_counter = call.result<float>("new_counter", new_counter, ScalarType::Float);
  state.new_active = call.result<bool>("new_active", new_active, ScalarType::Bool);
  output.out = call.output("out", out);
  const TokenRows<const float> to = call.output("new_out", new_out);
  output.new_out = {new_out.mutable_data_ptr<float>(), to.sample, to.row};
  output.in_place = output.out.data == to.data;
  const bool aligned = has_aligned_rows(x) && has_aligned_rows(new_out) && has_aligned_rows(out);
  with_rows(x, aligned, [&](auto number, auto is_aligned) {
    const auto run = [&](const HaltStep& p) {
      launch(x, halt_step<decltype(number), decltype(is_aligned)::value>, (p.gate.jobs + kHaltBlock - 1) / kHaltBlock, kHaltThreads, 0, p);
    };
    if (class_only) {
      // the output first: it goes by the state before the step, which may be overwritten
      output.gate = call.of_first_rows();
      run(output);
    } else {
      state.out = output.out;
      state.new_out = output.new_out;
      state.in_place = output.in_place;
    }
    state.gate = call.of_rows();
    run(state);
  });
}

void halt_gradients(OptionalTensor new_grad_x, OptionalTensor new_grad_remain, Tensor x, OptionalTensor grad_cum,
                    OptionalTensor grad_remain, OptionalTensor grad_rho, OptionalTensor grad_out, OptionalTensor remain,
                    OptionalTensor active, Tensor cum, OptionalTensor cu_seqlens, double scale, double center, double limit, bool last,
                    bool class_only) {
  const HaltCall call(x, cu_seqlens, remain, active, scale, center, limit, last, class_only);
  HaltBackward p{};
  p.cum = call.vector<float>("cum", cum, ScalarType::Float);
  p.grad_cum = call.vector<float>("grad_cum", grad_cum, ScalarType::Float);
  p.grad_remain = call.vector<float>("grad_remain", grad_remain, ScalarType::Float);
  p.grad_rho = call.vector<float>("grad_rho", grad_rho, ScalarType::Float);
  const TokenRows<const float> of_out = call.output("grad_out", grad_out);
  if (new_grad_x) {
    check_rank("new_grad_x", *new_grad_x, 3);
    check_dtype("new_grad_x", *new_grad_x, x.scalar_type());
    for (int64_t d = 0; d < 3; ++d) check_size("new_grad_x", *new_grad_x, d, x.size(d));
    check_dense_rows("new_grad_x", *new_grad_x);
    p.new_grad_x = new_grad_x->mutable_data_ptr();
    p.grad_x_sample = new_grad_x->stride(0);
    p.grad_x_row = new_grad_x->stride(1);
  }
  if (new_grad_remain) p.new_grad_remain = call.result<float>("new_grad_remain", *new_grad_remain, ScalarType::Float);
  const bool aligned = has_aligned_rows(x) && has_aligned_rows(grad_out) && has_aligned_rows(new_grad_x);
  with_rows(x, aligned, [&](auto number, auto is_aligned) {
    const auto run = [&](const HaltGate& gate, const TokenRows<const float>& grad) {
      p.gate = gate;
      p.grad_out = grad;
      launch(x, halt_backward<decltype(number), decltype(is_aligned)::value>, (gate.jobs + kHaltBlock - 1) / kHaltBlock, kHaltThreads, 0,
             p);
    };
    // first as if class tokens had no output; then their rows again
    run(call.of_rows(), class_only ? TokenRows<const float>{nullptr, 0, 0} : of_out);
    if (class_only && grad_out) run(call.of_first_rows(), of_out);
  });
}

// ---- packing ----

// dense rows [G, N, W] or [T, W], in bytes
struct RowGrid {
  char* data;
  int64_t grids, rows, grid, row, row_bytes;

  RowGrid(const char* name, const Tensor& t, int64_t rank) {
    check_rank(name, t, rank);
    check_dense_rows(name, t);
    const int64_t size = static_cast<int64_t>(t.element_size());
    data = static_cast<char*>(const_cast<void*>(t.const_data_ptr()));
    grids = rank == 3 ? t.size(0) : 1;
    rows = t.size(rank - 2);
    // also of the one grid that all lists share
    grid = grids == 1 ? 0 : t.stride(0) * size;
    row = t.stride(rank - 2) * size;
    row_bytes = t.size(rank - 1) * size;
    STD_TORCH_CHECK(rows < INT32_MAX && grids * rows < INT32_MAX, name, " must have fewer than 2^31 - 1 rows");
  }
};

RowLists row_lists(const OptionalTensor& index, int64_t lists, int64_t rows) {
  if (!index) return {nullptr, 0, 0, static_cast<int>(rows), static_cast<int>(rows)};
  check_rank("index", *index, 2);
  check_dtype("index", *index, ScalarType::Int);
  check_broadcast("index", *index, 0, lists);
  STD_TORCH_CHECK(index->size(1) < INT32_MAX - (1 << 16), "index must have fewer slots, got ", index->size(1));
  return {index->const_data_ptr<int32_t>(), broadcast_stride(*index, 0), index->stride(1), static_cast<int>(index->size(1)),
          static_cast<int>(rows)};
}

int64_t check_bounds(const Tensor& cu_seqlens) {
  check_rank("cu_seqlens", cu_seqlens, 1);
  check_dtype("cu_seqlens", cu_seqlens, ScalarType::Int);
  STD_TORCH_CHECK(cu_seqlens.size(0) > 0, "cu_seqlens must not be empty");
  return cu_seqlens.size(0) - 1;
}

// Copies rows by the widest words that all of them consist of.
template <class Pack>
void launch_copies(const Tensor& on, Pack p, const RowGrid& from, const RowGrid& to, int64_t jobs, void (*const (&kernels)[5])(Pack)) {
  STD_TORCH_CHECK(jobs < INT32_MAX, "there must be fewer than 2^31 - 1 rows and slots, got ", jobs);
  if (from.row_bytes == 0) return;
  int log_word = 4;
  const auto fits = [&](int64_t place) { return (place & ((1 << log_word) - 1)) == 0; };
  const auto fit = [&](const RowGrid& rows) {
    return fits(reinterpret_cast<intptr_t>(rows.data)) && fits(rows.grid) && fits(rows.row) && fits(rows.row_bytes);
  };
  while (!fit(from) || !fit(to)) --log_word;
  const int64_t words = from.row_bytes >> log_word;
  STD_TORCH_CHECK(words < INT32_MAX - kCopyThreads, "rows must be shorter, got ", from.row_bytes, " bytes");
  int log_lanes = 0;
  while (1 << log_lanes < std::min<int64_t>(words, kCopyThreads)) ++log_lanes;
  p.copies = {from.data, to.data, static_cast<int>(words), log_lanes, static_cast<int>(jobs)};
  launch(on, kernels[log_word], ((jobs << log_lanes) + kCopyThreads - 1) / kCopyThreads, kCopyThreads, 0, p);
}

void launch_numbers(const Tensor& on, const NumberSlots& p, int64_t lists) {
  const auto run = [&](auto threads) {
    launch(on, number_slots<threads.value>, lists, threads.value, sizeof(NumberShared<threads.value>), p);
  };
  // there may be very many short lists: a warp for each
  if (p.lists.slots <= kWarp * kNumberItems) return run(std::integral_constant<int, kWarp>{});
  run(std::integral_constant<int, 256>{});
}

// `ranks` as index, and `filled` [1|L]: room to work, with an index
void pack_tokens(Tensor tokens, Tensor cu_seqlens, OptionalTensor ranks, OptionalTensor filled, Tensor x, OptionalTensor index,
                 OptionalTensor count) {
  const RowGrid grid("x", x, 3), packed("tokens", tokens, 2);
  check_dtype("tokens", tokens, x.scalar_type());
  check_size("tokens", tokens, 1, x.size(2));
  const int64_t lists = check_bounds(cu_seqlens);
  check_contiguous("cu_seqlens", cu_seqlens);
  STD_TORCH_CHECK(index.has_value() != count.has_value(), "exactly one of index and count must be given");
  STD_TORCH_CHECK(grid.grids == lists || (grid.grids == 1 && index), "x must have a grid for each list, or one for all");
  PackRows p{};
  p.lists = row_lists(index, lists, grid.rows);
  const Tensor* lengths = index ? nullptr : &*count;
  if (index) {
    STD_TORCH_CHECK(ranks && filled, "an index needs ranks and filled");
    const int64_t numbered = index->size(0);
    for (const auto& [name, t, rank] : {std::tuple("ranks", &*ranks, 2), std::tuple("filled", &*filled, 1)}) {
      check_rank(name, *t, rank);
      check_dtype(name, *t, ScalarType::Int);
      check_size(name, *t, 0, numbered);
      check_contiguous(name, *t);
    }
    check_size("ranks", *ranks, 1, p.lists.slots);
    NumberSlots numbers{};
    numbers.lists = p.lists;
    numbers.ranks = ranks->mutable_data_ptr<int32_t>();
    numbers.counts = filled->mutable_data_ptr<int32_t>();
    launch_numbers(x, numbers, numbered);
    p.ranks = numbers.ranks;
    p.ranks_list = broadcast_stride(*ranks, 0);
    lengths = &*filled;
  }
  check_rank("count", *lengths, 1);
  check_dtype("count", *lengths, ScalarType::Int);
  check_broadcast("count", *lengths, 0, lists);
  p.counts = lengths->const_data_ptr<int32_t>();
  p.counts_stride = broadcast_stride(*lengths, 0);
  AddLengths lengths_of{p.counts,
                        p.counts_stride,
                        cu_seqlens.mutable_data_ptr<int32_t>(),
                        static_cast<int>(lists),
                        p.lists.slots,
                        static_cast<int>(packed.rows)};
  launch(x, add_lengths, 1, kAddThreads, sizeof(AddShared), lengths_of);
  p.bounds = lengths_of.bounds;
  p.x_grid = grid.grid;
  p.x_row = grid.row;
  p.tokens_row = packed.row;
  p.number_of_lists = static_cast<int>(lists);
  p.packed_rows = static_cast<int>(packed.rows);
  launch_copies(x, p, grid, packed, std::max(lists * p.lists.slots, packed.rows),
                {pack_rows<uint8_t>, pack_rows<uint16_t>, pack_rows<uint32_t>, pack_rows<uint2>, pack_rows<uint4>});
}

// `source` [G, N] of -1: room to work, with an index
void unpack_tokens(Tensor x, OptionalTensor source, Tensor tokens, Tensor cu_seqlens, OptionalTensor index) {
  const RowGrid grid("x", x, 3), packed("tokens", tokens, 2);
  check_dtype("x", x, tokens.scalar_type());
  check_size("x", x, 2, tokens.size(1));
  const int64_t lists = check_bounds(cu_seqlens);
  STD_TORCH_CHECK(grid.grids == lists || (grid.grids == 1 && index), "x must have a grid for each list, or one for all");
  UnpackRows p{};
  p.bounds = cu_seqlens.const_data_ptr<int32_t>();
  p.bounds_stride = cu_seqlens.stride(0);
  p.x_grid = grid.grid;
  p.x_row = grid.row;
  p.tokens_row = packed.row;
  p.rows = static_cast<int>(grid.rows);
  p.packed_rows = static_cast<int>(packed.rows);
  if (index) {
    STD_TORCH_CHECK(source, "an index needs source");
    check_rank("source", *source, 2);
    check_dtype("source", *source, ScalarType::Int);
    check_size("source", *source, 0, grid.grids);
    check_size("source", *source, 1, grid.rows);
    check_contiguous("source", *source);
    NumberSlots numbers{};
    numbers.lists = row_lists(index, lists, grid.rows);
    numbers.source = source->mutable_data_ptr<int32_t>();
    numbers.source_grid = broadcast_stride(*source, 0);
    numbers.bounds = p.bounds;
    numbers.bounds_stride = p.bounds_stride;
    numbers.packed_rows = p.packed_rows;
    launch_numbers(x, numbers, lists);
    p.source = numbers.source;
  }
  launch_copies(x, p, packed, grid, grid.grids * grid.rows,
                {unpack_rows<uint8_t>, unpack_rows<uint16_t>, unpack_rows<uint32_t>, unpack_rows<uint2>, unpack_rows<uint4>});
}

}  // namespace

TOKENOPS_CUDA_OPERATORS(m) {
  m.impl("token_select_cuda_select", TOKENOPS_CUDA_OPERATOR(select));
  m.impl("token_select_cuda_halt", TOKENOPS_CUDA_OPERATOR(halt));
  m.impl("token_select_cuda_halt_backward", TOKENOPS_CUDA_OPERATOR(halt_gradients));
  m.impl("token_select_cuda_pack", TOKENOPS_CUDA_OPERATOR(pack_tokens));
  m.impl("token_select_cuda_unpack", TOKENOPS_CUDA_OPERATOR(unpack_tokens));
}

}  // namespace tokenops
