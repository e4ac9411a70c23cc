// Max pooling in nhwc, tap by tap, with the best value and its offset side by side in registers: a vector holds neighbouring channels of
// one output, up to four of them at a time (value and offset in 8 registers); windows are clipped, so every tap is inside.
#include "cpu/kernels/max_pool2d.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

// kVectors neighbouring vectors of channels of one output; `lanes` are those of the last of them. input: the channels' values at the
// image's pixel 0.
template <class T, class Offset, int kVectors>
void forward_channels(const Pool2dShape& s, const T* input, int64_t top, Taps rows, int64_t left, Taps columns, T* output, Offset* offsets,
                      LaneSet lanes) {
  const LaneSet all = first_lanes<T>(kLanes<T>);
  Best<T, Offset> best[kVectors];
  if (!rows.empty() && !columns.empty()) {
    for (auto& b : best) b.offset = broadcast(static_cast<Int<T>>(rows.first * s.kernel_w + columns.first));
  }
  for (int64_t r = rows.first; r < rows.last; ++r) {
    const T* row = input + ((top + r * s.dilation_h) * s.in_w + left) * s.channels;
    for (int64_t k = columns.first; k < columns.last; ++k) {
      const T* pixel = row + k * s.dilation_w * s.channels;
      const IntVec<T> offset = broadcast(static_cast<Int<T>>(r * s.kernel_w + k));
      for (int i = 0; i < kVectors; ++i) best[i].take(load_lanes(pixel + i * kLanes<T>, i + 1 < kVectors ? all : lanes, Vec<T>{}), offset);
    }
  }
  for (int i = 0; i < kVectors; ++i) best[i].store_to(output + i * kLanes<T>, offsets + i * kLanes<T>, i + 1 < kVectors ? all : lanes);
}

// The channels [channel, last_channel) of one row of outputs of one image.
template <class T, class Offset>
void forward_row_nhwc(const Pool2dShape& s, const T* image, int64_t oh, T* output, Offset* offsets, int64_t channel, int64_t last_channel) {
  constexpr int kVectors = 4;
  const int64_t top = oh * s.stride_h - s.pad_top;
  const Taps rows = taps_inside(top, s.kernel_h, s.dilation_h, s.in_h);
  for (int64_t ow = 0; ow < s.out_w; ++ow) {
    const int64_t left = ow * s.stride_w - s.pad_left;
    const Taps columns = taps_inside(left, s.kernel_w, s.dilation_w, s.in_w);
    T* out = output + ow * s.channels;
    Offset* offs = offsets + ow * s.channels;
    int64_t c = channel;
    for (; c + kVectors * kLanes<T> <= last_channel; c += kVectors * kLanes<T>) {
      forward_channels<T, Offset, kVectors>(s, image + c, top, rows, left, columns, out + c, offs + c, first_lanes<T>(kLanes<T>));
    }
    for (; c < last_channel; c += kLanes<T>) {
      forward_channels<T, Offset, 1>(s, image + c, top, rows, left, columns, out + c, offs + c, first_lanes<T>(last_channel - c));
    }
  }
}

template <class T>
Split split_of(const Pool2dShape& s, int threads) {
  const int64_t reads = smaller(s.kernel_h * s.in_w, s.out_w * s.kernel_h * s.kernel_w);
  return split_rows(s, s.out_h, larger(reads, s.out_w) * pixel_of(s), kLanes<T>, threads);
}

template <class T, class Offset>
void forward(const Pool2dShape& s, const Pool2dBuffers& b, int threads) {
  for_each_task(s, split_of<T>(s, threads), threads, [&](int, int64_t row, int64_t last_row, int64_t channel, int64_t last_channel) {
    const int64_t row_elements = s.out_w * s.channels;
    for (; row < last_row; ++row) {
      const T* image = static_cast<const T*>(b.input) + row / s.out_h * s.in_h * s.in_w * s.channels;
      forward_row_nhwc(s, image, row % s.out_h, static_cast<T*>(b.output) + row * row_elements,
                       static_cast<Offset*>(b.offsets) + row * row_elements, channel, last_channel);
    }
  });
}

bool accepts(const Pool2dShape& s) { return accepts_float_and_double(s) && s.layout == Layout::nhwc; }

template <class T>
Plan plan_for(const Pool2dShape& s, int threads) {
  return {kLanes<T>, 1, split_of<T>(s, threads).tasks, 0};
}

Plan plan(const Pool2dShape& s, int threads) {
  return s.dtype == DType::float32 ? plan_for<float>(s, threads) : plan_for<double>(s, threads);
}

template <class T>
void run_for(const Pool2dShape& s, const Pool2dBuffers& b, int threads) {
  if (b.offsets == nullptr) return forward<T, NoOffset>(s, b, threads);
  if (has_small_offsets(s)) return forward<T, uint8_t>(s, b, threads);
  forward<T, int32_t>(s, b, threads);
}

void run(const Pool2dShape& s, const Pool2dBuffers& b, void*, int threads) {
  s.dtype == DType::float32 ? run_for<float>(s, b, threads) : run_for<double>(s, b, threads);
}

}  // namespace

extern const Pool2dKernel max_pool2d_forward_direct = {
    CNN_EXT_KERNEL_NAME("max_pool2d_forward_direct"), Isa::CNN_EXT_ISA, Pool2dOp::max, Pool2dDirection::forward, accepts, plan, run};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
