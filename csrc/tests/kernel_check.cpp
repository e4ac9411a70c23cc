// kernel_check: every row of the kernel table against the naive row, without Python and without torch, over the same cases that pytest
// reads.
//
//   kernel_check tests/cases/conv2d.csv tests/cases/pool2d.csv [--every N] [--row NAME] [--dtype NAME]
//
// Each row that accepts a case runs twice: on one thread with every tensor and the workspace starting flush behind a guard page, and on
// three threads with all of them ending flush before one, which also misaligns them. (A bias comes with equal layouts only.) A touch
// outside is a fault that names row and case; both runs must give the same bits, and these must be within the tolerance of
// tests/support/tolerances.py. --every N takes each N-th case, in each dtype and layout another first. With sanitizers:
//
//   cmake -S . -B build/asan -G Ninja -DCNN_EXT_PYTHON=OFF -DCNN_EXT_KERNEL_CHECK=ON -DCNN_EXT_CUDA=off -DCMAKE_BUILD_TYPE=Debug
//         -DCMAKE_CXX_FLAGS="-O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined"
//   cmake --build build/asan && ASAN_OPTIONS=handle_segv=0 build/asan/kernel_check tests/cases/conv2d.csv tests/cases/pool2d.csv
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/half.h"
#include "cpu/isa.h"
#include "cpu/kernel_table.h"
#include "tests/cases.h"
#include "tests/guarded.h"
#include "tests/options.h"
#include "tests/roundings.h"

