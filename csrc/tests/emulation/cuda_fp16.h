#pragma once

#include "core/half.h"
#include "tests/emulation/builtins.h"

using __half = cnn_ext::Float16;
inline float __half2float(__half x) { return x; }
inline __half __float2half_rn(float x) { return __half(x); }
