// A CPU kernel is a row of a table: what it is called, what it needs, what it accepts, how it would run a shape, and how it runs it.
// Included by files compiled for different instruction sets: declarations and plain data only.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/shapes.h"

namespace cnn_ext::cpu {

enum class Isa : int32_t { baseline, avx2, avx512, avx512_bf16 };

// How a kernel would run a shape, for the workspace that the caller provides and for explain(). The numbers below are a function of the
// shape, the row and the number of threads; the order of additions must not depend on the latter (DESIGN.md, order of additions).
struct Plan {
  int64_t tile_channels;   // channels of one register tile
  int64_t tile_pixels;     // pixels of one register tile
  int64_t tasks;           // independent pieces of work
  size_t workspace_bytes;  // scratch for the whole call, all threads together
};

// A fast kernel multiplies the zeros that it stages for padding, which is only right where the other operand is finite. A run that met an
// infinity or a NaN there says so, and the caller takes the next row, which overwrites whatever was written.
enum class Outcome : int32_t { done, not_finite };

struct Conv2dKernel {
  const char* name;  // <op>_<direction>_<algorithm>_<isa>
  Isa isa;
  Conv2dDirection direction;
  bool (*accepts)(const Conv2dShape&);
  Plan (*plan)(const Conv2dShape&, int threads);
  // workspace: plan().workspace_bytes bytes, aligned to 64.
  Outcome (*run)(const Conv2dShape&, const Conv2dBuffers&, void* workspace, int threads);
  bool adds_bias = false;     // of backward_input: whether it takes a bias, as a transposed convolution has one (forward takes it always)
  bool maps_padding = false;  // whether it takes other padding modes than zeros
};

struct Conv2dReluPoolKernel {
  const char* name;
  Isa isa;
  Conv2dDirection direction;
  bool (*accepts)(const Conv2dReluPoolShape&);
  Plan (*plan)(const Conv2dReluPoolShape&, int threads);
  Outcome (*run)(const Conv2dReluPoolShape&, const Conv2dReluPoolBuffers&, void* workspace, int threads);
};

struct Pool2dKernel {
  const char* name;
  Isa isa;
  Pool2dOp op;
  Pool2dDirection direction;
  bool (*accepts)(const Pool2dShape&);
  Plan (*plan)(const Pool2dShape&, int threads);
  void (*run)(const Pool2dShape&, const Pool2dBuffers&, void* workspace, int threads);
};

}  // namespace cnn_ext::cpu

// Sources under kernels/ are compiled once per instruction set with CNN_EXT_ISA = baseline | avx2 | avx512 | avx512_bf16: it names their
// namespace, and with it the suffix of the row names.
#ifdef CNN_EXT_ISA
#define CNN_EXT_STRINGIZE_(x) #x
#define CNN_EXT_STRINGIZE(x) CNN_EXT_STRINGIZE_(x)
#define CNN_EXT_KERNEL_NAME(stem) stem "_" CNN_EXT_STRINGIZE(CNN_EXT_ISA)
#endif
