// grad_weight[k, c, r, s] = sum over n, oh, ow of grad_output[n, k, oh, ow] * input[n, c, ih, iw] on the matrix unit of sm_90a, in float16
// and bfloat16. Rows of the product are output channels, columns the weights (r, s, c) in panels of 64 channels (32 where there are no
// more) of one tap, the depth runs over the pixels (n, oh, ow).
//
// Operands: the copy engine fetches boxes of both tensors, pixels x channels, padding as zeros, to shared memory; both lie across the
// depth, and the matrix unit transposes them. Tensors whose channels do not lie innermost in whole chunks of 16 bytes are put in that order
// by a launch of its own first (transposition.cuh).
//
// There are few tiles and a long depth: the pixels are split among blocks, and a second launch adds up the partial sums in order. The
// splits follow from the shape alone, so that every run has the same bits. With one split the tile is stored at once.
//
// Tile: 128 output channels (64 where there are no more) x two panels; a step of the depth is 64 pixels; stages as in gather_wgmma.cu.
//
// Padding never multiplies: see gather_wgmma.cu. Not handled: float32 and float64 (the matrix unit does not transpose TF32); groups;
// strides above 8, padding of more than 128, windows of more than 256. Bound by the second-level cache, as gather_wgmma.cu.
#include <algorithm>

#include "cuda/chunk.cuh"
#include "cuda/limits.h"
#include "cuda/pixel_reduction.cuh"
#include "cuda/sm90a/overlap.cuh"
#include "cuda/sm90a/pipeline.cuh"
#include "cuda/sm90a/tensor_map.cuh"
#include "cuda/sm90a/transposition.cuh"
#include "cuda/sm90a/wgmma.cuh"

namespace cnn_ext::cuda {
namespace {

constexpr int kStepPixels = 64, kPanels = 2;
constexpr int kPanelRows = 64;                     // output channels of a panel of grad_output
constexpr int kRowPanelBytes = kStepPixels * 128;  // of 64 channels of 16 bits

CNN_EXT_HOST_DEVICE constexpr int stage_bytes(int rows, int panel_channels) { return kStepPixels * 2 * (rows + kPanels * panel_channels); }
CNN_EXT_HOST_DEVICE constexpr int sum_pitch(int panel_channels) { return kPanels * panel_channels + 8; }

template <class T>
struct Problem {
  CUtensorMap grad_output_map, input_map;
  const T* grad_output;
  const T* input;
  float* partials;  // [split][output channel][tap][channel, of whole panels]; null: one split, stored at once
  T* grad_weight;
  Conv2dGeometry g;
  Strides in;
  int64_t out_pixel;  // from one pixel of grad_output to the next
  int panels_of_tap, panels, pixels, split_pixels;
  int row_tiles, col_tiles, splits, stages;
  FastDivisor tap_decoder, width_decoder;
  PlaneDecoder pixel_decoder;
};

// A panel of the columns: some channels of one tap.
struct Panel {
  int first_channel, r, s;
};

template <class T>
__device__ Panel panel_at(const Problem<T>& p, int panel, int panel_channels) {
  const int tap = p.tap_decoder.quotient(panel), r = p.width_decoder.quotient(tap);
  return {(panel - tap * p.panels_of_tap) * panel_channels, r, tap - r * p.g.kernel_w};
}

struct Block {
  int first_row, first_panel, begin, end;  // end: of the pixels
};

// Replaces every sum that is NaN by that of the products that exist.
template <class T, int kPanelChannels>
__device__ __noinline__ void add_up_again(const Problem<T>& p, Block b, float* sums, int rows) {
  constexpr int kCols = kPanels * kPanelChannels;
  for (int index = threadIdx.x; index < rows * kCols; index += kBlockThreads) {
    const int k = b.first_row + index / kCols, col = index % kCols;
    const Panel panel = panel_at(p, b.first_panel + col / kPanelChannels, kPanelChannels);
    const int channel = panel.first_channel + col % kPanelChannels;
    float* sum = sums + index / kCols * sum_pitch(kPanelChannels) + col;
    if (!isnan(*sum) || k >= p.g.group_out || channel >= p.g.group_in) continue;
    float exact = 0;
    for (int pixel = b.begin; pixel < b.end; ++pixel) {
      const PlaneIndex out = p.pixel_decoder.at(pixel);
      const int h = out.h * p.g.stride_h - p.g.pad_top + panel.r * p.g.dilation_h;
      const int w = out.w * p.g.stride_w - p.g.pad_left + panel.s * p.g.dilation_w;
      if (h < 0 || h >= p.g.in_h || w < 0 || w >= p.g.in_w) continue;
      const T* input = p.input + channel + out.outer * p.in.n + h * p.in.h + w * p.in.w;
      exact = fmaf(widen(p.grad_output[k + pixel * p.out_pixel]), widen(*input), exact);
    }
    *sum = exact;
  }
}

template <class T>
__device__ void store_weight(const Problem<T>& p, int k, const Panel& panel, int channel, float sum) {
  p.grad_weight[k * p.g.filter.n + channel * p.g.filter.c + panel.r * p.g.filter.h + panel.s * p.g.filter.w] = narrow<T>(sum);
}

// kRows: 128, a warpgroup for each 64; or 64, a warpgroup for each panel.
template <class T, int kRows, int kPanelChannels>
class Gemm {
 public:
  __device__ Gemm(const Problem<T>& problem, const Block& block) : p_(problem), b_(block) {}

