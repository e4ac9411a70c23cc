// Convolution of the half types, alone and fused with its ReLU and max pooling: converted.inl with the float32 rows.
//
// Narrow groups (depthwise among them) are cut into parts of some groups that the threads take in turn. Dense convolutions are cut into
// larger parts (conv2d_converted_dense.inl; the fused ones into some images), one after the other, with all threads at work in each: a
// float32 row packs its weights anew for each part. Converting takes one pass over a part where the row makes hundreds of multiplications
// per element.
//
// backward_weight adds up parts in float32: those of a range of images one after the other, then the ranges. Both are functions of the
// shape.
#include "cpu/kernels/conv2d_converted_dense.inl"
#include "cpu/kernels/conv2d_direct_pooled.inl"
#include "cpu/kernels/converted.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

constexpr int64_t kMostRanges = 8;           // of images, in backward_weight of narrow groups
constexpr int64_t kDenseElements = 1 << 20;  // of a part of a dense fused convolution

const Conv2dShape& conv_of(const Conv2dShape& s) { return s; }
const Conv2dShape& conv_of(const Conv2dReluPoolShape& s) { return s.conv; }
Conv2dShape& conv_of(Conv2dShape& s) { return s; }
Conv2dShape& conv_of(Conv2dReluPoolShape& s) { return s.conv; }
int64_t outputs_of(const Conv2dShape& s) { return s.out_h * s.out_w; }
int64_t outputs_of(const Conv2dReluPoolShape& s) { return s.pooled_h * s.pooled_w; }

template <class Shape>
constexpr bool kIsFused = sizeof(Shape) == sizeof(Conv2dReluPoolShape);

// How a problem is cut, and how large what a worker needs is.
template <class Shape>
struct Cutting {
  Cutting(const Shape& whole, Conv2dDirection direction, int threads)
      : shape(whole), s(conv_of(shape)), out_plane(outputs_of(shape)), dense(has_wide_groups(s)), workers(dense ? 1 : threads) {
    threads_within = dense ? threads : 1;
    group_in = s.in_channels / s.groups, group_out = s.out_channels / s.groups;
    in_plane = s.in_h * s.in_w, group_weights = group_out * group_in * s.kernel_h * s.kernel_w;
    const int64_t group_elements = larger(group_in * in_plane, group_out * s.out_h * s.out_w);
    parts = dense ? cut_images(s.batch, s.groups, s.groups * group_elements, kDenseElements)
                  : cut(s.layout, s.batch, s.groups, group_in, group_elements);
    ranges = dense ? 1 : larger(1, smaller(kMostRanges, parts.image_parts));
    input_bytes = part_bytes(parts.images * parts.units * group_in * in_plane);
    output_bytes = part_bytes(parts.images * parts.units * group_out * out_plane);
    weight_bytes = part_bytes(parts.units * group_weights);
    bias_bytes = part_bytes(parts.units * larger(group_in, group_out));
    row_bytes = float_row_bytes(direction, part(smaller(parts.images, s.batch), parts.units), Isa::CNN_EXT_ISA, threads_within);
  }

  // The float32 problem of a part.
  Shape part(int64_t images, int64_t groups) const {
    Shape part = shape;
    Conv2dShape& conv = conv_of(part);
    conv.dtype = DType::float32, conv.allow_winograd = 0;
    conv.batch = images, conv.groups = groups;
    conv.in_channels = groups * group_in, conv.out_channels = groups * group_out;
    return part;
  }
  // Input, output or its gradient, what backward knows of the output, weight, bias, and what the float32 row takes.
  int64_t worker_bytes() const {
    const int64_t outputs = (kIsFused<Shape> ? 2 : 1) * output_bytes;
    return input_bytes + outputs + weight_bytes + bias_bytes + aligned(static_cast<int64_t>(row_bytes));
  }
  int64_t range_bytes() const { return part_bytes(s.groups * group_weights); }

  const Shape shape;
  const Conv2dShape& s;
  int64_t out_plane;
  bool dense;
  int workers, threads_within;  // threads that take parts in turn, and threads at work in each part
  int64_t in_plane, group_in, group_out, group_weights;
  Parts parts;
  int64_t ranges;
  int64_t input_bytes, output_bytes, weight_bytes, bias_bytes;
  size_t row_bytes;
};

