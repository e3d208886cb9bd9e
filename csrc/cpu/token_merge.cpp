// The tensor side of token_merge on the CPU: tensors -> samples -> pieces of work -> the loops of one instruction set.
#include "token_merge.h"

#include <atomic>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "../token_merge_tensors.h"
#include "call.h"
#include "isa.h"
#include "threads.h"
#include "token_merge_plan.h"

namespace tokenops {
namespace {

constexpr int64_t kSmallestPiece = 32 << 10;  // bytes moved; less is not worth a second thread
constexpr int64_t kPairPiecesPerThread = 2;   // every piece packs the candidates of its sample again

template <class T>
std::unique_ptr<T[]> allocate(int64_t count) {
  return std::unique_ptr<T[]>(new (std::nothrow) T[std::max<int64_t>(count, 1)]);
}

int64_t pieces_of(int64_t bytes) {
  return std::min<int64_t>(kPiecesPerThread * torch::stable::get_num_threads(), bytes / kSmallestPiece + 1);
}

template <class T>
const T* sample_of(const Tensor& t, int64_t s) {
  return t.const_data_ptr<T>() + s * broadcast_stride(t, 0);
}

const char* sample_bytes(const Tensor& t, int64_t s) {
  return static_cast<const char*>(t.const_data_ptr()) + s * t.stride(0) * static_cast<int64_t>(t.element_size());
}

// the rows of each sample that take part, ascending; one list for all samples where they do not differ
class IdLists {
 public:
  template <class TakesPart>
  IdLists(int64_t samples, int64_t tokens, const TakesPart& takes_part) : starts_{0} {
    for (int64_t s = 0; s < samples; ++s) {
      for (int64_t i = 0; i < tokens; ++i)
        if (takes_part(s, i)) ids_.push_back(static_cast<int32_t>(i));
      starts_.push_back(static_cast<int64_t>(ids_.size()));
    }
  }
  const int32_t* ids(int64_t s) const { return ids_.data() + starts_[at(s)]; }
  int64_t count(int64_t s) const { return starts_[at(s) + 1] - starts_[at(s)]; }

