// grad_weight[k, c, r, s] of few input channels (fewer than 16, one group) on tensor cores, in TF32 (where the policy allows it), float16
// and bfloat16.
//
// The idea: rows of the product are output channels, columns the terms (c, r, s) of a filter, depth the pixels of the output. A block
// stages a patch of the input, with its halo, in shared memory (patch.cuh), by planes of a channel and in them by columns of one phase of
// the stride: there the elements that neighbouring outputs multiply for one term are neighbours, and a register of a fragment is a word of
// the patch. grad_output is read from memory straight into fragments: a thread takes 8 bytes of neighbouring pixels of a channel in nchw,
// up to 32 bytes of neighbouring channels of a pixel in nhwc, and pixels and channels are numbered so that this is what it needs.
//
// The tile: 256 pixels, by 32 or 64 output channels, by all terms. The 8 warps share the terms, at most 32 (72 of 32 channels) each, and
// what warps are left over share the pixels: their sums are added up as a tree at the end. A block takes every so many-th tile and leaves
// partial sums, which a second launch adds up (pixel_reduction.cuh).
//
// Bound by reading grad_output; with many terms by the tensor cores and the partial sums.
//
// Padding never multiplies: it is staged as zeros. A partial sum that is NaN is added up again, without the padding.
//
// Not handled: groups, float64, strict float32, and patches or filters too large for shared memory and registers.
#include "cuda/limits.h"
#include "cuda/mma_gemm.cuh"
#include "cuda/patch.cuh"
#include "cuda/pixel_reduction.cuh"

namespace cnn_ext::cuda {
namespace {

constexpr int kWarps = kBlockThreads / 32;
constexpr int kMostSums = 72;                                      // of a thread
constexpr int term_tiles(int cols) { return cols == 64 ? 4 : 9; }  // of 8 terms, of a warp

// The output channels of a block. Where there are many terms, warps that share them read the same gradients: fewer share fewer channels.
int weight_cols_of(const Conv2dShape& s) { return s.in_channels * s.kernel_h * s.kernel_w <= term_tiles(64) * 8 ? cols_of(s) : 32; }

int64_t weight_col_tiles_of(const Conv2dShape& s) { return ceil_div<int64_t>(s.out_channels, weight_cols_of(s)); }

// The patch, and how the warps share the work.
struct WeightPatch {
  WeightPatch(const Conv2dGeometry& g, const PatchTiles& tiles, DType dtype, int cols)
      : terms(g.group_in * g.kernel_h * g.kernel_w),
        all_tiles(ceil_div(terms, 8)),
        term_groups(1),
        patch_h((tiles.height - 1) * g.stride_h + (g.kernel_h - 1) * g.dilation_h + 1),
        patch_w((tiles.width - 1) * g.stride_w + (g.kernel_w - 1) * g.dilation_w + 1),
        phase_pitch(ceil_div(ceil_div(patch_w, g.stride_w), 2) * 2),
        pitch(phase_pitch * g.stride_w),
        plane(pitch * patch_h),
        patch_bytes(ceil_div(plane * g.group_in * bytes_of(dtype), kChunkBytes) * kChunkBytes),
        copy_bytes(bytes_of(dtype) == 2 ? patch_bytes : 0),
        shared_bytes(larger(patch_bytes + copy_bytes, kBlockThreads / 2 * kMostSums * static_cast<int>(sizeof(float)))) {
    while (term_groups < kWarps && all_tiles > term_groups * term_tiles(cols)) term_groups *= 2;
    warp_tiles = ceil_div(all_tiles, term_groups);
  }

  int terms, all_tiles;           // tiles: of 8 terms
  int term_groups, warp_tiles;    // of them, of a group
  int patch_h, patch_w;           // in pixels
  int phase_pitch, pitch, plane;  // of the patch, in elements
  int patch_bytes, copy_bytes, shared_bytes;
};

template <class T>
struct WeightProblem {
  WeightProblem(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, int cols)
      : g(s),
        tiles(g),
        patch(g, tiles, s.dtype, cols),
        lines(g, patch.patch_h, patch.patch_w),
        input(static_cast<const T*>(b.input)),
        grad_output(static_cast<const T*>(b.grad_output)),
        partials(static_cast<float*>(workspace)),
        pixel(lines.pixel),
        phase(g.stride_w),
        decoder(g.group_in, g.kernel_h, g.kernel_w),
        has_vectors(is_aligned(b.grad_output) && (g.layout == Layout::nhwc ? g.group_out % 8 == 0 : g.out_w % 4 == 0)) {}

