// Convolution of bfloat16 over few channels with the processor's matrix unit (AMX), forward and backward_input, in both layouts: the
// products of tiles of conv2d_amx.cpp, where a tile of the source is 16 grid points x 32 neighbours of the run that a row of taps reads
// (conv2d_amx_runs.inl). With the channels side by side and nothing between them, 7 taps of 3 channels are one step of 21 terms, where a
// step for each tap would have 3. Nothing is unfolded: the rows of a tile overlap, stride * channels elements apart.
//
// Staging copies channels_last, and puts the elements of planes in turns by permutations. All taps are summed in the tiles; what reads on
// behind a run meets weights that are zeros, so an image that is not finite is computed again, alone (conv2d_amx_row.inl). Subnormal
// numbers count as zeros (conv2d_amx.cpp). What bounds it is writing the outputs.
//
// Not for groups of few outputs, which leave most of a tile empty: depthwise and narrow groups wait for memory.
#include "cpu/kernels/amx/conv2d_amx_runs.inl"

#include "cpu/kernels/amx/conv2d_amx_row.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

constexpr int64_t kMostChannels = 15, kFewestOutputs = 8, kFewestTerms = 8;

template <Conv2dDirection kDirection>
using RunsRow = TileRow<BFloat16, MatrixUnit, StagedRuns, kDirection>;

template <Conv2dDirection kDirection>
bool accepts(const Conv2dShape& s) {
  constexpr bool kForward = kDirection == Conv2dDirection::forward;
  const int64_t in = s.in_channels / s.groups, out = s.out_channels / s.groups, channels = kForward ? in : out,
                outputs = kForward ? out : in;
  const int64_t phases = kForward ? 1 : s.stride_h * s.stride_w;
  return s.dtype == DType::bfloat16 && channels > 0 && channels <= kMostChannels && outputs >= kFewestOutputs &&
         channels * s.kernel_h * s.kernel_w >= kFewestTerms * phases;
}

template <Conv2dDirection kDirection>
Outcome run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, int threads) {
  return RunsRow<kDirection>::run(s, b, {}, workspace, threads);
}

}  // namespace

extern const Conv2dKernel conv2d_forward_amx_runs = {CNN_EXT_KERNEL_NAME("conv2d_forward_amx_runs"),
                                                     Isa::CNN_EXT_ISA,
                                                     Conv2dDirection::forward,
                                                     accepts<Conv2dDirection::forward>,
                                                     RunsRow<Conv2dDirection::forward>::plan,
                                                     run<Conv2dDirection::forward>};
extern const Conv2dKernel conv2d_backward_input_amx_runs = {CNN_EXT_KERNEL_NAME("conv2d_backward_input_amx_runs"),
                                                            Isa::CNN_EXT_ISA,
                                                            Conv2dDirection::backward_input,
                                                            accepts<Conv2dDirection::backward_input>,
                                                            RunsRow<Conv2dDirection::backward_input>::plan,
                                                            run<Conv2dDirection::backward_input>,
                                                            /*adds_bias=*/true};

extern const PackingConv2d conv2d_forward_amx_runs_packing = {&conv2d_forward_amx_runs, RunsRow<Conv2dDirection::forward>::form,
                                                              RunsRow<Conv2dDirection::forward>::run};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
