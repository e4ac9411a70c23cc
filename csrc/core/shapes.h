// The nouns that every floor of the house speaks: one problem, described by plain numbers.
// This header is included by files compiled for different instruction sets, so it holds no function whose compiled copy the
// linker could share between them: the one that it has is internal to each file.
#pragma once

#include <cstdint>

namespace cnn_ext {

enum class DType : int32_t { float32, float64, float16, bfloat16 };

// How a 4-D tensor of sizes [N, C, H, W] lies in memory, densely: row-major (nchw) or with the channels innermost (nhwc,
// which torch calls channels_last).
enum class Layout : int32_t { nchw, nhwc };

// What a convolution computes, in torch's terms:
//   forward          output      [N, K, OH, OW] from input, weight, bias
//   backward_input   grad_input  [N, C, H, W]   from grad_output, weight, and as a transposed convolution from a bias [C]
//   backward_weight  grad_weight [K, C/groups, R, S] from grad_output, input
//   backward_bias    grad_bias   [K]            from grad_output
enum class Conv2dDirection : int32_t { forward, backward_input, backward_weight, backward_bias };

// What stands in the padding of a convolution's input, in torch's words: zeros, which never multiply, or values of the input, reflected at
// its edges, repeated from its edges or repeated from its other side.
enum class PaddingMode : int32_t { zeros, reflect, replicate, circular };

// Cross-correlation of input [batch, in_channels, in_h, in_w] with weight [out_channels, in_channels / groups, kernel_h,
// kernel_w] into output [batch, out_channels, out_h, out_w]:
//   output[n, k, oh, ow] = bias[k] + sum over c, r, s of
//     weight[k, c, r, s] * input[n, c + group offset, oh * stride_h - pad_top + r * dilation_h, (same for w)]
// with positions outside the input left out of the sum, or taken from elsewhere in it (core/padding.h). The padding below and to the right
// shows in out_h and out_w only; they may also stop before the last window that the input holds.
struct Conv2dShape {
  int64_t batch;
  int64_t in_channels, in_h, in_w;
  int64_t out_channels, out_h, out_w;
  int64_t kernel_h, kernel_w;
  int64_t stride_h, stride_w;
  int64_t pad_top, pad_left;
  int64_t dilation_h, dilation_w;
  int64_t groups;
  DType dtype;
  Layout layout;           // of input, output and their gradients
  Layout weight_layout;    // of weight and grad_weight
  int32_t allow_winograd;  // 0 or 1: whether a kernel may trade accuracy for speed within Winograd's error bound
  PaddingMode padding_mode;
  int32_t allow_tf32;  // 0 or 1: whether a CUDA kernel may round float32 operands to TF32 before it multiplies them
};

enum class Pool2dOp : int32_t { max, avg };

//   forward   output     [N, C, OH, OW] from input; max pooling also writes one offset per output if asked
//   backward  grad_input [N, C, H, W]   from grad_output (and the offsets)
//   gather    output     [N, C, OH, OW] from input at given offsets (max only): the derivative of `backward`
enum class Pool2dDirection : int32_t { forward, backward, gather };

// The window of output (oh, ow) covers the rows oh * stride_h - pad_top + r * dilation_h, 0 <= r < kernel_h, that lie inside the
// input; columns alike. An offset is r * kernel_w + s, in the unclipped window: uint8 while kernel_h * kernel_w <= 256, else int32.
struct Pool2dShape {
  int64_t batch, channels;
  int64_t in_h, in_w;
  int64_t out_h, out_w;
  int64_t kernel_h, kernel_w;
  int64_t stride_h, stride_w;
  int64_t pad_top, pad_bottom, pad_left, pad_right;
  int64_t dilation_h, dilation_w;
  int64_t divisor_override;   // 0: none; average pooling only
  int32_t count_include_pad;  // 0 or 1; average pooling only
  DType dtype;
  Layout layout;  // of input, output, offsets and their gradients
};

// Max pooling of relu(convolution + bias), without the tensors in between: pooled output [batch, out_channels, pooled_h, pooled_w],
//   output[n, k, ph, pw] = max over r < pool_h, t < pool_w of relu(conv(n, k, ph * pool_stride_h + r, pw * pool_stride_w + t))
// The windows are not padded and lie inside conv.out_h x conv.out_w; what is behind the last one is not read. The directions are
// those of the convolution, with the gradient of the pooled output for grad_output. The ReLU and the maximum keep a NaN.
//
// What backward has to know of forward is one tensor:
//   with pooling     offsets, uint8 [N, K, PH, PW]: r * pool_w + t of the window's maximum (the first of equals, the last NaN),
//                    or kNoGradient where the maximum is <= 0. So pool_h * pool_w <= 255.
//   without pooling  the output: the gradient passes where !(output <= 0).
// The gradient of the convolution's output is zero everywhere else: zeros that multiply, as those of the unfused operators do.
struct Conv2dReluPoolShape {
  Conv2dShape conv;
  int64_t pool_h, pool_w;
  int64_t pool_stride_h, pool_stride_w;
  int64_t pooled_h, pooled_w;
};

constexpr uint8_t kNoGradient = 255;

// Whether there is more than the activation.
[[maybe_unused]] static constexpr bool has_pooling(const Conv2dReluPoolShape& s) {
  return s.pool_h != 1 || s.pool_w != 1 || s.pool_stride_h != 1 || s.pool_stride_w != 1;
}

// The tensors of one call; a direction reads and writes those of its line above and leaves the others null.
struct Conv2dBuffers {
  const void* input;
  const void* weight;
  const void* bias;  // null: none
  const void* grad_output;
  void* output;
  void* grad_input;
  void* grad_weight;
  void* grad_bias;
};

struct Conv2dReluPoolBuffers {
  const void* input;
  const void* weight;
  const void* bias;         // null: none
  const void* grad_output;  // of the pooled size
  uint8_t* offsets;         // written by forward (null: not asked for), read by the others; null without pooling
  void* output;             // written by forward, read by the others without pooling
  void* grad_input;
  void* grad_weight;
  void* grad_bias;
};

struct Pool2dBuffers {
  const void* input;
  const void* grad_output;
  void* offsets;  // written by forward (null: not asked for), read by backward and gather
  void* output;
  void* grad_input;
  // CUDA's max pooling forward alone: of relu(input), with the offset kNoGradient where the output is not above zero.
  bool relu = false;
};

}  // namespace cnn_ext
