// grad_weight[k, c, r, s] = sum over n, oh, ow of grad_output[n, k, oh, ow] * input[n, c, ih, iw] on the matrix unit of sm_90a, in float16
// and bfloat16 (backward_weight_wgmma.cuh). Both operands lie across the depth, and the matrix unit transposes them.
//
// Tile: 128 output channels (64 where there are no more) x two panels of 64 channels (32 where there are no more); a step of the depth is
// 64 pixels; stages as in gather_wgmma.cu.
//
// Not handled: float32 (the matrix unit does not transpose TF32). Bound by the second-level cache, as gather_wgmma.cu.
#include "cuda/sm90a/backward_weight_wgmma.cuh"

namespace cnn_ext::cuda {
namespace {

constexpr int kHalfPanels = 2, kHalfStepPixels = 64;
constexpr int kPanelRows = 64;  // output channels of a box, and the rows of a warpgroup

// kRows: 128, a warpgroup for each 64; or 64, a warpgroup for each panel.
template <class T, int kRows, int kPanelChannels>
class HalfGemm {
 public:
  using Tile = WeightTile<T, kRows, kHalfPanels, kPanelChannels, kHalfStepPixels>;
  static constexpr int kBlocks = kRows == kPanelRows ? 2 : 1, kOwnBytes = 0, kStepCycles = Tile::kStageBytes / kCacheBytes;

  __device__ HalfGemm(const WeightProblem<T>& problem, const WeightBlock& block) : p_(problem), b_(block) {}

  __device__ void accumulate(unsigned char* shared, uint64_t* barriers) {
    pin(sums_);
    pipeline(
        barriers, p_.stages, ceil_div(b_.end - b_.begin, kHalfStepPixels),
        [&](int stage, int step) {
          announce(barriers + stage, Tile::kStageBytes);
#pragma unroll
          for (int part = 0; part < Tile::kParts; ++part) {
            fetch_part<Tile>(p_, b_, shared + stage * Tile::kStageBytes, barriers + stage, b_.begin + step * kHalfStepPixels, part);
          }
        },
        [&](int stage, int) { multiply(shared + stage * Tile::kStageBytes); });
    pin(sums_);
  }

  __device__ bool write(float* sums) const {
    const int warp = threadIdx.x % kWarpgroupThreads / 32, lane = threadIdx.x % 32;
    float* corner = sums + (row_panel() * kPanelRows + warp * 16 + lane / 4) * Tile::kSumPitch +
                    (kSharesRows ? warpgroup() * kPanelChannels : 0) + lane % 4 * 2;
    return write_sums<Tile, 8>(sums_, corner);
  }

 private:
  static constexpr bool kSharesRows = kRows == kPanelRows;
  static constexpr int kWarpgroupCols = kSharesRows ? kPanelChannels : Tile::kCols;

  __device__ static int warpgroup() { return threadIdx.x / kWarpgroupThreads; }
  __device__ static int row_panel() { return kSharesRows ? 0 : warpgroup(); }

  __device__ void multiply(const unsigned char* stage) {
    const unsigned char* cols = stage + Tile::kRowTileBytes + (kSharesRows ? warpgroup() * Tile::kPanelBytes : 0);
    const uint64_t a = matrix_descriptor<128>(stage + row_panel() * Tile::kRowBoxBytes, Tile::kRowBoxBytes);
    const uint64_t b = matrix_descriptor<Tile::kPanelRowBytes>(cols, Tile::kPanelBytes);
    constexpr int kInstructionPixels = 16;
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kHalfStepPixels / kInstructionPixels; ++i) {
      wgmma<true, true>(sums_, a + descriptor_offset(i * kInstructionPixels * 128),
                        b + descriptor_offset(i * kInstructionPixels * Tile::kPanelRowBytes), T{});
    }
    wgmma_commit();
  }

  const WeightProblem<T>& p_;
  const WeightBlock b_;
  float sums_[kWarpgroupCols / 2] = {};
};

// Calls function(Gemm*) with the tile that suits a shape.
template <class T, class Function>
auto with_tile(const Conv2dShape& s, const Function& function) {
  const bool narrow_panels = s.in_channels <= 32;
  if (s.out_channels <= kPanelRows) {
    return narrow_panels ? function(static_cast<HalfGemm<T, kPanelRows, 32>*>(nullptr))
                         : function(static_cast<HalfGemm<T, kPanelRows, 64>*>(nullptr));
  }
  return narrow_panels ? function(static_cast<HalfGemm<T, 2 * kPanelRows, 32>*>(nullptr))
                       : function(static_cast<HalfGemm<T, 2 * kPanelRows, 64>*>(nullptr));
}

bool accepts(const Conv2dShape& s) { return s.dtype != DType::float32 && suits_weight_wgmma(s); }

Plan plan(const Conv2dShape& s) {
  return with_tile<__half>(s, [&](auto* gemm) { return WeightDivision(s, tile_sizes<std::decay_t<decltype(*gemm)>>()).plan(); });
}

template <class T>
void run_typed(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, cudaStream_t stream) {
  with_tile<T>(s, [&](auto* gemm) {
    using Gemm = std::decay_t<decltype(*gemm)>;
    run_weight_tile<Gemm>(s, b, WeightDivision(s, tile_sizes<Gemm>()), workspace, stream);
  });
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
