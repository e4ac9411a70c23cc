// Scratch memory for one call of a kernel.
#pragma once

#include <cstddef>

namespace cnn_ext::cpu {

// A block of at least `bytes` bytes, aligned to 64, that belongs to this call. Each calling thread keeps one block of at most 64 MB for
// each of three nested calls and hands it out again, so that a training step does not pay for fresh pages at every layer; larger ones are
// freed with the object. Objects end in the reverse order of their making.
class Workspace {
 public:
  explicit Workspace(size_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
  size_t bytes_;
};

}  // namespace cnn_ext::cpu
