// Fibers for threads, and what happens when they meet.
#include "emulator.h"

#include <stdlib.h>
#include <sys/mman.h>

#include <deque>
#include <map>
#include <memory>
#include <random>

#include <stdexcept>
#include <vector>

#include "../../csrc/tensors.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves what a call must preserve on this stack, and goes on where the other stack left off.
extern "C" void emulator_switch(void** save, void* load);
asm(R"(
.text
.type emulator_switch, @function
emulator_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size emulator_switch, . - emulator_switch
)");

namespace emulator {
namespace {

constexpr int kWarp = 32;
constexpr size_t kStack = 256 << 10;

bool operator==(Site a, Site b) { return a.line == b.line && strcmp(a.file, b.file) == 0; }

std::string describe(Site site) {
  const std::string file = site.file;
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line);
}

// Memory for one fiber; a page below it that nobody may touch.
class Stack {
 public:
  Stack() : memory_(mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK | MAP_NORESERVE, -1, 0)) {
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory_, 4096, PROT_NONE);
  }
  Stack(const Stack&) = delete;
  ~Stack() { munmap(memory_, kStack); }
  char* bottom() const { return static_cast<char*>(memory_) + 4096; }
  size_t size() const { return kStack - 4096; }

 private:
  void* memory_;
};

struct Copy {
  void* shared;
  const void* global;
  int bytes, group;
};

enum class Status { ready, at_step, at_barrier, done };

struct Thread {
  Place place;
  int lane, warp;
  Status status = Status::ready;
  Site site{"", 0};  // where it waits
  bool predicate = false;
  void* stack_pointer = nullptr;
  std::vector<Copy> copies;
  int group = 0;  // of copies that are not committed yet
};

// Lanes on their way to a step that they take together.
struct Meeting {
  unsigned mask, arrived;
  const void* kind;
  Site site;
  void* lanes[kWarp];
};

struct Launch {
  const std::function<void()>* kernel;
  std::vector<Thread> threads;
  std::vector<std::vector<Meeting>> meetings;  // of each warp
  std::unique_ptr<char, decltype(&free)> shared{nullptr, &free};
  size_t shared_bytes;
  Thread* current = nullptr;
  void* scheduler = nullptr;  // its stack pointer while a fiber runs
  bool vote = false;
  std::string failure;
#if defined(__SANITIZE_ADDRESS__)
  const void* scheduler_bottom = nullptr;
  size_t scheduler_size = 0;
#endif
};

Launch* launch = nullptr;
std::deque<Stack> stacks;
int64_t order_seed = 0;  // 0: ascending, 1: descending, others: shuffled
std::string skipped_site;
// barriers and waits that were met, and whether a test leaves them out
std::map<std::pair<const char*, int>, bool> sites;

bool skips(Site site) {
  const auto [entry, is_new] = sites.try_emplace({site.file, site.line}, false);
  if (is_new) entry->second = describe(site) == skipped_site;
  return entry->second;
}

void to_scheduler([[maybe_unused]] bool forever = false) {
  Thread& me = *launch->current;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(forever ? nullptr : &fake, launch->scheduler_bottom, launch->scheduler_size);
#endif
  emulator_switch(&me.stack_pointer, launch->scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &launch->scheduler_bottom, &launch->scheduler_size);
#endif
  (*launch->kernel)();
  Thread& me = *launch->current;
  if (!me.copies.empty()) fail("a thread ends with copies under way");
  me.status = Status::done;
  to_scheduler(true);
}

void start(Thread& thread, const Stack& stack) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack.bottom(), stack.size());
#endif
  // six registers, the address to return to and one word, so that the stack is aligned as after a call
  void** top = reinterpret_cast<void**>(stack.bottom() + stack.size()) - 1;
  *top = nullptr;
  *--top = reinterpret_cast<void*>(&fiber_main);
  thread.stack_pointer = top - 6;
}

void resume(Thread& thread, [[maybe_unused]] const Stack& stack) {
  launch->current = &thread;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, stack.bottom(), stack.size());
#endif
  emulator_switch(&launch->scheduler, thread.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  launch->current = nullptr;
}

template <class T>
void arrange(std::vector<T>& items, std::mt19937_64& random) {
  if (order_seed == 1) std::reverse(items.begin(), items.end());
  // std::shuffle's order is the library's own affair
  if (order_seed > 1)
    for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[random() % i]);
}

