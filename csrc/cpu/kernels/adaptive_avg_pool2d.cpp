// Adaptive average pooling, forward and backward, for every pair of sizes.
//
// nchw: one row at a time, in two steps through a row of scratch in L1: first down the columns, with neighbouring columns in the lanes,
// then along the row, one window after the other: neighbouring windows begin at no regular distance, so the second step is scalar. It reads
// each column once or twice.
//
// nhwc: a vector holds neighbouring channels of one pixel, and adds up each row of its window by itself first.
//
// Backward is the same with the sizes exchanged: the windows that cover an element are a window of the outputs. Their gradients are divided
// in the first step.
#include "cpu/kernels/sized_pool2d.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

int64_t whole_vectors(int64_t count, int lanes) { return (count + lanes - 1) / lanes * lanes; }

// The scratch: for backward the widths of the windows of a row of outputs, then a row of column sums per worker.
template <class T>
struct Scratch {
  Scratch(int64_t columns, int64_t widths_count, void* base)
      : row(whole_vectors(columns, kLanes<T>)), widths(static_cast<T*>(base)), sums(widths + whole_vectors(widths_count, kLanes<T>)) {}
  T* sums_of(int worker) const { return sums + worker * row; }
  int64_t row;
  T *widths, *sums;
};

template <class T>
void sum_columns(const T* plane, int64_t width, Window rows, T* sums) {
  for (int64_t c = 0; c < width; c += kLanes<T>) {
    const LaneSet lanes = first_lanes<T>(width - c);
    Vec<T> sum{};
    for (int64_t r = rows.first; r < rows.last; ++r) sum += load_lanes(plane + r * width + c, lanes, Vec<T>{});
    store(sums + c, sum);
  }
}

template <class T>
T sum_of(const T* values, Window w) {
  T sum{};
  for (int64_t i = w.first; i < w.last; ++i) sum += values[i];
  return sum;
}

template <class T>
void forward_row_nchw(const SizedPool2dShape& s, const T* plane, int64_t oh, T* sums, T* output) {
  const Window rows = window_of(oh, s.in_h, s.out_h);
  sum_columns(plane, s.in_w, rows, sums);
  for (int64_t ow = 0; ow < s.out_w; ++ow) {
    const Window columns = window_of(ow, s.in_w, s.out_w);
    output[ow] = sum_of(sums, columns) / static_cast<T>(rows.size() * columns.size());
  }
}

template <class T>
void forward_row_nhwc(const SizedPool2dShape& s, const T* image, int64_t oh, T* output) {
  const Window rows = window_of(oh, s.in_h, s.out_h);
  for (int64_t ow = 0; ow < s.out_w; ++ow) {
    const Window columns = window_of(ow, s.in_w, s.out_w);
    const Vec<T> divisor = broadcast(static_cast<T>(rows.size() * columns.size()));
    for (int64_t c = 0; c < s.channels; c += kLanes<T>) {
      const LaneSet lanes = first_lanes<T>(s.channels - c);
      Vec<T> total{};
      for (int64_t r = rows.first; r < rows.last; ++r) {
        Vec<T> sum{};
        for (int64_t k = columns.first; k < columns.last; ++k) {
          sum += load_lanes(image + (r * s.in_w + k) * s.channels + c, lanes, Vec<T>{});
        }
        total += sum;
      }
      store_lanes(output + ow * s.channels + c, total / divisor, lanes);
    }
  }
}

template <class T>
void forward(const SizedPool2dShape& s, const SizedPool2dBuffers& b, void* workspace, int threads) {
  const int64_t in_row = s.in_w * pixel_of(s), out_row = s.out_w * pixel_of(s);
  const Scratch<T> scratch(s.in_w, 0, workspace);
  for_each_row(row_tasks(s, s.out_h, in_row, threads), s.out_h, threads, [&](int worker, int64_t plane, int64_t oh) {
    const T* input = static_cast<const T*>(b.large) + plane * s.in_h * in_row;
    T* output = static_cast<T*>(b.small) + (plane * s.out_h + oh) * out_row;
    if (s.layout == Layout::nchw) {
      forward_row_nchw(s, input, oh, scratch.sums_of(worker), output);
    } else {
      forward_row_nhwc(s, input, oh, output);
    }
  });
}

template <class T>
void backward_row_nchw(const SizedPool2dShape& s, const T* grad_output, int64_t ih, const T* widths, T* sums, T* grad_input) {
  const Window rows = window_of(ih, s.out_h, s.in_h);
  for (int64_t c = 0; c < s.out_w; c += kLanes<T>) {
    const LaneSet lanes = first_lanes<T>(s.out_w - c);
    Vec<T> sum{};
    for (int64_t oh = rows.first; oh < rows.last; ++oh) {
      const Vec<T> divisor = broadcast(static_cast<T>(window_of(oh, s.in_h, s.out_h).size())) * load(widths + c);
      sum += load_lanes(grad_output + oh * s.out_w + c, lanes, Vec<T>{}) / divisor;
    }
    store(sums + c, sum);
  }
  for (int64_t iw = 0; iw < s.in_w; ++iw) grad_input[iw] = sum_of(sums, window_of(iw, s.out_w, s.in_w));
}