  __device__ void accumulate(unsigned char* shared, uint64_t* barriers) {
    pin(sums_);
    pipeline(
        barriers, p_.stages, ceil_div(b_.end - b_.begin, kStepPixels),
        [&](int stage, int step) { fetch(shared + stage * kStageBytes, barriers + stage, b_.begin + step * kStepPixels); },
        [&](int stage) { multiply(shared + stage * kStageBytes); });
    pin(sums_);
  }

  // Registers -> shared memory. Whether there is a NaN among this thread's sums.
  __device__ bool write(float* sums) const {
    const int warp = threadIdx.x % kWarpgroupThreads / 32, lane = threadIdx.x % 32;
    float* corner = sums + (row_panel() * kPanelRows + warp * 16 + lane / 4) * sum_pitch(kPanelChannels) +
                    (kSharesRows ? warpgroup() * kPanelChannels : 0) + lane % 4 * 2;
    bool meets_nan = false;
#pragma unroll
    for (int i = 0; i < kWarpgroupCols / 2; ++i) {
      corner[i % 4 / 2 * 8 * sum_pitch(kPanelChannels) + i / 4 * 8 + i % 2] = sums_[i];
      meets_nan = meets_nan || isnan(sums_[i]);
    }
    return meets_nan;
  }

 private:
  static constexpr bool kSharesRows = kRows == kPanelRows;
  static constexpr int kWarpgroupCols = kSharesRows ? kPanelChannels : kPanels * kPanelChannels;
  static constexpr int kColRowBytes = kPanelChannels * 2, kColPanelBytes = kStepPixels * kColRowBytes;
  static constexpr int kStageBytes = stage_bytes(kRows, kPanelChannels), kRowTileBytes = kRows / kPanelRows * kRowPanelBytes;

  __device__ static int warpgroup() { return threadIdx.x / kWarpgroupThreads; }
  __device__ static int row_panel() { return kSharesRows ? 0 : warpgroup(); }

  __device__ void fetch(unsigned char* stage, uint64_t* barrier, int pixel) const {
    announce(barrier, kStageBytes);
#pragma unroll
    for (int i = 0; i < kRows / kPanelRows; ++i) {
      fetch_box(stage + i * kRowPanelBytes, p_.grad_output_map, b_.first_row + i * kPanelRows, pixel, 0, 0, barrier);
    }
    const PlaneIndex out = p_.pixel_decoder.at(pixel);
#pragma unroll
    for (int i = 0; i < kPanels; ++i) {
      // A panel beyond the last one reads channels that do not exist.
      const bool exists = b_.first_panel + i < p_.panels;
      const Panel panel = panel_at(p_, exists ? b_.first_panel + i : 0, kPanelChannels);
      fetch_windows(stage + kRowTileBytes + i * kColPanelBytes, p_.input_map,
                    exists ? panel.first_channel : p_.panels_of_tap * kPanelChannels, out.w * p_.g.stride_w - p_.g.pad_left,
                    out.h * p_.g.stride_h - p_.g.pad_top, out.outer, panel.s * p_.g.dilation_w, panel.r * p_.g.dilation_h, barrier);
    }
  }