 private:
  int64_t at(int64_t s) const { return starts_.size() == 2 ? 0 : s; }
  std::vector<int32_t> ids_;
  std::vector<int64_t> starts_;
};

IdLists unmasked(const char* name, const OptionalTensor& mask, const Tensor& grid) {
  if (!mask) return {1, grid.size(1), [](int64_t, int64_t) { return true; }};
  check_per_token(name, *mask, ScalarType::Bool, grid.size(0), grid.size(1));
  return {mask->size(0), grid.size(1), [&](int64_t s, int64_t i) { return sample_of<bool>(*mask, s)[i * mask->stride(1)]; }};
}

PairSide side_of(const Tensor& grid, int64_t s, const IdLists& lists, const OptionalTensor& scale, const OptionalTensor& place) {
  PairSide side{sample_bytes(grid, s), grid.stride(1), lists.ids(s), lists.count(s), nullptr, 0, nullptr};
  if (scale) side.scale = sample_of<float>(*scale, s), side.scale_row = scale->stride(1);
  if (place) side.place = sample_of<int32_t>(*place, s);
  return side;
}

void check_side(const char* name, const Tensor& grid, const OptionalTensor& scale, const OptionalTensor& place, bool windowed) {
  check_tokens(name, grid);
  if (scale) check_per_token("a scale", *scale, ScalarType::Float, grid.size(0), grid.size(1));
  check_place(place, windowed, grid.size(0), grid.size(1));
  if (place) check_contiguous("a place", *place);
}

Pairs pairs_of(const Tensor& a, bool normalize, bool windowed, int64_t t_low, int64_t t_high, int64_t reach_y, int64_t reach_x) {
  const int64_t width = a.size(2);
  check_compared_width(width);
  return {storage_of("what is compared", a), width, normalize, windowed, held(t_low), held(t_high), held(reach_y), held(reach_x)};
}

// after(sample) runs once all its rows have their pair, on the thread that found the last of them
template <class After>
Status find_pairs(const TokenMergeLoops& loops, const Pairs& p, const std::vector<PairSample>& samples, const After& after) {
  BlockRow rows;
  std::vector<std::atomic<int64_t>> blocks_left(samples.size());
  int64_t most = 0;
  for (size_t s = 0; s < samples.size(); ++s) {
    const int64_t blocks = loops.pair_blocks(samples[s].a.count);
    rows.add(blocks, samples[s].b.count + 16);
    blocks_left[s] = blocks;
    most = std::max(most, samples[s].b.count);
    if (blocks == 0) after(static_cast<int64_t>(s));
  }
  const int64_t pieces = std::min<int64_t>(kPairPiecesPerThread * torch::stable::get_num_threads(), rows.work());
  std::atomic<bool> finite{true};
  const bool done = run_parallel(pieces, loops.pair_scratch(p, most), [&](int64_t piece, Lease& lease) {
    rows.for_piece(piece, pieces, [&](int64_t s, int64_t from, int64_t to) {
      if (!loops.pair(p, samples[s], from, to, lease.holds == s, lease.memory)) finite = false;
      lease.holds = s;
      if (blocks_left[s].fetch_sub(to - from) == to - from) after(s);
    });
  });
  return !done ? kNoMemory : finite ? kOk : kBadContents;
}

int64_t argmax(Tensor best, Tensor index, Tensor a, Tensor b, OptionalTensor a_mask, OptionalTensor b_mask, OptionalTensor a_scale,
               OptionalTensor b_scale, OptionalTensor a_place, OptionalTensor b_place, int64_t t_low, int64_t t_high, int64_t reach_y,
               int64_t reach_x, bool normalize, std::string isa) {
  const TokenMergeLoops& loops = loops_of<TokenMergeLoops>(isa);
  const bool windowed = a_place.has_value();
  check_side("a", a, a_scale, a_place, windowed);
  check_side("b", b, b_scale, b_place, windowed);
  const int64_t batch = a.size(0), rows = a.size(1);
  const Pairs p = pairs_of(a, normalize, windowed, t_low, t_high, reach_y, reach_x);
  check_dtype("b", b, a.scalar_type());
  check_size("b", b, 0, batch);
  check_size("b", b, 2, p.width);
  check_new("best", best, ScalarType::Float, batch, rows);
  check_new("index", index, ScalarType::Int, batch, rows);
  std::fill_n(best.mutable_data_ptr<float>(), batch * rows, -std::numeric_limits<float>::infinity());
  std::fill_n(index.mutable_data_ptr<int32_t>(), batch * rows, -1);
  const IdLists of_a = unmasked("a_mask", a_mask, a), of_b = unmasked("b_mask", b_mask, b);
  std::vector<PairSample> samples;
  for (int64_t s = 0; s < batch; ++s)
    samples.push_back({side_of(a, s, of_a, a_scale, a_place), side_of(b, s, of_b, b_scale, b_place),
                       best.mutable_data_ptr<float>() + s * rows, index.mutable_data_ptr<int32_t>() + s * rows});
  return find_pairs(loops, p, samples, [](int64_t) {});
}

// the tensors of a plan that is being made
struct NewPlan {
  int64_t batch, tokens, n_out;
  int32_t *slot, *count, *order, *offsets;

