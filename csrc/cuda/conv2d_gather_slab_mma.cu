// forward and backward_input of narrow groups (slab.cuh) on tensor cores, in TF32, float16 and bfloat16, in both layouts: rows of the
// product are pixels of the result, columns 16 of its channels, depth the 16 channels of the source that hold the same groups, tap by tap.
// backward_input is one such convolution for each stride phase (gather_axis.h).
//
// A block stages the filters of its channels as fragments, zeros between two groups, and then for each of its tiles what the windows read
// of the source: a tap is a distance from there. 16 pixels take a fragment of the source and two products for each tap; two such steps
// share the fragments of the filters. Columns are numbered so that a thread holds four neighbouring channels of a pixel.
//
// Order of additions: tap by tap in an instruction of 16 channels (8 in TF32), whatever the tile.
//
// Padding never multiplies, nor do groups with each other: a result that is NaN is added up again from the products that exist, alone.
//
// Not handled: strides of backward_input above 2; tiles that do not fit shared memory. Bound by instructions beside the products, most of
// them for addresses, in a single wave of blocks: what a thread needs of them for all of its pixels is worked out once.
#include "cuda/gather_axis.h"
#include "cuda/mma_fragments.cuh"
#include "cuda/slab.cuh"

namespace cnn_ext::cuda {
namespace {

constexpr int kMostPhaseStride = 2;
constexpr int kSteps = 2;  // of 16 pixels at a time

// What the host works out of a shape: how source and filters lie in shared memory, and who computes what.
struct GatherSlabs {
  GatherSlabs(const Conv2dShape& s, bool forward, int slab_)
      : slab(slab_),
        pitch(slab * bytes_of(s.dtype) + kChunkBytes),
        chunk_bits(__builtin_ctz(static_cast<unsigned>(slab * bytes_of(s.dtype) / kChunkBytes))),
        group_bits(__builtin_ctz(static_cast<unsigned>(s.in_channels / s.groups))),
        unit_bits(__builtin_ctz(static_cast<unsigned>(slab / kUnit))),
        tap_bytes(slab / kUnit * 32 * bytes_of(s.dtype) / 2 * kChunkBytes),
        slabs(static_cast<int>(ceil_div<int64_t>(s.in_channels, slab))),
        phases_h(forward ? 1 : static_cast<int>(s.stride_h)),
        phases_w(forward ? 1 : static_cast<int>(s.stride_w)),
        tiles(slab_tiles(forward ? s.out_h : ceil_div(s.in_h, s.stride_h), forward ? s.out_w : ceil_div(s.in_w, s.stride_w))),
        source(1, 1, pitch) {
    const Conv2dGeometry g(s);
    for (int i = 0; i < phases_h; ++i) {
      h[i] = forward ? forward_axis(g.kernel_h, g.stride_h, g.pad_top, g.dilation_h)
                     : backward_axis(g.kernel_h, g.stride_h, g.pad_top, g.dilation_h, i);
    }
    for (int i = 0; i < phases_w; ++i) {
      w[i] = forward ? forward_axis(g.kernel_w, g.stride_w, g.pad_left, g.dilation_w)
                     : backward_axis(g.kernel_w, g.stride_w, g.pad_left, g.dilation_w, i);
      tap_cols[i] = FastDivisor(w[i].taps);
    }
    int reach_h = 0, reach_w = 0, taps_h = 0, taps_w = 0;
    for (int i = 0; i < phases_h; ++i) reach_h = larger(reach_h, reach(h[i])), taps_h = larger(taps_h, h[i].taps);
    for (int i = 0; i < phases_w; ++i) reach_w = larger(reach_w, reach(w[i])), taps_w = larger(taps_w, w[i].taps);
    source = staged_source(tiles, h[0].step, w[0].step, reach_h, reach_w, pitch);
    filters = ceil_div(source.bytes(), kChunkBytes) * kChunkBytes;
    shared_bytes = filters + taps_h * taps_w * tap_bytes;
  }
  // Warps that share the units of a slab, each a part of the pixels or taps.
  CNN_EXT_HOST_DEVICE int parts() const { return kWarps >> unit_bits; }

