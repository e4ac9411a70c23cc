// float64 on tensor cores. The idea, the tile and what bounds it: mma_gemm.cuh; the numbering: gather_mma.cuh and backward_weight_mma.cuh.
// The sums of a tile take twice the registers and the shared memory, so one block has a multiprocessor to itself. Groups of fewer than 16
// channels are left to other rows.
#include "cuda/backward_weight_mma.cuh"
#include "cuda/gather_mma.cuh"

namespace cnn_ext::cuda {

extern const Conv2dKernel conv2d_forward_dmma_sm80 = {"conv2d_forward_dmma_sm80",
                                                      80,
                                                      Conv2dDirection::forward,
                                                      suits_double_mma,
                                                      gather_mma_plan<NarrowMmaTile, true>,
                                                      run_gather_tile<NarrowMmaTile, double, true>,
                                                      /*needs_proof=*/true};
extern const Conv2dKernel conv2d_backward_input_dmma_sm80 = {"conv2d_backward_input_dmma_sm80",
                                                             80,
                                                             Conv2dDirection::backward_input,
                                                             suits_double_mma,
                                                             gather_mma_plan<NarrowMmaTile, false>,
                                                             run_gather_tile<NarrowMmaTile, double, false>,
                                                             /*needs_proof=*/true,
                                                             /*adds_bias=*/true};
extern const Conv2dKernel conv2d_backward_weight_dmma_sm80 = {"conv2d_backward_weight_dmma_sm80",
                                                              80,
                                                              Conv2dDirection::backward_weight,
                                                              suits_double_mma,
                                                              backward_weight_mma_plan<NarrowMmaTile>,
                                                              run_backward_weight_tile<NarrowMmaTile, double>,
                                                              /*needs_proof=*/true};

}  // namespace cnn_ext::cuda
