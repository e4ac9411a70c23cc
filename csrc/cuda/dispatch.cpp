// Chooses the row for a call by what the current device can do, and runs it.
#include <atomic>
#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "cuda/api.h"
#include "cuda/archs.h"
#include "cuda/check.h"
#include "cuda/kernel_table.h"
#include "cuda/proof.h"

namespace cnn_ext::cuda {
namespace {

constexpr const char* kConv2dDirections[] = {"forward", "backward_input", "backward_weight", "backward_bias"};
constexpr const char* kPool2dDirections[] = {"forward", "backward", "gather"};
constexpr const char* kPool2dOps[] = {"max_pool2d", "avg_pool2d"};
constexpr const char* kSizedPool2dDirections[] = {"forward", "backward", "scatter", "gather"};
constexpr const char* kSizedPool2dOps[] = {"adaptive_max_pool2d", "adaptive_avg_pool2d", "max_unpool2d"};

const char* op_name(const Conv2dKernel&) { return "conv2d"; }
const char* op_name(const Conv2dReluPoolKernel&) { return "conv2d_relu_max_pool2d"; }
const char* op_name(const Pool2dKernel& row) { return kPool2dOps[static_cast<int>(row.op)]; }
const char* op_name(const SizedPool2dKernel& row) { return kSizedPool2dOps[static_cast<int>(row.op)]; }
const char* direction_name(const Conv2dKernel& row) { return kConv2dDirections[static_cast<int>(row.direction)]; }
const char* direction_name(const Conv2dReluPoolKernel& row) { return kConv2dDirections[static_cast<int>(row.direction)]; }
const char* direction_name(const Pool2dKernel& row) { return kPool2dDirections[static_cast<int>(row.direction)]; }
const char* direction_name(const SizedPool2dKernel& row) { return kSizedPool2dDirections[static_cast<int>(row.direction)]; }

// One slot for each op and direction: the rows of a slot compete for its calls.
int slot_of(Conv2dDirection direction) { return static_cast<int>(direction); }
int slot_of(Pool2dOp op, Pool2dDirection direction) { return 3 * static_cast<int>(op) + static_cast<int>(direction); }
int slot_of(SizedPool2dOp op, SizedPool2dDirection direction) { return 4 * static_cast<int>(op) + static_cast<int>(direction); }
int slot_of(const Conv2dKernel& row) { return slot_of(row.direction); }
int slot_of(const Conv2dReluPoolKernel& row) { return slot_of(row.direction); }
int slot_of(const Pool2dKernel& row) { return slot_of(row.op, row.direction); }
int slot_of(const SizedPool2dKernel& row) { return slot_of(row.op, row.direction); }

std::atomic<const Conv2dKernel*> forced_conv2d[4];
std::atomic<const Conv2dReluPoolKernel*> forced_conv2d_relu_pool[4];
std::atomic<const Pool2dKernel*> forced_pool2d[6];
std::atomic<const SizedPool2dKernel*> forced_sized_pool2d[12];
std::atomic<const Conv2dKernel*>& forced(const Conv2dKernel& row) { return forced_conv2d[slot_of(row)]; }
std::atomic<const Conv2dReluPoolKernel*>& forced(const Conv2dReluPoolKernel& row) { return forced_conv2d_relu_pool[slot_of(row)]; }
std::atomic<const Pool2dKernel*>& forced(const Pool2dKernel& row) { return forced_pool2d[slot_of(row)]; }
std::atomic<const SizedPool2dKernel*>& forced(const SizedPool2dKernel& row) { return forced_sized_pool2d[slot_of(row)]; }

int current_device() {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) throw std::runtime_error(std::string("cnn_ext: there is no CUDA device to use: ") + cudaGetErrorString(error));
  return device;
}

int capability_of(int device) {
  int major = 0, minor = 0;
  CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  return 10 * major + minor;
}

// The compute capability of the current device, for which there is compiled code: found out once for each of the first devices.
int usable_capability() {
  static std::atomic<int> known[16];
  const int device = current_device();
  std::atomic<int>* const place = device < 16 ? &known[device] : nullptr;
  if (place != nullptr && *place != 0) return *place;
  const int capability = capability_of(device);
  require_arch(capability, "CUDA device " + std::to_string(device));
  if (place != nullptr) *place = capability;
  return capability;
}

// 0: there is no device.
int capability_or_none() {
  int devices = 0;
  return cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0 ? capability_of(current_device()) : 0;
}

// Whether a row takes the bias that a transposed convolution may have.
bool suits(const Conv2dKernel& row, bool with_bias) {
  return row.direction != Conv2dDirection::backward_input || !with_bias || row.adds_bias;
}
template <class Kernel>
bool suits(const Kernel&, bool) {
  return true;
}

// The rows that compete for the calls of a slot on devices of a capability, in the table's order. That stays what it is, and is looked up
// for every call.
template <class Kernel>
const std::vector<const Kernel*>& competitors(const std::vector<const Kernel*>& table, int slot, int capability) {
  static std::mutex one_at_a_time;
  static std::map<std::pair<int, int>, std::vector<const Kernel*>> known;  // whose elements stay where they are
  const std::lock_guard<std::mutex> locked(one_at_a_time);
  const std::pair<int, int> key(slot, capability);
  const auto place = known.find(key);
  if (place != known.end()) return place->second;
  std::vector<const Kernel*> rows;
  for (const Kernel* row : table) {
    if (slot_of(*row) == slot && runs_on(*row, capability) && is_admitted(row->name, row->needs_proof)) rows.push_back(row);
  }
  return known.emplace(key, std::move(rows)).first->second;
}

// A row, and its plan for the shape that it was chosen for.
template <class Kernel>
struct Chosen {
  const Kernel& row;
  Plan plan;
};

template <class Kernel, class Shape>
Chosen<Kernel> choose_row(const std::vector<const Kernel*>& table, int slot, const Kernel* forced_row, const Shape& shape,
                          bool with_bias = false) {
  const int capability = usable_capability();
  if (forced_row != nullptr) {
    if (!forced_row->accepts(shape) || !suits(*forced_row, with_bias))
      throw std::invalid_argument("forced kernel " + std::string(forced_row->name) + " refuses this shape");
    return {*forced_row, forced_row->plan(shape)};
  }
  for (const Kernel* row : competitors(table, slot, capability)) {
    if (!row->accepts(shape) || !suits(*row, with_bias)) continue;
    const Plan plan = row->plan(shape);
    if (plan.blocks <= kMostGridBlocks) return {*row, plan};
  }
  throw std::invalid_argument("no CUDA kernel serves this shape and dtype");
}

Chosen<Conv2dKernel> row_for(Conv2dDirection direction, const Conv2dShape& shape, bool with_bias = false) {
  const int slot = slot_of(direction);
  return choose_row(conv2d_kernels(), slot, forced_conv2d[slot].load(), shape, with_bias);
}

Chosen<Conv2dReluPoolKernel> row_for(Conv2dDirection direction, const Conv2dReluPoolShape& shape) {
  const int slot = slot_of(direction);
  return choose_row(conv2d_relu_pool_kernels(), slot, forced_conv2d_relu_pool[slot].load(), shape);
}

Chosen<Pool2dKernel> row_for(Pool2dOp op, Pool2dDirection direction, const Pool2dShape& shape) {
  const int slot = slot_of(op, direction);
  return choose_row(pool2d_kernels(), slot, forced_pool2d[slot].load(), shape);
}

Chosen<SizedPool2dKernel> row_for(SizedPool2dOp op, SizedPool2dDirection direction, const SizedPool2dShape& shape) {
  const int slot = slot_of(op, direction);
  return choose_row(sized_pool2d_kernels(), slot, forced_sized_pool2d[slot].load(), shape);
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

// Whether the table has the row, which is then forced in the place of `previous`.
template <class Kernel>
bool force_in(const std::vector<const Kernel*>& table, const std::string& name, std::string& previous) {
  const Kernel* row = find_row(table, name);
  if (row == nullptr) return false;
  if (!runs_on(*row, capability_or_none())) {
    throw std::invalid_argument("name: this machine has no CUDA device for kernel \"" + name + "\"");
  }
  previous = exchange_forced(*row, row);
  return true;
}

template <class Kernel>
void restore_in(const std::vector<const Kernel*>& table, const std::string& name, const std::string& previous) {
  if (const Kernel* row = find_row(table, name)) exchange_forced(*row, find_row(table, previous));
}

template <class Kernel>
void append_rows(std::vector<KernelRow>& rows, const std::vector<const Kernel*>& table, int capability) {
  for (const Kernel* row : table) {
    rows.push_back({row->name, op_name(*row), direction_name(*row), arch_name(*row), runs_on(*row, capability), has_proof(row->name),
                    is_admitted(row->name, row->needs_proof)});
  }
}

template <class Kernel, class Shape, class Buffers>
void run_in_workspace(const Chosen<Kernel>& chosen, const Shape& shape, const Buffers& buffers, const Allocate& allocate,
                      cudaStream_t stream) {
  const size_t bytes = chosen.plan.workspace_bytes;
  chosen.row.run(shape, buffers, bytes == 0 ? nullptr : allocate(bytes), stream);
}

template <class Kernel>
Choice choice_of(const Chosen<Kernel>& chosen) {
  return {chosen.row.name, arch_name(chosen.row), chosen.plan};
}

}  // namespace

void run_conv2d(Conv2dDirection direction, const Conv2dShape& shape, const Conv2dBuffers& buffers, const Allocate& allocate,
                cudaStream_t stream) {
  run_in_workspace(row_for(direction, shape, buffers.bias != nullptr), shape, buffers, allocate, stream);
}

void run_conv2d_relu_pool(Conv2dDirection direction, const Conv2dReluPoolShape& shape, const Conv2dReluPoolBuffers& buffers,
                          const Allocate& allocate, cudaStream_t stream) {
  run_in_workspace(row_for(direction, shape), shape, buffers, allocate, stream);
}

void run_pool2d(Pool2dOp op, Pool2dDirection direction, const Pool2dShape& shape, const Pool2dBuffers& buffers, cudaStream_t stream) {
  row_for(op, direction, shape).row.run(shape, buffers, stream);
}

void run_sized_pool2d(SizedPool2dOp op, SizedPool2dDirection direction, const SizedPool2dShape& shape, const SizedPool2dBuffers& buffers,
                      cudaStream_t stream) {
  row_for(op, direction, shape).row.run(shape, buffers, stream);
}

Choice choose_conv2d(Conv2dDirection direction, const Conv2dShape& shape) { return choice_of(row_for(direction, shape)); }

Choice choose_conv2d_relu_pool(Conv2dDirection direction, const Conv2dReluPoolShape& shape) { return choice_of(row_for(direction, shape)); }

Choice choose_pool2d(Pool2dOp op, Pool2dDirection direction, const Pool2dShape& shape) { return choice_of(row_for(op, direction, shape)); }

Choice choose_sized_pool2d(SizedPool2dOp op, SizedPool2dDirection direction, const SizedPool2dShape& shape) {
  return choice_of(row_for(op, direction, shape));
}

std::vector<KernelRow> kernel_rows() {
  const int capability = capability_or_none();
  std::vector<KernelRow> rows;
  append_rows(rows, conv2d_kernels(), capability);
  append_rows(rows, conv2d_relu_pool_kernels(), capability);
  append_rows(rows, pool2d_kernels(), capability);
  append_rows(rows, sized_pool2d_kernels(), capability);
  return rows;
}

std::string force_kernel(const std::string& name) {
  std::string previous;
  if (!force_in(conv2d_kernels(), name, previous) && !force_in(conv2d_relu_pool_kernels(), name, previous) &&
      !force_in(pool2d_kernels(), name, previous) && !force_in(sized_pool2d_kernels(), name, previous)) {
    throw std::invalid_argument("name: no kernel is called \"" + name + "\"");
  }
  return previous;
}

void restore_forced_kernel(const std::string& name, const std::string& previous) {
  restore_in(conv2d_kernels(), name, previous);
  restore_in(conv2d_relu_pool_kernels(), name, previous);
  restore_in(pool2d_kernels(), name, previous);
  restore_in(sized_pool2d_kernels(), name, previous);
}

}  // namespace cnn_ext::cuda
