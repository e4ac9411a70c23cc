// Convolution of few channels at a time, forward and backward_input: depthwise in nhwc with square kernels of 3 and 5 with strides 1 and 2
// and of 7 with stride 1; groups whose outputs each take 4 channels of a 3 x 3 window, with stride 2 in nhwc alone. backward_input is
// forward with the filter turned round and its channels exchanged, so of stride 1 alone.
//
// A thread computes a column of some results of one channel or, in a depthwise convolution, of a vector of channels. Neighbouring threads
// take neighbouring channels in nhwc, neighbouring columns in nchw. A thread holds its filter in registers and reads each row of inputs
// once for all results that it serves; what neighbouring columns share comes from the first-level cache.
//
// A sum takes its taps row by row, each tap's channels in order, one fused multiplication each, whatever the tile. A tap beside the tensor
// is a zero times a zero, a row above or below it is skipped: padding never multiplies.
//
// Not handled: float64; dilation.
#include "cuda/depthwise.cuh"
#include "cuda/thread_places.h"
#include "cuda/vector.cuh"

namespace cnn_ext::cuda {
namespace {

// Where the filter of a result's channel lies: that of member i of a group begins at group * of_group + i * of_member + first.
struct ColumnFilter {
  FastDivisor members;  // channels of the result in a group
  int of_group, of_member, first, of_input, of_row, of_col;
};

struct ColumnsProblem {
  Axis h, w;
  int inputs;           // channels of what is read
  FastDivisor outputs;  // channels of the result
  ColumnFilter filter;
};

// Results of a column, as registers allow.
CNN_EXT_HOST_DEVICE constexpr int column_of(int64_t kernel, int64_t stride) { return kernel + 2 * stride > 7 ? 4 : 8; }

// Channels that a thread takes of a depthwise convolution, as registers allow.
CNN_EXT_HOST_DEVICE constexpr int channels_of(int64_t kernel) { return kernel == 3 ? 4 : 1; }

constexpr int kGroupInputs = 4;

// kInputs: channels that a result takes; kChannels: channels of the thread. One of them is 1. kWhole: vectors of them are aligned.
template <class T, Layout kLayout, int kKernel, int kStride, int kInputs, int kChannels, bool kWhole>
__global__ void __launch_bounds__(kBlockThreads, kInputs > 1 || kKernel == 7 ? 1 : 2)
    convolve_columns(ColumnsProblem p, ThreadPlaces places, const T* __restrict__ input, const T* __restrict__ weight,
                     const T* __restrict__ bias, T* __restrict__ output) {
  static_assert(kInputs == 1 || kChannels == 1);
  constexpr bool kNchw = kLayout == Layout::nchw;
  constexpr int kColumn = column_of(kKernel, kStride), kRows = (kColumn - 1) * kStride + kKernel, kWidth = kInputs * kChannels;
  const int index = static_cast<int>(element_index());
  if (index >= places.count()) return;
  const auto place = places.at(index);
  const int image = kNchw ? p.outputs.quotient(place.image) : place.image;
  const int channel = kNchw ? place.image - image * p.outputs.divisor() : place.vector * kChannels;
  const int group = p.filter.members.quotient(channel), first_input = kInputs == 1 ? channel : group * kInputs;
  const int first_h = place.row * kColumn * kStride + p.h.first, first_w = place.column * kStride + p.w.first;
  const int of_input = kNchw ? p.h.in * p.w.in : 1, of_pixel = kNchw ? 1 : p.inputs;
  const T* taps = weight + group * p.filter.of_group + (channel - group * p.filter.members.divisor()) * p.filter.of_member + p.filter.first;
  const int of_element = kInputs == 1 ? p.filter.of_group : p.filter.of_input;
  bool exists[kKernel];
  float filter[kKernel][kKernel][kWidth];
#pragma unroll
  for (int s = 0; s < kKernel; ++s) {
    exists[s] = first_w + s >= 0 && first_w + s < p.w.in;
#pragma unroll
    for (int r = 0; r < kKernel; ++r) {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        filter[r][s][e] = exists[s] ? widen(taps[r * p.filter.of_row + s * p.filter.of_col + e * of_element]) : 0.0f;
      }
    }
  }
  const T* plane = input + (image * p.h.in * p.w.in * p.inputs + first_input * of_input);
  float sums[kColumn][kChannels] = {};
#pragma unroll
  for (int y = 0; y < kRows; ++y) {
    const int h = first_h + y;
    const T* row = plane + (clamp(h, 0, p.h.in) * p.w.in + first_w) * of_pixel;
    Vector<T, kWidth> vectors[kKernel];
#pragma unroll
    for (int s = 0; s < kKernel; ++s) {
      vectors[s] = {};
      if (!exists[s]) continue;
      if constexpr (kWhole) {
        vectors[s] = load_vector<kWidth>(row + s * of_pixel);
      } else {
#pragma unroll
        for (int e = 0; e < kWidth; ++e) vectors[s].element[e] = row[s * of_pixel + e * of_input];
      }
    }
    if (h < 0 || h >= p.h.in) continue;
#pragma unroll
    for (int j = 0; j < kColumn; ++j) {
      const int r = y - j * kStride;
      if (r < 0 || r >= kKernel) continue;
#pragma unroll
      for (int s = 0; s < kKernel; ++s) {
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          float& sum = sums[j][kChannels == 1 ? 0 : e];
          sum = fma(filter[r][s][e], widen(vectors[s].element[e]), sum);
        }
      }
    }
  }
  const int of_row = p.w.out * (kNchw ? 1 : p.outputs.divisor());
  T* target = output + (place.image * p.h.out + place.row * kColumn) * of_row +
              (kNchw ? place.column : place.column * p.outputs.divisor() + channel);
  float added[kChannels] = {};
#pragma unroll
  for (int e = 0; e < kChannels; ++e) {
    if (bias != nullptr) added[e] = widen(bias[channel + e]);
  }
#pragma unroll
  for (int j = 0; j < kColumn; ++j) {
    if (place.row * kColumn + j >= p.h.out) continue;
    Vector<T, kChannels> results;
#pragma unroll
    for (int e = 0; e < kChannels; ++e) results.element[e] = narrow<T>(sums[j][e] + added[e]);
    store_some(target + j * of_row, results, kChannels, kWhole);
  }
}