  int slab, pitch, chunk_bits, group_bits, unit_bits;
  int tap_bytes;  // of the filters in shared memory
  int slabs, phases_h, phases_w;
  GatherAxis h[kMostPhaseStride], w[kMostPhaseStride];
  FastDivisor tap_cols[kMostPhaseStride];
  PatchTiles tiles;
  StagedPixels source;
  int filters, shared_bytes;
};

int slab_of(const Conv2dShape& s, bool forward) {
  return slab_width(s.in_channels, [&](int slab) { return GatherSlabs(s, forward, slab).shared_bytes; });
}

template <class T>
struct GatherProblem {
  GatherSlabs slabs;
  const T* source;
  const T* weight;
  const T* bias;
  T* result;
  Strides source_strides, result_strides;
  int of_result, of_source, of_row, of_col;  // of the filters: from one channel of the result or the source to the next, between taps
  bool forward;
  int batch, channels, source_h, source_w, result_h, result_w, ranges;
};

// A block's part: channels and a phase.
struct Share {
  int first_channel, phase_h, phase_w;
};

// Of the filters: where those between the channels `from` of the source and `to` of the result, of one group, begin, and how far a tap of
// the phase lies from there.
template <class T>
__device__ int filter_of(const GatherProblem<T>& p, int from, int to) {
  const int member = (1 << p.slabs.group_bits) - 1;
  return (p.forward ? to : to & member) * p.of_result + (p.forward ? from & member : from) * p.of_source;
}
template <class T>
__device__ int tap_of(const GatherProblem<T>& p, const GatherAxis& axis_h, const GatherAxis& axis_w, int r, int s) {
  return (axis_h.first_tap + r * axis_h.tap_distance) * p.of_row + (axis_w.first_tap + s * axis_w.tap_distance) * p.of_col;
}

// The sum of the products that exist.
template <class T>
__device__ float exact_sum(const GatherProblem<T>& p, Share share, const PlaneIndex& at, int pixel, int channel) {
  const GatherAxis &axis_h = p.slabs.h[share.phase_h], &axis_w = p.slabs.w[share.phase_w];
  const int group = 1 << p.slabs.group_bits, first = channel - channel % group;
  float sum = 0;
  for (int r = 0; r < axis_h.taps; ++r) {
    const int h = axis_h.first + (at.h + p.slabs.tiles.row_of(pixel)) * axis_h.step + r * axis_h.tap_step;
    if (h < 0 || h >= p.source_h) continue;
    for (int s = 0; s < axis_w.taps; ++s) {
      const int w = axis_w.first + (at.w + p.slabs.tiles.col_of(pixel)) * axis_w.step + s * axis_w.tap_step;
      if (w < 0 || w >= p.source_w) continue;
      const T* source = p.source + at.outer * p.source_strides.n + h * p.source_strides.h + w * p.source_strides.w;
      for (int from = first; from < first + group; ++from) {
        sum = fmaf(widen(source[from * p.source_strides.c]), widen(p.weight[filter_of(p, from, channel) + tap_of(p, axis_h, axis_w, r, s)]),
                   sum);
      }
    }
  }
  return p.bias == nullptr ? sum : sum + widen(p.bias[channel]);
}

// Replaces every result of a tile that is NaN. Not a part of the class: its registers must not go to memory for a call.
template <class T>
__device__ __attribute__((noinline)) void add_up_again(const GatherProblem<T>& p, Share share, PlaneIndex at) {
  const GatherAxis &axis_h = p.slabs.h[share.phase_h], &axis_w = p.slabs.w[share.phase_w];
  for (int index = threadIdx.x; index < p.slabs.tiles.height * p.slabs.tiles.width * p.slabs.slab; index += kBlockThreads) {
    const int pixel = index / p.slabs.slab, channel = share.first_channel + index % p.slabs.slab;
    const int h = axis_h.first_out + (at.h + p.slabs.tiles.row_of(pixel)) * axis_h.out_step;
    const int w = axis_w.first_out + (at.w + p.slabs.tiles.col_of(pixel)) * axis_w.out_step;
    if (h >= p.result_h || w >= p.result_w || channel >= p.channels) continue;
    const Strides& strides = p.result_strides;
    T& result = p.result[at.outer * strides.n + channel * strides.c + h * strides.h + w * strides.w];
    if (isnan(widen(result))) result = narrow<T>(exact_sum(p, share, at, pixel, channel));
  }
}

template <class T, bool kVector>
class SlabGather {
 public:
  __device__ SlabGather(const GatherProblem<T>& problem, Share share)
      : p_(problem),
        t_(problem.slabs),
        share_(share),
        unit_(static_cast<int>(threadIdx.x) / 32 & ((1 << t_.unit_bits) - 1)),
        part_(static_cast<int>(threadIdx.x) / 32 >> t_.unit_bits),
        channel_(share.first_channel + unit_ * kUnit + pair() * 4),
        h_(problem.slabs.h[share.phase_h]),
        w_(problem.slabs.w[share.phase_w]),
        shared_(dynamic_shared<unsigned char>()) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bias_[i] = p_.bias != nullptr && channel_ + i < p_.channels ? widen(p_.bias[channel_ + i]) : 0.0f;
    }
  }