  __device__ void multiply(const unsigned char* stage) {
    const unsigned char* cols = stage + kRowTileBytes + (kSharesRows ? warpgroup() * kColPanelBytes : 0);
    const uint64_t a = matrix_descriptor<128>(stage + row_panel() * kRowPanelBytes, kRowPanelBytes);
    const uint64_t b = matrix_descriptor<kColRowBytes>(cols, kColPanelBytes);
    constexpr int kInstructionPixels = 16;
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kStepPixels / kInstructionPixels; ++i) {
      wgmma<true, true>(sums_, a + descriptor_offset(i * kInstructionPixels * 128),
                        b + descriptor_offset(i * kInstructionPixels * kColRowBytes), T{});
    }
    wgmma_commit();
  }

  const Problem<T>& p_;
  const Block b_;
  float sums_[kWarpgroupCols / 2] = {};
};

// Blocks are numbered by row tile, column tile, split: those that read the same pixels run together.
template <class T, int kRows, int kPanelChannels>
__global__ void __launch_bounds__(kBlockThreads, 2) backward_weight_wgmma(const __grid_constant__ Problem<T> p) {
  constexpr int kCols = kPanels * kPanelChannels, kPitch = sum_pitch(kPanelChannels);
  __shared__ __align__(8) uint64_t barriers[kMostStages];
  init_pipeline(barriers, p.stages);
  const int row_tile = blockIdx.x % p.row_tiles, rest = blockIdx.x / p.row_tiles;
  const int col_tile = rest % p.col_tiles, split = rest / p.col_tiles;
  const Block b{row_tile * kRows, col_tile * kPanels, split * p.split_pixels, smaller(p.pixels, (split + 1) * p.split_pixels)};
  Gemm<T, kRows, kPanelChannels> gemm(p, b);
  unsigned char* shared = dynamic_shared<unsigned char>();
  wait_for_launch_before();
  gemm.accumulate(shared, barriers);
  float* sums = reinterpret_cast<float*>(shared);
  if (__syncthreads_or(gemm.write(sums))) {
    add_up_again<T, kPanelChannels>(p, b, sums, kRows);
    __syncthreads();
  }
  const int64_t line = static_cast<int64_t>(p.panels) * kPanelChannels;
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows * kCols; i += kBlockThreads) {
    const int k = b.first_row + i / kCols, col = i % kCols, panel = b.first_panel + col / kPanelChannels;
    if (k >= p.g.group_out || panel >= p.panels) continue;
    const float sum = sums[i / kCols * kPitch + col];
    if (p.partials != nullptr) {
      p.partials[(static_cast<int64_t>(split) * p.g.group_out + k) * line + b.first_panel * kPanelChannels + col] = sum;
      continue;
    }
    const Panel at = panel_at(p, panel, kPanelChannels);
    const int channel = at.first_channel + col % kPanelChannels;
    if (channel < p.g.group_in) store_weight(p, k, at, channel, sum);
  }
}

template <class T, int kPanelChannels>
__global__ void __launch_bounds__(kBlockThreads) sum_splits(const __grid_constant__ Problem<T> p, int64_t sums) {
  const int64_t index = element_index();
  if (index >= sums) return;
  const int line = p.panels * kPanelChannels;
  const int k = static_cast<int>(index / line), col = static_cast<int>(index % line);
  const Panel panel = panel_at(p, col / kPanelChannels, kPanelChannels);
  const int channel = panel.first_channel + col % kPanelChannels;
  if (channel >= p.g.group_in) return;
  wait_for_launch_before();
  float sum = 0;
  for (int split = 0; split < p.splits; ++split) sum += p.partials[split * sums + index];
  store_weight(p, k, panel, channel, sum);
}

