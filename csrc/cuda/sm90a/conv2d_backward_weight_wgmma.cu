// grad_weight[k, c, r, s] = sum over n, oh, ow of grad_output[n, k, oh, ow] * input[n, c, ih, iw] on the matrix unit of sm_90a, in TF32
// (where the policy allows it), float16 and bfloat16. Rows of the product are output channels, columns the weights of one (r, s, c) with c
// in whole chunks, the depth runs over the pixels (n, oh, ow).
//
// Operands: both tensors with the channels innermost; what lies otherwise, or has no whole chunks of 16 bytes, is put in that order by a
// launch of its own first (transposition.cuh). In 16 bits both operands lie across the depth, which the matrix unit transposes; TF32 it
// does not, so there the copies themselves do, element by element.
//
// There are few tiles and a long depth: the pixels are split among blocks, and a second launch adds up the partial sums in order. The splits
// follow from the shape alone, so that every run has the same bits. With one split the tile is stored at once.
//
// Tile: 128 output channels (64 where there are no more) x 128 weights; a step of the depth is 64 pixels (32 in TF32), four stages as in
// gather_wgmma.cu.
//
// Padding never multiplies: see gather_wgmma.cu. Not handled: float64; strict float32; groups whose channels do not fill whole chunks. Bound
// by the issue of copies, in TF32 above all.
#include <algorithm>
#include <type_traits>

#include "cuda/chunk.cuh"
#include "cuda/limits.h"
#include "cuda/pixel_reduction.cuh"
#include "cuda/sm90a/wgmma.cuh"
#include "cuda/transposition.cuh"

namespace cnn_ext::cuda {
namespace {

constexpr int kCols = 128, kStages = 4, kPitch = kCols + 8;
template <class T>
constexpr int kStepPixels = kSwizzleRowBytes / static_cast<int>(sizeof(T));
constexpr int kWarps = kBlockThreads / 32;

CNN_EXT_HOST_DEVICE constexpr size_t tile_bytes(int extent) { return static_cast<size_t>(extent) * kSwizzleRowBytes; }
CNN_EXT_HOST_DEVICE constexpr size_t stage_bytes(int rows) { return tile_bytes(rows) + tile_bytes(kCols); }

template <class T>
struct Problem {
  const T* grad_output;
  const T* input;
  float* partials;  // [split][group][output channel][tap][chunks of channels]; null: one split, stored at once
  T* grad_weight;
  Conv2dGeometry g;
  Strides in;
  int64_t out_pixel, in_group;  // from one pixel of grad_output to the next; from one group to the next
  bool has_chunks;
  int chunks, cols, pixels, split_pixels;
  int row_tiles, col_tiles, splits;
  FastDivisor tap_decoder, width_decoder;
  PlaneDecoder pixel_decoder;
};

// A column of the product: a channel at a tap.
struct Column {
  int channel, h, w;  // of the tap, in input positions
};

template <class T>
__device__ Column column_at(const Problem<T>& p, int col) {
  const int channels = p.chunks * kChunk<T>;
  const int tap = p.tap_decoder.quotient(col), r = p.width_decoder.quotient(tap), s = tap - r * p.g.kernel_w;
  return {col - tap * channels, r * p.g.dilation_h - p.g.pad_top, s * p.g.dilation_w - p.g.pad_left};
}

struct Block {
  int group, first_row, first_col, begin, end;
};

template <class T>
__device__ void copy_chunk(unsigned char* shared, const T* global, bool exists, bool has_chunks) {
  if (has_chunks) {
    cp_async<kChunkBytes>(shared, global, exists);
    return;
  }
  T elements[kChunk<T>];
#pragma unroll
  for (int i = 0; i < kChunk<T>; ++i) elements[i] = exists ? global[i] : narrow<T>(0);
  ChunkWords words;
  __builtin_memcpy(&words, elements, kChunkBytes);
  *reinterpret_cast<ChunkWords*>(shared) = words;
}

// Copies of 16 bytes: 64 neighbouring channels of a pixel are a row of a panel.
template <class T, int kRows>
class ChunkLoader {
 public:
  static constexpr bool kAcross = true;
  __device__ ChunkLoader(const Problem<T>& p, const Block& b) : p_(p) {
    const int row_chunk = threadIdx.x % kRowChunks, channel = b.first_row + row_chunk * kChunk<T>;
    row_place_ = place(row_chunk, threadIdx.x / kRowChunks);
    has_row_ = channel < p.g.group_out;
    grad_output_ = p.grad_output + b.group * p.g.group_out + channel + threadIdx.x / kRowChunks * p.out_pixel;
    const int col_chunk = threadIdx.x % kColChunks, col = b.first_col + col_chunk * kChunk<T>;
    col_place_ = place(col_chunk, threadIdx.x / kColChunks);
    has_col_ = col < p.cols;
    at_ = column_at(p, has_col_ ? col : 0);
    input_ = p.input + b.group * p.in_group + at_.channel;
  }

