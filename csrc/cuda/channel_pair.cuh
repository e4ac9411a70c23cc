// A pair: two neighbouring channels of a pixel in nhwc, which a thread of a depthwise convolution takes.
#pragma once

#include "cuda/vector.cuh"

namespace cnn_ext::cuda {

constexpr int kPair = 2;

// The words of a pair. As elements, each of 16 bits would take a register.
template <class T>
struct PairWords {
  uint32_t word[kPair * sizeof(T) / sizeof(uint32_t)];
  __device__ float at(int e) const {
    T elements[kPair];
    __builtin_memcpy(elements, word, sizeof word);
    return widen(elements[e]);
  }
};
template <>
__device__ inline float PairWords<__nv_bfloat16>::at(int e) const {
  return __uint_as_float(e == 0 ? word[0] << 16 : word[0] & 0xFFFF0000);
}

// The pixel at (h, w) of an image, or zeros outside.
template <bool kWhole, class T>
__device__ PairWords<T> pair_at(const T* image, int height, int width, int channels, int h, int w) {
  PairWords<T> words = {};
  if (h >= 0 && h < height && w >= 0 && w < width) {
    const Vector<T, kPair> pair = load_some<kPair>(image + (h * width + w) * channels, kPair, kWhole);
    __builtin_memcpy(&words, &pair, sizeof pair);
  }
  return words;
}

}  // namespace cnn_ext::cuda
