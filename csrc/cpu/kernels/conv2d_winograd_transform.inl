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

// v = B^T d
template <class T, int kAlpha, int kPair = 0>
__attribute__((always_inline)) inline void transform_input_pairs(const Vec<T> (&d)[kAlpha], Vec<T> (&v)[kAlpha]) {
  if constexpr (kPair < kPairCount<kAlpha>) {
    constexpr EvenPolynomial<kAlpha> kOthers = product_without<kAlpha>(kPair);
    const Vec<T> a = broadcast(static_cast<T>(Points<kAlpha>::kPairs[kPair]));
    const Vec<T> even = evaluate<T, kPairCount<kAlpha> - 1>(kOthers, d, 2);
    const Vec<T> odd = evaluate<T, kPairCount<kAlpha> - 1>(kOthers, d, 1);
    v[1 + 2 * kPair] = fma(a, odd, even);
    v[2 + 2 * kPair] = fma(-a, odd, even);
    transform_input_pairs<T, kAlpha, kPair + 1>(d, v);
  }
}

template <class T, int kAlpha>
__attribute__((always_inline)) inline void transform_input_axis(const Vec<T> (&d)[kAlpha], Vec<T> (&v)[kAlpha]) {
  constexpr EvenPolynomial<kAlpha> kAll = product_without<kAlpha>(kNoPair);
  v[0] = evaluate<T, kPairCount<kAlpha>>(kAll, d, 0);
  transform_input_pairs<T, kAlpha>(d, v);
  v[kAlpha - 1] = evaluate<T, kPairCount<kAlpha>>(kAll, d, 1);
}

// u = G g
template <class T, int kAlpha, int kTaps, int kPair = 0>
__attribute__((always_inline)) inline void transform_weight_pairs(const Vec<T> (&g)[kTaps], Vec<T> (&u)[kAlpha]) {
  if constexpr (kPair < kPairCount<kAlpha>) {
    constexpr Powers kPowers = powers_of(Points<kAlpha>::kPairs[kPair]);
    constexpr double kScale = 1.0 / derivative<kAlpha>(kPair);
    Vec<T> even = broadcast(static_cast<T>(kScale)) * g[0], odd = broadcast(static_cast<T>(kScale * kPowers.of[1])) * g[1];
#pragma GCC unroll 8
    for (int i = 2; i < kTaps; ++i) {
      Vec<T>& part = i % 2 == 0 ? even : odd;
      part = fma(broadcast(static_cast<T>(kScale * kPowers.of[i])), g[i], part);
    }
    u[1 + 2 * kPair] = even + odd;
    u[2 + 2 * kPair] = even - odd;
    transform_weight_pairs<T, kAlpha, kTaps, kPair + 1>(g, u);
  }
}

template <class T, int kAlpha, int kTaps>
__attribute__((always_inline)) inline void transform_weight_axis(const Vec<T> (&g)[kTaps], Vec<T> (&u)[kAlpha]) {
  constexpr double kScale = 1.0 / derivative<kAlpha>(kNoPair);
  u[0] = broadcast(static_cast<T>(kScale)) * g[0];
  transform_weight_pairs<T, kAlpha, kTaps>(g, u);
  u[kAlpha - 1] = g[kTaps - 1];
}

// y = A^T m
template <class T, int kAlpha, int kOutputs, int kPair = 0>
__attribute__((always_inline)) inline void transform_output_pairs(const Vec<T> (&m)[kAlpha], Vec<T> (&y)[kOutputs]) {
  if constexpr (kPair < kPairCount<kAlpha>) {
    constexpr Powers kPowers = powers_of(Points<kAlpha>::kPairs[kPair]);
    const Vec<T> even = m[1 + 2 * kPair] + m[2 + 2 * kPair], odd = m[1 + 2 * kPair] - m[2 + 2 * kPair];
    y[0] += even;
#pragma GCC unroll 4
    for (int i = 1; i < kOutputs; ++i) y[i] = fma(broadcast(static_cast<T>(kPowers.of[i])), i % 2 == 0 ? even : odd, y[i]);
    transform_output_pairs<T, kAlpha, kOutputs, kPair + 1>(m, y);
  }
}

