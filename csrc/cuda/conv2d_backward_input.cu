// grad_input[n, c, ih, iw] = sum over k, r, s of weight[k, c, r, s] * grad_output[n, k, oh, ow], over the taps that lead from (ih, iw) to
// an output. Every input gathers its own sum: nothing is scattered, nothing is added by two threads.
//
// implicit_gemm: rows are the input channels of a group, columns the input pixels, depth the taps (k, r, s) in nchw, (r, s, k) in nhwc.
// With a stride only every stride-th tap leads from a pixel to an output. So a block takes pixels of one stride phase, which share their
// taps: no product is wasted (see Phase). Phases differ in size by one pixel per axis; all get the larger one's blocks.
//
// direct: one thread per input; any shape, and what depthwise convolutions take. wide: the same where an int does not hold an extent.
#include "cuda/implicit_gemm.cuh"
#include "cuda/limits.h"
#include "cuda/relu_pool.cuh"

namespace cnn_ext::cuda {
namespace {

// Gradient: how grad_output is read (relu_pool.cuh).
template <class T, Layout kLayout, class Gradient>
struct BackwardInputOperands {
  using Acc = Accumulate<T>;
  static constexpr bool kRowsAlongDepth = kLayout == Layout::nchw, kColsAlongDepth = kLayout == Layout::nhwc;

  BackwardInputOperands(const Conv2dGeometry& geometry, const Gradient& gradient_, const void* weight_, const void* bias_,
                        void* grad_input_)
      : g(geometry),
        gradient(gradient_),
        weight(static_cast<const T*>(weight_)),
        bias(static_cast<const T*>(bias_)),
        grad_input(static_cast<T*>(grad_input_)),
        phase_height(ceil_div(g.in_h, g.stride_h)),
        phase_width(ceil_div(g.in_w, g.stride_w)),
        pixels(g.batch * phase_height * phase_width),
        pixel_decoder(phase_height, phase_width) {}

  __device__ void select_group(int group) {
    first_plane = group * g.group_out * gradient.strides.c;
    weight += group * g.group_out * g.filter.n;
    if (bias != nullptr) bias += group * g.group_in;
    grad_input += group * g.group_in * g.in.c;
  }

  struct Row {
    const T* filter;  // null: none
  };
  struct Col {
    int64_t plane;  // of the image's first channel in the group; -1: none
    int h, w;       // the output that the phase's first tap leads to
  };
  using Depth = Tap;  // channel k; r and s count the taps of the phase

  __device__ Row row(int c) const { return {c < g.group_in ? weight + c * g.filter.c : nullptr}; }
  __device__ Col col(int pixel) const {
    const PlaneIndex p = pixel_decoder.at(pixel);
    if (!exists(pixel, p)) return {-1, 0, 0};
    return {first_plane + p.outer * gradient.strides.n, phase_h.origin + p.h, phase_w.origin + p.w};
  }
  __device__ Depth depth(int term) const { return tap_decoder.at(term); }
  __device__ Acc load_row(const Row& row, const Depth& tap) const {
    if (row.filter == nullptr) return Acc{0};
    const int r = phase_h.first_tap + tap.r * phase_h.tap_step, t = phase_w.first_tap + tap.s * phase_w.tap_step;
    return widen(row.filter[tap.channel * g.filter.n + r * g.filter.h + t * g.filter.w]);
  }
  __device__ bool inside(const Col& col, const Depth& tap) const {
    const int h = col.h - tap.r * phase_h.step, w = col.w - tap.s * phase_w.step;
    return col.plane >= 0 && h >= 0 && h < g.out_h && w >= 0 && w < g.out_w;
  }
  __device__ Acc load_col(const Col& col, const Depth& tap) const {
    const int h = col.h - tap.r * phase_h.step, w = col.w - tap.s * phase_w.step;
    return gradient.at(col.plane + tap.channel * gradient.strides.c, h, w);
  }
  template <int kCount>
  __device__ void store(int c, int pixel, const Acc (&sums)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) store(c, pixel + i, sums[i]);
  }
  __device__ void store(int c, int pixel, Acc sum) const {
    const PlaneIndex p = pixel_decoder.at(pixel);
    if (c >= g.group_in || !exists(pixel, p)) return;
    const int h = phase_h.first_position + p.h * g.stride_h, w = phase_w.first_position + p.w * g.stride_w;
    if (bias != nullptr) sum += widen(bias[c]);
    grad_input[p.outer * g.in.n + c * g.in.c + h * g.in.h + w * g.in.w] = narrow<T>(sum);
  }

