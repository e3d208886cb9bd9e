// The tensor side of delta_matmul on the CPU: tensors -> pointers -> pieces of work -> the loops of one instruction set.
#include "delta_matmul.h"

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "../delta_matmul_tensors.h"
#include "call.h"
#include "id_lists.h"
#include "isa.h"
#include "threads.h"
#include "token_select.h"

namespace tokenops {
namespace {

// a row of so many channels is worth about as much work as waking another thread
constexpr int64_t kShortestStretch = 16;

// ids [1|B, K] of rows of a grid, each at most once in its list
class CheckedLists {
 public:
  CheckedLists(const Tensor& index, int64_t samples, int64_t rows) : lists_(index, samples), valid_(true) {
    Seen seen(rows, false);
    // one list for all is read once
    const int64_t different = lists_.list == 0 ? std::min<int64_t>(samples, 1) : samples;
    for (int64_t b = 0; b < different; ++b)
      for (int64_t j = 0; j < lists_.slots; ++j) {
        const int64_t id = lists_.at(b, j);
        if (id != -1) valid_ &= 0 <= id && id < rows && !seen.again(id, b);
      }
  }
  bool valid() const { return valid_; }
  int64_t slots() const { return lists_.slots; }
  int64_t at(int64_t b, int64_t j) const { return lists_.at(b, j); }

 private:
  IdLists lists_;
  bool valid_;
};

// [B, N, C] of dense rows
struct TokenGrid {
  char* data = nullptr;
  int64_t batch = 0, rows = 0, width = 0, sample_bytes = 0, row = 0, row_bytes = 0;

