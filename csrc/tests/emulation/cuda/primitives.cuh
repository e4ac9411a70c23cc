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

struct Fragments {
  uint32_t a[4], b[2];
};

// D += A * B, where a(lanes, row, k) and b(lanes, k, col) find an element in the registers of the lanes.
template <int kDepth, class A, class B>
void multiply_fragments(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], A element_of_a, B element_of_b) {
  const Fragments* lanes = emulation::exchange(Fragments{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
  for (int i = 0; i < 4; ++i) {
    const int row = emulation::lane() / 4 + i / 2 * 8, col = emulation::lane() % 4 * 2 + i % 2;
    for (int k = 0; k < kDepth; ++k) d[i] = fma(element_of_a(lanes, row, k), element_of_b(lanes, k, col), d[i]);
  }
}

// The lower 13 bits of an operand are not read.
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const auto value = [](uint32_t bits) { return __uint_as_float(bits & ~0x1FFFu); };
  multiply_fragments<8>(
      d, a, b, [&](const Fragments* lanes, int row, int k) { return value(lanes[row % 8 * 4 + k % 4].a[row / 8 + k / 4 * 2]); },
      [&](const Fragments* lanes, int k, int col) { return value(lanes[col * 4 + k % 4].b[k / 4]); });
}

// value: of 16 bits.
template <class Value>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Value value) {
  const auto half = [&](uint32_t bits, int k) { return value(static_cast<uint16_t>(bits >> k % 2 * 16)); };
  multiply_fragments<16>(
      d, a, b, [&](const Fragments* lanes, int row, int k) { return half(lanes[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2], k); },
      [&](const Fragments* lanes, int k, int col) { return half(lanes[col * 4 + k % 8 / 2].b[k / 8], k); });
}

inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_m16n8k16(d, a, b, [](uint16_t bits) { return __half2float(bits_as<__half>(bits)); });
}

inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_m16n8k16(d, a, b, [](uint16_t bits) { return __bfloat162float(bits_as<__nv_bfloat16>(bits)); });
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
