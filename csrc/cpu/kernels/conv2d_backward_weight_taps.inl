// conv2d backward_weight for few input channels per group (first layers, narrow groups), without dilation along the row. The input is
// packed with its padding as [row][column][channel], so that the kernel_w * channels elements that one tap row reads are neighbours: a
// register tile takes up to 14 (6) of them, or two or three whole tap rows where they are short.
//
// The zeros of the padding are multiplied here, which is only right for finite grad_output: a run that finds any other value while packing
// says so, and conv2d_backward_weight_direct, the next row, takes over. It also takes what has more channels or a dilation.
#pragma once

#include "cpu/kernels/conv2d_backward_weight.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

constexpr int64_t kMostChannels = kTileEntries / 2;  // above this, one tap alone fills half a tile

struct TapTiles {
  template <class T>
  static int64_t channels(int) {
    return kMostChannels;
  }
  static int64_t row_step(const Conv2dShape&) { return 1; }
  static int64_t column_step(const Conv2dShape&) { return 1; }
  static int64_t window_columns(const Conv2dShape& s) { return (s.out_w - 1) * s.stride_w + s.kernel_w; }

  // All input rows that these output rows read, padding included.
  static Window window(const Conv2dShape& s, Range rows) {
    return {rows.begin * s.stride_h - s.pad_top, (rows.size() - 1) * s.stride_h + (s.kernel_h - 1) * s.dilation_h + 1, -s.pad_left,
            window_columns(s)};
  }

  static bool multiplies_padding(const Conv2dShape& s) {
    const Window all = window(s, {0, s.out_h});
    return all.row < 0 || all.column < 0 || all.row + all.rows > s.in_h || all.column + all.columns > s.in_w;
  }

  // How the taps are shared out among tiles: a few whole tap rows for each, or parts of one.
  struct Parts {
    int64_t rows, lengths;
  };
  static Parts parts_of(const Conv2dShape& s, int64_t length) {
    const int64_t whole_rows = smaller(kTileRows, kTileEntries / larger(1, length));
    return {whole_rows > 1 ? divide_up(s.kernel_h, whole_rows) : s.kernel_h, divide_up(length, kTileEntries)};
  }
  static int64_t tiles(const Conv2dShape& s) {
    const Parts parts = parts_of(s, s.kernel_w * (s.in_channels / s.groups));
    return parts.rows * parts.lengths;
  }

  template <class T>
  static void add(const Conv2dShape& s, const PackedPatch<T>& p) {
    const int64_t step = p.vectors * kLanes<T>;
    const int64_t input_row = p.window.columns * p.channels, input_image = p.window.rows * input_row;
    const int64_t length = s.kernel_w * p.channels;  // elements of a tap row
    const Parts parts = parts_of(s, length);
    Patch patch{p.images.size(), p.rows.size(),          p.columns.size(),        p.image_pixels * step,   s.out_w * step,
                input_image,     s.stride_h * input_row, s.stride_w * p.channels, s.dilation_h * input_row};
    const T* first_output =
        p.grad_output + (p.images.begin * p.image_pixels + (p.rows.begin - p.block_row) * s.out_w + p.columns.begin) * step;
    const T* first_input = p.input + p.images.begin * input_image + (p.rows.begin - p.block_row) * s.stride_h * input_row +
                           p.columns.begin * s.stride_w * p.channels;
    for (int64_t i = 0; i < parts.rows; ++i) {
      const Range r = part_of(s.kernel_h, parts.rows, i);
      for (int64_t j = 0; j < parts.lengths; ++j) {
        const Range e = part_of(length, parts.lengths, j);
        p.next.next(patch, first_output);
        const AddPatch<T> tile = tile_of(T{}, p.vectors, static_cast<int>(r.size()), static_cast<int>(e.size()), p.fetches);
        tile(patch, first_output, first_input + r.begin * s.dilation_h * input_row + e.begin, p.sums + (r.begin * length + e.begin) * step,
             length * step);
      }
    }
  }
};

inline bool accepts_taps(const Conv2dShape& s) {
  return (s.dtype == DType::float32 || s.dtype == DType::float64) && s.in_channels / s.groups <= kMostChannels && s.kernel_w > 1 &&
         s.dilation_w == 1;
}

}  // namespace
}  // namespace cnn_ext::cpu::CNN_EXT_ISA
