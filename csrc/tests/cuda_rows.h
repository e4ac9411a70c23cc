// How a row of either table is called for cuda_check: with the operands of a case, and which CPU row has the truth.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "core/fused_pool.h"
#include "cpu/sized_pool2d_kernel.h"
#include "cuda/common.cuh"
#include "cuda/kernel.h"
#include "tests/cuda_operands.h"

namespace cnn_ext::cpu::naive {
extern const Conv2dKernel conv2d_forward, conv2d_backward_input, conv2d_backward_weight, conv2d_backward_bias;
extern const Conv2dReluPoolKernel conv2d_relu_max_pool2d_forward, conv2d_relu_max_pool2d_backward_input,
    conv2d_relu_max_pool2d_backward_weight, conv2d_relu_max_pool2d_backward_bias;
extern const Pool2dKernel max_pool2d_forward, max_pool2d_backward, max_pool2d_gather, avg_pool2d_forward, avg_pool2d_backward;
extern const SizedPool2dKernel adaptive_max_pool2d_forward, adaptive_avg_pool2d_forward, adaptive_avg_pool2d_backward, max_unpool2d_forward,
    max_unpool2d_scatter, max_unpool2d_gather;
}  // namespace cnn_ext::cpu::naive

namespace cnn_ext::tests {

namespace naive = cnn_ext::cpu::naive;

inline const cpu::Conv2dKernel& truth_of(const cuda::Conv2dKernel& row) {
  static const cpu::Conv2dKernel* const rows[] = {&naive::conv2d_forward, &naive::conv2d_backward_input, &naive::conv2d_backward_weight,
                                                  &naive::conv2d_backward_bias};
  return *rows[static_cast<int>(row.direction)];
}

inline const cpu::Conv2dReluPoolKernel& truth_of(const cuda::Conv2dReluPoolKernel& row) {
  static const cpu::Conv2dReluPoolKernel* const rows[] = {
      &naive::conv2d_relu_max_pool2d_forward, &naive::conv2d_relu_max_pool2d_backward_input, &naive::conv2d_relu_max_pool2d_backward_weight,
      &naive::conv2d_relu_max_pool2d_backward_bias};
  return *rows[static_cast<int>(row.direction)];
}

inline const cpu::Pool2dKernel& truth_of(const cuda::Pool2dKernel& row) {
  static const cpu::Pool2dKernel* const rows[][3] = {{&naive::max_pool2d_forward, &naive::max_pool2d_backward, &naive::max_pool2d_gather},
                                                     {&naive::avg_pool2d_forward, &naive::avg_pool2d_backward, nullptr}};
  return *rows[static_cast<int>(row.op)][static_cast<int>(row.direction)];
}

inline const cpu::SizedPool2dKernel& truth_of(const cuda::SizedPool2dKernel& row) {
  static const cpu::SizedPool2dKernel* const rows[][4] = {
      {&naive::adaptive_max_pool2d_forward, nullptr, nullptr, nullptr},
      {&naive::adaptive_avg_pool2d_forward, &naive::adaptive_avg_pool2d_backward, nullptr, nullptr},
      {&naive::max_unpool2d_forward, nullptr, &naive::max_unpool2d_scatter, &naive::max_unpool2d_gather}};
  return *rows[static_cast<int>(row.op)][static_cast<int>(row.direction)];
}

inline void call(const cpu::Conv2dKernel& row, Conv2dShape s, const Conv2dBuffers& b, void* workspace) {
  s.dtype = DType::float64;
  row.run(s, b, workspace, 1);
}
inline void call(const cuda::Conv2dKernel& row, const Conv2dShape& s, const Conv2dBuffers& b, void* workspace) {
  row.run(s, b, workspace, nullptr);
}
inline void call(const cpu::Conv2dReluPoolKernel& row, Conv2dReluPoolShape s, const Conv2dReluPoolBuffers& b, void* workspace) {
  s.conv.dtype = DType::float64;
  row.run(s, b, workspace, 1);
}
inline void call(const cuda::Conv2dReluPoolKernel& row, const Conv2dReluPoolShape& s, const Conv2dReluPoolBuffers& b, void* workspace) {
  row.run(s, b, workspace, nullptr);
}
// The naive rows of pooling, with a workspace.
template <class Kernel, class Shape, class Buffers>
void call_pooling(const Kernel& row, Shape s, const Buffers& b) {
  s.dtype = DType::float64;
  std::vector<double> workspace(row.plan(s, 1).workspace_bytes / sizeof(double));
  row.run(s, b, workspace.data(), 1);
}
inline void call(const cpu::Pool2dKernel& row, const Pool2dShape& s, const Pool2dBuffers& b) { call_pooling(row, s, b); }
inline void call(const cuda::Pool2dKernel& row, const Pool2dShape& s, const Pool2dBuffers& b) { row.run(s, b, nullptr); }
inline void call(const cpu::SizedPool2dKernel& row, const SizedPool2dShape& s, const SizedPool2dBuffers& b) { call_pooling(row, s, b); }
inline void call(const cuda::SizedPool2dKernel& row, const SizedPool2dShape& s, const SizedPool2dBuffers& b) { row.run(s, b, nullptr); }

// Bytes of the workspace; the naive rows of convolutions need none.
inline size_t workspace_bytes(const cpu::Conv2dKernel&, const Conv2dShape&) { return 0; }
inline size_t workspace_bytes(const cpu::Conv2dReluPoolKernel&, const Conv2dReluPoolShape&) { return 0; }
template <class Kernel, class Shape>
inline size_t workspace_bytes(const Kernel& row, const Shape& s) {
  return row.plan(s).workspace_bytes;
}

template <class Operands, class Kernel, class Shape>
void* workspace_of(Operands& operands, const Kernel& row, const Shape& s) {
  const size_t alignment = 256;
  return operands.bytes(static_cast<int64_t>((workspace_bytes(row, s) + alignment - 1) / alignment * alignment));
}

template <class T, class Stored, class Kernel>
Result<Stored> run_row(const Kernel& row, const Conv2dShape& s, const Run& run, const std::vector<uint8_t>&) {
  emulation::set_order(run.order);
  Operands<T, Stored> operands(run);
  const int64_t input = s.batch * s.in_channels * s.in_h * s.in_w, output = s.batch * s.out_channels * s.out_h * s.out_w;
  const int64_t weight = s.out_channels * (s.in_channels / s.groups) * s.kernel_h * s.kernel_w;
  const bool forward = row.direction == Conv2dDirection::forward;
  Conv2dBuffers b{};
  if (forward || row.direction == Conv2dDirection::backward_weight) b.input = operands.values(input, 1);
  if (forward || row.direction == Conv2dDirection::backward_input) b.weight = operands.values(weight, 2);
  if (forward && s.layout == s.weight_layout) b.bias = operands.values(s.out_channels, 3);
  if (row.direction == Conv2dDirection::backward_input && s.layout == s.weight_layout) b.bias = operands.values(s.in_channels, 3);
  if (!forward) b.grad_output = operands.values(output, 4);
  const int64_t count[] = {output, input, weight, s.out_channels};
  void** written[] = {&b.output, &b.grad_input, &b.grad_weight, &b.grad_bias};
  const int direction = static_cast<int>(row.direction);
  Stored* result = static_cast<Stored*>(operands.bytes(count[direction] * static_cast<int64_t>(sizeof(Stored))));
  *written[direction] = result;
  call(row, s, b, workspace_of(operands, row, s));
  return {std::vector<Stored>(result, result + count[direction]), {}};
}

// Maxima are compared where no order of additions finds others.
template <class T, class Stored, class Kernel>
Result<Stored> run_row(const Kernel& row, const Conv2dReluPoolShape& s, Run run, const std::vector<uint8_t>& offsets) {
  emulation::set_order(run.order);
  const Conv2dShape& conv = s.conv;
  const bool forward = row.direction == Conv2dDirection::forward;
  run.exact = forward && has_pooling(s);
  Operands<T, Stored> operands(run);
  const int64_t input = conv.batch * conv.in_channels * conv.in_h * conv.in_w, output = pooled_elements(s);
  const int64_t weight = conv.out_channels * (conv.in_channels / conv.groups) * conv.kernel_h * conv.kernel_w;
  const int64_t offset_bytes = has_pooling(s) ? output : 0;
  Conv2dReluPoolBuffers b{};
  if (forward || row.direction == Conv2dDirection::backward_weight) b.input = operands.values(input, 1);
  if (forward || row.direction == Conv2dDirection::backward_input) b.weight = operands.values(weight, 2);
  if (forward && conv.layout == conv.weight_layout) b.bias = operands.values(conv.out_channels, 3);
  if (!forward) b.grad_output = operands.values(output, 4);
  if (has_pooling(s)) b.offsets = static_cast<uint8_t*>(operands.bytes(offset_bytes, forward ? nullptr : offsets.data()));
  if (!forward && !has_pooling(s)) {
    run.values = Values::plain;  // the same mask in all runs, with its signs
    Stored* mask = operands.values(output, 5, run);
    if (output > 0) {
      if constexpr (std::is_same_v<T, Stored>) {
        mask[0] = cuda::narrow<T>(NAN);
      } else {
        mask[0] = NAN;
      }
    }
    b.output = mask;
  }
  const int64_t count[] = {output, input, weight, conv.out_channels};
  void** written[] = {&b.output, &b.grad_input, &b.grad_weight, &b.grad_bias};
  const int direction = static_cast<int>(row.direction);
  Stored* result = static_cast<Stored*>(operands.bytes(count[direction] * static_cast<int64_t>(sizeof(Stored))));
  *written[direction] = result;
  call(row, s, b, workspace_of(operands, row, s));
  return {std::vector<Stored>(result, result + count[direction]),
          forward ? std::vector<uint8_t>(b.offsets, b.offsets + offset_bytes) : std::vector<uint8_t>()};
}

template <class T, class Stored, class Kernel>
Result<Stored> run_row(const Kernel& row, const Pool2dShape& s, const Run& run, const std::vector<uint8_t>& offsets) {
  emulation::set_order(run.order);
  Operands<T, Stored> operands(run);
  const int64_t input = s.batch * s.channels * s.in_h * s.in_w, output = s.batch * s.channels * s.out_h * s.out_w;
  const int64_t offset_bytes = row.op == Pool2dOp::avg ? 0 : output * (s.kernel_h * s.kernel_w <= 256 ? 1 : 4);
  const bool backward = row.direction == Pool2dDirection::backward, forward = row.direction == Pool2dDirection::forward;
  Pool2dBuffers b{};
  (backward ? b.grad_output : b.input) = operands.values(backward ? output : input, backward ? 4 : 1);
  if (row.op == Pool2dOp::max) b.offsets = operands.bytes(offset_bytes, forward ? nullptr : offsets.data());
  const int64_t count = backward ? input : output;
  Stored* result = static_cast<Stored*>(operands.bytes(count * static_cast<int64_t>(sizeof(Stored))));
  (backward ? b.grad_input : b.output) = result;
  call(row, s, b);
  const uint8_t* written = static_cast<const uint8_t*>(b.offsets);
  return {std::vector<Stored>(result, result + count), std::vector<uint8_t>(written, written + offset_bytes)};
}

template <class T, class Stored, class Kernel>
Result<Stored> run_row(const Kernel& row, const SizedPool2dShape& s, const Run& run, const std::vector<uint8_t>& indices) {
  emulation::set_order(run.order);
  Operands<T, Stored> operands(run);
  const bool unpools = row.op == SizedPool2dOp::max_unpool;
  const bool writes_small = row.direction == SizedPool2dDirection::gather || (!unpools && row.direction == SizedPool2dDirection::forward);
  const int64_t large = s.batch * s.channels * s.in_h * s.in_w, small = s.batch * s.channels * s.out_h * s.out_w;
  const int64_t index_bytes = row.op == SizedPool2dOp::adaptive_avg ? 0 : small * static_cast<int64_t>(sizeof(int64_t));
  Stored* source = operands.values(writes_small ? large : small, writes_small ? 1 : 4);
  const int64_t count = writes_small ? small : large;
  Stored* result = static_cast<Stored*>(operands.bytes(count * static_cast<int64_t>(sizeof(Stored))));
  void* places = operands.bytes(index_bytes, unpools ? indices.data() : nullptr);
  call(row, s, {writes_small ? source : result, writes_small ? result : source, static_cast<int64_t*>(places)});
  const uint8_t* written = static_cast<const uint8_t*>(places);
  return {std::vector<Stored>(result, result + count), std::vector<uint8_t>(written, written + index_bytes)};
}

}  // namespace cnn_ext::tests
