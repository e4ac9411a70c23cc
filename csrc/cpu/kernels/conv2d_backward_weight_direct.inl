// conv2d backward_weight for any shape. One register tile holds the sums of one tap for 2 vectors of output channels times up to 14 (6)
// input channels, which the packed input has side by side: an element is read at a constant distance from one pointer, for any stride and
// dilation, and the channels are cut into blocks of equal size, so that no part of a tile idles.
//
// For each tap only the outputs whose input element exists are summed: nothing is staged as zero, padding never multiplies, and small maps
// are spared the work (5x5 on 14x14: 16 % less). Not for few input channels, whose tiles would be too small to hide the latency of the
// additions: conv2d_backward_weight_taps takes those first.
#pragma once

#include "cpu/kernels/conv2d_backward_weight.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

// Positions from `begin` on.
struct Steps {
  int64_t begin, count;
};

// The positions first, first + step, ... that are neither negative nor past the end.
inline Steps inside_from(int64_t first, int64_t end, int64_t step) {
  const int64_t begin = first < 0 ? first + divide_up(-first, step) * step : first;
  return {begin, begin < end ? divide_up(end - begin, step) : 0};
}

struct ChannelTiles {
  template <class T>
  static int64_t channels(int vectors) {
    return tile_entries<T>(vectors);
  }
  static bool multiplies_padding(const Conv2dShape&) { return false; }
  // What a single tap strides over is not packed.
  static int64_t row_step(const Conv2dShape& s) { return s.kernel_h == 1 ? s.stride_h : 1; }
  static int64_t column_step(const Conv2dShape& s) { return s.kernel_w == 1 ? s.stride_w : 1; }
  static int64_t window_columns(const Conv2dShape& s) { return inside_from(-s.pad_left, s.in_w, column_step(s)).count; }

  // The input rows that some tap of these output rows reads, those outside the input left out.
  static Window window(const Conv2dShape& s, Range rows) {
    const int64_t first = rows.begin * s.stride_h - s.pad_top;
    const int64_t last = (rows.end - 1) * s.stride_h - s.pad_top + (s.kernel_h - 1) * s.dilation_h;
    const Steps row = inside_from(first, smaller(s.in_h, last + 1), row_step(s));
    const Steps column = inside_from(-s.pad_left, s.in_w, column_step(s));
    return {row.begin, row.count, column.begin, column.count, row_step(s), column_step(s)};
  }

  static int64_t tiles(const Conv2dShape& s) { return s.kernel_h * s.kernel_w; }

  template <class T>
  static void add(const Conv2dShape& s, const PackedPatch<T>& p) {
    const int64_t step = p.vectors * kLanes<T>;
    const int64_t input_row = p.window.columns * p.channels, input_image = p.window.rows * input_row;
    const AddPatch<T> tile = tile_of(T{}, p.vectors, 1, p.channels, p.fetches);
    const int64_t row_step = p.window.row_step, column_step = p.window.column_step;
    Patch patch{p.images.size(),
                0,
                0,
                p.image_pixels * step,
                s.out_w * step,
                input_image,
                s.stride_h / row_step * input_row,
                s.stride_w / column_step * p.channels,
                0};
    for (int64_t r = 0; r < s.kernel_h; ++r) {
      const Range oh = common(p.rows, inside(s.out_h, s.in_h, s.stride_h, s.pad_top, r * s.dilation_h));
      const int64_t ih = (oh.begin * s.stride_h - s.pad_top + r * s.dilation_h - p.window.row) / row_step;
      for (int64_t t = 0; t < s.kernel_w; ++t) {
        const Range ow = common(p.columns, inside(s.out_w, s.in_w, s.stride_w, s.pad_left, t * s.dilation_w));
        if (oh.size() <= 0 || ow.size() <= 0) continue;
        const int64_t iw = (ow.begin * s.stride_w - s.pad_left + t * s.dilation_w - p.window.column) / column_step;
        patch.rows = oh.size(), patch.columns = ow.size();
        p.next.next(patch, p.grad_output);
        tile(patch, p.grad_output + (p.images.begin * p.image_pixels + (oh.begin - p.block_row) * s.out_w + ow.begin) * step,
             p.input + p.images.begin * input_image + ih * input_row + iw * p.channels, p.sums + (r * s.kernel_w + t) * p.channels * step,
             0);
      }
    }
  }
};

inline bool accepts_direct(const Conv2dShape& s) { return s.dtype == DType::float32 || s.dtype == DType::float64; }

}  // namespace
}  // namespace cnn_ext::cpu::CNN_EXT_ISA
