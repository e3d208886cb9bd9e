// CUDA for kernels that run on a CPU: one fiber for each thread of a block, blocks one after the other. What csrc/cuda/ptx.cuh declares,
// this declares too, and of CUDA's own names as many as our kernels use.
//
// A thread runs until it meets a barrier, so that it is as far ahead of the others as the barriers allow, and a missing one shows. Order of
// threads and blocks is a seed's. Shared memory begins as NaN. A copy under way leaves NaN at its place until its thread waits for it.
// Atomics are sequential; of the memory model and of time nothing is emulated.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <functional>
#include <string>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};

namespace emulator {

// where a barrier stands in a kernel's source
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

struct Place {
  dim3 thread, block, block_size, grid_size;
};
// of the thread that runs
const Place& place();

void run(unsigned blocks, unsigned threads, size_t shared, const std::function<void()>& kernel);
// ends the launch: the operator throws with this text
[[noreturn]] void fail(const std::string& what);

void* shared_memory();
size_t shared_bytes();
void check_alignment(const void* address, size_t bytes, const char* what);

void block_barrier(Site site);
// whether the predicate of any thread is true
bool block_vote(bool predicate, Site site);

// A step that the lanes of a mask take together. The last to arrive does it for all: `step` is given what each lane brought.
void together(unsigned mask, const void* kind, void* mine, void (*step)(void* const* lanes, unsigned mask), Site site);

void start_copy(void* shared, const void* global, int bytes);
void commit_copies();
void wait_copies(int pending, Site site);

// The value that each lane is given of all lanes' values.
template <class T, class Choose>
T exchange(unsigned mask, T value, Choose choose, Site site) {
  static_assert(std::is_trivially_copyable_v<T>);
  struct Slot {
    T value, result;
    const Choose* choose;
    static void step(void* const* lanes, unsigned mask) {
      for (int lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1) {
          Slot& mine = *static_cast<Slot*>(lanes[lane]);
          mine.result = (*mine.choose)([&](int other) -> const T& { return static_cast<Slot*>(lanes[other])->value; }, lane);
        }
    }
  } slot{value, value, &choose};
  static const char kind = 0;
  together(mask, &kind, &slot, &Slot::step, site);
  return slot.result;
}

// Another lane's value, by its number; a lane outside of the mask or of the group of `width` lanes leaves one's own.
template <class T, class Source>
T shuffle(unsigned mask, T value, Source source, Site site) {
  return exchange(
      mask, value,
      [&](auto&& of, int lane) {
        const int other = source(lane);
        if (other < 0 || other > 31 || !(mask >> other & 1)) return of(lane);
        return of(other);
      },
      site);
}

template <class Fold>
unsigned fold(unsigned mask, unsigned value, Fold combine, Site site) {
  return exchange(
      mask, value,
      [&](auto&& of, int) {
        bool first = true;
        unsigned result = 0;
        for (int lane = 0; lane < 32; ++lane)
          if (mask >> lane & 1) {
            result = first ? of(lane) : combine(result, of(lane));
            first = false;
          }
        return result;
      },
      site);
}

}  // namespace emulator

#define threadIdx (::emulator::place().thread)
#define blockIdx (::emulator::place().block)
#define blockDim (::emulator::place().block_size)
#define gridDim (::emulator::place().grid_size)

