// wide_check: the CUDA rows on tensors of more elements, and with more elements along an axis, than an int counts, under the emulation of
// csrc/tests/emulation.
//
// The axis is the outermost one of all tensors, so that the end of such a tensor is a small tensor of its own, the twin: the last images,
// channels, rows or columns. Before it everything is zero, in memory that nobody has touched and that therefore costs nothing. Only the
// last blocks of each launch run. What they write must be what the whole launch writes for the twin, which cuda_check proves. The operands
// are whole numbers, whose sums no order rounds.
#include <sys/mman.h>

#include <cstdio>
#include <exception>
#include <new>
#include <optional>
#include <string>

#include "core/fused_pool.h"
#include "cuda/api.h"
#include "cuda/kernel_table.h"
#include "tests/emulation/block.h"
#include "tests/guarded.h"

namespace {

using namespace cnn_ext;
using tests::random_bits;

constexpr int64_t kLastBlocks = 2;
constexpr int64_t kVast = int64_t{1} << 32;  // longer than the twin; as an int it is none

// Zeros, which take memory where they are written alone.
class SparseBytes {
 public:
  explicit SparseBytes(int64_t bytes) : bytes_(static_cast<size_t>(bytes) + 1) {
    data_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data_ == MAP_FAILED) throw std::bad_alloc();
  }
  ~SparseBytes() { munmap(data_, bytes_); }
  SparseBytes(const SparseBytes&) = delete;
  SparseBytes& operator=(const SparseBytes&) = delete;
  char* data() const { return static_cast<char*>(data_); }

 private:
  size_t bytes_;
  void* data_;
};

// How many elements a tensor of the large problem has, and its end, the twin's.
struct Counts {
  int64_t large, twin;
};

template <class T>
class TwinTensors {
 public:
  explicit TwinTensors(Counts counts) : counts_(counts), large_(counts.large * kBytes), twin_(counts.twin * kBytes) {}

  // value(i): of the i-th element of the twin; `further` is added to those of the large tensor.
  template <class Value>
  void fill(const Value& value, T further = 0) {
    for (int64_t i = 0; i < counts_.twin; ++i) {
      twin()[i] = value(i);
      end()[i] = static_cast<T>(value(i) + further);
    }
  }
  void fill_random(uint64_t seed) {
    fill([seed](int64_t i) { return static_cast<T>(random_bits(seed, i) % 9) - 4; });
  }
  // Whether the elements of the twin from `first` on, which are not all 0, are those of the large tensor.
  bool agree(int64_t first = 0, T further = 0) const {
    bool is_empty = true, is_same = true;
    for (int64_t i = first; i < counts_.twin; ++i) {
      is_empty = is_empty && twin()[i] == 0;
      is_same = is_same && end()[i] == static_cast<T>(twin()[i] + further);
    }
    return is_same && !is_empty;
  }
  T* large() const { return reinterpret_cast<T*>(large_.data()); }
  T* twin() const { return reinterpret_cast<T*>(twin_.data()); }

 private:
  static constexpr int64_t kBytes = sizeof(T);
  T* end() const { return large() + counts_.large - counts_.twin; }
  Counts counts_;
  SparseBytes large_, twin_;
};

int passed = 0, failed = 0;

void report(const std::string& what, const cuda::Choice& choice, const std::string& wanted, bool agrees) {
  const bool is_right = agrees && choice.kernel == wanted;
  ++(is_right ? passed : failed);
  if (!is_right)
    std::printf("FAILED %s, %s (wanted %s): %s\n", what.c_str(), choice.kernel.c_str(), wanted.c_str(), agrees ? "right" : "wrong");
}

// run(is_large) under a row: for the large problem, with its last blocks alone, and for the twin.
template <class Run>
void run_both(const cuda::Choice& choice, const Run& run) {
  const std::string previous = cuda::force_kernel(choice.kernel);
  emulation::set_last_blocks(kLastBlocks);
  run(true);
  emulation::set_last_blocks(0);
  run(false);
  cuda::restore_forced_kernel(choice.kernel, previous);
}

template <class Shape>
struct Twins {
  const char* name;
  Shape large, twin;
  const char* algorithm;  // of the row that has to serve the large problem
};

template <class Shape, class Count>
Counts counts_of(const Twins<Shape>& t, const Count& count) {
  return {count(t.large), count(t.twin)};
}

constexpr const char* kDirections[] = {"forward", "backward_input", "backward_weight", "backward_bias"};
std::string row_name(const std::string& op, const std::string& direction, const std::string& algorithm) {
  return op + "_" + direction + "_" + algorithm + "_sm80";
}

