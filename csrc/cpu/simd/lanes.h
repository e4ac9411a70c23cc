// What kernels with borders, strides and choices need beside vec.h: runs of lanes, masked and strided loads, comparisons and selections,
// even and odd lanes, and vectors of integers beside those of scalars. Internal linkage throughout, as in vec.h.
#pragma once

#include "cpu/simd/vec.h"

namespace {

template <class T>
struct IntegerOf;
template <>
struct IntegerOf<float> {
  using type = int32_t;
};
template <>
struct IntegerOf<double> {
  using type = int64_t;
};
template <>
struct IntegerOf<int32_t> {
  using type = int32_t;
};
template <>
struct IntegerOf<int64_t> {
  using type = int64_t;
};

// Integers as wide as T, as many as a Vec<T> has lanes.
template <class T>
using Int = typename IntegerOf<T>::type;
template <class T>
using IntVec = Vec<Int<T>>;

// A run of lanes. With AVX-512 it is kept as the mask that the instructions take.
#if defined(__AVX512F__)
struct LaneSet {
  uint32_t bits;
};
inline LaneSet lanes_between(int first, int last) { return {((1u << last) - 1u) & ~((1u << first) - 1u)}; }
#else
struct LaneSet {
  int first, last;
};
inline LaneSet lanes_between(int first, int last) { return {first, last}; }
template <class T>
inline bool is_full(LaneSet set) {
  return set.first == 0 && set.last == kLanes<T>;
}
#endif

template <class T>
inline LaneSet first_lanes(int64_t count) {
  return lanes_between(0, count < kLanes<T> ? static_cast<int>(count) : kLanes<T>);
}

// The lanes j for which 0 <= position + j * stride < size.
template <class T>
inline LaneSet lanes_inside(int64_t position, int64_t stride, int64_t size) {
  const int64_t first = position < 0 ? (-position + stride - 1) / stride : 0;
  const int64_t last = position < size ? (size - position + stride - 1) / stride : 0;
  const int64_t end = last < kLanes<T> ? last : kLanes<T>;
  return lanes_between(static_cast<int>(first < end ? first : end), static_cast<int>(end));
}

// Masked memory access touches nothing outside the set; a load takes the other lanes from `other`. load_strided reads lane j at p[j *
// stride]. load_offsets and store_offsets convert between the bytes (or int32) of pooling offsets and the lanes of an IntVec<T>; lanes
// outside the set load as 0.
#if defined(__AVX512F__)
inline Vec<float> load_lanes(const float* p, LaneSet set, Vec<float> other) {
  return _mm512_mask_loadu_ps(other, static_cast<__mmask16>(set.bits), p);
}
inline Vec<double> load_lanes(const double* p, LaneSet set, Vec<double> other) {
  return _mm512_mask_loadu_pd(other, static_cast<__mmask8>(set.bits), p);
}
inline void store_lanes(float* p, Vec<float> v, LaneSet set) { _mm512_mask_storeu_ps(p, static_cast<__mmask16>(set.bits), v); }
inline void store_lanes(double* p, Vec<double> v, LaneSet set) { _mm512_mask_storeu_pd(p, static_cast<__mmask8>(set.bits), v); }

template <class T, class Offset>
inline IntVec<T> load_offsets(const Offset* p, LaneSet set) {
  const __mmask16 mask = static_cast<__mmask16>(set.bits);
  if constexpr (sizeof(Offset) == 1 && sizeof(T) == 4) return (IntVec<T>)_mm512_maskz_cvtepu8_epi32(mask, _mm_maskz_loadu_epi8(mask, p));
  if constexpr (sizeof(Offset) == 1 && sizeof(T) == 8) {
    return (IntVec<T>)_mm512_maskz_cvtepu8_epi64(static_cast<__mmask8>(mask), _mm_maskz_loadu_epi8(mask, p));
  }
  if constexpr (sizeof(Offset) == 4 && sizeof(T) == 4) return (IntVec<T>)_mm512_maskz_loadu_epi32(mask, p);
  if constexpr (sizeof(Offset) == 4 && sizeof(T) == 8) {
    const __mmask8 mask_8 = static_cast<__mmask8>(mask);
    return (IntVec<T>)_mm512_maskz_cvtepi32_epi64(mask_8, _mm256_maskz_loadu_epi32(mask_8, p));
  }
}

template <class T, class Offset>
inline void store_offsets(Offset* p, IntVec<T> v, LaneSet set) {
  const __mmask16 mask = static_cast<__mmask16>(set.bits);
  if constexpr (sizeof(Offset) == 1 && sizeof(T) == 4) _mm_mask_storeu_epi8(p, mask, _mm512_maskz_cvtepi32_epi8(mask, (__m512i)v));
  if constexpr (sizeof(Offset) == 1 && sizeof(T) == 8)
    _mm_mask_storeu_epi8(p, mask, _mm512_maskz_cvtepi64_epi8(static_cast<__mmask8>(mask), (__m512i)v));
  if constexpr (sizeof(Offset) == 4 && sizeof(T) == 4) _mm512_mask_storeu_epi32(p, mask, (__m512i)v);
  if constexpr (sizeof(Offset) == 4 && sizeof(T) == 8) {
    _mm256_mask_storeu_epi32(p, static_cast<__mmask8>(mask), _mm512_maskz_cvtepi64_epi32(static_cast<__mmask8>(mask), (__m512i)v));
  }
}
#else
#if defined(__AVX2__)
// A window of 8 over this has the runs that end at a lane, or begin at one.
alignas(32) constexpr int32_t kRunOfLanes[24] = {0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};

template <class T>
inline __m256i mask_of(LaneSet set) {
  const __m256i ends = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kRunOfLanes + 16 - set.last));
  const __m256i begins = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kRunOfLanes + 8 - set.first));
  const __m256i lanes = _mm256_and_si256(ends, begins);
  return sizeof(T) == 4 ? lanes : _mm256_cvtepi32_epi64(_mm256_castsi256_si128(lanes));
}

