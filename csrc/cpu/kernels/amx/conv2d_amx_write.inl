// From the sums of a step, [point][output] in float32, to the destination.
#pragma once

#include "cpu/kernels/amx/conv2d_amx_stage.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

// `outputs` outputs of `points` neighbouring points; sums: `pitch` from a point to the next.
template <class Element>
inline void write_points(const float* sums, int64_t pitch, int64_t points, int64_t outputs, Element* dst, int64_t point_stride,
                         int64_t output_stride) {
  constexpr int64_t kV = kLanes<float>;
  for (int64_t k = 0; k < outputs; k += kV) {
    const int lanes = static_cast<int>(clamp(outputs - k, 0, kV));
    if (output_stride == 1) {
      for (int64_t i = 0; i < points; ++i) store_first(dst + i * point_stride + k, load(sums + i * pitch + k), lanes);
      continue;
    }
    for (int64_t first = 0; first < points; first += kV) {
      const int items = static_cast<int>(clamp(points - first, 0, kV));
      Vec<float> square[kV];
#pragma GCC unroll 16
      for (int i = 0; i < kV; ++i) square[i] = i < items ? load(sums + (first + i) * pitch + k) : Vec<float>{};
      transpose<float>(square);
      for (int lane = 0; lane < lanes; ++lane) {
        Element* row = dst + (k + lane) * output_stride + first * point_stride;
        if (point_stride == 1) {
          store_first(row, square[lane], items);
        } else {
          for (int i = 0; i < items; ++i) row[i * point_stride] = Element(square[lane][i]);
        }
      }
    }
  }
}

// Whether all of these sums are finite.
inline bool are_finite(const float* sums, int64_t pitch, int64_t points, int64_t outputs) {
  constexpr int64_t kV = kLanes<float>;
  __mmask16 others = 0;
  for (int64_t i = 0; i < points; ++i) {
    for (int64_t k = 0; k < outputs; k += kV) {
      const Vec<float> v = load_first(sums + i * pitch + k, static_cast<int>(clamp(outputs - k, 0, kV)));
      others |= _mm512_cmp_ps_mask(v - v, Vec<float>{}, _CMP_NEQ_UQ);
    }
  }
  return others == 0;
}

}  // namespace
}  // namespace cnn_ext::cpu::CNN_EXT_ISA
