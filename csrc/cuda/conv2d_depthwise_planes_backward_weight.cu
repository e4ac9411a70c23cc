// Depthwise convolution in nchw, backward_weight, of square kernels of 5 and 7 without stride and dilation:
//   grad_weight[c, r, s] = sum over n, oh, ow of grad_output[n, c, oh, ow] * input[n, c, ih, iw].
//
// A block sums for one channel, a warp of it for one row of taps. It stages bands of rows of several images at a time, gradients and,
// shifted by the padding, inputs with zeros around them, so that all loads are on their way at once and strips of 8 outputs begin at
// aligned addresses: a thread reads the gradients of every 32nd strip and the inputs that these meet by vectors and has the sums of its row
// of taps in registers. At the end a warp adds up its lanes. The bands are divided into splits, whose partial sums a second launch adds up
// (pixel_reduction.cuh).
//
// The order of additions follows the shape alone. Outside the tensors are zeros; a block whose sums are not all numbers sums again over
// what is inside, so that padding never multiplies.
//
// Not handled: several filters for a channel; float64; 5 x 5 in float32, which the row with all taps in a thread does as fast; rows so wide
// that a band of one does not fit.
#include "cuda/chunk.cuh"
#include "cuda/limits.h"
#include "cuda/pixel_reduction.cuh"
#include "cuda/primitives.cuh"
#include "cuda/vector.cuh"

namespace cnn_ext::cuda {
namespace {

constexpr int kWarp = 32, kStrip = 8;
constexpr int kMostBandRows = 32, kMostStagedBytes = 40 * 1024;
constexpr int kLoadsAhead = 16;  // of a thread

CNN_EXT_HOST_DEVICE constexpr int threads_of(int64_t kernel) { return kWarp * static_cast<int>(kernel); }

// Rows of a plane as they are staged, side by side and one after the other.
struct StagedRows {
  StagedRows(int rows_, int pitch_, int chunk) : rows(rows_), pitch(pitch_), chunks_of_row(pitch_ / chunk) {}
  CNN_EXT_HOST_DEVICE int count() const { return rows * pitch; }
  CNN_EXT_HOST_DEVICE int chunks() const { return rows * chunks_of_row.divisor(); }
  int rows, pitch;  // pitch: elements
  FastDivisor chunks_of_row;
};

// Bands are numbered by image, then row.
struct BandProblem {
  int channels, in_h, in_w, out_h, out_w, pad_top, pad_left;
  FastDivisor bands_of_image;
  int bands, split_size, staged_bands;
  StagedRows inputs, gradients;  // of a band
  FastDivisor chunks, strips, strip_cols;
  CNN_EXT_HOST_DEVICE int staged_elements() const { return inputs.count() + gradients.count(); }
};

// Where a band lies.
struct BandPlace {
  __device__ BandPlace(const BandProblem& p, int band) : image(p.bands_of_image.quotient(band)) {
    first_out = (band - image * p.bands_of_image.divisor()) * p.gradients.rows;
  }
  int image, first_out;
};

// A chunk of a row of a plane, zeros outside.
template <class T>
__device__ Vector<T, kChunk<T>> chunk_at(const T* plane, int height, int width, int h, int w) {
  const bool has_row = static_cast<unsigned>(h) < static_cast<unsigned>(height);
  const T* first = plane + (has_row ? h * width + w : 0);
  Vector<T, kChunk<T>> chunk = {};
#pragma unroll
  for (int i = 0; i < kChunk<T>; ++i) {
    if (has_row && static_cast<unsigned>(w + i) < static_cast<unsigned>(width)) chunk.element[i] = first[i];
  }
  return chunk;
}

// Stages `count` bands of a channel from number `first` on: of each the inputs, then the gradients.
template <class T>
__device__ void stage_bands(const BandProblem& p, const T* grad_output, const T* input, int channel, int first, int count, T* staged) {
  constexpr int kBatch = kLoadsAhead / kChunk<T>;
  const int chunks = count * p.chunks.divisor(), step = static_cast<int>(blockDim.x);
#pragma unroll 1
  for (int begin = static_cast<int>(threadIdx.x); begin < chunks; begin += kBatch * step) {
    Vector<T, kChunk<T>> batch[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int index = smaller(begin + b * step, chunks - 1), band = p.chunks.quotient(index), rest = index - band * p.chunks.divisor();
      const BandPlace place(p, first + band);
      const bool is_input = rest < p.inputs.chunks();
      const StagedRows& rows = is_input ? p.inputs : p.gradients;
      const int of_rows = rest - (is_input ? 0 : p.inputs.chunks()), y = rows.chunks_of_row.quotient(of_rows);
      const int x = (of_rows - y * rows.chunks_of_row.divisor()) * kChunk<T>;
      const int height = is_input ? p.in_h : p.out_h, width = is_input ? p.in_w : p.out_w;
      const int64_t plane = (static_cast<int64_t>(place.image) * p.channels + channel) * (height * width);
      batch[b] = chunk_at((is_input ? input : grad_output) + plane, height, width, place.first_out + y - (is_input ? p.pad_top : 0),
                          x - (is_input ? p.pad_left : 0));
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (begin + b * step < chunks) store_vector(staged + (begin + b * step) * kChunk<T>, batch[b]);
    }
  }
}

// A strip of a staged band: where it lies in the plane, and what a row of taps meets.
template <class T>
struct Strip {
  __device__ Strip(const BandProblem& p, const T* staged, int index, int r) : band(p.strips.quotient(index)) {
    const int rest = index - band * p.strips.divisor();
    row = p.strip_cols.quotient(rest), col = (rest - row * p.strip_cols.divisor()) * kStrip;
    inputs = staged + band * p.staged_elements() + (row + r) * p.inputs.pitch + col;
    gradients = staged + band * p.staged_elements() + p.inputs.count() + row * p.gradients.pitch + col;
  }
  int band, row, col;
  const T *inputs, *gradients;
};

template <class T, int kCount>
__device__ void load_row(const T* staged, float (&values)[kCount]) {
#pragma unroll
  for (int first = 0; first < kCount; first += kChunk<T>) {
    float chunk[kChunk<T>];
    load_chunk(staged + first, kChunk<T>, true, chunk);
#pragma unroll
    for (int i = 0; i < kChunk<T> && first + i < kCount; ++i) values[first + i] = chunk[i];
  }
}

template <class T, int kKernel>
__device__ void add_strip(const Strip<T>& strip, float (&sums)[kKernel]) {
  float gradients[kStrip], inputs[kStrip + kKernel - 1];
  load_row(strip.gradients, gradients);
  load_row(strip.inputs, inputs);
#pragma unroll
  for (int i = 0; i < kStrip; ++i) {
#pragma unroll
    for (int s = 0; s < kKernel; ++s) sums[s] = fma(gradients[i], inputs[i + s], sums[s]);
  }
}

// The same of what exists alone. first_band: of those staged.
template <class T, int kKernel>
__device__ void add_inside(const BandProblem& p, const Strip<T>& strip, int first_band, int r, float (&sums)[kKernel]) {
  const int out_h = BandPlace(p, first_band + strip.band).first_out + strip.row, in_h = out_h - p.pad_top + r;
  if (out_h >= p.out_h || in_h < 0 || in_h >= p.in_h) return;
#pragma unroll 1
  for (int i = 0; i < smaller(kStrip, p.out_w - strip.col); ++i) {
    const float gradient = widen(strip.gradients[i]);
#pragma unroll
    for (int s = 0; s < kKernel; ++s) {
      const int in_w = strip.col + i - p.pad_left + s;
      if (in_w >= 0 && in_w < p.in_w) sums[s] = fma(gradient, widen(strip.inputs[i + s]), sums[s]);
    }
  }
}

// Blocks are numbered by channel, then split.
template <class T, int kKernel>
__global__ void __launch_bounds__(threads_of(kKernel), kKernel == 7 ? 4 : 5)  // as registers allow

