// Average pooling: one thread per element of the result, in memory order. backward gathers: an input adds up its shares of the windows that
// cover it, in order. Bound by memory; overlapping windows are read from the caches. wide: the same where an int does not hold an extent.
#include "cuda/common.cuh"
#include "cuda/limits.h"
#include "cuda/pooling_divisor.cuh"

namespace cnn_ext::cuda {
namespace {

template <class T, class Integer>
__global__ void avg_forward(Pool2dGeometryOf<Integer> g, PoolDivisor rule, const T* __restrict__ input, T* __restrict__ output) {
  const int64_t index = element_index();
  if (index >= g.out_elements) return;
  const ElementOf<Integer> o = element_at(g.layout, index, g.channels, g.out_h, g.out_w);
  const Integer first_h = o.h * g.stride_h - g.pad_top, first_w = o.w * g.stride_w - g.pad_left;
  const RangeOf<Integer> rows = taps_inside(first_h, g.dilation_h, g.kernel_h, g.in_h);
  const RangeOf<Integer> cols = taps_inside(first_w, g.dilation_w, g.kernel_w, g.in_w);
  const T* plane = input + o.n * g.in.n + o.c * g.in.c;
  Accumulate<T> sum = 0;
  for (Integer r = rows.begin; r < rows.end; ++r) {
    const T* row = plane + (first_h + r * g.dilation_h) * g.in.h;
    for (Integer t = cols.begin; t < cols.end; ++t) sum += widen(row[(first_w + t * g.dilation_w) * g.in.w]);
  }
  const int64_t divisor = rule.of(g, first_h, first_w, g.dilation_h, g.dilation_w);
  output[index] = narrow<T>(sum / static_cast<Accumulate<T>>(divisor));
}

template <class T, class Integer>
__global__ void avg_backward(Pool2dGeometryOf<Integer> g, PoolDivisor rule, const T* __restrict__ grad_output, T* __restrict__ grad_input) {
  const int64_t index = element_index();
  if (index >= g.in_elements) return;
  const ElementOf<Integer> i = element_at(g.layout, index, g.channels, g.in_h, g.in_w);
  const Integer padded_h = i.h + g.pad_top, padded_w = i.w + g.pad_left;
  const RangeOf<Integer> rows = windows_over(padded_h, g.stride_h, g.dilation_h, g.kernel_h, g.out_h);
  const RangeOf<Integer> cols = windows_over(padded_w, g.stride_w, g.dilation_w, g.kernel_w, g.out_w);
  const T* plane = grad_output + i.n * g.out.n + i.c * g.out.c;
  Accumulate<T> sum = 0;
  for (Integer oh = rows.begin; oh < rows.end; ++oh) {
    if ((padded_h - oh * g.stride_h) % g.dilation_h != 0) continue;
    for (Integer ow = cols.begin; ow < cols.end; ++ow) {
      if ((padded_w - ow * g.stride_w) % g.dilation_w != 0) continue;
      const int64_t divisor = rule.of(g, oh * g.stride_h - g.pad_top, ow * g.stride_w - g.pad_left, g.dilation_h, g.dilation_w);
      sum += widen(plane[oh * g.out.h + ow * g.out.w]) / static_cast<Accumulate<T>>(divisor);
    }
  }
  grad_input[index] = narrow<T>(sum);
}

template <class Integer>
void run_forward(const Pool2dShape& s, const Pool2dBuffers& b, cudaStream_t stream) {
  with_element_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    const Pool2dGeometryOf<Integer> g(s);
    launch_elementwise(avg_forward<T, Integer>, g.out_elements, stream, g, PoolDivisor(s), static_cast<const T*>(b.input),
                       static_cast<T*>(b.output));
  });
}

template <class Integer>
void run_backward(const Pool2dShape& s, const Pool2dBuffers& b, cudaStream_t stream) {
  with_element_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    const Pool2dGeometryOf<Integer> g(s);
    launch_elementwise(avg_backward<T, Integer>, g.in_elements, stream, g, PoolDivisor(s), static_cast<const T*>(b.grad_output),
                       static_cast<T*>(b.grad_input));
  });
}

Plan plan_forward(const Pool2dShape& s) { return {1, 1, ceil_div<int64_t>(Pool2dGeometry(s).out_elements, kBlockThreads), 0}; }
Plan plan_backward(const Pool2dShape& s) { return {1, 1, ceil_div<int64_t>(Pool2dGeometry(s).in_elements, kBlockThreads), 0}; }

}  // namespace

extern const Pool2dKernel avg_pool2d_forward_direct_sm80 = {
    "avg_pool2d_forward_direct_sm80", 80, Pool2dOp::avg, Pool2dDirection::forward, has_int_extents, plan_forward, run_forward<int>};
extern const Pool2dKernel avg_pool2d_forward_wide_sm80 = {
    "avg_pool2d_forward_wide_sm80", 80, Pool2dOp::avg, Pool2dDirection::forward, has_any_extents, plan_forward, run_forward<int64_t>};
extern const Pool2dKernel avg_pool2d_backward_direct_sm80 = {
    "avg_pool2d_backward_direct_sm80", 80, Pool2dOp::avg, Pool2dDirection::backward, has_int_extents, plan_backward, run_backward<int>};
extern const Pool2dKernel avg_pool2d_backward_wide_sm80 = {
    "avg_pool2d_backward_wide_sm80", 80, Pool2dOp::avg, Pool2dDirection::backward, has_any_extents, plan_backward, run_backward<int64_t>};

}  // namespace cnn_ext::cuda
