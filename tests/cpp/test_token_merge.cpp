// The plans and the loops of token_merge on random problems, against plain loops in double; see check.h for what counts as an error.
#include "cpu/token_merge.h"

#include <set>

#include "check.h"
#include "cpu/token_merge_plan.h"

namespace tokenops {
namespace {

constexpr Storage kStorages[] = {Storage::f32, Storage::bf16, Storage::f16};

// rows of numbers of one sample, with random gaps behind them
struct Table {
  int64_t rows, width, pitch;
  Numbers numbers;

  Table(Storage storage, int64_t rows, int64_t width, double fill = NAN)
      : rows(rows), width(width), pitch(width + pick_of<int64_t>({0, 0, 1, 8, 24})), numbers(storage, rows * pitch, fill) {}
  void randomise_row(int64_t row, double size = 1) {
    for (int64_t c = 0; c < width; ++c) numbers.set(row * pitch + c, size * normal());
  }
  void randomise(double size = 1) {
    for (int64_t i = 0; i < rows; ++i) randomise_row(i, size);
  }
  double at(int64_t row, int64_t c) const { return numbers.get(row * pitch + c); }
};

// ascending ids of some of n rows
std::vector<int32_t> some_of(int64_t n, double share) {
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < n; ++i)
    if (chance(share)) ids.push_back(static_cast<int32_t>(i));
  return ids;
}

// ---- pairs ----

struct Side {
  Table table;
  std::vector<int32_t> list, place;
  Numbers scale;
  Side(Storage storage, int64_t rows, int64_t width)
      : table(storage, rows, width), list(some_of(rows, pick_of({0.3, 0.9, 1.0}))), scale(Storage::f32, rows, NAN) {
    for (int32_t id : list) {
      table.randomise_row(id);
      scale.set(id, pick_of({0.25, 0.5, 1.0, 3.0}));
    }
    for (int64_t i = 0; i < rows * 3; ++i) place.push_back(static_cast<int32_t>(pick(0, 3)));
  }
  PairSide view(bool scaled, bool placed) {
    return {table.numbers.data(),
            table.pitch,
            list.data(),
            static_cast<int64_t>(list.size()),
            scaled ? static_cast<const float*>(scale.data()) : nullptr,
            1,
            placed ? place.data() : nullptr};
  }
  double norm(int64_t id) const {
    double sum = 0;
    for (int64_t c = 0; c < table.width; ++c) sum += table.at(id, c) * table.at(id, c);
    return sqrt(sum);
  }
};

bool pairs_are_right(const TokenMergeLoops& loops) {
  const Storage storage = pick_of({kStorages[0], kStorages[1], kStorages[2]});
  const int64_t width = 8 * pick(1, 12);
  Side a(storage, pick(1, 150), width), b(storage, pick(1, 80), width);
  const bool normalize = chance(0.7), a_scaled = chance(0.5), b_scaled = chance(0.5), windowed = chance(0.5);
  // a row of zeros, and one whose square overflows
  if (chance(0.3) && !a.list.empty())
    for (int64_t c = 0; c < width; ++c) a.table.numbers.set(a.list[0] * a.table.pitch + c, 0);
  if (chance(0.3) && !b.list.empty() && storage != Storage::f16 && normalize)
    for (int64_t c = 0; c < width; ++c) b.table.numbers.set(b.list[0] * b.table.pitch + c, ldexp(normal(), chance(0.5) ? 90 : -90));
  const Pairs p{storage, width, normalize, windowed, pick(-2, 1), pick(0, 2), pick(0, 2), pick(0, 2)};
  Numbers best(Storage::f32, a.table.rows, kMark);
  std::vector<int32_t> index(a.table.rows, -7);
  const PairSample sample{a.view(a_scaled, windowed), b.view(b_scaled, windowed), static_cast<float*>(best.data()), index.data()};
  const std::vector<int64_t> cuts = cut(loops.pair_blocks(sample.a.count));
  const Scratch scratch(loops.pair_scratch(p, sample.b.count));
  bool finite = true;
  for (size_t i = 1; i < cuts.size(); ++i) finite &= loops.pair(p, sample, cuts[i - 1], cuts[i], i > 1, scratch);

  Comparison bests("best", best);
  bool right = finite;
  for (int64_t i = 0; i < a.table.rows; ++i) {
    if (std::find(a.list.begin(), a.list.end(), i) == a.list.end()) {
      right &= index[i] == -7;
      continue;
    }
    double top = -INFINITY, chosen = -INFINITY;
    const double of_a = normalize ? (a.norm(i) > 0 ? 1 / a.norm(i) : 0) : 1;
    for (int32_t j : b.list) {
      const int32_t *from = &a.place[i * 3], *to = &b.place[j * 3];
      if (windowed &&
          (to[0] - from[0] < p.t_low || to[0] - from[0] > p.t_high || abs(to[1] - from[1]) > p.reach_y || abs(to[2] - from[2]) > p.reach_x))
        continue;
      double score = 0;
      for (int64_t c = 0; c < width; ++c) score += a.table.at(i, c) * b.table.at(j, c);
      score *= of_a * (normalize ? 1 / b.norm(j) : 1) * (b_scaled ? b.scale.get(j) : 1);
      top = std::max(top, score);
      if (j == index[i]) chosen = score;
    }
    right &= (index[i] >= 0) == (top > -INFINITY);
    // nearly equal candidates may change places by rounding
    right &= index[i] < 0 || chosen >= top - 1e-5 * (1 + fabs(top)) * (normalize ? 1 : width);
    bests.expect(i, top * (top > -INFINITY && a_scaled ? a.scale.get(i) : 1));
  }
  // float32 accumulation for every storage type
  right &= bests.holds(Storage::f32);
  if (right && !sample.b.count) right = std::count(index.begin(), index.end(), -1) == sample.a.count;
  return right;
}

// a number that is none is reported wherever it stands
bool pairs_report_nan(const TokenMergeLoops& loops) {
  const Storage storage = pick_of({kStorages[0], kStorages[1], kStorages[2]});
  Side a(storage, pick(1, 60), 16), b(storage, pick(1, 60), 16);
  Side& spoilt = chance(0.5) ? a : b;
  if (a.list.empty() || b.list.empty()) return true;
  const int32_t id = spoilt.list[pick(0, static_cast<int64_t>(spoilt.list.size()) - 1)];
  spoilt.table.numbers.set(id * spoilt.table.pitch + pick(0, 15), pick_of<double>({NAN, INFINITY, -INFINITY}));
  const Pairs p{storage, 16, chance(0.5), false, 0, 0, 0, 0};
  std::vector<float> best(a.table.rows);
  std::vector<int32_t> index(a.table.rows);
  const PairSample sample{a.view(false, false), b.view(false, false), best.data(), index.data()};
  return !loops.pair(p, sample, 0, loops.pair_blocks(sample.a.count), false, Scratch(loops.pair_scratch(p, sample.b.count)));
}

// ---- plans ----

struct Plan {
  int64_t tokens, n_out;
  std::vector<int32_t> slot, count, order, offsets;
  Plan(int64_t tokens, int64_t n_out)
      : tokens(tokens), n_out(n_out), slot(tokens, -7), count(1, -7), order(tokens, -7), offsets(n_out + 1, -7) {}
  PlanOut view() { return {tokens, n_out, slot.data(), count.data(), order.data(), offsets.data()}; }
  bool sound() const { return plan_is_sound(slot.data(), order.data(), offsets.data(), tokens, n_out); }
};

// parents without a cycle: every token hangs on one that comes before it in a random order
std::vector<int32_t> random_parents(int64_t n) {
  std::vector<int32_t> order(n), parent(n);
  for (int64_t i = 0; i < n; ++i) order[i] = static_cast<int32_t>(i);
  std::shuffle(order.begin(), order.end(), random_bits);
  const double owners = pick_of({0.05, 0.5, 0.95});
  for (int64_t i = 0; i < n; ++i) parent[order[i]] = chance(0.05) ? -1 : i == 0 || chance(owners) ? order[i] : order[pick(0, i - 1)];
  return parent;
}

bool plans_are_right() {
  const int64_t n = pick(1, 90);
  const std::vector<int32_t> parent = random_parents(n);
  std::vector<int32_t> owners;
  for (int64_t i = 0; i < n; ++i)
    if (parent[i] == i) owners.push_back(static_cast<int32_t>(i));
  const int64_t needed = static_cast<int64_t>(owners.size());
  Plan plan(n, needed + pick(0, 3));
  std::vector<int32_t> roots = parent;
  bool right = plan_from_parents(roots.data(), plan.view()) && plan.sound() && plan.count[0] == needed;
  for (int64_t i = 0; i < n && right; ++i) {
    int32_t root = static_cast<int32_t>(i);
    while (root >= 0 && parent[root] != root) root = parent[root];
    right &= roots[i] == root;
    const int64_t rank = std::lower_bound(owners.begin(), owners.end(), root) - owners.begin();
    right &= plan.slot[i] == (root < 0 ? -1 : rank);
    if (root == i) right &= plan.order[plan.offsets[rank]] == i;
  }
  for (int64_t k = plan.offsets[plan.n_out]; k < n; ++k) right &= plan.order[k] == -1;
  // its own slots again, which need no owner
  Plan again(n, plan.n_out);
  right &= plan_from_slots(plan.slot.data(), again.view()) && again.sound() && again.slot == plan.slot && again.offsets == plan.offsets;

  // what must be refused: a cycle, an id out of range, too many owners, and plans that contradict themselves
  if (n > 1) {
    std::vector<int32_t> cycle = parent;
    const int64_t from = pick(0, n - 2), to = pick(from + 1, n - 1);
    cycle[from] = static_cast<int32_t>(to), cycle[to] = static_cast<int32_t>(from);
    right &= !plan_from_parents(cycle.data(), Plan(n, n).view());
  }
  std::vector<int32_t> outside = parent;
  outside[pick(0, n - 1)] = static_cast<int32_t>(pick_of<int64_t>({-2, n, INT32_MAX, INT32_MIN}));
  right &= !plan_from_parents(outside.data(), Plan(n, n).view());
  if (needed > 0) {
    std::vector<int32_t> many = parent;
    right &= !plan_from_parents(many.data(), Plan(n, needed - 1).view());
    for (std::vector<int32_t> Plan::* part : {&Plan::slot, &Plan::order, &Plan::offsets}) {
      Plan broken = plan;
      std::vector<int32_t>& numbers = broken.*part;
      // of the order only the part that is in use
      const int64_t used = part == &Plan::order ? plan.offsets[plan.n_out] : static_cast<int64_t>(numbers.size());
      int32_t& number = numbers[pick(0, used - 1)];
      number = static_cast<int32_t>(pick_of<int64_t>({number + 1, number - 1, INT32_MAX, INT32_MIN, n + 3}));
      // a step between two rows without members is no contradiction
      if (broken.slot == plan.slot && broken.order == plan.order && broken.offsets == plan.offsets) continue;
      right &= !broken.sound();
    }
  }
  return right;
}

bool sources_are_right() {
  const int64_t n = pick(1, 60);
  const std::vector<int32_t> sources = some_of(n, 0.6);
  const int64_t count = static_cast<int64_t>(sources.size()), r = pick(0, count + 1);
  std::vector<float> best(n, NAN);
  std::vector<int32_t> index(n, -1), parent(n);
  for (int64_t i = 0; i < n; ++i) parent[i] = static_cast<int32_t>(i);
  for (int32_t id : sources) {
    // few values, so that there are ties; both zeros are one
    best[id] = pick_of({-INFINITY, -1.f, -0.f, 0.f, 0.5f, 2.f});
    index[id] = chance(0.9) ? static_cast<int32_t>(n) : -1;
  }
  const float threshold = pick_of({-INFINITY, -1.f, 0.f, 0.5f});
  std::vector<int32_t> wanted;
  for (int32_t id : sources)
    if (index[id] >= 0 && best[id] > threshold) wanted.push_back(id);
  std::stable_sort(wanted.begin(), wanted.end(), [&](int32_t x, int32_t y) { return best[x] > best[y]; });
  if (r < static_cast<int64_t>(wanted.size())) wanted.resize(r);
  const std::set<int32_t> gone(wanted.begin(), wanted.end());
  std::vector<uint64_t> scratch(count);
  adopt_sources(parent.data(), sources.data(), count, best.data(), index.data(), r, threshold, scratch.data());
  bool right = true;
  for (int64_t i = 0; i < n; ++i) right &= parent[i] == (gone.count(static_cast<int32_t>(i)) ? n : i);
  return right;
}

// ---- segments ----

bool segments_are_right(const TokenMergeLoops& loops) {
  const Storage storage = pick_of({kStorages[0], kStorages[1], kStorages[2]});
  const int64_t n = pick(1, 40), width = pick_of<int64_t>({1, 3, 8, 16, 40, 65});
  std::vector<int32_t> parent = random_parents(n);
  Plan plan(n, n);
  if (!plan_from_parents(parent.data(), plan.view())) return false;
  const MergeMode mode = pick_of({MergeMode::sum, MergeMode::mean, MergeMode::amax, MergeMode::keep});
  const bool sized = mode == MergeMode::mean && chance(0.6);
  Table tokens(storage, n, width), merged(storage, n, width, kMark), grad(storage, n, width);
  Numbers size(Storage::f32, n, NAN);
  for (int64_t i = 0; i < n; ++i) size.set(i, plan.slot[i] < 0 ? NAN : pick_of({0.0, 0.5, 1.0, 7.0}));
  for (int64_t i = 0; i < n; ++i)
    if (plan.slot[i] >= 0) tokens.randomise_row(i);
  grad.randomise();
  const Segments p{storage, mode, width, chance(0.3)};
  SegmentSample s{};
  s.slot = plan.slot.data(), s.order = plan.order.data(), s.offsets = plan.offsets.data();
  if (sized) s.size = static_cast<float*>(size.data()), s.size_row = 1;
  s.tokens = tokens.numbers.data(), s.token_row = tokens.pitch;
  s.result = merged.numbers.data(), s.result_row = merged.pitch;
  const auto by_pieces = [&](int64_t rows, const auto& run) {
    const std::vector<int64_t> cuts = cut(rows);
    bool right = true;
    for (size_t i = 1; i < cuts.size(); ++i) right &= run(cuts[i - 1], cuts[i]);
    return right;
  };
  bool right = by_pieces(n, [&](int64_t from, int64_t to) { return loops.merge(p, s, from, to); });

  Comparison out("merged", merged.numbers);
  const auto weight_of = [&](int32_t id) { return sized ? size.get(id) : 1.0; };
  std::vector<double> mass(n, 0);
  for (int64_t i = 0; i < n; ++i)
    if (plan.slot[i] >= 0) mass[plan.slot[i]] += mode == MergeMode::mean ? weight_of(static_cast<int32_t>(i)) : 0;
  for (int64_t row = 0; row < n; ++row)
    for (int64_t c = 0; c < width; ++c) {
      const int32_t first = plan.offsets[row], last = plan.offsets[row + 1];
      double sum = 0, top = -INFINITY;
      for (int32_t k = first; k < last; ++k) {
        const double x = tokens.at(plan.order[k], c);
        sum += x * (mode == MergeMode::mean ? weight_of(plan.order[k]) : 1);
        top = std::max(top, x);
      }
      const double wanted = first == last             ? 0
                            : mode == MergeMode::sum  ? sum
                            : mode == MergeMode::amax ? top
                            : mode == MergeMode::keep ? tokens.at(plan.order[first], c)
                            : mass[row] == 0          ? 0
                                                      : sum / mass[row];
      out.expect(row * merged.pitch + c, wanted);
    }
  right &= out.holds(storage);

  Table grad_tokens(storage, n, width, kMark);
  Numbers grad_size(Storage::f32, n, kMark);
  s.merged = merged.numbers.data(), s.merged_row = merged.pitch;
  s.grad_merged = grad.numbers.data(), s.grad_merged_row = grad.pitch;
  s.result = grad_tokens.numbers.data(), s.result_row = grad_tokens.pitch;
  if (sized) s.grad_size = static_cast<float*>(grad_size.data());
  right &= by_pieces(n, [&](int64_t from, int64_t to) { return loops.merge_backward(p, s, from, to); });
  Comparison for_tokens("gradient of tokens", grad_tokens.numbers), for_size("gradient of size", grad_size);
  for (int64_t i = 0; i < n; ++i) {
    const int32_t row = plan.slot[i];
    // tokens that are dropped belong to no row: the tensor side fills them
    if (row < 0) continue;
    const int32_t first = plan.offsets[row], last = plan.offsets[row + 1];
    double slope = 0;
    for (int64_t c = 0; c < width; ++c) {
      const double g = grad.at(row, c), by = mass[row] == 0 ? 0 : 1 / mass[row];
      double wanted = g;
      if (mode == MergeMode::mean) wanted = g * weight_of(static_cast<int32_t>(i)) * by;
      if (mode == MergeMode::keep) wanted = plan.order[first] == i ? g : 0;
      if (mode == MergeMode::amax) {
        int reached = 0;
        for (int32_t k = first; k < last; ++k) reached += tokens.at(plan.order[k], c) == merged.at(row, c);
        wanted = tokens.at(i, c) == merged.at(row, c) ? g / reached : 0;
      }
      for_tokens.expect(i * grad_tokens.pitch + c, wanted);
      slope += g * (tokens.at(i, c) - merged.at(row, c)) * by;
    }
    if (sized) for_size.expect(i, slope);
  }
  right &= for_tokens.holds(storage) & for_size.holds(storage);

  Table back(storage, n, width, kMark);
  s.merged = grad.numbers.data(), s.merged_row = grad.pitch;
  s.result = back.numbers.data(), s.result_row = back.pitch;
  by_pieces(n, [&](int64_t from, int64_t to) { return loops.unmerge(p, s, from, to), true; });
  Comparison copies("unmerged", back.numbers);
  for (int64_t i = 0; i < n; ++i) {
    const int32_t row = plan.slot[i];
    const bool gets = row >= 0 && (mode != MergeMode::keep || plan.order[plan.offsets[row]] == i);
    for (int64_t c = 0; c < width; ++c) copies.expect(i * back.pitch + c, gets ? grad.at(row, c) : 0);
  }
  right &= copies.holds(storage);

  // a size that is negative or no number is reported
  const int64_t spoilt = pick(0, n - 1);
  if (sized && plan.slot[spoilt] >= 0) {
    size.set(spoilt, chance(0.5) ? -1 : NAN);
    s.result = back.numbers.data();
    right &= !loops.merge(p, s, 0, n);
  }
  return right;
}

// ---- soft merging ----

bool soft_is_right(const TokenMergeLoops& loops) {
  const Storage storage = pick_of({kStorages[0], kStorages[1], kStorages[2]});
  // directions of a few dimensions and a choice between meta tokens: without them the gradients are zero but for rounding
  const int64_t n = pick(1, 70), m = pick(2, 20), width = pick(1, 40), metric_width = pick(4, 24);
  const bool normalize = chance(0.7), massed = chance(0.7);
  const double temperature = normalize ? 0.5 : 4.0;
  Table x(storage, n, width), metric(storage, n, metric_width), meta(storage, m, metric_width), out(Storage::f32, m, width, kMark);
  for (Table* table : {&x, &metric, &meta}) table->randomise();
  Numbers mass(Storage::f32, n, 1), mass_out(Storage::f32, m, kMark), lse(Storage::f32, n, kMark);
  for (int64_t i = 0; i < n && massed; ++i) mass.set(i, pick_of({0.0, 0.5, 1.0, 2.0}));
  const SoftMerge p{storage, width, metric_width, m, normalize, static_cast<float>(temperature)};
  SoftSample s{};
  s.x = x.numbers.data(), s.x_row = x.pitch;
  s.metric = metric.numbers.data(), s.metric_row = metric.pitch;
  s.meta = meta.numbers.data(), s.meta_row = meta.pitch;
  if (massed) s.mass = static_cast<float*>(mass.data()), s.mass_row = 1;
  s.out = static_cast<float*>(out.numbers.data()), s.out_row = out.pitch;
  s.mass_out = static_cast<float*>(mass_out.data()), s.lse = static_cast<float*>(lse.data());
  const std::vector<int64_t> cuts = cut(n);
  const int64_t parts = static_cast<int64_t>(cuts.size()) - 1;
  const auto by_parts = [&](int64_t floats, int64_t scratch, const auto& run, const auto& sum) {
    const Scratch all(parts * floats * 4), memory(scratch);
    float* data = reinterpret_cast<float*>(static_cast<char*>(all));
    bool right = true;
    for (int64_t i = 0; i < parts; ++i) {
      memory.spoil();
      right &= run(cuts[i], cuts[i + 1], data + i * floats, memory);
    }
    memory.spoil();
    sum(data, memory);
    return right;
  };
  bool right = by_parts(
      loops.soft_part(p), loops.soft_scratch(p),
      [&](int64_t from, int64_t to, float* part, char* scratch) { return loops.soft(p, s, from, to, part, scratch); },
      [&](float* all, char*) { loops.soft_sum(p, s, all, parts); });

  const auto norm = [&](const Table& table, int64_t row) {
    double sum = 0;
    for (int64_t c = 0; c < metric_width; ++c) sum += table.at(row, c) * table.at(row, c);
    return normalize ? sqrt(sum) : 1.0;
  };
  std::vector<double> cosine(n * m), share(n * m), total(m, 0), mean(m * width, 0);
  Comparison lses("lse", lse), masses("mass", mass_out), outs("merged", out.numbers);
  for (int64_t i = 0; i < n; ++i) {
    double sum = 0;
    for (int64_t j = 0; j < m; ++j) {
      double dot = 0;
      for (int64_t c = 0; c < metric_width; ++c) dot += metric.at(i, c) * meta.at(j, c);
      cosine[i * m + j] = dot / (norm(metric, i) * norm(meta, j));
      sum += exp(cosine[i * m + j] / temperature);
    }
    lses.expect(i, log(sum));
    for (int64_t j = 0; j < m; ++j) {
      share[i * m + j] = exp(cosine[i * m + j] / temperature) / sum;
      total[j] += share[i * m + j] * mass.get(i);
    }
  }
  for (int64_t j = 0; j < m; ++j) {
    masses.expect(j, total[j]);
    for (int64_t c = 0; c < width; ++c) {
      for (int64_t i = 0; i < n; ++i) mean[j * width + c] += total[j] == 0 ? 0 : share[i * m + j] * mass.get(i) * x.at(i, c) / total[j];
      outs.expect(j * out.pitch + c, mean[j * width + c]);
    }
  }
  right &= lses.holds(storage) & masses.holds(storage) & outs.holds(storage);

  Table grad_out(Storage::f32, m, width), grad_x(storage, n, width, kMark), grad_metric(storage, n, metric_width, kMark);
  Table grad_meta(storage, m, metric_width, kMark);
  Numbers grad_mass_out(Storage::f32, m, 0), grad_mass(Storage::f32, n, kMark), grad_temperature(Storage::f32, 1, kMark);
  // <grad_out, x> of order one, like the gradient of the masses
  grad_out.randomise(1 / sqrt(static_cast<double>(width)));
  for (int64_t j = 0; j < m; ++j) grad_mass_out.set(j, normal());
  s.grad_out = static_cast<float*>(grad_out.numbers.data()), s.grad_out_row = grad_out.pitch;
  s.grad_mass_out = static_cast<float*>(grad_mass_out.data());
  const bool want_x = chance(0.8), want_metric = chance(0.8), want_meta = chance(0.8), want_mass = chance(0.8), want_heat = chance(0.8);
  if (want_x) s.grad_x = grad_x.numbers.data(), s.grad_x_row = grad_x.pitch;
  if (want_metric) s.grad_metric = grad_metric.numbers.data(), s.grad_metric_row = grad_metric.pitch;
  if (want_meta) s.grad_meta = grad_meta.numbers.data(), s.grad_meta_row = grad_meta.pitch;
  if (want_mass) s.grad_mass = static_cast<float*>(grad_mass.data());
  if (want_heat) s.grad_temperature = static_cast<float*>(grad_temperature.data());
  const Scratch prepared_memory(loops.soft_prepared(p) * 4);
  float* prepared = reinterpret_cast<float*>(static_cast<char*>(prepared_memory));
  loops.soft_prepare(p, s, prepared);
  by_parts(
      loops.soft_backward_part(p), loops.soft_backward_scratch(p),
      [&](int64_t from, int64_t to, float* part, char* scratch) {
        loops.soft_backward(p, s, prepared, from, to, part, scratch);
        return true;
      },
      [&](float* all, char* scratch) { loops.soft_backward_sum(p, s, all, parts, scratch); });

  Comparison for_x("gradient of x", grad_x.numbers), for_metric("gradient of metric", grad_metric.numbers);
  Comparison for_meta("gradient of meta", grad_meta.numbers), for_mass("gradient of mass", grad_mass);
  Comparison for_heat("gradient of temperature", grad_temperature);
  std::vector<double> of_cosine(n * m);
  double heat = 0, heat_squares = 0;
  for (int64_t i = 0; i < n; ++i) {
    std::vector<double> slope(m);
    double all = 0;
    for (int64_t j = 0; j < m; ++j) {
      slope[j] = grad_mass_out.get(j);
      for (int64_t c = 0; c < width && total[j] > 0; ++c) slope[j] += grad_out.at(j, c) * (x.at(i, c) - mean[j * width + c]) / total[j];
      all += slope[j] * share[i * m + j];
    }
    if (want_mass) for_mass.expect(i, all);
    for (int64_t j = 0; j < m; ++j) {
      of_cosine[i * m + j] = share[i * m + j] * mass.get(i) * (slope[j] - all) / temperature;
      const double warmth = of_cosine[i * m + j] * cosine[i * m + j] / temperature;
      heat -= warmth, heat_squares += warmth * warmth;
    }
    for (int64_t c = 0; c < width && want_x; ++c) {
      double sum = 0;
      for (int64_t j = 0; j < m; ++j) sum += total[j] > 0 ? share[i * m + j] * mass.get(i) * grad_out.at(j, c) / total[j] : 0;
      for_x.expect(i * grad_x.pitch + c, sum);
    }
  }
  const auto directions = [&](const Table& from, const Table& to, bool by_token, Comparison& comparison, const Table& result) {
    for (int64_t row = 0; row < from.rows; ++row)
      for (int64_t c = 0; c < metric_width; ++c) {
        double sum = 0;
        for (int64_t other = 0; other < to.rows; ++other) {
          const int64_t at = by_token ? row * m + other : other * m + row;
          sum += of_cosine[at] * (to.at(other, c) / norm(to, other) - (normalize ? cosine[at] * from.at(row, c) / norm(from, row) : 0));
        }
        comparison.expect(row * result.pitch + c, sum / norm(from, row));
      }
  };
  if (want_metric) directions(metric, meta, true, for_metric, grad_metric);
  if (want_meta) directions(meta, metric, false, for_meta, grad_meta);
  if (want_heat) for_heat.expect(0, heat, sqrt(heat_squares));
  right &= for_x.holds(storage) & for_metric.holds(storage) & for_meta.holds(storage);
  return right & for_mass.holds(storage) & for_heat.holds(storage);
}

bool test(const char* isa, const TokenMergeLoops& loops) {
  constexpr unsigned kProblems = 300;
  for (unsigned seed = 0; seed < kProblems; ++seed) {
    const auto run = [&](const char* what, bool right) {
      if (!right) fprintf(stderr, "token_merge %s, %s, problem %u\n", isa, what, seed);
      return right;
    };
    random_bits.seed(seed);
    if (!run("pairs", pairs_are_right(loops)) || !run("no numbers in pairs", pairs_report_nan(loops)) || !run("plans", plans_are_right()) ||
        !run("sources", sources_are_right()) || !run("segments", segments_are_right(loops)) || !run("soft", soft_is_right(loops)))
      return false;
  }
  printf("token_merge %s: %u problems each of pairs, plans, sources, segments, soft merging\n", isa, kProblems);
  return true;
}

}  // namespace
}  // namespace tokenops

int main(int count, char** arguments) { return tokenops::run_tests(count, arguments, tokenops::test); }