  Conv2dGeometry g;
  PatchTiles tiles;
  WeightPatch patch;
  PatchLines lines;
  const T* input;
  const T* grad_output;
  float* partials;  // [ranges][the weights in memory order]
  FastDivisor pixel, phase;
  TapDecoder<Layout::nchw> decoder;
  bool has_vectors;  // whether grad_output may be read by words
};

template <class T, bool kNhwc, int kCols>
class PatchBackwardWeight {
 public:
  __device__ PatchBackwardWeight(const WeightProblem<T>& problem, int first_col)
      : p(problem),
        g(problem.g),
        t(problem.patch),
        shared_(dynamic_shared<unsigned char>()),
        first_col_(first_col),
        first_tile_(warp() % t.term_groups * t.warp_tiles) {
    // Through shared memory: in registers alone they would be computed again for each product.
    int* places = dynamic_shared<int>();
    for (int term = threadIdx.x; term < t.all_tiles * 8; term += kBlockThreads) places[term] = place_of(term < t.terms ? term : 0);
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kTermTiles; ++j) terms_[j] = places[smaller(first_tile_ + j, t.all_tiles - 1) * 8 + group()];
  }

  __device__ void run(int range, const TileDistance& distance) {
    const int pixel_group = warp() / t.term_groups, pixel_groups = kWarps / t.term_groups;
    for (TileCursor tile(p.tiles, range, distance); tile.is_in(g.batch); tile.advance()) {
      const PlaneIndex at = tile.at();
      int step = next_step(at, pixel_group, pixel_groups);
      if (step < kSteps) fetch(at, step);
      __syncthreads();
      stage(at);
      __syncthreads();
#pragma unroll 1
      while (step < kSteps) {
        uint32_t a[kRowTiles][4];
        take(a);
        const int now = step;
        step = next_step(at, step + pixel_groups, pixel_groups);
        if (step < kSteps) fetch(at, step);
        multiply(now, a);
      }
    }
    add_up_warps(pixel_group, pixel_groups);
    const bool meets_nan = pixel_group == 0 && store(range);
    if (__syncthreads_or(meets_nan)) add_up_again(range, distance);
  }

 private:
  static constexpr int kRowTiles = kCols / 16, kTermTiles = term_tiles(kCols);
  static constexpr int kOwnPixels = 2 * kPerWord<T>, kStepPixels = 4 * kOwnPixels;  // of a thread, of an instruction
  static constexpr int kSteps = kTilePixels / kStepPixels;
  static constexpr int kLoads = kNhwc ? 4 : sizeof(T) == 4 ? 3 : 2;      // of the patch, on their way together: what registers are left
  static constexpr int kOwnCols = kCols / 8;                             // of a thread in nhwc
  static constexpr int kReadWords = kNhwc ? kOwnCols / kPerWord<T> : 2;  // side by side

  __device__ static int warp() { return threadIdx.x / 32; }
  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static int group() { return lane() / 4; }
  __device__ static int pair() { return lane() % 4; }
  // The output channel of a row of the product: of row `group`, or group + 8, of a fragment.
  __device__ int channel_of(int fragment, int half) const {
    return first_col_ + (kNhwc ? group() * kOwnCols + 2 * fragment + half : fragment * 16 + half * 8 + group());
  }

  __device__ void stage(const PlaneIndex& at) const {
    stage_patch<kLoads, kNhwc>(
        g, p.lines, p.input, at, shared_, t.copy_bytes, [this](int row, int line) { return line * t.plane + row * t.pitch; },
        [this](int x) {
          const int column = kNhwc ? p.pixel.quotient(x) : x, c = kNhwc ? x - column * p.lines.pixel : 0;
          const int moved = p.phase.quotient(column);
          return c * t.plane + (column - moved * g.stride_w) * t.phase_pitch + moved;
        });
  }

