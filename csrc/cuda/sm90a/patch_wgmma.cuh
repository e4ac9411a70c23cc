// forward and backward_input with strides of 1 and few channels on the matrix unit of sm_90a, in TF32 (where the policy allows it),
// float16 and bfloat16: the implicit GEMM of gather_wgmma.cuh, which reads a pixel of the source once for all taps instead of once for
// each.
//
// The filters of a block's columns stay in shared memory. A warpgroup's tile is a rectangle of the result; the copy engine fetches the
// patch of the source that it reads, padding as zeros, line by line, so that the positions of the patch are one sequence, and the taps of
// position i of the result are positions i + r * pitch + s of the patch: the matrix unit multiplies 128 positions in a row for each tap,
// beginning where the tap lies. The positions between one line of the rectangle and the next are multiplied in vain. A 1x1 convolution
// has no lines: all pixels of the batch are one.
//
// Two warpgroups of a block have tiles of their own, the next patch of each on its way where memory suffices: while one of them stores, the
// other multiplies. Blocks stay, and take tile after tile.
//
// Order of additions: boxes of channels, r, s, channels of a box, by one warpgroup: nothing but the shape of the filters.
//
// Padding never multiplies: a sum that is NaN, and no other, is added up again, tap by tap without the padding, once it has been stored.
//
// Not handled: strides, groups, 1x1 in nchw, filters that leave no room for patches. Bound by shared memory, from which the matrix unit
// reads 64 rows for each 32 to 128 columns; by memory where there are few taps.
#pragma once

#include "cuda/sm90a/gather_wgmma.cuh"
#include "cuda/sm90a/row_sums.cuh"

namespace cnn_ext::cuda {

constexpr int kPatchRows = 2 * kWarpgroupRows;  // positions of a tile
constexpr int kPatchWorkers = 2;                // warpgroups of a block

template <class T>
struct PatchGather {
  WgmmaGather<T> gather;
  CUtensorMap patch_map;
  PlaneDecoder tile_decoder;
  FastDivisor pitch;             // positions of a line of the patch
  int tile_h, tile_w, tiles;     // the rectangle, and how many there are
  int box_bytes, fetched_bytes;  // of shared memory for one box of channels of a patch, and what is fetched of it
  int buffers;                   // patches of a worker: 2 where they fit
};

// Replaces what is NaN among this warp's rows of the stored tile.
template <class T, int kCols>
__device__ __noinline__ void store_again(const PatchGather<T>& p, PlaneIndex corner, int first_col) {
  const WgmmaGather<T>& g = p.gather;
  const int warp = threadIdx.x % kWarpgroupThreads / 32, lane = threadIdx.x % 32;
  for (int index = lane; index < 2 * 16 * kCols; index += 32) {
    const int row = index / kCols, col = first_col + index % kCols;
    const int position = row / 16 * kWarpgroupRows + warp * 16 + row % 16, h = p.pitch.quotient(position),
              w = position - h * p.pitch.divisor();
    if (h >= p.tile_h || w >= p.tile_w || corner.h + h >= g.result_h || corner.w + w >= g.result_w || col >= g.cols) continue;
    const int pixel = (corner.outer * g.result_h + corner.h + h) * g.result_w + corner.w + w;
    T* result = g.result + corner.outer * g.result_strides.n + (corner.h + h) * g.result_strides.h + (corner.w + w) * g.result_strides.w +
                col * g.result_strides.c;
    if (!isnan(widen(*result))) continue;
    const float bias = g.bias == nullptr ? 0 : widen(g.bias[col]);
    *result = narrow<T>(activated(sum_again(g, g.phase[0], 0, pixel, col) + bias, g.relu));
  }
}

// kBoxBytes: of the depth in a box. kAcross: whether filters lie across the depth.
template <class T, int kCols, int kBoxBytes, bool kAcross>
class PatchWorker {
 public:
  __device__ PatchWorker(const PatchGather<T>& problem, const unsigned char* filters, unsigned char* patches, uint64_t* barriers,
                         int first_col)
      : p_(problem), filters_(filters), patches_(patches), barriers_(barriers), first_col_(first_col) {}