bool is_depthwise(const Conv2dShape& s) { return s.groups == s.in_channels && s.in_channels == s.out_channels; }

// group_read: channels of a group that are read, group_written: those of the result.
bool has_few_channels(const Conv2dShape& s, int64_t group_read, int64_t group_written) {
  const int64_t most_written = 8, kernel = s.kernel_h, stride = s.stride_h;
  const bool is_square = s.kernel_w == kernel && s.stride_w == stride && s.dilation_h == 1 && s.dilation_w == 1;
  const bool has_kernel = kernel == 3 || kernel == 5 || (kernel == 7 && stride == 1);
  const bool suits = is_depthwise(s) ? s.layout == Layout::nhwc && has_kernel && s.in_channels % channels_of(kernel) == 0
                                     : s.groups > 1 && group_read == kGroupInputs && group_written <= most_written && kernel == 3 &&
                                           (stride == 1 || s.layout == Layout::nhwc);
  return suits && is_square && (stride == 1 || stride == 2) && s.dtype != DType::float64 && has_int_extents(s) &&
         all_below(kMaxExtent, {product({s.batch, s.in_h + column_of(kernel, 1), s.in_w, s.in_channels}),
                                product({s.batch, s.out_h + column_of(kernel, 1), s.out_w, s.out_channels})});
}

int64_t group_in(const Conv2dShape& s) { return s.in_channels / s.groups; }
int64_t group_out(const Conv2dShape& s) { return s.out_channels / s.groups; }

bool accepts_forward(const Conv2dShape& s) { return has_few_channels(s, group_in(s), group_out(s)); }
bool accepts_backward(const Conv2dShape& s) { return s.stride_h == 1 && has_few_channels(s, group_out(s), group_in(s)); }

// What a launch takes from one tensor to another one.
struct Pass {
  ColumnsProblem problem;
  int64_t batch;
  const void *input, *weight, *bias;
  void* output;
};

Pass forward_pass(const Conv2dShape& s, const Conv2dBuffers& b) {
  const Strides filter = Conv2dGeometry(s).filter;
  const int n = static_cast<int>(filter.n), h = static_cast<int>(filter.h), w = static_cast<int>(filter.w);
  const ColumnFilter columns{
      FastDivisor(static_cast<int>(group_out(s))), static_cast<int>(group_out(s)) * n, n, 0, static_cast<int>(filter.c), h, w};
  return {{forward_axis(s.in_h, s.out_h, s.kernel_h, s.stride_h, s.pad_top, 1),
           forward_axis(s.in_w, s.out_w, s.kernel_w, s.stride_w, s.pad_left, 1), static_cast<int>(s.in_channels),
           FastDivisor(static_cast<int>(s.out_channels)), columns},
          s.batch,
          b.input,
          b.weight,
          b.bias,
          b.output};
}

Pass backward_pass(const Conv2dShape& s, const Conv2dBuffers& b) {
  const Strides filter = Conv2dGeometry(s).filter;
  const int n = static_cast<int>(filter.n), h = static_cast<int>(filter.h), w = static_cast<int>(filter.w);
  const int last = static_cast<int>(s.kernel_h - 1) * h + static_cast<int>(s.kernel_w - 1) * w;
  const ColumnFilter columns{
      FastDivisor(static_cast<int>(group_in(s))), static_cast<int>(group_out(s)) * n, static_cast<int>(filter.c), last, n, -h, -w};
  return {{backward_axis(s.in_h, s.out_h, s.kernel_h, s.pad_top, 1), backward_axis(s.in_w, s.out_w, s.kernel_w, s.pad_left, 1),
           static_cast<int>(s.out_channels), FastDivisor(static_cast<int>(s.in_channels)), columns},
          s.batch,
          b.grad_output,
          b.weight,
          b.bias,
          b.grad_input};
}

