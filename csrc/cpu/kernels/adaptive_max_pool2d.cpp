// Adaptive max pooling for every pair of sizes, with the index of each maximum: the first of equals, the last NaN.
//
// nchw: a window at least half a vector wide is read a vector of neighbouring columns at a time, each lane keeps its own best, and the
// lanes are compared at the end; a narrower one is read element by element, which would leave most lanes empty.
//
// nhwc: a vector holds neighbouring channels of one output, and beside it their indices, which float32 keeps in 32 bits.
#include "cpu/kernels/max_pool2d.inl"
#include "cpu/kernels/sized_pool2d.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

// A maximum so far and its place.
template <class T>
struct Maximum {
  T value;
  int64_t index;

  // Whether an element takes its place; of equals and of NaNs the index decides, so that the order of the comparisons does not.
  bool yields_to(T other, int64_t other_index) const {
    if (other != other) return value == value || other_index > index;
    return other > value || (other == value && other_index < index);
  }
  void take(T other, int64_t other_index) {
    if (!yields_to(other, other_index)) return;
    value = other;
    index = other_index;
  }
};

template <class T>
Maximum<T> maximum_of_narrow(const SizedPool2dShape& s, const T* plane, Window rows, Window columns) {
  Maximum<T> best{plane[rows.first * s.in_w + columns.first], rows.first * s.in_w + columns.first};
  for (int64_t r = rows.first; r < rows.last; ++r) {
    for (int64_t i = r * s.in_w + columns.first; i < r * s.in_w + columns.last; ++i) best.take(plane[i], i);
  }
  return best;
}

template <class T>
Maximum<T> maximum_of_wide(const SizedPool2dShape& s, const T* plane, Window rows, Window columns) {
  IntVec<T> lane{};
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = i;
  Best<T, int32_t> best;
  best.offset = lane + broadcast(static_cast<Int<T>>(rows.first * s.in_w + columns.first));
  for (int64_t r = rows.first; r < rows.last; ++r) {
    for (int64_t c = columns.first; c < columns.last; c += kLanes<T>) {
      const int64_t first = r * s.in_w + c;
      best.take(load_lanes(plane + first, first_lanes<T>(columns.last - c), broadcast(kLowest<T>)),
                lane + broadcast(static_cast<Int<T>>(first)));
    }
  }
  Maximum<T> maximum{best.value[0], best.offset[0]};
  for (int i = 1; i < kLanes<T> && i < columns.size(); ++i) maximum.take(best.value[i], best.offset[i]);
  return maximum;
}

template <class T>
void forward_row_nchw(const SizedPool2dShape& s, const T* plane, int64_t oh, T* output, int64_t* indices) {
  const Window rows = window_of(oh, s.in_h, s.out_h);
  for (int64_t ow = 0; ow < s.out_w; ++ow) {
    const Window columns = window_of(ow, s.in_w, s.out_w);
    const bool narrow = columns.size() < kLanes<T> / 2;
    const Maximum<T> maximum = (narrow ? maximum_of_narrow<T> : maximum_of_wide<T>)(s, plane, rows, columns);
    output[ow] = maximum.value;
    if (indices != nullptr) indices[ow] = maximum.index;
  }
}

template <class T>
void forward_row_nhwc(const SizedPool2dShape& s, const T* image, int64_t oh, T* output, int64_t* indices) {
  const Window rows = window_of(oh, s.in_h, s.out_h);
  for (int64_t ow = 0; ow < s.out_w; ++ow) {
    const Window columns = window_of(ow, s.in_w, s.out_w);
    for (int64_t c = 0; c < s.channels; c += kLanes<T>) {
      const LaneSet lanes = first_lanes<T>(s.channels - c);
      Best<T, int32_t> best;
      best.offset = broadcast(static_cast<Int<T>>(rows.first * s.in_w + columns.first));
      for (int64_t r = rows.first; r < rows.last; ++r) {
        for (int64_t i = r * s.in_w + columns.first; i < r * s.in_w + columns.last; ++i) {
          best.take(load_lanes(image + i * s.channels + c, lanes, Vec<T>{}), broadcast(static_cast<Int<T>>(i)));
        }
      }
      store_lanes(output + ow * s.channels + c, best.value, lanes);
      if (indices == nullptr) continue;
      for (int64_t i = 0; i < kLanes<T> && c + i < s.channels; ++i) indices[ow * s.channels + c + i] = best.offset[i];
    }
  }
}

template <class T>
void forward(const SizedPool2dShape& s, const SizedPool2dBuffers& b, int threads) {
  const int64_t in_row = s.in_w * pixel_of(s), out_row = s.out_w * pixel_of(s);
  for_each_row(row_tasks(s, s.out_h, in_row, threads), s.out_h, threads, [&](int, int64_t plane, int64_t oh) {
    const T* input = static_cast<const T*>(b.large) + plane * s.in_h * in_row;
    const int64_t first = (plane * s.out_h + oh) * out_row;
    int64_t* indices = b.indices == nullptr ? nullptr : b.indices + first;
    (s.layout == Layout::nchw ? forward_row_nchw<T> : forward_row_nhwc<T>)(s, input, oh, static_cast<T*>(b.small) + first, indices);
  });
}

bool accepts(const SizedPool2dShape& s) { return accepts_float_and_double(s) && s.in_h * s.in_w <= INT32_MAX; }

Plan plan(const SizedPool2dShape& s, int threads) {
  const int lanes = s.dtype == DType::float32 ? kLanes<float> : kLanes<double>;
  const bool nchw = s.layout == Layout::nchw;
  return {nchw ? 1 : lanes, nchw ? lanes : 1, row_tasks(s, s.out_h, s.in_w * pixel_of(s), threads).tasks, 0};
}

void run(const SizedPool2dShape& s, const SizedPool2dBuffers& b, void*, int threads) {
  (s.dtype == DType::float32 ? forward<float> : forward<double>)(s, b, threads);
}

}  // namespace

extern const SizedPool2dKernel adaptive_max_pool2d_forward_direct = {CNN_EXT_KERNEL_NAME("adaptive_max_pool2d_forward_direct"),
                                                                     Isa::CNN_EXT_ISA,
                                                                     SizedPool2dOp::adaptive_max,
                                                                     SizedPool2dDirection::forward,
                                                                     accepts,
                                                                     plan,
                                                                     run};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
