// What the fast pooling kernels share. They see a tensor as [images][height][width][channels]: nhwc as it is; in nchw each plane is an
// image of one channel. Dilation is 1, and element offsets fit an int.
#pragma once

#include "cuda/chunk.cuh"
#include "cuda/limits.h"

namespace cnn_ext::cuda {

inline int64_t pool_images(const Pool2dShape& s) { return s.layout == Layout::nchw ? s.batch * s.channels : s.batch; }
inline int64_t pool_channels(const Pool2dShape& s) { return s.layout == Layout::nchw ? 1 : s.channels; }

inline bool suits_pool_strips(const Pool2dShape& s) {
  return s.dilation_h == 1 && s.dilation_w == 1 && has_int_extents(s) &&
         all_below(kMaxExtent,
                   {product({s.batch, s.channels, s.in_h + s.stride_h, s.in_w}), product({s.batch, s.channels, s.out_h, s.out_w})});
}

// With a thread for each result; fewer where a thread computes several.
inline Plan plan_pool_outputs(const Pool2dShape& s) { return {1, 1, ceil_div<int64_t>(Pool2dGeometry(s).out_elements, kBlockThreads), 0}; }
inline Plan plan_pool_inputs(const Pool2dShape& s) { return {1, 1, ceil_div<int64_t>(Pool2dGeometry(s).in_elements, kBlockThreads), 0}; }

// Numbers the threads of a launch as (image, row, column, vector of channels), the last one fastest.
class ThreadPlaces {
 public:
  ThreadPlaces(int64_t images, int64_t rows, int64_t columns, int64_t vectors)
      : count_(static_cast<int>(images * rows * columns * vectors)),
        rows_(static_cast<int>(rows)),
        columns_(static_cast<int>(columns)),
        vectors_(static_cast<int>(vectors)) {}

  struct Place {
    int image, row, column, vector;
  };
  CNN_EXT_HOST_DEVICE Place at(int index) const {
    const int pixel = vectors_.quotient(index), line = columns_.quotient(pixel), image = rows_.quotient(line);
    return {image, line - image * rows_.divisor(), pixel - line * columns_.divisor(), index - pixel * vectors_.divisor()};
  }
  CNN_EXT_HOST_DEVICE int count() const { return count_; }

 private:
  int count_;
  FastDivisor rows_, columns_, vectors_;
};

// Neighbouring elements that are read or written at once, of at most 16 bytes.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T element[kCount];
} __attribute__((may_alias));

template <int kCount, class T>
__device__ Vector<T, kCount> load_vector(const T* source) {
  return *reinterpret_cast<const Vector<T, kCount>*>(source);
}
template <int kCount, class T>
__device__ void store_vector(T* target, const Vector<T, kCount>& vector) {
  *reinterpret_cast<Vector<T, kCount>*>(target) = vector;
}

// The same where only the first `count` exist (the others are zeros), at any address unless is_whole.
template <int kCount, class T>
__device__ Vector<T, kCount> load_some(const T* source, int count, bool is_whole) {
  if (is_whole && count >= kCount) return load_vector<kCount>(source);
  Vector<T, kCount> vector = {};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i < count) vector.element[i] = source[i];
  }
  return vector;
}
template <int kCount, class T>
__device__ void store_some(T* target, const Vector<T, kCount>& vector, int count, bool is_whole) {
  if (is_whole && count >= kCount) {
    store_vector(target, vector);
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i < count) target[i] = vector.element[i];
  }
}

// Whether rows of `elements` elements begin at multiples of kCount elements.
template <int kCount, class T>
bool has_whole_vectors(const T* data, int64_t elements) {
  return elements % kCount == 0 && reinterpret_cast<uintptr_t>(data) % (kCount * sizeof(T)) == 0;
}

inline bool has_square_windows(const Pool2dShape& s, int kernel) { return s.kernel_h == kernel && s.kernel_w == kernel; }
inline bool has_windows(const Pool2dShape& s, int kernel, int stride, int pad_left) {
  return has_square_windows(s, kernel) && s.stride_h == stride && s.stride_w == stride && s.pad_left == pad_left;
}

// The nearest place in [begin, end).
CNN_EXT_HOST_DEVICE inline int clamp(int value, int begin, int end) { return larger(begin, smaller(value, end - 1)); }

}  // namespace cnn_ext::cuda
