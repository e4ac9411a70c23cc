// Depthwise convolution of kernels of more than 7 x 7 taps, such as 31 x 31, without stride or dilation, in all three directions and both
// layouts. They are one sum over a channel's planes,
//   result[y, x] = sum over r, s of filter[r, s] * source[y + r - top, x + s - left]:
// forward with the filter, backward_input of grad_output with the filter turned round, and backward_weight of the input with grad_output
// for a filter and the taps for a result, which images add to in order.
//
// A block computes 32 x 32 results of a channel. It goes through the filter by bands of 32 x 32 taps: these and the 63 x 64 elements of the
// source that they meet lie in shared memory as floats, 20 KB. A thread computes four neighbours of a row: two reads of 16 bytes feed 16
// multiplications, which is what bounds it. In nchw the source is read by chunks of 16 bytes where its rows are aligned. backward_weight
// divides the images into splits, whose partial sums a second launch adds up (pixel_reduction.cuh).
//
// A sum takes its taps (r, s) in order, band after band, one fused multiplication each. Padding is zeros; a sum that is not a number is
// added up again from the products that exist.
//
// Not handled: float64; several filters for a channel. Maps much smaller than 32 x 32 leave most of a block idle.
#include "cuda/chunk.cuh"
#include "cuda/limits.h"
#include "cuda/pixel_reduction.cuh"
#include "cuda/vector.cuh"