  __device__ void run(int range) {
    TileCursor cursor(t_.tiles, range, p_.ranges);
    begin(cursor.at());
    stage_filters();
#pragma unroll 1
    while (true) {
      const PlaneIndex at = cursor.at();
      finish_pixels<T, kVector>(t_.source, t_.chunk_bits, shared_);
      __syncthreads();
      if (__syncthreads_or(convolve(at))) add_up_again(p_, share_, at);
      cursor.advance();
      if (!cursor.is_in(p_.batch)) return;
      begin(cursor.at());
    }
  }

 private:
  static constexpr int kWords = 2 * static_cast<int>(sizeof(T));  // of a tap's filters in a thread

  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static int group() { return lane() / 4; }
  __device__ static int pair() { return lane() % 4; }
  static constexpr int kTapBatch = 3;  // whose filters are on their way at a time

  // The thread's channels of a tile's image in the result, and where pixel 0 lies there.
  struct ResultTile {
    T* data;
    int h, w;
  };

  // Fetches what the windows of a tile read.
  __device__ void begin(const PlaneIndex& at) {
    begin_pixels<T, kVector, 24>(
        slab_image(p_.source, p_.source_strides, at.outer, p_.source_h, p_.source_w, share_.first_channel, p_.channels), t_.source,
        t_.chunk_bits, lowest_tap(h_) + at.h * h_.step, lowest_tap(w_) + at.w * w_.step, shared_);
  }

  // A tile, 16 pixels after the other. Whether there is a NaN among its sums.
  __device__ bool convolve(const PlaneIndex& at) {
    const ResultTile to{p_.result + at.outer * p_.result_strides.n + channel_ * p_.result_strides.c, h_.first_out + at.h * h_.out_step,
                        w_.first_out + at.w * w_.out_step};
    bool meets_nan = false;
    const int steps = t_.tiles.height * t_.tiles.width / kUnit, parts = t_.parts();
#pragma unroll 1
    for (int step = part_; step < steps; step += kSteps * parts) {
      multiply(step, parts, steps);
#pragma unroll
      for (int i = 0; i < kSteps; ++i) meets_nan |= step + i * parts < steps && store(to, i, (step + i * parts) * kUnit);
    }
    return meets_nan;
  }

