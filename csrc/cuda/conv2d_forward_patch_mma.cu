// output[n, k, oh, ow] of few input channels (fewer than 16, one group: the first layer of a network) on tensor cores, in TF32 (where the
// policy allows it), float16 and bfloat16.
//
// The idea: with few channels a convolution is bound by memory, and by what turns windows into operands. So a block stages a patch of the
// input, with its halo, in shared memory once, as rows of (w, channel) whatever the layout is. There the window of a pixel is, row by row,
// a run of kernel_w * channels neighbouring elements: a register of a fragment, 4 bytes of neighbouring terms, is read from where it lies,
// and nothing is unfolded. The depth of the product is (r, s, channel) with the terms of a row r padded to whole words. In 16 bits the
// windows of every other pixel may begin in the middle of a word: then a second copy of the patch, moved by an element, serves those.
//
// The tile: 256 threads are 8 warps of 32 pixels each, 8 x 32, 16 x 16 or 32 x 8 by the width of the map, and 32 or 64 output channels.
// A block keeps its filters in shared memory, as fragments, and goes from tile to tile. In nhwc pixels are the rows of the product, in nchw
// its columns, and those that lie side by side in memory are numbered so that a thread ends up with neighbours: it stores its registers by
// 16 bytes (8 in nchw and 16 bits). Where that does not fit the map or the address, sums go through shared memory instead.
//
// Bound by the stores of the output; with many terms (7 x 7) by the issue of instructions.
//
// Order of additions: from the bias on, the tensor core adds up the terms of an output in the order of the depth.
//
// Padding never multiplies: it is staged as zeros. A block that has met an infinity or a NaN looks for sums that are NaN and adds those up
// again, tap by tap without the padding.
//
// Not handled: groups, a dilation along the row, float64, strict float32, and strides whose patches do not fit shared memory.
#include "cuda/mma_gemm.cuh"
#include "cuda/patch.cuh"
#include "cuda/relu_pool.cuh"

namespace cnn_ext::cuda {
namespace {

template <class T>
struct ForwardProblem {
  ForwardProblem(const Conv2dShape& s, const Conv2dBuffers& b, int cols, bool relu_)
      : g(s),
        tiles(g),
        patch(g, tiles, s.dtype, cols),
        lines(g, patch.patch_h, patch.patch_w),
        input(static_cast<const T*>(b.input)),
        weight(static_cast<const T*>(b.weight)),
        bias(static_cast<const T*>(b.bias)),
        output(static_cast<T*>(b.output)),
        relu(relu_),
        has_vectors(is_aligned(b.output) && (g.layout == Layout::nhwc ? g.group_out % kChunk<T> == 0 : g.out_w % 4 == 0)) {}

  Conv2dGeometry g;
  PatchTiles tiles;
  ForwardPatch patch;
  PatchLines lines;
  const T* input;
  const T* weight;
  const T* bias;  // null: none
  T* output;
  bool relu;         // of what is stored
  bool has_vectors;  // whether neighbouring sums may be stored together
};

template <class T, bool kPixelRows, int kCols>
class PatchForward {
 public:
  __device__ PatchForward(const ForwardProblem<T>& problem, int first_col)
      : p(problem), g(problem.g), t(problem.patch), shared_(dynamic_shared<unsigned char>()), first_col_(first_col) {
#pragma unroll
    for (int q = 0; q < kGroups; ++q) {
      const int pixel = warp() * kWarpPixels + (kPixelRows ? q * 8 + group() : side_by_side<kPixelVector>(q, group()));
      const int element = p.tiles.row_of(pixel) * g.stride_h * t.pitch + p.tiles.col_of(pixel) * g.stride_w * g.group_in;
      windows_[q] = t.patch + word_place<T>(t.copy_bytes, element);
    }
  }

  __device__ void run(int range, int ranges) {
    const bool odd_filters = stage_filters();
    for (TileCursor tile(p.tiles, range, ranges); tile.is_in(g.batch); tile.advance()) {
      const PlaneIndex at = tile.at();
      const bool odd = __syncthreads_or(stage(at) || odd_filters);
      multiply();
      store(at.outer, at.h, at.w, odd);
      __syncthreads();
    }
  }

