// The running maximum that the rows of max pooling share.
#pragma once

#include "cpu/kernels/pool2d.inl"

namespace {

// Stands for the type of offsets where none are asked for.
struct NoOffset {};
template <class Offset>
constexpr bool kTracksOffsets = true;
template <>
constexpr bool kTracksOffsets<NoOffset> = false;

template <class T>
constexpr T kLowest = -static_cast<T>(__builtin_inff());

template <class T>
constexpr T kLowestFinite = T{};
template <>
constexpr float kLowestFinite<float> = -__FLT_MAX__;
template <>
constexpr double kLowestFinite<double> = -__DBL_MAX__;

// The maximum so far in each lane and the offset of the tap that it came from. Ties go to the first tap, NaNs to the last.
template <class T, class Offset>
struct Best {
  Vec<T> value = broadcast(kLowest<T>);
  IntVec<T> offset{};

  // kNaN: false where neither the candidate nor what was taken before can be a NaN.
  template <bool kNaN = true>
  void take(Vec<T> candidate, IntVec<T> candidate_offset) {
    auto wins = greater(candidate, value);
    if constexpr (kNaN) wins |= is_nan(candidate);
    value = select(wins, candidate, value);
    if constexpr (kTracksOffsets<Offset>) offset = select(wins, candidate_offset, offset);
  }
  void store_to(T* output, Offset* offsets, LaneSet lanes) const {
    store_lanes(output, value, lanes);
    if constexpr (kTracksOffsets<Offset>) store_offsets<T>(offsets, offset, lanes);
  }
};

}  // namespace
