// backward_weight with strides of 1 and three taps to a row of the filters on the matrix unit of sm_90a, in float16 and bfloat16
// (backward_weight_wgmma.cuh): three taps beside each other read the input once, instead of once each.
//
// A step of the depth is a rectangle of an image, whole lines of it or a part of one. The copy engine fetches the lines of the input that a
// row of taps reads, with what lies left and right of them, and those of grad_output at the same pitch, filled up with zeros: so the pixels
// are one sequence of positions, and tap s multiplies the input s * dilation positions further on. To the matrix unit the taps are panels
// of columns that lie a position apart. Positions that are no pixels are multiplied by zeros.
//
// Tile: 128 output channels x three taps of 64 channels; or 64 where there are no more: then the warpgroups share the steps, and add up
// their sums, and two blocks share a multiprocessor.
//
// Not handled: strides; filters of other than three columns; 32 channels and fewer; what windows are expected to serve faster. Bound by the
// matrix unit, an eighth of whose work are positions without a pixel.
#include "cuda/sm90a/backward_weight_wgmma.cuh"

namespace cnn_ext::cuda {
namespace {

constexpr int kTaps = 3, kPanelChannels = 64, kPositionBytes = 128;  // of a box: 64 channels
constexpr int kInstructionPositions = 16;
constexpr int kFewestStages = 3, kCycleProducts = 2048;  // kCycleProducts: of a multiprocessor
// Positions that the warpgroups take in a turn.
template <int kRows>
constexpr int kTurn = kRows == kWarpgroupRows ? 2 * kInstructionPositions : kInstructionPositions;

template <class T, int kRows>
class PatchGemm {
 public:
  using Tile = WeightTile<T, kRows, kTaps, kPanelChannels, kInstructionPositions>;
  static constexpr int kBlocks = kRows == kWarpgroupRows ? 2 : 1;
  // Behind the last stage. Nothing reads it, but compute-sanitizer takes the panels of a product for one behind the other.
  static constexpr int kOwnBytes = (kTaps - 1) * kInstructionPositions * kPositionBytes;

  __device__ PatchGemm(const WeightProblem<T>& problem, const WeightBlock& block)
      : p_(problem), b_(block), panel_(panel_at(problem, block.first_panel, kPanelChannels)) {}

  __device__ void accumulate(unsigned char* shared, uint64_t* barriers) {
    clear_ends(shared);
    pin_sums();
    pipeline(
        barriers, p_.stages, b_.end - b_.begin,
        [&](int stage, int step) { fetch(shared + stage * p_.rectangle.stage_bytes, barriers + stage, b_.begin + step); },
        [&](int stage, int) { multiply(shared + stage * p_.rectangle.stage_bytes); });
    pin_sums();
  }

  __device__ bool write(float* sums) {
    const int warp = threadIdx.x % kWarpgroupThreads / 32, lane = threadIdx.x % 32;
    float* corner = sums + (first_box() * kWarpgroupRows + warp * 16 + lane / 4) * Tile::kSumPitch + lane % 4 * 2;
    if constexpr (kSharesDepth) {
      if (warpgroup() == 1) write_sums<Tile, 8>(sums_[0], corner);
      __syncthreads();
      if (warpgroup() == 1) return false;
      add_sums<Tile, 8>(sums_[0], corner);
    }
    bool meets_nan = false;
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
      meets_nan |= write_sums<Tile, 8>(sums_[tile], corner + tile * kWarpgroupRows * Tile::kSumPitch);
    }
    return meets_nan;
  }

 private:
  static constexpr bool kSharesDepth = kRows == kWarpgroupRows;
  static constexpr int kRowTiles = kSharesDepth ? 1 : kRows / (2 * kWarpgroupRows);  // of a warpgroup

  __device__ static int warpgroup() { return threadIdx.x / kWarpgroupThreads; }
  __device__ static int first_box() { return kSharesDepth ? 0 : warpgroup() * kRowTiles; }
  __device__ static int first_position() { return kSharesDepth ? warpgroup() * kInstructionPositions : 0; }
  __device__ int row_box_bytes() const { return p_.rectangle.positions * kPositionBytes; }
  __device__ int fetched_bytes() const { return p_.rectangle.lines * p_.rectangle.pitch * kPositionBytes; }

  __device__ void pin_sums() {
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) pin(sums_[tile]);
  }

