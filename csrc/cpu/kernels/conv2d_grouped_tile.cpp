// The register tile of grouped convolutions: 1, 2 or 3 vectors of output channels x up to 28, 14 or 9 grid points (12, 6, 4 with 16
// registers). Of 1 vector of a group of 16, a source element serves one multiplication alone: 29 loads for 28 of them are just what two
// load ports bring while two multipliers work, where a tile of 14 points would lose a tenth.
#include "cpu/kernels/conv2d_grouped_tile.inl"

#include "cpu/simd/product.h"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

template <int kVectors, int kRows, int kCols>
__attribute__((noinline)) void grouped_tile(const GroupedTile& tile) {
  constexpr int kV = kLanes<float>;
  Vec<float> sum[kRows][kCols][kVectors] = {};
  const char* const* ahead = tile.ahead;
  for (const GroupedStep *step = tile.steps, *end = step + tile.step_count; step != end; ++step) {
    const char* const* const stop = tile.ahead_end - ahead < tile.ahead_step ? tile.ahead_end : ahead + tile.ahead_step;
    for (; ahead != stop; ++ahead) __builtin_prefetch(*ahead, 0, 2);
    const float* weights = tile.weights + step->weights * (kVectors * kV);
    const float* source[kRows];
    for (int r = 0; r < kRows; ++r) source[r] = tile.source[r] + step->source;
    for (int c = step->channels; c > 0; --c) {
      Vec<float> weight[kVectors];
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) weight[v] = load(weights + v * kV);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 14
        for (int i = 0; i < kCols; ++i) {
          if constexpr (kVectors == 1) {
            sum[r][i][0] = add_product(source[r] + i * kV, weight[0], sum[r][i][0]);
          } else {
            const Vec<float> x = broadcast_from(source[r] + i * kV);
#pragma GCC unroll 3
            for (int v = 0; v < kVectors; ++v) sum[r][i][v] = fma(x, weight[v], sum[r][i][v]);
          }
        }
        ++source[r];
      }
      weights += kVectors * kV;
    }
  }
  const int last = tile.last;
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    float* out = tile.out[r];
#pragma GCC unroll 14
    for (int i = 0; i < kCols; ++i, out += tile.out_step) {
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) {
        const Vec<float> total = load(tile.bias + v * kV) + sum[r][i][v];
        if (v + 1 < kVectors || last == kV) {
          store(out + v * kV, total);
        } else {
          store_first(out + v * kV, total, last);
        }
      }
    }
  }
}

template <int kVectors, int kRows, int kCols>
void run_cols(const GroupedTile& tile, int cols) {
  if (cols == kCols) return grouped_tile<kVectors, kRows, kCols>(tile);
  if constexpr (kCols > 1) run_cols<kVectors, kRows, kCols - 1>(tile, cols);
}

template <int kVectors, int kRows>
void run_rows(const GroupedTile& tile, int rows, int cols) {
  if (rows == kRows) return run_cols<kVectors, kRows, most_cols(kVectors, kRows)>(tile, cols);
  if constexpr (kRows > 1) run_rows<kVectors, kRows / 2>(tile, rows, cols);
}

}  // namespace

void run_grouped_tile(const GroupedTile& tile, int vectors, int rows, int cols) {
  if (vectors == 1) return run_rows<1, most_rows(1)>(tile, rows, cols);
  if (vectors == 2) return run_rows<2, most_rows(2)>(tile, rows, cols);
  run_rows<3, most_rows(3)>(tile, rows, cols);
}

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