namespace cnn_ext::cuda {
namespace {

constexpr int kTile = 32, kBand = 32, kOutputs = 4;  // kOutputs: neighbouring results of a thread
constexpr int kPatchRows = kTile + kBand - 1, kPatchCols = kTile + kBand;
static_assert(kTile * kTile == kBlockThreads * kOutputs);

// The planes of a tensor.
struct Planes {
  int64_t of_image, of_channel, of_row, of_col;  // distances, in elements
  int h, w;
};

struct Correlation {
  Planes source, filter, result;
  int top, left;
  bool is_turned;  // the filter
  bool is_whole;   // rows of the source are aligned chunks
  int channels, tiles_h, tiles_w;
};

template <class T>
struct Block {
  const T *source, *filter;  // of the channel and the first image
  int images, first_y, first_x;
};

// As kVector neighbouring elements at a time: elements outside are zeros.
template <int kVector, class T>
__device__ void stage_patch(const Planes& p, const T* plane, int first_h, int first_w, float* patch) {
  constexpr int kRowVectors = kPatchCols / kVector + (kVector > 1);
  const int aligned_w = first_w & ~(kVector - 1);
  for (int i = threadIdx.x; i < kPatchRows * kRowVectors; i += kBlockThreads) {
    const int row = i / kRowVectors, h = first_h + row, w = aligned_w + i % kRowVectors * kVector;
    Vector<T, kVector> vector = {};
    if (h >= 0 && h < p.h && w >= 0 && w < p.w) vector = load_vector<kVector>(plane + h * p.of_row + w * p.of_col);
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      const int col = w - first_w + e;
      if (col >= 0 && col < kPatchCols) patch[row * kPatchCols + col] = widen(vector.element[e]);
    }
  }
}

template <class T>
__device__ float filter_at(const Correlation& c, const T* filter, int r, int s) {
  const int h = c.is_turned ? c.filter.h - 1 - r : r, w = c.is_turned ? c.filter.w - 1 - s : s;
  return widen(filter[h * c.filter.of_row + w * c.filter.of_col]);
}

template <class T>
__device__ void stage_band(const Correlation& c, const T* filter, int first_r, int first_s, float* band) {
  for (int i = threadIdx.x; i < kBand * kBand; i += kBlockThreads) {
    const int r = first_r + i / kBand, s = first_s + i % kBand;
    band[i] = r < c.filter.h && s < c.filter.w ? filter_at(c, filter, r, s) : 0.0f;
  }
}

__device__ inline void read_four(const float* shared, float* four) {
  const Vector<float, 4> vector = load_vector<4>(shared);
#pragma unroll
  for (int i = 0; i < 4; ++i) four[i] = vector.element[i];
}

// patch: from this thread's first result on.
__device__ inline void add_band(const float* patch, const float* band, int rows, int cols, float (&sums)[kOutputs]) {
#pragma unroll 1
  for (int r = 0; r < rows; ++r) {
    float values[2 * kOutputs], taps[kOutputs];
    read_four(patch + r * kPatchCols, values);
#pragma unroll 2
    for (int s = 0; s < cols; s += kOutputs) {
      read_four(patch + r * kPatchCols + s + kOutputs, values + kOutputs);
      read_four(band + r * kBand + s, taps);
#pragma unroll
      for (int tap = 0; tap < kOutputs; ++tap) {
#pragma unroll
        for (int o = 0; o < kOutputs; ++o) sums[o] = fma(taps[tap], values[tap + o], sums[o]);
      }
#pragma unroll
      for (int i = 0; i < kOutputs; ++i) values[i] = values[i + kOutputs];
    }
  }
}

// One result from the products that exist.
template <class T>
__device__ float sum_inside(const Correlation& c, const Block<T>& block, int y, int x) {
  const int first_h = y - c.top, first_w = x - c.left;
  const Range rows = taps_inside(first_h, 1, c.filter.h, c.source.h), cols = taps_inside(first_w, 1, c.filter.w, c.source.w);
  float sum = 0;
#pragma unroll 1
  for (int image = 0; image < block.images; ++image) {
    const T* source = block.source + image * c.source.of_image;
    const T* filter = block.filter + image * c.filter.of_image;
#pragma unroll 1
    for (int r = rows.begin; r < rows.end; ++r) {
#pragma unroll 1
      for (int s = cols.begin; s < cols.end; ++s) {
        sum = fma(filter_at(c, filter, r, s), widen(source[(first_h + r) * c.source.of_row + (first_w + s) * c.source.of_col]), sum);
      }
    }
  }
  return sum;
}

// The sums of this thread over the images of the block.
template <class T>
__device__ void sum_planes(const Correlation& c, const Block<T>& block, int row, int col, float (&sums)[kOutputs]) {
  __shared__ __align__(16) float patch[kPatchRows * kPatchCols], band[kBand * kBand];
  for (int image = 0; image < block.images; ++image) {
    for (int r = 0; r < c.filter.h; r += kBand) {
      for (int s = 0; s < c.filter.w; s += kBand) {
        __syncthreads();
        const T* source = block.source + image * c.source.of_image;
        const int first_h = block.first_y + r - c.top, first_w = block.first_x + s - c.left;
        if (c.is_whole) {
          stage_patch<kChunk<T>>(c.source, source, first_h, first_w, patch);
        } else {
          stage_patch<1>(c.source, source, first_h, first_w, patch);
        }
        stage_band(c, block.filter + image * c.filter.of_image, r, s, band);
        __syncthreads();
        add_band(patch + row * kPatchCols + col, band, smaller(kBand, c.filter.h - r), smaller(kBand, c.filter.w - s), sums);
      }
    }
  }
  const int y = block.first_y + row, x = block.first_x + col;
#pragma unroll 1
  for (int o = 0; o < kOutputs; ++o) {
    if (isnan(sums[o]) && y < c.result.h && x + o < c.result.w) sums[o] = sum_inside(c, block, y, x + o);
  }
}

// Blocks are numbered by tile, channel, share of the images. Result: T, rounded with the bias, or float, sums of the share.
template <class T, class Result>
__global__ void __launch_bounds__(kBlockThreads, 2)
    correlate_planes(Correlation c, int images, int share, const T* __restrict__ source, const T* __restrict__ filter,
                     const T* __restrict__ bias, Result* __restrict__ result) {
  const int tile = blockIdx.x % (c.tiles_h * c.tiles_w), others = blockIdx.x / (c.tiles_h * c.tiles_w);
  const int channel = others % c.channels, first_image = others / c.channels * share;
  const Block<T> block{source + first_image * c.source.of_image + channel * c.source.of_channel,
                       filter + first_image * c.filter.of_image + channel * c.filter.of_channel, smaller(share, images - first_image),
                       tile / c.tiles_w * kTile, tile % c.tiles_w * kTile};
  const int row = threadIdx.x / (kTile / kOutputs), col = threadIdx.x % (kTile / kOutputs) * kOutputs;
  float sums[kOutputs] = {};
  sum_planes(c, block, row, col, sums);
  const int y = block.first_y + row, x = block.first_x + col;
  if (y >= c.result.h) return;
  const float added = bias == nullptr ? 0.0f : widen(bias[channel]);
  Result* target = result + others / c.channels * c.result.of_image + channel * c.result.of_channel + y * c.result.of_row;
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
    if (x + o < c.result.w) target[(x + o) * c.result.of_col] = narrow<Result>(sums[o] + added);
  }
}

int64_t tiles_along(int64_t size) { return ceil_div<int64_t>(size, kTile); }

constexpr int64_t kMostTaps = 49;  // of the other depthwise rows' unrolled kernels

bool accepts(const Conv2dShape& s) {
  return s.groups == s.in_channels && s.in_channels == s.out_channels && s.kernel_h * s.kernel_w > kMostTaps && s.stride_h == 1 &&
         s.stride_w == 1 && s.dilation_h == 1 && s.dilation_w == 1 && s.dtype != DType::float64 && has_int_extents(s) &&
         all_below(kMaxExtent, {product({s.batch, s.in_channels, tiles_along(s.out_h), tiles_along(s.out_w)}),
                                product({s.batch, s.in_channels, tiles_along(s.in_h), tiles_along(s.in_w)}),
                                product({s.batch, s.in_channels, tiles_along(s.kernel_h), tiles_along(s.kernel_w)})});
}