  NewPlan(const Tensor& slots, const Tensor& counts, const Tensor& orders, const Tensor& offset, int64_t batch, int64_t tokens)
      : batch(batch), tokens(tokens), n_out(offset.size(1) - 1) {
    check_new_plan(slots, counts, orders, offset, batch, tokens);
    slot = slots.mutable_data_ptr<int32_t>(), count = counts.mutable_data_ptr<int32_t>();
    order = orders.mutable_data_ptr<int32_t>(), offsets = offset.mutable_data_ptr<int32_t>();
  }
  PlanOut sample(int64_t s) const { return {tokens, n_out, slot + s * tokens, count + s, order + s * tokens, offsets + s * (n_out + 1)}; }
};

int64_t match(Tensor slot, Tensor count, Tensor order, Tensor offsets, Tensor metric, OptionalTensor role, bool class_token,
              bool distill_token, OptionalTensor place, int64_t t_low, int64_t t_high, int64_t reach_y, int64_t reach_x,
              OptionalTensor source_scale, OptionalTensor destination_scale, std::optional<int64_t> r, std::optional<double> threshold,
              bool normalize, std::string isa) {
  const TokenMergeLoops& loops = loops_of<TokenMergeLoops>(isa);
  const bool windowed = place.has_value();
  check_side("metric", metric, source_scale, place, windowed);
  check_side("metric", metric, destination_scale, place, windowed);
  const int64_t batch = metric.size(0), tokens = metric.size(1);
  const Pairs p = pairs_of(metric, normalize, windowed, t_low, t_high, reach_y, reach_x);
  const NewPlan plan(slot, count, order, offsets, batch, tokens);
  if (role) check_per_token("role", *role, ScalarType::Char, batch, tokens);
  STD_TORCH_CHECK(r.value_or(0) >= 0, "r must not be negative, got ", r.value_or(0));
  const auto role_of = [&](int64_t s, int64_t i) -> int {
    if (role) return sample_of<int8_t>(*role, s)[i * role->stride(1)];
    if ((i == 0 && class_token) || (i == 1 && distill_token)) return 0;
    return i % 2 ? kDestination : kSource;
  };
  const int64_t kinds = role ? role->size(0) : 1;
  const IdLists sources(kinds, tokens, [&](int64_t s, int64_t i) { return role_of(s, i) & kSource; });
  const IdLists destinations(kinds, tokens, [&](int64_t s, int64_t i) { return role_of(s, i) & kDestination; });
  const auto best = allocate<float>(batch * tokens);
  const auto index = allocate<int32_t>(batch * tokens), parent = allocate<int32_t>(batch * tokens);
  const auto keys = allocate<uint64_t>(batch * tokens);
  if (!best || !index || !parent || !keys) return kNoMemory;
  std::vector<PairSample> samples;
  for (int64_t s = 0; s < batch; ++s)
    samples.push_back({side_of(metric, s, sources, source_scale, place), side_of(metric, s, destinations, destination_scale, place),
                       best.get() + s * tokens, index.get() + s * tokens});
  std::atomic<bool> right{true};
  const Status status = find_pairs(loops, p, samples, [&](int64_t s) {
    int32_t* of_sample = parent.get() + s * tokens;
    for (int64_t i = 0; i < tokens; ++i) {
      const int kind = role_of(s, i);
      if (kind < 0 || kind > kDropped) right = false;
      of_sample[i] = kind & kDropped ? -1 : static_cast<int32_t>(i);
    }
    const PairSide& a = samples[s].a;
    adopt_sources(of_sample, a.list, a.count, samples[s].best, samples[s].index, r.value_or(a.count),
                  static_cast<float>(threshold.value_or(-std::numeric_limits<double>::infinity())), keys.get() + s * tokens);
    if (!plan_from_parents(of_sample, plan.sample(s))) right = false;
  });
  return status != kOk ? status : right ? kOk : kBadContents;
}

int64_t make_plan(Tensor slot, Tensor count, Tensor order, Tensor offsets, Tensor target, bool is_slot) {
  check_rank("target", target, 2);
  check_dtype("target", target, ScalarType::Int);
  check_contiguous("target", target);
  const NewPlan plan(slot, count, order, offsets, target.size(0), target.size(1));
  const int32_t* given = target.const_data_ptr<int32_t>();
  const auto parent = allocate<int32_t>(is_slot ? 0 : plan.batch * plan.tokens);
  if (!parent) return kNoMemory;
  std::atomic<bool> right{true};
  run_parallel(plan.batch, 0, [&](int64_t s, Lease&) {
    const int32_t* of_sample = given + s * plan.tokens;
    int32_t* own = parent.get() + s * plan.tokens;
    if (!is_slot) std::copy_n(of_sample, plan.tokens, own);
    if (!(is_slot ? plan_from_slots(of_sample, plan.sample(s)) : plan_from_parents(own, plan.sample(s)))) right = false;
  });
  return right ? kOk : kBadContents;
}

// A plan that was given, and what is merged by it. tokens [B, N, W], merged [B, n_out, W]; either may be the result.
struct SegmentCall {
  Segments p;
  ScalarType dtype;
  int64_t batch, tokens, n_out;
  std::vector<SegmentSample> samples;
  bool sound = true;

  SegmentCall(const Tensor& x, const Tensor& y, const Tensor& slot, const Tensor& order, const Tensor& offsets, const std::string& mode)
      : dtype(x.scalar_type()), batch(x.size(0)), tokens(x.size(1)), n_out(y.size(1)), samples(batch) {
    check_tokens("tokens", x);
    check_tokens("merged tokens", y, dtype, batch, n_out, x.size(2));
    check_plan(slot, order, offsets, batch, tokens, n_out);
    p = {storage_of("tokens", x), mode_of(mode), x.size(2), batch * n_out * x.size(2) * static_cast<int64_t>(x.element_size()) > kCaches};
    for (int64_t s = 0; s < batch; ++s) {
      SegmentSample& sample = samples[s];
      sample = {};
      sample.slot = sample_of<int32_t>(slot, s), sample.order = sample_of<int32_t>(order, s);
      sample.offsets = sample_of<int32_t>(offsets, s);
      sample.tokens = sample_bytes(x, s), sample.token_row = x.stride(1);
      sample.merged = sample_bytes(y, s), sample.merged_row = y.stride(1);
      if (s < slot.size(0)) sound &= plan_is_sound(sample.slot, sample.order, sample.offsets, tokens, n_out);
    }
  }

