// The k best of a list: bisection on the scores' bits, which compares whole vectors and does not mind how scores are distributed.
#pragma once

#include "token_select.h"
#include "vec.h"

namespace tokenops {
namespace TOKENOPS_ISA {
namespace {

constexpr int kKeys = kLanes;
// no number: below -inf
constexpr int32_t kLowestKey = INT32_MIN;

// integers in the order of the numbers; both zeros are the same
TOKENOPS_INLINE VecI<kKeys> keys_of(VecF<kKeys> x) {
  VecI<kKeys> bits = (VecI<kKeys>)(x + 0.f);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

struct KeyRange {
  int32_t lowest, highest;
  bool nan;
};

// fills up the last vector with keys that are never counted
template <class T>
KeyRange make_keys(const T* scores, int64_t n, int32_t* keys) {
  VecI<kKeys> low = VecI<kKeys>{} + INT32_MAX, high = VecI<kKeys>{} + kLowestKey, nan{};
  for (int64_t i = 0; i < n; i += kKeys) {
    const bool whole = i + kKeys <= n;
    VecF<kKeys> x = whole ? load<kKeys>(scores + i) : load_first<kKeys>(scores + i, n - i);
    VecI<kKeys> key = keys_of(x);
    nan |= x != x;
    if (!whole) {
      // zeros of the last vector's rest count neither as lowest nor as highest
      VecI<kKeys> lane;
      for (int j = 0; j < kKeys; ++j) lane[j] = j;
      const VecI<kKeys> real = lane < (int32_t)(n - i);
      low = real & (key < low) ? key : low;
      key = real ? key : VecI<kKeys>{} + kLowestKey;
    } else {
      low = key < low ? key : low;
    }
    high = key > high ? key : high;
    store_bits(keys + i, key);
  }
  KeyRange range{INT32_MAX, kLowestKey, false};
  for (int j = 0; j < kKeys; ++j) {
    range.lowest = low[j] < range.lowest ? low[j] : range.lowest;
    range.highest = high[j] > range.highest ? high[j] : range.highest;
    range.nan |= nan[j] != 0;
  }
  return range;
}

// bound is greater than kLowestKey
int64_t count_at_least(const int32_t* keys, int64_t n, int32_t bound) {
  VecI<kKeys> some{}, more{};
  int64_t i = 0;
  for (; i + kKeys < n; i += 2 * kKeys) {
    some -= load_bits<VecI<kKeys>>(keys + i) >= bound;
    more -= load_bits<VecI<kKeys>>(keys + i + kKeys) >= bound;
  }
  if (i < n) some -= load_bits<VecI<kKeys>>(keys + i) >= bound;
  some += more;
  int64_t count = 0;
  for (int j = 0; j < kKeys; ++j) count += some[j];
  return count;
}

// what() of the places in [first, last) whose key is in [low, high], one after the other; `to` has room for all of them and a vector more
template <class What>
TOKENOPS_INLINE int64_t compress(const int32_t* keys, int64_t first, int64_t last, int32_t low, int32_t high, int32_t* to, What what) {
  int64_t n = 0, i = first;
#if defined(__AVX512F__)
  for (; i + kKeys <= last; i += kKeys) {
    const __m512i key = _mm512_loadu_si512(keys + i);
    const __mmask16 kept = _mm512_cmp_epi32_mask(key, _mm512_set1_epi32(low), _MM_CMPINT_NLT) &
                           _mm512_cmp_epi32_mask(key, _mm512_set1_epi32(high), _MM_CMPINT_LE);
    _mm512_storeu_si512(to + n, _mm512_maskz_compress_epi32(kept, what(key, i)));
    n += __builtin_popcount(kept);
  }
#endif
  for (; i < last; ++i) {
    // written in any case: a branch would be guessed wrong half of the time
    to[n] = what(keys[i], i);
    n += (keys[i] >= low) & (keys[i] <= high);
  }
  return n;
}

struct Key {
  TOKENOPS_INLINE int32_t operator()(int32_t key, int64_t) const { return key; }
#if defined(__AVX512F__)
  TOKENOPS_INLINE __m512i operator()(__m512i key, int64_t) const { return key; }
#endif
};
struct Place {
  int32_t offset;
  TOKENOPS_INLINE int32_t operator()(int32_t, int64_t i) const { return (int32_t)i + offset; }
#if defined(__AVX512F__)
  TOKENOPS_INLINE __m512i operator()(__m512i, int64_t i) const {
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_add_epi32(lanes, _mm512_set1_epi32((int32_t)i + offset));
  }
#endif
};

// all greater keys, and of the equal ones the first `ties`
struct Cut {
  int32_t key;
  int64_t ties;
};

// where the k best of n > k > 0 keys end. `rest` has room for n keys and a vector more.
Cut find_cut(const int32_t* keys, int64_t n, int64_t k, KeyRange range, int32_t* rest) {
  // at_low keys are >= low, more than k; at_high keys are >= high, fewer than k
  int64_t low = range.lowest, high = (int64_t)range.highest + 1, at_low = n, at_high = 0;
  int64_t dropped = 0;  // of the at_high keys, those that are not among the n any more
  while (high - low > 1) {
    // few keys are left in between: go on with those only
    if (n > 32 * kKeys && at_low - at_high < n / 4) {
      n = compress(keys, 0, n, (int32_t)low, (int32_t)(high - 1), rest, Key{});
      for (int j = 0; j < kKeys; ++j) rest[n + j] = kLowestKey;
      keys = rest;
      dropped = at_high;
    }
    const int64_t middle = low + (high - low) / 2, count = dropped + count_at_least(keys, n, (int32_t)middle);
    if (count == k) return {(int32_t)middle - 1, 0};
    if (count > k) {
      low = middle;
      at_low = count;
    } else {
      high = middle;
      at_high = count;
    }
  }
  return {(int32_t)low, k - at_high};
}

// one behind the last of the first `ties` keys that are equal to it
int64_t end_of_ties(const int32_t* keys, int64_t n, Cut cut) {
  if (cut.ties == 0) return 0;
  int64_t i = 0, seen = 0;
  for (; i + kKeys <= n; i += kKeys) {
    const VecI<kKeys> equal = load_bits<VecI<kKeys>>(keys + i) == cut.key;
    int64_t here = 0;
    for (int j = 0; j < kKeys; ++j) here -= equal[j];
    if (seen + here >= cut.ties) break;
    seen += here;
  }
  for (; i < n; ++i) {
    seen += keys[i] == cut.key;
    if (seen == cut.ties) return i + 1;
  }
  return n;
}

int64_t select_scratch(int64_t tokens) { return 2 * (tokens + 2 * kKeys) * (int64_t)sizeof(int32_t); }

template <class T>
int64_t select_best(const Scores& p, int32_t* index, char* scratch) {
  // the protected are kept; the rest of the list is chosen from what is left
  const int64_t n = p.tokens - p.protect, room = p.k - p.protect;
  int32_t *keys = (int32_t*)scratch, *places = keys + p.tokens + 2 * kKeys;
  const KeyRange range = make_keys((const T*)p.data + p.protect, n, keys);
  if (range.nan) return -1;

  Cut cut{kLowestKey, 0};
  int64_t count = n;
  if (p.bounded) {
    cut.key = keys_of(splat<kKeys>(p.threshold))[0];
    count = count_at_least(keys, n, cut.key + 1);
  }
  if (count > room) {
    count = room;
    // without room nothing is greater than this
    cut = room > 0 ? find_cut(keys, n, room, range, places) : Cut{INT32_MAX - 1, 0};
  }
  const Place place{(int32_t)p.protect};
  const int64_t middle = end_of_ties(keys, n, cut);
  int64_t found = compress(keys, 0, middle, cut.key, INT32_MAX, places, place);
  found += compress(keys, middle, n, cut.key + 1, INT32_MAX, places + found, place);

  // an index without slots may have no memory at all
  if (p.k == 0) return 0;
  for (int64_t i = 0; i < p.protect; ++i) index[i] = (int32_t)i;
  memcpy(index + p.protect, places, count * sizeof(int32_t));
  memset(index + p.protect + count, -1, (room - count) * sizeof(int32_t));
  return p.protect + count;
}

}  // namespace
}  // namespace TOKENOPS_ISA
}  // namespace tokenops
