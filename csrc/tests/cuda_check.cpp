// cuda_check: every row of the CUDA kernel table on the host, under the emulation of csrc/tests/emulation, against the naive CPU rows in
// float64, over the same cases that pytest reads.
//
//   cuda_check tests/cases/conv2d.csv tests/cases/pool2d.csv [--every N] [--row NAME] [--dtype NAME]
//
// Each row that accepts a case runs
//   - with the threads of a block in forward order, every tensor starting flush behind a guard page;
//   - in reverse order, every tensor ending flush before one, which also misaligns them: the same bits;
//   - in shuffled order, with the first image alone where the result belongs to an image: the same bits;
//   - with an infinity and a NaN in every operand.
// Cases of more than 4096 blocks are left out. A result is within `tolerance` of the truth. --every N takes each N-th case of each dtype
// and layout, another one for each.
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <limits>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda/kernel_table.h"
#include "tests/cases.h"
#include "tests/cuda_rows.h"
#include "tests/options.h"
#include "tests/roundings.h"

namespace {

using namespace cnn_ext;
using namespace cnn_ext::tests;
using cuda::widen;

// The offsets or indices that a direction reads.
template <class T>
std::vector<uint8_t> offsets_for(const cuda::Conv2dKernel&, const Conv2dShape&) {
  return {};
}

template <class T>
std::vector<uint8_t> offsets_for(const cuda::Conv2dReluPoolKernel& row, const Conv2dReluPoolShape& s) {
  if (row.direction == Conv2dDirection::forward || !has_pooling(s)) return {};
  return run_row<T, double>(naive::conv2d_relu_max_pool2d_forward, s, Run{}, {}).offsets;
}

template <class T>
std::vector<uint8_t> offsets_for(const cuda::Pool2dKernel& row, const Pool2dShape& s) {
  if (row.op != Pool2dOp::max || row.direction == Pool2dDirection::forward) return {};
  return run_row<T, double>(naive::max_pool2d_forward, s, Run{}, {}).offsets;
}

// Not all of them different, so that several elements meet.
template <class T>
std::vector<uint8_t> offsets_for(const cuda::SizedPool2dKernel& row, const SizedPool2dShape& s) {
  if (row.op != SizedPool2dOp::max_unpool) return {};
  std::vector<int64_t> indices(static_cast<size_t>(s.batch * s.channels * s.out_h * s.out_w));
  for (size_t i = 0; i < indices.size(); ++i) indices[i] = static_cast<int64_t>(i) * 7919 % (s.in_h * s.in_w) / 2;
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(indices.data());
  return {bytes, bytes + indices.size() * sizeof(int64_t)};
}

int64_t roundings_of(const cuda::Conv2dKernel& row, const Conv2dShape& s) { return roundings(row.direction, s); }
int64_t roundings_of(const cuda::Conv2dReluPoolKernel& row, const Conv2dReluPoolShape& s) { return roundings(row.direction, s); }
int64_t roundings_of(const cuda::Pool2dKernel& row, const Pool2dShape& s) { return roundings(row.op, row.direction, s); }

int64_t roundings_of(const cuda::SizedPool2dKernel& row, const SizedPool2dShape& s) { return roundings(row.op, row.direction, s); }

// Whether the results of an image do not depend on the others.
bool goes_by_image(Conv2dDirection direction) {
  return direction == Conv2dDirection::forward || direction == Conv2dDirection::backward_input;
}
bool goes_by_image(const cuda::Conv2dKernel& row) { return goes_by_image(row.direction); }
bool goes_by_image(const cuda::Conv2dReluPoolKernel& row) { return goes_by_image(row.direction); }
bool goes_by_image(const cuda::Pool2dKernel&) { return true; }
bool goes_by_image(const cuda::SizedPool2dKernel&) { return true; }

int64_t& batch_of(Conv2dReluPoolShape& s) { return s.conv.batch; }
template <class Shape>
int64_t& batch_of(Shape& s) {
  return s.batch;
}

// What the errors of a sum's terms follow.
struct Arithmetic {
  int64_t roundings;
  double operand_error;  // of a product, relative: its operands may be rounded before
};

bool allows_tf32(const Conv2dShape& s) { return s.allow_tf32 != 0; }
template <class Shape>
bool allows_tf32(const Shape&) {
  return true;
}

// Tensor cores multiply float32 as TF32, each operand rounded to 11 bits, or three times where that is not allowed (mma_fragments.cuh). A
// composed row stores the convolution's gradient in between, which may be a sum: rounded to a half.
template <class T, class Kernel, class Shape>
Arithmetic arithmetic_of(const Kernel& row, const Shape& shape) {
  const bool is_tf32 = std::is_same_v<T, float> && std::strstr(row.name, "_mma_") != nullptr;
  const bool rounds_sums = std::strstr(row.name, "_composed_") != nullptr;
  const double of_product = std::ldexp(1.0, allows_tf32(shape) ? -10 : -21);
  return {roundings_of(row, shape), is_tf32 ? of_product : rounds_sums ? last_place<T>(1.0) : 0};
}

// How far a result may be from the truth, in the words of tests/support/tolerances.py: sums are added up in the type of sums. A negative
// divisor makes the sum of magnitudes negative.
template <class T>
double tolerance(const Arithmetic& arithmetic, double signed_magnitude, double truth) {
  const double magnitude = std::fabs(signed_magnitude);
  using Limits = std::numeric_limits<cuda::Accumulate<T>>;
  if (arithmetic.roundings == 0 || magnitude == 0) return 0;
  const double eps = Limits::epsilon() + std::numeric_limits<double>::epsilon();
  const double error = eps * std::sqrt(static_cast<double>(arithmetic.roundings)) + arithmetic.operand_error;
  return error * magnitude + Limits::min() + last_place<T>(truth);
}

template <class T>
std::string difference(const Result<T>& got, const Result<double>& truth, const Result<double>& magnitude, const Arithmetic& arithmetic) {
  if (got.offsets != truth.offsets) return "other offsets";
  for (size_t i = 0; i < got.values.size(); ++i) {
    const double value = static_cast<double>(widen(got.values[i])), wanted = truth.values[i];
    if (value == wanted || (std::isnan(value) && std::isnan(wanted))) continue;
    const double allowed = std::isfinite(wanted) ? tolerance<T>(arithmetic, magnitude.values[i], wanted) : 0;
    if (!(std::fabs(value - wanted) <= allowed)) {
      char text[128];
      std::snprintf(text, sizeof(text), "element %zu is %.9g, wanted %.9g within %.2g", i, value, wanted, allowed);
      return text;
    }
  }
  return "";
}

template <class T>
bool same_bits(const Result<T>& whole, const Result<T>& part) {
  const size_t bytes = part.values.size() * sizeof(T);
  return (bytes == 0 || std::memcmp(whole.values.data(), part.values.data(), bytes) == 0) &&
         std::equal(part.offsets.begin(), part.offsets.end(), whole.offsets.begin());
}

// The results of the naive rows for a shape in a dtype, each computed once for all rows that are to have the same.
using Truths = std::map<std::pair<const void*, Values>, Result<double>>;

// What is wrong with the results of a row, or an empty string.
template <class T, class Kernel, class Shape>
std::string problem_of(const Kernel& row, const Shape& shape, Truths& truths) {
  const std::vector<uint8_t> offsets = offsets_for<T>(row, shape);
  const auto run = [&](const Shape& s, const Run& how) { return run_row<T, T>(row, s, how, offsets); };
  const auto truth = [&](Values values) -> const Result<double>& {
    const auto& naive_row = truth_of(row);
    const auto [place, is_new] = truths.try_emplace({&naive_row, values});
    if (is_new) place->second = run_row<T, double>(naive_row, shape, {Order::forward, Flush::start, values}, offsets);
    return place->second;
  };
  const Result<T> result = run(shape, {Order::forward, Flush::start, Values::plain});
  const Result<double>& magnitude = truth(Values::absolute);
  const Arithmetic arithmetic = arithmetic_of<T>(row, shape);
  std::string problem = difference(result, truth(Values::plain), magnitude, arithmetic);
  if (!problem.empty()) return problem;
  if (!same_bits(result, run(shape, {Order::reverse, Flush::end, Values::plain})))
    return "other bits in reverse order, or at other addresses";
  Shape first = shape;
  if (goes_by_image(row)) batch_of(first) = std::min<int64_t>(batch_of(first), 1);
  if (!same_bits(result, run(first, {Order::shuffled, Flush::end, Values::plain})))
    return "other bits in shuffled order, or of an image alone";
  problem = difference(run(shape, {Order::forward, Flush::end, Values::not_finite}), truth(Values::not_finite), magnitude, arithmetic);
  return problem.empty() ? "" : "with an infinity and a NaN: " + problem;
}

char running[256];  // what a fault is reported with
int passed = 0, failed = 0, left_out = 0;

// A block for each weight, as a reduction takes them, would run for minutes where there are many: smaller cases show the same.
constexpr int64_t kMostBlocks = 4096;

void report_fault(int) {
  static_cast<void>(!write(STDOUT_FILENO, running, std::strlen(running)));
  static const char text[] = ": touches memory outside its buffers\n";
  static_cast<void>(!write(STDOUT_FILENO, text, sizeof(text) - 1));
  _exit(3);
}

// The policy under which a row may serve: some want TF32 to be forbidden.
Conv2dShape policy_for(const cuda::Conv2dKernel& row, Conv2dShape s) {
  if (!row.accepts(s)) s.allow_tf32 = 0;
  return s;
}
template <class Kernel, class Shape>
const Shape& policy_for(const Kernel&, const Shape& shape) {
  return shape;
}

template <class T, class Kernel, class Shape>
void check_rows(const std::vector<const Kernel*>& table, const std::string& what, const Shape& allowed, const Options& options) {
  Truths truths;
  for (const Kernel* row : table) {
    const Shape shape = policy_for(*row, allowed);
    if ((!options.row.empty() && options.row != row->name) || !row->accepts(shape)) continue;
    if (row->plan(shape).blocks > kMostBlocks) {
      ++left_out;
      continue;
    }
    std::snprintf(running, sizeof(running), "FAILED %s, %s", row->name, what.c_str());
    std::string problem;
    try {
      problem = problem_of<T>(*row, shape, truths);
    } catch (const std::runtime_error& error) {
      problem = error.what();
    }
    ++(problem.empty() ? passed : failed);
    if (!problem.empty()) std::printf("%s: %s\n", running, problem.c_str());
  }
}

template <class T>
void check_dtype(DType dtype, const std::string& dtype_name, const Options& options) {
  if (!options.dtype.empty() && options.dtype != dtype_name) return;
  const std::pair<Layout, const char*> layouts[] = {{Layout::nchw, "nchw"}, {Layout::nhwc, "nhwc"}};
  size_t variant = 3 * static_cast<size_t>(dtype), turn = static_cast<size_t>(dtype);
  for (const auto& [layout, layout_name] : layouts) {
    for (const Case& c : sample(read_cases(options.pool2d_file), variant++, options.every)) {
      const std::string what = "case " + c.name + ", " + dtype_name + " " + layout_name;
      const Pool2dShape shape = pool2d_shape(c, dtype, layout);
      check_rows<T>(cuda::pool2d_kernels(), what, shape, options);
      check_rows<T>(cuda::sized_pool2d_kernels(), "sizes of " + what, sized_pool2d_shape(shape), options);
    }
    for (const auto& [weight_layout, weight_layout_name] : layouts) {
      for (const Case& c : sample(read_cases(options.conv2d_file), variant++, options.every)) {
        const std::string what = "case " + c.name + ", " + dtype_name + " " + layout_name + ", weight " + weight_layout_name;
        const Conv2dShape conv = conv2d_shape(c, dtype, layout, weight_layout);
        check_rows<T>(cuda::conv2d_kernels(), what, conv, options);
        // Each convolution is fused with one of the poolings in turn, in float32 with and without TF32.
        const auto& [window, stride] = kFusedPools[turn % std::size(kFusedPools)];
        Conv2dReluPoolShape fused = fused_shape(conv, window, stride);
        fused.conv.allow_tf32 = turn++ / std::size(kFusedPools) % 2;
        if (fused.pooled_h < 1 || fused.pooled_w < 1) continue;
        check_rows<T>(cuda::conv2d_relu_pool_kernels(), what + ", pooled " + std::to_string(window) + "/" + std::to_string(stride), fused,
                      options);
      }
    }
  }
}

bool has_row(const std::string& name) {
  const auto is_named = [&](const auto* row) { return name == row->name; };
  return std::any_of(cuda::conv2d_kernels().begin(), cuda::conv2d_kernels().end(), is_named) ||
         std::any_of(cuda::conv2d_relu_pool_kernels().begin(), cuda::conv2d_relu_pool_kernels().end(), is_named) ||
         std::any_of(cuda::pool2d_kernels().begin(), cuda::pool2d_kernels().end(), is_named) ||
         std::any_of(cuda::sized_pool2d_kernels().begin(), cuda::sized_pool2d_kernels().end(), is_named);
}

}  // namespace

int main(int argc, char** argv) try {
  const Options options = parse_options(argc, argv, has_row);
  std::signal(SIGSEGV, report_fault);
  std::signal(SIGBUS, report_fault);
  check_dtype<float>(DType::float32, "float32", options);
  check_dtype<double>(DType::float64, "float64", options);
  check_dtype<__half>(DType::float16, "float16", options);
  check_dtype<__nv_bfloat16>(DType::bfloat16, "bfloat16", options);
  std::printf("%d passed, %d left out for their size, %d failed (a row, a case, a dtype and a layout each)\n", passed, left_out, failed);
  return failed == 0 && passed > 0 ? 0 : 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "cuda_check: %s\n", error.what());
  return 2;
}
