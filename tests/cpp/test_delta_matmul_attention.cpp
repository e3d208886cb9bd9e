// The loops of delta_attention over three frames of random problems, against plain double loops; `make sanitize` builds and runs it with
// AddressSanitizer and UBSan. Arguments: the instruction sets to test, those that this machine has.
//
// Every buffer is an allocation of exactly its size, so one element too far is an error. Scratch memory is NaN before every call.
#include "cpu/delta_matmul_attention.h"

#include <math.h>

#include <numeric>

#include "check.h"

namespace tokenops {
namespace {

RowList list_of(const std::vector<int32_t>& rows) {
  RowList list{};
  list.row = list.rank = list.slot = rows.data();
  list.count = static_cast<int64_t>(rows.size());
  return list;
}

std::vector<int32_t> numbered(int64_t count) {
  std::vector<int32_t> rows(count);
  std::iota(rows.begin(), rows.end(), 0);
  return rows;
}

std::vector<int32_t> some_of(int64_t rows, int64_t count) {
  std::vector<int32_t> some = numbered(rows);
  std::shuffle(some.begin(), some.end(), random_bits);
  some.resize(count);
  return some;
}

std::vector<int32_t> others(int64_t rows, const std::vector<int32_t>& some) {
  std::vector<int32_t> rest;
  for (int32_t row = 0; row < rows; ++row)
    if (std::find(some.begin(), some.end(), row) == some.end()) rest.push_back(row);
  return rest;
}

// [sample, head, row, width] without gaps
struct Buffer {
  Numbers numbers;
  int64_t heads, rows, width;

  Buffer(Storage storage, int64_t batch, int64_t heads, int64_t rows, int64_t width, double fill)
      : numbers(storage, batch * heads * rows * width, fill), heads(heads), rows(rows), width(width) {}
  int64_t at(int64_t s, int64_t h, int64_t row, int64_t c = 0) const { return ((s * heads + h) * rows + row) * width + c; }
  double get(int64_t s, int64_t h, int64_t row, int64_t c = 0) const { return numbers.get(at(s, h, row, c)); }
  Grid grid() { return {numbers.data(), heads * rows * width, rows * width, width}; }
  void randomise(int64_t s, int64_t row) {
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t c = 0; c < width; ++c) numbers.set(at(s, h, row, c), normal());
  }
};

struct Problem {
  Storage storage = pick_of({Storage::f32, Storage::bf16, Storage::f16});
  bool paper = chance(0.5), rel_pos = chance(0.5);
  Storage stored = paper ? pick_of({Storage::f32, Storage::bf16, Storage::f16}) : storage;
  int64_t batch = pick(1, 2), heads = pick(1, 3), width = 8 * pick(1, 9), value_width = 8 * pick(1, 9);
  int64_t gh = pick(1, 14), gw = pick(1, 14), cells = gh * gw, tokens = chance(0.5) ? cells : pick(1, 120);
  Buffer query{storage, batch, heads, tokens, width, 0}, key{storage, batch, heads, cells, width, 0};
  Buffer value{storage, batch, heads, cells, value_width, 0}, out{storage, batch, heads, tokens, value_width, kMark};
  Buffer rel_h{Storage::f32, batch, heads, tokens, gh, 0}, rel_w{Storage::f32, batch, heads, tokens, gw, 0};
  Buffer output{Storage::f32, batch, heads, tokens, value_width, NAN}, old_key{storage, batch, heads, cells, width, NAN};
  Buffer old_value{stored, batch, heads, cells, value_width, NAN}, probability{stored, batch, heads, paper ? cells : 0, tokens, NAN};
  Buffer maximum{Storage::f32, batch, heads, tokens, 1, NAN}, total = statistic(), peak = statistic();
  std::vector<uint8_t> again = std::vector<uint8_t>(batch * heads * tokens);
  std::vector<double> matrix = std::vector<double>(batch * heads * tokens * cells);  // what the results stand for
  DeltaAttention p{};

