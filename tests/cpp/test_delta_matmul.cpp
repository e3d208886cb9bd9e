// The loops of delta_matmul (all but attention) on random problems, against plain loops in double; see check.h for what counts as an error.
#include "cpu/delta_matmul.h"

#include "check.h"

namespace tokenops {
namespace {

constexpr Storage kStorages[] = {Storage::f32, Storage::bf16, Storage::f16};

std::vector<double> numbers(int64_t n, double mean, double deviation) {
  std::vector<double> some(n);
  for (double& x : some) x = mean + deviation * normal();
  return some;
}

// rows with gaps, as large as they must be and no larger
struct Rows {
  int64_t rows, width, pitch;
  Numbers numbers;

  Rows(Storage storage, int64_t rows, int64_t width, double fill)
      : rows(rows),
        width(width),
        pitch(width + pick_of<int64_t>({0, 0, 1, 8})),
        numbers(storage, rows > 0 ? (rows - 1) * pitch + width : 0, fill) {}
  void randomise() {
    for (int64_t n = 0; n < rows; ++n)
      for (int64_t c = 0; c < width; ++c) numbers.set(n * pitch + c, normal());
  }
  double get(int64_t n, int64_t c) const { return numbers.get(n * pitch + c); }
  std::vector<double> row(int64_t n) const {
    std::vector<double> all(width);
    for (int64_t c = 0; c < width; ++c) all[c] = get(n, c);
    return all;
  }
  GateRows view() { return {numbers.data(), pitch}; }
};

constexpr GateRows kNone{nullptr, 0};

// weight and bias of a layer normalisation, or none
struct Norm {
  bool given = chance(0.6);
  std::vector<float> weight, bias;
  float eps = 1e-3f;

  explicit Norm(int64_t width) {
    for (const double x : numbers(width, 1, 0.3)) weight.push_back(static_cast<float>(x));
    for (const double x : numbers(width, 0, 0.3)) bias.push_back(static_cast<float>(x));
  }
  RowNormalization view() const { return {given ? weight.data() : nullptr, given ? bias.data() : nullptr, eps}; }

