// The loops of sparse_attention on random problems, against a plain double loop; `make sanitize` builds and runs it with
// AddressSanitizer and UBSan. Arguments: the instruction sets to test, those that this machine has.
//
// Every buffer is an allocation of exactly its size, so one element too far is an error. What a call must not read (rows that
// no list names, gaps between rows, scratch memory) is NaN, and what it must not write holds a mark that is looked for afterwards.
#include "cpu/sparse_attention.h"

#include <math.h>
#include <string.h>

#include <numeric>

#include "check.h"

namespace tokenops {
namespace {

// [sequence, head, row, width] in a random order of dimensions, with random gaps behind its rows
struct Tensor {
  Grid grid;
  Numbers numbers;
  int64_t width;

  static Tensor make(Storage storage, bool packed, int64_t sequences, int64_t heads, int64_t rows, int64_t width, double fill) {
    const int64_t pitch = width + pick_of<int64_t>({0, 0, 1, 8, 24}), grids = packed ? 1 : sequences;
    const bool heads_first = chance(0.5);
    Grid grid{nullptr, packed ? 0 : heads * rows * pitch, heads_first ? rows * pitch : pitch, heads_first ? pitch : heads * pitch};
    Tensor made{grid, Numbers(storage, grids * heads * rows * pitch, fill), width};
    made.grid.data = made.numbers.data();
    return made;
  }
  int64_t place(int64_t s, int64_t h, int64_t row) const { return s * grid.sequence + h * grid.head + row * grid.row; }
  void randomise(int64_t s, int64_t h, int64_t row, double size = 1) {
    for (int64_t c = 0; c < width; ++c) numbers.set(place(s, h, row) + c, size * normal());
  }
};

// ---- problems ----

struct List {
  std::vector<int32_t> row, slot, rank, empty, rest;
};

struct Lists {
  std::vector<List> lists;
  std::vector<RowList> views;
  int64_t sequence, head;
  RowLists table() {
    for (const List& each : lists) {
      bool range = true;
      for (size_t i = 1; i < each.row.size(); ++i) range &= each.row[i] == each.row[i - 1] + 1;
      views.push_back({each.row.data(), each.slot.data(), each.rank.data(), static_cast<int64_t>(each.row.size()), range, each.empty.data(),
                       static_cast<int64_t>(each.empty.size()), each.rest.data(), static_cast<int64_t>(each.rest.size())});
    }
    return {views.data(), sequence, head};
  }
};

// lists of `slots` slots each over `rows` rows, empty slots anywhere; packed: one list of slots, cut into sequences
Lists make_lists(bool packed, int64_t sequences, int64_t heads, int64_t rows, int64_t slots, double empty) {
  const bool per_sequence = packed || chance(0.5), per_head = chance(0.5);
  const int64_t n_sequences = per_sequence ? sequences : 1, n_heads = per_head ? heads : 1;
  Lists made{std::vector<List>(n_sequences * n_heads), {}, per_sequence ? n_heads : 0, per_head ? 1 : 0};
  for (int64_t h = 0; h < n_heads; ++h) {
    std::vector<int32_t> order(rows);
    std::vector<int64_t> cuts{0, slots};
    for (int64_t s = 1; s < n_sequences; ++s) cuts.push_back(pick(0, slots));
    std::sort(cuts.begin(), cuts.end());
    std::vector<bool> named(rows);
    for (int64_t s = 0; s < n_sequences; ++s) {
      List& list = made.lists[s * n_heads + h];
      if (s == 0 || !packed) {
        std::iota(order.begin(), order.end(), 0);
        if (chance(0.7)) std::shuffle(order.begin(), order.end(), random_bits);
        named.assign(rows, false);
      }
      const int64_t first = packed ? cuts[s] : 0, last = packed ? cuts[s + 1] : slots;
      for (int64_t slot = first; slot < last; ++slot) {
        if (chance(empty)) {
          list.empty.push_back(static_cast<int32_t>(slot));
          continue;
        }
        named[order[slot]] = true;
        list.row.push_back(order[slot]);
        list.slot.push_back(static_cast<int32_t>(slot));
        list.rank.push_back(packed ? static_cast<int32_t>(slot - first) : order[slot]);
      }
      if (!packed || s == n_sequences - 1)
        for (int64_t r = 0; r < rows; ++r)
          if (!named[r]) list.rest.push_back(static_cast<int32_t>(r));
    }
  }
  return made;
}

int64_t divisor_of(int64_t n) {
  int64_t divisor = pick(1, n);
  while (n % divisor) --divisor;
  return divisor;
}

struct Problem {
  Storage storage = pick_of({Storage::f32, Storage::bf16, Storage::f16});
  bool packed = chance(0.25), by_row = chance(0.4), want_squares = chance(0.5), small = chance(0.4);
  int64_t sequences = pick(1, 3), kv_heads = pick(1, 3), group = pick(1, 3), heads = kv_heads * group;
  int64_t width = 8 * pick_of<int64_t>({1, 2, 3, 5, 8, 9, 16, 32}), value_width = chance(0.5) ? width : 8 * pick(1, 12);
  int64_t n = pick(1, small ? 32 : 150), m = pick(1, small ? 32 : 260);
  int64_t slots = chance(0.3) ? n : pick(0, n), kv_slots = chance(0.3) ? m : pick(0, m);
  Lists query_lists = make_lists(packed, sequences, heads, n, slots, pick_of({0.0, 0.2}));
  Lists key_lists = make_lists(packed, sequences, kv_heads, m, kv_slots, pick_of({0.0, 0.2}));
  Tensor query = tensor(heads, n, width), key = tensor(kv_heads, m, width), value = tensor(kv_heads, m, value_width);
  Tensor out = tensor(heads, by_row ? n : slots, value_width, kMark);
  Numbers lse{Storage::f32, grids() * heads * slots, kMark}, row_sq{Storage::f32, grids() * heads * slots, kMark};
  Numbers bias{Storage::f32, grids() * kv_heads * m, NAN};
  Mask mask = chance(0.5) ? Mask::none : pick_of({Mask::boolean, Mask::f32, Mask::bf16, Mask::f16});
  std::vector<uint8_t> visible = std::vector<uint8_t>(grids() * heads * n * m);
  // a cell for each key row, or for each slot of a packed sequence
  Storage rel_storage = pick_of({Storage::f32, storage});
  int64_t rel_height = packed ? pick(1, kv_slots + 1) : divisor_of(m);
  int64_t rel_width = packed ? kv_slots / rel_height + 1 : m / rel_height;
  Tensor rel_h = Tensor::make(rel_storage, packed, sequences, heads, n, rel_height, NAN);
  Tensor rel_w = Tensor::make(rel_storage, packed, sequences, heads, n, rel_width, NAN);
  Numbers added{mask == Mask::bf16 ? Storage::bf16 : mask == Mask::f16 ? Storage::f16 : Storage::f32, grids() * heads * n * m, 0};
  SparseAttention p{};

