// forward and backward_input on the matrix unit of sm_90a, in TF32 (where the policy allows it), float16 and bfloat16: an implicit GEMM
// whose rows are pixels of the result, columns its channels, and whose depth runs over the taps and channels of the source. backward_input
// is one gathering convolution for each stride phase (geometry.h), whose pixels share their taps, so that no product is wasted.
//
// Operands: chunks of 16 bytes of neighbouring channels, copied asynchronously to shared memory and multiplied from there by warpgroups.
// Source and filters are read as they lie where their channels are neighbours and fill whole chunks. What does not (nchw; channels that are
// no multiple; backward_input's filters, whose depth is the output channels) is put in that order by a launch of its own first
// (transposition.cuh), in the workspace: one pass over the tensor. The result is stored in its layout directly.
//
// Depth: a block of at most eight chunks of channels, all taps of it, the next block: the taps of a block read nearly the same pixels, which
// the first-level cache then holds.
//
// Tile: 128 pixels x 32, 64 or 128 channels; a step of the depth is 128 bytes; four stages, of which one is multiplied, one has just
// been and two are on their way. Where an image gives few tiles but a long depth, up to eight blocks of a cluster share a tile: each sums up
// a part of the depth, and they add up the parts through each other's shared memory, in order.
//
// Order of additions: the parts and what each of them sums up follow from the shape of one image, never from the batch, the tile or the
// device; the matrix unit adds up a part in order.
//
// Padding never multiplies: padded elements are staged as zeros, and a zero times an infinity or a NaN of the other operand shows as a
// NaN in the sum. Such a sum, and no other, is added up again, tap by tap without the padding, before it is stored.
//
// Not handled: float64; strict float32; groups whose channels do not fill whole chunks. Bound by the issue of copies and by the second-level
// cache; by latency where the problem is small.
#include <algorithm>

#include "cuda/chunk.cuh"
#include "cuda/gather_axis.h"
#include "cuda/limits.h"
#include "cuda/sm90a/wgmma.cuh"
#include "cuda/transposition.cuh"

namespace cnn_ext::cuda {
namespace {

constexpr int kRows = 128, kStages = 4;
constexpr int kStepChunks = kSwizzleRowBytes / kChunkBytes;            // of the depth
constexpr int kLoaderRows = kBlockThreads / kStepChunks;               // rows that the block copies at once
constexpr int kMostParts = 8;                                          // blocks of a cluster
constexpr int64_t kMultiprocessors = 132;                              // of the device that the tile is chosen for

constexpr size_t kRowTileBytes = kRows * kSwizzleRowBytes;
CNN_EXT_HOST_DEVICE constexpr size_t stage_bytes(int cols) { return kRowTileBytes + cols * kSwizzleRowBytes; }
CNN_EXT_HOST_DEVICE constexpr size_t shared_bytes(int cols) { return kStages * stage_bytes(cols); }
CNN_EXT_HOST_DEVICE constexpr int row_pitch(int cols) { return cols + 8; }  // of the sums on their way out, in floats: no bank twice
constexpr int kColPitch = kRows + 4;

// The depth of one phase: chunks numbered by (block of channels, r, s, chunk of the block).
struct DepthDecoder {
  CNN_EXT_HOST_DEVICE DepthDecoder(int channel_chunks, int chunks_of_block, int taps_h, int taps_w)
      : chunks(channel_chunks * taps_h * taps_w),
        block_chunks(chunks_of_block),
        block(chunks_of_block * taps_h * taps_w),
        tap(chunks_of_block),
        width(taps_w) {}
  struct At {
    int chunk, r, s;  // chunk of all channels
  };
  __device__ At at(int index) const {
    const int outer = block.quotient(index), rest = index - outer * block.divisor();
    const int t = tap.quotient(rest), r = width.quotient(t);
    return {outer * block_chunks + rest - t * block_chunks, r, t - r * width.divisor()};
  }
  int chunks, block_chunks;
  FastDivisor block, tap, width;
};

struct PhaseDepth {
  GatherAxis h, w;
  DepthDecoder depth;
};

// The largest divisor of a number of chunks that is at most a step.
int chunks_of_block(int channel_chunks) {
  int chunks = smaller(channel_chunks, kStepChunks);
  while (channel_chunks % chunks != 0) --chunks;
  return chunks;
}

template <class T>
struct Problem {
  const T* source;   // channels innermost
  const T* filters;  // [group][column][r][s][depth channel]
  const T* bias;
  T* result;
  Strides source_strides, result_strides;
  int64_t source_group, filter_group, result_group;  // from one group to the next
  int64_t filter_col, filter_h, filter_w;
  int source_h, source_w, result_h, result_w;
  int depth_channels, depth_chunks, block_chunks, cols;
  int pixels;
  PlaneDecoder pixel_decoder;
  Conv2dGeometry g;
  bool forward;
  bool has_chunks;      // whether all of source and filters is whole, aligned chunks
  int result_chunk;     // neighbouring elements of the result that are stored at once: channels in nhwc, pixels in nchw
  int phases, groups, row_tiles, col_tiles, parts;
  PhaseDepth first_phase;

