// The main loop of the convolutions on tensor cores: C[row, col] = sum over depth of A[row, depth] * B[col, depth], an implicit GEMM whose
// operands are read from the tensors themselves. What rows, columns and depth mean is told by two operands and a store (gather_mma.cuh,
// conv2d_backward_weight_mma.cu).
//
// The unit of everything is a chunk: 16 bytes of neighbouring channels, 8 in 16 bits, 4 in float32. Where the channels lie side by side
// (nhwc) and are aligned, a chunk is one asynchronous copy to shared memory (VectorLoader); everywhere else, in nchw above all, a thread
// gathers it element by element, neighbouring threads at neighbouring pixels, and the transposition costs nothing (ElementLoader). Both
// stage the same values in the same places, so the sums have the same bits. Channels are padded to whole chunks with zeros on both sides.
//
// Tile: 256 threads are 8 warps; 128 x 128 gives each warp 64 x 32 sums (64 registers a thread, six fragment reads for 16 instructions),
// 128 x 64, for at most 64 columns, 32 x 32. A step of the depth is 4 chunks, two instructions deep; 4 stages are in flight, 68 KB, so that
// two blocks share a multiprocessor.
//
// Order of additions: the tensor core adds up an output from depth_begin to depth_end, one instruction after the other, whatever the tile,
// the loader and the neighbours are.
//
// Padding never multiplies: padded elements are staged as zeros, and a zero times an infinity or a NaN of the other operand shows as a
// NaN in the sum. Such a sum, and no other, is added up again, tap by tap without the padding, before it is stored.
//
// float32 is multiplied as TF32 or, strictly, as three products of TF32; float64 as it is (mma_fragments.cuh). Bound by the tensor cores in
// nhwc, by the issue of loads where chunks are gathered.
#pragma once

#include <type_traits>

#include "cuda/chunk_loaders.cuh"
#include "cuda/common.cuh"
#include "cuda/mma_fragments.cuh"
#include "cuda/primitives.cuh"

namespace cnn_ext::cuda {

// kTerms: the products on tensor cores that make up one (mma_fragments.cuh).
// kGroups: groups of a convolution side by side, each with its part of the rows, all of its columns, and sums in these alone.
template <int kRows_, int kCols_, int kWarpRows_, int kTerms_ = 1, int kGroups_ = 1>
struct MmaTile {
  static constexpr int kRows = kRows_, kCols = kCols_, kWarpRows = kWarpRows_, kTerms = kTerms_, kGroups = kGroups_;
  static constexpr int kGroupRows = kRows / kGroups, kGroupCols = kCols / kGroups;
  static constexpr int kWarpCols = smaller(kGroupCols, 32), kRowWarps = kGroupCols / kWarpCols;  // side by side
  static constexpr int kStages = kGroups == 1 ? 4 : 3;
  static_assert(kRows / kWarpRows * kRowWarps * 32 == kBlockThreads);

  // What a row or column of the product is: a member of a group, counted from the block's first one.
  // Whether the tile's group `group` is one of the `groups` that are left from its first one on.
  CNN_EXT_HOST_DEVICE static bool has_group(int group, int groups) { return kGroups == 1 || group < groups; }
  CNN_EXT_HOST_DEVICE static int row_group(int row) { return kGroups == 1 ? 0 : row / kGroupRows % kGroups; }
  CNN_EXT_HOST_DEVICE static int row_member(int row) { return kGroups == 1 ? row : row / kRows * kGroupRows + row % kGroupRows; }
  CNN_EXT_HOST_DEVICE static int col_group(int col) { return kGroups == 1 ? 0 : col / kGroupCols; }
  CNN_EXT_HOST_DEVICE static int col_member(int col) { return kGroups == 1 ? col : col % kGroupCols; }

