// forward and backward_input on the matrix unit of sm_90a, in TF32 (where the policy allows it), float16 and bfloat16: an implicit GEMM
// whose rows are pixels of the result, columns its channels, and whose depth runs over the taps and channels of the source. backward_input
// is one gathering convolution for each stride phase (geometry.h), whose pixels share their taps, so that no product is wasted.
//
// Operands: the copy engine fetches boxes of them to shared memory, padding as zeros, from where warpgroups multiply. It wants the channels
// innermost and in whole chunks of 16 bytes: what lies otherwise (nchw; channels that are no multiple) is put in that order by a launch of
// its own first (transposition.cuh), in the workspace: one pass over the tensor. Filters lie [k][r][s][c] for both directions: in forward
// along the depth, in backward_input across it, which the matrix unit transposes in 16 bits; for TF32 they are transposed first. The result
// is stored in its layout directly: nhwc from registers, otherwise through shared memory.
//
// Tile: 128 pixels x 32, 64, 128 or 256 channels; a step of the depth is 128 bytes, of one tap or two. One stage is multiplied, one has
// just been, the others are on their way. Narrow tiles run two to a multiprocessor. Where an image gives few tiles but a long depth, that
// is summed up in up to eight parts, and these in order: by the blocks of a cluster, each of which sums up a part and reads the others'
// from their shared memory, or, where the batch gives tiles enough, by one block.
//
// Order of additions: the parts and what each of them sums up follow from the shape of one image, never from the batch, the tile or the
// device; the matrix unit adds up a part in order.
//
// Padding never multiplies: padded elements are zeros, and a zero times an infinity or a NaN of the other operand shows as a NaN in the
// sum. Such a sum, and no other, is added up again, tap by tap without the padding, before it is stored. Zeros of the filters meet the
// next group's channels in a group's last box.
//
// Not handled: float64; strict float32; strides above 8, more than 4 phases, groups of 16 channels and fewer, padding of more than 128,
// windows of more than 256. Bound by the second-level cache, which the tile reads 256 bytes of for 64 x 128 products; by latency where the
// problem is small.
#pragma once

#include "cuda/chunk.cuh"
#include "cuda/gather_axis.h"
#include "cuda/relu_pool.cuh"
#include "cuda/sm90a/overlap.cuh"
#include "cuda/sm90a/pipeline.cuh"
#include "cuda/sm90a/plane_sums.cuh"
#include "cuda/sm90a/row_sums.cuh"
#include "cuda/sm90a/tensor_map.cuh"
#include "cuda/sm90a/wgmma.cuh"