  // [tap][unit][lane] words of fragments: for each of the two blocks of 8 columns two of the depth; in TF32 first those of 8 channels.
  __device__ void stage_filters() {
    int elements[8];  // of the first tap; negative: between two groups
    const int first = share_.first_channel + unit_ * kUnit;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int word = word_of(i), j = word / 2 % 2;
      const int from = sizeof(T) == 4 ? word / 4 * 8 + word % 2 * 4 + pair() : word % 2 * 8 + pair() * 2 + i % 2;
      const int to = group() / 2 * 4 + j * 2 + group() % 2, element = filter_of(p_, first + from, first + to);
      elements[i] = from >> t_.group_bits == to >> t_.group_bits && first + larger(from, to) < p_.channels ? element : -1;
    }
    const FastDivisor& cols = t_.tap_cols[share_.phase_w];
    const int taps = h_.taps * w_.taps, parts = t_.parts();
#pragma unroll 1
    for (int tap = part_; tap < taps; tap += kTapBatch * parts) {
      T values[kTapBatch][8];
#pragma unroll
      for (int b = 0; b < kTapBatch; ++b) {
        const int of_batch = smaller(tap + b * parts, taps - 1), r = cols.quotient(of_batch);
        const T* weight = p_.weight + tap_of(p_, h_, w_, r, of_batch - r * w_.taps);
#pragma unroll
        for (int i = 0; i < 8; ++i) values[b][i] = elements[i] < 0 ? narrow<T>(0) : weight[elements[i]];
      }
#pragma unroll
      for (int b = 0; b < kTapBatch; ++b) {
        if (tap + b * parts >= taps) break;
        uint32_t words[kWords] = {};
#pragma unroll
        for (int i = 0; i < 8; ++i) words[word_of(i)] |= bits_of(values[b][i]) << (sizeof(T) == 4 ? 0 : i % 2 * 16);
        uint4* target = filters(tap + b * parts);
#pragma unroll
        for (int i = 0; i < kWords / 4; ++i) target[i * 32] = {words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]};
      }
    }
  }
  // Which of the words holds element i of 8.
  __device__ static constexpr int word_of(int i) { return i * kWords / 8; }
  __device__ uint4* filters(int tap) const {
    return reinterpret_cast<uint4*>(shared_ + t_.filters + tap * t_.tap_bytes) + unit_ * 32 * (kWords / 4) + lane();
  }

  __device__ void multiply(int step, int parts, int steps) {
    const unsigned char* windows[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int pixel = smaller(step + i * parts, steps - 1) * kUnit + lane() % 16;
      windows[i] = shared_ + t_.tiles.row_of(pixel) * h_.step * t_.source.of_row() + t_.tiles.col_of(pixel) * w_.step * t_.pitch +
                   unit_ * kUnit * static_cast<int>(sizeof(T)) + lane() / 16 * kChunkBytes;
#pragma unroll
      for (int v = 0; v < 8; ++v) sums_[i][v / 4][v % 4] = 0;
    }
    const uint4* filter = filters(0);
    const int row_step = h_.tap_step * t_.source.of_row(), col_step = w_.tap_step * t_.pitch;
    int of_row = tap_distance(h_, 0) * t_.source.of_row() + tap_distance(w_, 0) * t_.pitch;
#pragma unroll 1
    for (int r = 0; r < h_.taps; ++r, of_row += row_step) {
      int of_tap = of_row;
#pragma unroll 3
      for (int s = 0; s < w_.taps; ++s, of_tap += col_step, filter += t_.tap_bytes / kChunkBytes) {
#pragma unroll
        for (int half = 0; half < kWords / 4; ++half) {
          const uint4 b = filter[half * 32];
#pragma unroll
          for (int i = 0; i < kSteps; ++i) {
            uint32_t a[4];
            ldmatrix_x4(a, windows[i] + of_tap + half * 2 * kChunkBytes);
            mma(sums_[i][0], a, {b.x, b.y}, T{});
            mma(sums_[i][1], a, {b.z, b.w}, T{});
          }
        }
      }
    }
  }

  // Rounds the sums of 16 pixels from `first` on and stores them. Whether there is a NaN among them.
  __device__ bool store(const ResultTile& to, int step, int first) const {
    const int of_h = static_cast<int>(p_.result_strides.h), of_w = static_cast<int>(p_.result_strides.w);
    bool meets_nan = false;
#pragma unroll
    for (int v = 0; v < 4; v += 2) {
      const int pixel = first + group() + v * 4;
      const int h = to.h + t_.tiles.row_of(pixel) * h_.out_step, w = to.w + t_.tiles.col_of(pixel) * w_.out_step;
      if (h >= p_.result_h || w >= p_.result_w || channel_ >= p_.channels) continue;
      float values[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        values[i] = sums_[step][i / 2][v + i % 2];
        if (p_.bias != nullptr) values[i] += bias_[i];
        meets_nan |= isnan(values[i]);
      }
      T* target = to.data + (h * of_h + w * of_w);
      if constexpr (kVector) {
        store_vector(target, values);
      } else {
        const int of_c = static_cast<int>(p_.result_strides.c);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (channel_ + i < p_.channels) target[i * of_c] = narrow<T>(values[i]);
        }
      }
    }
    return meets_nan;
  }

  const GatherProblem<T>& p_;
  const GatherSlabs& t_;
  const Share share_;
  const int unit_, part_;  // of the warp
  const int channel_;      // the first of four of the thread
  const GatherAxis h_, w_;
  unsigned char* shared_;
  float bias_[4];
  float sums_[kSteps][2][4];
};

