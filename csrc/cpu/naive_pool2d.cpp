// The definition of max and average pooling and of their derivatives, as loop nests: slow, for any shape, and the truth that every other
// row is tested against. Sums are kept in double, also for float32.
#include <limits>

#include "cpu/kernel.h"
#include "cpu/naive.h"
#include "cpu/parallel.h"

namespace cnn_ext::cpu::naive {
namespace {

Strides input_strides(const Pool2dShape& s) { return strides_of(s.layout, s.channels, s.in_h, s.in_w); }
Strides output_strides(const Pool2dShape& s) { return strides_of(s.layout, s.channels, s.out_h, s.out_w); }

// One plane (an image's channel) of a tensor.
template <class T>
struct Plane {
  T* data;
  Strides strides;
  Plane(T* tensor, const Strides& t, const Pool2dShape& s, int64_t plane)
      : data(tensor + plane / s.channels * t.n + plane % s.channels * t.c), strides(t) {}
  T& at(int64_t h, int64_t w) const { return data[h * strides.h + w * strides.w]; }
};

// Calls visit(r, s, ih, iw) for every tap of the window of output (oh, ow) that lies inside the input, in row-major order.
template <class Visit>
void for_each_tap(const Pool2dShape& s, int64_t oh, int64_t ow, const Visit& visit) {
  for (int64_t r = 0; r < s.kernel_h; ++r) {
    const int64_t ih = oh * s.stride_h - s.pad_top + r * s.dilation_h;
    if (ih < 0 || ih >= s.in_h) continue;
    for (int64_t t = 0; t < s.kernel_w; ++t) {
      const int64_t iw = ow * s.stride_w - s.pad_left + t * s.dilation_w;
      if (iw >= 0 && iw < s.in_w) visit(r, t, ih, iw);
    }
  }
}

template <class Body>
void for_each_output(const Pool2dShape& s, const Body& body) {
  for (int64_t oh = 0; oh < s.out_h; ++oh) {
    for (int64_t ow = 0; ow < s.out_w; ++ow) body(oh, ow);
  }
}

// Taps of one axis before the end of the input and its padding.
int64_t taps_within_padding(int64_t out, int64_t stride, int64_t pad_before, int64_t pad_after, int64_t kernel, int64_t dilation,
                            int64_t in) {
  int64_t taps = 0;
  for (int64_t r = 0; r < kernel; ++r) taps += out * stride - pad_before + r * dilation < in + pad_after;
  return taps;
}

// torch's rule: an override, else the taps inside the input, else those inside the padded input (ceil_mode's overhang never counts). 0: an
// empty window.
int64_t average_divisor(const Pool2dShape& s, int64_t oh, int64_t ow) {
  int64_t inside = 0;
  for_each_tap(s, oh, ow, [&](int64_t, int64_t, int64_t, int64_t) { ++inside; });
  if (inside == 0) return 0;
  if (s.divisor_override != 0) return s.divisor_override;
  if (s.count_include_pad == 0) return inside;
  return taps_within_padding(oh, s.stride_h, s.pad_top, s.pad_bottom, s.kernel_h, s.dilation_h, s.in_h) *
         taps_within_padding(ow, s.stride_w, s.pad_left, s.pad_right, s.kernel_w, s.dilation_w, s.in_w);
}

// Ties go to the first tap, NaNs to the last one; a window of -inf alone takes its first tap inside the input.
template <class T, class Offset>
void max_forward(const Pool2dShape& s, const Pool2dBuffers& b, int threads) {
  parallel_for(threads, s.batch * s.channels, [&](int, int64_t plane) {
    const Plane<const T> input(static_cast<const T*>(b.input), input_strides(s), s, plane);
    const Plane<T> output(static_cast<T*>(b.output), output_strides(s), s, plane);
    for_each_output(s, [&](int64_t oh, int64_t ow) {
      T best = -std::numeric_limits<T>::infinity();
      int64_t offset = -1;
      for_each_tap(s, oh, ow, [&](int64_t r, int64_t t, int64_t ih, int64_t iw) {
        const T value = input.at(ih, iw);
        if (offset < 0 || value > best || value != value) {
          best = value;
          offset = r * s.kernel_w + t;
        }
      });
      output.at(oh, ow) = best;
      if (b.offsets != nullptr) {
        const Plane<Offset> offsets(static_cast<Offset*>(b.offsets), output_strides(s), s, plane);
        offsets.at(oh, ow) = static_cast<Offset>(offset < 0 ? 0 : offset);
      }
    });
  });
}

// Calls visit(oh, ow, ih, iw) for every output of a plane and the input position that its offset names, where that is inside the input.
template <class Offset, class Visit>
void for_each_offset(const Pool2dShape& s, void* offsets, int64_t plane, const Visit& visit) {
  const Plane<const Offset> offset(static_cast<const Offset*>(offsets), output_strides(s), s, plane);
  for_each_output(s, [&](int64_t oh, int64_t ow) {
    const int64_t tap = offset.at(oh, ow);
    const int64_t ih = oh * s.stride_h - s.pad_top + tap / s.kernel_w * s.dilation_h;
    const int64_t iw = ow * s.stride_w - s.pad_left + tap % s.kernel_w * s.dilation_w;
    visit(oh, ow, ih, iw, ih >= 0 && ih < s.in_h && iw >= 0 && iw < s.in_w);
  });
}

template <class T>
void fill_with_zeros(const Pool2dShape& s, const Plane<T>& grad_input) {
  for (int64_t ih = 0; ih < s.in_h; ++ih) {
    for (int64_t iw = 0; iw < s.in_w; ++iw) grad_input.at(ih, iw) = T{0};
  }
}

template <class T, class Offset>
void max_backward(const Pool2dShape& s, const Pool2dBuffers& b, int threads) {
  parallel_for(threads, s.batch * s.channels, [&](int, int64_t plane) {
    const Plane<const T> grad_output(static_cast<const T*>(b.grad_output), output_strides(s), s, plane);
    const Plane<T> grad_input(static_cast<T*>(b.grad_input), input_strides(s), s, plane);
    fill_with_zeros(s, grad_input);
    for_each_offset<Offset>(s, b.offsets, plane, [&](int64_t oh, int64_t ow, int64_t ih, int64_t iw, bool inside) {
      if (inside) grad_input.at(ih, iw) += grad_output.at(oh, ow);
    });
  });
}

template <class T, class Offset>
void max_gather(const Pool2dShape& s, const Pool2dBuffers& b, int threads) {
  parallel_for(threads, s.batch * s.channels, [&](int, int64_t plane) {
    const Plane<const T> input(static_cast<const T*>(b.input), input_strides(s), s, plane);
    const Plane<T> output(static_cast<T*>(b.output), output_strides(s), s, plane);
    for_each_offset<Offset>(s, b.offsets, plane, [&](int64_t oh, int64_t ow, int64_t ih, int64_t iw, bool inside) {
      output.at(oh, ow) = inside ? input.at(ih, iw) : T{0};
    });
  });
}

template <class T>
void avg_forward(const Pool2dShape& s, const Pool2dBuffers& b, int threads) {
  parallel_for(threads, s.batch * s.channels, [&](int, int64_t plane) {
    const Plane<const T> input(static_cast<const T*>(b.input), input_strides(s), s, plane);
    const Plane<T> output(static_cast<T*>(b.output), output_strides(s), s, plane);
    for_each_output(s, [&](int64_t oh, int64_t ow) {
      double sum = 0.0;
      for_each_tap(s, oh, ow, [&](int64_t, int64_t, int64_t ih, int64_t iw) { sum += static_cast<double>(input.at(ih, iw)); });
      const int64_t divisor = average_divisor(s, oh, ow);
      output.at(oh, ow) = divisor == 0 ? T{0} : static_cast<T>(sum / static_cast<double>(divisor));
    });
  });
}

template <class T>
void avg_backward(const Pool2dShape& s, const Pool2dBuffers& b, int threads) {
  parallel_for(threads, s.batch * s.channels, [&](int, int64_t plane) {
    const Plane<const T> grad_output(static_cast<const T*>(b.grad_output), output_strides(s), s, plane);
    const Plane<T> grad_input(static_cast<T*>(b.grad_input), input_strides(s), s, plane);
    fill_with_zeros(s, grad_input);
    for_each_output(s, [&](int64_t oh, int64_t ow) {
      const int64_t divisor = average_divisor(s, oh, ow);
      if (divisor == 0) return;
      const T share = grad_output.at(oh, ow) / static_cast<T>(divisor);
      for_each_tap(s, oh, ow, [&](int64_t, int64_t, int64_t ih, int64_t iw) { grad_input.at(ih, iw) += share; });
    });
  });
}

bool has_small_offsets(const Pool2dShape& s) { return s.kernel_h * s.kernel_w <= 256; }

bool accepts(const Pool2dShape& s) { return s.dtype == DType::float32 || s.dtype == DType::float64; }

Plan plan(const Pool2dShape& s, int) { return {1, 1, s.batch * s.channels, 0}; }

using Run = void (*)(const Pool2dShape&, const Pool2dBuffers&, int);

template <Run float_small, Run float_large, Run double_small, Run double_large>
void run_max(const Pool2dShape& s, const Pool2dBuffers& b, void*, int threads) {
  if (s.dtype == DType::float32) {
    (has_small_offsets(s) ? float_small : float_large)(s, b, threads);
  } else {
    (has_small_offsets(s) ? double_small : double_large)(s, b, threads);
  }
}

template <Run run_float, Run run_double>
void run_avg(const Pool2dShape& s, const Pool2dBuffers& b, void*, int threads) {
  (s.dtype == DType::float32 ? run_float : run_double)(s, b, threads);
}

}  // namespace

extern const Pool2dKernel max_pool2d_forward = {
    "max_pool2d_forward_naive_baseline",
    Isa::baseline,
    Pool2dOp::max,
    Pool2dDirection::forward,
    accepts,
    plan,
    run_max<max_forward<float, uint8_t>, max_forward<float, int32_t>, max_forward<double, uint8_t>, max_forward<double, int32_t>>};
extern const Pool2dKernel max_pool2d_backward = {
    "max_pool2d_backward_naive_baseline",
    Isa::baseline,
    Pool2dOp::max,
    Pool2dDirection::backward,
    accepts,
    plan,
    run_max<max_backward<float, uint8_t>, max_backward<float, int32_t>, max_backward<double, uint8_t>, max_backward<double, int32_t>>};
extern const Pool2dKernel max_pool2d_gather = {
    "max_pool2d_gather_naive_baseline",
    Isa::baseline,
    Pool2dOp::max,
    Pool2dDirection::gather,
    accepts,
    plan,
    run_max<max_gather<float, uint8_t>, max_gather<float, int32_t>, max_gather<double, uint8_t>, max_gather<double, int32_t>>};
extern const Pool2dKernel avg_pool2d_forward = {"avg_pool2d_forward_naive_baseline",
                                                Isa::baseline,
                                                Pool2dOp::avg,
                                                Pool2dDirection::forward,
                                                accepts,
                                                plan,
                                                run_avg<avg_forward<float>, avg_forward<double>>};
extern const Pool2dKernel avg_pool2d_backward = {"avg_pool2d_backward_naive_baseline",
                                                 Isa::baseline,
                                                 Pool2dOp::avg,
                                                 Pool2dDirection::backward,
                                                 accepts,
                                                 plan,
                                                 run_avg<avg_backward<float>, avg_backward<double>>};

}  // namespace cnn_ext::cpu::naive
