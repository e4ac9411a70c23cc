// backward_weight of narrow groups (slab.cuh) on tensor cores, in TF32, float16 and bfloat16, in both layouts: rows of the product are 16
// output channels, columns 16 input channels, depth the pixels of the output.
//
// A block goes over tiles of up to 256 pixels, or of 128 where more do not fit shared memory: it stages their gradient and what their
// windows read of the input, and takes from there for 16 pixels at a time one fragment of the gradient and for each of up to 9 taps one of
// the input, at a fixed distance. So memory is read once, whatever the kernel is; the sums of 9 taps are 72 registers. More taps take more
// blocks. Warps share the channels of the slab, then the pixels of the tile; their sums are added up in order. A second launch adds up the
// partial sums of the blocks.
//
// Order of additions: every `ranges`-th tile, step by step; how many ranges there are follows from the shape alone.
//
// Padding never multiplies: a sum that is NaN is added up again from the products that exist, alone.
//
// Not handled: tiles that do not fit shared memory. Bound by waiting for memory: on an H100 ResNeXt's layers of 56 x 56 take 14 to 16 us in
// 16 bits and 22 to 24 us in TF32 in nhwc, where moving their bytes would take 3 to 6.
#include <optional>

#include "cuda/mma_fragments.cuh"
#include "cuda/pixel_reduction.cuh"
#include "cuda/slab.cuh"

namespace cnn_ext::cuda {
namespace {

constexpr int kTaps = 9;  // of a block

// What the host works out of a shape: how the tensors lie in shared memory, and who computes what.
struct WeightSlabs {
  WeightSlabs(const Conv2dShape& s, int slab_, int tile_pixels)
      : slab(slab_),
        pitch(slab * bytes_of(s.dtype) + (bytes_of(s.dtype) == 2 ? 1 : 2) * kChunkBytes),
        chunk_bits(__builtin_ctz(static_cast<unsigned>(slab * bytes_of(s.dtype) / kChunkBytes))),
        group_bits(__builtin_ctz(static_cast<unsigned>(s.in_channels / s.groups))),
        taps(static_cast<int>(s.kernel_h * s.kernel_w)),
        tap_ranges(ceil_div(taps, kTaps)),
        slabs(static_cast<int>(ceil_div<int64_t>(s.in_channels, slab))),
        tiles(slab_tiles(s.out_h, s.out_w, tile_pixels)),
        input(staged_source(tiles, static_cast<int>(s.stride_h), static_cast<int>(s.stride_w),
                            static_cast<int>((s.kernel_h - 1) * s.dilation_h), static_cast<int>((s.kernel_w - 1) * s.dilation_w), pitch)),
        gradient(tiles.height, tiles.width, pitch) {}

  CNN_EXT_HOST_DEVICE int units() const { return slab / kUnit; }
  int shared_bytes() const {
    const int sums = (kWarps - units()) * kTaps * kUnit * kUnit * static_cast<int>(sizeof(float));
    return larger(input.bytes() + gradient.bytes(), sums);
  }

