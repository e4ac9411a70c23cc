// backward_weight of bfloat16 with the processor's matrix unit (AMX), in both layouts: for every tap a product of tiles, input (16 channels
// x 32 positions) times grad_output (32 positions x 16 channels, kept as pairs of positions), 2 x 2 of them at a time. Input lies in planes
// (conv2d_amx_weight_stage.inl), so that a tap is a shift along them; nothing is unfolded.
//
// A chunk of some images or some rows of one is staged by all threads, then multiplied by all of them, a block of 32 x 32 channels each.
// Sums stay in the tiles over a chunk and in float32 from chunk to chunk: their order follows from the shape. Where one chunk holds all, a
// block is written to grad_weight as soon as it is summed.
//
// Positions that are no outputs have zeros for gradients, padding has zeros for input: both operands have to be finite, which staging sees.
// Subnormal numbers count as zeros (conv2d_amx.cpp). Not for few channels, which leave most of a tile empty, nor maps of a few positions.
#include "cpu/kernel.h"
#include "cpu/kernels/amx/conv2d_amx_weight_stage.inl"
#include "cpu/kernels/amx/tile_state.inl"
#include "cpu/kernels/conv2d_backward_weight_write.inl"
#include "cpu/parallel.h"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

constexpr int64_t kChunkPositions = 2048;
constexpr int64_t kChunkBytes = 3 << 19;  // beside as much as the weight takes, and a quarter of the larger activation at most
constexpr int64_t kFewestInputs = 8, kFewestOutputs = 8, kFewestPositions = 16;
constexpr int64_t kManyBlocks = 16;  // with fewer, a task is a tap row of a block
constexpr int64_t kBlockSums = kUnit * kUnit;

// The operands of one product, in elements; a chunk's images are summed one after the other.
struct Operands {
  const BFloat16 *input, *grad_output;
  int64_t images, steps;
  int64_t channel_pitch, input_image;  // of input
  int64_t grad_output_half, grad_output_image;
};