// In nhwc conv2d_depthwise.cu is the better one for maps that leave most of a tile empty.
bool accepts_maps(const Conv2dShape& s) {
  return accepts(s) && (s.layout == Layout::nchw || (s.out_h >= kTile / 2 && s.out_w >= kTile / 2));
}

Planes planes_of(const Strides& strides, int h, int w) { return {strides.n, strides.c, strides.h, strides.w, h, w}; }

// Of all channels' filters, which the images share.
Planes filter_planes(const Conv2dGeometry& g) { return {0, g.kernel_h * g.kernel_w, g.kernel_w, 1, g.kernel_h, g.kernel_w}; }

Correlation correlation_of(const Conv2dShape& s, Conv2dDirection direction) {
  const Conv2dGeometry g(s);
  const Planes in = planes_of(g.in, g.in_h, g.in_w), out = planes_of(g.out, g.out_h, g.out_w), filter = filter_planes(g);
  Correlation c{in, filter, out, g.pad_top, g.pad_left, false, false, g.groups, 0, 0};
  if (direction == Conv2dDirection::backward_input) {
    c.source = out, c.result = in, c.is_turned = true;
    c.top = g.kernel_h - 1 - g.pad_top, c.left = g.kernel_w - 1 - g.pad_left;
  } else if (direction == Conv2dDirection::backward_weight) {
    c.filter = out, c.result = filter;
    c.result.of_image = g.groups * filter.of_channel;
  }
  c.tiles_h = static_cast<int>(tiles_along(c.result.h)), c.tiles_w = static_cast<int>(tiles_along(c.result.w));
  return c;
}

int64_t tiles_of(const Correlation& c) { return static_cast<int64_t>(c.tiles_h) * c.tiles_w * c.channels; }

template <class T, class Result>
void launch_planes(Correlation c, const Conv2dShape& s, int64_t shares, int64_t share, const void* source, const void* filter,
                   const void* bias, void* result, cudaStream_t stream) {
  c.is_whole = c.source.of_col == 1 && has_whole_vectors<kChunk<T>>(static_cast<const T*>(source), c.source.w);
  launch(correlate_planes<T, Result>, tiles_of(c) * shares, stream, c, static_cast<int>(s.batch), static_cast<int>(share),
         static_cast<const T*>(source), static_cast<const T*>(filter), static_cast<const T*>(bias), static_cast<Result*>(result));
}

template <Conv2dDirection kDirection>
Plan plan(const Conv2dShape& s) {
  return {1, kTile * kTile, tiles_of(correlation_of(s, kDirection)) * s.batch, 0};
}

template <Conv2dDirection kDirection>
void run(const Conv2dShape& s, const Conv2dBuffers& b, void*, cudaStream_t stream) {
  constexpr bool kForward = kDirection == Conv2dDirection::forward;
  with_single_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    launch_planes<T, T>(correlation_of(s, kDirection), s, s.batch, 1, kForward ? b.input : b.grad_output, b.weight, b.bias,
                        kForward ? b.output : b.grad_input, stream);
  });
}

int64_t weight_elements(const Conv2dShape& s) { return s.in_channels * s.kernel_h * s.kernel_w; }

// Of the images.
Splits weight_splits(const Conv2dShape& s) {
  return split_sum(s.batch, tiles_of(correlation_of(s, Conv2dDirection::backward_weight)), weight_elements(s), 1, 1);
}

Plan plan_weight(const Conv2dShape& s) {
  const Splits splits = weight_splits(s);
  return {1, kTile * kTile, tiles_of(correlation_of(s, Conv2dDirection::backward_weight)) * splits.count,
          partials_bytes(s.dtype, splits, weight_elements(s))};
}

void run_weight(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, cudaStream_t stream) {
  const Splits splits = weight_splits(s);
  with_single_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    launch_planes<T, float>(correlation_of(s, Conv2dDirection::backward_weight), s, splits.count, splits.size, b.input, b.grad_output,
                            nullptr, workspace, stream);
    launch_sum_partials<T>(workspace, splits, weight_elements(s), b.grad_weight, stream);
  });
}

}  // namespace

extern const Conv2dKernel conv2d_forward_depthwise_large_sm80 = {
    "conv2d_forward_depthwise_large_sm80", 80, Conv2dDirection::forward, accepts_maps, plan<Conv2dDirection::forward>,
    run<Conv2dDirection::forward>};
extern const Conv2dKernel conv2d_backward_input_depthwise_large_sm80 = {"conv2d_backward_input_depthwise_large_sm80",
                                                                        80,
                                                                        Conv2dDirection::backward_input,
                                                                        accepts_maps,
                                                                        plan<Conv2dDirection::backward_input>,
                                                                        run<Conv2dDirection::backward_input>,
                                                                        /*needs_proof=*/false,
                                                                        /*adds_bias=*/true};
extern const Conv2dKernel conv2d_backward_weight_depthwise_large_sm80 = {
    "conv2d_backward_weight_depthwise_large_sm80", 80, Conv2dDirection::backward_weight, accepts, plan_weight, run_weight};

}  // namespace cnn_ext::cuda
