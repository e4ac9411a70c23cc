// From the sums of a warpgroup's products to memory, without shared memory between: a line of channels for each pixel in nhwc; in nchw
// eight pixels of a channel at once.
#pragma once

#include "cuda/chunk.cuh"
#include "cuda/relu_pool.cuh"

namespace cnn_ext::cuda {

// Two neighbouring sums of a row in the result's type, as they lie in memory.
template <class T>
struct alignas(2 * sizeof(T)) ElementPair {
  T first, second;
};

// What the four lanes of a row hold of four chunks of 16 bytes, a word of each, becomes a whole chunk of each lane: lane i's is chunk i.
__device__ inline ChunkWords exchanged(ChunkWords words) {
  const int pair = threadIdx.x % 4;
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
    const bool upper = (pair & step) != 0;
#pragma unroll
    for (int low = 0; low < 4; ++low) {
      if (low & step) continue;
      uint32_t &a = words.word[low], &b = words.word[low + step];
      const uint32_t taken = __shfl_xor_sync(0xFFFFFFFF, upper ? a : b, step);
      a = upper ? taken : a;
      b = upper ? b : taken;
    }
  }
  return words;
}

// What becomes of the sums of one tile: channels first_col and on, as far as there are.
template <class T>
struct RowTarget {
  const T* bias;  // of channel 0; may be null
  bool relu;
  int first_col, cols;
  int channel_stride;
  bool whole_chunks;  // whether channels lie side by side and lines begin and end with whole aligned chunks
  bool whole_pairs;   // the same of two channels
};

// Adds the bias and applies the ReLU, where there are.
template <class T, int kSums>
__device__ void finish_sums(const RowTarget<T>& target, float (&sums)[kSums]) {
  if (target.bias == nullptr && !target.relu) return;
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    const int col = target.first_col + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
    const float bias = target.bias == nullptr || col >= target.cols ? 0 : widen(target.bias[col]);
    sums[i] = activated(sums[i] + bias, target.relu);
  }
}

// Stores the line of one pixel, channel 0 of which lies at `line`; null: the pixel does not exist. All lanes of a warp come here, each with
// the sums of its row: sums[4 * j + 2 * kHalf + 0..1] are columns 8 * j + 2 * (lane % 4) + 0..1 (wgmma.cuh). Whether one of them is NaN.
template <int kHalf, class T, int kSums>
__device__ bool store_line(const RowTarget<T>& target, T* line, const float (&sums)[kSums]) {
  constexpr int kColumnBlocks = kSums / 4;  // of 8
  const int pair = threadIdx.x % 4;
  bool meets_nan = false;
#pragma unroll
  for (int j = 0; j < kColumnBlocks; ++j) meets_nan |= isnan(sums[4 * j + 2 * kHalf]) | isnan(sums[4 * j + 2 * kHalf + 1]);
  const auto pair_of = [&](int j) { return ElementPair<T>{narrow<T>(sums[4 * j + 2 * kHalf]), narrow<T>(sums[4 * j + 2 * kHalf + 1])}; };
  if (!target.whole_pairs) {
#pragma unroll
    for (int j = 0; j < kColumnBlocks; ++j) {
      const int col = target.first_col + 8 * j + 2 * pair;
      const ElementPair<T> elements = pair_of(j);
      if (line != nullptr && col < target.cols) line[col * target.channel_stride] = elements.first;
      if (line != nullptr && col + 1 < target.cols) line[(col + 1) * target.channel_stride] = elements.second;
    }
    return meets_nan && line != nullptr;
  }
  const auto store_pairs = [&](int first) {  // the four lanes of a row write 16 or 32 bytes
#pragma unroll
    for (int j = 0; j < kColumnBlocks; ++j) {
      const int col = target.first_col + 8 * j + 2 * pair;
      if (j >= first && line != nullptr && col < target.cols) *reinterpret_cast<ElementPair<T>*>(line + col) = pair_of(j);
    }
  };
  if (sizeof(T) == 2 && target.whole_chunks) {
    constexpr int kChunkBlocks = kColumnBlocks / 4 * 4;
#pragma unroll
    for (int j = 0; j < kChunkBlocks; j += 4) {
      ChunkWords words;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const ElementPair<T> elements = pair_of(j + i);
        __builtin_memcpy(&words.word[i], &elements, sizeof elements);
      }
      words = exchanged(words);
      const int col = target.first_col + 8 * (j + pair);
      if (line != nullptr && col < target.cols) *reinterpret_cast<ChunkWords*>(line + col) = words;
    }
    store_pairs(kChunkBlocks);
  } else {
    store_pairs(0);
  }
  return meets_nan && line != nullptr;
}

}  // namespace cnn_ext::cuda
