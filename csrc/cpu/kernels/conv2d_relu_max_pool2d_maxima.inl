// What the fused gradients share that go by the maxima of windows alone (conv2d_relu_max_pool2d_backward_weight_maxima.cpp,
// conv2d_relu_max_pool2d_backward_input_maxima.cpp): lists of maxima, and the register tile that adds up what they weight.
#pragma once

#include "cpu/kernels/conv2d_direct_pooled.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

constexpr int kTileSums = 14;              // vectors
constexpr int64_t kWholeVectors = 16;      // channels: for every instruction set the same, as the table is one
constexpr int32_t kInfinity = 0x7f800000;  // the exponent's bits

// The gradient of a window, and where what it weights lies in the packed operand.
struct Maximum {
  float gradient;
  int32_t place;
};

class MaximumList {
 public:
  explicit MaximumList(Maximum* maxima) : maxima_(maxima) {}

  // `offset`: of the window's maximum, kNoGradient where the gradient is stopped. There is to be room for one more than pass.
  void append(float gradient, uint8_t offset, int64_t place) {
    const int32_t passes = offset != kNoGradient;
    maxima_[count_] = {gradient, static_cast<int32_t>(place)};
    const int32_t exponent = exponent_of(gradient) & -passes;
    largest_ = exponent > largest_ ? exponent : largest_;
    count_ += passes;
  }

  int64_t count() const { return count_; }
  bool is_finite() const { return largest_ != kInfinity; }

  static int32_t exponent_of(float x) {
    int32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return bits & kInfinity;
  }

 private:
  Maximum* maxima_;
  int64_t count_ = 0;
  int32_t largest_ = 0;
};

// sums[0 .. kVectors) += the sum over the maxima of gradient * packed[place ...].
template <int kVectors>
__attribute__((noinline)) void add_maxima(const Maximum* maxima, int64_t count, const float* packed, float* sums) {
  Vec<float> sum[kVectors] = {};
  for (int64_t i = 0; i < count; ++i) {
    const float* x = packed + maxima[i].place;
    const Vec<float> gradient = broadcast_from(&maxima[i].gradient);
#pragma GCC unroll 14
    for (int j = 0; j < kVectors; ++j) sum[j] = fma(load(x + j * kLanes<float>), gradient, sum[j]);
  }
#pragma GCC unroll 14
  for (int j = 0; j < kVectors; ++j) store(sums + j * kLanes<float>, load(sums + j * kLanes<float>) + sum[j]);
}

using AddMaxima = void (*)(const Maximum*, int64_t, const float*, float*);

template <int kVectors = kTileSums>
AddMaxima add_maxima_of(int64_t vectors) {
  if (vectors == kVectors) return add_maxima<kVectors>;
  if constexpr (kVectors > 1) return add_maxima_of<kVectors - 1>(vectors);
  return nullptr;
}

// Windows at least at every second output, and channels and taps that lie in whole vectors beside each other.
inline bool has_listed_maxima(const Conv2dReluPoolShape& s) {
  const Conv2dShape& c = s.conv;
  return c.dtype == DType::float32 && has_pooling(s) && s.pool_h * s.pool_w <= kNoGradient && s.pool_stride_h * s.pool_stride_w > 1 &&
         c.in_channels > 0 && c.in_channels / c.groups % kWholeVectors == 0 && c.kernel_w > 1 && c.dilation_w == 1;
}

}  // namespace
}  // namespace cnn_ext::cpu::CNN_EXT_ISA