  int slab, pitch, chunk_bits, group_bits, taps, tap_ranges, slabs;
  PatchTiles tiles;
  StagedPixels input, gradient;
};

// The largest tiles that fit, none where half of one does not.
std::optional<WeightSlabs> slabs_of(const Conv2dShape& s) {
  for (const int pixels : {kTilePixels, kTilePixels / 2}) {
    const int slab = slab_width(s.in_channels, [&](int width) { return WeightSlabs(s, width, pixels).shared_bytes(); });
    if (slab > 0) return WeightSlabs(s, slab, pixels);
  }
  return std::nullopt;
}

template <class T>
struct WeightProblem {
  Conv2dGeometry g;
  WeightSlabs slabs;
  const T* input;
  const T* grad_output;
  float* partials;  // [range][k][tap][c]
  int channels, ranges;
};

// A block's part: channels, taps and tiles.
struct Share {
  int first_channel, first_tap, range;
};

template <class T>
__device__ float* partial_of(const WeightProblem<T>& p, int range, int k, int tap, int c) {
  const int64_t row = (static_cast<int64_t>(range) * p.channels + k) * p.slabs.taps + tap;
  return p.partials + ((row << p.slabs.group_bits) + c);
}

// The products of a range of tiles that exist.
template <class T>
__device__ float exact_sum(const WeightProblem<T>& p, int range, int k, int tap, int channel) {
  const Conv2dGeometry& g = p.g;
  const int r = tap / g.kernel_w, s = tap - r * g.kernel_w;
  float sum = 0;
  for (TileCursor cursor(p.slabs.tiles, range, p.ranges); cursor.is_in(g.batch); cursor.advance()) {
    const PlaneIndex at = cursor.at();
    for (int pixel = 0; pixel < p.slabs.gradient.count.divisor(); ++pixel) {
      const int oh = at.h + p.slabs.tiles.row_of(pixel), ow = at.w + p.slabs.tiles.col_of(pixel);
      const int h = oh * g.stride_h - g.pad_top + r * g.dilation_h, w = ow * g.stride_w - g.pad_left + s * g.dilation_w;
      if (oh >= g.out_h || ow >= g.out_w || h < 0 || h >= g.in_h || w < 0 || w >= g.in_w) continue;
      const T gradient = p.grad_output[at.outer * g.out.n + k * g.out.c + oh * g.out.h + ow * g.out.w];
      sum = fmaf(widen(gradient), widen(p.input[at.outer * g.in.n + channel * g.in.c + h * g.in.h + w * g.in.w]), sum);
    }
  }
  return sum;
}

// Replaces every sum of the block's that is NaN. Not a part of the class: its registers must not go to memory for a call.
template <class T>
__device__ __attribute__((noinline)) void add_up_again(const WeightProblem<T>& p, Share share) {
  const int group = 1 << p.slabs.group_bits, taps = smaller(kTaps, p.slabs.taps - share.first_tap);
  for (int index = threadIdx.x; index < p.slabs.slab * taps * group; index += kBlockThreads) {
    const int row = index / group, c = index % group, k = share.first_channel + row / taps, tap = share.first_tap + row % taps;
    if (k >= p.channels) continue;
    float* sum = partial_of(p, share.range, k, tap, c);
    if (isnan(*sum)) *sum = exact_sum(p, share.range, k, tap, k - k % group + c);
  }
}

template <class T, bool kVector>
class SlabWeights {
 public:
  __device__ SlabWeights(const WeightProblem<T>& problem, Share share)
      : p_(problem), t_(problem.slabs), g_(problem.g), share_(share), shared_(dynamic_shared<unsigned char>()) {
#pragma unroll
    for (int t = 0; t < kTaps; ++t) {
      const int tap = smaller(share.first_tap + t, t_.taps - 1), r = tap / g_.kernel_w, s = tap - r * g_.kernel_w;
      distances_[t] = r * g_.dilation_h * t_.input.of_row() + s * g_.dilation_w * t_.pitch;
    }
  }

  __device__ void run() {
    for (TileCursor cursor(t_.tiles, share_.range, p_.ranges); cursor.is_in(g_.batch); cursor.advance()) {
      stage(cursor.at());
      __syncthreads();
#pragma unroll 1
      for (int step = part(); step < t_.gradient.count.divisor() / kUnit; step += kWarps / t_.units()) multiply(step * kUnit, T{});
      __syncthreads();
    }
    add_up_parts();
    const bool meets_nan = part() == 0 && store();
    if (__syncthreads_or(meets_nan)) add_up_again(p_, share_);
  }

 private:
  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static int group() { return lane() / 4; }
  __device__ static int pair() { return lane() % 4; }
  __device__ int unit() const { return static_cast<int>(threadIdx.x) / 32 % t_.units(); }
  __device__ int part() const { return static_cast<int>(threadIdx.x) / 32 / t_.units(); }

  __device__ unsigned char* input() const { return shared_; }
  __device__ unsigned char* gradient() const { return shared_ + t_.input.bytes(); }
  // Where a pixel's window begins.
  __device__ int window(int pixel) const {
    return t_.tiles.row_of(pixel) * g_.stride_h * t_.input.of_row() + t_.tiles.col_of(pixel) * g_.stride_w * t_.pitch;
  }

