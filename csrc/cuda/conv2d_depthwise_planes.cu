// Depthwise convolution in nchw, forward and backward_input, of square kernels of 3 and 5 with strides 1
// and 2 and of 7 with stride 1, without dilation.
//
// plane_strips, where rows are whole vectors and the padding is half of the kernel: a thread computes 8 or 4 rows of a vector of results.
// It reads each row of inputs once, with the vectors beside it. plane_columns, otherwise: a column of as many results, neighbouring threads
// neighbouring columns; what these share comes from the first-level cache. Both hold their filter in registers. backward_input with stride
// 1 is forward with the filter turned round; with stride 2 (plane_columns_backward) a thread computes a column of inputs from an even place
// of the padded input on: which taps meet which output rows is known while compiling, and which columns depends on the parity of the
// thread's.
//
// A sum takes its taps row by row, one fused multiplication each, whatever the tile. Padding never multiplies: in columns a tap outside the
// tensor is a zero times a zero; strips with a filter that is not finite are summed again without it.
//
// Not handled: several filters for a channel; float64.
#include "cuda/depthwise.cuh"
#include "cuda/thread_places.h"
#include "cuda/vector.cuh"

namespace cnn_ext::cuda {
namespace {

// Rows of results of a thread, as registers allow.
CNN_EXT_HOST_DEVICE constexpr int column_of(int64_t kernel, int64_t stride) { return kernel + 2 * stride > 7 ? 4 : 8; }

struct PlaneProblem {
  Axis h, w;
  FastDivisor channels;
  bool is_turned;  // the filter
  __device__ int channel_of(int plane) const { return plane - channels.quotient(plane) * channels.divisor(); }
};

// The filter of a channel, which may be turned round.
template <class T>
struct PlaneFilter {
  __device__ PlaneFilter(const PlaneProblem& p, const T* weight, int channel)
      : first(weight + channel * p.h.kernel * p.w.kernel + (p.is_turned ? p.h.kernel * p.w.kernel - 1 : 0)), step(p.is_turned ? -1 : 1) {}
  __device__ Accumulate<T> at(int tap) const { return widen(first[tap * step]); }
  const T* first;
  int step;
};

template <class T>
__device__ float bias_of(const T* bias, int channel) {
  return bias == nullptr ? 0.0f : widen(bias[channel]);
}

// One result, from the taps inside the plane alone.
template <class T>
__device__ float sum_inside(const PlaneProblem& p, const T* plane, const PlaneFilter<T>& filter, int out_h, int out_w) {
  const int first_h = out_h * p.h.stride + p.h.first, first_w = out_w * p.w.stride + p.w.first;
  const Range rows = taps_inside(first_h, 1, p.h.kernel, p.h.in), cols = taps_inside(first_w, 1, p.w.kernel, p.w.in);
  float sum = 0;
#pragma unroll 1
  for (int r = rows.begin; r < rows.end; ++r) {
#pragma unroll 1
    for (int s = cols.begin; s < cols.end; ++s) {
      sum = fma(filter.at(r * p.w.kernel + s), widen(plane[(first_h + r) * p.w.in + first_w + s]), sum);
    }
  }
  return sum;
}

// `rows` x `width` results from (out_h, out_w) on, with a filter that is not finite.
template <class T>
__device__ void sum_inside(const PlaneProblem& p, const T* plane, const PlaneFilter<T>& filter, int out_h, int rows, int out_w, int width,
                           float added, T* target) {
#pragma unroll 1
  for (int j = 0; j < rows; ++j) {
#pragma unroll 1
    for (int i = 0; i < width; ++i) target[j * p.w.out + i] = narrow<T>(sum_inside(p, plane, filter, out_h + j, out_w + i) + added);
  }
}

// kWidth: of a vector of results.
template <class T, int kKernel, int kStride, int kWidth>
__global__ void __launch_bounds__(kBlockThreads, 2)
    plane_strips(PlaneProblem p, ThreadPlaces places, const T* __restrict__ input, const T* __restrict__ weight, const T* __restrict__ bias,
                 T* __restrict__ output) {
  constexpr int kPad = kKernel / 2, kColumn = column_of(kKernel, kStride), kRows = (kColumn - 1) * kStride + kKernel;
  // Vectors that a row of results reads: those before its first column, its own, those behind it.
  constexpr int kBefore = ceil_div(kPad, kWidth), kBehind = ceil_div(larger(kKernel - kPad - kStride, 0), kWidth);
  constexpr int kVectors = kBefore + kStride + kBehind;
  const int index = static_cast<int>(element_index());
  if (index >= places.count()) return;
  const auto place = places.at(index);
  const int channel = p.channel_of(place.image), out_w = place.column * kWidth;
  const int first_h = place.row * kColumn * kStride + p.h.first, first_w = out_w * kStride - kBefore * kWidth;
  const PlaneFilter<T> taps(p, weight, channel);
  float filter[kKernel][kKernel];
  bool is_finite = true;
#pragma unroll
  for (int tap = 0; tap < kKernel * kKernel; ++tap) {
    filter[tap / kKernel][tap % kKernel] = taps.at(tap);
    is_finite &= isfinite(filter[tap / kKernel][tap % kKernel]);
  }
  const float added = bias_of(bias, channel);
  const int out_h = place.row * kColumn, results = smaller(kColumn, p.h.out - out_h);
  const T* plane = input + static_cast<int64_t>(place.image) * p.h.in * p.w.in;
  T* target = output + static_cast<int64_t>(place.image) * p.h.out * p.w.out + out_h * p.w.out + out_w;
  if (!is_finite) return sum_inside(p, plane, taps, out_h, results, out_w, kWidth, added, target);
  float sums[kColumn][kWidth] = {};
#pragma unroll
  for (int y = 0; y < kRows; ++y) {
    const int h = first_h + y;
    const bool has_row = h >= 0 && h < p.h.in;
    float values[kVectors * kWidth];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int w = first_w + v * kWidth;
      Vector<T, kWidth> vector = {};
      if (has_row && w >= 0 && w < p.w.in) vector = load_vector<kWidth>(plane + h * p.w.in + w);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) values[v * kWidth + i] = widen(vector.element[i]);
    }
#pragma unroll
    for (int j = 0; j < kColumn; ++j) {
      const int r = y - j * kStride;
      if (r < 0 || r >= kKernel) continue;
#pragma unroll
      for (int s = 0; s < kKernel; ++s) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          sums[j][i] = fma(filter[r][s], values[kBefore * kWidth - kPad + i * kStride + s], sums[j][i]);
        }
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kColumn; ++j) {
    Vector<T, kWidth> vector;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) vector.element[i] = narrow<T>(sums[j][i] + added);
    if (j < results) store_vector(target + j * p.w.out, vector);
  }
}

