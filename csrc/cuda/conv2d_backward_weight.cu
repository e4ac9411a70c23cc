// grad_weight[k, c, r, s] = sum over n, oh, ow of grad_output[n, k, oh, ow] * input[n, c, ih, iw].
//
// implicit_gemm: rows are the output channels of a group, columns its weights (c, r, s) in nchw, (r, s, c) in nhwc, depth the pixels
// (n, oh, ow). There are few tiles and a long depth, so the pixels are split among blocks and the partial sums added up by a second launch
// (see pixel_reduction.cuh).
//
// direct: a reduction over pixels for each weight; any shape, and what depthwise convolutions take. wide: the same where an int does not
// hold an extent.
#include "cuda/implicit_gemm.cuh"
#include "cuda/limits.h"
#include "cuda/pixel_reduction.cuh"
#include "cuda/relu_pool.cuh"

namespace cnn_ext::cuda {
namespace {

// Gradient: how grad_output is read (relu_pool.cuh).
template <class T, Layout kLayout, class Gradient>
struct BackwardWeightOperands {
  using Acc = Accumulate<T>;
  static constexpr bool kRowsAlongDepth = kLayout == Layout::nchw, kColsAlongDepth = kLayout == Layout::nchw;

  BackwardWeightOperands(const Conv2dGeometry& geometry, const Gradient& gradient_, const void* input_, void* workspace)
      : g(geometry),
        gradient(gradient_),
        input(static_cast<const T*>(input_)),
        partials(static_cast<Acc*>(workspace)),
        pixels(g.batch * g.out_h * g.out_w),
        weights(g.group_in * g.kernel_h * g.kernel_w),
        pixel_decoder(g.out_h, g.out_w),
        tap_decoder(g.group_in, g.kernel_h, g.kernel_w) {}

  __device__ void select(int group, int split) {
    first_plane = group * g.group_out * gradient.strides.c;
    input += group * g.group_in * g.in.c;
    partials += (static_cast<int64_t>(split) * g.groups + group) * g.group_out * g.filter.n;
  }

  struct Row {
    int64_t plane;  // of image 0; -1: none
  };
  struct Col {
    const T* plane;  // null: none
    int h, w;        // of the tap in the window of output (0, 0)
  };
  using Depth = PlaneIndex;

  __device__ Row row(int k) const { return {k < g.group_out ? first_plane + k * gradient.strides.c : -1}; }
  __device__ Col col(int weight) const {
    if (weight >= weights) return {nullptr, 0, 0};
    const Tap tap = tap_decoder.at(weight);
    return {input + tap.channel * g.in.c, tap.r * g.dilation_h - g.pad_top, tap.s * g.dilation_w - g.pad_left};
  }
  __device__ Depth depth(int pixel) const { return pixel_decoder.at(pixel); }
  __device__ Acc load_row(const Row& row, const Depth& p) const {
    return row.plane < 0 ? Acc{0} : gradient.at(row.plane + p.outer * gradient.strides.n, p.h, p.w);
  }
  __device__ bool inside(const Col& col, const Depth& p) const {
    const int h = col.h + p.h * g.stride_h, w = col.w + p.w * g.stride_w;
    return col.plane != nullptr && h >= 0 && h < g.in_h && w >= 0 && w < g.in_w;
  }
  __device__ Acc load_col(const Col& col, const Depth& p) const {
    const int h = col.h + p.h * g.stride_h, w = col.w + p.w * g.stride_w;
    return widen(col.plane[p.outer * g.in.n + h * g.in.h + w * g.in.w]);
  }
  template <int kCount>
  __device__ void store(int k, int weight, const Acc (&sums)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) store(k, weight + i, sums[i]);
  }
  __device__ void store(int k, int weight, Acc sum) const {
    if (k >= g.group_out || weight >= weights) return;
    const Tap tap = tap_decoder.at(weight);
    partials[k * g.filter.n + tap.channel * g.filter.c + tap.r * g.filter.h + tap.s * g.filter.w] = sum;
  }

