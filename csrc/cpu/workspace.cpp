#include "cpu/workspace.h"

#include <cstdlib>
#include <memory>
#include <new>

namespace cnn_ext::cpu {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kLargestKept = size_t{64} << 20;

struct Free {
  void operator()(void* p) const { std::free(p); }
};

struct Block {
  std::unique_ptr<void, Free> data;
  size_t bytes = 0;
};

thread_local Block kept;

Block allocate(size_t bytes) {
  const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  Block block{std::unique_ptr<void, Free>(std::aligned_alloc(kAlignment, rounded)), rounded};
  if (!block.data) throw std::bad_alloc();
  return block;
}

}  // namespace

Workspace::Workspace(size_t bytes) : data_(nullptr), bytes_(0) {
  if (bytes == 0) return;
  Block block = kept.bytes >= bytes ? std::move(kept) : allocate(bytes);
  kept = Block{};
  bytes_ = block.bytes;
  data_ = block.data.release();
}

Workspace::~Workspace() {
  if (bytes_ > kLargestKept || bytes_ < kept.bytes) {
    std::free(data_);
  } else if (data_ != nullptr) {
    kept = Block{std::unique_ptr<void, Free>(data_), bytes_};
  }
}

}  // namespace cnn_ext::cpu