// Rows that are fetched ahead of the one that is multiplied, as registers allow.
template <int kKernel>
constexpr int kAhead = kKernel == 3   ? 4
                       : kKernel == 5 ? 2
                                      : 1;

template <class T, int kKernel, int kStride>
__global__ void __launch_bounds__(kBlockThreads, kKernel == 7 ? 1 : 2)
    plane_columns(PlaneProblem p, ThreadPlaces places, const T* __restrict__ input, const T* __restrict__ weight,
                  const T* __restrict__ bias, T* __restrict__ output) {
  constexpr int kColumn = column_of(kKernel, kStride), kRows = (kColumn - 1) * kStride + kKernel;
  const int index = static_cast<int>(element_index());
  if (index >= places.count()) return;
  const auto place = places.at(index);
  const int channel = p.channel_of(place.image);
  const int first_h = place.row * kColumn * kStride + p.h.first, first_w = place.column * kStride + p.w.first;
  const PlaneFilter<T> taps(p, weight, channel);
  bool exists[kKernel];
  float filter[kKernel][kKernel];
#pragma unroll
  for (int s = 0; s < kKernel; ++s) {
    exists[s] = first_w + s >= 0 && first_w + s < p.w.in;
#pragma unroll
    for (int r = 0; r < kKernel; ++r) filter[r][s] = exists[s] ? taps.at(r * kKernel + s) : 0.0f;
  }
  const T* plane = input + static_cast<int64_t>(place.image) * p.h.in * p.w.in;
  T rows[kRows][kKernel];
  const auto fetch = [&](int y) {
    const T* row = plane + (clamp(first_h + y, 0, p.h.in) * p.w.in + first_w);
#pragma unroll
    for (int s = 0; s < kKernel; ++s) rows[y][s] = exists[s] ? row[s] : narrow<T>(0);
  };
#pragma unroll
  for (int y = 0; y < kAhead<kKernel>; ++y) fetch(y);
  float sums[kColumn] = {};
#pragma unroll
  for (int y = 0; y < kRows; ++y) {
    if (y + kAhead<kKernel> < kRows) fetch(y + kAhead<kKernel>);
    if (first_h + y < 0 || first_h + y >= p.h.in) continue;
#pragma unroll
    for (int j = 0; j < kColumn; ++j) {
      const int r = y - j * kStride;
      if (r < 0 || r >= kKernel) continue;
#pragma unroll
      for (int s = 0; s < kKernel; ++s) sums[j] = fma(filter[r][s], widen(rows[y][s]), sums[j]);
    }
  }
  const float added = bias_of(bias, channel);
  T* target = output + static_cast<int64_t>(place.image) * p.h.out * p.w.out + place.row * kColumn * p.w.out + place.column;
#pragma unroll
  for (int j = 0; j < kColumn; ++j) {
    if (place.row * kColumn + j < p.h.out) target[j * p.w.out] = narrow<T>(sums[j] + added);
  }
}