// All threads that are left wait at one barrier: it opens. Anything else cannot go on.
void open_barrier() {
  Site site{"", 0};
  launch->vote = false;
  for (const Thread& thread : launch->threads) {
    if (thread.status == Status::done) continue;
    if (thread.status == Status::at_step)
      throw std::runtime_error("divergent threads: thread " + std::to_string(thread.place.thread.x) + " waits for lanes of its warp at " +
                               describe(thread.site) + ", and they do not come");
    if (!site.line) site = thread.site;
    if (!(site == thread.site))
      throw std::runtime_error("divergent barrier: some threads wait at " + describe(site) + ", others at " + describe(thread.site));
    launch->vote |= thread.predicate;
  }
  for (Thread& thread : launch->threads)
    if (thread.status == Status::at_barrier) thread.status = Status::ready;
}

void run_block(std::mt19937_64& random) {
  // fresh memory for each block, so that a sanitizer knows its end
  launch->shared.reset(static_cast<char*>(aligned_alloc(128, (launch->shared_bytes + 127) / 128 * 128)));
  memset(launch->shared.get(), 0xff, launch->shared_bytes);
#if defined(__SANITIZE_ADDRESS__)
  const size_t reserved = (launch->shared_bytes + 127) / 128 * 128;
  __asan_poison_memory_region(launch->shared.get() + launch->shared_bytes, reserved - launch->shared_bytes);
#endif
  for (size_t i = 0; i < launch->threads.size(); ++i) start(launch->threads[i], stacks[i]);
  std::vector<size_t> order;
  while (true) {
    order.clear();
    size_t done = 0;
    for (size_t i = 0; i < launch->threads.size(); ++i) {
      if (launch->threads[i].status == Status::ready) order.push_back(i);
      done += launch->threads[i].status == Status::done;
    }
    if (done == launch->threads.size()) return;
    if (order.empty()) {
      open_barrier();
      continue;
    }
    arrange(order, random);
    for (const size_t i : order) {
      resume(launch->threads[i], stacks[i]);
      if (!launch->failure.empty()) throw std::runtime_error(launch->failure);
    }
  }
}

}  // namespace

const Place& place() { return launch->current->place; }
void* shared_memory() { return launch->shared.get(); }
size_t shared_bytes() { return launch->shared_bytes; }

void fail(const std::string& what) {
  const Place& at = place();
  launch->failure = what + " (thread " + std::to_string(at.thread.x) + " of block " + std::to_string(at.block.x) + ")";
  to_scheduler(true);
  abort();
}

void check_alignment(const void* address, size_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % bytes) fail(std::string(what) + ": an address is not a multiple of " + std::to_string(bytes));
}

void run(unsigned blocks, unsigned threads, size_t shared, const std::function<void()>& kernel) {
  if (blocks == 0) return;
  if (threads == 0 || threads > 1024) throw std::runtime_error("a block has 1 to 1024 threads, got " + std::to_string(threads));
  if (launch) throw std::runtime_error("a kernel is running");
  Launch one{};
  one.kernel = &kernel;
  one.shared_bytes = shared;
  launch = &one;
  const struct End {
    ~End() { launch = nullptr; }
  } end;
  while (stacks.size() < threads) stacks.emplace_back();
  std::mt19937_64 random(static_cast<uint64_t>(order_seed));
  std::vector<unsigned> order(blocks);
  for (unsigned i = 0; i < blocks; ++i) order[i] = i;
  arrange(order, random);
  for (const unsigned block : order) {
    one.threads.assign(threads, Thread{});
    one.meetings.assign((threads + kWarp - 1) / kWarp, {});
    for (unsigned i = 0; i < threads; ++i) {
      one.threads[i].place = {{i}, {block}, {threads}, {blocks}};
      one.threads[i].lane = static_cast<int>(i % kWarp);
      one.threads[i].warp = static_cast<int>(i / kWarp);
    }
    run_block(random);
  }
}

void block_barrier(Site site) {
  if (skips(site)) return;
  block_vote(false, site);
}

bool block_vote(bool predicate, Site site) {
  Thread& me = *launch->current;
  me.predicate = predicate;
  me.site = site;
  me.status = Status::at_barrier;
  to_scheduler();
  return launch->vote;
}

void together(unsigned mask, const void* kind, void* mine, void (*step)(void* const*, unsigned), Site site) {
  Thread& me = *launch->current;
  if (!(mask >> me.lane & 1)) fail("a lane is not in its own mask at " + describe(site));
  std::vector<Meeting>& meetings = launch->meetings[static_cast<size_t>(me.warp)];
  auto meeting = meetings.begin();
  while (meeting != meetings.end() && meeting->mask != mask) {
    if (meeting->mask & mask) fail("lanes name masks that overlap, at " + describe(site) + " and " + describe(meeting->site));
    ++meeting;
  }
  if (meeting == meetings.end()) meeting = meetings.insert(meeting, Meeting{mask, 0, kind, site, {}});
  if (meeting->kind != kind || !(meeting->site == site))
    fail("divergent lanes: some are at " + describe(meeting->site) + ", others at " + describe(site));
  meeting->lanes[me.lane] = mine;
  meeting->arrived |= 1u << me.lane;
  if (meeting->arrived != mask) {
    me.site = site;
    me.status = Status::at_step;
    to_scheduler();
    return;
  }
  if (step) step(meeting->lanes, mask);
  meetings.erase(meeting);
  Thread* const warp = &launch->threads[static_cast<size_t>(me.warp * kWarp)];
  for (int lane = 0; lane < kWarp; ++lane)
    if (mask >> lane & 1) warp[lane].status = Status::ready;
}

