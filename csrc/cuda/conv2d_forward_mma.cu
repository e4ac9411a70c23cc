// output[n, k, oh, ow] = bias[k] + sum over r, s, c of weight[k, c, r, s] * input[n, c, ih, iw] on tensor cores, in TF32 (where the policy
// allows it), float16 and bfloat16. The idea, the tile and what bounds it: mma_gemm.cuh; the numbering: gather_mma.cuh. Groups of fewer
// than 16 channels are left to other rows: most of the tile would be empty.
#include "cuda/gather_mma.cuh"

namespace cnn_ext::cuda {

extern const Conv2dKernel conv2d_forward_mma_sm80 = {
    "conv2d_forward_mma_sm80", 80, Conv2dDirection::forward, suits_mma, plan_gather_mma<true>, run_gather_mma<true>, /*needs_proof=*/true};

// With the ReLU.
static bool accepts_relu(const Conv2dReluPoolShape& s) { return !has_pooling(s) && suits_mma(s.conv); }

static Plan plan_relu(const Conv2dReluPoolShape& s) { return plan_gather_mma<true>(s.conv); }

static void run_relu(const Conv2dReluPoolShape& s, const Conv2dReluPoolBuffers& b, void*, cudaStream_t stream) {
  run_activated_gather_mma<true>(s.conv, unpooled_buffers(b), true, stream);
}

extern const Conv2dReluPoolKernel conv2d_relu_max_pool2d_forward_mma_sm80 = {"conv2d_relu_max_pool2d_forward_mma_sm80",
                                                                             80,
                                                                             Conv2dDirection::forward,
                                                                             accepts_relu,
                                                                             plan_relu,
                                                                             run_relu,
                                                                             /*needs_proof=*/true};

}  // namespace cnn_ext::cuda