  // Where the elements that a term multiplies begin in the patch, in bytes.
  __device__ int place_of(int term) const {
    const Tap tap = p.decoder.at(term);
    const int w = tap.s * g.dilation_w, moved = p.phase.quotient(w);
    const int element = tap.channel * t.plane + tap.r * g.dilation_h * t.pitch + (w - moved * g.stride_w) * t.phase_pitch + moved;
    return word_place<T>(t.copy_bytes, element);
  }

  // The first step from `step` on, at this distance, that has pixels.
  __device__ int next_step(const PlaneIndex& at, int step, int distance) const {
    for (; step < kSteps; step += distance) {
      const int first = step * kStepPixels;
      if (at.h + p.tiles.row_of(first) < g.out_h && at.w + p.tiles.col_of(first) < g.out_w) break;
    }
    return step;
  }

  // Adds the products of the pixels of a step.
  __device__ void multiply(int step, const uint32_t (&a)[kRowTiles][4]) {
    const int first = step * kStepPixels + pair() * kOwnPixels, row = p.tiles.row_of(first), col = p.tiles.col_of(first);
    const unsigned char* pixels = shared_ + (row * g.stride_h * t.pitch + col) * static_cast<int>(sizeof(T));
#pragma unroll
    for (int j = 0; j < kTermTiles; ++j) {
      if (j >= t.warp_tiles) break;
      const uint32_t* words = reinterpret_cast<const uint32_t*>(pixels + terms_[j]);
      const uint32_t b[2] = {words[0], words[1]};
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) mma(sums_[i][j], a[i], b, T{});
    }
  }

  // Reads grad_output of this thread's pixels of a step, which lie in a row: of each pixel kOwnCols channels in nhwc, or else a channel of
  // each half of a fragment.
  __device__ void fetch(const PlaneIndex& at, int step) { p.has_vectors ? fetch_words<true>(at, step) : fetch_words<false>(at, step); }

  template <bool kVector>
  __device__ void fetch_words(const PlaneIndex& at, int step) {
    const int first = step * kStepPixels + pair() * kOwnPixels, h = at.h + p.tiles.row_of(first), w = at.w + p.tiles.col_of(first);
    const T* source = p.grad_output + at.outer * g.out.n + h * g.out.h + w * g.out.w + channel_of(0, 0) * g.out.c;
    constexpr int kReads = kNhwc ? kOwnPixels : 2 * kRowTiles;
    exists_ = 0;
#pragma unroll
    for (int i = 0; i < kReads; ++i, source += kNhwc ? g.out.w : 8 * g.out.c) {
      const bool is_in = h < g.out_h && (kNhwc ? w + i < g.out_w : channel_of(i / 2, i % 2) < g.group_out);
      const int count = !is_in ? 0 : kNhwc ? g.group_out - channel_of(0, 0) : g.out_w - w;
      if constexpr (kVector) {
        constexpr int kAtOnce = smaller(kReadWords, 4);
#pragma unroll
        for (int v = 0; v < kReadWords; v += kAtOnce)
          load_words<kAtOnce>((count > 0 ? source : p.grad_output) + v * kPerWord<T>, fetched_[i] + v);
      } else {
        read_words<false>(source, count, p.grad_output, fetched_[i]);
      }
      exists_ |= (count > 0 ? 1u : 0u) << i;
    }
  }

