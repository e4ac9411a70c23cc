// Chooses the row for a call, gives it scratch and threads, and runs it.
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <type_traits>

#include "cpu/api.h"
#include "cpu/float_rows.h"
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
constexpr const char* kSizedPool2dDirections[] = {"forward", "backward", "scatter", "gather"};
constexpr const char* kSizedPool2dOps[] = {"adaptive_max_pool2d", "adaptive_avg_pool2d", "max_unpool2d"};

// One slot for each op and direction: the rows of a slot compete for its calls.
int slot_of(Conv2dDirection direction) { return static_cast<int>(direction); }
int slot_of(Pool2dOp op, Pool2dDirection direction) { return 3 * static_cast<int>(op) + static_cast<int>(direction); }
int slot_of(SizedPool2dOp op, SizedPool2dDirection direction) { return 4 * static_cast<int>(op) + static_cast<int>(direction); }

// What the templates below need of each kind of kernel: its table, names and slots, and the row that is forced in each slot.
template <class Kernel>
struct Noun;

template <>
struct Noun<Conv2dKernel> {
  static const std::vector<const Conv2dKernel*>& table() { return conv2d_kernels(); }
  static const char* op_name(const Conv2dKernel&) { return "conv2d"; }
  static const char* direction_name(const Conv2dKernel& row) { return kConv2dDirections[static_cast<int>(row.direction)]; }
  static int slot(const Conv2dKernel& row) { return slot_of(row.direction); }
  static inline std::atomic<const Conv2dKernel*> forced[4];
};

template <>
struct Noun<Conv2dReluPoolKernel> {
  static const std::vector<const Conv2dReluPoolKernel*>& table() { return conv2d_relu_pool_kernels(); }
  static const char* op_name(const Conv2dReluPoolKernel&) { return "conv2d_relu_max_pool2d"; }
  static const char* direction_name(const Conv2dReluPoolKernel& row) { return kConv2dDirections[static_cast<int>(row.direction)]; }
  static int slot(const Conv2dReluPoolKernel& row) { return slot_of(row.direction); }
  static inline std::atomic<const Conv2dReluPoolKernel*> forced[4];
};

template <>
struct Noun<Pool2dKernel> {
  static const std::vector<const Pool2dKernel*>& table() { return pool2d_kernels(); }
  static const char* op_name(const Pool2dKernel& row) { return kPool2dOps[static_cast<int>(row.op)]; }
  static const char* direction_name(const Pool2dKernel& row) { return kPool2dDirections[static_cast<int>(row.direction)]; }
  static int slot(const Pool2dKernel& row) { return slot_of(row.op, row.direction); }
  static inline std::atomic<const Pool2dKernel*> forced[6];
};

template <>
struct Noun<SizedPool2dKernel> {
  static const std::vector<const SizedPool2dKernel*>& table() { return sized_pool2d_kernels(); }
  static const char* op_name(const SizedPool2dKernel& row) { return kSizedPool2dOps[static_cast<int>(row.op)]; }
  static const char* direction_name(const SizedPool2dKernel& row) { return kSizedPool2dDirections[static_cast<int>(row.direction)]; }
  static int slot(const SizedPool2dKernel& row) { return slot_of(row.op, row.direction); }
  static inline std::atomic<const SizedPool2dKernel*> forced[12];
};

template <class Visit>
void for_each_noun(const Visit& visit) {
  visit(Noun<Conv2dKernel>{});
  visit(Noun<Conv2dReluPoolKernel>{});
  visit(Noun<Pool2dKernel>{});
  visit(Noun<SizedPool2dKernel>{});
}

bool is_supported(Isa isa) { return isa <= best_isa(); }

int64_t multiplications(const Conv2dShape& s) {
  return s.batch * s.out_channels * s.out_h * s.out_w * (s.in_channels / s.groups) * s.kernel_h * s.kernel_w;
}
int64_t multiplications(const Conv2dReluPoolShape& s) { return multiplications(s.conv); }
int64_t multiplications(const Pool2dShape& s) { return s.batch * s.channels * s.out_h * s.out_w * s.kernel_h * s.kernel_w; }
int64_t multiplications(const SizedPool2dShape& s) { return s.batch * s.channels * (s.in_h * s.in_w + s.out_h * s.out_w); }  // elements

