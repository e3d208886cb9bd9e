// One product of tiles by the instructions that every kernel with a matrix product uses. It proves on a machine that their operands lie
// where our kernels think; nothing else needs it.
#include <tuple>

#include "launch.h"

namespace tokenops {
namespace {

template <class T>
struct TileShared {
  alignas(16) T a[16][16];
  alignas(16) T b[8][16];
};

// product [16, 8] = a [16, 16] b^T for b [8, 16], all dense: one warp
template <class T>
__global__ void tile_product(const T* a, const T* b, float* product) {
  auto& shared = shared_memory<TileShared<T>>();
  const int lane = lane_id();
  // a row is two pieces of 16 bytes
  cp_async_16(&shared.a[lane / 2][lane % 2 * 8], a + lane * 8);
  if (lane < 16) cp_async_16(&shared.b[lane / 2][lane % 2 * 8], b + lane * 8);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  uint32_t tiles_a[4], tiles_b[4];
  ldmatrix(tiles_a, &shared.a[lane % 16][lane / 16 * 8]);
  // of b there are two tiles: the upper lanes' rows are read and not used
  ldmatrix(tiles_b, &shared.b[lane % 8][lane / 8 % 2 * 8]);
  float sum[4] = {};
  mma<T>(sum, tiles_a, tiles_b[0], tiles_b[1]);
  for (int i = 0; i < 4; ++i) product[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i];
}

template <class T>
void run_tile_product(const Tensor& product, const Tensor& a, const Tensor& b) {
  launch(product, tile_product<T>, 1, kWarp, sizeof(TileShared<T>), static_cast<const T*>(a.const_data_ptr()),
         static_cast<const T*>(b.const_data_ptr()), product.mutable_data_ptr<float>());
}

void tile_product_of(Tensor product, Tensor a, Tensor b) {
  for (const auto& [name, t, rows, columns] :
       {std::tuple("product", &product, 16, 8), std::tuple("a", &a, 16, 16), std::tuple("b", &b, 8, 16)}) {
    check_rank(name, *t, 2);
    check_size(name, *t, 0, rows);
    check_size(name, *t, 1, columns);
    check_contiguous(name, *t);
  }
  check_dtype("product", product, ScalarType::Float);
  check_dtype("b", b, a.scalar_type());
  with_half("a", a, [&](auto number) { run_tile_product<decltype(number)>(product, a, b); });
}

}  // namespace

TOKENOPS_CUDA_OPERATORS(m) { m.impl("cuda_tile_product", TOKENOPS_CUDA_OPERATOR(tile_product_of)); }

}  // namespace tokenops