template <class Element, class Shape, class Buffers>
class ConvertedPart {
 public:
  ConvertedPart(const Cutting<Shape>& cutting, const Buffers& buffers, int64_t image_part, int64_t group_part, char* memory)
      : b_(buffers), memory_(memory), threads_(cutting.threads_within) {
    const Conv2dShape& s = cutting.s;
    const int64_t image = image_part * cutting.parts.images, group = group_part * cutting.parts.units;
    part_ = cutting.part(smaller(cutting.parts.images, s.batch - image), smaller(cutting.parts.units, s.groups - group));
    const Conv2dShape& conv = conv_of(part_);
    in_ = slice_of(s.layout, s.in_channels, cutting.in_plane, image, conv.batch, group * cutting.group_in, conv.in_channels);
    out_ = slice_of(s.layout, s.out_channels, cutting.out_plane, image, conv.batch, group * cutting.group_out, conv.out_channels);
    weights_ = {group * cutting.group_weights, 1, conv.groups * cutting.group_weights, 0};
    bias_ = {group * cutting.group_out, 1, conv.out_channels, 0}, input_bias_ = {group * cutting.group_in, 1, conv.in_channels, 0};
    input_ = take(cutting.input_bytes), output_ = take(cutting.output_bytes), mask_ = take(kFused ? cutting.output_bytes : 0);
    weight_ = take(cutting.weight_bytes), bias_values_ = take(cutting.bias_bytes);
    scratch_ = {memory_, cutting.row_bytes};
  }

  void forward() {
    Buffers part{};
    part.input = widened(b_.input, in_, input_), part.weight = widened(b_.weight, weights_, weight_);
    part.bias = widened(b_.bias, bias_, bias_values_), part.output = output_;
    if constexpr (kFused) part.offsets = static_cast<uint8_t*>(offsets_of(b_.offsets, out_, 1, mask_));
    run_float_row(Conv2dDirection::forward, part_, part, Isa::CNN_EXT_ISA, threads_, scratch_);
    narrow(output_, out_, static_cast<Element*>(b_.output), threads_);
    if constexpr (kFused) move_offsets<true>(b_.offsets, out_, 1, mask_);
  }

  void backward_input() {
    Buffers part = gradient();
    part.weight = widened(b_.weight, weights_, weight_), part.bias = widened(b_.bias, input_bias_, bias_values_);
    part.grad_input = input_;
    run_float_row(Conv2dDirection::backward_input, part_, part, Isa::CNN_EXT_ISA, threads_, scratch_);
    narrow(input_, in_, static_cast<Element*>(b_.grad_input), threads_);
  }

  // sums: of the whole weight, to which those of the part are added.
  void backward_weight(float* sums) {
    Buffers part = gradient();
    part.input = widened(b_.input, in_, input_), part.grad_weight = weight_;
    run_float_row(Conv2dDirection::backward_weight, part_, part, Isa::CNN_EXT_ISA, threads_, scratch_);
    for_each_piece(weights_, threads_, [&](const Slice& piece, int64_t begin) {
      for (int64_t i = 0; i < piece.length; ++i) sums[piece.first + i] += weight_[begin + i];
    });
  }

 private:
  static constexpr bool kFused = kIsFused<Shape>;

  float* take(int64_t bytes) {
    float* place = reinterpret_cast<float*>(memory_);
    memory_ += bytes;
    return place;
  }

  float* widened(const void* tensor, const Slice& slice, float* place) const {
    if (tensor == nullptr) return nullptr;
    widen(static_cast<const Element*>(tensor), slice, place, threads_);
    return place;
  }

  // The gradient of the output, and what backward has to know of the output.
  Buffers gradient() {
    Buffers part{};
    part.grad_output = widened(b_.grad_output, out_, output_);
    if constexpr (kFused) {
      move_offsets<false>(b_.offsets, out_, 1, mask_);
      part.offsets = static_cast<uint8_t*>(offsets_of(b_.offsets, out_, 1, mask_));
      part.output = widened(b_.output, out_, mask_);
    }
    return part;
  }

  const Buffers& b_;
  Shape part_;
  char* memory_;
  const int threads_;
  Slice in_, out_, weights_, bias_, input_bias_;
  float *input_, *output_, *mask_, *weight_, *bias_values_;
  RowScratch scratch_;
};

template <class Shape, Conv2dDirection kDirection>
Plan plan(const Shape& shape, int threads) {
  if constexpr (!kIsFused<Shape>) {
    if (has_wide_groups(shape)) return plan_dense<kDirection>(shape, threads);
  }
  const Cutting<Shape> cutting(shape, kDirection, threads);
  const bool has_ranges = kDirection == Conv2dDirection::backward_weight;
  const int64_t image_parts = has_ranges ? cutting.ranges : cutting.parts.image_parts;
  const int64_t bytes = cutting.workers * cutting.worker_bytes() + (has_ranges ? cutting.ranges * cutting.range_bytes() : 0);
  return {cutting.parts.units * cutting.group_out, 1, image_parts * cutting.parts.unit_parts, static_cast<size_t>(bytes)};
}

