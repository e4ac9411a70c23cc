// What the rows of adaptive pooling and unpooling share: the windows, and how the rows of a tensor are cut into tasks.
#pragma once

#include "cpu/parallel.h"
#include "cpu/simd/lanes.h"
#include "cpu/sized_pool2d_kernel.h"

namespace {

using cnn_ext::DType;
using cnn_ext::Layout;
using cnn_ext::SizedPool2dBuffers;
using cnn_ext::SizedPool2dDirection;
using cnn_ext::SizedPool2dOp;
using cnn_ext::SizedPool2dShape;
using cnn_ext::cpu::Isa;
using cnn_ext::cpu::Plan;
using cnn_ext::cpu::SizedPool2dKernel;

// Positions of one axis: first <= position < last.
struct Window {
  int64_t first, last;
  int64_t size() const { return last - first; }
};

// The window of output `out` over an axis. Which outputs cover a position is the same question with the sizes exchanged.
inline Window window_of(int64_t out, int64_t in_size, int64_t out_size) {
  return {out * in_size / out_size, ((out + 1) * in_size + out_size - 1) / out_size};
}

inline bool accepts_float_and_double(const SizedPool2dShape& s) { return s.dtype == DType::float32 || s.dtype == DType::float64; }

// Planes: what rows are counted through, all channels of all images (nchw) or all images (nhwc). A row has `pixel_of` elements for each
// position.
inline int64_t planes_of(const SizedPool2dShape& s) { return s.layout == Layout::nchw ? s.batch * s.channels : s.batch; }
inline int64_t pixel_of(const SizedPool2dShape& s) { return s.layout == Layout::nchw ? 1 : s.channels; }

// All rows of all planes in tasks of consecutive rows. Every row is computed by itself, so the cut does not show in the result.
struct RowTasks {
  int64_t rows, rows_per_task, tasks;
};

inline RowTasks row_tasks(const SizedPool2dShape& s, int64_t rows_per_plane, int64_t elements_per_row, int threads) {
  constexpr int64_t kTaskElements = 32768;  // some 10 us of work, two orders above the cost of handing out a task
  const int64_t rows = planes_of(s) * rows_per_plane, shares = threads > 1 ? 4 * static_cast<int64_t>(threads) : 1;
  int64_t per_task = (rows + shares - 1) / shares;
  const int64_t most = elements_per_row < kTaskElements ? kTaskElements / elements_per_row : 1;
  if (per_task > most) per_task = most;
  if (per_task < 1) per_task = 1;
  return {rows, per_task, (rows + per_task - 1) / per_task};
}

// body(worker, plane, row) for every row.
template <class Body>
void for_each_row(const RowTasks& t, int64_t rows_per_plane, int threads, const Body& body) {
  parallel_for(threads, t.tasks, [&](int worker, int64_t task) {
    const int64_t end = (task + 1) * t.rows_per_task < t.rows ? (task + 1) * t.rows_per_task : t.rows;
    for (int64_t row = task * t.rows_per_task; row < end; ++row) body(worker, row / rows_per_plane, row % rows_per_plane);
  });
}

}  // namespace
