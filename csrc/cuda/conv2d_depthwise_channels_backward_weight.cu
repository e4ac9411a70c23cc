// Depthwise convolution in nhwc, backward_weight, of square kernels of 3 and 5 with strides 1 and 2 and of 7 with stride 1, without
// dilation, of an even number of channels:
//   grad_weight[c, r, s] = sum over n, oh, ow of grad_output[n, oh, ow, c] * input[n, ih, iw, c].
//
// A block walks over tiles of outputs of 32 channels, for each of which it stages gradients and inputs (channel_tile.cuh). A thread keeps
// the sums of a row of taps (3 x 3: of all) of two channels in registers and takes every kLanes-th strip of 7 or 8 outputs of a row: their
// gradients and the inputs that they meet are read and widened once for all its taps. At the end the block adds up its lanes. The tiles are
// divided into splits, whose partial sums a second launch adds up (pixel_reduction.cuh).
//
// The order of additions follows the shape alone. Outside the tensors are zeros; a block whose sums are not all numbers sums again over
// what is inside, so that padding never multiplies.
//
// Not handled: several filters for a channel; float64.
#include "cuda/channel_tile.cuh"
#include "cuda/limits.h"
#include "cuda/pixel_reduction.cuh"
#include "cuda/thread_places.h"

namespace cnn_ext::cuda {
namespace {

// Rows of taps of a thread, and threads of a block that share them and a pair of channels.
CNN_EXT_HOST_DEVICE constexpr int tap_rows_of(int64_t kernel) { return kernel == 3 ? 3 : 1; }
CNN_EXT_HOST_DEVICE constexpr int tap_groups_of(int64_t kernel) { return static_cast<int>(kernel) / tap_rows_of(kernel); }
CNN_EXT_HOST_DEVICE constexpr int lanes_of(int64_t kernel) { return kBlockThreads / kTilePairs / tap_groups_of(kernel); }
CNN_EXT_HOST_DEVICE constexpr int threads_of(int64_t kernel) { return lanes_of(kernel) * tap_groups_of(kernel) * kTilePairs; }

// Of a tile: three blocks to a multiprocessor in float32, four in 16 bits.
int most_tile_bytes(DType dtype) { return (dtype == DType::float32 ? 64 : 48) * 1024; }
// Rows of a tile of outputs: enough work for a block, and enough blocks.
int most_tile_rows(int64_t kernel) { return kernel == 3 ? 16 : 8; }

struct WeightProblem {
  int channels, in_h, in_w, out_h, out_w, pad_top, pad_left;
  int blocks_of_channels, split_size;  // of tiles
  FastDivisor tile_rows;
  int tile_cols;  // in strips
  TileExtent gradients, inputs;
  bool has_whole_gradients, has_whole_inputs;  // in chunks
};

// What a block sums.
struct BlockSums {
  __device__ BlockSums(const WeightProblem& p, const ThreadPlaces& tiles) {
    split = static_cast<int>(blockIdx.x) / p.blocks_of_channels;
    first_channel = (static_cast<int>(blockIdx.x) - split * p.blocks_of_channels) * kTileChannels;
    begin = split * p.split_size, end = smaller(tiles.count(), begin + p.split_size);
  }
  int split, first_channel, begin, end;
};

// What a thread sums: neighbouring threads take neighbouring channels, then taps.
struct ThreadSums {
  __device__ explicit ThreadSums(int kernel) {
    const int group = static_cast<int>(threadIdx.x) / kTilePairs, groups = tap_groups_of(kernel);
    of_block = static_cast<int>(threadIdx.x) % kTilePairs * kPair;
    lane = group / groups, first_row = group % groups * tap_rows_of(kernel);
  }
  int of_block, lane, first_row;
};

// A staged tile.
template <class T, int kKernel, int kStride, int kWidth>
struct WeightTile {
  static constexpr int kTapRows = tap_rows_of(kKernel), kInCols = (kWidth - 1) * kStride + kKernel;
  using Sums = PairValues[kTapRows][kKernel];