  __device__ void load(unsigned char* rows, unsigned char* cols, int first, int end) const {
#pragma unroll
    for (int i = 0; i < kRowLoads; ++i) {
      const bool exists = has_row_ && first + static_cast<int>(threadIdx.x) / kRowChunks + i * kRowStep < end;
      copy_chunk(rows + row_place_ + i * kRowStep * kSwizzleRowBytes,
                 exists ? grad_output_ + (first + i * kRowStep) * p_.out_pixel : p_.grad_output, exists, p_.has_chunks);
    }
#pragma unroll
    for (int i = 0; i < kColLoads; ++i) {
      const int pixel = first + threadIdx.x / kColChunks + i * kColStep;
      const PlaneIndex out = p_.pixel_decoder.at(pixel < end ? pixel : 0);
      const int h = out.h * p_.g.stride_h + at_.h, w = out.w * p_.g.stride_w + at_.w;
      const bool exists = has_col_ && pixel < end && static_cast<unsigned>(h) < static_cast<unsigned>(p_.g.in_h) &&
                          static_cast<unsigned>(w) < static_cast<unsigned>(p_.g.in_w);
      copy_chunk(cols + col_place_ + i * kColStep * kSwizzleRowBytes,
                 exists ? input_ + out.outer * p_.in.n + h * p_.in.h + w * p_.in.w : p_.input, exists, p_.has_chunks);
    }
  }

 private:
  static constexpr int kRowChunks = kRows / kChunk<T>, kColChunks = kCols / kChunk<T>;
  static constexpr int kRowStep = kBlockThreads / kRowChunks, kColStep = kBlockThreads / kColChunks;  // pixels copied at once
  static constexpr int kRowLoads = kStepPixels<T> / kRowStep, kColLoads = kStepPixels<T> / kColStep;

  __device__ static int place(int chunk, int pixel) {
    constexpr int kPanelChunks = kSwizzleRowBytes / kChunkBytes;
    return chunk / kPanelChunks * kStepPixels<T> * kSwizzleRowBytes + pixel * kSwizzleRowBytes +
           ((chunk % kPanelChunks) ^ (pixel % kSwizzleRows)) * kChunkBytes;
  }

  const Problem<T>& p_;
  int row_place_, col_place_;
  bool has_row_, has_col_;
  const T* grad_output_;
  const T* input_;
  Column at_;
};

// Copies of one float, which put the pixels side by side: a warp takes neighbouring channels of a pixel.
template <int kRows>
class ElementLoader {
 public:
  using T = float;
  static constexpr bool kAcross = false;
  __device__ ElementLoader(const Problem<T>& p, const Block& b) : p_(p) {
    const int lane = threadIdx.x % 32;
    rows_left_ = p.g.group_out - b.first_row - lane;
    grad_output_ = p.grad_output + b.group * p.g.group_out + b.first_row + lane;
    input_ = p.input + b.group * p.in_group;
#pragma unroll
    for (int i = 0; i < kCols / 32; ++i) {
      const int col = b.first_col + lane + i * 32;
      has_col_[i] = col < p.cols;
      at_[i] = column_at(p, has_col_[i] ? col : 0);
    }
  }

