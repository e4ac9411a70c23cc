// The definition of max and average pooling and of their derivatives, as loop nests: slow, for any shape, and the truth that every other
// row is tested against. Sums are kept in double, or in the type that
// the dtype is computed in.
#include <algorithm>
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
void max_forward(const Pool2dShape& s, const Pool2dBuffers& b, void*, int threads) {
  parallel_for(threads, s.batch * s.channels, [&](int, int64_t plane) {
    const Plane<const T> input(static_cast<const T*>(b.input), input_strides(s), s, plane);
    const Plane<T> output(static_cast<T*>(b.output), output_strides(s), s, plane);
    for_each_output(s, [&](int64_t oh, int64_t ow) {
      Compute<T> best = -std::numeric_limits<Compute<T>>::infinity();
      int64_t offset = -1;
      for_each_tap(s, oh, ow, [&](int64_t r, int64_t t, int64_t ih, int64_t iw) {
        const Compute<T> value = input.at(ih, iw);
        if (offset < 0 || value > best || value != value) {
          best = value;
          offset = r * s.kernel_w + t;
        }
      });
      output.at(oh, ow) = static_cast<T>(best);
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

// The gradient of one input plane, to be added up before it is rounded, in a worker's part of the workspace.
template <class T>
struct PlaneSums {
  PlaneSums(const Pool2dShape& s, void* workspace, int worker)
      : width(s.in_w), count(s.in_h * s.in_w), sums(static_cast<Compute<T>*>(workspace) + worker * count) {
    std::fill_n(sums, count, Compute<T>(0));
  }
  Compute<T>& at(int64_t h, int64_t w) const { return sums[h * width + w]; }
  void write(const Plane<T>& to) const {
    for (int64_t i = 0; i < count; ++i) to.at(i / width, i % width) = static_cast<T>(sums[i]);
  }
  int64_t width, count;
  Compute<T>* sums;
};

template <class T, class Offset>
void max_backward(const Pool2dShape& s, const Pool2dBuffers& b, void* workspace, int threads) {
  parallel_for(threads, s.batch * s.channels, [&](int worker, int64_t plane) {
    const Plane<const T> grad_output(static_cast<const T*>(b.grad_output), output_strides(s), s, plane);
    const Plane<T> grad_input(static_cast<T*>(b.grad_input), input_strides(s), s, plane);
    const PlaneSums<T> sums(s, workspace, worker);
    for_each_offset<Offset>(s, b.offsets, plane, [&](int64_t oh, int64_t ow, int64_t ih, int64_t iw, bool inside) {
      if (inside) sums.at(ih, iw) += grad_output.at(oh, ow);
    });
    sums.write(grad_input);
  });
}

template <class T, class Offset>
void max_gather(const Pool2dShape& s, const Pool2dBuffers& b, void*, int threads) {
  parallel_for(threads, s.batch * s.channels, [&](int, int64_t plane) {
    const Plane<const T> input(static_cast<const T*>(b.input), input_strides(s), s, plane);
    const Plane<T> output(static_cast<T*>(b.output), output_strides(s), s, plane);
    for_each_offset<Offset>(s, b.offsets, plane, [&](int64_t oh, int64_t ow, int64_t ih, int64_t iw, bool inside) {
      output.at(oh, ow) = inside ? input.at(ih, iw) : T(0.0f);
    });
  });
}

template <class T>
void avg_forward(const Pool2dShape& s, const Pool2dBuffers& b, void*, int threads) {
  parallel_for(threads, s.batch * s.channels, [&](int, int64_t plane) {
    const Plane<const T> input(static_cast<const T*>(b.input), input_strides(s), s, plane);
    const Plane<T> output(static_cast<T*>(b.output), output_strides(s), s, plane);
    for_each_output(s, [&](int64_t oh, int64_t ow) {
      double sum = 0.0;
      for_each_tap(s, oh, ow, [&](int64_t, int64_t, int64_t ih, int64_t iw) { sum += static_cast<double>(input.at(ih, iw)); });
      const int64_t divisor = average_divisor(s, oh, ow);
      output.at(oh, ow) = static_cast<T>(static_cast<Compute<T>>(divisor == 0 ? 0.0 : sum / static_cast<double>(divisor)));
    });
  });
}

template <class T>
void avg_backward(const Pool2dShape& s, const Pool2dBuffers& b, void* workspace, int threads) {
  parallel_for(threads, s.batch * s.channels, [&](int worker, int64_t plane) {
    const Plane<const T> grad_output(static_cast<const T*>(b.grad_output), output_strides(s), s, plane);
    const Plane<T> grad_input(static_cast<T*>(b.grad_input), input_strides(s), s, plane);
    const PlaneSums<T> sums(s, workspace, worker);
    for_each_output(s, [&](int64_t oh, int64_t ow) {
      const int64_t divisor = average_divisor(s, oh, ow);
      if (divisor == 0) return;
      const Compute<T> share = grad_output.at(oh, ow) / static_cast<Compute<T>>(divisor);
      for_each_tap(s, oh, ow, [&](int64_t, int64_t, int64_t ih, int64_t iw) { sums.at(ih, iw) += share; });
    });
    sums.write(grad_input);
  });
}

bool has_small_offsets(const Pool2dShape& s) { return s.kernel_h * s.kernel_w <= 256; }

bool accepts(const Pool2dShape&) { return true; }

Plan plan_forward(const Pool2dShape& s, int) { return {1, 1, s.batch * s.channels, 0}; }
Plan plan_gather(const Pool2dShape& s, int threads) { return plan_forward(s, threads); }
Plan plan_backward(const Pool2dShape& s, int threads) {
  const int64_t sums = threads * s.in_h * s.in_w;
  return {1, 1, s.batch * s.channels, static_cast<size_t>(sums) * sizeof(double)};
}

}  // namespace

// Max pooling's functions are templates of the offsets' type, too.
#define CNN_EXT_NAIVE_MAX_ROW(direction)                                                                            \
  static void run_max_##direction(const Pool2dShape& s, const Pool2dBuffers& b, void* workspace, int threads) {     \
    with_scalar(s.dtype, [&](auto scalar) {                                                                         \
      using T = decltype(scalar);                                                                                   \
      (has_small_offsets(s) ? max_##direction<T, uint8_t> : max_##direction<T, int32_t>)(s, b, workspace, threads); \
    });                                                                                                             \
  }                                                                                                                 \
  extern const Pool2dKernel max_pool2d_##direction = {"max_pool2d_" #direction "_naive_baseline",                   \
                                                      Isa::baseline,                                                \
                                                      Pool2dOp::max,                                                \
                                                      Pool2dDirection::direction,                                   \
                                                      accepts,                                                      \
                                                      plan_##direction,                                             \
                                                      run_max_##direction};
CNN_EXT_NAIVE_MAX_ROW(forward)
CNN_EXT_NAIVE_MAX_ROW(backward)
CNN_EXT_NAIVE_MAX_ROW(gather)

#define CNN_EXT_NAIVE_AVG_ROW(direction)                                                                        \
  static void run_avg_##direction(const Pool2dShape& s, const Pool2dBuffers& b, void* workspace, int threads) { \
    with_scalar(s.dtype, [&](auto scalar) { avg_##direction<decltype(scalar)>(s, b, workspace, threads); });    \
  }                                                                                                             \
  extern const Pool2dKernel avg_pool2d_##direction = {"avg_pool2d_" #direction "_naive_baseline",               \
                                                      Isa::baseline,                                            \
                                                      Pool2dOp::avg,                                            \
                                                      Pool2dDirection::direction,                               \
                                                      accepts,                                                  \
                                                      plan_##direction,                                         \
                                                      run_avg_##direction};
CNN_EXT_NAIVE_AVG_ROW(forward)
CNN_EXT_NAIVE_AVG_ROW(backward)

}  // namespace cnn_ext::cpu::naive
