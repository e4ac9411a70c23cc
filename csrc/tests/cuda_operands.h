// The tensors of one call of a kernel, for cuda_check: random values, rounded to the type that it reads, between guard pages.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "cuda/common.cuh"
#include "tests/emulation/block.h"
#include "tests/guarded.h"

namespace cnn_ext::tests {

using emulation::Order;

enum class Values { plain, absolute, not_finite };

// The operands of a case, the same for all rows, orders and dtypes but for their rounding. exact: whole numbers between -1 and 1, whose
// sums of products no type rounds.
struct Run {
  Order order = Order::forward;
  Flush flush = Flush::start;
  Values values = Values::plain;
  bool exact = false;
};

inline double operand(uint64_t seed, int64_t i, int64_t count, const Run& run) {
  const uint64_t x = random_bits(seed, i);
  if (run.values == Values::not_finite) {
    if (static_cast<int64_t>(random_bits(seed, -1) % static_cast<uint64_t>(count)) == i) return INFINITY;
    if (static_cast<int64_t>(random_bits(seed, -2) % static_cast<uint64_t>(count)) == i) return NAN;
  }
  double value = static_cast<double>(x >> 11) / 4503599627370496.0 - 1.0;
  if (run.exact) value = std::round(value);
  if (x & 1) value = std::round(value * 4) / 4;
  return run.values == Values::absolute ? std::fabs(value) : value;
}

// Tensors of one call as T, which the kernels read, or as the doubles of the same values.
template <class T, class Stored>
class Operands {
 public:
  explicit Operands(const Run& run) : run_(run), tensors_(run.flush) {}

  Stored* values(int64_t count, uint64_t seed) { return values(count, seed, run_); }
  Stored* values(int64_t count, uint64_t seed, const Run& run) {
    Stored* data = static_cast<Stored*>(bytes(count * static_cast<int64_t>(sizeof(Stored))));
    for (int64_t i = 0; i < count; ++i) {
      const T rounded = cuda::narrow<T>(static_cast<cuda::Accumulate<T>>(operand(seed, i, count, run)));
      if constexpr (std::is_same_v<T, Stored>) {
        data[i] = rounded;
      } else {
        data[i] = static_cast<Stored>(cuda::widen(rounded));
      }
    }
    return data;
  }
  void* bytes(int64_t count, const void* source = nullptr) { return tensors_.bytes(count, source); }

 private:
  Run run_;
  Tensors tensors_;
};

template <class Stored>
struct Result {
  std::vector<Stored> values;
  std::vector<uint8_t> offsets;  // raw bytes
};

}  // namespace cnn_ext::tests