    sum_bands(BandProblem p, const T* __restrict__ grad_output, const T* __restrict__ input, float* __restrict__ partials) {
  T* staged = dynamic_shared<T>();
  const int split = static_cast<int>(blockIdx.x) / p.channels, channel = static_cast<int>(blockIdx.x) - split * p.channels;
  const int r = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int end = smaller(p.bands, (split + 1) * p.split_size);
  // Calls add(strip, first band staged) for the strips of the thread.
  const auto for_each_strip = [&](const auto& add) {
#pragma unroll 1
    for (int first = split * p.split_size; first < end; first += p.staged_bands) {
      const int count = smaller(p.staged_bands, end - first);
      __syncthreads();  // those before have been read
      stage_bands(p, grad_output, input, channel, first, count, staged);
      __syncthreads();
#pragma unroll 1
      for (int index = lane; index < count * p.strips.divisor(); index += kWarp) add(Strip<T>(p, staged, index, r), first);
    }
  };
  float sums[kKernel] = {};
  for_each_strip([&](const Strip<T>& strip, int) { add_strip(strip, sums); });
  float total = 0;
#pragma unroll
  for (const float sum : sums) total += sum;
  if (__syncthreads_or(isnan(total)) != 0) {
#pragma unroll
    for (float& sum : sums) sum = 0;
    for_each_strip([&](const Strip<T>& strip, int first) { add_inside(p, strip, first, r, sums); });
  }
#pragma unroll
  for (float& sum : sums) {
#pragma unroll
    for (int half = kWarp / 2; half > 0; half /= 2) sum += __shfl_down_sync(0xFFFFFFFF, sum, half);
  }
  if (lane > 0) return;
  float* result = partials + (static_cast<int64_t>(split) * p.channels + channel) * kKernel * kKernel + r * kKernel;
#pragma unroll
  for (int s = 0; s < kKernel; ++s) result[s] = sums[s];
}

// How the planes are cut into bands, and the bands divided among blocks.
struct Division {
  explicit Division(const Conv2dShape& s)
      : strip_cols(ceil_div<int64_t>(s.out_w, kStrip)),
        rows(rows_of(s)),
        bands_of_image(ceil_div<int64_t>(s.out_h, larger<int64_t>(1, rows))),
        targets(s.in_channels * s.kernel_h * s.kernel_w),
        splits(split_sum(s.batch * bands_of_image, s.in_channels, targets, 1, 1)),
        staged_bands(smaller<int64_t>(splits.size, larger<int64_t>(1, kMostStagedBytes / larger<int64_t>(1, band_bytes(s, rows))))) {}
  int64_t blocks(const Conv2dShape& s) const { return s.in_channels * splits.count; }
  size_t shared_bytes(const Conv2dShape& s) const { return static_cast<size_t>(staged_bands * band_bytes(s, rows)); }
  int64_t in_pitch() const { return (strip_cols + 1) * kStrip; }
  int64_t out_pitch() const { return strip_cols * kStrip; }

