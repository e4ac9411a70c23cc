// The instructions of sm_90a that the products of whole warpgroups need, one function each; compiled for that architecture alone.
//
// An operand tile in shared memory is a sequence of rows of 128, 64 or 32 bytes, whose chunks of 16 bytes are swizzled as the copy engine
// does it (tensor_map.cuh); eight rows are an atom, and a tile is aligned to one. A product along the depth may begin at any row, for the
// swizzle follows the address.
//   along the depth    a row is a row or column of the product, its bytes are neighbours in depth
//   across the depth   a row is a position of the depth, its bytes are neighbouring rows or columns (16-bit types only); further ones
//                      follow in the next such panel
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/common.cuh"
#include "cuda/primitives.cuh"

namespace cnn_ext::cuda {

constexpr int kAtomRows = 8;
constexpr int kWarpgroupThreads = 128, kWarpgroupRows = 64;
constexpr int kInstructionBytes = 32;  // of the depth that one instruction takes: 16 elements of 16 bits, 8 of TF32

// What the matrix unit is told of a tile with rows of kRowBytes: where it lies, the distance of panels (across the depth) and of atoms.
template <int kRowBytes>
__device__ uint64_t matrix_descriptor(const void* tile, int panel_bytes) {
  static_assert(kRowBytes == 128 || kRowBytes == 64 || kRowBytes == 32);
  constexpr uint64_t kSwizzle = uint64_t{kRowBytes == 128 ? 1 : kRowBytes == 64 ? 2 : 3} << 62;
  return kSwizzle | static_cast<uint64_t>(kAtomRows * kRowBytes >> 4) << 32 | static_cast<uint64_t>(panel_bytes >> 4) << 16 |
         (shared_address(tile) & 0x3FFFF) >> 4;
}

// As it counts addresses.
__device__ constexpr uint64_t descriptor_offset(int bytes) { return static_cast<uint64_t>(bytes >> 4); }

// Orders this thread's accesses of its sums and of shared memory before the products that follow.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Makes what this thread has written to shared memory visible to the matrix unit, and lets the copy engine write where it has read; other
// threads' products and copies after a barrier.
__device__ inline void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Closes the group of the products queued since the last one.
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most the latest kGroups groups are still being computed.
template <int kGroups>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

// Sums that the matrix unit has written: nothing moves across.
template <int kCount>
__device__ void pin(float (&sums)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// D += A * B of one warpgroup, 64 rows by 32, 48, 64, 128, 192 or 256 columns. With warp w of the group, group = lane / 4 and pair = lane %
// 4, a lane holds of D   d[4 * j + 0..1] = row 16 * w + group, columns 8 * j + 2 * pair + {0, 1};   d[4 * j + 2..3] = the same of row + 8.
// kAcrossA, kAcrossB: whether an operand lies across the depth (16-bit types). Rows of TF32 may also come from registers, as words:
//   a[0..3] = (row 16 * w + group, depth pair), (row + 8, pair), (row, pair + 4), (row + 8, pair + 4)
#define CNN_EXT_SUMS_8(d, i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define CNN_EXT_SUMS_16(d, i) CNN_EXT_SUMS_8(d, i), CNN_EXT_SUMS_8(d, i + 8)
#define CNN_EXT_SUMS_24(d, i) CNN_EXT_SUMS_16(d, i), CNN_EXT_SUMS_8(d, i + 16)
#define CNN_EXT_SUMS_32(d, i) CNN_EXT_SUMS_16(d, i), CNN_EXT_SUMS_16(d, i + 16)
#define CNN_EXT_SUMS_64(d, i) CNN_EXT_SUMS_32(d, i), CNN_EXT_SUMS_32(d, i + 32)
#define CNN_EXT_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define CNN_EXT_NAMES_24 CNN_EXT_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define CNN_EXT_NAMES_32 CNN_EXT_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define CNN_EXT_NAMES_64                                                                                 \
  CNN_EXT_NAMES_32                                                                                       \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51" \
  ", %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define CNN_EXT_SUMS_96(d, i) CNN_EXT_SUMS_64(d, i), CNN_EXT_SUMS_32(d, i + 64)
#define CNN_EXT_SUMS_128(d, i) CNN_EXT_SUMS_64(d, i), CNN_EXT_SUMS_64(d, i + 64)
#define CNN_EXT_NAMES_96                                                                                 \
  CNN_EXT_NAMES_64                                                                                       \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83" \
  ", %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define CNN_EXT_NAMES_128                                                                                                           \
  CNN_EXT_NAMES_64                                                                                                                  \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, " \
  "%89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// COUNT: sums of a thread, the operands' numbers after them are A, B, SCALE (a one), ACROSS_A and ACROSS_B.
#define CNN_EXT_WGMMA_16BIT(COLS, COUNT, A, B, SCALE, ACROSS_A, ACROSS_B, ELEMENT, NAME)                                        \
  template <bool kAcrossA, bool kAcrossB>                                                                                       \
  __device__ void wgmma(float (&d)[COUNT], uint64_t a, uint64_t b, ELEMENT) {                                                   \
    asm volatile("{.reg .pred p; setp.ne.b32 p, " SCALE ", 0; wgmma.mma_async.sync.aligned.m64n" #COLS "k16.f32." NAME "." NAME \
                 " {" CNN_EXT_NAMES_##COUNT "}, " A ", " B ", p, 1, 1, " ACROSS_A ", " ACROSS_B ";}"                            \
                 : CNN_EXT_SUMS_##COUNT(d, 0)                                                                                   \
                 : "l"(a), "l"(b), "r"(1), "n"(int{kAcrossA}), "n"(int{kAcrossB}));                                             \
  }
#define CNN_EXT_WGMMA_TF32(COLS, COUNT, A, B, SCALE)                                                   \
  template <bool kAcrossA, bool kAcrossB>                                                              \
  __device__ void wgmma(float (&d)[COUNT], uint64_t a, uint64_t b, float) {                            \
    static_assert(!kAcrossA && !kAcrossB);                                                             \
    asm volatile("{.reg .pred p; setp.ne.b32 p, " SCALE ", 0; wgmma.mma_async.sync.aligned.m64n" #COLS \
                 "k8.f32.tf32.tf32 {" CNN_EXT_NAMES_##COUNT "}, " A ", " B ", p, 1, 1;}"               \
                 : CNN_EXT_SUMS_##COUNT(d, 0)                                                          \
                 : "l"(a), "l"(b), "r"(1));                                                            \
  }
#define CNN_EXT_WGMMA_TF32_ROWS(COLS, COUNT, A0, A1, A2, A3, B, SCALE)                                              \
  __device__ inline void wgmma(float (&d)[COUNT], const uint32_t (&a)[4], uint64_t b) {                             \
    asm volatile("{.reg .pred p; setp.ne.b32 p, " SCALE ", 0; wgmma.mma_async.sync.aligned.m64n" #COLS              \
                 "k8.f32.tf32.tf32 {" CNN_EXT_NAMES_##COUNT "}, {" A0 ", " A1 ", " A2 ", " A3 "}, " B ", p, 1, 1;}" \
                 : CNN_EXT_SUMS_##COUNT(d, 0)                                                                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));                                     \
  }
#define CNN_EXT_WGMMA(COLS, COUNT, A, B, SCALE, ACROSS_A, ACROSS_B)                        \
  CNN_EXT_WGMMA_16BIT(COLS, COUNT, A, B, SCALE, ACROSS_A, ACROSS_B, __half, "f16")         \
  CNN_EXT_WGMMA_16BIT(COLS, COUNT, A, B, SCALE, ACROSS_A, ACROSS_B, __nv_bfloat16, "bf16") \
  CNN_EXT_WGMMA_TF32(COLS, COUNT, A, B, SCALE)
CNN_EXT_WGMMA(32, 16, "%16", "%17", "%18", "%19", "%20")
CNN_EXT_WGMMA_16BIT(48, 24, "%24", "%25", "%26", "%27", "%28", __half, "f16")
CNN_EXT_WGMMA_16BIT(48, 24, "%24", "%25", "%26", "%27", "%28", __nv_bfloat16, "bf16")
CNN_EXT_WGMMA(64, 32, "%32", "%33", "%34", "%35", "%36")
CNN_EXT_WGMMA(128, 64, "%64", "%65", "%66", "%67", "%68")
CNN_EXT_WGMMA_16BIT(192, 96, "%96", "%97", "%98", "%99", "%100", __half, "f16")
CNN_EXT_WGMMA_16BIT(192, 96, "%96", "%97", "%98", "%99", "%100", __nv_bfloat16, "bf16")
CNN_EXT_WGMMA(256, 128, "%128", "%129", "%130", "%131", "%132")
CNN_EXT_WGMMA_TF32_ROWS(32, 16, "%16", "%17", "%18", "%19", "%20", "%21")
CNN_EXT_WGMMA_TF32_ROWS(64, 32, "%32", "%33", "%34", "%35", "%36", "%37")
CNN_EXT_WGMMA_TF32_ROWS(128, 64, "%64", "%65", "%66", "%67", "%68", "%69")
#undef CNN_EXT_WGMMA_TF32_ROWS
#undef CNN_EXT_WGMMA
#undef CNN_EXT_WGMMA_TF32
#undef CNN_EXT_WGMMA_16BIT

// The blocks of a cluster: neighbours that run at the same time and read each other's shared memory.
__device__ inline int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// A barrier of all threads of the cluster, which makes their shared memory visible to each other.
__device__ inline void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Reads four floats at the same place of another block's shared memory.
__device__ inline float4 read_of_block(const float* shared, int rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(shared)), "r"(rank));
  float4 values;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(values.x), "=f"(values.y), "=f"(values.z), "=f"(values.w)
               : "r"(address)
               : "memory");
  return values;
}

