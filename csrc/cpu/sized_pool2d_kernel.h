// The rows of the poolings of core/sized_pool2d.h: as cpu/kernel.h.
#pragma once

#include "core/sized_pool2d.h"
#include "cpu/kernel.h"

namespace cnn_ext::cpu {

struct SizedPool2dKernel {
  const char* name;
  Isa isa;
  SizedPool2dOp op;
  SizedPool2dDirection direction;
  bool (*accepts)(const SizedPool2dShape&);
  Plan (*plan)(const SizedPool2dShape&, int threads);
  // The indices that it reads lie within the plane.
  void (*run)(const SizedPool2dShape&, const SizedPool2dBuffers&, void* workspace, int threads);
};

}  // namespace cnn_ext::cpu
