// Max pooling, tap by tap, with the best value and its offset side by side in registers.
//
// nchw: a vector holds neighbouring outputs of one row. A tap's values come from one masked load (stride 1), two and a shuffle (stride 2)
// or a strided load (other strides). Where each vector begins and which of its lanes are inside the input depends on the column alone: a
// call computes that once, and the loop over rows has neither border code nor scalar tails. Lanes outside load as -inf, and each lane's
// offset starts at its first tap inside the input: no -inf is greater, so a border can neither win nor claim the offset of an -inf inside.
//
// nhwc: a vector holds neighbouring channels of one output, up to four of them at a time (value and offset in 8 registers); windows are
// clipped, so every tap is inside.
//
// Windows that are wide and few leave most lanes of the nchw path idle.
#include "cpu/kernels/max_pool2d.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

// A tap of a vector of outputs: lane j reads column `column + j * stride_w`, if that is inside the input.
struct VectorTap {
  int64_t column;
  LaneSet lanes[2];  // of the one load, or of the two that stride 2 takes its even lanes from
};

// A vector of neighbouring outputs of a row.
template <class T>
struct VectorColumns {
  IntVec<T> first_tap;  // per lane, the first tap inside the input
  IntVec<T> any_tap;    // per lane, all ones if there is one, else 0
  LaneSet outputs;      // the lanes that are outputs
};

template <class T>
struct Tables {
  VectorColumns<T>* columns;  // [vectors]
  VectorTap* taps;            // [vectors, kernel_w]
};

template <class T>
Tables<T> carve_tables(const Pool2dShape& s, Carver& carver) {
  const int64_t vectors = s.layout == Layout::nchw ? ceil_div(s.out_w, kLanes<T>) : 0;
  Tables<T> t;
  t.columns = carver.take<VectorColumns<T>>(vectors);
  t.taps = carver.take<VectorTap>(vectors * s.kernel_w);
  return t;
}

template <class T>
VectorTap vector_tap(const Pool2dShape& s, int64_t column) {
  if (s.stride_w != 2) return {column, {lanes_inside<T>(column, s.stride_w, s.in_w), {}}};
  return {column, {lanes_inside<T>(column, 1, s.in_w), lanes_inside<T>(column + kLanes<T>, 1, s.in_w)}};
}

template <class T>
void fill_tables(const Pool2dShape& s, const Tables<T>& t) {
  for (int64_t v = 0; v * kLanes<T> < s.out_w; ++v) {
    VectorColumns<T>& columns = t.columns[v];
    columns.outputs = first_lanes<T>(s.out_w - v * kLanes<T>);
    const int64_t start = v * kLanes<T> * s.stride_w - s.pad_left;
    for (int j = 0; j < kLanes<T>; ++j) {
      const Taps taps = taps_inside(start + j * s.stride_w, s.kernel_w, s.dilation_w, s.in_w);
      columns.first_tap[j] = static_cast<Int<T>>(taps.first);
      columns.any_tap[j] = taps.empty() ? 0 : -1;
    }
    for (int64_t k = 0; k < s.kernel_w; ++k) t.taps[v * s.kernel_w + k] = vector_tap<T>(s, start + k * s.dilation_w);
  }
}

// kStride: 1, 2, or 0 for any other.
template <class T, int kStride>
Vec<T> load_tap(const T* row, const VectorTap& tap, int64_t stride) {
  const Vec<T> outside = broadcast(kLowest<T>);
  const T* p = row + tap.column;
  if constexpr (kStride == 1) return load_lanes(p, tap.lanes[0], outside);
  if constexpr (kStride == 2) {
    return even_lanes<T>(load_lanes(p, tap.lanes[0], outside), load_lanes(p + kLanes<T>, tap.lanes[1], outside));
  }
  return load_strided(p, stride, tap.lanes[0], outside);
}

// One row of outputs of one plane. kKernelW: 0 for any.
template <class T, class Offset, int kStride, int kKernelW>
void forward_row(const Pool2dShape& s, const Tables<T>& tables, const T* plane, int64_t oh, T* output, Offset* offsets) {
  const int64_t kernel_w = kKernelW != 0 ? kKernelW : s.kernel_w;
  const int64_t top = oh * s.stride_h - s.pad_top;
  const Taps rows = taps_inside(top, s.kernel_h, s.dilation_h, s.in_h);
  const VectorTap* taps = tables.taps;
  for (int64_t v = 0; v * kLanes<T> < s.out_w; ++v, taps += kernel_w) {
    const VectorColumns<T>& columns = tables.columns[v];
    Best<T, Offset> best;
    IntVec<T> offset = broadcast(static_cast<Int<T>>(rows.first * kernel_w));
    if (!rows.empty()) best.offset = columns.any_tap & (columns.first_tap + offset);
    for (int64_t r = rows.first; r < rows.last; ++r) {
      const T* row = plane + (top + r * s.dilation_h) * s.in_w;
      for (int64_t k = 0; k < kernel_w; ++k) {
        best.take(load_tap<T, kStride>(row, taps[k], s.stride_w), offset);
        offset += 1;
      }
    }
    best.store_to(output + v * kLanes<T>, offsets + v * kLanes<T>, columns.outputs);
  }
}