namespace cnn_ext::cuda {

constexpr int kGatherRows = 128;
constexpr int kGatherStepBytes = 128;  // of the depth
constexpr int kMostGatherParts = 8;    // blocks of a cluster
constexpr int kMostGatherPhases = 4;
constexpr int kPanelCols = 64;  // of filters across the depth

CNN_EXT_HOST_DEVICE constexpr int gather_stage_bytes(int cols) { return (kGatherRows + cols) * kGatherStepBytes; }
CNN_EXT_HOST_DEVICE constexpr int gather_row_pitch(int cols) { return cols + 8; }  // of the sums on their way out, in floats: no bank twice
constexpr int kGatherColPitch = kGatherRows + 4;

// One phase: its axes, its windows' first taps as the copy engine counts them, and its depth in boxes, numbered by (box of channels, r, s).
struct PhaseDepth {
  GatherAxis h, w;
  int lowest_h, lowest_w;  // position of pixel 0's nearest tap
  int boxes;
  FastDivisor taps, width;
};

inline PhaseDepth phase_depth(const GatherAxis& h, const GatherAxis& w, int channel_boxes) {
  return {h, w, lowest_tap(h), lowest_tap(w), channel_boxes * h.taps * w.taps, FastDivisor(h.taps * w.taps), FastDivisor(w.taps)};
}

inline GatherAxis gather_axis_h(const Conv2dGeometry& g, bool forward, int phase) {
  return forward ? forward_axis(g.kernel_h, g.stride_h, g.pad_top, g.dilation_h)
                 : backward_axis(g.kernel_h, g.stride_h, g.pad_top, g.dilation_h, phase / g.stride_w);
}
inline GatherAxis gather_axis_w(const Conv2dGeometry& g, bool forward, int phase) {
  return forward ? forward_axis(g.kernel_w, g.stride_w, g.pad_left, g.dilation_w)
                 : backward_axis(g.kernel_w, g.stride_w, g.pad_left, g.dilation_w, phase % g.stride_w);
}

template <class T>
struct WgmmaGather {
  CUtensorMap source_maps[kMostGatherPhases];  // of all groups
  CUtensorMap filter_map;
  const T* source;  // channels innermost
  const T* filters;
  const T* bias;
  T* result;
  bool relu;                                               // of what is stored
  Strides source_strides, filter_strides, result_strides;  // filters: n of a column, c of a channel of the depth
  int64_t source_group, filter_group, result_group;        // from one group to the next
  PhaseDepth phase[kMostGatherPhases];
  int kernel_w;
  int source_h, source_w, result_h, result_w;
  int depth_channels, channel_boxes, cols, pixels;
  PlaneDecoder pixel_decoder;
  int result_chunk;   // channels of nhwc that are stored at once
  int result_pixels;  // pixels of nchw that are: 1, 2 or 4
  bool result_pairs;  // whether two channels may be: lines of nhwc begin at even places
  int phases, row_tiles, col_tiles, stages;
  int parts, cluster_blocks;  // of the depth; that share them: all or one
};

// This block's part of the work.
struct GatherTile {
  int group, phase, first_row, first_col, part;
};

// A part of the tile's sums in shared memory: lines of pixels or of channels.
struct SumLines {
  float* sums;
  int first, last, length, pitch;
};

// The sum of the products that exist.
template <class T>
__device__ float sum_again(const WgmmaGather<T>& p, const PhaseDepth& phase, int group, int pixel, int col) {
  const PlaneIndex at = p.pixel_decoder.at(pixel);
  float sum = 0;
  for (int r = 0; r < phase.h.taps; ++r) {
    const int h = phase.h.first + at.h * phase.h.step + r * phase.h.tap_step;
    if (h < 0 || h >= p.source_h) continue;
    for (int s = 0; s < phase.w.taps; ++s) {
      const int w = phase.w.first + at.w * phase.w.step + s * phase.w.tap_step;
      if (w < 0 || w >= p.source_w) continue;
      const T* source = p.source + group * p.source_group + at.outer * p.source_strides.n + h * p.source_strides.h + w * p.source_strides.w;
      const T* filter = p.filters + group * p.filter_group + col * p.filter_strides.n +
                        (phase.h.first_tap + r * phase.h.tap_distance) * p.filter_strides.h +
                        (phase.w.first_tap + s * phase.w.tap_distance) * p.filter_strides.w;
      for (int channel = 0; channel < p.depth_channels; ++channel) {
        sum = fmaf(widen(source[channel]), widen(filter[channel * p.filter_strides.c]), sum);
      }
    }
  }
  return sum;
}

// Replaces every sum that is NaN. Not a part of the class: its registers must not go to memory for a call.
template <class T>
__device__ __noinline__ void add_up_again(const WgmmaGather<T>& p, const PhaseDepth& phase, GatherTile place, SumLines lines) {
  const bool by_rows = p.result_strides.c == 1;
  for (int index = threadIdx.x; index < (lines.last - lines.first) * lines.length; index += kBlockThreads) {
    const int line = lines.first + index / lines.length, at = index % lines.length;
    float* sum = lines.sums + line * lines.pitch + at;
    const int pixel = place.first_row + (by_rows ? line : at), col = place.first_col + (by_rows ? at : line);
    if (isnan(*sum) && pixel < p.pixels && col < p.cols) *sum = sum_again(p, phase, place.group, pixel, col);
  }
}

// Where channel 0 of a pixel of this phase and group lies in the result; null where the pixel does not exist.
template <class T>
__device__ T* result_pixel(const WgmmaGather<T>& p, const PhaseDepth& phase, const GatherTile& place, int pixel) {
  if (pixel >= p.pixels) return nullptr;
  const PlaneIndex at = p.pixel_decoder.at(pixel);
  const int h = phase.h.first_out + at.h * phase.h.out_step, w = phase.w.first_out + at.w * phase.w.out_step;
  if (h >= p.result_h || w >= p.result_w) return nullptr;  // the larger phases' last row and column are missing in the others
  return p.result + place.group * p.result_group + at.outer * p.result_strides.n + h * p.result_strides.h + w * p.result_strides.w;
}

template <class T>
__device__ float bias_of(const WgmmaGather<T>& p, const GatherTile& place, int col) {
  return p.bias == nullptr ? 0 : widen(p.bias[place.group * p.cols + col]);
}

// Replaces what is NaN among the stored lines of this warp's 16 pixels from `first` on.
template <class T>
__device__ __noinline__ void store_again(const WgmmaGather<T>& p, const PhaseDepth& phase, GatherTile place, int first, int cols) {
  for (int index = threadIdx.x % 32; index < 16 * cols; index += 32) {
    const int pixel = first + index / cols, col = place.first_col + index % cols;
    T* line = result_pixel(p, phase, place, pixel);
    if (line == nullptr || col >= p.cols || !isnan(widen(line[col]))) continue;
    line[col] = narrow<T>(activated(sum_again(p, phase, place.group, pixel, col) + bias_of(p, place, col), p.relu));
  }
}

// kBoxBytes: of the depth in a box, 128 or 64: then two boxes are a step. kAcross: whether filters lie across the depth. kManyParts:
// whether this block sums up more than one part.
template <class T, int kCols, int kBoxBytes, bool kAcross, bool kManyParts>
class WgmmaGatherGemm {
 public:
  __device__ WgmmaGatherGemm(const WgmmaGather<T>& problem, const PhaseDepth& phase, const GatherTile& place)
      : p_(problem), phase_(phase), place_(place) {}