  void set_sizes(const OptionalTensor& size) {
    if (!size) return;
    check_per_token("size", *size, ScalarType::Float, batch, tokens);
    for (int64_t s = 0; s < batch; ++s) samples[s].size = sample_of<float>(*size, s), samples[s].size_row = size->stride(1);
  }

  void set_result(const char* name, const Tensor& t, int64_t rows) {
    check_tokens(name, t, dtype, batch, rows, p.width);
    for (int64_t s = 0; s < batch; ++s) samples[s].result = const_cast<char*>(sample_bytes(t, s)), samples[s].result_row = t.stride(1);
  }

  // work(sample, first row, last row) over all rows of all samples
  template <class Work>
  void run(int64_t rows, const Work& work) const {
    BlockRow all;
    for (int64_t s = 0; s < batch; ++s) all.add(rows, 1);
    const int64_t pieces = std::min(pieces_of(batch * (tokens + n_out) * p.width * bytes_of(p.storage)), all.work());
    run_parallel(pieces, 0, [&](int64_t piece, Lease&) {
      all.for_piece(piece, pieces, [&](int64_t s, int64_t from, int64_t to) { work(samples[s], from, to); });
    });
  }
};

int64_t merge(Tensor out, Tensor x, Tensor slot, Tensor order, Tensor offsets, OptionalTensor size, std::string mode, std::string isa) {
  const TokenMergeLoops& loops = loops_of<TokenMergeLoops>(isa);
  SegmentCall call(x, out, slot, order, offsets, mode);
  if (!call.sound) return kBadContents;
  call.set_sizes(size);
  call.set_result("out", out, call.n_out);
  std::atomic<bool> right{true};
  call.run(call.n_out, [&](const SegmentSample& sample, int64_t from, int64_t to) {
    if (!loops.merge(call.p, sample, from, to)) right = false;
  });
  return right ? kOk : kBadContents;
}

int64_t merge_backward(OptionalTensor grad_x, OptionalTensor grad_size, Tensor grad_out, Tensor x, Tensor out, Tensor slot, Tensor order,
                       Tensor offsets, OptionalTensor size, std::string mode, std::string isa) {
  const TokenMergeLoops& loops = loops_of<TokenMergeLoops>(isa);
  SegmentCall call(x, out, slot, order, offsets, mode);
  if (!call.sound) return kBadContents;
  call.set_sizes(size);
  check_tokens("grad_out", grad_out, call.dtype, call.batch, call.n_out, call.p.width);
  if (grad_x) call.set_result("grad_x", *grad_x, call.tokens);
  if (grad_size) {
    STD_TORCH_CHECK(size.has_value(), "grad_size needs a size");
    check_new("grad_size", *grad_size, ScalarType::Float, call.batch, call.tokens);
  }
  const int64_t row_bytes = call.p.width * bytes_of(call.p.storage);
  for (int64_t s = 0; s < call.batch; ++s) {
    SegmentSample& sample = call.samples[s];
    sample.grad_merged = sample_bytes(grad_out, s), sample.grad_merged_row = grad_out.stride(1);
    if (grad_size) sample.grad_size = grad_size->mutable_data_ptr<float>() + s * call.tokens;
    // tokens that no output row owns: the loops go by output row and do not meet them
    for (int64_t i = 0; i < call.tokens; ++i)
      if (sample.slot[i] < 0) {
        if (grad_x) std::fill_n(static_cast<char*>(sample.result) + i * sample.result_row * bytes_of(call.p.storage), row_bytes, 0);
        if (grad_size) sample.grad_size[i] = 0.f;
      }
  }
  std::atomic<bool> right{true};
  call.run(call.n_out, [&](const SegmentSample& sample, int64_t from, int64_t to) {
    if (!loops.merge_backward(call.p, sample, from, to)) right = false;
  });
  return right ? kOk : kBadContents;
}

int64_t unmerge(Tensor out, Tensor y, Tensor slot, Tensor order, Tensor offsets, std::string mode, std::string isa) {
  const TokenMergeLoops& loops = loops_of<TokenMergeLoops>(isa);
  SegmentCall call(out, y, slot, order, offsets, mode);
  if (!call.sound) return kBadContents;
  call.set_result("out", out, call.tokens);
  call.run(call.tokens, [&](const SegmentSample& sample, int64_t from, int64_t to) { loops.unmerge(call.p, sample, from, to); });
  return kOk;
}

// x [B, N, C], metric [B, N, F], meta [B, M, F], out [B, M, C], mass_out [B, M], lse [B, N]
struct SoftCall {
  static constexpr int64_t kEnoughParts = 32, kSmallestPart = 256;
  SoftMerge p;
  int64_t batch, tokens, parts;
  std::vector<SoftSample> samples;

