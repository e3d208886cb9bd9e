// Tiles of rows in shared memory.
#pragma once

#include "device.cuh"

namespace tokenops {
namespace {

// Rows of W numbers in shared memory, in pieces of 16 bytes that lie so that a read of one piece of eight neighbouring rows (ldmatrix's,
// or eight lanes') meets every bank once: 16-bit numbers are swizzled; float rows have a piece to spare.
template <class T, int W>
struct TileRows {
  static constexpr int kPiece = 16 / sizeof(T), kPieces = W / kPiece;
  static constexpr int kPitch = sizeof(T) == 4 ? W + kPiece : W;
  static_assert(W % 32 == 0);

  // `more` is a multiple of eight, constant where possible: those rows are swizzled alike, so that it ends in an instruction's offset
  static __device__ __forceinline__ int at(int row, int piece, int more) { return at(row, piece) + more * kPitch; }
  static __device__ __forceinline__ int at(int row, int piece) {
    if constexpr (sizeof(T) == 4) return row * kPitch + piece * kPiece;
    // rows of 128 bytes begin in the same bank, rows of 64 bytes every second one; pieces stay within their eight or four
    constexpr int kMask = W % 64 == 0 ? 7 : 3;
    const int turn = W % 64 == 0 ? row : row / 2;
    return row * kPitch + ((piece & ~kMask) + ((piece ^ turn) & kMask)) * kPiece;
  }
};

}  // namespace
}  // namespace tokenops