  Buffer statistic() const { return {Storage::f32, batch, heads, tokens, 1, NAN}; }
  Problem() {
    SparseAttention& grids = p.grids;
    grids.storage = storage, grids.sequences = batch, grids.query_heads = grids.kv_heads = heads;
    grids.width = width, grids.value_width = value_width, grids.scale = static_cast<float>(1 / sqrt(static_cast<double>(width)));
    grids.query = query.grid(), grids.key = key.grid(), grids.value = value.grid(), grids.out = out.grid();
    grids.past_caches = chance(0.5);
    if (rel_pos) {
      grids.rel_storage = Storage::f32, grids.rel_height = gh, grids.rel_width = gw;
      grids.rel_h = rel_h.grid(), grids.rel_w = rel_w.grid();
    }
    p.tokens = tokens, p.cells = cells, p.stored = stored, p.guard = 0.01f, p.again = again.data();
    p.output = floats(output), p.maximum = floats(maximum), p.total = floats(total), p.peak = floats(peak);
    p.old_key = paper ? nullptr : old_key.numbers.data(), p.old_value = old_value.numbers.data();
    p.probability = paper ? probability.numbers.data() : nullptr;
  }
  static float* floats(Buffer& buffer) { return static_cast<float*>(buffer.numbers.data()); }

  void change(int64_t s, const std::vector<int32_t>& rows, const std::vector<int32_t>& changed) {
    for (int32_t row : rows) query.randomise(s, row), rel_h.randomise(s, row), rel_w.randomise(s, row);
    for (int32_t cell : changed) key.randomise(s, cell), value.randomise(s, cell);
  }
  double* row_of_matrix(int64_t s, int64_t h, int64_t row) { return matrix.data() + ((s * heads + h) * tokens + row) * cells; }

  // the columns of these cells anew, or all of them
  void attend(int64_t s, const std::vector<int32_t>& changed) {
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = 0; i < tokens; ++i) {
        std::vector<double> weight(cells);
        double most = -INFINITY, sum = 0;
        for (int64_t j = 0; j < cells; ++j) {
          for (int64_t c = 0; c < width; ++c) weight[j] += query.get(s, h, i, c) * key.get(s, h, j, c);
          weight[j] *= static_cast<double>(p.grids.scale);
          if (rel_pos) weight[j] += rel_h.get(s, h, i, j / gw) + rel_w.get(s, h, i, j % gw);
          most = std::max(most, weight[j]);
        }
        for (double& w : weight) sum += w = exp(w - most);
        for (int32_t j : changed) row_of_matrix(s, h, i)[j] = weight[j] / sum;
      }
  }
};

