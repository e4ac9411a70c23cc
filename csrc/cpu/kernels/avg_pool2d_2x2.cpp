// Average pooling of 2x2 windows with stride 2, nchw, no window over the border: each input is loaded once and each element of grad_input
// written once. pool2d_2x2.inl says how outputs lie in vectors.
//
// forward: the sum of each row's two columns, then of the two rows, then one division.
//
// backward: a tile's shares (grad_output / divisor) are spread over the four inputs of each output.
//
// Divisions by a power of two, as without an override, are exact products.
#include "cpu/kernels/pool2d_2x2.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

// All windows are inside the input: 4 taps each, with or without the padding counted.
template <class T>
class Divisor {
 public:
  explicit Divisor(const Pool2dShape& s) {
    const int64_t divisor = s.divisor_override != 0 ? s.divisor_override : 4;
    const int64_t magnitude = divisor < 0 ? -divisor : divisor;
    divisor_ = broadcast(static_cast<T>(divisor));
    reciprocal_ = broadcast(T{1} / static_cast<T>(divisor));
    is_exact_ = (magnitude & (magnitude - 1)) == 0;
  }
  Vec<T> divide(Vec<T> v) const { return is_exact_ ? v * reciprocal_ : v / divisor_; }

 private:
  Vec<T> divisor_, reciprocal_;
  bool is_exact_;
};

// The sums of neighbouring columns of the 2 * lanes elements of a, then b.
template <class T>
Vec<T> sum_columns(Vec<T> a, Vec<T> b) {
  return even_lanes<T>(a, b) + odd_lanes<T>(a, b);
}

template <class T>
void forward_packed(const Pool2dShape& s, const T* input, T* output, int64_t row, int64_t last_row) {
  const Packing<T> packing(s);
  const Divisor<T> divisor(s);
  for_each_packed_tile<T>(s, packing.rows, row, last_row, [&](int64_t in, int64_t out, const PackedLanes<T>& lanes) {
    Vec<T> v[4];
    for (int i = 0; i < 4; ++i) v[i] = load_lanes(input + in + i * kLanes<T>, lanes.inputs[i], Vec<T>{});
    const Vec<T> first = sum_columns<T>(v[0], v[1]), second = sum_columns<T>(v[2], v[3]);
    const Vec<T> sum = pick<T>(first, second, packing.upper) + pick<T>(first, second, packing.lower);
    store_lanes(output + out, divisor.divide(sum), lanes.outputs);
  });
}

template <class T>
void forward_narrow(const Pool2dShape& s, const T* input, T* output, int64_t row, int64_t last_row) {
  const Divisor<T> divisor(s);
  const LaneSet outputs = first_lanes<T>(s.out_w);
  for_each_narrow_tile(s, row, last_row, [&](int64_t in, int64_t out) {
    const NarrowInputs<T> v(input + in, s.out_w);
    store_lanes(output + out, divisor.divide(sum_columns<T>(v.upper[0], v.upper[1]) + sum_columns<T>(v.lower[0], v.lower[1])), outputs);
  });
}

template <class T>
void forward_wide(const Pool2dShape& s, const T* input, T* output, int64_t row, int64_t last_row) {
  const Divisor<T> divisor(s);
  for_each_wide_tile<T>(s, row, last_row, [&](int64_t in, int64_t out) {
    const T *upper = input + in, *lower = upper + s.in_w;
    if constexpr (kFetchesReads) fetch_rows(upper, lower);
    const Vec<T> sum = sum_columns<T>(load(upper), load(upper + kLanes<T>)) + sum_columns<T>(load(lower), load(lower + kLanes<T>));
    store(output + out, divisor.divide(sum));
  });
}

template <class T>
void forward(const Pool2dShape& s, const Pool2dBuffers& b, int threads) {
  for_each_task(s, split_2x2<T>(s, threads), threads, [&](int, int64_t row, int64_t last_row, int64_t, int64_t) {
    const auto rows = has_narrow_rows<T>(s) ? forward_narrow<T> : packs_rows<T>(s) ? forward_packed<T> : forward_wide<T>;
    rows(s, static_cast<const T*>(b.input), static_cast<T*>(b.output), row, last_row);
  });
}

