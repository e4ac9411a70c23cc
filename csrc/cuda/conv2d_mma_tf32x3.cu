// Strict float32 on tensor cores, where the policy does not allow TF32: every product is three of TF32 (mma_fragments.cuh), off by at most
// 2^-21 of itself. The idea, the tile and what bounds it: mma_gemm.cuh; the numbering: gather_mma.cuh and backward_weight_mma.cuh. Three
// times the instructions for the same loads, so a narrow tile serves all. Groups of fewer than 16 channels are left to other rows.
#include "cuda/backward_weight_mma.cuh"
#include "cuda/gather_mma.cuh"

namespace cnn_ext::cuda {

extern const Conv2dKernel conv2d_forward_mma_tf32x3_sm80 = {"conv2d_forward_mma_tf32x3_sm80",
                                                            80,
                                                            Conv2dDirection::forward,
                                                            suits_split_mma,
                                                            gather_mma_plan<SplitMmaTile, true>,
                                                            run_gather_tile<SplitMmaTile, float, true>,
                                                            /*needs_proof=*/true};
extern const Conv2dKernel conv2d_backward_input_mma_tf32x3_sm80 = {"conv2d_backward_input_mma_tf32x3_sm80",
                                                                   80,
                                                                   Conv2dDirection::backward_input,
                                                                   suits_split_mma,
                                                                   gather_mma_plan<SplitMmaTile, false>,
                                                                   run_gather_tile<SplitMmaTile, float, false>,
                                                                   /*needs_proof=*/true,
                                                                   /*adds_bias=*/true};
extern const Conv2dKernel conv2d_backward_weight_mma_tf32x3_sm80 = {"conv2d_backward_weight_mma_tf32x3_sm80",
                                                                    80,
                                                                    Conv2dDirection::backward_weight,
                                                                    suits_split_mma,
                                                                    backward_weight_mma_plan<SplitMmaTile>,
                                                                    run_backward_weight_tile<SplitMmaTile, float>,
                                                                    /*needs_proof=*/true};

}  // namespace cnn_ext::cuda