  __device__ PhaseDepth phase(int index) const {
    if (forward) return first_phase;
    const GatherAxis h = backward_axis(g.kernel_h, g.stride_h, g.pad_top, g.dilation_h, index / g.stride_w);
    const GatherAxis w = backward_axis(g.kernel_w, g.stride_w, g.pad_left, g.dilation_w, index % g.stride_w);
    return {h, w, DepthDecoder(depth_chunks, block_chunks, h.taps, w.taps)};
  }
};

// A chunk whose address is not aligned, element by element: rare, and of the same bits.
template <class T>
__device__ __noinline__ void copy_elements(unsigned char* shared, const T* global, bool exists) {
  T elements[kChunk<T>];
#pragma unroll
  for (int i = 0; i < kChunk<T>; ++i) elements[i] = exists ? global[i] : narrow<T>(0);
  ChunkWords words;
  __builtin_memcpy(&words, elements, kChunkBytes);
  *reinterpret_cast<ChunkWords*>(shared) = words;
}

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
      const T* filter = p.filters + group * p.filter_group + col * p.filter_col +
                        (phase.h.first_tap + r * phase.h.tap_distance) * p.filter_h +
                        (phase.w.first_tap + s * phase.w.tap_distance) * p.filter_w;
      for (int channel = 0; channel < p.depth_channels; ++channel) sum = fmaf(widen(source[channel]), widen(filter[channel]), sum);
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

template <class T, int kCols>
class Gemm {
 public:
  __device__ Gemm(const Problem<T>& problem, const PhaseDepth& phase, const Place& place)
      : p_(problem),
        phase_(phase),
        place_(place),
        source_(problem.source + place.group * problem.source_group),
        filters_(problem.filters + place.group * problem.filter_group) {
    const int row = threadIdx.x / kStepChunks;
    swizzled_ = row * kSwizzleRowBytes + ((threadIdx.x % kStepChunks) ^ (row % kSwizzleRows)) * kChunkBytes;
#pragma unroll
    for (int i = 0; i < kRowLoads; ++i) {
      const int pixel = place.first_row + row + i * kLoaderRows;
      const PlaneIndex at = p_.pixel_decoder.at(pixel < p_.pixels ? pixel : 0);
      h_[i] = pixel < p_.pixels ? phase.h.first + at.h * phase.h.step : INT32_MIN / 2;
      w_[i] = phase.w.first + at.w * phase.w.step;
      rows_[i] = source_ + at.outer * p_.source_strides.n + (phase.h.first + at.h * phase.h.step) * p_.source_strides.h +
                 w_[i] * p_.source_strides.w;
    }
    first_filter_ = filters_ + (place.first_col + row) * p_.filter_col;
    filters_left_ = p_.cols - place.first_col - row;
  }

  __device__ void run(unsigned char* shared) {
    const int steps = ceil_div(phase_.depth.chunks, kStepChunks), part_steps = ceil_div(steps, p_.parts);
    const int begin = smaller(place_.part * part_steps, steps), end = smaller(begin + part_steps, steps);
    accumulate(shared, begin, end);
    float* sums = reinterpret_cast<float*>(shared);
    const bool by_rows = p_.result_strides.c == 1;  // whether a row of sums is a pixel or a channel
    bool meets_nan = write_sums(sums, by_rows);
    const int lines = by_rows ? kRows : kCols, line_sums = by_rows ? kCols : kRows, pitch = by_rows ? row_pitch(kCols) : kColPitch;
    const int first_line = place_.part * (lines / p_.parts), last_line = first_line + lines / p_.parts;
    if (p_.parts > 1) {
      cluster_barrier();
      meets_nan = add_up_parts(sums, first_line, last_line, line_sums, pitch);
    }
    if (__syncthreads_or(meets_nan)) {
      const SumLines own{sums, first_line, last_line, line_sums, pitch};
      add_up_again(p_, phase_, place_, own);
      __syncthreads();
    }
    if (by_rows) {
      store_pixels(sums, first_line, last_line);
    } else {
      store_channels(sums, first_line, last_line);
    }
    if (p_.parts > 1) cluster_barrier();  // the others read this block's shared memory
  }

 private:
  static constexpr int kRowLoads = kRows / kLoaderRows, kColLoads = kCols / kLoaderRows;
  static constexpr int kSums = kCols / 2;  // of a thread

  __device__ static unsigned char* row_tile(unsigned char* shared, int step) { return shared + step % kStages * stage_bytes(kCols); }
  __device__ static unsigned char* col_tile(unsigned char* shared, int step) { return row_tile(shared, step) + kRowTileBytes; }

  __device__ void load(unsigned char* shared, int step) {
    const int index = step * kStepChunks + threadIdx.x % kStepChunks;
    const bool exists = index < phase_.depth.chunks;
    const DepthDecoder::At at = phase_.depth.at(exists ? index : 0);
    const int h = at.r * phase_.h.tap_step, w = at.s * phase_.w.tap_step, channel = at.chunk * kChunk<T>;
    const int64_t offset = h * p_.source_strides.h + w * p_.source_strides.w + channel;
    const int64_t filter_offset = (phase_.h.first_tap + at.r * phase_.h.tap_distance) * p_.filter_h +
                                  (phase_.w.first_tap + at.s * phase_.w.tap_distance) * p_.filter_w + channel;
    unsigned char* row = row_tile(shared, step) + swizzled_;
    unsigned char* col = col_tile(shared, step) + swizzled_;
#pragma unroll
    for (int i = 0; i < kRowLoads; ++i) {
      const bool inside = exists && static_cast<unsigned>(h_[i] + h) < static_cast<unsigned>(p_.source_h) &&
                          static_cast<unsigned>(w_[i] + w) < static_cast<unsigned>(p_.source_w);
      copy(row + i * kLoaderRows * kSwizzleRowBytes, rows_[i] + offset, inside);
    }
#pragma unroll
    for (int i = 0; i < kColLoads; ++i) {
      copy(col + i * kLoaderRows * kSwizzleRowBytes, first_filter_ + i * kLoaderRows * p_.filter_col + filter_offset,
           exists && i * kLoaderRows < filters_left_);
    }
  }

  __device__ void copy(unsigned char* shared, const T* global, bool exists) const {
    if (p_.has_chunks) {
      cp_async<kChunkBytes>(shared, exists ? global : p_.source, exists);
    } else {
      copy_elements(shared, global, exists);
    }
  }

