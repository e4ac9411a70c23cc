// Packing: the weights of one unit (the output channels of one register tile) and one block of channels as [step][unit width], so that a
// kernel reads them from beginning to end (conv2d_direct_gather.inl has the order of the steps). Weights that are not finite are noticed on
// the way: a staged zero times one of them would be NaN.
#pragma once

#include "cpu/kernels/conv2d_direct_gather.inl"
#include "cpu/simd/lanes.h"
#include "cpu/simd/transpose.h"

namespace {

// How far ahead of what is packed the weights are fetched: memory takes as long as some squares of them.
constexpr int64_t kElementsAhead = 128, kChannelsAhead = 6, kTapsAhead = 2;

template <class T>
class Packer {
 public:
  explicit Packer(const StepOrder& order) : order_(order) {}

  // Packs `outputs` output channels beginning at src, and zeros up to `width`, of `channels` channels.
  void pack(const Gather& g, const T* src, int64_t outputs, int64_t width, int64_t channels, T* dst) {
    for (int64_t lane = 0; lane < width; lane += kLanes<T>) {
      lanes_ = static_cast<int>(width - lane < kLanes<T> ? width - lane : kLanes<T>);
      valid_ = static_cast<int>(outputs - lane < lanes_ ? outputs - lane : lanes_);
      width_ = width;
      pack_lanes(g, src + lane * g.weight_output, channels, dst + lane);
    }
  }

  bool found_finite() const {
    bool finite = true;
    for (int i = 0; i < kLanes<T>; ++i) finite &= residue_[i] == 0;
    return finite;
  }

 private:
  void pack_lanes(const Gather& g, const T* src, int64_t channels, T* dst) {
    if (g.weight_output != 1 && has_dense_taps(g)) return pack_dense_taps(g, src, channels, dst);
    const int64_t channel_step = order_.channel * width_;
    if (g.weight_output != 1 && g.weight_channel == 1) {
      return for_taps(g, [&](int64_t tap, int64_t step) {
        pack_run(src + tap, g.weight_output, channels, Strided{dst + step * width_, channel_step}, kTapsAhead * g.weight_w);
      });
    }
    for (int64_t c = 0; c < channels; ++c, src += g.weight_channel, dst += channel_step) {  // its taps lie together
      for_taps(g, [&](int64_t tap, int64_t step) {
        write(g.weight_output == 1 ? load_first(src + tap, valid_) : gather(src + tap, g.weight_output), dst + step * width_);
      });
    }
  }

  // Calls body(where the tap lies in the weight, its step) for the taps of a channel.
  template <class Body>
  void for_taps(const Gather& g, const Body& body) const {
    for (int64_t r = 0; r < g.h.taps; ++r) {
      for (int64_t s = 0; s < g.w.taps; ++s) {
        const int64_t row = g.h.kernel_first + r * g.h.kernel_step, col = g.w.kernel_first + s * g.w.kernel_step;
        body(row * g.weight_h + col * g.weight_w, r * order_.row + s * order_.col);
      }
    }
  }

  void pack_dense_taps(const Gather& g, const T* src, int64_t channels, T* dst) {
    const int64_t taps = g.taps();
    if (g.weight_channel == taps) return pack_run(src, g.weight_output, channels * taps, TapOrder(g, order_, width_, dst), kElementsAhead);
    for (int64_t c = 0; c < channels; ++c) {
      pack_run(src + c * g.weight_channel, g.weight_output, taps, TapOrder(g, order_, width_, dst + c * order_.channel * width_),
               kChannelsAhead * g.weight_channel);
    }
  }

  // Where consecutive elements of the weight go: to equidistant steps, or, for the elements of [channel][tap row][tap column], to theirs.
  struct Strided {
    T* dst;
    int64_t distance;
    T* next() {
      T* place = dst;
      dst += distance;
      return place;
    }
  };

  struct TapOrder {
    TapOrder(const Gather& g, const StepOrder& order, int64_t width, T* first)
        : dst(first),
          rows(g.h.taps),
          cols(g.w.taps),
          step(order.col * width),
          row_distance(order.row * width - (cols - 1) * step),
          channel_distance((order.channel - (rows - 1) * order.row) * width - (cols - 1) * step) {}
    T* next() {
      T* place = dst;
      if (++col < cols) {
        dst += step;
      } else if (col = 0, ++row < rows) {
        dst += row_distance;
      } else {
        row = 0;
        dst += channel_distance;
      }
      return place;
    }
    T* dst;
    int64_t rows, cols, step, row_distance, channel_distance, row = 0, col = 0;
  };

  // The taps of a channel are consecutive elements, in the order of the steps.
  static bool has_dense_taps(const Gather& g) {
    return g.weight_w == 1 && g.weight_h == g.w.taps && g.h.kernel_first + g.w.kernel_first == 0 && g.h.kernel_step * g.w.kernel_step == 1;
  }

  // `count` consecutive elements of every output channel; those `ahead` of them are fetched, for they are packed soon.
  template <class Places>
  void pack_run(const T* src, int64_t output_stride, int64_t count, Places places, int64_t ahead) {
    constexpr int kV = kLanes<T>;
    for (int64_t i = 0; i < count; i += kV) {
      const int items = static_cast<int>(count - i < kV ? count - i : kV);
      Vec<T> square[kV];
#pragma GCC unroll 16
      for (int o = 0; o < kV; ++o) {
        square[o] = o < valid_ ? load_first(src + o * output_stride + i, items) : Vec<T>{};
        __builtin_prefetch(src + o * output_stride + i + ahead);
      }
      transpose<T>(square);
#pragma GCC unroll 16
      for (int o = 0; o < kV; ++o) {
        if (o < items) write(square[o], places.next());
      }
    }
  }

  Vec<T> gather(const T* src, int64_t stride) const { return load_strided(src, stride, first_lanes<T>(valid_), Vec<T>{}); }

  void write(Vec<T> v, T* dst) {
    residue_ += v - v;  // 0 for a finite number, NaN for others
    store_first(dst, v, lanes_);
  }

  const StepOrder order_;
  Vec<T> residue_{};
  int lanes_ = 0, valid_ = 0;  // lanes written; of those, lanes of existing output channels
  int64_t width_ = 0;
};

// Packs one unit and block of channels in an order of steps; whether all weights were finite.
template <class T>
__attribute__((noinline)) bool pack_unit(const Gather& g, const StepOrder& order, const T* src, int64_t outputs, int64_t width,
                                         int64_t channels, T* dst) {
  Packer<T> packer(order);
  packer.pack(g, src, outputs, width, channels, dst);
  return packer.found_finite();
}

template <class T>
bool pack_unit(const Gather& g, const T* src, int64_t outputs, int64_t width, int64_t channels, T* dst) {
  return pack_unit(g, step_order(g, channels), src, outputs, width, channels, dst);
}

}  // namespace
