// What the C++ tests of all rooms share: random choices, memory of exactly its size that shows what nobody wrote or should have
// read, the one tolerance rule, and the main function.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/storage.h"

namespace tokenops {

inline std::mt19937 random_bits;

inline int64_t pick(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random_bits); }
template <class T>
T pick_of(std::initializer_list<T> choices) {
  return choices.begin()[pick(0, static_cast<int64_t>(choices.size()) - 1)];
}
inline bool chance(double p) { return std::bernoulli_distribution(p)(random_bits); }
inline double normal() { return std::normal_distribution<double>()(random_bits); }

constexpr double kMark = 12.25;  // exact in every storage type

// n numbers of one storage type, right behind a number that nobody may touch: so they are aligned to their own size and no more
class Numbers {
 public:
  Numbers(Storage storage, int64_t n, double fill) : storage_(storage), n_(n), bytes_(new char[(n + 1) * size()]) {
    for (int64_t i = -1; i < n; ++i) set(i, fill);
    set(-1, kMark);
  }
  Numbers(Numbers&& other) noexcept : storage_(other.storage_), n_(other.n_), bytes_(other.bytes_) { other.bytes_ = nullptr; }
  Numbers& operator=(Numbers&&) = delete;
  ~Numbers() { delete[] bytes_; }

  void* data() { return bytes_ + size(); }
  int64_t count() const { return n_; }
  double get(int64_t i) const {
    const char* at = bytes_ + (i + 1) * size();
    if (storage_ == Storage::f32) return read<float>(at);
    if (storage_ == Storage::f16) return read<_Float16>(at);
    const uint32_t bits = static_cast<uint32_t>(read<uint16_t>(at)) << 16;
    return read<float>(reinterpret_cast<const char*>(&bits));
  }
  // values are made of few bits, or cut to what the type holds: no rounding is tested here
  void set(int64_t i, double value) {
    char* at = bytes_ + (i + 1) * size();
    const float single = static_cast<float>(value);
    const _Float16 half = static_cast<_Float16>(value);
    if (storage_ == Storage::f32) memcpy(at, &single, 4);
    if (storage_ == Storage::f16) memcpy(at, &half, 2);
    if (storage_ == Storage::bf16) memcpy(at, reinterpret_cast<const char*>(&single) + 2, 2);
  }

 private:
  int64_t size() const { return storage_ == Storage::f32 ? 4 : 2; }
  template <class T>
  static T read(const char* at) {
    T value;
    memcpy(&value, at, sizeof(T));
    return value;
  }
  Storage storage_;
  int64_t n_;
  char* bytes_;
};

inline const char* name_of(Storage storage) {
  return storage == Storage::f32 ? "float32" : storage == Storage::bf16 ? "bfloat16" : "float16";
}

// sum of squares of a result and of its error, for the one tolerance rule that all of tokenops shares
class Comparison {
 public:
  Comparison(const char* what, const Numbers& got) : what_(what), got_(got), seen_(got.count()) {}
  // size: of the terms that add up to what is wanted, where they may cancel, as a root of their squares
  void expect(int64_t at, double wanted, double size = 0) {
    const double got = got_.get(at);
    seen_[at] = true;
    ++count_;
    if (isinf(wanted) || isinf(got) || isnan(got)) {
      wrong_ |= !(got == wanted);
    } else {
      error_ += (got - wanted) * (got - wanted);
      norm_ += std::max(wanted * wanted, size * size);
    }
  }
  // everything that was not expected still holds its mark, and the number before the first one too
  bool holds(Storage storage) const {
    const double tolerance = storage == Storage::f32 ? 2e-5 : storage == Storage::bf16 ? 2e-2 : 4e-3;
    bool untouched = got_.get(-1) == kMark;
    for (int64_t i = 0; i < got_.count(); ++i) untouched &= seen_[i] || got_.get(i) == kMark;
    const double allowed = tolerance * (sqrt(norm_) + 0.01 * sqrt(static_cast<double>(count_)));
    if (!wrong_ && untouched && sqrt(error_) <= allowed) return true;
    fprintf(stderr, "%s: error %g, allowed %g%s%s\n", what_, sqrt(error_), allowed, wrong_ ? ", a number is not finite" : "",
            untouched ? "" : ", a number was written that is not part of the result");
    return false;
  }

 private:
  const char* what_;
  const Numbers& got_;
  std::vector<bool> seen_;
  double error_ = 0, norm_ = 0;
  int64_t count_ = 0;
  bool wrong_ = false;
};

// [0, n) cut at random into one to three pieces
inline std::vector<int64_t> cut(int64_t n) {
  std::vector<int64_t> cuts{0, n};
  for (int64_t more = pick(0, 2); more > 0; --more) cuts.push_back(pick(0, n));
  std::sort(cuts.begin(), cuts.end());
  return cuts;
}

// scratch memory of exactly this size, all of it NaN
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : bytes_(bytes) {
    void* data = nullptr;
    if (posix_memalign(&data, 64, bytes) != 0) abort();
    data_ = static_cast<char*>(data);
    spoil();
  }
  Scratch(const Scratch&) = delete;
  ~Scratch() { free(data_); }
  operator char*() const { return data_; }
  void spoil() const { memset(data_, 0xff, bytes_); }

 private:
  int64_t bytes_;
  char* data_;
};

// test(name, loops) for each instruction set named on the command line; the exit status of the program
template <class Loops>
int run_tests(int count, char** arguments, bool (*test)(const char* isa, const Loops&)) {
  if (count < 2) {
    fprintf(stderr, "usage: %s ISA...\n", arguments[0]);
    return 2;
  }
  bool right = true;
  for (int i = 1; i < count; ++i) {
    const std::string isa = arguments[i];
    bool known = false;
#define X(name) \
  if (isa == #name) known = true, right &= test(#name, name::loops<Loops>());
    TOKENOPS_ISAS
#undef X
    if (!known) {
      fprintf(stderr, "%s was not built\n", isa.c_str());
      right = false;
    }
  }
  return right ? 0 : 1;
}

}  // namespace tokenops
