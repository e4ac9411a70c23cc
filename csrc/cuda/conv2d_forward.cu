// output[n, k, oh, ow] = bias[k] + sum over c, r, s of weight[k, c, r, s] * input[n, c, ih, iw].
//
// implicit_gemm: rows are the output channels of a group, columns the pixels (n, oh, ow), depth the taps (c, r, s) in nchw, (r, s, c) in
// nhwc. A block's pixels may belong to several images. Neighbouring threads read neighbouring pixels (nchw) or channels (nhwc).
//
// direct: one thread per output adds up its taps in the same order as the GEMM in nchw; any shape, and what depthwise convolutions take.
#include "cuda/implicit_gemm.cuh"
#include "cuda/limits.h"

namespace cnn_ext::cuda {
namespace {

template <class T, Layout kLayout>
struct ForwardOperands {
  using Acc = Accumulate<T>;
  static constexpr bool kRowsAlongDepth = true, kColsAlongDepth = kLayout == Layout::nhwc;

  ForwardOperands(const Conv2dGeometry& geometry, const Conv2dBuffers& b)
      : g(geometry),
        input(static_cast<const T*>(b.input)),
        weight(static_cast<const T*>(b.weight)),
        bias(static_cast<const T*>(b.bias)),
        output(static_cast<T*>(b.output)),
        pixels(g.batch * g.out_h * g.out_w),
        terms(g.group_in * g.kernel_h * g.kernel_w),
        pixel_decoder(g.out_h, g.out_w),
        tap_decoder(g.group_in, g.kernel_h, g.kernel_w) {}

  __device__ void select_group(int group) {
    input += group * g.group_in * g.in.c;
    weight += group * g.group_out * g.filter.n;
    bias += bias != nullptr ? group * g.group_out : 0;
    output += group * g.group_out * g.out.c;
  }

  struct Row {
    const T* filter;  // null: none
  };
  struct Col {
    const T* image;  // null: none
    int h, w;        // of the window's first tap
  };
  using Depth = Tap;

  __device__ Row row(int k) const { return {k < g.group_out ? weight + k * g.filter.n : nullptr}; }
  __device__ Col col(int pixel) const {
    if (pixel >= pixels) return {nullptr, 0, 0};
    const PlaneIndex p = pixel_decoder.at(pixel);
    return {input + p.outer * g.in.n, p.h * g.stride_h - g.pad_top, p.w * g.stride_w - g.pad_left};
  }
  __device__ Depth depth(int term) const { return tap_decoder.at(term); }
  __device__ Acc load_row(const Row& row, const Depth& tap) const {
    return row.filter == nullptr ? Acc{0} : widen(row.filter[tap.channel * g.filter.c + tap.r * g.filter.h + tap.s * g.filter.w]);
  }
  __device__ bool inside(const Col& col, const Depth& tap) const {
    const int h = col.h + tap.r * g.dilation_h, w = col.w + tap.s * g.dilation_w;
    return col.image != nullptr && h >= 0 && h < g.in_h && w >= 0 && w < g.in_w;
  }
  __device__ Acc load_col(const Col& col, const Depth& tap) const {
    const int h = col.h + tap.r * g.dilation_h, w = col.w + tap.s * g.dilation_w;
    return widen(col.image[tap.channel * g.in.c + h * g.in.h + w * g.in.w]);
  }
  __device__ void store(int k, int pixel, Acc sum) const {
    if (k >= g.group_out || pixel >= pixels) return;
    const PlaneIndex p = pixel_decoder.at(pixel);
    const int64_t offset = p.outer * g.out.n + k * g.out.c + p.h * g.out.h + p.w * g.out.w;
    output[offset] = narrow<T>(bias == nullptr ? sum : sum + widen(bias[k]));
  }

