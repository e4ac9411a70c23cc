// Staging of grouped convolutions: what a task reads of its group, as [block of channels][row][column phase][column][channel of the block],
// with zeros outside the source.
#pragma once

#include "cpu/kernels/conv2d_grouped_plan.inl"
#include "cpu/simd/transpose.h"

namespace {

// The lines of runs of equidistant places, handed out one after the other.
class Lines {
 public:
  struct Loop {
    int64_t count, stride;  // in elements
  };

  Lines() = default;
  Lines(const float* first, Loop outer, Loop middle, Loop run) : outer_(outer), middle_(middle), run_(run), at_(first) {
    runs_left_ = run.count > 0 ? outer.count * middle.count : 0;
  }

  int64_t count() const { return runs_left_ * run_.count - done_; }

  // Appends `wanted` lines, fewer if there are no more; returns the new end.
  const char** take(int64_t wanted, const char** lines) {
    while (wanted > 0 && runs_left_ > 0) {
      const int64_t count = smaller(wanted, run_.count - done_);
      for (int64_t i = 0; i < count; ++i) lines[i] = reinterpret_cast<const char*>(at_ + (done_ + i) * run_.stride);
      lines += count, wanted -= count, done_ += count;
      if (done_ == run_.count) next_run();
    }
    return lines;
  }

 private:
  void next_run() {
    done_ = 0, --runs_left_, at_ += middle_.stride;
    if (++turn_ < middle_.count) return;
    turn_ = 0, at_ += outer_.stride - middle_.count * middle_.stride;
  }