  Conv2dGeometry g;
  Gradient gradient;
  int64_t first_plane = 0;  // of the group
  const T* input;
  Acc* partials;  // [splits][the weights in memory order]
  int pixels, weights;
  PlaneDecoder pixel_decoder;
  TapDecoder<kLayout> tap_decoder;
};

// Blocks are numbered by row tile, column tile, group, split: those that read the same pixels run together.
template <class Tile, class T, Layout kLayout, class Gradient>
__global__ void __launch_bounds__(kBlockThreads, kResidentBlocks<Accumulate<T>>)
    backward_weight_implicit_gemm(BackwardWeightOperands<T, kLayout, Gradient> operands, int row_tiles, int col_tiles, int split_size) {
  const int row_tile = blockIdx.x % row_tiles, tiles = blockIdx.x / row_tiles;
  const int group = tiles / col_tiles % operands.g.groups, split = tiles / col_tiles / operands.g.groups;
  operands.select(group, split);
  const int begin = split * split_size, end = smaller(operands.pixels, begin + split_size);
  ImplicitGemm<Tile, BackwardWeightOperands<T, kLayout, Gradient>> gemm(operands, row_tile * Tile::kRows, tiles % col_tiles * Tile::kCols,
                                                                        begin, end);
  gemm.run();
}

int64_t weight_elements(const Conv2dShape& s) { return s.out_channels * (s.in_channels / s.groups) * s.kernel_h * s.kernel_w; }

// The tiles of all groups, and how the pixels are divided among blocks for each of them.
template <class Tile>
struct Division {
  explicit Division(const Conv2dShape& s)
      : row_tiles(ceil_div<int64_t>(s.out_channels / s.groups, Tile::kRows)),
        col_tiles(ceil_div<int64_t>(s.in_channels / s.groups * s.kernel_h * s.kernel_w, Tile::kCols)),
        splits(split_sum(pixels_of(s), row_tiles * col_tiles * s.groups, weight_elements(s), Tile::kDepth)),
        blocks(row_tiles * col_tiles * s.groups * splits.count) {}
  int64_t row_tiles, col_tiles;
  Splits splits;
  int64_t blocks;
};

bool gemm_accepts(const Conv2dShape& s) { return suits_implicit_gemm(s, s.out_channels / s.groups); }

template <class Tile>
Plan gemm_plan(const Conv2dShape& s) {
  const Division<Tile> division(s);
  return {Tile::kRows, Tile::kCols, division.blocks, partials_bytes(s.dtype, division.splits, weight_elements(s))};
}

template <class Tile, class T, Layout kLayout, class Gradient, class Buffers>
void launch_gemm(const Conv2dShape& s, const Gradient& gradient, const Buffers& b, void* workspace, cudaStream_t stream) {
  const Division<Tile> division(s);
  launch(backward_weight_implicit_gemm<Tile, T, kLayout, Gradient>, division.blocks, stream,
         BackwardWeightOperands<T, kLayout, Gradient>(Conv2dGeometry(s), gradient, b.input, workspace),
         static_cast<int>(division.row_tiles), static_cast<int>(division.col_tiles), static_cast<int>(division.splits.size));
  launch_sum_partials<T>(workspace, division.splits, weight_elements(s), b.grad_weight, stream);
}

template <class T, class Gradient, class Buffers>
void run_gemm_of(const Conv2dShape& s, const Gradient& gradient, const Buffers& b, void* workspace, cudaStream_t stream) {
  const bool is_flat = has_few_rows(s.out_channels / s.groups);
  if (s.layout == Layout::nchw) {
    (is_flat ? launch_gemm<FlatTile, T, Layout::nchw, Gradient, Buffers>
             : launch_gemm<SquareTile, T, Layout::nchw, Gradient, Buffers>)(s, gradient, b, workspace, stream);
  } else {
    (is_flat ? launch_gemm<FlatTile, T, Layout::nhwc, Gradient, Buffers>
             : launch_gemm<SquareTile, T, Layout::nhwc, Gradient, Buffers>)(s, gradient, b, workspace, stream);
  }
}

Plan plan_gemm(const Conv2dShape& s) { return has_few_rows(s.out_channels / s.groups) ? gemm_plan<FlatTile>(s) : gemm_plan<SquareTile>(s); }

void run_gemm(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, cudaStream_t stream) {
  with_element_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    run_gemm_of<T>(s, PlainGradient<T>(s, b), b, workspace, stream);
  });
}

