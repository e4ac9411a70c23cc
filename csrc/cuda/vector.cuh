// A vector: neighbouring elements of one access, of up to 16 bytes.
#pragma once

#include <cstdint>

#include "cuda/common.cuh"

namespace cnn_ext::cuda {

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
  if (kCount > 1 && is_whole && count >= kCount) return load_vector<kCount>(source);
  Vector<T, kCount> vector = {};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i < count) vector.element[i] = source[i];
  }
  return vector;
}
template <int kCount, class T>
__device__ void store_some(T* target, const Vector<T, kCount>& vector, int count, bool is_whole) {
  if (kCount > 1 && is_whole && count >= kCount) {
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

}  // namespace cnn_ext::cuda
