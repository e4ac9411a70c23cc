// How the sums of register tiles get from where they were added up to a tensor.
#pragma once

#include "cpu/kernels/conv2d_direct_tile.inl"
#include "cpu/kernels/conv2d_direct_write.inl"

namespace {

// How many tiles further on the place lies that a tile of few steps fetches: in planes, and where channels are innermost.
constexpr int64_t kPlaneTilesAhead = 1, kPointTilesAhead = 4;

// How a unit's sums get to their destination.
enum class Writing {
  in_scratch,   // not yet, or by a sink that takes units
  interleaved,  // from scratch, with those of another part
  in_place,     // tiles store them there: the lanes are innermost there too
  by_tiles,     // from scratch, tile by tile
  by_units      // from scratch, when all of a unit's are complete
};

template <class T, class Tile, class Sink>
struct SumsWriter {
  static constexpr int64_t kSize = sizeof(T);

  // Lets a tile store its sums at `dst` itself.
  void write_in_place(TileTask<T>& tile, T* dst, int64_t cols, int64_t outputs) const {
    tile.out = dst, tile.pitch = Tile::kChannelsInner ? sink.grid.w : sink.grid.c, tile.row_pitch = sink.grid.h;
    tile.last = static_cast<int>(((Tile::kChannelsInner ? outputs : cols) - 1) % kLanes<T> + 1);
  }

  // Of a tile's place in planes, the last line in each of them: the others are the tile's before, or follow soon. Where channels are
  // innermost, the place behind the tile's, which is most often the next one's. Tiles of few steps fetch what lies further on.
  Fetch ahead(const TileTask<T>& tile, Writing writing, const T* dst, int64_t rows, int64_t cols, int64_t outputs) const {
    const Strides& grid = sink.grid;
    if (writing == Writing::in_scratch) return fetch_nothing(tile.weights);
    if (grid.c == 1) {
      if (has_few_steps(tile, cols)) return points_ahead(dst, cols);
      return {reinterpret_cast<const char*>(dst + cols * grid.w), grid.w * kSize, cols};
    }
    const int64_t last_col = (has_few_steps(tile, outputs) ? kPlaneTilesAhead * cols : 0) + cols - 1;
    return {reinterpret_cast<const char*>(dst + (rows - 1) * grid.h + last_col * grid.w), grid.c * kSize, outputs};
  }

  void write_tile(const TileTask<T>& tile, int64_t rows, int64_t cols, int64_t outputs, T* dst) const {
    for (int64_t r = 0; r < rows; ++r) {
      write_row(tile.out + r * tile.row_pitch, tile.pitch, cols, outputs, dst + r * sink.grid.h);
    }
  }

  // Rows that follow each other without a gap are written as one.
  void write_unit(const UnitSums<T>& unit) const {
    const bool dense = sink.grid.h == unit.cols * sink.grid.w;
    const int64_t runs = dense ? 1 : unit.rows, cols = dense ? unit.rows * unit.cols : unit.cols;
    const T* sums = unit.sums;
    for (int64_t image = 0; image < unit.images; ++image) {
      for (int64_t r = 0; r < runs; ++r, sums += cols * unit.pitch) {
        write_row(sums, unit.pitch, cols, unit.outputs, sink.point(unit.n + image, unit.channel, unit.y + r, unit.x));
      }
    }
  }

  // Sums of the even columns, and, at `odd`, those of the odd columns of the same rows; the sink is that of the even ones.
  void write_interleaved(const UnitSums<T>& unit, const T* odd, int64_t odd_cols) const {
    const int64_t cols = unit.cols + odd_cols, width = unit.pitch, plane = sink.grid.c;
    const T* even = unit.sums;
    for (int64_t image = 0; image < unit.images; ++image) {
      for (int64_t y = 0; y < unit.rows; ++y, even += Tile::row_sums(width, unit.cols), odd += Tile::row_sums(width, odd_cols)) {
        T* dst = sink.point(unit.n + image, unit.channel, unit.y + y, unit.x);
        if constexpr (Tile::kChannelsInner) {
          interleave_matrices(even, odd, width, cols, unit.outputs, dst, plane);
        } else {
          constexpr int64_t kPoints = Tile::kMaxPoints;
          for (int64_t x = 0; x < cols; x += 2 * kPoints) {
            for (int64_t k = 0; k < unit.outputs; ++k) {
              const int64_t at = x / 2 * width + k * kPoints;
              interleave_rows(even + at, odd + at, cols - x < 2 * kPoints ? cols - x : 2 * kPoints, dst + k * plane + x);
            }
          }
        }
      }
    }
  }

  Sink sink;

 private:
  // A line of each point, or, where less than two lie between points, all of them.
  Fetch points_ahead(const T* dst, int64_t cols) const {
    const int64_t point = sink.grid.w * kSize;
    const char* at = reinterpret_cast<const char*>(dst + kPointTilesAhead * cols * sink.grid.w);
    return point < 2 * kLineBytes ? Fetch{at, kLineBytes, ceil_div(cols * point, kLineBytes)} : Fetch{at, point, cols};
  }

  // Sums of a row of grid points as they lie in scratch.
  void write_row(const T* sums, int64_t pitch, int64_t cols, int64_t outputs, T* dst) const {
    const Strides& grid = sink.grid;
    if constexpr (Tile::kChannelsInner) {
      write_matrix(sums, pitch, cols, outputs, dst, grid.w, grid.c);
    } else {
      write_matrix(sums, pitch, outputs, cols, dst, grid.c, grid.w);
    }
  }
};

}  // namespace