  // (x - mean) / sqrt(variance + eps), and the factor
  std::pair<std::vector<double>, double> centered(std::vector<double> x) const {
    double mean = 0, variance = 0;
    for (const double each : x) mean += each / static_cast<double>(x.size());
    for (double& each : x) each -= mean, variance += each * each / static_cast<double>(x.size());
    const double inverse = 1 / sqrt(variance + eps);
    for (double& each : x) each *= inverse;
    return {x, inverse};
  }
  std::vector<double> of(const std::vector<double>& x) const {
    if (!given) return x;
    std::vector<double> y = centered(x).first;
    for (size_t c = 0; c < y.size(); ++c) y[c] = y[c] * weight[c] + bias[c];
    return y;
  }
};

// distinct ids, some slots empty
std::vector<int32_t> some_ids(int64_t rows, int64_t slots) {
  std::vector<int32_t> ids(rows);
  for (int64_t i = 0; i < rows; ++i) ids[i] = static_cast<int32_t>(i);
  std::shuffle(ids.begin(), ids.end(), random_bits);
  ids.resize(slots, -1);
  for (int32_t& id : ids)
    if (chance(0.2)) id = -1;
  return ids;
}

// ---- the gate ----

double norm_of(const std::vector<double>& change, double order) {
  double sum = 0, top = 0;
  for (const double x : change) {
    top = std::max(top, fabs(x));
    sum += order == 0 ? x != 0 : pow(fabs(x), order);
  }
  return order == 0 ? sum : isinf(order) ? top : pow(sum, 1 / order);
}

bool gate_is_right(const DeltaMatmulLoops& loops) {
  const Storage storage = kStorages[pick(0, 2)];
  const int64_t tokens = pick(1, 9), width = pick_of<int64_t>({1, 3, 4, 8, 15, 16, 17, 40, 64, 100});
  const Norm norm(width);
  const bool with_skip = chance(0.5), decides = chance(0.7), whole = chance(0.4), in_place = chance(0.5), nan = chance(0.1);
  // whether a change is exactly zero is a matter of rounding, but where nothing is computed
  const float order = norm.given || with_skip ? pick_of({0.5f, 1.f, 2.f, 3.f, INFINITY}) : pick_of({0.f, 0.5f, 1.f, 2.f, 7.f, INFINITY});
  Rows x(storage, tokens, width, NAN), skip(storage, tokens, width, NAN), old(storage, tokens, width, NAN);
  x.randomise(), skip.randomise(), old.randomise();
  for (int64_t n = 0; n < tokens; ++n)
    for (int64_t c = 0; c < width; ++c)
      if (chance(0.1)) old.numbers.set(n * old.pitch + c, x.get(n, c));
  const int64_t bad = pick(0, tokens - 1);
  if (nan) x.numbers.set(bad * x.pitch + pick(0, width - 1), NAN);
  Rows total(storage, tokens, width, kMark), renewed(storage, tokens, width, kMark);
  Numbers norms(Storage::f32, tokens, kMark);

  const Gate p{storage, width, norm.view(), order, chance(0.5)};
  GateSample s{x.view(),
               with_skip ? skip.view() : kNone,
               old.view(),
               with_skip ? total.view() : kNone,
               in_place ? kNone : renewed.view(),
               decides ? static_cast<float*>(norms.data()) : nullptr,
               whole,
               nullptr,
               kNone,
               kNone};
  const Scratch scratch(loops.gate_scratch(width));
  const std::vector<int64_t> cuts = cut(tokens);
  const auto run = [&] {
    for (size_t i = 1; i < cuts.size(); ++i) {
      scratch.spoil();
      loops.gate(p, s, cuts[i - 1], cuts[i], scratch);
    }
  };
  run();
  if (nan) {
    bool right = true;
    for (int64_t n = 0; n < tokens && decides; ++n) right &= static_cast<bool>(isnan(norms.get(n))) == (n == bad);
    if (!right) fprintf(stderr, "gate: a change that is NaN went unnoticed\n");
    return right;
  }

  Rows& sum = with_skip ? total : x;
  std::vector<std::vector<double>> current(tokens), before(tokens);
  for (int64_t n = 0; n < tokens; ++n) current[n] = norm.of(sum.row(n)), before[n] = old.row(n);
  const auto change = [&](int64_t n) {
    std::vector<double> all(width);
    for (int64_t c = 0; c < width; ++c) all[c] = current[n][c] - before[n][c];
    return all;
  };
  bool right = true;
  Comparison of_total("total", total.numbers), of_norms("norms", norms), of_renewed("renewed", renewed.numbers);
  for (int64_t n = 0; n < tokens; ++n) {
    if (decides) of_norms.expect(n, norm_of(change(n), order));
    for (int64_t c = 0; c < width; ++c) {
      if (with_skip) of_total.expect(n * total.pitch + c, x.get(n, c) + skip.get(n, c));
      if (!in_place) of_renewed.expect(n * renewed.pitch + c, (whole ? current : before)[n][c]);
      if (!in_place && !whole) right &= renewed.get(n, c) == old.get(n, c);
    }
  }
  right &= of_total.holds(storage) & of_norms.holds(storage) & of_renewed.holds(storage);

  // the rows of the chosen
  const int64_t slots = pick(0, tokens);
  const std::vector<int32_t> ids = some_ids(tokens, slots);
  Rows values(storage, slots, width, kMark), delta(storage, slots, width, kMark);
  Rows& target = in_place ? old : renewed;
  s.x = sum.view();
  s.skip = s.total = kNone;
  s.norms = nullptr;
  s.renewed = target.view();
  s.index = ids.data();
  s.values = values.view();
  s.delta = delta.view();
  const bool first_frame = !in_place && chance(0.2);
  if (first_frame) s.reference = kNone;
  scratch.spoil();
  loops.gate_chosen(p, s, !whole, 0, slots, scratch);
  Comparison of_values("values", values.numbers), of_delta("delta", delta.numbers), of_target("renewed rows", target.numbers);
  std::vector<std::vector<double>> expected = in_place || !whole ? before : current;
  for (int64_t j = 0; j < slots; ++j) {
    const int64_t n = ids[j];
    if (n >= 0 && !whole) expected[n] = current[n];
    for (int64_t c = 0; c < width; ++c) {
      of_values.expect(j * values.pitch + c, n < 0 ? 0 : current[n][c]);
      of_delta.expect(j * delta.pitch + c, n < 0 ? 0 : first_frame ? current[n][c] : change(n)[c]);
    }
  }
  for (int64_t n = 0; n < tokens; ++n)
    for (int64_t c = 0; c < width; ++c) of_target.expect(n * target.pitch + c, expected[n][c]);
  // gaps of a grid that was filled with NaN hold no mark
  right &= of_values.holds(storage) & of_delta.holds(storage) & (in_place || of_target.holds(storage));
  if (in_place)
    for (int64_t n = 0; n < tokens; ++n)
      for (int64_t c = 0; c < width; ++c) right &= fabs(old.get(n, c) - expected[n][c]) <= 0.05 * (1 + fabs(expected[n][c]));

  if (in_place && whole) {
    run();
    for (int64_t n = 0; n < tokens; ++n)
      for (int64_t c = 0; c < width; ++c) right &= fabs(old.get(n, c) - current[n][c]) <= 0.05 * (1 + fabs(current[n][c]));
  }
  if (!right)
    fprintf(stderr, "gate: %s, %ld tokens of %ld, order %g%s%s%s%s\n", name_of(storage), long(tokens), long(width), order,
            norm.given ? ", norm" : "", with_skip ? ", skip" : "", whole ? ", whole" : "", in_place ? ", in place" : "");
  return right;
}

bool gate_backward_is_right(const DeltaMatmulLoops& loops) {
  const Storage storage = kStorages[pick(0, 2)];
  const int64_t tokens = pick(1, 9), width = pick_of<int64_t>({1, 3, 8, 15, 16, 17, 40, 100}), slots = pick(0, tokens);
  const Norm norm(width);
  const bool all = chance(0.4);
  const std::vector<int32_t> ids = some_ids(tokens, slots);
  std::vector<int32_t> slot(tokens, -1);
  for (int64_t j = 0; j < slots; ++j)
    if (ids[j] >= 0) slot[ids[j]] = static_cast<int32_t>(j);
  Rows x(storage, tokens, width, NAN), values(storage, slots, width, NAN), delta(storage, slots, width, NAN);
  Rows renewed(storage, tokens, width, NAN), total(storage, tokens, width, NAN);
  for (Rows* rows : {&x, &values, &delta, &renewed, &total}) rows->randomise();
  Rows grad_x(storage, tokens, width, kMark), grad_reference(storage, tokens, width, kMark);
  const bool with_values = chance(0.7), with_delta = chance(0.7), with_renewed = chance(0.7), with_total = chance(0.5);
  const bool want_x = chance(0.8), want_reference = chance(0.7), want_sums = norm.given && chance(0.7);

  const GateBackward p{storage, width, norm.view()};
  const GateBackwardSample s{x.view(),
                             slot.data(),
                             all,
                             with_values ? values.view() : kNone,
                             with_delta ? delta.view() : kNone,
                             with_renewed ? renewed.view() : kNone,
                             with_total ? total.view() : kNone,
                             want_x ? grad_x.view() : kNone,
                             want_reference ? grad_reference.view() : kNone};
  const int64_t sums_row = loops.gate_scratch(width) / static_cast<int64_t>(sizeof(float));
  const Scratch scratch(loops.gate_scratch(width));
  std::vector<double> weight_sum(width), bias_sum(width), weight_size(width), bias_size(width);
  const std::vector<int64_t> cuts = cut(tokens);
  for (size_t i = 1; i < cuts.size(); ++i) {
    Numbers sums(Storage::f32, 2 * sums_row, NAN);
    scratch.spoil();
    loops.gate_backward(p, s, cuts[i - 1], cuts[i], want_sums ? static_cast<float*>(sums.data()) : nullptr, scratch);
    for (int64_t c = 0; c < width && want_sums; ++c) weight_sum[c] += sums.get(c), bias_sum[c] += sums.get(sums_row + c);
  }

  Comparison of_x("grad_x", grad_x.numbers), of_reference("grad_reference", grad_reference.numbers);
  Numbers got_sums(Storage::f32, 2 * width, kMark);
  for (int64_t c = 0; c < width; ++c) got_sums.set(c, weight_sum[c]), got_sums.set(width + c, bias_sum[c]);
  std::vector<double> want_weight(width), want_bias(width);
  for (int64_t n = 0; n < tokens; ++n) {
    const int64_t j = slot[n];
    const bool sent = j >= 0 || all;
    const auto [y, inverse] = norm.centered(x.row(n));
    std::vector<double> grad(width);
    double mean = 0, along = 0;
    for (int64_t c = 0; c < width; ++c) {
      const double of_delta = j >= 0 && with_delta ? delta.get(j, c) : 0;
      grad[c] = (j >= 0 && with_values ? values.get(j, c) : 0) + of_delta + (sent && with_renewed ? renewed.get(n, c) : 0);
      if (want_reference) {
        const double through = !sent && with_renewed ? renewed.get(n, c) : 0;
        of_reference.expect(n * grad_reference.pitch + c, through - of_delta);
      }
      want_weight[c] += grad[c] * y[c], want_bias[c] += grad[c];
      weight_size[c] += grad[c] * y[c] * grad[c] * y[c], bias_size[c] += grad[c] * grad[c];
      if (norm.given) grad[c] *= norm.weight[c];
      mean += grad[c] / static_cast<double>(width), along += grad[c] * y[c] / static_cast<double>(width);
    }
    for (int64_t c = 0; c < width && want_x; ++c) {
      const double through = norm.given ? inverse * (grad[c] - mean - y[c] * along) : grad[c];
      of_x.expect(n * grad_x.pitch + c, through + (with_total ? total.get(n, c) : 0), norm.given ? inverse * fabs(grad[c]) : 0);
    }
  }
  bool right = of_x.holds(storage) & of_reference.holds(storage);
  if (want_sums) {
    Comparison of_sums("gradients of the norm", got_sums);
    for (int64_t c = 0; c < width; ++c) {
      of_sums.expect(c, want_weight[c], sqrt(weight_size[c]));
      of_sums.expect(width + c, want_bias[c], sqrt(bias_size[c]));
    }
    right &= of_sums.holds(Storage::f32);
  }
  if (!right)
    fprintf(stderr, "gate_backward: %s, %ld tokens of %ld%s%s\n", name_of(storage), long(tokens), long(width), norm.given ? ", norm" : "",
            all ? ", all" : "");
  return right;
}

// ---- layers ----

double activated(Activation activation, double x) {
  switch (activation) {
    case Activation::none: return x;
    case Activation::relu: return std::max(x, 0.0);
    case Activation::gelu: return x * 0.5 * erfc(-x / sqrt(2.0));
    case Activation::gelu_tanh: return 0.5 * x * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::silu: return x / (1 + exp(-x));
  }
  return NAN;
}

// a layer as it was made: weights of a size that keeps the result's
struct Dense {
  int64_t width, outputs;
  Rows weight;
  Numbers bias;
  bool has_bias = chance(0.7);

