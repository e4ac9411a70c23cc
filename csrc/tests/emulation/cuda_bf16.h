#pragma once

#include "core/half.h"
#include "tests/emulation/builtins.h"

using __nv_bfloat16 = cnn_ext::BFloat16;
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }
