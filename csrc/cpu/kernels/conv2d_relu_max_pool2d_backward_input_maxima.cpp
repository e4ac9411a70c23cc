// backward_input through ReLU and max pooling, by the maxima alone: the gradient of the convolution's output is zero but for one place in
// each window. A window's output channels have their maxima at different places, but all within the window, and so what they add to the
// input lies within `reach`, kernel and window together. There each of them is the kernel, moved by the offset of its maximum and with
// zeros around it: of 2x2 windows and a 5x5 kernel, 36 products are left of 100.
//
// The kernels are packed as [output channel][row][column][input channel] with those zeros, so that at an offset a row of the reach is a run
// of neighbours. A block of kBlockOutputs output channels is listed for each window of a row of windows; then, for each row of the reach,
// up to kTileSums vectors of a window's run are summed in registers over the list, and added to the gradient of an image and some input
// channels in scratch. That leaves two rows of a block's kernels to be read for all of a row of windows: from the first cache.
//
// Zeros multiply here that stand for nothing, and others are left out, so weights and gradients have to be finite: else the next row takes
// over. Not handled: channels of a group that are no whole vectors, dilation, large maps (which the scratch would have to hold), large
// weights (which the zeros would make larger), and windows that leave too few products out.
#include "cpu/kernel.h"
#include "cpu/kernels/conv2d_backward_weight_split.inl"
#include "cpu/kernels/conv2d_direct_write.inl"
#include "cpu/kernels/conv2d_relu_max_pool2d_maxima.inl"
#include "cpu/parallel.h"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

constexpr int64_t kBlockOutputs = 16;
constexpr int64_t kMostPixels = 1 << 13;   // of a map with its padding
constexpr int64_t kMostWeights = 1 << 21;  // with the zeros around them

// One axis of a problem.
struct Reach {
  Reach(int64_t kernel, int64_t pool, int64_t stride, int64_t pool_stride, int64_t pooled, int64_t in, int64_t pad)
      : step(stride),
        spread((pool - 1) * stride),
        size(spread + kernel),
        kernel_size(spread + size),
        window_step(pool_stride * stride),
        map_size(larger((pooled - 1) * window_step + size, in + pad)) {}

  // Where the kernel of a maximum at position `at` of its window begins.
  int64_t begin(int64_t at) const { return spread - at * step; }

  int64_t step;         // of the input, from one position of a window to the next
  int64_t spread;       // of the positions of a window, and the zeros on both sides of a kernel
  int64_t size;         // of what a window adds to
  int64_t kernel_size;  // with its zeros
  int64_t window_step;  // from window to window
  int64_t map_size;     // with padding
};

Reach rows_of(const Conv2dReluPoolShape& s) {
  return {s.conv.kernel_h, s.pool_h, s.conv.stride_h, s.pool_stride_h, s.pooled_h, s.conv.in_h, s.conv.pad_top};
}
Reach columns_of(const Conv2dReluPoolShape& s) {
  return {s.conv.kernel_w, s.pool_w, s.conv.stride_w, s.pool_stride_w, s.pooled_w, s.conv.in_w, s.conv.pad_left};
}

class MaximaRun {
 public:
  explicit MaximaRun(const Conv2dReluPoolShape& shape)
      : s_(shape),
        c_(shape.conv),
        rows_(rows_of(shape)),
        columns_(columns_of(shape)),
        group_in_(c_.in_channels / c_.groups),
        group_out_(c_.out_channels / c_.groups) {
    const int64_t vectors = group_in_ / kLanes<float>;
    in_blocks_ = divide_up(vectors, larger(1, kTileSums / columns_.size));
    while (vectors % in_blocks_ != 0) ++in_blocks_;
    in_channels_ = group_in_ / in_blocks_;
    for (int64_t tap = 0; tap < s_.pool_h * s_.pool_w; ++tap) {
      const int64_t row = rows_.begin(tap / s_.pool_w), column = columns_.begin(tap % s_.pool_w);
      place_of_[tap] = static_cast<int32_t>((row * columns_.kernel_size + column) * in_channels_);
    }
  }