// h, w: of the forward convolution, of stride 2.
template <class T, int kKernel>
__global__ void __launch_bounds__(kBlockThreads, 2)
    plane_columns_backward(PlaneProblem p, ThreadPlaces places, const T* __restrict__ grad_output, const T* __restrict__ weight,
                           const T* __restrict__ bias, T* __restrict__ grad_input) {
  constexpr int kColumn = column_of(kKernel, 2), kTaps = (kKernel + 1) / 2;  // of a parity, at most
  constexpr int kBefore = (kKernel - 1) / 2, kRows = kBefore + kColumn / 2;  // output rows: before the first input's, and in all
  const int index = static_cast<int>(element_index());
  if (index >= places.count()) return;
  const auto place = places.at(index);
  const int channel = p.channel_of(place.image);
  const int padded_w = place.column - p.w.first, parity = padded_w % 2, first_out = place.row * (kColumn / 2) - kBefore;
  const PlaneFilter<T> taps(p, weight, channel);
  bool exists[kTaps];
  float filter[kKernel][kTaps];
#pragma unroll
  for (int i = 0; i < kTaps; ++i) {
    const int out_w = padded_w / 2 - i;
    exists[i] = parity + 2 * i < kKernel && out_w >= 0 && out_w < p.w.out;
#pragma unroll
    for (int r = 0; r < kKernel; ++r) filter[r][i] = exists[i] ? taps.at(r * kKernel + parity + 2 * i) : 0.0f;
  }
  const T* plane = grad_output + static_cast<int64_t>(place.image) * p.h.out * p.w.out;
  T rows[kRows][kTaps];
#pragma unroll
  for (int y = 0; y < kRows; ++y) {
    const T* row = plane + (clamp(first_out + y, 0, p.h.out) * p.w.out + padded_w / 2);
#pragma unroll
    for (int i = 0; i < kTaps; ++i) rows[y][i] = exists[i] ? row[-i] : narrow<T>(0);
  }
  float sums[kColumn] = {};
#pragma unroll
  for (int y = 0; y < kRows; ++y) {
    if (first_out + y < 0 || first_out + y >= p.h.out) continue;
#pragma unroll
    for (int j = 0; j < kColumn; ++j) {
      const int r = j - 2 * (y - kBefore);
      if (r < 0 || r >= kKernel) continue;
#pragma unroll
      for (int i = 0; i < kTaps; ++i) sums[j] = fma(filter[r][i], widen(rows[y][i]), sums[j]);
    }
  }
  const float added = bias_of(bias, channel);
  T* target = grad_input + static_cast<int64_t>(place.image) * p.h.in * p.w.in + place.column;
#pragma unroll
  for (int j = 0; j < kColumn; ++j) {
    const int h = place.row * kColumn + j + p.h.first;
    if (h >= 0 && h < p.h.in) target[h * p.w.in] = narrow<T>(sums[j] + added);
  }
}

