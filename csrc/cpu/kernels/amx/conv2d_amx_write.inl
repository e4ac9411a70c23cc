// From the sums of a step, [point][output] in float32, to the destination. Rounding takes two vectors at a time and, for bfloat16, numbers
// below 2^-126 for zeros, as the products did.
#pragma once

#include "cpu/kernels/amx/conv2d_amx_stage.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

// The halves of `low`, then those of `high`.
inline __m512i narrowed_pair(Vec<float> low, Vec<float> high, BFloat16) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }
inline __m512i narrowed_pair(Vec<float> low, Vec<float> high, Float16) {
  const __m512i halves = _mm512_maskz_inserti64x4(0xff, __m512i{}, (__m256i)narrowed(low, Float16{}), 0);
  return _mm512_maskz_inserti64x4(0xff, halves, (__m256i)narrowed(high, Float16{}), 1);
}

inline __mmask32 first_of_32(int64_t count) { return count >= 32 ? ~__mmask32{0} : (__mmask32{1} << count) - 1; }

// The halves [begin, begin + 16) of a row at every second place of dst, of which the first `count` exist.
inline void store_every_second(void* dst, __m512i halves, int begin, int64_t count) {
  const __m256i some = begin == 0 ? _mm512_maskz_extracti64x4_epi64(0xff, halves, 0) : _mm512_maskz_extracti64x4_epi64(0xff, halves, 1);
  const __mmask32 places = first_of_32(2 * clamp(count - begin, 0, 16)) & 0x55555555u;
  _mm512_mask_storeu_epi16(static_cast<uint16_t*>(dst) + 2 * begin, places, _mm512_maskz_cvtepu16_epi32(0xffff, some));
}

// `count` halves of a row, `stride` apart in the destination.
inline void store_row(void* dst, __m512i halves, int64_t count, int64_t stride) {
  if (stride == 1) return _mm512_mask_storeu_epi16(dst, first_of_32(count), halves);
  if (stride == 2) {
    store_every_second(dst, halves, 0, count);
    return store_every_second(dst, halves, 16, count);
  }
  alignas(64) uint16_t values[32];
  _mm512_store_si512(values, halves);
  for (int64_t i = 0; i < count; ++i) static_cast<uint16_t*>(dst)[i * stride] = values[i];
}

// `outputs` outputs of `points` <= 32 neighbouring points; sums: `pitch` from a point to the next.
template <class Element>
inline void write_points(const float* sums, int64_t pitch, int64_t points, int64_t outputs, Element* dst, int64_t point_stride,
                         int64_t output_stride) {
  constexpr int64_t kV = kLanes<float>;
  if (output_stride == 1) {
    for (int64_t i = 0; i < points; ++i, sums += pitch) {
      store_row(dst + i * point_stride, narrowed_pair(load(sums), load(sums + kV), Element{}), outputs, 1);
    }
    return;
  }
  // Pairs of points side by side, transposed together.
  const FloatBits lane = (FloatBits)_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i pairs = (__m512i)(lane | (lane + 16) << 16);
  for (int64_t k = 0; k < outputs; k += kV) {
    Vec<float> square[kV];
#pragma GCC unroll 16
    for (int q = 0; q < kV; ++q) {
      const float* const first = sums + 2 * q * pitch + k;
      const Vec<float> low = 2 * q < points ? load(first) : Vec<float>{}, high = 2 * q + 1 < points ? load(first + pitch) : Vec<float>{};
      square[q] = (Vec<float>)_mm512_maskz_permutexvar_epi16(~__mmask32{0}, pairs, narrowed_pair(low, high, Element{}));
    }
    transpose<float>(square);
    for (int o = 0; o < kV && k + o < outputs; ++o) {
      store_row(dst + (k + o) * output_stride, (__m512i)square[o], points, point_stride);
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