namespace {

using namespace cnn_ext;
using namespace cnn_ext::cpu;
using namespace cnn_ext::tests;

// How a row is run; the operands are the same in all runs of a case, but for their signs.
struct Run {
  int threads = 1;
  Flush flush = Flush::start;
  bool absolute = false;
};

template <class T>
struct Result {
  std::vector<T> values;
  std::vector<uint8_t> offsets;  // raw bytes
};

size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

template <class T>
Result<T> call(const Conv2dKernel& row, const Conv2dShape& s, const Run& run, const std::vector<uint8_t>&) {
  Tensors tensors(run.flush);
  const int64_t input = s.batch * s.in_channels * s.in_h * s.in_w, output = s.batch * s.out_channels * s.out_h * s.out_w;
  const int64_t weight = s.out_channels * (s.in_channels / s.groups) * s.kernel_h * s.kernel_w;
  const bool forward = row.direction == Conv2dDirection::forward;
  const auto values = [&](int64_t count, uint64_t seed) { return tensors.values<T>(count, seed, run.absolute); };
  Conv2dBuffers b{};
  if (forward || row.direction == Conv2dDirection::backward_weight) b.input = values(input, 1);
  if (forward || row.direction == Conv2dDirection::backward_input) b.weight = values(weight, 2);
  if (forward && s.layout == s.weight_layout) b.bias = values(s.out_channels, 3);
  if (!forward) b.grad_output = values(output, 4);
  const int64_t count[] = {output, input, weight, s.out_channels};
  void** written[] = {&b.output, &b.grad_input, &b.grad_weight, &b.grad_bias};
  const int direction = static_cast<int>(row.direction);
  T* result = static_cast<T*>(tensors.bytes(count[direction] * static_cast<int64_t>(sizeof(T))));
  *written[direction] = result;
  const Guarded workspace(aligned(row.plan(s, run.threads).workspace_bytes), run.flush);
  if (row.run(s, b, workspace.data(), run.threads) != Outcome::done) throw std::runtime_error("finds finite operands not finite");
  return {std::vector<T>(result, result + count[direction]), {}};
}

template <class T>
Result<T> call(const Conv2dReluPoolKernel& row, const Conv2dReluPoolShape& s, const Run& run, const std::vector<uint8_t>& offsets) {
  const Conv2dShape& conv = s.conv;
  Tensors tensors(run.flush);
  const int64_t input = conv.batch * conv.in_channels * conv.in_h * conv.in_w,
                output = conv.batch * conv.out_channels * s.pooled_h * s.pooled_w;
  const int64_t weight = conv.out_channels * (conv.in_channels / conv.groups) * conv.kernel_h * conv.kernel_w;
  const bool forward = row.direction == Conv2dDirection::forward;
  const int64_t offset_bytes = has_pooling(s) ? output : 0;
  // Another order of additions would find another maximum: sums that are compared have to be exact.
  const auto values = [&](int64_t count, uint64_t seed) { return tensors.values<T>(count, seed, run.absolute, forward && has_pooling(s)); };
  Conv2dReluPoolBuffers b{};
  if (forward || row.direction == Conv2dDirection::backward_weight) b.input = values(input, 1);
  if (forward || row.direction == Conv2dDirection::backward_input) b.weight = values(weight, 2);
  if (forward && conv.layout == conv.weight_layout) b.bias = values(conv.out_channels, 3);
  if (!forward) b.grad_output = values(output, 4);
  if (has_pooling(s)) b.offsets = static_cast<uint8_t*>(tensors.bytes(offset_bytes, forward ? nullptr : offsets.data()));
  if (!forward && !has_pooling(s)) b.output = tensors.values<T>(output, 5, false);
  const int64_t count[] = {output, input, weight, conv.out_channels};
  void** written[] = {&b.output, &b.grad_input, &b.grad_weight, &b.grad_bias};
  const int direction = static_cast<int>(row.direction);
  T* result = static_cast<T*>(tensors.bytes(count[direction] * static_cast<int64_t>(sizeof(T))));
  *written[direction] = result;
  const Guarded workspace(aligned(row.plan(s, run.threads).workspace_bytes), run.flush);
  if (row.run(s, b, workspace.data(), run.threads) != Outcome::done) throw std::runtime_error("finds finite operands not finite");
  return {std::vector<T>(result, result + count[direction]), std::vector<uint8_t>(b.offsets, b.offsets + offset_bytes)};
}

template <class T>
Result<T> call(const Pool2dKernel& row, const Pool2dShape& s, const Run& run, const std::vector<uint8_t>& offsets) {
  Tensors tensors(run.flush);
  const int64_t input = s.batch * s.channels * s.in_h * s.in_w, output = s.batch * s.channels * s.out_h * s.out_w;
  const int64_t offset_bytes = row.op == Pool2dOp::avg ? 0 : output * (s.kernel_h * s.kernel_w <= 256 ? 1 : 4);
  const bool backward = row.direction == Pool2dDirection::backward, forward = row.direction == Pool2dDirection::forward;
  Pool2dBuffers b{};
  (backward ? b.grad_output : b.input) = tensors.values<T>(backward ? output : input, backward ? 4 : 1, run.absolute);
  if (row.op == Pool2dOp::max) b.offsets = tensors.bytes(offset_bytes, forward ? nullptr : offsets.data());
  const int64_t count = backward ? input : output;
  T* result = static_cast<T*>(tensors.bytes(count * static_cast<int64_t>(sizeof(T))));
  (backward ? b.grad_input : b.output) = result;
  const Guarded workspace(aligned(row.plan(s, run.threads).workspace_bytes), run.flush);
  row.run(s, b, workspace.data(), run.threads);
  const uint8_t* written = static_cast<const uint8_t*>(b.offsets);
  return {std::vector<T>(result, result + count), std::vector<uint8_t>(written, written + offset_bytes)};
}

template <class T>
Result<T> call(const SizedPool2dKernel& row, const SizedPool2dShape& s, const Run& run, const std::vector<uint8_t>& indices) {
  Tensors tensors(run.flush);
  const int64_t large = s.batch * s.channels * s.in_h * s.in_w, small = s.batch * s.channels * s.out_h * s.out_w;
  const bool unpools = row.op == SizedPool2dOp::max_unpool;
  const bool writes_small = row.direction == SizedPool2dDirection::gather || (!unpools && row.direction == SizedPool2dDirection::forward);
  const int64_t count = writes_small ? small : large;
  const int64_t index_bytes = row.op == SizedPool2dOp::adaptive_avg ? 0 : small * static_cast<int64_t>(sizeof(int64_t));
  T* source = tensors.values<T>(writes_small ? large : small, writes_small ? 1 : 4, run.absolute);
  T* result = static_cast<T*>(tensors.bytes(count * static_cast<int64_t>(sizeof(T))));
  void* places = index_bytes == 0 ? nullptr : tensors.bytes(index_bytes, unpools ? indices.data() : nullptr);
  const SizedPool2dBuffers b{writes_small ? source : result, writes_small ? result : source, static_cast<int64_t*>(places)};
  const Guarded workspace(aligned(row.plan(s, run.threads).workspace_bytes), run.flush);
  row.run(s, b, workspace.data(), run.threads);
  const uint8_t* written = static_cast<const uint8_t*>(places);
  return {std::vector<T>(result, result + count), std::vector<uint8_t>(written, written + index_bytes)};
}

int64_t roundings_of(const Conv2dKernel& row, const Conv2dShape& s) { return roundings(row.direction, s); }
int64_t roundings_of(const Conv2dReluPoolKernel& row, const Conv2dReluPoolShape& s) { return roundings(row.direction, s); }
int64_t roundings_of(const Pool2dKernel& row, const Pool2dShape& s) { return roundings(row.op, row.direction, s); }
int64_t roundings_of(const SizedPool2dKernel& row, const SizedPool2dShape& s) { return roundings(row.op, row.direction, s); }

bool same_slot(const Conv2dKernel& a, const Conv2dKernel& b) { return a.direction == b.direction; }
bool same_slot(const Conv2dReluPoolKernel& a, const Conv2dReluPoolKernel& b) { return a.direction == b.direction; }
bool same_slot(const Pool2dKernel& a, const Pool2dKernel& b) { return a.op == b.op && a.direction == b.direction; }
bool same_slot(const SizedPool2dKernel& a, const SizedPool2dKernel& b) { return a.op == b.op && a.direction == b.direction; }

// The naive row of a slot is its last.
template <class Kernel>
const Kernel& naive_row(const std::vector<const Kernel*>& table, const Kernel& row) {
  return **std::find_if(table.rbegin(), table.rend(), [&](const Kernel* other) { return same_slot(*other, row); });
}

// The offsets that a direction reads.
template <class T>
std::vector<uint8_t> offsets_for(const Conv2dKernel&, const Conv2dShape&) {
  return {};
}

// A window in four passes no gradient.
template <class T>
std::vector<uint8_t> offsets_for(const Conv2dReluPoolKernel& reader, const Conv2dReluPoolShape& s) {
  if (reader.direction == Conv2dDirection::forward || !has_pooling(s)) return {};
  std::vector<uint8_t> offsets(static_cast<size_t>(s.conv.batch * s.conv.out_channels * s.pooled_h * s.pooled_w));
  for (size_t i = 0; i < offsets.size(); ++i) {
    const uint64_t x = random_bits(6, static_cast<int64_t>(i));
    offsets[i] = x % 4 == 0 ? kNoGradient : static_cast<uint8_t>(x / 4 % static_cast<uint64_t>(s.pool_h * s.pool_w));
  }
  return offsets;
}

template <class T>
std::vector<uint8_t> offsets_for(const Pool2dKernel& reader, const Pool2dShape& s) {
  if (reader.op != Pool2dOp::max || reader.direction == Pool2dDirection::forward) return {};
  const auto is_max_forward = [](const Pool2dKernel* row) {
    return row->op == Pool2dOp::max && row->direction == Pool2dDirection::forward;
  };
  const auto row = std::find_if(pool2d_kernels().rbegin(), pool2d_kernels().rend(), is_max_forward);
  return call<T>(**row, s, Run{}, {}).offsets;
}

// Indices within the plane, some of them the same.
template <class T>
std::vector<uint8_t> offsets_for(const SizedPool2dKernel& reader, const SizedPool2dShape& s) {
  if (reader.op != SizedPool2dOp::max_unpool) return {};
  std::vector<int64_t> indices(static_cast<size_t>(s.batch * s.channels * s.out_h * s.out_w));
  for (size_t i = 0; i < indices.size(); ++i) {
    indices[i] = static_cast<int64_t>(random_bits(7, static_cast<int64_t>(i)) % static_cast<uint64_t>(s.in_h * s.in_w));
  }
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(indices.data());
  return {bytes, bytes + indices.size() * sizeof(int64_t)};
}

// What a slot's rows are compared with.
template <class T>
struct Oracle {
  std::vector<uint8_t> offsets;  // read by the rows
  Result<T> truth;
  Result<T> magnitude;  // the sum of the terms' absolute values
};

template <class T, class Kernel, class Shape>
Oracle<T> oracle(const Kernel& naive, const Shape& shape) {
  const std::vector<uint8_t> offsets = offsets_for<T>(naive, shape);
  return {offsets, call<T>(naive, shape, Run{}, offsets), call<T>(naive, shape, {1, Flush::start, true}, offsets)};
}

// Winograd's transforms spread the largest terms over a tile and amplify them: docs/kernels/winograd.md has the factor of each tile.
template <class Kernel, class Shape>
double amplification(const Kernel&, const Shape&) {
  return 0;
}

template <class Kernel>
bool is_winograd(const Kernel& row) {
  return std::strstr(row.name, "_winograd_") != nullptr;
}

double amplification(const Conv2dKernel& row, const Conv2dShape& s) { return !is_winograd(row) ? 0 : s.kernel_h == 3 ? 176 : 1565; }
double amplification(const Conv2dReluPoolKernel& row, const Conv2dReluPoolShape& s) {
  return !is_winograd(row) ? 0 : s.conv.kernel_h == 3 ? 176 : 1565;
}

// The shape as a row is given it: of the fused rows, those of Winograd's algorithm alone may use it, for other rows would use it, too.
template <class Kernel, class Shape>
const Shape& admitted(const Kernel&, const Shape& shape) {
  return shape;
}
Conv2dReluPoolShape admitted(const Conv2dReluPoolKernel& row, Conv2dReluPoolShape shape) {
  shape.conv.allow_winograd = is_winograd(row);
  return shape;
}

// What is wrong with the results of a row, or an empty string.
template <class T, class Kernel, class Shape>
std::string problem_of(const Kernel& row, const Shape& shape, const Oracle<T>& oracle) {
  const Result<T> result = call<T>(row, shape, {1, Flush::start, false}, oracle.offsets);
  const Result<T> again = call<T>(row, shape, {3, Flush::end, false}, oracle.offsets);
  const size_t bytes = result.values.size() * sizeof(T);
  if ((bytes != 0 && std::memcmp(result.values.data(), again.values.data(), bytes) != 0) || result.offsets != again.offsets) {
    return "other bits on three threads, or at other addresses";
  }
  // Sums that Winograd's algorithm rounds differ where those of whole numbers are equal.
  if (!is_winograd(row) && result.offsets != oracle.truth.offsets) return "other offsets";
  using Limits = std::numeric_limits<Compute<T>>;
  const double eps_sqrt_roundings = Limits::epsilon() * std::sqrt(static_cast<double>(roundings_of(row, shape)));
  double largest = 0;
  for (const T& magnitude : oracle.magnitude.values) largest = std::max(largest, std::fabs(static_cast<double>(magnitude)));
  const double spread = amplification(row, shape) * largest;
  for (size_t i = 0; i < result.values.size(); ++i) {
    const double got = static_cast<double>(result.values[i]), wanted = static_cast<double>(oracle.truth.values[i]);
    // Twice the tolerance, for the naive row has an error, too.
    double tolerance = 2 * eps_sqrt_roundings * (std::fabs(static_cast<double>(oracle.magnitude.values[i])) + spread);
    if (tolerance > 0) tolerance += static_cast<double>(Limits::min()) + last_place<T>(wanted);
    if (got != wanted && !(std::fabs(got - wanted) <= tolerance)) {
      return "element " + std::to_string(i) + " is " + std::to_string(got) + ", wanted " + std::to_string(wanted);
    }
  }
  return "";
}

char running[256];  // what a fault is reported with
int passed = 0, failed = 0;

void report_fault(int) {
  static_cast<void>(!write(STDOUT_FILENO, running, std::strlen(running)));
  static const char text[] = ": touches memory outside its buffers\n";
  static_cast<void>(!write(STDOUT_FILENO, text, sizeof(text) - 1));
  _exit(3);
}

template <class T, class Kernel, class Shape>
void check_row(const Kernel& row, const std::string& what, const Shape& shape, const Oracle<T>& oracle) {
  std::snprintf(running, sizeof(running), "FAILED %s, %s", row.name, what.c_str());
  std::string problem;
  try {
    problem = problem_of(row, shape, oracle);
  } catch (const std::runtime_error& error) {
    problem = error.what();
  }
  ++(problem.empty() ? passed : failed);
  if (!problem.empty()) std::printf("%s: %s\n", running, problem.c_str());
}

// Which rows a case is run by: those of the wanted name ("": any), and of a case that is not a half type's turn those of the matrix unit.
struct Wanted {
  std::string name;
  bool matrix_unit_alone = false;
  bool has(const char* row) const { return (name.empty() || name == row) && (!matrix_unit_alone || std::strstr(row, "_amx_") != nullptr); }
};

// Every wanted row of the table that this machine supports and that accepts the shape.
template <class T, class Kernel, class Shape>
void check_rows(const std::vector<const Kernel*>& table, const std::string& what, const Shape& shape, const Wanted& wanted) {
  for (const Kernel* naive : table) {
    if (naive != &naive_row(table, *naive)) continue;
    std::vector<const Kernel*> rows;
    std::copy_if(table.begin(), table.end(), std::back_inserter(rows), [&](const Kernel* row) {
      return same_slot(*row, *naive) && wanted.has(row->name) && row->isa <= best_isa() && row->accepts(admitted(*row, shape));
    });
    if (rows.empty()) continue;
    const Oracle<T> truth = oracle<T>(*naive, shape);
    for (const Kernel* row : rows) check_row(*row, what, admitted(*row, shape), truth);
  }
}

bool has_row(const std::string& name) {
  const auto is_named = [&](const auto* row) { return name == row->name; };
  return std::any_of(conv2d_kernels().begin(), conv2d_kernels().end(), is_named) ||
         std::any_of(conv2d_relu_pool_kernels().begin(), conv2d_relu_pool_kernels().end(), is_named) ||
         std::any_of(pool2d_kernels().begin(), pool2d_kernels().end(), is_named) ||
         std::any_of(sized_pool2d_kernels().begin(), sized_pool2d_kernels().end(), is_named);
}

template <class T>
void check_dtype(DType dtype, const std::string& dtype_name, const Options& options) {
  if (!options.dtype.empty() && options.dtype != dtype_name) return;
  // The paths of a half are those of float32 between other loads and stores: some cases show that. Those of the matrix unit are its own.
  const size_t step = is_half(dtype) ? kHalfStep : 1;
  const std::pair<Layout, const char*> layouts[] = {{Layout::nchw, "nchw"}, {Layout::nhwc, "nhwc"}};
  size_t variant = static_cast<size_t>(dtype);
  for (const auto& [layout, layout_name] : layouts) {
    const std::string described = dtype_name + " " + layout_name;
    size_t turn = 0;
    for (const Case& c : sample(read_cases(options.pool2d_file), variant++, options.every)) {
      if (turn++ % step != 0) continue;
      const Pool2dShape pool = pool2d_shape(c, dtype, layout);
      check_rows<T>(pool2d_kernels(), "case " + c.name + ", " + described, pool, {options.row});
      check_rows<T>(sized_pool2d_kernels(), "sizes of case " + c.name + ", " + described, sized_pool2d_shape(pool), {options.row});
    }
    for (const auto& [weight_layout, weight_layout_name] : layouts) {
      turn = 0;
      for (const Case& c : sample(read_cases(options.conv2d_file), variant++, options.every)) {
        const bool is_turn = turn % step == 0;
        const std::string what = "case " + c.name + ", " + described + ", weight " + weight_layout_name;
        const Conv2dShape conv = conv2d_shape(c, dtype, layout, weight_layout);
        check_rows<T>(conv2d_kernels(), what, conv, {options.row, !is_turn});
        // Each convolution is fused with one of the poolings in turn.
        const auto& [window, stride] = kFusedPools[turn++ / step % std::size(kFusedPools)];
        if (!is_turn) continue;
        const Conv2dReluPoolShape fused = fused_shape(conv, window, stride);
        if (fused.pooled_h < 1 || fused.pooled_w < 1) continue;
        const std::string pool = ", pool " + std::to_string(window) + " stride " + std::to_string(stride);
        check_rows<T>(conv2d_relu_pool_kernels(), what + pool, fused, {options.row});
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) try {
  const Options options = parse_options(argc, argv, has_row);
  std::signal(SIGSEGV, report_fault);
  std::signal(SIGBUS, report_fault);
  check_dtype<float>(DType::float32, "float32", options);
  check_dtype<double>(DType::float64, "float64", options);
  check_dtype<Float16>(DType::float16, "float16", options);
  check_dtype<BFloat16>(DType::bfloat16, "bfloat16", options);
  std::printf("%d passed, %d failed (a row, a case, a dtype and a layout each)\n", passed, failed);
  return failed == 0 && passed > 0 ? 0 : 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "kernel_check: %s\n", error.what());
  return 2;
}
