// The register tile of grouped convolutions, as their rows see it; conv2d_grouped_tile.cpp compiles it.
#pragma once

#include "cpu/simd/vec.h"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

constexpr int kGroupedSums = kVectorRegisters == 32 ? 28 : 12;
constexpr int kMostVectors = 3;
constexpr int kMostRows = 4;
constexpr int kMostCols = kGroupedSums / 2;

// The rows and the columns of the largest tiles of 1, 2 and 3 vectors of output channels.
constexpr int most_rows(int vectors) { return vectors == 1 ? 4 : vectors == 2 ? 2 : 1; }
constexpr int most_cols(int vectors, int rows) {
  const int cols = kGroupedSums / vectors / rows;
  return cols < kMostCols ? cols : kMostCols;
}

}  // namespace

// One tap and block of source channels.
struct GroupedStep {
  int32_t source;   // of the first grid point, in elements
  int32_t weights;  // in rows of the unit's output channels
  int32_t channels;
};

// The sums of some vectors of output channels for `rows` x `cols` grid points; the rows may belong to different images.
struct GroupedTile {
  const float* weights;
  const GroupedStep* steps;
  int64_t step_count;
  const float* source[kMostRows];  // of the first grid point of each row; the next one is a vector further
  float* out[kMostRows];
  int64_t out_step;   // from a grid point to the next
  const float* bias;  // whole vectors
  int last;           // lanes to write of the last vector
  // Lines to fetch meanwhile, some at each step.
  const char *const *ahead, *const *ahead_end;
  int64_t ahead_step;
};

void run_grouped_tile(const GroupedTile& tile, int vectors, int rows, int cols);

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
