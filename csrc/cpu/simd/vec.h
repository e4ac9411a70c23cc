// One vector type per scalar type, as wide as the instruction set that this source is compiled for: 16 bytes (baseline: SSE2 or NEON), 32
// (avx2) or 64 (avx512). GCC's vector extensions supply the operators + - * < and ?:, so this file only adds what they lack. Everything has
// internal linkage, for the same source is compiled once per instruction set.
#pragma once

#include <cstdint>

#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Registers that a kernel may plan with.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kVectorRegisters = 32;
#else
constexpr int kVectorRegisters = 16;
#endif

// The inline assembler's word for a vector register.
#if defined(__aarch64__)
#define CNN_EXT_VECTOR_REGISTER "w"
#else
#define CNN_EXT_VECTOR_REGISTER "v"
#endif

template <class T>
struct VecTraits {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  typedef T unaligned __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
};

template <class T>
using Vec = typename VecTraits<T>::type;

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
inline Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VecTraits<T>::unaligned*>(p);
}

template <class T>
inline void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VecTraits<T>::unaligned*>(p) = v;
}

template <class T>
inline Vec<T> broadcast(T x) {
  return x - Vec<T>{};  // GCC's idiom for a splat; exact, -0.0 and NaN included
}

// The element at p in every lane, by an instruction that the compiler can neither split nor merge with a neighbour's: left to itself, GCC
// keeps overlapping scalars of a convolution's taps in rotating registers and spills the accumulators instead.
template <class T>
inline Vec<T> broadcast_from(const T* p);

#if defined(__AVX512F__)
template <>
inline Vec<float> broadcast_from(const float* p) {
  Vec<float> v;
  asm("vbroadcastss %1, %0" : "=v"(v) : "m"(*p));
  return v;
}
template <>
inline Vec<double> broadcast_from(const double* p) {
  Vec<double> v;
  asm("vbroadcastsd %1, %0" : "=v"(v) : "m"(*p));
  return v;
}
#elif defined(__AVX2__)
template <>
inline Vec<float> broadcast_from(const float* p) {
  Vec<float> v;
  asm("vbroadcastss %1, %0" : "=x"(v) : "m"(*p));
  return v;
}
template <>
inline Vec<double> broadcast_from(const double* p) {
  Vec<double> v;
  asm("vbroadcastsd %1, %0" : "=x"(v) : "m"(*p));
  return v;
}
#elif defined(__aarch64__)
template <>
inline Vec<float> broadcast_from(const float* p) {
  return vld1q_dup_f32(p);
}
template <>
inline Vec<double> broadcast_from(const double* p) {
  return vld1q_dup_f64(p);
}
#else
template <>
inline Vec<float> broadcast_from(const float* p) {
  return broadcast(*p);
}
template <>
inline Vec<double> broadcast_from(const double* p) {
  return broadcast(*p);
}
#endif

// a * b + c, rounded once where the instruction set has FMA. Written out, so that no kernel's rounding depends on what the compiler
// contracts (every source is compiled with -ffp-contract=off).
#if defined(__AVX512F__)
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return _mm512_fmadd_pd(a, b, c); }
#elif defined(__AVX2__)
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return _mm256_fmadd_pd(a, b, c); }
#elif defined(__aarch64__)
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return vfmaq_f32(c, a, b); }
inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return vfmaq_f64(c, a, b); }
#else
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return a * b + c; }
inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return a * b + c; }
#endif

// sum += a * b, as fma(). With 16 registers by an instruction that leaves the sum in its register: left to itself, GCC moves the sums of a
// tile from register to register and, in a long loop, to memory.
#if defined(__AVX2__) && !defined(__AVX512F__)
inline void accumulate(Vec<float>& sum, Vec<float> a, Vec<float> b) { asm("vfmadd231ps %1, %2, %0" : "+x"(sum) : "x"(a), "x"(b)); }
inline void accumulate(Vec<double>& sum, Vec<double> a, Vec<double> b) { asm("vfmadd231pd %1, %2, %0" : "+x"(sum) : "x"(a), "x"(b)); }
// The same with a vector b that stays in memory: sums and factors leave no register for it.
inline void accumulate(Vec<float>& sum, Vec<float> a, const float* b) {
  asm("vfmadd231ps %1, %2, %0" : "+x"(sum) : "m"(*reinterpret_cast<const Vec<float>*>(b)), "x"(a));
}
inline void accumulate(Vec<double>& sum, Vec<double> a, const double* b) {
  asm("vfmadd231pd %1, %2, %0" : "+x"(sum) : "m"(*reinterpret_cast<const Vec<double>*>(b)), "x"(a));
}
#else
template <class V>
inline void accumulate(V& sum, V a, V b) {
  sum = fma(a, b, sum);
}
#endif

