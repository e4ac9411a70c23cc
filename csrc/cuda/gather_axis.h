// forward and backward_input as one kind of convolution: a pixel of the result takes, tap by tap, the channels of a pixel of a source.
// forward is one such convolution, backward_input one for each stride phase (geometry.h).
#pragma once

#include "cuda/geometry.h"

namespace cnn_ext::cuda {

// One axis of a gathering convolution. Its p-th pixel lies at first_out + p * out_step of the result and takes its j-th tap, which is the
// filter's first_tap + j * tap_distance, from position first + p * step + j * tap_step of the source.
struct GatherAxis {
  int first, step, tap_step;
  int first_tap, tap_distance, taps;
  int first_out, out_step;
};

// The position of pixel 0's nearest tap, how far the farthest lies from there, and tap j.
CNN_EXT_HOST_DEVICE inline int lowest_tap(const GatherAxis& axis) {
  return axis.first + (axis.tap_step < 0 ? (axis.taps - 1) * axis.tap_step : 0);
}
CNN_EXT_HOST_DEVICE inline int reach(const GatherAxis& axis) {
  return axis.taps == 0 ? 0 : (axis.taps - 1) * (axis.tap_step < 0 ? -axis.tap_step : axis.tap_step);
}
CNN_EXT_HOST_DEVICE inline int tap_distance(const GatherAxis& axis, int j) {
  return axis.tap_step < 0 ? (axis.taps - 1 - j) * -axis.tap_step : j * axis.tap_step;
}

CNN_EXT_HOST_DEVICE inline GatherAxis forward_axis(int kernel, int stride, int pad, int dilation) {
  return {-pad, stride, dilation, 0, 1, kernel, 0, 1};
}

CNN_EXT_HOST_DEVICE inline GatherAxis backward_axis(int kernel, int stride, int pad, int dilation, int phase) {
  const Phase p = phase_of(phase, stride, pad, dilation, kernel);
  return {p.origin, 1, -p.step, p.first_tap, p.tap_step, p.taps, p.first_position, stride};
}

}  // namespace cnn_ext::cuda
