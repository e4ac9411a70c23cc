// Chooses the row for a call, gives it scratch and threads, and runs it.
#include <pthread.h>

#include <atomic>
#include <stdexcept>

#include "cpu/api.h"
#include "cpu/isa.h"
#include "cpu/kernel_table.h"
#include "cpu/workspace.h"

namespace cnn_ext::cpu {
namespace {

// Below this much work an OpenMP region costs more than it saves.
constexpr int64_t kSerialMultiplications = 75'000;

// After a fork the OpenMP runtime's threads are gone in the child, and a parallel region would wait for them for ever.
std::atomic<bool> forked{false};
const int atfork_registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

constexpr const char* kConv2dDirections[] = {"forward", "backward_input", "backward_weight", "backward_bias"};
constexpr const char* kPool2dDirections[] = {"forward", "backward", "gather"};
constexpr const char* kPool2dOps[] = {"max_pool2d", "avg_pool2d"};

const char* op_name(const Conv2dKernel&) { return "conv2d"; }
const char* op_name(const Pool2dKernel& row) { return kPool2dOps[static_cast<int>(row.op)]; }
const char* direction_name(const Conv2dKernel& row) { return kConv2dDirections[static_cast<int>(row.direction)]; }
const char* direction_name(const Pool2dKernel& row) { return kPool2dDirections[static_cast<int>(row.direction)]; }

// One slot for each op and direction: the rows of a slot compete for its calls.
int slot_of(Conv2dDirection direction) { return static_cast<int>(direction); }
int slot_of(Pool2dOp op, Pool2dDirection direction) { return 3 * static_cast<int>(op) + static_cast<int>(direction); }
int slot_of(const Conv2dKernel& row) { return slot_of(row.direction); }
int slot_of(const Pool2dKernel& row) { return slot_of(row.op, row.direction); }

std::atomic<const Conv2dKernel*> forced_conv2d[4];
std::atomic<const Pool2dKernel*> forced_pool2d[6];
std::atomic<const Conv2dKernel*>& forced(const Conv2dKernel& row) { return forced_conv2d[slot_of(row)]; }
std::atomic<const Pool2dKernel*>& forced(const Pool2dKernel& row) { return forced_pool2d[slot_of(row)]; }

bool is_supported(Isa isa) { return isa <= best_isa(); }

int64_t multiplications(const Conv2dShape& s) {
  return s.batch * s.out_channels * s.out_h * s.out_w * (s.in_channels / s.groups) * s.kernel_h * s.kernel_w;
}
int64_t multiplications(const Pool2dShape& s) { return s.batch * s.channels * s.out_h * s.out_w * s.kernel_h * s.kernel_w; }

template <class Shape>
int usable_threads(const Shape& shape, int threads) {
  return forked || multiplications(shape) < kSerialMultiplications ? 1 : threads;
}

// Offers the rows of a slot that support the shape to `use`, the best first (a forced one before all), until it returns true.
template <class Kernel, class Shape, class Use>
void offer(const std::vector<const Kernel*>& table, int slot, const Kernel* forced_row, const Shape& shape, const Use& use) {
  if (forced_row != nullptr) {
    if (!forced_row->accepts(shape)) throw std::invalid_argument("forced kernel " + std::string(forced_row->name) + " refuses this shape");
    if (use(*forced_row)) return;
  }
  for (const Kernel* row : table) {
    if (slot_of(*row) == slot && row != forced_row && is_supported(row->isa) && row->accepts(shape) && use(*row)) return;
  }
  throw std::invalid_argument("no kernel serves this shape and dtype");
}

template <class Kernel, class Shape>
Choice choose(const std::vector<const Kernel*>& table, int slot, const Kernel* forced_row, const Shape& shape, int threads) {
  Choice choice;
  offer(table, slot, forced_row, shape, [&](const Kernel& row) {
    choice.threads = usable_threads(shape, threads);
    choice.kernel = row.name;
    choice.isa = row.isa;
    choice.plan = row.plan(shape, choice.threads);
    return true;
  });
  return choice;
}

template <class Kernel>
const Kernel* find_row(const std::vector<const Kernel*>& table, const std::string& name) {
  for (const Kernel* row : table) {
    if (name == row->name) return row;
  }
  return nullptr;
}

template <class Kernel>
std::string exchange_forced(const Kernel& slot_member, const Kernel* row) {
  const Kernel* previous = forced(slot_member).exchange(row);
  return previous == nullptr ? "" : previous->name;
}

template <class Kernel>
void append_rows(std::vector<KernelRow>& rows, const std::vector<const Kernel*>& table) {
  for (const Kernel* row : table) rows.push_back({row->name, op_name(*row), direction_name(*row), row->isa, is_supported(row->isa)});
}

}  // namespace

void run_conv2d(Conv2dDirection direction, const Conv2dShape& shape, const Conv2dBuffers& buffers, int threads) {
  const int team = usable_threads(shape, threads);
  const int slot = slot_of(direction);
  offer(conv2d_kernels(), slot, forced_conv2d[slot].load(), shape, [&](const Conv2dKernel& row) {
    Workspace workspace(row.plan(shape, team).workspace_bytes);
    return row.run(shape, buffers, workspace.data(), team) == Outcome::done;
  });
}

void run_pool2d(Pool2dOp op, Pool2dDirection direction, const Pool2dShape& shape, const Pool2dBuffers& buffers, int threads) {
  const int team = usable_threads(shape, threads);
  const int slot = slot_of(op, direction);
  offer(pool2d_kernels(), slot, forced_pool2d[slot].load(), shape, [&](const Pool2dKernel& row) {
    Workspace workspace(row.plan(shape, team).workspace_bytes);
    row.run(shape, buffers, workspace.data(), team);
    return true;
  });
}

Choice choose_conv2d(Conv2dDirection direction, const Conv2dShape& shape, int threads) {
  const int slot = slot_of(direction);
  return choose(conv2d_kernels(), slot, forced_conv2d[slot].load(), shape, threads);
}

Choice choose_pool2d(Pool2dOp op, Pool2dDirection direction, const Pool2dShape& shape, int threads) {
  const int slot = slot_of(op, direction);
  return choose(pool2d_kernels(), slot, forced_pool2d[slot].load(), shape, threads);
}

std::vector<KernelRow> kernel_rows() {
  std::vector<KernelRow> rows;
  append_rows(rows, conv2d_kernels());
  append_rows(rows, pool2d_kernels());
  return rows;
}

std::string force_kernel(const std::string& name) {
  const Conv2dKernel* conv2d = find_row(conv2d_kernels(), name);
  const Pool2dKernel* pool2d = find_row(pool2d_kernels(), name);
  if (conv2d == nullptr && pool2d == nullptr) throw std::invalid_argument("name: no kernel is called \"" + name + "\"");
  if (!is_supported(conv2d != nullptr ? conv2d->isa : pool2d->isa)) {
    throw std::invalid_argument("name: this machine, or CNN_EXT_ISA, does not allow kernel \"" + name + "\"");
  }
  return conv2d != nullptr ? exchange_forced(*conv2d, conv2d) : exchange_forced(*pool2d, pool2d);
}

void restore_forced_kernel(const std::string& name, const std::string& previous) {
  if (const Conv2dKernel* row = find_row(conv2d_kernels(), name)) exchange_forced(*row, find_row(conv2d_kernels(), previous));
  if (const Pool2dKernel* row = find_row(pool2d_kernels(), name)) exchange_forced(*row, find_row(pool2d_kernels(), previous));
}

}  // namespace cnn_ext::cpu
