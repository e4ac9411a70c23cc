// The caches of a core, as a kernel may plan with them: of processors that have this source's instruction set, the smaller ones that are
// common. Budgets of blocks are shares of these.
#pragma once

#include <cstdint>

#include "cpu/simd/vec.h"

namespace {

constexpr int64_t kFirstCacheBytes = (kVectorBytes == 64 ? 48 : 32) << 10;
constexpr int64_t kSecondCacheBytes = (kVectorBytes == 64 ? 2048 : 512) << 10;

}  // namespace
