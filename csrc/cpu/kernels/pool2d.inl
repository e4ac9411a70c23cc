// What the pooling kernels share: which taps lie inside, how a tensor's rows are cut into tasks, and tables that a call computes once.
#pragma once

#include "cpu/kernel.h"
#include "cpu/parallel.h"
#include "cpu/simd/lanes.h"

namespace {

using cnn_ext::DType;
using cnn_ext::Layout;
using cnn_ext::Pool2dBuffers;
using cnn_ext::Pool2dDirection;
using cnn_ext::Pool2dOp;
using cnn_ext::Pool2dShape;
using cnn_ext::cpu::Isa;
using cnn_ext::cpu::Plan;
using cnn_ext::cpu::Pool2dKernel;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The taps of one axis's window that lie inside the input: first <= tap < last.
struct Taps {
  int64_t first, last;
  bool empty() const { return first >= last; }
};

// start: the position of tap 0.
inline Taps taps_inside(int64_t start, int64_t kernel, int64_t dilation, int64_t size) {
  Taps taps{0, kernel};
  if (start < 0) taps.first = ceil_div(-start, dilation);
  if (start + (kernel - 1) * dilation >= size) taps.last = start < size ? ceil_div(size - start, dilation) : 0;
  return taps;
}

inline bool accepts_float_and_double(const Pool2dShape& s) { return s.dtype == DType::float32 || s.dtype == DType::float64; }
inline bool has_small_offsets(const Pool2dShape& s) { return s.kernel_h * s.kernel_w <= 256; }

// Planes: what the rows of a layout are counted through, all channels of all images (nchw) or all images (nhwc). A row has `pixel_of`
// elements for each position.
inline int64_t planes_of(const Pool2dShape& s) { return s.layout == Layout::nchw ? s.batch * s.channels : s.batch; }
inline int64_t pixel_of(const Pool2dShape& s) { return s.layout == Layout::nchw ? 1 : s.channels; }

// All rows of all planes, cut into tasks of consecutive rows, and each row's channels into parts where the rows are too few to go round
// (nhwc only). Every row is computed by itself, so the cut does not show in the result.
struct Split {
  int64_t rows, rows_per_task, parts, channels_per_part, tasks;
};

inline Split split_rows(const Pool2dShape& s, int64_t rows_per_plane, int64_t elements_per_row, int lanes, int threads) {
  constexpr int64_t kTaskElements = 32768;  // 128 KB of float32: some 10 us of work, two orders above the cost of handing out a task
  Split split;
  split.rows = planes_of(s) * rows_per_plane;
  const int64_t wanted = threads > 1 ? 4 * static_cast<int64_t>(threads) : 1;
  split.rows_per_task = larger(1, smaller(ceil_div(split.rows, wanted), kTaskElements / larger(1, elements_per_row)));
  const int64_t row_tasks = ceil_div(split.rows, split.rows_per_task);
  const int64_t vectors = s.layout == Layout::nhwc ? ceil_div(s.channels, 4 * lanes) : 1;
  split.parts = row_tasks == 0 ? 1 : larger(1, smaller(vectors, wanted / row_tasks));
  split.channels_per_part = ceil_div(ceil_div(s.channels, split.parts), lanes) * lanes;
  split.tasks = row_tasks * split.parts;
  return split;
}

// Calls body(worker, first_row, last_row, first_channel, last_channel) for each task; the channels mean something for nhwc only.
template <class Body>
void for_each_task(const Pool2dShape& s, const Split& split, int threads, const Body& body) {
  parallel_for(threads, split.tasks, [&](int worker, int64_t task) {
    const int64_t row = task / split.parts * split.rows_per_task;
    const int64_t channel = task % split.parts * split.channels_per_part;
    body(worker, row, smaller(split.rows, row + split.rows_per_task), smaller(s.channels, channel),
         smaller(s.channels, channel + split.channels_per_part));
  });
}

// Hands out consecutive pieces of the workspace; with a null base it only counts them, for the plan.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}
  template <class U>
  U* take(int64_t count) {
    char* piece = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (static_cast<size_t>(count) * sizeof(U) + 63) / 64 * 64;
    return reinterpret_cast<U*>(piece);
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// An output whose window covers a given input position of one axis, and the tap that meets it there.
struct Cover {
  int64_t out, tap;
};

// For every input position of one axis its covers, by ascending output.
struct AxisCovers {
  int64_t* begin;  // [positions + 1]
  Cover* covers;
};

inline AxisCovers carve_covers(Carver& carver, int64_t in, int64_t out, int64_t kernel) {
  AxisCovers c;
  c.begin = carver.take<int64_t>(in + 1);
  c.covers = carver.take<Cover>(out * kernel);
  return c;
}

inline void fill_covers(const AxisCovers& c, int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  int64_t used = 0;
  for (int64_t i = 0; i < in; ++i) {
    c.begin[i] = used;
    const int64_t from = i + pad - (kernel - 1) * dilation;
    const int64_t last = smaller(out - 1, (i + pad) / stride);
    for (int64_t o = from > 0 ? ceil_div(from, stride) : 0; o <= last; ++o) {
      const int64_t distance = i + pad - o * stride;
      if (distance % dilation == 0) c.covers[used++] = {o, distance / dilation};
    }
  }
  c.begin[in] = used;
}

inline void fill_row_covers(const AxisCovers& c, const Pool2dShape& s) {
  fill_covers(c, s.in_h, s.out_h, s.kernel_h, s.stride_h, s.pad_top, s.dilation_h);
}
inline void fill_column_covers(const AxisCovers& c, const Pool2dShape& s) {
  fill_covers(c, s.in_w, s.out_w, s.kernel_w, s.stride_w, s.pad_left, s.dilation_w);
}

// Fetches a line that will soon be written, of a tensor that is written from front to back: a store that finds its line only in memory
// waits for it, and the processor's own fetching follows loads.
inline void fetch_to_write(const void* p) {
  constexpr int64_t kAheadBytes = 2048;
  __builtin_prefetch(static_cast<const char*>(p) + kAheadBytes, 1);
}
template <class T>
inline void store_in_stream(T* p, Vec<T> v) {
  fetch_to_write(p);
  store(p, v);
}
template <class T>
inline void store_in_stream(T* p, Vec<T> v, LaneSet lanes) {
  fetch_to_write(p);
  store_lanes(p, v, lanes);
}

// Fetches a line that will soon be read, where a kernel goes down columns or along two rows at once. (AVX2: AVX-512's processors follow
// such reads themselves.)
constexpr bool kFetchesReads = kVectorBytes == 32;
template <class T>
inline void fetch_to_read(const T* p) {
  if constexpr (kFetchesReads) __builtin_prefetch(p);
}

}  // namespace
