// forward and backward_input on the matrix unit of sm_90a, in TF32 (where the policy allows it), float16 and bfloat16: an implicit GEMM
// whose rows are pixels of the result, columns its channels, and whose depth runs over the taps and channels of the source. backward_input
// is one gathering convolution for each stride phase (geometry.h), whose pixels share their taps, so that no product is wasted.
//
// Operands: the copy engine fetches boxes of them to shared memory, padding as zeros, from where warpgroups multiply. It wants the channels
// innermost and in whole chunks of 16 bytes: what lies otherwise (nchw; channels that are no multiple) is put in that order by a launch of
// its own first (transposition.cuh), in the workspace: one pass over the tensor. Filters lie [k][r][s][c] for both directions: in forward
// along the depth, in backward_input across it, which the matrix unit transposes in 16 bits; for TF32 they are transposed first. The result
// is stored in its layout directly.
//
// Tile: 128 pixels x 32, 64, 128 or 256 channels; a step of the depth is 128 bytes, of one tap or two. One stage is multiplied, one has
// just been, the others are on their way. Narrow tiles run two to a multiprocessor. Where an image gives few tiles but a long depth, up to
// eight blocks of a cluster share a tile: each sums up a part of the depth, and they add up the parts through each other's shared memory,
// in order.
//
// Order of additions: the parts and what each of them sums up follow from the shape of one image, never from the batch, the tile or the
// device; the matrix unit adds up a part in order.
//
// Padding never multiplies: padded elements are zeros, and a zero times an infinity or a NaN of the other operand shows as a NaN in the
// sum. Such a sum, and no other, is added up again, tap by tap without the padding, before it is stored.
//
// Not handled: float64; strict float32; strides above 8, more than 4 phases times groups, padding of more than 128, windows of more than
// 256. Bound by the second-level cache, which the tile reads 256 bytes of for 64 x 128 products; by latency where the problem is small.
#include <algorithm>

#include "cuda/chunk.cuh"
#include "cuda/gather_axis.h"
#include "cuda/limits.h"
#include "cuda/sm90a/tensor_map.cuh"
#include "cuda/sm90a/transposition.cuh"
#include "cuda/sm90a/wgmma.cuh"

