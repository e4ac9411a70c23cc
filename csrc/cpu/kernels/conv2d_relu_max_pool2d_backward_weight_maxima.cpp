// backward_weight through ReLU and max pooling, by the maxima alone. The gradient of the convolution's output is zero but for one place in
// each window, so with 2x2 windows a quarter of the definition's products is left, in its order of additions: a zero adds nothing.
//
// Each output channel has its maxima elsewhere, so the lanes are input channels. The input is packed as [row][column][channel] with its
// padding; what a row of the kernel reads at a maximum are kernel_w * channels neighbours, up to kTileSums vectors of which are summed in
// registers over all maxima of a block of windows, with one load for each multiply-add. The packed input of a block is meant for the first
// cache.
//
// Zeros are left out here, and those of the padding are multiplied, so both operands have to be finite: else the next row takes over. Not
// handled: channels of a group that are no whole vectors, a dilation along the row, and windows that lie closer than every second output.
#include "cpu/kernels/conv2d_backward_weight_pack.inl"
#include "cpu/kernels/conv2d_backward_weight_split.inl"
#include "cpu/kernels/conv2d_relu_max_pool2d_maxima.inl"
#include "cpu/parallel.h"
#include "cpu/simd/caches.h"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

constexpr int64_t kPackedBytes = kFirstCacheBytes - (4 << 10);  // of a block: the rest is for the sums and the list
constexpr int64_t kWantedJobs = 16;
constexpr int64_t kFewestOutputs = 16;  // channels of a job, which packs its input for itself
constexpr int64_t kMostPartialBytes = 8 << 20;

class MaximaRun {
 public:
  explicit MaximaRun(const Conv2dReluPoolShape& shape)
      : s_(shape), c_(shape.conv), group_in_(c_.in_channels / c_.groups), group_out_(c_.out_channels / c_.groups) {
    const int64_t vectors = group_in_ / kLanes<float>;
    in_blocks_ = divide_up(vectors, larger(1, kTileSums / c_.kernel_w));
    while (vectors % in_blocks_ != 0) ++in_blocks_;
    in_channels_ = group_in_ / in_blocks_;
    const int64_t blocks = c_.groups * in_blocks_;
    out_ranges_ = larger(1, smaller(divide_up(kWantedJobs, blocks), group_out_ / kFewestOutputs));
    out_channels_ = divide_up(group_out_, out_ranges_);
    image_ranges_ = larger(1, smaller(c_.batch, kWantedJobs / (blocks * out_ranges_)));
    while (image_ranges_ > 1 && jobs() * sums_elements() * kBytes > kMostPartialBytes) --image_ranges_;
    rows_ = s_.pooled_h;
    while (rows_ > 1 && packed_elements(rows_) * kBytes > kPackedBytes) rows_ = divide_up(rows_, 2);
    images_ = rows_ < s_.pooled_h ? 1 : larger(1, smaller(c_.batch, kPackedBytes / (packed_elements(rows_) * kBytes)));
    for (int64_t tap = 0; tap < s_.pool_h * s_.pool_w; ++tap) {
      place_of_[tap] = static_cast<int32_t>((tap / s_.pool_w * c_.stride_h * columns() + tap % s_.pool_w * c_.stride_w) * in_channels_);
    }
  }

  Plan plan(int threads) const {
    const int64_t elements = shared_elements() + threads * worker_elements();
    return {in_channels_, rows_ * s_.pooled_w, jobs(), static_cast<size_t>(elements * kBytes)};
  }

  Outcome run(const Conv2dReluPoolBuffers& b, void* workspace, int threads) const {
    float* shared = static_cast<float*>(workspace);
    float* scratch = shared + shared_elements();
    int finite = 1;
    parallel_for(threads, jobs(), [&](int worker, int64_t job) {
      float* packed = scratch + worker * worker_elements();
      Maximum* maxima = reinterpret_cast<Maximum*>(packed + packed_block());
      float* sums = image_ranges_ > 1 ? shared + job * sums_elements() : packed + packed_block() + maxima_elements();
      if (!run_job(b, job, packed, maxima, sums)) __atomic_store_n(&finite, 0, __ATOMIC_RELAXED);
      if (image_ranges_ == 1) write(b, job, {0, out_channels_}, sums);
    });
    if (image_ranges_ > 1) {
      const int64_t ranges = jobs() / image_ranges_;
      parallel_for(threads, ranges * out_channels_, [&](int, int64_t i) {
        const int64_t job = i / out_channels_, channel = i % out_channels_;
        write(b, job, {channel, channel + 1}, shared + job * sums_elements());
      });
    }
    return finite ? Outcome::done : Outcome::not_finite;
  }

