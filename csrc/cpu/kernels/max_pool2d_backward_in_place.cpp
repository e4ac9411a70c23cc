// The gradient of max pooling where windows overlap, output by output, in grad_input itself (AVX2): each gradient is added where its offset
// says, in rows that were cleared just before. An output costs six instructions: its offset, the distance that this stands for, the place,
// and a load, an addition and a store there. Nothing is copied; a sum that waits for the one before it waits beside others, since the
// processor looks some forty outputs ahead.
//
// nchw: two planes side by side, whose sums never meet. nhwc: the channels of a pixel in turn, for the same reason.
//
// A window's maximum lies inside the input, so that offsets are not checked, but for those that, were they forged, could leave the tensor
// (its first and last rows), and where a plane's rows are cut into tasks.
//
// Every element adds up its gradients in ascending order of the outputs. Windows that lie in the padding alone name a place outside; they
// are left to max_pool2d_backward_scatter.cpp.
#include "cpu/kernels/max_pool2d_backward.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

constexpr int kPlanesTogether = 2;  // of more, not all pointers fit 16 registers
constexpr int kUnrolled = 4;

// How tensors are cut into tasks: by planes, then by a pixel's channels, then by rows of the input.
struct Cut {
  int64_t planes;  // of a task
  int64_t parts, channels_per_part;
  int64_t ranges, rows_per_range;
  int64_t tasks;
};

template <class T>
Cut cut_of(const Pool2dShape& s, int threads) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T)), kFewestLines = 4;
  const int64_t wanted = threads > 1 ? 4 * static_cast<int64_t>(threads) : 1, lines = ceil_div(pixel_of(s), kLine);
  Cut c;
  c.planes = s.layout == Layout::nchw ? kPlanesTogether : 1;
  const int64_t groups = ceil_div(planes_of(s), c.planes);
  c.parts = larger(1, smaller(wanted / larger(1, groups), lines / kFewestLines));
  c.channels_per_part = ceil_div(lines, c.parts) * kLine;
  c.ranges = larger(1, smaller(wanted / larger(1, groups * c.parts), s.in_h / (4 * s.kernel_h)));
  c.rows_per_range = ceil_div(s.in_h, c.ranges);
  c.tasks = groups * c.parts * c.ranges;
  return c;
}

struct Task {
  int64_t plane, planes;
  int64_t channel, channels;
  int64_t first_row, last_row;  // of the input
};

Task task_of(const Pool2dShape& s, const Cut& c, int64_t number) {
  const int64_t plane = number / (c.parts * c.ranges) * c.planes;
  const int64_t channel = number / c.ranges % c.parts * c.channels_per_part, row = number % c.ranges * c.rows_per_range;
  return {plane, smaller(c.planes, planes_of(s) - plane), channel, smaller(c.channels_per_part, pixel_of(s) - channel),
          row,   smaller(s.in_h, row + c.rows_per_range)};
}

// From a window's first tap to each other one. Numbers that are no tap stand for the last.
void fill_distances(const Pool2dShape& s, int32_t* distances) {
  int32_t* distance = distances;
  for (int64_t r = 0; r < s.kernel_h; ++r) {
    for (int64_t k = 0; k < s.kernel_w; ++k) *distance++ = static_cast<int32_t>((r * s.in_w + k) * pixel_of(s));
  }
  for (; distance < distances + 256; ++distance) *distance = distance[-1];
}

template <class Offset>
inline int64_t distance_of(const Pool2dShape& s, const int32_t* distances, Offset offset) {
  if constexpr (sizeof(Offset) == 1) return distances[offset];
  const uint32_t last_tap = static_cast<uint32_t>(taps_of(s) - 1);
  return distances[static_cast<uint32_t>(offset) < last_tap ? static_cast<uint32_t>(offset) : last_tap];
}

// Outputs and where they are added.
template <class T, class Offset>
struct Sums {
  const T* gradients;
  const Offset* offsets;
  T* window;             // the first tap of the first output's window
  int64_t at, writable;  // checked rows: where that is among the elements that may be written, and how many those are
};

