// The source of a task for the matrix unit: [phase][row][column][channel] with whole tiles of channels, zeros outside the source. A float16
// is the sum of two bfloat16, exactly: its upper part and the rest lie in tiles of channels that follow each other.
#pragma once

#include "cpu/kernels/conv2d_direct_stage.inl"
#include "cpu/simd/half.h"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

constexpr int64_t kTilePoints = 16, kTileOutputs = 16, kTileChannels = 32;
constexpr int64_t kTileElements = 512;  // of a half type

// The bfloat16 that make one element.
template <class Element>
constexpr int64_t kParts = 1;
template <>
constexpr int64_t kParts<Float16> = 2;

typedef FloatBits Pairs;  // of elements, or of parts of them: one in the lower half of each lane, the next one in the upper half

// Stores what pairs of elements are made of, the parts `distance` elements apart. Returns the (upper) part.
inline Pairs store_parts(const Pairs& pairs, BFloat16* dst, int64_t, BFloat16) {
  _mm512_storeu_si512(dst, (__m512i)pairs);
  return pairs;
}
inline Pairs store_parts(const Pairs& pairs, BFloat16* dst, int64_t distance, Float16) {
  const Vec<float> first = widened(__builtin_convertvector(pairs & 0xffff, HalfBits), Float16{});
  const Vec<float> second = widened(__builtin_convertvector(pairs >> 16, HalfBits), Float16{});
  const Pairs upper_first = (Pairs)first & 0xffff0000u, upper_second = (Pairs)second & 0xffff0000u;
  const Vec<float> rest_first = first - (Vec<float>)upper_first, rest_second = second - (Vec<float>)upper_second;
  const Pairs upper = upper_first >> 16 | upper_second;
  _mm512_storeu_si512(dst, (__m512i)upper);
  _mm512_storeu_si512(dst + distance, (__m512i)((Pairs)rest_first >> 16 | ((Pairs)rest_second & 0xffff0000u)));
  return upper;
}

// What is staged of `images` images for `grid_rows` grid rows: the source by phases of the stride, each as [image][row][column]. Grid
// points are numbered through as the positions of a phase are: the next one of a row is the next number.
struct Staged {
  static constexpr bool kReadsOn = false;  // whether a point that is kept reads what is not its own, times zeros

  Staged(const Gather& g, int64_t grid_rows, int64_t images, int64_t parts)
      : channel_blocks(g.taps() == 0 ? 0 : (g.channels + kTileChannels - 1) / kTileChannels),
        pixel(channel_blocks * parts * kTileChannels),
        step_h(g.h.source_step),
        step_w(g.w.source_step),
        cols(g.taps() == 0 ? g.w.count * step_w : window_of(g.w, g.w.count).span),
        row_points((cols + step_w - 1) / step_w) {
    const int64_t rows = g.taps() == 0 ? grid_rows * step_h : window_of(g.h, grid_rows).span;
    image_points = (rows + step_h - 1) / step_h * row_points;
    phase_points = images * image_points;
  }
  int64_t bytes() const { return step_h * step_w * phase_points * pixel * static_cast<int64_t>(sizeof(BFloat16)); }
  // Tiles end behind the last point.
  int64_t slack_bytes() const { return 2 * kTilePoints * pixel * static_cast<int64_t>(sizeof(BFloat16)) + kVectorBytes; }
  int64_t steps(const Gather& g) const { return channel_blocks * g.taps(); }
  // Of a row and a column of an image's source window, in elements.
  int64_t place(int64_t image, int64_t row, int64_t col) const {
    const int64_t phase = row % step_h * step_w + col % step_w;
    return (phase * phase_points + image * image_points + row / step_h * row_points + col / step_w) * pixel;
  }
  // The same of a column, from column 0 of its row on.
  int64_t column_place(int64_t col) const { return step_w == 1 ? col * pixel : place(0, 0, col); }

  int64_t channel_blocks;
  int64_t pixel;  // elements
  int64_t step_h, step_w;
  int64_t cols;  // of the source
  int64_t row_points, image_points, phase_points;
};

// From a grid point to what the steps [block of channels][tap row][tap column] read.
inline void fill_offsets(const Gather& g, const Staged& staged, int64_t parts, int32_t* offsets) {
  const int64_t origin_h = window_of(g.h, 1).tap_origin, origin_w = window_of(g.w, 1).tap_origin;
  for (int64_t block = 0; block < staged.channel_blocks; ++block) {
    for (int64_t r = 0; r < g.h.taps; ++r) {
      for (int64_t s = 0; s < g.w.taps; ++s) {
        const int64_t tap = staged.place(0, origin_h + r * g.h.tap_step, origin_w + s * g.w.tap_step);
        *offsets++ = static_cast<int32_t>(tap + block * parts * kTileChannels);
      }
    }
  }
}