template <class Shape>
int usable_threads(const Shape& shape, int threads) {
  return forked || multiplications(shape) < kSerialMultiplications ? 1 : threads;
}

// Whether a row does what the buffers ask for beyond its shape.
template <class Kernel, class Buffers>
bool suits(const Kernel&, const Buffers&) {
  return true;
}
bool suits(const Conv2dKernel& row, const Conv2dBuffers& buffers) {
  return row.direction != Conv2dDirection::backward_input || buffers.bias == nullptr || row.adds_bias;
}

// Offers the rows of a slot, of the instruction set `most` or a lesser one, that accept the shape to `use`, the best first, until it
// returns true.
template <class Kernel, class Shape, class Use>
void offer_table(int slot, const Shape& shape, Isa most, const Kernel* without, const Use& use) {
  for (const Kernel* row : Noun<Kernel>::table()) {
    if (Noun<Kernel>::slot(*row) == slot && row != without && row->isa <= most && takes(*row, shape) && use(*row)) return;
  }
  throw std::invalid_argument("no kernel serves this shape and dtype");
}

// The same, with a forced row before all.
template <class Kernel, class Shape, class Use>
void offer(int slot, const Shape& shape, const Use& use) {
  const Kernel* forced_row = Noun<Kernel>::forced[slot].load();
  if (forced_row != nullptr) {
    if (!takes(*forced_row, shape)) throw std::invalid_argument("forced kernel " + std::string(forced_row->name) + " refuses this shape");
    if (use(*forced_row)) return;
  }
  offer_table<Kernel>(slot, shape, best_isa(), forced_row, use);
}

// Whether the row did it, in the scratch of its caller where that is enough.
template <class Kernel, class Shape, class Buffers>
bool try_row(const Kernel& row, const Shape& shape, const Buffers& buffers, int threads, RowScratch scratch = {}) {
  const size_t bytes = row.plan(shape, threads).workspace_bytes;
  const Workspace workspace(bytes <= scratch.bytes ? 0 : bytes);
  void* const memory = bytes <= scratch.bytes ? scratch.data : workspace.data();
  if constexpr (std::is_same_v<Kernel, Pool2dKernel> || std::is_same_v<Kernel, SizedPool2dKernel>) {
    // These multiply nothing, so that nothing is tried in vain.
    row.run(shape, buffers, memory, threads);
    return true;
  } else {
    return row.run(shape, buffers, memory, threads) == Outcome::done;
  }
}

template <class Kernel, class Shape, class Buffers>
void run(int slot, const Shape& shape, const Buffers& buffers, int threads) {
  const int team = usable_threads(shape, threads);
  offer<Kernel>(slot, shape, [&](const Kernel& row) {
    if (suits(row, buffers)) return try_row(row, shape, buffers, team);
    if (&row == Noun<Kernel>::forced[slot].load()) throw std::invalid_argument("forced kernel " + std::string(row.name) + " adds no bias");
    return false;
  });
}

int64_t groups_of(const Conv2dShape& s) { return s.groups; }
int64_t groups_of(const Conv2dReluPoolShape& s) { return s.conv.groups; }

// The row with which a call begins.
template <class Kernel, class Shape>
const Kernel* first_row(int slot, const Shape& shape) {
  const Kernel* first = nullptr;
  offer<Kernel>(slot, shape, [&](const Kernel& row) { return (first = &row) != nullptr; });
  return first;
}

// With a packed weight if it is kept in the form that the call needs, else packing it; false where a run of this kind is not to be had.
template <class Kernel, class Packing, class Shape, class Buffers>
bool run_packed(const std::vector<const Packing*>& table, int slot, const Shape& shape, const Buffers& buffers, PackedWeight& weight,
                int threads) {
  const Kernel* row = first_row<Kernel>(slot, shape);
  const auto packing = std::find_if(table.begin(), table.end(), [&](const Packing* candidate) { return candidate->row == row; });
  if (packing == table.end()) return false;
  const Workspace workspace(row->plan(shape, threads).workspace_bytes);
  auto wanted = std::make_shared<PackedWeight::Content>(PackedWeight::Content{row, (*packing)->form(shape), groups_of(shape)});
  if (const auto kept = weight.get(); kept != nullptr && kept->matches(*wanted)) {
    return (*packing)->run(shape, buffers, {kept->data.get(), true}, workspace.data(), threads) == Outcome::done;
  }
  wanted->data.reset(std::aligned_alloc(64, wanted->form.bytes));
  if (wanted->data == nullptr) throw std::bad_alloc();
  if ((*packing)->run(shape, buffers, {wanted->data.get(), false}, workspace.data(), threads) != Outcome::done) return false;
  weight.set(std::move(wanted));
  return true;
}

