// Copies that put one axis of a tensor innermost, padded with zeros to whole chunks: what lets the products read any layout by chunks of 16
// bytes. target[batch][across][along], along innermost, from source[batch][along][across] with any strides. A block moves a tile of 64 x 64
// through shared memory, so that both sides are contiguous where the source is contiguous across (kReadAcross) or along.
//
// Bound by memory: one read and one write of every element.
#pragma once

#include "cuda/common.cuh"

namespace cnn_ext::cuda {

// Strides in elements. The batch has two axes.
struct Transposition {
  int64_t blocks() const { return static_cast<int64_t>(outer) * inner * ceil_div(padded_along, kTile) * ceil_div(across, kTile); }
  bool reads_across() const { return source_across <= source_along; }

  static constexpr int kTile = 64;
  int outer, inner;
  int along, padded_along, across;
  int64_t source_outer, source_inner, source_along, source_across;
  int64_t target_outer, target_inner, target_across;
};

template <class T, bool kReadAcross>
__global__ void __launch_bounds__(kBlockThreads) transpose(Transposition t, const T* source, T* target) {
  constexpr int kTile = Transposition::kTile, kRows = kBlockThreads / kTile;
  // One more element in a row than the tile has: columns then meet no bank twice.
  __shared__ T tile[kTile][kTile + 1];
  const int tiles_along = ceil_div(t.padded_along, kTile), tiles_across = ceil_div(t.across, kTile);
  const int batch = blockIdx.x / (tiles_along * tiles_across), rest = blockIdx.x % (tiles_along * tiles_across);
  const int first_along = rest / tiles_across * kTile, first_across = rest % tiles_across * kTile;
  source += batch / t.inner * t.source_outer + batch % t.inner * t.source_inner;
  target += batch / t.inner * t.target_outer + batch % t.inner * t.target_inner;
  const int fast = threadIdx.x % kTile;
#pragma unroll
  for (int slow = threadIdx.x / kTile; slow < kTile; slow += kRows) {
    const int i = kReadAcross ? slow : fast, j = kReadAcross ? fast : slow;
    const int along = first_along + i, across = first_across + j;
    const bool exists = along < t.along && across < t.across;
    tile[i][j] = exists ? source[along * t.source_along + across * t.source_across] : narrow<T>(0);
  }
  __syncthreads();
#pragma unroll
  for (int slow = threadIdx.x / kTile; slow < kTile; slow += kRows) {
    const int along = first_along + fast, across = first_across + slow;
    if (along < t.padded_along && across < t.across) target[across * t.target_across + along] = tile[fast][slow];
  }
}

template <class T>
void launch_transposition(const Transposition& t, const void* source, void* target, cudaStream_t stream) {
  launch(t.reads_across() ? transpose<T, true> : transpose<T, false>, t.blocks(), stream, t, static_cast<const T*>(source),
         static_cast<T*>(target));
}

}  // namespace cnn_ext::cuda