  __device__ void run(unsigned char* shared, uint64_t* barriers) {
    const int steps = ceil_div(phase_.boxes, kBoxes), part_steps = ceil_div(steps, p_.parts);
    if constexpr (kManyParts) {
      accumulate(shared, barriers, 0, steps, part_steps);
      add_part();
      const bool ends_empty = part_steps * (p_.parts - 1) >= steps;  // a part without a step adds a zero
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums_[i] = ends_empty ? totals_[i] + 0.0F : totals_[i];
    } else {
      const int begin = smaller(place_.part * part_steps, steps);
      accumulate(shared, barriers, begin, smaller(begin + part_steps, steps), part_steps);
    }
    const bool by_rows = p_.result_strides.c == 1;  // whether a line of sums is a pixel or a channel
    if (by_rows && p_.cluster_blocks == 1) return store_rows();
    float* sums = reinterpret_cast<float*>(shared);
    bool meets_nan = write_sums(sums, by_rows);
    const int lines = by_rows ? kGatherRows : kCols;
    const int part_lines = lines / p_.cluster_blocks;
    const SumLines own{sums, place_.part * part_lines, (place_.part + 1) * part_lines, by_rows ? kCols : kGatherRows,
                       by_rows ? gather_row_pitch(kCols) : kGatherColPitch};
    if (p_.cluster_blocks > 1) {
      cluster_barrier();
      meets_nan = add_up_parts(own);
    }
    if (__syncthreads_or(meets_nan)) {
      add_up_again(p_, phase_, place_, own);
      __syncthreads();
    }
    store(own, by_rows);
    if (p_.cluster_blocks > 1) cluster_barrier();  // the others read this block's shared memory
  }

 private:
  static constexpr int kBoxes = kGatherStepBytes / kBoxBytes, kBoxChannels = kBoxBytes / static_cast<int>(sizeof(T));
  static constexpr int kRowBoxBytes = kGatherRows * kBoxBytes, kColBoxBytes = kCols * kBoxBytes;
  static constexpr int kPanelBytes = kBoxChannels * kPanelCols * static_cast<int>(sizeof(T));
  static constexpr int kSums = kCols / 2;  // of a thread

