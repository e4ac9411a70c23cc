// Rearrangements of vectors in registers.
#pragma once

#include "cpu/simd/vec.h"

namespace {

template <int... J>
struct Lanes {};

// Lanes<0, 1, ..., count - 1>
template <int kCount, int... J>
struct CountedLanes : CountedLanes<kCount - 1, kCount - 1, J...> {};
template <int... J>
struct CountedLanes<0, J...> {
  using type = Lanes<J...>;
};

// Elements 0, 2, 4, ... of a followed by b.
template <class T, int... J>
inline Vec<T> every_second(Vec<T> a, Vec<T> b, Lanes<J...>) {
  return __builtin_shufflevector(a, b, 2 * J...);
}

// Of the 2 x 2 blocks of kStep x kStep elements in rows a and b (kStep rows apart), exchanges the two off the diagonal.
template <class T, int kStep, int... J>
inline void exchange_blocks(Vec<T>& a, Vec<T>& b, Lanes<J...>) {
  constexpr int kSecond = kLanes<T>;  // where b's lanes begin in the numbering of the shuffle
  const Vec<T> upper = __builtin_shufflevector(a, b, ((J & kStep) != 0 ? kSecond + J - kStep : J)...);
  const Vec<T> lower = __builtin_shufflevector(a, b, ((J & kStep) != 0 ? kSecond + J : J + kStep)...);
  a = upper;
  b = lower;
}

// The lower halves of a and b.
template <class T, int... J>
inline Vec<T> join_lower_halves(Vec<T> a, Vec<T> b, Lanes<J...>) {
  constexpr int kHalf = kLanes<T> / 2;
  return __builtin_shufflevector(a, b, (J < kHalf ? J : J + kHalf)...);
}

// A square of vectors: row i, lane j becomes row j, lane i. With fewer rows than lanes there are several squares side by side.
template <class T, int kRows, int kStep = kRows / 2>
inline void transpose(Vec<T> (&rows)[kRows]) {
  if constexpr (kStep > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      if ((i & kStep) == 0) exchange_blocks<T, kStep>(rows[i], rows[i + kStep], typename CountedLanes<kLanes<T>>::type{});
    }
    transpose<T, kRows, kStep / 2>(rows);
  }
}

}  // namespace
