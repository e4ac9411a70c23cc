// The source of a task for the matrix unit: [row][column][channel] with whole tiles of channels, zeros outside the source.
#pragma once

#include "cpu/kernels/conv2d_direct_stage.inl"
#include "cpu/simd/half.h"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

constexpr int64_t kTilePoints = 16, kTileOutputs = 16, kTileChannels = 32;
constexpr int64_t kTileElements = 512;  // of a half type

// What is staged of one image for `grid_rows` grid rows, and how grid points are numbered there: the next one of a row is the next number.
struct Staged {
  Staged(const Gather& g, int64_t grid_rows)
      : channel_blocks(g.taps() == 0 ? 0 : (g.channels + kTileChannels - 1) / kTileChannels),
        rows(g.taps() == 0 ? grid_rows * g.h.source_step : window_of(g.h, grid_rows).span),
        cols(g.taps() == 0 ? g.w.count : window_of(g.w, g.w.count).span),
        step_h(g.h.source_step),
        step_w(g.w.source_step) {
    cols = (cols + step_w - 1) / step_w * step_w;
    pixel = channel_blocks * kTileChannels;
    point_pitch = step_w * pixel;
    image_elements = rows * cols * pixel;
  }
  bool is_linear() const { return step_h == 1 && step_w == 1; }
  int64_t row_points() const { return step_h * cols / step_w; }
  int64_t image_points() const { return rows * cols / step_w; }
  int64_t image_bytes() const { return image_elements * static_cast<int64_t>(sizeof(BFloat16)); }
  // Tiles end behind the last point.
  int64_t slack_bytes() const { return 2 * kTilePoints * point_pitch * static_cast<int64_t>(sizeof(BFloat16)) + kVectorBytes; }

  int64_t channel_blocks, rows, cols, step_h, step_w;
  int64_t pixel, point_pitch, image_elements;  // in elements
};

// From a grid point to what the steps [block of channels][tap row][tap column] read.
inline void fill_offsets(const Gather& g, const Staged& staged, int32_t* offsets) {
  const int64_t origin_h = window_of(g.h, 1).tap_origin, origin_w = window_of(g.w, 1).tap_origin;
  for (int64_t block = 0; block < staged.channel_blocks; ++block) {
    for (int64_t r = 0; r < g.h.taps; ++r) {
      for (int64_t s = 0; s < g.w.taps; ++s) {
        const int64_t pixel = (origin_h + r * g.h.tap_step) * staged.cols + origin_w + s * g.w.tap_step;
        *offsets++ = static_cast<int32_t>(pixel * staged.pixel + block * kTileChannels);
      }
    }
  }
}

inline void zero(BFloat16* p, int64_t count) { __builtin_memset(p, 0, static_cast<size_t>(count) * sizeof(BFloat16)); }

// `pixels` neighbours with their channels side by side.
inline void stage_pixels(const BFloat16* src, int64_t src_pixel, int64_t channels, int64_t pixels, int64_t pixel, BFloat16* dst) {
  if (channels == pixel && channels == src_pixel) {
    __builtin_memcpy(dst, src, static_cast<size_t>(pixels * pixel) * sizeof(BFloat16));
    return;
  }
  for (int64_t x = 0; x < pixels; ++x, src += src_pixel, dst += pixel) {
    for (int64_t c = 0; c < pixel; c += kTileChannels) {
      const int64_t count = clamp(channels - c, 0, kTileChannels);
      const __mmask32 mask = count == kTileChannels ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
      _mm512_storeu_si512(dst + c, _mm512_maskz_loadu_epi16(mask, src + c));
    }
  }
}

// A row of planes, transposed by pairs of channels: columns [0, cols), of which those inside are read.
inline void stage_row_of_planes(const BFloat16* row, int64_t plane, int64_t channels, const Inside& inside, int64_t cols, int64_t pixel,
                                BFloat16* dst) {
  constexpr int kV = kLanes<float>;
  for (int64_t c = 0; c < pixel; c += kTileChannels) {
    for (int64_t x = 0; x < cols; x += kV) {
      const int begin = static_cast<int>(inside.begin - x), end = static_cast<int>(inside.end - x);
      const auto column = [&](int64_t channel) {
        return channel < channels ? __builtin_convertvector(bits_between(row + channel * plane + x, begin, end), FloatBits) : FloatBits{};
      };
      Vec<float> pairs[kV];
#pragma GCC unroll 16
      for (int q = 0; q < kV; ++q) pairs[q] = (Vec<float>)(column(c + 2 * q) | column(c + 2 * q + 1) << 16);
      transpose<float>(pairs);
      BFloat16* to = dst + x * pixel + c;
#pragma GCC unroll 16
      for (int i = 0; i < kV; ++i) {
        if (x + i < cols) _mm512_storeu_ps(to + i * pixel, pairs[i]);
      }
    }
  }
}

// What `grid_rows` grid rows from y on read of an image; src: its first channel at row 0, column 0.
inline void stage_image(const Gather& g, const Staged& staged, const BFloat16* src, int64_t y, int64_t grid_rows, BFloat16* dst) {
  if (staged.channel_blocks == 0) return;
  const int64_t first_row = y * g.h.source_step + g.h.source_first - window_of(g.h, 1).tap_origin;
  const int64_t first_col = g.w.source_first - window_of(g.w, 1).tap_origin, row_elements = staged.cols * staged.pixel;
  const Inside cols = inside(first_col, 1, staged.cols, g.w.source_size);
  for (int64_t r = 0; r < window_of(g.h, grid_rows).span; ++r, dst += row_elements) {
    const int64_t source_row = first_row + r;
    if (source_row < 0 || source_row >= g.h.source_size || cols.begin == cols.end) {
      zero(dst, row_elements);
    } else if (g.source.w == 1) {
      stage_row_of_planes(src + source_row * g.source.h + first_col, g.source.c, g.channels, cols, staged.cols, staged.pixel, dst);
    } else {
      zero(dst, cols.begin * staged.pixel);
      stage_pixels(src + source_row * g.source.h + (first_col + cols.begin) * g.source.w, g.source.w, g.channels, cols.end - cols.begin,
                   staged.pixel, dst + cols.begin * staged.pixel);
      zero(dst + cols.end * staged.pixel, (staged.cols - cols.end) * staged.pixel);
    }
  }
}

}  // namespace
}  // namespace cnn_ext::cpu::CNN_EXT_ISA
