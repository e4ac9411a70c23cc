// grad_bias[k] = sum over n, oh, ow of grad_output[n, k, oh, ow]: a reduction over pixels.
#include "cuda/limits.h"
#include "cuda/pixel_reduction.cuh"

namespace cnn_ext::cuda {
namespace {

template <class T>
struct BiasTerms {
  using Acc = Accumulate<T>;
  using Target = int64_t;  // k

  __device__ Target target(int64_t k) const { return k; }
  __device__ Acc term(Target k, const PlaneIndex& pixel) const {
    return widen(grad_output[pixel.outer * out.n + k * out.c + pixel.h * out.h + pixel.w * out.w]);
  }
  __device__ int64_t offset(Target k) const { return k; }

  const T* grad_output;
  Strides out;
  int64_t targets;
};

Plan plan(const Conv2dShape& s) { return plan_reduction(s, s.out_channels); }

void run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, cudaStream_t stream) {
  with_element_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    const BiasTerms<T> terms{static_cast<const T*>(b.grad_output), strides_of(s.layout, s.out_channels, s.out_h, s.out_w), s.out_channels};
    run_reduction<T>(s, terms, workspace, b.grad_bias, stream);
  });
}

}  // namespace

extern const Conv2dKernel conv2d_backward_bias_reduction_sm80 = {
    "conv2d_backward_bias_reduction_sm80", 80, Conv2dDirection::backward_bias, has_int_extents, plan, run};

}  // namespace cnn_ext::cuda
