// The tensor side of token_merge on a GPU: tensors -> arguments -> launches. Soft merging: token_merge_soft.cu.
#include <string>

#include "launch.h"
#include "token_merge_pairs.cuh"
#include "token_merge_plan.cuh"
#include "token_merge_segments.cuh"
#include "token_merge_tensors.h"

namespace tokenops {
namespace {

// scratch: (5 pitch + 7 blocks) words a sample for each side, and with splits two more for each of them and slot of a
void argmax(Tensor best, Tensor index, Tensor scratch, Tensor a, Tensor b, OptionalTensor a_mask, OptionalTensor b_mask,
            OptionalTensor a_scale, OptionalTensor b_scale, OptionalTensor a_place, OptionalTensor b_place, int64_t t_low, int64_t t_high,
            int64_t reach_y, int64_t reach_x, bool normalize, OptionalTensor lists, OptionalTensor listed, int64_t splits, int64_t first_id,
            int64_t id_step) {
  const int64_t batch = a.size(0), rows = a.size(1), width = a.size(2);
  check_dtype("b", b, a.scalar_type());
  check_size("b", b, 0, batch);
  check_size("b", b, 2, width);
  check_new("best", best, ScalarType::Float, batch, rows);
  check_new("index", index, ScalarType::Int, batch, rows);
  check_dtype("scratch", scratch, ScalarType::Int);
  check_compared_width(width);
  STD_TORCH_CHECK(splits > 0, "splits must be positive, got ", splits);
  STD_TORCH_CHECK(lists.has_value() == listed.has_value(), "lists and how many they list must be given together");
  with_float("a", a, [&](auto number) {
    using T = decltype(number);
    Words words(scratch);
    PairArguments<T> p{};
    p.windowed = a_place.has_value();
    p.a = side_of<T>("a", a, a_mask, a_scale, a_place, lists, listed, 0, kRowsA, p.windowed, words);
    p.b = side_of<T>("b", b, b_mask, b_scale, b_place, lists, listed, 1, kRowsB, p.windowed, words);
    take_blocks(p.a.of, batch, words), take_blocks(p.b.of, batch, words);
    p.samples = static_cast<int>(batch), p.width = static_cast<int>(width);
    p.normalize = normalize;
    // whatever float16 holds, its products and squares are float32 numbers
    p.usual = normalize && !std::is_same_v<T, f16> ? kUsual : 0;
    const int64_t bounds[][2] = {{held(t_low), held(t_high)}, {-held(reach_y), held(reach_y)}, {-held(reach_x), held(reach_x)}};
    for (int axis = 0; axis < kPlaces; ++axis) p.low[axis] = bounds[axis][0], p.high[axis] = bounds[axis][1];
    p.splits = static_cast<int>(splits), p.first_id = static_cast<int>(first_id), p.id_step = static_cast<int>(id_step);
    p.best = splits > 1 ? words.take<float>(splits * batch * rows) : best.mutable_data_ptr<float>();
    p.index = splits > 1 ? words.take<int32_t>(splits * batch * rows) : index.mutable_data_ptr<int32_t>();
    launch(a, describe<T>, batch * (p.a.of.blocks + p.b.of.blocks), kDescribeThreads, sizeof(DescribeShared), p);
    launch(a, p.windowed ? search<T, true> : search<T, false>, batch * splits * p.a.of.blocks, kSearchThreads,
           p.windowed ? sizeof(WindowShared<T>) : sizeof(SearchShared<T>), p);
    if (splits == 1) return;
    const ShareArguments shares{
        p.best,    p.a.of.factor, p.index, best.mutable_data_ptr<float>(), index.mutable_data_ptr<int32_t>(), p.samples,
        p.a.slots, p.a.of.pitch,  p.splits};
    launch(a, best_of_shares, (batch * rows + kSearchThreads - 1) / kSearchThreads, kSearchThreads, 0, shares);
  });
}

// How many blocks share the tiles of one: two on each processor, but two tiles for each at least.
int64_t splits(Tensor on, int64_t blocks, int64_t tiles) {
  return std::max<int64_t>(1, std::min(2 * processors(on) / std::max<int64_t>(blocks, 1), tiles / 2));
}

void list(Tensor lists, Tensor listed, Tensor role) {
  const int64_t batch = lists.size(1), tokens = lists.size(2);
  check_lists(lists, batch, tokens);
  check_new("listed", listed, ScalarType::Int, 2, batch);
  check_per_token("role", role, ScalarType::Char, batch, tokens);
  launch(role, list_roles, 2 * batch, plan_threads(tokens), sizeof(int[2][kMostWarps]),
         ListArguments{role.const_data_ptr<int8_t>(), broadcast_stride(role, 0), role.stride(1), lists.mutable_data_ptr<int32_t>(),
                       listed.mutable_data_ptr<int32_t>(), static_cast<int>(batch), static_cast<int>(tokens)});
}

PlanArguments new_plan(const Tensor& slot, const Tensor& count, const Tensor& order, const Tensor& offsets, const Tensor& scratch) {
  const int64_t batch = slot.size(0), tokens = slot.size(1), n_out = offsets.size(1) - 1;
  check_new_plan(slot, count, order, offsets, batch, tokens);
  check_new("scratch", scratch, ScalarType::Int, batch, kPlanScratch * tokens);
  PlanArguments p{};
  p.slot = slot.mutable_data_ptr<int32_t>(), p.count = count.mutable_data_ptr<int32_t>();
  p.order = order.mutable_data_ptr<int32_t>(), p.offsets = offsets.mutable_data_ptr<int32_t>();
  p.scratch = scratch.mutable_data_ptr<int32_t>();
  p.tokens = static_cast<int>(tokens), p.n_out = static_cast<int>(n_out);
  return p;
}

void launch_plan(const Tensor& on, const PlanArguments& p) { launch(on, plan, on.size(0), plan_threads(p.tokens), sizeof(PlanShared), p); }

// Of the sources whose score is greater than the threshold the `most` best merge into their partners.
void match(Tensor slot, Tensor count, Tensor order, Tensor offsets, Tensor scratch, OptionalTensor role, Tensor score, Tensor partner,
           OptionalTensor lists, int64_t first, int64_t step, int64_t most, double threshold) {
  PlanArguments p = new_plan(slot, count, order, offsets, scratch);
  const int64_t batch = slot.size(0), slots = score.size(1);
  check_new("score", score, ScalarType::Float, batch, slots);
  check_new("partner", partner, ScalarType::Int, batch, slots);
  STD_TORCH_CHECK(most >= 0 && slots <= p.tokens, "sources must be among the tokens, and their number not negative");
  if (role) {
    check_per_token("role", *role, ScalarType::Char, batch, p.tokens);
    p.role = role->const_data_ptr<int8_t>(), p.role_sample = broadcast_stride(*role, 0), p.role_token = role->stride(1);
  }
  if (lists) {
    check_lists(*lists, batch, p.tokens);
    STD_TORCH_CHECK(slots == p.tokens, "there must be a score for each place of a list");
    p.sources = lists->const_data_ptr<int32_t>();
  }
  p.score = score.const_data_ptr<float>(), p.partner = partner.const_data_ptr<int32_t>();
  p.slots = static_cast<int>(slots), p.first = static_cast<int>(first), p.step = static_cast<int>(step);
  p.most = static_cast<int>(std::min(most, slots)), p.threshold = static_cast<float>(threshold);
  launch_plan(slot, p);
}

void make_plan(Tensor slot, Tensor count, Tensor order, Tensor offsets, Tensor scratch, Tensor target, bool is_slot) {
  PlanArguments p = new_plan(slot, count, order, offsets, scratch);
  check_new("target", target, ScalarType::Int, slot.size(0), p.tokens);
  p.target = target.const_data_ptr<int32_t>(), p.is_slot = is_slot;
  launch_plan(slot, p);
}

// A plan that was given, and grids whose rows go along it: tokens [B, N, W], and merged ones [B, n_out, W].
struct SegmentCall {
  const Tensor &slot, &order, &offsets;
  int64_t batch, tokens, n_out, width;
  bool aligned = true;

