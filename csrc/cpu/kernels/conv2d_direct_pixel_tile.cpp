// The register tile of grid points in the lanes (PixelTile): 32 registers hold 28 accumulators, 16 hold 12.
#include "cpu/kernels/conv2d_direct_steps.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

// Adds a tile's sums to what is before them, a bias or other sums, and writes them. Each case is straight code: beside short sums, this is
// a large part of what a tile does.
template <int kVectors, class T, int kPoints, int kWidth>
inline __attribute__((always_inline)) void write_sums(const TileTask<T>& task, const Vec<T> (&sum)[kPoints][kWidth]) {
  constexpr int kV = kLanes<T>, kLast = (kVectors - 1) * kV;
  const auto write = [&](const auto& before, const auto& store_last) __attribute__((always_inline)) {
    const int64_t pitch = task.pitch, row_pitch = task.row_pitch;
    T* to = task.out;
#pragma GCC unroll 14
    for (int k = 0; k < kWidth; ++k, to += pitch) {
#pragma GCC unroll 4
      for (int r = 0; r < kPoints / kVectors; ++r) {
        T* const row = to + r * row_pitch;
        if constexpr (kVectors == 2) store(row, before(k, r, 0) + sum[2 * r][k]);
        store_last(row + kLast, before(k, r, kLast) + sum[kVectors * (r + 1) - 1][k]);
      }
    }
  };
  const int last = task.last;
  const auto write_after = [&](const auto& before) __attribute__((always_inline)) {
    if (last == kV) {
      write(before, [](T* to, Vec<T> total) __attribute__((always_inline)) { store(to, total); });
    } else {
      write(before, [last](T* to, Vec<T> total) __attribute__((always_inline)) { store_first(to, total, last); });
    }
  };
  if (const T* const bias = task.bias; bias != nullptr) {
    write_after([bias](int k, int, int) __attribute__((always_inline)) { return broadcast_from(bias + k); });
  } else {
    const T* const sums = task.before;
    const int64_t pitch = task.before_pitch, row_pitch = task.before_row_pitch;
    write_after([=](int k, int r, int column) __attribute__((always_inline)) { return load(sums + k * pitch + r * row_pitch + column); });
  }
}

template <class T, int kWidth, int kRows, int kVectors>
__attribute__((noinline)) void pixel_tile(const TileTask<T>& task) {
  constexpr int kV = kLanes<T>, kPoints = kRows * kVectors;
  Vec<T> sum[kPoints][kWidth] = {};
  const T* const staged = task.staged;
  const int64_t row_step = task.row_step;
  for_steps<kWidth, kVectors>(task, [&](int64_t offset, const T* weights) __attribute__((always_inline)) {
    const T* in = at_offset(staged, offset);
    if constexpr (kWidth < kPoints) {
      Vec<T> weight[kWidth];
#pragma GCC unroll 14
      for (int k = 0; k < kWidth; ++k) weight[k] = broadcast_from(weights + k);
#pragma GCC unroll 8
      for (int p = 0; p < kPoints; ++p) {
        const Vec<T> x = load(in + p / kVectors * row_step + p % kVectors * kV);
#pragma GCC unroll 14
        for (int k = 0; k < kWidth; ++k) accumulate(sum[p][k], x, weight[k]);
      }
    } else {
      Vec<T> x[kPoints];
#pragma GCC unroll 8
      for (int p = 0; p < kPoints; ++p) x[p] = load(in + p / kVectors * row_step + p % kVectors * kV);
#pragma GCC unroll 14
      for (int k = 0; k < kWidth; ++k) {
        const Vec<T> weight = broadcast_from(weights + k);
#pragma GCC unroll 8
        for (int p = 0; p < kPoints; ++p) accumulate(sum[p][k], x[p], weight);
      }
    }
  });
  if constexpr (kVectorRegisters == 32) {
    const T* const bias = task.bias;
    const int last = task.last;
#pragma GCC unroll 14
    for (int k = 0; k < kWidth; ++k) {
      const Vec<T> offset = bias != nullptr ? broadcast_from(bias + k) : Vec<T>{};
#pragma GCC unroll 8
      for (int p = 0; p < kPoints; ++p) {
        const int row = p / kVectors, column = p % kVectors * kV;
        const Vec<T> before = bias != nullptr ? offset : load(task.before + row * task.before_row_pitch + k * task.before_pitch + column);
        const Vec<T> total = before + sum[p][k];
        T* const to = task.out + row * task.row_pitch + k * task.pitch + column;
        if (column + kV < kVectors * kV || last == kV) {
          store(to, total);
        } else {
          store_first(to, total, last);
        }
      }
    }
  } else {
    write_sums<kVectors, T>(task, sum);
  }
}

template <int kWidth, int kVectors, int kRows, class T>
void run_rows(const TileTask<T>& task, int rows) {
  if constexpr (kWidth * kVectors * kRows <= kAccumulators) {
    if (rows == kRows) return pixel_tile<T, kWidth, kRows, kVectors>(task);
  }
  if constexpr (kRows > 1) run_rows<kWidth, kVectors, kRows / 2>(task, rows);
}

template <int kWidth, class T>
void run_width(const TileTask<T>& task, int width, int rows, int vectors) {
  if (width == kWidth) return vectors == 2 ? run_rows<kWidth, 2, 4>(task, rows) : run_rows<kWidth, 1, 4>(task, rows);
  if constexpr (kWidth > 1) run_width<kWidth - 1>(task, width, rows, vectors);
}

}  // namespace

void run_pixel_tile(const TileTask<float>& task, int width, int rows, int vectors) {
  run_width<kPixelTileWidth<float>>(task, width, rows, vectors);
}
void run_pixel_tile(const TileTask<double>& task, int width, int rows, int vectors) {
  run_width<kPixelTileWidth<double>>(task, width, rows, vectors);
}

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