bool accepts(const Conv2dShape& s) {
  const int64_t kernel = s.kernel_h, stride = s.stride_h;
  const bool has_kernel = s.kernel_w == kernel && (kernel == 3 || kernel == 5 || (kernel == 7 && stride == 1));
  const bool has_stride = s.stride_w == stride && (stride == 1 || stride == 2);
  return s.layout == Layout::nchw && s.groups == s.in_channels && s.in_channels == s.out_channels && has_kernel && has_stride &&
         s.dilation_h == 1 && s.dilation_w == 1 && s.dtype != DType::float64 && has_int_extents(s) &&
         all_below(kMaxExtent, {product({s.batch, s.in_channels, s.in_h + s.pad_top + column_of(s.kernel_h, s.stride_h), s.in_w}),
                                product({s.batch, s.out_channels, s.out_h + column_of(s.kernel_h, s.stride_h), s.out_w})});
}

// What a launch takes from one tensor to another one.
struct Pass {
  PlaneProblem problem;
  int64_t planes;
  const void *input, *weight, *bias;
  void* output;
};

ThreadPlaces columns_of(int64_t kernel, int64_t stride, int64_t planes, int64_t height, int64_t width) {
  return ThreadPlaces(planes, ceil_div<int64_t>(height, column_of(kernel, stride)), width, 1);
}

template <class T>
void launch_plane(void (*function)(PlaneProblem, ThreadPlaces, const T*, const T*, const T*, T*), const ThreadPlaces& places,
                  const Pass& pass, cudaStream_t stream) {
  launch_elementwise(function, places.count(), stream, pass.problem, places, static_cast<const T*>(pass.input),
                     static_cast<const T*>(pass.weight), static_cast<const T*>(pass.bias), static_cast<T*>(pass.output));
}

// Results of a vector: the widest by which rows can be read.
constexpr int kWide = 4, kNarrow = 2;

template <class T, int kKernel, int kStride>
void launch_forward(const Pass& pass, cudaStream_t stream) {
  const Axis &h = pass.problem.h, &w = pass.problem.w;
  const auto has_vectors = [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    return has_whole_vectors<kWidth>(static_cast<const T*>(pass.input), w.in) &&
           has_whole_vectors<kWidth>(static_cast<T*>(pass.output), w.out);
  };
  const bool is_half_padded = w.first == -(kKernel / 2);
  const auto places = [&](int width) { return columns_of(kKernel, kStride, pass.planes, h.out, w.out / width); };
  if (is_half_padded && has_vectors(std::integral_constant<int, kWide>{})) {
    launch_plane<T>(plane_strips<T, kKernel, kStride, kWide>, places(kWide), pass, stream);
  } else if (is_half_padded && has_vectors(std::integral_constant<int, kNarrow>{})) {
    launch_plane<T>(plane_strips<T, kKernel, kStride, kNarrow>, places(kNarrow), pass, stream);
  } else {
    launch_plane<T>(plane_columns<T, kKernel, kStride>, places(1), pass, stream);
  }
}