  // The larger phases' last row and column are missing in the others.
  __device__ bool exists(int pixel, const PlaneIndex& p) const {
    return pixel < pixels && phase_h.first_position + p.h * g.stride_h < g.in_h && phase_w.first_position + p.w * g.stride_w < g.in_w;
  }

  Conv2dGeometry g;
  Gradient gradient;
  int64_t first_plane = 0;  // of the group
  const T* weight;
  const T* bias;  // null: none
  T* grad_input;
  int phase_height, phase_width, pixels;
  PlaneDecoder pixel_decoder;
  Phase phase_h{}, phase_w{};
  TapDecoder<kLayout> tap_decoder{1, 1, 1};
};

// Blocks are numbered by row tile, group, phase, column tile.
template <class Tile, class T, Layout kLayout, class Gradient>
__global__ void __launch_bounds__(kBlockThreads, kResidentBlocks<Accumulate<T>>)
    backward_input_implicit_gemm(BackwardInputOperands<T, kLayout, Gradient> operands, int row_tiles, int groups, int phases) {
  const Conv2dGeometry& g = operands.g;
  const int row_tile = blockIdx.x % row_tiles, tiles = blockIdx.x / row_tiles;
  const int phase = tiles / groups % phases, col_tile = tiles / groups / phases;
  operands.select_group(tiles % groups);
  operands.phase_h = phase_of(phase / g.stride_w, g.stride_h, g.pad_top, g.dilation_h, g.kernel_h);
  operands.phase_w = phase_of(phase % g.stride_w, g.stride_w, g.pad_left, g.dilation_w, g.kernel_w);
  operands.tap_decoder = TapDecoder<kLayout>(g.group_out, operands.phase_h.taps, operands.phase_w.taps);
  const int terms = g.group_out * operands.phase_h.taps * operands.phase_w.taps;
  ImplicitGemm<Tile, BackwardInputOperands<T, kLayout, Gradient>> gemm(operands, row_tile * Tile::kRows, col_tile * Tile::kCols, 0, terms);
  gemm.run();
}

bool gemm_accepts(const Conv2dShape& s) { return suits_implicit_gemm(s, s.in_channels / s.groups); }

template <class Tile>
Plan gemm_plan(const Conv2dShape& s) {
  const int64_t row_tiles = ceil_div<int64_t>(s.in_channels / s.groups, Tile::kRows);
  const int64_t pixels = s.batch * ceil_div(s.in_h, s.stride_h) * ceil_div(s.in_w, s.stride_w);
  const int64_t col_tiles = ceil_div<int64_t>(pixels, Tile::kCols);
  return {Tile::kRows, Tile::kCols, row_tiles * s.groups * s.stride_h * s.stride_w * col_tiles, 0};
}

template <class Tile, class T, Layout kLayout, class Gradient, class Buffers>
void launch_gemm(const Conv2dShape& s, const Gradient& gradient, const Buffers& b, const void* bias, cudaStream_t stream) {
  const Conv2dGeometry g(s);
  launch(backward_input_implicit_gemm<Tile, T, kLayout, Gradient>, gemm_plan<Tile>(s).blocks, stream,
         BackwardInputOperands<T, kLayout, Gradient>(g, gradient, b.weight, bias, b.grad_input), ceil_div(g.group_in, Tile::kRows),
         g.groups, g.stride_h * g.stride_w);
}

template <class T, class Gradient, class Buffers>
void run_gemm_of(const Conv2dShape& s, const Gradient& gradient, const Buffers& b, const void* bias, cudaStream_t stream) {
  const bool is_flat = has_few_rows(s.in_channels / s.groups);
  if (s.layout == Layout::nchw) {
    (is_flat ? launch_gemm<FlatTile, T, Layout::nchw, Gradient, Buffers>
             : launch_gemm<SquareTile, T, Layout::nchw, Gradient, Buffers>)(s, gradient, b, bias, stream);
  } else {
    (is_flat ? launch_gemm<FlatTile, T, Layout::nhwc, Gradient, Buffers>
             : launch_gemm<SquareTile, T, Layout::nhwc, Gradient, Buffers>)(s, gradient, b, bias, stream);
  }
}

Plan plan_gemm(const Conv2dShape& s) { return has_few_rows(s.in_channels / s.groups) ? gemm_plan<FlatTile>(s) : gemm_plan<SquareTile>(s); }

void run_gemm(const Conv2dShape& s, const Conv2dBuffers& b, void*, cudaStream_t stream) {
  with_element_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    run_gemm_of<T>(s, PlainGradient<T>(s, b), b, b.bias, stream);
  });
}

bool masked_gemm_accepts(const Conv2dReluPoolShape& s) { return suits_fused_gemm(s, s.conv.in_channels / s.conv.groups); }

Plan plan_masked_gemm(const Conv2dReluPoolShape& s) { return plan_gemm(s.conv); }

