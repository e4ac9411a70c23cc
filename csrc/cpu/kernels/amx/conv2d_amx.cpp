// Direct convolution of bfloat16 and float16 with the processor's matrix unit (AMX), forward and backward_input, in both layouts: the
// gather convolutions of conv2d_direct_gather.inl as products of tiles. A tile of the source is 16 grid points x 32 channels, one of the
// weights 32 channels x 16 outputs, kept as pairs of channels; 2 x 2 tiles of sums (32 points x 32 outputs in float32) take 4 loads for 4
// products of 16 cycles each, so that the unit and not the loads is the limit. All channels and taps are summed in the tiles.
//
// A task stages the source of some rows of one or several images as [row][column][channel], by phases of the stride, zeros outside and in
// the channels behind the last. Its points are numbered through, rows and images alike: what lies between the rows is computed and thrown
// away, which wastes less than tiles that end with a row (7x7 maps: 22 % instead of 56 %).
//
// The unit takes subnormal numbers for zeros and rounds to nearest even after each pair of products: the error is within that of float32
// sums, plus |other operand| * 2^-126 for each subnormal bfloat16. Few channels leave most of a tile empty: conv2d_amx_runs.cpp.
//
// The dot rows are the same with AVX-512's dot products of pairs of bfloat16 (vdpbf16ps) in place of the matrix unit, where the processor
// has no such unit; it stages, packs and writes alike.
//
// A float16 is the sum of two bfloat16 (11 bits are 8 and 3), none of them subnormal, and a product of two is four exact ones: a quarter of
// the rate of bfloat16 is four times that of float32's multiply-add.
#include "cpu/kernels/amx/conv2d_amx_row.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

constexpr int64_t kFewestChannels = 16;

// Calls use(TileRow{}) on the matrix unit for the element of a shape.
template <Conv2dDirection kDirection, class Use>
auto with_row(const Conv2dShape& s, const Use& use) {
  return s.dtype == DType::float16 ? use(TileRow<Float16, MatrixUnit, Staged, kDirection>{})
                                   : use(TileRow<BFloat16, MatrixUnit, Staged, kDirection>{});
}

template <Conv2dDirection kDirection>
Plan plan(const Conv2dShape& s, int threads) {
  return with_row<kDirection>(s, [&](auto row) { return row.plan(s, threads); });
}

template <Conv2dDirection kDirection>
Outcome run_packed(const Conv2dShape& s, const Conv2dBuffers& b, Packed packed, void* workspace, int threads) {
  return with_row<kDirection>(s, [&](auto row) { return row.run(s, b, packed, workspace, threads); });
}

template <Conv2dDirection kDirection>
Outcome run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, int threads) {
  return run_packed<kDirection>(s, b, {}, workspace, threads);
}

PackedForm form(const Conv2dShape& s) {
  return with_row<Conv2dDirection::forward>(s, [&](auto row) { return row.form(s); });
}

// What the float32 rows do better by way of conversion: a few outputs of single taps or on maps of a few points; and of a float16, which
// takes four products, tiles that are less than half full or taps that lie in the padding for half of a map.
template <Conv2dDirection kDirection>
bool accepts(const Conv2dShape& s) {
  constexpr bool kForward = kDirection == Conv2dDirection::forward;
  const int64_t in = s.in_channels / s.groups, out = s.out_channels / s.groups, channels = kForward ? in : out,
                outputs = kForward ? out : in;
  if (!is_half(s.dtype) || channels < kFewestChannels || outputs == 0) return false;
  const bool has_few_points = s.out_h * s.out_w < kTilePoints;
  const int64_t phases = kForward ? 1 : s.stride_h * s.stride_w;
  if (outputs < kFewestChannels && (has_few_points || s.kernel_h * s.kernel_w < 2 * phases)) return false;
  if (s.dtype == DType::bfloat16) return true;
  const int64_t full = ceil_div(channels, kTileChannels) * kTileChannels * ceil_div(outputs, kTileOutputs) * kTileOutputs;
  const bool reaches_far = 2 * (s.kernel_h - 1) * s.dilation_h > s.in_h || 2 * (s.kernel_w - 1) * s.dilation_w > s.in_w;
  return !has_few_points && !reaches_far && 2 * channels * outputs >= full;
}

// Of bfloat16, where the processor has dot products of pairs and no matrix unit.
template <Conv2dDirection kDirection>
using DotRow = TileRow<BFloat16, DotProducts, Staged, kDirection>;

template <Conv2dDirection kDirection>
Outcome run_dot(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, int threads) {
  return DotRow<kDirection>::run(s, b, {}, workspace, threads);
}

template <Conv2dDirection kDirection>
bool accepts_dot(const Conv2dShape& s) {
  return s.dtype == DType::bfloat16 && accepts<kDirection>(s);
}

}  // namespace

extern const Conv2dKernel conv2d_forward_amx = {CNN_EXT_KERNEL_NAME("conv2d_forward_amx"),
                                                Isa::CNN_EXT_ISA,
                                                Conv2dDirection::forward,
                                                accepts<Conv2dDirection::forward>,
                                                plan<Conv2dDirection::forward>,
                                                run<Conv2dDirection::forward>};
extern const Conv2dKernel conv2d_backward_input_amx = {CNN_EXT_KERNEL_NAME("conv2d_backward_input_amx"),
                                                       Isa::CNN_EXT_ISA,
                                                       Conv2dDirection::backward_input,
                                                       accepts<Conv2dDirection::backward_input>,
                                                       plan<Conv2dDirection::backward_input>,
                                                       run<Conv2dDirection::backward_input>,
                                                       /*adds_bias=*/true};

extern const Conv2dKernel conv2d_forward_dot = {CNN_EXT_KERNEL_NAME("conv2d_forward_dot"),
                                                Isa::CNN_EXT_ISA,
                                                Conv2dDirection::forward,
                                                accepts_dot<Conv2dDirection::forward>,
                                                DotRow<Conv2dDirection::forward>::plan,
                                                run_dot<Conv2dDirection::forward>};
extern const Conv2dKernel conv2d_backward_input_dot = {CNN_EXT_KERNEL_NAME("conv2d_backward_input_dot"),
                                                       Isa::CNN_EXT_ISA,
                                                       Conv2dDirection::backward_input,
                                                       accepts_dot<Conv2dDirection::backward_input>,
                                                       DotRow<Conv2dDirection::backward_input>::plan,
                                                       run_dot<Conv2dDirection::backward_input>,
                                                       /*adds_bias=*/true};

extern const PackingConv2d conv2d_forward_amx_packing = {&conv2d_forward_amx, form, run_packed<Conv2dDirection::forward>};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
