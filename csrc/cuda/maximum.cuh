// The maximum of a window, and how it is written. Ties go to the first tap, NaNs to the last one, in a part of a window as in the window; a
// window of -inf alone takes its first tap inside the input. A ReLU is applied to the maximum: it is monotonic.
#pragma once

#include "cuda/pooling.cuh"

namespace cnn_ext::cuda {

template <class Acc>
struct Maximum {
  static constexpr bool kRepeats = true;
  Maximum() = default;
  __device__ explicit Maximum(int first_tap) : value(-INFINITY), tap(first_tap) {}
  __device__ Maximum(Acc first, int first_tap) : value(first), tap(first_tap) {}
  __device__ static Acc nothing() { return -INFINITY; }
  __device__ void take(Acc other, int other_tap) {
    const bool wins = static_cast<int>(other > value) | static_cast<int>(isnan(other));  // without a branch
    value = wins ? other : value;
    tap = wins ? other_tap : tap;
  }
  Acc value;
  int tap;
};

template <class Element>
struct MaxForward {
  using T = Element;
  using Part = Maximum<Accumulate<T>>;

  template <int kCount>
  bool is_whole(int64_t elements) const {
    return has_whole_vectors<kCount>(output, elements) && has_whole_vectors<kCount>(offsets, elements);
  }
  template <int kCount>
  __device__ void finish(const Pool2dGeometry&, int, int, int, Part (&)[kCount]) const {}
  template <int kCount>
  __device__ void write(int index, const Part (&parts)[kCount], int count, bool is_whole) const {
    Vector<T, kCount> values;
    Vector<uint8_t, kCount> taps;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const bool stops = relu && parts[i].value <= 0;
      values.element[i] = narrow<T>(stops ? Accumulate<T>{0} : parts[i].value);
      taps.element[i] = static_cast<uint8_t>(stops ? kNoGradient : parts[i].tap);
    }
    store_some(output + index, values, count, is_whole);
    if (offsets != nullptr) store_some(offsets + index, taps, count, is_whole);
  }

  T* output;
  uint8_t* offsets;  // null: not asked for
  bool relu;
};

}  // namespace cnn_ext::cuda