  __device__ void stage(const PlaneIndex& at) {
    begin_pixels<T, kVector, 16>(slab_image(p_.input, g_.in, at.outer, g_.in_h, g_.in_w, share_.first_channel, p_.channels), t_.input,
                                 t_.chunk_bits, at.h * g_.stride_h - g_.pad_top, at.w * g_.stride_w - g_.pad_left, input());
    begin_pixels<T, kVector, 16>(slab_image(p_.grad_output, g_.out, at.outer, g_.out_h, g_.out_w, share_.first_channel, p_.channels),
                                 t_.gradient, t_.chunk_bits, at.h, at.w, gradient());
    finish_pixels<T, kVector>(t_.input, t_.chunk_bits, input());
    finish_pixels<T, kVector>(t_.gradient, t_.chunk_bits, gradient());
  }

  template <class Half>
  __device__ void multiply(int pixel, Half) {
    const int of_unit = unit() * kUnit * static_cast<int>(sizeof(T));
    uint32_t a[4];
    ldmatrix_x4_trans(a, gradient() + (pixel + lane() / 16 * 8 + lane() % 8) * t_.pitch + of_unit + lane() / 8 % 2 * kChunkBytes);
    const unsigned char* windows = input() + window(pixel + lane() % 16) + of_unit + lane() / 16 * kChunkBytes;
#pragma unroll
    for (int t = 0; t < kTaps; ++t) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, windows + distances_[t]);
      mma(sums_[t][0], a, {b[0], b[1]}, T{});
      mma(sums_[t][1], a, {b[2], b[3]}, T{});
    }
  }

  // In TF32 a fragment is 8 pixels deep.
  __device__ void multiply(int first, float) {
    const int of_channel = (unit() * kUnit + group()) * static_cast<int>(sizeof(float)), next = 8 * static_cast<int>(sizeof(float));
    const int far_pixel = 4 * t_.pitch, far_window = 4 * g_.stride_w * t_.pitch;
#pragma unroll
    for (int pixel = first; pixel < first + kUnit; pixel += 8) {
      const unsigned char* column = gradient() + (pixel + pair()) * t_.pitch + of_channel;
      const uint32_t a[4] = {word(column), word(column + next), word(column + far_pixel), word(column + far_pixel + next)};
      const unsigned char* windows = input() + window(pixel + pair()) + of_channel;
#pragma unroll
      for (int t = 0; t < kTaps; ++t) {
        const unsigned char* x = windows + distances_[t];
        mma(sums_[t][0], a, {word(x), word(x + far_window)}, T{});
        mma(sums_[t][1], a, {word(x + next), word(x + far_window + next)}, T{});
      }
    }
  }
  __device__ static uint32_t word(const unsigned char* shared) { return *reinterpret_cast<const uint32_t*>(shared); }

  // The sums of the warps that share a unit go to the first of them.
  __device__ void add_up_parts() {
    constexpr int kSums = kTaps * 8 * 32;  // of a warp
    float* sums = reinterpret_cast<float*>(shared_) + unit() * kSums + lane();
    const int of_part = t_.units() * kSums;
    if (part() > 0) {
#pragma unroll
      for (int i = 0; i < kTaps * 8; ++i) sums[(part() - 1) * of_part + i * 32] = sums_[i / 8][i / 4 % 2][i % 4];
    }
    __syncthreads();
    if (part() > 0) return;
#pragma unroll 1
    for (int other = 1; other < kWarps / t_.units(); ++other, sums += of_part) {
#pragma unroll
      for (int i = 0; i < kTaps * 8; ++i) sums_[i / 8][i / 4 % 2][i % 4] += sums[i * 32];
    }
  }

  // Registers -> global memory, those that belong to a group. Whether there is a NaN among them.
  __device__ bool store() const {
    bool meets_nan = false;
#pragma unroll
    for (int v = 0; v < 4; v += 2) {
      const int row = group() + v * 4, k = share_.first_channel + unit() * kUnit + row;
      float* of_row = partial_of(p_, share_.range, k, share_.first_tap, 0);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int col = j * 8 + pair() * 2;
        if (k >= p_.channels || row >> t_.group_bits != col >> t_.group_bits) continue;
        float* target = of_row + (col & ((1 << t_.group_bits) - 1));
#pragma unroll
        for (int t = 0; t < kTaps; ++t) {
          if (share_.first_tap + t >= t_.taps) continue;
          const float values[2] = {sums_[t][j][v], sums_[t][j][v + 1]};
          store_words(target + (t << t_.group_bits), {__float_as_uint(values[0]), __float_as_uint(values[1])});
          meets_nan = meets_nan || isnan(values[0]) || isnan(values[1]);
        }
      }
    }
    return meets_nan;
  }

  const WeightProblem<T>& p_;
  const WeightSlabs& t_;
  const Conv2dGeometry& g_;
  const Share share_;
  unsigned char* shared_;
  int distances_[kTaps];  // from a window's first tap, bytes of shared memory
  float sums_[kTaps][2][4] = {};
};