  __device__ WeightTile(const WeightProblem& problem, const ThreadPlaces::Place& tile_place)
      : p(problem),
        place(tile_place),
        out_h(place.row * p.tile_rows.divisor()),
        out_w(place.column * p.tile_cols * kWidth),
        staged_gradients(dynamic_shared<unsigned char>()),
        staged_inputs(staged_gradients + p.gradients.bytes()) {}

  __device__ void stage(const T* grad_output, const T* input, int first_channel) const {
    const int64_t image = place.image;
    const ChannelsImage<T> gradients{grad_output + image * p.out_h * p.out_w * p.channels, p.out_h, p.out_w, p.channels,
                                     p.has_whole_gradients};
    const ChannelsImage<T> inputs{input + image * p.in_h * p.in_w * p.channels, p.in_h, p.in_w, p.channels, p.has_whole_inputs};
    stage_tile(gradients, first_channel, out_h, out_w, p.gradients, staged_gradients);
    stage_tile(inputs, first_channel, out_h * kStride - p.pad_top, out_w * kStride - p.pad_left, p.inputs, staged_inputs);
    cp_async_commit();
    cp_async_wait<0>();
  }

  // The strip at (row, col) of the tile.
  __device__ void add(const ThreadSums& thread, int row, int col, Sums& sums) const {
    PairValues gradients[kWidth];
    load_pixels<T>(gradient_at(thread, row, col * kWidth), gradients);
#pragma unroll
    for (int r = 0; r < kTapRows; ++r) {
      PairValues inputs[kInCols];
      load_pixels<T>(input_at(thread, row * kStride + thread.first_row + r, col * kWidth * kStride), inputs);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
#pragma unroll
        for (int s = 0; s < kKernel; ++s) add_product(sums[r][s], gradients[i], inputs[i * kStride + s]);
      }
    }
  }

  // The same of what exists alone.
  __device__ void add_inside(const ThreadSums& thread, int row, int col, Sums& sums) const {
    if (out_h + row >= p.out_h) return;
#pragma unroll 1
    for (int i = col * kWidth; i < smaller((col + 1) * kWidth, p.out_w - out_w); ++i) {
      const PairValues gradient = staged_pair<T>(gradient_at(thread, row, i));
#pragma unroll
      for (int r = 0; r < kTapRows; ++r) {
#pragma unroll
        for (int s = 0; s < kKernel; ++s) {
          const int y = row * kStride + thread.first_row + r, x = i * kStride + s;
          const int h = out_h * kStride - p.pad_top + y, w = out_w * kStride - p.pad_left + x;
          if (h < 0 || h >= p.in_h || w < 0 || w >= p.in_w) continue;
          add_product(sums[r][s], gradient, staged_pair<T>(input_at(thread, y, x)));
        }
      }
    }
  }

  __device__ const unsigned char* gradient_at(const ThreadSums& thread, int y, int x) const {
    return staged_gradients + y * p.gradients.pitch + x * kPixelBytes<T> + thread.of_block * static_cast<int>(sizeof(T));
  }
  __device__ const unsigned char* input_at(const ThreadSums& thread, int y, int x) const {
    return staged_inputs + y * p.inputs.pitch + x * kPixelBytes<T> + thread.of_block * static_cast<int>(sizeof(T));
  }

  const WeightProblem& p;
  ThreadPlaces::Place place;
  int out_h, out_w;
  unsigned char *staged_gradients, *staged_inputs;
};

// Blocks are numbered by channels, then split.
template <class T, int kKernel, int kStride, int kWidth>
__global__ void __launch_bounds__(threads_of(kKernel), kKernel == 3 && sizeof(T) == 4 ? 3 : 4)  // as registers allow

