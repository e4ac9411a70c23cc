// Gathers the input at given offsets: the derivative of max pooling's backward, so only double backward needs it. One look-up per output: a
// table turns an offset into a row and a column of the window, a load fetches the value. Offsets that point outside the input or the window
// (empty windows do) give 0.
#include "cpu/kernels/pool2d.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

// A tap's distance from the window's first, in rows and columns of the input.
struct Distance {
  int32_t rows, columns;
};

int64_t taps_of(const Pool2dShape& s) { return s.kernel_h * s.kernel_w; }

void fill_distances(const Pool2dShape& s, Distance* distances) {
  for (int64_t tap = 0; tap < taps_of(s); ++tap) {
    distances[tap] = {static_cast<int32_t>(tap / s.kernel_w * s.dilation_h), static_cast<int32_t>(tap % s.kernel_w * s.dilation_w)};
  }
}

bool is_inside(int64_t position, int64_t size) { return static_cast<uint64_t>(position) < static_cast<uint64_t>(size); }

// One row of outputs; `pixel` elements at each position (channels of nhwc, else 1).
template <class T, class Offset>
void gather_row(const Pool2dShape& s, const Distance* distances, const T* plane, const Offset* offsets, int64_t oh, T* output) {
  const int64_t pixel = pixel_of(s), taps = taps_of(s);
  for (int64_t ow = 0; ow < s.out_w; ++ow) {
    const int64_t top = oh * s.stride_h - s.pad_top, left = ow * s.stride_w - s.pad_left;
    for (int64_t c = 0; c < pixel; ++c) {
      const int64_t tap = offsets[ow * pixel + c];
      const Distance distance = is_inside(tap, taps) ? distances[tap] : Distance{INT32_MIN, INT32_MIN};
      const int64_t ih = top + distance.rows, iw = left + distance.columns;
      const bool inside = is_inside(ih, s.in_h) && is_inside(iw, s.in_w);
      output[ow * pixel + c] = inside ? plane[(ih * s.in_w + iw) * pixel + c] : T{0};
    }
  }
}

// Whole pixels per task, so that there is no cut through the channels.
Split split_of(const Pool2dShape& s, int threads) {
  return split_rows(s, s.out_h, 4 * s.out_w * pixel_of(s), static_cast<int>(s.channels), threads);
}

template <class T, class Offset>
void gather(const Pool2dShape& s, const Pool2dBuffers& b, void* workspace, int threads) {
  Distance* distances = static_cast<Distance*>(workspace);
  fill_distances(s, distances);
  const int64_t plane_elements = s.in_h * s.in_w * pixel_of(s), row_elements = s.out_w * pixel_of(s);
  for_each_task(s, split_of(s, threads), threads, [&](int, int64_t row, int64_t last_row, int64_t, int64_t) {
    for (; row < last_row; ++row) {
      gather_row(s, distances, static_cast<const T*>(b.input) + row / s.out_h * plane_elements,
                 static_cast<const Offset*>(b.offsets) + row * row_elements, row % s.out_h, static_cast<T*>(b.output) + row * row_elements);
    }
  });
}

Plan plan(const Pool2dShape& s, int threads) {
  return {1, 1, split_of(s, threads).tasks, static_cast<size_t>(taps_of(s)) * sizeof(Distance)};
}

void run(const Pool2dShape& s, const Pool2dBuffers& b, void* workspace, int threads) {
  if (s.dtype == DType::float32) {
    (has_small_offsets(s) ? gather<float, uint8_t> : gather<float, int32_t>)(s, b, workspace, threads);
  } else {
    (has_small_offsets(s) ? gather<double, uint8_t> : gather<double, int32_t>)(s, b, workspace, threads);
  }
}

}  // namespace

extern const Pool2dKernel max_pool2d_gather_direct = {CNN_EXT_KERNEL_NAME("max_pool2d_gather_direct"),
                                                      Isa::CNN_EXT_ISA,
                                                      Pool2dOp::max,
                                                      Pool2dDirection::gather,
                                                      accepts_float_and_double,
                                                      plan,
                                                      run};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
