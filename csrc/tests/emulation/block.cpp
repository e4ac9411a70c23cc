#include "tests/emulation/block.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <numeric>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#include "tests/emulation/builtins.h"
#include "tests/emulation/fibre.h"
#include "tests/guarded.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cnn_ext::emulation {
namespace {

constexpr int kMostThreads = 1024;
constexpr size_t kStackBytes = 256 * 1024;
constexpr int kNamedBarriers = 16;

struct Copy {
  void* destination;
  const void* source;
  size_t bytes;
  bool exists;
  int group;
};

// The threads that have not ended, in the order in which they take turns.
struct Ring {
  int next, previous;
};
struct Turns {
  Ring in_block, in_warp;
};

struct Thread {
  Fibre fibre;
  Turns turns;
  std::vector<Copy> copies;
  int copy_groups;
};

struct Warp {
  Barrier barrier;
  alignas(16) unsigned char exchanged[2][kWarpThreads * kExchangeBytes];
};

// The block that runs.
struct Block {
  Thread threads[kMostThreads];
  Warp warps[kMostThreads / kWarpThreads];
  Barrier barriers[kNamedBarriers];
  int size = 0;       // threads
  int alive = 0;      // threads that have not ended
  int fruitless = 0;  // waits since anybody last got any further
  std::exception_ptr error;
  const std::function<void()>* thread = nullptr;
  void* shared = nullptr;
  char mark = 0;  // of its beginning and its end
};

Block block;
Fibre program;
Order order = Order::forward;
int64_t last_blocks = 0;  // that run of a grid; 0: all
int prepared = 0;         // threads whose fibres have a stack

Thread& current() { return block.threads[threadIdx.x]; }

using Scope = Ring Turns::*;

void join(std::vector<Turns>& turns, const std::vector<int>& threads, Scope scope) {
  for (size_t i = 0; i < threads.size(); ++i) {
    turns[threads[i]].*scope = {threads[(i + 1) % threads.size()], threads[(i + threads.size() - 1) % threads.size()]};
  }
}

void drop_out(const Thread& thread, Scope scope) {
  const Ring ring = thread.turns.*scope;
  (block.threads[ring.previous].turns.*scope).next = ring.next;
  (block.threads[ring.next].turns.*scope).previous = ring.previous;
}

void enter(Fibre& from, int index) {
  threadIdx.x = static_cast<unsigned>(index);
  Thread& thread = block.threads[index];
  block.threads[thread.turns.in_block.next].fibre.prefetch();
  from.switch_to(thread.fibre);
}

// Lets another thread go on.
void take_turns(Scope scope) {
  if (++block.fruitless > 3 * block.alive) fail("waits for threads that never come");
  Thread& self = current();
  const int index = static_cast<int>(threadIdx.x), next = (self.turns.*scope).next;
  if (next == index) return;
  enter(self.fibre, next);
  threadIdx.x = static_cast<unsigned>(index);
}

void run_thread() {
  Thread& self = current();
  self.copies.clear();
  self.copy_groups = 0;
  happen_after(&block.mark);
  try {
    (*block.thread)();
    if (!self.copies.empty()) fail("ends with copies on their way");
  } catch (...) {
    block.error = std::current_exception();
  }
  happen_before(&block.mark);
}

void leave() {
  Thread& self = current();
  block.fruitless = 0;
  --block.alive;
  if (block.error != nullptr || block.alive == 0) {
    self.fibre.switch_to(program);
  } else {
    drop_out(self, &Turns::in_block);
    drop_out(self, &Turns::in_warp);
    enter(self.fibre, self.turns.in_block.next);
  }
}

void fibre_entry() {
  Fibre::begin(program);
  for (;;) {
    run_thread();
    leave();
  }
}

// Stacks with a page between them that may not be touched. Their tops are staggered, or all of them would compete for the same few cache
// lines.
void prepare_fibres(int threads) {
  static char* const stacks = static_cast<char*>(
      mmap(nullptr, kMostThreads * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (stacks == MAP_FAILED) throw std::bad_alloc();
  constexpr size_t kGuardBytes = 4096, kStagger = 9 * 64, kMostStagger = 32 * 1024;
  for (; prepared < threads; ++prepared) {
    char* stack = stacks + static_cast<size_t>(prepared) * kStackBytes;
    mprotect(stack, kGuardBytes, PROT_NONE);
    const size_t stagger = static_cast<size_t>(prepared) * kStagger % kMostStagger;
    block.threads[prepared].fibre.prepare(stack + kGuardBytes, kStackBytes - kGuardBytes - stagger, fibre_entry);
  }
}

// In the wanted order; a shuffled one differs from launch to launch.
std::vector<int> ordered_threads() {
  static unsigned launches = 0;
  std::vector<int> threads(static_cast<size_t>(block.size));
  std::iota(threads.begin(), threads.end(), 0);
  if (order == Order::reverse) std::reverse(threads.begin(), threads.end());
  if (order == Order::shuffled) std::shuffle(threads.begin(), threads.end(), std::mt19937(++launches));
  return threads;
}

std::vector<Turns> turns_of(const std::vector<int>& threads) {
  std::vector<Turns> turns(threads.size());
  join(turns, threads, &Turns::in_block);
  std::vector<int> lanes[kMostThreads / kWarpThreads];
  for (const int thread : threads) lanes[thread / kWarpThreads].push_back(thread);
  for (const std::vector<int>& warp : lanes) join(turns, warp, &Turns::in_warp);
  return turns;
}

void run_block(int64_t index, int first, const std::vector<Turns>& turns) {
  blockIdx.x = static_cast<unsigned>(index);
  block.alive = block.size;
  block.fruitless = 0;
  for (Warp& warp : block.warps) warp.barrier = Barrier();
  for (Barrier& barrier : block.barriers) barrier = Barrier();
  for (size_t i = 0; i < turns.size(); ++i) block.threads[i].turns = turns[i];
  happen_before(&block.mark);
  enter(program, first);
  happen_after(&block.mark);
  if (block.error == nullptr) return;
  prepared = 0;  // the fibres that are left halfway start afresh
  std::rethrow_exception(std::exchange(block.error, nullptr));
}

}  // namespace

void set_order(Order wanted) { order = wanted; }
void set_last_blocks(int64_t wanted) { last_blocks = wanted; }

void run_grid(int64_t blocks, int threads, size_t shared_bytes, const std::function<void()>& thread) {
  if (shared_bytes % 16 != 0)
    throw std::invalid_argument("shared memory of " + std::to_string(shared_bytes) + " bytes: want a multiple of 16");
  if (threads < 1 || threads > kMostThreads) throw std::invalid_argument("a block of " + std::to_string(threads) + " threads");
  prepare_fibres(threads);
  block.size = threads;
  block.thread = &thread;
  gridDim = dim3(static_cast<unsigned>(blocks));
  blockDim = dim3(static_cast<unsigned>(threads));
  const std::vector<int> ordered = ordered_threads();
  const std::vector<Turns> turns = turns_of(ordered);
  const tests::Guarded shared(shared_bytes, tests::Flush::end);
  block.shared = shared_bytes != 0 ? shared.data() : nullptr;
  for (int64_t i = last_blocks == 0 ? 0 : std::max<int64_t>(0, blocks - last_blocks); i < blocks; ++i) {
    std::memset(shared.data(), 0xFF, shared_bytes);
    run_block(i, ordered[0], turns);
  }
}

void fail(const std::string& what) {
  throw std::runtime_error("block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(threadIdx.x) + ": " + what);
}

void* dynamic_shared_memory() {
  if (block.shared == nullptr) fail("asks for shared memory that the launch did not");
  return block.shared;
}

int Barrier::wait(int expected, int number) {
  const Scope scope = this == &warp_barrier() ? &Turns::in_warp : &Turns::in_block;
  sum_ += number;
  const unsigned mine = generation_;
  happen_before(&marks_[mine % 2]);
  if (++arrived_ == expected) {
    result_ = std::exchange(sum_, 0);
    arrived_ = 0;
    ++generation_;
    block.fruitless = 0;
    take_turns(scope);
  }
  if (generation_ == mine) take_turns(scope);
  while (generation_ == mine) take_turns(&Turns::in_block);
  happen_after(&marks_[mine % 2]);
  return result_;
}

Barrier& block_barrier(int id) {
  if (id < 0 || id >= kNamedBarriers) fail("barrier " + std::to_string(id));
  return block.barriers[id];
}

Barrier& warp_barrier() { return block.warps[threadIdx.x / kWarpThreads].barrier; }

int block_threads() { return block.size; }

int lane() { return static_cast<int>(threadIdx.x) % kWarpThreads; }

const unsigned char* exchange(const void* mine, size_t bytes) {
  if (block.size % kWarpThreads != 0) fail("a warp that is not full");
  Warp& warp = block.warps[threadIdx.x / kWarpThreads];
  unsigned char* exchanged = warp.exchanged[warp.barrier.generation() % 2];
  std::memcpy(exchanged + static_cast<size_t>(lane()) * bytes, mine, bytes);
  warp.barrier.wait(kWarpThreads);
  return exchanged;
}

void queue_copy(void* destination, const void* source, size_t bytes, bool exists) {
  const auto is_aligned = [bytes](const void* address) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; };
  if (!is_aligned(destination) || (exists && !is_aligned(source))) fail("an asynchronous copy that is not aligned");
  std::memset(destination, 0xFF, bytes);
  current().copies.push_back({destination, source, bytes, exists, current().copy_groups});
}

void close_copy_group() { ++current().copy_groups; }

void land_copies(int groups_left) {
  Thread& self = current();
  const auto stays =
      std::find_if(self.copies.begin(), self.copies.end(), [&](const Copy& copy) { return copy.group >= self.copy_groups - groups_left; });
  for (auto copy = self.copies.begin(); copy != stays; ++copy) {
    if (copy->exists) {
      std::memcpy(copy->destination, copy->source, copy->bytes);
    } else {
      std::memset(copy->destination, 0, copy->bytes);
    }
  }
  self.copies.erase(self.copies.begin(), stays);
}

}  // namespace cnn_ext::emulation
