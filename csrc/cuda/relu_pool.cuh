// The ends of a convolution that is fused with its ReLU and max pooling: how forward stores its sums, and where the gradients find their
// operand. The kernels between them are those of the plain convolution.
//
// Forward numbers the outputs of the convolution window by window, so that those of a window are neighbours in a tile; a tile holds whole
// windows where they have 1, 2 or 4 taps. Windows that overlap would be computed several times: they are left to the composed row.
//
// The gradient of the convolution's output is read from the pooled gradient, where the mask (core/shapes.h) names the element, and is a
// zero elsewhere. An element of windows that do not overlap belongs to one of them at most.
#pragma once

#include "cuda/chunk.cuh"
#include "cuda/common.cuh"
#include "cuda/limits.h"
#include "cuda/vector.cuh"

namespace cnn_ext::cuda {

// The ReLU alone, where the sums of a plain row pass by.
template <class Acc>
__device__ Acc activated(Acc x, bool relu) {
  return relu && x <= 0 ? Acc{0} : x;
}

// What a plain row reads and writes of a forward without pooling.
inline Conv2dBuffers unpooled_buffers(const Conv2dReluPoolBuffers& b) {
  Conv2dBuffers conv{};
  conv.input = b.input, conv.weight = b.weight, conv.bias = b.bias, conv.output = b.output;
  return conv;
}

// Whether forward can number them so.
inline bool has_stored_windows(const Conv2dReluPoolShape& s) {
  const int64_t taps = s.pool_h * s.pool_w;
  return has_disjoint_windows(s) && (taps == 1 || taps == 2 || taps == 4);
}

// index = ((n * height + ph) * width + pw) * taps + r * pool_w + t: an output of the convolution as the place of a window.
class WindowDecoder {
 public:
  explicit WindowDecoder(const Conv2dReluPoolShape& s)
      : windows_(static_cast<int>(s.pooled_h), static_cast<int>(s.pooled_w)),
        taps_(static_cast<int>(s.pool_h * s.pool_w)),
        pool_w_(static_cast<int>(s.pool_w)),
        stride_h_(static_cast<int>(s.pool_stride_h)),
        stride_w_(static_cast<int>(s.pool_stride_w)) {}

  CNN_EXT_HOST_DEVICE int taps() const { return taps_.divisor(); }
  // Of the pooled output.
  CNN_EXT_HOST_DEVICE PlaneIndex window(int index) const { return windows_.at(taps_.quotient(index)); }
  // Of the convolution's output.
  CNN_EXT_HOST_DEVICE PlaneIndex at(int index) const {
    const int window = taps_.quotient(index), tap = index - window * taps_.divisor(), r = pool_w_.quotient(tap);
    const PlaneIndex p = windows_.at(window);
    return {p.outer, p.h * stride_h_ + r, p.w * stride_w_ + tap - r * pool_w_.divisor()};
  }

 private:
  PlaneDecoder windows_;
  FastDivisor taps_, pool_w_;
  int stride_h_, stride_w_;
};

// The maximum of a window's taps after the ReLU: the first of equals, the last NaN, none of what is not above zero.
template <class Acc>
struct WindowMaximum {
  __device__ void take(Acc other, int other_tap) {
    const bool wins = static_cast<int>(other > value) | static_cast<int>(isnan(other));  // without a branch
    value = wins ? other : value;
    tap = wins ? other_tap : tap;
  }
  Acc value = 0;
  int tap = kNoGradient;
};

// Calls function(T{}) for the types of the fused implicit GEMMs: accepts() admits no other.
template <class Function>
void with_strict_type(DType dtype, const Function& function) {
  dtype == DType::float64 ? function(double{}) : function(float{});
}

// Numbers the outputs by windows, rounds their sums and stores what is left of them. Maxima are found among rounded sums.
template <class T>
struct WindowStore {
  using Acc = Accumulate<T>;

  WindowStore(const Conv2dReluPoolShape& s, const Conv2dReluPoolBuffers& b)
      : output(static_cast<T*>(b.output)),
        offsets(has_pooling(s) ? b.offsets : nullptr),
        bias(static_cast<const T*>(b.bias)),
        strides(strides_of(s.conv.layout, s.conv.out_channels, s.pooled_h, s.pooled_w)),
        decoder(s),
        pixels(static_cast<int>(s.conv.batch * s.pooled_h * s.pooled_w) * decoder.taps()) {}