  // What is multiplied behind the positions that are fetched.
  __device__ void clear_ends(unsigned char* shared) const {
    constexpr int kBoxes = Tile::kRowBoxes + 1;
    for (int i = threadIdx.x / 32; i < p_.stages * kBoxes; i += kBlockThreads / 32) {
      unsigned char* stage = shared + i / kBoxes * p_.rectangle.stage_bytes;
      unsigned char* box = stage + i % kBoxes * row_box_bytes();
      const int box_bytes = i % kBoxes < Tile::kRowBoxes ? row_box_bytes() : static_cast<int>(stage + p_.rectangle.stage_bytes - box);
      for (int byte = fetched_bytes() + threadIdx.x % 32 * kChunkBytes; byte < box_bytes; byte += 32 * kChunkBytes) {
        *reinterpret_cast<uint4*>(box + byte) = make_uint4(0, 0, 0, 0);
      }
    }
    fence_async_proxy();
  }

  // A thread of each warp asks for a box.
  __device__ void fetch(unsigned char* stage, uint64_t* barrier, int rectangle) const {
    if (threadIdx.x == 0) announce(barrier, (Tile::kRowBoxes + 1) * fetched_bytes());
    const int box = threadIdx.x / 32;
    if (threadIdx.x % 32 > 0 || box > Tile::kRowBoxes) return;
    const PlaneIndex at = p_.pixel_decoder.at(rectangle);
    const int line = at.h * p_.rectangle.lines;
    unsigned char* target = stage + box * row_box_bytes();
    if (box < Tile::kRowBoxes) {
      fetch_box(target, p_.grad_output_map, b_.first_row + box * kWarpgroupRows, 0, line * p_.rectangle.columns + at.w, at.outer, barrier);
    } else {
      fetch_box(target, p_.input_map, b_.group_channel + panel_.first_channel, at.w * p_.rectangle.width - p_.g.pad_left,
                line - p_.g.pad_top + panel_.r * p_.g.dilation_h, at.outer, barrier);
    }
  }

  __device__ void multiply(const unsigned char* stage) {
    const uint64_t a = matrix_descriptor<kPositionBytes>(stage + first_box() * row_box_bytes(), row_box_bytes());
    const uint64_t b = matrix_descriptor<kPositionBytes>(stage + Tile::kRowBoxes * row_box_bytes(), p_.g.dilation_w * kPositionBytes);
    const auto multiply_turn = [&](int position) {
      const uint64_t offset = descriptor_offset((position + first_position()) * kPositionBytes);
      wgmma_fence();
#pragma unroll
      for (int tile = 0; tile < kRowTiles; ++tile) {
        wgmma<true, true>(sums_[tile], a + descriptor_offset(tile * row_box_bytes()) + offset, b + offset, T{});
      }
    };
    // The last one by itself, with which the group ends: what the next step need not wait for.
    const int last = p_.rectangle.positions - kTurn<kRows>;
#pragma unroll 1
    for (int position = 0; position < last; position += kTurn<kRows>) multiply_turn(position);
    multiply_turn(last);
    wgmma_commit();
  }

  const WeightProblem<T>& p_;
  const WeightBlock b_;
  const Panel panel_;
  float sums_[kRowTiles][Tile::kCols / 2] = {};
};

// How the images are divided for a tile of some rows. steps: rectangles of an image.
struct RectangleChoice {
  WeightRectangle rectangle;
  int64_t steps, taken;  // taken: positions of an image, and what a step costs besides
};

int64_t reach_of(const Conv2dShape& s) { return (kTaps - 1) * s.dilation_w; }

// Whole lines, or equal parts of one, whatever takes the fewest positions; a step costs as much as some.
template <class Gemm>
RectangleChoice choose_rectangle(const Conv2dShape& s) {
  constexpr int kRows = Gemm::Tile::kRows;
  constexpr int64_t kStepPositions = 8, kLeastWidth = 8, kMostBoxExtent = 256;
  RectangleChoice best{{}, 0, INT64_MAX};
  for (int64_t columns = 1; columns == 1 || s.out_w / columns >= kLeastWidth; ++columns) {
    const int64_t width = s.out_w / columns, pitch = width + reach_of(s);
    if (s.out_w % columns != 0 || pitch > kMostBoxExtent) continue;
    for (int64_t lines = 1; lines <= (columns > 1 ? 1 : std::min(s.out_h, kMostBoxExtent)); ++lines) {
      const int64_t positions = ceil_div<int64_t>(lines * pitch, kTurn<kRows>) * kTurn<kRows>;
      const int64_t read = ceil_div<int64_t>(positions + reach_of(s), kAtomRows) * kAtomRows;
      const int64_t stage_bytes = (kRows / kWarpgroupRows * positions + read) * kPositionBytes;
      if (pipeline_stages(static_cast<int>(stage_bytes), Gemm::kBlocks == 2, Gemm::kOwnBytes) < kFewestStages) break;
      const int64_t steps = ceil_div(s.out_h, lines) * columns, taken = steps * (positions + kStepPositions);
      if (taken >= best.taken) continue;
      best = {{static_cast<int>(lines), static_cast<int>(width), static_cast<int>(columns), static_cast<int>(pitch),
               static_cast<int>(positions), static_cast<int>(stage_bytes)},
              steps,
              taken};
    }
  }
  return best;
}

