// Products of every row of one grid with every row of another, a tile at a time, for whoever looks at each tile once: none is stored.
//
// A block has 128 rows of a and walks over tiles of 64 rows of b; a warp has 16 or 32 of its rows. Tiles come in chunks of 128 bytes of
// each row, some under way while another is multiplied, so that one barrier a chunk is enough. Half types are multiplied by tensor cores,
// float by ordinary ones, 4 x 8 or 8 x 8 numbers a thread: TF32 would not be what the other backends compute.
//
// A *slot* is a place in the list of rows that take part; without a list slot s is row s.
#pragma once

#include "device.cuh"

namespace tokenops {
namespace {

constexpr int kRowsA = 128, kRowsB = 64;
constexpr int kPieces = 8;  // of 16 bytes, in a chunk of a row

template <class T>
constexpr int kChunk = kPieces * Wide<T>::kCount;  // numbers

template <class T, int kRows>
using Chunk = T[kRows][kChunk<T>];

// kTiles: of 16 rows, that a warp has. Two read b half as often; one leaves registers for other sums beside the products.
template <class T, int Stages, int Tiles>
struct TileShared {
  static constexpr int kStages = Stages, kTiles = Tiles, kWarpRows = 16 * kTiles;
  static constexpr int kWarps = kRowsA / kWarpRows, kThreads = kWarps * kWarp;
  alignas(128) Chunk<T, kRowsA> a[kStages];
  alignas(128) Chunk<T, kRowsB> b[kStages];
};

// Rows of one sample, read in place.
template <class T>
struct Grid {
  const T* base;
  int64_t row;          // stride
  const int32_t* list;  // row ids by slot, or null
  int end;              // of the slots
  int rows;             // that there are: an id beyond is nobody
  int width;
  bool wide;            // 16 bytes at once: see is_wide
  const float* shrink;  // by slot, a power of two that rows are multiplied with, or null

  __device__ int id(int slot) const {
    if (slot >= end) return -1;
    if (!list) return slot;
    const int id = list[slot];
    return id >= 0 && id < rows ? id : -1;
  }
};

// Where a piece of a row stands: rows of a multiple of 128 bytes would share their banks without it.
__device__ __forceinline__ int swizzled(int row, int piece) { return piece ^ (row % kPieces); }

template <int kThreads, class T, int kRows>
__device__ __forceinline__ void load_chunk(Chunk<T, kRows>& to, const Grid<T>& from, int first, int chunk) {
  constexpr int kCount = Wide<T>::kCount;
#pragma unroll
  for (int i = threadIdx.x; i < kRows * kPieces; i += kThreads) {
    const int row = i / kPieces, piece = i % kPieces, column = chunk * kChunk<T> + piece * kCount;
    const int id = from.id(first + row);
    const bool there = id >= 0 && column < from.width;
    const T* source = from.base + (there ? id * from.row + column : 0);
    T* target = &to[row][swizzled(row, piece) * kCount];
    if (from.wide) {
      cp_async_16(target, source, there);
      continue;
    }
    Wide<T> numbers{};
    if (there)
      for (int k = 0; k < kCount; ++k)
        if (column + k < from.width) numbers.at[k] = source[k];
    store_wide(target, numbers);
  }
}

// a product with a power of two: exact in the number's own type
template <int kThreads, class T, int kRows>
__device__ void shrink_chunk(Chunk<T, kRows>& rows, const float* shrink) {
  constexpr int kCount = Wide<T>::kCount;
  for (int i = threadIdx.x; i < kRows * kPieces; i += kThreads) {
    T* at = &rows[i / kPieces][i % kPieces * kCount];
    const float by = shrink[i / kPieces];
    if (by == 1.0f) continue;
    Wide<T> numbers = load_wide(at);
    for (int k = 0; k < kCount; ++k) numbers.at[k] = from_float<T>(to_float(numbers.at[k]) * by);
    store_wide(at, numbers);
  }
}

// A thread's share of the products of a warp's rows of a with 64 of b: kOwnRows rows and kOwnColumns columns, both ascending. kSharers
// neighbouring lanes have the same rows.
template <class T, int kTiles>
struct Products {
  static constexpr int kOwnRows = 2 * kTiles, kOwnColumns = 16, kSharers = 4;
  float sum[kTiles][8][4];

  __device__ static int row(int i) { return i / 2 * 16 + i % 2 * 8 + lane_id() / 4; }
  __device__ static int column(int j) { return j / 2 * 8 + lane_id() % 4 * 2 + j % 2; }
  __device__ float& at(int i, int j) { return sum[i / 2][j / 2][i % 2 * 2 + j % 2]; }

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i)
#pragma unroll
      for (int j = 0; j < kOwnColumns; ++j) at(i, j) = 0.0f;
  }