int64_t inputs(const Conv2dShape& s) { return s.batch * s.in_channels * s.in_h * s.in_w; }
int64_t weights(const Conv2dShape& s) { return s.out_channels * (s.in_channels / s.groups) * s.kernel_h * s.kernel_w; }
int64_t outputs(const Conv2dShape& s) { return s.batch * s.out_channels * s.out_h * s.out_w; }

// The bias gradient is a reduction in any case.
template <class Shape>
std::string algorithm_of(const Twins<Shape>& t, Conv2dDirection direction) {
  const std::string algorithm = t.algorithm;
  return direction == Conv2dDirection::backward_bias && algorithm == "direct" ? "reduction" : algorithm;
}

void check(const Twins<Conv2dShape>& t, Conv2dDirection direction) {
  TwinTensors<float> input(counts_of(t, inputs)), weight(counts_of(t, weights)), grad_output(counts_of(t, outputs));
  const auto channels = [](const Conv2dShape& s) { return s.out_channels; };
  const Counts results[] = {counts_of(t, outputs), counts_of(t, inputs), counts_of(t, weights), counts_of(t, channels)};
  const int number = static_cast<int>(direction);
  TwinTensors<float> result(results[number]);
  input.fill_random(1), weight.fill_random(2), grad_output.fill_random(3);
  const cuda::Choice choice = cuda::choose_conv2d(direction, t.large);
  run_both(choice, [&](bool is_large) {
    const auto data = [is_large](const TwinTensors<float>& tensors) { return is_large ? tensors.large() : tensors.twin(); };
    const Conv2dShape& shape = is_large ? t.large : t.twin;
    Conv2dBuffers b{};
    b.input = data(input), b.weight = data(weight), b.grad_output = data(grad_output);
    void** written[] = {&b.output, &b.grad_input, &b.grad_weight, &b.grad_bias};
    *written[number] = data(result);
    std::optional<SparseBytes> workspace;
    const auto allocate = [&](size_t bytes) { return workspace.emplace(static_cast<int64_t>(bytes)).data(); };
    cuda::run_conv2d(direction, shape, b, allocate, nullptr);
  });
  const std::string name = kDirections[number];
  report(name + " of " + t.name, choice, row_name("conv2d", name, algorithm_of(t, direction)), result.agree());
}

// Through ReLU and pooling.
void check(const Twins<Conv2dReluPoolShape>& t, Conv2dDirection direction) {
  const auto conv_inputs = [](const Conv2dReluPoolShape& s) { return inputs(s.conv); };
  const auto conv_weights = [](const Conv2dReluPoolShape& s) { return weights(s.conv); };
  const auto channels = [](const Conv2dReluPoolShape& s) { return s.conv.out_channels; };
  const Counts pooled = counts_of(t, pooled_elements);
  TwinTensors<float> input(counts_of(t, conv_inputs)), weight(counts_of(t, conv_weights)), grad_output(pooled), mask(pooled);
  const Counts results[] = {pooled, counts_of(t, conv_inputs), counts_of(t, conv_weights), counts_of(t, channels)};
  const int number = static_cast<int>(direction);
  TwinTensors<float> result(results[number]);
  TwinTensors<uint8_t> offsets(pooled);
  input.fill_random(1), weight.fill_random(2), grad_output.fill_random(3), mask.fill_random(5);
  offsets.fill([&](int64_t i) { return static_cast<uint8_t>(random_bits(4, i) % static_cast<uint64_t>(t.twin.pool_h * t.twin.pool_w)); });
  const cuda::Choice choice = cuda::choose_conv2d_relu_pool(direction, t.large);
  run_both(choice, [&](bool is_large) {
    const auto data = [is_large](const TwinTensors<float>& tensors) { return is_large ? tensors.large() : tensors.twin(); };
    const Conv2dReluPoolShape& shape = is_large ? t.large : t.twin;
    Conv2dReluPoolBuffers b{};
    b.input = data(input), b.weight = data(weight), b.grad_output = data(grad_output), b.output = data(mask);
    b.offsets = !has_pooling(shape) ? nullptr : is_large ? offsets.large() : offsets.twin();
    void** written[] = {&b.output, &b.grad_input, &b.grad_weight, &b.grad_bias};
    *written[number] = data(result);
    std::optional<SparseBytes> workspace;
    const auto allocate = [&](size_t bytes) { return workspace.emplace(static_cast<int64_t>(bytes)).data(); };
    cuda::run_conv2d_relu_pool(direction, shape, b, allocate, nullptr);
  });
  const std::string name = kDirections[number],
                    algorithm = direction == Conv2dDirection::backward_bias ? algorithm_of(t, direction) : "composed";
  report("fused " + name + " of " + t.name, choice, row_name("conv2d_relu_max_pool2d", name, algorithm),
         result.agree() && (!has_pooling(t.twin) || offsets.agree()));
}

