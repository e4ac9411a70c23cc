// Of csrc/cuda/launch.cuh, for the host: runs the grid before it returns.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/kernel.h"
#include "tests/emulation/block.h"

namespace cnn_ext::cuda {

struct Grid {
  Grid(int64_t blocks_, int threads_ = kBlockThreads, size_t shared_bytes_ = 0)
      : blocks(blocks_), threads(threads_), shared_bytes(shared_bytes_) {}
  int64_t blocks;
  int threads;
  size_t shared_bytes;
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, cudaStream_t, const Arguments&... arguments) {
  emulation::run_grid(grid.blocks, grid.threads, grid.shared_bytes, [&] { kernel(arguments...); });
}

}  // namespace cnn_ext::cuda
