// Which kernels have run on a GPU and were right: those of the result file that `python -m benchmarks rows --device cuda` writes and CMake
// reads (cmake/cuda.cmake). A row that wants this proof (Conv2dKernel::needs_proof) is not chosen before; CNN_EXT_UNPROVEN=1 chooses it
// all the same.
#pragma once

#include <string>

namespace cnn_ext::cuda {

bool has_proof(const std::string& row);

// Throws std::invalid_argument where CNN_EXT_UNPROVEN is neither 0 nor 1.
bool is_admitted(const std::string& row, bool needs_proof);

}  // namespace cnn_ext::cuda
