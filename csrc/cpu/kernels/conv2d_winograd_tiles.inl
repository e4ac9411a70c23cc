// Winograd tiles: how those of a plane are cut into blocks, and the staging of what a block reads, with the channels in the lanes.
#pragma once

#include "cpu/kernels/conv2d_direct_blocking.inl"
#include "cpu/kernels/conv2d_winograd_multiply.inl"

namespace {

// A rectangle of tiles of an image, or all tiles of several images: the first image, row and column, and how many there are.
struct TileBlock {
  int64_t n, images, row, rows, col, cols;
  int64_t tiles() const { return images * rows * cols; }
};

// All blocks of a batch, of at most `images` x `rows` x `cols` tiles each.
struct TileBlocks {
  int64_t batch, tile_rows, tile_cols;
  int64_t images, image_blocks;
  int64_t rows, row_blocks;
  int64_t cols, col_blocks;

  int64_t count() const { return image_blocks * row_blocks * col_blocks; }
  int64_t tiles() const { return images * rows * cols; }  // of a block

  TileBlock block(int64_t index) const {
    TileBlock b{};
    b.col = index % col_blocks * cols, index /= col_blocks;
    b.row = index % row_blocks * rows, index /= row_blocks;
    b.n = index * images;
    b.images = smaller(images, batch - b.n), b.rows = smaller(rows, tile_rows - b.row), b.cols = smaller(cols, tile_cols - b.col);
    return b;
  }
};

inline void count_tile_blocks(TileBlocks& b) {
  b.image_blocks = ceil_div(b.batch, b.images), b.row_blocks = ceil_div(b.tile_rows, b.rows), b.col_blocks = ceil_div(b.tile_cols, b.cols);
}

// The tiles of `outputs` x `outputs` outputs of a batch of height x width planes, whole images in a block, halved (then rows of tiles, then
// columns) until it fits.
template <class Fits>
void fit_tile_blocks(int64_t batch, int64_t height, int64_t width, int64_t outputs, TileBlocks& b, const Fits& fits) {
  b.batch = batch, b.tile_rows = ceil_div(height, outputs), b.tile_cols = ceil_div(width, outputs);
  b.images = at_least_1(batch), b.rows = b.tile_rows, b.cols = b.tile_cols;
  int64_t* const parts[] = {&b.images, &b.rows, &b.cols};
  for (int64_t* part : parts) {
    for (count_tile_blocks(b); *part > 1 && !fits(); count_tile_blocks(b)) *part = ceil_div(*part, 2);
  }
}

// Tiles [begin, end) of a block, in its order.
struct TileRange {
  int64_t begin, end;
  int64_t count() const { return end - begin; }
};

// A block's rows of tiles in strips, whose sums are held at a time, and the tiles of a strip in panels of at most kProductTiles, for a
// register tile each; the panels of a strip differ by one tile at most.
struct TilePanels {
  int64_t tiles, strip_tiles;

  TilePanels(const TileBlock& b, int64_t strip_rows) : tiles(b.tiles()), strip_tiles(strip_rows * b.cols) {}

  int64_t strips() const { return ceil_div(tiles, strip_tiles); }
  TileRange strip(int64_t index) const { return {index * strip_tiles, smaller(tiles, (index + 1) * strip_tiles)}; }
  static int64_t count(const TileRange& strip) { return ceil_div(strip.count(), kProductTiles); }
  static TileRange panel(const TileRange& strip, int64_t index) {
    const int64_t panels = count(strip);
    return {strip.begin + index * strip.count() / panels, strip.begin + (index + 1) * strip.count() / panels};
  }
  TileRange panel_of(int64_t tile) const {
    const TileRange in = strip(tile / strip_tiles);
    return panel(in, ((tile - in.begin + 1) * count(in) - 1) / in.count());
  }
};

// rows x cols positions of a plane from (y, x) on, also outside of it, of up to a vector of channels.
struct TileWindow {
  int64_t n, channel;
  int lanes;  // channels that exist
  int64_t y, rows, x, cols;
};

// Rows of neighbouring planes.
template <class T>
struct Planes {
  const T* first;
  int64_t plane, row;  // from one to the next
};

// Rows [y, y + rows) of the channels of a window. Those of a tensor lie in memory; others are written to `line`.
template <class T>
Planes<T> planes_of(const TensorSource<T>& source, const TileWindow& w, int64_t y, int64_t, int64_t, T* line) {
  return {source.row(w.n, w.channel, y, line), source.strides.c, source.strides.h};
}
template <class T, class Source>
Planes<T> planes_of(const Source& source, const TileWindow& w, int64_t y, int64_t rows, int64_t width, T* line) {
  for (int64_t i = 0; i < w.lanes * rows; ++i) source.row(w.n, w.channel + i / rows, y + i % rows, line + i * width);
  return {line, rows * width, width};
}

// Elements of `line` for windows of at most `rows` rows. Rows are written in ascending order and may end a few vectors late.
template <class T>
int64_t planes_elements(const TensorSource<T>*, int64_t, int64_t) {
  return 0;
}
template <class T, class Source>
int64_t planes_elements(const Source*, int64_t rows, int64_t width) {
  return kLanes<T> * rows * width + 4 * kLanes<T>;
}

// Copies windows of a height x width source to [row][column][lane] with rows `pitch` apart, zeros outside of the source.
template <class T, class Source>
class TileStager {
 public:
  TileStager(const Source& source, int64_t height, int64_t width) : source_(source), height_(height), width_(width) {}