  SoftCall(const Tensor& x, const Tensor& metric, const Tensor& meta, double temperature, const OptionalTensor& mass, bool normalize,
           const Tensor& out, const Tensor& mass_out, const Tensor& lse)
      : batch(x.size(0)), tokens(x.size(1)), samples(batch) {
    check_tokens("x", x);
    check_like("metric", metric, x, tokens, metric.size(2));
    check_like("meta", meta, x, meta.size(1), metric.size(2));
    p = {storage_of("x", x), x.size(2), metric.size(2), meta.size(1), normalize, static_cast<float>(temperature)};
    STD_TORCH_CHECK(p.metas > 0 && p.metric_width > 0, "meta must have rows and columns");
    check_sums("out", out);
    check_new("mass_out", mass_out, ScalarType::Float, batch, p.metas);
    check_new("lse", lse, ScalarType::Float, batch, tokens);
    if (mass) check_per_token("mass", *mass, ScalarType::Float, batch, tokens);
    // a part follows from the shapes alone
    parts = std::max<int64_t>(1, std::min((kEnoughParts + batch - 1) / std::max<int64_t>(batch, 1), tokens / kSmallestPart));
    for (int64_t s = 0; s < batch; ++s) {
      SoftSample& sample = samples[s];
      sample = {};
      sample.x = sample_bytes(x, s), sample.x_row = x.stride(1);
      sample.metric = sample_bytes(metric, s), sample.metric_row = metric.stride(1);
      sample.meta = sample_bytes(meta, s), sample.meta_row = meta.stride(1);
      if (mass) sample.mass = sample_of<float>(*mass, s), sample.mass_row = mass->stride(1);
      sample.out = const_cast<float*>(out.const_data_ptr<float>()) + s * out.stride(0), sample.out_row = out.stride(1);
      sample.mass_out = numbers_of(mass_out, s), sample.lse = numbers_of(lse, s);
    }
  }

  int64_t first_of(int64_t part) const { return tokens * part / parts; }