  // What was fetched, as fragments.
  __device__ void take(uint32_t (&a)[kRowTiles][4]) const {
    const auto word = [&](int i, int v) {
      const uint32_t bits = sizeof(T) == 4 ? to_tf32(__uint_as_float(fetched_[i][v])) : fetched_[i][v];
      return exists_ >> i & 1 ? bits : 0;
    };
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      if constexpr (!kNhwc) {
        a[i][0] = word(2 * i, 0), a[i][1] = word(2 * i + 1, 0), a[i][2] = word(2 * i, 1), a[i][3] = word(2 * i + 1, 1);
      } else if constexpr (sizeof(T) == 4) {
        a[i][0] = word(0, 2 * i), a[i][1] = word(0, 2 * i + 1), a[i][2] = word(1, 2 * i), a[i][3] = word(1, 2 * i + 1);
      } else {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t x = word(2 * half, i), y = word(2 * half + 1, i);
          a[i][2 * half] = (x & 0xFFFF) | y << 16;
          a[i][2 * half + 1] = x >> 16 | (y & 0xFFFF0000);
        }
      }
    }
  }

  // Adds the sums of all pixel groups to those of the first.
  __device__ void add_up_warps(int pixel_group, int pixel_groups) {
    const int term_group = warp() % t.term_groups;
    for (int half = pixel_groups / 2; half > 0; half /= 2) {
      float* slot = reinterpret_cast<float*>(shared_) + (pixel_group % half * t.term_groups + term_group) * 32 * kMostSums + lane();
      __syncthreads();
      if (pixel_group >= half && pixel_group < 2 * half) each_sum([&](int index, float& sum) { slot[index * 32] = sum; });
      __syncthreads();
      if (pixel_group < half) each_sum([&](int index, float& sum) { sum += slot[index * 32]; });
    }
  }

  template <class Function>
  __device__ void each_sum(const Function& function) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kTermTiles; ++j) {
#pragma unroll
        for (int v = 0; v < 4; ++v) function((i * kTermTiles + j) * 4 + v, sums_[i][j][v]);
      }
    }
  }

  __device__ float* partial(int range, int k, int term) const {
    const Tap tap = p.decoder.at(term);
    return p.partials + (static_cast<int64_t>(range) * g.group_out + k) * g.filter.n + tap.channel * g.filter.c + tap.r * g.filter.h +
           tap.s * g.filter.w;
  }

  // Whether there is a NaN among this thread's sums.
  __device__ bool store(int range) const {
    bool meets_nan = false;
#pragma unroll
    for (int j = 0; j < kTermTiles; ++j) {
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        const int term = (first_tile_ + j) * 8 + pair() * 2 + v;
        if (j >= t.warp_tiles || term >= t.terms) continue;
        float* target = partial(range, 0, term);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int k = channel_of(i, half);
            const float sum = sums_[i][j][half * 2 + v];
            if (k >= g.group_out) continue;
            target[k * g.filter.n] = sum;
            meets_nan = meets_nan || isnan(sum);
          }
        }
      }
    }
    return meets_nan;
  }

  // Replaces every partial sum that is NaN.
  __device__ void add_up_again(int range, const TileDistance& distance) const {
    const int cols = smaller(kCols, g.group_out - first_col_);
#pragma unroll 1
    for (int index = threadIdx.x; index < cols * t.terms; index += kBlockThreads) {
      const int k = first_col_ + index / t.terms, term = index % t.terms;
      float* sum = partial(range, k, term);
      if (isnan(*sum)) *sum = exact_sum(range, distance, k, term);
    }
  }

  // The sum of the products that exist.
  __device__ float exact_sum(int range, const TileDistance& distance, int k, int term) const {
    const Tap tap = p.decoder.at(term);
    float sum = 0;
#pragma unroll 1
    for (TileCursor tile(p.tiles, range, distance); tile.is_in(g.batch); tile.advance()) {
      const PlaneIndex at = tile.at();
      const T* input = p.input + at.outer * g.in.n + tap.channel * g.in.c;
      const T* grad_output = p.grad_output + at.outer * g.out.n + k * g.out.c;
#pragma unroll 1
      for (int pixel = 0; pixel < kTilePixels; ++pixel) {
        const int oh = at.h + p.tiles.row_of(pixel), ow = at.w + p.tiles.col_of(pixel);
        const int h = oh * g.stride_h - g.pad_top + tap.r * g.dilation_h, w = ow * g.stride_w - g.pad_left + tap.s * g.dilation_w;
        if (oh >= g.out_h || ow >= g.out_w || h < 0 || h >= g.in_h || w < 0 || w >= g.in_w) continue;
        sum = fmaf(widen(grad_output[oh * g.out.h + ow * g.out.w]), widen(input[h * g.in.h + w * g.in.w]), sum);
      }
    }
    return sum;
  }

  const WeightProblem<T>& p;
  const Conv2dGeometry& g;
  const WeightPatch& t;
  unsigned char* shared_;
  const int first_col_, first_tile_;
  int terms_[kTermTiles];  // where this thread's terms are in the patch, in bytes
  unsigned exists_ = 0;    // a bit for each row of words fetched
  uint32_t fetched_[kNhwc ? kOwnPixels : 2 * kRowTiles][kReadWords];
  float sums_[kRowTiles][kTermTiles][4] = {};
};

