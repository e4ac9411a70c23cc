// The register tile of backward_weight: 2 vectors of output channels (1 for the last few) times up to kTileEntries entries of grad_weight,
// each the sum of grad_output times one input element per pixel. Of the 32 (16) registers 28 (12) are sums, 2 hold grad_output and 1 an
// input element in all lanes, which serves two multiplications: 14 + 2 loads for 28 of them, so the multipliers and not the loads are the
// limit. Groups of 16 channels (a vector) have one vector of 16 entries.
#include "cpu/kernels/conv2d_backward_weight_tile.inl"

#include "cpu/simd/product.h"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

// sums[entry][vector of output channels] += sum over the patch; entries = kRows tap rows of kColumns neighbouring elements each. The patch
// is summed in registers first, so that a long sum is made of short ones.
template <class T, int kVectors, int kRows, int kColumns, bool kFetches>
void add_patch(const Patch& patch, const T* grad_output, const T* input, T* sums, int64_t sums_row) {
  constexpr int lanes = kLanes<T>, entries = kRows * kColumns;
  Vec<T> sum[entries][kVectors] = {};
  const char *gradient_ahead = patch.gradient_ahead.at, *input_ahead = patch.input_ahead.at;
  const int64_t gradient_step = patch.gradient_ahead.step, input_step = patch.input_ahead.step;
  for (int64_t image = 0; image < patch.images; ++image) {
    for (int64_t row = 0; row < patch.rows; ++row) {
      const T* g = grad_output + image * patch.grad_output_image + row * patch.grad_output_row;
      const T* x = input + image * patch.input_image + row * patch.input_row;
      for (int64_t column = 0; column < patch.columns; ++column) {
        Vec<T> channels[kVectors];
        for (int v = 0; v < kVectors; ++v) channels[v] = load(g + v * lanes);
#pragma GCC unroll 16
        for (int e = 0; e < entries; ++e) {
          const T* const entry = x + e / kColumns * patch.input_tap_row + e % kColumns;
          if constexpr (kVectors == 1) {
            sum[e][0] = add_product(entry, channels[0], sum[e][0]);
            continue;
          }
          const Vec<T> element = broadcast_from(entry);
          for (int v = 0; v < kVectors; ++v) sum[e][v] = fma(element, channels[v], sum[e][v]);
        }
        if constexpr (kFetches) {
          __builtin_prefetch(gradient_ahead, 0, 2);
          __builtin_prefetch(input_ahead, 0, 2);
          gradient_ahead += gradient_step, input_ahead += input_step;
        }
        g += kVectors * lanes;
        x += patch.input_column;
      }
    }
  }
#pragma GCC unroll 16
  for (int e = 0; e < entries; ++e) {
    T* to = sums + e / kColumns * sums_row + e % kColumns * kVectors * lanes;
    for (int v = 0; v < kVectors; ++v) store(to + v * lanes, load(to + v * lanes) + sum[e][v]);
  }
}

template <class T, int kVectors, int kRows, int kColumns = kRows == 1 ? tile_entries<T>(kVectors) : kTileEntries / kRows>
inline AddPatch<T> tile_of_rows(int rows, int columns, bool fetches) {
  if constexpr (kColumns == 0) {
    return nullptr;
  } else {
    if (rows != kRows) {
      if constexpr (kRows > 1) return tile_of_rows<T, kVectors, kRows - 1>(rows, columns, fetches);
    }
    if (columns == kColumns) {
      if constexpr (kRows == 1) {
        if (!fetches) return add_patch<T, kVectors, kRows, kColumns, false>;
      }
      return add_patch<T, kVectors, kRows, kColumns, true>;
    }
    return tile_of_rows<T, kVectors, kRows, kColumns - 1>(rows, columns, fetches);
  }
}

template <class T>
AddPatch<T> find_tile(int vectors, int rows, int columns, bool fetches) {
  return vectors == 1 ? tile_of_rows<T, 1, kTileRows>(rows, columns, fetches)
                      : tile_of_rows<T, kTileVectors, kTileRows>(rows, columns, fetches);
}

}  // namespace

AddPatch<float> tile_of(float, int vectors, int rows, int columns, bool fetches) {
  return find_tile<float>(vectors, rows, columns, fetches);
}
AddPatch<double> tile_of(double, int vectors, int rows, int columns, bool fetches) {
  return find_tile<double>(vectors, rows, columns, fetches);
}

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
