// output[n, k, oh, ow] = bias[k] + sum over r, s, c of weight[k, c, r, s] * input[n, c, ih, iw] on tensor cores, in TF32 (where the policy
// allows it), float16 and bfloat16. The idea, the tile and what bounds it: mma_gemm.cuh; the numbering: gather_mma.cuh. Groups of fewer
// than 16 channels are left to other rows: most of the tile would be empty.
#include "cuda/gather_mma.cuh"

namespace cnn_ext::cuda {

extern const Conv2dKernel conv2d_forward_mma_sm80 = {
    "conv2d_forward_mma_sm80", 80, Conv2dDirection::forward, suits_mma, plan_gather_mma<true>, run_gather_mma<true>, /*needs_proof=*/true};

// With the ReLU and the pooling: windows of few taps that do not overlap, numbered one after the other (relu_pool.cuh).
static bool accepts_windows(const Conv2dReluPoolShape& s) { return suits_fused_mma(s) && has_stored_windows(s); }

extern const Conv2dReluPoolKernel conv2d_relu_max_pool2d_forward_mma_sm80 = {"conv2d_relu_max_pool2d_forward_mma_sm80",
                                                                             80,
                                                                             Conv2dDirection::forward,
                                                                             accepts_windows,
                                                                             plan_fused_gather_mma<true>,
                                                                             run_fused_gather_mma<true>,
                                                                             /*needs_proof=*/true};

}  // namespace cnn_ext::cuda
