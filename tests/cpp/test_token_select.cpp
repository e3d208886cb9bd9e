// The loops of token_select on random problems, against plain loops in double; see check.h for what counts as an error.
#include "cpu/token_select.h"

#include "check.h"

namespace tokenops {
namespace {

constexpr Storage kStorages[] = {Storage::f32, Storage::bf16, Storage::f16};

// ---- choosing ----

bool select_is_right(const TokenSelectLoops& loops) {
  const Storage storage = kStorages[pick(0, 2)];
  const int64_t tokens = pick_of<int64_t>({0, 1, 15, 16, 17, 64, 100, 333, 2000}), protect = pick(0, std::min<int64_t>(tokens, 3));
  const int64_t k = pick_of<int64_t>({protect, pick(protect, tokens), tokens, tokens + 5});
  // few values: many ties
  const bool ties = chance(0.5);
  Numbers scores(storage, tokens, NAN);
  for (int64_t i = protect; i < tokens; ++i)
    scores.set(i, ties          ? pick_of({-0.25, 0.25}) * pick(-3, 3)
                  : chance(0.1) ? pick_of<double>({-0.0, 0.0, 1e30, -INFINITY, INFINITY})
                                : normal());
  const bool bounded = chance(0.5), nan = tokens > protect && chance(0.1);
  const float threshold = pick_of({0.f, -0.25f, 0.7f, -INFINITY, INFINITY});
  if (nan) scores.set(pick(protect, tokens - 1), NAN);

  std::vector<int64_t> kept;
  for (int64_t i = protect; i < tokens; ++i)
    if (!bounded || scores.get(i) > threshold) kept.push_back(i);
  std::stable_sort(kept.begin(), kept.end(), [&](int64_t a, int64_t b) { return scores.get(a) > scores.get(b); });
  kept.resize(std::min<int64_t>(kept.size(), k - protect));
  for (int64_t i = 0; i < protect; ++i) kept.push_back(i);
  std::sort(kept.begin(), kept.end());

  constexpr int32_t kUntouched = 12345;
  std::vector<int32_t> index(k + 2, kUntouched);
  const Scratch scratch(loops.select_scratch(tokens));
  const int64_t count = loops.select({storage, scores.data(), tokens, protect, k, bounded, threshold}, index.data() + 1, scratch);
  bool right = nan ? count == -1 : count == static_cast<int64_t>(kept.size());
  right &= index[0] == kUntouched && index[k + 1] == kUntouched;
  for (int64_t j = 0; j < k && !nan; ++j) right &= index[j + 1] == (j < count ? kept[j] : -1);
  if (!right)
    fprintf(stderr, "select: %s, tokens %ld, protect %ld, k %ld%s\n", name_of(storage), long(tokens), long(protect), long(k),
            nan ? ", NaN" : "");
  return right;
}

// ---- halting ----

// one float for each token in a random order of dimensions, with gaps
struct Vector {
  int64_t sample, row;
  Numbers numbers;

  Vector(int64_t samples, int64_t rows, double fill) : Vector(samples, rows, fill, chance(0.5), pick_of<int64_t>({1, 3})) {}
  int64_t place(int64_t s, int64_t n) const { return s * sample + n * row; }
  double get(int64_t s, int64_t n) const { return numbers.get(place(s, n)); }
  template <class T>
  PerToken<T> view() {
    return {static_cast<T*>(numbers.data()), sample, row};
  }

 private:
  Vector(int64_t samples, int64_t rows, double fill, bool rows_first, int64_t gap)
      : sample(rows_first ? gap : rows * gap), row(rows_first ? samples * gap : gap), numbers(Storage::f32, samples * rows * gap, fill) {}
};

// a row for each token, with gaps
struct Table {
  int64_t samples, rows, channels, pitch;
  Numbers numbers;

