// The fragments of products on tensor cores: a warp's registers of 16 rows of A or 16 columns of B, two chunks deep, which is one
// instruction of every type, and the products of them.
//
//   float16, bfloat16      m16n8k16, sums in float32
//   float32, one term      m16n8k8 in TF32: each operand is rounded to 11 bits
//   float32, three terms   the same three times: x = large + small, both TF32, and x * y is small * large + large * small + large * large
//   float64                m8n8k4 twice, for 16 rows
//
// With three terms a product is off by at most 2^-21 of itself: 2^-22 for small * small, which is left out, and 2^-23 for what each small
// part is rounded by. Tensor cores cut sums of float32 off instead of rounding them, which does not matter beside TF32's own error. Here it
// would: an instruction's depth is added up by itself, the small products first, and these sums to the others by additions that round.
//
// An operand that is not finite, or that TF32's rounding makes infinite, splits into an infinity and its opposite or a NaN: its sums become
// NaN and are added up again without tensor cores (mma_gemm.cuh). Below 2^-112 the smaller part has no bits left: the operand's absolute
// error is at most 2^-137.
#pragma once

#include "cuda/chunk_loaders.cuh"
#include "cuda/primitives.cuh"

namespace cnn_ext::cuda {

__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float) { mma_m16n8k8_tf32(d, a, b); }
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) { mma_m16n8k16_f16(d, a, b); }
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16) { mma_m16n8k16_bf16(d, a, b); }
__device__ inline void mma(double (&d)[4], const double (&a)[2], const double (&b)[1], double) {
  mma_m8n8k4_f64(d[0], d[1], a[0], b[0]);
  mma_m8n8k4_f64(d[2], d[3], a[1], b[0]);
}

// The words of an operand as they lie in the tile, four 8 x 8 matrices (8 x 4 in TF32, two in float64) as ldmatrix numbers them: `first` is
// the extent of the first; kExtentBit says which bit of a matrix's number means 8 extents on, the other one meaning a chunk on in depth.
// `step`: which of the two instructions of a stage.
template <class Operand, int kExtent, int kExtentBit>
__device__ void read_words(uint32_t (&words)[4], const unsigned char* tile, int first, int step) {
  using T = typename Operand::Element;
  using Tile = ChunkTile<Operand, kExtent>;
  const int lane = threadIdx.x % 32, matrix = lane / 8, row = lane % 8;
  const int extent_part = kExtentBit == 0 ? matrix % 2 : matrix / 2, depth_part = kExtentBit == 0 ? matrix / 2 : matrix % 2;
  if constexpr (Operand::kAlongDepth) {
    ldmatrix_x4(words, tile + Tile::along(first + extent_part * 8 + row, 2 * step + depth_part));
  } else if constexpr (sizeof(T) == 2) {
    const int depth = (2 * step + depth_part) * kChunk<T> + row;
    ldmatrix_x4_trans(words, tile + Tile::across(depth, first / kChunk<T> + extent_part));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int depth = (2 * step + (kExtentBit == 0 ? i / 2 : i % 2)) * kChunk<T> + lane % 4;
      const int extent = first + (kExtentBit == 0 ? i % 2 : i / 2) * 8 + lane / 4;
      words[i] = *reinterpret_cast<const uint32_t*>(tile + Tile::across(depth, extent / kChunk<T>) + extent % kChunk<T> * sizeof(uint32_t));
    }
  }
}

template <class Operand, int kExtent, int kExtentBit>
__device__ void read_words(double (&words)[2], const unsigned char* tile, int first, int step) {
  using Tile = ChunkTile<Operand, kExtent>;
  const int lane = threadIdx.x % 32, depth = 2 * step * kChunk<double> + lane % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int extent = first + i * 8 + lane / 4;
    const int chunk = Operand::kAlongDepth ? Tile::along(extent, depth / kChunk<double>) : Tile::across(depth, extent / kChunk<double>);
    words[i] = reinterpret_cast<const double*>(tile + chunk)[(Operand::kAlongDepth ? depth : extent) % kChunk<double>];
  }
}

// kWords words make up 16 rows of A or 16 columns of B; the first half of the latter are the first 8 columns.
template <class T, int kTerms>
struct MmaFragments {
  using Register = std::conditional_t<std::is_same_v<T, double>, double, uint32_t>;
  static constexpr int kWords = std::is_same_v<T, double> ? 2 : 4;
  static_assert(kTerms == 1);

  template <class Operand, int kExtent, int kExtentBit>
  __device__ static void read(Register (&registers)[kWords], const unsigned char* tile, int first, int step) {
    read_words<Operand, kExtent, kExtentBit>(registers, tile, first, step);
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
      for (Register& x : registers) x = to_tf32(__uint_as_float(x));
    }
  }
  template <int kCols>
  __device__ static void multiply(Accumulate<T> (&sums)[kCols][4], const Register (&a)[kWords], const Register (&b)[kCols][kWords / 2]) {
#pragma unroll
    for (int j = 0; j < kCols; ++j) mma(sums[j], a, b[j], T{});
  }
};

// x = large + small.
struct SplitWord {
  uint32_t large, small;
};

template <>
struct MmaFragments<float, 3> {
  using Register = SplitWord;
  static constexpr int kWords = 4;

  template <class Operand, int kExtent, int kExtentBit>
  __device__ static void read(Register (&registers)[kWords], const unsigned char* tile, int first, int step) {
    uint32_t words[kWords];
    read_words<Operand, kExtent, kExtentBit>(words, tile, first, step);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const float x = __uint_as_float(words[i]);
      registers[i].large = to_tf32(x);
      registers[i].small = to_tf32(x - __uint_as_float(registers[i].large));
    }
  }
  template <int kCols>
  __device__ static void multiply(float (&sums)[kCols][4], const Register (&a)[4], const Register (&b)[kCols][2]) {
    const uint32_t large_a[] = {a[0].large, a[1].large, a[2].large, a[3].large},
                   small_a[] = {a[0].small, a[1].small, a[2].small, a[3].small};
    float products[kCols][4] = {};
#pragma unroll
    for (int j = 0; j < kCols; ++j) mma_m16n8k8_tf32(products[j], small_a, {b[j][0].large, b[j][1].large});
#pragma unroll
    for (int j = 0; j < kCols; ++j) mma_m16n8k8_tf32(products[j], large_a, {b[j][0].small, b[j][1].small});
#pragma unroll
    for (int j = 0; j < kCols; ++j) mma_m16n8k8_tf32(products[j], large_a, {b[j][0].large, b[j][1].large});
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
#pragma unroll
      for (int v = 0; v < 4; ++v) sums[j][v] += products[j][v];
    }
  }
};

}  // namespace cnn_ext::cuda