  TokenGrid() = default;
  TokenGrid(const char* name, const Tensor& t) {
    check_rank(name, t, 3);
    check_dense_rows(name, t);
    STD_TORCH_CHECK(t.size(1) < INT32_MAX, name, " must have fewer than 2^31 - 1 rows");
    const int64_t size = static_cast<int64_t>(t.element_size());
    data = static_cast<char*>(const_cast<void*>(t.const_data_ptr()));
    batch = t.size(0), rows = t.size(1), width = t.size(2);
    sample_bytes = t.stride(0) * size, row = t.stride(1), row_bytes = row * size;
  }
  // of the shape and dtype of another tensor but for the number of rows
  TokenGrid(const char* name, const Tensor& t, const Tensor& like, int64_t rows_wanted) : TokenGrid(name, t) {
    check_dtype(name, t, like.scalar_type());
    check_size(name, t, 0, like.size(0));
    check_size(name, t, 1, rows_wanted);
    check_size(name, t, 2, like.size(2));
  }
  static TokenGrid of(const char* name, const OptionalTensor& t, const Tensor& like, int64_t rows_wanted) {
    return t ? TokenGrid(name, *t, like, rows_wanted) : TokenGrid();
  }
  GateRows sample(int64_t b) const { return {data ? data + b * sample_bytes : nullptr, row}; }
  char* at(int64_t b, int64_t n) const { return data + b * sample_bytes + n * row_bytes; }
  bool same_as(const TokenGrid& other) const { return data == other.data && sample_bytes == other.sample_bytes && row == other.row; }
};

RowNormalization norm_of(const OptionalTensor& weight, const OptionalTensor& bias, double eps, int64_t width) {
  STD_TORCH_CHECK(weight.has_value() == bias.has_value(), "norm_weight and norm_bias must be given both or not at all");
  if (!weight) return {nullptr, nullptr, 0.f};
  for (const Tensor* t : {&*weight, &*bias}) {
    check_rank("norm", *t, 1);
    check_dtype("norm", *t, ScalarType::Float);
    check_size("norm", *t, 0, width);
    check_dense_rows("norm", *t);
  }
  return {weight->const_data_ptr<float>(), bias->const_data_ptr<float>(), static_cast<float>(eps)};
}

// calls work(sample, first, last, scratch) for stretches of the rows of all samples. False: no memory.
template <class Work>
bool for_rows(int64_t batch, int64_t rows, int64_t scratch, const Work& work) {
  const int64_t pieces = std::clamp<int64_t>(batch * rows / kShortestStretch, 1, kPiecesPerThread * torch::stable::get_num_threads());
  return run_parallel(pieces, scratch, [&](int64_t i, Lease& lease) {
    int64_t first = batch * rows * i / pieces;
    for (const int64_t last = batch * rows * (i + 1) / pieces; first < last;) {
      const int64_t b = first / rows, end = std::min(last, (b + 1) * rows);
      work(b, first - b * rows, end - b * rows, lease.memory);
      first = end;
    }
  });
}

// ---- the gate ----

int64_t gate(Tensor index, Tensor count, Tensor values, Tensor delta, Tensor renewed, Tensor total, Tensor x, OptionalTensor skip,
             OptionalTensor reference, OptionalTensor norm_weight, OptionalTensor norm_bias, double norm_eps, OptionalTensor chosen,
             std::optional<double> threshold, double order, bool whole, std::string isa) {
  const DeltaMatmulLoops& loops = loops_of<DeltaMatmulLoops>(isa);
  const TokenGrid frame("x", x);
  const int64_t batch = frame.batch, tokens = frame.rows, slots = values.size(1);
  const TokenGrid skipped = TokenGrid::of("skip", skip, x, tokens), old = TokenGrid::of("reference", reference, x, tokens);
  const TokenGrid next("new reference", renewed, x, tokens), rows("values", values, x, slots), changes("delta", delta, x, slots);
  const TokenGrid sum = skip ? TokenGrid("total", total, x, tokens) : TokenGrid();
  check_rank("index", index, 2);
  check_dtype("index", index, ScalarType::Int);
  check_size("index", index, 0, batch);
  check_size("index", index, 1, slots);
  check_dense_rows("index", index);
  check_rank("count", count, 1);
  check_dtype("count", count, ScalarType::Int);
  check_size("count", count, 0, batch);
  STD_TORCH_CHECK(order >= 0, "order must not be negative");
  STD_TORCH_CHECK(!threshold || *threshold == *threshold, "threshold must not be NaN");
  STD_TORCH_CHECK(reference || (!chosen && slots == tokens), "in a first frame every token is chosen");
  const Storage storage = storage_of("x", x);
  const int64_t grid_bytes = batch * tokens * frame.width * bytes_of(storage);
  const Gate p{storage, frame.width, norm_of(norm_weight, norm_bias, norm_eps, frame.width), static_cast<float>(order),
               grid_bytes > kCaches};

  int32_t *ids = index.mutable_data_ptr<int32_t>(), *counts = count.mutable_data_ptr<int32_t>();
  const int64_t ids_row = index.stride(0), counts_row = count.stride(0);
  if (chosen) {
    const CheckedLists lists(*chosen, batch, tokens);
    check_size("index given", *chosen, 1, slots);
    if (!lists.valid()) return kBadContents;
    for (int64_t b = 0; b < batch; ++b) {
      int32_t filled = 0;
      for (int64_t j = 0; j < slots; ++j) filled += (ids[b * ids_row + j] = static_cast<int32_t>(lists.at(b, j))) >= 0;
      counts[b * counts_row] = filled;
    }
  } else if (!reference) {
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t j = 0; j < slots; ++j) ids[b * ids_row + j] = static_cast<int32_t>(j);
      counts[b * counts_row] = static_cast<int32_t>(slots);
    }
  }