    sum_channels(WeightProblem p, ThreadPlaces tiles, const T* __restrict__ grad_output, const T* __restrict__ input,
                 float* __restrict__ partials) {
  using Tile = WeightTile<T, kKernel, kStride, kWidth>;
  constexpr int kLanes = lanes_of(kKernel), kTaps = kKernel * kKernel;
  const BlockSums block(p, tiles);
  const ThreadSums thread(kKernel);
  const int strips = p.tile_rows.divisor() * p.tile_cols;
  PairValues sums[tap_rows_of(kKernel)][kKernel] = {};
  // Calls add(tile, row, col) for the strips of the thread.
  const auto for_each_strip = [&](const auto& add) {
#pragma unroll 1
    for (int i = block.begin; i < block.end; ++i) {
      const Tile tile(p, tiles.at(i));
      __syncthreads();  // the tile before has been read
      tile.stage(grad_output, input, block.first_channel);
      __syncthreads();
#pragma unroll 1
      for (int strip = thread.lane; strip < strips; strip += kLanes) {
        const int col = p.tile_rows.quotient(strip);
        add(tile, strip - col * p.tile_rows.divisor(), col);
      }
    }
  };
  for_each_strip([&](const Tile& tile, int row, int col) { tile.add(thread, row, col, sums); });
  if (__syncthreads_or(!are_numbers(sums)) != 0) {
#pragma unroll
    for (auto& row : sums) {
#pragma unroll
      for (auto& sum : row) sum = {};
    }
    for_each_strip([&](const Tile& tile, int row, int col) { tile.add_inside(thread, row, col, sums); });
    __syncthreads();
  }
  float* of_lanes = dynamic_shared<float>();  // [kLanes][kTaps][kFilterPitch]
#pragma unroll
  for (int r = 0; r < tap_rows_of(kKernel); ++r) {
#pragma unroll
    for (int s = 0; s < kKernel; ++s) {
      const int tap = (thread.first_row + r) * kKernel + s;
      const Vector<float, kPair> pair{{sums[r][s].value[0], sums[r][s].value[1]}};
      store_vector(of_lanes + (thread.lane * kTaps + tap) * kFilterPitch + thread.of_block, pair);
    }
  }
  __syncthreads();
  const int count = smaller(kTileChannels, p.channels - block.first_channel) * kTaps;
  float* result = partials + (static_cast<int64_t>(block.split) * p.channels + block.first_channel) * kTaps;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < count; i += threads_of(kKernel)) {
    const int channel = i / kTaps, tap = i - channel * kTaps;
    float sum = 0;
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) sum += of_lanes[(lane * kTaps + tap) * kFilterPitch + channel];
    result[i] = sum;
  }
}

bool accepts(const Conv2dShape& s) {
  const int64_t kernel = s.kernel_h, stride = s.stride_h;
  const bool has_kernel = s.kernel_w == kernel && (kernel == 3 || kernel == 5 || (kernel == 7 && stride == 1));
  return s.layout == Layout::nhwc && s.groups == s.in_channels && s.in_channels == s.out_channels && s.in_channels % kPair == 0 &&
         has_kernel && s.stride_w == stride && (stride == 1 || stride == 2) && s.dilation_h == 1 && s.dilation_w == 1 &&
         s.dtype != DType::float64 && has_int_extents(s) &&
         all_below(kMaxExtent, {product({s.batch, s.out_h + 1, s.out_w + 1}), product({s.in_channels, kernel, kernel}),
                                product({s.in_h, s.in_w, s.in_channels}), product({s.out_h, s.out_w, s.in_channels})});
}

// A tile, of strips of outputs, and what is staged for it. All tiles have about as many rows.
struct TileSize {
  explicit TileSize(const Conv2dShape& s)
      : width(strip_width(s.out_w)),
        cols(static_cast<int>(tile_cols(s.out_w, width))),
        rows(rows_of(s)),
        gradients(rows, cols * width, pixel_bytes(s), 1),
        inputs(in_extent(s, rows), in_extent(s, cols * width), pixel_bytes(s), static_cast<int>(s.stride_h)) {}
  size_t shared_bytes(int64_t kernel) const {
    return static_cast<size_t>(larger(gradients.bytes() + inputs.bytes(), lanes_of(kernel) * filter_bytes(kernel)));
  }
  int width, cols, rows;  // width: of a strip; cols: strips
  TileExtent gradients, inputs;