ThreadPlaces places_of(Layout layout, const Pass& pass, int64_t column, int64_t channels) {
  const int64_t outputs = pass.problem.outputs.divisor(), rows = ceil_div<int64_t>(pass.problem.h.out, column), width = pass.problem.w.out;
  return layout == Layout::nchw ? ThreadPlaces(pass.batch * outputs, rows, width, 1)
                                : ThreadPlaces(pass.batch, rows, width, outputs / channels);
}

template <class T, Layout kLayout, int kKernel, int kStride, int kInputs, int kChannels, bool kWhole>
void launch_columns(const Pass& pass, cudaStream_t stream) {
  const ThreadPlaces places = places_of(kLayout, pass, column_of(kKernel, kStride), kChannels);
  launch_elementwise(convolve_columns<T, kLayout, kKernel, kStride, kInputs, kChannels, kWhole>, places.count(), stream, pass.problem,
                     places, static_cast<const T*>(pass.input), static_cast<const T*>(pass.weight), static_cast<const T*>(pass.bias),
                     static_cast<T*>(pass.output));
}

template <class T, int kKernel, int kStride>
void launch_depthwise(const Pass& pass, cudaStream_t stream) {
  constexpr int kChannels = channels_of(kKernel);
  const bool is_whole = has_whole_vectors<kChannels>(static_cast<const T*>(pass.input), pass.problem.inputs) &&
                        has_whole_vectors<kChannels>(static_cast<T*>(pass.output), pass.problem.inputs);
  (is_whole ? launch_columns<T, Layout::nhwc, kKernel, kStride, 1, kChannels, true>
            : launch_columns<T, Layout::nhwc, kKernel, kStride, 1, kChannels, false>)(pass, stream);
}

template <class T, int kStride>
void launch_groups(Layout layout, const Pass& pass, cudaStream_t stream) {
  const bool is_whole = has_whole_vectors<kGroupInputs>(static_cast<const T*>(pass.input), pass.problem.inputs);
  if constexpr (kStride == 1) {
    if (layout == Layout::nchw) return launch_columns<T, Layout::nchw, 3, kStride, kGroupInputs, 1, false>(pass, stream);
  }
  (is_whole ? launch_columns<T, Layout::nhwc, 3, kStride, kGroupInputs, 1, true>
            : launch_columns<T, Layout::nhwc, 3, kStride, kGroupInputs, 1, false>)(pass, stream);
}

template <class T, int kStride>
void launch_pass(const Conv2dShape& s, const Pass& pass, cudaStream_t stream) {
  if (!is_depthwise(s)) return launch_groups<T, kStride>(s.layout, pass, stream);
  if (s.kernel_h == 3) return launch_depthwise<T, 3, kStride>(pass, stream);
  if (s.kernel_h == 5) return launch_depthwise<T, 5, kStride>(pass, stream);
  if constexpr (kStride == 1) launch_depthwise<T, 7, kStride>(pass, stream);
}

void run(const Conv2dShape& s, const Pass& pass, cudaStream_t stream) {
  with_single_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    (s.stride_h == 1 ? launch_pass<T, 1> : launch_pass<T, 2>)(s, pass, stream);
  });
}

void run_forward(const Conv2dShape& s, const Conv2dBuffers& b, void*, cudaStream_t stream) { run(s, forward_pass(s, b), stream); }
void run_backward(const Conv2dShape& s, const Conv2dBuffers& b, void*, cudaStream_t stream) { run(s, backward_pass(s, b), stream); }

Plan plan_for(const Conv2dShape& s, const Pass& pass) {
  const int column = column_of(s.kernel_h, s.stride_h), channels = is_depthwise(s) ? channels_of(s.kernel_h) : 1;
  return {channels, column, ceil_div<int64_t>(places_of(s.layout, pass, column, channels).count(), kBlockThreads), 0};
}

Plan plan_forward(const Conv2dShape& s) { return plan_for(s, forward_pass(s, {})); }
Plan plan_backward(const Conv2dShape& s) { return plan_for(s, backward_pass(s, {})); }

}  // namespace

extern const Conv2dKernel conv2d_forward_columns_sm80 = {
    "conv2d_forward_columns_sm80", 80, Conv2dDirection::forward, accepts_forward, plan_forward, run_forward};
extern const Conv2dKernel conv2d_backward_input_columns_sm80 = {"conv2d_backward_input_columns_sm80",
                                                                80,
                                                                Conv2dDirection::backward_input,
                                                                accepts_backward,
                                                                plan_backward,
                                                                run_backward,
                                                                /*needs_proof=*/false,
                                                                /*adds_bias=*/true};

}  // namespace cnn_ext::cuda
