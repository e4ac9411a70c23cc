// grad_weight[k, c, r, s] = sum over n, oh, ow of grad_output[n, k, oh, ow] * input[n, c, ih, iw] on the matrix unit of sm_90a, in TF32
// where the policy allows it (backward_weight_wgmma.cuh). Both operands lie across the depth, which the matrix unit does not transpose in
// TF32: it takes the rows from registers, which are read from grad_output as it lies, and the columns from a second tile, to which the
// threads transpose the windows of the input while the step before is multiplied.
//
// Tile: 128 or 256 output channels (64 where there are no more) x four panels of 32 channels (two where there are no more), whatever
// takes the least time; a step of the depth is 32 pixels. Up to 128 rows two blocks run on a multiprocessor: one waits and loads registers
// while the other multiplies.
//
// Within eight pixels the depth is taken as 0, 2, 4, 6, 1, 3, 5, 7, and within 16 output channels rows group and group + 8 are neighbours:
// so a thread's registers are four pairs of words in a bank each, and nobody waits for a bank.
//
// Bound by shared memory, which a step of 128 x 128 keeps busy for 896 cycles, for 512 of the matrix unit, and one of 256 x 128 for 1408,
// for 1024; and nearly so by the second-level cache, of which they read 32 and 48 KB.
#include "cuda/sm90a/backward_weight_wgmma.cuh"

namespace cnn_ext::cuda {
namespace {

constexpr int kPanelChannels = 32, kStepPixels = 32;
constexpr int kTransposedRowBytes = kStepPixels * 4;
constexpr int kInstructions = kStepPixels / 8;  // of a step

// kRows: 64, and the warpgroups share the columns; or more, and they share the rows.
template <class T, int kRows, int kPanels>
class TransposingGemm {
 public:
  using Tile = WeightTile<T, kRows, kPanels, kPanelChannels, kStepPixels>;
  static constexpr int kBlocks = kRows <= 128 ? 2 : 1;
  static constexpr int kTransposedBytes = Tile::kCols * kTransposedRowBytes;
  static constexpr int kOwnBytes = 2 * kTransposedBytes;

  __device__ TransposingGemm(const WeightProblem<T>& problem, const WeightBlock& block) : p_(problem), b_(block) {}

  // One stage is transposed while the step before is multiplied, the others are on their way.
  __device__ void accumulate(unsigned char* shared, uint64_t* barriers) {
    const int steps = ceil_div(b_.end - b_.begin, kStepPixels);
    const auto stage_at = [&](int stage) { return shared + kOwnBytes + stage * Tile::kStageBytes; };
    const StepFetcher<Tile> fetcher(p_, b_);
    const auto fetch = [&](int stage, int step) { fetcher.fetch(p_, stage_at(stage), barriers + stage, b_.begin + step * kStepPixels); };
    for (int step = 0; step < smaller(p_.stages, steps); ++step) fetch(step, step);
    pin_sums();
    Ring ring(p_.stages);
    for (int step = 0; step < steps; ++step) {
      unsigned char* stage = stage_at(ring.stage());
      unsigned char* cols = shared + step % 2 * kTransposedBytes;
      wait_barrier(barriers + ring.stage(), ring.parity());
      transpose_panels(stage + Tile::kRowTileBytes, cols);
      wgmma_wait<0>();
      load_rows(stage);
      fence_async_proxy();
      __syncthreads();  // the columns are there; the stage is free, and so are the columns of the step before
      multiply(cols);
      if (step + p_.stages < steps) fetch(ring.stage(), step + p_.stages);
      ring.advance();
    }
    wgmma_wait<0>();
    pin_sums();
    __syncthreads();
  }

  __device__ bool write(float* sums) const {
    const int lane = threadIdx.x % 32;
    float* corner = sums + (first_row() + lane / 4 * 2) * Tile::kSumPitch + first_col() + lane % 4 * 2;
    bool meets_nan = false;
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
      meets_nan |= write_sums<Tile, 1>(sums_[tile], corner + tile * kWarpgroupRows * Tile::kSumPitch);
    }
    return meets_nan;
  }

 private:
  static constexpr bool kSharesRows = kRows == kWarpgroupRows;
  static constexpr int kRowTiles = kSharesRows ? 1 : kRows / (2 * kWarpgroupRows);  // of a warpgroup
  static constexpr int kWarpgroupCols = kSharesRows ? Tile::kCols / 2 : Tile::kCols;
  static constexpr int kSums = kWarpgroupCols / 2;

  __device__ static int warpgroup() { return threadIdx.x / kWarpgroupThreads; }
  __device__ static int first_col() { return kSharesRows ? warpgroup() * kWarpgroupCols : 0; }
  // Of this warp in the first row tile.
  __device__ static int first_row() {
    return (kSharesRows ? 0 : warpgroup() * kRowTiles * kWarpgroupRows) + threadIdx.x % kWarpgroupThreads / 32 * 16;
  }