 private:
  static int pixel_bytes(const Conv2dShape& s) { return kTileChannels * (s.dtype == DType::float32 ? 4 : 2); }
  static int in_extent(const Conv2dShape& s, int extent) { return static_cast<int>((extent - 1) * s.stride_h + s.kernel_h); }
  int rows_of(const Conv2dShape& s) const {
    const auto fits = [&](int most) {
      const int pixels = most * (cols * width + 1) + in_extent(s, most) * (in_extent(s, cols * width) + 1);
      return pixels * pixel_bytes(s) <= most_tile_bytes(s.dtype);
    };
    int most = most_tile_rows(s.kernel_h);
    while (most > 1 && !fits(most)) --most;
    return s.out_h == 0 ? 1 : static_cast<int>(ceil_div(s.out_h, ceil_div<int64_t>(s.out_h, most)));
  }
};

// How the tiles are divided among blocks.
struct Division {
  explicit Division(const Conv2dShape& s)
      : tile(s),
        tiles(s.batch, ceil_div<int64_t>(s.out_h, tile.rows), ceil_div<int64_t>(s.out_w, tile.cols * tile.width), 1),
        blocks_of_channels(ceil_div<int64_t>(s.in_channels, kTileChannels)),
        targets(s.in_channels * s.kernel_h * s.kernel_w),
        splits(split_sum(tiles.count(), blocks_of_channels, targets, 1, 1)) {}
  int64_t blocks() const { return blocks_of_channels * splits.count; }
  TileSize tile;
  ThreadPlaces tiles;
  int64_t blocks_of_channels, targets;
  Splits splits;
};

Plan plan(const Conv2dShape& s) {
  const Division division(s);
  return {kTileChannels, int64_t{division.tile.rows} * division.tile.cols * division.tile.width, division.blocks(),
          partials_bytes(s.dtype, division.splits, division.targets)};
}

template <class T, int kWidth>
auto function_of(int64_t kernel, int64_t stride) {
  return kernel == 7   ? sum_channels<T, 7, 1, kWidth>
         : kernel == 5 ? (stride == 1 ? sum_channels<T, 5, 1, kWidth> : sum_channels<T, 5, 2, kWidth>)
         : stride == 1 ? sum_channels<T, 3, 1, kWidth>
                       : sum_channels<T, 3, 2, kWidth>;
}

template <class T>
void launch_weights(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, cudaStream_t stream) {
  const Division division(s);
  const TileSize& tile = division.tile;
  const T *grad_output = static_cast<const T*>(b.grad_output), *input = static_cast<const T*>(b.input);
  const WeightProblem p{static_cast<int>(s.in_channels),
                        static_cast<int>(s.in_h),
                        static_cast<int>(s.in_w),
                        static_cast<int>(s.out_h),
                        static_cast<int>(s.out_w),
                        static_cast<int>(s.pad_top),
                        static_cast<int>(s.pad_left),
                        static_cast<int>(division.blocks_of_channels),
                        static_cast<int>(division.splits.size),
                        FastDivisor(tile.rows),
                        tile.cols,
                        tile.gradients,
                        tile.inputs,
                        has_whole_vectors<kChunk<T>>(grad_output, s.in_channels),
                        has_whole_vectors<kChunk<T>>(input, s.in_channels)};
  const auto function = (tile.width == kNarrowStrip ? function_of<T, kNarrowStrip> : function_of<T, kWideStrip>)(s.kernel_h, s.stride_h);
  launch(function, Grid(division.blocks(), threads_of(s.kernel_h), tile.shared_bytes(s.kernel_h)), stream, p, division.tiles, grad_output,
         input, static_cast<float*>(workspace));
  launch_sum_partials<T>(workspace, division.splits, division.targets, b.grad_weight, stream);
}

void run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, cudaStream_t stream) {
  with_single_type(s.dtype, [&](auto element) { launch_weights<decltype(element)>(s, b, workspace, stream); });
}

}  // namespace

extern const Conv2dKernel conv2d_backward_weight_depthwise_channels_sm80 = {
    "conv2d_backward_weight_depthwise_channels_sm80", 80, Conv2dDirection::backward_weight, accepts, plan, run};

}  // namespace cnn_ext::cuda
