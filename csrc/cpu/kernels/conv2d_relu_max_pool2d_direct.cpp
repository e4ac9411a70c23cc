// Convolution, ReLU and max pooling in one pass, forward and backward_input: the direct convolution (conv2d_direct.cpp) between other ends.
//
// Forward keeps a task's sums in scratch, [grid point][channel], until they are complete, and pools them there with the channels in the
// lanes; what is written is the pooled part. A task is a whole number of pooling windows; where windows overlap, the rows that two tasks
// share are computed twice. Without pooling the register tile writes the positive part. backward_input stages the gradient of the
// convolution's output as it would lie in memory, made up from the pooled gradient and the offsets on the way.
//
// The sums are those of conv2d_direct, in the same order. Grid points in the lanes (conv2d_direct_pixels.cpp) serve backward_input and the
// activation alone where they are faster, but not pooling, which would have to pick lanes apart.
#include "cpu/kernels/conv2d_direct_pixels.inl"
#include "cpu/kernels/conv2d_direct_pooled.inl"
#include "cpu/kernels/conv2d_winograd_blocking.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

Strides pooled_strides(const Conv2dReluPoolShape& s) { return dense_strides(s.conv.layout, s.conv.out_channels, s.pooled_h, s.pooled_w); }

// Forward: only what a pooling window sees is computed.
struct ForwardGather {
  int64_t count() const { return 1; }
  Gather gather(int64_t) const {
    Gather g = make_gather_of_rows(Conv2dDirection::forward, shape.conv, 0);
    g.rows = {shape.pooled_h, shape.pool_stride_h, shape.pool_h - shape.pool_stride_h};
    g.cols = {shape.pooled_w, shape.pool_stride_w, shape.pool_w - shape.pool_stride_w};
    g.h.count = g.rows.points(shape.pooled_h);
    g.w.count = g.cols.points(shape.pooled_w);
    return g;
  }

  const Conv2dReluPoolShape& shape;
  const Conv2dReluPoolBuffers& buffers;
};

template <class T>
struct PooledForward : ForwardGather {
  using Source = TensorSource<T>;
  using Sink = PoolSink<T>;
  Source source(const Gather& g) const { return {static_cast<const T*>(buffers.input), g.source}; }
  Sink sink(const Gather&) const {
    return {static_cast<T*>(buffers.output),
            buffers.offsets,
            pooled_strides(shape),
            {shape.pool_h, shape.pool_w, shape.pool_stride_h, shape.pool_stride_w}};
  }
};

template <class T>
struct ReluForward : ForwardGather {
  using Source = TensorSource<T>;
  using Sink = TensorSink<T>;
  Source source(const Gather& g) const { return {static_cast<const T*>(buffers.input), g.source}; }
  Sink sink(const Gather& g) const { return {g, static_cast<T*>(buffers.output), true}; }
};

template <class T>
struct BackwardInputGather {
  using Sink = TensorSink<T>;
  int64_t count() const { return gather_count(Conv2dDirection::backward_input, shape.conv); }
  Gather gather(int64_t i) const { return make_gather_of_rows(Conv2dDirection::backward_input, shape.conv, i); }
  Sink sink(const Gather& g) const { return {g, static_cast<T*>(buffers.grad_input), false}; }

  const Conv2dReluPoolShape& shape;
  const Conv2dReluPoolBuffers& buffers;
};

template <class T>
struct PooledBackwardInput : BackwardInputGather<T> {
  using Source = PooledGradient<T>;
  Source source(const Gather&) const {
    return {this->shape, static_cast<const T*>(this->buffers.grad_output), this->buffers.offsets, pooled_strides(this->shape)};
  }
};

template <class T>
struct ReluBackwardInput : BackwardInputGather<T> {
  using Source = ReluGradient<T>;
  Source source(const Gather& g) const {
    return {static_cast<const T*>(this->buffers.grad_output), static_cast<const T*>(this->buffers.output), g.source, g.w.source_size};
  }
};

