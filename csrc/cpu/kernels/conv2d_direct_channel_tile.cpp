// The register tile of output channels in the lanes (ChannelTile): 32 registers hold 28 accumulators, 16 hold 12.
#include "cpu/kernels/conv2d_direct_steps.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

template <class T, int kVectors, int kRows, int kCols>
__attribute__((noinline)) void channel_tile(const TileTask<T>& task) {
  constexpr int kV = kLanes<T>, kPoints = kRows * kCols;
  Vec<T> sum[kPoints][kVectors] = {};
  const T* const staged = task.staged;
  const int64_t row_step = task.row_step;
  for_steps<kVectors * kV>(task, [&](int64_t offset, const T* weights) __attribute__((always_inline)) {
    const T* in = at_offset(staged, offset);
    Vec<T> weight[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) weight[v] = load(weights + v * kV);
#pragma GCC unroll 28
    for (int i = 0; i < kPoints; ++i) {
      const Vec<T> x = broadcast_from(in + (i / kCols) * row_step + i % kCols);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) accumulate(sum[i][v], x, weight[v]);
    }
  });
  const auto write = [&](const auto& store_last) __attribute__((always_inline)) {
#pragma GCC unroll 28
    for (int i = 0; i < kPoints; ++i) {
      const T* from = task.before + i / kCols * task.before_row_pitch + i % kCols * task.before_pitch;
      T* to = task.out + i / kCols * task.row_pitch + i % kCols * task.pitch;
      if constexpr (kVectors == 2) store(to, load(from) + sum[i][0]);
      store_last(to + (kVectors - 1) * kV, load(from + (kVectors - 1) * kV) + sum[i][kVectors - 1]);
    }
  };
  const int last = task.last;
  if (last == kV) {
    write([](T* to, Vec<T> total) __attribute__((always_inline)) { store(to, total); });
  } else {
    write([last](T* to, Vec<T> total) __attribute__((always_inline)) { store_first(to, total, last); });
  }
}

template <int kVectors, int kRows, int kCols, class T>
void run_cols(const TileTask<T>& task, int cols) {
  if (cols == kCols) return channel_tile<T, kVectors, kRows, kCols>(task);
  if constexpr (kCols > 1) run_cols<kVectors, kRows, kCols - 1>(task, cols);
}

template <int kVectors, class T>
void run_rows(const TileTask<T>& task, int rows, int cols) {
  constexpr int kPoints = kAccumulators / 2;
  rows == 1 ? run_cols<kVectors, 1, kPoints>(task, cols) : run_cols<kVectors, 2, kPoints / kVectors>(task, cols);
}

template <class T>
void run(const TileTask<T>& task, int vectors, int rows, int cols) {
  vectors == 1 ? run_rows<1>(task, rows, cols) : run_rows<2>(task, rows, cols);
}

}  // namespace

void run_channel_tile(const TileTask<float>& task, int vectors, int rows, int cols) { run(task, vectors, rows, cols); }
void run_channel_tile(const TileTask<double>& task, int vectors, int rows, int cols) { run(task, vectors, rows, cols); }

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
