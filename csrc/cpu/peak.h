// How fast this machine multiplies and adds when nothing else holds it up: what benchmarks measure beside each kernel, for the rate of a
// shared machine changes from second to second.
#pragma once

#include "core/shapes.h"
#include "cpu/kernel.h"

namespace cnn_ext::cpu {

// `rounds` rounds of independent multiply-adds in registers on each of `threads` threads, as one instruction set does them.
struct FmaLoop {
  Isa isa;
  int64_t flops_per_round_float32;
  int64_t flops_per_round_float64;
  void (*run_float32)(int64_t rounds, int threads);
  void (*run_float64)(int64_t rounds, int threads);
};

// GFLOP/s of the best instruction set's loop on `threads` threads, measured for about `seconds`. Throws std::invalid_argument for a half
// type.
double fma_gflops(DType dtype, int threads, double seconds);

}  // namespace cnn_ext::cpu
