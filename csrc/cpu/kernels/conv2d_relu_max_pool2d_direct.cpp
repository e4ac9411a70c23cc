// Convolution, ReLU and max pooling in one pass, forward and backward_input: the direct convolution (conv2d_direct.cpp) between other ends.
//
// Forward keeps a task's sums in scratch, [grid point][channel], until they are complete, and pools them there with the channels in the
// lanes; what is written is the pooled part. A task is a whole number of pooling windows; where windows overlap, the rows that two tasks
// share are computed twice. Without pooling the register tile writes the positive part. backward_input stages the gradient of the
// convolution's output as it would lie in memory, made up from the pooled gradient and the offsets on the way.
//
// The sums are those of conv2d_direct, in the same order. Grid points in the lanes (conv2d_direct_pixels.cpp) serve backward_input and the
// activation alone where they are faster, but not pooling, which would have to pick lanes apart.
#include "cpu/kernels/conv2d_direct_gathers.inl"
#include "cpu/kernels/conv2d_direct_pixels.inl"
#include "cpu/kernels/conv2d_direct_pooled.inl"
#include "cpu/kernels/conv2d_winograd_blocking.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

// Forward: only what a pooling window sees is computed.
struct ForwardEnds {
  using Source = TensorSource<float>;
  int64_t count() const { return 1; }
  Gather gather(int64_t) const {
    Gather g = make_gather_of_rows(Conv2dDirection::forward, shape.conv, 0);
    g.rows = {shape.pooled_h, shape.pool_stride_h, shape.pool_h - shape.pool_stride_h};
    g.cols = {shape.pooled_w, shape.pool_stride_w, shape.pool_w - shape.pool_stride_w};
    g.h.count = g.rows.points(shape.pooled_h);
    g.w.count = g.cols.points(shape.pooled_w);
    return g;
  }
  Source source(const Gather& g) const { return {static_cast<const float*>(buffers.input), g.source}; }

  const Conv2dReluPoolShape& shape;
  const Conv2dReluPoolBuffers& buffers;
};

struct PooledForward : ForwardEnds {
  using Sink = PoolSink<float>;
  Sink sink(const Gather&) const {
    return {static_cast<float*>(buffers.output),
            buffers.offsets,
            pooled_strides(shape),
            {shape.pool_h, shape.pool_w, shape.pool_stride_h, shape.pool_stride_w}};
  }
};

struct ReluForward : ForwardEnds {
  using Sink = TensorSink<float>;
  Sink sink(const Gather& g) const { return {g, static_cast<float*>(buffers.output), true}; }
};

struct BackwardInput {
  using Source = FusedGradient<float>;
  using Sink = TensorSink<float>;
  int64_t count() const { return gather_count(Conv2dDirection::backward_input, shape.conv); }
  Gather gather(int64_t i) const { return make_gather_of_rows(Conv2dDirection::backward_input, shape.conv, i); }
  Source source(const Gather&) const { return {shape, buffers}; }
  Sink sink(const Gather& g) const { return {g, static_cast<float*>(buffers.grad_input), false}; }

  const Conv2dReluPoolShape& shape;
  const Conv2dReluPoolBuffers& buffers;
};

using Channels = ChannelTile<float>;
using Pixels = PixelTile<float>;

// A table row's functions.
template <class Tile, class Ends>
Plan plan(const Conv2dReluPoolShape& s, int threads) {
  return plan_gathers<float, Tile>(Ends{s, {}}, threads);
}

template <class Tile, class Ends>
Outcome run_packed(const Conv2dReluPoolShape& s, const Conv2dReluPoolBuffers& b, Packed packed, void* workspace, int threads) {
  const float* bias = static_cast<const float*>(b.bias);
  return run_gathers<float, Tile>(Ends{s, b}, static_cast<const float*>(b.weight), bias, packed, workspace, threads);
}

template <class Tile, class Ends>
Outcome run(const Conv2dReluPoolShape& s, const Conv2dReluPoolBuffers& b, void* workspace, int threads) {
  return run_packed<Tile, Ends>(s, b, {}, workspace, threads);
}

