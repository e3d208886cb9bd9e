// Lists of row ids as token rooms take them, read in place and checked while they are.
#pragma once

#include <utility>
#include <vector>

#include "../tensors.h"

namespace tokenops {

// lists [1|B, K] of row ids, as one list serves all
struct IdLists {
  const int32_t* data;
  int64_t list, slot, slots;

  IdLists(const Tensor& index, int64_t lists) {
    check_rank("index", index, 2);
    check_dtype("index", index, ScalarType::Int);
    check_broadcast("index", index, 0, lists);
    data = index.const_data_ptr<int32_t>();
    list = broadcast_stride(index, 0);
    slot = index.stride(1);
    slots = index.size(1);
  }
  int64_t at(int64_t b, int64_t j) const { return data[b * list + j * slot]; }
};

// whether an id comes twice in one grid of rows
class Seen {
 public:
  Seen(int64_t rows, bool shared) : turn_(rows, -1), shared_(shared) {}
  bool again(int64_t id, int64_t list) {
    const int32_t turn = shared_ ? 0 : static_cast<int32_t>(list);
    return std::exchange(turn_[id], turn) == turn;
  }

 private:
  std::vector<int32_t> turn_;
  bool shared_;
};

}  // namespace tokenops
