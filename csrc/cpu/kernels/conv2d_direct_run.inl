// The plan and the loops around a register tile: what both tiles (channels or pixels in the lanes) and both directions share.
//
// The reduction is cut into blocks of channels of about kReductionTerms terms, a function of the kernel's size alone: each block is summed
// from zero and then added to the bias or to the blocks before, which keeps a block's weights in the nearest cache and the error of long sums
// small. A task is one image's block of rows x columns of the grid, for all or some units of output channels; how tasks are cut changes no sum.
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/conv2d_direct_pack.inl"
#include "cpu/kernels/conv2d_direct_stage.inl"
#include "cpu/kernels/conv2d_direct_tile.inl"
#include "cpu/parallel.h"

namespace {

using cnn_ext::Conv2dBuffers;
using cnn_ext::cpu::Outcome;
using cnn_ext::cpu::Plan;

constexpr int64_t kReductionTerms = 512;
constexpr int64_t kStagedBytes = 256 << 10;  // a block's source, with the weights and sums beside it, stays in the second cache
constexpr int64_t kTaskPoints = 512;
constexpr int64_t kFewestPoints = 56;        // below this, packed weights are read too often for each of their uses
constexpr int64_t kWantedTasks = 16;
constexpr int64_t kSerialPack = 1 << 14;     // weights
constexpr int64_t kPackChannels = 64;
constexpr int64_t kAlignment = 64;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t at_least_1(int64_t x) { return x < 1 ? 1 : x; }

// How one gather convolution is cut.
struct Blocking {
  int64_t channels, channel_blocks;  // of a block of the reduction
  int64_t rows, row_blocks;          // grid rows of a task
  int64_t cols, col_blocks;
  int64_t units, unit_blocks;        // units of output channels of a task
  int64_t tasks;
};

template <class T, class Tile>
int64_t staged_bytes(const Gather& g, int64_t channels, int64_t rows, int64_t cols) {
  return channels * staged_layout<T>(g, rows, cols).channel_pitch * static_cast<int64_t>(sizeof(T));
}

template <class T, class Tile>
Blocking make_blocking(const Gather& g) {
  Blocking b{};
  b.channel_blocks = at_least_1(ceil_div(g.terms(), kReductionTerms));
  b.channels = at_least_1(ceil_div(g.channels, b.channel_blocks));
  b.channel_blocks = at_least_1(ceil_div(g.channels, b.channels));
  b.rows = g.h.count, b.cols = g.w.count;
  const auto too_large = [&] {
    return b.rows * b.cols > kTaskPoints || (g.taps() > 0 && staged_bytes<T, Tile>(g, b.channels, b.rows, b.cols) > kStagedBytes);
  };
  while (b.rows > 1 && too_large()) b.rows = ceil_div(b.rows, 2);
  while (b.cols > 4 * Tile::kMaxPoints && too_large()) b.cols = ceil_div(ceil_div(b.cols, 2), Tile::kMaxPoints) * Tile::kMaxPoints;
  b.col_blocks = ceil_div(g.w.count, b.cols);
  const int64_t planes = g.batch * g.groups * b.col_blocks;
  while (b.rows > 1 && b.rows * b.cols >= 2 * kFewestPoints && planes * ceil_div(g.h.count, b.rows) < kWantedTasks) b.rows = ceil_div(b.rows, 2);
  const int64_t tile_rows = Tile::rows(b.cols);
  b.rows = ceil_div(b.rows, tile_rows) * tile_rows;
  b.row_blocks = ceil_div(g.h.count, b.rows);
  const int64_t units = at_least_1(Tile::units(g.outputs));
  b.unit_blocks = clamp(kWantedTasks / at_least_1(planes * b.row_blocks), 1, units);
  b.units = ceil_div(units, b.unit_blocks);
  b.unit_blocks = ceil_div(units, b.units);
  b.tasks = planes * b.row_blocks * b.unit_blocks;
  return b;
}

// Where things lie in the workspace, in bytes.
struct Scratch {
  int64_t group_weights;  // packed weights of one group, in elements
  int64_t group_bias;
  int64_t bias, offsets, workers;  // offsets into the workspace
  int64_t staged_bytes, worker_bytes;
  int64_t total(int threads) const { return workers + threads * worker_bytes; }
};

inline int64_t aligned(int64_t bytes) { return ceil_div(bytes, kAlignment) * kAlignment; }

template <class T, class Tile>
Scratch make_scratch(const Gather& g, const Blocking& b) {
  constexpr int64_t kSize = sizeof(T);
  Scratch s{};
  const int64_t units = Tile::units(g.outputs);
  for (int64_t u = 0; u < units; ++u) s.group_bias += Tile::width(g.outputs, u);
  s.group_weights = s.group_bias * g.terms();
  s.bias = aligned(g.groups * s.group_weights * kSize);
  s.offsets = s.bias + aligned(g.groups * s.group_bias * kSize);
  s.workers = s.offsets + aligned(b.channels * g.taps() * static_cast<int64_t>(sizeof(int32_t)));
  s.staged_bytes = g.taps() == 0 ? 0 : aligned(staged_bytes<T, Tile>(g, b.channels, b.rows, b.cols) + 2 * kVectorBytes);
  const int64_t tiles = b.channel_blocks == 1 ? 1 : b.units * Tile::tiles(b.cols) * ceil_div(b.rows, Tile::rows(b.cols));
  s.worker_bytes = s.staged_bytes + aligned(tiles * Tile::kMaxWidth * Tile::kMaxPoints * kSize);
  return s;
}

// Writes a matrix (lanes innermost, `pitch` apart) to where its rows and columns belong.
template <class T>
inline void write_matrix(const T* src, int64_t pitch, int64_t rows, int64_t cols, T* dst, int64_t row_stride, int64_t col_stride) {
  constexpr int kV = kLanes<T>;
  if (col_stride == 1) {
    for (int64_t i = 0; i < rows; ++i) {
      int64_t j = 0;
      for (; j + kV <= cols; j += kV) store(dst + i * row_stride + j, load(src + i * pitch + j));
      if (j < cols) store_first(dst + i * row_stride + j, load(src + i * pitch + j), static_cast<int>(cols - j));
    }
  } else if (row_stride == 1) {
    for (int64_t j = 0; j < cols; j += kV) {
      for (int64_t i = 0; i < rows; i += kV) {
        const int items = static_cast<int>(rows - i < kV ? rows - i : kV);
        Vec<T> square[kV];
#pragma GCC unroll 16
        for (int k = 0; k < kV; ++k) square[k] = k < items ? load(src + (i + k) * pitch + j) : Vec<T>{};
        transpose<T>(square);
#pragma GCC unroll 16
        for (int k = 0; k < kV; ++k) {
          if (j + k < cols) store_first(dst + (j + k) * col_stride + i, square[k], items);
        }
      }
    }
  } else {
    for (int64_t j = 0; j < cols; ++j) {
      for (int64_t i = 0; i < rows; ++i) dst[i * row_stride + j * col_stride] = src[i * pitch + j];
    }
  }
}

template <class T, class Tile>
class GatherRun {
 public:
  GatherRun(const Gather& g, const T* source, const T* weight, const T* bias, T* dest, void* workspace)
      : g_(g),
        b_(make_blocking<T, Tile>(g)),
        scratch_(make_scratch<T, Tile>(g, b_)),
        layout_(g.taps() == 0 ? StagedLayout{} : staged_layout<T>(g, b_.rows, b_.cols)),
        source_(source),
        weight_(weight),
        bias_(bias),
        dest_(dest),
        memory_(static_cast<char*>(workspace)) {}

