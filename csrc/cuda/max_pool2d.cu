// Max pooling: one thread per element of the result, in memory order. backward gathers: an input looks at the windows that cover it, in
// order, and adds up the gradients of those whose offset names it. Bound by memory; overlapping windows are read from the caches. Ties go
// to the first tap, NaNs to the last one; a window of -inf alone takes its first tap inside the input. A ReLU is applied to the maximum: it
// is monotonic. wide: the same where an int does not hold an extent.
#include "cuda/common.cuh"
#include "cuda/limits.h"

namespace cnn_ext::cuda {
namespace {

template <class T, class Offset, class Integer>
__global__ void max_forward(Pool2dGeometryOf<Integer> g, const T* __restrict__ input, T* __restrict__ output, Offset* __restrict__ offsets,
                            bool relu) {
  const int64_t index = element_index();
  if (index >= g.out_elements) return;
  const ElementOf<Integer> o = element_at(g.layout, index, g.channels, g.out_h, g.out_w);
  const Integer first_h = o.h * g.stride_h - g.pad_top, first_w = o.w * g.stride_w - g.pad_left;
  const RangeOf<Integer> rows = taps_inside(first_h, g.dilation_h, g.kernel_h, g.in_h);
  const RangeOf<Integer> cols = taps_inside(first_w, g.dilation_w, g.kernel_w, g.in_w);
  const T* plane = input + o.n * g.in.n + o.c * g.in.c;
  Accumulate<T> best = -INFINITY;
  Integer offset = -1;
  for (Integer r = rows.begin; r < rows.end; ++r) {
    const T* row = plane + (first_h + r * g.dilation_h) * g.in.h;
    for (Integer t = cols.begin; t < cols.end; ++t) {
      const Accumulate<T> value = widen(row[(first_w + t * g.dilation_w) * g.in.w]);
      if (offset < 0 || value > best || isnan(value)) {
        best = value;
        offset = r * g.kernel_w + t;
      }
    }
  }
  const bool stops = relu && best <= 0;
  output[index] = narrow<T>(stops ? Accumulate<T>{0} : best);
  if (offsets != nullptr) offsets[index] = static_cast<Offset>(stops ? kNoGradient : offset < 0 ? 0 : offset);
}

template <class T, class Offset, class Integer>
__global__ void max_backward(Pool2dGeometryOf<Integer> g, const T* __restrict__ grad_output, const Offset* __restrict__ offsets,
                             T* __restrict__ grad_input) {
  const int64_t index = element_index();
  if (index >= g.in_elements) return;
  const ElementOf<Integer> i = element_at(g.layout, index, g.channels, g.in_h, g.in_w);
  const Integer padded_h = i.h + g.pad_top, padded_w = i.w + g.pad_left;
  const RangeOf<Integer> rows = windows_over(padded_h, g.stride_h, g.dilation_h, g.kernel_h, g.out_h);
  const RangeOf<Integer> cols = windows_over(padded_w, g.stride_w, g.dilation_w, g.kernel_w, g.out_w);
  const int64_t plane = i.n * g.out.n + i.c * g.out.c;
  Accumulate<T> sum = 0;
  for (Integer oh = rows.begin; oh < rows.end; ++oh) {
    const Integer offset_h = padded_h - oh * g.stride_h;
    if (offset_h % g.dilation_h != 0) continue;
    for (Integer ow = cols.begin; ow < cols.end; ++ow) {
      const Integer offset_w = padded_w - ow * g.stride_w;
      if (offset_w % g.dilation_w != 0) continue;
      const int64_t out = plane + oh * g.out.h + ow * g.out.w;
      const Integer tap = offset_h / g.dilation_h * g.kernel_w + offset_w / g.dilation_w;
      if (static_cast<Integer>(offsets[out]) == tap) sum += widen(grad_output[out]);
    }
  }
  grad_input[index] = narrow<T>(sum);
}

template <class T, class Offset, class Integer>
__global__ void max_gather(Pool2dGeometryOf<Integer> g, const T* __restrict__ input, const Offset* __restrict__ offsets,
                           T* __restrict__ output) {
  const int64_t index = element_index();
  if (index >= g.out_elements) return;
  const ElementOf<Integer> o = element_at(g.layout, index, g.channels, g.out_h, g.out_w);
  const Integer tap = offsets[index];
  const Integer h = o.h * g.stride_h - g.pad_top + tap / g.kernel_w * g.dilation_h;
  const Integer w = o.w * g.stride_w - g.pad_left + tap % g.kernel_w * g.dilation_w;
  const bool inside = h >= 0 && h < g.in_h && w >= 0 && w < g.in_w;
  output[index] = inside ? input[o.n * g.in.n + o.c * g.in.c + h * g.in.h + w * g.in.w] : narrow<T>(0);
}

// Calls function(T{}, Offset{}).
template <class Function>
void with_element_and_offset_types(const Pool2dShape& s, const Function& function) {
  with_element_type(s.dtype, [&](auto element) {
    if (s.kernel_h * s.kernel_w <= 256) {
      function(element, uint8_t{});
    } else {
      function(element, int32_t{});
    }
  });
}

template <class Integer>
void run_forward(const Pool2dShape& s, const Pool2dBuffers& b, cudaStream_t stream) {
  with_element_and_offset_types(s, [&](auto element, auto offset) {
    using T = decltype(element);
    using Offset = decltype(offset);
    const Pool2dGeometryOf<Integer> g(s);
    launch_elementwise(max_forward<T, Offset, Integer>, g.out_elements, stream, g, static_cast<const T*>(b.input),
                       static_cast<T*>(b.output), static_cast<Offset*>(b.offsets), b.relu);
  });
}

template <class Integer>
void run_backward(const Pool2dShape& s, const Pool2dBuffers& b, cudaStream_t stream) {
  with_element_and_offset_types(s, [&](auto element, auto offset) {
    using T = decltype(element);
    using Offset = decltype(offset);
    const Pool2dGeometryOf<Integer> g(s);
    launch_elementwise(max_backward<T, Offset, Integer>, g.in_elements, stream, g, static_cast<const T*>(b.grad_output),
                       static_cast<const Offset*>(b.offsets), static_cast<T*>(b.grad_input));
  });
}

template <class Integer>
void run_gather(const Pool2dShape& s, const Pool2dBuffers& b, cudaStream_t stream) {
  with_element_and_offset_types(s, [&](auto element, auto offset) {
    using T = decltype(element);
    using Offset = decltype(offset);
    const Pool2dGeometryOf<Integer> g(s);
    launch_elementwise(max_gather<T, Offset, Integer>, g.out_elements, stream, g, static_cast<const T*>(b.input),
                       static_cast<const Offset*>(b.offsets), static_cast<T*>(b.output));
  });
}

Plan plan_outputs(const Pool2dShape& s) { return {1, 1, ceil_div<int64_t>(Pool2dGeometry(s).out_elements, kBlockThreads), 0}; }
Plan plan_inputs(const Pool2dShape& s) { return {1, 1, ceil_div<int64_t>(Pool2dGeometry(s).in_elements, kBlockThreads), 0}; }

}  // namespace

extern const Pool2dKernel max_pool2d_forward_direct_sm80 = {
    "max_pool2d_forward_direct_sm80", 80, Pool2dOp::max, Pool2dDirection::forward, has_int_extents, plan_outputs, run_forward<int>};
extern const Pool2dKernel max_pool2d_forward_wide_sm80 = {
    "max_pool2d_forward_wide_sm80", 80, Pool2dOp::max, Pool2dDirection::forward, has_any_extents, plan_outputs, run_forward<int64_t>};
extern const Pool2dKernel max_pool2d_backward_direct_sm80 = {
    "max_pool2d_backward_direct_sm80", 80, Pool2dOp::max, Pool2dDirection::backward, has_int_extents, plan_inputs, run_backward<int>};
extern const Pool2dKernel max_pool2d_backward_wide_sm80 = {
    "max_pool2d_backward_wide_sm80", 80, Pool2dOp::max, Pool2dDirection::backward, has_any_extents, plan_inputs, run_backward<int64_t>};
extern const Pool2dKernel max_pool2d_gather_direct_sm80 = {
    "max_pool2d_gather_direct_sm80", 80, Pool2dOp::max, Pool2dDirection::gather, has_int_extents, plan_outputs, run_gather<int>};
extern const Pool2dKernel max_pool2d_gather_wide_sm80 = {
    "max_pool2d_gather_wide_sm80", 80, Pool2dOp::max, Pool2dDirection::gather, has_any_extents, plan_outputs, run_gather<int64_t>};

}  // namespace cnn_ext::cuda
