// The register tile of conv2d_backward_weight_planes: the products of up to 4 x 3 or 3 x 4 planes, summed lane by lane over a block of
// pixels.
#pragma once

#include "cpu/kernels/conv2d_direct_ahead.inl"
#include "cpu/simd/vec.h"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

using Vector = Vec<float>;

constexpr int kLanesOfVector = kLanes<float>;
constexpr int kWideSide = 4, kNarrowSide = 3;  // channels of a tile
constexpr int kTurn = 2;                       // vectors of pixels that a turn of the tile's loop takes: a line
constexpr int64_t kTurnPixels = kTurn * kLanesOfVector;

// The pixels of a block in the planes of neighbouring channels, `pitch` elements apart.
struct Planes {
  const float* first;
  int64_t pitch;
};

struct TileArguments {
  Planes gradient, input;
  int64_t turns;
  float* sums;  // of [output channel][input channel]
  int64_t sums_row;
  bool adds;  // to what there is
  Fetch gradient_ahead, input_ahead;
};

// The sums of the lanes of four vectors.
inline __m128 lane_sums(Vector a, Vector b, Vector c, Vector d) {
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
  const __m256d lower = _mm256_unpacklo_pd((__m256d)ab, (__m256d)cd), upper = _mm256_unpackhi_pd((__m256d)ab, (__m256d)cd);
  const __m256 halves = _mm256_add_ps((__m256)lower, (__m256)upper);
  return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
}

// sum[k][c] += a vector of plane k of grad_output times one of plane c of the input. The side of fewer planes stays in registers.
template <int kOut, int kIn>
inline __attribute__((always_inline)) void add_vectors(const float* const (&gradient)[kOut], const float* const (&input)[kIn], int64_t i,
                                                       Vector (&sum)[kOut][kWideSide]) {
  if constexpr (kOut <= kIn) {
    Vector g[kOut];
#pragma GCC unroll 4
    for (int k = 0; k < kOut; ++k) g[k] = load(gradient[k] + i);
#pragma GCC unroll 4
    for (int c = 0; c < kIn; ++c) {
      const Vector x = load(input[c] + i);
#pragma GCC unroll 4
      for (int k = 0; k < kOut; ++k) accumulate(sum[k][c], g[k], x);
    }
  } else {
    Vector x[kIn];
#pragma GCC unroll 4
    for (int c = 0; c < kIn; ++c) x[c] = load(input[c] + i);
#pragma GCC unroll 4
    for (int k = 0; k < kOut; ++k) {
      const Vector g = load(gradient[k] + i);
#pragma GCC unroll 4
      for (int c = 0; c < kIn; ++c) accumulate(sum[k][c], g, x[c]);
    }
  }
}

template <int kOut, int kIn>
void add_tile(const TileArguments& tile) {
  Vector sum[kOut][kWideSide] = {};
  const float *gradient[kOut], *input[kIn];
#pragma GCC unroll 4
  for (int k = 0; k < kOut; ++k) gradient[k] = tile.gradient.first + k * tile.gradient.pitch;
#pragma GCC unroll 4
  for (int c = 0; c < kIn; ++c) input[c] = tile.input.first + c * tile.input.pitch;
  const char *gradient_ahead = tile.gradient_ahead.at, *input_ahead = tile.input_ahead.at;
  const int64_t gradient_step = tile.gradient_ahead.step, input_step = tile.input_ahead.step;
  const int64_t end = tile.turns * kTurnPixels;
  for (int64_t i = 0; i < end; i += kTurnPixels) {
#pragma GCC unroll 2
    for (int v = 0; v < kTurn; ++v) add_vectors<kOut, kIn>(gradient, input, i + v * kLanesOfVector, sum);
    __builtin_prefetch(gradient_ahead, 0, 2);
    __builtin_prefetch(input_ahead, 0, 2);
    gradient_ahead += gradient_step, input_ahead += input_step;
  }
#pragma GCC unroll 4
  for (int k = 0; k < kOut; ++k) {
    float* to = tile.sums + k * tile.sums_row;
    Vector sums = _mm256_castps128_ps256(lane_sums(sum[k][0], sum[k][1], sum[k][2], sum[k][3]));
    if (tile.adds) sums += load_first(to, kIn);
    store_first(to, sums, kIn);
  }
}

using AddTile = void (*)(const TileArguments&);

constexpr AddTile kTiles[kWideSide][kWideSide] = {{add_tile<1, 1>, add_tile<1, 2>, add_tile<1, 3>, add_tile<1, 4>},
                                                  {add_tile<2, 1>, add_tile<2, 2>, add_tile<2, 3>, add_tile<2, 4>},
                                                  {add_tile<3, 1>, add_tile<3, 2>, add_tile<3, 3>, add_tile<3, 4>},
                                                  {add_tile<4, 1>, add_tile<4, 2>, add_tile<4, 3>, nullptr}};

}  // namespace
}  // namespace cnn_ext::cpu::CNN_EXT_ISA
