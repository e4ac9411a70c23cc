// The register tile of backward_weight, as its rows see it; conv2d_backward_weight_tile.cpp compiles it once for all of them.
#pragma once

#include "cpu/kernels/conv2d_direct_ahead.inl"
#include "cpu/simd/vec.h"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

constexpr int kTileVectors = 2;
constexpr int kTileEntries = (kVectorRegisters - 4) / kTileVectors;
constexpr int kTileRows = 3;  // tap rows that one tile may span

// Entries of a tile of one tap row. Of a single vector they are as many as a group of so many output channels has input channels, too:
// shared out among two tiles these would be few to hide the latency of the additions.
template <class T>
constexpr int tile_entries(int vectors) {
  return vectors == 1 && kLanes<T> > kTileEntries ? kLanes<T> : kTileEntries;
}

}  // namespace

// The pixels that one tile sums over; distances in elements. A pixel of grad_output is followed by the next one of its row.
struct Patch {
  int64_t images, rows, columns;
  int64_t grad_output_image, grad_output_row;
  int64_t input_image, input_row, input_column;
  int64_t input_tap_row;                  // from an entry to that of the next tap row
  Fetch gradient_ahead{}, input_ahead{};  // a part of what will be packed next, a line at a pixel
};

namespace {
inline int64_t pixels_of(const Patch& patch) { return patch.images * patch.rows * patch.columns; }
}  // namespace

template <class T>
using AddPatch = void (*)(const Patch&, const T* grad_output, const T* input, T* sums, int64_t sums_row);

// The tile of these vectors of output channels, tap rows, and entries per row; rows * columns <= kTileEntries, or
// tile_entries() of one row. It does
//   sums[entry][vector] += sum over the patch; entries = `rows` tap rows of `columns` neighbouring elements each. The first argument says
//   the type alone. fetches: whether the patch has something to fetch; tiles of one row have a loop without it.
AddPatch<float> tile_of(float type, int vectors, int rows, int columns, bool fetches);
AddPatch<double> tile_of(double type, int vectors, int rows, int columns, bool fetches);

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