inline void zero(BFloat16* p, int64_t count) { __builtin_memset(p, 0, static_cast<size_t>(count) * sizeof(BFloat16)); }

// Columns [begin, end) of a row with the channels of each side by side; src: column 0.
template <class Element>
inline void stage_pixels(const Element* src, int64_t src_pixel, int64_t channels, int64_t begin, int64_t end, const Staged& staged,
                         BFloat16* dst) {
  if (kParts<Element> == 1 && staged.step_w == 1 && channels == staged.pixel && channels == src_pixel) {
    __builtin_memcpy(dst + begin * channels, src + begin * channels, static_cast<size_t>((end - begin) * channels) * sizeof(BFloat16));
    return;
  }
  for (int64_t x = begin; x < end; ++x) {
    const Element* from = src + x * src_pixel;
    BFloat16* to = dst + staged.column_place(x);
    for (int64_t c = 0; c < channels; c += kTileChannels, to += kParts<Element> * kTileChannels) {
      const int64_t count = clamp(channels - c, 0, kTileChannels);
      const __mmask32 mask = count == kTileChannels ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
      store_parts((Pairs)_mm512_maskz_loadu_epi16(mask, from + c), to, kTileChannels, Element{});
    }
  }
}

inline void zero_columns(int64_t begin, int64_t end, const Staged& staged, BFloat16* dst) {
  if (staged.step_w == 1) return zero(dst + begin * staged.pixel, (end - begin) * staged.pixel);
  for (int64_t x = begin; x < end; ++x) zero(dst + staged.column_place(x), staged.pixel);
}

// A row of planes, transposed by pairs of channels: all columns, of which those inside are read.
template <class Element>
inline void stage_row_of_planes(const Element* row, int64_t plane, int64_t channels, const Inside& inside, const Staged& staged,
                                BFloat16* dst) {
  constexpr int kV = kLanes<float>;
  for (int64_t c = 0; c < channels; c += kTileChannels, dst += kParts<Element> * kTileChannels) {
    for (int64_t x = 0; x < staged.cols; x += kV) {
      const int begin = static_cast<int>(inside.begin - x), end = static_cast<int>(inside.end - x);
      const auto column = [&](int64_t channel) {
        return channel < channels ? __builtin_convertvector(bits_between(row + channel * plane + x, begin, end), FloatBits) : FloatBits{};
      };
      Vec<float> pairs[kV];
#pragma GCC unroll 16
      for (int q = 0; q < kV; ++q) pairs[q] = (Vec<float>)(column(c + 2 * q) | column(c + 2 * q + 1) << 16);
      transpose<float>(pairs);
#pragma GCC unroll 16
      for (int i = 0; i < kV; ++i) {
        if (x + i < staged.cols) store_parts((Pairs)pairs[i], dst + staged.column_place(x + i), kTileChannels, Element{});
      }
    }
  }
}

// What `grid_rows` grid rows from y on read of an image, the `image`-th that is staged; src: its first channel at row 0, column 0. False:
// the image has to be computed in another way.
template <class Element>
inline bool stage_image(const Gather& g, const Staged& staged, const Element* src, int64_t image, int64_t y, int64_t grid_rows,
                        BFloat16* dst) {
  if (staged.channel_blocks == 0) return true;
  const int64_t first_row = y * g.h.source_step + g.h.source_first - window_of(g.h, 1).tap_origin;
  const int64_t first_col = g.w.source_first - window_of(g.w, 1).tap_origin;
  const Inside cols = inside(first_col, 1, staged.cols, g.w.source_size);
  for (int64_t r = 0; r < window_of(g.h, grid_rows).span; ++r) {
    if (!is_read(g.h, grid_rows, r)) continue;
    const int64_t source_row = first_row + r;
    BFloat16* const to = dst + staged.place(image, r, 0);
    if (source_row < 0 || source_row >= g.h.source_size || cols.begin == cols.end) {
      zero_columns(0, staged.cols, staged, to);
    } else if (g.source.w == 1) {
      stage_row_of_planes(src + source_row * g.source.h + first_col, g.source.c, g.channels, cols, staged, to);
    } else {
      zero_columns(0, cols.begin, staged, to);
      stage_pixels(src + source_row * g.source.h + first_col * g.source.w, g.source.w, g.channels, cols.begin, cols.end, staged, to);
      zero_columns(cols.end, staged.cols, staged, to);
    }
  }
  return true;
}

}  // namespace
}  // namespace cnn_ext::cpu::CNN_EXT_ISA
