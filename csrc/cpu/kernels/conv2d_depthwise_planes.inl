// What the depthwise kernels that read nchw memory directly share: which lanes of a vector of neighbouring columns have a source.
#pragma once

#include "cpu/kernels/conv2d_depthwise.inl"

namespace {

inline int64_t greatest_common_divisor(int64_t a, int64_t b) {
  while (b != 0) {
    const int64_t rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

// The first `count` bits, 0 to 32 of them.
inline uint32_t first_bits_of(int64_t count) { return static_cast<uint32_t>((uint64_t{1} << larger(0, smaller(32, count))) - 1); }

// Any subset of the lanes: bit j stands for lane j. load_bits takes the other lanes as zeros; memory outside the subset is not touched.
#if defined(__AVX512F__)
inline Vec<float> load_bits(const float* p, uint32_t bits) { return _mm512_maskz_loadu_ps(static_cast<__mmask16>(bits), p); }
inline void store_bits(float* p, Vec<float> v, uint32_t bits) { _mm512_mask_storeu_ps(p, static_cast<__mmask16>(bits), v); }
#elif defined(__AVX2__)
inline __m256i lanes_of_bits_32(uint32_t bits) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), bit), bit);
}
inline Vec<float> load_bits(const float* p, uint32_t bits) { return _mm256_maskload_ps(p, lanes_of_bits_32(bits)); }
// AMD's processors take a dozen times as long for a masked store as for a plain one: only lanes in the midst of a vector pay for it.
inline void store_bits(float* p, Vec<float> v, uint32_t bits) {
  if ((bits & (bits + 1)) == 0) return store_first(p, v, __builtin_popcount(bits));
  _mm256_maskstore_ps(p, lanes_of_bits_32(bits), v);
}
#else
template <class T>
inline Vec<T> load_bits(const T* p, uint32_t bits) {
  Vec<T> v{};
  for (int i = 0; i < kLanes<T>; ++i) {
    if ((bits >> i & 1) != 0) v[i] = p[i];
  }
  return v;
}
template <class T>
inline void store_bits(T* p, Vec<T> v, uint32_t bits) {
  for (int i = 0; i < kLanes<T>; ++i) {
    if ((bits >> i & 1) != 0) p[i] = v[i];
  }
}
#endif

// The lanes, `columns` of them at most, whose source column exists: `first` + lane * step within [0, source_columns).
template <class T>
uint32_t lanes_with_source(int64_t columns, int64_t first, int64_t step, int64_t source_columns) {
  uint32_t bits = 0;
  for (int64_t lane = 0; lane < smaller(kLanes<T>, columns); ++lane) {
    const int64_t source = first + lane * step;
    if (source >= 0 && source < source_columns) bits |= 1u << lane;
  }
  return bits;
}

// The elements to load for the given lanes: with a step of 2, lane i is element 2 * i of two vectors.
template <class T>
void write_mask(uint32_t lanes, int64_t step, uint32_t* mask) {
  if (step == 1) {
    *mask = lanes;
    return;
  }
  for (int64_t half = 0; half < 2; ++half) {
    uint32_t elements = 0;
    for (int64_t i = 0; i < kLanes<T> / 2; ++i) elements |= (lanes >> (half * kLanes<T> / 2 + i) & 1) << (2 * i);
    mask[half] = elements;
  }
}

// Whether the `count` elements at p are finite.
template <class T>
bool all_finite(const T* p, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    if (!is_finite<T>(load_lanes(p + i, first_lanes<T>(count - i), Vec<T>{}))) return false;
  }
  return true;
}

// Whether a channel in each lane (conv2d_depthwise.cpp) is faster than neighbouring columns, however wide the maps are. With avx2, whose
// vectors take half as many channels to fill and half as many shuffles to transpose, it is by a fifth to a half, unless lanes are idle.
inline bool prefers_channels_in_lanes(const Conv2dShape& s) {
  constexpr int64_t lanes = kLanes<float>;
  return kVectorBytes == 32 && 4 * s.groups >= 3 * lanes * ceil_div(s.groups, lanes);
}

// nchw maps in float32 that fill most of a vector: with fewer columns a channel in each lane (conv2d_depthwise.cpp) is faster.
inline bool accepts_planes(const Conv2dShape& s, int64_t columns) {
  return s.dtype == DType::float32 && s.layout == Layout::nchw && s.groups > 1 && s.groups == s.in_channels &&
         4 * columns >= 3 * kLanes<float> && !prefers_channels_in_lanes(s);
}

// Columns read one after the other, or every second; neighbouring rows of the output then meet in the same input rows.
inline bool accepts_planes_stride(const Conv2dShape& s) {
  return s.stride_w <= 2 && s.stride_h / greatest_common_divisor(s.stride_h, s.dilation_h) == s.stride_w;
}

}  // namespace
