#include "tests/emulation/fibre.h"

#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

namespace cnn_ext::emulation {

// Keeps the registers that a call must keep on the stack, remembers the stack pointer and takes up another one's.
extern "C" void cnn_ext_switch_stack(void** saved_stack_pointer, void* stack_pointer);

#if defined(__x86_64__)
asm(R"(
.text
.globl cnn_ext_switch_stack
.type cnn_ext_switch_stack, @function
cnn_ext_switch_stack:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size cnn_ext_switch_stack, .-cnn_ext_switch_stack
)");

// As if entry() had been called: its return address lies where the stack is 16 bytes aligned.
void Fibre::prepare(void* stack, size_t bytes, void (*entry)()) {
  constexpr size_t kRegisters = 6;
  stack_ = stack, bytes_ = bytes;
  uintptr_t* top = reinterpret_cast<uintptr_t*>(static_cast<char*>(stack) + bytes / 16 * 16);
  *--top = 0;
  *--top = reinterpret_cast<uintptr_t>(entry);
  for (size_t i = 0; i < kRegisters; ++i) *--top = 0;
  stack_pointer_ = top;
}
#else
#error "the emulation of CUDA's threads switches stacks on x86-64 only"
#endif

#if defined(__SANITIZE_ADDRESS__)
void Fibre::switch_to(Fibre& next) {
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, next.stack_, next.bytes_);
  cnn_ext_switch_stack(&stack_pointer_, next.stack_pointer_);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

void Fibre::begin(Fibre& first_caller) {
  const void* stack;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &bytes);
  if (first_caller.stack_ == nullptr) first_caller.stack_ = stack, first_caller.bytes_ = bytes;
}
#elif defined(__SANITIZE_THREAD__)
__attribute__((no_sanitize("thread"))) void Fibre::switch_to(Fibre& next) {
  if (thread_ == nullptr) thread_ = __tsan_get_current_fiber();
  if (next.thread_ == nullptr) next.thread_ = __tsan_create_fiber(0);
  __tsan_switch_to_fiber(next.thread_, __tsan_switch_to_fiber_no_sync);
  cnn_ext_switch_stack(&stack_pointer_, next.stack_pointer_);
}
void Fibre::begin(Fibre&) {}
#else
void Fibre::switch_to(Fibre& next) { cnn_ext_switch_stack(&stack_pointer_, next.stack_pointer_); }
void Fibre::begin(Fibre&) {}
#endif

#if defined(__SANITIZE_THREAD__)
void happen_before(void* mark) { __tsan_release(mark); }
void happen_after(void* mark) { __tsan_acquire(mark); }
#else
void happen_before(void*) {}
void happen_after(void*) {}
#endif

}  // namespace cnn_ext::emulation
