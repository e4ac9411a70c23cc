// What the kernels' sources need of CUDA's runtime.
#pragma once

#include "tests/emulation/builtins.h"

using cudaStream_t = struct CUstream_st*;
using cudaError_t = int;