void run_masked_gemm(const Conv2dReluPoolShape& s, const Conv2dReluPoolBuffers& b, void*, cudaStream_t stream) {
  with_strict_type(s.conv.dtype, [&](auto element) {
    using T = decltype(element);
    run_gemm_of<T>(s.conv, MaskedGradient<T>(s, b), b, nullptr, stream);
  });
}

template <class T, class Integer>
__global__ void backward_input_direct(Conv2dGeometryOf<Integer> g, Conv2dBuffers b, int64_t elements) {
  const int64_t index = element_index();
  if (index >= elements) return;
  const ElementOf<Integer> i = element_at(g.layout, index, g.groups * g.group_in, g.in_h, g.in_w);
  const Integer padded_h = i.h + g.pad_top, padded_w = i.w + g.pad_left;
  const RangeOf<Integer> rows = windows_over(padded_h, g.stride_h, g.dilation_h, g.kernel_h, g.out_h);
  const RangeOf<Integer> cols = windows_over(padded_w, g.stride_w, g.dilation_w, g.kernel_w, g.out_w);
  const int64_t first_out = i.c / g.group_in * g.group_out;
  const T* grad_output = static_cast<const T*>(b.grad_output) + i.n * g.out.n + first_out * g.out.c;
  const T* weight = static_cast<const T*>(b.weight) + first_out * g.filter.n + i.c % g.group_in * g.filter.c;
  Accumulate<T> sum = b.bias != nullptr ? widen(static_cast<const T*>(b.bias)[i.c]) : Accumulate<T>{0};
  for (Integer k = 0; k < g.group_out; ++k) {
    for (Integer oh = rows.begin; oh < rows.end; ++oh) {
      const Integer offset_h = padded_h - oh * g.stride_h;
      if (offset_h % g.dilation_h != 0) continue;
      const T* out_row = grad_output + k * g.out.c + oh * g.out.h;
      const T* filter_row = weight + k * g.filter.n + offset_h / g.dilation_h * g.filter.h;
      for (Integer ow = cols.begin; ow < cols.end; ++ow) {
        const Integer offset_w = padded_w - ow * g.stride_w;
        if (offset_w % g.dilation_w != 0) continue;
        sum = fma(widen(filter_row[offset_w / g.dilation_w * g.filter.w]), widen(out_row[ow * g.out.w]), sum);
      }
    }
  }
  static_cast<T*>(b.grad_input)[index] = narrow<T>(sum);
}

int64_t input_elements(const Conv2dShape& s) { return s.batch * s.in_channels * s.in_h * s.in_w; }

Plan plan_direct(const Conv2dShape& s) { return {1, 1, ceil_div<int64_t>(input_elements(s), kBlockThreads), 0}; }

template <class Integer>
void run_direct(const Conv2dShape& s, const Conv2dBuffers& b, void*, cudaStream_t stream) {
  with_element_type(s.dtype, [&](auto element) {
    launch_elementwise(backward_input_direct<decltype(element), Integer>, input_elements(s), stream, Conv2dGeometryOf<Integer>(s), b,
                       input_elements(s));
  });
}

}  // namespace

extern const Conv2dKernel conv2d_backward_input_implicit_gemm_sm80 = {"conv2d_backward_input_implicit_gemm_sm80",
                                                                      80,
                                                                      Conv2dDirection::backward_input,
                                                                      gemm_accepts,
                                                                      plan_gemm,
                                                                      run_gemm,
                                                                      /*needs_proof=*/false,
                                                                      /*adds_bias=*/true};
extern const Conv2dReluPoolKernel conv2d_relu_max_pool2d_backward_input_implicit_gemm_sm80 = {
    "conv2d_relu_max_pool2d_backward_input_implicit_gemm_sm80",
    80,
    Conv2dDirection::backward_input,
    masked_gemm_accepts,
    plan_masked_gemm,
    run_masked_gemm};
extern const Conv2dKernel conv2d_backward_input_direct_sm80 = {"conv2d_backward_input_direct_sm80",
                                                               80,
                                                               Conv2dDirection::backward_input,
                                                               has_int_extents,
                                                               plan_direct,
                                                               run_direct<int>,
                                                               /*needs_proof=*/false,
                                                               /*adds_bias=*/true};
extern const Conv2dKernel conv2d_backward_input_wide_sm80 = {"conv2d_backward_input_wide_sm80",
                                                             80,
                                                             Conv2dDirection::backward_input,
                                                             has_any_extents,
                                                             plan_direct,
                                                             run_direct<int64_t>,
                                                             /*needs_proof=*/false,
                                                             /*adds_bias=*/true};

}  // namespace cnn_ext::cuda
