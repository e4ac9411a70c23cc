// Copies that put one axis of a tensor innermost, padded with zeros to whole chunks: what lets the products read any layout by chunks of 16
// bytes. target[batch][across][along], along innermost, from source[batch][along][across] with any strides. A block moves a tile of
// 4096 elements, 16, 32 or 64 of them along, through shared memory; it reads as many neighbours at once as the strides allow and writes
// chunks.
//
// Bound by memory: one read and one write of every element.
#pragma once

#include "cuda/chunk.cuh"
#include "cuda/common.cuh"
#include "cuda/sm90a/overlap.cuh"

namespace cnn_ext::cuda {

// Strides in elements. The batch has two axes.
struct Transposition {
  int64_t blocks(int tile_along) const {
    return static_cast<int64_t>(outer) * inner * ceil_div(padded_along, tile_along) * ceil_div(across, kTile / tile_along);
  }
  // Whether `count` neighbours across the source are one aligned access.
  bool reads(const void* source, int count) const {
    return source_across == 1 && across % count == 0 && source_along % count == 0 && source_outer % count == 0 &&
           source_inner % count == 0 && is_aligned(source);
  }

  // Whether lines along are one run of memory, short across.
  bool has_slabs() const { return source_across == 1 && source_along == across && across < 64; }
  CNN_EXT_HOST_DEVICE int slab_along() const { return kTile / across / 8 * 8; }  // whole chunks
  int64_t slab_blocks() const { return static_cast<int64_t>(outer) * inner * ceil_div(padded_along, slab_along()); }

