// conv2d backward_weight where the padding holds values of the input (PaddingMode other than zeros): as conv2d_backward_weight_direct, with
// the input packed together with its padding, so that every tap sums all outputs. What has few channels is conv2d_backward_weight_taps's,
// and zeros are conv2d_backward_weight_direct's, which does not multiply them.
#include "cpu/kernels/conv2d_backward_weight.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

struct PaddedTiles {
  template <class T>
  static int64_t channels(int vectors) {
    return tile_entries<T>(vectors);
  }
  static bool multiplies_padding(const Conv2dShape& s) {
    const Window all = window(s, {0, s.out_h});
    const bool pads = all.row < 0 || all.column < 0 || all.row + all.rows > s.in_h || all.column + all.columns > s.in_w;
    return pads && s.padding_mode == PaddingMode::zeros;
  }
  static int64_t row_step(const Conv2dShape&) { return 1; }
  static int64_t column_step(const Conv2dShape&) { return 1; }
  static int64_t window_columns(const Conv2dShape& s) { return (s.out_w - 1) * s.stride_w + (s.kernel_w - 1) * s.dilation_w + 1; }

  static Window window(const Conv2dShape& s, Range rows) {
    return {rows.begin * s.stride_h - s.pad_top, (rows.size() - 1) * s.stride_h + (s.kernel_h - 1) * s.dilation_h + 1, -s.pad_left,
            window_columns(s)};
  }

  static int64_t tiles(const Conv2dShape& s) { return s.kernel_h * s.kernel_w; }

  template <class T>
  static void add(const Conv2dShape& s, const PackedPatch<T>& p) {
    const int64_t step = p.vectors * kLanes<T>;
    const int64_t input_row = p.window.columns * p.channels, input_image = p.window.rows * input_row;
    const AddPatch<T> tile = tile_of(T{}, p.vectors, 1, p.channels, p.fetches);
    Patch patch{p.images.size(),        p.rows.size(),           p.columns.size(),
                p.image_pixels * step,  s.out_w * step,          input_image,
                s.stride_h * input_row, s.stride_w * p.channels, 0};
    const T* grad_output =
        p.grad_output + (p.images.begin * p.image_pixels + (p.rows.begin - p.block_row) * s.out_w + p.columns.begin) * step;
    const T* input = p.input + p.images.begin * input_image + (p.rows.begin - p.block_row) * s.stride_h * input_row +
                     p.columns.begin * s.stride_w * p.channels;
    for (int64_t r = 0; r < s.kernel_h; ++r) {
      for (int64_t t = 0; t < s.kernel_w; ++t) {
        p.next.next(patch, grad_output);
        tile(patch, grad_output, input + r * s.dilation_h * input_row + t * s.dilation_w * p.channels,
             p.sums + (r * s.kernel_w + t) * p.channels * step, 0);
      }
    }
  }
};

bool accepts(const Conv2dShape& s) { return s.dtype == DType::float32 || s.dtype == DType::float64; }

}  // namespace

extern const Conv2dKernel conv2d_backward_weight_padded = {CNN_EXT_KERNEL_NAME("conv2d_backward_weight_padded"),
                                                           Isa::CNN_EXT_ISA,
                                                           Conv2dDirection::backward_weight,
                                                           accepts,
                                                           TensorRow<PaddedTiles>::plan,
                                                           TensorRow<PaddedTiles>::run,
                                                           /*adds_bias=*/false,
                                                           /*maps_padding=*/true};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
