// cnn_ext._C: the shapes and the CPU kernels.
#include <pybind11/pybind11.h>

namespace cnn_ext {
void bind_shapes(pybind11::module_& m);
void bind_cpu(pybind11::module_& m);
}  // namespace cnn_ext

PYBIND11_MODULE(_C, m) {
  m.attr("source_hash") = CNN_EXT_SOURCE_HASH;
  m.attr("compiler") = CNN_EXT_COMPILER;
  cnn_ext::bind_shapes(m);
  cnn_ext::bind_cpu(m);
}
