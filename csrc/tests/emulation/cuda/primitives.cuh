// Of csrc/cuda/primitives.cuh, for the host: the same functions with the same fragments. Anything wrong with a call fails; a sum of
// products is rounded after each addition.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "tests/emulation/block.h"
#include "tests/emulation/builtins.h"

namespace cnn_ext::cuda {

template <class T>
T* dynamic_shared() {
  return static_cast<T*>(emulation::dynamic_shared_memory());
}

template <int kBytes>
void cp_async(void* shared, const void* global, bool exists) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  emulation::queue_copy(shared, global, kBytes, exists);
}
inline void cp_async_16(void* shared, const void* global, bool exists) { cp_async<16>(shared, global, exists); }
inline void atomic_min(int* shared, int value) {
  int held = __atomic_load_n(shared, __ATOMIC_RELAXED);
  while (value < held && !__atomic_compare_exchange_n(shared, &held, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

inline void cp_async_commit() { emulation::close_copy_group(); }
template <int kGroups>
void cp_async_wait() {
  emulation::land_copies(kGroups);
}

template <int kWords>
void load_words(const void* global, uint32_t* words) {
  if (reinterpret_cast<uintptr_t>(global) % (kWords * sizeof(uint32_t)) != 0) emulation::fail("a load that is not aligned");
  std::memcpy(words, global, kWords * sizeof(uint32_t));
}

template <size_t kWords>
void store_words(void* global, const uint32_t (&words)[kWords]) {
  if (reinterpret_cast<uintptr_t>(global) % sizeof words != 0) emulation::fail("a store that is not aligned");
  std::memcpy(global, words, sizeof words);
}

inline void named_barrier(int id, int threads) { emulation::block_barrier(id).wait(threads); }

// The rows that all lanes name, of eight 16-bit elements.
inline const uint16_t* const* exchange_rows(const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emulation::fail("ldmatrix of a row that is not aligned");
  return emulation::exchange(static_cast<const uint16_t*>(row));
}
inline uint32_t packed(uint16_t low, uint16_t high) { return low | static_cast<uint32_t>(high) << 16; }

inline void ldmatrix_x4(uint32_t (&registers)[4], const void* shared) {
  const uint16_t* const* rows = exchange_rows(shared);
  const int row = emulation::lane() / 4, col = emulation::lane() % 4 * 2;
  for (int i = 0; i < 4; ++i) registers[i] = packed(rows[8 * i + row][col], rows[8 * i + row][col + 1]);
}

inline void ldmatrix_x4_trans(uint32_t (&registers)[4], const void* shared) {
  const uint16_t* const* rows = exchange_rows(shared);
  const int row = emulation::lane() % 4 * 2, col = emulation::lane() / 4;
  for (int i = 0; i < 4; ++i) registers[i] = packed(rows[8 * i + row][col], rows[8 * i + row + 1][col]);
}

// Infinities and NaNs stay what they are.
inline uint32_t to_tf32(float x) {
  const uint32_t bits = __float_as_uint(x);
  return isfinite(x) ? (bits + 0x1000) & ~0x1FFFu : bits;
}

// The elements of a lane's registers, each of which holds kPerRegister of them, one after the other in depth.
template <int kPerRegister>
struct Fragments {
  float a[4 * kPerRegister], b[2 * kPerRegister];
};

// D += A * B. A lane's registers of A are of rows r and r + 8 in the first half of the depth, then of both in the second one; those of B
// are of its column. Four lanes share out a half. value(bits): an element whose bits are the lowest.
template <int kPerRegister, class Value>
void multiply_fragments(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Value value) {
  Fragments<kPerRegister> mine;
  for (int i = 0; i < 4 * kPerRegister; ++i) mine.a[i] = value(a[i / kPerRegister] >> i % kPerRegister * 16);
  for (int i = 0; i < 2 * kPerRegister; ++i) mine.b[i] = value(b[i / kPerRegister] >> i % kPerRegister * 16);
  const Fragments<kPerRegister>* lanes = emulation::exchange(mine);
  const Fragments<kPerRegister>*rows = lanes + emulation::lane() / 4 * 4, *left = lanes + emulation::lane() % 4 * 8, *right = left + 4;
  float d0 = d[0], d1 = d[1], d2 = d[2], d3 = d[3];
  for (int k = 0; k < 8 * kPerRegister; ++k) {
    const int lane = k / kPerRegister % 4, half = k / kPerRegister / 4, element = half * kPerRegister + k % kPerRegister;
    const float *a_low = rows[lane].a + half * kPerRegister + element, *a_high = a_low + kPerRegister;
    const float b_left = left[lane].b[element], b_right = right[lane].b[element];
    d0 = fma(*a_low, b_left, d0);
    d1 = fma(*a_low, b_right, d1);
    d2 = fma(*a_high, b_left, d2);
    d3 = fma(*a_high, b_right, d3);
  }
  d[0] = d0, d[1] = d1, d[2] = d2, d[3] = d3;
}

// The lower 13 bits of an operand are not read.
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply_fragments<1>(d, a, b, [](uint32_t bits) { return __uint_as_float(bits & ~0x1FFFu); });
}

inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply_fragments<2>(d, a, b, [](uint32_t bits) { return __half2float(bits_as<__half>(static_cast<uint16_t>(bits))); });
}

inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply_fragments<2>(d, a, b, [](uint32_t bits) { return __bfloat162float(bits_as<__nv_bfloat16>(static_cast<uint16_t>(bits))); });
}

inline void mma_m8n8k4_f64(double& d0, double& d1, double a, double b) {
  struct Elements {
    double a, b;
  };
  const Elements* lanes = emulation::exchange(Elements{a, b});
  const int row = emulation::lane() / 4, col = emulation::lane() % 4 * 2;
  for (int k = 0; k < 4; ++k) {
    d0 = fma(lanes[row * 4 + k].a, lanes[col * 4 + k].b, d0);
    d1 = fma(lanes[row * 4 + k].a, lanes[(col + 1) * 4 + k].b, d1);
  }
}

}  // namespace cnn_ext::cuda
