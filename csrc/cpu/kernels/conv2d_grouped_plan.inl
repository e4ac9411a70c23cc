// How a grouped convolution is cut into tasks, and what scratch they need. None of it changes a sum.
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/conv2d_direct_gather.inl"
#include "cpu/kernels/conv2d_grouped_tile.inl"

namespace {

using cnn_ext::DType;
using cnn_ext::cpu::CNN_EXT_ISA::GroupedStep;
using cnn_ext::cpu::CNN_EXT_ISA::kMostCols;
using cnn_ext::cpu::CNN_EXT_ISA::kMostVectors;
using cnn_ext::cpu::CNN_EXT_ISA::most_cols;
using cnn_ext::cpu::CNN_EXT_ISA::most_rows;

constexpr int64_t kMostChannels = 64;         // of a group
constexpr int64_t kTaskBytes = 192 << 10;     // staged and summed by one: they stay in the second cache, beside the weights
constexpr int64_t kMostRowBytes = 512 << 10;  // of the smallest task, a row
// Of several images, where these are small. Pixels of channels_last that lie a page apart share few sets of the second cache.
constexpr int64_t kTaskPixels = 512;
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kMostPhases = 16;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t align_64(int64_t bytes) { return ceil_div(bytes, 64) * 64; }

// The rows of a tile, of maps of `cols` grid points a row.
inline int rows_at_once(int vectors, int64_t cols) {
  int rows = most_rows(vectors);
  while (rows > 1 && smaller(cols, kMostCols) > most_cols(vectors, rows)) rows /= 2;
  return rows;
}

// The source positions that a grid point of an axis reads in any phase, relative to the step it takes with every grid point.
struct Reach {
  int64_t first, count;
};

class Grouping {
 public:
  static constexpr int64_t kV = kLanes<float>;
  static constexpr int64_t kLine = 64 / sizeof(float);

  Grouping(Conv2dDirection direction, const Conv2dShape& shape, int threads) : shape_(shape), phases(gather_count(direction, shape)) {
    for (int64_t i = 0; i < phases; ++i) gathers_[i] = make_gather_of_rows(direction, shape, i);
    const bool forward = direction == Conv2dDirection::forward;
    dest_h = forward ? shape.out_h : shape.in_h, dest_w = forward ? shape.out_w : shape.in_w;
    grid_h = ceil_div(dest_h, gathers_[0].h.dest_step), grid_w = ceil_div(dest_w, gathers_[0].w.dest_step);
    blocks = ceil_div(gathers_[0].channels, kV), vectors = ceil_div(gathers_[0].outputs, kV);
    units = ceil_div(vectors, kMostVectors);
    for (int64_t i = 0; i < phases; ++i) {
      extend(gathers_[i].h, i == 0, reach_h), extend(gathers_[i].w, i == 0, reach_w);
    }
    cols = grid_w - 1 + ceil_div(reach_w.count, step_w());
    row_pitch = (step_w() * cols + 1) * kV;
    cut(threads);
  }

  bool is_empty() const { return gathers_[0].is_empty(); }
  const Gather& phase(int64_t index) const { return gathers_[index]; }
  const Gather& gather() const { return gathers_[0]; }
  bool is_nchw() const { return shape_.layout == Layout::nchw; }
  int64_t step_h() const { return gathers_[0].h.source_step; }
  int64_t step_w() const { return gathers_[0].w.source_step; }
  int64_t taps() const { return shape_.kernel_h * shape_.kernel_w; }

  // The vectors of a group's output channels are shared out evenly among the units.
  int64_t unit_begin(int64_t unit) const { return unit * vectors / units; }
  int64_t unit_vectors(int64_t unit) const { return unit_begin(unit + 1) - unit_begin(unit); }

  // A group's weights are packed as [unit][tap][channel][channels of the unit], by this gather: all taps in the order of the kernel.
  Gather packed_gather() const {
    Gather g = gathers_[0];
    g.h.taps = shape_.kernel_h, g.w.taps = shape_.kernel_w;
    g.h.kernel_first = g.w.kernel_first = 0, g.h.kernel_step = g.w.kernel_step = 1;
    return g;
  }
  StepOrder packed_order() const { return {shape_.kernel_w * gathers_[0].channels, gathers_[0].channels, 1}; }
  int64_t packed_group() const { return taps() * gathers_[0].channels * vectors * kV; }
  int64_t packed_bytes() const { return align_64(gathers_[0].groups * packed_group() * kSize); }