template <bool kChecks, class T, class Offset>
inline void add_output(const Pool2dShape& s, const int32_t* distances, const Sums<T, Offset>& sums, int64_t i, int64_t window) {
  const int64_t place = window + distance_of(s, distances, sums.offsets[i]);
  if (kChecks && static_cast<uint64_t>(sums.at + place) >= static_cast<uint64_t>(sums.writable)) return;
  sums.window[place] += sums.gradients[i];
}

// The outputs' order is that of memory, whose rows follow one another.
template <bool kChecks, class T, class Offset>
inline void advance(Sums<T, Offset>& sums, int64_t outputs, int64_t window) {
  sums.gradients += outputs;
  sums.offsets += outputs;
  sums.window += window;
  if constexpr (kChecks) sums.at += window;
}

// Rows of outputs of kPlanes planes. kStride: of the columns, where the compiler knows it, or 0.
template <int kPlanes, bool kChecks, int kStride, class T, class Offset>
void add_rows_of_planes(const Pool2dShape& s, const int32_t* distances, Sums<T, Offset> first, int64_t rows) {
  Sums<T, Offset> sums[kPlanes];
  for (int m = 0; m < kPlanes; ++m) {
    sums[m] = first;
    advance<false>(sums[m], m * s.out_h * s.out_w, m * s.in_h * s.in_w);
  }
  const int64_t stride = kStride != 0 ? kStride : s.stride_w, to_next_row = s.stride_h * s.in_w - s.out_w * stride;
  const auto add = [&](auto count) {
#pragma GCC unroll 4
    for (int i = 0; i < count.value; ++i) {
#pragma GCC unroll 2
      for (int m = 0; m < kPlanes; ++m) add_output<kChecks>(s, distances, sums[m], i, i * stride);
    }
#pragma GCC unroll 2
    for (int m = 0; m < kPlanes; ++m) advance<kChecks>(sums[m], count.value, count.value * stride);
  };
  for (; rows > 0; --rows) {
    int64_t left = s.out_w;
    for (; left >= kUnrolled; left -= kUnrolled) add(Count<kUnrolled>{});
    for (; left > 0; --left) add(Count<1>{});
#pragma GCC unroll 2
    for (int m = 0; m < kPlanes; ++m) advance<kChecks>(sums[m], 0, to_next_row);
  }
}

// Rows of outputs of some channels of each pixel.
template <bool kChecks, class T, class Offset>
void add_rows_of_pixels(const Pool2dShape& s, const int32_t* distances, Sums<T, Offset> sums, int64_t rows, int64_t channels) {
  const int64_t to_next_row = (s.stride_h * s.in_w - s.out_w * s.stride_w) * s.channels;
  const auto add = [&](auto count) {
#pragma GCC unroll 4
    for (int i = 0; i < count.value; ++i) add_output<kChecks>(s, distances, sums, i, i);
    advance<kChecks>(sums, count.value, count.value);
  };
  for (; rows > 0; --rows) {
    for (int64_t ow = 0; ow < s.out_w; ++ow) {
      int64_t left = channels;
      for (; left >= kUnrolled; left -= kUnrolled) add(Count<kUnrolled>{});
      for (; left > 0; --left) add(Count<1>{});
      advance<kChecks>(sums, s.channels - channels, s.stride_w * s.channels - channels);
    }
    advance<kChecks>(sums, 0, to_next_row);
  }
}

template <int kPlanes, bool kChecks, class T, class Offset>
void add_rows(const Pool2dShape& s, const int32_t* distances, const Sums<T, Offset>& sums, int64_t rows, int64_t channels) {
  if (s.layout == Layout::nhwc) return add_rows_of_pixels<kChecks>(s, distances, sums, rows, channels);
  if (s.stride_w == 1) return add_rows_of_planes<kPlanes, kChecks, 1>(s, distances, sums, rows);
  if (s.stride_w == 2) return add_rows_of_planes<kPlanes, kChecks, 2>(s, distances, sums, rows);
  add_rows_of_planes<kPlanes, kChecks, 0>(s, distances, sums, rows);
}

