// Average pooling: sums down the columns of a window first, then along its row of column sums, then one division.
//
// nchw: the column sums of one row of outputs go to a scratch row in L1, padded with zeros, so that the sums along the row need no borders.
// They are shared by all windows of the row, and the rows of the input are read in order. Along the row a vector holds neighbouring
// outputs; where windows are wide (7 and more) and far apart, as in global pooling, it holds neighbouring columns of one window instead.
//
// nhwc: a vector holds neighbouring channels of one output, four of them at a time to hide the latency of the additions; each row of a
// window is summed by itself first.
//
// Without AVX-512 windows are read in the order of memory where they can be, since those processors do not fetch ahead down columns, or
// some of each pixel's channels: a plane that is one window is summed as a run (nchw), and up to 12 vectors of a pixel are taken at a time
// (nhwc).
//
// Every output is added up in the same order wherever its window lies: borders add zeros or nothing.
#include "cpu/kernels/avg_pool2d.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

template <class T>
struct Scratch {
  T* column_divisors;
  T* column_sums;  // nchw: one row per worker
  int64_t column_sums_size;
};

// Columns of the padded input that some window of a row reads.
int64_t span_of(const Pool2dShape& s) { return (s.out_w - 1) * s.stride_w + (s.kernel_w - 1) * s.dilation_w + 1; }

template <class T>
Scratch<T> carve_scratch(const Pool2dShape& s, Carver& carver, int threads) {
  Scratch<T> scratch;
  scratch.column_divisors = carve_column_divisors<T>(s, 1, carver);
  const int64_t whole_vectors = ceil_div(s.out_w, kLanes<T>) * kLanes<T> * s.stride_w + (s.kernel_w - 1) * s.dilation_w;
  scratch.column_sums_size = s.layout == Layout::nchw ? larger(whole_vectors, s.pad_left + s.in_w) + 2 * kLanes<T> : 0;
  scratch.column_sums = carver.take<T>(scratch.column_sums_size * threads);
  return scratch;
}

// sums[i * lanes ...] = the sum of the rows at `row` for kVectors vectors of columns.
template <class T, int kVectors>
void sum_columns(const T* row, int64_t rows, int64_t row_stride, T* sums, LaneSet last_lanes) {
  const LaneSet all = first_lanes<T>(kLanes<T>);
  Vec<T> sum[kVectors] = {};
  for (int64_t r = 0; r < rows; ++r, row += row_stride) {
    for (int i = 0; i < kVectors; ++i) sum[i] += load_lanes(row + i * kLanes<T>, i + 1 < kVectors ? all : last_lanes, Vec<T>{});
  }
  for (int i = 0; i < kVectors; ++i) store(sums + i * kLanes<T>, sum[i]);
}

template <class T>
void sum_columns_of_row(const Pool2dShape& s, const T* plane, int64_t oh, T* sums) {
  constexpr int kVectors = 4;  // independent additions, as many as their latency in cycles
  const int64_t top = oh * s.stride_h - s.pad_top;
  const Taps rows = taps_inside(top, s.kernel_h, s.dilation_h, s.in_h);
  const int64_t count = larger(0, rows.last - rows.first), row_stride = s.dilation_h * s.in_w;
  const T* row = plane + (count > 0 ? (top + rows.first * s.dilation_h) * s.in_w : 0);
  const int64_t columns = smaller(s.in_w, span_of(s) - s.pad_left);
  int64_t c = 0;
  for (; c + kVectors * kLanes<T> <= columns; c += kVectors * kLanes<T>) {
    sum_columns<T, kVectors>(row + c, count, row_stride, sums + c, first_lanes<T>(kLanes<T>));
  }
  for (; c + kLanes<T> < columns; c += 2 * kLanes<T>) {
    sum_columns<T, 2>(row + c, count, row_stride, sums + c, first_lanes<T>(columns - c - kLanes<T>));
  }
  for (; c < columns; c += kLanes<T>) sum_columns<T, 1>(row + c, count, row_stride, sums + c, first_lanes<T>(columns - c));
}

