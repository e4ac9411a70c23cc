// Pooling backward at memory bandwidth: an input gathers from the windows that cover it, in order, top row first.
//
// Op offers
//   T, kHasOffsets                          whether a window passes its gradient to one tap only, which its offset names
//   grad_output, offsets, grad_input
//   factor(g, first_h, first_w)             of what a window passes to all its taps
#pragma once

#include "cuda/pooling.cuh"

namespace cnn_ext::cuda {

// The windows of kCount neighbouring outputs, in memory from `index` on.
template <class Op, int kCount>
struct PoolWindows {
  using T = typename Op::T;
  __device__ PoolWindows(const Op& op, int index, int count, bool is_whole) {
    gradients = load_some<kCount>(op.grad_output + index, count, is_whole);
    if constexpr (Op::kHasOffsets) offsets = load_some<kCount>(op.offsets + index, count, is_whole);
  }
  // Adds what the i-th passes to a tap.
  __device__ void add(int i, int tap, Accumulate<T> factor, Accumulate<T>& sum) const {
    const Accumulate<T> gradient = widen(gradients.element[i]);
    if constexpr (Op::kHasOffsets) {
      if (offsets.element[i] == tap) sum += gradient;
    } else {
      sum = fma(gradient, factor, sum);
    }
  }
  Vector<T, kCount> gradients;
  Vector<uint8_t, kCount> offsets;
};

// Divides by the strides of a pooling.
struct PoolStrides {
  explicit PoolStrides(const Pool2dShape& s) : h(static_cast<int>(s.stride_h)), w(static_cast<int>(s.stride_w)) {}
  FastDivisor h, w;
};

__device__ inline Range windows_over(int padded, const FastDivisor& stride, int kernel, int windows) {
  const int first = padded - (kernel - 1);
  const int begin = first <= 0 ? 0 : stride.quotient(first + stride.divisor() - 1);
  return {begin, larger(begin, smaller(windows, stride.quotient(padded) + 1))};
}

// A thread gathers for kVector channels of one input. kWindows: that cover it at most, 1 or 0: any number.
template <class Op, int kVector, int kWindows>
__global__ void __launch_bounds__(kBlockThreads, 4)
    pool_backward_pixels(Op op, Pool2dGeometry g, PoolStrides strides, ThreadPlaces places, int pitch) {
  using Acc = Accumulate<typename Op::T>;
  const int index = static_cast<int>(element_index());
  if (index >= places.count()) return;
  const auto place = places.at(index);
  const int padded_h = place.row + g.pad_top, padded_w = place.column + g.pad_left;
  const Range rows = windows_over(padded_h, strides.h, g.kernel_h, g.out_h), cols = windows_over(padded_w, strides.w, g.kernel_w, g.out_w);
  Acc sums[kVector] = {};
  const auto add = [&](int oh, int ow) {
    const int first_h = oh * g.stride_h, first_w = ow * g.stride_w;
    const PoolWindows<Op, kVector> windows(op, ((place.image * g.out_h + oh) * g.out_w + ow) * pitch + place.vector * kVector, kVector,
                                           true);
    const Acc factor = op.factor(g, first_h - g.pad_top, first_w - g.pad_left);
    const int tap = (padded_h - first_h) * g.kernel_w + padded_w - first_w;
#pragma unroll
    for (int i = 0; i < kVector; ++i) windows.add(i, tap, factor, sums[i]);
  };
  if constexpr (kWindows == 1) {
    if (rows.begin < rows.end && cols.begin < cols.end) add(rows.begin, cols.begin);
  } else {
#pragma unroll 1
    for (int oh = rows.begin; oh < rows.end; ++oh) {
#pragma unroll 2
      for (int ow = cols.begin; ow < cols.end; ++ow) add(oh, ow);
    }
  }
  Vector<typename Op::T, kVector> result;
#pragma unroll
  for (int i = 0; i < kVector; ++i) result.element[i] = narrow<typename Op::T>(sums[i]);
  store_vector(op.grad_input + ((place.image * g.in_h + place.row) * g.in_w + place.column) * pitch + place.vector * kVector, result);
}

// With stride 2: a thread gathers for kVector channels of 2 x 2 inputs, which lie in the padded input at even places. The windows that
// begin there cover them and, with 3 x 3 taps, those before.
template <class Op, int kKernel, int kVector>
__global__ void __launch_bounds__(kBlockThreads) pool_backward_blocks(Op op, Pool2dGeometry g, ThreadPlaces places, int pitch) {
  using T = typename Op::T;
  using Acc = Accumulate<T>;
  constexpr int kBefore = kKernel == 3 ? 1 : 0;
  const int index = static_cast<int>(element_index());
  if (index >= places.count()) return;
  const auto place = places.at(index);
  const int outputs = place.image * g.out_h * g.out_w, channel = place.vector * kVector;
  Acc sums[2][2][kVector] = {};
#pragma unroll
  for (int a = -kBefore; a <= 0; ++a) {
#pragma unroll
    for (int b = -kBefore; b <= 0; ++b) {
      const int oh = place.row + a, ow = place.column + b;
      const bool exists = oh >= 0 && oh < g.out_h && ow >= 0 && ow < g.out_w;
      const PoolWindows<Op, kVector> windows(op, exists ? (outputs + oh * g.out_w + ow) * pitch + channel : 0, exists ? kVector : 0, true);
      const Acc factor = op.factor(g, oh * 2 - g.pad_top, ow * 2 - g.pad_left);
#pragma unroll
      for (int r = -2 * a; r < smaller(kKernel, 2 - 2 * a); ++r) {
#pragma unroll
        for (int t = -2 * b; t < smaller(kKernel, 2 - 2 * b); ++t) {
#pragma unroll
          for (int i = 0; i < kVector; ++i) windows.add(i, r * kKernel + t, factor, sums[r + 2 * a][t + 2 * b][i]);
        }
      }
    }
  }
#pragma unroll
  for (int y = 0; y < 2; ++y) {
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      const int h = place.row * 2 + y - g.pad_top, w = place.column * 2 + x - g.pad_left;
      if (h < 0 || h >= g.in_h || w < 0 || w >= g.in_w) continue;
      Vector<T, kVector> result;
#pragma unroll
      for (int i = 0; i < kVector; ++i) result.element[i] = narrow<T>(sums[y][x][i]);
      store_vector(op.grad_input + ((place.image * g.in_h + h) * g.in_w + w) * pitch + channel, result);
    }
  }
}