  __device__ void select_channel(int channel) {
    output += channel * strides.c;
    if (offsets != nullptr) offsets += channel * strides.c;
    if (bias != nullptr) bias += channel;
  }
  __device__ Acc finished(Acc sum, int channel) const { return widen(narrow<T>(bias == nullptr ? sum : sum + widen(bias[channel]))); }
  // Where the window of an index lies.
  __device__ int64_t place(int index, int channel) const {
    const PlaneIndex p = decoder.window(index);
    return p.outer * strides.n + channel * strides.c + p.h * strides.h + p.w * strides.w;
  }
  __device__ void write(int64_t place, const WindowMaximum<Acc>& maximum) const {
    output[place] = narrow<T>(maximum.value);
    if (offsets != nullptr) offsets[place] = static_cast<uint8_t>(maximum.tap);
  }
  // Of one channel and kCount neighbouring indices, whole windows; `index` is the first.
  template <int kCount>
  __device__ void store(int index, int channel, const Acc (&sums)[kCount]) const {
    const int last_tap = decoder.taps() - 1;
    WindowMaximum<Acc> maximum;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (index + i >= pixels) return;
      maximum.take(finished(sums[i], channel), i & last_tap);
      if ((i & last_tap) != last_tap) continue;
      write(place(index + i, channel), maximum);
      maximum = {};
    }
  }

  T* output;
  uint8_t* offsets;  // null: there is no pooling, or they are not asked for
  const T* bias;     // null: none
  Strides strides;   // of the pooled output
  WindowDecoder decoder;
  int pixels;  // of all windows
};

// The gradient of a convolution's output as it lies in memory; a plane is image * strides.n + channel * strides.c.
template <class T>
struct PlainGradient {
  PlainGradient(const Conv2dShape& s, const Conv2dBuffers& b)
      : gradient(static_cast<const T*>(b.grad_output)), strides(strides_of(s.layout, s.out_channels, s.out_h, s.out_w)) {}

  __device__ Accumulate<T> at(int64_t plane, int h, int w) const { return widen(gradient[plane + h * strides.h + w * strides.w]); }

  const T* gradient;
  Strides strides;
};

// The same made up from the pooled gradient and the mask, whose strides they have.
template <class T>
struct MaskedGradient {
  MaskedGradient(const Conv2dReluPoolShape& s, const Conv2dReluPoolBuffers& b)
      : gradient(static_cast<const T*>(b.grad_output)),
        offsets(has_pooling(s) ? b.offsets : nullptr),
        output(static_cast<const T*>(b.output)),
        strides(strides_of(s.conv.layout, s.conv.out_channels, s.pooled_h, s.pooled_w)),
        stride_h(static_cast<int>(s.pool_stride_h)),
        stride_w(static_cast<int>(s.pool_stride_w)),
        pool_h(static_cast<int>(s.pool_h)),
        pool_w(static_cast<int>(s.pool_w)),
        pooled_h(static_cast<int>(s.pooled_h)),
        pooled_w(static_cast<int>(s.pooled_w)) {}

  // Of an output of the convolution: where its window lies in a plane, and which of its taps it is. place -1: it has no window.
  struct Window {
    int64_t place;
    int tap;
  };
  __device__ Window window_of(int h, int w) const {
    const int ph = stride_h.quotient(h), pw = stride_w.quotient(w);
    const int r = h - ph * stride_h.divisor(), t = w - pw * stride_w.divisor();
    if (ph >= pooled_h || pw >= pooled_w || r >= pool_h || t >= pool_w) return {-1, 0};
    return {ph * strides.h + pw * strides.w, r * pool_w + t};
  }
  __device__ bool passes(int64_t place, int tap) const { return offsets != nullptr ? offsets[place] == tap : !(widen(output[place]) <= 0); }
  __device__ Accumulate<T> at(int64_t plane, int h, int w) const {
    const Window window = window_of(h, w);
    const int64_t place = plane + window.place;
    return window.place >= 0 && passes(place, window.tap) ? widen(gradient[place]) : Accumulate<T>{0};
  }

  const T* gradient;
  const uint8_t* offsets;  // null: there is no pooling, and the output is the mask
  const T* output;
  Strides strides;
  FastDivisor stride_h, stride_w;
  int pool_h, pool_w, pooled_h, pooled_w;
};

}  // namespace cnn_ext::cuda