 private:
  static constexpr int kGroups = kWarpPixels / 8;  // of pixels
  static constexpr int kFragments = kCols / kSlots;
  static constexpr int kMajor = kPixelRows ? 8 : kSlots, kMinor = kPixelRows ? kCols : kWarpPixels;  // of a slice of the sums
  static constexpr int kPixelVector = 4, kColVector = kChunk<T>;
  static constexpr int kRowFragments = kPixelRows ? kGroups / 2 : kFragments, kColFragments = kPixelRows ? kCols / 8 : kGroups;

  __device__ static int warp() { return threadIdx.x / 32; }
  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static int group() { return lane() / 4; }
  __device__ static int pair() { return lane() % 4; }
  __device__ static int channel_of_slot(int slot) { return kPixelRows ? side_by_side<kColVector>(slot / 8, slot % 8) : slot; }

  __device__ float* shared_bias() const { return reinterpret_cast<float*>(shared_ + t.bias); }

  // The filters as fragments, [step][fragment][lane][4 words]: slots group and group + 8, words pair and pair + 4 of the step of each.
  // Whether one that this thread has staged is not finite.
  __device__ bool stage_filters() const {
    bool odd = false;
    uint32_t* filters = reinterpret_cast<uint32_t*>(shared_);
    for (int word = lane(); word < t.steps * kStepWords; word += 32) {
      const int r = word / t.row_words, first_term = word % t.row_words * kPerWord<T>;
      int64_t offset[kPerWord<T>];
      bool exists[kPerWord<T>];
#pragma unroll
      for (int i = 0; i < kPerWord<T>; ++i) {
        const int s = (first_term + i) / g.group_in, c = (first_term + i) % g.group_in;
        exists[i] = r < g.kernel_h && s < g.kernel_w;
        offset[i] = exists[i] ? c * g.filter.c + r * g.filter.h + s * g.filter.w : 0;
      }
      const int step = word / kStepWords, half = word / 4 % 2;
      if (warp() == 0) {
        const int place = (r * g.dilation_h * t.pitch + first_term) * static_cast<int>(sizeof(T));
        reinterpret_cast<int*>(shared_ + t.offsets)[(step * 4 + word % 4) * 2 + half] = r < g.kernel_h ? place : 0;
      }
#pragma unroll 4
      for (int slot = warp(); slot < kCols; slot += kBlockThreads / 32) {
        const int k = first_col_ + channel_of_slot(slot);
        uint32_t bits = 0;
#pragma unroll
        for (int i = 0; i < kPerWord<T>; ++i) {
          const T value = exists[i] && k < g.group_out ? p.weight[k * g.filter.n + offset[i]] : narrow<T>(0);
          odd = odd || !isfinite(widen(value));
          bits |= bits_of(value) << (16 * i);
        }
        filters[((step * kFragments + slot / kSlots) * 32 + slot % 8 * 4 + word % 4) * 4 + slot % kSlots / 8 * 2 + half] = bits;
      }
    }
    for (int col = threadIdx.x; col < kCols; col += kBlockThreads) {
      const int k = first_col_ + col;
      shared_bias()[col] = p.bias != nullptr && k < g.group_out ? widen(p.bias[k]) : 0;
    }
    return odd;
  }

  __device__ bool stage(const PlaneIndex& at) const {
    return stage_patch<4, kPixelRows>(
        g, p.lines, p.input, at, shared_ + t.patch, t.copy_bytes, [this](int row, int c) { return row * t.pitch + c; },
        [this](int x) { return kPixelRows ? x : x * p.lines.channels; });
  }