  Table(Storage storage, int64_t samples, int64_t rows, int64_t channels, double fill)
      : samples(samples),
        rows(rows),
        channels(channels),
        pitch(channels + pick_of<int64_t>({0, 0, 1, 8})),
        numbers(storage, samples * rows * pitch, fill) {}
  int64_t place(int64_t s, int64_t n) const { return (s * rows + n) * pitch; }
  TokenRows view() { return {numbers.data(), rows * pitch, pitch}; }
};

struct Step {
  Storage storage = kStorages[pick(0, 2)];
  int64_t samples = pick(1, 3), rows = pick_of<int64_t>({1, 2, 15, 16, 17, 40}), channels = pick_of<int64_t>({1, 7, 16, 24, 33, 70});
  int64_t inside = chance(0.5) ? rows : pick(0, rows);
  bool class_only = chance(0.3), first = chance(0.2), last = chance(0.2);
  double scale = pick_of({10.0, -2.0}), center = pick_of({5.0, -0.5}), limit = 0.99f;
  std::vector<int32_t> sample_of_row;
  Table x{storage, samples, rows, channels, NAN};
  Vector cum{samples, rows, NAN}, remain{samples, rows, NAN}, rho{samples, rows, NAN}, counter{samples, rows, NAN};
  std::vector<char> active = std::vector<char>(samples * rows);

  // what becomes of each token
  struct Fate {
    bool active, reached, going;
    double h, cum, weight;
    bool takes() const { return active && (reached || going); }
  };
  std::vector<Fate> fates;

