// What the row for few input channels by cells (conv2d_backward_input_cells_mma.cu) multiplies, and where a block keeps it. A cell is a few
// rows and columns of inputs, as many as the strides or a multiple of them: all cells read outputs at the same distances.
#pragma once

#include "cuda/limits.h"
#include "cuda/patch.cuh"

namespace cnn_ext::cuda {

constexpr int kGroupWords = 16;                     // of depth: two instructions deep, 4 words of each of a fragment's four columns
constexpr int kGroupBytes = kGroupWords * 4;        // of an output
constexpr int kNarrowRows = 8, kFragmentRows = 16;  // of a cell: so few that cells are the rows of a fragment, and else of one fragment
constexpr int kMostFragments = 4;                   // of a cell, in one block
constexpr int kMostOutputs = 4, kLeastCells = 512;  // to a cell along an axis; of an image with more than one
constexpr int kStageBytes = 32 * 1024;              // more groups than one at a time up to this

// One axis: a cell of `size` inputs reads the outputs first + cell * outputs + {0 to taps - 1}. Its input i, i + offset inputs after a
// multiple of the stride, takes the filter's tap r from the output at distance (i + offset - r * dilation) / stride, if that is whole.
struct CellAxis {
  CellAxis(int extent, int kernel, int stride, int pad, int dilation, int outputs_)
      : outputs(outputs_),
        size(outputs * stride),
        offset(pad % stride),
        first_distance(ceil_quotient(offset - (kernel - 1) * dilation, stride)),
        first(pad / stride + first_distance),
        taps((offset + size - 1) / stride - first_distance + 1),
        count(ceil_div(extent, size)) {}

  // The first input of a cell that takes the filter's tap r; the next ones follow at distance `stride`, each an output on.
  CNN_EXT_HOST_DEVICE int input_of(int r, int stride, int dilation) const {
    const int from = r * dilation - offset;
    return from - stride * -ceil_quotient(-from, stride);
  }
  CNN_EXT_HOST_DEVICE int tap_of(int r, int stride, int dilation) const {
    return (input_of(r, stride, dilation) + offset - r * dilation) / stride - first_distance;
  }

  int outputs, size, offset;
  int first_distance, first, taps;
  int count;  // of cells
};

// The product of a cell. A block multiplies at most block_fragments_ fragments of its rows: others share a cell where filters are large.
struct Cells {
  Cells(const Conv2dGeometry& g, DType dtype, int outputs_h, int outputs_w, int block_fragments_ = kMostFragments)
      : h(g.in_h, g.kernel_h, g.stride_h, g.pad_top, g.dilation_h, outputs_h),
        w(g.in_w, g.kernel_w, g.stride_w, g.pad_left, g.dilation_w, outputs_w),
        row_terms(w.size * g.group_in),
        rows(h.size * row_terms),
        fragment_rows(rows <= kNarrowRows ? kNarrowRows : kFragmentRows),
        fragments(ceil_div(rows, fragment_rows)),
        block_fragments(smaller(fragments, block_fragments_)),
        shares(ceil_div(fragments, block_fragments)),
        tap_bytes(fragment_rows * kGroupBytes),
        taps(h.taps * w.taps),
        groups(ceil_div(ceil_div(g.group_out * bytes_of(dtype), 4), kGroupWords)),
        filter_bytes(static_cast<int>(smaller<int64_t>(kMostSharedBytes + 1, product({block_fragments, taps, groups, tap_bytes})))) {}

  bool is_narrow() const { return fragment_rows == kNarrowRows; }
  int of_image() const { return h.count * w.count; }
  // Products for each of its outputs, times those.
  int work() const { return taps * fragment_rows; }
  int outputs() const { return h.outputs * w.outputs; }