template <class Element, class Shape, class Buffers>
void run_backward_weight(const Cutting<Shape>& cutting, const Buffers& b, char* memory, int threads) {
  const Parts& parts = cutting.parts;
  const int64_t weights = cutting.s.groups * cutting.group_weights;
  const int64_t range_elements = cutting.range_bytes() / static_cast<int64_t>(sizeof(float));
  float* sums = reinterpret_cast<float*>(memory);
  for (int64_t i = 0; i < cutting.ranges * range_elements; ++i) sums[i] = 0;
  memory += cutting.ranges * cutting.range_bytes();
  parallel_for(cutting.workers, cutting.ranges * parts.unit_parts, [&](int worker, int64_t task) {
    const int64_t range = task / parts.unit_parts;
    for (int64_t i = range * parts.image_parts / cutting.ranges; i < (range + 1) * parts.image_parts / cutting.ranges; ++i) {
      ConvertedPart<Element, Shape, Buffers> part(cutting, b, i, task % parts.unit_parts, memory + worker * cutting.worker_bytes());
      part.backward_weight(sums + range * range_elements);
    }
  });
  for (int64_t range = 1; range < cutting.ranges; ++range) {
    for (int64_t i = 0; i < weights; ++i) sums[i] += sums[range * range_elements + i];
  }
  narrow(sums, {0, 1, weights, 0}, static_cast<Element*>(b.grad_weight), threads);
}

template <class Shape, class Buffers, Conv2dDirection kDirection>
Outcome run(const Shape& shape, const Buffers& b, void* workspace, int threads) {
  if constexpr (!kIsFused<Shape>) {
    if (has_wide_groups(shape)) {
      with_half(shape.dtype, [&](auto element) { DenseRun<decltype(element), kDirection>(shape, b, workspace, threads).run(); });
      return Outcome::done;
    }
  }
  const Cutting<Shape> cutting(shape, kDirection, threads);
  const Parts& parts = cutting.parts;
  char* memory = static_cast<char*>(workspace);
  with_half(cutting.s.dtype, [&](auto element) {
    using Element = decltype(element);
    if constexpr (kDirection == Conv2dDirection::backward_weight) {
      run_backward_weight<Element>(cutting, b, memory, threads);
    } else {
      parallel_for(cutting.workers, parts.image_parts * parts.unit_parts, [&](int worker, int64_t task) {
        ConvertedPart<Element, Shape, Buffers> part(cutting, b, task / parts.unit_parts, task % parts.unit_parts,
                                                    memory + worker * cutting.worker_bytes());
        kDirection == Conv2dDirection::forward ? part.forward() : part.backward_input();
      });
    }
  });
  return Outcome::done;
}

bool accepts(const Conv2dShape& s) { return is_half(s.dtype); }
bool accepts_fused(const Conv2dReluPoolShape& s) { return is_half(s.conv.dtype) && s.pool_h * s.pool_w <= kNoGradient; }

}  // namespace

#define CNN_EXT_CONVERTED_ROW(direction)                                               \
  extern const Conv2dKernel conv2d_##direction##_converted = {                         \
      CNN_EXT_KERNEL_NAME("conv2d_" #direction "_converted"),                          \
      Isa::CNN_EXT_ISA,                                                                \
      Conv2dDirection::direction,                                                      \
      accepts,                                                                         \
      plan<Conv2dShape, Conv2dDirection::direction>,                                   \
      run<Conv2dShape, Conv2dBuffers, Conv2dDirection::direction>,                     \
      /*adds_bias=*/Conv2dDirection::direction == Conv2dDirection::backward_input};    \
  extern const Conv2dReluPoolKernel conv2d_relu_max_pool2d_##direction##_converted = { \
      CNN_EXT_KERNEL_NAME("conv2d_relu_max_pool2d_" #direction "_converted"),          \
      Isa::CNN_EXT_ISA,                                                                \
      Conv2dDirection::direction,                                                      \
      accepts_fused,                                                                   \
      plan<Conv2dReluPoolShape, Conv2dDirection::direction>,                           \
      run<Conv2dReluPoolShape, Conv2dReluPoolBuffers, Conv2dDirection::direction>};
CNN_EXT_CONVERTED_ROW(forward)
CNN_EXT_CONVERTED_ROW(backward_input)
CNN_EXT_CONVERTED_ROW(backward_weight)

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