// kStride: 1, 2, or 0 for any other.
template <class T, int kStride>
Vec<T> sum_windows(const Pool2dShape& s, const T* sums, LaneSet outputs) {
  Vec<T> total{};
  int64_t k = 0;
  if constexpr (kStride == 2) {
    for (; s.dilation_w == 1 && k + 1 < s.kernel_w; k += 2) {
      const Vec<T> lower = load(sums + k), upper = load(sums + k + kLanes<T>);
      total += even_lanes<T>(lower, upper);
      total += odd_lanes<T>(lower, upper);
    }
  }
  for (; k < s.kernel_w; ++k) {
    const T* p = sums + k * s.dilation_w;
    if constexpr (kStride == 1) total += load(p);
    if constexpr (kStride == 2) total += even_lanes<T>(load(p), load(p + kLanes<T>));
    if constexpr (kStride == 0) total += load_strided(p, s.stride_w, outputs, Vec<T>{});
  }
  return total;
}

template <class T, int kStride>
void average_row(const Pool2dShape& s, const T* column_divisors, const T* sums, Vec<T> row_divisor, T* output) {
  for (int64_t ow = 0; ow < s.out_w; ow += kLanes<T>) {
    const LaneSet outputs = first_lanes<T>(s.out_w - ow);
    const Vec<T> total = sum_windows<T, kStride>(s, sums + ow * s.stride_w, outputs);
    store_lanes(output + ow, total / (row_divisor * load(column_divisors + ow)), outputs);
  }
}

// Whether a vector along the window serves better than one along the outputs.
bool has_wide_windows(const Pool2dShape& s) { return s.dilation_w == 1 && s.kernel_w >= 7 && (s.stride_w > 2 || s.out_w < s.kernel_w); }

template <class T>
T sum_lanes(Vec<T> v) {
  for (int half = kLanes<T> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  }
  return v[0];
}

template <class T>
void average_row_of_wide_windows(const Pool2dShape& s, const T* column_divisors, const T* sums, T row_divisor, T* output) {
  for (int64_t ow = 0; ow < s.out_w; ++ow) {
    Vec<T> total{};
    for (int64_t k = 0; k < s.kernel_w; k += kLanes<T>) {
      total += load_lanes(sums + ow * s.stride_w + k, first_lanes<T>(s.kernel_w - k), Vec<T>{});
    }
    output[ow] = sum_lanes<T>(total) / (row_divisor * column_divisors[ow]);
  }
}

template <class T>
void forward_row_nchw(const Pool2dShape& s, const T* column_divisors, T* sums, const T* plane, int64_t oh, T* output) {
  sum_columns_of_row(s, plane, oh, sums + s.pad_left);
  const T divisor = static_cast<T>(row_divisor(s, oh));
  if (has_wide_windows(s)) return average_row_of_wide_windows(s, column_divisors, sums, divisor, output);
  if (s.stride_w == 1) return average_row<T, 1>(s, column_divisors, sums, broadcast(divisor), output);
  if (s.stride_w == 2) return average_row<T, 2>(s, column_divisors, sums, broadcast(divisor), output);
  average_row<T, 0>(s, column_divisors, sums, broadcast(divisor), output);
}

// Whether windows are read in the order of memory (above), and from how many columns on in nhwc: of narrower ones the totals, which leave
// the registers for each row, take longer than what is gained.
constexpr bool kReadsInOrder = kVectorBytes < 64;
constexpr int64_t kWideWindow = 7;

template <class T>
T sum_run(const T* p, int64_t count) {
  constexpr int kVectors = 8;  // independent additions
  Vec<T> sum[kVectors] = {};
  int64_t i = 0;
  for (; i + kVectors * kLanes<T> <= count; i += kVectors * kLanes<T>) {
    for (int v = 0; v < kVectors; ++v) sum[v] += load(p + i + v * kLanes<T>);
  }
  for (; i < count; i += kLanes<T>) sum[0] += load_lanes(p + i, first_lanes<T>(count - i), Vec<T>{});
  for (int half = kVectors / 2; half > 0; half /= 2) {
    for (int v = 0; v < half; ++v) sum[v] += sum[v + half];
  }
  return sum_lanes<T>(sum[0]);
}