  __device__ void multiply() {
    const float* bias = shared_bias();
#pragma unroll
    for (int i = 0; i < kRowFragments; ++i) {
#pragma unroll
      for (int j = 0; j < kColFragments; ++j) {
#pragma unroll
        for (int v = 0; v < 4; ++v)
          sums_[i][j][v] = bias[kPixelRows ? channel_of_slot(j * 8 + pair() * 2 + v % 2) : i * kSlots + v / 2 * 8 + group()];
      }
    }
    const uint2* offsets = reinterpret_cast<const uint2*>(shared_ + t.offsets) + pair();
    const uint4* filters = reinterpret_cast<const uint4*>(shared_) + lane();
#pragma unroll 1
    for (int step = 0; step < t.steps; ++step, offsets += 4, filters += kFragments * 32) {
      uint32_t pixels[kGroups][2];
#pragma unroll
      for (int q = 0; q < kGroups; ++q) {
        pixels[q][0] = *reinterpret_cast<const uint32_t*>(shared_ + windows_[q] + offsets->x);
        pixels[q][1] = *reinterpret_cast<const uint32_t*>(shared_ + windows_[q] + offsets->y);
      }
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
        const uint4 filter = filters[f * 32];
        if constexpr (kPixelRows) {
#pragma unroll
          for (int i = 0; i < kRowFragments; ++i) {
            const uint32_t a[4] = {pixels[2 * i][0], pixels[2 * i + 1][0], pixels[2 * i][1], pixels[2 * i + 1][1]};
            mma(sums_[i][2 * f], a, {filter.x, filter.y}, T{});
            mma(sums_[i][2 * f + 1], a, {filter.z, filter.w}, T{});
          }
        } else {
          const uint32_t a[4] = {filter.x, filter.z, filter.y, filter.w};
#pragma unroll
          for (int q = 0; q < kGroups; ++q) mma(sums_[f][q], a, pixels[q], T{});
        }
      }
    }
  }

  // Where a pixel of this warp lies in the output.
  struct Pixel {
    int h, w;
    bool exists;
  };
  __device__ Pixel pixel_at(int oh, int ow, int pixel) const {
    pixel += warp() * kWarpPixels;
    const int h = oh + p.tiles.row_of(pixel), w = ow + p.tiles.col_of(pixel);
    return {h, w, h < g.out_h && w < g.out_w};
  }

  __device__ void store(int n, int oh, int ow, bool odd) const {
    if (p.has_vectors && !odd) {
      store_registers(n, oh, ow);
    } else {
      store_slices(n, oh, ow, odd);
    }
  }

  __device__ void store_registers(int n, int oh, int ow) const {
    T* image = p.output + n * g.out.n + first_col_ * g.out.c;
    if constexpr (kPixelRows) {
#pragma unroll
      for (int q = 0; q < kGroups; ++q) {
        const Pixel pixel = pixel_at(oh, ow, q * 8 + group());
        T* target = image + pixel.h * g.out.h + pixel.w * g.out.w;
#pragma unroll
        for (int first = 0; first < kCols; first += 4 * kColVector) {
          const int col = first + pair() * kColVector;
          float values[kColVector];
#pragma unroll
          for (int i = 0; i < kColVector; ++i) values[i] = activated(sums_[q / 2][first / 8 + i / 2][q % 2 * 2 + i % 2], p.relu);
          if (pixel.exists && first_col_ + col < g.group_out) store_vector(target + col, values);
        }
      }
    } else {
#pragma unroll
      for (int first = 0; first < kWarpPixels; first += 4 * kPixelVector) {
        const Pixel pixel = pixel_at(oh, ow, first + pair() * kPixelVector);
        T* target = image + pixel.h * g.out.h + pixel.w + group() * g.out.c;
#pragma unroll
        for (int slot = 0; slot < kCols; slot += 8, target += 8 * g.out.c) {
          float values[kPixelVector];
#pragma unroll
          for (int i = 0; i < kPixelVector; ++i) {
            values[i] = activated(sums_[slot / kSlots][first / 8 + i / 2][slot % kSlots / 8 * 2 + i % 2], p.relu);
          }
          if (pixel.exists && first_col_ + slot + group() < g.group_out) store_vector(target, values);
        }
      }
    }
  }

