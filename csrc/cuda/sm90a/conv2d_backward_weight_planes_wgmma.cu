// backward_weight of 1x1 kernels without stride and padding in nchw, on the matrix unit of sm_90a, in TF32 (where the policy allows it),
// float16 and bfloat16 (backward_weight_wgmma.cuh): grad_weight[k, c] = sum over n and pixels of grad_output[n, k, pixel] * input[n, c,
// pixel]. Planes lie along the depth, so both operands are multiplied as they lie: nothing is transposed.
//
// An image is one row of pixels, filled up with zeros to whole steps of 128 bytes, which the copy engine fetches for each plane of a tile.
//
// Tile: 128 output channels (64 where there are no more) x 64, 128 or 256 channels; stages as in gather_wgmma.cu.
//
// Not handled: planes that are not whole chunks of 16 bytes. Bound by memory.
#include "cuda/sm90a/backward_weight_wgmma.cuh"

namespace cnn_ext::cuda {
namespace {

constexpr int kPanelChannels = 32, kRowBytes = 128;  // of a plane in a step
template <class T>
constexpr int kStepPixels = kRowBytes / static_cast<int>(sizeof(T));

// kRows: 128, a warpgroup for each 64; or 64, a warpgroup for each half of the columns.
template <class T, int kRows, int kPanels>
class PlanesGemm {
 public:
  using Tile = WeightTile<T, kRows, kPanels, kPanelChannels, kStepPixels<T>>;
  static constexpr int kBlocks = kPanels <= 4 ? 2 : 1, kOwnBytes = 0;

  __device__ PlanesGemm(const WeightProblem<T>& problem, const WeightBlock& block) : p_(problem), b_(block) {}

  __device__ void accumulate(unsigned char* shared, uint64_t* barriers) {
    pin(sums_);
    pipeline(
        barriers, p_.stages, ceil_div(b_.end - b_.begin, kStepPixels<T>),
        [&](int stage, int step) {
          if (threadIdx.x == 0) fetch(shared + stage * Tile::kStageBytes, barriers + stage, b_.begin + step * kStepPixels<T>);
        },
        [&](int stage, int) { multiply(shared + stage * Tile::kStageBytes); });
    pin(sums_);
  }

  __device__ bool write(float* sums) const {
    const int warp = threadIdx.x % kWarpgroupThreads / 32, lane = threadIdx.x % 32;
    return write_sums<Tile, 8>(sums_, sums + (first_row() + warp * 16 + lane / 4) * Tile::kSumPitch + first_col() + lane % 4 * 2);
  }

 private:
  static constexpr bool kSharesRows = kRows == kWarpgroupRows;
  static constexpr int kWarpgroupCols = kSharesRows ? Tile::kCols / 2 : Tile::kCols;

  __device__ static int warpgroup() { return threadIdx.x / kWarpgroupThreads; }
  __device__ static int first_row() { return kSharesRows ? 0 : warpgroup() * kWarpgroupRows; }
  __device__ static int first_col() { return kSharesRows ? warpgroup() * kWarpgroupCols : 0; }

  __device__ void fetch(unsigned char* stage, uint64_t* barrier, int pixel) const {
    const PlaneIndex at = p_.pixel_decoder.at(pixel);
    announce(barrier, Tile::kStageBytes);
    fetch_box(stage, p_.grad_output_map, at.w, b_.first_row, at.outer, 0, barrier);
    fetch_box(stage + Tile::kRowTileBytes, p_.input_map, at.w, b_.group_channel + b_.first_panel * kPanelChannels, at.outer, 0, barrier);
  }

  __device__ void multiply(const unsigned char* stage) {
    const uint64_t a = matrix_descriptor<kRowBytes>(stage + first_row() * kRowBytes, 16);
    const uint64_t b = matrix_descriptor<kRowBytes>(stage + Tile::kRowTileBytes + first_col() * kRowBytes, 16);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kRowBytes; i += kInstructionBytes) {
      wgmma<false, false>(sums_, a + descriptor_offset(i), b + descriptor_offset(i), T{});
    }
    wgmma_commit();
  }