// In nchw with stride 2: a thread gathers for kInputs columns of two rows, which lie in the padded input at even places and below. The
// windows' places in the rows are known while compiling.
template <class Op, int kKernel, int kPad, int kInputs>
__global__ void __launch_bounds__(kBlockThreads)
    pool_backward_strips(Op op, Pool2dGeometry g, ThreadPlaces places, bool are_outputs_whole, bool are_inputs_whole) {
  using T = typename Op::T;
  using Acc = Accumulate<T>;
  // Of the windows that begin in these columns, kPad earlier; one more before them or behind them may reach into the columns.
  constexpr int kOutputs = kInputs / 2, kBefore = kKernel == 3 ? 1 : 0;
  constexpr bool kHasBefore = kKernel - kPad >= 3, kHasBehind = kPad >= 1;
  constexpr int kFirst = kHasBefore ? -1 : 0, kEnd = kOutputs + (kHasBehind ? 1 : 0);
  const int index = static_cast<int>(element_index());
  if (index >= places.count()) return;
  const auto place = places.at(index);
  const int first_out = place.column * kOutputs, count = g.out_w - first_out;
  Acc sums[2][kInputs] = {};
#pragma unroll
  for (int a = -kBefore; a <= 0; ++a) {
    const int oh = place.row + a;
    if (oh < 0 || oh >= g.out_h) continue;
    const int row = (place.image * g.out_h + oh) * g.out_w + first_out;
    const PoolWindows<Op, kOutputs> windows(op, row, count, are_outputs_whole);
    const PoolWindows<Op, 1> before(op, row - 1, kHasBefore && first_out > 0 ? 1 : 0, false);
    const PoolWindows<Op, 1> behind(op, row + kOutputs, kHasBehind && count > kOutputs ? 1 : 0, false);
#pragma unroll
    for (int ow = kFirst; ow < kEnd; ++ow) {
      const Acc factor = op.factor(g, oh * 2 - g.pad_top, (ow + first_out) * 2 - kPad);
#pragma unroll
      for (int r = -2 * a; r < smaller(kKernel, 2 - 2 * a); ++r) {
#pragma unroll
        for (int t = 0; t < kKernel; ++t) {
          const int x = ow * 2 - kPad + t;
          if (x < 0 || x >= kInputs) continue;
          Acc& sum = sums[r + 2 * a][x];
          if (ow < 0) {
            before.add(0, r * kKernel + t, factor, sum);
          } else if (ow < kOutputs) {
            windows.add(smaller(larger(ow, 0), kOutputs - 1), r * kKernel + t, factor, sum);
          } else {
            behind.add(0, r * kKernel + t, factor, sum);
          }
        }
      }
    }
  }
  const int first_w = place.column * kInputs;
#pragma unroll
  for (int y = 0; y < 2; ++y) {
    const int h = place.row * 2 + y - g.pad_top;
    if (h < 0 || h >= g.in_h) continue;
    Vector<T, kInputs> result;
#pragma unroll
    for (int i = 0; i < kInputs; ++i) result.element[i] = narrow<T>(sums[y][i]);
    store_some(op.grad_input + (place.image * g.in_h + h) * g.in_w + first_w, result, g.in_w - first_w, are_inputs_whole);
  }
}