  // Eight pixels or sixteen channels at a time through shared memory, one by one from there, neighbours in memory by neighbouring lanes.
  __device__ void store_slices(int n, int oh, int ow, bool odd) const {
    float* slice = reinterpret_cast<float*>(shared_ + t.slices + warp() * t.slice_bytes);
    constexpr int kSlices = kPixelRows ? kGroups : kFragments;
#pragma unroll
    for (int part = 0; part < kSlices; ++part) {
      if constexpr (kPixelRows) {
#pragma unroll
        for (int j = 0; j < kColFragments; ++j) {
#pragma unroll
          for (int v = 0; v < 2; ++v) {
            slice[group() * t.slice_pitch + channel_of_slot(j * 8 + pair() * 2 + v)] = sums_[part / 2][j][part % 2 * 2 + v];
          }
        }
      } else {
#pragma unroll
        for (int q = 0; q < kGroups; ++q) {
#pragma unroll
          for (int v = 0; v < 4; ++v) {
            slice[(v / 2 * 8 + group()) * t.slice_pitch + side_by_side<kPixelVector>(q, pair() * 2 + v % 2)] = sums_[part][q][v];
          }
        }
      }
      __syncwarp();
      if (odd) add_up_again(slice, part, n, oh, ow);
      store_slice(slice, part, n, oh, ow);
      __syncwarp();
    }
  }

  // Where the sum at [major][minor] of a slice goes.
  struct Target {
    Pixel pixel;
    int k;
    bool exists;
  };
  __device__ Target target_of(int part, int major, int minor, int oh, int ow) const {
    const Pixel pixel = pixel_at(oh, ow, kPixelRows ? part * 8 + major : minor);
    const int k = first_col_ + (kPixelRows ? minor : part * kSlots + major);
    return {pixel, k, pixel.exists && k < g.group_out};
  }

  __device__ void store_slice(const float* slice, int part, int n, int oh, int ow) const {
    T* image = p.output + n * g.out.n;
#pragma unroll 1
    for (int first = 0; first < kMinor; first += 32) {
#pragma unroll 4
      for (int major = 0; major < kMajor; ++major) {
        const Target to = target_of(part, major, first + lane(), oh, ow);
        const int64_t offset = to.pixel.h * g.out.h + to.pixel.w * g.out.w + to.k * g.out.c;
        if (to.exists) image[offset] = narrow<T>(activated(slice[major * t.slice_pitch + first + lane()], p.relu));
      }
    }
  }

  // Replaces every sum that is NaN.
  __device__ void add_up_again(float* slice, int part, int n, int oh, int ow) const {
#pragma unroll 1
    for (int index = lane(); index < kMajor * kMinor; index += 32) {
      const Target of = target_of(part, index / kMinor, index % kMinor, oh, ow);
      float& sum = slice[index / kMinor * t.slice_pitch + index % kMinor];
      if (of.exists && isnan(sum)) sum = exact_sum(n, of.k, of.pixel.h, of.pixel.w);
    }
    __syncwarp();
  }

  // The sum of the products that exist.
  __device__ float exact_sum(int n, int k, int oh, int ow) const {
    float sum = shared_bias()[k - first_col_];
    const int first_h = oh * g.stride_h - g.pad_top, first_w = ow * g.stride_w - g.pad_left;
    const Range rows = taps_inside(first_h, g.dilation_h, g.kernel_h, g.in_h), cols = taps_inside(first_w, 1, g.kernel_w, g.in_w);
    const T* image = p.input + n * g.in.n;
    const T* filter = p.weight + k * g.filter.n;
#pragma unroll 1
    for (int r = rows.begin; r < rows.end; ++r) {
#pragma unroll 1
      for (int s = cols.begin; s < cols.end; ++s) {
        const T* pixel = image + (first_h + r * g.dilation_h) * g.in.h + (first_w + s) * g.in.w;
#pragma unroll 1
        for (int c = 0; c < g.group_in; ++c) {
          sum = fmaf(widen(filter[c * g.filter.c + r * g.filter.h + s * g.filter.w]), widen(pixel[c * g.in.c]), sum);
        }
      }
    }
    return sum;
  }

