// The loop that both register tiles of a gather convolution are made of.
#pragma once

#include "cpu/kernels/conv2d_direct_tile.inl"

namespace {

// The steps of a tile are gone through in two runs: while there is a destination to fetch, and after that.
template <class T, class Step>
inline __attribute__((always_inline)) void for_steps(const TileTask<T>& task, const Step& step) {
  const int32_t* offset = task.offsets;
  const int32_t* const end = offset + task.steps;
  const char* source = task.source_ahead.at;
  const char* dest = task.dest_ahead.at;
  int64_t source_step = task.source_ahead.step, dest_step = task.dest_ahead.step;
  const int32_t* stop = offset + (task.dest_ahead.count < task.steps ? task.dest_ahead.count : task.steps);
  while (true) {
    for (; offset != stop; ++offset) {
      step(*offset);
      __builtin_prefetch(source, 0, 2);
      __builtin_prefetch(dest, 0, 2);
      source += source_step, dest += dest_step;
    }
    if (stop == end) return;
    stop = end, dest_step = 0;
  }
}

}  // namespace
