// The main loop of the dense convolutions: C[row, col] = sum over depth of A[row, depth] * B[depth, col], where A is read plainly and B is
// gathered from a tensor with padding, without ever being written out (an implicit GEMM). What rows, columns and depth mean is told by an
// `Operands` class; there is one for each direction.
//
// Tile: 256 threads compute kRows x kCols outputs, 4 x 4 each, and walk the depth in steps of kDepth. Two 16-byte reads of shared memory
// feed 16 multiplications; 16 sums, 8 operands, the positions and the values fetched ahead fit 128 registers in float32, so two blocks
// share a multiprocessor and hide each other's barriers. 64 x 64 x 16 serves wide layers, 32 x 128 x 8 those of at most 32 rows. The next
// step's values are fetched into registers while the present ones are multiplied.
//
// Order of additions: one thread adds up one output from depth_begin to depth_end, one fused multiplication after the other. The order
// depends on neither the tile, the grid nor the neighbours.
//
// Padding never multiplies: padded elements of B are staged as zeros, which is right as long as A is finite. While A is staged each thread
// looks at what it stores, and the barrier that follows anyway tells every thread whether anything was infinite or NaN. Only then that step
// takes the masked path, which leaves the padded products out one by one. (A zero product changes no sum but the sign of a zero.)
//
// Not handled: tensor cores; vector loads from global memory.
#pragma once

#include "cuda/common.cuh"

namespace cnn_ext::cuda {

// Blocks that share a multiprocessor's registers: for the kernels' launch bounds.
template <class Acc>
constexpr int kResidentBlocks = sizeof(Acc) == sizeof(double) ? 1 : 2;

template <int kRows_, int kCols_, int kDepth_>
struct GemmTile {
  static constexpr int kRows = kRows_, kCols = kCols_, kDepth = kDepth_;
  static constexpr int kThreadRows = 4, kThreadCols = 4;
  static_assert(kRows / kThreadRows * (kCols / kThreadCols) == kBlockThreads);
};
using SquareTile = GemmTile<64, 64, 16>;
using FlatTile = GemmTile<32, 128, 8>;

inline bool has_few_rows(int64_t rows) { return rows <= FlatTile::kRows; }

// Which elements of a depth x extent tile a thread stages: kLoads of them, kBlockThreads apart, numbered along the depth or across it,
// whichever direction is contiguous in global memory.
template <int kExtent, int kDepth, bool kAlongDepth>
struct Staging {
  static constexpr int kLoads = kExtent * kDepth / kBlockThreads;
  static_assert(kLoads * kBlockThreads == kExtent * kDepth);
  __device__ static int depth(int load) {
    const int element = load * kBlockThreads + threadIdx.x;
    return kAlongDepth ? element % kDepth : element / kExtent;
  }
  __device__ static int across(int load) {
    const int element = load * kBlockThreads + threadIdx.x;
    return kAlongDepth ? element / kDepth : element % kExtent;
  }
};

// A tile of an operand in shared memory. The padding of 16 bytes keeps the rows aligned for vector reads and spreads the banks.
template <class Acc, int kExtent, int kDepth>
struct __align__(16) StagedTile {
  Acc values[kDepth][kExtent + 16 / sizeof(Acc)];
};

template <int kCount, class Acc>
__device__ void read_fragment(const Acc* staged, Acc (&fragment)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) fragment[i] = staged[i];
}

// Operands offers
//   Acc                                  the type of sums
//   kRowsAlongDepth, kColsAlongDepth     in which direction A and B are contiguous
//   Row row(int), Col col(int)           what a thread remembers of a row or a column; one beyond the last reads as zeros
//   Depth depth(int)                     a position of the sum, below depth_end
//   Acc load_row(Row, Depth)             an element of A
//   bool inside(Col, Depth)              whether an element of B exists, or is padding
//   Acc load_col(Col, Depth)             an element of B that exists
//   void store(int row, int col, sums)   takes the sums of kThreadCols neighbouring columns, or ignores those beyond the last row or column
template <class Tile, class Operands>
class ImplicitGemm {
 public:
  using Acc = typename Operands::Acc;
  using RowStaging = Staging<Tile::kRows, Tile::kDepth, Operands::kRowsAlongDepth>;
  using ColStaging = Staging<Tile::kCols, Tile::kDepth, Operands::kColsAlongDepth>;
  using RowTile = StagedTile<Acc, Tile::kRows, Tile::kDepth>;
  using ColTile = StagedTile<Acc, Tile::kCols, Tile::kDepth>;