template <class Op, int kVector, int kWindows>
void launch_pool_backward_pixels(const Op& op, const Pool2dShape& s, cudaStream_t stream) {
  const ThreadPlaces places(pool_images(s), s.in_h, s.in_w, pool_channels(s) / kVector);
  launch_elementwise(pool_backward_pixels<Op, kVector, kWindows>, places.count(), stream, op, Pool2dGeometry(s), PoolStrides(s), places,
                     static_cast<int>(pool_channels(s)));
}

// Where rows hold no whole number of chunks a thread takes fewer columns, so that those of neighbours lie in the same sectors.
template <class Op, int kKernel, int kPad, int kInputs = kChunk<typename Op::T>>
void launch_pool_backward_strips(const Op& op, const Pool2dShape& s, cudaStream_t stream) {
  const bool are_inputs_whole = has_whole_vectors<kInputs>(op.grad_input, s.in_w);
  if constexpr (kInputs > 2) {
    if (!are_inputs_whole) return launch_pool_backward_strips<Op, kKernel, kPad, kInputs / 2>(op, s, stream);
  }
  const ThreadPlaces places(pool_images(s), ceil_div<int64_t>(s.in_h + s.pad_top, 2), ceil_div<int64_t>(s.in_w, kInputs), 1);
  launch_elementwise(pool_backward_strips<Op, kKernel, kPad, kInputs>, places.count(), stream, op, Pool2dGeometry(s), places,
                     op.template are_outputs_whole<kInputs / 2>(s.out_w), are_inputs_whole);
}

template <class Op, int kKernel, int kVector>
void launch_pool_backward_blocks(const Op& op, const Pool2dShape& s, cudaStream_t stream) {
  const ThreadPlaces places(pool_images(s), ceil_div<int64_t>(s.in_h + s.pad_top, 2), ceil_div<int64_t>(s.in_w + s.pad_left, 2),
                            pool_channels(s) / kVector);
  launch_elementwise(pool_backward_blocks<Op, kKernel, kVector>, places.count(), stream, op, Pool2dGeometry(s), places,
                     static_cast<int>(pool_channels(s)));
}

// Whether the tensors in nhwc are whole aligned vectors of channels.
template <int kVector, class Op>
bool has_channel_vectors(const Op& op, const Pool2dShape& s) {
  return s.layout == Layout::nhwc && op.template are_outputs_whole<kVector>(s.channels) &&
         has_whole_vectors<kVector>(op.grad_input, s.channels);
}

}  // namespace cnn_ext::cuda
