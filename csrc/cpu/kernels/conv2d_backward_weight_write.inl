// From the sums of backward_weight, [tap][channel of the block][output channels], to grad_weight, with the partial sums of the pixel ranges
// added in their order.
#pragma once

#include "cpu/kernel.h"
#include "cpu/simd/transpose.h"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

// The sums of one vector of output channels with one block of input channels, and where they go.
// Element: of grad_weight, where it is not T.
template <class T, class Element = T>
struct SumsBlock {
  const T* sums;  // those of a tap and a channel of the block at sums + tap * tap_pitch + channel * entry
  int64_t tap_pitch, entry;
  int64_t parts, part;  // partial sums and the distance between them
  int64_t taps, channels;
  Element* grad_weight;  // of the first output channel, first input channel, first tap
  int64_t out_channel;   // from one output channel to the next
  int out_channels;      // <= lanes
};

template <class T, class Element>
inline Vec<T> total(const SumsBlock<T, Element>& block, int64_t tap, int64_t channel) {
  const T* p = block.sums + tap * block.tap_pitch + channel * block.entry;
  Vec<T> sum = load(p);
  for (int64_t i = 1; i < block.parts; ++i) sum += load(p + i * block.part);
  return sum;
}

// `count` entries that are neighbours in grad_weight from `offset` on, beginning with (tap, channel) and advanced by next(tap, channel).
template <class T, class Element, class Next>
inline void write_run(const SumsBlock<T, Element>& block, int64_t count, int64_t tap, int64_t channel, int64_t offset, const Next& next) {
  constexpr int lanes = kLanes<T>;
  for (int64_t first = 0; first < count; first += lanes) {
    const int entries = count - first < lanes ? static_cast<int>(count - first) : lanes;
    Vec<T> rows[lanes] = {};
    for (int i = 0; i < entries; ++i) {
      rows[i] = total(block, tap, channel);
      next(tap, channel);
    }
    transpose<T>(rows);
    for (int k = 0; k < block.out_channels; ++k) store_first(block.grad_weight + k * block.out_channel + offset + first, rows[k], entries);
  }
}

// channels: of grad_weight, in all.
template <class T, class Element>
inline void write_sums(const SumsBlock<T, Element>& block, Layout layout, int64_t channels) {
  if (layout == Layout::nchw) {
    write_run(block, block.taps * block.channels, 0, 0, 0, [&](int64_t& tap, int64_t& channel) {
      if (++tap == block.taps) tap = 0, ++channel;
    });
  } else {
    for (int64_t tap = 0; tap < block.taps; ++tap) {
      write_run(block, block.channels, tap, 0, tap * channels, [](int64_t&, int64_t& channel) { ++channel; });
    }
  }
}

}  // namespace
}  // namespace cnn_ext::cpu::CNN_EXT_ISA