// By lines; the last vectors end with the elements.
template <class T>
void clear(T* p, int64_t count) {
  if (count < kLanes<T>) return store_first(p, Vec<T>{}, static_cast<int>(count));
  int64_t i = 0;
  for (; i + 2 * kLanes<T> <= count; i += 2 * kLanes<T>) {
    store_in_stream(p + i, Vec<T>{});
    store(p + i + kLanes<T>, Vec<T>{});
  }
  if (i + kLanes<T> <= count) store(p + i, Vec<T>{});
  store(p + count - kLanes<T>, Vec<T>{});
}

// One task: kPlanes planes, or a plane's rows and channels.
template <int kPlanes, class T, class Offset>
class Gradient {
 public:
  Gradient(const Pool2dShape& s, const Pool2dBuffers& b, const int32_t* distances, const Task& task)
      : s_(s), distances_(distances), task_(task), row_(s.in_w * pixel_of(s)), plane_(s.in_h * row_) {
    const int64_t outputs = s.out_h * s.out_w * pixel_of(s), first = task.plane * outputs + task.channel;
    gradients_ = static_cast<const T*>(b.grad_output) + first;
    offsets_ = static_cast<const Offset*>(b.offsets) + first;
    grad_input_ = static_cast<T*>(b.grad_input) + task.plane * plane_ + task.channel;
    cleared_ = task.first_row;
  }

  // Rows are cleared some at a time, and the windows that end in them added.
  void compute() {
    constexpr int64_t kClearedBytes = 4096;
    const int64_t rows = kClearedBytes / (row_ * static_cast<int64_t>(sizeof(T)));
    const int64_t last = smaller(s_.out_h, (task_.last_row - 1 + s_.pad_top) / s_.stride_h + 1);
    int64_t oh = ceil_div(larger(0, task_.first_row + s_.pad_top - s_.kernel_h + 1), s_.stride_h);
    while (oh < last) {
      clear_to(smaller(task_.last_row, larger(cleared_ + rows, top(oh) + s_.kernel_h)));
      const int64_t end = cleared_ == task_.last_row ? last : smaller(last, (cleared_ - s_.kernel_h + s_.pad_top) / s_.stride_h + 1);
      add(oh, end);
      oh = end;
    }
    clear_to(task_.last_row);
  }

 private:
  int64_t top(int64_t oh) const { return oh * s_.stride_h - s_.pad_top; }

  void clear_to(int64_t end) {
    const int64_t pixel = pixel_of(s_), count = (end - cleared_) * row_;
    if (count <= 0) return;
    T* first = grad_input_ + cleared_ * row_;
    for (int m = 0; m < kPlanes && task_.channels == pixel; ++m) clear(first + m * plane_, count);
    for (int64_t i = 0; i < count && task_.channels < pixel; i += pixel) clear(first + i, task_.channels);
    cleared_ = end;
  }

  // Whether no offset can lead from the windows of a row out of the tensor, nor, where its rows are cut, out of the task's.
  bool is_free(int64_t oh) const {
    const int64_t first = top(oh) * row_ - s_.pad_left * pixel_of(s_);
    const int64_t last = first + ((s_.kernel_h - 1) * s_.in_w + (s_.out_w - 1) * s_.stride_w + s_.kernel_w - 1) * pixel_of(s_);
    if (task_.last_row - task_.first_row < s_.in_h) return first >= task_.first_row * row_ && last < (task_.last_row - 1) * row_;
    return first >= -task_.plane * plane_ && last < (planes_of(s_) - task_.plane - kPlanes + 1) * plane_ - pixel_of(s_);
  }

  void add(int64_t oh, int64_t end) const {
    while (oh < end) {
      const bool free = is_free(oh);
      int64_t next = oh + 1;
      while (next < end && is_free(next) == free) ++next;
      const int64_t first = oh * s_.out_w * pixel_of(s_), window = top(oh) * row_ - s_.pad_left * pixel_of(s_);
      const Sums<T, Offset> sums{gradients_ + first, offsets_ + first, grad_input_ + window, window - task_.first_row * row_,
                                 (task_.last_row - task_.first_row) * row_ - pixel_of(s_) + task_.channels};
      (free ? add_rows<kPlanes, false, T, Offset> : add_rows<kPlanes, true, T, Offset>)(s_, distances_, sums, next - oh, task_.channels);
      oh = next;
    }
  }

