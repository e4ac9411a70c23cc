// Direct convolution, forward and backward_input, for every stride, padding, dilation and number of groups, in both layouts.
//
// Both directions are gather convolutions (conv2d_direct_gather.inl). A block of the source is staged into scratch (_stage), the weights
// are packed once per call (_pack), and a register tile of output channels in the lanes x grid points sums over channels and taps (_tile,
// with the tile's sizes and their reasons); _run cuts the work. Few output channels fill few lanes of the tile: see
// conv2d_direct_pixels.cpp.
#include "cpu/kernels/conv2d_direct_rows.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

bool accepts(const Conv2dShape& s) { return s.dtype == DType::float32 || s.dtype == DType::float64; }

// Whether WideTile is faster than ChannelTile. It has spans of 5 and 7 taps, too, and reads less for each multiply-add; but its steps read
// twice the weights, which shows with spans of 3, except on maps whose rows leave ChannelTile, of twice as many points, with small tiles.
inline bool is_for_wide_tile(Conv2dDirection direction, const Conv2dShape& s) {
  constexpr int64_t kNarrowest = 6, kWidest = 9;
  if (s.dtype != DType::float32 || gather_count(direction, s) != 1) return false;
  const Gather g = make_gather(direction, s, 0);
  if (g.outputs == 0 || ceil_div(g.outputs, WideTile::kV) % WideTile::kVectors != 0) return false;
  const int taps = span_taps<WideTile>(g);
  return taps > 3 || (taps == 3 && g.w.count >= kNarrowest && g.w.count <= kWidest);
}

template <Conv2dDirection kDirection, bool kHasWideTile>
struct DirectRow : FloatingRow<ChannelTile, kDirection> {};

template <Conv2dDirection kDirection>
struct DirectRow<kDirection, true> {
  using Channel = FloatingRow<ChannelTile, kDirection>;
  using Wide = GatherRow<float, WideTile, kDirection>;

  static bool is_wide(const Conv2dShape& s) { return is_for_wide_tile(kDirection, s); }
  static Plan plan(const Conv2dShape& s, int threads) { return (is_wide(s) ? Wide::plan : Channel::plan)(s, threads); }
  static Outcome run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, int threads) {
    return (is_wide(s) ? Wide::run : Channel::run)(s, b, workspace, threads);
  }
  static PackedForm form(const Conv2dShape& s) { return (is_wide(s) ? Wide::form : Channel::form)(s); }
  static Outcome run_packed(const Conv2dShape& s, const Conv2dBuffers& b, Packed packed, void* workspace, int threads) {
    return (is_wide(s) ? Wide::run_packed : Channel::run_packed)(s, b, packed, workspace, threads);
  }
};

using Forward = DirectRow<Conv2dDirection::forward, kHasSpans>;
using BackwardInput = DirectRow<Conv2dDirection::backward_input, kHasSpans>;

}  // namespace

extern const Conv2dKernel conv2d_forward_direct = {CNN_EXT_KERNEL_NAME("conv2d_forward_direct"),
                                                   Isa::CNN_EXT_ISA,
                                                   Conv2dDirection::forward,
                                                   accepts,
                                                   Forward::plan,
                                                   Forward::run,
                                                   /*adds_bias=*/false,
                                                   /*maps_padding=*/true};
extern const Conv2dKernel conv2d_backward_input_direct = {CNN_EXT_KERNEL_NAME("conv2d_backward_input_direct"),
                                                          Isa::CNN_EXT_ISA,
                                                          Conv2dDirection::backward_input,
                                                          accepts,
                                                          BackwardInput::plan,
                                                          BackwardInput::run,
                                                          /*adds_bias=*/true};

extern const PackingConv2d conv2d_forward_direct_packing = {&conv2d_forward_direct, Forward::form, Forward::run_packed};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