// kVectors neighbouring vectors of channels of one output; `lanes` are those of the last of them. window: the channels' values at the first
// tap.
template <class T, int kVectors>
void average_channels(const Pool2dShape& s, const T* window, int64_t rows, int64_t columns, T divisor, T* output, LaneSet lanes) {
  constexpr int64_t kPixelsAhead = 8;  // of some of their channels: strided reads
  constexpr int kVectorsOfLine = 64 / kVectorBytes;
  const LaneSet all = first_lanes<T>(kLanes<T>);
  Vec<T> total[kVectors] = {};
  for (int64_t r = 0; r < rows; ++r) {
    const T* pixel = window + r * s.dilation_h * s.in_w * s.channels;
    Vec<T> sum[kVectors] = {};
    for (int64_t k = 0; k < columns; ++k, pixel += s.dilation_w * s.channels) {
      for (int i = 0; i < kVectors; ++i) {
        if (i % kVectorsOfLine == 0) fetch_to_read(pixel + i * kLanes<T> + kPixelsAhead * s.channels);
        sum[i] += load_lanes(pixel + i * kLanes<T>, i + 1 < kVectors ? all : lanes, Vec<T>{});
      }
    }
    for (int i = 0; i < kVectors; ++i) total[i] += sum[i];
  }
  for (int i = 0; i < kVectors; ++i) store_lanes(output + i * kLanes<T>, total[i] / broadcast(divisor), i + 1 < kVectors ? all : lanes);
}

// The same for whole vectors, whose sums stay in registers along a row: the totals leave them.
template <class T, int kVectors>
void average_many_channels(const Pool2dShape& s, const T* window, int64_t rows, int64_t columns, T divisor, T* output) {
  constexpr int64_t kPixelsAhead = 8;
  constexpr int kVectorsOfLine = 64 / kVectorBytes;
  Vec<T> total[kVectors] = {};
  for (int64_t r = 0; r < rows; ++r) {
    const T* pixel = window + r * s.dilation_h * s.in_w * s.channels;
    Vec<T> sum[kVectors] = {};
    for (int64_t k = 0; k < columns; ++k, pixel += s.dilation_w * s.channels) {
#pragma GCC unroll 12
      for (int i = 0; i < kVectors; ++i) {
        if (i % kVectorsOfLine == 0) fetch_to_read(pixel + i * kLanes<T> + kPixelsAhead * s.channels);
        sum[i] += load(pixel + i * kLanes<T>);
      }
    }
    for (int i = 0; i < kVectors; ++i) total[i] += sum[i];
  }
  for (int i = 0; i < kVectors; ++i) store(output + i * kLanes<T>, total[i] / broadcast(divisor));
}

// The channels [channel, last_channel) of one row of outputs of one image.
template <class T>
void forward_row_nhwc(const Pool2dShape& s, const T* column_divisors, const T* image, int64_t oh, T* output, int64_t channel,
                      int64_t last_channel) {
  constexpr int kVectors = 4;
  const int64_t top = oh * s.stride_h - s.pad_top;
  const Taps rows = taps_inside(top, s.kernel_h, s.dilation_h, s.in_h);
  const T row_taps = static_cast<T>(row_divisor(s, oh));
  for (int64_t ow = 0; ow < s.out_w; ++ow, output += s.channels) {
    const int64_t left = ow * s.stride_w - s.pad_left;
    const Taps columns = taps_inside(left, s.kernel_w, s.dilation_w, s.in_w);
    const int64_t row_count = columns.empty() ? 0 : rows.last - rows.first, column_count = columns.last - columns.first;
    const T* window = image + ((top + rows.first * s.dilation_h) * s.in_w + left + columns.first * s.dilation_w) * s.channels;
    const T divisor = row_taps * column_divisors[ow];
    int64_t c = channel;
    if constexpr (kReadsInOrder) {
      const auto take = [&](auto average, int64_t vectors) {
        for (; c + vectors * kLanes<T> <= last_channel; c += vectors * kLanes<T>) {
          average(s, window + c, row_count, column_count, divisor, output + c);
        }
      };
      if (s.kernel_w >= kWideWindow) {
        take(average_many_channels<T, 12>, 12);
        take(average_many_channels<T, 8>, 8);
      }
    }
    for (; c + kVectors * kLanes<T> <= last_channel; c += kVectors * kLanes<T>) {
      average_channels<T, kVectors>(s, window + c, row_count, column_count, divisor, output + c, first_lanes<T>(kLanes<T>));
    }
    for (; c + kLanes<T> < last_channel; c += 2 * kLanes<T>) {
      average_channels<T, 2>(s, window + c, row_count, column_count, divisor, output + c, first_lanes<T>(last_channel - c - kLanes<T>));
    }
    if (c < last_channel) {
      average_channels<T, 1>(s, window + c, row_count, column_count, divisor, output + c, first_lanes<T>(last_channel - c));
    }
  }
}