  // += a chunk's part; `first` is the warp's first row of a
  __device__ void add(const Chunk<T, kRowsA>& a, int first, const Chunk<T, kRowsB>& b) {
    const int lane = lane_id();
#pragma unroll
    for (int k = 0; k < kPieces; k += 2) {
      uint32_t of_a[kTiles][4], of_b[4];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        const int row = first + m * 16 + lane % 16;
        ldmatrix(of_a[m], &a[row][swizzled(row, k + lane / 16) * 8]);
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int row = n * 16 + lane / 16 * 8 + lane % 8;
        ldmatrix(of_b, &b[row][swizzled(row, k + lane / 8 % 2) * 8]);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          mma<T>(sum[m][n * 2], of_a[m], of_b[0], of_b[1]);
          mma<T>(sum[m][n * 2 + 1], of_a[m], of_b[2], of_b[3]);
        }
      }
    }
  }
};

template <int kTiles>
struct Products<float, kTiles> {
  static constexpr int kOwnRows = 4 * kTiles, kOwnColumns = 8, kSharers = 8;
  float sum[kOwnRows][kOwnColumns];

  __device__ static int row(int i) { return i * 4 + lane_id() / 8; }
  __device__ static int column(int j) { return j * 8 + lane_id() % 8; }
  __device__ float& at(int i, int j) { return sum[i][j]; }

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i)
#pragma unroll
      for (int j = 0; j < kOwnColumns; ++j) sum[i][j] = 0.0f;
  }

  __device__ void add(const Chunk<float, kRowsA>& a, int first, const Chunk<float, kRowsB>& b) {
    // unrolled, the compiler would load several pieces ahead and spill
#pragma unroll 1
    for (int k = 0; k < kPieces; ++k) {
      Wide<float> of_a[kOwnRows];
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i) of_a[i] = load_wide(&a[first + row(i)][swizzled(row(i), k) * 4]);
#pragma unroll
      for (int j = 0; j < kOwnColumns; ++j) {
        const Wide<float> of_b = load_wide(&b[column(j)][swizzled(column(j), k) * 4]);
#pragma unroll
        for (int e = 0; e < 4; ++e)
#pragma unroll
          for (int i = 0; i < kOwnRows; ++i) sum[i][j] += of_a[i].at[e] * of_b.at[e];
      }
    }
  }
};

// Calls use(tile, stage, products) for the tiles of b from `first` to `last` that `meets` lets pass, in ascending order. With a tile's last
// chunk load(tile, stage) may bring to shared memory what use wants to know of it. `works`: whether this warp's rows are wanted at all.
// `shrinks`: whether rows are to be multiplied with their shrink, the same for the whole block.
template <class T, int kStages, int kTiles, class Meets, class Load, class Use>
__device__ __forceinline__ void for_tiles(TileShared<T, kStages, kTiles>& shared, const Grid<T>& a, int a_first, const Grid<T>& b,
                                          int first, int last, bool works, bool shrinks, const Meets& meets, const Load& load,
                                          const Use& use) {
  using Shared = TileShared<T, kStages, kTiles>;
  constexpr int kThreads = Shared::kThreads;
  const int chunks = (a.width + kChunk<T> - 1) / kChunk<T>;
  // rows of a that fit stay, else they come with each tile again
  const bool stays = chunks <= kStages;
  const auto next = [&](int tile) {
    while (tile < last && !meets(tile)) ++tile;
    return tile;
  };
  const int start = next(first);
  struct Cursor {
    int tile, chunk, stage;
  };
  const auto advance = [&](Cursor& at) {
    at.stage = at.stage + 1 == kStages ? 0 : at.stage + 1;
    if (++at.chunk < chunks) return;
    at.chunk = 0, at.tile = next(at.tile + 1);
  };
  const auto place_of_a = [&](const Cursor& at) { return stays ? at.chunk : at.stage; };
  Cursor ahead{start, 0, 0}, here{start, 0, 0};
  const auto fetch = [&] {
    if (ahead.tile < last) {
      if (!stays || ahead.tile == start) load_chunk<kThreads>(shared.a[place_of_a(ahead)], a, a_first, ahead.chunk);
      load_chunk<kThreads>(shared.b[ahead.stage], b, ahead.tile * kRowsB, ahead.chunk);
      if (ahead.chunk == chunks - 1) load(ahead.tile, ahead.stage);
      advance(ahead);
    }
    // an empty group counts too: the wait below goes by numbers
    cp_async_commit();
  };
  for (int i = 0; i < kStages - 1; ++i) fetch();
  Products<T, kTiles> products;
  products.clear();
  while (here.tile < last) {
    cp_async_wait<kStages - 2>();
    // what this chunk's threads copied can be read, and what was read before is free
    __syncthreads();
    fetch();
    if (shrinks) {
      if (!stays || here.tile == start) shrink_chunk<kThreads>(shared.a[place_of_a(here)], a.shrink + a_first);
      shrink_chunk<kThreads>(shared.b[here.stage], b.shrink + here.tile * kRowsB);
      __syncthreads();
    }
    const Cursor now = here;
    advance(here);
    if (!works) continue;
    products.add(shared.a[place_of_a(now)], warp_id() * Shared::kWarpRows, shared.b[now.stage]);
    if (now.chunk < chunks - 1) continue;
    use(now.tile, now.stage, products);
    products.clear();
  }
}

}  // namespace
}  // namespace tokenops
