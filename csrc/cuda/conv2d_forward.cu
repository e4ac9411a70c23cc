// output[n, k, oh, ow] = bias[k] + sum over c, r, s of weight[k, c, r, s] * input[n, c, ih, iw].
//
// implicit_gemm: rows are the output channels of a group, columns the pixels (n, oh, ow), depth the taps (c, r, s) in nchw, (r, s, c) in
// nhwc. A block's pixels may belong to several images. Neighbouring threads read neighbouring pixels (nchw) or channels (nhwc).
//
// direct: one thread per output adds up its taps in the same order as the GEMM in nchw; any shape, and what depthwise convolutions take.
// wide: the same where an int does not hold an extent.
#include "cuda/implicit_gemm.cuh"
#include "cuda/limits.h"
#include "cuda/relu_pool.cuh"

namespace cnn_ext::cuda {
namespace {

// How the outputs are numbered and stored: one by one, or as windows of the pooling (WindowStore).
template <class T>
struct PlainStore {
  using Acc = Accumulate<T>;

  PlainStore(const Conv2dShape& s, const Conv2dBuffers& b)
      : output(static_cast<T*>(b.output)),
        bias(static_cast<const T*>(b.bias)),
        strides(strides_of(s.layout, s.out_channels, s.out_h, s.out_w)),
        decoder(static_cast<int>(s.out_h), static_cast<int>(s.out_w)),
        pixels(static_cast<int>(s.batch * s.out_h * s.out_w)) {}

  __device__ void select_channel(int channel) {
    output += channel * strides.c;
    if (bias != nullptr) bias += channel;
  }
  template <int kCount>
  __device__ void store(int pixel, int k, const Acc (&sums)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (pixel + i >= pixels) return;
      const PlaneIndex p = decoder.at(pixel + i);
      const int64_t offset = p.outer * strides.n + k * strides.c + p.h * strides.h + p.w * strides.w;
      output[offset] = narrow<T>(bias == nullptr ? sums[i] : sums[i] + widen(bias[k]));
    }
  }

  T* output;
  const T* bias;  // null: none
  Strides strides;
  PlaneDecoder decoder;
  int pixels;
};

template <class T, Layout kLayout, class Store>
struct ForwardOperands {
  using Acc = Accumulate<T>;
  static constexpr bool kRowsAlongDepth = true, kColsAlongDepth = kLayout == Layout::nhwc;

  ForwardOperands(const Conv2dGeometry& geometry, const Store& outputs, const void* input_, const void* weight_)
      : g(geometry),
        out(outputs),
        input(static_cast<const T*>(input_)),
        weight(static_cast<const T*>(weight_)),
        terms(g.group_in * g.kernel_h * g.kernel_w),
        tap_decoder(g.group_in, g.kernel_h, g.kernel_w) {}

  __device__ void select_group(int group) {
    input += group * g.group_in * g.in.c;
    weight += group * g.group_out * g.filter.n;
    out.select_channel(group * g.group_out);
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
    if (pixel >= out.pixels) return {nullptr, 0, 0};
    const PlaneIndex p = out.decoder.at(pixel);
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
  template <int kCount>
  __device__ void store(int k, int pixel, const Acc (&sums)[kCount]) const {
    if (k < g.group_out) out.store(pixel, k, sums);
  }

  Conv2dGeometry g;
  Store out;
  const T* input;
  const T* weight;
  int terms;
  TapDecoder<kLayout> tap_decoder;
};

// Blocks are numbered by row tile, group, column tile: those that read the same pixels run together.
template <class Tile, class T, Layout kLayout, class Store>
__global__ void __launch_bounds__(kBlockThreads, kResidentBlocks<Accumulate<T>>)
    forward_implicit_gemm(ForwardOperands<T, kLayout, Store> operands, int row_tiles, int groups) {
  const int row_tile = blockIdx.x % row_tiles, rest = blockIdx.x / row_tiles;
  operands.select_group(rest % groups);
  ImplicitGemm<Tile, ForwardOperands<T, kLayout, Store>> gemm(operands, row_tile * Tile::kRows, rest / groups * Tile::kCols, 0,
                                                              operands.terms);
  gemm.run();
}

bool gemm_accepts(const Conv2dShape& s) { return suits_implicit_gemm(s, s.out_channels / s.groups); }

template <class Tile>
Plan gemm_plan(const Conv2dShape& s, int64_t pixels) {
  const int64_t row_tiles = ceil_div<int64_t>(s.out_channels / s.groups, Tile::kRows);
  return {Tile::kRows, Tile::kCols, row_tiles * s.groups * ceil_div<int64_t>(pixels, Tile::kCols), 0};
}

Plan plan_gemm_of(const Conv2dShape& s, int64_t pixels) {
  return (has_few_rows(s.out_channels / s.groups) ? gemm_plan<FlatTile> : gemm_plan<SquareTile>)(s, pixels);
}

template <class Tile, class T, Layout kLayout, class Store, class Buffers>
void launch_gemm(const Conv2dShape& s, const Store& store, const Buffers& b, cudaStream_t stream) {
  const Conv2dGeometry g(s);
  launch(forward_implicit_gemm<Tile, T, kLayout, Store>, gemm_plan<Tile>(s, store.pixels).blocks, stream,
         ForwardOperands<T, kLayout, Store>(g, store, b.input, b.weight), ceil_div(g.group_out, Tile::kRows), g.groups);
}

template <class T, class Store, class Buffers>
void run_gemm_of(const Conv2dShape& s, const Store& store, const Buffers& b, cudaStream_t stream) {
  const bool is_flat = has_few_rows(s.out_channels / s.groups);
  if (s.layout == Layout::nchw) {
    (is_flat ? launch_gemm<FlatTile, T, Layout::nchw, Store, Buffers>
             : launch_gemm<SquareTile, T, Layout::nchw, Store, Buffers>)(s, store, b, stream);
  } else {
    (is_flat ? launch_gemm<FlatTile, T, Layout::nhwc, Store, Buffers>
             : launch_gemm<SquareTile, T, Layout::nhwc, Store, Buffers>)(s, store, b, stream);
  }
}

Plan plan_gemm(const Conv2dShape& s) { return plan_gemm_of(s, s.batch * s.out_h * s.out_w); }

void run_gemm(const Conv2dShape& s, const Conv2dBuffers& b, void*, cudaStream_t stream) {
  with_element_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    run_gemm_of<T>(s, PlainStore<T>(s, b), b, stream);
  });
}

