// What the depthwise kernels in nhwc stage: a tile of pixels of 32 neighbouring channels, with zeros outside the image, and the filters of
// these channels. 16 threads, each with a pair of channels, share a strip of the tile's results; two strips are a warp.
#pragma once

#include "cuda/chunk.cuh"
#include "cuda/primitives.cuh"
#include "cuda/vector.cuh"

namespace cnn_ext::cuda {

constexpr int kPair = 2, kTilePairs = 16, kTileChannels = kPair * kTilePairs;
template <class T>
constexpr int kPixelBytes = kTileChannels * static_cast<int>(sizeof(T));

constexpr int kNarrowStrip = 7, kWideStrip = 8;  // results of a row

// Strips side by side in a tile.
inline int64_t tile_cols(int64_t width, int strip_width) {
  const int64_t strips = ceil_div<int64_t>(width, strip_width);
  return strips == 3 ? 3 : larger<int64_t>(1, smaller<int64_t>(strips, 2));
}

// The strip that covers less beyond the width; of two, the one with fewer registers.
inline int strip_width(int64_t width) {
  const auto covered = [&](int strip) { return ceil_div(width, tile_cols(width, strip) * strip) * tile_cols(width, strip) * strip; };
  return covered(kNarrowStrip) <= covered(kWideStrip) ? kNarrowStrip : kWideStrip;
}

// As it lies in shared memory: `pitch` bytes from row to row.
struct TileExtent {
  TileExtent(int rows_, int cols_, int pixel_bytes, int strip_distance)
      : rows(rows_), cols(cols_), pitch(cols_ * pixel_bytes + spread(cols_, strip_distance)) {}
  // So that pixels of 64 bytes in rows `strip_distance` apart, those of neighbouring strips, lie in different banks.
  static constexpr int spread(int cols, int strip_distance) { return strip_distance == 1 ? (cols + 1) % 2 * 64 : 64 / strip_distance; }
  CNN_EXT_HOST_DEVICE int bytes() const { return rows * pitch; }

  int rows;
  FastDivisor cols;
  int pitch;
};

// An image, or zeros outside.
template <class T>
struct ChannelsImage {
  const T* data;
  int height, width, channels;
  bool has_whole_chunks;
};

// Queues the copies of a tile from pixel (first_h, first_w) on. It is there after cp_async_wait and a barrier.
template <class T>
__device__ void stage_tile(const ChannelsImage<T>& image, int first_channel, int first_h, int first_w, const TileExtent& tile,
                           unsigned char* staged) {
  constexpr int kPixelChunks = kTileChannels / kChunk<T>;
  const int part = static_cast<int>(threadIdx.x) % kPixelChunks, channel = first_channel + part * kChunk<T>;
  const int pixels = tile.rows * tile.cols.divisor(), step = static_cast<int>(blockDim.x) / kPixelChunks;
  staged += part * kChunkBytes;
  // copy(target, source, count) a chunk of which `count` channels exist.
  const auto for_each_chunk = [&](const auto& copy) {
#pragma unroll 1
    for (int pixel = static_cast<int>(threadIdx.x) / kPixelChunks; pixel < pixels; pixel += step) {
      const int y = tile.cols.quotient(pixel), x = pixel - y * tile.cols.divisor(), h = first_h + y, w = first_w + x;
      const bool exists = static_cast<unsigned>(h) < static_cast<unsigned>(image.height) &&
                          static_cast<unsigned>(w) < static_cast<unsigned>(image.width) && channel < image.channels;
      const int offset = exists ? (h * image.width + w) * image.channels + channel : 0;
      copy(staged + y * tile.pitch + x * kPixelBytes<T>, image.data + offset, exists ? image.channels - channel : 0);
    }
  };
  if (image.has_whole_chunks) {
    for_each_chunk([](unsigned char* target, const T* source, int count) { cp_async_16(target, source, count > 0); });
  } else {
    for_each_chunk([](unsigned char* target, const T* source, int count) {
      store_vector(reinterpret_cast<T*>(target), load_some<kChunk<T>>(source, count, false));
    });
  }
}

// Filters by taps; the pitch spreads a filter over the banks.
constexpr int kFilterPitch = kTileChannels + kPair;

constexpr int filter_bytes(int64_t kernel) {
  return ceil_div(static_cast<int>(kernel * kernel * kFilterPitch * sizeof(float)), kChunkBytes) * kChunkBytes;
}

// They may be turned round.
template <class T, int kKernel>
__device__ void stage_filters(const T* weight, int channels, int first_channel, bool is_turned, float* filters) {
  constexpr int kTaps = kKernel * kKernel;
  const int count = smaller(kTileChannels, channels - first_channel) * kTaps, step = static_cast<int>(blockDim.x);
  constexpr int kBatch = ceil_div(kTileChannels * kTaps, kBlockThreads);  // loads on their way at a time
  const T* source = weight + first_channel * kTaps;
#pragma unroll 1
  for (int first = static_cast<int>(threadIdx.x); first < count; first += kBatch * step) {
    T batch[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) batch[b] = source[smaller(first + b * step, count - 1)];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int i = first + b * step, channel = i / kTaps, tap = i - channel * kTaps;
      if (i < count) filters[(is_turned ? kTaps - 1 - tap : tap) * kFilterPitch + channel] = widen(batch[b]);
    }
  }
}

// A pair of channels, of a pixel or of a tap.
struct PairValues {
  float value[kPair];
};

__device__ inline PairValues widen_pair(const Vector<float, kPair>& pair) { return {{pair.element[0], pair.element[1]}}; }
__device__ inline PairValues widen_pair(const Vector<__half, kPair>& pair) { return {{widen(pair.element[0]), widen(pair.element[1])}}; }
__device__ inline PairValues widen_pair(const Vector<__nv_bfloat16, kPair>& pair) {
  uint32_t word;
  __builtin_memcpy(&word, &pair, sizeof word);
  return {{__uint_as_float(word << 16), __uint_as_float(word & 0xFFFF0000)}};  // two instructions
}

template <class T>
__device__ PairValues staged_pair(const void* staged) {
  return widen_pair(load_vector<kPair>(static_cast<const T*>(staged)));
}

__device__ inline PairValues tap_at(const float* filters, int tap) { return staged_pair<float>(filters + tap * kFilterPitch); }

template <int kKernel>
__device__ void load_taps(const float* filters, int r, PairValues (&taps)[kKernel]) {
#pragma unroll
  for (int s = 0; s < kKernel; ++s) taps[s] = tap_at(filters, r * kKernel + s);
}

// The pairs of kCount neighbouring pixels.
template <class T, int kCount>
__device__ void load_pixels(const unsigned char* staged, PairValues (&pixels)[kCount]) {
#pragma unroll
  for (int x = 0; x < kCount; ++x) pixels[x] = staged_pair<T>(staged + x * kPixelBytes<T>);
}

__device__ inline void add_product(PairValues& sum, const PairValues& a, const PairValues& b) {
#pragma unroll
  for (int e = 0; e < kPair; ++e) sum.value[e] = fma(a.value[e], b.value[e], sum.value[e]);
}

// Whether none of them is a NaN, nor two of them infinities of different signs.
template <int kRows, int kCols>
__device__ bool are_numbers(const PairValues (&sums)[kRows][kCols]) {
  float total = 0;
#pragma unroll
  for (int i = 0; i < kRows * kCols * kPair; ++i) total += sums[i / kPair / kCols][i / kPair % kCols].value[i % kPair];
  return !isnan(total);
}

}  // namespace cnn_ext::cuda
