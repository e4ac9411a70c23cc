// grad_input[n, c, ih, iw] = sum over r, s, k of weight[k, c, r, s] * grad_output[n, k, oh, ow] on tensor cores, in TF32 (where the policy
// allows it), float16 and bfloat16, one gathering convolution for each stride phase. The idea, the tile and what bounds it: mma_gemm.cuh;
// the numbering: gather_mma.cuh. Groups of fewer than 16 channels are left to other rows: most of the tile would be empty.
#include "cuda/gather_mma.cuh"

namespace cnn_ext::cuda {

extern const Conv2dKernel conv2d_backward_input_mma_sm80 = {"conv2d_backward_input_mma_sm80",
                                                            80,
                                                            Conv2dDirection::backward_input,
                                                            suits_mma,
                                                            plan_gather_mma<false>,
                                                            run_gather_mma<false>,
                                                            /*needs_proof=*/true,
                                                            /*adds_bias=*/true};

}  // namespace cnn_ext::cuda
