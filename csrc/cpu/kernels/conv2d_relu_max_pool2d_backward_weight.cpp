// backward_weight through ReLU (and max pooling): conv2d_backward_weight.inl with a gradient that is made up while it is packed, from the
// pooled gradient and the offsets (or the output), a vector of channels at a time. Both tilings of the plain direction serve here, by the
// same rule.
#include "cpu/kernels/conv2d_backward_weight_direct.inl"
#include "cpu/kernels/conv2d_backward_weight_taps.inl"
#include "cpu/kernels/conv2d_direct_pooled.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

// What BackwardWeight packs, made of the rows or pixels of `Source`.
template <class T, class Source>
struct MadeUpGradient {
  // A vector of channels, one behind the other; rows are written in ascending order and may end a few vectors late.
  static int64_t line_elements(int64_t pixels) { return kLanes<T> * pixels + 4 * kLanes<T>; }

  void pack(const Conv2dShape& s, int64_t n, int64_t channel, int64_t channels, int64_t pixel, int64_t pixels, T* line, T* destination,
            int64_t step) const {
    for (int64_t c = 0; c < channels; c += kLanes<T>) {
      const int count = static_cast<int>(smaller(kLanes<T>, channels - c));
      if (s.layout == Layout::nchw && has_pooling(source.s)) {
        pack_windows(s, n, channel + c, count, pixel / s.out_w, pixels / s.out_w, destination + c, step);
      } else if (s.layout == Layout::nchw) {
        pack_rows(s, n, channel + c, count, pixel / s.out_w, pixels / s.out_w, line, destination + c, step);
      } else {
        pack_pixels_of(s, n, channel + c, count, pixel, pixels, destination + c, step);
      }
    }
  }

  void pack_rows(const Conv2dShape& s, int64_t n, int64_t channel, int channels, int64_t y, int64_t rows, T* line, T* destination,
                 int64_t step) const {
    for (int64_t i = 0; i < channels * rows; ++i) source.row(n, channel + i / rows, y + i % rows, line + i * s.out_w);
    pack_planes(line, rows * s.out_w, channels, rows * s.out_w, destination, step, kLanes<T>);
  }

  // Of 2x2 windows the pooled vectors are transposed, and then become four pixels each.
  void pack_windows(const Conv2dShape& s, int64_t n, int64_t channel, int channels, int64_t y, int64_t rows, T* destination,
                    int64_t step) const {
    constexpr int kV = kLanes<T>;
    const int64_t height = source.s.pooled_h, width = source.s.pooled_w, at = n * source.strides.n + channel * source.strides.c;
    if (2 * width < s.out_w || y + rows > 2 * height) {
      for (int64_t i = 0; i < rows * s.out_w; ++i) store(destination + i * step, Vec<T>{});
    }
    const int64_t end = smaller(height, divide_up(y + rows, 2)) * width;
    int64_t row = y / 2 * 2 - y, column = 0;  // of the window's first pixel in the destination
    for (int64_t first = y / 2 * width; first < end; first += kV) {
      const int64_t count = smaller(kV, end - first);
      Vec<T> grad[kV], offset[kV];
      for (int i = 0; i < kV; ++i) {
        const LaneSet lanes = first_lanes<T>(i < channels ? count : 0);
        const int64_t place = at + i * source.strides.c + first;
        grad[i] = load_lanes(source.grad + place, lanes, Vec<T>{});
        offset[i] = (Vec<T>)load_offsets<T>(source.offsets + place, lanes);
      }
      transpose<T>(grad);
      transpose<T>(offset);
      for (int64_t i = 0; i < count; ++i) {
        T* to = destination + (row * s.out_w + column) * step;
        if (row >= 0) store_chosen(grad[i], offset[i], 0, to, step);
        if (row + 1 < rows) store_chosen(grad[i], offset[i], 2, to + s.out_w * step, step);
        column += 2;
        if (column == 2 * width) column = 0, row += 2;
      }
    }
  }

  // The pixels of a window at taps `tap` and `tap` + 1.
  static void store_chosen(Vec<T> grad, Vec<T> offset, Int<T> tap, T* to, int64_t step) {
    store(to, select(equal((IntVec<T>)offset, IntVec<T>{} + tap), grad, Vec<T>{}));
    store(to + step, select(equal((IntVec<T>)offset, IntVec<T>{} + (tap + 1)), grad, Vec<T>{}));
  }

  void pack_pixels_of(const Conv2dShape& s, int64_t n, int64_t channel, int channels, int64_t pixel, int64_t pixels, T* destination,
                      int64_t step) const {
    for (int64_t i = 0; i < pixels;) {
      const int64_t y = (pixel + i) / s.out_w;
      const auto row = source.pixels(n, channel, y);
      for (int64_t x = pixel + i - y * s.out_w; x < s.out_w && i < pixels; ++x, ++i) store(destination + i * step, row.at(x, channels));
    }
  }

  Ahead<T> ahead(const Conv2dShape&, Range, int64_t, int64_t, int64_t, int64_t) const { return {}; }

  Source source;
};

template <class Tiles>
struct FusedRow {
  using Run = BackwardWeight<float, Tiles, MadeUpGradient<float, FusedGradient<float>>>;

  static Plan plan(const Conv2dReluPoolShape& s, int threads) { return Run(s.conv).plan(threads); }
  static Outcome run(const Conv2dReluPoolShape& s, const Conv2dReluPoolBuffers& b, void* workspace, int threads) {
    return Run(s.conv).run({{s, b}}, static_cast<const float*>(b.input), static_cast<float*>(b.grad_weight), workspace, threads);
  }
};

bool serves(const Conv2dReluPoolShape& s) { return fuses_directly<Conv2dDirection::backward_weight>(s); }
bool accepts(const Conv2dReluPoolShape& s) { return serves(s) && accepts_direct(s.conv); }
bool accepts_taps_of(const Conv2dReluPoolShape& s) { return serves(s) && accepts_taps(s.conv); }

}  // namespace

extern const Conv2dReluPoolKernel conv2d_relu_max_pool2d_backward_weight_taps = {
    CNN_EXT_KERNEL_NAME("conv2d_relu_max_pool2d_backward_weight_taps"),
    Isa::CNN_EXT_ISA,
    Conv2dDirection::backward_weight,
    accepts_taps_of,
    FusedRow<TapTiles>::plan,
    FusedRow<TapTiles>::run};
extern const Conv2dReluPoolKernel conv2d_relu_max_pool2d_backward_weight_direct = {
    CNN_EXT_KERNEL_NAME("conv2d_relu_max_pool2d_backward_weight_direct"),
    Isa::CNN_EXT_ISA,
    Conv2dDirection::backward_weight,
    accepts,
    FusedRow<ChannelTiles>::plan,
    FusedRow<ChannelTiles>::run};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
