// Kernels of any size and dilation for conv2d_depthwise_rows.cpp: a block's source rows are copied with zeros around them, so that every
// tap of every target is a load at a fixed distance. A stride of 2 is taken apart while copying (conv2d_depthwise_planes_strip.inl, of one
// map).
//
// Tile: as many rows of 1 to 4 vectors as make 12 sums, at most 8. A tap's weight is broadcast once for all of them, and its sources are
// operands in memory: 4 instructions beside 12 multiply-adds, whatever the kernel is. Each source is loaded once for every tap, then, and
// an odd address often costs two loads; where few taps keep their weights in registers, rows that roll down need fewer.
#pragma once

#include "cpu/kernels/conv2d_depthwise_rows_tile.inl"

namespace {

constexpr int kMostCopiedVectors = 4, kMostCopiedRows = 8;

// Of a tile of so many vectors.
constexpr int64_t most_copied_rows(int64_t vectors) {
  constexpr int64_t kSums = 12;
  return kSums / vectors < kMostCopiedRows ? kSums / vectors : kMostCopiedRows;
}

struct CopiedTileArguments {
  const float* source;       // that the first row's lane 0 meets with a tap at distance 0
  int64_t source_row;        // from the source of a target row to that of the next one
  const int32_t* distances;  // [tap], in elements
  int64_t taps;
  const float* weights;  // of the first tap
  int64_t weight_step;
  float initial;
  float* target;  // lane 0 of the first row
  int64_t target_row;
  const float* target_end;                 // of what may be written
  const float *next_source, *next_target;  // of the next block: what to fetch meanwhile
};

template <int kRows, int kVectors>
void compute_copied_tile(const CopiedTileArguments& a) {
  const float* source[kRows];
  Vec<float> sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    source[r] = a.source + r * a.source_row;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[r][v] = broadcast(a.initial);
  }
  const float* weight = a.weights;
  const int64_t weight_step = a.weight_step;
  for (const int32_t *distance = a.distances, *last = distance + a.taps; distance < last; ++distance, weight += weight_step) {
    const Vec<float> w = broadcast_from(weight);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) accumulate(sum[r][v], w, source[r] + *distance + v * kLanes<float>);
    }
  }
  // Lanes behind a row are written, too, unless the task ends there.
  float* target = a.target;
  const bool is_inside = target + (kRows - 1) * a.target_row + kVectors * kLanes<float> <= a.target_end;
  const float *next_source = a.next_source, *next_target = a.next_target;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r, target += a.target_row) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      if (__builtin_expect(is_inside, 1)) {
        store(target + v * kLanes<float>, sum[r][v]);
      } else {
        store_before(target + v * kLanes<float>, sum[r][v], a.target_end);
      }
    }
    fetch<kVectors * kLanes<float>>(next_source);
    fetch<kVectors * kLanes<float>>(next_target);
  }
}

using CopiedTile = void (*)(const CopiedTileArguments&);

template <int kVectors, int kRows>
constexpr CopiedTile copied_tile() {
  if constexpr (kRows <= most_copied_rows(kVectors)) return compute_copied_tile<kRows, kVectors>;
  return nullptr;
}

template <int kVectors>
CopiedTile copied_tile(int64_t rows) {
  static constexpr CopiedTile tiles[kMostCopiedRows] = {copied_tile<kVectors, 1>(), copied_tile<kVectors, 2>(), copied_tile<kVectors, 3>(),
                                                        copied_tile<kVectors, 4>(), copied_tile<kVectors, 5>(), copied_tile<kVectors, 6>(),
                                                        copied_tile<kVectors, 7>(), copied_tile<kVectors, 8>()};
  return tiles[rows - 1];
}

// The copy of a block's rows.
struct RowCopy {
  StripColumns columns;
  StripLayout<float> layout;
  int64_t kernel_h, stride_h, dilation_h;
  int32_t* distances;  // [tap]

  int64_t taps() const { return kernel_h * columns.taps; }
  int64_t reach_h() const { return (kernel_h - 1) * dilation_h; }
  int64_t rows(int64_t targets) const { return (targets - 1) * stride_h + reach_h() + 1; }
  int64_t size(int64_t targets) const { return align_to(stage_size(columns, layout, rows(targets)), kLanes<float>); }
};

inline int64_t widest_copied_tile(const RowCopy& copy) {
  return ceil_div(copy.layout.vectors, ceil_div(copy.layout.vectors, kMostCopiedVectors));
}

inline void fill_distances(const RowCopy& copy) {
  for (int64_t tap = 0; tap < copy.taps(); ++tap) {
    const int64_t row = tap / copy.columns.taps * copy.dilation_h, column = tap % copy.columns.taps * copy.columns.dilation;
    copy.distances[tap] = static_cast<int32_t>(row * copy.layout.row + column % copy.columns.stride * copy.layout.phase + copy.layout.lead +
                                               column / copy.columns.stride);
  }
}

// What a block's tiles have in common.
struct CopiedBlock {
  const float* source_map;
  int64_t source_rows;   // of the map
  int64_t first_source;  // row of the map that the copy begins with, or would
  int64_t targets;       // rows
  float* stage;          // all zeros around the rows
};

// Copies the rows that exist; the others are zeros.
inline void copy_rows(const RowCopy& copy, const CopiedBlock& block) {
  const int64_t rows = copy.rows(block.targets), above = smaller(rows, larger(0, -block.first_source));
  const int64_t last = larger(above, smaller(rows, block.source_rows - block.first_source));
  const auto clear = [&](int64_t first, int64_t end) {
    for (int64_t i = first * copy.layout.row; i < end * copy.layout.row; i += kLanes<float>) store(block.stage + i, Vec<float>{});
  };
  clear(0, above);
  clear(last, rows);
  stage_strip(copy.columns, copy.layout, block.source_map + (block.first_source + above) * copy.columns.source, 0, 1, last - above,
              block.stage + above * copy.layout.row);
}

// The rows of targets from `a.target` on. The last tile of rows reaches back as far as it must to be whole; the tiles of a row go from
// right to left, so that what one writes behind its rows is computed later.
inline void compute_copied_block(const RowCopy& copy, const CopiedBlock& block, CopiedTileArguments a) {
  const int64_t vectors = copy.layout.vectors, tiles = ceil_div(vectors, kMostCopiedVectors);
  const int64_t most_rows = most_copied_rows(widest_copied_tile(copy)),
                tile_rows = ceil_div(block.targets, ceil_div(block.targets, most_rows));
  const CopiedTile tile[kMostCopiedVectors] = {copied_tile<1>(tile_rows), copied_tile<2>(tile_rows), copied_tile<3>(tile_rows),
                                               copied_tile<4>(tile_rows)};
  float* const target = a.target;
  for (int64_t next = 0; next < block.targets; next += tile_rows) {
    const int64_t row = smaller(next, block.targets - tile_rows);
    int64_t first = vectors;
    for (int64_t left = tiles; left > 0; --left) {
      const int64_t width = first / left;
      first -= width;
      a.source = block.stage + row * a.source_row + first * kLanes<float>;
      a.target = target + row * a.target_row + first * kLanes<float>;
      tile[width - 1](a);
      a.next_source += tile_rows * width * kLanes<float>;
      a.next_target += tile_rows * width * kLanes<float>;
    }
  }
}

}  // namespace
