#include "cpu/kernel_table.h"

#include "cpu/isa.h"

namespace cnn_ext::cpu {

// The rows that instruction sets have, the most special first. (Declared and listed by macros, for the same lines hold for each of them.)
// On x86-64, where hardly a processor is left that has no more than baseline, that has the rows alone that serve every shape, and not
// those marked SPECIAL, which are faster for some of them: cmake/isa.cmake compiles none of these. Those marked AVX2 are faster with its 16
// registers alone, and compiled for nothing else.
#define CNN_EXT_CONV2D_ROWS(ROW, SPECIAL, AVX2)      \
  SPECIAL(conv2d_forward_depthwise_channels)         \
  SPECIAL(conv2d_backward_input_depthwise_channels)  \
  SPECIAL(conv2d_backward_weight_depthwise_channels) \
  SPECIAL(conv2d_forward_grouped_channels)           \
  SPECIAL(conv2d_backward_input_grouped_channels)    \
  SPECIAL(conv2d_backward_weight_grouped_channels)   \
  AVX2(conv2d_forward_depthwise_rows)                \
  AVX2(conv2d_backward_input_depthwise_rows)         \
  SPECIAL(conv2d_forward_depthwise_planes)           \
  SPECIAL(conv2d_backward_input_depthwise_planes)    \
  SPECIAL(conv2d_backward_input_depthwise_strided)   \
  ROW(conv2d_forward_depthwise)                      \
  ROW(conv2d_backward_input_depthwise)               \
  SPECIAL(conv2d_backward_weight_depthwise_planes)   \
  ROW(conv2d_backward_weight_depthwise)              \
  SPECIAL(conv2d_forward_pointwise)                  \
  SPECIAL(conv2d_backward_input_pointwise)           \
  SPECIAL(conv2d_backward_input_patches)             \
  SPECIAL(conv2d_forward_winograd)                   \
  SPECIAL(conv2d_backward_input_winograd)            \
  SPECIAL(conv2d_forward_grouped)                    \
  SPECIAL(conv2d_backward_input_grouped)             \
  AVX2(conv2d_forward_short_sums)                    \
  SPECIAL(conv2d_forward_pixels)                     \
  SPECIAL(conv2d_backward_input_shares)              \
  SPECIAL(conv2d_backward_input_pixels)              \
  ROW(conv2d_forward_direct)                         \
  ROW(conv2d_backward_input_direct)                  \
  SPECIAL(conv2d_backward_weight_winograd)           \
  AVX2(conv2d_backward_weight_pointwise)             \
  SPECIAL(conv2d_backward_weight_taps)               \
  AVX2(conv2d_backward_weight_planes)                \
  ROW(conv2d_backward_weight_direct)                 \
  ROW(conv2d_backward_weight_padded)                 \
  ROW(conv2d_forward_converted)                      \
  ROW(conv2d_backward_input_converted)               \
  ROW(conv2d_backward_weight_converted)              \
  ROW(conv2d_backward_bias_direct)

#define CNN_EXT_CONV2D_RELU_POOL_ROWS(ROW, SPECIAL)        \
  SPECIAL(conv2d_relu_max_pool2d_forward_winograd)         \
  SPECIAL(conv2d_relu_max_pool2d_backward_input_winograd)  \
  SPECIAL(conv2d_relu_max_pool2d_backward_input_maxima)    \
  SPECIAL(conv2d_relu_max_pool2d_backward_weight_winograd) \
  SPECIAL(conv2d_relu_max_pool2d_backward_weight_maxima)   \
  SPECIAL(conv2d_relu_max_pool2d_forward_pixels)           \
  SPECIAL(conv2d_relu_max_pool2d_backward_input_pixels)    \
  SPECIAL(conv2d_relu_max_pool2d_forward_direct)           \
  SPECIAL(conv2d_relu_max_pool2d_backward_input_direct)    \
  SPECIAL(conv2d_relu_max_pool2d_backward_weight_taps)     \
  SPECIAL(conv2d_relu_max_pool2d_backward_weight_direct)   \
  ROW(conv2d_relu_max_pool2d_forward_converted)            \
  ROW(conv2d_relu_max_pool2d_backward_input_converted)     \
  ROW(conv2d_relu_max_pool2d_backward_weight_converted)    \
  ROW(conv2d_relu_max_pool2d_backward_bias_direct)

// Those whose packed weight may be kept.
#define CNN_EXT_PACKING_CONV2D_ROWS(ROW, SPECIAL, AVX2) \
  SPECIAL(conv2d_forward_pointwise_packing)             \
  SPECIAL(conv2d_forward_grouped_packing)               \
  AVX2(conv2d_forward_short_sums_packing)               \
  SPECIAL(conv2d_forward_pixels_packing)                \
  ROW(conv2d_forward_direct_packing)

#define CNN_EXT_PACKING_CONV2D_RELU_POOL_ROWS(ROW, SPECIAL) \
  SPECIAL(conv2d_relu_max_pool2d_forward_pixels_packing)    \
  SPECIAL(conv2d_relu_max_pool2d_forward_direct_packing)

#define CNN_EXT_POOL2D_ROWS(ROW, SPECIAL, AVX2) \
  SPECIAL(max_pool2d_forward_2x2)               \
  SPECIAL(max_pool2d_forward_strips)            \
  SPECIAL(max_pool2d_forward_separable)         \
  ROW(max_pool2d_forward_direct)                \
  ROW(max_pool2d_forward_converted)             \
  SPECIAL(max_pool2d_backward_2x2)              \
  AVX2(max_pool2d_backward_in_place)            \
  SPECIAL(max_pool2d_backward_scatter)          \
  ROW(max_pool2d_backward_direct)               \
  ROW(max_pool2d_backward_converted)            \
  ROW(max_pool2d_gather_direct)                 \
  ROW(max_pool2d_gather_converted)              \
  SPECIAL(avg_pool2d_forward_2x2)               \
  ROW(avg_pool2d_forward_direct)                \
  ROW(avg_pool2d_forward_converted)             \
  SPECIAL(avg_pool2d_backward_2x2)              \
  ROW(avg_pool2d_backward_direct)               \
  ROW(avg_pool2d_backward_converted)

#define CNN_EXT_SIZED_POOL2D_ROWS(ROW)     \
  ROW(adaptive_max_pool2d_forward_direct)  \
  ROW(adaptive_avg_pool2d_forward_direct)  \
  ROW(adaptive_avg_pool2d_backward_direct) \
  ROW(max_unpool2d_forward_direct)         \
  ROW(max_unpool2d_scatter_direct)         \
  ROW(max_unpool2d_gather_direct)

#if defined(__x86_64__)
#define CNN_EXT_FOR_EACH_ISA(DO) DO(avx512) DO(avx2) DO(baseline)
constexpr Isa kLeastWithSpecialRows = Isa::avx2;
#else
#define CNN_EXT_FOR_EACH_ISA(DO) DO(baseline)
constexpr Isa kLeastWithSpecialRows = Isa::baseline;
#endif

#define CNN_EXT_DECLARE_CONV2D(row) extern const Conv2dKernel row;
#define CNN_EXT_DECLARE_CONV2D_RELU_POOL(row) extern const Conv2dReluPoolKernel row;
#define CNN_EXT_DECLARE_POOL2D(row) extern const Pool2dKernel row;
#define CNN_EXT_DECLARE_SIZED_POOL2D(row) extern const SizedPool2dKernel row;
#define CNN_EXT_DECLARE_PACKING_CONV2D(row) extern const PackingConv2d row;
#define CNN_EXT_DECLARE_PACKING_CONV2D_RELU_POOL(row) extern const PackingConv2dReluPool row;
#define CNN_EXT_DECLARE(isa)                                                                                                  \
  namespace isa {                                                                                                             \
  constexpr bool kHasSpecialRows = Isa::isa >= kLeastWithSpecialRows, kHasAvx2Rows = Isa::isa == Isa::avx2;                   \
  CNN_EXT_CONV2D_ROWS(CNN_EXT_DECLARE_CONV2D, CNN_EXT_DECLARE_CONV2D, CNN_EXT_DECLARE_CONV2D)                                 \
  CNN_EXT_CONV2D_RELU_POOL_ROWS(CNN_EXT_DECLARE_CONV2D_RELU_POOL, CNN_EXT_DECLARE_CONV2D_RELU_POOL)                           \
  CNN_EXT_POOL2D_ROWS(CNN_EXT_DECLARE_POOL2D, CNN_EXT_DECLARE_POOL2D, CNN_EXT_DECLARE_POOL2D)                                 \
  CNN_EXT_SIZED_POOL2D_ROWS(CNN_EXT_DECLARE_SIZED_POOL2D)                                                                     \
  CNN_EXT_PACKING_CONV2D_ROWS(CNN_EXT_DECLARE_PACKING_CONV2D, CNN_EXT_DECLARE_PACKING_CONV2D, CNN_EXT_DECLARE_PACKING_CONV2D) \
  CNN_EXT_PACKING_CONV2D_RELU_POOL_ROWS(CNN_EXT_DECLARE_PACKING_CONV2D_RELU_POOL, CNN_EXT_DECLARE_PACKING_CONV2D_RELU_POOL)   \
  }
CNN_EXT_FOR_EACH_ISA(CNN_EXT_DECLARE)

#if defined(CNN_EXT_HAS_AMX)
namespace avx512_bf16 {
extern const Conv2dKernel conv2d_forward_amx, conv2d_backward_input_amx, conv2d_backward_weight_amx;
extern const Conv2dKernel conv2d_forward_amx_runs, conv2d_backward_input_amx_runs;
extern const Conv2dKernel conv2d_forward_dot, conv2d_backward_input_dot;
extern const PackingConv2d conv2d_forward_amx_packing, conv2d_forward_amx_runs_packing;
}  // namespace avx512_bf16
#endif

// Made of other rows: the fused operator of the rows of its parts, for every shape that no fused kernel serves, and backward_input where
// the padding holds values of the input.
namespace composed {
extern const Conv2dKernel conv2d_backward_input;
extern const Conv2dReluPoolKernel conv2d_relu_max_pool2d_forward, conv2d_relu_max_pool2d_backward_input,
    conv2d_relu_max_pool2d_backward_weight, conv2d_relu_max_pool2d_backward_bias;
}  // namespace composed

// The oracle: the definition as a loop nest, the last row of each op and direction.
namespace naive {
extern const Conv2dKernel conv2d_forward, conv2d_backward_input, conv2d_backward_weight, conv2d_backward_bias;
extern const Conv2dReluPoolKernel conv2d_relu_max_pool2d_forward, conv2d_relu_max_pool2d_backward_input,
    conv2d_relu_max_pool2d_backward_weight, conv2d_relu_max_pool2d_backward_bias;
extern const Pool2dKernel max_pool2d_forward, max_pool2d_backward, max_pool2d_gather, avg_pool2d_forward, avg_pool2d_backward;
extern const SizedPool2dKernel adaptive_max_pool2d_forward, adaptive_avg_pool2d_forward, adaptive_avg_pool2d_backward, max_unpool2d_forward,
    max_unpool2d_scatter, max_unpool2d_gather;
}  // namespace naive

#define CNN_EXT_ADD(row) rows.push_back(&row);
#define CNN_EXT_ADD_SPECIAL(row) \
  if constexpr (kHasSpecialRows) rows.push_back(&row);
#define CNN_EXT_ADD_AVX2(row) \
  if constexpr (kHasAvx2Rows) rows.push_back(&row);
#define CNN_EXT_ADD_CONV2D(isa)                                             \
  {                                                                         \
    using namespace isa;                                                    \
    CNN_EXT_CONV2D_ROWS(CNN_EXT_ADD, CNN_EXT_ADD_SPECIAL, CNN_EXT_ADD_AVX2) \
  }
#define CNN_EXT_ADD_CONV2D_RELU_POOL(isa)                           \
  {                                                                 \
    using namespace isa;                                            \
    CNN_EXT_CONV2D_RELU_POOL_ROWS(CNN_EXT_ADD, CNN_EXT_ADD_SPECIAL) \
  }
#define CNN_EXT_ADD_POOL2D(isa)                                             \
  {                                                                         \
    using namespace isa;                                                    \
    CNN_EXT_POOL2D_ROWS(CNN_EXT_ADD, CNN_EXT_ADD_SPECIAL, CNN_EXT_ADD_AVX2) \
  }

#define CNN_EXT_ADD_SIZED_POOL2D(isa)      \
  {                                        \
    using namespace isa;                   \
    CNN_EXT_SIZED_POOL2D_ROWS(CNN_EXT_ADD) \
  }

const std::vector<const Conv2dKernel*>& conv2d_kernels() {
  static const std::vector<const Conv2dKernel*> table = [] {
    std::vector<const Conv2dKernel*> rows;
#if defined(CNN_EXT_HAS_AMX)
    if (has_matrix_unit())
      rows = {&avx512_bf16::conv2d_forward_amx, &avx512_bf16::conv2d_backward_input_amx, &avx512_bf16::conv2d_backward_weight_amx,
              &avx512_bf16::conv2d_forward_amx_runs, &avx512_bf16::conv2d_backward_input_amx_runs};
    const auto add_dot_rows = [&rows] {
      rows.insert(rows.end(), {&avx512_bf16::conv2d_forward_dot, &avx512_bf16::conv2d_backward_input_dot});
    };
    if (has_fast_dot_products()) add_dot_rows();
#endif
    CNN_EXT_FOR_EACH_ISA(CNN_EXT_ADD_CONV2D)
#if defined(CNN_EXT_HAS_AMX)
    if (!has_fast_dot_products()) add_dot_rows();  // behind the rows that convert, which are faster and take the same
#endif
    for (const Conv2dKernel* row : {&composed::conv2d_backward_input, &naive::conv2d_forward, &naive::conv2d_backward_input,
                                    &naive::conv2d_backward_weight, &naive::conv2d_backward_bias}) {
      rows.push_back(row);
    }
    return rows;
  }();
  return table;
}

const std::vector<const Conv2dReluPoolKernel*>& conv2d_relu_pool_kernels() {
  static const std::vector<const Conv2dReluPoolKernel*> table = [] {
    std::vector<const Conv2dReluPoolKernel*> rows;
    CNN_EXT_FOR_EACH_ISA(CNN_EXT_ADD_CONV2D_RELU_POOL)
    for (const Conv2dReluPoolKernel* row :
         {&composed::conv2d_relu_max_pool2d_forward, &composed::conv2d_relu_max_pool2d_backward_input,
          &composed::conv2d_relu_max_pool2d_backward_weight, &composed::conv2d_relu_max_pool2d_backward_bias,
          &naive::conv2d_relu_max_pool2d_forward, &naive::conv2d_relu_max_pool2d_backward_input,
          &naive::conv2d_relu_max_pool2d_backward_weight, &naive::conv2d_relu_max_pool2d_backward_bias}) {
      rows.push_back(row);
    }
    return rows;
  }();
  return table;
}

#define CNN_EXT_ADD_PACKING_CONV2D(isa)                                             \
  {                                                                                 \
    using namespace isa;                                                            \
    CNN_EXT_PACKING_CONV2D_ROWS(CNN_EXT_ADD, CNN_EXT_ADD_SPECIAL, CNN_EXT_ADD_AVX2) \
  }
#define CNN_EXT_ADD_PACKING_CONV2D_RELU_POOL(isa)                           \
  {                                                                         \
    using namespace isa;                                                    \
    CNN_EXT_PACKING_CONV2D_RELU_POOL_ROWS(CNN_EXT_ADD, CNN_EXT_ADD_SPECIAL) \
  }

const std::vector<const PackingConv2d*>& packing_conv2d() {
  static const std::vector<const PackingConv2d*> table = [] {
    std::vector<const PackingConv2d*> rows;
#if defined(CNN_EXT_HAS_AMX)
    if (has_matrix_unit()) rows = {&avx512_bf16::conv2d_forward_amx_packing, &avx512_bf16::conv2d_forward_amx_runs_packing};
#endif
    CNN_EXT_FOR_EACH_ISA(CNN_EXT_ADD_PACKING_CONV2D)
    return rows;
  }();
  return table;
}

const std::vector<const PackingConv2dReluPool*>& packing_conv2d_relu_pool() {
  static const std::vector<const PackingConv2dReluPool*> table = [] {
    std::vector<const PackingConv2dReluPool*> rows;
    CNN_EXT_FOR_EACH_ISA(CNN_EXT_ADD_PACKING_CONV2D_RELU_POOL)
    return rows;
  }();
  return table;
}

const std::vector<const Pool2dKernel*>& pool2d_kernels() {
  static const std::vector<const Pool2dKernel*> table = [] {
    std::vector<const Pool2dKernel*> rows;
    CNN_EXT_FOR_EACH_ISA(CNN_EXT_ADD_POOL2D)
    for (const Pool2dKernel* row : {&naive::max_pool2d_forward, &naive::max_pool2d_backward, &naive::max_pool2d_gather,
                                    &naive::avg_pool2d_forward, &naive::avg_pool2d_backward}) {
      rows.push_back(row);
    }
    return rows;
  }();
  return table;
}

const std::vector<const SizedPool2dKernel*>& sized_pool2d_kernels() {
  static const std::vector<const SizedPool2dKernel*> table = [] {
    std::vector<const SizedPool2dKernel*> rows;
    CNN_EXT_FOR_EACH_ISA(CNN_EXT_ADD_SIZED_POOL2D)
    for (const SizedPool2dKernel* row :
         {&naive::adaptive_max_pool2d_forward, &naive::adaptive_avg_pool2d_forward, &naive::adaptive_avg_pool2d_backward,
          &naive::max_unpool2d_forward, &naive::max_unpool2d_scatter, &naive::max_unpool2d_gather}) {
      rows.push_back(row);
    }
    return rows;
  }();
  return table;
}

}  // namespace cnn_ext::cpu