inline Vec<float> load_lanes(const float* p, LaneSet set, Vec<float> other) {
  if (is_full<float>(set)) return load(p);
  const __m256i mask = mask_of<float>(set);
  return _mm256_blendv_ps(other, _mm256_maskload_ps(p, mask), _mm256_castsi256_ps(mask));
}
inline Vec<double> load_lanes(const double* p, LaneSet set, Vec<double> other) {
  if (is_full<double>(set)) return load(p);
  const __m256i mask = mask_of<double>(set);
  return _mm256_blendv_pd(other, _mm256_maskload_pd(p, mask), _mm256_castsi256_pd(mask));
}

inline void store_lanes(float* p, Vec<float> v, LaneSet set) {
  set.first == 0 ? store_first(p, v, set.last) : _mm256_maskstore_ps(p, mask_of<float>(set), v);
}
inline void store_lanes(double* p, Vec<double> v, LaneSet set) {
  set.first == 0 ? store_first(p, v, set.last) : _mm256_maskstore_pd(p, mask_of<double>(set), v);
}

// Up to 8 bytes as an integer, in pieces of 4, 2 and 1.
inline uint64_t load_bytes(const uint8_t* p, int count) {
  uint64_t bytes = 0;
  int loaded = 0;
  const auto piece = [&](auto part) {
    if ((count & static_cast<int>(sizeof part)) == 0) return;
    __builtin_memcpy(&part, p + loaded, sizeof part);
    bytes |= static_cast<uint64_t>(part) << (8 * loaded);
    loaded += static_cast<int>(sizeof part);
  };
  if (count == 8) {
    __builtin_memcpy(&bytes, p, sizeof bytes);
    return bytes;
  }
  piece(uint32_t{}), piece(uint16_t{}), piece(uint8_t{});
  return bytes;
}
inline void store_bytes(uint8_t* p, uint64_t bytes, int count) {
  const auto piece = [&](auto part) {
    if ((count & static_cast<int>(sizeof part)) == 0) return;
    part = static_cast<decltype(part)>(bytes);
    __builtin_memcpy(p, &part, sizeof part);
    p += sizeof part;
    if constexpr (sizeof part < sizeof bytes) bytes >>= 8 * sizeof part;
  };
  piece(uint64_t{}), piece(uint32_t{}), piece(uint16_t{}), piece(uint8_t{});
}

