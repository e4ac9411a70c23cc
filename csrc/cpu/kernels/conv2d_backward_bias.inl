// conv2d backward_bias: the sum of each channel of grad_output, read once and as it lies. The work is reading, so there is no tile to speak
// of: 4 vectors of sums are enough to hide the latency of the additions.
//
// A part is a range of images (NCHW) or of pixels (channels_last); their number is a function of the shape alone. Within a part, runs of
// kRun additions are summed in registers before they are added to the sum of the part, and the parts are added up in double and in order:
// the error grows with the length of a run and the number of runs, not with their product.
#pragma once

#include "cpu/kernel.h"
#include "cpu/parallel.h"
#include "cpu/simd/half.h"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

constexpr int64_t kWantedTasks = 32;
constexpr int64_t kPartPixels = 512;  // channels_last: fewer are not worth a task
constexpr int kVectors = 4;
constexpr int64_t kRun = 64;  // vectors added up into one register

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

int64_t parts_of(const Conv2dShape& s) {
  const int64_t wanted = s.layout == Layout::nhwc ? smaller(kWantedTasks, s.batch * s.out_h * s.out_w / kPartPixels)
                                                  : smaller(s.batch, (kWantedTasks - 1) / s.out_channels + 1);
  return wanted < 1 ? 1 : wanted;
}

template <class T>
double lane_sum(Vec<T> v) {
  double sum = 0;
  for (int i = 0; i < kLanes<T>; ++i) sum += static_cast<double>(v[i]);
  return sum;
}

// What is summed, as it lies in memory. (A fused backward pass sums less: conv2d_relu_max_pool2d_backward_bias.cpp.)
template <class Element>
struct TensorValues {
  using T = Compute<Element>;
  Vec<T> at(int64_t i) const { return load(data + i); }
  Vec<T> first_at(int64_t i, int count) const { return load_first(data + i, count); }
  const Element* data;
};

// A sum of runs of neighbours. Its vectors go on from run to run, until they are added up in double after kRun additions.
template <class T, class Values>
class RunSum {
 public:
  explicit RunSum(const Values& values) : values_(values) {}

  void add(int64_t begin, int64_t end) {
    constexpr int64_t step = kVectors * kLanes<T>;
    int64_t i = begin;
    while (i + step <= end) {
      const int64_t last = smaller(end - step, i + (kRun - 1 - additions_) * step);
      for (; i <= last; i += step, ++additions_) {
        for (int j = 0; j < kVectors; ++j) sums_[j] += values_.at(i + j * kLanes<T>);
      }
      if (additions_ == kRun) settle();
    }
    if (i == end) return;
    for (int j = 0; i < end; i += kLanes<T>, ++j) sums_[j] += values_.first_at(i, static_cast<int>(smaller(kLanes<T>, end - i)));
    if (++additions_ == kRun) settle();
  }

  double total() {
    settle();
    return total_;
  }

 private:
  void settle() {
    total_ += lane_sum<T>((sums_[0] + sums_[1]) + (sums_[2] + sums_[3]));
    for (Vec<T>& sum : sums_) sum = Vec<T>{};
    additions_ = 0;
  }

  const Values& values_;
  Vec<T> sums_[kVectors] = {};
  int64_t additions_ = 0;  // to each of them
  double total_ = 0;
};

// The sum of a channel of the images [begin, end), NCHW.
template <class T, class Values>
T image_sum(const Values& values, int64_t channels, int64_t plane, int64_t channel, int64_t begin, int64_t end) {
  RunSum<T, Values> sum(values);
  for (int64_t n = begin; n < end; ++n) {
    const int64_t first = (n * channels + channel) * plane;
    sum.add(first, first + plane);
  }
  return static_cast<T>(sum.total());
}

// sums[0 .. channels) += the first `channels` <= kVectors * lanes channels of `pixels` <= kRun pixels that lie `step` apart.
template <class T, class Values>
void add_pixels(const Values& values, int64_t first, int64_t step, int64_t pixels, int64_t channels, T* sums) {
  constexpr int64_t lanes = kLanes<T>;
  if (channels == kVectors * lanes) {
    Vec<T> v[kVectors] = {};
    for (int64_t i = 0; i < pixels; ++i) {
      for (int j = 0; j < kVectors; ++j) v[j] += values.at(first + i * step + j * lanes);
    }
    for (int j = 0; j < kVectors; ++j) store(sums + j * lanes, load(sums + j * lanes) + v[j]);
    return;
  }
  for (int64_t c = 0; c < channels; c += lanes) {
    const int count = static_cast<int>(smaller(lanes, channels - c));
    Vec<T> v{};
    for (int64_t i = 0; i < pixels; ++i) v += values.first_at(first + i * step + c, count);
    store_first(sums + c, load_first(sums + c, count) + v, count);
  }
}

// sums[k] of the pixels [begin, end), channels_last.
template <class T, class Values>
void pixel_sums(const Values& values, int64_t channels, int64_t begin, int64_t end, T* sums) {
  constexpr int64_t width = kVectors * kLanes<T>;
  for (int64_t c = 0; c < channels; ++c) sums[c] = 0;
  for (int64_t i = begin; i < end; i += kRun) {
    for (int64_t c = 0; c < channels; c += width) {
      add_pixels<T>(values, i * channels + c, channels, smaller(kRun, end - i), smaller(width, channels - c), sums + c);
    }
  }
}

// Of the shape, only the output counts: `values` are those of [batch, out_channels, out_h, out_w].
template <class Element, class Values>
void backward_bias(const Conv2dShape& s, const Values& values, Element* grad_bias, void* workspace, int threads) {
  using T = Compute<Element>;
  T* partial = static_cast<T*>(workspace);
  const int64_t channels = s.out_channels, plane = s.out_h * s.out_w, parts = parts_of(s);
  if (s.layout == Layout::nhwc) {
    const int64_t pixels = s.batch * plane;
    parallel_for(threads, parts, [&](int, int64_t i) {
      pixel_sums<T>(values, channels, pixels * i / parts, pixels * (i + 1) / parts, partial + i * channels);
    });
  } else {
    parallel_for(threads, parts * channels, [&](int, int64_t task) {
      const int64_t i = task / channels;
      partial[task] = image_sum<T>(values, channels, plane, task % channels, s.batch * i / parts, s.batch * (i + 1) / parts);
    });
  }
  for (int64_t k = 0; k < channels; ++k) {
    double sum = 0;
    for (int64_t i = 0; i < parts; ++i) sum += static_cast<double>(partial[i * channels + k]);
    grad_bias[k] = static_cast<Element>(static_cast<T>(sum));
  }
}

Plan bias_plan(const Conv2dShape& s, int) {
  const int64_t parts = parts_of(s);
  const size_t element = s.dtype == DType::float64 ? sizeof(double) : sizeof(float);
  return {s.layout == Layout::nhwc ? static_cast<int64_t>(kVectors * kVectorBytes / element) : 1, kRun,
          s.layout == Layout::nhwc ? parts : parts * s.out_channels, static_cast<size_t>(parts * s.out_channels) * element};
}

}  // namespace
}  // namespace cnn_ext::cpu::CNN_EXT_ISA
