// The loop that both register tiles of a gather convolution are made of.
#pragma once

#include "cpu/kernels/conv2d_direct_tile.inl"

namespace {

// The lines of a destination, where a tile has too few steps to fetch them one by one.
template <int kDestLines>
inline void fetch_at_once(const Fetch& fetch) {
  const char* at = fetch.at;
  for (int64_t i = 0; i < fetch.count; ++i, at += fetch.step) {
    __builtin_prefetch(at, 0, 2);
    if constexpr (kDestLines == 2) __builtin_prefetch(at - kLineBytes, 0, 2);
  }
}

// Calls step(offset, weights) for the steps of a tile, or for spans of kSpan of them. Its first run is gone through in two parts: while
// there is a destination to fetch, and after that, as in the other runs, what there is of the weights. Where kDestLines is 2, the line
// before each of the destination's is fetched, too, and these steps are not taken together.
template <int kWidth, int kDestLines = 1, int kSpan = 1, class T, class Step>
inline __attribute__((always_inline)) void for_steps(const TileTask<T>& task, const Step& step) {
  constexpr int kTogether = (kStepsTogether + kSpan - 1) / kSpan * kSpan;
  const int32_t* offset = task.offsets;
  const T* weights = task.weights;
  const char *source = task.source_ahead.at, *other = task.dest_ahead.at;
  int64_t source_step = task.source_ahead.step, other_step = task.dest_ahead.step;
  const int32_t* end = offset + task.run_steps;
  int64_t dest_steps = task.dest_ahead.count * (kDestLines == 2 ? 1 : kTogether);
  if constexpr (kTogether > 1) {
    if (has_few_steps(task, task.dest_ahead.count)) {
      fetch_at_once<kDestLines>(task.dest_ahead);
      dest_steps = 0;
    }
  }
  const int32_t* stop = offset + (dest_steps < task.run_steps ? dest_steps : task.run_steps);
  int64_t runs = task.runs;
  if constexpr (kDestLines == 2) {
    for (; offset != stop; offset += kSpan, weights += kSpan * kWidth) {
      step(*offset, weights);
      __builtin_prefetch(source, 0, 2);
      __builtin_prefetch(other, 0, 2);
      __builtin_prefetch(other - kLineBytes, 0, 2);
      source += source_step, other += other_step;
    }
  }
  while (true) {
    if constexpr (kTogether > kSpan) {
      for (const int32_t* last = stop - (kTogether - 1); offset < last; offset += kTogether, weights += kTogether * kWidth) {
#pragma GCC unroll 4
        for (int i = 0; i < kTogether; i += kSpan) step(offset[i], weights + i * kWidth);
        __builtin_prefetch(source, 0, 2);
        __builtin_prefetch(other, 0, 2);
        source += kTogether * source_step, other += other_step;
      }
    }
    for (; offset != stop; offset += kSpan, weights += kSpan * kWidth) {
      step(*offset, weights);
      __builtin_prefetch(source, 0, 2);
      __builtin_prefetch(other, 0, 2);
      source += kSpan * source_step, other += other_step;
    }
    if (stop == end) {
      if (--runs <= 0) return;
      offset += task.gap, weights += task.gap * kWidth, end = offset + task.run_steps;
    }
    stop = end, other = task.weights_ahead.at, other_step = task.weights_ahead.step * kTogether;
  }
}

}  // namespace
