// What the definitions share: where an element lies, and one output of the convolution.
#pragma once

#include <cstdint>

#include "core/half.h"
#include "core/padding.h"
#include "core/shapes.h"

namespace cnn_ext::cpu::naive {

// Element strides of a dense 4-D tensor.
struct Strides {
  int64_t n, c, h, w;
};

inline Strides strides_of(Layout layout, int64_t c, int64_t h, int64_t w) {
  return layout == Layout::nchw ? Strides{c * h * w, h * w, w, 1} : Strides{c * h * w, 1, w * c, c};
}

struct Geometry {
  explicit Geometry(const Conv2dShape& s)
      : group_in(s.in_channels / s.groups),
        group_out(s.out_channels / s.groups),
        in(strides_of(s.layout, s.in_channels, s.in_h, s.in_w)),
        out(strides_of(s.layout, s.out_channels, s.out_h, s.out_w)),
        weight(strides_of(s.weight_layout, group_in, s.kernel_h, s.kernel_w)) {}
  int64_t group_in, group_out;
  Strides in, out, weight;
};

inline int64_t at(const Strides& t, int64_t n, int64_t c, int64_t h, int64_t w) { return n * t.n + c * t.c + h * t.h + w * t.w; }

// output[n, channel, oh, ow] of the convolution, before it is rounded to T.
template <class T>
Compute<T> output_at(const Conv2dShape& s, const Geometry& geo, const T* input, const T* weight, const T* bias, int64_t n, int64_t channel,
                     int64_t oh, int64_t ow) {
  const int64_t first_in = channel / geo.group_out * geo.group_in;
  double sum = bias != nullptr ? static_cast<double>(bias[channel]) : 0.0;
  for (int64_t r = 0; r < s.kernel_h; ++r) {
    const int64_t ih = source_position(s.padding_mode, oh * s.stride_h - s.pad_top + r * s.dilation_h, s.in_h);
    if (ih < 0) continue;
    for (int64_t t = 0; t < s.kernel_w; ++t) {
      const int64_t iw = source_position(s.padding_mode, ow * s.stride_w - s.pad_left + t * s.dilation_w, s.in_w);
      if (iw < 0) continue;
      for (int64_t c = 0; c < geo.group_in; ++c) {
        sum +=
            static_cast<double>(input[at(geo.in, n, first_in + c, ih, iw)]) * static_cast<double>(weight[at(geo.weight, channel, c, r, t)]);
      }
    }
  }
  return static_cast<Compute<T>>(sum);
}

}  // namespace cnn_ext::cpu::naive
