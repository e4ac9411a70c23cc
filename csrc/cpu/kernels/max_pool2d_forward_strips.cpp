// Max pooling of 2x2, 3x3 and 5x5 windows with stride 1 or 2 in nchw: a strip as wide as a vector of outputs is walked down the rows. The
// maxima of an input row stay in registers for the next window that meets the row; columns in order, then rows in order, is the order of
// the taps, so ties go to the first and NaNs to the last. Which lanes of a load are inside the input is the strip's, not the row's.
//
// Lanes outside load as -inf, and each lane's offset starts at its first tap inside the input: no -inf is greater, so a border can neither
// win nor claim the offset of an -inf inside.
//
// Planes are walked in blocks of rows, so that the strips beside find their rows in the first-level cache. A row narrower than a vector
// leaves lanes idle.
#include "cpu/kernels/max_pool2d.inl"
#include "cpu/simd/caches.h"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

constexpr int64_t kBlockBytes = kFirstCacheBytes / 2;  // of input rows

// A vector of outputs of a row: where its loads begin, with which lanes, and the first tap inside the input of each output.
template <class T, int kKernel, int kStride>
struct Strip {
  int64_t column;  // of the first lane's first tap
  LaneSet lanes[kKernel],
      lanes_2[(kKernel + 1) / 2];  // of the loads: one per tap; or for stride 2 a first one for each even tap, and a second one
  IntVec<T> first_tap;
  LaneSet outputs;

  Strip(const Pool2dShape& s, int64_t ow) : column(ow * kStride - s.pad_left), outputs(first_lanes<T>(s.out_w - ow)) {
    for (int k = 0; k < kKernel; ++k) lanes[k] = lanes_inside<T>(column + k, 1, s.in_w);
    for (int i = 0; 2 * i < kKernel; ++i) lanes_2[i] = lanes_inside<T>(column + 2 * i + kLanes<T>, 1, s.in_w);
    for (int j = 0; j < kLanes<T>; ++j) first_tap[j] = static_cast<Int<T>>(larger(0, -(column + j * kStride)));
  }
};

template <class T>
IntVec<T> number(int64_t n) {
  return broadcast(static_cast<Int<T>>(n));
}

template <class T, class Offset, int kKernel, int kStride>
Best<T, Offset> row_maxima(const Strip<T, kKernel, kStride>& strip, const T* row) {
  const Vec<T> outside = broadcast(kLowest<T>);
  Vec<T> taps[kKernel + 1];
#pragma GCC unroll 5
  for (int k = 0; k < kKernel; k += kStride) {
    const T* p = row + strip.column + k;
    taps[k] = load_lanes(p, strip.lanes[k], outside);
    if constexpr (kStride == 1) continue;
    const Vec<T> lower = taps[k], upper = load_lanes(p + kLanes<T>, strip.lanes_2[k / 2], outside);
    taps[k] = even_lanes<T>(lower, upper);
    taps[k + 1] = odd_lanes<T>(lower, upper);
  }
  Best<T, Offset> best{taps[0], strip.first_tap};
#pragma GCC unroll 5
  for (int k = 1; k < kKernel; ++k) best.take(taps[k], number<T>(k));
  return best;
}

// One strip of the rows [oh, last) of outputs of a plane; output and offsets point to the strip's first output of row oh.
template <class T, class Offset, int kKernel, int kStride>
void forward_strip(const Pool2dShape& s, const Strip<T, kKernel, kStride>& strip, const T* plane, int64_t oh, int64_t last, T* output,
                   Offset* offsets) {
  Best<T, Offset> rows[kKernel];
  [[maybe_unused]] const int64_t next_block = (last - oh) * kStride * s.in_w;
  for (bool shares = false; oh < last; ++oh, output += s.out_w, offsets += s.out_w, shares = true) {
    const int64_t top = oh * kStride - s.pad_top;
    const Taps inside = taps_inside(top, kKernel, 1, s.in_h);
#pragma GCC unroll 5
    for (int r = 0; r < kKernel; ++r) {
      if (shares && r + kStride < kKernel) {
        rows[r] = rows[r + kStride];
      } else if (r >= inside.first && r < inside.last) {
        if constexpr (kFetchesReads) fetch_to_read(plane + (top + r) * s.in_w + strip.column + next_block);
        rows[r] = row_maxima<T, Offset>(strip, plane + (top + r) * s.in_w);
      }
    }
    Best<T, Offset> best = rows[0];
#pragma GCC unroll 5
    for (int r = 0; r < kKernel; ++r) {
      if (r < inside.first || r >= inside.last) continue;
      const IntVec<T> offset = rows[r].offset + number<T>(r * kKernel);
      if (r == inside.first) {
        best = {rows[r].value, offset};
      } else {
        best.take(rows[r].value, offset);
      }
    }
    best.store_to(output, offsets, strip.outputs);
  }
}