  int64_t image_blocks() const { return ceil_div(gathers_[0].batch, images); }
  int64_t row_blocks() const { return ceil_div(grid_h, rows); }
  int64_t tasks() const { return is_empty() ? 0 : image_blocks() * row_blocks() * gathers_[0].groups; }

  int64_t staged_rows(int64_t grid_rows) const { return (grid_rows - 1) * step_h() + reach_h.count; }
  int64_t block_pitch() const { return staged_rows(rows) * row_pitch; }
  int64_t image_pitch() const { return blocks * block_pitch(); }
  // The sums of a unit, in nchw: [row][column][channels of the unit], all phases together.
  int64_t sums_of_image() const { return is_nchw() ? rows * gathers_[0].h.dest_step * dest_w * ceil_div(vectors, units) * kV : 0; }

  int64_t bias_bytes() const { return align_64(gathers_[0].groups * vectors * kV * kSize); }
  int64_t steps_bytes() const { return align_64(taps() * blocks * static_cast<int64_t>(sizeof(GroupedStep))); }
  int64_t places_bytes() const { return align_64(gathers_[0].w.source_size * static_cast<int64_t>(sizeof(int32_t))); }
  int64_t staged_bytes() const { return align_64(images * image_pitch() * kSize); }
  int64_t sums_bytes() const { return align_64(images * sums_of_image() * kSize); }
  int64_t worker_bytes() const { return staged_bytes() + sums_bytes(); }
  int64_t workspace_bytes(int threads) const {
    return is_empty() ? 0 : packed_bytes() + bias_bytes() + steps_bytes() + places_bytes() + threads * worker_bytes();
  }

 private:
  static constexpr int64_t kSize = sizeof(float);

  const Conv2dShape shape_;
  Gather gathers_[kMostPhases];

 public:
  const int64_t phases;
  int64_t dest_h, dest_w;
  int64_t grid_h, grid_w;          // grid points of the largest phase
  int64_t blocks, vectors, units;  // blocks of source channels, vectors and units of output channels of a group
  Reach reach_h{}, reach_w{};
  int64_t cols, row_pitch;  // staged: columns of a phase; elements of a row, the last pixel of which takes what nobody reads
  int64_t images, rows;     // of a task

 private:
  static void extend(const Axis& a, bool is_first, Reach& reach) {
    if (a.taps == 0 && !is_first) return;
    const int64_t span = (larger(a.taps, 1) - 1) * a.tap_step;
    const int64_t low = a.source_first + smaller(0, span), high = a.source_first + larger(0, span) + 1;
    const int64_t first = is_first ? low : smaller(reach.first, low), last = is_first ? high : larger(reach.first + reach.count, high);
    reach = {first, last - first};
  }

  // Some images, where these are small, or a band of the rows of one.
  void cut(int threads) {
    const auto fits = [&] { return worker_bytes() <= kTaskBytes; };
    images = 1, rows = larger(1, grid_h);
    while (rows > 1 && !fits()) rows = ceil_div(rows, 2);
    if (rows == grid_h) {
      const int64_t pixels = larger(gathers_[0].h.source_size * gathers_[0].w.source_size, dest_h * dest_w);
      const int64_t at_once = rows_at_once(static_cast<int>(ceil_div(vectors, units)), grid_w);
      images = smaller(larger(1, gathers_[0].batch), larger(1, kTaskPixels / larger(1, pixels)));
      while (images > 1 && !fits()) --images;
      if (images > at_once) images -= images % at_once;
    }
    const int64_t wanted = threads > 1 ? threads * kTasksPerThread : 1;
    while (tasks() > 0 && tasks() < wanted && images > 1) images = ceil_div(images, 2);
    while (tasks() > 0 && tasks() < wanted && rows > 1) rows = ceil_div(rows, 2);
  }
};

inline bool accepts_grouped(Conv2dDirection direction, const Conv2dShape& s) {
  if (s.dtype != DType::float32 || s.groups == 1) return false;
  if (s.in_channels > kMostChannels * s.groups || s.out_channels > kMostChannels * s.groups) return false;
  // Half a vector and less leave more lanes empty than other rows do.
  if (2 * s.in_channels <= kLanes<float> * s.groups || 2 * s.out_channels <= kLanes<float> * s.groups) return false;
  if (gather_count(direction, s) > kMostPhases) return false;
  Conv2dShape one = s;
  one.batch = 1;
  const Grouping grouping(direction, one, 1);
  return grouping.rows > 1 || grouping.worker_bytes() <= kMostRowBytes;
}

}  // namespace
