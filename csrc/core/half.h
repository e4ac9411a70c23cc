// The half types as they lie in memory, and the scalar types that stand for each DType. Arithmetic on halves is float32's: a half becomes a
// float, exactly, when it is read, and a float a half, rounded to nearest even, when it is written. Too large a float becomes an infinity,
// a NaN stays one. Included by files compiled for different instruction sets: everything has internal linkage.
#pragma once

#include <cstdint>

#include "core/shapes.h"

namespace cnn_ext {
namespace {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

// IEEE binary16: 5 bits of exponent, 10 of mantissa.
struct Float16 {
  Float16() = default;
  explicit Float16(float x) {
    constexpr uint32_t kTooLarge = 0x47800000, kFirstNormal = 0x38800000, kInfinity = 0x7f800000;  // 2^16, 2^-14
    uint32_t x_bits = bits_of(x);
    const uint32_t sign = x_bits >> 16 & 0x8000;
    x_bits &= 0x7fffffff;
    if (x_bits > kInfinity) {
      bits = static_cast<uint16_t>(sign | 0x7e00 | (x_bits >> 13 & 0x3ff));
    } else if (x_bits >= kTooLarge) {
      bits = static_cast<uint16_t>(sign | 0x7c00);
    } else if (x_bits < kFirstNormal) {  // the last place of 0.5 is the smallest half: the addition rounds
      bits = static_cast<uint16_t>(sign | (bits_of(float_of(x_bits) + 0.5f) - bits_of(0.5f)));
    } else {
      bits = static_cast<uint16_t>(sign | (x_bits + 0xfff + (x_bits >> 13 & 1) - (112u << 23)) >> 13);
    }
  }
  operator float() const {
    const uint32_t sign = (bits & 0x8000u) << 16, magnitude = (bits & 0x7fffu) << 13, exponent = magnitude & 0x0f800000;
    if (exponent == 0x0f800000) return float_of(sign | (magnitude + (224u << 23)));
    if (exponent != 0) return float_of(sign | (magnitude + (112u << 23)));
    return float_of(sign | bits_of(float_of(magnitude + (113u << 23)) - float_of(113u << 23)));
  }
  uint16_t bits;
};

// The upper half of a float.
struct BFloat16 {
  BFloat16() = default;
  explicit BFloat16(float x) {
    const uint32_t x_bits = bits_of(x);
    bits = static_cast<uint16_t>(x == x ? (x_bits + 0x7fff + (x_bits >> 16 & 1)) >> 16 : x_bits >> 16 | 0x40);
  }
  operator float() const { return float_of(static_cast<uint32_t>(bits) << 16); }
  uint16_t bits;
};

template <class T>
struct ComputeOf {
  using type = T;
};
template <>
struct ComputeOf<Float16> {
  using type = float;
};
template <>
struct ComputeOf<BFloat16> {
  using type = float;
};

// What values of a scalar type are computed in.
template <class T>
using Compute = typename ComputeOf<T>::type;

// visit(T{}) for the scalar type of a dtype.
template <class Visit>
inline auto with_scalar(DType dtype, const Visit& visit) {
  switch (dtype) {
    case DType::float64:
      return visit(double{});
    case DType::float16:
      return visit(Float16{});
    case DType::bfloat16:
      return visit(BFloat16{});
    default:
      return visit(float{});
  }
}

// The same for the half types alone.
template <class Visit>
inline auto with_half(DType dtype, const Visit& visit) {
  return dtype == DType::float16 ? visit(Float16{}) : visit(BFloat16{});
}

inline bool is_half(DType dtype) { return dtype == DType::float16 || dtype == DType::bfloat16; }

}  // namespace
}  // namespace cnn_ext
