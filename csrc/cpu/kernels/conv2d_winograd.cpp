// Winograd convolution F(2x2, 3x3), F(4x4, 3x3) and F(4x4, 5x5), forward and backward_input, of stride 1 and dilation 1, for any padding
// and number of groups, in both layouts, in float32; only where the caller allows it (Conv2dShape::allow_winograd), for its error is larger
// than that of a direct sum (docs/kernels/winograd.md has the bound).
//
// Both directions are gather convolutions (conv2d_direct_gather.inl): backward_input is one with rotated, transposed weights. Inputs are
// staged with channels in the lanes and transformed tile by tile, multiplied point by point, and transformed back (_transform, _multiply,
// _run). F(4x4, 3x3) multiplies 36 times for 16 outputs where a direct sum takes 144, F(4x4, 5x5) 64 times for 400; what the transforms
// cost, and which tile fits a map, is weighed in _blocking, per sample.
//
// A transform spreads an infinity or a NaN over its tile and makes NaNs of infinities; padding multiplies, too. So sums are watched, and an
// image that met one that is not finite is computed again by the direct row, alone: the other images keep their bits.
#include "cpu/kernels/conv2d_winograd_run.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {

extern const Conv2dKernel conv2d_forward_direct, conv2d_backward_input_direct;

namespace {

template <Conv2dDirection kDirection>
struct TensorWinograd {
  using T = float;
  using Source = TensorSource<T>;
  template <int kOutputs>
  using Sink = TileTensorSink<T, kOutputs>;
  static constexpr bool kForward = kDirection == Conv2dDirection::forward;
  static const Conv2dKernel& direct_row() { return kForward ? conv2d_forward_direct : conv2d_backward_input_direct; }

  Gather gather() const { return make_gather(kDirection, shape, 0); }
  Source source(const Gather& g) const { return {static_cast<const T*>(kForward ? buffers.input : buffers.grad_output), g.source}; }
  template <int kOutputs>
  Sink<kOutputs> sink(const Gather& g) const {
    return {g, static_cast<T*>(kForward ? buffers.output : buffers.grad_input), false};
  }
  const T* weight() const { return static_cast<const T*>(buffers.weight); }
  const T* bias() const { return static_cast<const T*>(kForward ? buffers.bias : nullptr); }

  size_t exact_bytes(int threads) const { return direct_row().plan(one_image(shape), threads).workspace_bytes; }
  Outcome run_exactly(int64_t n, void* workspace, int threads) const {
    const int64_t input = n * shape.in_channels * shape.in_h * shape.in_w, output = n * shape.out_channels * shape.out_h * shape.out_w;
    Conv2dBuffers image = buffers;
    image.input = advanced<T>(buffers.input, input), image.grad_input = advanced<T>(buffers.grad_input, input);
    image.output = advanced<T>(buffers.output, output), image.grad_output = advanced<T>(buffers.grad_output, output);
    return direct_row().run(one_image(shape), image, workspace, threads);
  }

  const Conv2dShape& shape;
  const Conv2dBuffers& buffers;
};

// A table row's functions.
template <Conv2dDirection kDirection>
struct WinogradRow {
  using Ends = TensorWinograd<kDirection>;
  static Plan plan(const Conv2dShape& s, int threads) {
    return with_tile<float>(kDirection, s, [&](auto tile) { return plan_winograd<tile.kOutputs, tile.kTaps>(Ends{s, {}}, threads); });
  }
  static Outcome run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, int threads) {
    return with_tile<float>(kDirection, s,
                            [&](auto tile) { return run_winograd<tile.kOutputs, tile.kTaps>(Ends{s, b}, workspace, threads); });
  }
};

constexpr Conv2dDirection kForward = Conv2dDirection::forward, kBackwardInput = Conv2dDirection::backward_input;

}  // namespace

extern const Conv2dKernel conv2d_forward_winograd = {CNN_EXT_KERNEL_NAME("conv2d_forward_winograd"),
                                                     Isa::CNN_EXT_ISA,
                                                     kForward,
                                                     winograd_serves<kForward>,
                                                     WinogradRow<kForward>::plan,
                                                     WinogradRow<kForward>::run};
extern const Conv2dKernel conv2d_backward_input_winograd = {CNN_EXT_KERNEL_NAME("conv2d_backward_input_winograd"),
                                                            Isa::CNN_EXT_ISA,
                                                            kBackwardInput,
                                                            winograd_serves<kBackwardInput>,
                                                            WinogradRow<kBackwardInput>::plan,
                                                            WinogradRow<kBackwardInput>::run};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
