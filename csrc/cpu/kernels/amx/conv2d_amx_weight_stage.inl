// What backward_weight reads, staged for the matrix unit: input in planes, where a tap is a shift along the reduction, and grad_output in
// tiles of pairs of neighbouring positions.
//
// A position is a place of a chunk's grid: output (y, x) is y * pitch + x. Between the outputs of two rows lie positions that are none,
// with zeros for their gradients. The zeros that pad a row of the input on the right are those that pad the next one on the left, where
// there are some: 7x7 maps under a padded 3x3 kernel have a pitch of 8. A stride cuts input into phases, a plane for each.
#pragma once

#include "cpu/kernels/conv2d_direct_stage.inl"
#include "cpu/simd/half.h"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

constexpr int64_t kTileSide = 16;         // rows of a tile; columns of a tile of sums
constexpr int64_t kStepPositions = 32;    // that a tile reduces
constexpr int64_t kTileElements = 512;    // of a half type
constexpr int64_t kUnit = 2 * kTileSide;  // channels of a block, on both sides
constexpr int64_t kMostStride = 4;
constexpr int64_t kLineElements = 64;  // zeros behind the last row of what is staged, beyond what is read

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// How the taps of an axis cut input into phases of the stride, those that a tap reads numbered through in ascending order, as staging wants
// its planes.
struct Phases {
  Phases(int64_t taps, int64_t tap_step, int64_t step) : stride(step), dilation(tap_step), span((taps - 1) * tap_step / step) {
    for (int64_t phase = 0; phase < stride; ++phase) number[phase] = -1;
    for (int64_t t = 0; t < taps; ++t) number[t * tap_step % step] = 0;
    for (int64_t phase = 0; phase < stride; ++phase) {
      if (number[phase] == 0) number[phase] = count++;
    }
  }
  int64_t of_tap(int64_t t) const { return number[t * dilation % stride]; }
  int64_t shift(int64_t t) const { return t * dilation / stride; }

  int64_t stride, dilation;
  int64_t span;  // of the taps, in elements of a phase
  int64_t count = 0;
  int64_t number[kMostStride];
};

// Positions of a chunk and the planes that it reads.
struct Grid {
  explicit Grid(const Conv2dShape& s) : h(s.kernel_h, s.dilation_h, s.stride_h), w(s.kernel_w, s.dilation_w, s.stride_w), pitch(0) {
    // Zeros in front of a row of every phase, which may stand for those behind the row before.
    int64_t shared = w.span;
    for (int64_t phase = 0; phase < w.stride; ++phase) {
      if (w.number[phase] >= 0) shared = smaller(shared, (s.pad_left - phase + w.stride - 1) / w.stride);
    }
    const int64_t reach = s.out_w + w.span, read = ceil_div(s.in_w + s.pad_left, w.stride);
    pitch = larger(s.out_w, reach - larger(0, smaller(shared, reach - read)));
  }
  int64_t plane_rows(int64_t rows) const { return rows + h.span; }
  int64_t plane(int64_t rows) const { return plane_rows(rows) * pitch; }
  int64_t planes(int64_t rows) const { return h.count * w.count * plane(rows); }
  int64_t steps(int64_t rows) const { return ceil_div(rows * pitch, kStepPositions); }

  // From a channel of the staged input to the next; an odd number of lines, so that the rows of a tile do not compete for places in the
  // cache.
  int64_t channel_pitch(int64_t rows) const {
    const int64_t most = planes(rows) + w.span + kStepPositions + kLineElements;
    return (ceil_div(most, kStepPositions) | 1) * kStepPositions;
  }
  int64_t tap_offset(int64_t r, int64_t t, int64_t rows) const {
    return (h.of_tap(r) * w.count + w.of_tap(t)) * plane(rows) + h.shift(r) * pitch + w.shift(t);
  }

  Phases h, w;
  int64_t pitch;
};

// Watches for what is not finite.
struct Watch {
  __mmask32 seen = 0;
  __m512i look(__m512i halves) {
    const __m512i magnitude = _mm512_and_si512(halves, _mm512_set1_epi16(0x7fff));
    seen |= _mm512_cmpge_epu16_mask(magnitude, _mm512_set1_epi16(0x7f80));
    return halves;
  }
};