  Plan plan(int threads) const {
    const int64_t elements = weights_elements() + threads * worker_elements();
    return {in_channels_, columns_.size, tasks(), static_cast<size_t>(elements * static_cast<int64_t>(sizeof(float)))};
  }

  Outcome run(const Conv2dReluPoolBuffers& b, void* workspace, int threads) const {
    float* weights = static_cast<float*>(workspace);
    float* scratch = weights + weights_elements();
    int finite = 1;
    parallel_for(threads, c_.groups * in_blocks_ * group_out_, [&](int, int64_t i) {
      if (!pack(static_cast<const float*>(b.weight), i, weights + i * kernel_elements())) __atomic_store_n(&finite, 0, __ATOMIC_RELAXED);
    });
    if (finite == 0) return Outcome::not_finite;
    parallel_for(threads, tasks(), [&](int worker, int64_t task) {
      float* map = scratch + worker * worker_elements();
      if (!run_task(b, task, weights, map)) __atomic_store_n(&finite, 0, __ATOMIC_RELAXED);
    });
    return finite ? Outcome::done : Outcome::not_finite;
  }

 private:
  int64_t tasks() const { return c_.batch * c_.groups * in_blocks_; }
  int64_t kernel_elements() const { return rows_.kernel_size * columns_.kernel_size * in_channels_; }
  int64_t weights_elements() const { return c_.groups * in_blocks_ * group_out_ * kernel_elements(); }
  int64_t map_elements() const { return rows_.map_size * columns_.map_size * in_channels_; }
  int64_t counts_elements() const { return divide_up(s_.pooled_w, kLanes<float>) * kLanes<float>; }
  int64_t worker_elements() const { return map_elements() + counts_elements() + s_.pooled_w * 2 * (kBlockOutputs + 1) + kLanes<float>; }

  // Kernel i = (group * in_blocks + block of input channels) * group_out + output channel.
  bool pack(const float* weight, int64_t i, float* packed) const {
    const Strides strides = dense_strides(c_.weight_layout, group_in_, c_.kernel_h, c_.kernel_w);
    const int64_t k = i % group_out_, block = i / group_out_ % in_blocks_, group = i / group_out_ / in_blocks_;
    const float* from = weight + (group * group_out_ + k) * strides.n + block * in_channels_ * strides.c;
    for (int64_t j = 0; j < kernel_elements(); ++j) packed[j] = 0;
    int32_t largest = 0;
    for (int64_t r = 0; r < c_.kernel_h; ++r) {
      for (int64_t t = 0; t < c_.kernel_w; ++t) {
        float* to = packed + ((rows_.spread + r) * columns_.kernel_size + columns_.spread + t) * in_channels_;
        for (int64_t c = 0; c < in_channels_; ++c) {
          to[c] = from[r * strides.h + t * strides.w + c * strides.c];
          const int32_t exponent = MaximumList::exponent_of(to[c]);
          largest = exponent > largest ? exponent : largest;
        }
      }
    }
    return largest != kInfinity;
  }

  // An image's gradient of one block of input channels, in `map` [row][column][channel] first.
  bool run_task(const Conv2dReluPoolBuffers& b, int64_t task, const float* weights, float* map) const {
    const int64_t block = task % (c_.groups * in_blocks_), n = task / (c_.groups * in_blocks_), group = block / in_blocks_;
    int32_t* counts = reinterpret_cast<int32_t*>(map + map_elements());
    Maximum* maxima = reinterpret_cast<Maximum*>(counts + counts_elements());
    for (int64_t i = 0; i < map_elements(); ++i) map[i] = 0;
    bool finite = true;
    for (int64_t y = 0; y < s_.pooled_h; ++y) {
      for (int64_t k = 0; k < group_out_; k += kBlockOutputs) {
        const Range outputs{group * group_out_ + k, group * group_out_ + smaller(group_out_, k + kBlockOutputs)};
        for (int64_t x = 0; x < s_.pooled_w; ++x) {
          const MaximumList list = list_maxima(b, n, outputs, y, x, maxima + x * (kBlockOutputs + 1));
          counts[x] = static_cast<int32_t>(list.count());
          finite = finite && list.is_finite();
        }
        add_windows(maxima, counts, weights + (block * group_out_ + k) * kernel_elements(),
                    map + y * rows_.window_step * columns_.map_size * in_channels_);
      }
    }
    write(map, n, group * group_in_ + block % in_blocks_ * in_channels_, static_cast<float*>(b.grad_input));
    return finite;
  }

