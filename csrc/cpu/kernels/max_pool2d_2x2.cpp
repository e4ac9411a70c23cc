// Max pooling of 2x2 windows with stride 2, nchw, no window over the border: each input is loaded once and each element of grad_input
// written once. pool2d_2x2.inl says how outputs lie in vectors.
//
// forward: the maximum of a row's two columns, then of the two rows: the order of the taps, so that the first of equal values wins.
//
// backward: a tile's gradients and offsets are loaded once for the four inputs of each output; a lane's gradient goes where its offset
// says.
#include "cpu/kernels/max_pool2d.inl"
#include "cpu/kernels/pool2d_2x2.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

template <class T>
IntVec<T> tap(int number) {
  return broadcast(static_cast<Int<T>>(number));
}

// The maxima of neighbouring columns of the 2 * lanes elements of a, then b.
template <class T, class Offset>
Best<T, Offset> best_of_columns(Vec<T> a, Vec<T> b) {
  Best<T, Offset> best{even_lanes<T>(a, b), {}};
  best.take(odd_lanes<T>(a, b), tap<T>(1));
  return best;
}

template <class T, class Offset>
Best<T, Offset> shuffle(const Best<T, Offset>& a, const Best<T, Offset>& b, IntVec<T> places) {
  Best<T, Offset> shuffled{pick<T>(a.value, b.value, places), {}};
  if constexpr (kTracksOffsets<Offset>) shuffled.offset = pick<Int<T>>(a.offset, b.offset, places);
  return shuffled;
}

template <class T, class Offset>
void forward_packed(const Pool2dShape& s, const T* input, T* output, Offset* offsets, int64_t row, int64_t last_row) {
  const Packing<T> packing(s);
  for_each_packed_tile<T>(s, packing.rows, row, last_row, [&](int64_t in, int64_t out, const PackedLanes<T>& lanes) {
    Vec<T> v[4];
    for (int i = 0; i < 4; ++i) v[i] = load_lanes(input + in + i * kLanes<T>, lanes.inputs[i], Vec<T>{});
    const auto first = best_of_columns<T, Offset>(v[0], v[1]), second = best_of_columns<T, Offset>(v[2], v[3]);
    auto best = shuffle(first, second, packing.upper);
    const auto lower = shuffle(first, second, packing.lower);
    best.take(lower.value, lower.offset + tap<T>(2));
    best.store_to(output + out, offsets + out, lanes.outputs);
  });
}

template <class T, class Offset>
void forward_narrow(const Pool2dShape& s, const T* input, T* output, Offset* offsets, int64_t row, int64_t last_row) {
  const LaneSet outputs = first_lanes<T>(s.out_w);
  for_each_narrow_tile(s, row, last_row, [&](int64_t in, int64_t out) {
    const NarrowInputs<T> v(input + in, s.out_w);
    auto best = best_of_columns<T, Offset>(v.upper[0], v.upper[1]);
    const auto below = best_of_columns<T, Offset>(v.lower[0], v.lower[1]);
    best.take(below.value, below.offset + tap<T>(2));
    best.store_to(output + out, offsets + out, outputs);
  });
}

template <class T, class Offset>
void forward_wide(const Pool2dShape& s, const T* input, T* output, Offset* offsets, int64_t row, int64_t last_row) {
  for_each_wide_tile<T>(s, row, last_row, [&](int64_t in, int64_t out) {
    const T *upper = input + in, *lower = upper + s.in_w;
    if constexpr (kFetchesReads) fetch_rows(upper, lower);
    auto best = best_of_columns<T, Offset>(load(upper), load(upper + kLanes<T>));
    const auto below = best_of_columns<T, Offset>(load(lower), load(lower + kLanes<T>));
    best.take(below.value, below.offset + tap<T>(2));
    best.store_to(output + out, offsets + out, first_lanes<T>(kLanes<T>));
  });
}

template <class T, class Offset>
void forward(const Pool2dShape& s, const Pool2dBuffers& b, int threads) {
  for_each_task(s, split_2x2<T>(s, threads), threads, [&](int, int64_t row, int64_t last_row, int64_t, int64_t) {
    if constexpr (kVectorBytes == 32) {
      if (has_narrow_rows<T>(s)) {
        return forward_narrow(s, static_cast<const T*>(b.input), static_cast<T*>(b.output), static_cast<Offset*>(b.offsets), row, last_row);
      }
    }
    (packs_rows<T>(s) ? forward_packed<T, Offset> : forward_wide<T, Offset>)(s, static_cast<const T*>(b.input), static_cast<T*>(b.output),
                                                                             static_cast<Offset*>(b.offsets), row, last_row);
  });
}

// The gradients whose offset is `tap`. Adding to 0 makes a 0.0 of a -0.0, as a sum does.
template <class T>
Vec<T> where_tap(IntVec<T> offsets, IntVec<T> tap, Vec<T> grad) {
  return Vec<T>{} + select(equal(offsets, tap), grad, Vec<T>{});
}

