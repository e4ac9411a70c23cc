// backward_input of a layer that cuts its input into patches (stride = kernel, no padding: patch embeddings and downsampling). Every output
// position has a patch of grad_input to itself, so a patch is a product: kernel_h * kernel_w * channels elements, in the order of the
// weight, from all channels of one position of grad_output.
//
// That is a gather convolution of one tap (conv2d_direct_run.inl) with the elements of a patch for output channels. grad_output is staged
// once instead of once for each of the stride_h * stride_w phases that conv2d_direct would make of it, and grad_input is written in runs of
// neighbours (PatchSink) instead of every stride-th element. Patches must tile the input, and the weight lie in the layout of the
// activations.
#include "cpu/kernels/conv2d_direct_gathers.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

bool accepts(const Conv2dShape& s) {
  const bool tiles = s.stride_h == s.kernel_h && s.stride_w == s.kernel_w && s.pad_top == 0 && s.pad_left == 0 && s.dilation_h == 1 &&
                     s.dilation_w == 1 && s.in_h == s.out_h * s.kernel_h && s.in_w == s.out_w * s.kernel_w;
  return (s.dtype == DType::float32 || s.dtype == DType::float64) && tiles && s.groups == 1 && s.kernel_h * s.kernel_w > 1 &&
         s.weight_layout == s.layout;
}

Axis patch_axis(int64_t count) { return {count, 0, 1, count, 0, 1, 1, 1, 0, 1, PaddingMode::zeros, 0, 0, false}; }

Gather make_patch_gather(const Conv2dShape& s) {
  Gather g{};
  g.batch = s.batch, g.groups = 1;
  g.channels = s.out_channels, g.outputs = s.in_channels * s.kernel_h * s.kernel_w;
  g.h = patch_axis(s.out_h), g.w = patch_axis(s.out_w);
  cut_anywhere(g);
  g.source = dense_strides(s.layout, s.out_channels, s.out_h, s.out_w);
  g.weight_output = 1, g.weight_channel = g.outputs, g.weight_h = g.weight_w = g.outputs;
  return g;
}

// Whether runs of two elements are transposed as pairs. (AVX-512 stores them one by one.)
template <class T>
constexpr bool kTransposesPairs = sizeof(T) == sizeof(float) && kVectorBytes == 32;

// Takes [image][row][column][element of the patch] and writes the elements where they belong: in runs that are neighbours in grad_input as
// in the weight, kernel_w of them, or kernel_w * in_channels in nhwc. Runs of neighbouring patches follow each other.
template <class T>
struct PatchSink {
  static constexpr bool kTakesUnits = true;
  static constexpr bool relu = false;

  void write(const UnitSums<T>& unit, T*) const {
    if constexpr (kTransposesPairs<T>) {
      if (shape.layout == Layout::nchw && shape.kernel_w == 2) return write_pairs(unit);
    }
    const bool nchw = shape.layout == Layout::nchw;
    const int64_t run = shape.kernel_w * (nchw ? 1 : shape.in_channels), row = shape.in_w * (nchw ? 1 : shape.in_channels);
    const int64_t end = unit.channel + unit.outputs;
    for (int64_t first = unit.channel, next = 0; first < end; first = next) {
      next = smaller(end, (first / run + 1) * run);
      const int64_t r = first / run % shape.kernel_h, channel = first / run / shape.kernel_h, channels = nchw ? shape.in_channels : 1;
      for (int64_t image = 0; image < unit.images; ++image) {
        const T* sums = unit.sums + image * unit.rows * unit.cols * unit.pitch + first - unit.channel;
        T* plane = grad_input + ((unit.n + image) * channels + channel) * shape.in_h * row;
        for (int64_t y = 0; y < unit.rows; ++y, sums += unit.cols * unit.pitch) {
          write_row(sums, unit, plane + ((unit.y + y) * shape.kernel_h + r) * row + unit.x * run + first % run, run, next - first);
        }
      }
    }
  }

  T* grad_input;
  Conv2dShape shape;