template <class Kernel, class Shape, class Buffers>
void run_table(int slot, const Shape& shape, const Buffers& buffers, Isa most, int threads, RowScratch scratch = {}) {
  offer_table<Kernel>(slot, shape, most, nullptr,
                      [&](const Kernel& row) { return suits(row, buffers) && try_row(row, shape, buffers, threads, scratch); });
}

template <class Kernel, class Shape>
Choice choose(int slot, const Shape& shape, int threads) {
  Choice choice;
  offer<Kernel>(slot, shape, [&](const Kernel& row) {
    choice.threads = usable_threads(shape, threads);
    choice.kernel = row.name;
    choice.isa = row.isa;
    choice.plan = row.plan(shape, choice.threads);
    return true;
  });
  return choice;
}

template <class Kernel>
const Kernel* find_row(Noun<Kernel>, const std::string& name) {
  for (const Kernel* row : Noun<Kernel>::table()) {
    if (name == row->name) return row;
  }
  return nullptr;
}

template <class Kernel>
std::string exchange_forced(const Kernel& slot_member, const Kernel* row) {
  const Kernel* previous = Noun<Kernel>::forced[Noun<Kernel>::slot(slot_member)].exchange(row);
  return previous == nullptr ? "" : previous->name;
}

}  // namespace

void run_conv2d(Conv2dDirection direction, const Conv2dShape& shape, const Conv2dBuffers& buffers, int threads) {
  run<Conv2dKernel>(slot_of(direction), shape, buffers, threads);
}

void run_conv2d(Conv2dDirection direction, const Conv2dShape& shape, const Conv2dBuffers& buffers, PackedWeight& weight, int threads) {
  const int slot = slot_of(direction), team = usable_threads(shape, threads);
  if (!run_packed<Conv2dKernel>(packing_conv2d(), slot, shape, buffers, weight, team)) run_conv2d(direction, shape, buffers, threads);
}

void run_conv2d_relu_pool(Conv2dDirection direction, const Conv2dReluPoolShape& shape, const Conv2dReluPoolBuffers& buffers,
                          PackedWeight& weight, int threads) {
  const int slot = slot_of(direction), team = usable_threads(shape, threads);
  if (run_packed<Conv2dReluPoolKernel>(packing_conv2d_relu_pool(), slot, shape, buffers, weight, team)) return;
  run_conv2d_relu_pool(direction, shape, buffers, threads);
}

void run_conv2d_unforced(Conv2dDirection direction, const Conv2dShape& shape, const Conv2dBuffers& buffers, int threads) {
  run_table<Conv2dKernel>(slot_of(direction), shape, buffers, best_isa(), threads);
}

void run_conv2d_relu_pool(Conv2dDirection direction, const Conv2dReluPoolShape& shape, const Conv2dReluPoolBuffers& buffers, int threads) {
  run<Conv2dReluPoolKernel>(slot_of(direction), shape, buffers, threads);
}

void run_pool2d(Pool2dOp op, Pool2dDirection direction, const Pool2dShape& shape, const Pool2dBuffers& buffers, int threads) {
  run<Pool2dKernel>(slot_of(op, direction), shape, buffers, threads);
}

// Every index, taken as unsigned, is below the size of the plane.
static void require_inside(const SizedPool2dShape& s, const int64_t* indices) {
  uint64_t largest = 0;
  for (int64_t i = 0; i < s.batch * s.channels * s.out_h * s.out_w; ++i) {
    const uint64_t index = static_cast<uint64_t>(indices[i]);
    if (index > largest) largest = index;
  }
  if (largest < static_cast<uint64_t>(s.in_h * s.in_w)) return;
  throw std::runtime_error("Found an invalid max index: " + std::to_string(static_cast<int64_t>(largest)) +
                           " (output volumes are of size " + std::to_string(s.in_h) + "x" + std::to_string(s.in_w) + ")");
}

