// grad_weight[k, c, r, s] = sum over n, oh, ow of grad_output[n, k, oh, ow] * input[n, c, ih, iw] on tensor cores, in TF32 (where the
// policy allows it), float16 and bfloat16. The numbering: backward_weight_mma.cuh; the tile and what bounds it: mma_gemm.cuh. Groups of
// fewer than 16 input channels are left to other rows: most of the tile would be empty.
#include "cuda/backward_weight_mma.cuh"

namespace cnn_ext::cuda {
namespace {

bool is_narrow(const Conv2dShape& s) { return has_few_cols(s.out_channels / s.groups) || reads_words_across(s.dtype); }

Plan plan(const Conv2dShape& s) {
  return is_narrow(s) ? backward_weight_mma_plan<NarrowMmaTile>(s) : backward_weight_mma_plan<WideMmaTile>(s);
}

// The splits are those of the plan whichever loader runs, so that the bits do not depend on the alignment.
void run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, cudaStream_t stream) {
  const Splits splits = is_narrow(s) ? WeightDivision<NarrowMmaTile>(s).splits : WeightDivision<WideMmaTile>(s).splits;
  with_single_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    const WeightProblem<T> problem(s, b, workspace);
    if (!problem.has_vectors()) {
      launch_backward_weight_mma<NarrowMmaTile, false>(s, problem, splits, stream);
    } else if (is_narrow(s)) {
      launch_backward_weight_mma<NarrowMmaTile, true>(s, problem, splits, stream);
    } else if constexpr (!std::is_same_v<T, float>) {
      launch_backward_weight_mma<WideMmaTile, true>(s, problem, splits, stream);
    }
    launch_sum_partials<T>(workspace, splits, weight_elements(s), b.grad_weight, stream);
  });
}

}  // namespace

extern const Conv2dKernel conv2d_backward_weight_mma_sm80 = {
    "conv2d_backward_weight_mma_sm80", 80, Conv2dDirection::backward_weight, suits_mma, plan, run, /*needs_proof=*/true};

}  // namespace cnn_ext::cuda