bool pooled_gemm_accepts(const Conv2dReluPoolShape& s) {
  return has_stored_windows(s) && suits_fused_gemm(s, s.conv.out_channels / s.conv.groups);
}

Plan plan_pooled_gemm(const Conv2dReluPoolShape& s) {
  return plan_gemm_of(s.conv, s.conv.batch * s.pooled_h * s.pooled_w * s.pool_h * s.pool_w);
}

void run_pooled_gemm(const Conv2dReluPoolShape& s, const Conv2dReluPoolBuffers& b, void*, cudaStream_t stream) {
  with_strict_type(s.conv.dtype, [&](auto element) {
    using T = decltype(element);
    run_gemm_of<T>(s.conv, WindowStore<T>(s, b), b, stream);
  });
}

template <class T, class Integer>
__global__ void forward_direct(Conv2dGeometryOf<Integer> g, Conv2dBuffers b, int64_t elements) {
  const int64_t index = element_index();
  if (index >= elements) return;
  const ElementOf<Integer> o = element_at(g.layout, index, g.groups * g.group_out, g.out_h, g.out_w);
  const Integer first_h = o.h * g.stride_h - g.pad_top, first_w = o.w * g.stride_w - g.pad_left;
  const RangeOf<Integer> rows = taps_inside(first_h, g.dilation_h, g.kernel_h, g.in_h);
  const RangeOf<Integer> cols = taps_inside(first_w, g.dilation_w, g.kernel_w, g.in_w);
  const T* image = static_cast<const T*>(b.input) + o.n * g.in.n + o.c / g.group_out * g.group_in * g.in.c;
  const T* filter = static_cast<const T*>(b.weight) + o.c * g.filter.n;
  Accumulate<T> sum = 0;
  for (Integer c = 0; c < g.group_in; ++c) {
    for (Integer r = rows.begin; r < rows.end; ++r) {
      const T* image_row = image + c * g.in.c + (first_h + r * g.dilation_h) * g.in.h;
      const T* filter_row = filter + c * g.filter.c + r * g.filter.h;
      for (Integer t = cols.begin; t < cols.end; ++t) {
        sum = fma(widen(filter_row[t * g.filter.w]), widen(image_row[(first_w + t * g.dilation_w) * g.in.w]), sum);
      }
    }
  }
  if (b.bias != nullptr) sum += widen(static_cast<const T*>(b.bias)[o.c]);
  static_cast<T*>(b.output)[index] = narrow<T>(sum);
}

int64_t output_elements(const Conv2dShape& s) { return s.batch * s.out_channels * s.out_h * s.out_w; }

Plan plan_direct(const Conv2dShape& s) { return {1, 1, ceil_div<int64_t>(output_elements(s), kBlockThreads), 0}; }

template <class Integer>
void run_direct(const Conv2dShape& s, const Conv2dBuffers& b, void*, cudaStream_t stream) {
  with_element_type(s.dtype, [&](auto element) {
    launch_elementwise(forward_direct<decltype(element), Integer>, output_elements(s), stream, Conv2dGeometryOf<Integer>(s), b,
                       output_elements(s));
  });
}

}  // namespace

extern const Conv2dKernel conv2d_forward_implicit_gemm_sm80 = {
    "conv2d_forward_implicit_gemm_sm80", 80, Conv2dDirection::forward, gemm_accepts, plan_gemm, run_gemm};
extern const Conv2dReluPoolKernel conv2d_relu_max_pool2d_forward_implicit_gemm_sm80 = {"conv2d_relu_max_pool2d_forward_implicit_gemm_sm80",
                                                                                       80,
                                                                                       Conv2dDirection::forward,
                                                                                       pooled_gemm_accepts,
                                                                                       plan_pooled_gemm,
                                                                                       run_pooled_gemm};
extern const Conv2dKernel conv2d_forward_direct_sm80 = {
    "conv2d_forward_direct_sm80", 80, Conv2dDirection::forward, has_int_extents, plan_direct, run_direct<int>};
extern const Conv2dKernel conv2d_forward_wide_sm80 = {
    "conv2d_forward_wide_sm80", 80, Conv2dDirection::forward, has_any_extents, plan_direct, run_direct<int64_t>};

}  // namespace cnn_ext::cuda