  Step() {
    sample_of_row.assign(samples * rows, -1);
    for (int64_t s = 0; s < samples; ++s)
      if (inside > 0) sample_of_row[s * rows] = static_cast<int32_t>(s);
    for (int64_t s = 0; s < samples; ++s)
      for (int64_t n = 0; n < rows; ++n) {
        Fate fate;
        active[s * rows + n] = chance(0.7);
        // again until the decision stands apart from rounding
        do {
          x.numbers.set(x.place(s, n), 0.4 + 0.3 * normal());
          cum.numbers.set(cum.place(s, n), pick_of({0.1, 0.7, 1.2}));
          fate.h = last ? 1 : 1 / (1 + exp(center - scale * x.numbers.get(x.place(s, n))));
          fate.cum = (first ? 0 : cum.get(s, n)) + (n < inside ? fate.h : 0);
        } while (fabs(fate.cum - limit) < 1e-3);
        remain.numbers.set(remain.place(s, n), pick(1, 7) / 8.0);
        rho.numbers.set(rho.place(s, n), pick(0, 5));
        counter.numbers.set(counter.place(s, n), pick(1, 5));
        fate.active = (first || active[s * rows + n]) && n < inside;
        fate.reached = fate.active && fate.cum > limit;
        fate.going = n < inside && fate.cum < limit;
        fate.weight = fate.reached ? old(remain, 1, s, n) : fate.active && fate.going ? fate.h : 0;
        fates.push_back(fate);
        // what stands in rows that take no part is never read
        for (int64_t c = 1; c < channels; ++c) x.numbers.set(x.place(s, n) + c, fate.takes() ? normal() : NAN);
      }
  }
  const Fate& fate(int64_t s, int64_t n) const { return fates[s * rows + n]; }
  double old(const Vector& vector, double at_first, int64_t s, int64_t n) const { return first ? at_first : vector.get(s, n); }
  HaltGate gate() {
    return {storage,
            rows,
            channels,
            inside,
            class_only ? sample_of_row.data() : nullptr,
            x.view(),
            static_cast<float>(scale),
            static_cast<float>(center),
            static_cast<float>(limit),
            last};
  }
  template <class Loop, class Problem>
  void run(Loop loop, const Problem& problem) const {
    const std::vector<int64_t> cuts = cut(samples * rows);
    for (size_t i = 1; i < cuts.size(); ++i) loop(problem, cuts[i - 1], cuts[i]);
  }
  bool fail(const char* what) const {
    fprintf(stderr, "%s: %s, %ld x %ld x %ld, inside %ld%s%s%s\n", what, name_of(storage), long(samples), long(rows), long(channels),
            long(inside), class_only ? ", class" : "", first ? ", first" : "", last ? ", last" : "");
    return false;
  }
};

bool halt_is_right(const TokenSelectLoops& loops) {
  Step step;
  // class tokens are always added in place, see token_select.cpp
  const bool in_place = step.class_only || (!step.first && chance(0.5));
  const int64_t out_rows = step.class_only ? 1 : step.rows;
  Table out(Storage::f32, step.samples, out_rows, step.channels, kMark),
      elsewhere(Storage::f32, step.samples, out_rows, step.channels, kMark);
  Table& to = in_place ? out : elsewhere;
  for (int64_t s = 0; s < step.samples; ++s)
    for (int64_t n = 0; n < out_rows; ++n)
      for (int64_t c = 0; c < step.channels; ++c) out.numbers.set(out.place(s, n) + c, pick(-8, 8) / 4.0);
  std::vector<double> before;
  for (int64_t i = 0; i < out.numbers.count(); ++i) before.push_back(out.numbers.get(i));
  Vector cum(step.samples, step.rows, kMark), remain(step.samples, step.rows, kMark), rho(step.samples, step.rows, kMark),
      counter(step.samples, step.rows, kMark);
  std::vector<char> active(step.samples * step.rows, 7);
  HaltStep p{};
  p.gate = step.gate();
  if (!step.first) {
    p.cum = step.cum.view<const float>();
    p.remain = step.remain.view<const float>();
    p.rho = step.rho.view<const float>();
    p.counter = step.counter.view<const float>();
    p.active = {reinterpret_cast<const bool*>(step.active.data()), step.rows, 1};
  }
  if (!step.first || step.class_only) p.out = out.view();
  p.new_cum = cum.view<float>();
  p.new_remain = remain.view<float>();
  p.new_rho = rho.view<float>();
  p.new_counter = counter.view<float>();
  p.new_active = {reinterpret_cast<bool*>(active.data()), step.rows, 1};
  p.new_out = to.view();
  p.in_place = in_place;
  p.past_caches = !in_place && chance(0.5);
  if (step.class_only) p.out.row = p.new_out.row = out.pitch;
  step.run(loops.halt, p);

  Comparison of_cum("cum", cum.numbers), of_remain("remain", remain.numbers), of_rho("rho", rho.numbers),
      of_counter("counter", counter.numbers), of_out("out", to.numbers);
  bool right = true;
  for (int64_t s = 0; s < step.samples; ++s)
    for (int64_t n = 0; n < step.rows; ++n) {
      const Step::Fate& fate = step.fate(s, n);
      const double rest = step.old(step.remain, 1, s, n);
      of_cum.expect(cum.place(s, n), fate.cum);
      of_remain.expect(remain.place(s, n), rest - (fate.going ? fate.h : 0));
      of_rho.expect(rho.place(s, n), step.old(step.rho, 0, s, n) + fate.active + (fate.reached ? rest : 0));
      of_counter.expect(counter.place(s, n), step.old(step.counter, 1, s, n) + fate.going);
      right &= active[s * step.rows + n] == fate.going;
      if (step.class_only && n > 0) continue;
      const bool adds = fate.takes() && (!step.class_only || step.inside > 0);
      for (int64_t c = 0; c < step.channels; ++c) {
        const double was = step.first && !step.class_only ? 0 : before[out.place(s, n) + c];
        of_out.expect(to.place(s, n) + c, was + (adds ? fate.weight * step.x.numbers.get(step.x.place(s, n) + c) : 0));
      }
    }
  right &= of_cum.holds(Storage::f32) & of_remain.holds(Storage::f32) & of_rho.holds(Storage::f32) & of_counter.holds(Storage::f32) &
           of_out.holds(Storage::f32);
  return right || step.fail("halt");
}

bool halt_backward_is_right(const TokenSelectLoops& loops) {
  Step step;
  const bool with[] = {chance(0.8), chance(0.8), chance(0.8), chance(0.8)}, want_x = chance(0.8), want_remain = chance(0.8);
  const int64_t out_rows = step.class_only ? 1 : step.rows;
  Vector after(step.samples, step.rows, NAN), grad_cum(step.samples, step.rows, NAN), grad_remain(step.samples, step.rows, NAN),
      grad_rho(step.samples, step.rows, NAN), new_grad_remain(step.samples, step.rows, kMark);
  Table grad_out(Storage::f32, step.samples, out_rows, step.channels, NAN),
      grad_x(step.storage, step.samples, step.rows, step.channels, kMark);
  for (int64_t s = 0; s < step.samples; ++s)
    for (int64_t n = 0; n < step.rows; ++n) {
      after.numbers.set(after.place(s, n), step.fate(s, n).cum);
      for (Vector* grad : {&grad_cum, &grad_remain, &grad_rho}) grad->numbers.set(grad->place(s, n), normal());
      if (n < out_rows && step.fate(s, n).takes())
        for (int64_t c = 0; c < step.channels; ++c) grad_out.numbers.set(grad_out.place(s, n) + c, normal());
    }
  HaltBackward p{};
  p.gate = step.gate();
  if (!step.first) {
    p.remain = step.remain.view<const float>();
    p.active = {reinterpret_cast<const bool*>(step.active.data()), step.rows, 1};
  }
  p.cum = after.view<const float>();
  if (with[0]) p.grad_cum = grad_cum.view<const float>();
  if (with[1]) p.grad_remain = grad_remain.view<const float>();
  if (with[2]) p.grad_rho = grad_rho.view<const float>();
  if (with[3]) p.grad_out = grad_out.view();
  if (step.class_only) p.grad_out.row = grad_out.pitch;
  if (want_x) p.new_grad_x = grad_x.view();
  if (want_remain) p.new_grad_remain = new_grad_remain.view<float>();
  step.run(loops.halt_backward, p);

  Comparison of_x("grad_x", grad_x.numbers), of_remain("grad_remain", new_grad_remain.numbers);
  for (int64_t s = 0; s < step.samples; ++s)
    for (int64_t n = 0; n < step.rows; ++n) {
      const Step::Fate& fate = step.fate(s, n);
      const bool adds = with[3] && fate.takes() && n < out_rows;
      const auto out_at = [&](int64_t c) { return adds ? grad_out.numbers.get(grad_out.place(s, n) + c) : 0.0; };
      double of_weight = 0;
      for (int64_t c = 0; c < step.channels && adds; ++c) of_weight += out_at(c) * step.x.numbers.get(step.x.place(s, n) + c);
      const double from_remain = with[1] ? grad_remain.get(s, n) : 0;
      const double of_h = (with[0] && n < step.inside ? grad_cum.get(s, n) : 0) - (fate.going ? from_remain : 0) +
                          (fate.going && fate.active ? of_weight : 0);
      const double of_score = n < step.inside && !step.last ? step.scale * fate.h * (1 - fate.h) * of_h : 0;
      for (int64_t c = 0; c < step.channels && want_x; ++c)
        of_x.expect(grad_x.place(s, n) + c, fate.weight * out_at(c) + (c == 0 ? of_score : 0));
      if (want_remain)
        of_remain.expect(new_grad_remain.place(s, n), from_remain + (fate.reached ? (with[2] ? grad_rho.get(s, n) : 0) + of_weight : 0));
    }
  return (of_x.holds(step.storage) & of_remain.holds(Storage::f32)) || step.fail("halt_backward");
}

// ---- gathering ----

bool gather_is_right(const TokenSelectLoops& loops) {
  const int64_t row_bytes = pick_of<int64_t>({1, 2, 3, 4, 8, 12, 63, 64, 65, 200, 257}), pitch = row_bytes + pick(0, 3);
  const int64_t from_rows = pick(1, 20), rows = pick(0, 30);
  // exactly as large as they must be, so that one byte too far is an error
  std::vector<char> from((from_rows - 1) * pitch + row_bytes), to(rows * row_bytes, 7);
  for (char& byte : from) byte = static_cast<char>(pick(-128, 127));
  std::vector<int64_t> source;
  for (int64_t i = 0; i < rows; ++i) source.push_back(chance(0.2) ? -1 : pick(0, from_rows - 1) * pitch);
  const RowGather p{to.data(), from.data(), source.data(), row_bytes, chance(0.5)};
  const std::vector<int64_t> cuts = cut(rows);
  for (size_t i = 1; i < cuts.size(); ++i) loops.gather(p, cuts[i - 1], cuts[i]);
  bool right = true;
  for (int64_t i = 0; i < rows * row_bytes; ++i)
    right &= to[i] == (source[i / row_bytes] < 0 ? 0 : from[source[i / row_bytes] + i % row_bytes]);
  if (!right) fprintf(stderr, "gather: %ld rows of %ld bytes\n", long(rows), long(row_bytes));
  return right;
}

bool test(const char* isa, const TokenSelectLoops& loops) {
  constexpr unsigned kProblems = 400;
  for (unsigned seed = 0; seed < kProblems; ++seed) {
    random_bits.seed(seed);
    if (!(select_is_right(loops) && halt_is_right(loops) && halt_backward_is_right(loops) && gather_is_right(loops))) {
      fprintf(stderr, "token_select %s: problem %u\n", isa, seed);
      return false;
    }
  }
  printf("token_select %s: %u problems each for select, halt, halt_backward and gather\n", isa, kProblems);
  return true;
}

}  // namespace
}  // namespace tokenops

int main(int count, char** arguments) { return tokenops::run_tests<tokenops::TokenSelectLoops>(count, arguments, tokenops::test); }
