// The words of CUDA C++ that a host compiler does not know.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>

#include "tests/emulation/block.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static  // the blocks run one after the other

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  explicit dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  unsigned x, y, z;
};
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

inline int meet_block(int number) { return cnn_ext::emulation::block_barrier(0).wait(cnn_ext::emulation::block_threads(), number); }
inline void __syncthreads() { meet_block(0); }
inline int __syncthreads_count(int predicate) { return meet_block(predicate != 0); }
inline int __syncthreads_or(int predicate) { return meet_block(predicate != 0) != 0; }
inline int __syncthreads_and(int predicate) { return meet_block(predicate == 0) == 0; }

constexpr unsigned kAllLanes = 0xFFFFFFFF;

inline void require_all_lanes(unsigned mask) {
  if (mask != kAllLanes) cnn_ext::emulation::fail("a mask of some lanes only");
}

inline void __syncwarp(unsigned mask = kAllLanes) {
  require_all_lanes(mask);
  cnn_ext::emulation::exchange('\0');
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  require_all_lanes(mask);
  const int* predicates = cnn_ext::emulation::exchange(predicate);
  unsigned ballot = 0;
  for (int lane = 0; lane < cnn_ext::emulation::kWarpThreads; ++lane) ballot |= static_cast<unsigned>(predicates[lane] != 0) << lane;
  return ballot;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == kAllLanes; }

// The value of lane `source`, counted within this lane's part of `width` lanes; this lane's own where the part has no such lane.
template <class T>
T shuffle(unsigned mask, T value, int source, int width) {
  require_all_lanes(mask);
  const int part = cnn_ext::emulation::lane() / width * width;
  const T* values = cnn_ext::emulation::exchange(value);
  return source < 0 || source >= width ? value : values[part + source];
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return shuffle(mask, value, source % width, width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  return shuffle(mask, value, cnn_ext::emulation::lane() % width - static_cast<int>(distance), width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  return shuffle(mask, value, cnn_ext::emulation::lane() % width + static_cast<int>(distance), width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  return shuffle(mask, value, (cnn_ext::emulation::lane() % width) ^ bits, width);
}

template <class T>
T __ldg(const T* address) {
  return *address;
}

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline unsigned __float_as_uint(float x) { return bits_as<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return bits_as<float>(x); }