  Outcome run(int threads) {
    if (!pack_weights(threads)) return Outcome::not_finite;
    pack_bias();
    fill_offsets(g_, layout_, b_.channels, offsets());
    parallel_for(threads, b_.tasks, [&](int worker, int64_t task) { run_task(worker, task); });
    return Outcome::done;
  }

 private:
  T* packed() const { return reinterpret_cast<T*>(memory_); }
  T* packed_bias() const { return reinterpret_cast<T*>(memory_ + scratch_.bias); }
  int32_t* offsets() const { return reinterpret_cast<int32_t*>(memory_ + scratch_.offsets); }
  T* staged(int worker) const { return reinterpret_cast<T*>(memory_ + scratch_.workers + worker * scratch_.worker_bytes); }
  T* sums(int worker) const { return reinterpret_cast<T*>(memory_ + scratch_.workers + worker * scratch_.worker_bytes + scratch_.staged_bytes); }

  // The output channels of a unit that exist.
  int64_t unit_outputs(int64_t unit) const {
    return clamp(g_.outputs - Tile::first(g_.outputs, unit), 0, Tile::width(g_.outputs, unit));
  }

  bool pack_weights(int threads) const {
    const int64_t units = Tile::units(g_.outputs), chunks = ceil_div(g_.channels, kPackChannels);
    int finite = 1;
    const int team = g_.groups * scratch_.group_weights < kSerialPack ? 1 : threads;
    parallel_for(team, g_.groups * units * chunks, [&](int, int64_t i) {
      const int64_t chunk = i % chunks, unit = i / chunks % units, group = i / chunks / units;
      const int64_t first = Tile::first(g_.outputs, unit), width = Tile::width(g_.outputs, unit), c = chunk * kPackChannels;
      const T* src = weight_ + group * g_.weight_group + first * g_.weight_output + c * g_.weight_channel;
      T* dst = packed() + group * scratch_.group_weights + first * g_.terms() + c * g_.taps() * width;
      Packer<T> packer;
      packer.pack(g_, src, unit_outputs(unit), width, clamp(g_.channels - c, 0, kPackChannels), dst);
      if (!packer.found_finite()) __atomic_store_n(&finite, 0, __ATOMIC_RELAXED);
    });
    return finite != 0;
  }