  const ForwardProblem<T>& p;
  const Conv2dGeometry& g;
  const ForwardPatch& t;
  unsigned char* shared_;
  const int first_col_;
  int windows_[kGroups];  // where this thread's pixels read their windows, in bytes of shared memory
  float sums_[kRowFragments][kColFragments][4];
};

// Blocks are numbered by columns, then by the range of tiles that they take every `ranges`-th of.
template <class T, bool kPixelRows, int kCols>
__global__ void __launch_bounds__(kBlockThreads, resident_blocks(kCols))
    forward_patch(ForwardProblem<T> problem, int col_tiles, int ranges) {
  PatchForward<T, kPixelRows, kCols> forward(problem, static_cast<int>(blockIdx.x) % col_tiles * kCols);
  forward.run(static_cast<int>(blockIdx.x) / col_tiles, ranges);
}

int shared_bytes(const Conv2dShape& s) {
  const Conv2dGeometry g(s);
  return ForwardPatch(g, PatchTiles(g), s.dtype, cols_of(s)).shared_bytes;
}

bool accepts(const Conv2dShape& s) {
  return suits_patch(s) && (s.dilation_w == 1 || s.kernel_w == 1) && shared_bytes(s) <= kMostSharedBytes;
}

Plan plan(const Conv2dShape& s) {
  const int cols = cols_of(s);
  const int64_t tiles = s.batch * PatchTiles(Conv2dGeometry(s)).of_image;
  const int64_t most = ceil_div<int64_t>(kMultiprocessors * resident_blocks(cols), col_tiles_of(s));
  return {cols, kTilePixels, col_tiles_of(s) * (tiles < most ? tiles : most), 0};
}

template <class T, bool kPixelRows, int kCols>
void launch_forward(const Conv2dShape& s, const Conv2dBuffers& b, bool relu, cudaStream_t stream) {
  const ForwardProblem<T> problem(s, b, kCols, relu);
  const int64_t blocks = plan(s).blocks, col_tiles = col_tiles_of(s);
  launch(forward_patch<T, kPixelRows, kCols>, Grid(blocks, kBlockThreads, problem.patch.shared_bytes), stream, problem,
         static_cast<int>(col_tiles), static_cast<int>(blocks / col_tiles));
}

template <class T, bool kPixelRows>
void launch_layout(const Conv2dShape& s, const Conv2dBuffers& b, bool relu, cudaStream_t stream) {
  (cols_of(s) == 32 ? launch_forward<T, kPixelRows, 32> : launch_forward<T, kPixelRows, 64>)(s, b, relu, stream);
}

void launch_typed(const Conv2dShape& s, const Conv2dBuffers& b, bool relu, cudaStream_t stream) {
  with_single_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    (s.layout == Layout::nhwc ? launch_layout<T, true> : launch_layout<T, false>)(s, b, relu, stream);
  });
}

void run(const Conv2dShape& s, const Conv2dBuffers& b, void*, cudaStream_t stream) { launch_typed(s, b, false, stream); }

bool accepts_relu(const Conv2dReluPoolShape& s) { return !has_pooling(s) && accepts(s.conv); }

Plan plan_relu(const Conv2dReluPoolShape& s) { return plan(s.conv); }

void run_relu(const Conv2dReluPoolShape& s, const Conv2dReluPoolBuffers& b, void*, cudaStream_t stream) {
  launch_typed(s.conv, unpooled_buffers(b), true, stream);
}

}  // namespace

extern const Conv2dKernel conv2d_forward_patch_mma_sm80 = {
    "conv2d_forward_patch_mma_sm80", 80, Conv2dDirection::forward, accepts, plan, run, /*needs_proof=*/true};
extern const Conv2dReluPoolKernel conv2d_relu_max_pool2d_forward_patch_mma_sm80 = {
    "conv2d_relu_max_pool2d_forward_patch_mma_sm80", 80, Conv2dDirection::forward, accepts_relu, plan_relu, run_relu, /*needs_proof=*/true};

}  // namespace cnn_ext::cuda
