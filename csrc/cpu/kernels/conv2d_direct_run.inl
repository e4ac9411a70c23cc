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
constexpr int64_t kTaskPoints = 512;         // grid points that read the same packed weights while these are near
constexpr int64_t kFewestPoints = 28;
constexpr int64_t kFewestTasks = 16;         // with fewer, the last one to finish is waited for too long
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kSerialPack = 1 << 14;     // weights
constexpr int64_t kAlignment = 64;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t at_least_1(int64_t x) { return x < 1 ? 1 : x; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// How one gather convolution is cut. A task is `images` x `rows` x `cols` grid points x `units` units of output channels of one group.
struct Blocking {
  int64_t channels, channel_blocks;  // of a block of the reduction
  int64_t images, image_blocks;
  int64_t rows, row_blocks;
  int64_t cols, col_blocks;
  int64_t units, unit_blocks;
  int64_t tasks;
};

template <class T>
int64_t staged_bytes(const Gather& g, const Blocking& b) {
  return b.images * staged_layout<T>(g, b.channels, b.rows, b.cols).image_pitch * static_cast<int64_t>(sizeof(T));
}

inline void count_blocks(const Gather& g, int64_t units, Blocking& b) {
  b.image_blocks = ceil_div(g.batch, b.images);
  b.row_blocks = ceil_div(g.h.count, b.rows);
  b.col_blocks = ceil_div(g.w.count, b.cols);
  b.unit_blocks = ceil_div(units, b.units);
  b.tasks = b.image_blocks * g.groups * b.row_blocks * b.col_blocks * b.unit_blocks;
}

// The largest block of grid points whose source fits, of several images where one is small.
template <class T, class Tile>
void fit_points(const Gather& g, Blocking& b) {
  const auto fits = [&] { return b.images * b.rows * b.cols <= kTaskPoints && staged_bytes<T>(g, b) <= kStagedBytes; };
  b.images = 1, b.rows = g.h.count, b.cols = g.w.count;
  while (b.rows > 1 && !fits()) b.rows = ceil_div(b.rows, 2);
  while (b.cols > 4 * Tile::kMaxPoints && !fits()) b.cols = ceil_div(ceil_div(b.cols, 2), Tile::kMaxPoints) * Tile::kMaxPoints;
  if (b.rows < g.h.count || b.cols < g.w.count) return;
  b.images = smaller(g.batch, kTaskPoints);
  while (b.images > 1 && !fits()) b.images = ceil_div(b.images, 2);
}

// Halves tasks until there are enough. Fewer points per task read the weights more often, fewer units stage the source more often.
template <class Tile>
void split_tasks(const Gather& g, int64_t wanted, Blocking& b) {
  const int64_t units = b.units;
  for (count_blocks(g, units, b); b.tasks < wanted; count_blocks(g, units, b)) {
    const int64_t points = b.images * b.rows * b.cols;
    const bool may_split_points = b.images > 1 || (b.rows > 1 && points >= 2 * kFewestPoints);
    if (b.units > 1 && (!may_split_points || points < b.units * Tile::kMaxWidth * g.taps())) {
      b.units = ceil_div(b.units, 2);
    } else if (may_split_points) {
      int64_t& part = b.images > 1 ? b.images : b.rows;
      part = ceil_div(part, 2);
    } else {
      return;
    }
  }
}

template <class T, class Tile>
Blocking make_blocking(const Gather& g, int threads) {
  Blocking b{};
  b.channel_blocks = at_least_1(ceil_div(g.terms(), kReductionTerms));
  b.channels = at_least_1(ceil_div(g.channels, b.channel_blocks));
  b.channel_blocks = at_least_1(ceil_div(g.channels, b.channels));
  fit_points<T, Tile>(g, b);
  b.units = Tile::units(g.outputs);
  split_tasks<Tile>(g, threads * kTasksPerThread < kFewestTasks ? kFewestTasks : threads * kTasksPerThread, b);
  if (b.rows < g.h.count && 2 * b.cols <= Tile::kMaxPoints) b.rows += b.rows % 2;
  count_blocks(g, Tile::units(g.outputs), b);
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
  s.workers = s.offsets + aligned(2 * b.channels * g.taps() * static_cast<int64_t>(sizeof(int32_t)));
  s.staged_bytes = aligned(staged_bytes<T>(g, b) + kVectorBytes);
  const int64_t tiles = b.channel_blocks == 1 ? 1 : b.images * b.units * Tile::tiles(b.cols) * b.rows;
  s.worker_bytes = s.staged_bytes + aligned(tiles * Tile::kSums * kSize);
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
  GatherRun(const Gather& g, const T* source, const T* weight, const T* bias, T* dest, void* workspace, int threads)
      : g_(g),
        b_(make_blocking<T, Tile>(g, threads)),
        scratch_(make_scratch<T, Tile>(g, b_)),
        layout_(staged_layout<T>(g, b_.channels, b_.rows, b_.cols)),
        source_(source),
        weight_(weight),
        bias_(bias),
        dest_(dest),
        memory_(static_cast<char*>(workspace)),
        threads_(threads) {}

  Outcome run() const {
    if (!pack_weights()) return Outcome::not_finite;
    pack_bias();
    fill_offsets(g_, layout_, b_.channels, offsets(0));
    fill_offsets(g_, layout_, channels_of(b_.channel_blocks - 1), offsets(b_.channel_blocks - 1));
    parallel_for(threads_, b_.tasks, [&](int worker, int64_t task) { run_task(worker, task); });
    return Outcome::done;
  }

 private:
  T* packed() const { return reinterpret_cast<T*>(memory_); }
  T* packed_bias() const { return reinterpret_cast<T*>(memory_ + scratch_.bias); }
  T* staged(int worker) const { return reinterpret_cast<T*>(memory_ + scratch_.workers + worker * scratch_.worker_bytes); }
  T* sums(int worker) const { return reinterpret_cast<T*>(memory_ + scratch_.workers + worker * scratch_.worker_bytes + scratch_.staged_bytes); }

  // Those of the last block of channels, which may be smaller, are kept apart.
  int32_t* offsets(int64_t channel_block) const {
    const bool last = channel_block == b_.channel_blocks - 1;
    return reinterpret_cast<int32_t*>(memory_ + scratch_.offsets) + (last ? b_.channels * g_.taps() : 0);
  }

  int64_t channels_of(int64_t channel_block) const { return clamp(g_.channels - channel_block * b_.channels, 0, b_.channels); }

  // The output channels of a unit that exist.
  int64_t outputs_of(int64_t unit) const { return clamp(g_.outputs - Tile::first(g_.outputs, unit), 0, Tile::width(g_.outputs, unit)); }

  T* packed_weights(int64_t group, int64_t unit, int64_t channel_block) const {
    return packed() + group * scratch_.group_weights + Tile::first(g_.outputs, unit) * g_.terms() +
           channel_block * b_.channels * g_.taps() * Tile::width(g_.outputs, unit);
  }

  bool pack_weights() const {
    const int64_t units = Tile::units(g_.outputs);
    int finite = 1;
    const int team = g_.groups * scratch_.group_weights < kSerialPack ? 1 : threads_;
    parallel_for(team, g_.groups * units * b_.channel_blocks, [&](int, int64_t i) {
      const int64_t channel_block = i % b_.channel_blocks, unit = i / b_.channel_blocks % units, group = i / b_.channel_blocks / units;
      const T* src = weight_ + group * g_.weight_group + Tile::first(g_.outputs, unit) * g_.weight_output +
                     channel_block * b_.channels * g_.weight_channel;
      Packer<T> packer;
      packer.pack(g_, src, outputs_of(unit), Tile::width(g_.outputs, unit), channels_of(channel_block),
                  packed_weights(group, unit, channel_block));
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

  // A task's place: which images, group, units and block of the grid.
  struct Place {
    int64_t group, n, images, y, rows, x, cols, unit, unit_end;
  };

  Place place_of(int64_t task) const {
    Place p{};
    const auto next = [&task](int64_t blocks) {
      const int64_t block = task % blocks;
      task /= blocks;
      return block;
    };
    p.unit = next(b_.unit_blocks) * b_.units, p.unit_end = smaller(p.unit + b_.units, Tile::units(g_.outputs));
    p.x = next(b_.col_blocks) * b_.cols, p.cols = smaller(g_.w.count - p.x, b_.cols);
    p.y = next(b_.row_blocks) * b_.rows, p.rows = smaller(g_.h.count - p.y, b_.rows);
    p.group = next(g_.groups);
    p.n = task * b_.images, p.images = smaller(g_.batch - p.n, b_.images);
    return p;
  }

  void run_task(int worker, int64_t task) const {
    const Place p = place_of(task);
    for (int64_t block = 0; block < b_.channel_blocks; ++block) {
      stage_images(worker, p, block);
      T* sums_of_unit = sums(worker);
      for (int64_t unit = p.unit; unit < p.unit_end; ++unit) sums_of_unit = run_unit(worker, p, block, unit, sums_of_unit);
    }
  }

  void stage_images(int worker, const Place& p, int64_t channel_block) const {
    StageTask block{};
    block.channels = channels_of(channel_block);
    block.rows = p.rows;
    block.first_row = p.y * g_.h.source_step + g_.h.source_first - window_of(g_.h, 1).tap_origin;
    block.first_col = p.x * g_.w.source_step + g_.w.source_first - window_of(g_.w, 1).tap_origin;
    const T* source = source_ + p.n * g_.source.n + (p.group * g_.channels + channel_block * b_.channels) * g_.source.c;
    for (int64_t i = 0; i < p.images; ++i) stage(g_, layout_, block, source + i * g_.source.n, staged(worker) + i * layout_.image_pitch);
  }

  // Sums up one block of channels for one unit of output channels; returns where the sums of the next unit begin.
  T* run_unit(int worker, const Place& p, int64_t channel_block, int64_t unit, T* sums) const {
    const int64_t width = Tile::width(g_.outputs, unit);
    const int64_t row_steps = channels_of(channel_block) * g_.w.taps;
    const T* weights = packed_weights(p.group, unit, channel_block);
    const bool last = channel_block == b_.channel_blocks - 1;
    TileTask<T> tile{};
    tile.row_step = g_.h.source_step * layout_.row_pitch;
    tile.bias = channel_block == 0 ? packed_bias() + p.group * scratch_.group_bias + Tile::first(g_.outputs, unit) : nullptr;
    tile.sums = sums;
    for (int64_t image = 0; image < p.images; ++image) {
      int64_t rows = 0;
      for (int64_t y = 0; y < p.rows; y += rows) {
        rows = Tile::rows(width, p.cols, p.rows - y);
        const TapRange taps = taps_inside(g_.h, p.y + y, rows);
        tile.weights = weights + taps.begin * row_steps * width;
        tile.offsets = offsets(channel_block) + taps.begin * row_steps;
        tile.steps = (taps.end - taps.begin) * row_steps;
        for (int64_t t = 0; t < Tile::tiles(p.cols); ++t) {
          const int64_t x = Tile::tile_begin(p.cols, t), cols = Tile::tile_begin(p.cols, t + 1) - x;
          tile.staged = staged(worker) + image * layout_.image_pitch + y * tile.row_step + x;
          Tile::run(tile, width, rows, cols);
          if (last) write_tile(tile.sums, p.group, unit, p.n + image, p.y + y, rows, p.x + x, cols);
          if (b_.channel_blocks > 1) tile.sums += Tile::kSums;
        }
      }
    }
    return tile.sums;
  }

  void write_tile(const T* sums, int64_t group, int64_t unit, int64_t n, int64_t y, int64_t rows, int64_t x, int64_t cols) const {
    const int64_t width = Tile::width(g_.outputs, unit), outputs = outputs_of(unit);
    const int64_t channel = group * g_.outputs + Tile::first(g_.outputs, unit);
    const int64_t col_stride = g_.w.dest_step * g_.dest.w;
    for (int64_t r = 0; r < rows; ++r) {
      T* dst = dest_ + n * g_.dest.n + channel * g_.dest.c + (g_.h.dest_first + (y + r) * g_.h.dest_step) * g_.dest.h +
               (g_.w.dest_first + x * g_.w.dest_step) * g_.dest.w;
      if constexpr (Tile::kChannelsInner) {
        write_matrix(sums + r * cols * width, width, cols, outputs, dst, col_stride, g_.dest.c);
      } else {
        write_matrix(sums + r * width * Tile::kMaxPoints, static_cast<int64_t>(Tile::kMaxPoints), outputs, cols, dst, g_.dest.c, col_stride);
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
  const int threads_;
};

template <class T, template <class> class Tile>
Plan plan_gathers(Conv2dDirection direction, const Conv2dShape& s, int threads) {
  Plan plan{Tile<T>::kMaxWidth, Tile<T>::kMaxPoints, 0, 0};
  for (int64_t i = 0; i < gather_count(direction, s); ++i) {
    const Gather g = make_gather(direction, s, i);
    if (g.is_empty()) continue;
    const Blocking b = make_blocking<T, Tile<T>>(g, threads);
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
    GatherRun<T, Tile<T>> run(g, source, static_cast<const T*>(buffers.weight), bias, dest, workspace, threads);
    if (run.run() == Outcome::not_finite) return Outcome::not_finite;
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