// The planes [plane, last) of nchw, each of them one window.
template <class T>
void average_planes(const Pool2dShape& s, const T* input, int64_t plane, int64_t last, T* output) {
  const T divisor = global_divisor<T>(s);
  const int64_t size = s.in_h * s.in_w;
  for (; plane < last; ++plane) output[plane] = sum_run(input + plane * size, size) / divisor;
}

template <class T>
Split split_of(const Pool2dShape& s, int threads) {
  return split_rows(s, s.out_h, larger(smaller(s.stride_h, s.kernel_h) * s.in_w, s.out_w) * pixel_of(s), kLanes<T>, threads);
}

bool is_empty_row(const Pool2dShape& s, int64_t oh) {
  return taps_inside(oh * s.stride_h - s.pad_top, s.kernel_h, s.dilation_h, s.in_h).empty();
}

// The average of an empty window is 0, whatever the sign of an override.
template <class T>
void write_zeros(const Pool2dShape& s, T* output, int64_t channel, int64_t last_channel) {
  if (s.layout == Layout::nchw) channel = 0, last_channel = 1;
  for (int64_t ow = 0; ow < s.out_w; ++ow) {
    for (int64_t c = channel; c < last_channel; ++c) output[ow * pixel_of(s) + c] = T{0};
  }
}

template <class T>
void forward_global(const Pool2dShape& s, const Pool2dBuffers& b, int threads) {
  for_each_task(s, split_of<T>(s, threads), threads, [&](int, int64_t plane, int64_t last, int64_t, int64_t) {
    average_planes(s, static_cast<const T*>(b.input), plane, last, static_cast<T*>(b.output));
  });
}

template <class T>
void forward(const Pool2dShape& s, const Pool2dBuffers& b, void* workspace, int threads) {
  if constexpr (kReadsInOrder) {
    if (is_global(s)) return forward_global<T>(s, b, threads);
  }
  Carver carver(workspace);
  const Scratch<T> scratch = carve_scratch<T>(s, carver, threads);
  fill_column_divisors(s, 1, scratch.column_divisors);
  const int64_t plane_elements = s.in_h * s.in_w * pixel_of(s), row_elements = s.out_w * pixel_of(s);
  for_each_task(s, split_of<T>(s, threads), threads, [&](int worker, int64_t row, int64_t last_row, int64_t channel, int64_t last_channel) {
    T* sums = scratch.column_sums + worker * scratch.column_sums_size;
    for (int64_t i = 0; i < scratch.column_sums_size; ++i) sums[i] = T{0};
    for (; row < last_row; ++row) {
      const T* plane = static_cast<const T*>(b.input) + row / s.out_h * plane_elements;
      T* output = static_cast<T*>(b.output) + row * row_elements;
      if (is_empty_row(s, row % s.out_h)) {
        write_zeros(s, output, channel, last_channel);
      } else if (s.layout == Layout::nchw) {
        forward_row_nchw(s, scratch.column_divisors, sums, plane, row % s.out_h, output);
      } else {
        forward_row_nhwc(s, scratch.column_divisors, plane, row % s.out_h, output, channel, last_channel);
      }
    }
  });
}

template <class T>
Plan plan_for(const Pool2dShape& s, int threads) {
  Carver carver(nullptr);
  carve_scratch<T>(s, carver, threads);
  const bool nchw = s.layout == Layout::nchw;
  return {nchw ? 1 : kLanes<T>, nchw ? kLanes<T> : 1, split_of<T>(s, threads).tasks, carver.used()};
}

Plan plan(const Pool2dShape& s, int threads) {
  return s.dtype == DType::float32 ? plan_for<float>(s, threads) : plan_for<double>(s, threads);
}

void run(const Pool2dShape& s, const Pool2dBuffers& b, void* workspace, int threads) {
  s.dtype == DType::float32 ? forward<float>(s, b, workspace, threads) : forward<double>(s, b, workspace, threads);
}

}  // namespace

extern const Pool2dKernel avg_pool2d_forward_direct = {CNN_EXT_KERNEL_NAME("avg_pool2d_forward_direct"),
                                                       Isa::CNN_EXT_ISA,
                                                       Pool2dOp::avg,
                                                       Pool2dDirection::forward,
                                                       accepts_float_and_double,
                                                       plan,
                                                       run};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