// The first results of a twin have padding where the large problem has zeros.
constexpr int64_t kFirstResults = 8;

void check(const Twins<Pool2dShape>& t, Pool2dOp op, Pool2dDirection direction) {
  const Counts large = counts_of(t, [](const Pool2dShape& s) { return s.batch * s.channels * s.in_h * s.in_w; });
  const Counts small = counts_of(t, [](const Pool2dShape& s) { return s.batch * s.channels * s.out_h * s.out_w; });
  const bool backward = direction == Pool2dDirection::backward, forward = direction == Pool2dDirection::forward;
  TwinTensors<float> source(backward ? small : large), result(backward ? large : small);
  TwinTensors<uint8_t> offsets(small);
  source.fill_random(1);
  if (!forward)
    offsets.fill(
        [&](int64_t i) { return static_cast<uint8_t>(random_bits(4, i) % static_cast<uint64_t>(t.twin.kernel_h * t.twin.kernel_w)); });
  const cuda::Choice choice = cuda::choose_pool2d(op, direction, t.large);
  run_both(choice, [&](bool is_large) {
    Pool2dBuffers b{};
    float* const read = is_large ? source.large() : source.twin();
    float* const written = is_large ? result.large() : result.twin();
    (backward ? b.grad_output : b.input) = read;
    (backward ? b.grad_input : b.output) = written;
    b.offsets = op == Pool2dOp::avg ? nullptr : is_large ? offsets.large() : offsets.twin();
    cuda::run_pool2d(op, direction, is_large ? t.large : t.twin, b, nullptr);
  });
  const bool agrees = result.agree(kFirstResults) && (op == Pool2dOp::avg || offsets.agree(kFirstResults));
  const char* directions[] = {"forward", "backward", "gather"};
  const std::string name = directions[static_cast<int>(direction)];
  report(name + " of " + t.name, choice, row_name(op == Pool2dOp::max ? "max_pool2d" : "avg_pool2d", name, t.algorithm), agrees);
}

// An index of a plane of the large problem is by `further` larger than the twin's.
void check(const Twins<SizedPool2dShape>& t, SizedPool2dOp op, SizedPool2dDirection direction) {
  const Counts large = counts_of(t, [](const SizedPool2dShape& s) { return s.batch * s.channels * s.in_h * s.in_w; });
  const Counts small = counts_of(t, [](const SizedPool2dShape& s) { return s.batch * s.channels * s.out_h * s.out_w; });
  const bool unpools = op == SizedPool2dOp::max_unpool;
  const bool writes_small = direction == SizedPool2dDirection::gather || (!unpools && direction == SizedPool2dDirection::forward);
  const int64_t plane = t.twin.in_h * t.twin.in_w, further = t.large.in_h * t.large.in_w - plane;
  TwinTensors<float> source(writes_small ? large : small), result(writes_small ? small : large);
  TwinTensors<int64_t> indices(small);
  source.fill_random(1);
  if (unpools) indices.fill([&](int64_t i) { return i * 7919 % plane; }, further);
  const cuda::Choice choice = cuda::choose_sized_pool2d(op, direction, t.large);
  run_both(choice, [&](bool is_large) {
    float* const read = is_large ? source.large() : source.twin();
    float* const written = is_large ? result.large() : result.twin();
    const SizedPool2dBuffers b{writes_small ? read : written, writes_small ? written : read, is_large ? indices.large() : indices.twin()};
    cuda::run_sized_pool2d(op, direction, is_large ? t.large : t.twin, b, nullptr);
  });
  const char* ops[] = {"adaptive_max_pool2d", "adaptive_avg_pool2d", "max_unpool2d"};
  const char* directions[] = {"forward", "backward", "scatter", "gather"};
  const std::string name = directions[static_cast<int>(direction)];
  report(name + " of " + t.name, choice, row_name(ops[static_cast<int>(op)], name, "direct"),
         result.agree() && (op != SizedPool2dOp::adaptive_max || indices.agree(0, further)));
}

