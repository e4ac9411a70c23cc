#include "cuda/archs.h"

#include <sstream>
#include <stdexcept>

namespace cnn_ext::cuda {
namespace {

constexpr int kLeastCapability = 80;

// "90" runs on 9.0 and on later minors of the same major; "90a" on 9.0 alone.
struct Arch {
  explicit Arch(const std::string& text) : name(text), capability(std::stoi(text)), is_specific(!std::isdigit(text.back())) {}
  bool machine_code_runs_on(int device) const {
    return is_specific ? device == capability : device / 10 == capability / 10 && device >= capability;
  }
  bool portable_code_runs_on(int device) const { return is_specific ? device == capability : device >= capability; }
  std::string name;
  int capability;
  bool is_specific;
};

// Sorted by CMake: the newest is the last.
std::vector<Arch> archs() {
  std::istringstream words(CNN_EXT_CUDA_ARCHS);
  std::vector<Arch> result;
  for (std::string word; words >> word;) result.emplace_back(word);
  return result;
}

bool is_served(int capability) {
  const std::vector<Arch> all = archs();
  for (const Arch& arch : all) {
    if (arch.machine_code_runs_on(capability)) return true;
  }
  return all.back().portable_code_runs_on(capability);
}

std::string joined(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : ", ") + word;
  return text;
}

}  // namespace

std::vector<std::string> built_archs() {
  std::vector<std::string> names;
  for (const Arch& arch : archs()) names.push_back("sm_" + arch.name);
  names.push_back("compute_" + archs().back().name);
  return names;
}

void require_arch(int capability, const std::string& device) {
  const std::string number = std::to_string(capability);
  if (capability < kLeastCapability) {
    throw std::runtime_error("cnn_ext's CUDA kernels need compute capability 8.0 or newer: " + device + " is sm_" + number);
  }
  if (!is_served(capability)) {
    throw std::runtime_error("cnn_ext's CUDA kernels were built for " + joined(built_archs()) + ": " + device + " is sm_" + number +
                             "; rebuild with CNN_EXT_CUDA_ARCHS=" + number);
  }
}

}  // namespace cnn_ext::cuda
