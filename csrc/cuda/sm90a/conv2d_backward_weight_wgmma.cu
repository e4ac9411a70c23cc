// grad_weight[k, c, r, s] = sum over n, oh, ow of grad_output[n, k, oh, ow] * input[n, c, ih, iw] on the matrix unit of sm_90a, in float16
// and bfloat16 (backward_weight_wgmma.cuh). Both operands lie across the depth, and the matrix unit transposes them.
//
// Tile: 64, 128 or 256 output channels x two to eight panels of 64 channels (32 where there are no more), whatever takes the least time; a
// step of the depth is 64 pixels; stages as in gather_wgmma.cu.
//
// Not handled: float32 (the matrix unit does not transpose TF32). Bound by the second-level cache, as gather_wgmma.cu.
#include "cuda/sm90a/backward_weight_wgmma.cuh"

namespace cnn_ext::cuda {
namespace {

constexpr int kStepPixels = 64, kBoxRows = 64;  // output channels of a box

// kRows: 64, and the warpgroups share the columns; or more, and they share the rows.
template <class T, int kRows, int kPanels, int kPanelChannels>
class HalfGemm {
 public:
  using Tile = WeightTile<T, kRows, kPanels, kPanelChannels, kStepPixels>;
  static constexpr int kBlocks = kRows * Tile::kCols <= 64 * 128 ? 2 : 1, kOwnBytes = 0;

  __device__ HalfGemm(const WeightProblem<T>& problem, const WeightBlock& block) : p_(problem), b_(block) {}

  __device__ void accumulate(unsigned char* shared, uint64_t* barriers) {
    const StepFetcher<Tile> fetcher(p_, b_);
    pin_sums();
    pipeline(
        barriers, p_.stages, ceil_div(b_.end - b_.begin, kStepPixels),
        [&](int stage, int step) {
          fetcher.fetch(p_, shared + stage * Tile::kStageBytes, barriers + stage, b_.begin + step * kStepPixels);
        },
        [&](int stage, int) { multiply(shared + stage * Tile::kStageBytes); });
    pin_sums();
  }

  __device__ bool write(float* sums) const {
    const int warp = threadIdx.x % kWarpgroupThreads / 32, lane = threadIdx.x % 32;
    float* corner =
        sums + (first_box() * kBoxRows + warp * 16 + lane / 4) * Tile::kSumPitch + first_panel() * kPanelChannels + lane % 4 * 2;
    bool meets_nan = false;
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
      meets_nan |= write_sums<Tile, 8>(sums_[tile], corner + tile * kBoxRows * Tile::kSumPitch);
    }
    return meets_nan;
  }

 private:
  static constexpr bool kSharesRows = kRows == kBoxRows;
  static constexpr int kRowTiles = kSharesRows ? 1 : kRows / (2 * kBoxRows);  // of a warpgroup
  static constexpr int kWarpgroupPanels = kSharesRows ? kPanels / 2 : kPanels;

  __device__ static int warpgroup() { return threadIdx.x / kWarpgroupThreads; }
  __device__ static int first_box() { return kSharesRows ? 0 : warpgroup() * kRowTiles; }
  __device__ static int first_panel() { return kSharesRows ? warpgroup() * kWarpgroupPanels : 0; }

  __device__ void pin_sums() {
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) pin(sums_[tile]);
  }

  __device__ void multiply(const unsigned char* stage) {
    const uint64_t a = matrix_descriptor<128>(stage + first_box() * Tile::kRowBoxBytes, Tile::kRowBoxBytes);
    const unsigned char* cols = stage + Tile::kRowTileBytes + first_panel() * Tile::kPanelBytes;
    const uint64_t b = matrix_descriptor<Tile::kPanelRowBytes>(cols, Tile::kPanelBytes);
    constexpr int kInstructionPixels = 16;
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kStepPixels; i += kInstructionPixels) {
#pragma unroll
      for (int tile = 0; tile < kRowTiles; ++tile) {
        wgmma<true, true>(sums_[tile], a + descriptor_offset(tile * Tile::kRowBoxBytes + i * 128),
                          b + descriptor_offset(i * Tile::kPanelRowBytes), T{});
      }
    }
    wgmma_commit();
  }

  const WeightProblem<T>& p_;
  const WeightBlock b_;
  float sums_[kRowTiles][kWarpgroupPanels * kPanelChannels / 2] = {};
};

template <class T, int kRows, int kPanels, int kPanelChannels>
constexpr WeightCandidate candidate(int64_t step_cycles) {
  using Gemm = HalfGemm<T, kRows, kPanels, kPanelChannels>;
  return {tile_sizes<Gemm>(step_cycles), run_weight_tile<Gemm>};
}

template <class T>
constexpr WeightCandidate kNarrow[] = {candidate<T, 64, 2, 32>(470), candidate<T, 64, 4, 32>(400), candidate<T, 128, 2, 32>(400),
                                       candidate<T, 128, 4, 32>(520), candidate<T, 128, 8, 32>(1030)};
template <class T>
constexpr WeightCandidate kWide[] = {candidate<T, 64, 2, 32>(470),  candidate<T, 64, 2, 64>(400),  candidate<T, 64, 4, 64>(800),
                                     candidate<T, 128, 2, 32>(400), candidate<T, 128, 2, 64>(520), candidate<T, 256, 2, 64>(1030),
                                     candidate<T, 128, 4, 64>(1030)};

template <class T>
WeightChoice choose(const Conv2dShape& s) {
  return s.in_channels / s.groups <= 32 ? choose_tile(s, kNarrow<T>) : choose_tile(s, kWide<T>);
}

bool accepts(const Conv2dShape& s) { return s.dtype != DType::float32 && suits_weight_wgmma(s); }

Plan plan(const Conv2dShape& s) { return choose<__half>(s).division.plan(); }

void run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, cudaStream_t stream) {
  const WeightChoice choice = s.dtype == DType::float16 ? choose<__half>(s) : choose<__nv_bfloat16>(s);
  choice.candidate.run(s, b, choice.division, workspace, stream);
}

}  // namespace

int64_t expected_window_cycles(const Conv2dShape& s) { return choose<__half>(s).division.splits.cycles; }

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
