// THE table: every kernel there is, in order of preference. It alone drives the choice at run time, the tests, the benchmarks and
// cnn_ext.kernels(). A new kernel is one new file under kernels/ and one line in kernel_table.cpp.
#pragma once

#include <algorithm>
#include <cstdint>
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

inline Conv2dShape of_one_image(Conv2dShape shape) {
  shape.batch = 1;
  return shape;
}
inline Conv2dReluPoolShape of_one_image(Conv2dReluPoolShape shape) {
  shape.conv.batch = 1;
  return shape;
}

// Rows stage what lies between the taps of a dilated window, too: with dilations of thousands that is more than their int32 can count. Of
// windows so large that they may come near it, the plan for one image and one thread decides.
template <class Kernel, class Shape>
bool can_stage(const Kernel& row, const Shape& shape, const Conv2dShape& conv) {
  constexpr double kLargeWindow = 1 << 26;  // elements
  const double rows = static_cast<double>((conv.kernel_h - 1) * conv.dilation_h + 1);
  const double columns = static_cast<double>((conv.kernel_w - 1) * conv.dilation_w + conv.out_w * conv.stride_w);
  const double channels = static_cast<double>(std::max(conv.in_channels, conv.out_channels) / conv.groups);
  if (rows * columns * channels < kLargeWindow) return true;
  const int64_t packed_weights = 8 * conv.out_channels * (conv.in_channels / conv.groups) * conv.kernel_h * conv.kernel_w;  // of doubles
  return row.plan(of_one_image(shape), 1).workspace_bytes <= static_cast<size_t>(INT32_MAX + packed_weights);
}

// Whether a row serves a shape.
template <class Kernel, class Shape>
bool takes(const Kernel& row, const Shape& shape) {
  return row.accepts(shape);
}
inline bool takes(const Conv2dKernel& row, const Conv2dShape& shape) {
  return (shape.padding_mode == PaddingMode::zeros || row.maps_padding) && row.accepts(shape) && can_stage(row, shape, shape);
}
inline bool takes(const Conv2dReluPoolKernel& row, const Conv2dReluPoolShape& shape) {
  return row.accepts(shape) && can_stage(row, shape, shape.conv);
}

}  // namespace cnn_ext::cpu
