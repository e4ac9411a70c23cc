// Every call of the CUDA runtime is checked: an error becomes an exception that says where, what and why.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#define CUDA_CHECK(call) ::cnn_ext::cuda::check((call), #call, __FILE__, __LINE__)

namespace cnn_ext::cuda {

inline void check(cudaError_t error, const char* call, const char* file, int line) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("CUDA error: ") + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ") in " + call +
                           ", " + file + ":" + std::to_string(line));
}

}  // namespace cnn_ext::cuda