  const bool decides = reference && !chosen, in_place = reference && next.same_as(old), all = whole || !reference;
  // before the reference is overwritten the changes of the chosen are needed
  const bool renew_later = all && in_place;
  std::vector<float> norms(decides ? batch * tokens : 0);
  std::vector<GateSample> samples(batch);
  for (int64_t b = 0; b < batch; ++b) {
    samples[b] = {frame.sample(b),
                  skipped.sample(b),
                  old.sample(b),
                  sum.sample(b),
                  in_place ? GateRows{nullptr, 0} : next.sample(b),
                  decides ? norms.data() + b * tokens : nullptr,
                  all,
                  ids + b * ids_row,
                  rows.sample(b),
                  changes.sample(b)};
  }
  const int64_t scratch = loops.gate_scratch(frame.width);
  if (decides || skip || !in_place) {
    const auto pass = [&](int64_t b, int64_t first, int64_t last, char* memory) { loops.gate(p, samples[b], first, last, memory); };
    if (!for_rows(batch, tokens, scratch, pass)) return kNoMemory;
  }
  if (decides) {
    const TokenSelectLoops& choosing = loops_of<TokenSelectLoops>(isa);
    std::atomic<bool> numbers{true};
    const bool done = run_parallel(batch, choosing.select_scratch(tokens), [&](int64_t b, Lease& lease) {
      const Scores list{Storage::f32, samples[b].norms, tokens, 0, slots, threshold.has_value(), static_cast<float>(threshold.value_or(0))};
      const int64_t found = choosing.select(list, ids + b * ids_row, lease.memory);
      counts[b * counts_row] = static_cast<int32_t>(found);
      if (found < 0) numbers = false;
    });
    if (!done) return kNoMemory;
    if (!numbers) return kBadContents;
  }
  for (int64_t b = 0; b < batch; ++b) {
    if (skip) samples[b].x = sum.sample(b);
    samples[b].skip = samples[b].total = {nullptr, 0};
    samples[b].norms = nullptr;
    samples[b].renewed = next.sample(b);
  }
  const auto choose = [&](int64_t b, int64_t first, int64_t last, char* memory) {
    loops.gate_chosen(p, samples[b], !all, first, last, memory);
  };
  if (!for_rows(batch, slots, scratch, choose)) return kNoMemory;
  if (renew_later) {
    const auto renew = [&](int64_t b, int64_t first, int64_t last, char* memory) { loops.gate(p, samples[b], first, last, memory); };
    if (!for_rows(batch, tokens, scratch, renew)) return kNoMemory;
  }
  return kOk;
}

