// Convolution in groups of up to 64 channels, forward and backward_input, in both layouts: each group is a small convolution of its own, so
// what is paid per group and call decides.
//
// Both directions are gather convolutions (conv2d_direct_gather.inl). What a task reads of its group is copied to scratch as
// [block of channels][row][column phase][column][channel of the block], with zeros around it: a pixel is one vector, which channels_last
// copies as it lies and nchw transposes, square by square of a plane. A register tile (conv2d_grouped_tile.cpp) has output channels in the
// lanes and broadcasts those of a pixel. A task is a group, a band of rows and some images. The phases of a strided backward_input share
// what is staged and the packed weights, and in nchw complete whole rows in scratch before these are transposed.
//
// A sum is one chain over tap rows, tap columns and channels, then the bias. Tap rows in the padding are left out, for a tile's rows have
// the same ones; elsewhere the staged zeros multiply, so that a weight that is not finite is left to another row.
//
// Meanwhile the lines that the next task stages, and those that the sums go to, are fetched a few at each step.
//
// Not for: wider groups, where the weights of one fill the near cache, and maps so wide that a row of them fills it.
#include "cpu/kernels/conv2d_grouped_run.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

template <Conv2dDirection kDirection>
bool accepts(const Conv2dShape& s) {
  return accepts_grouped(kDirection, s);
}

template <Conv2dDirection kDirection>
Plan plan(const Conv2dShape& s, int threads) {
  const Grouping grouping(kDirection, s, threads);
  return {kMostVectors * kLanes<float>, kGroupedSums, grouping.tasks(), static_cast<size_t>(grouping.workspace_bytes(threads))};
}

template <Conv2dDirection kDirection>
Outcome run_packed(const Conv2dShape& s, const Conv2dBuffers& b, Packed packed, void* workspace, int threads) {
  constexpr bool kForward = kDirection == Conv2dDirection::forward;
  const Grouping grouping(kDirection, s, threads);
  if (grouping.is_empty()) return Outcome::done;
  const GroupedRun run(grouping, static_cast<const float*>(kForward ? b.input : b.grad_output),
                       static_cast<float*>(kForward ? b.output : b.grad_input), packed, workspace, threads);
  return run.run(static_cast<const float*>(b.weight), static_cast<const float*>(b.bias));
}

template <Conv2dDirection kDirection>
Outcome run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, int threads) {
  return run_packed<kDirection>(s, b, {}, workspace, threads);
}

PackedForm form(const Conv2dShape& s) { return {static_cast<size_t>(Grouping(Conv2dDirection::forward, s, 1).packed_bytes()), 0}; }

}  // namespace

extern const Conv2dKernel conv2d_forward_grouped = {CNN_EXT_KERNEL_NAME("conv2d_forward_grouped"),
                                                    Isa::CNN_EXT_ISA,
                                                    Conv2dDirection::forward,
                                                    accepts<Conv2dDirection::forward>,
                                                    plan<Conv2dDirection::forward>,
                                                    run<Conv2dDirection::forward>};
extern const Conv2dKernel conv2d_backward_input_grouped = {CNN_EXT_KERNEL_NAME("conv2d_backward_input_grouped"),
                                                           Isa::CNN_EXT_ISA,
                                                           Conv2dDirection::backward_input,
                                                           accepts<Conv2dDirection::backward_input>,
                                                           plan<Conv2dDirection::backward_input>,
                                                           run<Conv2dDirection::backward_input>,
                                                           /*adds_bias=*/true};

extern const PackingConv2d conv2d_forward_grouped_packing = {&conv2d_forward_grouped, form, run_packed<Conv2dDirection::forward>};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