  void pack_bias() const {
    for (int64_t group = 0; group < g_.groups; ++group) {
      T* dst = packed_bias() + group * scratch_.group_bias;
      for (int64_t k = 0; k < scratch_.group_bias; ++k) dst[k] = bias_ != nullptr && k < g_.outputs ? bias_[group * g_.outputs + k] : T(0);
    }
  }

  // One task's place: which image, group, units and block of the grid.
  struct Place {
    int64_t n, group, first_unit, end_unit, y, x, rows, cols;
  };

  Place place_of(int64_t task) const {
    Place p{};
    const int64_t unit_block = task % b_.unit_blocks;
    task /= b_.unit_blocks;
    const int64_t col_block = task % b_.col_blocks;
    task /= b_.col_blocks;
    const int64_t row_block = task % b_.row_blocks;
    task /= b_.row_blocks;
    p.group = task % g_.groups, p.n = task / g_.groups;
    p.first_unit = unit_block * b_.units, p.end_unit = clamp(p.first_unit + b_.units, 0, Tile::units(g_.outputs));
    p.y = row_block * b_.rows, p.rows = clamp(g_.h.count - p.y, 0, b_.rows);
    p.x = col_block * b_.cols, p.cols = clamp(g_.w.count - p.x, 0, b_.cols);
    return p;
  }

  void run_task(int worker, int64_t task) const {
    const Place p = place_of(task);
    StageTask block{};
    block.rows = p.rows;
    block.first_row = p.y * g_.h.source_step + g_.h.source_first - window_of(g_.h, 1).tap_origin;
    block.first_col = p.x * g_.w.source_step + g_.w.source_first - window_of(g_.w, 1).tap_origin;
    for (int64_t cb = 0; cb < b_.channel_blocks; ++cb) {
      const int64_t c = cb * b_.channels;
      block.channels = clamp(g_.channels - c, 0, b_.channels);
      stage(g_, layout_, block, source_ + p.n * g_.source.n + (p.group * g_.channels + c) * g_.source.c, staged(worker));
      run_units(worker, p, cb, block.channels);
    }
  }

  void run_units(int worker, const Place& p, int64_t channel_block, int64_t channels) const {
    TileTask<T> tile{};
    tile.offsets = offsets();
    tile.steps = channels * g_.taps();
    tile.row_step = g_.h.source_step * layout_.row_pitch;
    tile.sums = sums(worker);
    const int64_t tiles = Tile::tiles(p.cols), tile_rows = Tile::rows(p.cols);
    for (int64_t unit = p.first_unit; unit < p.end_unit; ++unit) {
      const int64_t first = Tile::first(g_.outputs, unit), width = Tile::width(g_.outputs, unit);
      tile.weights = packed() + p.group * scratch_.group_weights + first * g_.terms() + channel_block * b_.channels * g_.taps() * width;
      tile.bias = channel_block == 0 ? packed_bias() + p.group * scratch_.group_bias + first : nullptr;
      for (int64_t y = 0; y < p.rows; y += tile_rows) {
        const int64_t rows = p.rows - y < tile_rows ? p.rows - y : tile_rows;
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t x = Tile::tile_begin(p.cols, t), cols = Tile::tile_begin(p.cols, t + 1) - x;
          tile.staged = staged(worker) + y * tile.row_step + x;
          Tile::run(tile, width, rows, cols);
          if (channel_block == b_.channel_blocks - 1) write_tile(p, tile.sums, unit, y, x, rows, cols);
          if (b_.channel_blocks > 1) tile.sums += Tile::kMaxWidth * Tile::kMaxPoints;
        }
      }
    }
  }