int64_t gate_backward(OptionalTensor grad_x, OptionalTensor grad_reference, OptionalTensor grad_norm_weight, OptionalTensor grad_norm_bias,
                      Tensor x, OptionalTensor norm_weight, OptionalTensor norm_bias, double norm_eps, Tensor index, bool whole,
                      bool first_frame, OptionalTensor grad_values, OptionalTensor grad_delta, OptionalTensor grad_renewed,
                      OptionalTensor grad_total, std::string isa) {
  const DeltaMatmulLoops& loops = loops_of<DeltaMatmulLoops>(isa);
  const TokenGrid frame("x", x);
  const int64_t batch = frame.batch, tokens = frame.rows, width = frame.width;
  const CheckedLists lists(index, batch, tokens);
  const TokenGrid of_values = TokenGrid::of("grad_values", grad_values, x, lists.slots());
  const TokenGrid of_delta = TokenGrid::of("grad_delta", grad_delta, x, lists.slots());
  const TokenGrid of_renewed = TokenGrid::of("grad_reference", grad_renewed, x, tokens),
                  of_total = TokenGrid::of("grad_total", grad_total, x, tokens);
  const TokenGrid to_x = TokenGrid::of("new grad_x", grad_x, x, tokens),
                  to_reference = TokenGrid::of("new grad_reference", grad_reference, x, tokens);
  const GateBackward p{storage_of("x", x), width, norm_of(norm_weight, norm_bias, norm_eps, width)};
  for (const OptionalTensor* t : {&grad_norm_weight, &grad_norm_bias}) {
    if (!*t) continue;
    STD_TORCH_CHECK(norm_weight, "without a norm its gradients must not be asked for");
    check_rank("gradient of norm", **t, 1);
    check_dtype("gradient of norm", **t, ScalarType::Float);
    check_size("gradient of norm", **t, 0, width);
    check_dense_rows("gradient of norm", **t);
  }
  if (!lists.valid()) return kBadContents;

  std::vector<int32_t> slots(batch * tokens, -1);
  std::vector<GateBackwardSample> samples(batch);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t j = 0; j < lists.slots(); ++j)
      if (const int64_t id = lists.at(b, j); id >= 0) slots[b * tokens + id] = static_cast<int32_t>(j);
    samples[b] = {frame.sample(b),      slots.data() + b * tokens, whole || first_frame, of_values.sample(b),   of_delta.sample(b),
                  of_renewed.sample(b), of_total.sample(b),        to_x.sample(b),       to_reference.sample(b)};
  }
  // Sums over tokens are taken part by part and added up in order. A part follows from the shapes alone, so the bits do not depend on
  // threads.
  const bool sums = grad_norm_weight || grad_norm_bias;
  constexpr int64_t kPartRows = 256;
  const int64_t parts_of_sample = (tokens + kPartRows - 1) / kPartRows, parts = batch * parts_of_sample;
  const int64_t sums_row = loops.gate_scratch(width) / static_cast<int64_t>(sizeof(float));
  std::vector<float> sum(sums ? parts * 2 * sums_row : 0);
  const bool done = run_parallel(parts, loops.gate_scratch(width), [&](int64_t i, Lease& lease) {
    const int64_t b = i / parts_of_sample, first = i % parts_of_sample * kPartRows, last = std::min(tokens, first + kPartRows);
    loops.gate_backward(p, samples[b], first, last, sums ? sum.data() + i * 2 * sums_row : nullptr, lease.memory);
  });
  if (!done) return kNoMemory;
  const OptionalTensor* const targets[] = {&grad_norm_weight, &grad_norm_bias};
  for (int64_t which = 0; which < 2; ++which) {
    if (!*targets[which]) continue;
    float* to = (*targets[which])->mutable_data_ptr<float>();
    for (int64_t c = 0; c < width; ++c) {
      float whole_sum = 0.f;
      for (int64_t i = 0; i < parts; ++i) whole_sum += sum[(2 * i + which) * sums_row + c];
      to[c] = whole_sum;
    }
  }
  return kOk;
}

// ---- layers ----

// weight [outputs, width] and bias [outputs] in the dtype of x
void set_layer(Layer& p, const Tensor& weight, const OptionalTensor& bias, const Tensor& x, int64_t width) {
  check_rank("weight", weight, 2);
  check_dtype("weight", weight, x.scalar_type());
  check_size("weight", weight, 1, width);
  check_dense_rows("weight", weight);
  p.width = width;
  p.outputs = weight.size(0);
  p.weight = weight.const_data_ptr();
  p.weight_row = weight.stride(0);
  if (!bias) return;
  check_rank("bias", *bias, 1);
  check_dtype("bias", *bias, x.scalar_type());
  check_size("bias", *bias, 0, p.outputs);
  check_dense_rows("bias", *bias);
  p.bias = bias->const_data_ptr();
}

bool run_layer(const DeltaMatmulLoops& loops, const Layer& p) {
  const int64_t panels = loops.panels(p.rows), blocks = (panels + loops.panels_at_once - 1) / loops.panels_at_once;
  const int64_t threads = torch::stable::get_num_threads(), wanted = kPiecesPerThread * threads,
                units = (p.outputs + loops.output_unit - 1) / loops.output_unit;
  int64_t cuts = (wanted + blocks - 1) / blocks;
  // of nine pieces two threads would do five and four: rather eighteen. Little waiting at the end is no reason to cut finer
  const auto idle = [&] { return (threads - blocks * cuts % threads) % threads; };
  while (16 * idle() > blocks * cuts && blocks * cuts < 2 * wanted) ++cuts;
  cuts = std::clamp<int64_t>(cuts, 1, units);
  const auto cut = [&](int64_t i) { return std::min(p.outputs, units * i / cuts * loops.output_unit); };
  // pieces of one part of the weights follow each other: they are read from memory once
  return run_parallel(blocks * cuts, loops.layer_scratch(p.storage), [&](int64_t i, Lease& lease) {
    const int64_t block = i % blocks, at = i / blocks;
    loops.layer(p, panels * block / blocks, panels * (block + 1) / blocks, cut(at), cut(at + 1), lease.memory);
  });
}

