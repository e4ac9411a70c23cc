// The command line of the programs that check kernels over the shared cases: CONV2D_CSV POOL2D_CSV [--every N] [--row NAME] [--dtype NAME].
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "tests/cases.h"

namespace cnn_ext::tests {

struct Options {
  const char *conv2d_file = nullptr, *pool2d_file = nullptr;
  std::string row, dtype;  // "": all
  size_t every = 1;
};

// `has_row` tells whether there is a kernel of a name.
template <class HasRow>
Options parse_options(int argc, char** argv, const HasRow& has_row) {
  Options options;
  if (argc < 3) throw std::invalid_argument("usage: CONV2D_CSV POOL2D_CSV [--every N] [--row NAME] [--dtype NAME]");
  options.conv2d_file = argv[1], options.pool2d_file = argv[2];
  for (int i = 3; i < argc; i += 2) {
    const std::string option = argv[i], value = i + 1 < argc ? argv[i + 1] : "";
    if (option == "--every" && std::atoi(value.c_str()) > 0) {
      options.every = static_cast<size_t>(std::atoi(value.c_str()));
    } else if (option == "--row" && has_row(value)) {
      options.row = value;
    } else if (option == "--dtype") {
      options.dtype = value;
    } else {
      throw std::invalid_argument("cannot do with " + option + " " + value);
    }
  }
  return options;
}

// Each `every`-th case, the `first` (modulo `every`) one first.
inline std::vector<Case> sample(const std::vector<Case>& cases, size_t first, size_t every) {
  std::vector<Case> taken;
  for (size_t i = first % every; i < cases.size(); i += every) taken.push_back(cases[i]);
  return taken;
}

}  // namespace cnn_ext::tests