  __device__ void load(unsigned char* rows, unsigned char* cols, int first, int end) const {
    const int warp = threadIdx.x / 32;
#pragma unroll
    for (int j = 0; j < kStepPixels<T> / kWarps; ++j) {
      const int offset = warp + j * kWarps, pixel = first + offset;
      const bool exists = pixel < end;
      const PlaneIndex out = p_.pixel_decoder.at(exists ? pixel : 0);
#pragma unroll
      for (int i = 0; i < kRows / 32; ++i) {
        const bool inside = exists && i * 32 < rows_left_;
        cp_async<4>(rows + place(i, offset), inside ? grad_output_ + pixel * p_.out_pixel + i * 32 : p_.grad_output, inside);
      }
      const T* image = input_ + out.outer * p_.in.n;
#pragma unroll
      for (int i = 0; i < kCols / 32; ++i) {
        const int h = out.h * p_.g.stride_h + at_[i].h, w = out.w * p_.g.stride_w + at_[i].w;
        const bool inside = exists && has_col_[i] && static_cast<unsigned>(h) < static_cast<unsigned>(p_.g.in_h) &&
                            static_cast<unsigned>(w) < static_cast<unsigned>(p_.g.in_w);
        cp_async<4>(cols + place(i, offset), inside ? image + h * p_.in.h + w * p_.in.w + at_[i].channel : p_.input, inside);
      }
    }
  }

 private:
  __device__ static int place(int i, int pixel) {
    const int extent = threadIdx.x % 32 + i * 32;
    return extent * kSwizzleRowBytes + ((pixel / kChunk<T>) ^ (extent % kSwizzleRows)) * kChunkBytes + pixel % kChunk<T> * 4;
  }

  const Problem<T>& p_;
  int rows_left_;
  const T* grad_output_;
  const T* input_;
  bool has_col_[kCols / 32];
  Column at_[kCols / 32];
};

template <class T, int kRows>
using Loader = std::conditional_t<std::is_same_v<T, float>, ElementLoader<kRows>, ChunkLoader<T, kRows>>;

// The products of a warpgroup: 64 rows, and of the columns all or, where both warpgroups share the rows, half.
template <class T, int kRows>
class Sums {
 public:
  static constexpr int kWarpgroupCols = kRows == kWarpgroupRows ? kCols / 2 : kCols;
  static constexpr bool kAcross = Loader<T, kRows>::kAcross;

  __device__ static int first_row() { return kRows == kWarpgroupRows ? 0 : threadIdx.x / kWarpgroupThreads * kWarpgroupRows; }
  __device__ static int first_col() { return kRows == kWarpgroupRows ? threadIdx.x / kWarpgroupThreads * kWarpgroupCols : 0; }

  __device__ void multiply(const unsigned char* rows, const unsigned char* cols) {
    // Both ways a warpgroup's part begins as many rows of 128 bytes into the tile as it has extents: a panel of 64 has that many bytes.
    constexpr int kPanelBytes = kAcross ? kStepPixels<T> * kSwizzleRowBytes : 16;
    constexpr int kAdvance = (kAcross ? kInstructionBytes / static_cast<int>(sizeof(T)) * kSwizzleRowBytes : kInstructionBytes) >> 4;
    const uint64_t a = matrix_descriptor(rows + first_row() * kSwizzleRowBytes, kPanelBytes);
    const uint64_t b = matrix_descriptor(cols + first_col() * kSwizzleRowBytes, kPanelBytes);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kSwizzleRowBytes / kInstructionBytes; ++i) {
      wgmma<kAcross, kAcross>(values, a + i * kAdvance, b + i * kAdvance, T{});
    }
    wgmma_commit();
  }

  // Registers -> shared memory. Whether there is a NaN among this thread's sums.
  __device__ bool write(float* sums) const {
    const int warp = threadIdx.x % kWarpgroupThreads / 32, lane = threadIdx.x % 32;
    float* corner = sums + (first_row() + warp * 16 + lane / 4) * kPitch + first_col() + lane % 4 * 2;
    bool meets_nan = false;
#pragma unroll
    for (int i = 0; i < kWarpgroupCols / 2; ++i) {
      corner[i % 4 / 2 * 8 * kPitch + i / 4 * 8 + i % 2] = values[i];
      meets_nan = meets_nan || isnan(values[i]);
    }
    return meets_nan;
  }

