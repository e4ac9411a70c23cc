// CUDA's execution model on the host: the blocks of a grid one after the other, a block's threads as fibres that take turns where they wait
// for one another. Which of them goes first is a choice (Order): what depends on it lacks a barrier. A warp goes on as far as it can before
// another one does, so that they are as far apart as the barriers of the block allow.
//
// Whatever a real device would leave undefined fails here: std::runtime_error with the block and the thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace cnn_ext::emulation {

constexpr int kWarpThreads = 32;

enum class Order { forward, reverse, shuffled };

// Of the blocks that run from now on. shuffled: by a random permutation for each block.
void set_order(Order order);
// Of every grid from now on, only so many blocks run, the last ones; 0: all.
void set_last_blocks(int64_t blocks);

// Calls thread() once for each thread of each block, with the built-in variables set (builtins.h).
void run_grid(int64_t blocks, int threads, size_t shared_bytes, const std::function<void()>& thread);

// The rest is for what runs inside thread().
[[noreturn]] void fail(const std::string& what);

// The block's dynamic shared memory, flush before a guard page: just as many bytes as were asked for, each 0xFF at first.
void* dynamic_shared_memory();

// A barrier: where `expected` threads meet, each with a number. Returns the sum of the numbers to all of them.
class Barrier {
 public:
  int wait(int expected, int number = 0);
  unsigned generation() const { return generation_; }

 private:
  int arrived_ = 0, sum_ = 0, result_ = 0;
  unsigned generation_ = 0;
  char marks_[2] = {};  // of the meetings with even and with odd numbers
};

Barrier& block_barrier(int id);
Barrier& warp_barrier();
int block_threads();
int lane();

// Every lane of the warp gives `bytes` bytes and gets all lanes' in turn. They stay until the next but one exchange.
constexpr size_t kExchangeBytes = 48;
const unsigned char* exchange(const void* mine, size_t bytes);

template <class T>
const T* exchange(const T& mine) {
  static_assert(sizeof(T) <= kExchangeBytes && kExchangeBytes % alignof(T) == 0);
  return reinterpret_cast<const T*>(exchange(&mine, sizeof(T)));
}

// Asynchronous copies of this thread. Until one lands its destination holds 0xFF, and it lands only in land_copies().
void queue_copy(void* destination, const void* source, size_t bytes, bool exists);
void close_copy_group();
void land_copies(int groups_left);

}  // namespace cnn_ext::emulation