  int64_t strip_cols, rows;  // rows: of a band; 0: none fits
  int64_t bands_of_image, targets;
  Splits splits;
  int64_t staged_bands;

 private:
  int64_t band_bytes(const Conv2dShape& s, int64_t band_rows) const {
    return ((band_rows + s.kernel_h - 1) * in_pitch() + band_rows * out_pitch()) * (s.dtype == DType::float32 ? 4 : 2);
  }
  int64_t rows_of(const Conv2dShape& s) const {
    int64_t most = kMostBandRows;
    while (most > 0 && band_bytes(s, most) > kMostStagedBytes) --most;
    return most == 0 || s.out_h == 0 ? most : ceil_div(s.out_h, ceil_div(s.out_h, most));
  }
};

bool accepts(const Conv2dShape& s) {
  return s.layout == Layout::nchw && s.groups == s.in_channels && s.in_channels == s.out_channels && s.kernel_w == s.kernel_h &&
         (s.kernel_h == 7 || (s.kernel_h == 5 && s.dtype != DType::float32)) && s.stride_h == 1 && s.stride_w == 1 && s.dilation_h == 1 &&
         s.dilation_w == 1 && s.dtype != DType::float64 && has_int_extents(s) &&
         all_below(kMaxExtent, {product({s.in_channels, s.kernel_h, s.kernel_w}), product({s.batch, s.out_h}), product({s.in_h, s.in_w}),
                                product({s.out_h, s.out_w})}) &&
         Division(s).rows > 0;
}

Plan plan(const Conv2dShape& s) {
  const Division division(s);
  return {1, division.rows * division.out_pitch(), division.blocks(s), partials_bytes(s.dtype, division.splits, division.targets)};
}

template <class T>
void launch_weights(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, cudaStream_t stream) {
  const Division division(s);
  const int rows = static_cast<int>(division.rows), cols = static_cast<int>(division.strip_cols);
  const StagedRows inputs(rows + static_cast<int>(s.kernel_h) - 1, static_cast<int>(division.in_pitch()), kChunk<T>);
  const StagedRows gradients(rows, static_cast<int>(division.out_pitch()), kChunk<T>);
  const BandProblem p{static_cast<int>(s.in_channels),
                      static_cast<int>(s.in_h),
                      static_cast<int>(s.in_w),
                      static_cast<int>(s.out_h),
                      static_cast<int>(s.out_w),
                      static_cast<int>(s.pad_top),
                      static_cast<int>(s.pad_left),
                      FastDivisor(static_cast<int>(division.bands_of_image)),
                      static_cast<int>(s.batch * division.bands_of_image),
                      static_cast<int>(division.splits.size),
                      static_cast<int>(division.staged_bands),
                      inputs,
                      gradients,
                      FastDivisor(inputs.chunks() + gradients.chunks()),
                      FastDivisor(rows * cols),
                      FastDivisor(cols)};
  launch(s.kernel_h == 7 ? sum_bands<T, 7> : sum_bands<T, 5>, Grid(division.blocks(s), threads_of(s.kernel_h), division.shared_bytes(s)),
         stream, p, static_cast<const T*>(b.grad_output), static_cast<const T*>(b.input), static_cast<float*>(workspace));
  launch_sum_partials<T>(workspace, division.splits, division.targets, b.grad_weight, stream);
}

void run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, cudaStream_t stream) {
  with_single_type(s.dtype, [&](auto element) { launch_weights<decltype(element)>(s, b, workspace, stream); });
}

}  // namespace

extern const Conv2dKernel conv2d_backward_weight_depthwise_planes_sm80 = {
    "conv2d_backward_weight_depthwise_planes_sm80", 80, Conv2dDirection::backward_weight, accepts, plan, run};

}  // namespace cnn_ext::cuda
