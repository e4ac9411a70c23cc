// What all kernels share: element types, and one thread per element.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <stdexcept>

#include "cuda/geometry.h"
#include "cuda/kernel.h"
#include "cuda/launch.cuh"

namespace cnn_ext::cuda {

// Sums are kept in float32, those of float64 in float64, and rounded once when stored.
template <class T>
struct AccumulateType {
  using type = float;
};
template <>
struct AccumulateType<double> {
  using type = double;
};
template <class T>
using Accumulate = typename AccumulateType<T>::type;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ T narrow(Accumulate<T> x) {
  return x;
}
template <>
__device__ inline __half narrow<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Calls function(T{}) with the element type of a tensor.
template <class Function>
void with_element_type(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::float32:
      return function(float{});
    case DType::float64:
      return function(double{});
    case DType::float16:
      return function(__half{});
    case DType::bfloat16:
      return function(__nv_bfloat16{});
  }
}

// The same of the types whose sums are float32: accepts() admits no other.
template <class Function>
void with_single_type(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::float32:
      return function(float{});
    case DType::float16:
      return function(__half{});
    case DType::bfloat16:
      return function(__nv_bfloat16{});
    case DType::float64:
      break;
  }
  throw std::invalid_argument("this kernel takes float32, float16 and bfloat16");
}

// One thread per element: this thread's, or none (an index not below the count).
__device__ inline int64_t element_index() { return static_cast<int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x; }

template <class... Parameters, class... Arguments>
void launch_elementwise(void (*kernel)(Parameters...), int64_t elements, cudaStream_t stream, const Arguments&... arguments) {
  launch(kernel, ceil_div<int64_t>(elements, kBlockThreads), stream, arguments...);
}

}  // namespace cnn_ext::cuda