  Loop outer_{}, middle_{}, run_{};
  const float* at_ = nullptr;  // the present run
  int64_t done_ = 0, turn_ = 0, runs_left_ = 0;
};

// Some rows of the channels of a group, of one image.
struct StagedPart {
  const float* source;      // of the group's first channel, row 0
  int64_t first_row, rows;  // rows outside the source are zeros
};

// Where column `col` of the window lies in a staged row.
inline int64_t place_of_col(const Grouping& g, int64_t col) { return (col % g.step_w() * g.cols + col / g.step_w()) * Grouping::kV; }

// Those of the columns of the source; the last pixel of a staged row is for those that nobody reads.
inline void fill_places(const Grouping& g, int32_t* places) {
  for (int64_t x = 0; x < g.gather().w.source_size; ++x) {
    const int64_t col = x - g.reach_w.first;
    const bool is_read = col >= 0 && col < g.step_w() * g.cols;
    places[x] = static_cast<int32_t>(is_read ? place_of_col(g, col) : g.step_w() * g.cols * Grouping::kV);
  }
}

// The columns of a phase that lie inside the source.
inline TapRange cols_inside(const Grouping& g, int64_t phase) {
  const int64_t first = g.reach_w.first + phase, size = g.gather().w.source_size;
  const int64_t begin = first < 0 ? smaller(g.cols, ceil_div(-first, g.step_w())) : 0;
  return {begin, first < size ? larger(begin, smaller(g.cols, ceil_div(size - first, g.step_w()))) : begin};
}

inline void clear_pixels(float* first, int64_t count) {
  for (int64_t i = 0; i < count; ++i) store(first + i * Grouping::kV, Vec<float>{});
}

inline void clear_row(const Grouping& g, bool is_inside, float* row) {
  for (int64_t phase = 0; phase < g.step_w(); ++phase, row += g.cols * Grouping::kV) {
    const TapRange cols = is_inside ? cols_inside(g, phase) : TapRange{g.cols, g.cols};
    clear_pixels(row, cols.begin);
    clear_pixels(row + cols.end * Grouping::kV, g.cols - cols.end);
  }
}

// Pixel by pixel.
inline void stage_pixels(const Grouping& g, const float* source_row, int channels, float* row) {
  const int64_t pixel = g.gather().source.w * g.step_w();
  for (int64_t phase = 0; phase < g.step_w(); ++phase, row += g.cols * Grouping::kV) {
    const TapRange cols = cols_inside(g, phase);
    const float* src = source_row + (g.reach_w.first + phase) * g.gather().source.w;
    if (channels == Grouping::kV) {
      for (int64_t i = cols.begin; i < cols.end; ++i) store(row + i * Grouping::kV, load(src + i * pixel));
    } else {
      for (int64_t i = cols.begin; i < cols.end; ++i) store(row + i * Grouping::kV, load_first(src + i * pixel, channels));
    }
  }
}

// Rows of planes, which are one run: in squares of pixels x channels.
inline void stage_planes(const Grouping& g, const float* source, int64_t rows, int channels, const int32_t* places, float* row) {
  constexpr int kV = Grouping::kV;
  const int64_t width = g.gather().w.source_size, plane = g.gather().source.c, count = rows * width;
  int64_t x = 0;
  for (int64_t p = 0; p < count; p += kV) {
    const int pixels = static_cast<int>(smaller(kV, count - p));
    Vec<float> square[kV];
#pragma GCC unroll 16
    for (int c = 0; c < kV; ++c) square[c] = c < channels ? load_first(source + c * plane + p, pixels) : Vec<float>{};
    transpose<float>(square);
#pragma GCC unroll 16
    for (int i = 0; i < kV; ++i) {
      if (i >= pixels) continue;
      store(row + places[x], square[i]);
      if (++x == width) x = 0, row += g.row_pitch;
    }
  }
}

// The rows of a part that exist.
inline TapRange rows_inside(const Grouping& g, const StagedPart& part) {
  const int64_t size = g.gather().h.source_size;
  const int64_t begin = smaller(part.rows, larger(0, -part.first_row));
  return {begin, larger(begin, smaller(part.rows, size - part.first_row))};
}

__attribute__((noinline)) void stage_part(const Grouping& g, const StagedPart& part, const int32_t* places, float* staged) {
  const Strides& strides = g.gather().source;
  const TapRange rows = rows_inside(g, part);
  for (int64_t b = 0; b < g.blocks; ++b, staged += g.block_pitch()) {
    const int channels = static_cast<int>(smaller(Grouping::kV, g.gather().channels - b * Grouping::kV));
    const float* source = part.source + b * Grouping::kV * strides.c + part.first_row * strides.h;
    for (int64_t r = 0; r < part.rows; ++r) {
      const bool is_inside = r >= rows.begin && r < rows.end;
      clear_row(g, is_inside, staged + r * g.row_pitch);
      if (is_inside && !g.is_nchw()) stage_pixels(g, source + r * strides.h, channels, staged + r * g.row_pitch);
    }
    if (g.is_nchw()) stage_planes(g, source + rows.begin * strides.h, rows.count(), channels, places, staged + rows.begin * g.row_pitch);
  }
}

// The lines that some rows of the planes of a unit or group lie on.
inline Lines lines_of_planes(const float* first, const Strides& strides, int64_t images, int64_t channels, int64_t length) {
  if (length == strides.c) length *= channels, channels = 1;
  return {first, {images, strides.n}, {channels, strides.c}, {ceil_div(length, Grouping::kLine), Grouping::kLine}};
}

// The lines that some images of a part of the source lie on.
inline Lines lines_of_part(const Grouping& g, const StagedPart& part, int64_t images) {
  const Gather& gather = g.gather();
  const Strides& strides = gather.source;
  const TapRange rows = rows_inside(g, part);
  const float* first = part.source + (part.first_row + rows.begin) * strides.h;
  const int64_t width = gather.w.source_size;
  if (g.is_nchw()) return lines_of_planes(first, strides, images, gather.channels, rows.count() * width);
  // Rows follow each other without a gap.
  return {first, {images, strides.n}, {ceil_div(gather.channels, Grouping::kLine), Grouping::kLine}, {rows.count() * width, strides.w}};
}

}  // namespace
