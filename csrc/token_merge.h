// What token_merge calls things on every device.
#pragma once

namespace tokenops {

enum class MergeMode { sum, mean, amax, keep };  // keep: the destination's own row

// bits of a role, as in tokenops/types.py
constexpr int kSource = 1, kDestination = 2, kDropped = 4;

constexpr int kPlaces = 3;  // t, y, x

}  // namespace tokenops