  // Tiles first, first + step, ... barriers: one for each buffer. filters_barrier: passed when the filters are there.
  __device__ void run(int first, int step, uint64_t* filters_barrier) {
    const bool leads = threadIdx.x % kWarpgroupThreads == 0;
    if (leads && first < p_.tiles) fetch(first, 0);
    wait_barrier(filters_barrier, 0);
    Ring ring(p_.buffers);
    for (int tile = first; tile < p_.tiles; tile += step) {
      const int next = tile + step, buffer = ring.stage();
      const bool fetches = leads && next < p_.tiles;
      if (fetches && p_.buffers == 2) fetch(next, 1 - buffer);
      wait_barrier(barriers_ + buffer, ring.parity());
      multiply(patches_ + buffer * patch_bytes());
      named_barrier(1 + threadIdx.x / kWarpgroupThreads, kWarpgroupThreads);  // the patch has been read
      if (fetches && p_.buffers == 1) fetch(next, 0);
      store(p_.tile_decoder.at(tile));
      ring.advance();
    }
  }

 private:
  static constexpr int kBoxChannels = kBoxBytes / static_cast<int>(sizeof(T)), kFilterBytes = kCols * kBoxBytes;
  static constexpr int kPanel = kCols < kPanelCols ? kCols : kPanelCols;
  static constexpr int kFilterRowBytes = kAcross ? kPanel * static_cast<int>(sizeof(T)) : kBoxBytes;
  static constexpr int kFilterStep = kAcross ? kInstructionBytes / static_cast<int>(sizeof(T)) * kFilterRowBytes : kInstructionBytes;
  static constexpr int kPanelBytes = kAcross ? kBoxChannels * kFilterRowBytes : 16;
  static constexpr int kSums = kCols / 2;  // of a thread, for 64 rows

  __device__ int patch_bytes() const { return p_.gather.channel_boxes * p_.box_bytes; }

  __device__ PlaneIndex corner_of(const PlaneIndex& tile) const { return {tile.outer, tile.h * p_.tile_h, tile.w * p_.tile_w}; }

  __device__ void fetch(int tile, int buffer) const {
    const WgmmaGather<T>& g = p_.gather;
    const PlaneIndex corner = corner_of(p_.tile_decoder.at(tile));
    unsigned char* patch = patches_ + buffer * patch_bytes();
    announce(barriers_ + buffer, g.channel_boxes * p_.fetched_bytes);
    for (int box = 0; box < g.channel_boxes; ++box) {
      fetch_box(patch + box * p_.box_bytes, p_.patch_map, box * kBoxChannels, corner.w + g.phase[0].lowest_w,
                corner.h + g.phase[0].lowest_h, corner.outer, barriers_ + buffer);
    }
  }

  __device__ void multiply(const unsigned char* patch) {
    const PhaseDepth& depth = p_.gather.phase[0];
    const int pitch = p_.pitch.divisor();
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums_[0][i] = sums_[1][i] = 0;
    pin(sums_[0]);
    pin(sums_[1]);
    wgmma_fence();
    const unsigned char* filters = filters_;
#pragma unroll 1
    for (int box = 0; box < p_.gather.channel_boxes; ++box, patch += p_.box_bytes) {
#pragma unroll 1
      for (int r = 0; r < depth.h.taps; ++r) {
        const unsigned char* line = patch + tap_distance(depth.h, r) * pitch * kBoxBytes;
#pragma unroll 1
        for (int s = 0; s < depth.w.taps; ++s, filters += kFilterBytes) multiply_tap(line + tap_distance(depth.w, s) * kBoxBytes, filters);
      }
    }
    wgmma_commit();
    wgmma_wait<0>();
    pin(sums_[0]);
    pin(sums_[1]);
  }

