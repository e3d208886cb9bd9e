// Index lists as the attention kernels want them: without empty slots, with the slots that stay empty and the rows nobody names.
#pragma once

#include <algorithm>
#include <vector>

#include "../sparse_attention_tensors.h"
#include "sparse_attention.h"

namespace tokenops {

class RowListTable {
 public:
  // index [1|B, 1|H, K] int32 or none (all rows of the grid); offsets [S + 1] int32 cut its slots into packed sequences.
  // Out-of-range or repeated ids and bad offsets make the table invalid. `unique_rows`: packed sequences may not share rows.
  RowListTable(const char* name, const OptionalTensor& index, const OptionalTensor& offsets, int64_t rows, int64_t batch, int64_t heads,
               bool unique_rows) {
    if (index) check_index(name, *index, batch, heads);
    if (offsets) check_rank("cu_seqlens", *offsets, 1);
    const int64_t slots = index ? index->size(2) : rows;
    sequences_ = offsets ? std::max<int64_t>(offsets->size(0) - 1, 1) : index ? index->size(0) : 1;
    heads_ = index ? index->size(1) : 1;
    if (offsets && !read_offsets(*offsets, slots)) return;
    lists_.resize(sequences_ * heads_);
    seen_.assign(rows, -1);
    for (int64_t h = 0; h < heads_; ++h) {
      named_.assign(rows, 0);
      for (int64_t s = 0; s < sequences_; ++s) {
        const int32_t* ids = index ? index->const_data_ptr<int32_t>() + h * index->stride(1) : nullptr;
        if (index && !offsets) ids += s * index->stride(0);
        if (!add_list(s, h, ids, index ? index->stride(2) : 0, slots, rows, offsets.has_value(), unique_rows)) return;
        // rows that no list names: of this list, or for a packed grid of all its sequences together
        if (!offsets || s == sequences_ - 1) add_rest(s, h, rows);
        if (!offsets) named_.assign(rows, 0);
      }
    }
    // the arrays have stopped growing: offsets become pointers
    for (int64_t i = 0; i < static_cast<int64_t>(lists_.size()); ++i) {
      const Place& at = places_[i];
      RowList& list = lists_[i];
      list.row = row_.data() + at.kept;
      list.slot = slot_.data() + at.kept;
      list.rank = (offsets ? rank_ : row_).data() + at.kept;
      list.empty = empty_.data() + at.empty;
      list.rest = rest_.data() + at.rest;
      longest_ = std::max(longest_, list.count);
    }
    valid_ = true;
  }

  bool valid() const { return valid_; }
  int64_t sequences() const { return sequences_; }
  int64_t longest() const { return longest_; }
  // slots of the longest packed sequence, empty ones included
  int64_t longest_span() const {
    int64_t most = 0;
    for (size_t i = 1; i < offsets_.size(); ++i) most = std::max<int64_t>(most, offsets_[i] - offsets_[i - 1]);
    return most;
  }
  RowLists lists() const { return {lists_.data(), sequences_ == 1 ? 0 : heads_, heads_ == 1 ? 0 : 1}; }

 private:
  struct Place {
    int64_t kept, empty, rest;
  };

  bool read_offsets(const Tensor& offsets, int64_t slots) {
    check_dtype("cu_seqlens", offsets, ScalarType::Int);
    const int32_t* from = offsets.const_data_ptr<int32_t>();
    for (int64_t i = 0; i < offsets.size(0); ++i) offsets_.push_back(from[i * offsets.stride(0)]);
    if (offsets_.empty() || offsets_.front() != 0 || offsets_.back() > slots) return false;
    for (size_t i = 1; i < offsets_.size(); ++i)
      if (offsets_[i] < offsets_[i - 1]) return false;
    offsets_.resize(sequences_ + 1, 0);  // no sequence at all: one without slots owns the padding
    return true;
  }

  bool add_list(int64_t s, int64_t h, const int32_t* ids, int64_t stride, int64_t slots, int64_t rows, bool packed, bool unique_rows) {
    const int32_t turn = static_cast<int32_t>(s * heads_ + h);
    const int64_t first = packed ? offsets_[s] : 0, last = packed ? offsets_[s + 1] : slots;
    if (places_.empty()) places_.resize(lists_.size());
    places_[turn] = {static_cast<int64_t>(row_.size()), static_cast<int64_t>(empty_.size()), static_cast<int64_t>(rest_.size())};
    for (int64_t slot = first; slot < last; ++slot) {
      const int64_t id = ids ? ids[slot * stride] : slot;
      if (id == -1) {
        empty_.push_back(static_cast<int32_t>(slot));
        continue;
      }
      if (id < 0 || id >= rows || seen_[id] == turn || (unique_rows && packed && named_[id])) return false;
      seen_[id] = turn;
      named_[id] = 1;
      row_.push_back(static_cast<int32_t>(id));
      slot_.push_back(static_cast<int32_t>(slot));
      if (packed) rank_.push_back(static_cast<int32_t>(slot - first));
    }
    // slots beyond the last sequence are padding
    if (packed && s == sequences_ - 1)
      for (int64_t slot = last; slot < slots; ++slot) empty_.push_back(static_cast<int32_t>(slot));
    lists_[turn].count = static_cast<int64_t>(row_.size()) - places_[turn].kept;
    lists_[turn].empties = static_cast<int64_t>(empty_.size()) - places_[turn].empty;
    lists_[turn].rests = 0;
    lists_[turn].range = lists_[turn].count == 0 || row_.back() - row_[places_[turn].kept] == lists_[turn].count - 1;
    if (ids) lists_[turn].range &= std::is_sorted(row_.begin() + places_[turn].kept, row_.end());
    return true;
  }

  void add_rest(int64_t s, int64_t h, int64_t rows) {
    const int64_t turn = s * heads_ + h;
    places_[turn].rest = static_cast<int64_t>(rest_.size());
    for (int64_t r = 0; r < rows; ++r)
      if (!named_[r]) rest_.push_back(static_cast<int32_t>(r));
    lists_[turn].rests = static_cast<int64_t>(rest_.size()) - places_[turn].rest;
  }

  int64_t sequences_, heads_, longest_ = 0;
  bool valid_ = false;
  std::vector<int32_t> offsets_, row_, slot_, rank_, empty_, rest_, seen_;
  std::vector<uint8_t> named_;
  std::vector<Place> places_;
  std::vector<RowList> lists_;
};

}  // namespace tokenops