  SegmentCall(const Tensor& any, const Tensor& slot, const Tensor& order, const Tensor& offsets)
      : slot(slot),
        order(order),
        offsets(offsets),
        batch(any.size(0)),
        tokens(slot.size(1)),
        n_out(offsets.size(1) - 1),
        width(any.size(2)) {
    check_plan(slot, order, offsets, batch, tokens, n_out);
    STD_TORCH_CHECK(n_out >= 0 && n_out < INT32_MAX - 1024, "offsets must have n_out + 1 columns, fewer than 2^31 - 1024");
  }

  template <class T>
  Rows<T> rows(const char* name, const Tensor& t, const Tensor& like, int64_t count) {
    check_tokens(name, t, like.scalar_type(), batch, count, width);
    aligned &= is_wide(t);
    return {static_cast<T*>(const_cast<void*>(t.const_data_ptr())), t.stride(0), t.stride(1)};
  }

  template <class T>
  SegmentArguments<T> arguments(const std::string& mode, const OptionalTensor& size) const {
    SegmentArguments<T> p{};
    p.slot = slot.const_data_ptr<int32_t>(), p.slot_sample = broadcast_stride(slot, 0);
    p.order = order.const_data_ptr<int32_t>(), p.order_sample = broadcast_stride(order, 0);
    p.offsets = offsets.const_data_ptr<int32_t>(), p.offsets_sample = broadcast_stride(offsets, 0);
    if (size) {
      check_per_token("size", *size, ScalarType::Float, batch, tokens);
      p.size = size->const_data_ptr<float>(), p.size_sample = broadcast_stride(*size, 0), p.size_token = size->stride(1);
    }
    p.mode = mode_of(mode);
    p.samples = static_cast<int>(batch), p.tokens = static_cast<int>(tokens), p.n_out = static_cast<int>(n_out);
    p.width = static_cast<int>(width);
    const int64_t pieces = (width + Wide<T>::kCount - 1) / Wide<T>::kCount;
    for (p.lanes = 1; p.lanes < std::min<int64_t>(pieces, kWarp);) p.lanes *= 2;
    return p;
  }