  void write_tile(const Place& p, const T* sums, int64_t unit, int64_t y, int64_t x, int64_t rows, int64_t cols) const {
    const int64_t width = Tile::width(g_.outputs, unit), outputs = unit_outputs(unit);
    const int64_t channel = p.group * g_.outputs + Tile::first(g_.outputs, unit);
    const int64_t col_stride = g_.w.dest_step * g_.dest.w;
    for (int64_t r = 0; r < rows; ++r) {
      T* dst = dest_ + p.n * g_.dest.n + channel * g_.dest.c + (g_.h.dest_first + (p.y + y + r) * g_.h.dest_step) * g_.dest.h +
               (g_.w.dest_first + (p.x + x) * g_.w.dest_step) * g_.dest.w;
      if constexpr (Tile::kChannelsInner) {
        write_matrix(sums + r * cols * width, width, cols, outputs, dst, col_stride, g_.dest.c);
      } else {
        write_matrix(sums, static_cast<int64_t>(Tile::kMaxPoints), outputs, cols, dst, g_.dest.c, col_stride);
      }
    }
  }

  const Gather g_;
  const Blocking b_;
  const Scratch scratch_;
  const StagedLayout layout_;
  const T* const source_;
  const T* const weight_;
  const T* const bias_;
  T* const dest_;
  char* const memory_;
};

template <class T, template <class> class Tile>
Plan plan_gathers(Conv2dDirection direction, const Conv2dShape& s, int threads) {
  Plan plan{Tile<T>::kMaxWidth, Tile<T>::kMaxPoints, 0, 0};
  for (int64_t i = 0; i < gather_count(direction, s); ++i) {
    const Gather g = make_gather(direction, s, i);
    if (g.is_empty()) continue;
    const Blocking b = make_blocking<T, Tile<T>>(g);
    const size_t bytes = static_cast<size_t>(make_scratch<T, Tile<T>>(g, b).total(threads));
    plan.tasks += b.tasks;
    if (bytes > plan.workspace_bytes) plan.workspace_bytes = bytes;
  }
  return plan;
}

template <class T, template <class> class Tile>
Outcome run_gathers(Conv2dDirection direction, const Conv2dShape& s, const Conv2dBuffers& buffers, void* workspace, int threads) {
  const bool forward = direction == Conv2dDirection::forward;
  const T* source = static_cast<const T*>(forward ? buffers.input : buffers.grad_output);
  T* dest = static_cast<T*>(forward ? buffers.output : buffers.grad_input);
  const T* bias = static_cast<const T*>(forward ? buffers.bias : nullptr);
  for (int64_t i = 0; i < gather_count(direction, s); ++i) {
    const Gather g = make_gather(direction, s, i);
    if (g.is_empty()) continue;
    GatherRun<T, Tile<T>> run(g, source, static_cast<const T*>(buffers.weight), bias, dest, workspace);
    if (run.run(threads) == Outcome::not_finite) return Outcome::not_finite;
  }
  return Outcome::done;
}

// The functions of a table row.
template <template <class> class Tile, Conv2dDirection kDirection>
struct GatherRow {
  static Plan plan(const Conv2dShape& s, int threads) {
    return s.dtype == cnn_ext::DType::float32 ? plan_gathers<float, Tile>(kDirection, s, threads) : plan_gathers<double, Tile>(kDirection, s, threads);
  }
  static Outcome run(const Conv2dShape& s, const Conv2dBuffers& buffers, void* workspace, int threads) {
    return s.dtype == cnn_ext::DType::float32 ? run_gathers<float, Tile>(kDirection, s, buffers, workspace, threads)
                                              : run_gathers<double, Tile>(kDirection, s, buffers, workspace, threads);
  }
};

}  // namespace