  static int64_t line_elements(int64_t rows, int64_t width) { return planes_elements<T>(static_cast<const Source*>(nullptr), rows, width); }

  void stage(const TileWindow& w, int64_t pitch, T* line, T* staged) const {
    const int64_t top = clamp(-w.y, 0, w.rows), bottom = clamp(height_ - w.y, top, w.rows);
    const int64_t left = clamp(-w.x, 0, w.cols), right = clamp(width_ - w.x, left, w.cols);
    clear(staged, top * pitch);
    clear(staged + bottom * pitch, (w.rows - bottom) * pitch);
    for (int64_t row = top; row < bottom; ++row) {
      clear(staged + row * pitch, left * kV);
      clear(staged + row * pitch + right * kV, (w.cols - right) * kV);
    }
    const Part part{w.y + top, bottom - top, w.x + left, right - left};
    T* const dst = staged + top * pitch + left * kV;
    if (source_.strides.w == 1) {
      stage_planes(w, part, pitch, line, dst);
    } else {
      stage_pixels(w, part, pitch, dst);
    }
  }

 private:
  static constexpr int kV = kLanes<T>;

  // What of a window lies inside.
  struct Part {
    int64_t y, rows, x, cols;
  };

  static void clear(T* dst, int64_t elements) {
    for (int64_t i = 0; i < elements; i += kV) store(dst + i, Vec<T>{});
  }

  void stage_pixels(const TileWindow& w, const Part& part, int64_t pitch, T* dst) const {
    for (int64_t row = 0; row < part.rows; ++row) {
      const auto pixels = source_.pixels(w.n, w.channel, part.y + row);
      for (int64_t col = 0; col < part.cols; ++col) store(dst + row * pitch + col * kV, pixels.at(part.x + col, w.lanes));
    }
  }

  void stage_planes(const TileWindow& w, const Part& part, int64_t pitch, T* line, T* dst) const {
    const Planes<T> planes = planes_of(source_, w, part.y, part.rows, width_, line);
    const T* src = planes.first + part.x;
    if (part.cols == planes.row) {  // whole rows: one run
      transpose_pixels(src, planes.plane, part.rows * part.cols, w.lanes, part.cols, pitch, dst);
    } else {
      for (int64_t row = 0; row < part.rows; ++row) {
        transpose_pixels(src + row * planes.row, planes.plane, part.cols, w.lanes, part.cols, pitch, dst + row * pitch);
      }
    }
  }

  // `count` neighbouring pixels of planes `plane` apart; a row of the destination takes `row_width` of them.
  __attribute__((noinline)) static void transpose_pixels(const T* src, int64_t plane, int64_t count, int lanes, int64_t row_width,
                                                         int64_t pitch, T* dst) {
    int64_t col = 0;
    for (int64_t i = 0; i < count; i += kV) {
      const int items = static_cast<int>(smaller(kV, count - i));
      Vec<T> square[kV];
#pragma GCC unroll 16
      for (int c = 0; c < kV; ++c) {
        const T* pixels = src + c * plane + i;
        square[c] = c >= lanes ? Vec<T>{} : items == kV ? load(pixels) : load_first(pixels, items);
      }
      transpose<T>(square);
#pragma GCC unroll 16
      for (int j = 0; j < kV; ++j) {
        if (j >= items) break;
        store(dst + col * kV, square[j]);
        if (++col == row_width) col = 0, dst += pitch;
      }
    }
  }

  const Source source_;
  const int64_t height_, width_;
};

}  // namespace