  CellAxis h, w;
  int row_terms, rows;  // (h, w, channel) of a cell
  int fragment_rows, fragments;
  int block_fragments, shares;  // of a block; blocks that share a cell
  int tap_bytes;                // of the filters of a fragment: one distance, one group of the depth
  int taps, groups;             // of the depth
  int filter_bytes;             // of a block
};

// The outputs that a tile of cells reads, and where a block keeps things in shared memory, in bytes from its start: the filters, the
// outputs [group][h][phase of w][w][16 words], where a row and a column of the filters begins, (h, w) and place of each output of a group,
// and where a distance leads in them.
struct CellPatch {
  CellPatch(const Conv2dGeometry& g, const Cells& cells, const PatchTiles& tiles)
      : height((tiles.height - 1) * cells.h.outputs + cells.h.taps),
        width((tiles.width - 1) * cells.w.outputs + cells.w.taps),
        phase_pitch(ceil_div(width, cells.w.outputs) | 1),  // odd: neighbours are written to different banks
        row_pitch(cells.w.outputs * phase_pitch),
        group_bytes(height * row_pitch * kGroupBytes),
        depth(larger(1, smaller(cells.groups, kStageBytes / group_bytes))),
        chunks(depth * height * width * (kGroupBytes / kChunkBytes)),
        outputs(cells.filter_bytes),
        filter_places(outputs + depth * group_bytes),
        output_places(filter_places + (g.kernel_h + g.kernel_w) * static_cast<int>(sizeof(int) * 2)),
        places(output_places + height * width * static_cast<int>(sizeof(int) * 2)),
        shared_bytes(ceil_div(places + cells.taps * static_cast<int>(sizeof(int)), kChunkBytes) * kChunkBytes) {}

  int height, width, phase_pitch, row_pitch;  // in outputs
  int group_bytes, depth;                     // of a group, and how many groups at a time
  int chunks;                                 // of all of these
  int outputs, filter_places, output_places, places, shared_bytes;
};

// The cells of a block: 8 for each of its warps, this many times.
inline PatchTiles cell_tiles(const Cells& cells, int eights) {
  const int bits = smaller(eights == 4 ? 5 : eights == 2 ? 4 : 3, width_bits_of(cells.w.count));
  return {bits, (kBlockThreads / 4 * eights) >> bits, cells.h.count, cells.w.count};
}

inline int most_eights(const Cells& cells) { return cells.block_fragments == 1 ? 4 : 2; }

inline bool fits_shared(const Conv2dGeometry& g, const Cells& cells) {
  return cells.filter_bytes <= kMostSharedBytes && all_below(kMostSharedBytes, {cells.taps}) &&
         CellPatch(g, cells, cell_tiles(cells, most_eights(cells))).shared_bytes <= kMostSharedBytes;
}

// One output to a cell: what no cell is smaller than.
inline Cells least_cells(const Conv2dGeometry& g, DType dtype) {
  const Cells whole(g, dtype, 1, 1);
  return whole.shares == 1 && fits_shared(g, whole) ? whole : Cells(g, dtype, 1, 1, /*block_fragments_=*/1);
}

// By the shape of an image, which the order of additions follows.
inline Cells cells_of(const Conv2dGeometry& g, DType dtype) {
  Cells best = least_cells(g, dtype);
  for (int h = 1; h <= kMostOutputs; ++h) {
    for (int w = 1; w <= kMostOutputs; ++w) {
      const Cells cells(g, dtype, h, w);
      const bool is_better = cells.work() * best.outputs() < best.work() * cells.outputs();
      if (cells.fragments == 1 && cells.of_image() >= kLeastCells && is_better && fits_shared(g, cells)) best = cells;
    }
  }
  return best;
}

// Fewer cells for a warp where there are too few tiles for all multiprocessors.
inline int eights_of(const Cells& cells, int64_t batch) {
  const int most = most_eights(cells);
  if (most == 2 || batch * cell_tiles(cells, most).of_image >= kMultiprocessors / 2) return most;
  return cells.is_narrow() ? 2 : 1;
}

}  // namespace cnn_ext::cuda