  void check_like(const char* name, const Tensor& t, const Tensor& x, int64_t rows, int64_t width) const {
    check_tokens(name, t, x.scalar_type(), batch, rows, width);
  }
  // a row for each meta token, float32 whatever x is
  void check_sums(const char* name, const Tensor& t) const { check_tokens(name, t, ScalarType::Float, batch, p.metas, p.width); }
  static float* numbers_of(const Tensor& t, int64_t s) { return const_cast<float*>(t.const_data_ptr<float>()) + s * t.size(1); }
};

int64_t soft(Tensor out, Tensor mass_out, Tensor lse, Tensor x, Tensor metric, Tensor meta, double temperature, OptionalTensor mass,
             bool normalize, std::string isa) {
  const TokenMergeLoops& loops = loops_of<TokenMergeLoops>(isa);
  const SoftCall call(x, metric, meta, temperature, mass, normalize, out, mass_out, lse);
  const int64_t floats = loops.soft_part(call.p);
  const auto sums = allocate<float>(call.batch * call.parts * floats);
  if (!sums) return kNoMemory;
  const auto part_of = [&](int64_t i) { return sums.get() + i * floats; };
  std::atomic<bool> right{true};
  const bool done = run_parallel(call.batch * call.parts, loops.soft_scratch(call.p), [&](int64_t i, Lease& lease) {
    const int64_t part = i % call.parts;
    if (!loops.soft(call.p, call.samples[i / call.parts], call.first_of(part), call.first_of(part + 1), part_of(i), lease.memory))
      right = false;
  });
  if (!done) return kNoMemory;
  if (!right) return kBadContents;
  run_parallel(call.batch, 0, [&](int64_t s, Lease&) { loops.soft_sum(call.p, call.samples[s], part_of(s * call.parts), call.parts); });
  return kOk;
}

int64_t soft_backward(OptionalTensor grad_x, OptionalTensor grad_metric, OptionalTensor grad_meta, OptionalTensor grad_temperature,
                      OptionalTensor grad_mass, Tensor grad_out, Tensor grad_mass_out, Tensor x, Tensor metric, Tensor meta,
                      double temperature, OptionalTensor mass, bool normalize, Tensor out, Tensor mass_out, Tensor lse, std::string isa) {
  const TokenMergeLoops& loops = loops_of<TokenMergeLoops>(isa);
  SoftCall call(x, metric, meta, temperature, mass, normalize, out, mass_out, lse);
  call.check_sums("grad_out", grad_out);
  check_new("grad_mass_out", grad_mass_out, ScalarType::Float, call.batch, call.p.metas);
  if (grad_x) call.check_like("grad_x", *grad_x, x, call.tokens, call.p.width);
  if (grad_metric) call.check_like("grad_metric", *grad_metric, x, call.tokens, call.p.metric_width);
  if (grad_meta) call.check_like("grad_meta", *grad_meta, x, call.p.metas, call.p.metric_width);
  if (grad_mass) check_new("grad_mass", *grad_mass, ScalarType::Float, call.batch, call.tokens);
  if (grad_temperature) {
    check_rank("grad_temperature", *grad_temperature, 1);
    check_dtype("grad_temperature", *grad_temperature, ScalarType::Float);
    check_size("grad_temperature", *grad_temperature, 0, call.batch);
    check_contiguous("grad_temperature", *grad_temperature);
  }
  for (int64_t s = 0; s < call.batch; ++s) {
    SoftSample& sample = call.samples[s];
    sample.grad_out = grad_out.const_data_ptr<float>() + s * grad_out.stride(0), sample.grad_out_row = grad_out.stride(1);
    sample.grad_mass_out = call.numbers_of(grad_mass_out, s);
    if (grad_x) sample.grad_x = const_cast<char*>(sample_bytes(*grad_x, s)), sample.grad_x_row = grad_x->stride(1);
    if (grad_metric) {
      sample.grad_metric = const_cast<char*>(sample_bytes(*grad_metric, s));
      sample.grad_metric_row = grad_metric->stride(1);
    }
    if (grad_meta) sample.grad_meta = const_cast<char*>(sample_bytes(*grad_meta, s)), sample.grad_meta_row = grad_meta->stride(1);
    if (grad_mass) sample.grad_mass = call.numbers_of(*grad_mass, s);
    if (grad_temperature) sample.grad_temperature = grad_temperature->mutable_data_ptr<float>() + s;
  }
  const int64_t floats = loops.soft_backward_part(call.p), prepared_floats = loops.soft_prepared(call.p);
  const auto sums = allocate<float>(call.batch * call.parts * floats), prepared = allocate<float>(call.batch * prepared_floats);
  if (!sums || !prepared) return kNoMemory;
  const auto part_of = [&](int64_t i) { return sums.get() + i * floats; };
  const auto prepared_of = [&](int64_t s) { return prepared.get() + s * prepared_floats; };
  const int64_t scratch = loops.soft_backward_scratch(call.p);
  run_parallel(call.batch, 0, [&](int64_t s, Lease&) { loops.soft_prepare(call.p, call.samples[s], prepared_of(s)); });
  bool done = run_parallel(call.batch * call.parts, scratch, [&](int64_t i, Lease& lease) {
    const int64_t s = i / call.parts, part = i % call.parts;
    loops.soft_backward(call.p, call.samples[s], prepared_of(s), call.first_of(part), call.first_of(part + 1), part_of(i), lease.memory);
  });
  done &= run_parallel(call.batch, scratch, [&](int64_t s, Lease& lease) {
    loops.soft_backward_sum(call.p, call.samples[s], part_of(s * call.parts), call.parts, lease.memory);
  });
  return done ? kOk : kNoMemory;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tokenops, CPU, m) {
  m.impl("token_merge_cpu_argmax", TORCH_BOX(&argmax));
  m.impl("token_merge_cpu_match", TORCH_BOX(&match));
  m.impl("token_merge_cpu_plan", TORCH_BOX(&make_plan));
  m.impl("token_merge_cpu_merge", TORCH_BOX(&merge));
  m.impl("token_merge_cpu_merge_backward", TORCH_BOX(&merge_backward));
  m.impl("token_merge_cpu_unmerge", TORCH_BOX(&unmerge));
  m.impl("token_merge_cpu_soft", TORCH_BOX(&soft));
  m.impl("token_merge_cpu_soft_backward", TORCH_BOX(&soft_backward));
}

}  // namespace tokenops