  Conv2dGeometry g;
  const T* input;
  const T* weight;
  const T* bias;
  T* output;
  int pixels, terms;
  PlaneDecoder pixel_decoder;
  TapDecoder<kLayout> tap_decoder;
};

// Blocks are numbered by row tile, group, column tile: those that read the same pixels run together.
template <class Tile, class T, Layout kLayout>
__global__ void __launch_bounds__(kBlockThreads, kResidentBlocks<Accumulate<T>>)
    forward_implicit_gemm(ForwardOperands<T, kLayout> operands, int row_tiles, int groups) {
  const int row_tile = blockIdx.x % row_tiles, rest = blockIdx.x / row_tiles;
  operands.select_group(rest % groups);
  ImplicitGemm<Tile, ForwardOperands<T, kLayout>> gemm(operands, row_tile * Tile::kRows, rest / groups * Tile::kCols, 0, operands.terms);
  gemm.run();
}

bool gemm_accepts(const Conv2dShape& s) { return suits_implicit_gemm(s, s.out_channels / s.groups); }

template <class Tile>
Plan gemm_plan(const Conv2dShape& s) {
  const int64_t row_tiles = ceil_div<int64_t>(s.out_channels / s.groups, Tile::kRows);
  const int64_t col_tiles = ceil_div<int64_t>(s.batch * s.out_h * s.out_w, Tile::kCols);
  return {Tile::kRows, Tile::kCols, row_tiles * s.groups * col_tiles, 0};
}

template <class Tile, class T, Layout kLayout>
void launch_gemm(const Conv2dShape& s, const Conv2dBuffers& b, cudaStream_t stream) {
  const Conv2dGeometry g(s);
  launch(forward_implicit_gemm<Tile, T, kLayout>, gemm_plan<Tile>(s).blocks, stream, ForwardOperands<T, kLayout>(g, b),
         ceil_div(g.group_out, Tile::kRows), g.groups);
}

template <class Tile>
void run_gemm_tile(const Conv2dShape& s, const Conv2dBuffers& b, cudaStream_t stream) {
  with_element_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    if (s.layout == Layout::nchw) {
      launch_gemm<Tile, T, Layout::nchw>(s, b, stream);
    } else {
      launch_gemm<Tile, T, Layout::nhwc>(s, b, stream);
    }
  });
}

Plan plan_gemm(const Conv2dShape& s) { return has_few_rows(s.out_channels / s.groups) ? gemm_plan<FlatTile>(s) : gemm_plan<SquareTile>(s); }

void run_gemm(const Conv2dShape& s, const Conv2dBuffers& b, void*, cudaStream_t stream) {
  (has_few_rows(s.out_channels / s.groups) ? run_gemm_tile<FlatTile> : run_gemm_tile<SquareTile>)(s, b, stream);
}

template <class T>
__global__ void forward_direct(Conv2dGeometry g, Conv2dBuffers b, int64_t elements) {
  const int64_t index = element_index();
  if (index >= elements) return;
  const Element o = element_at(g.layout, index, g.groups * g.group_out, g.out_h, g.out_w);
  const int first_h = o.h * g.stride_h - g.pad_top, first_w = o.w * g.stride_w - g.pad_left;
  const Range rows = taps_inside(first_h, g.dilation_h, g.kernel_h, g.in_h);
  const Range cols = taps_inside(first_w, g.dilation_w, g.kernel_w, g.in_w);
  const T* image = static_cast<const T*>(b.input) + o.n * g.in.n + o.c / g.group_out * g.group_in * g.in.c;
  const T* filter = static_cast<const T*>(b.weight) + o.c * g.filter.n;
  Accumulate<T> sum = 0;
  for (int c = 0; c < g.group_in; ++c) {
    for (int r = rows.begin; r < rows.end; ++r) {
      const T* image_row = image + c * g.in.c + (first_h + r * g.dilation_h) * g.in.h;
      const T* filter_row = filter + c * g.filter.c + r * g.filter.h;
      for (int t = cols.begin; t < cols.end; ++t) {
        sum = fma(widen(filter_row[t * g.filter.w]), widen(image_row[(first_w + t * g.dilation_w) * g.in.w]), sum);
      }
    }
  }
  if (b.bias != nullptr) sum += widen(static_cast<const T*>(b.bias)[o.c]);
  static_cast<T*>(b.output)[index] = narrow<T>(sum);
}

int64_t output_elements(const Conv2dShape& s) { return s.batch * s.out_channels * s.out_h * s.out_w; }

Plan plan_direct(const Conv2dShape& s) { return {1, 1, ceil_div<int64_t>(output_elements(s), kBlockThreads), 0}; }

void run_direct(const Conv2dShape& s, const Conv2dBuffers& b, void*, cudaStream_t stream) {
  with_element_type(s.dtype, [&](auto element) {
    launch_elementwise(forward_direct<decltype(element)>, output_elements(s), stream, Conv2dGeometry(s), b, output_elements(s));
  });
}

}  // namespace

extern const Conv2dKernel conv2d_forward_implicit_gemm_sm80 = {
    "conv2d_forward_implicit_gemm_sm80", 80, Conv2dDirection::forward, gemm_accepts, plan_gemm, run_gemm};
extern const Conv2dKernel conv2d_forward_direct_sm80 = {
    "conv2d_forward_direct_sm80", 80, Conv2dDirection::forward, has_int_extents, plan_direct, run_direct};

}  // namespace cnn_ext::cuda
