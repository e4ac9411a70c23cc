// The instructions that C++ has no word for, one function each. csrc/tests/emulation/cuda/primitives.cuh has the same functions for the
// host: a primitive that is added here is added there.
//
// Fragments are those of PTX's mma.sync: with group = lane / 4 and pair = lane % 4, a lane holds
//   of D 16 x 8           d[0..1] = row group, columns 2 * pair + {0, 1};  d[2..3] = the same of row group + 8
//   of A 16 x 8  (tf32)   a[0..3] = (group, pair), (group + 8, pair), (group, pair + 4), (group + 8, pair + 4)
//   of B 8 x 8   (tf32)   b[0..1] = (pair, group), (pair + 4, group)
//   of A 16 x 16 (16 bit) a[0..3] = columns 2 * pair + {0, 1} of row group, of row group + 8, and columns 2 * pair + 8 + {0, 1} of both
//   of B 16 x 8  (16 bit) b[0..1] = rows 2 * pair + {0, 1} of column group, rows 2 * pair + 8 + {0, 1}; the lower half is the first
//   of D 8 x 8   (f64)    row group, columns 2 * pair + {0, 1};  of A 8 x 4: (group, pair);  of B 4 x 8: (pair, group)
#pragma once

#include <cstdint>

namespace cnn_ext::cuda {

// The block's dynamic shared memory, aligned to 1024 bytes.
template <class T>
__device__ T* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
  return reinterpret_cast<T*>(dynamic_shared_memory);
}

__device__ inline uint32_t shared_address(const void* shared) { return static_cast<uint32_t>(__cvta_generic_to_shared(shared)); }

// Queues a copy of kBytes (4, 8 or 16) from global to shared memory, both aligned to that size; where not `exists`, of as many zeros: the
// source is not read. It may land at any time until cp_async_wait() has returned, and is seen by other threads after a barrier.
template <int kBytes>
__device__ inline void cp_async(void* shared, const void* global, bool exists) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global), "n"(kBytes),
               "r"(exists ? kBytes : 0)
               : "memory");
}

// The same for 16 bytes, past the first-level cache.
__device__ inline void cp_async_16(void* shared, const void* global, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(exists ? 16 : 0) : "memory");
}

// The smaller of what lies there and of `value`, for other threads too.
__device__ inline void atomic_min(int* shared, int value) { atomicMin(shared, value); }

// Closes the group of the copies queued since the last one.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the latest kGroups groups of this thread are still on their way.
template <int kGroups>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Loads 2 or 4 words from global memory at once, aligned to the size of all; nobody writes them while the kernel runs.
template <int kWords>
__device__ inline void load_words(const void* global, uint32_t* words) {
  static_assert(kWords == 2 || kWords == 4);
  if constexpr (kWords == 2) {
    asm("ld.global.nc.v2.b32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(global));
  } else {
    asm("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "l"(global));
  }
}

// Stores words to global memory at once, aligned to the size of all.
__device__ inline void store_words(void* global, const uint32_t (&words)[2]) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(global), "r"(words[0]), "r"(words[1]) : "memory");
}
__device__ inline void store_words(void* global, const uint32_t (&words)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

// Barrier `id` (1 to 15; 0 is __syncthreads) of the first `threads` threads that come to it.
__device__ inline void named_barrier(int id, int threads) { asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// Four 8 x 8 matrices of 16-bit elements from shared memory: lanes 8i to 8i + 7 give the addresses of the rows of matrix i, each of 16
// aligned bytes, and registers[i] gets columns 2 * (lane % 4) + {0, 1} of its row lane / 4.
__device__ inline void ldmatrix_x4(uint32_t (&registers)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(shared))
               : "memory");
}

// The same of the transposed matrices: rows 2 * (lane % 4) + {0, 1} of column lane / 4.
__device__ inline void ldmatrix_x4_trans(uint32_t (&registers)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(shared))
               : "memory");
}

// The bits of x rounded to TF32 (to nearest, ties away from zero): what mma_m16n8k8_tf32 reads.
__device__ inline uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// D += A * B of one warp, for fragments as above.
__device__ inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void mma_m8n8k4_f64(double& d0, double& d1, double a, double b) {
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};" : "+d"(d0), "+d"(d1) : "d"(a), "d"(b));
}

}  // namespace cnn_ext::cuda