  // The sums on their way out lie in shared memory, [rows][columns of a group + 8] or [columns of a group][rows + 4]: no bank twice.
  static constexpr int kRowPitch = kGroupCols + 8, kColPitch = kRows + 4;
  static constexpr size_t kRowTileBytes = kRows * kStepBytes + kTilePadding, kColTileBytes = kCols * kStepBytes + kTilePadding;
  static constexpr size_t kStageBytes = kRowTileBytes + kColTileBytes;
  static constexpr size_t kSums = larger(kRows * kRowPitch, kGroupCols* kColPitch);
  template <class T>
  static constexpr size_t kSumBytes = sizeof(Accumulate<T>) * kSums;
  template <class T>
  static constexpr size_t kSharedBytes = kStages * kStageBytes > kSumBytes<T> ? kStages * kStageBytes : kSumBytes<T>;
};
using WideMmaTile = MmaTile<128, 128, 64>;
using NarrowMmaTile = MmaTile<128, 64, 32>;
using SplitMmaTile = MmaTile<128, 64, 32, 3>;
using GroupsMmaTile = MmaTile<256, 64, 32, 1, 4>;  // four groups of 64 rows and 16 columns

// Blocks that share a multiprocessor, as registers allow: for the kernels' launch bounds.
template <class Tile, class T>
constexpr int kMmaBlocks = Tile::kTerms > 1 || Tile::kGroups > 1 || sizeof(T) == 8 ? 1 : 2;

inline bool has_few_cols(int64_t cols) { return cols <= NarrowMmaTile::kCols; }

// Whether fragments of an operand across the depth are read word by word: no instruction transposes those of TF32. The addresses take
// registers that the wide tile does not have to spare.
inline bool reads_words_across(DType dtype) { return dtype == DType::float32; }

// Stores offer
//   kChunks                                       whether they take chunks of kChunk neighbouring columns, or single sums
//   bool along_rows()                             single sums: whether neighbouring rows are neighbours in memory
//   void store(int row, int col, const Sum*)      takes a sum, or kChunk of them; ignores what lies beyond the last row or column
template <class Tile, class RowLoader, class ColLoader>
class MmaGemm {
 public:
  using Rows = typename RowLoader::Operand;
  using Cols = typename ColLoader::Operand;
  using T = typename Rows::Element;
  using Sum = Accumulate<T>;

  // channels_first: whether neighbouring threads of an element loader take neighbouring channels, or pixels.
  __device__ MmaGemm(const Rows& rows, const Cols& cols, int first_row, int first_col, bool channels_first)
      : rows_(rows),
        cols_(cols),
        row_loader_(rows, first_row, channels_first),
        col_loader_(cols, first_col, channels_first),
        first_row_(first_row),
        first_col_(first_col) {}

  template <class Store>
  __device__ void run(int depth_begin, int depth_end, const Store& store) {
    unsigned char* shared = dynamic_shared<unsigned char>();
    accumulate(shared, depth_begin, depth_end);
    cp_async_wait<0>();
    __syncthreads();
    Sum* sums = reinterpret_cast<Sum*>(shared);
    const bool along_rows = !Store::kChunks && store.along_rows();
    const int row_pitch = along_rows ? 1 : Tile::kRowPitch, col_pitch = along_rows ? Tile::kColPitch : 1;
    const bool meets_nan = write_sums(sums, row_pitch, col_pitch);
    if (__syncthreads_or(meets_nan)) {
      add_up_again(sums, row_pitch, col_pitch, depth_begin, depth_end);
      __syncthreads();
    }
    store_sums(sums, along_rows, store);
  }

 private:
  static constexpr int kDepth = kStepDepth<T>, kStages = Tile::kStages;
  static constexpr int kWarpRows = Tile::kWarpRows, kWarpCols = Tile::kWarpCols;
  __device__ static int warp_row() { return threadIdx.x / 32 / Tile::kRowWarps * kWarpRows; }
  __device__ static int warp_group_col() { return threadIdx.x / 32 % Tile::kRowWarps * kWarpCols; }
  __device__ static int warp_col() { return Tile::row_group(warp_row()) * Tile::kGroupCols + warp_group_col(); }

  __device__ static unsigned char* row_tile(unsigned char* shared, int step) { return shared + step % kStages * Tile::kStageBytes; }
  __device__ static unsigned char* col_tile(unsigned char* shared, int step) { return row_tile(shared, step) + Tile::kRowTileBytes; }

  __device__ void begin(unsigned char* shared, int step, int depth_begin) {
    row_loader_.begin(depth_begin + step * kDepth, row_tile(shared, step));
    col_loader_.begin(depth_begin + step * kDepth, col_tile(shared, step));
  }
  __device__ void finish(unsigned char* shared, int step) {
    row_loader_.finish(row_tile(shared, step));
    col_loader_.finish(col_tile(shared, step));
  }

  __device__ void accumulate(unsigned char* shared, int depth_begin, int depth_end) {
    const int steps = ceil_div(depth_end - depth_begin, kDepth);
    for (int step = 0; step < kStages - 1; ++step) {
      if (step < steps) {
        begin(shared, step, depth_begin);
        finish(shared, step);
      }
      cp_async_commit();
    }
    for (int step = 0; step < steps; ++step) {
      cp_async_wait<kStages - 2>();
      __syncthreads();
      const int next = step + kStages - 1;  // its stage was read last in the step before
      if (next < steps) begin(shared, next, depth_begin);
      cp_async_commit();
      multiply(row_tile(shared, step), col_tile(shared, step));
      if (next < steps) finish(shared, next);
    }
  }

