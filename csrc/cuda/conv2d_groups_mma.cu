// Groups of 8 to 16 channels on tensor cores, for backward_weight also of 4 to 7, in TF32 (where the policy allows it), float16 and
// bfloat16, for what does not lie in slabs (slab.cuh): groups of other sizes, or of different ones on both sides. Four groups to a tile,
// each with 64 rows and 16 columns, of which a smaller group leaves some empty. In nhwc the chunks of neighbouring groups are neighbours in
// memory. The idea and what bounds it: mma_gemm.cuh; the numbering: gather_mma.cuh and backward_weight_mma.cuh.
#include "cuda/backward_weight_mma.cuh"
#include "cuda/gather_mma.cuh"

namespace cnn_ext::cuda {
namespace {

static_assert(GroupsMmaTile::kGroups == kMostTileGroups && GroupsMmaTile::kGroupCols == kMostGroupChannels);

bool accepts_gather(const Conv2dShape& s) { return suits_groups_mma(s, 8); }
bool accepts_backward_weight(const Conv2dShape& s) { return suits_groups_mma(s, 4); }

template <bool kForward>
void run_gather(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, cudaStream_t stream) {
  with_single_type(s.dtype, [&](auto element) { run_gather_tile<GroupsMmaTile, decltype(element), kForward>(s, b, workspace, stream); });
}

void run_backward_weight(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, cudaStream_t stream) {
  with_single_type(s.dtype, [&](auto element) { run_backward_weight_tile<GroupsMmaTile, decltype(element)>(s, b, workspace, stream); });
}

}  // namespace

extern const Conv2dKernel conv2d_forward_groups_mma_sm80 = {"conv2d_forward_groups_mma_sm80",
                                                            80,
                                                            Conv2dDirection::forward,
                                                            accepts_gather,
                                                            gather_mma_plan<GroupsMmaTile, true>,
                                                            run_gather<true>,
                                                            /*needs_proof=*/true};
extern const Conv2dKernel conv2d_backward_input_groups_mma_sm80 = {"conv2d_backward_input_groups_mma_sm80",
                                                                   80,
                                                                   Conv2dDirection::backward_input,
                                                                   accepts_gather,
                                                                   gather_mma_plan<GroupsMmaTile, false>,
                                                                   run_gather<false>,
                                                                   /*needs_proof=*/true,
                                                                   /*adds_bias=*/true};
extern const Conv2dKernel conv2d_backward_weight_groups_mma_sm80 = {"conv2d_backward_weight_groups_mma_sm80",
                                                                    80,
                                                                    Conv2dDirection::backward_weight,
                                                                    accepts_backward_weight,
                                                                    backward_weight_mma_plan<GroupsMmaTile>,
                                                                    run_backward_weight,
                                                                    /*needs_proof=*/true};

}  // namespace cnn_ext::cuda