  const WeightProblem<T>& p_;
  const WeightBlock b_;
  float sums_[kWarpgroupCols / 2] = {};
};

// The same products as of images of one row, padded with zeros on the right to whole steps.
Conv2dShape in_one_row(const Conv2dShape& s) {
  const int64_t step = s.dtype == DType::float32 ? kStepPixels<float> : kStepPixels<__half>;
  Conv2dShape row = s;
  row.in_h = row.out_h = 1;
  row.in_w = s.in_h * s.in_w;
  row.out_w = ceil_div(row.in_w, step) * step;
  return row;
}

// s: in one row.
template <class Gemm>
void run_planes(const Conv2dShape& s, const Conv2dBuffers& b, const WeightDivision& d, void* workspace, cudaStream_t stream) {
  using Tile = typename Gemm::Tile;
  using T = typename Tile::Element;
  const auto operand = [&](const void* data, int64_t channels) {
    return WeightOperand{data, strides_of(Layout::nchw, channels, 1, s.in_w)};
  };
  auto problem = weight_problem<T>(s, d, operand(b.input, s.in_channels), operand(b.grad_output, s.out_channels), workspace, b.grad_weight);
  const auto map = [&](const WeightOperand& planes, int64_t channels, int box) {
    const TensorAxes axes{{s.in_w, channels, s.batch, 1}, {planes.strides.c, planes.strides.n, planes.strides.n * s.batch}};
    return tile_map<T>(planes.data, axes, {kStepPixels<T>, box, 1, 1});
  };
  problem.grad_output_map = map({problem.grad_output, problem.out}, s.out_channels, Tile::kRows);
  problem.input_map = map({problem.input, problem.in}, s.in_channels, Tile::kCols);
  launch_weight_tile<Gemm>(problem, d, stream);
}

template <class T, int kRows, int kPanels>
constexpr WeightCandidate candidate(int64_t step_cycles) {
  using Gemm = PlanesGemm<T, kRows, kPanels>;
  return {tile_sizes<Gemm>(step_cycles), run_planes<Gemm>};
}

template <class T>
constexpr WeightCandidate kCandidates[] = {candidate<T, 64, 2>(470),  candidate<T, 64, 4>(400),  candidate<T, 64, 8>(800),
                                           candidate<T, 128, 2>(400), candidate<T, 128, 4>(520), candidate<T, 128, 8>(1030)};

bool accepts(const Conv2dShape& s) {
  const int64_t plane_bytes = s.in_h * s.in_w * (s.dtype == DType::float32 ? 4 : 2);
  return s.layout == Layout::nchw && s.kernel_h * s.kernel_w == 1 && s.out_h == s.in_h && s.out_w == s.in_w && s.pad_top == 0 &&
         s.pad_left == 0 && s.stride_h * s.stride_w == 1 && plane_bytes % kChunkBytes == 0 && suits_weight_wgmma(s);
}

// Of images in one row.
WeightChoice choose(const Conv2dShape& row) {
  return row.dtype == DType::float32 ? choose_tile(row, kCandidates<float>, /*in_place=*/true)
                                     : choose_tile(row, kCandidates<__half>, /*in_place=*/true);
}

Plan plan(const Conv2dShape& s) { return choose(in_one_row(s)).division.plan(); }

void run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, cudaStream_t stream) {
  with_single_type(s.dtype, [&](auto element) {
    const Conv2dShape row = in_one_row(s);
    const WeightChoice choice = choose_tile(row, kCandidates<decltype(element)>, /*in_place=*/true);
    choice.candidate.run(row, b, choice.division, workspace, stream);
  });
}

}  // namespace

extern const Conv2dKernel conv2d_backward_weight_planes_wgmma_sm90a = {"conv2d_backward_weight_planes_wgmma_sm90a",
                                                                       90,
                                                                       Conv2dDirection::backward_weight,
                                                                       accepts,
                                                                       plan,
                                                                       run,
                                                                       /*needs_proof=*/true,
                                                                       /*adds_bias=*/false,
                                                                       /*arch_specific=*/true};

}  // namespace cnn_ext::cuda