  Problem() {
    p.storage = storage;
    p.sequences = sequences, p.query_heads = heads, p.kv_heads = kv_heads, p.width = width, p.value_width = value_width;
    p.queries = query_lists.table(), p.keys = key_lists.table();
    p.scale = static_cast<float>(1 / sqrt(static_cast<double>(width)));
    p.causal = chance(0.3);
    p.out_by_row = by_row, p.past_caches = chance(0.5);
    p.lse = static_cast<float*>(lse.data());
    if (want_squares) p.row_sq = static_cast<float*>(row_sq.data());
    p.stat_sequence = packed ? 0 : heads * slots, p.stat_head = slots;
    for_rows(heads, p.queries, [&](int64_t s, int64_t h, int32_t row) { query.randomise(s, h, row); });
    const double hidden = pick_of({0.0, 0.3, 1.0});
    if (chance(0.5)) p.bias = static_cast<float*>(bias.data());
    p.bias_sequence = packed ? 0 : kv_heads * m, p.bias_head = m, p.bias_row = 1;
    for_rows(kv_heads, p.keys, [&](int64_t s, int64_t h, int32_t row) {
      key.randomise(s, h, row), value.randomise(s, h, row);
      bias.set(bias_place(s, h, row), chance(hidden) ? -INFINITY : normal());
    });
    p.mask = mask;
    p.mask_data = mask == Mask::boolean ? visible.data() : added.data();
    p.mask_sequence = packed ? 0 : heads * n * m, p.mask_head = n * m, p.mask_row = m, p.mask_column = 1;
    for (size_t i = 0; i < visible.size(); ++i) {
      visible[i] = !chance(0.3);
      added.set(static_cast<int64_t>(i), visible[i] ? normal() : -INFINITY);
    }
    if (chance(0.4)) {
      p.rel_storage = rel_storage, p.rel_height = rel_height, p.rel_width = rel_width;
      p.rel_h = rel_h.grid, p.rel_w = rel_w.grid;
      for_rows(heads, p.queries, [&](int64_t s, int64_t h, int32_t row) { rel_h.randomise(s, h, row), rel_w.randomise(s, h, row); });
    }
    p.query = query.grid, p.key = key.grid, p.value = value.grid, p.out = out.grid;
  }
  Problem(const Problem&) = delete;