template <class Tile>
PackedForm form_forward(const Conv2dReluPoolShape& s) {
  return packed_form<float, Tile>(make_gather_of_rows(Conv2dDirection::forward, s.conv, 0));
}

Plan plan_forward(const Conv2dReluPoolShape& s, int threads) {
  return has_pooling(s) ? plan<Channels, PooledForward>(s, threads) : plan<Channels, ReluForward>(s, threads);
}

Outcome run_forward_packed(const Conv2dReluPoolShape& s, const Conv2dReluPoolBuffers& b, Packed packed, void* workspace, int threads) {
  return has_pooling(s) ? run_packed<Channels, PooledForward>(s, b, packed, workspace, threads)
                        : run_packed<Channels, ReluForward>(s, b, packed, workspace, threads);
}

Outcome run_forward(const Conv2dReluPoolShape& s, const Conv2dReluPoolBuffers& b, void* workspace, int threads) {
  return run_forward_packed(s, b, {}, workspace, threads);
}

// Where Winograd's algorithm is allowed and pays, also the composed row is faster.
template <Conv2dDirection kDirection>
bool accepts(const Conv2dReluPoolShape& s) {
  return fuses_directly<kDirection>(s) && !winograd_serves<kDirection>(s.conv);
}

template <Conv2dDirection kDirection>
bool accepts_pixels(const Conv2dReluPoolShape& s) {
  const bool fits = kDirection == Conv2dDirection::backward_input || !has_pooling(s);
  return fits && accepts<kDirection>(s) && pixels_are_cheaper(kDirection, s.conv, make_gather_of_rows(kDirection, s.conv, 0));
}

}  // namespace

extern const Conv2dReluPoolKernel conv2d_relu_max_pool2d_forward_pixels = {CNN_EXT_KERNEL_NAME("conv2d_relu_max_pool2d_forward_pixels"),
                                                                           Isa::CNN_EXT_ISA,
                                                                           Conv2dDirection::forward,
                                                                           accepts_pixels<Conv2dDirection::forward>,
                                                                           plan<Pixels, ReluForward>,
                                                                           run<Pixels, ReluForward>};
extern const Conv2dReluPoolKernel conv2d_relu_max_pool2d_backward_input_pixels = {
    CNN_EXT_KERNEL_NAME("conv2d_relu_max_pool2d_backward_input_pixels"),
    Isa::CNN_EXT_ISA,
    Conv2dDirection::backward_input,
    accepts_pixels<Conv2dDirection::backward_input>,
    plan<Pixels, BackwardInput>,
    run<Pixels, BackwardInput>};
extern const Conv2dReluPoolKernel conv2d_relu_max_pool2d_forward_direct = {CNN_EXT_KERNEL_NAME("conv2d_relu_max_pool2d_forward_direct"),
                                                                           Isa::CNN_EXT_ISA,
                                                                           Conv2dDirection::forward,
                                                                           accepts<Conv2dDirection::forward>,
                                                                           plan_forward,
                                                                           run_forward};
extern const Conv2dReluPoolKernel conv2d_relu_max_pool2d_backward_input_direct = {
    CNN_EXT_KERNEL_NAME("conv2d_relu_max_pool2d_backward_input_direct"),
    Isa::CNN_EXT_ISA,
    Conv2dDirection::backward_input,
    accepts<Conv2dDirection::backward_input>,
    plan<Channels, BackwardInput>,
    run<Channels, BackwardInput>};

extern const PackingConv2dReluPool conv2d_relu_max_pool2d_forward_pixels_packing = {&conv2d_relu_max_pool2d_forward_pixels,
                                                                                    form_forward<Pixels>, run_packed<Pixels, ReluForward>};
extern const PackingConv2dReluPool conv2d_relu_max_pool2d_forward_direct_packing = {&conv2d_relu_max_pool2d_forward_direct,
                                                                                    form_forward<Channels>, run_forward_packed};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