inline __mmask32 lanes_32(int64_t begin, int64_t end) {
  const auto first = [](int64_t count) { return count <= 0 ? 0u : count >= 32 ? ~0u : (1u << count) - 1u; };
  return first(end) & ~first(begin);
}

// Of 64 halves, those at even places.
inline __m512i even_halves() {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const FloatBits first = (FloatBits)lane * 4;
  return (__m512i)(first | (first + 2) << 16);
}

// Part of one row of a phase: elements [first, first + 32) of it, from a row of the input that begins at `row`; those outside are zero.
// column: of element 0 in the input.
inline __m512i load_phase(const BFloat16* row, int64_t column, int64_t stride, int64_t first, const Inside& inside) {
  const BFloat16* from = row + column + first * stride;
  if (stride == 1) return _mm512_maskz_loadu_epi16(lanes_32(inside.begin - first, inside.end - first), from);
  if (stride == 2) {
    const int64_t begin = 2 * (inside.begin - first), end = 2 * (inside.end - first) - 1;
    const __m512i low = _mm512_maskz_loadu_epi16(lanes_32(begin, end), from);
    const __m512i high = _mm512_maskz_loadu_epi16(lanes_32(begin - 32, end - 32), from + 32);
    return _mm512_permutex2var_epi16(low, even_halves(), high);
  }
  alignas(64) uint16_t values[32] = {};
  for (int64_t i = larger(0, inside.begin - first); i < smaller(32, inside.end - first); ++i) values[i] = from[i * stride].bits;
  return _mm512_load_si512(values);
}

// 32 pixels of up to 32 channels: row i of the result is channel i of them.
template <class Pixel>
inline void transpose_pixels(const Pixel& pixel, __m512i (&channels)[32]) {
  Vec<float> even[16], odd[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) even[i] = (Vec<float>)pixel(2 * i), odd[i] = (Vec<float>)pixel(2 * i + 1);
  transpose<float>(even);
  transpose<float>(odd);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    const FloatBits a = (FloatBits)even[i], b = (FloatBits)odd[i];
    channels[2 * i] = (__m512i)((a & 0xffff) | b << 16);
    channels[2 * i + 1] = (__m512i)(a >> 16 | (b & 0xffff0000u));
  }
}

// Rows of a chunk of an image: grid rows [y, y + rows) of a chunk of `chunk_rows` at most.
struct ChunkRows {
  int64_t y, rows, chunk_rows;
};

// Stages `channels` <= 32 channels of the input, the first at `image`. Whole vectors are stored in ascending order: what they write too
// much is overwritten by the next row.
inline void stage_input(const Conv2dShape& s, const Grid& grid, const BFloat16* image, int64_t channels, const ChunkRows& part,
                        BFloat16* staged, Watch& watch) {
  const int64_t channel_pitch = grid.channel_pitch(part.chunk_rows), plane = grid.plane(part.chunk_rows);
  const bool is_nchw = s.layout == Layout::nchw;
  const int64_t row_stride = is_nchw ? s.in_w : s.in_w * s.in_channels, rows = grid.plane_rows(part.rows);
  for (int64_t row_phase = 0; row_phase < grid.h.stride; ++row_phase) {
    if (grid.h.number[row_phase] < 0) continue;
    for (int64_t phase = 0; phase < grid.w.stride; ++phase) {
      if (grid.w.number[phase] < 0) continue;
      BFloat16* to = staged + (grid.h.number[row_phase] * grid.w.count + grid.w.number[phase]) * plane;
      const int64_t column = phase - s.pad_left;
      for (int64_t i = 0; i < rows; ++i, to += grid.pitch) {
        const int64_t y = (part.y + i) * s.stride_h + row_phase - s.pad_top;
        const Inside cols = y < 0 || y >= s.in_h ? Inside{0, 0} : inside(column, s.stride_w, grid.pitch, s.in_w);
        const BFloat16* row = image + (cols.begin < cols.end ? y * row_stride : 0);
        for (int64_t x = 0; x < grid.pitch; x += 32) {
          if (is_nchw) {
            for (int64_t c = 0; c < channels; ++c) {
              const __m512i values = load_phase(row + c * s.in_h * s.in_w, column, s.stride_w, x, cols);
              _mm512_storeu_si512(to + c * channel_pitch + x, watch.look(values));
            }
          } else {
            __m512i values[32];
            transpose_pixels(
                [&](int64_t j) {
                  const bool here = x + j >= cols.begin && x + j < cols.end;
                  const BFloat16* pixel = row + (here ? (column + (x + j) * s.stride_w) * s.in_channels : 0);
                  return watch.look(_mm512_maskz_loadu_epi16(here ? lanes_32(0, channels) : 0, pixel));
                },
                values);
            for (int64_t c = 0; c < channels; ++c) _mm512_storeu_si512(to + c * channel_pitch + x, values[c]);
          }
        }
      }
    }
  }
  const int64_t end = grid.planes(part.chunk_rows);
  for (int64_t c = 0; c < channels; ++c) {
    __builtin_memset(staged + c * channel_pitch + end, 0, static_cast<size_t>(channel_pitch - end) * sizeof(BFloat16));
  }
}