  static constexpr int kTile = 4096;  // elements, in shared memory
  int outer, inner;
  int along, padded_along, across;
  int64_t source_outer, source_inner, source_along, source_across;
  int64_t target_outer, target_inner, target_across;
};

// [batch, channels, plane] in a layout -> [batch, plane, padded channels].
inline Transposition channels_innermost(Layout layout, int64_t batch, int64_t channels, int64_t padded, int64_t plane) {
  Transposition t{};
  t.outer = static_cast<int>(batch), t.inner = 1;
  t.along = static_cast<int>(channels), t.padded_along = static_cast<int>(padded), t.across = static_cast<int>(plane);
  t.source_outer = channels * plane, t.source_along = layout == Layout::nchw ? plane : 1;
  t.source_across = layout == Layout::nchw ? 1 : channels;
  t.target_outer = padded * plane, t.target_across = padded;
  return t;
}

template <class T>
struct Copy {
  Transposition order;
  const T* source;
  T* target;
};

// What one launch copies: two tensors, or the first alone.
template <class T>
struct Copies {
  Copy<T> first, second;
  int first_blocks;
};

template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Neighbours {
  T values[kCount];
};

// kAlong: of the tile. kRead: neighbours across that a thread reads at once; kReadAcross: whether neighbouring threads read across the
// source, or along it.
template <class T, int kAlong, int kRead, bool kReadAcross>
__global__ void __launch_bounds__(kBlockThreads) transpose(const __grid_constant__ Copies<T> copies) {
  constexpr int kAcross = Transposition::kTile / kAlong, kReads = kAcross / kRead, kWrites = kAlong / kChunk<T>;
  // The pitch spreads the columns over the banks.
  __shared__ T tile[kAcross][kAlong + 4 / sizeof(T)];
  const bool is_second = blockIdx.x >= static_cast<unsigned>(copies.first_blocks);
  const Copy<T>& copy = is_second ? copies.second : copies.first;
  const Transposition& t = copy.order;
  const int block = blockIdx.x - (is_second ? copies.first_blocks : 0);
  const int tiles_along = ceil_div(t.padded_along, kAlong), tiles_across = ceil_div(t.across, kAcross);
  const int batch = block / (tiles_along * tiles_across), rest = block % (tiles_along * tiles_across);
  const int first_along = rest / tiles_across * kAlong, first_across = rest % tiles_across * kAcross;
  const T* source = copy.source + batch / t.inner * t.source_outer + batch % t.inner * t.source_inner;
  T* target = copy.target + batch / t.inner * t.target_outer + batch % t.inner * t.target_inner;
  wait_for_launch_before();
#pragma unroll
  for (int unit = threadIdx.x; unit < kAlong * kReads; unit += kBlockThreads) {
    const int i = kReadAcross ? unit / kReads : unit % kAlong, j = (kReadAcross ? unit % kReads : unit / kAlong) * kRead;
    const int along = first_along + i, across = first_across + j;
    Neighbours<T, kRead> read;
#pragma unroll
    for (int e = 0; e < kRead; ++e) read.values[e] = narrow<T>(0);
    if (along < t.along && across < t.across) {
      read = *reinterpret_cast<const Neighbours<T, kRead>*>(source + along * t.source_along + across * t.source_across);
    }
#pragma unroll
    for (int e = 0; e < kRead; ++e) tile[j + e][i] = read.values[e];
  }
  __syncthreads();
#pragma unroll
  for (int unit = threadIdx.x; unit < kAcross * kWrites; unit += kBlockThreads) {
    const int i = unit % kWrites * kChunk<T>, j = unit / kWrites;
    const int along = first_along + i, across = first_across + j;
    if (along >= t.padded_along || across >= t.across) continue;
    Neighbours<T, kChunk<T>> chunk;
#pragma unroll
    for (int e = 0; e < kChunk<T>; ++e) chunk.values[e] = tile[j][i + e];
    *reinterpret_cast<Neighbours<T, kChunk<T>>*>(target + across * t.target_across + along) = chunk;
  }
}

// kRead: elements that a thread reads at once.
template <class T, int kRead>
__global__ void __launch_bounds__(kBlockThreads) transpose_slabs(const __grid_constant__ Copies<T> copies) {
  __shared__ __align__(kChunkBytes) T slab[Transposition::kTile];
  const bool is_second = blockIdx.x >= static_cast<unsigned>(copies.first_blocks);
  const Copy<T>& copy = is_second ? copies.second : copies.first;
  const Transposition& t = copy.order;
  const int block = blockIdx.x - (is_second ? copies.first_blocks : 0), slab_along = t.slab_along();
  const int slabs = ceil_div(t.padded_along, slab_along), batch = block / slabs, first = block % slabs * slab_along;
  const int lines = smaller(slab_along, t.along - first), chunks = smaller(slab_along, t.padded_along - first) / kChunk<T>;
  const T* source = copy.source + batch / t.inner * t.source_outer + batch % t.inner * t.source_inner + first * t.source_along;
  T* target = copy.target + batch / t.inner * t.target_outer + batch % t.inner * t.target_inner + first;
  wait_for_launch_before();
  for (int i = threadIdx.x * kRead; i < lines * t.across; i += kBlockThreads * kRead) {
    *reinterpret_cast<Neighbours<T, kRead>*>(slab + i) = *reinterpret_cast<const Neighbours<T, kRead>*>(source + i);
  }
  __syncthreads();
  for (int unit = threadIdx.x; unit < t.across * chunks; unit += kBlockThreads) {
    const int across = unit / chunks, along = unit % chunks * kChunk<T>;
    Neighbours<T, kChunk<T>> chunk;
#pragma unroll
    for (int e = 0; e < kChunk<T>; ++e) chunk.values[e] = along + e < lines ? slab[(along + e) * t.across + across] : narrow<T>(0);
    *reinterpret_cast<Neighbours<T, kChunk<T>>*>(target + across * t.target_across + along) = chunk;
  }
}

// What copies a tensor.
template <class T>
struct CopyPlan {
  void (*kernel)(Copies<T>);
  int64_t blocks;
};

template <class T>
CopyPlan<T> plan_slabs(const Copy<T>& copy) {
  const Transposition& t = copy.order;
  const bool is_whole =
      t.along % kChunk<T> == 0 && t.source_outer % kChunk<T> == 0 && t.source_inner % kChunk<T> == 0 && is_aligned(copy.source);
  return {is_whole ? transpose_slabs<T, kChunk<T>> : transpose_slabs<T, 1>, t.slab_blocks()};
}

template <class T, int kAlong>
CopyPlan<T> plan_tiles(const Copy<T>& copy) {
  constexpr int kHalf = kChunk<T> / 2;
  const Transposition& t = copy.order;
  return {t.reads(copy.source, kChunk<T>)     ? transpose<T, kAlong, kChunk<T>, true>
          : t.reads(copy.source, kHalf)       ? transpose<T, kAlong, kHalf, true>
          : t.source_across <= t.source_along ? transpose<T, kAlong, 1, true>
                                              : transpose<T, kAlong, 1, false>,
          t.blocks(kAlong)};
}

template <class T>
CopyPlan<T> plan_copy(const Copy<T>& copy) {
  if (copy.order.has_slabs()) return plan_slabs(copy);
  if (copy.order.padded_along <= 16) return plan_tiles<T, 16>(copy);
  if (copy.order.padded_along <= 32) return plan_tiles<T, 32>(copy);
  return plan_tiles<T, 64>(copy);
}

template <class T>
void launch_copy(const Copy<T>& copy, cudaStream_t stream) {
  const CopyPlan<T> plan = plan_copy(copy);
  launch(plan.kernel, overlapping(Grid(plan.blocks)), stream, Copies<T>{copy, copy, static_cast<int>(plan.blocks)});
}

// Both in one launch, where the same kernel serves them. null: there is nothing to copy.
template <class T>
void launch_copies(const Copy<T>* first, const Copy<T>* second, cudaStream_t stream) {
  if (first != nullptr && second != nullptr) {
    const CopyPlan<T> plan = plan_copy(*first), other = plan_copy(*second);
    if (plan.kernel == other.kernel) {
      const Copies<T> copies{*first, *second, static_cast<int>(plan.blocks)};
      return launch(plan.kernel, overlapping(Grid(plan.blocks + other.blocks)), stream, copies);
    }
  }
  if (first != nullptr) launch_copy(*first, stream);
  if (second != nullptr) launch_copy(*second, stream);
}

}  // namespace cnn_ext::cuda