  const Pool2dShape& s_;
  const int32_t* distances_;
  const Task task_;
  const int64_t row_, plane_;  // elements of grad_input
  const T* gradients_;
  const Offset* offsets_;
  T* grad_input_;
  int64_t cleared_;  // the first row that is not cleared yet
};

template <class T, class Offset>
void backward(const Pool2dShape& s, const Pool2dBuffers& b, void* workspace, int threads) {
  const Cut cut = cut_of<T>(s, threads);
  int32_t* distances = static_cast<int32_t*>(workspace);
  fill_distances(s, distances);
  parallel_for(threads, cut.tasks, [&](int, int64_t number) {
    const Task task = task_of(s, cut, number);
    if (task.channels <= 0 || task.first_row >= task.last_row) return;
    if (task.planes == kPlanesTogether) return Gradient<kPlanesTogether, T, Offset>(s, b, distances, task).compute();
    Gradient<1, T, Offset>(s, b, distances, task).compute();
  });
}

// Whether the gather of max_pool2d_backward.cpp is faster in nchw. Its steps are vectors of outputs for each tap; the first and the last
// one of a row, whose lanes are masked, take four times a plain one. Five outputs here take as long as seven steps, or as nine where a
// plane is one row, of which four vectors go on together.
bool gathers_planes(const Pool2dShape& s, int64_t lanes) {
  if (gathers_pairs(s)) return s.out_w >= lanes;
  if (s.stride_w > 2) return false;
  const bool joins = joins_rows(s);
  const int64_t masked = joins ? 2 * ceil_div(s.pad_top * s.in_w + s.pad_left, lanes) : 2 * s.out_h;
  return 5 * taps_of(s) * (output_vectors_of(s, lanes) + 3 * masked) <= (joins ? 9 : 7) * s.out_h * s.out_w;
}

// The same in nhwc, by instructions: there for each pixel, each window that meets it and each vector of channels, here for each output
// and to clear. Those here take 1.4 times as long.
bool gathers_pixels(const Pool2dShape& s, int64_t lanes) {
  const int64_t pixels = s.in_h * s.in_w, outputs = s.out_h * s.out_w, vectors = ceil_div(s.channels, lanes);
  const int64_t gathered = 25 * pixels + taps_of(s) * outputs * (12 * ceil_div(vectors, 4) + 5 * vectors);
  const int64_t added = outputs * (10 + 7 * s.channels) + 3 * pixels * vectors / 2;
  return 10 * gathered <= 14 * added;
}

// Whether an int32 holds the distance to a window's last tap.
bool has_near_taps(const Pool2dShape& s) { return ((s.kernel_h - 1) * s.in_w + s.kernel_w - 1) * pixel_of(s) <= INT32_MAX; }

bool accepts(const Pool2dShape& s) {
  if (!accepts_float_and_double(s) || !every_window_meets_input(s) || !has_near_taps(s)) return false;
  const int64_t lanes = s.dtype == DType::float32 ? kLanes<float> : kLanes<double>;
  return !(s.layout == Layout::nchw ? gathers_planes : gathers_pixels)(s, lanes);
}

Plan plan(const Pool2dShape& s, int threads) {
  const Cut cut = s.dtype == DType::float32 ? cut_of<float>(s, threads) : cut_of<double>(s, threads);
  return {1, 1, cut.tasks, static_cast<size_t>(larger(256, taps_of(s))) * sizeof(int32_t)};
}

void run(const Pool2dShape& s, const Pool2dBuffers& b, void* workspace, int threads) {
  if (s.dtype == DType::float32) {
    (has_small_offsets(s) ? backward<float, uint8_t> : backward<float, int32_t>)(s, b, workspace, threads);
  } else {
    (has_small_offsets(s) ? backward<double, uint8_t> : backward<double, int32_t>)(s, b, workspace, threads);
  }
}

}  // namespace

extern const Pool2dKernel max_pool2d_backward_in_place = {
    CNN_EXT_KERNEL_NAME("max_pool2d_backward_in_place"), Isa::CNN_EXT_ISA, Pool2dOp::max, Pool2dDirection::backward, accepts, plan, run};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