// Blocks are numbered by columns, then by the first of the tiles that they take.
template <class T, bool kNhwc, int kCols>
__global__ void __launch_bounds__(kBlockThreads, 2) backward_weight_patch(WeightProblem<T> problem, int col_tiles, TileDistance distance) {
  PatchBackwardWeight<T, kNhwc, kCols> backward(problem, static_cast<int>(blockIdx.x) % col_tiles * kCols);
  backward.run(static_cast<int>(blockIdx.x) / col_tiles, distance);
}

bool accepts(const Conv2dShape& s) {
  if (!suits_patch(s)) return false;
  const Conv2dGeometry g(s);
  const WeightPatch patch(g, PatchTiles(g), s.dtype, weight_cols_of(s));
  return patch.shared_bytes <= kMostSharedBytes && patch.warp_tiles <= term_tiles(weight_cols_of(s));
}

int64_t weight_elements(const Conv2dShape& s) { return s.out_channels * s.in_channels * s.kernel_h * s.kernel_w; }

// How the tiles are divided: two blocks for each multiprocessor.
Splits splits_of(const Conv2dShape& s) {
  const int64_t tiles = s.batch * PatchTiles(Conv2dGeometry(s)).of_image, targets = weight_elements(s);
  const int64_t by_blocks = ceil_div<int64_t>(2 * kMultiprocessors, weight_col_tiles_of(s));
  const int64_t by_memory = targets == 0 ? 1 : kMostPartials / targets;
  int64_t count = tiles < by_blocks ? tiles : by_blocks;
  count = count < by_memory ? count : by_memory;
  return {count > 0 ? count : 1, 0};
}

Plan plan(const Conv2dShape& s) {
  const Splits splits = splits_of(s);
  return {weight_cols_of(s), kTilePixels, weight_col_tiles_of(s) * splits.count, partials_bytes(s.dtype, splits, weight_elements(s))};
}

template <class T, bool kNhwc, int kCols>
void launch_backward(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, cudaStream_t stream) {
  const WeightProblem<T> problem(s, b, workspace, kCols);
  launch(backward_weight_patch<T, kNhwc, kCols>, Grid(plan(s).blocks, kBlockThreads, problem.patch.shared_bytes), stream, problem,
         static_cast<int>(weight_col_tiles_of(s)), TileDistance(problem.tiles, static_cast<int>(splits_of(s).count)));
}

template <class T, bool kNhwc>
void launch_layout(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, cudaStream_t stream) {
  (weight_cols_of(s) == 32 ? launch_backward<T, kNhwc, 32> : launch_backward<T, kNhwc, 64>)(s, b, workspace, stream);
}

void run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, cudaStream_t stream) {
  with_single_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    (s.layout == Layout::nhwc ? launch_layout<T, true> : launch_layout<T, false>)(s, b, workspace, stream);
    launch_sum_partials<T>(workspace, splits_of(s), weight_elements(s), b.grad_weight, stream);
  });
}

}  // namespace

extern const Conv2dKernel conv2d_backward_weight_patch_mma_sm80 = {
    "conv2d_backward_weight_patch_mma_sm80", 80, Conv2dDirection::backward_weight, accepts, plan, run, /*needs_proof=*/true};

}  // namespace cnn_ext::cuda