 private:
  static constexpr int64_t kBytes = sizeof(float);

  // A job: some output channels of a group times a block of its input channels, over some images.
  struct Job {
    int64_t group;
    int64_t first_in;  // channel of the group
    Range out;         // channels of the group
    Range images;
    bool is_first;  // of those that read this input
  };

  int64_t jobs() const { return image_ranges_ * c_.groups * in_blocks_ * out_ranges_; }
  int64_t columns() const { return ((s_.pooled_w - 1) * s_.pool_stride_w + s_.pool_w - 1) * c_.stride_w + c_.kernel_w; }
  // Input rows that windows of `pooled` rows read.
  int64_t window_rows(int64_t pooled) const {
    return ((pooled - 1) * s_.pool_stride_h + s_.pool_h - 1) * c_.stride_h + (c_.kernel_h - 1) * c_.dilation_h + 1;
  }
  int64_t packed_elements(int64_t pooled) const { return window_rows(pooled) * columns() * in_channels_; }
  int64_t packed_block() const { return images_ * packed_elements(rows_) + kLanes<float>; }
  int64_t maxima_elements() const { return divide_up(2 * (images_ * rows_ * s_.pooled_w + 1), kLanes<float>) * kLanes<float>; }
  int64_t sums_elements() const { return out_channels_ * c_.kernel_h * c_.kernel_w * in_channels_; }
  int64_t shared_elements() const { return image_ranges_ > 1 ? jobs() * sums_elements() : 0; }
  int64_t worker_elements() const { return packed_block() + maxima_elements() + (image_ranges_ > 1 ? 0 : sums_elements()); }

  Job job_at(int64_t job) const {
    const int64_t out = job % out_ranges_, in = job / out_ranges_ % in_blocks_, group = job / out_ranges_ / in_blocks_ % c_.groups;
    const int64_t first_out = out * out_channels_;
    return {group,
            in * in_channels_,
            {first_out, smaller(group_out_, first_out + out_channels_)},
            part_of(c_.batch, image_ranges_, job / out_ranges_ / in_blocks_ / c_.groups),
            out == 0};
  }

  bool run_job(const Conv2dReluPoolBuffers& b, int64_t index, float* packed, Maximum* maxima, float* sums) const {
    const Job job = job_at(index);
    const int64_t length = c_.kernel_w * in_channels_;
    for (int64_t i = 0; i < sums_elements(); ++i) sums[i] = 0;
    bool finite = true;
    for (int64_t n = job.images.begin; n < job.images.end; n += images_) {
      const Range images{n, smaller(job.images.end, n + images_)};
      for (int64_t row = 0; row < s_.pooled_h; row += rows_) {
        const Range rows{row, smaller(s_.pooled_h, row + rows_)};
        pack_input(static_cast<const float*>(b.input), job, images, rows, packed);
        if (job.is_first) finite = finite && all_finite(packed, images.size() * packed_elements(rows.size()));
        for (int64_t k = job.out.begin; k < job.out.end; ++k) {
          const MaximumList list = list_maxima(b, job, images, rows, k, maxima);
          finite = finite && list.is_finite();
          add_channel(maxima, list.count(), packed, length, sums + (k - job.out.begin) * c_.kernel_h * length);
        }
      }
    }
    return finite;
  }

  void pack_input(const float* input, const Job& job, Range images, Range rows, float* packed) const {
    const Window window{rows.begin * s_.pool_stride_h * c_.stride_h - c_.pad_top, window_rows(rows.size()), -c_.pad_left, columns()};
    for (int64_t n = images.begin; n < images.end; ++n) {
      pack_window(c_, input + n * c_.in_channels * c_.in_h * c_.in_w, job.group * group_in_ + job.first_in, in_channels_, window,
                  packed + (n - images.begin) * packed_elements(rows.size()));
    }
  }

  // Zero times a finite number is zero, times any other it is not.
  static bool all_finite(const float* packed, int64_t elements) {
    Vec<float> zeros[4] = {};
    for (int64_t i = 0; i < elements; i += kLanes<float>) {
      Vec<float>& chain = zeros[i / kLanes<float> % 4];
      chain = fma(load(packed + i), Vec<float>{}, chain);
    }
    const Vec<float> sum = (zeros[0] + zeros[1]) + (zeros[2] + zeros[3]);
    for (int i = 0; i < kLanes<float>; ++i) {
      if (!(sum[i] == 0)) return false;
    }
    return true;
  }

