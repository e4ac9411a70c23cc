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
constexpr int kMostReach = 256, kMostStride = 64;  // keep every number of a patch an int

constexpr int resident_blocks(int cols) { return cols == 64 ? 2 : 3; }

// The output channels of a block: what leaves the fewest empty.
inline int cols_of(const Conv2dShape& s) { return (s.out_channels - 1) % 64 < 32 ? 32 : 64; }

inline int64_t col_tiles_of(const Conv2dShape& s) { return ceil_div<int64_t>(s.out_channels, cols_of(s)); }

// What all of these rows take, as far as the patch fits shared memory.
inline bool suits_patch(const Conv2dShape& s) {
  return has_mma_type(s) && s.groups == 1 && s.in_channels > 0 && s.in_channels < kLeastMmaChannels && has_int_extents(s) &&
         all_below(kMostReach, {s.kernel_h * s.dilation_h, s.kernel_w * s.dilation_w}) &&
         all_below(kMostStride, {s.stride_h, s.stride_w}) &&
         all_below(kMaxExtent, {product({s.in_w, s.in_channels}), product({s.out_h, s.out_w})});
}

// Of a / b, b > 0, rounded up; a may be negative.
CNN_EXT_HOST_DEVICE inline int ceil_quotient(int a, int b) { return a >= 0 ? ceil_div(a, b) : -(-a / b); }

inline int bytes_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// The width of a tile: 32, 16 or 8 pixels.
inline int width_bits_of(int out_w) {
  if (out_w > 16) return 5;
  return out_w > 8 ? 4 : 3;
}

// The tiles of the images of a batch: of the output 8 x 32 pixels, 16 x 16 or 32 x 8, by the width of the image.
struct PatchTiles {
  PatchTiles(int width_bits_, int height_, int image_h, int image_w)
      : width_bits(width_bits_),
        width(1 << width_bits),
        height(height_),
        in_row(ceil_div(image_w, width)),
        of_image(ceil_div(image_h, height) * in_row.divisor()) {}
  explicit PatchTiles(const Conv2dGeometry& g)
      : PatchTiles(width_bits_of(g.out_w), kTilePixels >> width_bits_of(g.out_w), g.out_h, g.out_w) {}

  // Of a pixel in its tile.
  CNN_EXT_HOST_DEVICE int row_of(int pixel) const { return pixel >> width_bits; }
  CNN_EXT_HOST_DEVICE int col_of(int pixel) const { return pixel & (width - 1); }

  int width_bits, width, height;  // in pixels
  FastDivisor in_row;
  int of_image;
};

// A distance between tiles of a batch, as whole images and a rest.
struct TileDistance {
  CNN_EXT_HOST_DEVICE TileDistance(const PatchTiles& tiles, int distance)
      : images(distance / larger(1, tiles.of_image)), rest(distance % larger(1, tiles.of_image)) {}
  int images, rest;
};

// Goes over every so many-th tile of a batch, from number `range` on.
class TileCursor {
 public:
  __device__ TileCursor(const PatchTiles& tiles, int range, const TileDistance& distance)
      : tiles_(tiles), distance_(distance), n_(range / tiles.of_image), tile_(range % tiles.of_image) {}
  __device__ TileCursor(const PatchTiles& tiles, int range, int ranges) : TileCursor(tiles, range, TileDistance(tiles, ranges)) {}
  // The image, and the first pixel of the tile.
  __device__ PlaneIndex at() const {
    const int row = tiles_.in_row.quotient(tile_);
    return {n_, row * tiles_.height, (tile_ - row * tiles_.in_row.divisor()) * tiles_.width};
  }
  __device__ bool is_in(int batch) const { return n_ < batch; }
  __device__ void advance() {
    n_ += distance_.images, tile_ += distance_.rest;
    if (tile_ >= tiles_.of_image) tile_ -= tiles_.of_image, ++n_;
  }

 private:
  const PatchTiles& tiles_;
  const TileDistance distance_;
  int n_, tile_;
};

// The patch of a tile of forward, and where a block keeps things in shared memory, in bytes from its start: the
// filters, the offsets of the words of the depth in the patch, the bias, the patch and, for each warp, a slice of the sums.
struct ForwardPatch {
  ForwardPatch(const Conv2dGeometry& g, const PatchTiles& tiles, DType dtype, int cols)
      : row_words(ceil_div(g.kernel_w * g.group_in * bytes_of(dtype), 4)),
        steps(ceil_div(g.kernel_h * row_words, kStepWords)),
        patch_h((tiles.height - 1) * g.stride_h + (g.kernel_h - 1) * g.dilation_h + 1),
        patch_w((tiles.width - 1) * g.stride_w + g.kernel_w + 1),
        pitch(ceil_div(patch_w * g.group_in, 2) * 2),
        patch_bytes(ceil_div(patch_h * pitch * bytes_of(dtype), kChunkBytes) * kChunkBytes),
        copy_bytes(bytes_of(dtype) == 2 && g.stride_w * g.group_in % 2 != 0 ? patch_bytes : 0),
        slice_pitch((g.layout == Layout::nhwc ? cols : kWarpPixels) + 4),
        slice_bytes((g.layout == Layout::nhwc ? 8 : kSlots) * slice_pitch * static_cast<int>(sizeof(float))),
        offsets(steps * (cols / kSlots) * 32 * kChunkBytes),
        bias(offsets + steps * 4 * static_cast<int>(sizeof(uint2))),
        patch(bias + cols * static_cast<int>(sizeof(float))),
        slices(patch + patch_bytes + copy_bytes),
        shared_bytes(slices + kBlockThreads / 32 * slice_bytes) {}