  Dense(Storage storage, int64_t width, int64_t outputs)
      : width(width), outputs(outputs), weight(storage, outputs, width, NAN), bias(storage, outputs, NAN) {
    for (int64_t o = 0; o < outputs; ++o) {
      bias.set(o, normal());
      for (int64_t c = 0; c < width; ++c) weight.numbers.set(o * weight.pitch + c, normal() / sqrt(static_cast<double>(width)));
    }
  }
  Layer view(Storage storage, int64_t rows) {
    Layer p{};
    p.storage = storage;
    p.rows = rows, p.width = width, p.outputs = outputs;
    p.weight = weight.numbers.data(), p.weight_row = weight.pitch;
    p.bias = has_bias ? bias.data() : nullptr;
    return p;
  }
  std::vector<double> of(const std::vector<double>& x, Activation activation) const {
    std::vector<double> y(outputs);
    for (int64_t o = 0; o < outputs; ++o) {
      y[o] = has_bias ? bias.get(o) : 0;
      for (int64_t c = 0; c < width; ++c) y[o] += weight.get(o, c) * x[c];
      y[o] = activated(activation, y[o]);
    }
    return y;
  }
};

// in pieces as the tensor side cuts them
void run_layer(const DeltaMatmulLoops& loops, const Layer& p, const Scratch& scratch) {
  const int64_t panels = loops.panels(p.rows), units = (p.outputs + loops.output_unit - 1) / loops.output_unit;
  const std::vector<int64_t> cuts = cut(units);
  for (int64_t panel = 0; panel < panels;) {
    const int64_t end = std::min(panels, panel + pick(1, loops.panels_at_once));
    for (size_t i = 1; i < cuts.size(); ++i) {
      scratch.spoil();
      loops.layer(p, panel, end, cuts[i - 1] * loops.output_unit, std::min(p.outputs, cuts[i] * loops.output_unit), scratch);
    }
    panel = end;
  }
}

bool layers_are_right(const DeltaMatmulLoops& loops) {
  const Storage storage = kStorages[pick(0, 2)];
  // one of them large: more than a panel, than a panel's part in the cache, than a chunk of outputs
  const int64_t large = pick(0, 5);
  const int64_t rows = large == 0 ? pick(100, 260) : pick(1, 20), width = large == 1 ? pick(600, 1300) : pick(0, 40);
  const int64_t hidden = large == 2 ? pick(250, 600) : pick(1, 40), outputs = large == 3 ? pick(250, 300) : pick(1, 40);
  const bool two = chance(0.5);
  const Activation activation = pick_of({Activation::none, Activation::gelu, Activation::gelu_tanh, Activation::relu, Activation::silu});
  const Norm norm(width);
  Rows x(storage, rows, width, NAN), out(storage, rows, outputs, kMark);
  x.randomise();
  std::vector<int64_t> place(rows);
  for (int64_t i = 0; i < rows; ++i) place[i] = i;
  std::shuffle(place.begin(), place.end(), random_bits);
  const int64_t size = storage == Storage::f32 ? 4 : 2;
  std::vector<const void*> from;
  std::vector<void*> to;
  for (int64_t i = 0; i < rows; ++i) {
    from.push_back(static_cast<char*>(x.numbers.data()) + i * x.pitch * size);
    to.push_back(static_cast<char*>(out.numbers.data()) + place[i] * out.pitch * size);
  }
  Dense first(storage, width, two ? hidden : outputs), second(storage, hidden, outputs);
  const Scratch packed(loops.packed_bytes(storage, rows, width)), next(loops.packed_bytes(storage, rows, hidden));
  const Scratch scratch(loops.layer_scratch(storage));

  const PackedRows packing{storage, rows, width, norm.view(), from.data(), packed};
  for (int64_t panel = 0; panel < loops.panels(rows); ++panel) loops.pack(packing, panel);
  Layer p = first.view(storage, rows);
  p.activation = activation;
  p.packed = packed;
  p.out = to.data();
  p.past_caches = chance(0.5);
  if (two) p.next = next;
  run_layer(loops, p, scratch);
  if (two) {
    Layer q = second.view(storage, rows);
    q.packed = next;
    q.out = to.data();
    q.past_caches = chance(0.5);
    run_layer(loops, q, scratch);
  }

  Comparison of_out("out", out.numbers);
  for (int64_t i = 0; i < rows; ++i) {
    std::vector<double> y = first.of(norm.of(x.row(i)), activation);
    if (two) y = second.of(y, Activation::none);
    for (int64_t o = 0; o < outputs; ++o) of_out.expect(place[i] * out.pitch + o, y[o], 1);
  }
  const bool right = of_out.holds(storage);
  if (!right)
    fprintf(stderr, "layers: %s, %ld rows, %ld -> %ld -> %ld, activation %d%s\n", name_of(storage), long(rows), long(width),
            two ? long(hidden) : 0, long(outputs), static_cast<int>(activation), norm.given ? ", norm" : "");
  return right;
}

// float accuracy where the tolerance rule would not see its loss, and the ends of the range
bool activations_are_right(const DeltaMatmulLoops& loops) {
  const Activation activation = pick_of({Activation::gelu, Activation::gelu_tanh, Activation::relu, Activation::silu});
  const std::vector<double> points{-3e38, -1e30, -200, -100, -20, -12, -5.5, -3, -1,  -0.3, -1e-3,
                                   0,     1e-3,  0.3,  1,    3,   5.5, 12,   20, 100, 1e30, 3e38};
  const int64_t rows = static_cast<int64_t>(points.size());
  Numbers x(Storage::f32, rows, 0), out(Storage::f32, rows, kMark);
  std::vector<const void*> from;
  std::vector<void*> to;
  for (int64_t i = 0; i < rows; ++i) {
    x.set(i, points[i] * (fabs(points[i]) < 50 ? 1 + 0.1 * normal() : 1));
    from.push_back(static_cast<float*>(x.data()) + i);
    to.push_back(static_cast<float*>(out.data()) + i);
  }
  const float one = 1;
  const Scratch packed(loops.packed_bytes(Storage::f32, rows, 1)), scratch(loops.layer_scratch(Storage::f32));
  const PackedRows packing{Storage::f32, rows, 1, {nullptr, nullptr, 0}, from.data(), packed};
  for (int64_t panel = 0; panel < loops.panels(rows); ++panel) loops.pack(packing, panel);
  Layer p{};
  p.rows = rows, p.width = p.outputs = 1;
  p.weight = &one, p.weight_row = 1;
  p.activation = activation;
  p.packed = packed;
  p.out = to.data();
  run_layer(loops, p, scratch);
  bool right = true;
  for (int64_t i = 0; i < rows; ++i) {
    const double wanted = activated(activation, x.get(i)), error = fabs(out.get(i) - wanted);
    // relative to the result, and to what is left of a number of this size where the result vanishes
    const bool close = error <= 5e-7 * fabs(wanted) + 1e-7 * std::min(1.0, fabs(x.get(i)));
    if (!close) fprintf(stderr, "activation %d of %g: got %.9g, wanted %.9g\n", static_cast<int>(activation), x.get(i), out.get(i), wanted);
    right &= close;
  }
  return right;
}

// ---- copies ----

bool copy_is_right(const DeltaMatmulLoops& loops) {
  const int64_t row_bytes = pick_of<int64_t>({1, 2, 4, 63, 64, 65, 200, 257}), rows = pick(0, 30), pitch = row_bytes + pick(0, 3);
  std::vector<char> source(rows > 0 ? (rows - 1) * pitch + row_bytes : 0), target(rows * row_bytes, 7);
  for (char& byte : source) byte = static_cast<char>(pick(-128, 127));
  std::vector<char*> to;
  std::vector<const char*> from;
  for (int64_t i = 0; i < rows; ++i) {
    to.push_back(target.data() + (rows - 1 - i) * row_bytes);
    from.push_back(chance(0.2) ? nullptr : source.data() + i * pitch);
  }
  const RowCopy p{to.data(), from.data(), row_bytes, chance(0.5)};
  const std::vector<int64_t> cuts = cut(rows);
  for (size_t i = 1; i < cuts.size(); ++i) loops.copy(p, cuts[i - 1], cuts[i]);
  bool right = true;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t b = 0; b < row_bytes; ++b) right &= to[i][b] == (from[i] ? from[i][b] : 0);
  if (!right) fprintf(stderr, "copy: %ld rows of %ld bytes\n", long(rows), long(row_bytes));
  return right;
}

bool test(const char* isa, const DeltaMatmulLoops& loops) {
  constexpr unsigned kProblems = 300;
  for (unsigned seed = 0; seed < kProblems; ++seed) {
    random_bits.seed(seed);
    if (!(gate_is_right(loops) && gate_backward_is_right(loops) && layers_are_right(loops) && activations_are_right(loops) &&
          copy_is_right(loops))) {
      fprintf(stderr, "delta_matmul %s: problem %u\n", isa, seed);
      return false;
    }
  }
  printf("delta_matmul %s: %u problems each for gate, gate_backward, layers, activations and copies\n", isa, kProblems);
  return true;
}

}  // namespace
}  // namespace tokenops

int main(int count, char** arguments) { return tokenops::run_tests<tokenops::DeltaMatmulLoops>(count, arguments, tokenops::test); }
