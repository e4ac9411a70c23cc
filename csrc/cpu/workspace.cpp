#include "cpu/workspace.h"

#include <cstdlib>
#include <memory>
#include <new>
#include <utility>

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

// A call of a kernel may make another one, whose workspace lives within that of the first: each depth keeps a block.
constexpr int kDepths = 3;
thread_local Block kept[kDepths];
thread_local int depth = 0;

Block allocate(size_t bytes) {
  const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  Block block{std::unique_ptr<void, Free>(std::aligned_alloc(kAlignment, rounded)), rounded};
  if (!block.data) throw std::bad_alloc();
  return block;
}

}  // namespace

Workspace::Workspace(size_t bytes) : data_(nullptr), bytes_(0) {
  if (bytes != 0) {
    Block block;
    if (depth < kDepths) std::swap(block, kept[depth]);
    if (block.bytes < bytes) {
      block = Block{};  // before the new one: the two together may be more than there is
      block = allocate(bytes);
    }
    bytes_ = block.bytes;
    data_ = block.data.release();
  }
  ++depth;
}

Workspace::~Workspace() {
  --depth;
  if (data_ == nullptr) return;
  Block block{std::unique_ptr<void, Free>(data_), bytes_};
  if (depth < kDepths && bytes_ <= kLargestKept) kept[depth] = std::move(block);
}

}  // namespace cnn_ext::cpu