bool masked_gemm_accepts(const Conv2dReluPoolShape& s) { return suits_fused_gemm(s, s.conv.out_channels / s.conv.groups); }

Plan plan_masked_gemm(const Conv2dReluPoolShape& s) { return plan_gemm(s.conv); }

void run_masked_gemm(const Conv2dReluPoolShape& s, const Conv2dReluPoolBuffers& b, void* workspace, cudaStream_t stream) {
  with_strict_type(s.conv.dtype, [&](auto element) {
    using T = decltype(element);
    run_gemm_of<T>(s.conv, MaskedGradient<T>(s, b), b, workspace, stream);
  });
}

template <class T, class Integer>
struct WeightTerms {
  using Acc = Accumulate<T>;
  struct Target {
    const T* grad_output;  // plane k of image 0
    const T* input;        // plane c of image 0
    Integer h, w;          // of the tap in the window of output (0, 0)
    int64_t offset;
  };

  WeightTerms(const Conv2dShape& s, const Conv2dBuffers& b)
      : g(s), grad_output(static_cast<const T*>(b.grad_output)), input(static_cast<const T*>(b.input)), targets(weight_elements(s)) {}

  // Numbered (k, c, r, s), in nhwc (c, r, s, k): neighbouring output channels lie side by side there.
  __device__ Target target(int64_t index) const {
    const bool nchw = g.layout == Layout::nchw;
    const ElementOf<Integer> e = element_at(g.layout, index, nchw ? g.group_in : g.groups * g.group_out, g.kernel_h, g.kernel_w);
    const Integer k = nchw ? e.n : e.c, c = nchw ? e.c : e.n;
    const Integer channel = k / g.group_out * g.group_in + c;
    return {grad_output + k * g.out.c, input + channel * g.in.c, e.h * g.dilation_h - g.pad_top, e.w * g.dilation_w - g.pad_left,
            k * g.filter.n + c * g.filter.c + e.h * g.filter.h + e.w * g.filter.w};
  }
  __device__ Acc term(const Target& t, const PlaneIndexOf<Integer>& p) const {
    const Integer h = t.h + p.h * g.stride_h, w = t.w + p.w * g.stride_w;
    if (h < 0 || h >= g.in_h || w < 0 || w >= g.in_w) return 0;
    return widen(t.grad_output[p.outer * g.out.n + p.h * g.out.h + p.w * g.out.w]) *
           widen(t.input[p.outer * g.in.n + h * g.in.h + w * g.in.w]);
  }
  __device__ int64_t offset(const Target& t) const { return t.offset; }

  Conv2dGeometryOf<Integer> g;
  const T* grad_output;
  const T* input;
  int64_t targets;
};

template <class Integer>
Plan plan_direct(const Conv2dShape& s) {
  return plan_reduction<Integer>(s, weight_elements(s));
}

template <class Integer>
void run_direct(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, cudaStream_t stream) {
  with_element_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    run_reduction<T, Integer>(s, WeightTerms<T, Integer>(s, b), workspace, b.grad_weight, stream);
  });
}

}  // namespace

extern const Conv2dKernel conv2d_backward_weight_implicit_gemm_sm80 = {
    "conv2d_backward_weight_implicit_gemm_sm80", 80, Conv2dDirection::backward_weight, gemm_accepts, plan_gemm, run_gemm};
extern const Conv2dReluPoolKernel conv2d_relu_max_pool2d_backward_weight_implicit_gemm_sm80 = {
    "conv2d_relu_max_pool2d_backward_weight_implicit_gemm_sm80",
    80,
    Conv2dDirection::backward_weight,
    masked_gemm_accepts,
    plan_masked_gemm,
    run_masked_gemm};
extern const Conv2dKernel conv2d_backward_weight_direct_sm80 = {
    "conv2d_backward_weight_direct_sm80", 80, Conv2dDirection::backward_weight, has_int_extents, plan_direct<int>, run_direct<int>};
extern const Conv2dKernel conv2d_backward_weight_wide_sm80 = {
    "conv2d_backward_weight_wide_sm80", 80, Conv2dDirection::backward_weight, has_any_extents, plan_direct<int64_t>, run_direct<int64_t>};

}  // namespace cnn_ext::cuda
