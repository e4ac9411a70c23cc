// Which instruction sets this machine has, and which of them may be used.
#pragma once

#include <string>

#include "cpu/kernel.h"

namespace cnn_ext::cpu {

const char* isa_name(Isa isa);

// The best instruction set that may be used: what the processor has, capped by the environment variable CNN_EXT_ISA (baseline, avx2,
// avx512 or avx512_bf16). Throws std::invalid_argument for another name there, or for one that the processor lacks.
Isa best_isa();

// Whether this process may use the processor's matrix unit (AMX) for bfloat16.
bool has_matrix_unit();

// Whether dot products of pairs of bfloat16 (vdpbf16ps) issue as often as float32's multiply-adds, and so make twice as many products: on
// AMD's processors from Zen 4 on. Intel's with a matrix unit issue a quarter as many.
bool has_fast_dot_products();

}  // namespace cnn_ext::cpu
