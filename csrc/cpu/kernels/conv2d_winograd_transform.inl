// The transforms of Winograd's minimal filtering F(m x m, r x r) (Toom-Cook), one vector of channels at a time.
//
// A tile of alpha x alpha inputs, alpha = m + r - 1, gives m x m outputs of an r x r kernel. With polynomials evaluated at alpha - 1 points
// and at infinity, a 1-D convolution is y = A^T [(G g) * (B^T d)], * elementwise, and a 2-D one applies each matrix along both axes. The
// points are 0 and the pairs +-a, so that M(x) = x * prod(x^2 - a^2) is odd and every row of a matrix splits into an even and an odd part,
// which the two points of a pair share:
//   B^T  row of a point p: the coefficients of M(x) / (x - p), row of infinity: those of M(x)
//   G    row of a point p: the powers of p over M'(p), row of infinity: (0, ..., 0, 1)
//   A^T  column of a point p: its powers, column of infinity: (0, ..., 0, 1)
// A transformed axis holds 0, +a, -a, +b, -b, ..., infinity, in this order. B^T depends on alpha alone.
//
// The pairs keep the error least among multiples of 1/16 (docs/kernels/winograd.md); as such they and their squares are exact numbers.
#pragma once

#include "cpu/simd/vec.h"

namespace {

template <int kAlpha>
struct Points;
template <>
struct Points<4> {
  static constexpr double kPairs[] = {1.0};
};
template <>
struct Points<6> {
  static constexpr double kPairs[] = {0.625, 1.5};
};
template <>
struct Points<8> {
  static constexpr double kPairs[] = {0.5, 1.0, 2.0};
};

template <int kAlpha>
constexpr int kPairCount = (kAlpha - 2) / 2;

struct Powers {
  double of[5];
};

constexpr Powers powers_of(double a) { return {{1.0, a, a * a, a * a * a, a * a * a * a}}; }

// A polynomial in x^2: the product of (x^2 - a^2) over all pairs but one.
template <int kAlpha>
struct EvenPolynomial {
  double coefficient[kPairCount<kAlpha> + 1];
};

constexpr int kNoPair = -1;

template <int kAlpha>
constexpr EvenPolynomial<kAlpha> product_without(int left_out) {
  EvenPolynomial<kAlpha> p{};
  p.coefficient[0] = 1.0;
  int degree = 0;
  for (int pair = 0; pair < kPairCount<kAlpha>; ++pair) {
    if (pair == left_out) continue;
    const double square = Points<kAlpha>::kPairs[pair] * Points<kAlpha>::kPairs[pair];
    ++degree;
    for (int i = degree; i >= 0; --i) p.coefficient[i] = (i > 0 ? p.coefficient[i - 1] : 0.0) - square * p.coefficient[i];
  }
  return p;
}

// M'(0), and M'(a) = M'(-a) of a pair.
template <int kAlpha>
constexpr double derivative(int pair) {
  if (pair == kNoPair) return product_without<kAlpha>(kNoPair).coefficient[0];
  const double square = Points<kAlpha>::kPairs[pair] * Points<kAlpha>::kPairs[pair];
  double value = 2 * square;
  for (int other = 0; other < kPairCount<kAlpha>; ++other) {
    if (other != pair) value *= square - Points<kAlpha>::kPairs[other] * Points<kAlpha>::kPairs[other];
  }
  return value;
}

// The sum of coefficient[i] * d[first + 2 * i] for i <= kDegree; the leading coefficient is 1.
template <class T, int kDegree, int kAlpha>
__attribute__((always_inline)) inline Vec<T> evaluate(const EvenPolynomial<kAlpha>& p, const Vec<T> (&d)[kAlpha], int first) {
  Vec<T> sum = d[first + 2 * kDegree];
#pragma GCC unroll 4
  for (int i = kDegree - 1; i >= 0; --i) sum = fma(broadcast(static_cast<T>(p.coefficient[i])), d[first + 2 * i], sum);
  return sum;
}

// A transformed axis is computed a column of two at a time: the points of a pair, +a and -a, which share what they are made of, or 0 and
// infinity, which are what a last pair would be. So the columns of a 2-D transform stay in registers between the two axes.
template <int kAlpha>
constexpr int kEnds = kPairCount<kAlpha>;
template <int kAlpha>
constexpr int first_of(int pair) {
  return pair == kEnds<kAlpha> ? 0 : 1 + 2 * pair;
}
template <int kAlpha>
constexpr int second_of(int pair) {
  return pair == kEnds<kAlpha> ? kAlpha - 1 : 2 + 2 * pair;
}

// The elements of B^T d for a pair of points.
template <class T, int kAlpha, int kPair>
__attribute__((always_inline)) inline void transform_input_pair(const Vec<T> (&d)[kAlpha], Vec<T>& first, Vec<T>& second) {
  if constexpr (kPair == kEnds<kAlpha>) {
    constexpr EvenPolynomial<kAlpha> kAll = product_without<kAlpha>(kNoPair);
    first = evaluate<T, kPairCount<kAlpha>>(kAll, d, 0);
    second = evaluate<T, kPairCount<kAlpha>>(kAll, d, 1);
  } else {
    constexpr EvenPolynomial<kAlpha> kOthers = product_without<kAlpha>(kPair);
    const Vec<T> a = broadcast(static_cast<T>(Points<kAlpha>::kPairs[kPair]));
    const Vec<T> even = evaluate<T, kPairCount<kAlpha> - 1>(kOthers, d, 2);
    const Vec<T> odd = evaluate<T, kPairCount<kAlpha> - 1>(kOthers, d, 1);
    first = fma(a, odd, even);
    second = fma(-a, odd, even);
  }
}

// v = B^T d
template <class T, int kAlpha, int kPair = 0>
__attribute__((always_inline)) inline void transform_input_axis(const Vec<T> (&d)[kAlpha], Vec<T> (&v)[kAlpha]) {
  transform_input_pair<T, kAlpha, kPair>(d, v[first_of<kAlpha>(kPair)], v[second_of<kAlpha>(kPair)]);
  if constexpr (kPair < kEnds<kAlpha>) transform_input_axis<T, kAlpha, kPair + 1>(d, v);
}

// The elements of G g for a pair of points.
template <class T, int kAlpha, int kTaps, int kPair>
__attribute__((always_inline)) inline void transform_weight_pair(const Vec<T> (&g)[kTaps], Vec<T>& first, Vec<T>& second) {
  if constexpr (kPair == kEnds<kAlpha>) {
    constexpr double kScale = 1.0 / derivative<kAlpha>(kNoPair);
    first = broadcast(static_cast<T>(kScale)) * g[0];
    second = g[kTaps - 1];
  } else {
    constexpr Powers kPowers = powers_of(Points<kAlpha>::kPairs[kPair]);
    constexpr double kScale = 1.0 / derivative<kAlpha>(kPair);
    Vec<T> even = broadcast(static_cast<T>(kScale)) * g[0], odd = broadcast(static_cast<T>(kScale * kPowers.of[1])) * g[1];
#pragma GCC unroll 8
    for (int i = 2; i < kTaps; ++i) {
      Vec<T>& part = i % 2 == 0 ? even : odd;
      part = fma(broadcast(static_cast<T>(kScale * kPowers.of[i])), g[i], part);
    }
    first = even + odd;
    second = even - odd;
  }
}

// u = G g
template <class T, int kAlpha, int kTaps, int kPair = 0>
__attribute__((always_inline)) inline void transform_weight_axis(const Vec<T> (&g)[kTaps], Vec<T> (&u)[kAlpha]) {
  transform_weight_pair<T, kAlpha, kTaps, kPair>(g, u[first_of<kAlpha>(kPair)], u[second_of<kAlpha>(kPair)]);
  if constexpr (kPair < kEnds<kAlpha>) transform_weight_axis<T, kAlpha, kTaps, kPair + 1>(g, u);
}

// Adds to y = A^T m what the two points of a pair give; y[0] and the last hold those of 0 and infinity, the others nothing before pair 0.
template <class T, int kAlpha, int kOutputs, int kPair>
__attribute__((always_inline)) inline void add_output_pair(Vec<T> first, Vec<T> second, Vec<T> (&y)[kOutputs]) {
  constexpr Powers kPowers = powers_of(Points<kAlpha>::kPairs[kPair]);
  const Vec<T> even = first + second, odd = first - second;
  y[0] += even;
#pragma GCC unroll 8
  for (int i = 1; i < kOutputs; ++i) {
    const Vec<T> power = broadcast(static_cast<T>(kPowers.of[i])), term = i % 2 == 0 ? even : odd;
    y[i] = kPair == 0 && i < kOutputs - 1 ? power * term : fma(power, term, y[i]);
  }
}

// y = A^T m
template <class T, int kAlpha, int kOutputs, int kPair = 0>
__attribute__((always_inline)) inline void transform_output_axis(const Vec<T> (&m)[kAlpha], Vec<T> (&y)[kOutputs]) {
  if constexpr (kPair == 0) y[0] = m[0], y[kOutputs - 1] = m[kAlpha - 1];
  add_output_pair<T, kAlpha, kOutputs, kPair>(m[first_of<kAlpha>(kPair)], m[second_of<kAlpha>(kPair)], y);
  if constexpr (kPair + 1 < kPairCount<kAlpha>) transform_output_axis<T, kAlpha, kOutputs, kPair + 1>(m, y);
}

// p, which the compiler takes for a new address: left to itself, GCC computes the addresses of all rows beforehand and spills them.
template <class T>
__attribute__((always_inline)) inline T* next_row(T* p) {
  asm("" : "+r"(p));
  return p;
}

// B^T d, or G g, of a column to every kAlpha-th of the vectors `pitch` apart.
template <class T, int kAlpha>
__attribute__((always_inline)) inline void store_column(const Vec<T> (&v)[kAlpha], T* dst, int64_t pitch) {
#pragma GCC unroll 8
  for (int i = 0; i < kAlpha; ++i) {
    store(dst, v[i]);
    dst = next_row(dst + kAlpha * pitch);
  }
}
template <class T, int kAlpha>
__attribute__((always_inline)) inline void store_input_column(const Vec<T> (&d)[kAlpha], T* dst, int64_t pitch) {
  Vec<T> v[kAlpha];
  transform_input_axis<T, kAlpha>(d, v);
  store_column<T, kAlpha>(v, dst, pitch);
}
template <class T, int kAlpha, int kTaps>
__attribute__((always_inline)) inline void store_weight_column(const Vec<T> (&g)[kTaps], T* dst, int64_t pitch) {
  Vec<T> u[kAlpha];
  transform_weight_axis<T, kAlpha, kTaps>(g, u);
  store_column<T, kAlpha>(u, dst, pitch);
}

// B^T d B of a tile: vectors d[i][j] at src + i * row_pitch + j * lanes, to alpha * alpha vectors `dst_pitch` apart.
template <class T, int kAlpha, int kPair = 0>
inline void transform_input_tile(const T* src, int64_t row_pitch, T* dst, int64_t dst_pitch) {
  constexpr int kV = kLanes<T>, kFirst = first_of<kAlpha>(kPair), kSecond = second_of<kAlpha>(kPair);
  Vec<T> first[kAlpha], second[kAlpha];
  const T* row = src;
#pragma GCC unroll 8
  for (int i = 0; i < kAlpha; ++i) {
    Vec<T> d[kAlpha];
#pragma GCC unroll 8
    for (int j = 0; j < kAlpha; ++j) d[j] = load(row + j * kV);
    row = next_row(row + row_pitch);
    transform_input_pair<T, kAlpha, kPair>(d, first[i], second[i]);
  }
  store_input_column<T, kAlpha>(first, dst + kFirst * dst_pitch, dst_pitch);
  store_input_column<T, kAlpha>(second, dst + kSecond * dst_pitch, dst_pitch);
  if constexpr (kPair < kEnds<kAlpha>) transform_input_tile<T, kAlpha, kPair + 1>(src, row_pitch, dst, dst_pitch);
}

// G g G^T of one vector of filters: the tap (r, s) at src + r * row_pitch + s * col_pitch (negative pitches rotate the filter), to
// alpha * alpha vectors `dst_pitch` apart.
template <class T, int kAlpha, int kTaps, int kPair = 0>
inline void transform_filter(const T* src, int64_t row_pitch, int64_t col_pitch, T* dst, int64_t dst_pitch) {
  constexpr int kFirst = first_of<kAlpha>(kPair), kSecond = second_of<kAlpha>(kPair);
  Vec<T> first[kTaps], second[kTaps];
  const T* row = src;
#pragma GCC unroll 8
  for (int r = 0; r < kTaps; ++r) {
    Vec<T> g[kTaps];
    const T* tap = row;
#pragma GCC unroll 8
    for (int s = 0; s < kTaps; ++s) {
      g[s] = load(tap);
      tap = next_row(tap + col_pitch);
    }
    row += row_pitch;
    transform_weight_pair<T, kAlpha, kTaps, kPair>(g, first[r], second[r]);
  }
  store_weight_column<T, kAlpha, kTaps>(first, dst + kFirst * dst_pitch, dst_pitch);
  store_weight_column<T, kAlpha, kTaps>(second, dst + kSecond * dst_pitch, dst_pitch);
  if constexpr (kPair < kEnds<kAlpha>) transform_filter<T, kAlpha, kTaps, kPair + 1>(src, row_pitch, col_pitch, dst, dst_pitch);
}

// A^T m of one column of vectors, every kAlpha-th of those `pitch` apart.
template <class T, int kAlpha, int kOutputs>
__attribute__((always_inline)) inline void transform_output_column(const T* src, int64_t pitch, Vec<T> (&y)[kOutputs]) {
  Vec<T> m[kAlpha];
#pragma GCC unroll 8
  for (int i = 0; i < kAlpha; ++i) {
    m[i] = load(src);
    src = next_row(src + kAlpha * pitch);
  }
  transform_output_axis<T, kAlpha, kOutputs>(m, y);
}

// A^T m A of alpha * alpha vectors `pitch` apart.
template <class T, int kAlpha, int kOutputs, int kPair = kEnds<kAlpha>>
__attribute__((always_inline)) inline void transform_output_tile(const T* src, int64_t pitch, Vec<T> (&y)[kOutputs][kOutputs]) {
  Vec<T> first[kOutputs], second[kOutputs];
  transform_output_column<T, kAlpha, kOutputs>(src + first_of<kAlpha>(kPair) * pitch, pitch, first);
  transform_output_column<T, kAlpha, kOutputs>(src + second_of<kAlpha>(kPair) * pitch, pitch, second);
#pragma GCC unroll 8
  for (int i = 0; i < kOutputs; ++i) {
    if constexpr (kPair == kEnds<kAlpha>) {
      y[i][0] = first[i], y[i][kOutputs - 1] = second[i];
    } else {
      add_output_pair<T, kAlpha, kOutputs, kPair>(first[i], second[i], y[i]);
    }
  }
  constexpr int kNext = kPair == kEnds<kAlpha> ? 0 : kPair + 1;
  if constexpr (kNext < kPairCount<kAlpha>) transform_output_tile<T, kAlpha, kOutputs, kNext>(src, pitch, y);
}

}  // namespace