// What the host works out of a shape.
struct Division {
  explicit Division(const Conv2dShape& s)
      : panel_channels(s.in_channels <= 32 ? 32 : 64),
        panels_of_tap(ceil_div<int64_t>(s.in_channels, panel_channels)),
        panels(panels_of_tap * s.kernel_h * s.kernel_w),
        rows(s.out_channels <= kPanelRows ? kPanelRows : 2 * kPanelRows),
        row_tiles(ceil_div<int64_t>(s.out_channels, rows)),
        col_tiles(ceil_div<int64_t>(panels, kPanels)),
        sums(s.out_channels * panels * panel_channels),
        splits(split(pixels_of(s), row_tiles * col_tiles)),
        padded_in(ceil_div<int64_t>(s.in_channels, kChunk<__half>) * kChunk<__half>),
        padded_out(ceil_div<int64_t>(s.out_channels, kChunk<__half>) * kChunk<__half>),
        stages_input((s.layout == Layout::nchw && s.in_h * s.in_w > 1) || padded_in != s.in_channels),
        stages_grad((s.layout == Layout::nchw && s.out_h * s.out_w > 1) || padded_out != s.out_channels),
        input_bytes(stages_input ? aligned(s.batch * s.in_h * s.in_w * padded_in * 2) : 0),
        grad_bytes(stages_grad ? aligned(s.batch * s.out_h * s.out_w * padded_out * 2) : 0),
        partial_bytes(splits.count > 1 ? static_cast<int64_t>(sizeof(float)) * splits.count * sums : 0) {}

  static int64_t aligned(int64_t bytes) { return ceil_div<int64_t>(bytes, 256) * 256; }

  // Two blocks for each of 132 multiprocessors, but at least 512 pixels to a split and at most 2^24 partial sums in all.
  Splits split(int64_t pixels, int64_t tiles) const {
    constexpr int64_t kWanted = 2 * kMultiprocessors, kLeastPixels = 512;
    if (pixels == 0 || sums == 0) return {1, kStepPixels};
    const int64_t wanted =
        std::max<int64_t>(1, std::min({kWanted / std::max<int64_t>(tiles, 1), ceil_div(pixels, kLeastPixels), kMostPartials / sums}));
    const int64_t size = ceil_div(ceil_div(pixels, wanted), int64_t{kStepPixels}) * kStepPixels;
    return {ceil_div(pixels, size), size};
  }

  int64_t panel_channels, panels_of_tap, panels, rows, row_tiles, col_tiles, sums;
  Splits splits;
  int64_t padded_in, padded_out;
  bool stages_input, stages_grad;
  int64_t input_bytes, grad_bytes, partial_bytes;  // of the workspace
};

bool accepts(const Conv2dShape& s) {
  const WindowAxis h{-static_cast<int>(s.pad_top), static_cast<int>(s.stride_h), static_cast<int>(s.out_h)};
  const WindowAxis w{-static_cast<int>(s.pad_left), static_cast<int>(s.stride_w), static_cast<int>(s.out_w)};
  return s.padding_mode == PaddingMode::zeros && s.dtype != DType::float32 && s.groups == 1 && s.batch > 0 && suits_mma(s) &&
         fits_copy_engine(h, static_cast<int>(s.in_h), static_cast<int>((s.kernel_h - 1) * s.dilation_h)) &&
         fits_copy_engine(w, static_cast<int>(s.in_w), static_cast<int>((s.kernel_w - 1) * s.dilation_w));
}

Plan plan(const Conv2dShape& s) {
  const Division d(s);
  return {d.rows, kPanels * d.panel_channels, d.row_tiles * d.col_tiles * d.splits.count,
          static_cast<size_t>(d.input_bytes + d.grad_bytes + d.partial_bytes)};
}

