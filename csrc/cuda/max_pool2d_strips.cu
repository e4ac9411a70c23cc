// Max pooling at memory bandwidth (pooling_forward.cuh, pooling_backward.cuh). Ties go to the first tap, NaNs to the last one, in a row of
// a window as in the window; a window of -inf alone takes its first tap inside the input. A ReLU is applied to the maximum: it is
// monotonic.
//
// Not handled: dilation; windows of more than 256 taps.
#include "cuda/pooling_backward.cuh"
#include "cuda/pooling_forward.cuh"

namespace cnn_ext::cuda {
namespace {

template <class Acc>
struct Maximum {
  static constexpr bool kRepeats = true;
  Maximum() = default;
  __device__ explicit Maximum(int first_tap) : value(-INFINITY), tap(first_tap) {}
  __device__ Maximum(Acc first, int first_tap) : value(first), tap(first_tap) {}
  __device__ static Acc nothing() { return -INFINITY; }
  __device__ void take(Acc other, int other_tap) {
    const bool wins = static_cast<int>(other > value) | static_cast<int>(isnan(other));  // without a branch
    value = wins ? other : value;
    tap = wins ? other_tap : tap;
  }
  Acc value;
  int tap;
};

template <class Element>
struct MaxForward {
  using T = Element;
  using Part = Maximum<Accumulate<T>>;

  template <int kCount>
  bool is_whole(int64_t elements) const {
    return has_whole_vectors<kCount>(output, elements) && has_whole_vectors<kCount>(offsets, elements);
  }
  template <int kCount>
  __device__ void finish(const Pool2dGeometry&, int, int, int, Part (&)[kCount]) const {}
  template <int kCount>
  __device__ void write(int index, const Part (&parts)[kCount], int count, bool is_whole) const {
    Vector<T, kCount> values;
    Vector<uint8_t, kCount> taps;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const bool stops = relu && parts[i].value <= 0;
      values.element[i] = narrow<T>(stops ? Accumulate<T>{0} : parts[i].value);
      taps.element[i] = static_cast<uint8_t>(stops ? kNoGradient : parts[i].tap);
    }
    store_some(output + index, values, count, is_whole);
    if (offsets != nullptr) store_some(offsets + index, taps, count, is_whole);
  }

  T* output;
  uint8_t* offsets;  // null: not asked for
  bool relu;
};

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
  if (has_channel_chunks(op, s)) {
    if (has_windows(s, 2, 2, s.pad_left)) return launch_pool_backward_blocks<Op, 2>(op, s, stream);
    if (has_windows(s, 3, 2, s.pad_left)) return launch_pool_backward_blocks<Op, 3>(op, s, stream);
    if (s.kernel_w <= kMostChunkTaps) return launch_pool_backward_pixels<Op, kChunk<typename Op::T>, 0>(op, s, stream);
  }
  launch_pool_backward_pixels<Op, 1, 0>(op, s, stream);
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
