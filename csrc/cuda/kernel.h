// A CUDA kernel is a row of a table, as on the CPU: what it is called, what it needs, what it accepts, how it would run a shape, and how
// it runs it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "core/shapes.h"
#include "core/sized_pool2d.h"

namespace cnn_ext::cuda {

constexpr int kBlockThreads = 256;              // of every kernel
constexpr int64_t kMostGridBlocks = INT32_MAX;  // of a launch: CUDA's bound

// How a kernel would run a shape: a function of the shape and the row alone, never of the device, for the order of additions follows it.
struct Plan {
  int64_t tile_channels;   // channels of one block's tile
  int64_t tile_pixels;     // pixels of one block's tile
  int64_t blocks;          // of the main launch
  size_t workspace_bytes;  // device memory that the caller provides
};

// run() queues its launches on the stream of the current device and returns. workspace: plan().workspace_bytes bytes, aligned to 256.
struct Conv2dKernel {
  const char* name;    // <op>_<direction>_<algorithm>_<arch_name()>
  int min_capability;  // 10 * major + minor
  Conv2dDirection direction;
  bool (*accepts)(const Conv2dShape&);
  Plan (*plan)(const Conv2dShape&);
  void (*run)(const Conv2dShape&, const Conv2dBuffers&, void* workspace, cudaStream_t);
  bool needs_proof = false;    // stays aside until it has run on a GPU: the plain rows serve meanwhile (proof.h)
  bool adds_bias = false;      // of backward_input: whether it takes a bias, as a transposed convolution has one (forward takes it always)
  bool arch_specific = false;  // runs on that compute capability and on no later one
};

// Of max pooling of relu(convolution + bias), in the directions of the convolution.
struct Conv2dReluPoolKernel {
  const char* name;
  int min_capability;
  Conv2dDirection direction;
  bool (*accepts)(const Conv2dReluPoolShape&);
  Plan (*plan)(const Conv2dReluPoolShape&);
  void (*run)(const Conv2dReluPoolShape&, const Conv2dReluPoolBuffers&, void* workspace, cudaStream_t);
  bool needs_proof = false;
  bool arch_specific = false;
};

struct Pool2dKernel {
  const char* name;
  int min_capability;
  Pool2dOp op;
  Pool2dDirection direction;
  bool (*accepts)(const Pool2dShape&);
  Plan (*plan)(const Pool2dShape&);
  void (*run)(const Pool2dShape&, const Pool2dBuffers&, cudaStream_t);
  bool needs_proof = false;
  bool arch_specific = false;
};

struct SizedPool2dKernel {
  const char* name;
  int min_capability;
  SizedPool2dOp op;
  SizedPool2dDirection direction;
  bool (*accepts)(const SizedPool2dShape&);
  Plan (*plan)(const SizedPool2dShape&);
  void (*run)(const SizedPool2dShape&, const SizedPool2dBuffers&, cudaStream_t);
  bool needs_proof = false;
  bool arch_specific = false;
};

template <class Kernel>
bool runs_on(const Kernel& row, int capability) {
  return row.arch_specific ? capability == row.min_capability : capability >= row.min_capability;
}

// As the names of rows end: sm80, sm90a.
template <class Kernel>
std::string arch_name(const Kernel& row) {
  return "sm" + std::to_string(row.min_capability) + (row.arch_specific ? "a" : "");
}

}  // namespace cnn_ext::cuda
