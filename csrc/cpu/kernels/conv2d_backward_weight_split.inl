// How backward_weight is cut into jobs and blocks: a function of the shape, the dtype and the instruction set alone, for the order of
// additions follows from it.
//
// A job sums one range of output channels times one range of input channels over one range of pixels. It packs for itself what it reads, a
// block of images or rows at a time, and shares nothing with other jobs. Splitting output channels packs the input again for each range,
// splitting input channels packs grad_output again, splitting pixels leaves partial sums to be added up: the cheapest cut for a team of
// kPlannedTeam is taken, whatever the team is.
#pragma once

#include "cpu/kernels/conv2d_backward_weight_tile.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

constexpr int64_t kPlannedTeam = 8;
constexpr int64_t kBlockBytes = 512 << 10;  // packed data of one block: a part of the level-2 cache
constexpr int64_t kPatchPixels = 208;       // with 32 + 14 floats for each, a patch stays in the level-1 cache over all taps
constexpr int64_t kPackPixels = 32;         // channels_last: all channel blocks of so many pixels are packed in turn
constexpr int64_t kPartialBytes = 8 << 20;  // partial sums of all jobs, at most
constexpr int64_t kSparePartials = 1 << 20;

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Part i of [0, count) cut into `parts` whose sizes differ by one at most.
inline Range part_of(int64_t count, int64_t parts, int64_t i) { return {count * i / parts, count * (i + 1) / parts}; }

// The outputs i of a row whose tap at `offset` (tap index times dilation) lies inside the input.
inline Range inside(int64_t out, int64_t in, int64_t stride, int64_t pad, int64_t offset) {
  const int64_t first = pad - offset, last = in - 1 + pad - offset;
  return {first > 0 ? divide_up(first, stride) : 0, last < 0 ? 0 : smaller(out, last / stride + 1)};
}

inline Range common(Range a, Range b) { return {larger(a.begin, b.begin), smaller(a.end, b.end)}; }

// What the cut needs to know of a shape. A block of channels is what one tile takes: `lanes` * kTileVectors output channels, or up to
// kTileEntries input channels.
struct Work {
  int64_t groups, batch, out_h, out_w;
  int64_t group_out, group_in, taps;
  int64_t out_block;              // output channels of a block
  int64_t out_blocks, in_blocks;  // of a group
  int64_t input_pixels;           // packed, of an image
  int64_t element_bytes;

  int64_t sums_bytes() const { return groups * out_blocks * out_block * group_in * taps * element_bytes; }
};

struct Split {
  int64_t out_ranges, in_ranges, pixel_ranges;
};

// Estimated cycles: packing takes half a cycle for an element, adding a partial sum or writing a sum about as much.
inline double estimated_cycles(const Work& w, const Split& split) {
  const double outputs = static_cast<double>(w.batch) * static_cast<double>(w.out_h * w.out_w);
  const double sums = static_cast<double>(w.out_blocks * w.out_block * w.group_in * w.taps);
  const double multiply = outputs * sums / static_cast<double>(w.out_block);
  const double pack = 0.5 * (static_cast<double>(w.batch * w.input_pixels * w.group_in * split.out_ranges) +
                             outputs * static_cast<double>(w.group_out * split.in_ranges));
  const double add = split.pixel_ranges > 1 ? 0.5 * sums * static_cast<double>(split.pixel_ranges) : 0.0;
  const int64_t jobs = w.groups * split.out_ranges * split.in_ranges * split.pixel_ranges;
  const double rounds = static_cast<double>(divide_up(jobs, kPlannedTeam)) / static_cast<double>(jobs);
  const double start = 1000.0 * static_cast<double>(jobs);
  return static_cast<double>(w.groups) * ((multiply + pack) * rounds + add / static_cast<double>(kPlannedTeam)) + start;
}

// Partial sums may take as much as one gradient, a quarter of the larger activation and a little more.
inline int64_t partial_bytes_for(const Work& w) {
  const int64_t outputs = w.out_h * w.out_w * w.group_out, inputs = w.input_pixels * w.group_in;
  const int64_t activation = w.groups * w.batch * larger(outputs, inputs) * w.element_bytes;
  return smaller(kPartialBytes, w.sums_bytes() + activation / 4 + kSparePartials);
}

// By cycles(work, split).
template <class Cycles>
inline Split cheapest_split(const Work& w, const Cycles& cycles_of, int64_t partial_bytes) {
  Split best{1, 1, 1};
  double best_cycles = cycles_of(w, best);
  for (int64_t out_ranges = 1; out_ranges <= w.out_blocks; out_ranges *= 2) {
    for (int64_t in_ranges = 1; in_ranges <= w.in_blocks; in_ranges *= 2) {
      for (int64_t pixel_ranges = 1; pixel_ranges <= 32 && pixel_ranges <= w.batch * w.out_h; pixel_ranges *= 2) {
        if (pixel_ranges > 1 && pixel_ranges * w.sums_bytes() > partial_bytes) break;
        const Split split{out_ranges, in_ranges, pixel_ranges};
        const double cycles = cycles_of(w, split);
        if (cycles < best_cycles) best = split, best_cycles = cycles;
      }
    }
  }
  return best;
}

// Blocks of pixels that are packed at once: several whole images, or some rows of one.
struct Blocking {
  int64_t images, rows;  // of a block
  int64_t row_blocks;    // of an image
  int64_t blocks;        // in all
};

// bytes_per_row: of one output row, packed; halo_bytes: of the input rows that a block needs besides.
inline Blocking blocking_for(const Work& w, int64_t pixel_ranges, int64_t bytes_per_row, int64_t halo_bytes) {
  Blocking b{};
  const int64_t wanted = divide_up(pixel_ranges, larger(w.batch, 1));
  const int64_t fitting = larger(1, (kBlockBytes - halo_bytes) / larger(bytes_per_row, 1));
  b.row_blocks = larger(divide_up(w.out_h, fitting), smaller(wanted, w.out_h));
  b.rows = divide_up(w.out_h, b.row_blocks);
  b.row_blocks = divide_up(w.out_h, b.rows);
  b.images = 1;
  if (b.row_blocks == 1 && w.batch > 1) {
    const int64_t of_range = divide_up(w.batch, pixel_ranges);
    const int64_t images_fitting = larger(1, kBlockBytes / larger(1, bytes_per_row * w.out_h + halo_bytes));
    b.images = divide_up(of_range, divide_up(of_range, images_fitting));
  }
  b.blocks = divide_up(w.batch, b.images) * b.row_blocks;
  return b;
}

}  // namespace
}  // namespace cnn_ext::cpu::CNN_EXT_ISA