template <class T, int kStride>
void launch_forward_of(const Pass& pass, cudaStream_t stream) {
  const int kernel = pass.problem.h.kernel;
  if (kernel == 3) return launch_forward<T, 3, kStride>(pass, stream);
  if (kernel == 5) return launch_forward<T, 5, kStride>(pass, stream);
  if constexpr (kStride == 1) launch_forward<T, 7, kStride>(pass, stream);
}

// At most, where results are not taken as vectors.
Plan plan_forward(const Conv2dShape& s) {
  const ThreadPlaces places = columns_of(s.kernel_h, s.stride_h, s.batch * s.in_channels, s.out_h, s.out_w);
  return {1, column_of(s.kernel_h, s.stride_h), ceil_div<int64_t>(places.count(), kBlockThreads), 0};
}

// With a stride they begin above the input, in its padding.
ThreadPlaces backward_columns(const Conv2dShape& s) {
  return columns_of(s.kernel_h, s.stride_h, s.batch * s.in_channels, s.in_h + (s.stride_h == 1 ? 0 : s.pad_top), s.in_w);
}

Plan plan_backward(const Conv2dShape& s) {
  return {1, column_of(s.kernel_h, s.stride_h), ceil_div<int64_t>(backward_columns(s).count(), kBlockThreads), 0};
}

PlaneProblem forward_problem(const Conv2dShape& s) {
  return {forward_axis(s.in_h, s.out_h, s.kernel_h, s.stride_h, s.pad_top, s.dilation_h),
          forward_axis(s.in_w, s.out_w, s.kernel_w, s.stride_w, s.pad_left, s.dilation_w), FastDivisor(static_cast<int>(s.in_channels)),
          false};
}

void run_forward(const Conv2dShape& s, const Conv2dBuffers& b, void*, cudaStream_t stream) {
  const Pass pass{forward_problem(s), s.batch * s.in_channels, b.input, b.weight, b.bias, b.output};
  with_single_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    (s.stride_h == 1 ? launch_forward_of<T, 1> : launch_forward_of<T, 2>)(pass, stream);
  });
}

template <class T>
void run_backward_of(const Conv2dShape& s, const Conv2dBuffers& b, cudaStream_t stream) {
  Pass pass{forward_problem(s), s.batch * s.in_channels, b.grad_output, b.weight, b.bias, b.grad_input};
  if (s.stride_h == 1) {
    pass.problem.h = backward_axis(s.in_h, s.out_h, s.kernel_h, s.pad_top, 1);
    pass.problem.w = backward_axis(s.in_w, s.out_w, s.kernel_w, s.pad_left, 1);
    pass.problem.is_turned = true;
    launch_forward_of<T, 1>(pass, stream);
    return;
  }
  const auto function = s.kernel_h == 3 ? plane_columns_backward<T, 3> : plane_columns_backward<T, 5>;
  launch_plane<T>(function, backward_columns(s), pass, stream);
}

void run_backward(const Conv2dShape& s, const Conv2dBuffers& b, void*, cudaStream_t stream) {
  with_single_type(s.dtype, [&](auto element) { run_backward_of<decltype(element)>(s, b, stream); });
}

}  // namespace

extern const Conv2dKernel conv2d_forward_depthwise_planes_sm80 = {
    "conv2d_forward_depthwise_planes_sm80", 80, Conv2dDirection::forward, accepts, plan_forward, run_forward};
extern const Conv2dKernel conv2d_backward_input_depthwise_planes_sm80 = {"conv2d_backward_input_depthwise_planes_sm80",
                                                                         80,
                                                                         Conv2dDirection::backward_input,
                                                                         accepts,
                                                                         plan_backward,
                                                                         run_backward,
                                                                         /*needs_proof=*/false,
                                                                         /*adds_bias=*/true};

}  // namespace cnn_ext::cuda