void start_copy(void* shared, const void* global, int bytes) {
  check_alignment(shared, static_cast<size_t>(bytes), "cp.async to shared memory");
  const char *begin = launch->shared.get(), *to = static_cast<char*>(shared);
  if (to < begin || to + bytes > begin + launch->shared_bytes) fail("cp.async to an address outside of shared memory");
  if (global) check_alignment(global, static_cast<size_t>(bytes), "cp.async from global memory");
  memset(shared, 0xff, static_cast<size_t>(bytes));
  Thread& me = *launch->current;
  me.copies.push_back({shared, global, bytes, me.group});
}

void commit_copies() { ++launch->current->group; }

void wait_copies(int pending, Site site) {
  if (skips(site)) return;
  Thread& me = *launch->current;
  size_t left = 0;
  for (const Copy& copy : me.copies) {
    if (copy.group >= me.group - pending) {
      me.copies[left++] = copy;
    } else if (copy.global) {
      memcpy(copy.shared, copy.global, static_cast<size_t>(copy.bytes));
    } else {
      memset(copy.shared, 0, static_cast<size_t>(copy.bytes));
    }
  }
  me.copies.resize(left);
}

}  // namespace emulator

void __syncwarp(unsigned mask, emulator::Site site) {
  static const char kind = 0;
  if (!emulator::skips(site)) emulator::together(mask, &kind, nullptr, nullptr, site);
}

namespace tokenops::emulated {

void load_tiles(void* const* lanes, unsigned) {
  uint16_t numbers[4][8][8];
  for (int lane = 0; lane < 32; ++lane) memcpy(numbers[lane / 8][lane % 8], static_cast<const Tiles*>(lanes[lane])->row, 16);
  for (int lane = 0; lane < 32; ++lane) {
    const Tiles& mine = *static_cast<const Tiles*>(lanes[lane]);
    for (int tile = 0; tile < 4; ++tile) {
      uint32_t both = 0;
      for (int i = 0; i < 2; ++i) {
        const int near = lane / 4, far = lane % 4 * 2 + i;
        both |= static_cast<uint32_t>(mine.transposed ? numbers[tile][far][near] : numbers[tile][near][far]) << (16 * i);
      }
      mine.tiles[tile] = both;
    }
  }
}

void multiply(void* const* lanes, unsigned) {
  float a[16][16], b[8][16];
  for (int lane = 0; lane < 32; ++lane) {
    const Fragments& mine = *static_cast<const Fragments*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 2; ++i) {
      for (int part = 0; part < 4; ++part)
        a[g + part % 2 * 8][2 * t + part / 2 * 8 + i] = mine.number(static_cast<uint16_t>(mine.a[part] >> (16 * i)));
      for (int part = 0; part < 2; ++part) b[g][2 * t + part * 8 + i] = mine.number(static_cast<uint16_t>(mine.b[part] >> (16 * i)));
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const Fragments& mine = *static_cast<const Fragments*>(lanes[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float sum = 0.0f;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[column][k];
      mine.sum[i] += sum;
    }
  }
}

}  // namespace tokenops::emulated

namespace tokenops {
namespace {

// 0: threads and blocks in order; 1: backwards; another: shuffled
void set_order(int64_t seed) { emulator::order_seed = seed; }
// leaves out the barrier or wait at "file:line"; none if empty
void skip(std::string site) {
  emulator::skipped_site = site;
  emulator::sites.clear();
}
// the barriers and waits that were met since then, comma-separated
std::string sites() {
  std::string all;
  for (const auto& [site, skipped] : emulator::sites) all += (all.empty() ? "" : ",") + emulator::describe({site.first, site.second});
  return all;
}

}  // namespace

STABLE_TORCH_LIBRARY(tokenops_emulator, m) {
  m.def("set_order(int seed) -> ()");
  m.def("skip(str site) -> ()");
  m.def("sites() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(tokenops_emulator, CompositeExplicitAutograd, m) {
  m.impl("set_order", TORCH_BOX(&set_order));
  m.impl("skip", TORCH_BOX(&skip));
  m.impl("sites", TORCH_BOX(&sites));
}

}  // namespace tokenops
