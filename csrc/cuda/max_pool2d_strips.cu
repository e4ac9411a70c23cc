// Max pooling at memory bandwidth (maximum.cuh, pooling_forward.cuh, pooling_backward.cuh).
//
// Not handled: dilation; windows of more than 256 taps.
#include "cuda/maximum.cuh"
#include "cuda/pooling_backward.cuh"
#include "cuda/pooling_forward.cuh"

namespace cnn_ext::cuda {
namespace {

template <class Element>
struct MaxBackward {
  using T = Element;
  static constexpr bool kHasOffsets = true;

  template <int kCount>
  bool are_outputs_whole(int64_t elements) const {
    return has_whole_vectors<kCount>(grad_output, elements) && has_whole_vectors<kCount>(offsets, elements);
  }
  __device__ Accumulate<T> factor(const Pool2dGeometry&, int, int) const { return 1; }

  const T* grad_output;
  const uint8_t* offsets;
  T* grad_input;
};

// An offset is a byte.
bool accepts(const Pool2dShape& s) { return suits_pool_strips(s) && s.kernel_h * s.kernel_w <= 256; }

void run_forward(const Pool2dShape& s, const Pool2dBuffers& b, cudaStream_t stream) {
  with_element_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    const MaxForward<T> op{static_cast<T*>(b.output), static_cast<uint8_t*>(b.offsets), b.relu};
    run_pool_forward(op, s, static_cast<const T*>(b.input), stream);
  });
}

// Where more windows cover an input, threads of one channel: there are more of them.
constexpr int64_t kMostChunkTaps = 5;

template <class Op>
void run_backward_of(const Op& op, const Pool2dShape& s, cudaStream_t stream) {
  if (s.layout == Layout::nchw) {
    if (has_windows(s, 2, 2, 0)) return launch_pool_backward_strips<Op, 2, 0>(op, s, stream);
    if (has_windows(s, 3, 2, 0)) return launch_pool_backward_strips<Op, 3, 0>(op, s, stream);
    if (has_windows(s, 3, 2, 1)) return launch_pool_backward_strips<Op, 3, 1>(op, s, stream);
  }
  constexpr int kVector = kChunk<typename Op::T>;
  const bool has_chunks = has_channel_vectors<kVector>(op, s);
  if (s.layout == Layout::nhwc) {
    if (has_windows(s, 2, 2, s.pad_left)) {
      return (has_chunks ? launch_pool_backward_blocks<Op, 2, kVector> : launch_pool_backward_blocks<Op, 2, 1>)(op, s, stream);
    }
    if (has_windows(s, 3, 2, s.pad_left)) {
      return (has_chunks ? launch_pool_backward_blocks<Op, 3, kVector> : launch_pool_backward_blocks<Op, 3, 1>)(op, s, stream);
    }
  }
  (has_chunks && s.kernel_w <= kMostChunkTaps ? launch_pool_backward_pixels<Op, kVector, 0>
                                              : launch_pool_backward_pixels<Op, 1, 0>)(op, s, stream);
}

void run_backward(const Pool2dShape& s, const Pool2dBuffers& b, cudaStream_t stream) {
  with_element_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    run_backward_of(
        MaxBackward<T>{static_cast<const T*>(b.grad_output), static_cast<const uint8_t*>(b.offsets), static_cast<T*>(b.grad_input)}, s,
        stream);
  });
}

}  // namespace

extern const Pool2dKernel max_pool2d_forward_strips_sm80 = {
    "max_pool2d_forward_strips_sm80", 80, Pool2dOp::max, Pool2dDirection::forward, accepts, plan_pool_outputs, run_forward};
extern const Pool2dKernel max_pool2d_backward_strips_sm80 = {
    "max_pool2d_backward_strips_sm80", 80, Pool2dOp::max, Pool2dDirection::backward, accepts, plan_pool_inputs, run_backward};

}  // namespace cnn_ext::cuda
