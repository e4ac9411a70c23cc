// backward_input of at most four points, for 16 registers: every weight is read once, so that packing it would be most of the time. Nothing
// is packed: the outputs of a channel lie side by side, and some channels are walked through at a time, as memory likes to be read, while
// the sums of a piece of their rows are in the nearest cache.
//
// Order: as in the product, so that the choice, which looks at the number of samples, changes no bit.
#pragma once

#include "cpu/kernels/conv2d_pointwise_run.inl"

namespace {

constexpr bool kServesFewPoints = kVectorRegisters < 32;
constexpr int64_t kFewPoints = 4;
constexpr int kFewFactors = 8;              // elements of the source, one in each lane of a vector, that stay in registers
constexpr int64_t kFewSumsBytes = 4 << 10;  // of a point

// Whether points, side by side like their channels, are few, neighbouring weights are those of neighbouring outputs, and weights are so
// many that they come from memory: nearer ones are packed soon enough.
template <class T>
bool has_few_points(const Product& p) {
  const bool is_one_line = p.groups == 1 && p.lines() == 1 && p.source_channel == 1 && p.dest_channel == 1 && p.weight_output == 1;
  return kServesFewPoints && is_one_line && !p.dest_has_gaps && !p.is_empty() && p.points <= kFewPoints && !weights_are_near<T>(p);
}

template <class T>
class FewPoints {
  static constexpr int64_t kV = kLanes<T>;

 public:
  FewPoints(const Product& p, const T* source, const T* weight, T* dest, int threads)
      : p_(p),
        source_(source),
        weight_(weight),
        dest_(dest),
        threads_(threads),
        channels_(larger(1, divide_up(p.channels, larger(1, divide_up(p.channels, kReductionChannels))))) {}

  void run() const {
    const int64_t pieces = threads_ * divide_up(p_.outputs, threads_ * kMostOutputs);
    const int64_t outputs = divide_up(divide_up(p_.outputs, pieces), kV) * kV;
    parallel_for(threads_, divide_up(p_.outputs, outputs),
                 [&](int, int64_t task) { run_points<kFewPoints>(task * outputs, smaller(outputs, p_.outputs - task * outputs)); });
  }

 private:
  static constexpr int64_t kMostOutputs = kFewSumsBytes / static_cast<int64_t>(sizeof(T));

  template <int kPoints>
  void run_points(int64_t first, int64_t outputs) const {
    if (p_.points == kPoints) return add_blocks<kPoints>(first, outputs);
    if constexpr (kPoints > 1) run_points<kPoints - 1>(first, outputs);
  }

  template <int kPoints>
  void add_blocks(int64_t first, int64_t outputs) const {
    constexpr int kChannels = kFewFactors / kPoints;
    for (int64_t begin = 0; begin == 0 || begin < p_.channels; begin += channels_) {
      alignas(kAlignment) T sums[kPoints][kMostOutputs];
      for (int64_t i = 0; i < kPoints; ++i) {
        for (int64_t output = 0; output < outputs; output += kV) store(sums[i] + output, Vec<T>{});
      }
      const int64_t end = smaller(p_.channels, begin + channels_);
      int64_t channel = begin;
      for (; channel + kChannels <= end; channel += kChannels) add_channels<kPoints, kChannels>(channel, first, outputs, sums);
      for (; channel < end; ++channel) add_channels<kPoints, 1>(channel, first, outputs, sums);
      for (int64_t i = 0; i < kPoints; ++i) write(sums[i], outputs, begin == 0, dest_ + i * p_.dest_point + first);
    }
  }

  template <int kPoints, int kChannels>
  void add_channels(int64_t channel, int64_t first, int64_t outputs, T (&sums)[kPoints][kMostOutputs]) const {
    const T* const weights = weight_ + channel * p_.weight_channel + first;
    Vec<T> x[kPoints][kChannels];
    for (int i = 0; i < kPoints; ++i) {
      for (int c = 0; c < kChannels; ++c) x[i][c] = broadcast_from(source_ + i * p_.source_point + channel + c);
    }
    const auto add = [&](int64_t output, const auto& load_weights) __attribute__((always_inline)) {
      Vec<T> weight[kChannels];
#pragma GCC unroll 8
      for (int c = 0; c < kChannels; ++c) weight[c] = load_weights(weights + c * p_.weight_channel + output);
#pragma GCC unroll 4
      for (int i = 0; i < kPoints; ++i) {
        Vec<T> sum = load(sums[i] + output);
#pragma GCC unroll 8
        for (int c = 0; c < kChannels; ++c) sum = fma(x[i][c], weight[c], sum);
        store(sums[i] + output, sum);
      }
    };
    int64_t output = 0;
    for (; output + kV <= outputs; output += kV) add(output, [](const T* w) { return load(w); });
    const int last = static_cast<int>(outputs - output);
    if (last > 0) add(output, [last](const T* w) { return load_first(w, last); });
  }

  void write(const T* sums, int64_t outputs, bool is_first, T* dest) const {
    for (int64_t output = 0; output < outputs; output += kV)
      finish(dest + output, is_first, Vec<T>{}, load(sums + output), static_cast<int>(smaller(kV, outputs - output)));
  }

  const Product p_;
  const T* const source_;
  const T* const weight_;
  T* const dest_;
  const int threads_;
  const int64_t channels_;  // of a block, as the product's
};

}  // namespace