template <class T, int kAlpha, int kOutputs>
__attribute__((always_inline)) inline void transform_output_axis(const Vec<T> (&m)[kAlpha], Vec<T> (&y)[kOutputs]) {
  y[0] = m[0];
#pragma GCC unroll 4
  for (int i = 1; i + 1 < kOutputs; ++i) y[i] = Vec<T>{};
  y[kOutputs - 1] = m[kAlpha - 1];
  transform_output_pairs<T, kAlpha, kOutputs>(m, y);
}

// B^T d B of a tile: vectors d[i][j] at src + i * row_pitch + j * lanes, to alpha * alpha vectors `dst_pitch` apart.
template <class T, int kAlpha>
inline void transform_input_tile(const T* src, int64_t row_pitch, T* dst, int64_t dst_pitch) {
  constexpr int kV = kLanes<T>;
  Vec<T> rows[kAlpha][kAlpha];
#pragma GCC unroll 1
  for (int i = 0; i < kAlpha; ++i) {
    Vec<T> d[kAlpha];
#pragma GCC unroll 8
    for (int j = 0; j < kAlpha; ++j) d[j] = load(src + i * row_pitch + j * kV);
    transform_input_axis<T, kAlpha>(d, rows[i]);
  }
#pragma GCC unroll 1
  for (int j = 0; j < kAlpha; ++j) {
    Vec<T> d[kAlpha], v[kAlpha];
#pragma GCC unroll 8
    for (int i = 0; i < kAlpha; ++i) d[i] = rows[i][j];
    transform_input_axis<T, kAlpha>(d, v);
#pragma GCC unroll 8
    for (int i = 0; i < kAlpha; ++i) store(dst + (i * kAlpha + j) * dst_pitch, v[i]);
  }
}

// G g G^T of one vector of filters: the tap (r, s) at src + r * row_pitch + s * col_pitch (negative pitches rotate the filter), to
// alpha * alpha vectors `dst_pitch` apart.
template <class T, int kAlpha, int kTaps>
inline void transform_filter(const T* src, int64_t row_pitch, int64_t col_pitch, T* dst, int64_t dst_pitch) {
  Vec<T> rows[kTaps][kAlpha];
#pragma GCC unroll 1
  for (int r = 0; r < kTaps; ++r) {
    Vec<T> g[kTaps];
#pragma GCC unroll 8
    for (int s = 0; s < kTaps; ++s) g[s] = load(src + r * row_pitch + s * col_pitch);
    transform_weight_axis<T, kAlpha, kTaps>(g, rows[r]);
  }
#pragma GCC unroll 1
  for (int j = 0; j < kAlpha; ++j) {
    Vec<T> g[kTaps], u[kAlpha];
#pragma GCC unroll 8
    for (int r = 0; r < kTaps; ++r) g[r] = rows[r][j];
    transform_weight_axis<T, kAlpha, kTaps>(g, u);
#pragma GCC unroll 8
    for (int i = 0; i < kAlpha; ++i) store(dst + (i * kAlpha + j) * dst_pitch, u[i]);
  }
}

// A^T m A of alpha * alpha vectors `pitch` apart.
template <class T, int kAlpha, int kOutputs>
inline void transform_output_tile(const T* src, int64_t pitch, Vec<T> (&y)[kOutputs][kOutputs]) {
  Vec<T> rows[kOutputs][kAlpha];
#pragma GCC unroll 1
  for (int j = 0; j < kAlpha; ++j) {
    Vec<T> m[kAlpha], column[kOutputs];
#pragma GCC unroll 8
    for (int i = 0; i < kAlpha; ++i) m[i] = load(src + (i * kAlpha + j) * pitch);
    transform_output_axis<T, kAlpha, kOutputs>(m, column);
#pragma GCC unroll 4
    for (int i = 0; i < kOutputs; ++i) rows[i][j] = column[i];
  }
#pragma GCC unroll 4
  for (int i = 0; i < kOutputs; ++i) transform_output_axis<T, kAlpha, kOutputs>(rows[i], y[i]);
}

}  // namespace