  __device__ void pin_sums() {
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) pin(sums_[tile]);
  }

  // The panels [pixel][channel] -> columns [channel][pixel in the order of the depth], both swizzled. A thread takes four channels of the
  // four even or odd pixels of eight; the eight threads that access memory at once meet eight different chunks of both tiles.
  __device__ static void transpose_panels(const unsigned char* panels, unsigned char* cols) {
    const int panel = threadIdx.x / 64;
    if (panel >= kPanels) return;
    const int quad = threadIdx.x % 8, pixels = quad / 2 ^ threadIdx.x / 8 % 8, odd = pixels % 2;
    const unsigned char* source = panels + panel * Tile::kPanelBytes + (pixels / 2 * 8 + odd) * Tile::kPanelRowBytes;
    float4 read[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      read[i] = *reinterpret_cast<const float4*>(source + i * 2 * Tile::kPanelRowBytes + (quad ^ odd ^ i * 2) * kChunkBytes);
    }
    unsigned char* target = cols + (panel * kPanelChannels + quad * 4) * kTransposedRowBytes;
    const auto write = [&](int channel, float x, float y, float z, float w) {
      const int chunk = pixels ^ quad % 2 * 4 ^ channel;
      *reinterpret_cast<float4*>(target + channel * kTransposedRowBytes + chunk * kChunkBytes) = make_float4(x, y, z, w);
    };
    write(0, read[0].x, read[1].x, read[2].x, read[3].x);
    write(1, read[0].y, read[1].y, read[2].y, read[3].y);
    write(2, read[0].z, read[1].z, read[2].z, read[3].z);
    write(3, read[0].w, read[1].w, read[2].w, read[3].w);
  }

  // This thread's registers of all instructions of a step, from the boxes of grad_output.
  __device__ void load_rows(const unsigned char* boxes) {
    const int lane = threadIdx.x % 32, group = lane / 4, pixel = lane % 4 * 2;
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
      const int row = first_row() + tile * kWarpgroupRows;
      const unsigned char* box = boxes + row / Tile::kRowBox * Tile::kRowBoxBytes;
      const int chunk = row % Tile::kRowBox / 4 + group / 2;
#pragma unroll
      for (int i = 0; i < kInstructions; ++i) {
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const unsigned char* source = box + (i * 8 + pixel + odd) * 128 + (chunk ^ pixel ^ odd) * kChunkBytes + group % 2 * 8;
          const uint2 pair = *reinterpret_cast<const uint2*>(source);
          rows_[tile][i][odd * 2] = pair.x, rows_[tile][i][odd * 2 + 1] = pair.y;
        }
      }
    }
  }

  __device__ void multiply(const unsigned char* cols) {
    const uint64_t b = matrix_descriptor<kTransposedRowBytes>(cols + first_col() * kTransposedRowBytes, 16);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kInstructions; ++i) {
#pragma unroll
      for (int tile = 0; tile < kRowTiles; ++tile) {
        wgmma(sums_[tile], rows_[tile][i], b + descriptor_offset(i * kInstructionBytes));
      }
    }
    wgmma_commit();
  }

  const WeightProblem<T>& p_;
  const WeightBlock b_;
  float sums_[kRowTiles][kSums] = {};
  uint32_t rows_[kRowTiles][kInstructions][4];
};

template <int kRows, int kPanels>
constexpr WeightCandidate candidate(int64_t step_cycles) {
  using Gemm = TransposingGemm<float, kRows, kPanels>;
  return {tile_sizes<Gemm>(step_cycles), run_weight_tile<Gemm>};
}

constexpr WeightCandidate kCandidates[] = {candidate<64, 2>(448), candidate<64, 4>(704), candidate<128, 2>(576), candidate<128, 4>(896),
                                           candidate<256, 4>(1408)};

bool accepts(const Conv2dShape& s) { return s.dtype == DType::float32 && suits_weight_wgmma(s); }

Plan plan(const Conv2dShape& s) { return choose_tile(s, kCandidates).division.plan(); }

void run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, cudaStream_t stream) {
  const WeightChoice choice = choose_tile(s, kCandidates);
  choice.candidate.run(s, b, choice.division, workspace, stream);
}

}  // namespace

extern const Conv2dKernel conv2d_backward_weight_wgmma_tf32_sm90a = {"conv2d_backward_weight_wgmma_tf32_sm90a",
                                                                     90,
                                                                     Conv2dDirection::backward_weight,
                                                                     accepts,
                                                                     plan,
                                                                     run,
                                                                     /*needs_proof=*/true,
                                                                     /*adds_bias=*/false,
                                                                     /*arch_specific=*/true};

}  // namespace cnn_ext::cuda