namespace cnn_ext::cuda {
namespace {

constexpr int kRows = 128;
constexpr int kStepBytes = 128;  // of the depth
constexpr int kMostStages = 8;
constexpr int kMostParts = 8;              // blocks of a cluster
constexpr int kMostMaps = 4;               // phases times groups
constexpr int64_t kMultiprocessors = 132;  // of the device that the tile is chosen for
constexpr int kPanelCols = 64;             // of filters across the depth

CNN_EXT_HOST_DEVICE constexpr int stage_bytes(int cols) { return (kRows + cols) * kStepBytes; }
CNN_EXT_HOST_DEVICE constexpr int row_pitch(int cols) { return cols + 8; }  // of the sums on their way out, in floats: no bank twice
constexpr int kColPitch = kRows + 4;

// One phase: its axes, its windows' first taps as the copy engine counts them, and its depth in boxes, numbered by (box of channels, r, s).
struct PhaseDepth {
  GatherAxis h, w;
  int lowest_h, lowest_w;  // position of pixel 0's nearest tap
  int boxes;
  FastDivisor taps, width;
};

inline int lowest_tap(const GatherAxis& axis) { return axis.first + (axis.tap_step < 0 ? (axis.taps - 1) * axis.tap_step : 0); }
inline int reach(const GatherAxis& axis) {
  return axis.taps == 0 ? 0 : (axis.taps - 1) * (axis.tap_step < 0 ? -axis.tap_step : axis.tap_step);
}
// How far tap j lies from the nearest.
CNN_EXT_HOST_DEVICE inline int tap_distance(const GatherAxis& axis, int j) {
  return axis.tap_step < 0 ? (axis.taps - 1 - j) * -axis.tap_step : j * axis.tap_step;
}

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
struct Problem {
  CUtensorMap source_maps[kMostMaps];  // [group][phase]
  CUtensorMap filter_map;
  const T* source;  // channels innermost
  const T* filters;
  const T* bias;
  T* result;
  Strides source_strides, filter_strides, result_strides;  // filters: n of a column, c of a channel of the depth
  int64_t source_group, filter_group, result_group;        // from one group to the next
  PhaseDepth phase[kMostMaps];
  int kernel_w;
  int source_h, source_w, result_h, result_w;
  int depth_channels, channel_boxes, cols, pixels;
  PlaneDecoder pixel_decoder;
  int result_chunk;  // neighbouring elements of the result that are stored at once: channels in nhwc, pixels in nchw
  int phases, row_tiles, col_tiles, parts, stages;
};

// This block's part of the work.
struct Place {
  int group, phase, first_row, first_col, part;
};

// A part of the tile's sums in shared memory: lines of pixels or of channels.
struct SumLines {
  float* sums;
  int first, last, length, pitch;
};

// The sum of the products that exist.
template <class T>
__device__ float sum_again(const Problem<T>& p, const PhaseDepth& phase, int group, int pixel, int col) {
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
__device__ __noinline__ void add_up_again(const Problem<T>& p, const PhaseDepth& phase, Place place, SumLines lines) {
  const bool by_rows = p.result_strides.c == 1;
  for (int index = threadIdx.x; index < (lines.last - lines.first) * lines.length; index += kBlockThreads) {
    const int line = lines.first + index / lines.length, at = index % lines.length;
    float* sum = lines.sums + line * lines.pitch + at;
    const int pixel = place.first_row + (by_rows ? line : at), col = place.first_col + (by_rows ? at : line);
    if (isnan(*sum) && pixel < p.pixels && col < p.cols) *sum = sum_again(p, phase, place.group, pixel, col);
  }
}

// kBoxBytes: of the depth in a box, 128 or 64: then two boxes are a step. kAcross: whether filters lie across the depth.
template <class T, int kCols, int kBoxBytes, bool kAcross>
class Gemm {
 public:
  __device__ Gemm(const Problem<T>& problem, const PhaseDepth& phase, const Place& place) : p_(problem), phase_(phase), place_(place) {}

  __device__ void run(unsigned char* shared, uint64_t* barriers) {
    const int steps = ceil_div(phase_.boxes, kBoxes), part_steps = ceil_div(steps, p_.parts);
    const int begin = smaller(place_.part * part_steps, steps), end = smaller(begin + part_steps, steps);
    accumulate(shared, barriers, begin, end);
    float* sums = reinterpret_cast<float*>(shared);
    const bool by_rows = p_.result_strides.c == 1;  // whether a line of sums is a pixel or a channel
    bool meets_nan = write_sums(sums, by_rows);
    const int lines = by_rows ? kRows : kCols;
    const int part_lines = lines / p_.parts;
    const SumLines own{sums, place_.part * part_lines, (place_.part + 1) * part_lines, by_rows ? kCols : kRows,
                       by_rows ? row_pitch(kCols) : kColPitch};
    if (p_.parts > 1) {
      cluster_barrier();
      meets_nan = add_up_parts(own);
    }
    if (__syncthreads_or(meets_nan)) {
      add_up_again(p_, phase_, place_, own);
      __syncthreads();
    }
    if (by_rows) {
      store_pixels(own);
    } else {
      store_channels(own);
    }
    if (p_.parts > 1) cluster_barrier();  // the others read this block's shared memory
  }

 private:
  static constexpr int kBoxes = kStepBytes / kBoxBytes, kBoxChannels = kBoxBytes / static_cast<int>(sizeof(T));
  static constexpr int kRowBoxBytes = kRows * kBoxBytes, kColBoxBytes = kCols * kBoxBytes;
  static constexpr int kPanelBytes = kBoxChannels * kPanelCols * static_cast<int>(sizeof(T));
  static constexpr int kSums = kCols / 2;  // of a thread

  // Announces and fetches a step; boxes beyond the last one are fetched as zeros.
  __device__ void fetch(unsigned char* stage, uint64_t* barrier, int step, const PlaneIndex& first) const {
    announce(barrier, stage_bytes(kCols));
    const CUtensorMap& source_map = p_.source_maps[place_.group * p_.phases + place_.phase];
#pragma unroll
    for (int i = 0; i < kBoxes; ++i) {
      const int box = step * kBoxes + i;
      const bool exists = box < phase_.boxes;
      const int channel_box = exists ? phase_.taps.quotient(box) : p_.channel_boxes;
      const int tap = exists ? box - channel_box * phase_.taps.divisor() : 0;
      const int r = phase_.width.quotient(tap), s = tap - r * phase_.width.divisor(), channel = channel_box * kBoxChannels;
      fetch_windows(stage + i * kRowBoxBytes, source_map, channel, phase_.lowest_w + first.w * phase_.w.step,
                    phase_.lowest_h + first.h * phase_.h.step, first.outer, tap_distance(phase_.w, s), tap_distance(phase_.h, r), barrier);
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

  __device__ void accumulate(unsigned char* shared, uint64_t* barriers, int begin, int end) {
    const PlaneIndex first = p_.pixel_decoder.at(place_.first_row);
    const int ahead = p_.stages - 2;
    if (threadIdx.x == 0) {
      for (int i = 0; i < ahead && begin + i < end; ++i) fetch(shared + i * stage_bytes(kCols), barriers + i, begin + i, first);
    }
    Ring ring(p_.stages), next(p_.stages, ahead);
    pin(sums_);
    for (int step = begin; step < end; ++step) {
      __syncthreads();  // all warpgroups are done with the step before the last, whose stage is the next to be filled
      wait_barrier(barriers + ring.stage(), ring.parity());
      multiply(shared + ring.stage() * stage_bytes(kCols));
      if (threadIdx.x == 0 && step + ahead < end) {
        fetch(shared + next.stage() * stage_bytes(kCols), barriers + next.stage(), step + ahead, first);
      }
      ring.advance();
      next.advance();
      wgmma_wait<1>();
    }
    wgmma_wait<0>();
    pin(sums_);
    __syncthreads();
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
    const int pitch_of_row = by_rows ? row_pitch(kCols) : 1, pitch_of_col = by_rows ? 1 : kColPitch;
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
    bool meets_nan = false;
    const int quads = own.length / 4;
    for (int index = threadIdx.x; index < (own.last - own.first) * quads; index += kBlockThreads) {
      float* place = own.sums + (own.first + index / quads) * own.pitch + index % quads * 4;
      float4 total = read_of_block(place, 0);
      for (int part = 1; part < p_.parts; ++part) {
        const float4 more = read_of_block(place, part);
        total.x += more.x, total.y += more.y, total.z += more.z, total.w += more.w;
      }
      *reinterpret_cast<float4*>(place) = total;
      meets_nan = meets_nan || isnan(total.x) || isnan(total.y) || isnan(total.z) || isnan(total.w);
    }
    return meets_nan;
  }

  // Where a pixel of this phase lies in the result; null where it has none.
  __device__ T* target(int pixel) const {
    if (pixel >= p_.pixels) return nullptr;
    const PlaneIndex at = p_.pixel_decoder.at(pixel);
    const int h = phase_.h.first_out + at.h * phase_.h.out_step, w = phase_.w.first_out + at.w * phase_.w.out_step;
    if (h >= p_.result_h || w >= p_.result_w) return nullptr;  // the larger phases' last row and column are missing in the others
    return p_.result + place_.group * p_.result_group + at.outer * p_.result_strides.n + h * p_.result_strides.h + w * p_.result_strides.w;
  }

  __device__ float bias(int col) const { return p_.bias == nullptr ? 0 : widen(p_.bias[place_.group * p_.cols + col]); }

  // nhwc: neighbouring threads take neighbouring channels.
  __device__ void store_pixels(const SumLines& own) const {
    const int width = p_.result_chunk, units = kCols / width;
#pragma unroll 1
    for (int index = threadIdx.x; index < (own.last - own.first) * units; index += kBlockThreads) {
      const int line = own.first + index / units, at = index % units * width, col = place_.first_col + at;
      T* pixel = target(place_.first_row + line);
      if (pixel == nullptr || col >= p_.cols) continue;
      const float* sums = own.sums + line * own.pitch + at;
      if (width == 1) {
        pixel[col] = narrow<T>(*sums + bias(col));
      } else {
        float values[kChunk<T>];
#pragma unroll
        for (int i = 0; i < kChunk<T>; ++i) values[i] = sums[i] + bias(col + i);
        store_chunk(pixel + col, kChunk<T>, true, values);
      }
    }
  }

  // nchw: neighbouring threads take neighbouring pixels.
  __device__ void store_channels(const SumLines& own) const {
    const int width = p_.result_chunk, units = kRows / width;
#pragma unroll 1
    for (int index = threadIdx.x; index < (own.last - own.first) * units; index += kBlockThreads) {
      const int line = own.first + index / units, at = index % units * width, col = place_.first_col + line;
      T* pixel = target(place_.first_row + at);
      if (pixel == nullptr || col >= p_.cols) continue;
      const float* sums = own.sums + line * own.pitch + at;
      const float shift = bias(col);
      pixel += col * p_.result_strides.c;
      if (width == 1) {
        *pixel = narrow<T>(*sums + shift);
      } else {
        float values[kChunk<T>];
#pragma unroll
        for (int i = 0; i < kChunk<T>; ++i) values[i] = sums[i] + shift;
        store_chunk(pixel, kChunk<T>, true, values);
      }
    }
  }

  const Problem<T>& p_;
  const PhaseDepth& phase_;
  const Place place_;
  float sums_[kSums] = {};
};

// Blocks are numbered by part, column tile, row tile, phase, group: those that read the same pixels run together.
template <class T, int kCols, int kBoxBytes, bool kAcross>
__global__ void __launch_bounds__(kBlockThreads, kCols <= 64 ? 2 : 1) gather_wgmma(const __grid_constant__ Problem<T> problem) {
  __shared__ __align__(8) uint64_t barriers[kMostStages];
  int index = blockIdx.x;
  const auto take = [&](int count) {
    const int taken = index % count;
    index /= count;
    return taken;
  };
  Place place;
  place.part = take(problem.parts);
  place.first_col = take(problem.col_tiles) * kCols;
  place.first_row = take(problem.row_tiles) * kRows;
  place.phase = take(problem.phases);
  place.group = index;
  if (threadIdx.x == 0) {
    for (int i = 0; i < problem.stages; ++i) init_barrier(barriers + i);
    fence_barriers();
  }
  __syncthreads();
  wait_for_launch_before();
  Gemm<T, kCols, kBoxBytes, kAcross> gemm(problem, problem.phase[place.phase], place);
  gemm.run(dynamic_shared<unsigned char>(), barriers);
}

// What the host works out of a shape, the same for forward and backward_input.
template <bool kForward>
struct Side {
  explicit Side(const Conv2dShape& s)
      : is_16_bit(s.dtype != DType::float32),
        chunk(is_16_bit ? kChunk<__half> : kChunk<float>),
        depth_channels((kForward ? s.in_channels : s.out_channels) / s.groups),
        cols((kForward ? s.out_channels : s.in_channels) / s.groups),
        taps(s.kernel_h * s.kernel_w),
        source_h(kForward ? s.in_h : s.out_h),
        source_w(kForward ? s.in_w : s.out_w),
        result_plane(kForward ? s.out_h * s.out_w : s.in_h * s.in_w),
        phases(kForward ? 1 : s.stride_h * s.stride_w),
        pixel_h(kForward ? s.out_h : ceil_div(s.in_h, s.stride_h)),
        pixel_w(kForward ? s.out_w : ceil_div(s.in_w, s.stride_w)),
        rows(s.batch * pixel_h * pixel_w),
        filters_across(!kForward && is_16_bit),
        box_channels(depth_channels % (8 * chunk) == 0 || depth_channels > 16 * chunk ? 8 * chunk : 4 * chunk),
        parts(count_parts(s)),
        padded_source(padded(depth_channels)),
        padded_filter(padded(filters_across ? cols : depth_channels)),
        stages_source((s.layout == Layout::nchw && source_h * source_w > 1) || depth_channels % chunk != 0),
        stages_filters((!kForward && !filters_across) || (s.weight_layout == Layout::nchw && taps > 1) ||
                       (filters_across ? cols : depth_channels) % chunk != 0),
        source_bytes(stages_source ? aligned(s.batch * source_h * source_w * s.groups * padded_source) : 0),
        filter_bytes(stages_filters ? aligned(s.groups * (filters_across ? depth_channels : cols) * taps * padded_filter) : 0) {}

  int64_t padded(int64_t channels) const { return ceil_div(channels, chunk) * chunk; }
  int64_t aligned(int64_t elements) const { return ceil_div<int64_t>(elements * (is_16_bit ? 2 : 4), 256) * 256; }

  // By how many blocks the depth is shared: as many as fill the device with a batch of 8, or leave each of them at most 32 steps where an
  // image is small; never so many that a block has fewer than 8.
  int count_parts(const Conv2dShape& s) const {
    const int64_t steps = ceil_div(depth_channels, 8 * chunk) * taps / phases;
    const int64_t sums = result_plane * cols * s.groups, few = 8 * kRows * 128;
    if (sums > few) return 1;
    const int64_t wanted = std::min(std::max(few / std::max<int64_t>(sums, 1), steps / 32), steps / 8);
    int count = 1;
    while (count < kMostParts && 2 * count <= wanted) count *= 2;
    return count;
  }

  // Columns of the tile, on which the sums do not depend: those with the least time, by the cycles that a step of theirs takes when all
  // multiprocessors read the second-level cache.
  int tile_cols(const Conv2dShape& s) const {
    if (cols <= 32 && !filters_across) return 32;
    constexpr struct {
      int cols, cycles;
    } kTiles[] = {{64, 630}, {128, 840}, {256, 1260}};
    int best = 64;
    int64_t least = INT64_MAX;
    for (const auto& tile : kTiles) {
      const int64_t blocks = ceil_div<int64_t>(rows, kRows) * ceil_div<int64_t>(cols, tile.cols) * phases * s.groups * parts;
      const int64_t cycles = ceil_div(blocks, kMultiprocessors) * tile.cycles;
      if (cycles < least) best = tile.cols, least = cycles;
    }
    return best;
  }

  bool is_16_bit;
  int64_t chunk, depth_channels, cols, taps, source_h, source_w, result_plane, phases, pixel_h, pixel_w, rows;
  bool filters_across;
  int64_t box_channels;
  int parts;
  int64_t padded_source, padded_filter;  // channels that lie innermost
  bool stages_source, stages_filters;
  int64_t source_bytes, filter_bytes;  // of the workspace
};

template <bool kForward>
bool accepts(const Conv2dShape& s) {
  if (s.padding_mode != PaddingMode::zeros || !suits_mma(s) || s.stride_h > 8 || s.stride_w > 8) return false;
  const Side<kForward> side(s);
  if (side.phases * s.groups > kMostMaps) return false;
  if (s.groups > 1 && (side.depth_channels % side.chunk != 0 || side.cols % side.chunk != 0)) return false;
  const Conv2dGeometry g(s);
  for (int phase = 0; phase < side.phases; ++phase) {
    const GatherAxis h = gather_axis_h(g, kForward, phase), w = gather_axis_w(g, kForward, phase);
    if (!fits_copy_engine({lowest_tap(h), h.step, static_cast<int>(side.pixel_h)}, static_cast<int>(side.source_h), reach(h)) ||
        !fits_copy_engine({lowest_tap(w), w.step, static_cast<int>(side.pixel_w)}, static_cast<int>(side.source_w), reach(w))) {
      return false;
    }
  }
  return true;
}

template <bool kForward>
Plan plan(const Conv2dShape& s) {
  const Side<kForward> side(s);
  const int64_t cols = side.tile_cols(s);
  const int64_t blocks = ceil_div<int64_t>(side.rows, kRows) * ceil_div<int64_t>(side.cols, cols) * side.phases * s.groups * side.parts;
  return {cols, kRows, blocks, static_cast<size_t>(side.source_bytes + side.filter_bytes)};
}

// [N, channels, plane] -> [N, plane, channels of whole chunks].
template <bool kForward>
Transposition source_order(const Conv2dShape& s, const Side<kForward>& side) {
  const int64_t channels = side.depth_channels * s.groups, plane = side.source_h * side.source_w, padded = side.padded_source * s.groups;
  const bool nchw = s.layout == Layout::nchw;
  Transposition t{};
  t.outer = static_cast<int>(s.batch), t.inner = 1;
  t.along = static_cast<int>(channels), t.padded_along = static_cast<int>(padded), t.across = static_cast<int>(plane);
  t.source_outer = channels * plane;
  t.source_along = nchw ? plane : 1, t.source_across = nchw ? 1 : channels;
  t.target_outer = padded * plane, t.target_across = padded;
  return t;
}

// The filters -> [k][tap][c], or for TF32's backward_input [group][c][tap][k].
template <bool kForward>
Transposition filter_order(const Conv2dShape& s, const Side<kForward>& side) {
  const int64_t group_in = s.in_channels / s.groups, group_out = s.out_channels / s.groups, padded = side.padded_filter;
  const bool nchw = s.weight_layout == Layout::nchw;
  const int64_t channel = nchw ? side.taps : 1, tap = nchw ? 1 : group_in, output = group_in * side.taps;
  Transposition t{};
  t.padded_along = static_cast<int>(padded);
  if (kForward || side.filters_across) {
    t.along = static_cast<int>(group_in);
    t.outer = static_cast<int>(s.out_channels), t.inner = 1, t.across = static_cast<int>(side.taps);
    t.source_outer = output, t.source_along = channel, t.source_across = tap;
    t.target_outer = side.taps * padded, t.target_across = padded;
    return t;
  }
  t.along = static_cast<int>(group_out);
  t.outer = static_cast<int>(s.groups), t.source_outer = group_out * output, t.source_along = output;
  t.target_outer = group_in * side.taps * padded;
  if (nchw) {  // (channel, tap) is one axis on both sides
    t.inner = 1, t.across = static_cast<int>(group_in * side.taps);
    t.source_across = 1, t.target_across = padded;
  } else {
    t.inner = static_cast<int>(side.taps), t.across = static_cast<int>(group_in);
    t.source_inner = tap, t.source_across = channel;
    t.target_inner = padded, t.target_across = side.taps * padded;
  }
  return t;
}

template <class T, bool kForward>
Problem<T> problem_of(const Conv2dShape& s, const Conv2dBuffers& b, const Side<kForward>& side, void* workspace) {
  const Conv2dGeometry g(s);
  Problem<T> p{};
  p.bias = static_cast<const T*>(b.bias);
  p.result = static_cast<T*>(kForward ? b.output : b.grad_input);
  p.source_strides = strides_of(Layout::nhwc, side.padded_source * s.groups, side.source_h, side.source_w);
  p.result_strides = kForward ? g.out : g.in;
  p.kernel_w = g.kernel_w;
  p.pixel_decoder = PlaneDecoder(static_cast<int>(side.pixel_h), static_cast<int>(side.pixel_w));
  p.source = static_cast<const T*>(side.stages_source ? workspace : kForward ? b.input : b.grad_output);
  p.filters = static_cast<const T*>(side.stages_filters ? static_cast<unsigned char*>(workspace) + side.source_bytes : b.weight);
  if (!is_aligned(p.source) || !is_aligned(p.filters)) throw std::invalid_argument("this kernel wants tensors aligned to 16 bytes");
  const int64_t line = side.padded_filter, filter = side.taps * line;  // of one tap, of all
  const int64_t kernel_w = s.kernel_w;
  if (side.filters_across) {
    p.filter_strides = {1, filter, kernel_w * line, line};
    p.filter_group = side.depth_channels * filter;
  } else {
    p.filter_strides = {filter, 1, kernel_w * line, line};
    p.filter_group = side.cols * filter;
  }
  p.source_group = side.depth_channels;
  p.result_group = side.cols * p.result_strides.c;
  p.source_h = static_cast<int>(side.source_h), p.source_w = static_cast<int>(side.source_w);
  p.result_h = kForward ? g.out_h : g.in_h, p.result_w = kForward ? g.out_w : g.in_w;
  p.depth_channels = static_cast<int>(side.depth_channels), p.cols = static_cast<int>(side.cols), p.pixels = static_cast<int>(side.rows);
  p.channel_boxes = static_cast<int>(ceil_div(side.depth_channels, side.box_channels));
  const int64_t neighbours = s.layout == Layout::nhwc ? side.cols : side.phases == 1 ? side.result_plane : 1;
  p.result_chunk = neighbours % side.chunk == 0 && is_aligned(p.result) ? static_cast<int>(side.chunk) : 1;
  p.phases = static_cast<int>(side.phases);
  const int cols = side.tile_cols(s);
  p.row_tiles = static_cast<int>(ceil_div<int64_t>(side.rows, kRows)), p.col_tiles = static_cast<int>(ceil_div<int64_t>(side.cols, cols));
  p.parts = side.parts;

  const int box = static_cast<int>(side.box_channels);
  for (int group = 0; group < g.groups; ++group) {
    for (int phase = 0; phase < side.phases; ++phase) {
      const GatherAxis h = gather_axis_h(g, kForward, phase), w = gather_axis_w(g, kForward, phase);
      const TensorAxes axes{{side.depth_channels, side.source_w, side.source_h, s.batch},
                            {p.source_strides.w, p.source_strides.h, p.source_strides.n}};
      p.phase[phase] = phase_depth(h, w, p.channel_boxes);
      p.source_maps[group * side.phases + phase] =
          window_map<T>(p.source + group * p.source_group, axes, {lowest_tap(h), h.step, static_cast<int>(side.pixel_h)},
                        {lowest_tap(w), w.step, static_cast<int>(side.pixel_w)}, box, kRows);
    }
  }
  const int64_t outputs = side.filters_across ? side.depth_channels : side.cols;
  const TensorAxes axes{{side.filters_across ? side.cols : side.depth_channels, side.taps, outputs, g.groups},
                        {line, filter, p.filter_group}};
  if (side.filters_across) {
    p.filter_map = tile_map<T>(p.filters, axes, {kPanelCols, 1, box, 1});
  } else {
    p.filter_map = tile_map<T>(p.filters, axes, {box, 1, cols, 1});
  }
  return p;
}

template <class T, int kCols, int kBoxBytes, bool kAcross>
void launch_tile(Problem<T>& problem, int64_t blocks, cudaStream_t stream) {
  constexpr int kSumBytes = static_cast<int>(sizeof(float)) * std::max(kRows * row_pitch(kCols), kCols * kColPitch);
  // Narrow tiles run two to a multiprocessor where there are so many.
  constexpr int kBlockBytes = 224 * 1024;
  const bool shares = kCols <= 64 && blocks > kMultiprocessors;
  problem.stages = std::min(kMostStages, (shares ? kBlockBytes / 2 : kBlockBytes) / stage_bytes(kCols));
  launch(gather_wgmma<T, kCols, kBoxBytes, kAcross>,
         overlapping(Grid(blocks, kBlockThreads, std::max(problem.stages * stage_bytes(kCols), kSumBytes), problem.parts)), stream,
         problem);
}

template <class T, int kCols, bool kAcross>
void launch_boxes(Problem<T>& problem, int64_t box_channels, int64_t blocks, cudaStream_t stream) {
  if (box_channels == kStepBytes / static_cast<int>(sizeof(T))) {
    launch_tile<T, kCols, kStepBytes, kAcross>(problem, blocks, stream);
  } else {
    launch_tile<T, kCols, kStepBytes / 2, kAcross>(problem, blocks, stream);
  }
}

template <class T, bool kForward>
void run_typed(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, cudaStream_t stream) {
  const Side<kForward> side(s);
  if (side.stages_source) launch_transposition<T>(source_order(s, side), kForward ? b.input : b.grad_output, workspace, stream);
  if (side.stages_filters) {
    launch_transposition<T>(filter_order(s, side), b.weight, static_cast<unsigned char*>(workspace) + side.source_bytes, stream);
  }
  Problem<T> problem = problem_of<T>(s, b, side, workspace);
  const int64_t blocks = plan<kForward>(s).blocks;
  constexpr bool kAcross = !kForward && sizeof(T) == 2;
  const int cols = side.tile_cols(s);
  if (cols == 256) return launch_boxes<T, 256, kAcross>(problem, side.box_channels, blocks, stream);
  if (cols == 128) return launch_boxes<T, 128, kAcross>(problem, side.box_channels, blocks, stream);
  if (cols == 64) return launch_boxes<T, 64, kAcross>(problem, side.box_channels, blocks, stream);
  if constexpr (!kAcross) launch_boxes<T, 32, false>(problem, side.box_channels, blocks, stream);
}

template <bool kForward>
void run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, cudaStream_t stream) {
  if (plan<kForward>(s).blocks == 0) return;
  switch (s.dtype) {
    case DType::float32:
      return run_typed<float, kForward>(s, b, workspace, stream);
    case DType::float16:
      return run_typed<__half, kForward>(s, b, workspace, stream);
    default:
      return run_typed<__nv_bfloat16, kForward>(s, b, workspace, stream);
  }
}

}  // namespace

extern const Conv2dKernel conv2d_forward_wgmma_sm90a = {
    "conv2d_forward_wgmma_sm90a", 90, Conv2dDirection::forward, accepts<true>, plan<true>, run<true>,
    /*needs_proof=*/true,
    /*adds_bias=*/true,
    /*arch_specific=*/true};
extern const Conv2dKernel conv2d_backward_input_wgmma_sm90a = {"conv2d_backward_input_wgmma_sm90a",
                                                               90,
                                                               Conv2dDirection::backward_input,
                                                               accepts<false>,
                                                               plan<false>,
                                                               run<false>,
                                                               /*needs_proof=*/true,
                                                               /*adds_bias=*/true,
                                                               /*arch_specific=*/true};

}  // namespace cnn_ext::cuda