// Blocks are numbered by slab, range of taps, range of tiles: those that read the same pixels run together.
template <class T, bool kVector>
__global__ void __launch_bounds__(kBlockThreads, 2) backward_weight_slabs(const __grid_constant__ WeightProblem<T> p) {
  const int block = static_cast<int>(blockIdx.x), slab = block % p.slabs.slabs, rest = block / p.slabs.slabs;
  SlabWeights<T, kVector> weights(p, {slab * p.slabs.slab, rest % p.slabs.tap_ranges * kTaps, rest / p.slabs.tap_ranges});
  weights.run();
}

// From the order of the partial sums, (k, tap, c), to that of memory.
struct WeightOrder {
  __device__ int64_t operator()(int64_t index) const {
    const int place = static_cast<int>(index), row = place >> group_bits, k = taps.quotient(row), tap = row - k * taps.divisor();
    const int r = width.quotient(tap);
    return k * filter.n + (place - (row << group_bits)) * filter.c + r * filter.h + (tap - r * width.divisor()) * filter.w;
  }
  int group_bits;
  FastDivisor taps, width;
  Strides filter;
};

int64_t weights_of(const Conv2dShape& s) { return s.out_channels * (s.in_channels / s.groups) * s.kernel_h * s.kernel_w; }

// How the tiles are divided: up to two blocks for each of 132 multiprocessors, as far as there are tiles and memory.
Splits splits_of(const Conv2dShape& s, const WeightSlabs& slabs) {
  const int64_t tiles = s.batch * slabs.tiles.of_image, shares = slabs.slabs * slabs.tap_ranges;
  const int64_t most = smaller(2 * kMultiprocessors / shares, kMostPartials / weights_of(s));
  const int64_t count = larger<int64_t>(1, smaller(tiles, most));
  return {count, ceil_div(tiles, count)};
}

bool accepts(const Conv2dShape& s) { return suits_slabs(s) && slabs_of(s); }

Plan plan(const Conv2dShape& s) {
  const WeightSlabs slabs = *slabs_of(s);
  const Splits splits = splits_of(s, slabs);
  return {slabs.slab, slabs.gradient.count.divisor(), slabs.slabs * slabs.tap_ranges * splits.count,
          partials_bytes(s.dtype, splits, weights_of(s))};
}

void run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, cudaStream_t stream) {
  with_single_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    const WeightSlabs slabs = *slabs_of(s);
    const Splits splits = splits_of(s, slabs);
    const WeightProblem<T> problem{Conv2dGeometry(s),
                                   slabs,
                                   static_cast<const T*>(b.input),
                                   static_cast<const T*>(b.grad_output),
                                   static_cast<float*>(workspace),
                                   static_cast<int>(s.in_channels),
                                   static_cast<int>(splits.count)};
    const bool has_vectors = s.layout == Layout::nhwc && s.in_channels % kChunk<T> == 0 && is_aligned(b.input) && is_aligned(b.grad_output);
    launch(has_vectors ? backward_weight_slabs<T, true> : backward_weight_slabs<T, false>,
           Grid(plan(s).blocks, kBlockThreads, slabs.shared_bytes()), stream, problem);
    const Strides filter = problem.g.filter;
    launch_sum_partials<T>(workspace, splits, weights_of(s), b.grad_weight, stream,
                           WeightOrder{slabs.group_bits, FastDivisor(slabs.taps), FastDivisor(problem.g.kernel_w), filter});
  });
}

}  // namespace

extern const Conv2dKernel conv2d_backward_weight_slab_mma_sm80 = {
    "conv2d_backward_weight_slab_mma_sm80", 80, Conv2dDirection::backward_weight, accepts, plan, run, /*needs_proof=*/true};

}  // namespace cnn_ext::cuda
