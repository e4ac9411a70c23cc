// For which devices the kernels were compiled.
#pragma once

#include <string>
#include <vector>

namespace cnn_ext::cuda {

// As CMake was told (cmake/cuda.cmake): machine code for each, "sm_80", and portable code (PTX) of the newest, "compute_90".
std::vector<std::string> built_archs();

// Throws std::runtime_error with both sides and the remedy if no compiled kernel runs on a device of this compute capability
// (10 * major + minor). device: its name, for the message.
void require_arch(int capability, const std::string& device);

}  // namespace cnn_ext::cuda
