// Winograd convolution F(2x2, 3x3), F(4x4, 3x3) and F(4x4, 5x5), forward and backward_input, of stride 1 and dilation 1, for any padding
// and number of groups, in both layouts; only where the caller allows it (Conv2dShape::allow_winograd), for its error is larger than that
// of a direct sum (docs/kernels/winograd.md has the bound).
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

Conv2dShape one_image(Conv2dShape s) {
  s.batch = 1;
  return s;
}

const Conv2dKernel& direct_row(Conv2dDirection direction) {
  return direction == Conv2dDirection::forward ? conv2d_forward_direct : conv2d_backward_input_direct;
}

template <class T>
Outcome run_directly(Conv2dDirection direction, const Conv2dShape& s, const Conv2dBuffers& buffers, int64_t n, void* workspace,
                     int threads) {
  const int64_t input = n * s.in_channels * s.in_h * s.in_w, output = n * s.out_channels * s.out_h * s.out_w;
  Conv2dBuffers image = buffers;
  if (direction == Conv2dDirection::forward) {
    image.input = static_cast<const T*>(buffers.input) + input, image.output = static_cast<T*>(buffers.output) + output;
  } else {
    image.grad_output = static_cast<const T*>(buffers.grad_output) + output, image.grad_input = static_cast<T*>(buffers.grad_input) + input;
  }
  return direct_row(direction).run(one_image(s), image, workspace, threads);
}

template <class T, int kOutputs, int kTaps>
struct Tiled {
  static Plan plan(Conv2dDirection direction, const Conv2dShape& s, int threads) {
    const Gather g = make_gather(direction, s, 0);
    const WinogradBlocking b = make_winograd_blocking<T, kOutputs, kTaps>(g, threads);
    const size_t exact = suspects_bytes(s.batch) + direct_row(direction).plan(one_image(s), threads).workspace_bytes;
    const size_t own = static_cast<size_t>(make_winograd_scratch<T, kOutputs, kTaps>(g, b).total(threads));
    return {kUnitVectors * kLanes<T>, kProductTiles * kOutputs * kOutputs, g.groups * (b.by_units ? b.units : b.blocks.count()),
            own > exact ? own : exact};
  }

  static Outcome run(Conv2dDirection direction, const Conv2dShape& s, const Conv2dBuffers& buffers, void* workspace, int threads) {
    const bool forward = direction == Conv2dDirection::forward;
    const Gather g = make_gather(direction, s, 0);
    const T* const source = static_cast<const T*>(forward ? buffers.input : buffers.grad_output);
    T* const dest = static_cast<T*>(forward ? buffers.output : buffers.grad_input);
    const T* const bias = static_cast<const T*>(forward ? buffers.bias : nullptr);
    const WinogradRun<T, kOutputs, kTaps> winograd(g, source, static_cast<const T*>(buffers.weight), bias, dest, workspace, threads);
    if (g.is_empty()) return Outcome::done;
    winograd.run();
    char* const exact = static_cast<char*>(workspace) + suspects_bytes(s.batch);
    for (int64_t n = 0; n < s.batch; ++n) {
      if (winograd.suspects()[n] == 0) continue;
      if (run_directly<T>(direction, s, buffers, n, exact, threads) == Outcome::not_finite) return Outcome::not_finite;
    }
    return Outcome::done;
  }
};

// use(Tiled<...>) with the tile of a shape.
template <class Use>
auto with_tile(Conv2dDirection direction, const Conv2dShape& s, const Use& use) {
  const Gather g = make_gather(direction, s, 0);
  const auto with_type = [&](auto zero) {
    using T = decltype(zero);
    if (s.kernel_h == 5) return use(Tiled<T, 4, 5>{});
    return tile_outputs<T>(g) == 4 ? use(Tiled<T, 4, 3>{}) : use(Tiled<T, 2, 3>{});
  };
  return s.dtype == DType::float32 ? with_type(0.0f) : with_type(0.0);
}

template <Conv2dDirection kDirection>
Plan plan(const Conv2dShape& s, int threads) {
  return with_tile(kDirection, s, [&](auto tiled) { return tiled.plan(kDirection, s, threads); });
}

template <Conv2dDirection kDirection>
Outcome run(const Conv2dShape& s, const Conv2dBuffers& buffers, void* workspace, int threads) {
  return with_tile(kDirection, s, [&](auto tiled) { return tiled.run(kDirection, s, buffers, workspace, threads); });
}

constexpr Conv2dDirection kForward = Conv2dDirection::forward, kBackwardInput = Conv2dDirection::backward_input;

}  // namespace

extern const Conv2dKernel conv2d_forward_winograd = {
    CNN_EXT_KERNEL_NAME("conv2d_forward_winograd"), Isa::CNN_EXT_ISA, kForward, winograd_serves<kForward>, plan<kForward>, run<kForward>};
extern const Conv2dKernel conv2d_backward_input_winograd = {CNN_EXT_KERNEL_NAME("conv2d_backward_input_winograd"),
                                                            Isa::CNN_EXT_ISA,
                                                            kBackwardInput,
                                                            winograd_serves<kBackwardInput>,
                                                            plan<kBackwardInput>,
                                                            run<kBackwardInput>};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