// so many rows go through both layers before the next: their packed and hidden rows stay in the caches
constexpr int64_t kRowsAtOnce = 768;

int64_t linear(Tensor out, Tensor x, Tensor index, Tensor weight, OptionalTensor bias, OptionalTensor norm_weight, OptionalTensor norm_bias,
               double norm_eps, std::string activation, OptionalTensor weight_2, OptionalTensor bias_2, bool into, std::string isa) {
  const DeltaMatmulLoops& loops = loops_of<DeltaMatmulLoops>(isa);
  const TokenGrid from("x", x), to("out", out);
  const int64_t batch = from.batch, tokens = from.rows;
  const CheckedLists lists(index, batch, tokens);
  const Storage storage = storage_of("x", x);
  Layer first{}, second{};
  set_layer(first, weight, bias, x, from.width);
  if (weight_2) set_layer(second, *weight_2, bias_2, x, first.outputs);
  Layer& final = weight_2 ? second : first;
  check_dtype("out", out, x.scalar_type());
  check_size("out", out, 0, batch);
  check_size("out", out, 1, into ? tokens : lists.slots());
  check_size("out", out, 2, final.outputs);
  first.storage = second.storage = storage;
  first.activation = activation_of(activation);
  PackedRows packing{storage, 0, from.width, norm_of(norm_weight, norm_bias, norm_eps, from.width), nullptr, nullptr};
  if (!lists.valid()) return kBadContents;

  std::vector<const void*> sources;
  std::vector<void*> targets;
  sources.reserve(batch * lists.slots());
  targets.reserve(batch * lists.slots());
  const int64_t element = bytes_of(storage);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t j = 0; j < lists.slots(); ++j) {
      const int64_t id = lists.at(b, j);
      if (id >= 0) {
        sources.push_back(from.at(b, id));
        targets.push_back(to.at(b, into ? id : j));
      } else if (!into) {
        memset(to.at(b, j), 0, final.outputs * element);
      }
    }
  const int64_t rows = static_cast<int64_t>(sources.size());
  const int64_t most = weight_2 ? std::min(rows, kRowsAtOnce) : rows;
  const int64_t packed_bytes = loops.packed_bytes(storage, most, from.width);
  const int64_t hidden_bytes = weight_2 ? loops.packed_bytes(storage, most, first.outputs) : 0;
  Scratch& kept = scratch_of_call();
  char* memory = kept.reserve(packed_bytes + hidden_bytes);
  if (!memory && packed_bytes + hidden_bytes > 0) return kNoMemory;
  packing.packed = memory;
  first.packed = memory;
  first.next = weight_2 ? memory + packed_bytes : nullptr;
  second.packed = first.next;
  final.past_caches = rows * final.outputs * element > kCaches;
  bool done = true;
  for (int64_t at = 0; at < rows; at += most) {
    packing.rows = first.rows = second.rows = std::min(most, rows - at);
    packing.row = sources.data() + at;
    final.out = targets.data() + at;
    run_parallel(loops.panels(packing.rows), 0, [&](int64_t i, Lease&) { loops.pack(packing, i); });
    done &= run_layer(loops, first);
    if (weight_2) done &= run_layer(loops, second);
  }
  kept.trim();
  return done ? kOk : kNoMemory;
}

// ---- buffers ----

void copy_rows(const DeltaMatmulLoops& loops, const std::vector<char*>& to, const std::vector<const char*>& from, int64_t row_bytes) {
  const int64_t rows = static_cast<int64_t>(to.size());
  const RowCopy p{to.data(), from.data(), row_bytes, rows * row_bytes > kCaches};
  // a piece moves at least as much as a thread can while another is woken
  constexpr int64_t kShortestBytes = 32 << 10;
  if (row_bytes > 0)
    in_stretches(rows, std::max<int64_t>(1, kShortestBytes / row_bytes), [&](int64_t a, int64_t b) { loops.copy(p, a, b); });
}