  // Announces and fetches a step; boxes beyond the last one are fetched as zeros.
  __device__ void fetch(unsigned char* stage, uint64_t* barrier, int step, const PlaneIndex& first) const {
    announce(barrier, gather_stage_bytes(kCols));
    const CUtensorMap& source_map = p_.source_maps[place_.phase];
#pragma unroll
    for (int i = 0; i < kBoxes; ++i) {
      const int box = step * kBoxes + i;
      const bool exists = box < phase_.boxes;
      const int channel_box = exists ? phase_.taps.quotient(box) : p_.channel_boxes;
      const int tap = exists ? box - channel_box * phase_.taps.divisor() : 0;
      const int r = phase_.width.quotient(tap), s = tap - r * phase_.width.divisor(), channel = channel_box * kBoxChannels;
      fetch_windows(stage + i * kRowBoxBytes, source_map, place_.group * p_.depth_channels + channel,
                    phase_.lowest_w + first.w * phase_.w.step, phase_.lowest_h + first.h * phase_.h.step, first.outer,
                    tap_distance(phase_.w, s), tap_distance(phase_.h, r), barrier);
      const int filter_tap =
          (phase_.h.first_tap + r * phase_.h.tap_distance) * p_.kernel_w + phase_.w.first_tap + s * phase_.w.tap_distance;
      unsigned char* filters = stage + kBoxes * kRowBoxBytes + i * kColBoxBytes;
      if constexpr (kAcross) {
#pragma unroll
        for (int panel = 0; panel < kCols / kPanelCols; ++panel) {
          fetch_box(filters + panel * kPanelBytes, p_.filter_map, place_.first_col + panel * kPanelCols, filter_tap, channel, place_.group,
                    barrier);
        }
      } else {
        fetch_box(filters, p_.filter_map, channel, filter_tap, place_.first_col, place_.group, barrier);
      }
    }
  }

  __device__ void accumulate(unsigned char* shared, uint64_t* barriers, int begin, int end, int part_steps) {
    const PlaneIndex first = p_.pixel_decoder.at(place_.first_row);
    int part_end = part_steps;
    pin(sums_);
    pipeline(
        barriers, p_.stages, end - begin,
        [&](int stage, int step) {
          if (threadIdx.x == 0) fetch(shared + stage * gather_stage_bytes(kCols), barriers + stage, begin + step, first);
        },
        [&](int stage, int step) {
          if (kManyParts && step == part_end) {
            wgmma_wait<0>();
            pin(sums_);
            add_part();
            pin(sums_);
            part_end += part_steps;
          }
          multiply(shared + stage * gather_stage_bytes(kCols));
        });
    pin(sums_);
  }

  // Adds the part to those before it.
  __device__ void add_part() {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      totals_[i] = part_ == 0 ? sums_[i] : totals_[i] + sums_[i];
      sums_[i] = 0;
    }
    ++part_;
  }