void run_sized_pool2d(SizedPool2dOp op, SizedPool2dDirection direction, const SizedPool2dShape& shape, const SizedPool2dBuffers& buffers,
                      int threads) {
  if (op == SizedPool2dOp::max_unpool) require_inside(shape, buffers.indices);
  run<SizedPool2dKernel>(slot_of(op, direction), shape, buffers, threads);
}

void run_float_row(Conv2dDirection direction, const Conv2dShape& shape, const Conv2dBuffers& buffers, Isa most, int threads,
                   RowScratch scratch) {
  run_table<Conv2dKernel>(slot_of(direction), shape, buffers, most, threads, scratch);
}

void run_float_row(Conv2dDirection direction, const Conv2dReluPoolShape& shape, const Conv2dReluPoolBuffers& buffers, Isa most, int threads,
                   RowScratch scratch) {
  run_table<Conv2dReluPoolKernel>(slot_of(direction), shape, buffers, most, threads, scratch);
}

void run_float_row(Pool2dOp op, Pool2dDirection direction, const Pool2dShape& shape, const Pool2dBuffers& buffers, Isa most, int threads) {
  run_table<Pool2dKernel>(slot_of(op, direction), shape, buffers, most, threads);
}

template <class Kernel, class Shape>
static size_t row_bytes(int slot, const Shape& shape, Isa most, int threads) {
  size_t bytes = 0;
  offer_table<Kernel>(slot, shape, most, nullptr, [&](const Kernel& row) {
    bytes = row.plan(shape, threads).workspace_bytes;
    return true;
  });
  return bytes;
}

size_t float_row_bytes(Conv2dDirection direction, const Conv2dShape& shape, Isa most, int threads) {
  return row_bytes<Conv2dKernel>(slot_of(direction), shape, most, threads);
}

size_t float_row_bytes(Conv2dDirection direction, const Conv2dReluPoolShape& shape, Isa most, int threads) {
  return row_bytes<Conv2dReluPoolKernel>(slot_of(direction), shape, most, threads);
}

Choice choose_conv2d(Conv2dDirection direction, const Conv2dShape& shape, int threads) {
  return choose<Conv2dKernel>(slot_of(direction), shape, threads);
}

Choice choose_conv2d_relu_pool(Conv2dDirection direction, const Conv2dReluPoolShape& shape, int threads) {
  return choose<Conv2dReluPoolKernel>(slot_of(direction), shape, threads);
}

Choice choose_pool2d(Pool2dOp op, Pool2dDirection direction, const Pool2dShape& shape, int threads) {
  return choose<Pool2dKernel>(slot_of(op, direction), shape, threads);
}

Choice choose_sized_pool2d(SizedPool2dOp op, SizedPool2dDirection direction, const SizedPool2dShape& shape, int threads) {
  return choose<SizedPool2dKernel>(slot_of(op, direction), shape, threads);
}

std::vector<KernelRow> kernel_rows() {
  std::vector<KernelRow> rows;
  for_each_noun([&](auto noun) {
    for (const auto* row : noun.table()) {
      rows.push_back({row->name, noun.op_name(*row), noun.direction_name(*row), row->isa, is_supported(row->isa)});
    }
  });
  return rows;
}

std::string force_kernel(const std::string& name) {
  std::optional<std::string> previous;
  for_each_noun([&](auto noun) {
    const auto* row = find_row(noun, name);
    if (row == nullptr) return;
    if (!is_supported(row->isa)) {
      throw std::invalid_argument("name: this machine, or CNN_EXT_ISA, does not allow kernel \"" + name + "\"");
    }
    previous = exchange_forced(*row, row);
  });
  if (!previous) throw std::invalid_argument("name: no kernel is called \"" + name + "\"");
  return *previous;
}

void restore_forced_kernel(const std::string& name, const std::string& previous) {
  for_each_noun([&](auto noun) {
    if (const auto* row = find_row(noun, name)) exchange_forced(*row, find_row(noun, previous));
  });
}

}  // namespace cnn_ext::cpu
