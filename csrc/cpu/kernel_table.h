// THE table: every kernel there is, in order of preference. It alone drives the choice at run time, the tests, the benchmarks and
// cnn_ext.kernels(). A new kernel is one new file under kernels/ and one line in kernel_table.cpp.
#pragma once

#include <vector>

#include "cpu/kernel.h"
#include "cpu/packed.h"
#include "cpu/sized_pool2d_kernel.h"

namespace cnn_ext::cpu {

const std::vector<const Conv2dKernel*>& conv2d_kernels();
const std::vector<const Conv2dReluPoolKernel*>& conv2d_relu_pool_kernels();
const std::vector<const Pool2dKernel*>& pool2d_kernels();
const std::vector<const SizedPool2dKernel*>& sized_pool2d_kernels();

// Those of the rows whose packed weight may be kept.
const std::vector<const PackingConv2d*>& packing_conv2d();
const std::vector<const PackingConv2dReluPool*>& packing_conv2d_relu_pool();

// Whether a row serves a shape.
template <class Kernel, class Shape>
bool takes(const Kernel& row, const Shape& shape) {
  return row.accepts(shape);
}
inline bool takes(const Conv2dKernel& row, const Conv2dShape& shape) {
  return (shape.padding_mode == PaddingMode::zeros || row.maps_padding) && row.accepts(shape);
}

}  // namespace cnn_ext::cpu