template <class T>
void backward_row_nhwc(const SizedPool2dShape& s, const T* grad_output, int64_t ih, const T* widths, T* grad_input) {
  const Window rows = window_of(ih, s.out_h, s.in_h);
  for (int64_t iw = 0; iw < s.in_w; ++iw) {
    const Window columns = window_of(iw, s.out_w, s.in_w);
    for (int64_t c = 0; c < s.channels; c += kLanes<T>) {
      const LaneSet lanes = first_lanes<T>(s.channels - c);
      Vec<T> sum{};
      for (int64_t oh = rows.first; oh < rows.last; ++oh) {
        const T height = static_cast<T>(window_of(oh, s.in_h, s.out_h).size());
        for (int64_t ow = columns.first; ow < columns.last; ++ow) {
          sum += load_lanes(grad_output + (oh * s.out_w + ow) * s.channels + c, lanes, Vec<T>{}) / broadcast(height * widths[ow]);
        }
      }
      store_lanes(grad_input + iw * s.channels + c, sum, lanes);
    }
  }
}

template <class T>
void backward(const SizedPool2dShape& s, const SizedPool2dBuffers& b, void* workspace, int threads) {
  const int64_t in_row = s.in_w * pixel_of(s), out_row = s.out_w * pixel_of(s);
  const Scratch<T> scratch(s.out_w, s.out_w, workspace);
  for (int64_t ow = 0; ow < scratch.row; ++ow)
    scratch.widths[ow] = ow < s.out_w ? static_cast<T>(window_of(ow, s.in_w, s.out_w).size()) : T{1};
  for_each_row(row_tasks(s, s.in_h, in_row, threads), s.in_h, threads, [&](int worker, int64_t plane, int64_t ih) {
    const T* grad_output = static_cast<const T*>(b.small) + plane * s.out_h * out_row;
    T* grad_input = static_cast<T*>(b.large) + (plane * s.in_h + ih) * in_row;
    if (s.layout == Layout::nchw) {
      backward_row_nchw(s, grad_output, ih, scratch.widths, scratch.sums_of(worker), grad_input);
    } else {
      backward_row_nhwc(s, grad_output, ih, scratch.widths, grad_input);
    }
  });
}

// Room for rows of `columns` per worker and for the widths.
template <class T>
Plan plan_rows(const SizedPool2dShape& s, int64_t rows_per_plane, int64_t columns, int64_t widths, int threads) {
  const int64_t tasks = row_tasks(s, rows_per_plane, s.in_w * pixel_of(s), threads).tasks;
  const int64_t elements = whole_vectors(widths, kLanes<T>) + threads * whole_vectors(columns, kLanes<T>);
  const bool nchw = s.layout == Layout::nchw;
  return {nchw ? 1 : kLanes<T>, nchw ? kLanes<T> : 1, tasks, static_cast<size_t>(elements) * sizeof(T)};
}

Plan plan_forward(const SizedPool2dShape& s, int threads) {
  return (s.dtype == DType::float32 ? plan_rows<float> : plan_rows<double>)(s, s.out_h, s.in_w, 0, threads);
}

Plan plan_backward(const SizedPool2dShape& s, int threads) {
  return (s.dtype == DType::float32 ? plan_rows<float> : plan_rows<double>)(s, s.in_h, s.out_w, s.out_w, threads);
}

void run_forward(const SizedPool2dShape& s, const SizedPool2dBuffers& b, void* workspace, int threads) {
  (s.dtype == DType::float32 ? forward<float> : forward<double>)(s, b, workspace, threads);
}

void run_backward(const SizedPool2dShape& s, const SizedPool2dBuffers& b, void* workspace, int threads) {
  (s.dtype == DType::float32 ? backward<float> : backward<double>)(s, b, workspace, threads);
}

}  // namespace

extern const SizedPool2dKernel adaptive_avg_pool2d_forward_direct = {CNN_EXT_KERNEL_NAME("adaptive_avg_pool2d_forward_direct"),
                                                                     Isa::CNN_EXT_ISA,
                                                                     SizedPool2dOp::adaptive_avg,
                                                                     SizedPool2dDirection::forward,
                                                                     accepts_float_and_double,
                                                                     plan_forward,
                                                                     run_forward};
extern const SizedPool2dKernel adaptive_avg_pool2d_backward_direct = {CNN_EXT_KERNEL_NAME("adaptive_avg_pool2d_backward_direct"),
                                                                      Isa::CNN_EXT_ISA,
                                                                      SizedPool2dOp::adaptive_avg,
                                                                      SizedPool2dDirection::backward,
                                                                      accepts_float_and_double,
                                                                      plan_backward,
                                                                      run_backward};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