bool test_once(const char* isa, const DeltaAttentionLoops& loops) {
  Problem problem;
  DeltaAttention& p = problem.p;
  const std::vector<int32_t> rows = numbered(problem.tokens), every = numbered(problem.cells);
  bool right = true;
  for (int frame = 0; frame < 3 && right; ++frame) {
    std::vector<std::vector<int32_t>> fresh(problem.batch), kept(problem.batch), changed(problem.batch);
    std::vector<DeltaLists> lists(problem.batch);
    int64_t most = 0;
    p.first = frame == 0;
    for (int64_t s = 0; s < problem.batch; ++s) {
      fresh[s] = p.first ? rows : some_of(problem.tokens, pick(0, problem.tokens));
      changed[s] = p.first ? every : some_of(problem.cells, pick(0, problem.cells));
      kept[s] = others(problem.tokens, fresh[s]);
      problem.change(s, fresh[s], changed[s]);
      problem.attend(s, problem.paper ? changed[s] : every);
      lists[s] = {list_of(rows), list_of(kept[s]), list_of(changed[s]), list_of(every)};
      most = std::max(most, lists[s].cells.count);
    }
    p.lists = lists.data();
    const Scratch few(loops.scratch(p, most)), many(loops.scratch(p, problem.cells));
    // blocks of a list in one to three pieces, with the packed keys of the piece before
    const auto in_pieces = [&](const RowList& list, const Scratch& scratch, const auto& pass) {
      scratch.spoil();
      const std::vector<int64_t> cuts = cut(list.count ? loops.blocks(list.count) : 0);
      for (size_t i = 1; i < cuts.size(); ++i) pass(cuts[i - 1], cuts[i], i > 1);
    };
    for (int64_t s = 0; s < problem.batch; ++s)
      for (int64_t h = 0; h < problem.heads; ++h) {
        if (problem.paper) {
          in_pieces(lists[s].rows, few, [&](int64_t from, int64_t to, bool packed) { loops.publish(p, s, h, from, to, packed, few); });
        } else {
          in_pieces(lists[s].kept, few, [&](int64_t from, int64_t to, bool packed) { loops.advance(p, s, h, from, to, packed, few); });
          std::vector<int32_t> afresh = fresh[s];
          for (int32_t row : kept[s])
            if (problem.again[p.head(s, h) * p.tokens + row]) afresh.push_back(row);
          const RowList list = list_of(afresh);
          in_pieces(list, many, [&](int64_t from, int64_t to, bool packed) { loops.afresh(p, s, h, list, from, to, packed, many); });
        }
        loops.remember(p, s, h);
      }

    Comparison out("out", problem.out.numbers), remembered("state.value", problem.old_value.numbers);
    for (int64_t s = 0; s < problem.batch; ++s)
      for (int64_t h = 0; h < problem.heads; ++h) {
        for (int64_t i = 0; i < problem.tokens; ++i)
          for (int64_t c = 0; c < problem.value_width; ++c) {
            double wanted = 0;
            for (int64_t j = 0; j < problem.cells; ++j) wanted += problem.row_of_matrix(s, h, i)[j] * problem.value.get(s, h, j, c);
            out.expect(problem.out.at(s, h, i, c), wanted);
          }
        for (int64_t j = 0; j < problem.cells; ++j)
          for (int64_t c = 0; c < problem.value_width; ++c)
            remembered.expect(problem.old_value.at(s, h, j, c), problem.value.get(s, h, j, c));
      }
    // what is computed is as coarse as the coarser of what goes in and what is stored
    const auto coarser = [](Storage a, Storage b) {
      return a == Storage::bf16 || b == Storage::bf16 ? Storage::bf16
             : a == Storage::f16 || b == Storage::f16 ? Storage::f16
                                                      : Storage::f32;
    };
    right = out.holds(coarser(problem.storage, problem.stored)) & remembered.holds(problem.stored);
    for (uint8_t& flag : problem.again) flag = 0;
    if (!right)
      fprintf(stderr, "%s: frame %d, %s, %s stored as %s, %lld samples, %lld heads, %lld tokens, %lld x %lld cells, width %lld and %lld\n",
              isa, frame, problem.paper ? "paper" : "exact", name_of(problem.storage), name_of(problem.stored), (long long)problem.batch,
              (long long)problem.heads, (long long)problem.tokens, (long long)problem.gh, (long long)problem.gw, (long long)problem.width,
              (long long)problem.value_width);
  }
  return right;
}

bool test(const char* isa, const DeltaAttentionLoops& loops) {
  constexpr unsigned kProblems = 200;
  for (unsigned seed = 0; seed < kProblems; ++seed) {
    random_bits.seed(seed);
    if (!test_once(isa, loops)) {
      fprintf(stderr, "delta_attention %s: problem %u\n", isa, seed);
      return false;
    }
  }
  printf("delta_attention %s: %u problems of three frames\n", isa, kProblems);
  return true;
}

}  // namespace
}  // namespace tokenops

int main(int count, char** arguments) { return tokenops::run_tests<tokenops::DeltaAttentionLoops>(count, arguments, tokenops::test); }