struct PatchChoice {
  RectangleChoice rectangles;
  WeightDivision division;
  void (*run)(const Conv2dShape&, const Conv2dBuffers&, const PatchChoice&, void*, cudaStream_t);
};

template <class Gemm>
void run_patch(const Conv2dShape& s, const Conv2dBuffers& b, const PatchChoice& choice, void* workspace, cudaStream_t stream) {
  using T = typename Gemm::Tile::Element;
  const WeightRectangle& rectangle = choice.rectangles.rectangle;
  auto problem = staged_weight_problem<T>(s, b, choice.division, workspace, stream);
  const int rectangles_h = static_cast<int>(choice.rectangles.steps) / rectangle.columns;
  problem.rectangle = rectangle;
  problem.pixels = static_cast<int>(s.batch * choice.rectangles.steps);
  problem.pixel_decoder = PlaneDecoder(rectangles_h, rectangle.columns);
  // Lines are as long as rectangles: what lies beyond them is zeros.
  const TensorAxes out_axes{{s.out_channels, rectangle.width, s.out_h * rectangle.columns, s.batch},
                            {problem.out.w, problem.out.w * rectangle.width, problem.out.n}};
  problem.grad_output_map = tile_map<T>(problem.grad_output, out_axes, {kPanelChannels, rectangle.pitch, rectangle.lines, 1});
  const TensorAxes in_axes{{s.in_channels, s.in_w, s.in_h, s.batch}, {problem.in.w, problem.in.h, problem.in.n}};
  problem.input_map = tile_map<T>(problem.input, in_axes, {kPanelChannels, rectangle.pitch, rectangle.lines, 1});
  launch_weight_tile<Gemm>(problem, choice.division, stream);
}

// Adds a tile to the choice where it is expected to take less time.
template <class T, int kRows>
void consider(const Conv2dShape& s, std::optional<PatchChoice>& best) {
  using Gemm = PatchGemm<T, kRows>;
  if (!suits_extent(kRows, s.out_channels / s.groups)) return;
  const RectangleChoice rectangles = choose_rectangle<Gemm>(s);
  if (rectangles.steps == 0) return;
  const WeightRectangle& rectangle = rectangles.rectangle;
  const int64_t step_cycles = kRows * rectangle.positions * Gemm::Tile::kCols / kCycleProducts;
  const WeightDivision division(s, {kRows, kTaps, kPanelChannels, 1, rectangle.stage_bytes, Gemm::kBlocks, step_cycles},
                                s.batch * rectangles.steps);
  if (!best || division.splits.cycles < best->division.splits.cycles) best = PatchChoice{rectangles, division, run_patch<Gemm>};
}

template <class T>
std::optional<PatchChoice> choose(const Conv2dShape& s) {
  std::optional<PatchChoice> best;
  consider<T, 64>(s, best);
  consider<T, 128>(s, best);
  return best;
}

bool accepts(const Conv2dShape& s) {
  if (s.dtype == DType::float32 || !suits_weight_wgmma(s) || s.stride_h != 1 || s.stride_w != 1 || s.kernel_w != kTaps ||
      s.in_channels / s.groups <= kPanelChannels / 2) {
    return false;
  }
  const auto choice = choose<__half>(s);
  return choice && choice->division.splits.cycles <= expected_window_cycles(s);
}

Plan plan(const Conv2dShape& s) { return choose<__half>(s)->division.plan(); }

void run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, cudaStream_t stream) {
  const auto choice = s.dtype == DType::float16 ? choose<__half>(s) : choose<__nv_bfloat16>(s);
  choice->run(s, b, *choice, workspace, stream);
}

}  // namespace

extern const Conv2dKernel conv2d_backward_weight_patch_wgmma_sm90a = {"conv2d_backward_weight_patch_wgmma_sm90a",
                                                                      90,
                                                                      Conv2dDirection::backward_weight,
                                                                      accepts,
                                                                      plan,
                                                                      run,
                                                                      /*needs_proof=*/true,
                                                                      /*adds_bias=*/false,
                                                                      /*arch_specific=*/true};

}  // namespace cnn_ext::cuda
