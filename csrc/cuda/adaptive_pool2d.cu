// Adaptive pooling: one thread per element of the result, in memory order. The gradient of the mean gathers: an input adds up its shares of
// the windows that cover it, in order. Ties go to the first element, NaNs to the last one.
#include "cuda/sized_pool2d.cuh"

namespace cnn_ext::cuda {
namespace {

template <class T>
__global__ void adaptive_max_forward(SizedPool2dGeometry g, const T* __restrict__ input, T* __restrict__ output,
                                     int64_t* __restrict__ indices) {
  const int64_t index = element_index();
  if (index >= g.small_elements) return;
  const ElementOf<int64_t> o = element_at(g.layout, index, g.channels, g.out_h, g.out_w);
  const RangeOf<int64_t> rows = covered(o.h, g.out_h, g.in_h), cols = covered(o.w, g.out_w, g.in_w);
  const T* plane = input + o.n * g.large.n + o.c * g.large.c;
  Accumulate<T> best = -INFINITY;
  int64_t place = -1;
  for (int64_t h = rows.begin; h < rows.end; ++h) {
    for (int64_t w = cols.begin; w < cols.end; ++w) {
      const Accumulate<T> value = widen(plane[h * g.large.h + w * g.large.w]);
      if (place < 0 || value > best || isnan(value)) {
        best = value;
        place = h * g.in_w + w;
      }
    }
  }
  output[index] = narrow<T>(best);
  if (indices != nullptr) indices[index] = place;
}

template <class T>
__global__ void adaptive_avg_forward(SizedPool2dGeometry g, const T* __restrict__ input, T* __restrict__ output) {
  const int64_t index = element_index();
  if (index >= g.small_elements) return;
  const ElementOf<int64_t> o = element_at(g.layout, index, g.channels, g.out_h, g.out_w);
  const RangeOf<int64_t> rows = covered(o.h, g.out_h, g.in_h), cols = covered(o.w, g.out_w, g.in_w);
  const T* plane = input + o.n * g.large.n + o.c * g.large.c;
  Accumulate<T> sum = 0;
  for (int64_t h = rows.begin; h < rows.end; ++h) {
    for (int64_t w = cols.begin; w < cols.end; ++w) sum += widen(plane[h * g.large.h + w * g.large.w]);
  }
  const int64_t taps = (rows.end - rows.begin) * (cols.end - cols.begin);
  output[index] = narrow<T>(sum / static_cast<Accumulate<T>>(taps));
}

template <class T>
__global__ void adaptive_avg_backward(SizedPool2dGeometry g, const T* __restrict__ grad_output, T* __restrict__ grad_input) {
  const int64_t index = element_index();
  if (index >= g.large_elements) return;
  const ElementOf<int64_t> i = element_at(g.layout, index, g.channels, g.in_h, g.in_w);
  const RangeOf<int64_t> rows = covered(i.h, g.in_h, g.out_h), cols = covered(i.w, g.in_w, g.out_w);
  const T* plane = grad_output + i.n * g.small.n + i.c * g.small.c;
  Accumulate<T> sum = 0;
  for (int64_t oh = rows.begin; oh < rows.end; ++oh) {
    const RangeOf<int64_t> window_rows = covered(oh, g.out_h, g.in_h);
    for (int64_t ow = cols.begin; ow < cols.end; ++ow) {
      const RangeOf<int64_t> window_cols = covered(ow, g.out_w, g.in_w);
      const int64_t taps = (window_rows.end - window_rows.begin) * (window_cols.end - window_cols.begin);
      sum += widen(plane[oh * g.small.h + ow * g.small.w]) / static_cast<Accumulate<T>>(taps);
    }
  }
  grad_input[index] = narrow<T>(sum);
}

void run_max_forward(const SizedPool2dShape& s, const SizedPool2dBuffers& b, cudaStream_t stream) {
  with_element_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    const SizedPool2dGeometry g(s);
    launch_elementwise(adaptive_max_forward<T>, g.small_elements, stream, g, static_cast<const T*>(b.large), static_cast<T*>(b.small),
                       b.indices);
  });
}

void run_avg_forward(const SizedPool2dShape& s, const SizedPool2dBuffers& b, cudaStream_t stream) {
  with_element_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    const SizedPool2dGeometry g(s);
    launch_elementwise(adaptive_avg_forward<T>, g.small_elements, stream, g, static_cast<const T*>(b.large), static_cast<T*>(b.small));
  });
}

void run_avg_backward(const SizedPool2dShape& s, const SizedPool2dBuffers& b, cudaStream_t stream) {
  with_element_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    const SizedPool2dGeometry g(s);
    launch_elementwise(adaptive_avg_backward<T>, g.large_elements, stream, g, static_cast<const T*>(b.small), static_cast<T*>(b.large));
  });
}

Plan plan_small(const SizedPool2dShape& s) { return {1, 1, ceil_div<int64_t>(SizedPool2dGeometry(s).small_elements, kBlockThreads), 0}; }
Plan plan_large(const SizedPool2dShape& s) { return {1, 1, ceil_div<int64_t>(SizedPool2dGeometry(s).large_elements, kBlockThreads), 0}; }

}  // namespace

extern const SizedPool2dKernel adaptive_max_pool2d_forward_direct_sm80 = {"adaptive_max_pool2d_forward_direct_sm80",
                                                                          80,
                                                                          SizedPool2dOp::adaptive_max,
                                                                          SizedPool2dDirection::forward,
                                                                          has_any_extents,
                                                                          plan_small,
                                                                          run_max_forward};
extern const SizedPool2dKernel adaptive_avg_pool2d_forward_direct_sm80 = {"adaptive_avg_pool2d_forward_direct_sm80",
                                                                          80,
                                                                          SizedPool2dOp::adaptive_avg,
                                                                          SizedPool2dDirection::forward,
                                                                          has_any_extents,
                                                                          plan_small,
                                                                          run_avg_forward};
extern const SizedPool2dKernel adaptive_avg_pool2d_backward_direct_sm80 = {"adaptive_avg_pool2d_backward_direct_sm80",
                                                                           80,
                                                                           SizedPool2dOp::adaptive_avg,
                                                                           SizedPool2dDirection::backward,
                                                                           has_any_extents,
                                                                           plan_large,
                                                                           run_avg_backward};

}  // namespace cnn_ext::cuda
