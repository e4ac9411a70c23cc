// Threads of execution with stacks of their own that are switched by hand: a switch costs a few nanoseconds, not a system call. To
// ThreadSanitizer they are threads that only happen_after() orders: it finds every pair of accesses without a barrier between them.
#pragma once

#include <cstddef>

namespace cnn_ext::emulation {

class Fibre {
 public:
  Fibre() = default;  // for the stack that the program was started on
  // Runs entry() when it is switched to for the first time; entry() begins with begin() and never returns.
  void prepare(void* stack, size_t bytes, void (*entry)());
  // Goes on with `next` and returns when somebody switches to this fibre, the one that runs, again.
  void switch_to(Fibre& next);
  static void begin(Fibre& first_caller);
  void prefetch() const { __builtin_prefetch(stack_pointer_), __builtin_prefetch(static_cast<const char*>(stack_pointer_) + 64); }

 private:
  void* stack_pointer_ = nullptr;
  const void* stack_ = nullptr;
  size_t bytes_ = 0;
  void* thread_ = nullptr;  // ThreadSanitizer's
};

// What the fibre has done so far happens before what follows happen_after() of the same mark.
void happen_before(void* mark);
void happen_after(void* mark);

}  // namespace cnn_ext::emulation