  // one of a kernel's two forms, with `lanes` threads for each of so many rows
  template <class T>
  void run(void (*wide)(SegmentArguments<T>), void (*narrow)(SegmentArguments<T>), int64_t count, const SegmentArguments<T>& p) const {
    const int64_t blocks = (batch * count * p.lanes + kSegmentThreads - 1) / kSegmentThreads;
    launch(slot, aligned ? wide : narrow, blocks, kSegmentThreads, 0, p);
  }
};

void merge(Tensor out, Tensor x, Tensor slot, Tensor order, Tensor offsets, OptionalTensor size, std::string mode) {
  with_float("x", x, [&](auto number) {
    using T = decltype(number);
    SegmentCall call(x, slot, order, offsets);
    SegmentArguments<T> p = call.arguments<T>(mode, size);
    p.x = call.rows<const T>("x", x, x, call.tokens);
    p.result = call.rows<T>("out", out, x, call.n_out);
    call.run<T>(merge_rows<T, true>, merge_rows<T, false>, call.n_out, p);
  });
}

// x and out where something depends on them: with amax, and for the gradient of the size
void merge_gradients(OptionalTensor grad_x, OptionalTensor grad_size, Tensor grad_out, OptionalTensor x, OptionalTensor out, Tensor slot,
                     Tensor order, Tensor offsets, OptionalTensor size, std::string mode) {
  with_float("grad_out", grad_out, [&](auto number) {
    using T = decltype(number);
    SegmentCall call(grad_out, slot, order, offsets);
    SegmentArguments<T> p = call.arguments<T>(mode, size);
    p.y = call.rows<const T>("grad_out", grad_out, grad_out, call.n_out);
    STD_TORCH_CHECK((x && out) || (p.mode != MergeMode::amax && !grad_size), "x and out must be given where a gradient depends on them");
    if (x) p.x = call.rows<const T>("x", *x, grad_out, call.tokens);
    if (out) p.out = call.rows<const T>("out", *out, grad_out, call.n_out);
    if (grad_x) p.result = call.rows<T>("grad_x", *grad_x, grad_out, call.tokens);
    if (grad_size) {
      check_new("grad_size", *grad_size, ScalarType::Float, call.batch, call.tokens);
      p.grad_size = grad_size->mutable_data_ptr<float>();
      // it is a sum over a row, by a whole warp
      p.lanes = kWarp;
    }
    call.run<T>(merge_backward<T, true>, merge_backward<T, false>, std::max(call.tokens, call.n_out), p);
  });
}

void unmerge(Tensor out, Tensor y, Tensor slot, Tensor order, Tensor offsets, std::string mode) {
  with_float("y", y, [&](auto number) {
    using T = decltype(number);
    SegmentCall call(y, slot, order, offsets);
    SegmentArguments<T> p = call.arguments<T>(mode, std::nullopt);
    p.y = call.rows<const T>("y", y, y, call.n_out);
    p.result = call.rows<T>("out", out, y, call.tokens);
    call.run<T>(unmerge_rows<T, true>, unmerge_rows<T, false>, call.tokens, p);
  });
}

}  // namespace

TOKENOPS_CUDA_OPERATORS(m) {
  m.impl("token_merge_cuda_splits", TOKENOPS_CUDA_OPERATOR(splits));
  m.impl("token_merge_cuda_argmax", TOKENOPS_CUDA_OPERATOR(argmax));
  m.impl("token_merge_cuda_list", TOKENOPS_CUDA_OPERATOR(list));
  m.impl("token_merge_cuda_match", TOKENOPS_CUDA_OPERATOR(match));
  m.impl("token_merge_cuda_plan", TOKENOPS_CUDA_OPERATOR(make_plan));
  m.impl("token_merge_cuda_merge", TOKENOPS_CUDA_OPERATOR(merge));
  m.impl("token_merge_cuda_merge_backward", TOKENOPS_CUDA_OPERATOR(merge_gradients));
  m.impl("token_merge_cuda_unmerge", TOKENOPS_CUDA_OPERATOR(unmerge));
}

}  // namespace tokenops