// Stages `channels` <= 32 channels of grad_output, the first at `image`, as two rows of tiles, a tile for each step: [pair of positions]
// [channel][2]. line: scratch of 16 * (steps * 32 + 32) elements.
inline void stage_grad_output(const Conv2dShape& s, const Grid& grid, const BFloat16* image, int64_t channels, const ChunkRows& part,
                              BFloat16* line, BFloat16* tiles, Watch& watch) {
  const int64_t steps = grid.steps(part.rows), half = grid.steps(part.chunk_rows) * kTileElements;
  if (s.layout == Layout::nhwc) {
    const FloatBits lane = (FloatBits)_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i lower = (__m512i)(lane | (lane + 32) << 16), upper = (__m512i)((lane + 16) | (lane + 48) << 16);
    const __mmask32 lanes = lanes_32(0, channels);
    int64_t y = 0, x = 0;
    const auto next = [&] {
      const bool here = y < part.rows && x < s.out_w;
      const BFloat16* pixel = image + (here ? ((part.y + y) * s.out_w + x) * s.out_channels : 0);
      if (++x == grid.pitch) x = 0, ++y;
      return watch.look(_mm512_maskz_loadu_epi16(here ? lanes : 0, pixel));
    };
    for (int64_t pair = 0; pair < steps * kTileSide; ++pair, tiles += kUnit) {
      const __m512i first = next(), second = next();
      _mm512_storeu_si512(tiles, _mm512_permutex2var_epi16(first, lower, second));
      _mm512_storeu_si512(tiles + half, _mm512_permutex2var_epi16(first, upper, second));
    }
    return;
  }
  const int64_t line_pitch = steps * kStepPositions + 32;
  for (int64_t first = 0; first < channels; first += kTileSide, tiles += half) {
    const int64_t count = smaller(kTileSide, channels - first);
    for (int64_t c = 0; c < count; ++c) {
      const BFloat16* plane = image + ((first + c) * s.out_h + part.y) * s.out_w;
      BFloat16* to = line + c * line_pitch;
      for (int64_t y = 0; y < part.rows; ++y) {
        for (int64_t x = 0; x < grid.pitch; x += 32) {
          const __m512i values = _mm512_maskz_loadu_epi16(lanes_32(0, s.out_w - x), plane + y * s.out_w + x);
          _mm512_storeu_si512(to + y * grid.pitch + x, watch.look(values));
        }
      }
      _mm512_storeu_si512(to + part.rows * grid.pitch, _mm512_setzero_si512());
    }
    for (int64_t step = 0; step < steps; ++step) {
      Vec<float> square[16];
#pragma GCC unroll 16
      for (int c = 0; c < 16; ++c) {
        square[c] = c < count ? (Vec<float>)_mm512_loadu_si512(line + c * line_pitch + step * kStepPositions) : Vec<float>{};
      }
      transpose<float>(square);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_storeu_ps(tiles + step * kTileElements + i * kUnit, square[i]);
    }
  }
}

}  // namespace
}  // namespace cnn_ext::cpu::CNN_EXT_ISA
