// The steps of a Winograd convolution around its transforms and products, and the two schedules of _blocking.
#pragma once

#include "cpu/kernels/conv2d_direct_run.inl"
#include "cpu/kernels/conv2d_winograd_blocking.inl"
#include "cpu/kernels/conv2d_winograd_transform.inl"

namespace {

template <class T, int kOutputs, int kTaps>
class WinogradRun {
 public:
  WinogradRun(const Gather& g, const T* source, const T* weight, const T* bias, T* dest, void* workspace, int threads)
      : g_(g),
        b_(make_winograd_blocking<T, kOutputs, kTaps>(g, threads)),
        scratch_(make_winograd_scratch<T, kOutputs, kTaps>(g, b_)),
        stager_({source, g.source}, g.h.source_size, g.w.source_size),
        weight_(weight),
        bias_(bias),
        dest_(dest),
        memory_(static_cast<char*>(workspace)),
        threads_(threads) {}

  void run() const {
    for (int64_t n = 0; n < g_.batch; ++n) suspects()[n] = 0;
    if (b_.by_units) {
      run_by_units();
    } else {
      run_by_blocks();
    }
  }

  // For every image, whether it met sums that are not finite; the first thing in the workspace.
  int32_t* suspects() const { return reinterpret_cast<int32_t*>(memory_); }

 private:
  static constexpr int kV = kLanes<T>, kAlpha = kOutputs + kTaps - 1, kPoints = kAlpha * kAlpha;
  static constexpr int kUnit = kUnitVectors * kV;
  static constexpr int kOverlap = kTaps - 1;

  T* at(int64_t offset) const { return reinterpret_cast<T*>(memory_ + offset); }
  T* own(int worker, int64_t offset) const { return at(scratch_.workers + worker * scratch_.worker_bytes + offset); }

  void run_by_blocks() const {
    parallel_for(threads_, g_.groups * b_.units * b_.channel_blocks, [&](int worker, int64_t i) {
      const int64_t channel_block = i % b_.channel_blocks, unit = i / b_.channel_blocks;
      T* const weights = at(scratch_.weights) + unit * scratch_.unit_weights + channel_block * scratch_.block_weights;
      transform_weights(worker, unit / b_.units, unit % b_.units, channel_block, weights);
    });
    const int64_t blocks = b_.blocks.count();
    parallel_for(threads_, g_.groups * blocks, [&](int worker, int64_t i) {
      const int64_t group = i / blocks;
      const TileBlock block = b_.blocks.block(i % blocks);
      T* const tiles = own(worker, scratch_.own_tiles);
      for (int64_t image = 0; image < block.images; ++image) {
        for (int64_t v = 0; v < b_.channel_vectors; ++v) transform_input(worker, group, block, image, v, tiles);
      }
      for (int64_t unit = 0; unit < b_.units; ++unit) {
        const T* weights = at(scratch_.weights) + (group * b_.units + unit) * scratch_.unit_weights;
        for (int64_t c = 0; c < b_.channel_blocks; ++c) multiply(worker, block, unit, c, weights + c * scratch_.block_weights, tiles);
        transform_output(worker, group, block, unit);
      }
    });
  }

  void run_by_units() const {
    T* const tiles = at(scratch_.tiles);
    const int64_t blocks = b_.blocks.count();
    for (int64_t i = 0; i < g_.groups * blocks; ++i) {
      const int64_t group = i / blocks;
      const TileBlock block = b_.blocks.block(i % blocks);
      parallel_for(threads_, block.images * b_.channel_vectors, [&](int worker, int64_t j) {
        transform_input(worker, group, block, j / b_.channel_vectors, j % b_.channel_vectors, tiles);
      });
      parallel_for(threads_, b_.units, [&](int worker, int64_t unit) {
        T* const weights = own(worker, scratch_.own_weights);
        for (int64_t c = 0; c < b_.channel_blocks; ++c) {
          transform_weights(worker, group, unit, c, weights);
          multiply(worker, block, unit, c, weights, tiles);
        }
        transform_output(worker, group, block, unit);
      });
    }
  }

  int64_t channels_of(int64_t channel_block) const { return smaller(b_.channels, g_.channels - channel_block * b_.channels); }
  int64_t width_of(int64_t unit) const { return unit_width(g_.outputs, unit, kV); }

