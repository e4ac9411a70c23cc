#include "cuda/kernel_table.h"

namespace cnn_ext::cuda {

// Rows that need instructions of one architecture alone: where the build is for it.
#ifdef CNN_EXT_HAS_SM90A
#define CNN_EXT_CONV2D_SM90A_ROWS(ROW)           \
  ROW(conv2d_forward_patch_wgmma_sm90a)          \
  ROW(conv2d_forward_wgmma_sm90a)                \
  ROW(conv2d_backward_input_patch_wgmma_sm90a)   \
  ROW(conv2d_backward_input_wgmma_sm90a)         \
  ROW(conv2d_backward_weight_planes_wgmma_sm90a) \
  ROW(conv2d_backward_weight_patch_wgmma_sm90a)  \
  ROW(conv2d_backward_weight_wgmma_sm90a)        \
  ROW(conv2d_backward_weight_wgmma_tf32_sm90a)
#define CNN_EXT_CONV2D_RELU_POOL_SM90A_ROWS(ROW)        \
  ROW(conv2d_relu_max_pool2d_forward_patch_wgmma_sm90a) \
  ROW(conv2d_relu_max_pool2d_forward_wgmma_sm90a)
#define CNN_EXT_POOL2D_SM90A_ROWS(ROW) ROW(avg_pool2d_forward_global_cluster_sm90a)
#else
#define CNN_EXT_CONV2D_SM90A_ROWS(ROW)
#define CNN_EXT_CONV2D_RELU_POOL_SM90A_ROWS(ROW)
#define CNN_EXT_POOL2D_SM90A_ROWS(ROW)
#endif

// The most special first.
#define CNN_EXT_CONV2D_ROWS(ROW)                      \
  ROW(conv2d_forward_dot_sm80)                        \
  ROW(conv2d_backward_input_dot_sm80)                 \
  ROW(conv2d_backward_weight_dot_sm80)                \
  ROW(conv2d_backward_weight_few_pixels_sm80)         \
  CNN_EXT_CONV2D_SM90A_ROWS(ROW)                      \
  ROW(conv2d_forward_slab_mma_sm80)                   \
  ROW(conv2d_forward_columns_sm80)                    \
  ROW(conv2d_forward_depthwise_channels_sm80)         \
  ROW(conv2d_forward_depthwise_large_sm80)            \
  ROW(conv2d_forward_depthwise_sm80)                  \
  ROW(conv2d_forward_depthwise_planes_sm80)           \
  ROW(conv2d_forward_patch_mma_sm80)                  \
  ROW(conv2d_forward_groups_mma_sm80)                 \
  ROW(conv2d_forward_mma_sm80)                        \
  ROW(conv2d_forward_mma_tf32x3_sm80)                 \
  ROW(conv2d_forward_dmma_sm80)                       \
  ROW(conv2d_forward_implicit_gemm_sm80)              \
  ROW(conv2d_forward_direct_sm80)                     \
  ROW(conv2d_forward_wide_sm80)                       \
  ROW(conv2d_backward_input_slab_mma_sm80)            \
  ROW(conv2d_backward_input_columns_sm80)             \
  ROW(conv2d_backward_input_depthwise_channels_sm80)  \
  ROW(conv2d_backward_input_depthwise_large_sm80)     \
  ROW(conv2d_backward_input_depthwise_sm80)           \
  ROW(conv2d_backward_input_depthwise_planes_sm80)    \
  ROW(conv2d_backward_input_cells_mma_sm80)           \
  ROW(conv2d_backward_input_patch_mma_sm80)           \
  ROW(conv2d_backward_input_groups_mma_sm80)          \
  ROW(conv2d_backward_input_mma_sm80)                 \
  ROW(conv2d_backward_input_mma_tf32x3_sm80)          \
  ROW(conv2d_backward_input_dmma_sm80)                \
  ROW(conv2d_backward_input_implicit_gemm_sm80)       \
  ROW(conv2d_backward_input_direct_sm80)              \
  ROW(conv2d_backward_input_wide_sm80)                \
  ROW(conv2d_backward_weight_depthwise_large_sm80)    \
  ROW(conv2d_backward_weight_depthwise_channels_sm80) \
  ROW(conv2d_backward_weight_depthwise_planes_sm80)   \
  ROW(conv2d_backward_weight_depthwise_sm80)          \
  ROW(conv2d_backward_weight_patch_mma_sm80)          \
  ROW(conv2d_backward_weight_slab_mma_sm80)           \
  ROW(conv2d_backward_weight_groups_mma_sm80)         \
  ROW(conv2d_backward_weight_mma_sm80)                \
  ROW(conv2d_backward_weight_mma_tf32x3_sm80)         \
  ROW(conv2d_backward_weight_dmma_sm80)               \
  ROW(conv2d_backward_weight_implicit_gemm_sm80)      \
  ROW(conv2d_backward_weight_direct_sm80)             \
  ROW(conv2d_backward_weight_wide_sm80)               \
  ROW(conv2d_backward_bias_reduction_sm80)            \
  ROW(conv2d_backward_bias_wide_sm80)

#define CNN_EXT_CONV2D_RELU_POOL_ROWS(ROW)                       \
  CNN_EXT_CONV2D_RELU_POOL_SM90A_ROWS(ROW)                       \
  ROW(conv2d_relu_max_pool2d_forward_patch_mma_sm80)             \
  ROW(conv2d_relu_max_pool2d_forward_mma_sm80)                   \
  ROW(conv2d_relu_max_pool2d_forward_implicit_gemm_sm80)         \
  ROW(conv2d_relu_max_pool2d_forward_composed_sm80)              \
  ROW(conv2d_relu_max_pool2d_backward_input_implicit_gemm_sm80)  \
  ROW(conv2d_relu_max_pool2d_backward_input_composed_sm80)       \
  ROW(conv2d_relu_max_pool2d_backward_weight_implicit_gemm_sm80) \
  ROW(conv2d_relu_max_pool2d_backward_weight_composed_sm80)      \
  ROW(conv2d_relu_max_pool2d_backward_bias_reduction_sm80)       \
  ROW(conv2d_relu_max_pool2d_backward_bias_wide_sm80)

#define CNN_EXT_POOL2D_ROWS(ROW)         \
  CNN_EXT_POOL2D_SM90A_ROWS(ROW)         \
  ROW(max_pool2d_forward_separable_sm80) \
  ROW(max_pool2d_backward_scatter_sm80)  \
  ROW(max_pool2d_forward_strips_sm80)    \
  ROW(max_pool2d_backward_strips_sm80)   \
  ROW(avg_pool2d_forward_global_sm80)    \
  ROW(avg_pool2d_backward_global_sm80)   \
  ROW(avg_pool2d_forward_strips_sm80)    \
  ROW(avg_pool2d_backward_strips_sm80)   \
  ROW(max_pool2d_forward_direct_sm80)    \
  ROW(max_pool2d_forward_wide_sm80)      \
  ROW(max_pool2d_backward_direct_sm80)   \
  ROW(max_pool2d_backward_wide_sm80)     \
  ROW(max_pool2d_gather_direct_sm80)     \
  ROW(max_pool2d_gather_wide_sm80)       \
  ROW(avg_pool2d_forward_direct_sm80)    \
  ROW(avg_pool2d_forward_wide_sm80)      \
  ROW(avg_pool2d_backward_direct_sm80)   \
  ROW(avg_pool2d_backward_wide_sm80)

#define CNN_EXT_SIZED_POOL2D_ROWS(ROW)          \
  ROW(adaptive_max_pool2d_forward_direct_sm80)  \
  ROW(adaptive_avg_pool2d_forward_direct_sm80)  \
  ROW(adaptive_avg_pool2d_backward_direct_sm80) \
  ROW(max_unpool2d_forward_direct_sm80)         \
  ROW(max_unpool2d_scatter_direct_sm80)         \
  ROW(max_unpool2d_gather_direct_sm80)

#define CNN_EXT_DECLARE_CONV2D(row) extern const Conv2dKernel row;
#define CNN_EXT_DECLARE_CONV2D_RELU_POOL(row) extern const Conv2dReluPoolKernel row;
#define CNN_EXT_DECLARE_POOL2D(row) extern const Pool2dKernel row;
#define CNN_EXT_DECLARE_SIZED_POOL2D(row) extern const SizedPool2dKernel row;
CNN_EXT_CONV2D_ROWS(CNN_EXT_DECLARE_CONV2D)
CNN_EXT_CONV2D_RELU_POOL_ROWS(CNN_EXT_DECLARE_CONV2D_RELU_POOL)
CNN_EXT_POOL2D_ROWS(CNN_EXT_DECLARE_POOL2D)
CNN_EXT_SIZED_POOL2D_ROWS(CNN_EXT_DECLARE_SIZED_POOL2D)

#define CNN_EXT_ADDRESS(row) &row,

const std::vector<const Conv2dKernel*>& conv2d_kernels() {
  static const std::vector<const Conv2dKernel*> table = {CNN_EXT_CONV2D_ROWS(CNN_EXT_ADDRESS)};
  return table;
}

const std::vector<const Conv2dReluPoolKernel*>& conv2d_relu_pool_kernels() {
  static const std::vector<const Conv2dReluPoolKernel*> table = {CNN_EXT_CONV2D_RELU_POOL_ROWS(CNN_EXT_ADDRESS)};
  return table;
}

const std::vector<const Pool2dKernel*>& pool2d_kernels() {
  static const std::vector<const Pool2dKernel*> table = {CNN_EXT_POOL2D_ROWS(CNN_EXT_ADDRESS)};
  return table;
}

const std::vector<const SizedPool2dKernel*>& sized_pool2d_kernels() {
  static const std::vector<const SizedPool2dKernel*> table = {CNN_EXT_SIZED_POOL2D_ROWS(CNN_EXT_ADDRESS)};
  return table;
}

}  // namespace cnn_ext::cuda