  __device__ void multiply(const unsigned char* rows, const unsigned char* cols) {
    using Fragments = MmaFragments<T, Tile::kTerms>;
    constexpr int kColWords = Fragments::kWords / 2;  // of 8 columns
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      typename Fragments::Register b[kWarpCols / 8][kColWords];
#pragma unroll
      for (int j = 0; j < kWarpCols / 16; ++j) {
        typename Fragments::Register pair[2 * kColWords];
        Fragments::template read<Cols, Tile::kCols, 1>(pair, cols, warp_col() + j * 16, step);
#pragma unroll
        for (int i = 0; i < kColWords; ++i) b[2 * j][i] = pair[i], b[2 * j + 1][i] = pair[kColWords + i];
      }
#pragma unroll
      for (int i = 0; i < kWarpRows / 16; ++i) {
        typename Fragments::Register a[Fragments::kWords];
        Fragments::template read<Rows, Tile::kRows, 0>(a, rows, warp_row() + i * 16, step);
        Fragments::multiply(sums_[i], a, b);
      }
    }
  }

  // Registers -> shared memory. Whether there is a NaN among this thread's sums.
  __device__ bool write_sums(Sum* sums, int row_pitch, int col_pitch) const {
    const int lane = threadIdx.x % 32;
    Sum* corner = sums + (warp_row() + lane / 4) * row_pitch + (warp_group_col() + lane % 4 * 2) * col_pitch;
    bool meets_nan = false;
#pragma unroll
    for (int i = 0; i < kWarpRows / 16; ++i) {
#pragma unroll
      for (int j = 0; j < kWarpCols / 8; ++j) {
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          corner[(i * 16 + v / 2 * 8) * row_pitch + (j * 8 + v % 2) * col_pitch] = sums_[i][j][v];
          meets_nan = meets_nan || isnan(sums_[i][j][v]);
        }
      }
    }
    return meets_nan;
  }

  // The element of an operand, if it exists.
  template <class Operand>
  __device__ static bool read(const Operand& operand, int extent, int depth, Sum& value) {
    const int channel = (Operand::kAlongDepth ? depth : extent) % kChunk<T>;
    const Place e = operand.at_extent(Operand::kAlongDepth ? extent : extent - channel);
    const Place d = operand.at_depth(Operand::kAlongDepth ? depth - channel : depth);
    if (!is_inside(operand, e, d) || channel >= chunk_channels<Operand>(e, d)) return false;
    value = fetch_element(operand, e, d, channel);
    return true;
  }

  // The product's column of a sum: row and col as the sums lie in shared memory.
  __device__ int col_of(int row, int col) const { return first_col_ + Tile::row_group(row) * Tile::kGroupCols + col; }

  // Replaces every sum that is NaN by that of the products that exist.
  __device__ void add_up_again(Sum* sums, int row_pitch, int col_pitch, int depth_begin, int depth_end) const {
#pragma unroll 1
    for (int index = threadIdx.x; index < Tile::kRows * Tile::kGroupCols; index += kBlockThreads) {
      const int row = index / Tile::kGroupCols, col = index % Tile::kGroupCols;
      Sum* sum = sums + row * row_pitch + col * col_pitch;
      if (!isnan(*sum)) continue;
      Sum exact = 0;
#pragma unroll 1
      for (int depth = depth_begin; depth < depth_end; ++depth) {
        Sum a, b;
        if (read(rows_, first_row_ + row, depth, a) && read(cols_, col_of(row, col), depth, b)) exact = fma(a, b, exact);
      }
      *sum = exact;
    }
  }

  template <class Store>
  __device__ void store_sums(const Sum* sums, bool along_rows, const Store& store) const {
    if constexpr (Store::kChunks) {
      constexpr int kChunkCols = Tile::kGroupCols / kChunk<T>;
#pragma unroll 1
      for (int index = threadIdx.x; index < Tile::kRows * kChunkCols; index += kBlockThreads) {
        const int row = index / kChunkCols, col = index % kChunkCols * kChunk<T>;
        store.store(first_row_ + row, col_of(row, col), sums + row * Tile::kRowPitch + col);
      }
    } else {
      const int inner = along_rows ? Tile::kRows : Tile::kGroupCols;
      const int row_pitch = along_rows ? 1 : Tile::kRowPitch, col_pitch = along_rows ? Tile::kColPitch : 1;
#pragma unroll 1
      for (int index = threadIdx.x; index < Tile::kRows * Tile::kGroupCols; index += kBlockThreads) {
        const int across = index / inner, along = index % inner;
        const int row = along_rows ? along : across, col = along_rows ? across : along;
        store.store(first_row_ + row, col_of(row, col), sums + row * row_pitch + col * col_pitch);
      }
    }
  }

  const Rows& rows_;
  const Cols& cols_;
  RowLoader row_loader_;
  ColLoader col_loader_;
  const int first_row_, first_col_;
  Sum sums_[kWarpRows / 16][kWarpCols / 8][4] = {};
};

}  // namespace cnn_ext::cuda