// sums[32 input channels][32 output channels] (+)= input x grad_output; of the second 16 on either side, where there are some.
template <bool kTwoInputs, bool kTwoOutputs>
void multiply(const Operands& o, bool add, float* sums) {
  constexpr int64_t row = kUnit * sizeof(float);
  float* const second = sums + kTileSide * kUnit;
  if (add) {
    _tile_loadd(0, sums, row);
    if constexpr (kTwoOutputs) _tile_loadd(1, sums + kTileSide, row);
    if constexpr (kTwoInputs) _tile_loadd(2, second, row);
    if constexpr (kTwoInputs && kTwoOutputs) _tile_loadd(3, second + kTileSide, row);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const int64_t pitch = o.channel_pitch * static_cast<int64_t>(sizeof(BFloat16));
  for (int64_t image = 0; image < o.images; ++image) {
    const BFloat16 *input = o.input + image * o.input_image, *grad_output = o.grad_output + image * o.grad_output_image;
    for (int64_t i = 0; i < o.steps; ++i, input += kStepPositions, grad_output += kTileElements) {
      _tile_loadd(6, grad_output, 64);
      _tile_loadd(4, input, pitch);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (kTwoOutputs) {
        _tile_loadd(7, grad_output + o.grad_output_half, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (kTwoInputs) {
        _tile_loadd(5, input + kTileSide * o.channel_pitch, pitch);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (kTwoOutputs) _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, sums, row);
  if constexpr (kTwoOutputs) _tile_stored(1, sums + kTileSide, row);
  if constexpr (kTwoInputs) _tile_stored(2, second, row);
  if constexpr (kTwoInputs && kTwoOutputs) _tile_stored(3, second + kTileSide, row);
}

// A 1x1 kernel in channels_last makes no difference between rows and images.
Conv2dShape flattened(Conv2dShape s) {
  const bool is_pointwise = s.kernel_h * s.kernel_w == 1 && s.stride_h * s.stride_w == 1 && s.in_h == s.out_h && s.in_w == s.out_w &&
                            s.pad_top == 0 && s.pad_left == 0;
  if (!is_pointwise || s.layout != Layout::nhwc) return s;
  s.in_h = s.out_h = s.batch * s.in_h, s.batch = 1;
  return s;
}

class TileWeightRun {
 public:
  TileWeightRun(const Conv2dShape& shape, const Conv2dBuffers& buffers, void* workspace, int threads)
      : s_(flattened(shape)), b_(buffers), grid_(s_), memory_(static_cast<char*>(workspace)), threads_(threads) {
    group_in_ = s_.in_channels / s_.groups, group_out_ = s_.out_channels / s_.groups;
    in_blocks_ = ceil_div(group_in_, kUnit), out_blocks_ = ceil_div(group_out_, kUnit);
    cut();
  }

  Plan plan() const { return {kUnit, kStepPositions, blocks() * (tasks_are_blocks() ? 1 : s_.kernel_h), places().end}; }

  Outcome run() const {
    const int64_t tasks = blocks() * (tasks_are_blocks() ? 1 : s_.kernel_h);
    for (int64_t chunk = 0; chunk < chunks(); ++chunk) {
      if (!stage(chunk)) return Outcome::not_finite;
      parallel_for(threads_, tasks, [&](int worker, int64_t task) {
        const TileState state;
        if (!tasks_are_blocks()) return multiply_taps(chunk, task / s_.kernel_h, task % s_.kernel_h, 1, sums(worker, task / s_.kernel_h));
        float* const block_sums = sums(worker, task);
        multiply_taps(chunk, task, 0, s_.kernel_h, block_sums);
        if (chunk + 1 == chunks()) write(task, block_sums);
      });
    }
    if (chunks() == 0 || !tasks_are_blocks()) {
      parallel_for(threads_, blocks(), [&](int worker, int64_t block) {
        float* const block_sums = sums(worker, block);
        if (chunks() == 0) __builtin_memset(block_sums, 0, static_cast<size_t>(block_elements()) * sizeof(float));
        write(block, block_sums);
      });
    }
    return Outcome::done;
  }

 private:
  // Images and rows of a chunk.
  void cut() {
    rows_ = s_.out_h, images_ = 1;
    constexpr int64_t kSize = sizeof(BFloat16);
    const int64_t weights = s_.groups * group_in_ * group_out_ * taps() * kSize;
    const int64_t activation = s_.batch * larger(s_.in_channels * s_.in_h * s_.in_w, s_.out_channels * s_.out_h * s_.out_w) * kSize;
    const int64_t most = kChunkBytes + smaller(weights, activation / 4);
    const auto fits = [&] { return images_ * grid_.steps(rows_) * kStepPositions <= kChunkPositions && staged_bytes() <= most; };
    while (rows_ > 1 && !fits()) rows_ = ceil_div(rows_, 2);
    if (rows_ < s_.out_h) return;
    images_ = larger(1, s_.batch);
    while (images_ > 1 && !fits()) images_ = ceil_div(images_, 2);
  }

  int64_t taps() const { return s_.kernel_h * s_.kernel_w; }
  int64_t blocks() const { return s_.groups * in_blocks_ * out_blocks_; }
  int64_t block_elements() const { return taps() * kBlockSums; }
  bool tasks_are_blocks() const { return blocks() >= kManyBlocks; }
  int64_t row_chunks() const { return ceil_div(s_.out_h, rows_); }
  int64_t chunks() const { return ceil_div(s_.batch, images_) * row_chunks(); }

  // In the workspace, in bytes: input and grad_output of a chunk, then the sums of all blocks, or of one for each worker, and what a worker
  // needs for staging.
  int64_t input_elements() const { return s_.groups * in_blocks_ * kUnit * grid_.channel_pitch(rows_); }  // of an image
  int64_t grad_output_elements() const { return s_.groups * out_blocks_ * 2 * grid_.steps(rows_) * kTileElements; }
  int64_t staged_bytes() const { return images_ * (input_elements() + grad_output_elements()) * static_cast<int64_t>(sizeof(BFloat16)); }
  bool keeps_sums() const { return chunks() > 1 || !tasks_are_blocks(); }
  struct Places {
    size_t grad_output, sums, lines, end;
  };
  int64_t line_elements() const { return kTileSide * (grid_.steps(rows_) * kStepPositions + 32 + grid_.pitch); }
  Places places() const {
    Places p{};
    p.grad_output = static_cast<size_t>(images_ * input_elements()) * sizeof(BFloat16);
    p.sums = static_cast<size_t>(staged_bytes());
    p.lines = p.sums + static_cast<size_t>((keeps_sums() ? blocks() : threads_) * block_elements()) * sizeof(float);
    p.end = p.lines + static_cast<size_t>(threads_ * line_elements()) * sizeof(BFloat16);
    return p;
  }
  BFloat16* staged_input() const { return reinterpret_cast<BFloat16*>(memory_); }
  BFloat16* staged_grad_output() const { return reinterpret_cast<BFloat16*>(memory_ + places().grad_output); }
  BFloat16* line(int worker) const { return reinterpret_cast<BFloat16*>(memory_ + places().lines) + worker * line_elements(); }
  float* sums(int worker, int64_t block) const {
    return reinterpret_cast<float*>(memory_ + places().sums) + (keeps_sums() ? block : worker) * block_elements();
  }

  struct Chunk {
    int64_t image, images;
    ChunkRows rows;
  };
  Chunk chunk_of(int64_t chunk) const {
    const int64_t image = chunk / row_chunks() * images_, y = chunk % row_chunks() * rows_;
    return {image, smaller(images_, s_.batch - image), {y, smaller(rows_, s_.out_h - y), rows_}};
  }

  // Whether all of it is finite.
  bool stage(int64_t chunk) const {
    const Chunk c = chunk_of(chunk);
    const int64_t in_blocks = s_.groups * in_blocks_, out_blocks = s_.groups * out_blocks_, of_image = in_blocks + out_blocks;
    int finite = 1;
    parallel_for(threads_, c.images * of_image, [&](int worker, int64_t task) {
      const int64_t image = task / of_image, block = task % of_image;
      Watch watch;
      if (block < in_blocks) {
        stage_input_block(c, image, block, watch);
      } else {
        stage_grad_output_block(c, image, block - in_blocks, line(worker), watch);
      }
      if (watch.seen != 0) __atomic_store_n(&finite, 0, __ATOMIC_RELAXED);
    });
    return finite != 0;
  }

  void stage_input_block(const Chunk& c, int64_t image, int64_t block, Watch& watch) const {
    const int64_t first = block % in_blocks_ * kUnit, channel = block / in_blocks_ * group_in_ + first;
    const int64_t plane = s_.in_h * s_.in_w;
    const BFloat16* from = static_cast<const BFloat16*>(b_.input) + (c.image + image) * s_.in_channels * plane;
    stage_input(s_, grid_, from + channel * (s_.layout == Layout::nchw ? plane : 1), smaller(kUnit, group_in_ - first), c.rows,
                staged_input() + image * input_elements() + block * kUnit * grid_.channel_pitch(rows_), watch);
  }

  void stage_grad_output_block(const Chunk& c, int64_t image, int64_t block, BFloat16* line, Watch& watch) const {
    const int64_t first = block % out_blocks_ * kUnit, channel = block / out_blocks_ * group_out_ + first;
    const int64_t plane = s_.out_h * s_.out_w;
    const BFloat16* from = static_cast<const BFloat16*>(b_.grad_output) + (c.image + image) * s_.out_channels * plane;
    stage_grad_output(s_, grid_, from + channel * (s_.layout == Layout::nchw ? plane : 1), smaller(kUnit, group_out_ - first), c.rows, line,
                      staged_grad_output() + image * grad_output_elements() + block * 2 * grid_.steps(rows_) * kTileElements, watch);
  }

  // A block's place: neighbours share their output channels.
  struct Place {
    int64_t group, in_block, out_block;
  };
  Place place_of(int64_t block) const { return {block / (in_blocks_ * out_blocks_), block % in_blocks_, block / in_blocks_ % out_blocks_}; }

  // Adds a chunk to the sums of a block, [tap][input channel][output channel], for some rows of taps.
  void multiply_taps(int64_t chunk, int64_t block, int64_t first_row, int64_t rows, float* block_sums) const {
    const Chunk c = chunk_of(chunk);
    const Place p = place_of(block);
    const int64_t channel_pitch = grid_.channel_pitch(rows_);
    const BFloat16* input = staged_input() + (p.group * in_blocks_ + p.in_block) * kUnit * channel_pitch;
    Operands o{};
    o.grad_output = staged_grad_output() + (p.group * out_blocks_ + p.out_block) * 2 * grid_.steps(rows_) * kTileElements;
    o.images = c.images, o.steps = grid_.steps(c.rows.rows);
    o.channel_pitch = channel_pitch, o.input_image = input_elements();
    o.grad_output_half = grid_.steps(rows_) * kTileElements, o.grad_output_image = grad_output_elements();
    const bool two_inputs = group_in_ - p.in_block * kUnit > kTileSide, two_outputs = group_out_ - p.out_block * kUnit > kTileSide;
    const auto product = two_inputs ? (two_outputs ? multiply<true, true> : multiply<true, false>)
                                    : (two_outputs ? multiply<false, true> : multiply<false, false>);
    for (int64_t r = first_row; r < first_row + rows; ++r) {
      for (int64_t t = 0; t < s_.kernel_w; ++t) {
        o.input = input + grid_.tap_offset(r, t, rows_);
        product(o, chunk > 0, block_sums + (r * s_.kernel_w + t) * kBlockSums);
      }
    }
  }

  void write(int64_t block, const float* block_sums) const {
    const Place p = place_of(block);
    const int64_t first = p.out_block * kUnit, outputs = smaller(kUnit, group_out_ - first), in_first = p.in_block * kUnit;
    const int64_t out_channel = group_in_ * taps();
    BFloat16* grad_weight = static_cast<BFloat16*>(b_.grad_weight) + (p.group * group_out_ + first) * out_channel +
                            in_first * (s_.weight_layout == Layout::nchw ? taps() : 1);
    constexpr int64_t lanes = kLanes<float>;
    for (int64_t k = 0; k < outputs; k += lanes) {
      const SumsBlock<float, BFloat16> sums{block_sums + k,
                                            kBlockSums,
                                            kUnit,
                                            /*parts=*/1,
                                            /*part=*/0,
                                            taps(),
                                            smaller(kUnit, group_in_ - in_first),
                                            grad_weight + k * out_channel,
                                            out_channel,
                                            static_cast<int>(smaller(lanes, outputs - k))};
      write_sums(sums, s_.weight_layout, group_in_);
    }
  }

  const Conv2dShape s_;
  const Conv2dBuffers b_;
  const Grid grid_;
  char* const memory_;
  const int threads_;
  int64_t group_in_, group_out_, in_blocks_, out_blocks_;
  int64_t images_, rows_;  // of a chunk
};

Plan plan(const Conv2dShape& s, int threads) { return TileWeightRun(s, {}, nullptr, threads).plan(); }

Outcome run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, int threads) {
  return TileWeightRun(s, b, workspace, threads).run();
}

bool accepts(const Conv2dShape& s) {
  return s.dtype == DType::bfloat16 && s.in_channels / s.groups >= kFewestInputs && s.out_channels / s.groups >= kFewestOutputs &&
         s.out_h * s.out_w >= kFewestPositions && s.stride_h <= kMostStride && s.stride_w <= kMostStride;
}

}  // namespace

extern const Conv2dKernel conv2d_backward_weight_amx = {
    CNN_EXT_KERNEL_NAME("conv2d_backward_weight_amx"), Isa::CNN_EXT_ISA, Conv2dDirection::backward_weight, accepts, plan, run};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