  float values[kWarpgroupCols / 2] = {};
};

// Replaces every sum that is NaN by that of the products that exist.
template <class T>
__device__ __noinline__ void add_up_again(const Problem<T>& p, Block b, float* sums, int rows) {
  for (int index = threadIdx.x; index < rows * kCols; index += kBlockThreads) {
    const int k = b.first_row + index / kCols, col = b.first_col + index % kCols;
    float* sum = sums + index / kCols * kPitch + index % kCols;
    if (!isnan(*sum) || k >= p.g.group_out || col >= p.cols) continue;
    const Column at = column_at(p, col);
    float exact = 0;
    for (int pixel = b.begin; pixel < b.end; ++pixel) {
      const PlaneIndex out = p.pixel_decoder.at(pixel);
      const int h = out.h * p.g.stride_h + at.h, w = out.w * p.g.stride_w + at.w;
      if (h < 0 || h >= p.g.in_h || w < 0 || w >= p.g.in_w) continue;
      const T* input = p.input + b.group * p.in_group + at.channel + out.outer * p.in.n + h * p.in.h + w * p.in.w;
      exact = fmaf(widen(p.grad_output[b.group * p.g.group_out + k + pixel * p.out_pixel]), widen(*input), exact);
    }
    *sum = exact;
  }
}

// Stores a sum where a weight is.
template <class T>
__device__ void store_weight(const Problem<T>& p, int group, int k, int col, float sum) {
  const int channels = p.chunks * kChunk<T>, tap = p.tap_decoder.quotient(col), channel = col - tap * channels;
  if (channel >= p.g.group_in) return;
  const int r = p.width_decoder.quotient(tap), s = tap - r * p.g.kernel_w;
  p.grad_weight[(static_cast<int64_t>(group) * p.g.group_out + k) * p.g.filter.n + channel * p.g.filter.c + r * p.g.filter.h +
                s * p.g.filter.w] = narrow<T>(sum);
}

// Blocks are numbered by row tile, column tile, split, group: those that read the same pixels run together.
template <class T, int kRows>
__global__ void __launch_bounds__(kBlockThreads) backward_weight_wgmma(const __grid_constant__ Problem<T> p) {
  unsigned char* shared = dynamic_shared<unsigned char>();
  int index = blockIdx.x;
  const auto take = [&](int count) {
    const int taken = index % count;
    index /= count;
    return taken;
  };
  Block b;
  b.first_row = take(p.row_tiles) * kRows;
  b.first_col = take(p.col_tiles) * kCols;
  const int split = take(p.splits);
  b.group = index;
  b.begin = split * p.split_pixels;
  b.end = smaller(p.pixels, b.begin + p.split_pixels);

  const Loader<T, kRows> loader(p, b);
  Sums<T, kRows> sums;
  const int steps = ceil_div(b.end - b.begin, kStepPixels<T>);
  const auto load = [&](int step) {
    unsigned char* stage = shared + step % kStages * stage_bytes(kRows);
    loader.load(stage, stage + tile_bytes(kRows), b.begin + step * kStepPixels<T>, b.end);
  };
#pragma unroll
  for (int i = 0; i < kStages - 2; ++i) {
    if (i < steps) load(i);
    cp_async_commit();
  }
  pin(sums.values);
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 3>();
    fence_for_matrix_unit();
    __syncthreads();  // all of the step has landed, and all warpgroups are done with the step before the last
    const unsigned char* stage = shared + step % kStages * stage_bytes(kRows);
    sums.multiply(stage, stage + tile_bytes(kRows));
    if (step + kStages - 2 < steps) load(step + kStages - 2);
    cp_async_commit();
    wgmma_wait<1>();
  }
  wgmma_wait<0>();
  pin(sums.values);
  cp_async_wait<0>();
  __syncthreads();