  int64_t grids() const { return packed ? 1 : sequences; }
  Tensor tensor(int64_t n_heads, int64_t rows, int64_t columns, double fill = NAN) const {
    return Tensor::make(storage, packed, sequences, n_heads, rows, columns, fill);
  }
  int64_t stat(int64_t s, int64_t h, int64_t slot) const { return s * p.stat_sequence + h * p.stat_head + slot; }
  int64_t bias_place(int64_t s, int64_t h, int64_t row) const { return s * p.bias_sequence + h * p.bias_head + row; }
  template <class F>
  void for_rows(int64_t n_heads, const RowLists& lists, F&& f) const {
    for (int64_t s = 0; s < sequences; ++s)
      for (int64_t h = 0; h < n_heads; ++h)
        for (int64_t i = 0; i < lists.at(s, h).count; ++i) f(s, h, lists.at(s, h).row[i]);
  }
  double logit(int64_t s, int64_t h, int64_t i, int64_t j) const {
    const RowList &queries = p.queries.at(s, h), &keys = p.keys.at(s, h / group);
    const int64_t row = queries.row[i], column = keys.row[j];
    if (p.causal && keys.rank[j] > queries.rank[i]) return -INFINITY;
    double sum = 0;
    for (int64_t c = 0; c < width; ++c)
      sum += query.numbers.get(query.place(s, h, row) + c) * key.numbers.get(key.place(s, h / group, column) + c);
    sum *= p.scale;
    if (p.bias) sum += bias.get(bias_place(s, h / group, column));
    if (p.rel_h.data) {
      sum += rel_h.numbers.get(rel_h.place(s, h, row) + keys.rank[j] / rel_width);
      sum += rel_w.numbers.get(rel_w.place(s, h, row) + keys.rank[j] % rel_width);
    }
    const int64_t at = s * p.mask_sequence + h * p.mask_head + row * p.mask_row + column;
    if (mask == Mask::boolean) return visible[at] ? sum : -INFINITY;
    return mask == Mask::none ? sum : sum + added.get(at);
  }
  std::string text() const {
    char line[400];
    snprintf(
        line, sizeof(line),
        "%s sequences=%d%s kv_heads=%d group=%d D=%d Dv=%d N=%d K=%d M=%d L=%d causal=%d bias=%d mask=%d rel_pos=%dx%d by_row=%d row_sq=%d "
        "past_caches=%d",
        name_of(storage), static_cast<int>(sequences), packed ? " packed" : "", static_cast<int>(kv_heads), static_cast<int>(group),
        static_cast<int>(width), static_cast<int>(value_width), static_cast<int>(n), static_cast<int>(slots), static_cast<int>(m),
        static_cast<int>(kv_slots), p.causal, p.bias != nullptr, static_cast<int>(mask), static_cast<int>(p.rel_height),
        static_cast<int>(p.rel_width), by_row, want_squares, p.past_caches);
    return line;
  }
};

// ---- what should come out ----

struct Wanted {
  std::vector<double> weights, lse;  // of one (sequence, query head): [i][j], [i]
  Wanted(const Problem& problem, int64_t s, int64_t h) {
    const int64_t queries = problem.p.queries.at(s, h).count, keys = problem.p.keys.at(s, h / problem.group).count;
    weights.resize(queries * keys);
    for (int64_t i = 0; i < queries; ++i) {
      double* row = weights.data() + i * keys;
      double top = -INFINITY, sum = 0;
      for (int64_t j = 0; j < keys; ++j) top = std::max(top, row[j] = problem.logit(s, h, i, j));
      for (int64_t j = 0; j < keys; ++j) sum += row[j] = top == -INFINITY ? 0 : exp(row[j] - top);
      for (int64_t j = 0; j < keys; ++j) row[j] /= sum > 0 ? sum : 1;
      lse.push_back(top == -INFINITY ? -INFINITY : top + log(sum));
    }
  }
};

// ---- the tests ----

int64_t longest(const Lists& lists) {
  size_t most = 0;
  for (const List& each : lists.lists) most = std::max(most, each.row.size());
  return static_cast<int64_t>(most);
}

void run_forward(const Problem& problem, const SparseAttentionLoops& loops) {
  const SparseAttention& p = problem.p;
  const int64_t keys = longest(problem.key_lists);
  if (loops.is_short(p, longest(problem.query_lists), keys) && chance(0.8)) {
    const std::vector<int64_t> cuts = cut(p.sequences * p.query_heads);
    for (size_t i = 1; i < cuts.size(); ++i) loops.forward_short(p, cuts[i - 1], cuts[i], Scratch(loops.forward_scratch(p, keys)));
    return;
  }
  for (int64_t s = 0; s < p.sequences; ++s)
    for (int64_t kv = 0; kv < p.kv_heads; ++kv) {
      int64_t blocks = 0;
      for (int64_t h = kv * p.group(); h < (kv + 1) * p.group(); ++h) blocks += loops.query_blocks(p.queries.at(s, h).count);
      const std::vector<int64_t> cuts = cut(blocks);
      const Scratch scratch(loops.forward_scratch(p, p.keys.at(s, kv).count));
      for (size_t i = 1; i < cuts.size(); ++i) {
        const bool packed = i > 1 && chance(0.5);
        if (!packed) scratch.spoil();
        loops.forward(p, s, kv, cuts[i - 1], cuts[i], packed, scratch);
      }
    }
}

bool forward_is_right(Problem& problem, const SparseAttentionLoops& loops) {
  const SparseAttention& p = problem.p;
  run_forward(problem, loops);
  Comparison out("out", problem.out.numbers), lse("lse", problem.lse), row_sq("row_sq", problem.row_sq);
  for (int64_t s = 0; s < p.sequences; ++s)
    for (int64_t h = 0; h < p.query_heads; ++h) {
      const RowList &queries = p.queries.at(s, h), &keys = p.keys.at(s, h / p.group());
      const Wanted wanted(problem, s, h);
      for (int64_t i = 0; i < queries.count; ++i) {
        const double* weights = wanted.weights.data() + i * keys.count;
        lse.expect(problem.stat(s, h, queries.slot[i]), wanted.lse[i]);
        if (p.row_sq) row_sq.expect(problem.stat(s, h, queries.slot[i]), std::inner_product(weights, weights + keys.count, weights, 0.0));
        for (int64_t c = 0; c < p.value_width; ++c) {
          double sum = 0;
          for (int64_t j = 0; j < keys.count; ++j)
            sum += weights[j] * problem.value.numbers.get(problem.value.place(s, h / p.group(), keys.row[j]) + c);
          out.expect(problem.out.place(s, h, problem.by_row ? queries.row[i] : queries.slot[i]) + c, sum);
        }
      }
      for (int64_t i = 0; i < queries.empties; ++i) {
        lse.expect(problem.stat(s, h, queries.empty[i]), -INFINITY);
        if (p.row_sq) row_sq.expect(problem.stat(s, h, queries.empty[i]), 0);
        for (int64_t c = 0; c < p.value_width && !problem.by_row; ++c) out.expect(problem.out.place(s, h, queries.empty[i]) + c, 0);
      }
    }
  return out.holds(problem.storage) & lse.holds(problem.storage) & row_sq.holds(problem.storage);
}

// runs on the results of a forward pass in slot order
bool backward_is_right(Problem& problem, const SparseAttentionLoops& loops) {
  SparseAttention& p = problem.p;
  const int64_t group = p.group();
  Tensor grad_out = problem.tensor(p.query_heads, problem.slots, p.value_width);
  // <grad_out, value> of order one, like the logits: the gradient of a lone key's logit is the difference of two of them
  const double size = 1 / sqrt(static_cast<double>(p.value_width));
  for (int64_t s = 0; s < p.sequences; ++s)
    for (int64_t h = 0; h < p.query_heads; ++h)
      for (int64_t i = 0; i < p.queries.at(s, h).count; ++i) grad_out.randomise(s, h, p.queries.at(s, h).slot[i], size);
  Tensor grad_query = problem.tensor(p.query_heads, problem.n, p.width, kMark);
  Tensor grad_key = problem.tensor(p.kv_heads, problem.m, p.width, kMark);
  Tensor grad_value = problem.tensor(p.kv_heads, problem.m, p.value_width, kMark);
  Tensor grad_rel_h =
      Tensor::make(problem.rel_storage, problem.packed, problem.sequences, p.query_heads, problem.n, problem.rel_height, kMark);
  Tensor grad_rel_w =
      Tensor::make(problem.rel_storage, problem.packed, problem.sequences, p.query_heads, problem.n, problem.rel_width, kMark);
  Numbers grad_bias(Storage::f32, problem.grids() * p.kv_heads * problem.m, kMark);
  p.grad_out = grad_out.grid;
  const bool want_query = chance(0.8), want_key = chance(0.8), want_value = chance(0.8), want_bias = chance(0.5);
  const bool want_rel_h = p.rel_h.data && chance(0.8), want_rel_w = p.rel_w.data && chance(0.8);
  if (want_query) p.grad_query = grad_query.grid;
  if (want_key) p.grad_key = grad_key.grid;
  if (want_value) p.grad_value = grad_value.grid;
  if (want_bias) p.grad_bias = static_cast<float*>(grad_bias.data());
  if (want_rel_h) p.grad_rel_h = grad_rel_h.grid;
  if (want_rel_w) p.grad_rel_w = grad_rel_w.grid;
  p.grad_bias_sequence = p.bias_sequence, p.grad_bias_head = p.bias_head;

  constexpr int64_t kMostParts = 3;
  const bool split = chance(0.5);
  p.part_row = p.width + (p.wants_rel() ? p.rel_height + p.rel_width : 0);
  p.part_head = problem.slots * p.part_row, p.part_sequence = problem.packed ? 0 : p.part_head * p.query_heads;
  p.part_stride = p.part_head * p.query_heads * problem.grids();
  Numbers shares(Storage::f32, kMostParts * p.part_stride, NAN);
  if (split) p.grad_query_parts = static_cast<float*>(shares.data());
  for (int64_t s = 0; s < p.sequences; ++s)
    for (int64_t kv = 0; kv < p.kv_heads; ++kv) {
      const int64_t count = p.keys.at(s, kv).count;
      const std::vector<int64_t> cuts = split ? cut(count) : std::vector<int64_t>{0, count};
      const int64_t parts = static_cast<int64_t>(cuts.size()) - 1;
      for (int64_t part = 0; part < parts; ++part)
        loops.backward(p, s, kv, part, cuts[part], cuts[part + 1], Scratch(loops.backward_scratch(p, cuts[part + 1] - cuts[part])));
      for (int64_t h = kv * group; h < (kv + 1) * group && split && (want_query || p.wants_rel()); ++h)
        loops.sum_query_parts(p, s, h, parts);
    }

  // a lone key's logit has no gradient: what comes out is the rounding of two equal terms of order one, coarser than the rule's floor
  if (longest(problem.key_lists) == 1) return true;

  Comparison dq("grad_query", grad_query.numbers), dk("grad_key", grad_key.numbers), dv("grad_value", grad_value.numbers),
      db("grad_bias", grad_bias), drh("grad_rel_h", grad_rel_h.numbers), drw("grad_rel_w", grad_rel_w.numbers);
  for (int64_t s = 0; s < p.sequences; ++s)
    for (int64_t kv = 0; kv < p.kv_heads; ++kv) {
      const RowList& keys = p.keys.at(s, kv);
      std::vector<double> for_key(keys.count * p.width), for_value(keys.count * p.value_width), for_bias(keys.count);
      for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
        const RowList& queries = p.queries.at(s, h);
        const Wanted wanted(problem, s, h);
        for (int64_t i = 0; i < queries.count; ++i) {
          const double* weights = wanted.weights.data() + i * keys.count;
          const int64_t at_grad = grad_out.place(s, h, queries.slot[i]), at_query = problem.query.place(s, h, queries.row[i]);
          std::vector<double> slope(keys.count), for_query(p.width), for_rel_h(p.rel_height), for_rel_w(p.rel_width);
          double squares = 0;
          // <grad_out, out> of the rounded out that the call is given, which is all a backward pass knows
          double mean = 0;
          for (int64_t c = 0; c < p.value_width; ++c)
            mean += grad_out.numbers.get(at_grad + c) * problem.out.numbers.get(problem.out.place(s, h, queries.slot[i]) + c);
          for (int64_t j = 0; j < keys.count; ++j) {
            for (int64_t c = 0; c < p.value_width; ++c) {
              const double grad = grad_out.numbers.get(at_grad + c);
              slope[j] += grad * problem.value.numbers.get(problem.value.place(s, kv, keys.row[j]) + c);
              for_value[j * p.value_width + c] += weights[j] * grad;
            }
          }
          for (int64_t j = 0; j < keys.count; ++j) {
            slope[j] = weights[j] * (slope[j] - mean);
            for_bias[j] += slope[j];
            squares += slope[j] * slope[j];
            if (p.rel_h.data) for_rel_h[keys.rank[j] / p.rel_width] += slope[j], for_rel_w[keys.rank[j] % p.rel_width] += slope[j];
            for (int64_t c = 0; c < p.width; ++c) {
              for_query[c] += p.scale * slope[j] * problem.key.numbers.get(problem.key.place(s, kv, keys.row[j]) + c);
              for_key[j * p.width + c] += p.scale * slope[j] * problem.query.numbers.get(at_query + c);
            }
          }
          for (int64_t c = 0; c < p.width && want_query; ++c) dq.expect(grad_query.place(s, h, queries.row[i]) + c, for_query[c]);
          // over all keys the slopes of a query cancel
          for (int64_t y = 0; y < p.rel_height && want_rel_h; ++y)
            drh.expect(grad_rel_h.place(s, h, queries.row[i]) + y, for_rel_h[y], sqrt(squares));
          for (int64_t x = 0; x < p.rel_width && want_rel_w; ++x)
            drw.expect(grad_rel_w.place(s, h, queries.row[i]) + x, for_rel_w[x], sqrt(squares));
        }
        for (int64_t i = 0; i < queries.rests && want_query; ++i)
          for (int64_t c = 0; c < p.width; ++c) dq.expect(grad_query.place(s, h, queries.rest[i]) + c, 0);
        for (int64_t i = 0; i < queries.rests && want_rel_h; ++i)
          for (int64_t y = 0; y < p.rel_height; ++y) drh.expect(grad_rel_h.place(s, h, queries.rest[i]) + y, 0);
        for (int64_t i = 0; i < queries.rests && want_rel_w; ++i)
          for (int64_t x = 0; x < p.rel_width; ++x) drw.expect(grad_rel_w.place(s, h, queries.rest[i]) + x, 0);
      }
      for (int64_t j = 0; j < keys.count + keys.rests; ++j) {
        const bool listed = j < keys.count;
        const int64_t row = listed ? keys.row[j] : keys.rest[j - keys.count];
        if (want_bias) db.expect(problem.bias_place(s, kv, row), listed ? for_bias[j] : 0);
        for (int64_t c = 0; c < p.width && want_key; ++c) dk.expect(grad_key.place(s, kv, row) + c, listed ? for_key[j * p.width + c] : 0);
        for (int64_t c = 0; c < p.value_width && want_value; ++c)
          dv.expect(grad_value.place(s, kv, row) + c, listed ? for_value[j * p.value_width + c] : 0);
      }
    }
  return dq.holds(problem.storage) & dk.holds(problem.storage) & dv.holds(problem.storage) & db.holds(problem.storage) &
         drh.holds(problem.storage) & drw.holds(problem.storage);
}

bool test(const char* isa, const SparseAttentionLoops& loops) {
  constexpr unsigned kProblems = 300;
  unsigned backwards = 0;
  for (unsigned seed = 0; seed < kProblems; ++seed) {
    random_bits.seed(seed);
    Problem problem;
    bool right = forward_is_right(problem, loops);
    if (right && !problem.by_row) {
      right = backward_is_right(problem, loops);
      ++backwards;
    }
    if (!right) {
      fprintf(stderr, "sparse_attention %s, problem %u: %s\n", isa, seed, problem.text().c_str());
      return false;
    }
  }
  printf("sparse_attention %s: %u problems forward, %u backward\n", isa, kProblems, backwards);
  return true;
}

}  // namespace
}  // namespace tokenops

int main(int count, char** arguments) { return tokenops::run_tests(count, arguments, tokenops::test); }