  // Those of one output channel, window by window.
  MaximumList list_maxima(const Conv2dReluPoolBuffers& b, const Job& job, Range images, Range rows, int64_t k, Maximum* maxima) const {
    const Strides strides = pooled_strides(s_);
    const float* grad = static_cast<const float*>(b.grad_output);
    const int64_t column = s_.pool_stride_w * c_.stride_w * in_channels_;
    const int64_t row = s_.pool_stride_h * c_.stride_h * columns() * in_channels_;
    MaximumList list(maxima);
    for (int64_t n = images.begin; n < images.end; ++n) {
      for (int64_t y = rows.begin; y < rows.end; ++y) {
        int64_t at = n * strides.n + (job.group * group_out_ + k) * strides.c + y * strides.h;
        int64_t place = (n - images.begin) * packed_elements(rows.size()) + (y - rows.begin) * row;
        for (int64_t x = 0; x < s_.pooled_w; ++x, at += strides.w, place += column) {
          const uint8_t offset = b.offsets[at];
          list.append(grad[at], offset, place + place_of_[offset]);
        }
      }
    }
    return list;
  }

  // All taps of an output channel: [tap row][tap column and input channel].
  void add_channel(const Maximum* maxima, int64_t count, const float* packed, int64_t length, float* sums) const {
    const int64_t vectors = length / kLanes<float>, parts = divide_up(vectors, kTileSums);
    for (int64_t i = 0; i < parts; ++i) {
      const Range part = part_of(vectors, parts, i);
      const AddMaxima add = add_maxima_of(part.size());
      const int64_t first = part.begin * kLanes<float>;
      for (int64_t r = 0; r < c_.kernel_h; ++r) {
        add(maxima, count, packed + r * c_.dilation_h * columns() * in_channels_ + first, sums + r * length + first);
      }
    }
  }

  // Adds up what the image ranges have of some of a job's output channels.
  void write(const Conv2dReluPoolBuffers& b, int64_t index, Range outputs, const float* sums) const {
    const Job job = job_at(index);
    const int64_t taps = c_.kernel_h * c_.kernel_w, ranges = jobs() / image_ranges_;
    const bool planar = c_.weight_layout == Layout::nchw;
    const int64_t channel_step = planar ? taps : 1, tap_step = planar ? 1 : group_in_;
    for (int64_t k = outputs.begin; k < smaller(outputs.end, job.out.size()); ++k) {
      float* to = static_cast<float*>(b.grad_weight) + (job.group * group_out_ + job.out.begin + k) * group_in_ * taps +
                  job.first_in * channel_step;
      for (int64_t tap = 0; tap < taps; ++tap) {
        for (int64_t c = 0; c < in_channels_; ++c) {
          const float* from = sums + (k * taps + tap) * in_channels_ + c;
          float sum = from[0];
          for (int64_t i = 1; i < image_ranges_; ++i) sum += from[i * ranges * sums_elements()];
          to[tap * tap_step + c * channel_step] = sum;
        }
      }
    }
  }

  const Conv2dReluPoolShape s_;
  const Conv2dShape c_;
  const int64_t group_in_, group_out_;
  int64_t in_blocks_, in_channels_;    // of a group's input channels; of a block, which are alike
  int64_t out_ranges_, out_channels_;  // of a group's output channels; of a job
  int64_t image_ranges_;
  int64_t images_, rows_;       // of a block of windows: pooled rows
  int32_t place_of_[256] = {};  // from a window's place to that of a maximum in it, by offset
};

Plan plan(const Conv2dReluPoolShape& s, int threads) { return MaximaRun(s).plan(threads); }

Outcome run(const Conv2dReluPoolShape& s, const Conv2dReluPoolBuffers& b, void* workspace, int threads) {
  return MaximaRun(s).run(b, workspace, threads);
}

}  // namespace

extern const Conv2dReluPoolKernel conv2d_relu_max_pool2d_backward_weight_maxima = {
    CNN_EXT_KERNEL_NAME("conv2d_relu_max_pool2d_backward_weight_maxima"),
    Isa::CNN_EXT_ISA,
    Conv2dDirection::backward_weight,
    has_listed_maxima,
    plan,
    run};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
