// Convolution, ReLU and max pooling in one pass by Winograd's algorithm, where it is allowed and pays: the plain Winograd convolution
// (conv2d_winograd.cpp, conv2d_winograd_weight.cpp) between other ends, with the same sums.
//
// Forward pools the outputs of a tile in registers: 2x2 windows with stride 2 lie inside of tiles, other windows have no row here (the
// composed row runs the plain convolution and pools). The gradient of the convolution's output is made up while it is staged, as in
// conv2d_relu_max_pool2d_direct.cpp, whose row also computes an image whose sums are not finite.
#include "cpu/kernels/conv2d_direct_pooled.inl"
#include "cpu/kernels/conv2d_relu_max_pool2d_maxima.inl"
#include "cpu/kernels/conv2d_winograd_run.inl"
#include "cpu/kernels/conv2d_winograd_weight.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {

extern const Conv2dReluPoolKernel conv2d_relu_max_pool2d_forward_direct, conv2d_relu_max_pool2d_backward_input_direct;

namespace {

// What both directions that gather have in common.
template <Conv2dDirection kDirection>
struct FusedWinograd {
  using T = float;

  static const Conv2dReluPoolKernel& direct_row() {
    return kDirection == Conv2dDirection::forward ? conv2d_relu_max_pool2d_forward_direct : conv2d_relu_max_pool2d_backward_input_direct;
  }
  Conv2dReluPoolShape one_image_shape() const {
    Conv2dReluPoolShape s = shape;
    s.conv.batch = 1;
    return s;
  }
  const T* weight() const { return static_cast<const T*>(buffers.weight); }
  const T* bias() const { return static_cast<const T*>(buffers.bias); }

  size_t exact_bytes(int threads) const { return direct_row().plan(one_image_shape(), threads).workspace_bytes; }
  Outcome run_exactly(int64_t n, void* workspace, int threads) const {
    const int64_t input = n * shape.conv.in_channels * shape.conv.in_h * shape.conv.in_w;
    const int64_t pooled = n * shape.conv.out_channels * shape.pooled_h * shape.pooled_w;
    Conv2dReluPoolBuffers image = buffers;
    image.input = advanced<T>(buffers.input, input), image.grad_input = advanced<T>(buffers.grad_input, input);
    image.output = advanced<T>(buffers.output, pooled), image.grad_output = advanced<T>(buffers.grad_output, pooled);
    if (buffers.offsets != nullptr) image.offsets = buffers.offsets + pooled;
    return direct_row().run(one_image_shape(), image, workspace, threads);
  }