  // The weights of a unit and a block of channels as [point][channel][unit width].
  void transform_weights(int worker, int64_t group, int64_t unit, int64_t channel_block, T* dst) const {
    const int64_t channels = channels_of(channel_block), width = width_of(unit), col_pitch = width, row_pitch = channels * kTaps * width;
    const T* src = weight_ + group * g_.weight_group + unit * kUnit * g_.weight_output + channel_block * b_.channels * g_.weight_channel;
    T* const packed = own(worker, scratch_.own_packed);
    Packer<T>().pack(g_, src, smaller(width, g_.outputs - unit * kUnit), width, channels, packed);
    // backward_input reads its taps backwards.
    const bool rotated = g_.h.tap_step < 0;
    const T* const first = packed + (rotated ? (kTaps - 1) * (row_pitch + col_pitch) : 0);
    const int64_t sign = rotated ? -1 : 1;
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t lane = 0; lane < width; lane += kV) {
        transform_filter<T, kAlpha, kTaps>(first + c * kTaps * width + lane, sign * row_pitch, sign * col_pitch, dst + c * width + lane,
                                           scratch_.point_weights);
      }
    }
  }

  // Stages one vector of channels of an image, and transforms it.
  void transform_input(int worker, int64_t group, const TileBlock& block, int64_t image, int64_t vector, T* tiles) const {
    T* const staged = own(worker, scratch_.own_staged);
    TileWindow window{};
    window.n = block.n + image, window.channel = group * g_.channels + vector * kV;
    window.lanes = static_cast<int>(smaller(kV, g_.channels - vector * kV));
    window.y = block.row * kOutputs + first_source(g_.h), window.rows = block.rows * kOutputs + kOverlap;
    window.x = block.col * kOutputs + first_source(g_.w), window.cols = block.cols * kOutputs + kOverlap;
    const int64_t pitch = window.cols * kV;
    stager_.stage(window, pitch, staged);
    T* dst = tiles + (vector * block.tiles() + image * block.rows * block.cols) * kV;
    for (int64_t row = 0; row < block.rows; ++row) {
      for (int64_t col = 0; col < block.cols; ++col, dst += kV) {
        transform_input_tile<T, kAlpha>(staged + row * kOutputs * pitch + col * kOutputs * kV, pitch, dst, scratch_.point_tiles);
      }
    }
  }

  // The source position of the first tap of grid point 0.
  static int64_t first_source(const Axis& a) { return a.source_first + (a.tap_step < 0 ? (a.taps - 1) * a.tap_step : 0); }

  // Adds a block of channels up for a unit and all tiles of the block.
  void multiply(int worker, const TileBlock& block, int64_t unit, int64_t channel_block, const T* weights, const T* tiles) const {
    const int64_t count = block.tiles(), groups = ceil_div(count, kProductTiles), width = width_of(unit);
    tiles += channel_block * (b_.channels / kV) * count * kV;
    Product<T> p{};
    p.channels = channels_of(channel_block);
    p.vector_pitch = p.sums_pitch = count * kV;
    p.add = channel_block > 0;
    for (int64_t point = 0; point < kPoints; ++point) {
      p.weights = weights + point * scratch_.point_weights;
      for (int64_t i = 0; i < groups; ++i) {
        const int64_t begin = i * count / groups, end = (i + 1) * count / groups;
        p.tiles = tiles + point * scratch_.point_tiles + begin * kV;
        p.sums = own(worker, scratch_.own_sums) + point * scratch_.point_sums + begin * kV;
        if (width == kUnit) {
          multiply_tiles<T, kUnitVectors>(p, end - begin);
        } else {
          multiply_tiles<T, 1>(p, end - begin);
        }
      }
    }
  }

  void transform_output(int worker, int64_t group, const TileBlock& block, int64_t unit) const {
    for (int64_t lane = 0; lane < width_of(unit); lane += kV) {
      const T* sums = own(worker, scratch_.own_sums) + lane * block.tiles();
      for (int64_t image = 0; image < block.images; ++image) {
        Vec<T> residue{};
        for (int64_t row = 0; row < block.rows; ++row, sums += block.cols * kV) {
          write_row(worker, group, block, image, row, unit * kUnit + lane, sums, residue);
        }
        if (!is_zero(residue)) __atomic_store_n(suspects() + block.n + image, 1, __ATOMIC_RELAXED);
      }
    }
  }

  static bool is_zero(Vec<T> v) {
    bool zero = true;
    for (int i = 0; i < kV; ++i) zero &= v[i] == 0;
    return zero;
  }

  // Where a row of tiles is written: in the destination itself where the channels are innermost there, and otherwise in scratch.
  struct Target {
    T* first;
    int64_t row_pitch, col_pitch;
    int lanes;
  };

  // The outputs of one row of Winograd tiles and one vector of output channels.
  void write_row(int worker, int64_t group, const TileBlock& block, int64_t image, int64_t row, int64_t channel, const T* sums,
                 Vec<T>& residue) const {
    const int64_t y = (block.row + row) * kOutputs, x = block.col * kOutputs;
    const int64_t height = smaller(kOutputs, g_.h.count - y), width = smaller(block.cols * kOutputs, g_.w.count - x);
    const int lanes = static_cast<int>(smaller(kV, g_.outputs - channel));
    const int64_t first_channel = group * g_.outputs + channel;
    T* const dest = dest_ + (block.n + image) * g_.dest.n + first_channel * g_.dest.c + y * g_.dest.h + x * g_.dest.w;
    const bool staged = g_.dest.c != 1;
    const Target target =
        staged ? Target{own(worker, scratch_.own_outputs), width * kV, kV, kV} : Target{dest, g_.dest.h, g_.dest.w, lanes};
    const Vec<T> bias = bias_ == nullptr ? Vec<T>{} : load_first(bias_ + first_channel, lanes);
    for (int64_t col = 0; col < block.cols; ++col) {
      Vec<T> y_tile[kOutputs][kOutputs];
      transform_output_tile<T, kAlpha, kOutputs>(sums + col * kV, scratch_.point_sums, y_tile);
      residue += not_finite_residue(y_tile);
      write_tile(y_tile, bias, target, col * kOutputs, height, smaller(kOutputs, width - col * kOutputs));
    }
    if (!staged) return;
    if (width == g_.dest.h) {  // whole rows: one run
      write_matrix(target.first, kV, height * width, lanes, dest, 1, g_.dest.c);
    } else {
      for (int64_t i = 0; i < height; ++i)
        write_matrix(target.first + i * target.row_pitch, kV, width, lanes, dest + i * g_.dest.h, 1, g_.dest.c);
    }
  }

  // 0 where all outputs of a tile are finite, NaN where one is not: whatever was not finite in the inputs, the weights or on the way
  // reaches at least one output of the tile.
  static Vec<T> not_finite_residue(const Vec<T> (&y)[kOutputs][kOutputs]) {
    Vec<T> sum{};
#pragma GCC unroll 4
    for (int i = 0; i < kOutputs; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kOutputs; ++j) sum += y[i][j];
    }
    return sum - sum;
  }

  // What becomes of a tile of outputs in registers: `height` x `width` of them exist.
  static void write_tile(const Vec<T> (&y)[kOutputs][kOutputs], Vec<T> bias, const Target& target, int64_t col, int64_t height,
                         int64_t width) {
    T* const place = target.first + col * target.col_pitch;
    const int64_t row_pitch = target.row_pitch, col_pitch = target.col_pitch;
    const int lanes = target.lanes;
    if (height == kOutputs && width == kOutputs && lanes == kV) {
#pragma GCC unroll 4
      for (int i = 0; i < kOutputs; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < kOutputs; ++j) store(place + i * row_pitch + j * col_pitch, y[i][j] + bias);
      }
      return;
    }
#pragma GCC unroll 4
    for (int i = 0; i < kOutputs; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kOutputs; ++j) {
        if (i >= height || j >= width) continue;
        T* const pixel = place + i * row_pitch + j * col_pitch;
        if (lanes == kV) {
          store(pixel, y[i][j] + bias);
        } else {
          store_first(pixel, y[i][j] + bias, lanes);
        }
      }
    }
  }

  const Gather g_;
  const WinogradBlocking b_;
  const WinogradScratch scratch_;
  const TileStager<T, TensorSource<T>> stager_;
  const T* const weight_;
  const T* const bias_;
  T* const dest_;
  char* const memory_;
  const int threads_;
};

}  // namespace