template <class T>
Problem<T> problem_of(const Conv2dShape& s, const Conv2dBuffers& b, const Division& d, void* workspace) {
  const Conv2dGeometry g(s);
  auto* staged_input = static_cast<unsigned char*>(workspace);
  auto* staged_grad = staged_input + d.input_bytes;
  const int64_t pixels = pixels_of(s);
  Problem<T> p{{},
               {},
               static_cast<const T*>(d.stages_grad ? staged_grad : b.grad_output),
               static_cast<const T*>(d.stages_input ? staged_input : b.input),
               d.splits.count > 1 ? reinterpret_cast<float*>(staged_grad + d.grad_bytes) : nullptr,
               static_cast<T*>(b.grad_weight),
               g,
               strides_of(Layout::nhwc, d.padded_in, s.in_h, s.in_w),
               d.padded_out,
               static_cast<int>(d.panels_of_tap),
               static_cast<int>(d.panels),
               static_cast<int>(pixels),
               static_cast<int>(d.splits.size),
               static_cast<int>(d.row_tiles),
               static_cast<int>(d.col_tiles),
               static_cast<int>(d.splits.count),
               0,
               FastDivisor(static_cast<int>(d.panels_of_tap)),
               FastDivisor(g.kernel_w),
               PlaneDecoder(g.out_h, g.out_w)};
  if (!is_aligned(p.grad_output) || !is_aligned(p.input)) throw std::invalid_argument("this kernel wants tensors aligned to 16 bytes");
  const TensorAxes out_axes{{s.out_channels, pixels, 1, 1}, {d.padded_out, d.padded_out * pixels, d.padded_out * pixels}};
  p.grad_output_map = tile_map<T>(p.grad_output, out_axes, {kPanelRows, kStepPixels, 1, 1});
  const TensorAxes in_axes{{s.in_channels, s.in_w, s.in_h, s.batch}, {p.in.w, p.in.h, p.in.n}};
  p.input_map = window_map<T>(p.input, in_axes, {-g.pad_top, g.stride_h, g.out_h}, {-g.pad_left, g.stride_w, g.out_w},
                              static_cast<int>(d.panel_channels), kStepPixels);
  return p;
}

template <class T, int kRows, int kPanelChannels>
void launch_tile(Problem<T>& problem, int64_t blocks, int64_t sums, cudaStream_t stream) {
  constexpr int kStage = stage_bytes(kRows, kPanelChannels),
                kSumBytes = static_cast<int>(sizeof(float)) * kRows * sum_pitch(kPanelChannels);
  problem.stages = pipeline_stages(kStage, kRows == kPanelRows && blocks > kMultiprocessors);
  launch(backward_weight_wgmma<T, kRows, kPanelChannels>,
         overlapping(Grid(blocks, kBlockThreads, std::max(problem.stages * kStage, kSumBytes))), stream, problem);
  if (problem.splits > 1) {
    launch(sum_splits<T, kPanelChannels>, overlapping(Grid(ceil_div<int64_t>(sums, kBlockThreads))), stream, problem, sums);
  }
}

template <class T>
void run_typed(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, cudaStream_t stream) {
  const Division d(s);
  auto* staged_input = static_cast<unsigned char*>(workspace);
  if (d.stages_input)
    launch_transposition<T>(channels_innermost(s.layout, s.batch, s.in_channels, d.padded_in, s.in_h * s.in_w), b.input, staged_input,
                            stream);
  if (d.stages_grad) {
    launch_transposition<T>(channels_innermost(s.layout, s.batch, s.out_channels, d.padded_out, s.out_h * s.out_w), b.grad_output,
                            staged_input + d.input_bytes, stream);
  }
  Problem<T> problem = problem_of<T>(s, b, d, workspace);
  const int64_t blocks = plan(s).blocks;
  if (d.rows == kPanelRows) {
    (d.panel_channels == 32 ? launch_tile<T, kPanelRows, 32> : launch_tile<T, kPanelRows, 64>)(problem, blocks, d.sums, stream);
  } else {
    (d.panel_channels == 32 ? launch_tile<T, 2 * kPanelRows, 32> : launch_tile<T, 2 * kPanelRows, 64>)(problem, blocks, d.sums, stream);
  }
}

void run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, cudaStream_t stream) {
  if (s.dtype == DType::float16) {
    run_typed<__half>(s, b, workspace, stream);
  } else {
    run_typed<__nv_bfloat16>(s, b, workspace, stream);
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
