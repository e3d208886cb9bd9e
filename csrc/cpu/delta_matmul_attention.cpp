// The tensor side of delta_attention on the CPU: tensors -> lists -> pieces of work -> the loops of one instruction set.
#include "delta_matmul_attention.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "../tensors.h"
#include "call.h"
#include "grid.h"
#include "id_lists.h"
#include "isa.h"
#include "threads.h"

namespace tokenops {

namespace {

RowList list_of(const std::vector<int32_t>& rows) {
  RowList list{};
  list.row = list.rank = list.slot = rows.data();
  list.count = static_cast<int64_t>(rows.size());
  return list;
}

// the ids of one sample's list without its empty slots; false: an id out of range, or twice
bool read_list(std::vector<int32_t>& to, const IdLists& lists, int64_t sample, int64_t rows) {
  Seen seen(rows, true);
  for (int64_t j = 0; j < lists.slots; ++j) {
    const int64_t id = lists.at(sample, j);
    if (id == -1) continue;
    if (id < 0 || id >= rows || seen.again(id, 0)) return false;
    to.push_back(static_cast<int32_t>(id));
  }
  return true;
}

// what the loops' pointers point into
struct Lists {
  std::vector<int32_t> kept, cells, afresh;
};

void* part_of_state(const char* name, const Tensor& t, ScalarType dtype, std::initializer_list<int64_t> sizes) {
  check_dense(name, t, dtype, sizes);
  return t.mutable_data_ptr();
}

int64_t attend(Tensor out, Tensor query, Tensor key, Tensor value, OptionalTensor rows, OptionalTensor cells, OptionalTensor rel_h,
               OptionalTensor rel_w, double scale, double guard, int64_t refresh, double crossover, Tensor output, Tensor old_value,
               OptionalTensor old_key, OptionalTensor maximum, OptionalTensor total, OptionalTensor peak, OptionalTensor turn,
               OptionalTensor probability, std::string isa) {
  const DeltaAttentionLoops& loops = loops_of<DeltaAttentionLoops>(isa);
  check_rank("query", query, 4);
  check_rank("key", key, 4);
  check_rank("value", value, 4);
  const ScalarType dtype = query.scalar_type();
  const int64_t batch = query.size(0), heads = query.size(1), tokens = query.size(2), keys = key.size(2);
  STD_TORCH_CHECK(tokens < INT32_MAX && keys < INT32_MAX, "there must be fewer than 2^31 - 1 tokens");
  STD_TORCH_CHECK(rows.has_value() == cells.has_value(), "rows and cells must be given together");

  DeltaAttention p{};
  SparseAttention& grids = p.grids;
  grids.storage = storage_of("query", query);
  grids.sequences = batch;
  grids.query_heads = grids.kv_heads = heads;
  grids.width = query.size(3);
  grids.value_width = value.size(3);
  check_widths(grids);
  grids.query = grid_of("query", query, dtype, batch, heads, tokens, grids.width);
  grids.key = grid_of("key", key, dtype, batch, heads, keys, grids.width);
  grids.value = grid_of("value", value, dtype, batch, heads, keys, grids.value_width);
  grids.out = grid_of("out", out, dtype, batch, heads, tokens, grids.value_width);
  grids.scale = static_cast<float>(scale);
  grids.past_caches = batch * heads * tokens * grids.value_width * bytes_of(grids.storage) > kCaches;
  set_rel_pos(grids, rel_h, rel_w, batch, tokens, keys);
  p.tokens = tokens;
  p.cells = keys;
  p.first = !rows.has_value();
  p.guard = static_cast<float>(guard);
  p.output = static_cast<float*>(part_of_state("state.output", output, ScalarType::Float, {batch, heads, tokens, grids.value_width}));
  p.old_value = part_of_state("state.value", old_value, old_value.scalar_type(), {batch, heads, keys, grids.value_width});
  p.stored = storage_of("state.value", old_value);
  const bool paper = probability.has_value();
  if (paper) {
    p.probability = part_of_state("state.probability", *probability, old_value.scalar_type(), {batch, heads, keys, tokens});
  } else {
    STD_TORCH_CHECK(old_key && maximum && total && peak && turn, "a state of mode exact has key, maximum, total, peak and turn");
    check_dtype("state.value", old_value, dtype);
    p.old_key = part_of_state("state.key", *old_key, dtype, {batch, heads, keys, grids.width});
    const auto statistic = [&](const char* name, const Tensor& t) {
      return static_cast<float*>(part_of_state(name, t, ScalarType::Float, {batch, heads, tokens}));
    };
    p.maximum = statistic("state.maximum", *maximum);
    p.total = statistic("state.total", *total);
    p.peak = statistic("state.peak", *peak);
    part_of_state("state.turn", *turn, ScalarType::Int, {});
  }
  // nothing is written before all lists are known to be in order
  const int64_t slice = paper || refresh <= 0 ? 0 : (tokens + refresh - 1) / refresh, turns = slice ? (tokens + slice - 1) / slice : 0;
  // a turn out of range is nobody's: another `refresh` may be asked for than in the frame before
  const int64_t now = p.first || paper ? 0 : *turn->const_data_ptr<int32_t>();
  std::vector<int32_t> every_row(tokens), every_key(keys);
  std::iota(every_row.begin(), every_row.end(), 0);
  std::iota(every_key.begin(), every_key.end(), 0);
  std::vector<Lists> lists(batch);
  std::vector<DeltaLists> loop_lists(batch);
  int64_t most_changed = 0;
  for (int64_t s = 0; s < batch; ++s) {
    Lists& of = lists[s];
    if (p.first) {
      of.cells = every_key;
      of.afresh = every_row;
    } else {
      std::vector<int32_t> changed;
      if (!read_list(of.cells, IdLists(*cells, batch), s, keys) || !read_list(changed, IdLists(*rows, batch), s, tokens))
        return kBadContents;
      std::vector<uint8_t> fresh(tokens, static_cast<double>(of.cells.size()) > crossover * static_cast<double>(keys));
      for (const int32_t row : changed) fresh[row] = 1;
      for (int64_t row = std::max<int64_t>(now, 0) * slice; row < std::min((now + 1) * slice, tokens); ++row) fresh[row] = 1;
      for (int64_t row = 0; row < tokens; ++row) (fresh[row] ? of.afresh : of.kept).push_back(static_cast<int32_t>(row));
    }
    loop_lists[s] = {list_of(every_row), list_of(of.kept), list_of(of.cells), list_of(every_key)};
    most_changed = std::max(most_changed, loop_lists[s].cells.count);
  }
  p.lists = loop_lists.data();

  // calls pass(piece of a head) over the blocks of rows(s, h), whose cost grows with the keys they meet
  const auto for_heads = [&](int64_t scratch_keys, const auto& rows_of, int64_t keys_met, const auto& pass) {
    BlockRow row;
    for (int64_t i = 0; i < batch * heads; ++i) {
      const int64_t count = rows_of(i).count;
      row.add(count ? loops.blocks(count) : 0, keys_met + 16);
    }
    const int64_t pieces = std::min<int64_t>(kPiecesPerThread * torch::stable::get_num_threads(), row.work());
    return run_parallel(pieces, loops.scratch(p, scratch_keys), [&](int64_t piece, Lease& lease) {
      row.for_piece(piece, pieces, [&](int64_t i, int64_t from, int64_t to) {
        pass(i, from, to, lease.holds == i, lease.memory);
        lease.holds = i;
      });
    });
  };

  bool done = true;
  if (paper) {
    const auto all = [&](int64_t i) -> const RowList& { return loop_lists[i / heads].rows; };
    done &= for_heads(most_changed, all, keys, [&](int64_t i, int64_t from, int64_t to, bool packed, char* scratch) {
      loops.publish(p, i / heads, i % heads, from, to, packed, scratch);
    });
  } else {
    std::vector<uint8_t> again(batch * heads * tokens, 0);
    p.again = again.data();
    const auto kept = [&](int64_t i) -> const RowList& { return loop_lists[i / heads].kept; };
    done &= for_heads(most_changed, kept, 2 * most_changed, [&](int64_t i, int64_t from, int64_t to, bool packed, char* scratch) {
      loops.advance(p, i / heads, i % heads, from, to, packed, scratch);
    });
    // rows whose sums came out unsound join those of their sample that are computed afresh anyway
    std::vector<std::vector<int32_t>> joined(batch * heads);
    std::vector<RowList> afresh(batch * heads);
    for (int64_t i = 0; i < batch * heads; ++i) {
      const std::vector<int32_t>& common = lists[i / heads].afresh;
      const uint8_t* flags = again.data() + i * tokens;
      if (!memchr(flags, 1, tokens)) {
        afresh[i] = list_of(common);
        continue;
      }
      joined[i] = common;
      for (int64_t row = 0; row < tokens; ++row)
        if (flags[row]) joined[i].push_back(static_cast<int32_t>(row));
      afresh[i] = list_of(joined[i]);
    }
    const auto fresh_rows = [&](int64_t i) -> const RowList& { return afresh[i]; };
    done &= for_heads(keys, fresh_rows, keys, [&](int64_t i, int64_t from, int64_t to, bool packed, char* scratch) {
      loops.afresh(p, i / heads, i % heads, afresh[i], from, to, packed, scratch);
    });
    *turn->mutable_data_ptr<int32_t>() = static_cast<int32_t>(p.first || turns == 0 ? 0 : (now + 1) % turns);
  }
  done &= run_parallel(batch * heads, 0, [&](int64_t i, Lease&) { loops.remember(p, i / heads, i % heads); });
  return done ? kOk : kNoMemory;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tokenops, CPU, m) { m.impl("delta_matmul_cpu_attention", TORCH_BOX(&attend)); }

}  // namespace tokenops