// Blocks are numbered by slab, phase, range of tiles: those that read the same pixels run together.
template <class T, bool kVector>
__global__ void __launch_bounds__(kBlockThreads, 2) gather_slabs(const __grid_constant__ GatherProblem<T> p) {
  const int block = static_cast<int>(blockIdx.x), slab = block % p.slabs.slabs, rest = block / p.slabs.slabs;
  const int phases = p.slabs.phases_h * p.slabs.phases_w, phase = rest % phases;
  const Share share{slab * p.slabs.slab, phase / p.slabs.phases_w, phase % p.slabs.phases_w};
  SlabGather<T, kVector> gather(p, share);
  gather.run(rest / phases);
}

template <bool kForward>
bool accepts(const Conv2dShape& s) {
  return suits_slabs(s) && (kForward || (s.stride_h <= kMostPhaseStride && s.stride_w <= kMostPhaseStride)) && slab_of(s, kForward) > 0;
}

// Enough blocks to fill 132 multiprocessors four times, as far as there are tiles.
int64_t ranges_of(const Conv2dShape& s, const GatherSlabs& slabs) {
  const int64_t shares = slabs.slabs * slabs.phases_h * slabs.phases_w;
  return smaller<int64_t>(s.batch * slabs.tiles.of_image, ceil_div<int64_t>(4 * kMultiprocessors, shares));
}

template <bool kForward>
Plan plan(const Conv2dShape& s) {
  const GatherSlabs slabs(s, kForward, slab_of(s, kForward));
  return {slabs.slab, slabs.tiles.height * slabs.tiles.width, slabs.slabs * slabs.phases_h * slabs.phases_w * ranges_of(s, slabs), 0};
}

template <class T, bool kForward>
void run_typed(const Conv2dShape& s, const Conv2dBuffers& b, cudaStream_t stream) {
  const Conv2dGeometry g(s);
  const GatherSlabs slabs(s, kForward, slab_of(s, kForward));
  const GatherProblem<T> problem{slabs,
                                 static_cast<const T*>(kForward ? b.input : b.grad_output),
                                 static_cast<const T*>(b.weight),
                                 static_cast<const T*>(b.bias),
                                 static_cast<T*>(kForward ? b.output : b.grad_input),
                                 kForward ? g.in : g.out,
                                 kForward ? g.out : g.in,
                                 static_cast<int>(kForward ? g.filter.n : g.filter.c),
                                 static_cast<int>(kForward ? g.filter.c : g.filter.n),
                                 static_cast<int>(g.filter.h),
                                 static_cast<int>(g.filter.w),
                                 kForward,
                                 g.batch,
                                 static_cast<int>(s.in_channels),
                                 kForward ? g.in_h : g.out_h,
                                 kForward ? g.in_w : g.out_w,
                                 kForward ? g.out_h : g.in_h,
                                 kForward ? g.out_w : g.in_w,
                                 static_cast<int>(ranges_of(s, slabs))};
  const bool has_vectors =
      s.layout == Layout::nhwc && s.in_channels % kChunk<T> == 0 && is_aligned(problem.source) && is_aligned(problem.result);
  launch(has_vectors ? gather_slabs<T, true> : gather_slabs<T, false>, Grid(plan<kForward>(s).blocks, kBlockThreads, slabs.shared_bytes),
         stream, problem);
}

template <bool kForward>
void run(const Conv2dShape& s, const Conv2dBuffers& b, void*, cudaStream_t stream) {
  with_single_type(s.dtype, [&](auto element) { run_typed<decltype(element), kForward>(s, b, stream); });
}

}  // namespace

extern const Conv2dKernel conv2d_forward_slab_mma_sm80 = {
    "conv2d_forward_slab_mma_sm80", 80, Conv2dDirection::forward, accepts<true>, plan<true>, run<true>, /*needs_proof=*/true};
extern const Conv2dKernel conv2d_backward_input_slab_mma_sm80 = {"conv2d_backward_input_slab_mma_sm80",
                                                                 80,
                                                                 Conv2dDirection::backward_input,
                                                                 accepts<false>,
                                                                 plan<false>,
                                                                 run<false>,
                                                                 /*needs_proof=*/true,
                                                                 /*adds_bias=*/true};

}  // namespace cnn_ext::cuda