constexpr int kMostClusterBlocks = 8;

__device__ inline void add_quad(float4& sum, const float4& quad) { sum.x += quad.x, sum.y += quad.y, sum.z += quad.z, sum.w += quad.w; }

// Some quads of a cluster of kBlocks: a thread reads 16 quads of all blocks before it adds the first.
template <int kBlocks, class Place>
__device__ bool add_up_quads(int count, const Place& place) {
  constexpr int kAtOnce = 16 / kBlocks;
  bool meets_nan = false;
  for (int first = threadIdx.x; first < count; first += kAtOnce * kBlockThreads) {
    float4 values[kAtOnce][kBlocks];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i * kBlockThreads >= count) break;
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) values[i][block] = read_of_block(place(first + i * kBlockThreads), block);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i * kBlockThreads >= count) break;
      float4 total = values[i][0];
#pragma unroll
      for (int block = 1; block < kBlocks; ++block) add_quad(total, values[i][block]);
      *reinterpret_cast<float4*>(place(first + i * kBlockThreads)) = total;
      meets_nan = meets_nan || isnan(total.x) || isnan(total.y) || isnan(total.z) || isnan(total.w);
    }
  }
  return meets_nan;
}

// Adds up, in order, what all blocks of the cluster have of `count` quads of floats, which lie at place(0), place(1)... in each one's
// shared memory; the sums replace those of this block. blocks: 2, 4 or 8. Whether this thread meets a NaN among them.
template <class Place>
__device__ bool add_up_cluster(int blocks, int count, const Place& place) {
  return blocks == 2 ? add_up_quads<2>(count, place) : blocks == 4 ? add_up_quads<4>(count, place) : add_up_quads<8>(count, place);
}

}  // namespace cnn_ext::cuda