  float* out = reinterpret_cast<float*>(shared);
  if (__syncthreads_or(sums.write(out))) {
    add_up_again(p, b, out, kRows);
    __syncthreads();
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows * kCols; i += kBlockThreads) {
    const int k = b.first_row + i / kCols, col = b.first_col + i % kCols;
    if (k >= p.g.group_out || col >= p.cols) continue;
    const float sum = out[i / kCols * kPitch + i % kCols];
    if (p.partials == nullptr) {
      store_weight(p, b.group, k, col, sum);
    } else {
      p.partials[((static_cast<int64_t>(split) * p.g.groups + b.group) * p.g.group_out + k) * p.cols + col] = sum;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kBlockThreads) sum_splits(const __grid_constant__ Problem<T> p, int64_t sums) {
  const int64_t index = element_index();
  if (index >= sums) return;
  float sum = 0;
  for (int split = 0; split < p.splits; ++split) sum += p.partials[split * sums + index];
  const int64_t row = index / p.cols;
  store_weight(p, static_cast<int>(row / p.g.group_out), static_cast<int>(row % p.g.group_out), static_cast<int>(index % p.cols), sum);
}

// What the host works out of a shape.
struct Division {
  explicit Division(const Conv2dShape& s)
      : chunk(s.dtype == DType::float32 ? kChunk<float> : kChunk<__half>),
        group_in(s.in_channels / s.groups),
        group_out(s.out_channels / s.groups),
        in_chunks(ceil_div<int64_t>(group_in, chunk)),
        out_chunks(ceil_div<int64_t>(group_out, chunk)),
        cols(in_chunks * chunk * s.kernel_h * s.kernel_w),
        rows(group_out <= kWarpgroupRows ? kWarpgroupRows : 2 * kWarpgroupRows),
        row_tiles(ceil_div<int64_t>(group_out, rows)),
        col_tiles(ceil_div<int64_t>(cols, kCols)),
        sums(s.groups * group_out * cols),
        splits(split(pixels_of(s), row_tiles * col_tiles * s.groups)),
        stages_input((s.layout == Layout::nchw && s.in_h * s.in_w > 1) || group_in % chunk != 0),
        stages_grad((s.layout == Layout::nchw && s.out_h * s.out_w > 1) || group_out % chunk != 0),
        input_bytes(stages_input ? aligned(s.batch * s.in_h * s.in_w * s.groups * in_chunks * kChunkBytes) : 0),
        grad_bytes(stages_grad ? aligned(s.batch * s.out_h * s.out_w * s.groups * out_chunks * kChunkBytes) : 0),
        partial_bytes(splits.count > 1 ? static_cast<int64_t>(sizeof(float)) * splits.count * sums : 0) {}

  static int64_t aligned(int64_t bytes) { return ceil_div<int64_t>(bytes, 256) * 256; }

  // Two blocks for each of 132 multiprocessors, but at least 512 pixels to a split and at most 2^24 partial sums in all.
  Splits split(int64_t pixels, int64_t tiles) const {
    constexpr int64_t kWanted = 264, kLeastPixels = 512, kMultiple = 64;
    if (pixels == 0 || sums == 0) return {1, kMultiple};
    const int64_t wanted = std::max<int64_t>(
        1, std::min({kWanted / std::max<int64_t>(tiles, 1), ceil_div(pixels, kLeastPixels), kMostPartials / sums}));
    const int64_t size = ceil_div(ceil_div(pixels, wanted), kMultiple) * kMultiple;
    return {ceil_div(pixels, size), size};
  }

  int64_t chunk, group_in, group_out, in_chunks, out_chunks, cols, rows, row_tiles, col_tiles, sums;
  Splits splits;
  bool stages_input, stages_grad;
  int64_t input_bytes, grad_bytes, partial_bytes;  // of the workspace
};

bool accepts(const Conv2dShape& s) {
  if (s.padding_mode != PaddingMode::zeros || !suits_mma(s)) return false;
  const int64_t chunk = s.dtype == DType::float32 ? kChunk<float> : kChunk<__half>;
  return s.groups == 1 || (s.in_channels / s.groups % chunk == 0 && s.out_channels / s.groups % chunk == 0);
}

Plan plan(const Conv2dShape& s) {
  const Division d(s);
  return {d.rows, kCols, d.row_tiles * d.col_tiles * s.groups * d.splits.count,
          static_cast<size_t>(d.input_bytes + d.grad_bytes + d.partial_bytes)};
}

// [N, channels, plane] -> [N, plane, channels of whole chunks].
Transposition channels_innermost(const Conv2dShape& s, int64_t channels, int64_t padded, int64_t plane) {
  const bool nchw = s.layout == Layout::nchw;
  Transposition t{};
  t.outer = static_cast<int>(s.batch), t.inner = 1;
  t.along = static_cast<int>(channels), t.padded_along = static_cast<int>(padded), t.across = static_cast<int>(plane);
  t.source_outer = channels * plane, t.source_along = nchw ? plane : 1, t.source_across = nchw ? 1 : channels;
  t.target_outer = padded * plane, t.target_across = padded;
  return t;
}

template <class T>
void run_typed(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, cudaStream_t stream) {
  const Division d(s);
  auto* staged_input = static_cast<unsigned char*>(workspace);
  auto* staged_grad = staged_input + d.input_bytes;
  const int64_t padded_in = d.in_chunks * d.chunk * s.groups, padded_out = d.out_chunks * d.chunk * s.groups;
  if (d.stages_input) {
    launch_transposition<T>(channels_innermost(s, s.in_channels, padded_in, s.in_h * s.in_w), b.input, staged_input, stream);
  }
  if (d.stages_grad) {
    launch_transposition<T>(channels_innermost(s, s.out_channels, padded_out, s.out_h * s.out_w), b.grad_output, staged_grad, stream);
  }
  const Conv2dGeometry g(s);
  const int channels = static_cast<int>(d.in_chunks * d.chunk);
  Problem<T> p{static_cast<const T*>(d.stages_grad ? staged_grad : b.grad_output),
               static_cast<const T*>(d.stages_input ? staged_input : b.input),
               d.splits.count > 1 ? reinterpret_cast<float*>(staged_grad + d.grad_bytes) : nullptr,
               static_cast<T*>(b.grad_weight),
               g,
               strides_of(Layout::nhwc, padded_in, s.in_h, s.in_w),
               padded_out,
               channels,
               true,
               static_cast<int>(d.in_chunks),
               static_cast<int>(d.cols),
               static_cast<int>(pixels_of(s)),
               static_cast<int>(d.splits.size),
               static_cast<int>(d.row_tiles),
               static_cast<int>(d.col_tiles),
               static_cast<int>(d.splits.count),
               FastDivisor(channels),
               FastDivisor(g.kernel_w),
               PlaneDecoder(g.out_h, g.out_w)};
  p.has_chunks = is_aligned(p.grad_output) && is_aligned(p.input);
  const int64_t blocks = plan(s).blocks;
  constexpr size_t kSumBytes = sizeof(float) * kPitch;  // of a row
  if (d.rows == kWarpgroupRows) {
    constexpr int kRows = kWarpgroupRows;
    launch(backward_weight_wgmma<T, kRows>, Grid(blocks, kBlockThreads, std::max(kStages * stage_bytes(kRows), kRows * kSumBytes)), stream, p);
  } else {
    constexpr int kRows = 2 * kWarpgroupRows;
    launch(backward_weight_wgmma<T, kRows>, Grid(blocks, kBlockThreads, std::max(kStages * stage_bytes(kRows), kRows * kSumBytes)), stream, p);
  }
  if (d.splits.count > 1) launch_elementwise(sum_splits<T>, d.sums, stream, p, d.sums);
}

void run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, cudaStream_t stream) {
  switch (s.dtype) {
    case DType::float32:
      return run_typed<float>(s, b, workspace, stream);
    case DType::float16:
      return run_typed<__half>(s, b, workspace, stream);
    default:
      return run_typed<__nv_bfloat16>(s, b, workspace, stream);
  }
}

}  // namespace

extern const Conv2dKernel conv2d_backward_weight_wgmma_sm90a = {"conv2d_backward_weight_wgmma_sm90a",
                                                                90,
                                                                Conv2dDirection::backward_weight,
                                                                accepts,
                                                                plan,
                                                                run,
                                                                /*needs_proof=*/true,
                                                                /*adds_bias=*/false,
                                                                /*arch_specific=*/true};

}  // namespace cnn_ext::cuda
