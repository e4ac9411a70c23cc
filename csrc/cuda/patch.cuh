// What the rows for few input channels (conv2d_forward_patch_mma.cu) stage: the patch of the input that a tile of the output reads, with
// its halo, in shared memory as rows of (w, channel) whatever the layout is. In it the window of a pixel is, row by row, a run of kernel_w
// * channels neighbouring elements.
#pragma once

#include "cuda/chunk.cuh"
#include "cuda/common.cuh"
#include "cuda/limits.h"
#include "cuda/primitives.cuh"

namespace cnn_ext::cuda {

constexpr int kWarpPixels = 32, kTilePixels = kBlockThreads / 32 * kWarpPixels;
constexpr int kStepWords = 8;  // of depth that an instruction multiplies, 4 bytes each
constexpr int kSlots = 16;     // output channels of one fragment of filters
template <class T>
constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));  // elements

constexpr int kMostSharedBytes = 99 * 1024;        // of every device since sm_80
constexpr int kMultiprocessors = 132;              // enough blocks for all of them
constexpr int kMostReach = 512, kMostStride = 64;  // keep every number of a patch an int

constexpr int resident_blocks(int cols) { return cols == 64 ? 2 : 3; }

// The output channels of a block: what leaves the fewest empty.
inline int cols_of(const Conv2dShape& s) { return (s.out_channels - 1) % 64 < 32 ? 32 : 64; }

inline int bytes_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// The width of a tile: 32, 16 or 8 pixels.
inline int width_bits_of(int out_w) {
  if (out_w > 16) return 5;
  return out_w > 8 ? 4 : 3;
}

// A tile of the output, the patch of the input that it reads, and where a block keeps things in shared memory, in bytes from its start: the
// filters, the offsets of the words of the depth in the patch, the bias, the patch and, for each warp, a slice of the sums.
struct PatchTile {
  PatchTile(const Conv2dGeometry& g, DType dtype, int cols)
      : width_bits(width_bits_of(g.out_w)),
        width(1 << width_bits),
        height(kTilePixels / width),
        row_words(ceil_div(g.kernel_w * g.group_in * bytes_of(dtype), 4)),
        steps(ceil_div(g.kernel_h * row_words, kStepWords)),
        patch_h((height - 1) * g.stride_h + (g.kernel_h - 1) * g.dilation_h + 1),
        patch_w((width - 1) * g.stride_w + g.kernel_w + 1),
        pitch(ceil_div(patch_w * g.group_in, 2) * 2),
        copies(bytes_of(dtype) == 2 && g.stride_w * g.group_in % 2 != 0 ? 2 : 1),
        copy_bytes(ceil_div(patch_h * pitch * bytes_of(dtype), kChunkBytes) * kChunkBytes),
        slice_pitch((g.layout == Layout::nhwc ? cols : kWarpPixels) + 4),
        slice_bytes((g.layout == Layout::nhwc ? 8 : kSlots) * slice_pitch * static_cast<int>(sizeof(float))),
        offsets(steps * (cols / kSlots) * 32 * kChunkBytes),
        bias(offsets + steps * 4 * static_cast<int>(sizeof(uint2))),
        patch(bias + cols * static_cast<int>(sizeof(float))),
        slices(patch + copies * copy_bytes),
        shared_bytes(slices + kBlockThreads / 32 * slice_bytes) {}

  int width_bits, width, height;  // of the tile, in pixels
  int row_words, steps;           // of the depth: the words of a row of the kernel, all instructions
  int patch_h, patch_w;           // in pixels; the last word of a row may end one element after its window
  int pitch;                      // of the patch, in elements
  int copies, copy_bytes;
  int slice_pitch, slice_bytes;
  int offsets, bias, patch, slices, shared_bytes;
};

// The lines of memory that a patch is read from: rows of (w, channel) in nhwc; rows of w in nchw, one for each channel.
struct PatchLines {
  PatchLines(const Conv2dGeometry& g, const PatchTile& t)
      : channels(g.layout == Layout::nhwc ? 1 : g.group_in),
        pixel(g.group_in / channels),
        limit(g.in_w * pixel),
        elements(t.patch_h * t.patch_w * g.group_in),
        length(t.patch_w * pixel),
        channel(channels) {}