inline void __syncthreads(emulator::Site site = emulator::Site::here()) { emulator::block_barrier(site); }
inline int __syncthreads_or(int p, emulator::Site site = emulator::Site::here()) { return emulator::block_vote(p != 0, site); }
void __syncwarp(unsigned mask = 0xffffffffu, emulator::Site site = emulator::Site::here());

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, emulator::Site site = emulator::Site::here()) {
  return emulator::shuffle(mask, value, [=](int lane) { return lane / width * width + source % width; }, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, emulator::Site site = emulator::Site::here()) {
  return emulator::shuffle(mask, value, [=](int lane) { return (lane ^ bits) / width > lane / width ? lane : lane ^ bits; }, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int step, int width = 32, emulator::Site site = emulator::Site::here()) {
  return emulator::shuffle(mask, value, [=](int lane) { return lane % width < step ? lane : lane - step; }, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, emulator::Site site = emulator::Site::here()) {
  const unsigned bit = predicate ? 1u << (threadIdx.x % 32) : 0u;
  return emulator::fold(mask, bit, [](unsigned a, unsigned b) { return a | b; }, site);
}
inline int __any_sync(unsigned mask, int predicate, emulator::Site site = emulator::Site::here()) {
  return __ballot_sync(mask, predicate, site) != 0;
}
inline unsigned __match_any_sync(unsigned mask, unsigned value, emulator::Site site = emulator::Site::here()) {
  return emulator::exchange(
      mask, value,
      [&](auto&& of, int lane) {
        unsigned same = 0;
        for (int other = 0; other < 32; ++other)
          if (mask >> other & 1 && of(other) == of(lane)) same |= 1u << other;
        return same;
      },
      site);
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value, emulator::Site site = emulator::Site::here()) {
  return emulator::fold(mask, value, [](unsigned a, unsigned b) { return a + b; }, site);
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value, emulator::Site site = emulator::Site::here()) {
  return emulator::fold(mask, value, [](unsigned a, unsigned b) { return a > b ? a : b; }, site);
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value, emulator::Site site = emulator::Site::here()) {
  return emulator::fold(mask, value, [](unsigned a, unsigned b) { return a < b ? a : b; }, site);
}

template <class T>
T atomicAdd(T* place, T value) {
  return std::exchange(*place, *place + value);
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float __uint_as_float(unsigned x) {
  float y;
  memcpy(&y, &x, 4);
  return y;
}
inline unsigned __float_as_uint(float x) {
  unsigned y;
  memcpy(&y, &x, 4);
  return y;
}
inline float __int_as_float(int x) { return __uint_as_float(static_cast<unsigned>(x)); }
inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
// no compiler makes a multiply-add of it
inline float __fmul_rn(float a, float b) {
  const volatile float product = a * b;
  return product;
}
inline float __fdividef(float a, float b) { return a / b; }
using std::max;
using std::min;

namespace tokenops {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(f16 x) {
  _Float16 y;
  memcpy(&y, &x, 2);
  return static_cast<float>(y);
}

namespace emulated {
inline uint16_t round_to(bf16, float x) {
  const uint32_t bits = __float_as_uint(x);
  // the carry of rounding would turn some NaNs into infinities
  if (x != x) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint16_t round_to(f16, float x) {
  const _Float16 y = static_cast<_Float16>(x);
  uint16_t bits;
  memcpy(&bits, &y, 2);
  return bits;
}
}  // namespace emulated

template <class T>
uint32_t pack(float low, float high) {
  return emulated::round_to(T{}, low) | static_cast<uint32_t>(emulated::round_to(T{}, high)) << 16;
}

// the instructions take subnormal numbers for 0
inline float exp2_fast(float x) {
  const float y = exp2f(x);
  return y < 1.17549435e-38f ? 0.0f : y;
}
inline float log2_fast(float x) { return log2f(x < 1.17549435e-38f && x > 0.0f ? 0.0f : x); }

inline void* shared_begin(size_t bytes) {
  if (bytes > emulator::shared_bytes())
    emulator::fail("a kernel has " + std::to_string(bytes) + " bytes of shared memory, and its launch gives it " +
                   std::to_string(emulator::shared_bytes()));
  return emulator::shared_memory();
}

inline void cp_async_16(void* shared, const void* global, bool valid = true) { emulator::start_copy(shared, valid ? global : nullptr, 16); }
inline void cp_async_4(void* shared, const void* global, bool valid = true) { emulator::start_copy(shared, valid ? global : nullptr, 4); }
inline void cp_async_commit() { emulator::commit_copies(); }
template <int Pending>
void cp_async_wait(emulator::Site site = emulator::Site::here()) {
  emulator::wait_copies(Pending, site);
}

namespace emulated {

struct Tiles {
  uint32_t* tiles;
  const void* row;
  bool transposed;
};
void load_tiles(void* const* lanes, unsigned mask);

struct Fragments {
  float* sum;
  const uint32_t* a;
  uint32_t b[2];
  float (*number)(uint16_t);
};
void multiply(void* const* lanes, unsigned mask);

inline void ldmatrix(uint32_t* tiles, const void* row, bool transposed, emulator::Site site) {
  emulator::check_alignment(row, 16, "ldmatrix");
  Tiles mine{tiles, row, transposed};
  emulator::together(0xffffffffu, reinterpret_cast<const void*>(&load_tiles), &mine, &load_tiles, site);
}

}  // namespace emulated

inline void ldmatrix(uint32_t (&tiles)[4], const void* row, emulator::Site site = emulator::Site::here()) {
  emulated::ldmatrix(tiles, row, false, site);
}
inline void ldmatrix_transposed(uint32_t (&tiles)[4], const void* row, emulator::Site site = emulator::Site::here()) {
  emulated::ldmatrix(tiles, row, true, site);
}

template <class T>
void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, emulator::Site site = emulator::Site::here()) {
  emulated::Fragments mine{sum, a, {b0, b1}, [](uint16_t bits) { return to_float(T{bits}); }};
  emulator::together(0xffffffffu, reinterpret_cast<const void*>(&emulated::multiply), &mine, &emulated::multiply, site);
}

}  // namespace tokenops