  int row_words, steps;  // of the depth: the words of a row of the kernel, all instructions
  int patch_h, patch_w;  // in pixels; the last word of a row may end one element after its window
  int pitch;             // of the patch, in elements
  int patch_bytes, copy_bytes;
  int slice_pitch, slice_bytes;
  int offsets, bias, patch, slices, shared_bytes;
};

// The lines of memory that a patch is read from: rows of (w, channel) in nhwc; rows of w in nchw, one for each channel.
struct PatchLines {
  PatchLines(const Conv2dGeometry& g, int patch_h, int patch_w)
      : channels(g.layout == Layout::nhwc ? 1 : g.group_in),
        pixel(g.group_in / channels),
        limit(g.in_w * pixel),
        elements(patch_h * patch_w * g.group_in),
        length(patch_w * pixel),
        channel(channels) {}

  int channels;  // lines of a row
  int pixel;     // elements of a pixel in a line
  int limit;     // elements of a line of the image
  int elements;  // of the patch
  FastDivisor length, channel;
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

// Neighbouring elements as the words of a fragment, in TF32 where they are float32; those from `count` on are zeros. kVector: they are
// aligned to the size of all, up to 16 bytes, and exist together; where they do not, `base` is read, the tensor: without a branch the loads
// of several calls are on their way together.
template <bool kVector, class T, int kWords>
__device__ void read_words(const T* source, int count, const T* base, uint32_t (&words)[kWords]) {
  if constexpr (kVector) {
    const T* first = count > 0 ? source : base;
    constexpr int kAtOnce = smaller(kWords, 4);
#pragma unroll
    for (int i = 0; i < kWords; i += kAtOnce) load_words<kAtOnce>(first + i * kPerWord<T>, words + i);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const uint32_t word = sizeof(T) == 4 ? to_tf32(__uint_as_float(words[i])) : words[i];
      words[i] = count > 0 ? word : 0;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = 0;
#pragma unroll
    for (int i = 0; i < kWords * kPerWord<T>; ++i) {
      if (i < count) words[i / kPerWord<T>] |= bits_of(source[i]) << i % kPerWord<T> * 16;
    }
  }
}

// The number n of kVector neighbours that end up in one thread: index n of the product's columns 8 * j + n, of which a thread holds two
// for each j, is theirs when they are numbered so.
template <int kVector>
__device__ int side_by_side(int j, int n) {
  constexpr int kFragments = kVector / 2;
  return j / kFragments * 4 * kVector + n / 2 * kVector + j % kFragments * 2 + n % 2;
}

// A patch as the tensor cores read it, in TF32 where it is float32. In 16 bits a second copy, `copy_bytes` behind and moved by an element,
// has the words that begin at odd elements; 0: there is none.
template <class T>
__device__ void stage_element(unsigned char* patch, int copy_bytes, int place, T value) {
  if constexpr (sizeof(T) == 4) {
    reinterpret_cast<uint32_t*>(patch)[place] = to_tf32(value);
  } else {
    reinterpret_cast<T*>(patch)[place] = value;
    if (copy_bytes != 0 && place > 0) reinterpret_cast<T*>(patch + copy_bytes)[place - 1] = value;
  }
}

// Stages the patch of the tile at `at`, whose taps begin in the padding. line_place(row, c) and place(x): which element of the patch the
// element x is, of line c of a row, as a sum. kLoads of a thread are on their way at a time. Whether an element that it has staged is not
// finite. kNhwc: of the layout.
template <int kLoads, bool kNhwc, class T, class LinePlace, class Place>
__device__ bool stage_patch(const Conv2dGeometry& g, const PatchLines& lines, const T* input, const PlaneIndex& at, unsigned char* patch,
                            int copy_bytes, const LinePlace& line_place, const Place& place) {
  const int first_h = at.h * g.stride_h - g.pad_top, first_x = (at.w * g.stride_w - g.pad_left) * lines.pixel;
  const int64_t image = at.outer * g.in.n;
  const int line_elements = static_cast<int>(g.in.h);
  bool odd = false;
#pragma unroll 1
  for (int first = threadIdx.x; first < lines.elements; first += kLoads * kBlockThreads) {
    T value[kLoads];
    int element[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int index = first + i * kBlockThreads, line = lines.length.quotient(index), x = index - line * lines.length.divisor();
      const int row = kNhwc ? line : lines.channel.quotient(line), c = kNhwc ? 0 : line - row * lines.channels;
      const int h = first_h + row, w = first_x + x;
      const bool exists = index < lines.elements && static_cast<unsigned>(h) < static_cast<unsigned>(g.in_h) &&
                          static_cast<unsigned>(w) < static_cast<unsigned>(lines.limit);
      const int64_t offset = image + c * g.in.c + static_cast<int64_t>(h) * line_elements + w;
      value[i] = exists ? input[offset] : narrow<T>(0);
      element[i] = index < lines.elements ? line_place(row, c) + place(x) : -1;
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (element[i] < 0) continue;
      odd = odd || !isfinite(widen(value[i]));
      stage_element(patch, copy_bytes, element[i], value[i]);
    }
  }
  return odd;
}

// Where the words from an element on lie in it, in bytes.
template <class T>
__device__ int word_place(int copy_bytes, int element) {
  const bool moved = copy_bytes != 0 && element % 2 != 0;
  return (moved ? copy_bytes : 0) + (element - moved) * static_cast<int>(sizeof(T));
}

}  // namespace cnn_ext::cuda
