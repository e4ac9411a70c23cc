// Convolution of groups whose outputs each take 4 channels of a 3 x 3 window, forward and backward_input, with stride 2 in nhwc alone.
// backward_input is forward with the filter turned round and its channels exchanged, so of stride 1 alone.
//
// A thread computes a column of some results of one channel. Neighbouring threads take neighbouring channels in nhwc, neighbouring columns
// in nchw. A thread holds its filter in registers and reads each row of inputs once for all results that it serves; what neighbouring
// columns share comes from the first-level cache.
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

constexpr int kKernel = 3, kGroupInputs = 4;  // channels that a result takes
constexpr int kColumn = 8;                    // results of a column

// kWhole: vectors of inputs are aligned.
template <class T, Layout kLayout, int kStride, bool kWhole>
__global__ void __launch_bounds__(kBlockThreads, 1)
    convolve_columns(ColumnsProblem p, ThreadPlaces places, const T* __restrict__ input, const T* __restrict__ weight,
                     const T* __restrict__ bias, T* __restrict__ output) {
  constexpr bool kNchw = kLayout == Layout::nchw;
  constexpr int kRows = (kColumn - 1) * kStride + kKernel;
  const int index = static_cast<int>(element_index());
  if (index >= places.count()) return;
  const auto place = places.at(index);
  const int image = kNchw ? p.outputs.quotient(place.image) : place.image;
  const int channel = kNchw ? place.image - image * p.outputs.divisor() : place.vector;
  const int group = p.filter.members.quotient(channel), first_input = group * kGroupInputs;
  const int first_h = place.row * kColumn * kStride + p.h.first, first_w = place.column * kStride + p.w.first;
  const int of_input = kNchw ? p.h.in * p.w.in : 1, of_pixel = kNchw ? 1 : p.inputs;
  const T* taps = weight + group * p.filter.of_group + (channel - group * p.filter.members.divisor()) * p.filter.of_member + p.filter.first;
  bool exists[kKernel];
  float filter[kKernel][kKernel][kGroupInputs];
#pragma unroll
  for (int s = 0; s < kKernel; ++s) {
    exists[s] = first_w + s >= 0 && first_w + s < p.w.in;
#pragma unroll
    for (int r = 0; r < kKernel; ++r) {
#pragma unroll
      for (int e = 0; e < kGroupInputs; ++e) {
        filter[r][s][e] = exists[s] ? widen(taps[r * p.filter.of_row + s * p.filter.of_col + e * p.filter.of_input]) : 0.0f;
      }
    }
  }
  const T* plane = input + (image * p.h.in * p.w.in * p.inputs + first_input * of_input);
  float sums[kColumn] = {};
#pragma unroll
  for (int y = 0; y < kRows; ++y) {
    const int h = first_h + y;
    const T* row = plane + (clamp(h, 0, p.h.in) * p.w.in + first_w) * of_pixel;
    Vector<T, kGroupInputs> vectors[kKernel];
#pragma unroll
    for (int s = 0; s < kKernel; ++s) {
      vectors[s] = {};
      if (!exists[s]) continue;
      if constexpr (kWhole) {
        vectors[s] = load_vector<kGroupInputs>(row + s * of_pixel);
      } else {
#pragma unroll
        for (int e = 0; e < kGroupInputs; ++e) vectors[s].element[e] = row[s * of_pixel + e * of_input];
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
        for (int e = 0; e < kGroupInputs; ++e) {
          sums[j] = fma(filter[r][s][e], widen(vectors[s].element[e]), sums[j]);
        }
      }
    }
  }
  const int of_row = p.w.out * (kNchw ? 1 : p.outputs.divisor());
  T* target = output + (place.image * p.h.out + place.row * kColumn) * of_row +
              (kNchw ? place.column : place.column * p.outputs.divisor() + channel);
  const float added = bias == nullptr ? 0.0f : widen(bias[channel]);
#pragma unroll
  for (int j = 0; j < kColumn; ++j) {
    if (place.row * kColumn + j < p.h.out) target[j * of_row] = narrow<T>(sums[j] + added);
  }
}

// group_read: channels of a group that are read, group_written: those of the result.
bool has_few_channels(const Conv2dShape& s, int64_t group_read, int64_t group_written) {
  const int64_t most_written = 8, stride = s.stride_h;
  const bool is_square = s.kernel_h == kKernel && s.kernel_w == kKernel && s.stride_w == stride && s.dilation_h == 1 && s.dilation_w == 1;
  return s.groups > 1 && group_read == kGroupInputs && group_written <= most_written && is_square &&
         (stride == 1 || (stride == 2 && s.layout == Layout::nhwc)) && s.dtype != DType::float64 && has_int_extents(s) &&
         all_below(kMaxExtent, {product({s.batch, s.in_h + kColumn, s.in_w, s.in_channels}),
                                product({s.batch, s.out_h + kColumn, s.out_w, s.out_channels})});
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

ThreadPlaces places_of(Layout layout, const Pass& pass) {
  const int64_t outputs = pass.problem.outputs.divisor(), rows = ceil_div<int64_t>(pass.problem.h.out, kColumn), width = pass.problem.w.out;
  return layout == Layout::nchw ? ThreadPlaces(pass.batch * outputs, rows, width, 1) : ThreadPlaces(pass.batch, rows, width, outputs);
}

template <class T, Layout kLayout, int kStride, bool kWhole>
void launch_columns(const Pass& pass, cudaStream_t stream) {
  const ThreadPlaces places = places_of(kLayout, pass);
  launch_elementwise(convolve_columns<T, kLayout, kStride, kWhole>, places.count(), stream, pass.problem, places,
                     static_cast<const T*>(pass.input), static_cast<const T*>(pass.weight), static_cast<const T*>(pass.bias),
                     static_cast<T*>(pass.output));
}

template <class T, int kStride>
void launch_pass(Layout layout, const Pass& pass, cudaStream_t stream) {
  const bool is_whole = has_whole_vectors<kGroupInputs>(static_cast<const T*>(pass.input), pass.problem.inputs);
  if constexpr (kStride == 1) {
    if (layout == Layout::nchw) return launch_columns<T, Layout::nchw, kStride, false>(pass, stream);
  }
  (is_whole ? launch_columns<T, Layout::nhwc, kStride, true> : launch_columns<T, Layout::nhwc, kStride, false>)(pass, stream);
}

void run(const Conv2dShape& s, const Pass& pass, cudaStream_t stream) {
  with_single_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    (s.stride_h == 1 ? launch_pass<T, 1> : launch_pass<T, 2>)(s.layout, pass, stream);
  });
}

void run_forward(const Conv2dShape& s, const Conv2dBuffers& b, void*, cudaStream_t stream) { run(s, forward_pass(s, b), stream); }
void run_backward(const Conv2dShape& s, const Conv2dBuffers& b, void*, cudaStream_t stream) { run(s, backward_pass(s, b), stream); }

Plan plan_for(const Conv2dShape& s, const Pass& pass) {
  return {1, kColumn, ceil_div<int64_t>(places_of(s.layout, pass).count(), kBlockThreads), 0};
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
