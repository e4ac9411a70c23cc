// The one way to launch a kernel. The test programs without a GPU have a launch.cuh of their own (csrc/tests/emulation).
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#include "cuda/check.h"
#include "cuda/kernel.h"

namespace cnn_ext::cuda {

struct Grid {
  Grid(int64_t blocks_, int threads_ = kBlockThreads, size_t shared_bytes_ = 0, int cluster_blocks_ = 1)
      : blocks(blocks_), threads(threads_), shared_bytes(shared_bytes_), cluster_blocks(cluster_blocks_) {}
  int64_t blocks;
  int threads;            // of a block
  size_t shared_bytes;    // of a block, behind dynamic_shared()
  int cluster_blocks;     // neighbours that run together (sm_90); divides blocks
  bool overlaps = false;  // begins before the launch before it has ended, and waits for it itself (sm_90)
};

// What a block may ask for without saying so to the runtime first: 48 KB, less what is declared with a size.
constexpr size_t kPlainSharedBytes = 32 * 1024;

// Runs kernel<<<grid>>>(arguments...) on the stream. No blocks: nothing to do.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, cudaStream_t stream, const Arguments&... arguments) {
  if (grid.blocks == 0) return;
  if (grid.blocks > kMostGridBlocks) throw std::invalid_argument("the problem is too large: it needs more blocks than a CUDA grid holds");
  if (grid.shared_bytes > kPlainSharedBytes) {
    CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(grid.shared_bytes)));
  }
  if (grid.cluster_blocks > 1 || grid.overlaps) {
    cudaLaunchAttribute attributes[2]{};
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {static_cast<unsigned>(grid.cluster_blocks), 1, 1};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = grid.overlaps;
    cudaLaunchConfig_t config{};
    config.gridDim = static_cast<unsigned>(grid.blocks), config.blockDim = static_cast<unsigned>(grid.threads);
    config.dynamicSmemBytes = grid.shared_bytes, config.stream = stream;
    config.attrs = attributes, config.numAttrs = 2;
    CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
    return;
  }
  kernel<<<static_cast<unsigned>(grid.blocks), grid.threads, grid.shared_bytes, stream>>>(arguments...);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace cnn_ext::cuda