Split split_of(const Pool2dShape& s, int threads) { return split_rows(s, s.out_h, larger(2 * s.stride_h * s.in_w, s.out_w), 1, threads); }

template <class T, class Offset, int kKernel, int kStride>
void forward(const Pool2dShape& s, const Pool2dBuffers& b, int threads) {
  const int64_t block = larger(4, kBlockBytes / (kStride * s.in_w * static_cast<int64_t>(sizeof(T))));
  for_each_task(s, split_of(s, threads), threads, [&](int, int64_t row, int64_t last_row, int64_t, int64_t) {
    while (row < last_row) {
      const int64_t plane = row / s.out_h, oh = row % s.out_h, last = smaller(smaller(s.out_h, oh + last_row - row), oh + block);
      for (int64_t ow = 0; ow < s.out_w; ow += kLanes<T>) {
        forward_strip<T, Offset>(s, Strip<T, kKernel, kStride>(s, ow), static_cast<const T*>(b.input) + plane * s.in_h * s.in_w, oh, last,
                                 static_cast<T*>(b.output) + row * s.out_w + ow, static_cast<Offset*>(b.offsets) + row * s.out_w + ow);
      }
      row += last - oh;
    }
  });
}

// The stride of an axis with one output says nothing.
bool has_stride(const Pool2dShape& s, int64_t stride) {
  return (s.stride_h == stride || s.out_h == 1) && (s.stride_w == stride || s.out_w == 1);
}

// No window may be empty.
bool accepts(const Pool2dShape& s) {
  const bool has_kernel = s.kernel_h == s.kernel_w && (s.kernel_h == 2 || s.kernel_h == 3 || s.kernel_h == 5);
  const bool is_dense = s.dilation_h == 1 && s.dilation_w == 1;
  const bool begins_inside = s.pad_top < s.kernel_h && s.pad_left < s.kernel_w;
  const bool ends_inside = (s.out_h - 1) * s.stride_h < s.in_h + s.pad_top && (s.out_w - 1) * s.stride_w < s.in_w + s.pad_left;
  return accepts_float_and_double(s) && s.layout == Layout::nchw && has_kernel && is_dense && begins_inside && ends_inside &&
         (has_stride(s, 1) || has_stride(s, 2));
}

Plan plan(const Pool2dShape& s, int threads) {
  return {1, s.dtype == DType::float32 ? kLanes<float> : kLanes<double>, split_of(s, threads).tasks, 0};
}

template <class T, int kKernel, int kStride>
void run_for(const Pool2dShape& s, const Pool2dBuffers& b, int threads) {
  (b.offsets == nullptr ? forward<T, NoOffset, kKernel, kStride> : forward<T, uint8_t, kKernel, kStride>)(s, b, threads);
}

template <class T, int kKernel>
void run_kernel(const Pool2dShape& s, const Pool2dBuffers& b, int threads) {
  (has_stride(s, 1) ? run_for<T, kKernel, 1> : run_for<T, kKernel, 2>)(s, b, threads);
}

template <class T>
void run_type(const Pool2dShape& s, const Pool2dBuffers& b, int threads) {
  if (s.kernel_h == 2) return run_kernel<T, 2>(s, b, threads);
  if (s.kernel_h == 3) return run_kernel<T, 3>(s, b, threads);
  run_kernel<T, 5>(s, b, threads);
}

void run(const Pool2dShape& s, const Pool2dBuffers& b, void*, int threads) {
  (s.dtype == DType::float32 ? run_type<float> : run_type<double>)(s, b, threads);
}

}  // namespace

extern const Pool2dKernel max_pool2d_forward_strips = {
    CNN_EXT_KERNEL_NAME("max_pool2d_forward_strips"), Isa::CNN_EXT_ISA, Pool2dOp::max, Pool2dDirection::forward, accepts, plan, run};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