// A convolution whose windows are 3 long and 2 apart, padded by 1, along each axis that is longer than 1.
Conv2dShape conv_of(Layout layout, int64_t batch, int64_t channels, int64_t h, int64_t w, int64_t groups = 1) {
  Conv2dShape s{};
  s.batch = batch, s.in_channels = s.out_channels = channels, s.groups = groups, s.in_h = h, s.in_w = w;
  s.kernel_h = h > 1 ? 3 : 1, s.kernel_w = w > 1 ? 3 : 1;
  s.stride_h = h > 1 ? 2 : 1, s.stride_w = w > 1 ? 2 : 1, s.dilation_h = s.dilation_w = 1;
  s.pad_top = h > 1 ? 1 : 0, s.pad_left = w > 1 ? 1 : 0;
  s.out_h = (h + 1) / 2, s.out_w = (w + 1) / 2;
  s.dtype = DType::float32, s.layout = s.weight_layout = layout;
  return s;
}

// With the convolution's windows.
Pool2dShape pool_of(const Conv2dShape& s) {
  Pool2dShape p{};
  p.batch = s.batch, p.channels = s.in_channels, p.in_h = s.in_h, p.in_w = s.in_w, p.out_h = s.out_h, p.out_w = s.out_w;
  p.kernel_h = s.kernel_h, p.kernel_w = s.kernel_w, p.stride_h = s.stride_h, p.stride_w = s.stride_w;
  p.pad_top = p.pad_bottom = s.pad_top, p.pad_left = p.pad_right = s.pad_left, p.dilation_h = p.dilation_w = 1;
  p.count_include_pad = 1, p.dtype = s.dtype, p.layout = s.layout;
  return p;
}

// With windows of 2 along the axes that the convolution has windows along.
Conv2dReluPoolShape fused_of(const Conv2dShape& s) {
  const int64_t pool_h = s.kernel_h > 1 ? 2 : 1, pool_w = s.kernel_w > 1 ? 2 : 1;
  return {s, pool_h, pool_w, pool_h, pool_w, s.out_h / pool_h, s.out_w / pool_w};
}

SizedPool2dShape sized_of(const Conv2dShape& s) { return {s.batch, s.in_channels, s.in_h, s.in_w, s.out_h, s.out_w, s.dtype, s.layout}; }

template <class Shape, class Make>
Twins<Shape> derived(const Twins<Conv2dShape>& t, const Make& make) {
  return {t.name, make(t.large), make(t.twin), t.algorithm};
}

// Results that are many.
void check_elements(const Twins<Conv2dShape>& t) {
  for (const Conv2dDirection direction : {Conv2dDirection::forward, Conv2dDirection::backward_input}) {
    check(t, direction);
    check(derived<Conv2dReluPoolShape>(t, fused_of), direction);
  }
  const auto pool = derived<Pool2dShape>(t, pool_of);
  for (const Pool2dDirection direction : {Pool2dDirection::forward, Pool2dDirection::backward, Pool2dDirection::gather}) {
    check(pool, Pool2dOp::max, direction);
    if (direction != Pool2dDirection::gather) check(pool, Pool2dOp::avg, direction);
  }
  check(derived<SizedPool2dShape>(t, sized_of), SizedPool2dOp::max_unpool, SizedPool2dDirection::gather);
}

// Sums of many terms.
void check_sums(const Twins<Conv2dShape>& t) {
  for (const Conv2dDirection direction : {Conv2dDirection::backward_weight, Conv2dDirection::backward_bias}) {
    check(t, direction);
    check(derived<Conv2dReluPoolShape>(t, fused_of), direction);
  }
}

// How many elements a window has follows from the sizes: they are twice as many as the outputs, in the twin as well.
void check_adaptive(const char* name, const SizedPool2dShape& large, const SizedPool2dShape& twin) {
  const Twins<SizedPool2dShape> t{name, large, twin, "direct"};
  check(t, SizedPool2dOp::adaptive_max, SizedPool2dDirection::forward);
  check(t, SizedPool2dOp::adaptive_avg, SizedPool2dDirection::forward);
  check(t, SizedPool2dOp::adaptive_avg, SizedPool2dDirection::backward);
}

void check_unpool(const char* name, const SizedPool2dShape& large, const SizedPool2dShape& twin) {
  const Twins<SizedPool2dShape> t{name, large, twin, "direct"};
  check(t, SizedPool2dOp::max_unpool, SizedPool2dDirection::forward);
  check(t, SizedPool2dOp::max_unpool, SizedPool2dDirection::scatter);
}

