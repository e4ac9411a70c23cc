// Convolution, ReLU and max pooling in one pass by Winograd's algorithm, where it is allowed and pays: the plain Winograd convolution
// (conv2d_winograd.cpp, conv2d_winograd_weight.cpp) between other ends, with the same sums.
//
// Forward pools the outputs of a tile in registers: 2x2 windows with stride 2 lie inside of tiles, other windows have no row here (the
// composed row runs the plain convolution and pools). The gradient of the convolution's output is made up while it is staged, as in
// conv2d_relu_max_pool2d_direct.cpp, whose row also computes an image whose sums are not finite.
#include "cpu/kernels/conv2d_direct_pooled.inl"
#include "cpu/kernels/conv2d_winograd_run.inl"
#include "cpu/kernels/conv2d_winograd_weight.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {

extern const Conv2dReluPoolKernel conv2d_relu_max_pool2d_forward_direct, conv2d_relu_max_pool2d_backward_input_direct;

namespace {

Strides pooled_strides(const Conv2dReluPoolShape& s) { return dense_strides(s.conv.layout, s.conv.out_channels, s.pooled_h, s.pooled_w); }

// What both directions that gather have in common.
template <class T, Conv2dDirection kDirection>
struct FusedWinograd {
  using Scalar = T;

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

template <class T>
struct Forward : FusedWinograd<T, Conv2dDirection::forward> {
  using Source = TensorSource<T>;
  Source source(const Gather& g) const { return {static_cast<const T*>(this->buffers.input), g.source}; }
};

template <class T>
struct ReluForward : Forward<T> {
  template <int kOutputs>
  using Sink = TileTensorSink<T, kOutputs>;
  Gather gather() const { return make_gather(Conv2dDirection::forward, this->shape.conv, 0); }
  template <int kOutputs>
  Sink<kOutputs> sink(const Gather& g) const {
    return {g, static_cast<T*>(this->buffers.output), true};
  }
};

template <class T>
struct PooledForward : Forward<T> {
  template <int kOutputs>
  using Sink = TilePoolSink<T, kOutputs>;
  // Only what a window sees is computed.
  Gather gather() const {
    Gather g = make_gather(Conv2dDirection::forward, this->shape.conv, 0);
    g.h.count = 2 * this->shape.pooled_h, g.w.count = 2 * this->shape.pooled_w;
    return g;
  }
  template <int kOutputs>
  Sink<kOutputs> sink(const Gather&) const {
    return {static_cast<T*>(this->buffers.output), this->buffers.offsets, pooled_strides(this->shape), this->shape.pooled_h,
            this->shape.pooled_w};
  }
};

template <class T>
struct BackwardInput : FusedWinograd<T, Conv2dDirection::backward_input> {
  template <int kOutputs>
  using Sink = TileTensorSink<T, kOutputs>;
  Gather gather() const { return make_gather(Conv2dDirection::backward_input, this->shape.conv, 0); }
  template <int kOutputs>
  Sink<kOutputs> sink(const Gather& g) const {
    return {g, static_cast<T*>(this->buffers.grad_input), false};
  }
};

template <class T>
PooledGradient<T> pooled_gradient(const Conv2dReluPoolShape& s, const Conv2dReluPoolBuffers& b) {
  return {s, static_cast<const T*>(b.grad_output), b.offsets, pooled_strides(s)};
}

template <class T>
ReluGradient<T> relu_gradient(const Conv2dReluPoolShape& s, const Conv2dReluPoolBuffers& b) {
  return {static_cast<const T*>(b.grad_output), static_cast<const T*>(b.output), pooled_strides(s), s.conv.out_w};
}

template <class T>
struct ReluBackwardInput : BackwardInput<T> {
  using Source = ReluGradient<T>;
  Source source(const Gather&) const { return relu_gradient<T>(this->shape, this->buffers); }
};

template <class T>
struct PooledBackwardInput : BackwardInput<T> {
  using Source = PooledGradient<T>;
  Source source(const Gather&) const { return pooled_gradient<T>(this->shape, this->buffers); }
};

// The functions of a table row that gathers: with pooling, and with the activation alone.
template <Conv2dDirection kDirection, template <class> class Pooled, template <class> class Relu>
struct GatherRow {
  // use(tile, ends)
  template <class T, class Use>
  static auto with_ends(const Conv2dReluPoolShape& s, const Conv2dReluPoolBuffers& b, const Use& use) {
    return with_tile<T>(kDirection, s.conv,
                        [&](auto tile) { return has_pooling(s) ? use(tile, Pooled<T>{{{s, b}}}) : use(tile, Relu<T>{{{s, b}}}); });
  }
  template <class T>
  static Plan plan_of(const Conv2dReluPoolShape& s, int threads) {
    const Conv2dReluPoolBuffers none{};
    return with_ends<T>(s, none, [&](auto tile, const auto& ends) { return plan_winograd<tile.kOutputs, tile.kTaps>(ends, threads); });
  }
  template <class T>
  static Outcome run_of(const Conv2dReluPoolShape& s, const Conv2dReluPoolBuffers& b, void* workspace, int threads) {
    return with_ends<T>(s, b,
                        [&](auto tile, const auto& ends) { return run_winograd<tile.kOutputs, tile.kTaps>(ends, workspace, threads); });
  }
  static Plan plan(const Conv2dReluPoolShape& s, int threads) {
    return s.conv.dtype == DType::float32 ? plan_of<float>(s, threads) : plan_of<double>(s, threads);
  }
  static Outcome run(const Conv2dReluPoolShape& s, const Conv2dReluPoolBuffers& b, void* workspace, int threads) {
    return s.conv.dtype == DType::float32 ? run_of<float>(s, b, workspace, threads) : run_of<double>(s, b, workspace, threads);
  }
};

using ForwardRow = GatherRow<Conv2dDirection::forward, PooledForward, ReluForward>;
using BackwardInputRow = GatherRow<Conv2dDirection::backward_input, PooledBackwardInput, ReluBackwardInput>;

bool accepts_forward(const Conv2dReluPoolShape& s) {
  return fuses_directly<Conv2dDirection::forward>(s) && winograd_serves<Conv2dDirection::forward>(s.conv) &&
         (!has_pooling(s) || has_2x2_windows(s));
}
bool accepts_backward_input(const Conv2dReluPoolShape& s) {
  return fuses_directly<Conv2dDirection::backward_input>(s) && winograd_serves<Conv2dDirection::backward_input>(s.conv);
}
bool accepts_backward_weight(const Conv2dReluPoolShape& s) {
  return fuses_directly<Conv2dDirection::backward_weight>(s) && winograd_serves_weight(s.conv);
}

Plan plan_weight(const Conv2dReluPoolShape& s, int threads) {
  const auto plan = [&](const auto& winograd) { return winograd.plan(threads); };
  return has_pooling(s) ? with_weight_tile<PooledGradient>(s.conv, plan) : with_weight_tile<ReluGradient>(s.conv, plan);
}

template <class T, int kOutputs, int kTaps>
Outcome run_tiled(const WinogradWeight<T, kOutputs, kTaps, PooledGradient<T>>& winograd, const Conv2dReluPoolShape& s,
                  const Conv2dReluPoolBuffers& b, void* workspace, int threads) {
  return winograd.run(pooled_gradient<T>(s, b), static_cast<const T*>(b.input), static_cast<T*>(b.grad_weight), workspace, threads);
}
template <class T, int kOutputs, int kTaps>
Outcome run_tiled(const WinogradWeight<T, kOutputs, kTaps, ReluGradient<T>>& winograd, const Conv2dReluPoolShape& s,
                  const Conv2dReluPoolBuffers& b, void* workspace, int threads) {
  return winograd.run(relu_gradient<T>(s, b), static_cast<const T*>(b.input), static_cast<T*>(b.grad_weight), workspace, threads);
}

Outcome run_weight(const Conv2dReluPoolShape& s, const Conv2dReluPoolBuffers& b, void* workspace, int threads) {
  const auto run = [&](const auto& winograd) { return run_tiled(winograd, s, b, workspace, threads); };
  return has_pooling(s) ? with_weight_tile<PooledGradient>(s.conv, run) : with_weight_tile<ReluGradient>(s.conv, run);
}

}  // namespace

extern const Conv2dReluPoolKernel conv2d_relu_max_pool2d_forward_winograd = {CNN_EXT_KERNEL_NAME("conv2d_relu_max_pool2d_forward_winograd"),
                                                                             Isa::CNN_EXT_ISA,
                                                                             Conv2dDirection::forward,
                                                                             accepts_forward,
                                                                             ForwardRow::plan,
                                                                             ForwardRow::run};
extern const Conv2dReluPoolKernel conv2d_relu_max_pool2d_backward_input_winograd = {
    CNN_EXT_KERNEL_NAME("conv2d_relu_max_pool2d_backward_input_winograd"),
    Isa::CNN_EXT_ISA,
    Conv2dDirection::backward_input,
    accepts_backward_input,
    BackwardInputRow::plan,
    BackwardInputRow::run};
extern const Conv2dReluPoolKernel conv2d_relu_max_pool2d_backward_weight_winograd = {
    CNN_EXT_KERNEL_NAME("conv2d_relu_max_pool2d_backward_weight_winograd"),
    Isa::CNN_EXT_ISA,
    Conv2dDirection::backward_weight,
    accepts_backward_weight,
    plan_weight,
    run_weight};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