  int channels;  // lines of a row
  int pixel;     // elements of a pixel in a line
  int limit;     // elements of a line of the image
  int elements;  // of the patch
  FastDivisor length, channel;
};

template <class T>
struct PatchProblem {
  PatchProblem(const Conv2dShape& s, const Conv2dBuffers& b, int cols)
      : g(s),
        tile(g, s.dtype, cols),
        lines(g, tile),
        input(static_cast<const T*>(b.input)),
        weight(static_cast<const T*>(b.weight)),
        bias(static_cast<const T*>(b.bias)),
        output(static_cast<T*>(b.output)),
        tiles_w(ceil_div(g.out_w, tile.width)),
        image_tiles(ceil_div(g.out_h, tile.height) * tiles_w.divisor()),
        has_vectors(is_aligned(b.output) && (g.layout == Layout::nhwc ? g.group_out % kChunk<T> == 0 : g.out_w % 4 == 0)) {}

  Conv2dGeometry g;
  PatchTile tile;
  PatchLines lines;
  const T* input;
  const T* weight;
  const T* bias;  // null: none
  T* output;
  FastDivisor tiles_w;
  int image_tiles;
  bool has_vectors;  // whether neighbouring sums may be stored together
};

template <class T>
__device__ uint32_t bits_of(T x) {
  if constexpr (sizeof(T) == 4) {
    return to_tf32(x);
  } else {
    uint16_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return bits;
  }
}

// Rounds 8 or 16 bytes of neighbours and stores them at once.
template <class T, int kCount>
__device__ void store_vector(T* target, const float (&values)[kCount]) {
  constexpr int kWords = kCount / kPerWord<T>;
  uint32_t words[kWords] = {};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (sizeof(T) == 4) {
      words[i] = __float_as_uint(values[i]);
    } else {
      words[i / 2] |= bits_of(narrow<T>(values[i])) << i % 2 * 16;
    }
  }
  store_words(target, words);
}

// The number n of kVector neighbours that end up in one thread: index n of the product's columns 8 * j + n, of which a thread holds two
// for each j, is theirs when they are numbered so.
template <int kVector>
__device__ int side_by_side(int j, int n) {
  constexpr int kFragments = kVector / 2;
  return j / kFragments * 4 * kVector + n / 2 * kVector + j % kFragments * 2 + n % 2;
}

template <class T>
__device__ void stage_element(unsigned char* patch, int place, T value) {
  if constexpr (sizeof(T) == 4) {
    reinterpret_cast<uint32_t*>(patch)[place] = to_tf32(value);
  } else {
    reinterpret_cast<T*>(patch)[place] = value;
  }
}

// Stages the patch of the tile whose first output is (oh, ow). Whether an element that this thread has staged is not finite.
template <class T>
__device__ bool stage_patch(const PatchProblem<T>& p, unsigned char* patch, int n, int oh, int ow) {
  constexpr int kLoads = 4;
  const Conv2dGeometry& g = p.g;
  const PatchTile& t = p.tile;
  const PatchLines& lines = p.lines;
  const int first_h = oh * g.stride_h - g.pad_top, first_x = (ow * g.stride_w - g.pad_left) * lines.pixel;
  const T* image = p.input + n * g.in.n;
  bool odd = false;
  for (int first = threadIdx.x; first < lines.elements; first += kLoads * kBlockThreads) {
    T value[kLoads];
    int place[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int index = first + i * kBlockThreads;
      const int line = lines.length.quotient(index), x = index - line * lines.length.divisor();
      const int row = lines.channel.quotient(line), c = line - row * lines.channels;
      const int h = first_h + row, w = first_x + x;
      const bool exists = index < lines.elements && static_cast<unsigned>(h) < static_cast<unsigned>(g.in_h) &&
                          static_cast<unsigned>(w) < static_cast<unsigned>(lines.limit);
      const int64_t offset = c * g.in.c + h * g.in.h + w;
      value[i] = exists ? image[offset] : narrow<T>(0);
      place[i] = index < lines.elements ? row * t.pitch + x * lines.channels + c : -1;
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (place[i] < 0) continue;
      odd = odd || !isfinite(widen(value[i]));
      stage_element(patch, place[i], value[i]);
      if (t.copies == 2 && place[i] > 0) stage_element(patch + t.copy_bytes, place[i] - 1, value[i]);
    }
  }
  return odd;
}

}  // namespace cnn_ext::cuda