template <class T>
void backward_packed(const Pool2dShape& s, const T* grad_output, T* grad_input, int64_t row, int64_t last_row) {
  const Packing<T> packing(s);
  const Divisor<T> divisor(s);
  for_each_packed_tile<T>(s, packing.rows, row, last_row, [&](int64_t in, int64_t out, const PackedLanes<T>& lanes) {
    const Vec<T> share = divisor.divide(load_lanes(grad_output + out, lanes.outputs, Vec<T>{}));
    for (int half = 0; half < 2; ++half) {
      const Vec<T> shares = pick<T>(share, packing.output[half]);
      T* pixels = grad_input + in + 2 * half * kLanes<T>;
      store_in_stream(pixels, interleave_lower<T>(shares, shares), lanes.inputs[2 * half]);
      store_in_stream(pixels + kLanes<T>, interleave_upper<T>(shares, shares), lanes.inputs[2 * half + 1]);
    }
  });
}

template <class T>
void backward_narrow(const Pool2dShape& s, const T* grad_output, T* grad_input, int64_t row, int64_t last_row) {
  const Divisor<T> divisor(s);
  const LaneSet outputs = first_lanes<T>(s.out_w);
  for_each_narrow_tile(s, row, last_row, [&](int64_t in, int64_t out) {
    const Vec<T> share = divisor.divide(load_lanes(grad_output + out, outputs, Vec<T>{}));
    const Vec<T> first = interleave_lower<T>(share, share), second = interleave_upper<T>(share, share);
    store_narrow(grad_input + in, s.out_w, first, second, first, second);
  });
}

template <class T>
void backward_wide(const Pool2dShape& s, const T* grad_output, T* grad_input, int64_t row, int64_t last_row) {
  const Divisor<T> divisor(s);
  for_each_wide_tile<T>(s, row, last_row, [&](int64_t in, int64_t out) {
    const Vec<T> share = divisor.divide(load(grad_output + out));
    const Vec<T> first = interleave_lower<T>(share, share), second = interleave_upper<T>(share, share);
    for (int r = 0; r < 2; ++r) {
      store_in_stream(grad_input + in + r * s.in_w, first);
      store_in_stream(grad_input + in + r * s.in_w + kLanes<T>, second);
    }
  });
}

template <class T>
void backward(const Pool2dShape& s, const Pool2dBuffers& b, int threads) {
  for_each_task(s, split_2x2<T>(s, threads), threads, [&](int, int64_t row, int64_t last_row, int64_t, int64_t) {
    T* grad_input = static_cast<T*>(b.grad_input);
    const auto rows = has_narrow_rows<T>(s) ? backward_narrow<T> : packs_rows<T>(s) ? backward_packed<T> : backward_wide<T>;
    rows(s, static_cast<const T*>(b.grad_output), grad_input, row, last_row);
    clear_uncovered(s, row, last_row, grad_input);
  });
}

void run_forward(const Pool2dShape& s, const Pool2dBuffers& b, void*, int threads) {
  (s.dtype == DType::float32 ? forward<float> : forward<double>)(s, b, threads);
}

void run_backward(const Pool2dShape& s, const Pool2dBuffers& b, void*, int threads) {
  (s.dtype == DType::float32 ? backward<float> : backward<double>)(s, b, threads);
}

}  // namespace

extern const Pool2dKernel avg_pool2d_forward_2x2 = {CNN_EXT_KERNEL_NAME("avg_pool2d_forward_2x2"),
                                                    Isa::CNN_EXT_ISA,
                                                    Pool2dOp::avg,
                                                    Pool2dDirection::forward,
                                                    accepts_2x2,
                                                    plan_2x2,
                                                    run_forward};

extern const Pool2dKernel avg_pool2d_backward_2x2 = {CNN_EXT_KERNEL_NAME("avg_pool2d_backward_2x2"),
                                                     Isa::CNN_EXT_ISA,
                                                     Pool2dOp::avg,
                                                     Pool2dDirection::backward,
                                                     accepts_2x2,
                                                     plan_2x2,
                                                     run_backward};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