  __device__ void multiply(const unsigned char* stage) {
    constexpr int kFilterRowBytes = kAcross ? kPanelCols * static_cast<int>(sizeof(T)) : kBoxBytes;
    constexpr int kFilterStep = kAcross ? kInstructionBytes / static_cast<int>(sizeof(T)) * kFilterRowBytes : kInstructionBytes;
    const unsigned char* rows = stage + threadIdx.x / kWarpgroupThreads * kWarpgroupRows * kBoxBytes;
    const unsigned char* cols = stage + kBoxes * kRowBoxBytes;
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kBoxes; ++i) {
      const uint64_t a = matrix_descriptor<kBoxBytes>(rows + i * kRowBoxBytes, 16);
      const uint64_t b = matrix_descriptor<kFilterRowBytes>(cols + i * kColBoxBytes, kAcross ? kPanelBytes : 16);
#pragma unroll
      for (int j = 0; j < kBoxBytes / kInstructionBytes; ++j) {
        wgmma<false, kAcross>(sums_, a + descriptor_offset(j * kInstructionBytes), b + descriptor_offset(j * kFilterStep), T{});
      }
    }
    wgmma_commit();
  }

  // Registers -> shared memory. Whether there is a NaN among this thread's sums.
  __device__ bool write_sums(float* sums, bool by_rows) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int pitch_of_row = by_rows ? gather_row_pitch(kCols) : 1, pitch_of_col = by_rows ? 1 : kGatherColPitch;
    float* corner = sums + (warp * 16 + lane / 4) * pitch_of_row + lane % 4 * 2 * pitch_of_col;
    bool meets_nan = false;
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      corner[i % 4 / 2 * 8 * pitch_of_row + (i / 4 * 8 + i % 2) * pitch_of_col] = sums_[i];
      meets_nan = meets_nan || isnan(sums_[i]);
    }
    return meets_nan;
  }

  // The parts of all blocks of the cluster, in order, for this block's lines. Whether there is a NaN among them.
  __device__ bool add_up_parts(const SumLines& own) const {
    const int quads = own.length / 4;
    return add_up_cluster(p_.cluster_blocks, (own.last - own.first) * quads,
                          [&](int quad) { return own.sums + (own.first + quad / quads) * own.pitch + quad % quads * 4; });
  }

  // From registers to nhwc.
  __device__ void store_rows() {
    const T* bias = p_.bias == nullptr ? nullptr : p_.bias + place_.group * p_.cols;
    const RowTarget<T> target{bias, p_.relu, place_.first_col, p_.cols, /*channel_stride=*/1, p_.result_chunk > 1, p_.result_pairs};
    const int first = place_.first_row + threadIdx.x / 32 * 16, pixel = first + threadIdx.x % 32 / 4;
    finish_sums(target, sums_);
    bool meets_nan = store_line<0>(target, result_pixel(p_, phase_, place_, pixel), sums_);
    meets_nan |= store_line<1>(target, result_pixel(p_, phase_, place_, pixel + 8), sums_);
    if (__any_sync(0xFFFFFFFF, meets_nan)) {
      __syncwarp();
      store_again(p_, phase_, place_, first, kCols);
    }
  }

  __device__ void store(const SumLines& own, bool by_rows) const {
    if (by_rows) return store_lines(own);
    if (p_.result_pixels == 4) return store_planes<4>(own);
    return p_.result_pixels == 2 ? store_planes<2>(own) : store_planes<1>(own);
  }

  // From shared memory to nhwc: neighbouring threads take neighbouring channels.
  __device__ void store_lines(const SumLines& own) const {
    const int width = p_.result_chunk, units = own.length / width;
#pragma unroll 1
    for (int index = threadIdx.x; index < (own.last - own.first) * units; index += kBlockThreads) {
      const int line = own.first + index / units, at = index % units * width, col = place_.first_col + at;
      T* pixel = result_pixel(p_, phase_, place_, place_.first_row + line);
      if (pixel == nullptr || col >= p_.cols) continue;
      const float* sums = own.sums + line * own.pitch + at;
      if (width == 1) {
        pixel[col] = narrow<T>(activated(*sums + bias_of(p_, place_, col), p_.relu));
        continue;
      }
      float values[kChunk<T>];
#pragma unroll
      for (int i = 0; i < kChunk<T>; ++i) values[i] = activated(sums[i] + bias_of(p_, place_, col + i), p_.relu);
      store_chunk(pixel + col, kChunk<T>, true, values);
    }
  }

  // From shared memory to nchw.
  template <int kPixels>
  __device__ void store_planes(const SumLines& own) const {
    const PlaneLanes<T, kGatherRows, kPixels> lanes([&](int i) { return result_pixel(p_, phase_, place_, place_.first_row + i); });
    const int last = smaller(own.last, p_.cols - place_.first_col);
#pragma unroll 2
    for (int line = own.first + threadIdx.x / 32; line < last; line += kBlockThreads / 32) {
      const int col = place_.first_col + line;
      lanes.store(own.sums + line * own.pitch, col * p_.result_strides.c, bias_of(p_, place_, col), p_.relu);
    }
  }

  const WgmmaGather<T>& p_;
  const PhaseDepth& phase_;
  const GatherTile place_;
  float sums_[kSums] = {};
  float totals_[kManyParts ? kSums : 1];
  int part_ = 0;
};

// Blocks are numbered by part, column tile, row tile, phase, group: those that read the same pixels run together.
template <class T, int kCols, int kBoxBytes, bool kAcross, bool kManyParts>
__global__ void __launch_bounds__(kBlockThreads, kCols <= (kManyParts ? 64 : 128) ? 2 : 1)
    gather_wgmma(const __grid_constant__ WgmmaGather<T> problem) {
  __shared__ __align__(8) uint64_t barriers[kMostStages];
  int index = blockIdx.x;
  const auto take = [&](int count) {
    const int taken = index % count;
    index /= count;
    return taken;
  };
  GatherTile place;
  place.part = take(problem.cluster_blocks);
  place.first_col = take(problem.col_tiles) * kCols;
  place.first_row = take(problem.row_tiles) * kGatherRows;
  place.phase = take(problem.phases);
  place.group = index;
  if (threadIdx.x == 0) {
    prefetch_map(problem.source_maps[place.phase]);
    prefetch_map(problem.filter_map);
  }
  init_pipeline(barriers, problem.stages);
  wait_for_launch_before();
  WgmmaGatherGemm<T, kCols, kBoxBytes, kAcross, kManyParts> gemm(problem, problem.phase[place.phase], place);
  gemm.run(dynamic_shared<unsigned char>(), barriers);
}

}  // namespace cnn_ext::cuda