template <class T, class Offset, int kStride, int kKernelW>
void forward_nchw(const Pool2dShape& s, const Pool2dBuffers& b, const Tables<T>& tables, const Split& split, int threads) {
  for_each_task(s, split, threads, [&](int, int64_t row, int64_t last_row, int64_t, int64_t) {
    int64_t plane = row / s.out_h, oh = row % s.out_h;
    for (; row < last_row; ++row) {
      forward_row<T, Offset, kStride, kKernelW>(s, tables, static_cast<const T*>(b.input) + plane * s.in_h * s.in_w, oh,
                                                static_cast<T*>(b.output) + row * s.out_w, static_cast<Offset*>(b.offsets) + row * s.out_w);
      if (++oh == s.out_h) oh = 0, ++plane;
    }
  });
}

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

template <class T, class Offset>
void forward_nhwc(const Pool2dShape& s, const Pool2dBuffers& b, const Split& split, int threads) {
  for_each_task(s, split, threads, [&](int, int64_t row, int64_t last_row, int64_t channel, int64_t last_channel) {
    const int64_t row_elements = s.out_w * s.channels;
    for (; row < last_row; ++row) {
      const T* image = static_cast<const T*>(b.input) + row / s.out_h * s.in_h * s.in_w * s.channels;
      forward_row_nhwc(s, image, row % s.out_h, static_cast<T*>(b.output) + row * row_elements,
                       static_cast<Offset*>(b.offsets) + row * row_elements, channel, last_channel);
    }
  });
}

template <class T>
Split split_of(const Pool2dShape& s, int threads) {
  const int64_t reads = smaller(s.kernel_h * s.in_w, s.out_w * s.kernel_h * s.kernel_w);
  return split_rows(s, s.out_h, larger(reads, s.out_w) * pixel_of(s), kLanes<T>, threads);
}

template <class T, class Offset>
void forward(const Pool2dShape& s, const Pool2dBuffers& b, void* workspace, int threads) {
  const Split split = split_of<T>(s, threads);
  if (s.layout == Layout::nhwc) return forward_nhwc<T, Offset>(s, b, split, threads);
  Carver carver(workspace);
  const Tables<T> tables = carve_tables<T>(s, carver);
  fill_tables(s, tables);
  if (s.stride_w == 1) return forward_nchw<T, Offset, 1, 0>(s, b, tables, split, threads);
  if (s.stride_w == 2 && s.kernel_w == 2) return forward_nchw<T, Offset, 2, 2>(s, b, tables, split, threads);
  if (s.stride_w == 2 && s.kernel_w == 3) return forward_nchw<T, Offset, 2, 3>(s, b, tables, split, threads);
  if (s.stride_w == 2) return forward_nchw<T, Offset, 2, 0>(s, b, tables, split, threads);
  forward_nchw<T, Offset, 0, 0>(s, b, tables, split, threads);
}

template <class T>
Plan plan_for(const Pool2dShape& s, int threads) {
  Carver carver(nullptr);
  carve_tables<T>(s, carver);
  const bool nchw = s.layout == Layout::nchw;
  return {nchw ? 1 : kLanes<T>, nchw ? kLanes<T> : 1, split_of<T>(s, threads).tasks, carver.used()};
}

Plan plan(const Pool2dShape& s, int threads) {
  return s.dtype == DType::float32 ? plan_for<float>(s, threads) : plan_for<double>(s, threads);
}

template <class T>
void run_for(const Pool2dShape& s, const Pool2dBuffers& b, void* workspace, int threads) {
  if (b.offsets == nullptr) return forward<T, NoOffset>(s, b, workspace, threads);
  if (has_small_offsets(s)) return forward<T, uint8_t>(s, b, workspace, threads);
  forward<T, int32_t>(s, b, workspace, threads);
}

void run(const Pool2dShape& s, const Pool2dBuffers& b, void* workspace, int threads) {
  s.dtype == DType::float32 ? run_for<float>(s, b, workspace, threads) : run_for<double>(s, b, workspace, threads);
}

}  // namespace

extern const Pool2dKernel max_pool2d_forward_direct = {CNN_EXT_KERNEL_NAME("max_pool2d_forward_direct"),
                                                       Isa::CNN_EXT_ISA,
                                                       Pool2dOp::max,
                                                       Pool2dDirection::forward,
                                                       accepts_float_and_double,
                                                       plan,
                                                       run};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
