// Loads and stores of halves: vectors of floats in registers. Each of vec.h's and lanes.h's, with the same name and the same rule for what
// memory is touched. x86-64 from AVX2 on converts binary16 by instruction, the others by arithmetic on bits; a bfloat16 is the upper half
// of a float.
#pragma once

#include "core/half.h"
#include "cpu/simd/lanes.h"

namespace {

using cnn_ext::BFloat16;
using cnn_ext::Compute;
using cnn_ext::Float16;

// As many halves as a Vec<float> has lanes.
typedef uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t FloatBits __attribute__((vector_size(kVectorBytes)));

#if defined(__AVX2__) && !defined(__AVX512F__)
// The compiler's own conversions between 16 and 32 bits go through more shuffles.
inline FloatBits bits_of_halves(HalfBits halves) { return (FloatBits)_mm256_cvtepu16_epi32((__m128i)halves); }
inline HalfBits lower_bits(FloatBits v) {  // of lanes that have no others
  return (HalfBits)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
}
#else
inline FloatBits bits_of_halves(HalfBits halves) { return __builtin_convertvector(halves, FloatBits); }
inline HalfBits lower_bits(FloatBits v) { return __builtin_convertvector(v, HalfBits); }
#endif

inline Vec<float> widened(HalfBits halves, BFloat16) { return (Vec<float>)(bits_of_halves(halves) << 16); }

inline HalfBits narrowed(Vec<float> v, BFloat16) {
  const FloatBits bits = (FloatBits)v;
  const FloatBits rounded = bits + 0x7fff + (bits >> 16 & 1), quiet = bits | 0x400000;
  return lower_bits((v == v ? rounded : quiet) >> 16);
}

#if defined(__AVX512F__)
inline Vec<float> widened(HalfBits halves, Float16) { return _mm512_maskz_cvtph_ps(0xffff, (__m256i)halves); }
inline HalfBits narrowed(Vec<float> v, Float16) {
  return (HalfBits)_mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif defined(__F16C__)
inline Vec<float> widened(HalfBits halves, Float16) { return _mm256_cvtph_ps((__m128i)halves); }
inline HalfBits narrowed(Vec<float> v, Float16) { return (HalfBits)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#else
// As core/half.h has it for one.
inline Vec<float> widened(HalfBits halves, Float16) {
  const FloatBits bits = __builtin_convertvector(halves, FloatBits);
  const FloatBits sign = (bits & 0x8000u) << 16, magnitude = (bits & 0x7fffu) << 13, exponent = magnitude & 0x0f800000u;
  const FloatBits finite = magnitude + (112u << 23), tiny = magnitude + (113u << 23), smallest = FloatBits{} + (113u << 23);
  const FloatBits subnormal = (FloatBits)((Vec<float>)tiny - (Vec<float>)smallest);
  const FloatBits number = exponent == 0 ? subnormal : exponent == 0x0f800000u ? finite + (112u << 23) : finite;
  return (Vec<float>)(sign | number);
}

inline HalfBits narrowed(Vec<float> v, Float16) {
  const FloatBits bits = (FloatBits)v, sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  const Vec<float> half = Vec<float>{} + 0.5f;
  const FloatBits subnormal = (FloatBits)((Vec<float>)magnitude + half) - (FloatBits)half;
  const FloatBits normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
  const FloatBits finite = magnitude < 0x38800000u ? subnormal : normal;
  const FloatBits number = magnitude < 0x47800000u ? finite : FloatBits{} + 0x7c00u;
  return __builtin_convertvector(sign | (magnitude > 0x7f800000u ? 0x7e00u | (magnitude >> 13 & 0x3ffu) : number), HalfBits);
}
#endif

// The bits of the halves [begin, end) of p, which may lie beyond the lanes; zeros in the other lanes.
#if defined(__AVX512F__)
inline HalfBits bits_between(const void* p, int begin, int end) {
  return (HalfBits)_mm256_maskz_loadu_epi16(static_cast<__mmask16>(first_bits(end) & ~first_bits(begin)), p);
}
inline void store_bits(void* p, HalfBits bits, LaneSet set) {
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(set.bits), (__m256i)bits);
}
#else
inline HalfBits bits_between(const void* p, int begin, int end) {
  HalfBits bits{};
  if (begin <= 0 && end >= kLanes<float>) {
    __builtin_memcpy(&bits, p, sizeof bits);
    return bits;
  }
  for (int i = begin < 0 ? 0 : begin; i < end && i < kLanes<float>; ++i) bits[i] = static_cast<const uint16_t*>(p)[i];
  return bits;
}
inline void store_bits(void* p, HalfBits bits, LaneSet set) {
  if (is_full<float>(set)) {
    __builtin_memcpy(p, &bits, sizeof bits);
    return;
  }
  for (int i = set.first; i < set.last; ++i) static_cast<uint16_t*>(p)[i] = bits[i];
}
#endif

#define CNN_EXT_LOADS_AND_STORES(Half)                                                                                       \
  inline Vec<float> load(const Half* p) {                                                                                    \
    HalfBits bits;                                                                                                           \
    __builtin_memcpy(&bits, p, sizeof bits);                                                                                 \
    return widened(bits, Half{});                                                                                            \
  }                                                                                                                          \
  inline void store(Half* p, Vec<float> v) {                                                                                 \
    const HalfBits bits = narrowed(v, Half{});                                                                               \
    __builtin_memcpy(p, &bits, sizeof bits);                                                                                 \
  }                                                                                                                          \
  inline Vec<float> load_between(const Half* p, int begin, int end) { return widened(bits_between(p, begin, end), Half{}); } \
  inline Vec<float> load_first(const Half* p, int count) { return load_between(p, 0, count); }                               \
  inline void store_first(Half* p, Vec<float> v, int count) { store_bits(p, narrowed(v, Half{}), first_lanes<float>(count)); }
CNN_EXT_LOADS_AND_STORES(Float16)
CNN_EXT_LOADS_AND_STORES(BFloat16)
#undef CNN_EXT_LOADS_AND_STORES

}  // namespace
