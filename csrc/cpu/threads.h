// Running independent pieces of work on torch's own thread pool, each with scratch memory of its thread.
#pragma once

#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <utility>
#include <vector>

#include "../tensors.h"

namespace tokenops {

constexpr int64_t kPiecesPerThread = 4;  // so that a thread that falls behind is helped

// Memory that a thread keeps from call to call: fresh pages would be faulted in on every call. Large blocks are given back.
class Scratch {
 public:
  ~Scratch() { free(data_); }
  char* reserve(int64_t bytes) {
    if (bytes > size_) {
      free(data_);
      size_ = (bytes + 4095) / 4096 * 4096;
      data_ = static_cast<char*>(aligned_alloc(4096, size_));
      if (!data_) size_ = 0;
    }
    return data_;
  }
  void trim() {
    if (size_ <= kKept) return;
    free(data_);
    data_ = nullptr;
    size_ = 0;
  }

 private:
  static constexpr int64_t kKept = 64 << 20;
  char* data_ = nullptr;
  int64_t size_ = 0;
};

// Memory of one call that is too large to keep. Its pages are faulted in on first touch, and small ones would be many thousands.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) {
    constexpr int64_t kLargePage = 2 << 20;
    const int64_t whole = (bytes + kLargePage - 1) / kLargePage * kLargePage;
    data_ = bytes < kLargePage ? malloc(bytes) : aligned_alloc(kLargePage, whole);
#if defined(MADV_HUGEPAGE)
    // a wish: without it the pages are small
    if (data_ && bytes >= kLargePage) madvise(data_, whole, MADV_HUGEPAGE);
#endif
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { free(data_); }
  float* floats() const { return static_cast<float*>(data_); }

 private:
  void* data_;
};

inline Scratch& scratch_of_thread() {
  static thread_local Scratch scratch;
  return scratch;
}

// what all threads of a call share, kept by the thread that calls
inline Scratch& scratch_of_call() {
  static thread_local Scratch scratch;
  return scratch;
}

// scratch memory as one thread sees it during one run
struct Lease {
  char* memory;
  int64_t holds;  // what the work before left there, -1 = nothing; for the work to use and set
};

// Calls work(i, lease) for i in [0, count), handed out in order to whichever thread is free. Each i owns what it writes, so
// the result does not depend on who ran it. False: a thread could not get its scratch memory.
template <class Work>
bool run_parallel(int64_t count, int64_t scratch_bytes, const Work& work) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> enough_memory{true};
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    Scratch& kept = scratch_of_thread();
    Lease lease{kept.reserve(scratch_bytes), -1};
    if (!lease.memory && scratch_bytes) {
      enough_memory = false;
      return;
    }
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(i, lease);
    kept.trim();
  });
  return enough_memory;
}

// calls work(first, last) for stretches of [0, rows), none shorter than it is worth
template <class Work>
void in_stretches(int64_t rows, int64_t shortest, const Work& work) {
  const int64_t pieces = std::clamp<int64_t>(rows / shortest, 1, kPiecesPerThread * torch::stable::get_num_threads());
  run_parallel(pieces, 0, [&](int64_t i, Lease&) { work(rows * i / pieces, rows * (i + 1) / pieces); });
}

// The blocks of many items (heads, samples) in a row, to be cut into pieces of even work. Blocks of an item cost the same.
class BlockRow {
 public:
  void add(int64_t blocks, int64_t cost) {
    items_.push_back({blocks, cost});
    before_.push_back(before_.back() + blocks * cost);
  }
  int64_t work() const { return before_.back(); }

  // calls f(item, first block, last block) for what belongs to one of that many pieces
  template <class F>
  void for_piece(int64_t piece, int64_t pieces, const F& f) const {
    const auto [first, first_block] = start_of(piece, pieces);
    const auto [last, last_block] = start_of(piece + 1, pieces);
    const int64_t items = static_cast<int64_t>(items_.size());
    for (int64_t i = first; i < items && i <= last; ++i) {
      const int64_t from = i == first ? first_block : 0, to = i == last ? last_block : items_[i].blocks;
      if (from < to) f(i, from, to);
    }
  }

 private:
  struct Item {
    int64_t blocks, cost;
  };
  std::pair<int64_t, int64_t> start_of(int64_t piece, int64_t pieces) const {
    const int64_t at = static_cast<int64_t>(static_cast<__int128>(work()) * piece / pieces);
    const int64_t i = std::upper_bound(before_.begin(), before_.end(), at) - before_.begin() - 1;
    return {i, i == static_cast<int64_t>(items_.size()) ? 0 : (at - before_[i]) / items_[i].cost};
  }

  std::vector<Item> items_;
  std::vector<int64_t> before_{0};
};

}  // namespace tokenops