// The compiler's own conversions between bytes and wider lanes go one by one.
template <class T>
inline IntVec<T> load_byte_offsets(const uint8_t* p, LaneSet set) {
  const uint64_t bytes = load_bytes(p + set.first, set.last - set.first) << (8 * set.first & 63);
  const __m128i narrow = _mm_cvtsi64_si128(static_cast<int64_t>(bytes));
  return (IntVec<T>)(sizeof(T) == 4 ? _mm256_cvtepu8_epi32(narrow) : _mm256_cvtepu8_epi64(narrow));
}

template <class T>
inline void store_byte_offsets(uint8_t* p, IntVec<T> v, LaneSet set) {
  __m128i words;  // 16 bits each
  if constexpr (sizeof(T) == 4) {
    words = _mm_packus_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  } else {
    const __m128 lower = _mm_castsi128_ps(_mm256_castsi256_si128((__m256i)v));
    const __m128 upper = _mm_castsi128_ps(_mm256_extracti128_si256((__m256i)v, 1));
    const __m128i lanes = _mm_castps_si128(_mm_shuffle_ps(lower, upper, _MM_SHUFFLE(2, 0, 2, 0)));
    words = _mm_packus_epi32(lanes, lanes);
  }
  const uint64_t bytes = static_cast<uint64_t>(_mm_cvtsi128_si64(_mm_packus_epi16(words, words)));
  store_bytes(p + set.first, bytes >> (8 * set.first & 63), set.last - set.first);
}
#else
template <class T>
inline Vec<T> load_lanes(const T* p, LaneSet set, Vec<T> other) {
  if (is_full<T>(set)) return load(p);
  for (int i = 0; i < kLanes<T>; ++i) {  // a compiler sees that no other lane is touched
    if (i >= set.first && i < set.last) other[i] = p[i];
  }
  return other;
}

template <class T>
inline void store_lanes(T* p, Vec<T> v, LaneSet set) {
  if (is_full<T>(set)) return store(p, v);
  for (int i = 0; i < kLanes<T>; ++i) {
    if (i >= set.first && i < set.last) p[i] = v[i];
  }
}
#endif

template <class T, class Offset>
inline IntVec<T> load_offsets(const Offset* p, LaneSet set) {
#if defined(__AVX2__)
  if constexpr (sizeof(Offset) == 1) return load_byte_offsets<T>(p, set);
#endif
  IntVec<T> v{};
  if (is_full<T>(set)) {
    typedef Offset Narrow __attribute__((vector_size(kLanes<T> * sizeof(Offset))));
    Narrow narrow;
    __builtin_memcpy(&narrow, p, sizeof narrow);
    return __builtin_convertvector(narrow, IntVec<T>);
  }
  for (int i = set.first; i < set.last; ++i) v[i] = p[i];
  return v;
}

template <class T, class Offset>
inline void store_offsets(Offset* p, IntVec<T> v, LaneSet set) {
#if defined(__AVX2__)
  if constexpr (sizeof(Offset) == 1) return store_byte_offsets<T>(p, v, set);
#endif
  if (is_full<T>(set)) {
    for (int i = 0; i < kLanes<T>; ++i) p[i] = static_cast<Offset>(v[i]);
    return;
  }
  for (int i = set.first; i < set.last; ++i) p[i] = static_cast<Offset>(v[i]);
}
#endif

#if defined(__AVX512F__)
inline Vec<float> load_strided(const float* p, int64_t stride, LaneSet set, Vec<float> other) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i index = _mm512_mullo_epi32(lane, _mm512_set1_epi32(static_cast<int>(stride)));
  return _mm512_mask_i32gather_ps(other, static_cast<__mmask16>(set.bits), index, p, 4);
}
inline Vec<double> load_strided(const double* p, int64_t stride, LaneSet set, Vec<double> other) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i index = _mm256_mullo_epi32(lane, _mm256_set1_epi32(static_cast<int>(stride)));
  return _mm512_mask_i32gather_pd(other, static_cast<__mmask8>(set.bits), index, p, 8);
}
#else
#if defined(__AVX2__)
inline Vec<float> load_strided(const float* p, int64_t stride, LaneSet set, Vec<float> other) {
  if (is_full<float>(set)) {  // a gather takes twice as long
    const float* q = p + 4 * stride;
    return _mm256_setr_ps(p[0], p[stride], p[2 * stride], p[3 * stride], q[0], q[stride], q[2 * stride], q[3 * stride]);
  }
  const __m256i index = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(static_cast<int>(stride)));
  return _mm256_mask_i32gather_ps(other, p, index, _mm256_castsi256_ps(mask_of<float>(set)), sizeof(float));
}
#endif
template <class T>
inline Vec<T> load_strided(const T* p, int64_t stride, LaneSet set, Vec<T> other) {
  for (int i = set.first; i < set.last; ++i) other[i] = p[i * stride];
  return other;
}
#endif

