// The copy engine of sm_90: tensors are described to it on the host, boxes of them are fetched by one thread and land in shared memory
// behind a barrier that counts their bytes. What lies outside of a tensor lands as zeros.
#pragma once

#include <cuda.h>

#include <stdexcept>
#include <string>

#include "cuda/check.h"
#include "cuda/common.cuh"
#include "cuda/limits.h"
#include "cuda/primitives.cuh"

namespace cnn_ext::cuda {

template <class T>
constexpr CUtensorMapDataType kTensorMapType = CU_TENSOR_MAP_DATA_TYPE_TFLOAT32;  // rounded to TF32 (to nearest) on its way
template <>
inline constexpr CUtensorMapDataType kTensorMapType<__half> = CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
template <>
inline constexpr CUtensorMapDataType kTensorMapType<__nv_bfloat16> = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;

// The driver's functions, by name: there is no link against the driver, which a machine that only builds does not have.
template <class Function>
Function driver_function(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  CUDA_CHECK(cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found));
  if (found != cudaDriverEntryPointSuccess) throw std::runtime_error(std::string("cnn_ext: the CUDA driver has no ") + name);
  return reinterpret_cast<Function>(function);
}

inline void require_map(CUresult result, const char* what) {
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error(std::string("cnn_ext: ") + what + " failed with CUresult " + std::to_string(static_cast<int>(result)));
  }
}

constexpr CUtensorMapSwizzle swizzle_of(int row_bytes) {
  return row_bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : row_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_32B;
}

// A tensor of four axes, innermost first. strides: in elements, of the axes but the innermost; their bytes are multiples of 16, as is the
// address. The innermost axis of a box has 32, 64 or 128 bytes.
struct TensorAxes {
  int64_t sizes[4];
  int64_t strides[3];
};

template <class T>
void axes_for_driver(const TensorAxes& axes, cuuint64_t (&sizes)[4], cuuint64_t (&bytes)[3]) {
  for (int i = 0; i < 4; ++i) sizes[i] = static_cast<cuuint64_t>(axes.sizes[i]);
  for (int i = 0; i < 3; ++i) bytes[i] = static_cast<cuuint64_t>(axes.strides[i]) * sizeof(T);
}

template <class T>
CUtensorMap tile_map(const void* tensor, const TensorAxes& axes, const int (&box)[4]) {
  static const auto encode = driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  cuuint64_t sizes[4], strides[3];
  axes_for_driver<T>(axes, sizes, strides);
  cuuint32_t extents[4], steps[4] = {1, 1, 1, 1};
  for (int i = 0; i < 4; ++i) extents[i] = static_cast<cuuint32_t>(box[i]);
  CUtensorMap map;
  require_map(
      encode(&map, kTensorMapType<T>, 4, const_cast<void*>(tensor), sizes, strides, extents, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             swizzle_of(box[0] * static_cast<int>(sizeof(T))), CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
      "cuTensorMapEncodeTiled");
  return map;
}

// The positions of one axis of an image that windows begin at: first + p * step, 0 <= p < count.
struct WindowAxis {
  int first, step, count;
};

// What the copy engine takes of such an axis of `size` positions whose taps lie at most `reach` further on.
inline bool fits_copy_engine(const WindowAxis& axis, int size, int reach) {
  const int last = axis.first + (axis.count - 1) * axis.step + 1 - size;
  return axis.first >= -128 && axis.first <= 127 && last >= -128 && last <= 127 && axis.step <= 8 && reach <= 255;
}

// Of groups whose channels lie side by side the copy engine has been seen to take windows from multiples of 32 bytes on, and an odd channel
// has been seen to end it. Narrow groups have rows of their own. copied, others: channels of a group in the tensor that is copied by
// windows, and in the other one; chunk: channels in 16 bytes.
inline bool suits_copied_groups(int64_t groups, int64_t copied, int64_t others, int64_t chunk) {
  return groups == 1 || (copied > kMostGroupChannels && copied % (2 * chunk) == 0 && others % chunk == 0);
}

// Images [N, H, W, C], axes C, W, H, N, whose boxes are `channels` neighbouring channels of `pixels` windows in a row: the next one to the
// right, then in the next row, then in the next image.
template <class T>
CUtensorMap window_map(const void* images, const TensorAxes& axes, const WindowAxis& h, const WindowAxis& w, int channels, int pixels) {
  static const auto encode = driver_function<decltype(&cuTensorMapEncodeIm2col)>("cuTensorMapEncodeIm2col");
  cuuint64_t sizes[4], strides[3];
  axes_for_driver<T>(axes, sizes, strides);
  const auto upper = [](const WindowAxis& axis, int64_t size) {
    return axis.first + (axis.count - 1) * axis.step + 1 - static_cast<int>(size);
  };
  const int lower_corner[2] = {w.first, h.first}, upper_corner[2] = {upper(w, axes.sizes[1]), upper(h, axes.sizes[2])};
  const cuuint32_t steps[4] = {1, static_cast<cuuint32_t>(w.step), static_cast<cuuint32_t>(h.step), 1};
  CUtensorMap map;
  require_map(
      encode(&map, kTensorMapType<T>, 4, const_cast<void*>(images), sizes, strides, lower_corner, upper_corner,
             static_cast<cuuint32_t>(channels), static_cast<cuuint32_t>(pixels), steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             swizzle_of(channels * static_cast<int>(sizeof(T))), CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
      "cuTensorMapEncodeIm2col");
  return map;
}

// Asks for a description before it is used.
__device__ inline void prefetch_map(const CUtensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }

// A barrier in shared memory, passed when one thread has announced how many bytes will land and they have.
__device__ inline void init_barrier(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}

// Makes initialised barriers visible to the copy engine.
__device__ inline void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void announce(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

// parity: 0 for the first use of a barrier, 1 for the second, 0 for the third...
__device__ inline void wait_barrier(uint64_t* barrier, int parity) {
  asm volatile(
      "{.reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @done bra passed; bra again; passed: }" ::"r"(
          shared_address(barrier)),
      "r"(parity)
      : "memory");
}

__device__ inline void fetch_box(void* shared, const CUtensorMap& map, int i0, int i1, int i2, int i3, uint64_t* barrier) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(
                   shared_address(shared)),
               "l"(&map), "r"(i0), "r"(i1), "r"(i2), "r"(i3), "r"(shared_address(barrier))
               : "memory");
}

// A box of window_map: from `channel` on, of the windows from that at (n, h, w) on, taken tap_h and tap_w further on.
__device__ inline void fetch_windows(void* shared, const CUtensorMap& map, int channel, int w, int h, int n, int tap_w, int tap_h,
                                     uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6], {%7, "
      "%8};" ::"r"(shared_address(shared)),
      "l"(&map), "r"(channel), "r"(w), "r"(h), "r"(n), "r"(shared_address(barrier)), "h"(static_cast<uint16_t>(tap_w)),
      "h"(static_cast<uint16_t>(tap_h))
      : "memory");
}

}  // namespace cnn_ext::cuda
