// Pieces of a vector: 16 bytes, within which shuffles are cheapest, and which a load or a store finds in any place of the vector. So
// a few neighbouring elements of many rows are transposed with half the shuffles that whole vectors take, and little is lost to short
// rows.
#pragma once

#include "cpu/simd/transpose.h"

namespace {

template <class T>
constexpr int kPieceLanes = 16 / static_cast<int>(sizeof(T));
template <class T>
constexpr int kPieces = kLanes<T> / kPieceLanes<T>;

template <class T>
struct PieceTraits {
  typedef T unaligned __attribute__((vector_size(16), aligned(sizeof(T)), may_alias));
};

#if defined(__AVX__)
template <class T>
inline __m128 load_piece(const T* p) {
  return _mm_loadu_ps(reinterpret_cast<const float*>(p));
}
#endif

// Piece i of the vector lies at rows[i * kPieceLanes] + offset.
template <class T>
inline Vec<T> load_pieces(const T* const* rows, int64_t offset) {
#if defined(__AVX512F__)
  constexpr int kStep = kPieceLanes<T>;
  __m512 v = _mm512_zextps128_ps512(load_piece(rows[0] + offset));
  v = _mm512_insertf32x4(v, load_piece(rows[kStep] + offset), 1);
  v = _mm512_insertf32x4(v, load_piece(rows[2 * kStep] + offset), 2);
  return (Vec<T>)_mm512_insertf32x4(v, load_piece(rows[3 * kStep] + offset), 3);
#elif defined(__AVX__)
  constexpr int kStep = kPieceLanes<T>;
  return (Vec<T>)_mm256_insertf128_ps(_mm256_zextps128_ps256(load_piece(rows[0] + offset)), load_piece(rows[kStep] + offset), 1);
#else
  return load(rows[0] + offset);
#endif
}

// By an instruction of its own: GCC would move the piece to a register by a shuffle first.
template <class T, int kPiece>
inline void store_piece(T* p, Vec<T> v) {
  auto& piece = *reinterpret_cast<typename PieceTraits<T>::unaligned*>(p);
#if defined(__AVX512F__)
  asm("vextractf32x4 %2, %1, %0" : "=m"(piece) : "v"(v), "i"(kPiece));
#elif defined(__AVX__)
  asm("vextractf128 %2, %1, %0" : "=m"(piece) : "x"(v), "i"(kPiece));
#else
  piece = v;
#endif
}

// Piece i of vector j goes to rows[i * kPieceLanes + j] + offset, the last row first.
template <class T, int kPiece = kPieces<T> - 1>
inline void store_pieces(const Vec<T> (&vectors)[kPieceLanes<T>], T* const* rows, int64_t offset) {
#pragma GCC unroll 4
  for (int j = kPieceLanes<T> - 1; j >= 0; --j) store_piece<T, kPiece>(rows[kPiece * kPieceLanes<T> + j] + offset, vectors[j]);
  if constexpr (kPiece > 0) store_pieces<T, kPiece - 1>(vectors, rows, offset);
}

// Piece i of vector j goes to p + (i * kPieceLanes + j) * step, in ascending order: where they overlap, the later one stays.
template <class T, int kPiece = 0>
inline void store_pieces_in_turn(const Vec<T> (&vectors)[kPieceLanes<T>], T* p, int64_t step) {
#pragma GCC unroll 4
  for (int j = 0; j < kPieceLanes<T>; ++j) store_piece<T, kPiece>(p + (kPiece * kPieceLanes<T> + j) * step, vectors[j]);
  if constexpr (kPiece + 1 < kPieces<T>) store_pieces_in_turn<T, kPiece + 1>(vectors, p, step);
}

// Of each piece: vector i, lane j becomes vector j, lane i.
template <class T, int kStep = kPieceLanes<T> / 2>
inline void transpose_pieces(Vec<T> (&vectors)[kPieceLanes<T>]) {
#pragma GCC unroll 4
  for (int i = 0; i < kPieceLanes<T>; ++i) {
    if ((i & kStep) == 0) exchange_blocks<T, kStep>(vectors[i], vectors[i + kStep], typename CountedLanes<kLanes<T>>::type{});
  }
  if constexpr (kStep > 1) transpose_pieces<T, kStep / 2>(vectors);
}

}  // namespace