  __device__ void accumulate(unsigned char* shared, int begin, int end) {
#pragma unroll
    for (int i = 0; i < kStages - 2; ++i) {
      if (begin + i < end) load(shared, begin + i);
      cp_async_commit();
    }
    for (int step = begin; step < end; ++step) {
      cp_async_wait<kStages - 3>();
      fence_for_matrix_unit();
      __syncthreads();  // all of the step has landed, and all warpgroups are done with the step before the last
      multiply(row_tile(shared, step), col_tile(shared, step));
      const int next = step + kStages - 2;
      if (next < end) load(shared, next);
      cp_async_commit();
      wgmma_wait<1>();
    }
    wgmma_wait<0>();
    pin(sums_);
    cp_async_wait<0>();
    __syncthreads();
  }

  __device__ void multiply(const unsigned char* rows, const unsigned char* cols) {
    const uint64_t a = matrix_descriptor(rows + threadIdx.x / kWarpgroupThreads * kWarpgroupRows * kSwizzleRowBytes, 16);
    const uint64_t b = matrix_descriptor(cols, 16);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kSwizzleRowBytes / kInstructionBytes; ++i) {
      wgmma<false, false>(sums_, a + i * (kInstructionBytes >> 4), b + i * (kInstructionBytes >> 4), T{});
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
  __device__ bool add_up_parts(float* sums, int first_line, int last_line, int line_sums, int pitch) const {
    bool meets_nan = false;
    const int quads = line_sums / 4;
    for (int index = threadIdx.x; index < (last_line - first_line) * quads; index += kBlockThreads) {
      float* place = sums + (first_line + index / quads) * pitch + index % quads * 4;
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
    return p_.result + place_.group * p_.result_group + at.outer * p_.result_strides.n + h * p_.result_strides.h +
           w * p_.result_strides.w;
  }

  __device__ float bias(int col) const { return p_.bias == nullptr ? 0 : widen(p_.bias[place_.group * p_.cols + col]); }

  // nhwc: neighbouring threads take neighbouring channels.
  __device__ void store_pixels(const float* sums, int first_line, int last_line) const {
    const int width = p_.result_chunk, units = kCols / width;
#pragma unroll 1
    for (int index = threadIdx.x; index < (last_line - first_line) * units; index += kBlockThreads) {
      const int line = first_line + index / units, at = index % units * width, col = place_.first_col + at;
      T* pixel = target(place_.first_row + line);
      if (pixel == nullptr || col >= p_.cols) continue;
      const float* line_sums = sums + line * row_pitch(kCols) + at;
      if (width == 1) {
        pixel[col] = narrow<T>(*line_sums + bias(col));
      } else {
        float values[kChunk<T>];
#pragma unroll
        for (int i = 0; i < kChunk<T>; ++i) values[i] = line_sums[i] + bias(col + i);
        store_chunk(pixel + col, kChunk<T>, true, values);
      }
    }
  }

  // nchw: neighbouring threads take neighbouring pixels.
  __device__ void store_channels(const float* sums, int first_line, int last_line) const {
    const int width = p_.result_chunk, units = kRows / width;
#pragma unroll 1
    for (int index = threadIdx.x; index < (last_line - first_line) * units; index += kBlockThreads) {
      const int line = first_line + index / units, at = index % units * width, col = place_.first_col + line;
      T* pixel = target(place_.first_row + at);
      if (pixel == nullptr || col >= p_.cols) continue;
      const float* line_sums = sums + line * kColPitch + at;
      const float shift = bias(col);
      pixel += col * p_.result_strides.c;
      if (width == 1) {
        *pixel = narrow<T>(*line_sums + shift);
      } else {
        float values[kChunk<T>];
#pragma unroll
        for (int i = 0; i < kChunk<T>; ++i) values[i] = line_sums[i] + shift;
        store_chunk(pixel, kChunk<T>, true, values);
      }
    }
  }

  const Problem<T>& p_;
  const PhaseDepth& phase_;
  const Place place_;
  const T* source_;
  const T* filters_;
  int swizzled_;
  const T* rows_[kRowLoads];  // of this thread's pixels: where their first tap would lie
  int h_[kRowLoads], w_[kRowLoads];
  const T* first_filter_;
  int filters_left_;
  float sums_[kSums] = {};
};

// Blocks are numbered by part, column tile, row tile, phase, group: those that read the same pixels run together.
template <class T, int kCols>
__global__ void __launch_bounds__(kBlockThreads) gather_wgmma(const __grid_constant__ Problem<T> problem) {
  __shared__ __align__(alignof(PhaseDepth)) unsigned char phase_bytes[sizeof(PhaseDepth)];
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
  // Of a block's phase in shared memory: registers are scarce.
  if (threadIdx.x == 0) *reinterpret_cast<PhaseDepth*>(phase_bytes) = problem.phase(place.phase);
  __syncthreads();
  Gemm<T, kCols> gemm(problem, *reinterpret_cast<const PhaseDepth*>(phase_bytes), place);
  gemm.run(dynamic_shared<unsigned char>());
}

// What the host works out of a shape, the same for forward and backward_input.
template <bool kForward>
struct Side {
  explicit Side(const Conv2dShape& s)
      : chunk(s.dtype == DType::float32 ? kChunk<float> : kChunk<__half>),
        element_bytes(kChunkBytes / chunk),
        depth_channels((kForward ? s.in_channels : s.out_channels) / s.groups),
        depth_chunks(ceil_div<int64_t>(depth_channels, chunk)),
        cols((kForward ? s.out_channels : s.in_channels) / s.groups),
        taps(s.kernel_h * s.kernel_w),
        source_plane(kForward ? s.in_h * s.in_w : s.out_h * s.out_w),
        result_plane(kForward ? s.out_h * s.out_w : s.in_h * s.in_w),
        phases(kForward ? 1 : s.stride_h * s.stride_w),
        rows(kForward ? s.batch * result_plane : s.batch * ceil_div(s.in_h, s.stride_h) * ceil_div(s.in_w, s.stride_w)),
        stages_source((s.layout == Layout::nchw && source_plane > 1 && depth_channels * s.groups > 1) || depth_channels % chunk != 0),
        stages_filters(!kForward || (s.weight_layout == Layout::nchw && taps > 1) || depth_channels % chunk != 0),
        parts(count_parts(s)),
        source_bytes(stages_source ? aligned(s.batch * source_plane * s.groups * depth_chunks * kChunkBytes) : 0),
        filter_bytes(stages_filters ? aligned(s.groups * cols * taps * depth_chunks * kChunkBytes) : 0) {}

  static int64_t aligned(int64_t bytes) { return ceil_div<int64_t>(bytes, 256) * 256; }

  // By how many blocks the depth is shared: as many as fill the device with a batch of 8, or leave each of them at most 32 steps where an
  // image is small; never so many that a block has fewer than 8.
  int count_parts(const Conv2dShape& s) const {
    const int64_t steps = ceil_div<int64_t>(depth_chunks * taps, kStepChunks) / phases;
    const int64_t sums = result_plane * cols * s.groups, few = 8 * kRows * 128;
    if (sums > few) return 1;
    const int64_t wanted = std::min(std::max(few / std::max<int64_t>(sums, 1), steps / 32), steps / 8);
    int count = 1;
    while (count < kMostParts && 2 * count <= wanted) count *= 2;
    return count;
  }

  // Columns of the tile: the sums do not depend on it.
  int tile_cols(const Conv2dShape& s) const {
    if (cols <= 32) return 32;
    const int64_t wide_tiles = ceil_div<int64_t>(rows, kRows) * ceil_div<int64_t>(cols, 128) * phases * s.groups * parts;
    return cols <= 64 || wide_tiles < kMultiprocessors ? 64 : 128;
  }

  int64_t chunk, element_bytes, depth_channels, depth_chunks, cols, taps, source_plane, result_plane, phases, rows;
  bool stages_source, stages_filters;
  int parts;
  int64_t source_bytes, filter_bytes;  // of the workspace
};

bool accepts(const Conv2dShape& s) {
  if (s.padding_mode != PaddingMode::zeros || !suits_mma(s)) return false;
  const int64_t chunk = s.dtype == DType::float32 ? kChunk<float> : kChunk<__half>;
  return s.groups == 1 || (s.in_channels / s.groups % chunk == 0 && s.out_channels / s.groups % chunk == 0);
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
  const int channels = static_cast<int>(side.depth_channels * s.groups), plane = static_cast<int>(side.source_plane);
  const int padded = s.groups == 1 ? static_cast<int>(side.depth_chunks * side.chunk) : channels;
  const bool nchw = s.layout == Layout::nchw;
  Transposition t{};
  t.outer = static_cast<int>(s.batch), t.inner = 1;
  t.along = channels, t.padded_along = padded, t.across = plane;
  t.source_outer = static_cast<int64_t>(channels) * plane;
  t.source_along = nchw ? plane : 1, t.source_across = nchw ? 1 : channels;
  t.target_outer = static_cast<int64_t>(padded) * plane, t.target_across = padded;
  return t;
}

// The filters -> [group][column][tap][depth channel].
template <bool kForward>
Transposition filter_order(const Conv2dShape& s, const Side<kForward>& side) {
  const int64_t group_in = s.in_channels / s.groups, group_out = s.out_channels / s.groups, padded = side.depth_chunks * side.chunk;
  const bool nchw = s.weight_layout == Layout::nchw;
  const int64_t channel = nchw ? side.taps : 1, tap = nchw ? 1 : group_in, output = group_in * side.taps;
  Transposition t{};
  t.along = static_cast<int>(side.depth_channels), t.padded_along = static_cast<int>(padded);
  if (kForward) {
    t.outer = static_cast<int>(s.out_channels), t.inner = 1, t.across = static_cast<int>(side.taps);
    t.source_outer = output, t.source_along = channel, t.source_across = tap;
    t.target_outer = side.taps * padded, t.target_across = padded;
  } else if (nchw) {  // (channel, tap) is one axis on both sides
    t.outer = static_cast<int>(s.groups), t.inner = 1, t.across = static_cast<int>(group_in * side.taps);
    t.source_outer = group_out * output, t.source_along = output, t.source_across = 1;
    t.target_outer = group_in * side.taps * padded, t.target_across = padded;
  } else {
    t.outer = static_cast<int>(s.groups), t.inner = static_cast<int>(side.taps), t.across = static_cast<int>(group_in);
    t.source_outer = group_out * output, t.source_inner = tap, t.source_along = output, t.source_across = channel;
    t.target_outer = group_in * side.taps * padded, t.target_inner = padded, t.target_across = side.taps * padded;
  }
  return t;
}

template <class T, bool kForward>
Problem<T> problem_of(const Conv2dShape& s, const Conv2dBuffers& b, const Side<kForward>& side, void* workspace) {
  const Conv2dGeometry g(s);
  const int64_t depth = side.depth_chunks * side.chunk;
  auto* filters = static_cast<unsigned char*>(workspace) + side.source_bytes;
  const Strides source = kForward ? g.in : g.out;
  const int64_t source_w = kForward ? s.in_w : s.out_w, padded = depth * s.groups;
  const int channel_chunks = static_cast<int>(side.depth_chunks), block_chunks = chunks_of_block(channel_chunks);
  const int cols = static_cast<int>(side.tile_cols(s));
  const GatherAxis h = kForward ? forward_axis(g.kernel_h, g.stride_h, g.pad_top, g.dilation_h) : GatherAxis{};
  const GatherAxis w = kForward ? forward_axis(g.kernel_w, g.stride_w, g.pad_left, g.dilation_w) : GatherAxis{};
  const void* plain_source = kForward ? b.input : b.grad_output;
  void* result = kForward ? b.output : b.grad_input;
  Problem<T> p{
      static_cast<const T*>(side.stages_source ? workspace : plain_source),
      static_cast<const T*>(side.stages_filters ? filters : b.weight),
      static_cast<const T*>(b.bias),
      static_cast<T*>(result),
      side.stages_source ? Strides{side.source_plane * padded, 1, source_w * padded, padded} : source,
      kForward ? g.out : g.in,
      depth,
      side.cols * side.taps * depth,
      side.cols * (kForward ? g.out.c : g.in.c),
      side.taps * depth,
      s.kernel_w * depth,
      depth,
      kForward ? g.in_h : g.out_h,
      kForward ? g.in_w : g.out_w,
      kForward ? g.out_h : g.in_h,
      kForward ? g.out_w : g.in_w,
      static_cast<int>(side.depth_channels),
      channel_chunks,
      block_chunks,
      static_cast<int>(side.cols),
      static_cast<int>(side.rows),
      kForward ? PlaneDecoder(g.out_h, g.out_w) : PlaneDecoder(ceil_div(g.in_h, g.stride_h), ceil_div(g.in_w, g.stride_w)),
      g,
      kForward,
      true,
      1,
      static_cast<int>(side.phases),
      g.groups,
      static_cast<int>(ceil_div<int64_t>(side.rows, kRows)),
      static_cast<int>(ceil_div<int64_t>(side.cols, cols)),
      side.parts,
      {h, w, DepthDecoder(channel_chunks, block_chunks, h.taps, w.taps)}};
  p.has_chunks = is_aligned(p.source) && is_aligned(p.filters);
  const int64_t neighbours = s.layout == Layout::nhwc ? side.cols : side.phases == 1 ? side.result_plane : 1;
  if (neighbours % side.chunk == 0 && is_aligned(p.result)) p.result_chunk = static_cast<int>(side.chunk);
  return p;
}

template <class T, int kCols>
void launch_tile(const Problem<T>& problem, int64_t blocks, cudaStream_t stream) {
  constexpr size_t kSumBytes = sizeof(float) * std::max(kRows * row_pitch(kCols), kCols * kColPitch);
  launch(gather_wgmma<T, kCols>, Grid(blocks, kBlockThreads, std::max(shared_bytes(kCols), kSumBytes), problem.parts), stream, problem);
}

template <class T, bool kForward>
void run_typed(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, cudaStream_t stream) {
  const Side<kForward> side(s);
  if (side.stages_source) launch_transposition<T>(source_order(s, side), kForward ? b.input : b.grad_output, workspace, stream);
  if (side.stages_filters) {
    launch_transposition<T>(filter_order(s, side), b.weight, static_cast<unsigned char*>(workspace) + side.source_bytes, stream);
  }
  const Problem<T> problem = problem_of<T>(s, b, side, workspace);
  const int64_t blocks = plan<kForward>(s).blocks;
  switch (side.tile_cols(s)) {
    case 32:
      return launch_tile<T, 32>(problem, blocks, stream);
    case 64:
      return launch_tile<T, 64>(problem, blocks, stream);
    default:
      return launch_tile<T, 128>(problem, blocks, stream);
  }
}

template <bool kForward>
void run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, cudaStream_t stream) {
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
    "conv2d_forward_wgmma_sm90a",
    90,
    Conv2dDirection::forward,
    accepts,
    plan<true>,
    run<true>,
    /*needs_proof=*/true,
    /*adds_bias=*/true,
    /*arch_specific=*/true};
extern const Conv2dKernel conv2d_backward_input_wgmma_sm90a = {"conv2d_backward_input_wgmma_sm90a",
                                                               90,
                                                               Conv2dDirection::backward_input,
                                                               accepts,
                                                               plan<false>,
                                                               run<false>,
                                                               /*needs_proof=*/true,
                                                               /*adds_bias=*/true,
                                                               /*arch_specific=*/true};

}  // namespace cnn_ext::cuda
