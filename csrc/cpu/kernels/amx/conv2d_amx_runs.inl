// The source of a task and the weights for sums over few channels. The source is [phase of the rows][row][column][channel] with nothing
// between its elements: what the taps of a row read is one run of neighbours, which is cut into steps of 32. A step at the end of a run
// reads on into what follows it, where the weights are zeros. So that none of that is an infinity or a NaN, elements that are not finite
// are staged as zeros, and staging says that it met some.
#pragma once

#include "cpu/kernels/amx/conv2d_amx_stage.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

constexpr int64_t kMostRunChannels = kTileChannels - 1;

// What is staged of `images` images for `grid_rows` grid rows. Grid points are numbered through as those of Staged are; the next one of a
// row is step_w columns further.
struct StagedRuns {
  static constexpr bool kReadsOn = true;

  StagedRuns(const Gather& g, int64_t grid_rows, int64_t images, int64_t)
      : pixel(g.w.source_step * g.channels),
        step_h(g.h.source_step),
        row_points((window_of(g.w, g.w.count).span - 1) / g.w.source_step + 1) {
    image_points = ((window_of(g.h, grid_rows).span - 1) / step_h + 1) * row_points;
    phase_points = images * image_points;
    const bool are_neighbours = g.w.tap_step * g.w.tap_step == 1;
    run_taps = are_neighbours ? g.w.taps : 1;
    row_runs = are_neighbours ? 1 : g.w.taps;
    run_steps = (run_taps * g.channels + kTileChannels - 1) / kTileChannels;
  }
  int64_t bytes() const { return step_h * phase_points * pixel * static_cast<int64_t>(sizeof(BFloat16)); }
  // Tiles and steps end behind the last point.
  int64_t slack_bytes() const {
    return (2 * kTilePoints * pixel + run_steps * kTileChannels) * static_cast<int64_t>(sizeof(BFloat16)) + kVectorBytes;
  }
  int64_t steps(const Gather& g) const { return g.h.taps * row_runs * run_steps; }
  // Of a row of an image's source window, in elements.
  int64_t place(int64_t image, int64_t row) const {
    return (row % step_h * phase_points + image * image_points + row / step_h * row_points) * pixel;
  }
  // The tap column that run `run` reads at its position `at`.
  int64_t tap_column(const Gather& g, int64_t run, int64_t at) const {
    return row_runs > 1 ? run : g.w.tap_step < 0 ? g.w.taps - 1 - at : at;
  }

  int64_t pixel;  // elements from a grid point to the next
  int64_t step_h;
  int64_t row_points, image_points, phase_points;
  int64_t run_taps, row_runs, run_steps;  // taps of a run, runs of a tap row, steps of a run
};

// From a grid point to what the steps [tap row][run][step of it] read.
inline void fill_offsets(const Gather& g, const StagedRuns& staged, int64_t, int32_t* offsets) {
  const int64_t origin_h = window_of(g.h, 1).tap_origin, origin_w = window_of(g.w, 1).tap_origin;
  for (int64_t r = 0; r < g.h.taps; ++r) {
    for (int64_t run = 0; run < staged.row_runs; ++run) {
      const int64_t column = origin_w + staged.tap_column(g, run, 0) * g.w.tap_step;
      const int64_t first = staged.place(0, origin_h + r * g.h.tap_step) + column * g.channels;
      for (int64_t i = 0; i < staged.run_steps; ++i) *offsets++ = static_cast<int32_t>(first + i * kTileChannels);
    }
  }
}

inline __mmask32 first_elements(int64_t count) {
  return count >= kTileChannels ? ~__mmask32{0} : count <= 0 ? 0 : (__mmask32{1} << count) - 1;
}

// Puts zeros for what is not finite, and remembers whether it did.
struct Finite {
  __m512i operator()(__m512i halves) {
    const __m512i magnitude = _mm512_and_si512(halves, _mm512_set1_epi16(0x7fff));
    const __mmask32 finite = _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(0x7f80));
    others |= ~finite;
    return _mm512_maskz_mov_epi16(finite, halves);
  }
  __mmask32 others = 0;
};

// How 32 columns of planes become pixels: vector i of them has of channel c the lanes of_channel[i][c], from the columns column[i].
struct Interleaving {
  explicit Interleaving(int64_t channels) {
    alignas(64) uint16_t columns[kTileChannels];
    for (int64_t i = 0; i < channels; ++i) {
      for (int64_t c = 0; c < channels; ++c) of_channel[i][c] = 0;
      for (int64_t lane = 0; lane < kTileChannels; ++lane) {
        const int64_t element = i * kTileChannels + lane;
        columns[lane] = static_cast<uint16_t>(element / channels);
        of_channel[i][element % channels] |= __mmask32{1} << lane;
      }
      column[i] = _mm512_load_si512(columns);
    }
  }
  __m512i column[kMostRunChannels];
  __mmask32 of_channel[kMostRunChannels][kMostRunChannels];
};

