// THE table of CUDA kernels, in order of preference: see csrc/cpu/kernel_table.h. A new kernel is one new file and one line in
// kernel_table.cpp.
#pragma once

#include <vector>

#include "cuda/kernel.h"

namespace cnn_ext::cuda {

const std::vector<const Conv2dKernel*>& conv2d_kernels();
const std::vector<const Conv2dReluPoolKernel*>& conv2d_relu_pool_kernels();
const std::vector<const Pool2dKernel*>& pool2d_kernels();
const std::vector<const SizedPool2dKernel*>& sized_pool2d_kernels();

}  // namespace cnn_ext::cuda