  __device__ ImplicitGemm(const Operands& operands, int first_row, int first_col, int depth_begin, int depth_end)
      : operands_(operands), first_row_(first_row), first_col_(first_col), depth_begin_(depth_begin), depth_end_(depth_end) {
#pragma unroll
    for (int i = 0; i < RowStaging::kLoads; ++i) rows_[i] = operands.row(first_row + RowStaging::across(i));
#pragma unroll
    for (int j = 0; j < ColStaging::kLoads; ++j) cols_[j] = operands.col(first_col + ColStaging::across(j));
  }

  __device__ void run() {
    __shared__ RowTile staged_rows;
    __shared__ ColTile staged_cols;
    fetch(depth_begin_);
    for (int base = depth_begin_; base < depth_end_; base += kDepth) {
      const bool finite = stage(staged_rows, staged_cols);
      const bool masked = __syncthreads_or(!finite);
      if (base + kDepth < depth_end_) fetch(base + kDepth);
      if (masked) {
        accumulate_masked(staged_rows, staged_cols, base);
      } else {
        accumulate(staged_rows, staged_cols);
      }
      __syncthreads();
    }
    store();
  }

 private:
  static constexpr int kDepth = Tile::kDepth, kThreadRows = Tile::kThreadRows, kThreadCols = Tile::kThreadCols;
  __device__ static int thread_row() { return threadIdx.x / (Tile::kCols / kThreadCols) * kThreadRows; }
  __device__ static int thread_col() { return threadIdx.x % (Tile::kCols / kThreadCols) * kThreadCols; }

  __device__ bool is_inside(int load, int base) const {
    const int depth = base + ColStaging::depth(load);
    return depth < depth_end_ && operands_.inside(cols_[load], operands_.depth(depth));
  }

  // Global memory -> registers.
  __device__ void fetch(int base) {
#pragma unroll
    for (int i = 0; i < RowStaging::kLoads; ++i) {
      const int depth = base + RowStaging::depth(i);
      fetched_rows_[i] = depth < depth_end_ ? operands_.load_row(rows_[i], operands_.depth(depth)) : Acc{0};
    }
#pragma unroll
    for (int j = 0; j < ColStaging::kLoads; ++j) {
      const int depth = base + ColStaging::depth(j);
      fetched_cols_[j] = is_inside(j, base) ? operands_.load_col(cols_[j], operands_.depth(depth)) : Acc{0};
    }
  }

  // Registers -> shared memory. Whether all of A that this thread staged is finite.
  __device__ bool stage(RowTile& rows, ColTile& cols) const {
    bool finite = true;
#pragma unroll
    for (int i = 0; i < RowStaging::kLoads; ++i) {
      rows.values[RowStaging::depth(i)][RowStaging::across(i)] = fetched_rows_[i];
      finite = finite && isfinite(fetched_rows_[i]);
    }
#pragma unroll
    for (int j = 0; j < ColStaging::kLoads; ++j) cols.values[ColStaging::depth(j)][ColStaging::across(j)] = fetched_cols_[j];
    return finite;
  }

  __device__ void accumulate(const RowTile& rows, const ColTile& cols) {
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      Acc a[kThreadRows], b[kThreadCols];
      read_fragment(&rows.values[d][thread_row()], a);
      read_fragment(&cols.values[d][thread_col()], b);
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
        for (int j = 0; j < kThreadCols; ++j) sums_[i][j] = fma(a[i], b[j], sums_[i][j]);
      }
    }
  }

  // The same sums in the same order without the products with padding. All threads of the block come here together.
  __device__ void accumulate_masked(const RowTile& rows, const ColTile& cols, int base) {
    __shared__ bool inside[kDepth][Tile::kCols];
#pragma unroll
    for (int j = 0; j < ColStaging::kLoads; ++j) inside[ColStaging::depth(j)][ColStaging::across(j)] = is_inside(j, base);
    __syncthreads();
#pragma unroll 1
    for (int d = 0; d < kDepth; ++d) {
      Acc a[kThreadRows], b[kThreadCols];
      read_fragment(&rows.values[d][thread_row()], a);
      read_fragment(&cols.values[d][thread_col()], b);
#pragma unroll
      for (int j = 0; j < kThreadCols; ++j) {
        const bool exists = inside[d][thread_col() + j];
#pragma unroll
        for (int i = 0; i < kThreadRows; ++i) sums_[i][j] = exists ? fma(a[i], b[j], sums_[i][j]) : sums_[i][j];
      }
    }
  }

  __device__ void store() const {
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) operands_.store(first_row_ + thread_row() + i, first_col_ + thread_col(), sums_[i]);
  }

  const Operands& operands_;
  const int first_row_, first_col_, depth_begin_, depth_end_;
  typename Operands::Row rows_[RowStaging::kLoads];
  typename Operands::Col cols_[ColStaging::kLoads];
  Acc fetched_rows_[RowStaging::kLoads], fetched_cols_[ColStaging::kLoads];
  Acc sums_[kThreadRows][kThreadCols] = {};
};

}  // namespace cnn_ext::cuda
