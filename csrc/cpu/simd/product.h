// A product with one element in all lanes, for tiles whose elements serve a single multiplication.
#pragma once

#include "cpu/simd/vec.h"

namespace {

// sum + *x * weight. With AVX-512 the instruction that multiplies broadcasts, too, which saves the other one.
inline Vec<float> add_product(const float* x, Vec<float> weight, Vec<float> sum) {
#if defined(__AVX512F__)
  asm("vfmadd231ps %1%{1to16%}, %2, %0" : "+v"(sum) : "m"(*x), "v"(weight));
  return sum;
#else
  return fma(broadcast_from(x), weight, sum);
#endif
}
inline Vec<double> add_product(const double* x, Vec<double> weight, Vec<double> sum) { return fma(broadcast_from(x), weight, sum); }

}  // namespace