template <class T>
void backward_packed(const Pool2dShape& s, const T* grad_output, const uint8_t* offsets, T* grad_input, int64_t row, int64_t last_row) {
  const Packing<T> packing(s);
  for_each_packed_tile<T>(s, packing.rows, row, last_row, [&](int64_t in, int64_t out, const PackedLanes<T>& lanes) {
    const Vec<T> grad = load_lanes(grad_output + out, lanes.outputs, Vec<T>{});
    const IntVec<T> offset = load_offsets<T>(offsets + out, lanes.outputs);
    for (int half = 0; half < 2; ++half) {
      const Vec<T> grads = pick<T>(grad, packing.output[half]);
      const IntVec<T> left = pick<Int<T>>(offset, packing.output[half]) - packing.first_tap[half];
      const Vec<T> even = where_tap<T>(left, tap<T>(0), grads), odd = where_tap<T>(left, tap<T>(1), grads);
      T* pixels = grad_input + in + 2 * half * kLanes<T>;
      store_in_stream(pixels, interleave_lower<T>(even, odd), lanes.inputs[2 * half]);
      store_in_stream(pixels + kLanes<T>, interleave_upper<T>(even, odd), lanes.inputs[2 * half + 1]);
    }
  });
}

template <class T>
void backward_narrow(const Pool2dShape& s, const T* grad_output, const uint8_t* offsets, T* grad_input, int64_t row, int64_t last_row) {
  const LaneSet outputs = first_lanes<T>(s.out_w);
  for_each_narrow_tile(s, row, last_row, [&](int64_t in, int64_t out) {
    const Vec<T> grad = load_lanes(grad_output + out, outputs, Vec<T>{});
    const IntVec<T> offset = load_offsets<T>(offsets + out, outputs);
    Vec<T> v[4];
    for (int i = 0; i < 4; ++i) v[i] = where_tap<T>(offset, tap<T>(i), grad);
    store_narrow(grad_input + in, s.out_w, interleave_lower<T>(v[0], v[1]), interleave_upper<T>(v[0], v[1]),
                 interleave_lower<T>(v[2], v[3]), interleave_upper<T>(v[2], v[3]));
  });
}

template <class T>
void backward_wide(const Pool2dShape& s, const T* grad_output, const uint8_t* offsets, T* grad_input, int64_t row, int64_t last_row) {
  const LaneSet all = first_lanes<T>(kLanes<T>);
  for_each_wide_tile<T>(s, row, last_row, [&](int64_t in, int64_t out) {
    const Vec<T> grad = load(grad_output + out);
    const IntVec<T> offset = load_offsets<T>(offsets + out, all);
    for (int r = 0; r < 2; ++r) {
      const Vec<T> even = where_tap<T>(offset, tap<T>(2 * r), grad), odd = where_tap<T>(offset, tap<T>(2 * r + 1), grad);
      store_in_stream(grad_input + in + r * s.in_w, interleave_lower<T>(even, odd));
      store_in_stream(grad_input + in + r * s.in_w + kLanes<T>, interleave_upper<T>(even, odd));
    }
  });
}

template <class T>
void backward(const Pool2dShape& s, const Pool2dBuffers& b, int threads) {
  for_each_task(s, split_2x2<T>(s, threads), threads, [&](int, int64_t row, int64_t last_row, int64_t, int64_t) {
    T* grad_input = static_cast<T*>(b.grad_input);
    const T* grad_output = static_cast<const T*>(b.grad_output);
    const uint8_t* offsets = static_cast<const uint8_t*>(b.offsets);
    const auto rows = has_narrow_rows<T>(s) ? backward_narrow<T> : packs_rows<T>(s) ? backward_packed<T> : backward_wide<T>;
    rows(s, grad_output, offsets, grad_input, row, last_row);
    clear_uncovered(s, row, last_row, grad_input);
  });
}

template <class T>
void run_forward_for(const Pool2dShape& s, const Pool2dBuffers& b, int threads) {
  (b.offsets == nullptr ? forward<T, NoOffset> : forward<T, uint8_t>)(s, b, threads);
}

void run_forward(const Pool2dShape& s, const Pool2dBuffers& b, void*, int threads) {
  (s.dtype == DType::float32 ? run_forward_for<float> : run_forward_for<double>)(s, b, threads);
}

void run_backward(const Pool2dShape& s, const Pool2dBuffers& b, void*, int threads) {
  (s.dtype == DType::float32 ? backward<float> : backward<double>)(s, b, threads);
}

}  // namespace

extern const Pool2dKernel max_pool2d_forward_2x2 = {CNN_EXT_KERNEL_NAME("max_pool2d_forward_2x2"),
                                                    Isa::CNN_EXT_ISA,
                                                    Pool2dOp::max,
                                                    Pool2dDirection::forward,
                                                    accepts_2x2,
                                                    plan_2x2,
                                                    run_forward};

extern const Pool2dKernel max_pool2d_backward_2x2 = {CNN_EXT_KERNEL_NAME("max_pool2d_backward_2x2"),
                                                     Isa::CNN_EXT_ISA,
                                                     Pool2dOp::max,
                                                     Pool2dDirection::backward,
                                                     accepts_2x2,
                                                     plan_2x2,
                                                     run_backward};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