// A table row's functions: with pooling, and with the activation alone.
template <template <class> class Tile, template <class> class Pooled, template <class> class Relu>
struct FusedRow {
  template <class T>
  static Plan plan_of(const Conv2dReluPoolShape& s, int threads) {
    const Conv2dReluPoolBuffers none{};
    return has_pooling(s) ? plan_gathers<T, Tile<T>>(Pooled<T>{s, none}, threads) : plan_gathers<T, Tile<T>>(Relu<T>{s, none}, threads);
  }
  template <class T>
  static Outcome run_of(const Conv2dReluPoolShape& s, const Conv2dReluPoolBuffers& b, Packed packed, void* workspace, int threads) {
    const T* weight = static_cast<const T*>(b.weight);
    const T* bias = static_cast<const T*>(b.bias);
    return has_pooling(s) ? run_gathers<T, Tile<T>>(Pooled<T>{s, b}, weight, bias, packed, workspace, threads)
                          : run_gathers<T, Tile<T>>(Relu<T>{s, b}, weight, bias, packed, workspace, threads);
  }
  static Plan plan(const Conv2dReluPoolShape& s, int threads) {
    return s.conv.dtype == DType::float32 ? plan_of<float>(s, threads) : plan_of<double>(s, threads);
  }
  static Outcome run_packed(const Conv2dReluPoolShape& s, const Conv2dReluPoolBuffers& b, Packed packed, void* workspace, int threads) {
    return s.conv.dtype == DType::float32 ? run_of<float>(s, b, packed, workspace, threads)
                                          : run_of<double>(s, b, packed, workspace, threads);
  }
  static Outcome run(const Conv2dReluPoolShape& s, const Conv2dReluPoolBuffers& b, void* workspace, int threads) {
    return run_packed(s, b, {}, workspace, threads);
  }
  static PackedForm form(const Conv2dReluPoolShape& s) {
    return packed_form<Tile>(make_gather_of_rows(Conv2dDirection::forward, s.conv, 0), s.conv.dtype);
  }
};

template <template <class> class Tile>
using Forward = FusedRow<Tile, PooledForward, ReluForward>;
template <template <class> class Tile>
using BackwardInput = FusedRow<Tile, PooledBackwardInput, ReluBackwardInput>;

// Where Winograd's algorithm is allowed and pays, also the composed row is faster.
template <Conv2dDirection kDirection>
bool accepts(const Conv2dReluPoolShape& s) {
  return fuses_directly<kDirection>(s) && !winograd_serves<kDirection>(s.conv);
}

template <Conv2dDirection kDirection>
bool accepts_pixels(const Conv2dReluPoolShape& s) {
  const bool fits = kDirection == Conv2dDirection::backward_input || !has_pooling(s);
  return fits && accepts<kDirection>(s) && pixels_are_cheaper(make_gather_of_rows(kDirection, s.conv, 0), s.conv.dtype, s.conv.layout);
}

}  // namespace

extern const Conv2dReluPoolKernel conv2d_relu_max_pool2d_forward_pixels = {CNN_EXT_KERNEL_NAME("conv2d_relu_max_pool2d_forward_pixels"),
                                                                           Isa::CNN_EXT_ISA,
                                                                           Conv2dDirection::forward,
                                                                           accepts_pixels<Conv2dDirection::forward>,
                                                                           Forward<PixelTile>::plan,
                                                                           Forward<PixelTile>::run};
extern const Conv2dReluPoolKernel conv2d_relu_max_pool2d_backward_input_pixels = {
    CNN_EXT_KERNEL_NAME("conv2d_relu_max_pool2d_backward_input_pixels"),
    Isa::CNN_EXT_ISA,
    Conv2dDirection::backward_input,
    accepts_pixels<Conv2dDirection::backward_input>,
    BackwardInput<PixelTile>::plan,
    BackwardInput<PixelTile>::run};
extern const Conv2dReluPoolKernel conv2d_relu_max_pool2d_forward_direct = {CNN_EXT_KERNEL_NAME("conv2d_relu_max_pool2d_forward_direct"),
                                                                           Isa::CNN_EXT_ISA,
                                                                           Conv2dDirection::forward,
                                                                           accepts<Conv2dDirection::forward>,
                                                                           Forward<ChannelTile>::plan,
                                                                           Forward<ChannelTile>::run};
extern const Conv2dReluPoolKernel conv2d_relu_max_pool2d_backward_input_direct = {
    CNN_EXT_KERNEL_NAME("conv2d_relu_max_pool2d_backward_input_direct"),
    Isa::CNN_EXT_ISA,
    Conv2dDirection::backward_input,
    accepts<Conv2dDirection::backward_input>,
    BackwardInput<ChannelTile>::plan,
    BackwardInput<ChannelTile>::run};

extern const PackingConv2dReluPool conv2d_relu_max_pool2d_forward_pixels_packing = {
    &conv2d_relu_max_pool2d_forward_pixels, Forward<PixelTile>::form, Forward<PixelTile>::run_packed};
extern const PackingConv2dReluPool conv2d_relu_max_pool2d_forward_direct_packing = {
    &conv2d_relu_max_pool2d_forward_direct, Forward<ChannelTile>::form, Forward<ChannelTile>::run_packed};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