void check_convolutions_and_windows() {
  const auto nchw = Layout::nchw, nhwc = Layout::nhwc;
  check_elements({"images", conv_of(nchw, kVast + 5, 2, 5, 3), conv_of(nchw, 5, 2, 5, 3), "wide"});
  check_elements({"images in nhwc", conv_of(nhwc, kVast + 5, 2, 5, 3), conv_of(nhwc, 5, 2, 5, 3), "wide"});
  check_elements({"channels", conv_of(nchw, 1, kVast + 5, 5, 3, kVast + 5), conv_of(nchw, 1, 5, 5, 3, 5), "wide"});
  check_elements({"rows", conv_of(nchw, 1, 1, kVast + 40, 3), conv_of(nchw, 1, 1, 40, 3), "wide"});
  check_elements({"rows in nhwc", conv_of(nhwc, 1, 2, kVast + 40, 3), conv_of(nhwc, 1, 2, 40, 3), "wide"});
  check_elements({"columns", conv_of(nchw, 1, 1, 1, kVast + 80), conv_of(nchw, 1, 1, 1, 80), "wide"});
  check_elements({"columns in nhwc", conv_of(nhwc, 1, 3, 1, kVast + 80), conv_of(nhwc, 1, 3, 1, 80), "wide"});
  check_elements({"elements", conv_of(nchw, kVast / 16 + 4, 2, 7, 3), conv_of(nchw, 4, 2, 7, 3), "direct"});
  check_sums({"images", conv_of(nchw, kVast + 50, 2, 1, 1), conv_of(nchw, 50, 2, 1, 1), "wide"});
  check_sums({"images in nhwc", conv_of(nhwc, kVast + 50, 2, 1, 1), conv_of(nhwc, 50, 2, 1, 1), "wide"});
  check_sums({"channels", conv_of(nchw, 1, kVast + 5, 5, 3, kVast + 5), conv_of(nchw, 1, 5, 5, 3, 5), "wide"});
  check_sums({"columns", conv_of(nchw, 1, 1, 1, kVast + 80), conv_of(nchw, 1, 1, 1, 80), "wide"});
  const Twins<Conv2dShape> elements{"elements", conv_of(nhwc, kVast / 128 + 50, 16, 1, 20), conv_of(nhwc, 50, 16, 1, 20), "direct"};
  check(elements, Conv2dDirection::backward_bias);
}

void check_sizes() {
  const DType dtype = DType::float32;
  const auto nchw = Layout::nchw, nhwc = Layout::nhwc;
  const int64_t half = kVast / 2, grid = cuda::kMostGridBlocks;
  check_adaptive("images", {kVast + 5, 2, 6, 4, 3, 2, dtype, nchw}, {5, 2, 6, 4, 3, 2, dtype, nchw});
  check_adaptive("rows in nhwc", {1, 3, half + 40, 2, half / 2 + 20, 1, dtype, nhwc}, {1, 3, 40, 2, 20, 1, dtype, nhwc});
  check_adaptive("columns", {1, 1, 1, half + 80, 1, half / 2 + 40, dtype, nchw}, {1, 1, 1, 80, 1, 40, dtype, nchw});
  // Elements that meet, more of them than are looked through at a time.
  check_unpool("columns", {1, 1, 1, kVast + 2000, 1, 20000, dtype, nchw}, {1, 1, 1, 2000, 1, 20000, dtype, nchw});
  check_unpool("rows", {1, 1, kVast + 500, 4, 100, 200, dtype, nchw}, {1, 1, 500, 4, 100, 200, dtype, nchw});
  // More planes than a grid has blocks.
  check_unpool("planes", {3 * grid, 1, 3, 4, 2, 2, dtype, nchw}, {2, 1, 3, 4, 2, 2, dtype, nchw});
}

// A block for each stride phase of each group: more than a grid holds.
void check_grid() {
  Conv2dShape s = conv_of(Layout::nchw, 1, 3000, 8, 8, 1000);
  s.stride_h = s.stride_w = s.pad_top = s.pad_left = 20000, s.out_h = s.out_w = 2;
  const Conv2dDirection direction = Conv2dDirection::backward_input;
  report("backward_input of strides", cuda::choose_conv2d(direction, s), row_name("conv2d", "backward_input", "direct"), true);
}

}  // namespace

int main() try {
  check_convolutions_and_windows();
  check_grid();
  check_sizes();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 && passed > 0 ? 0 : 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "wide_check: %s\n", error.what());
  return 2;
}