  const Conv2dReluPoolShape& shape;
  const Conv2dReluPoolBuffers& buffers;
};

struct Forward : FusedWinograd<Conv2dDirection::forward> {
  using Source = TensorSource<T>;
  Source source(const Gather& g) const { return {static_cast<const T*>(buffers.input), g.source}; }
};

struct ReluForward : Forward {
  template <int kOutputs>
  using Sink = TileTensorSink<T, kOutputs>;
  Gather gather() const { return make_gather(Conv2dDirection::forward, shape.conv, 0); }
  template <int kOutputs>
  Sink<kOutputs> sink(const Gather& g) const {
    return {g, static_cast<T*>(buffers.output), true};
  }
};

struct PooledForward : Forward {
  template <int kOutputs>
  using Sink = TilePoolSink<T, kOutputs>;
  // Only what a window sees is computed.
  Gather gather() const {
    Gather g = make_gather(Conv2dDirection::forward, shape.conv, 0);
    g.h.count = 2 * shape.pooled_h, g.w.count = 2 * shape.pooled_w;
    return g;
  }
  template <int kOutputs>
  Sink<kOutputs> sink(const Gather&) const {
    return {static_cast<T*>(buffers.output), buffers.offsets, pooled_strides(shape), shape.pooled_h, shape.pooled_w};
  }
};

struct BackwardInput : FusedWinograd<Conv2dDirection::backward_input> {
  using Source = FusedGradient<T>;
  template <int kOutputs>
  using Sink = TileTensorSink<T, kOutputs>;
  Gather gather() const { return make_gather(Conv2dDirection::backward_input, shape.conv, 0); }
  Source source(const Gather&) const { return {shape, buffers}; }
  template <int kOutputs>
  Sink<kOutputs> sink(const Gather& g) const {
    return {g, static_cast<T*>(buffers.grad_input), false};
  }
};

// The functions of a table row that gathers.
template <Conv2dDirection kDirection, class Ends>
Plan plan(const Conv2dReluPoolShape& s, int threads) {
  return with_tile<float>(kDirection, s.conv, [&](auto tile) { return plan_winograd<tile.kOutputs, tile.kTaps>(Ends{s, {}}, threads); });
}

template <Conv2dDirection kDirection, class Ends>
Outcome run(const Conv2dReluPoolShape& s, const Conv2dReluPoolBuffers& b, void* workspace, int threads) {
  return with_tile<float>(kDirection, s.conv,
                          [&](auto tile) { return run_winograd<tile.kOutputs, tile.kTaps>(Ends{s, b}, workspace, threads); });
}

constexpr Conv2dDirection kForward = Conv2dDirection::forward, kBackwardInput = Conv2dDirection::backward_input;

Plan plan_forward(const Conv2dReluPoolShape& s, int threads) {
  return has_pooling(s) ? plan<kForward, PooledForward>(s, threads) : plan<kForward, ReluForward>(s, threads);
}

Outcome run_forward(const Conv2dReluPoolShape& s, const Conv2dReluPoolBuffers& b, void* workspace, int threads) {
  return has_pooling(s) ? run<kForward, PooledForward>(s, b, workspace, threads) : run<kForward, ReluForward>(s, b, workspace, threads);
}

bool accepts_forward(const Conv2dReluPoolShape& s) {
  return fuses_directly<Conv2dDirection::forward>(s) && winograd_serves<Conv2dDirection::forward>(s.conv) &&
         (!has_pooling(s) || has_2x2_windows(s));
}
bool accepts_backward_input(const Conv2dReluPoolShape& s) {
  return fuses_directly<Conv2dDirection::backward_input>(s) && winograd_serves<Conv2dDirection::backward_input>(s.conv);
}
// Of a 5x5 kernel, the maxima of pooling windows leave less to do than Winograd's algorithm does.
bool accepts_backward_weight(const Conv2dReluPoolShape& s) {
  return fuses_directly<Conv2dDirection::backward_weight>(s) && winograd_serves_weight(s.conv) &&
         !(s.conv.kernel_h == 5 && has_listed_maxima(s));
}

Plan plan_weight(const Conv2dReluPoolShape& s, int threads) {
  return with_weight_tile<float, FusedGradient<float>>(s.conv, [&](const auto& winograd) { return winograd.plan(threads); });
}

Outcome run_weight(const Conv2dReluPoolShape& s, const Conv2dReluPoolBuffers& b, void* workspace, int threads) {
  return with_weight_tile<float, FusedGradient<float>>(s.conv, [&](const auto& winograd) {
    return winograd.run({s, b}, static_cast<const float*>(b.input), static_cast<float*>(b.grad_weight), workspace, threads);
  });
}

}  // namespace

extern const Conv2dReluPoolKernel conv2d_relu_max_pool2d_forward_winograd = {CNN_EXT_KERNEL_NAME("conv2d_relu_max_pool2d_forward_winograd"),
                                                                             Isa::CNN_EXT_ISA,
                                                                             Conv2dDirection::forward,
                                                                             accepts_forward,
                                                                             plan_forward,
                                                                             run_forward};
extern const Conv2dReluPoolKernel conv2d_relu_max_pool2d_backward_input_winograd = {
    CNN_EXT_KERNEL_NAME("conv2d_relu_max_pool2d_backward_input_winograd"),
    Isa::CNN_EXT_ISA,
    Conv2dDirection::backward_input,
    accepts_backward_input,
    plan<kBackwardInput, BackwardInput>,
    run<kBackwardInput, BackwardInput>};
extern const Conv2dReluPoolKernel conv2d_relu_max_pool2d_backward_weight_winograd = {
    CNN_EXT_KERNEL_NAME("conv2d_relu_max_pool2d_backward_weight_winograd"),
    Isa::CNN_EXT_ISA,
    Conv2dDirection::backward_weight,
    accepts_backward_weight,
    plan_weight,
    run_weight};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
