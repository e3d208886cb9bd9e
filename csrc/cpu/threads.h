// Running independent pieces of work on torch's own thread pool, each with scratch memory of its thread.
#pragma once

#include <stdlib.h>

#include <atomic>

#include "../tensors.h"

namespace tokenops {

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

inline Scratch& scratch_of_thread() {
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

}  // namespace tokenops