// A row of planes as `length` elements, of which the columns inside are read; row: column 0 of the first plane.
inline void stage_run_of_planes(const BFloat16* row, int64_t plane, int64_t channels, const Inside& inside, const Interleaving& order,
                                int64_t length, Finite& finite, BFloat16* dst) {
  for (int64_t x = 0; x * channels < length; x += kTileChannels) {
    const __mmask32 columns = first_elements(inside.end - x) & ~first_elements(inside.begin - x);
    __m512i planes[kMostRunChannels];
    for (int64_t c = 0; c < channels; ++c) planes[c] = finite(_mm512_maskz_loadu_epi16(columns, row + c * plane + x));
    for (int64_t i = 0; i < channels; ++i) {
      __m512i pixels = _mm512_setzero_si512();
      for (int64_t c = 0; c < channels; ++c) {
        pixels = _mm512_mask_permutexvar_epi16(pixels, order.of_channel[i][c], order.column[i], planes[c]);
      }
      const int64_t at = x * channels + i * kTileChannels;
      _mm512_mask_storeu_epi16(dst + at, first_elements(length - at), pixels);
    }
  }
}

// Neighbours [begin, end) of a row, the others of its `length` zero; row: element 0.
inline void stage_run(const BFloat16* row, int64_t begin, int64_t end, int64_t length, Finite& finite, BFloat16* dst) {
  zero(dst, begin);
  for (int64_t i = begin; i < end; i += kTileChannels) {
    const __mmask32 mask = first_elements(end - i);
    _mm512_mask_storeu_epi16(dst + i, mask, finite(_mm512_maskz_loadu_epi16(mask, row + i)));
  }
  zero(dst + end, length - end);
}

// As the other one. False: some of it is not finite.
inline bool stage_image(const Gather& g, const StagedRuns& staged, const BFloat16* src, int64_t image, int64_t y, int64_t grid_rows,
                        BFloat16* dst) {
  if (g.taps() == 0) return true;
  const int64_t first_row = y * g.h.source_step + g.h.source_first - window_of(g.h, 1).tap_origin;
  const int64_t first_col = g.w.source_first - window_of(g.w, 1).tap_origin;
  const int64_t length = staged.row_points * staged.pixel;
  const Inside cols = inside(first_col, 1, staged.row_points * g.w.source_step, g.w.source_size);
  const Interleaving order(g.source.w == 1 ? g.channels : 0);
  Finite finite;
  for (int64_t r = 0; r < window_of(g.h, grid_rows).span; ++r) {
    if (!is_read(g.h, grid_rows, r)) continue;
    const int64_t source_row = first_row + r;
    BFloat16* const to = dst + staged.place(image, r);
    const BFloat16* const row = src + source_row * g.source.h + first_col * g.source.w;
    if (source_row < 0 || source_row >= g.h.source_size || cols.begin == cols.end) {
      zero(to, length);
    } else if (g.source.w == 1) {
      stage_run_of_planes(row, g.source.c, g.channels, cols, order, length, finite, to);
    } else if (g.source.w == g.channels) {
      stage_run(row, cols.begin * g.channels, cols.end * g.channels, length, finite, to);
    } else {
      zero(to, cols.begin * g.channels);
      for (int64_t x = cols.begin; x < cols.end; ++x) {
        stage_run(row + x * g.source.w, 0, g.channels, g.channels, finite, to + x * g.channels);
      }
      zero(to + cols.end * g.channels, length - cols.end * g.channels);
    }
  }
  return finite.others == 0;
}

// The weights of a unit of outputs: [tap row][run][step of it][half of the outputs], in tiles as the other one's.
inline bool pack_unit(const Gather& g, const StagedRuns& staged, const BFloat16* src, int64_t outputs, BFloat16* dst) {
  bool finite = true;
  zero(dst, staged.steps(g) * 2 * kTileElements);
  for (int64_t r = 0; r < g.h.taps; ++r) {
    for (int64_t run = 0; run < staged.row_runs; ++run, dst += staged.run_steps * 2 * kTileElements) {
      for (int64_t k = 0; k < staged.run_taps * g.channels; ++k) {
        const int64_t tap = staged.tap_column(g, run, k / g.channels);
        const BFloat16* from = src + k % g.channels * g.weight_channel + (g.h.kernel_first + r * g.h.kernel_step) * g.weight_h +
                               (g.w.kernel_first + tap * g.w.kernel_step) * g.weight_w;
        BFloat16* const to = dst + k / kTileChannels * 2 * kTileElements + k % kTileChannels / 2 * 2 * kTileOutputs + k % 2;
        for (int64_t o = 0; o < outputs; ++o, from += g.weight_output) {
          to[o / kTileOutputs * kTileElements + o % kTileOutputs * 2] = *from;
          finite &= (from->bits & 0x7fff) < 0x7f80;
        }
      }
    }
  }
  return finite;
}

}  // namespace
}  // namespace cnn_ext::cpu::CNN_EXT_ISA