 private:
  // Runs of two elements are moved as one of twice the size: as many rows of grad_input as a vector has pairs are written at once, from
  // squares of pairs that are transposed in registers.
  void write_pairs(const UnitSums<T>& unit) const {
    constexpr int kPairs = kLanes<double>;
    const int64_t plane = shape.in_h * shape.in_w;
    for (int64_t image = 0; image < unit.images; ++image) {
      for (int64_t first = 0; first < unit.outputs; first += 2 * kPairs) {
        const int pairs = static_cast<int>(smaller(unit.outputs - first, 2 * kPairs) / 2);
        T* rows[kPairs];  // of grad_input, at the first of the unit's patches
        for (int i = 0; i < pairs; ++i) {
          const int64_t pair = (unit.channel + first) / 2 + i, channel = pair / shape.kernel_h, r = pair % shape.kernel_h;
          rows[i] = grad_input + ((unit.n + image) * shape.in_channels + channel) * plane + (unit.y * shape.kernel_h + r) * shape.in_w +
                    2 * unit.x;
        }
        const T* sums = unit.sums + image * unit.rows * unit.cols * unit.pitch + first;
        for (int64_t y = 0; y < unit.rows; ++y, sums += unit.cols * unit.pitch) {
          write_rows_of_pairs(sums, unit, pairs, y * shape.kernel_h * shape.in_w, rows);
        }
      }
    }
  }

  static void write_rows_of_pairs(const T* sums, const UnitSums<T>& unit, int pairs, int64_t offset, T* const* rows) {
    constexpr int kPairs = kLanes<double>;
    for (int64_t x = 0; x < unit.cols; x += kPairs) {
      const int points = static_cast<int>(smaller(unit.cols - x, kPairs));
      Vec<double> square[kPairs];
#pragma GCC unroll 4
      for (int i = 0; i < kPairs; ++i) square[i] = i < points ? (Vec<double>)load(sums + (x + i) * unit.pitch) : Vec<double>{};
      transpose<double>(square);
#pragma GCC unroll 4
      for (int i = 0; i < kPairs; ++i) {
        if (i < pairs) store_first(rows[i] + offset + 2 * x, (Vec<T>)square[i], 2 * points);
      }
    }
  }

  static void write_row(const T* sums, const UnitSums<T>& unit, T* dst, int64_t run, int64_t count) {
    for (int64_t x = 0; x < unit.cols; ++x, sums += unit.pitch, dst += run) {
      for (int64_t i = 0; i < count; i += kLanes<T>) store_first(dst + i, load(sums + i), static_cast<int>(smaller(count - i, kLanes<T>)));
    }
  }
};

template <class T>
struct PatchEnds {
  using Source = TensorSource<T>;
  using Sink = PatchSink<T>;

  int64_t count() const { return 1; }
  Gather gather(int64_t) const { return make_patch_gather(shape); }
  Source source(const Gather& g) const { return {static_cast<const T*>(buffers.grad_output), g.source}; }
  Sink sink(const Gather&) const { return {static_cast<T*>(buffers.grad_input), shape}; }

  const Conv2dShape& shape;
  const Conv2dBuffers& buffers;
};

template <class T>
Outcome run_patches(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, int threads) {
  const T* none = nullptr;
  return run_gathers<T, ChannelTile<T>>(PatchEnds<T>{s, b}, static_cast<const T*>(b.weight), none, {}, workspace, threads);
}

bool is_float(const Conv2dShape& s) { return s.dtype == DType::float32; }

Plan plan(const Conv2dShape& s, int threads) {
  return is_float(s) ? plan_gathers<float, ChannelTile<float>>(PatchEnds<float>{s, {}}, threads)
                     : plan_gathers<double, ChannelTile<double>>(PatchEnds<double>{s, {}}, threads);
}

Outcome run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, int threads) {
  return (is_float(s) ? run_patches<float> : run_patches<double>)(s, b, workspace, threads);
}

}  // namespace

extern const Conv2dKernel conv2d_backward_input_patches = {
    CNN_EXT_KERNEL_NAME("conv2d_backward_input_patches"), Isa::CNN_EXT_ISA, Conv2dDirection::backward_input, accepts, plan, run};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