  __device__ void multiply_tap(const unsigned char* positions, const unsigned char* filters) {
    const uint64_t a = matrix_descriptor<kBoxBytes>(positions, 16), b = matrix_descriptor<kFilterRowBytes>(filters, kPanelBytes);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < kBoxBytes / kInstructionBytes; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        wgmma<false, kAcross>(sums_[half], a + descriptor_offset(half * kWarpgroupRows * kBoxBytes + j * kInstructionBytes),
                              b + descriptor_offset(j * kFilterStep), T{});
      }
    }
  }

  // Where the line of a position of the tile lies; null where it has none.
  __device__ T* line_of(const PlaneIndex& corner, int position) const {
    const WgmmaGather<T>& g = p_.gather;
    const int tile_h = p_.pitch.quotient(position), tile_w = position - tile_h * p_.pitch.divisor();
    const int h = corner.h + tile_h, w = corner.w + tile_w;
    if (tile_h >= p_.tile_h || tile_w >= p_.tile_w || h >= g.result_h || w >= g.result_w) return nullptr;
    return g.result + corner.outer * g.result_strides.n + h * g.result_strides.h + w * g.result_strides.w;
  }

  __device__ void store(const PlaneIndex& tile) {
    const WgmmaGather<T>& g = p_.gather;
    const bool has_lines = g.result_strides.c == 1;
    const RowTarget<T> target{
        g.bias, g.relu, first_col_, g.cols, static_cast<int>(g.result_strides.c), has_lines && g.result_chunk > 1, g.result_pairs};
    const PlaneIndex corner = corner_of(tile);
    const int row = threadIdx.x % kWarpgroupThreads / 32 * 16 + threadIdx.x % 32 / 4;
    bool meets_nan = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      finish_sums(target, sums_[half]);
      meets_nan |= store_line<0>(target, line_of(corner, half * kWarpgroupRows + row), sums_[half]);
      meets_nan |= store_line<1>(target, line_of(corner, half * kWarpgroupRows + row + 8), sums_[half]);
    }
    if (__any_sync(0xFFFFFFFF, meets_nan)) {
      __syncwarp();
      store_again<T, kCols>(p_, corner, first_col_);
    }
  }

  const PatchGather<T>& p_;
  const unsigned char* filters_;
  unsigned char* patches_;
  uint64_t* barriers_;
  const int first_col_;
  float sums_[2][kSums];
};

// Fetches the filters of the columns, in the order of the products.
template <class T, int kCols, int kBoxBytes, bool kAcross>
__device__ void fetch_filters(const PatchGather<T>& p, unsigned char* filters, int first_col, uint64_t* barrier) {
  constexpr int kPanel = kCols < kPanelCols ? kCols : kPanelCols, kBoxChannels = kBoxBytes / static_cast<int>(sizeof(T));
  const PhaseDepth& depth = p.gather.phase[0];
  announce(barrier, depth.boxes * kCols * kBoxBytes);
  for (int box = 0; box < p.gather.channel_boxes; ++box) {
    for (int r = 0; r < depth.h.taps; ++r) {
      for (int s = 0; s < depth.w.taps; ++s, filters += kCols * kBoxBytes) {
        const int tap = (depth.h.first_tap + r * depth.h.tap_distance) * p.gather.kernel_w + depth.w.first_tap + s * depth.w.tap_distance;
        if constexpr (kAcross) {
          for (int col = 0; col < kCols; col += kPanel) {
            fetch_box(filters + col * kBoxBytes, p.gather.filter_map, first_col + col, tap, box * kBoxChannels, 0, barrier);
          }
        } else {
          fetch_box(filters, p.gather.filter_map, box * kBoxChannels, tap, first_col, 0, barrier);
        }
      }
    }
  }
}

// Blocks are numbered by column tile, then by who takes which tiles.
template <class T, int kCols, int kBoxBytes, bool kAcross>
__global__ void __launch_bounds__(kBlockThreads, kCols <= 64 ? 2 : 1) patch_wgmma(const __grid_constant__ PatchGather<T> p) {
  __shared__ __align__(8) uint64_t barriers[1 + 2 * kPatchWorkers];
  if (threadIdx.x == 0) {
    prefetch_map(p.patch_map);
    prefetch_map(p.gather.filter_map);
  }
  init_pipeline(barriers, 1 + 2 * kPatchWorkers);
  wait_for_launch_before();
  const int col_tile = blockIdx.x % p.gather.col_tiles, block = blockIdx.x / p.gather.col_tiles, blocks = gridDim.x / p.gather.col_tiles;
  const int worker = threadIdx.x / kWarpgroupThreads, first_col = col_tile * kCols;
  unsigned char* filters = dynamic_shared<unsigned char>();
  if (threadIdx.x == 0) fetch_filters<T, kCols, kBoxBytes, kAcross>(p, filters, first_col, barriers);
  unsigned char* patches =
      filters + p.gather.phase[0].boxes * kCols * kBoxBytes + worker * p.buffers * p.gather.channel_boxes * p.box_bytes;
  PatchWorker<T, kCols, kBoxBytes, kAcross>(p, filters, patches, barriers + 1 + 2 * worker, first_col)
      .run(block * kPatchWorkers + worker, blocks * kPatchWorkers, barriers);
}

}  // namespace cnn_ext::cuda