// out = buffer (zeros where there is none) with the listed rows replaced; it may be the buffer itself
int64_t update(Tensor out, OptionalTensor buffer, Tensor rows, Tensor index, std::string isa) {
  const DeltaMatmulLoops& loops = loops_of<DeltaMatmulLoops>(isa);
  const TokenGrid to("out", out);
  const CheckedLists lists(index, to.batch, to.rows);
  const TokenGrid before = TokenGrid::of("buffer", buffer, out, to.rows), news("rows", rows, out, lists.slots());
  if (!lists.valid()) return kBadContents;
  std::vector<char*> targets;
  std::vector<const char*> sources;
  if (buffer && before.same_as(to)) {
    for (int64_t b = 0; b < to.batch; ++b)
      for (int64_t j = 0; j < lists.slots(); ++j)
        if (const int64_t id = lists.at(b, j); id >= 0) {
          targets.push_back(to.at(b, id));
          sources.push_back(news.at(b, j));
        }
  } else {
    for (int64_t b = 0; b < to.batch; ++b) {
      for (int64_t n = 0; n < to.rows; ++n) {
        targets.push_back(to.at(b, n));
        sources.push_back(buffer ? before.at(b, n) : nullptr);
      }
      for (int64_t j = 0; j < lists.slots(); ++j)
        if (const int64_t id = lists.at(b, j); id >= 0) sources[b * to.rows + id] = news.at(b, j);
    }
  }
  copy_rows(loops, targets, sources, to.width * static_cast<int64_t>(out.element_size()));
  return kOk;
}

int64_t update_backward(OptionalTensor grad_buffer, OptionalTensor grad_rows, Tensor grad_out, Tensor index, std::string isa) {
  const DeltaMatmulLoops& loops = loops_of<DeltaMatmulLoops>(isa);
  const TokenGrid from("grad_out", grad_out);
  const CheckedLists lists(index, from.batch, from.rows);
  const TokenGrid to_buffer = TokenGrid::of("grad_buffer", grad_buffer, grad_out, from.rows);
  const TokenGrid to_rows = TokenGrid::of("grad_rows", grad_rows, grad_out, lists.slots());
  if (!lists.valid()) return kBadContents;
  std::vector<char*> targets;
  std::vector<const char*> sources;
  if (grad_buffer)
    for (int64_t b = 0; b < from.batch; ++b) {
      for (int64_t n = 0; n < from.rows; ++n) {
        targets.push_back(to_buffer.at(b, n));
        sources.push_back(from.at(b, n));
      }
      for (int64_t j = 0; j < lists.slots(); ++j)
        if (const int64_t id = lists.at(b, j); id >= 0) sources[b * from.rows + id] = nullptr;
    }
  if (grad_rows)
    for (int64_t b = 0; b < from.batch; ++b)
      for (int64_t j = 0; j < lists.slots(); ++j) {
        const int64_t id = lists.at(b, j);
        targets.push_back(to_rows.at(b, j));
        sources.push_back(id >= 0 ? from.at(b, id) : nullptr);
      }
  copy_rows(loops, targets, sources, from.width * static_cast<int64_t>(grad_out.element_size()));
  return kOk;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tokenops, CPU, m) {
  m.impl("delta_matmul_cpu_gate", TORCH_BOX(&gate));
  m.impl("delta_matmul_cpu_gate_backward", TORCH_BOX(&gate_backward));
  m.impl("delta_matmul_cpu_linear", TORCH_BOX(&linear));
  m.impl("delta_matmul_cpu_update", TORCH_BOX(&update));
  m.impl("delta_matmul_cpu_update_backward", TORCH_BOX(&update_backward));
}

}  // namespace tokenops