// One truth per lane: a mask register with AVX-512, else a vector of all-ones and zeros.
#if defined(__AVX512F__)
using Choice = uint32_t;
inline Choice greater(Vec<float> a, Vec<float> b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline Choice greater(Vec<double> a, Vec<double> b) { return _mm512_cmp_pd_mask(a, b, _CMP_GT_OQ); }
inline Choice is_nan(Vec<float> a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
inline Choice is_nan(Vec<double> a) { return _mm512_cmp_pd_mask(a, a, _CMP_UNORD_Q); }
inline Choice equal(Vec<int32_t> a, Vec<int32_t> b) { return _mm512_cmpeq_epi32_mask((__m512i)a, (__m512i)b); }
inline Choice equal(Vec<int64_t> a, Vec<int64_t> b) { return _mm512_cmpeq_epi64_mask((__m512i)a, (__m512i)b); }
inline bool any(Choice c) { return c != 0; }
inline Vec<float> select(Choice c, Vec<float> a, Vec<float> b) { return _mm512_mask_blend_ps(static_cast<__mmask16>(c), b, a); }
inline Vec<double> select(Choice c, Vec<double> a, Vec<double> b) { return _mm512_mask_blend_pd(static_cast<__mmask8>(c), b, a); }
inline Vec<int32_t> select(Choice c, Vec<int32_t> a, Vec<int32_t> b) {
  return (Vec<int32_t>)_mm512_mask_blend_epi32(static_cast<__mmask16>(c), (__m512i)b, (__m512i)a);
}
inline Vec<int64_t> select(Choice c, Vec<int64_t> a, Vec<int64_t> b) {
  return (Vec<int64_t>)_mm512_mask_blend_epi64(static_cast<__mmask8>(c), (__m512i)b, (__m512i)a);
}
#else
inline Vec<int32_t> greater(Vec<float> a, Vec<float> b) { return a > b; }
inline Vec<int64_t> greater(Vec<double> a, Vec<double> b) { return a > b; }
inline Vec<int32_t> is_nan(Vec<float> a) { return a != a; }
inline Vec<int64_t> is_nan(Vec<double> a) { return a != a; }
inline Vec<int32_t> equal(Vec<int32_t> a, Vec<int32_t> b) { return a == b; }
inline Vec<int64_t> equal(Vec<int64_t> a, Vec<int64_t> b) { return a == b; }
#if defined(__AVX2__)
template <class C>
inline bool any(C choice) {
  return _mm256_testz_si256((__m256i)choice, (__m256i)choice) == 0;
}
#else
template <class C>
inline bool any(C choice) {
  const __typeof__(choice) none{};
  return __builtin_memcmp(&choice, &none, sizeof choice) != 0;
}
#endif
inline Vec<float> select(Vec<int32_t> c, Vec<float> a, Vec<float> b) { return c ? a : b; }
inline Vec<double> select(Vec<int64_t> c, Vec<double> a, Vec<double> b) { return c ? a : b; }
inline Vec<int32_t> select(Vec<int32_t> c, Vec<int32_t> a, Vec<int32_t> b) { return c ? a : b; }
inline Vec<int64_t> select(Vec<int64_t> c, Vec<int64_t> a, Vec<int64_t> b) { return c ? a : b; }
#endif

// Of the 2 * lanes elements of a, then b: those at even places, those at odd ones; and the inverse, a and b alternating, its lower and its
// upper half.
#if defined(__AVX2__) && !defined(__AVX512F__)
// The lower and the upper halves of two vectors side by side: so shuffles within the halves do the rest, and even_lanes and odd_lanes share
// them.
template <class T>
inline __m256d lower_halves(Vec<T> a, Vec<T> b) {
  return _mm256_permute2f128_pd((__m256d)a, (__m256d)b, 0x20);
}
template <class T>
inline __m256d upper_halves(Vec<T> a, Vec<T> b) {
  return _mm256_permute2f128_pd((__m256d)a, (__m256d)b, 0x31);
}

template <class T>
inline Vec<T> even_lanes(Vec<T> a, Vec<T> b) {
  const __m256d lower = lower_halves<T>(a, b), upper = upper_halves<T>(a, b);
  if constexpr (kLanes<T> == 4) return (Vec<T>)_mm256_unpacklo_pd(lower, upper);
  if constexpr (kLanes<T> == 8) return (Vec<T>)_mm256_shuffle_ps((__m256)lower, (__m256)upper, _MM_SHUFFLE(2, 0, 2, 0));
}

template <class T>
inline Vec<T> odd_lanes(Vec<T> a, Vec<T> b) {
  const __m256d lower = lower_halves<T>(a, b), upper = upper_halves<T>(a, b);
  if constexpr (kLanes<T> == 4) return (Vec<T>)_mm256_unpackhi_pd(lower, upper);
  if constexpr (kLanes<T> == 8) return (Vec<T>)_mm256_shuffle_ps((__m256)lower, (__m256)upper, _MM_SHUFFLE(3, 1, 3, 1));
}
#else
template <class T>
inline Vec<T> even_lanes(Vec<T> a, Vec<T> b) {
  if constexpr (kLanes<T> == 16) return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  if constexpr (kLanes<T> == 8) return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
  if constexpr (kLanes<T> == 4) return __builtin_shufflevector(a, b, 0, 2, 4, 6);
  if constexpr (kLanes<T> == 2) return __builtin_shufflevector(a, b, 0, 2);
}

template <class T>
inline Vec<T> odd_lanes(Vec<T> a, Vec<T> b) {
  if constexpr (kLanes<T> == 16) return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  if constexpr (kLanes<T> == 8) return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
  if constexpr (kLanes<T> == 4) return __builtin_shufflevector(a, b, 1, 3, 5, 7);
  if constexpr (kLanes<T> == 2) return __builtin_shufflevector(a, b, 1, 3);
}
#endif

template <class T>
inline Vec<T> interleave_lower(Vec<T> a, Vec<T> b) {
  if constexpr (kLanes<T> == 16) return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  if constexpr (kLanes<T> == 8) return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  if constexpr (kLanes<T> == 4) return __builtin_shufflevector(a, b, 0, 4, 1, 5);
  if constexpr (kLanes<T> == 2) return __builtin_shufflevector(a, b, 0, 2);
}

template <class T>
inline Vec<T> interleave_upper(Vec<T> a, Vec<T> b) {
  if constexpr (kLanes<T> == 16) return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  if constexpr (kLanes<T> == 8) return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  if constexpr (kLanes<T> == 4) return __builtin_shufflevector(a, b, 2, 6, 3, 7);
  if constexpr (kLanes<T> == 2) return __builtin_shufflevector(a, b, 1, 3);
}

// `count` elements, `step` apart, in the first lanes; the others are zero.
template <class T>
inline Vec<T> load_apart(const T* p, int64_t step, int count) {
  constexpr int lanes = kLanes<T>;
  if (step != 2) return load_strided(p, step, first_lanes<T>(count), Vec<T>{});
  const int elements = 2 * count - 1, lower = elements < lanes ? elements : lanes;
  return even_lanes<T>(load_first(p, lower), load_first(p + lower, elements - lower));
}

// Lane i of the result is element index[i] of a, or of the 2 * lanes elements of a, then b.
template <class T>
inline Vec<T> pick(Vec<T> a, IntVec<T> index) {
  return __builtin_shuffle(a, index);
}
template <class T>
inline Vec<T> pick(Vec<T> a, Vec<T> b, IntVec<T> index) {
  return __builtin_shuffle(a, b, index);
}

}  // namespace