  // Those of one window, output channel by output channel.
  MaximumList list_maxima(const Conv2dReluPoolBuffers& b, int64_t n, Range outputs, int64_t y, int64_t x, Maximum* maxima) const {
    const Strides strides = pooled_strides(s_);
    const float* grad = static_cast<const float*>(b.grad_output);
    int64_t at = n * strides.n + outputs.begin * strides.c + y * strides.h + x * strides.w;
    MaximumList list(maxima);
    for (int64_t k = 0; k < outputs.size(); ++k, at += strides.c) {
      const uint8_t offset = b.offsets[at];
      list.append(grad[at], offset, k * kernel_elements() + place_of_[offset]);
    }
    return list;
  }

  // What a row of windows adds to the map from `map` on.
  void add_windows(const Maximum* maxima, const int32_t* counts, const float* weights, float* map) const {
    const int64_t vectors = columns_.size * in_channels_ / kLanes<float>, parts = divide_up(vectors, kTileSums);
    for (int64_t i = 0; i < parts; ++i) {
      const Range part = part_of(vectors, parts, i);
      const AddMaxima add = add_maxima_of(part.size());
      for (int64_t r = 0; r < rows_.size; ++r) {
        const float* kernels = weights + r * columns_.kernel_size * in_channels_ + part.begin * kLanes<float>;
        float* to = map + r * columns_.map_size * in_channels_ + part.begin * kLanes<float>;
        for (int64_t x = 0; x < s_.pooled_w; ++x) {
          add(maxima + x * (kBlockOutputs + 1), counts[x], kernels, to + x * columns_.window_step * in_channels_);
        }
      }
    }
  }

  void write(const float* map, int64_t n, int64_t channel, float* grad_input) const {
    const Strides strides = dense_strides(c_.layout, c_.in_channels, c_.in_h, c_.in_w);
    float* to = grad_input + n * strides.n + channel * strides.c;
    for (int64_t y = 0; y < c_.in_h; ++y) {
      const float* from = map + ((y + c_.pad_top) * columns_.map_size + c_.pad_left) * in_channels_;
      write_matrix(from, in_channels_, c_.in_w, in_channels_, to + y * strides.h, strides.w, strides.c);
    }
  }

  const Conv2dReluPoolShape s_;
  const Conv2dShape c_;
  const Reach rows_, columns_;
  const int64_t group_in_, group_out_;
  int64_t in_blocks_, in_channels_;  // of a group's input channels; of a block
  int32_t place_of_[256] = {};       // of a maximum's kernel, by offset
};

// A product here takes a third longer than one of the direct row's.
bool accepts(const Conv2dReluPoolShape& s) {
  const Conv2dShape& c = s.conv;
  if (!has_listed_maxima(s) || c.dilation_h != 1) return false;
  const Reach rows = rows_of(s), columns = columns_of(s);
  const int64_t direct_products = s.pool_stride_h * s.pool_stride_w * c.kernel_h * c.kernel_w;
  return 4 * rows.size * columns.size <= 3 * direct_products && rows.map_size * columns.map_size <= kMostPixels &&
         c.in_channels / c.groups * c.out_channels * rows.kernel_size * columns.kernel_size <= kMostWeights;
}

Plan plan(const Conv2dReluPoolShape& s, int threads) { return MaximaRun(s).plan(threads); }

Outcome run(const Conv2dReluPoolShape& s, const Conv2dReluPoolBuffers& b, void* workspace, int threads) {
  return MaximaRun(s).run(b, workspace, threads);
}

}  // namespace

extern const Conv2dReluPoolKernel conv2d_relu_max_pool2d_backward_input_maxima = {
    CNN_EXT_KERNEL_NAME("conv2d_relu_max_pool2d_backward_input_maxima"),
    Isa::CNN_EXT_ISA,
    Conv2dDirection::backward_input,
    accepts,
    plan,
    run};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