// The elements at p that belong to lanes begin to end - 1, zeros in the other lanes; no other memory is touched. begin and end may lie
// beyond the lanes, up to 2^30 away.
#if defined(__AVX512F__)
inline uint32_t first_bits(int count) { return (1u << (count < 0 ? 0 : count > 16 ? 16 : count)) - 1u; }
inline Vec<float> load_between(const float* p, int begin, int end) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>(first_bits(end) & ~first_bits(begin)), p);
}
inline Vec<double> load_between(const double* p, int begin, int end) {
  return _mm512_maskz_loadu_pd(static_cast<__mmask8>(first_bits(end) & ~first_bits(begin)), p);
}
#elif defined(__AVX2__)
inline __m256i lanes_between_32(int begin, int end) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(begin), lane), _mm256_cmpgt_epi32(_mm256_set1_epi32(end), lane));
}
inline Vec<float> load_between(const float* p, int begin, int end) { return _mm256_maskload_ps(p, lanes_between_32(begin, end)); }
inline Vec<double> load_between(const double* p, int begin, int end) {
  return _mm256_maskload_pd(p, _mm256_cvtepi32_epi64(_mm256_castsi256_si128(lanes_between_32(begin, end))));
}
#else
template <class T>
inline Vec<T> load_between(const T* p, int begin, int end) {
  Vec<T> v{};
  for (int i = begin < 0 ? 0 : begin; i < end && i < kLanes<T>; ++i) v[i] = p[i];
  return v;
}
#endif

// The first `count` elements at p, 0 <= count <= lanes, zeros in the other lanes; memory past them is not touched.
#if defined(__AVX512F__)
inline Vec<float> load_first(const float* p, int count) { return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1u), p); }
inline Vec<double> load_first(const double* p, int count) { return _mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1u), p); }
inline void store_first(float* p, Vec<float> v, int count) { _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1u), v); }
inline void store_first(double* p, Vec<double> v, int count) { _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << count) - 1u), v); }
#elif defined(__AVX2__)
inline __m256i first_lanes_32(int count) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
inline __m256i first_lanes_64(int count) { return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3)); }
inline Vec<float> load_first(const float* p, int count) { return _mm256_maskload_ps(p, first_lanes_32(count)); }
inline Vec<double> load_first(const double* p, int count) { return _mm256_maskload_pd(p, first_lanes_64(count)); }
// In pieces of 4, 2 and 1 elements: AMD's processors take five times as long for a masked store.
inline void store_first(float* p, Vec<float> v, int count) {
  if (count == kLanes<float>) return store(p, v);
  __m128 rest = _mm256_castps256_ps128(v);
  if ((count & 4) != 0) {
    _mm_storeu_ps(p, rest);
    rest = _mm256_extractf128_ps(v, 1);
    p += 4;
  }
  if ((count & 2) != 0) {
    _mm_storel_pi(reinterpret_cast<__m64*>(p), rest);
    rest = _mm_movehl_ps(rest, rest);
    p += 2;
  }
  if ((count & 1) != 0) _mm_store_ss(p, rest);
}
inline void store_first(double* p, Vec<double> v, int count) {
  if (count == kLanes<double>) return store(p, v);
  __m128d rest = _mm256_castpd256_pd128(v);
  if ((count & 2) != 0) {
    _mm_storeu_pd(p, rest);
    rest = _mm256_extractf128_pd(v, 1);
    p += 2;
  }
  if ((count & 1) != 0) _mm_store_sd(p, rest);
}
#else
template <class T>
inline Vec<T> load_first(const T* p, int count) {
  Vec<T> v{};
  for (int i = 0; i < count; ++i) v[i] = p[i];
  return v;
}
template <class T>
inline void store_first(T* p, Vec<T> v, int count) {
  for (int i = 0; i < count; ++i) p[i] = v[i];
}
#endif

}  // namespace
