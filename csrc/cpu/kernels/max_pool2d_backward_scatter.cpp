// The gradient of max pooling where windows overlap: output by output, each gradient is added where its offset says.
//
// The sums are kept in scratch, a few rows of the padded input at a time, and written to grad_input once they are complete. Padding is
// part of the scratch, so that an offset needs no check of borders: a table turns it into a distance.
//
// Neighbouring windows often have the same maximum, and a sum in memory can be read again some ten cycles after it was written. So
// neighbours in time belong to different channels, whose sums never meet: kPlanes planes side by side (nchw), or the channels of a
// pixel (nhwc).
//
// Every element adds up its gradients in ascending order of the outputs, wherever tasks and scratch begin.
//
// AVX2: serves what max_pool2d_backward_in_place.cpp does not.
#include "cpu/kernels/max_pool2d_backward.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

constexpr int64_t kPlanes = 8;
constexpr int64_t kChannels = 32;
// Steps of a gather in nchw that take as long as scattering five outputs: they are shorter where lanes are masked by instructions.
constexpr int64_t kStepsOfFiveOutputs = kVectorBytes == 64 ? 8 : 3;
constexpr int64_t kStepsOfFourOutputs = kVectorBytes == 64 ? 3 : 5;    // of a vector of channels, in nhwc
constexpr int64_t kScratchBytes = kVectorBytes == 64 ? 32768 : 16384;  // of the 48 or 32 KB next to a core

// What is summed side by side is a group of members: planes (nchw) or channels of an image (nhwc). Rows and columns count in the padded
// input.
struct Grouping {
  int64_t members, groups_per_image, groups;
  int64_t rows, columns;           // of the scratch
  int64_t member_stride, pixel;    // in the scratch, from one member or column to the next
  int64_t window_rows;             // from the first to the last tap
  int64_t ranges, rows_per_range;  // of input rows, where the groups alone are too few tasks
  int64_t tasks() const { return groups * ranges; }
  int64_t scratch_elements() const { return members * rows * columns; }
};

template <class T>
Grouping grouping_of(const Pool2dShape& s, int threads) {
  const bool nchw = s.layout == Layout::nchw;
  Grouping g;
  g.window_rows = (s.kernel_h - 1) * s.dilation_h + 1;
  const int64_t padded_rows = larger(s.pad_top + s.in_h, (s.out_h - 1) * s.stride_h + g.window_rows);
  g.columns = larger(s.pad_left + s.in_w, (s.out_w - 1) * s.stride_w + (s.kernel_w - 1) * s.dilation_w + 1);
  g.members = nchw ? kPlanes : kChannels;
  g.groups_per_image = ceil_div(s.channels, g.members);
  g.groups = nchw ? ceil_div(s.batch * s.channels, g.members) : s.batch * g.groups_per_image;
  const int64_t row_bytes = g.members * g.columns * static_cast<int64_t>(sizeof(T));
  g.rows = smaller(padded_rows, larger(g.window_rows + s.stride_h, kScratchBytes / row_bytes));
  g.member_stride = nchw ? g.rows * g.columns : 1;
  g.pixel = nchw ? 1 : g.members;
  const int64_t wanted = threads > 1 ? 4 * static_cast<int64_t>(threads) : 1;
  g.ranges = larger(1, smaller(wanted / larger(1, g.groups), s.in_h / (4 * g.window_rows)));
  g.rows_per_range = ceil_div(s.in_h, g.ranges);
  return g;
}

template <class T>
struct Scratch {
  int32_t* distances;  // [taps], or one for every uint8
  T* sums;             // per worker
};

template <class T>
Scratch<T> carve_scratch(const Pool2dShape& s, const Grouping& g, Carver& carver, int threads) {
  Scratch<T> scratch;
  scratch.distances = carver.take<int32_t>(larger(256, taps_of(s)));
  scratch.sums = carver.take<T>(g.scratch_elements() * threads);
  return scratch;
}

// From a window's first tap to each other one. Numbers that are no tap stand for the last.
void fill_distances(const Pool2dShape& s, const Grouping& g, int32_t* distances) {
  int32_t* distance = distances;
  for (int64_t r = 0; r < s.kernel_h; ++r) {
    const int64_t row = r * s.dilation_h * g.columns;
    for (int64_t k = 0; k < s.kernel_w; ++k) *distance++ = static_cast<int32_t>((row + k * s.dilation_w) * g.pixel);
  }
  for (; distance < distances + 256; ++distance) *distance = distance[-1];
}

// The members of a group: their outputs and their gradients.
template <class T, class Offset>
struct Members {
  const T* grad_output;
  const Offset* offsets;
  T* grad_input;
  int64_t count;
  int64_t output_stride, input_stride;  // from one member to the next
};

template <class T, class Offset>
Members<T, Offset> members_of(const Pool2dShape& s, const Pool2dBuffers& b, const Grouping& g, int64_t group) {
  const bool nchw = s.layout == Layout::nchw;
  const int64_t in = s.in_h * s.in_w, out = s.out_h * s.out_w;
  const int64_t first = nchw ? group * g.members : group % g.groups_per_image * g.members;
  const int64_t image = nchw ? 0 : group / g.groups_per_image * s.channels;
  const int64_t output = image * out + first * (nchw ? out : 1), input = image * in + first * (nchw ? in : 1);
  const int64_t count = smaller(g.members, (nchw ? s.batch * s.channels : s.channels) - first);
  return {static_cast<const T*>(b.grad_output) + output,
          static_cast<const Offset*>(b.offsets) + output,
          static_cast<T*>(b.grad_input) + input,
          count,
          nchw ? out : 1,
          nchw ? in : 1};
}

template <class Offset>
uint32_t table_index(Offset offset, uint32_t last_tap) {
  if constexpr (sizeof(Offset) == 1) return offset;
  return static_cast<uint32_t>(offset) < last_tap ? static_cast<uint32_t>(offset) : last_tap;
}

// Adds one row of outputs, of kCount members or, if that is 0, of members.count. window: the first tap of the row's first window.
template <class T, class Offset, int kCount>
void scatter_row(const Pool2dShape& s, const Grouping& g, const int32_t* distances, const Members<T, Offset>& members, int64_t oh,
                 T* window) {
  const bool nchw = s.layout == Layout::nchw;
  const int64_t count = kCount != 0 ? kCount : members.count, step = nchw ? 1 : s.channels;
  const uint32_t last_tap = static_cast<uint32_t>(taps_of(s) - 1);
  const T* grad = members.grad_output + oh * s.out_w * step;
  const Offset* offset = members.offsets + oh * s.out_w * step;
  const int64_t output_stride = nchw ? members.output_stride : 1, member_stride = nchw ? g.member_stride : 1;
  for (int64_t ow = 0; ow < s.out_w; ++ow, grad += step, offset += step, window += s.stride_w * g.pixel) {
#pragma GCC unroll 8
    for (int64_t m = 0; m < count; ++m) {
      window[m * member_stride + distances[table_index(offset[m * output_stride], last_tap)]] += grad[m * output_stride];
    }
  }
}

template <class T>
void clear(T* p, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = T{0};
}

template <class T>
void copy(const T* from, T* to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) store_in_stream(to + i, load(from + i));
  if (i < count) store_lanes(to + i, load_lanes(from + i, first_lanes<T>(count - i), Vec<T>{}), first_lanes<T>(count - i));
}

// A window of rows over the sums of one group, from the padded row `top` on.
template <class T, class Offset>
class Sums {
 public:
  Sums(const Pool2dShape& s, const Grouping& g, const Members<T, Offset>& members, const int32_t* distances, T* sums)
      : s_(s), g_(g), members_(members), distances_(distances), sums_(sums) {}

  void start(int64_t top) {
    top_ = top;
    clear(sums_, g_.scratch_elements());
  }

  int64_t end() const { return top_ + g_.rows; }

  void add_row(int64_t oh) {
    T* window = sums_ + (oh * s_.stride_h - top_) * g_.columns * g_.pixel;
    constexpr int kWhole = static_cast<int>(kPlanes);
    const bool is_whole = s_.layout == Layout::nchw && members_.count == kWhole;
    (is_whole ? scatter_row<T, Offset, kWhole> : scatter_row<T, Offset, 0>)(s_, g_, distances_, members_, oh, window);
  }

  // Writes the padded rows [top, end), as far as they are inside the input.
  void write(int64_t row, int64_t last) const {
    last = smaller(last, s_.pad_top + s_.in_h);
    for (row = larger(row, s_.pad_top); row < last; ++row) {
      const T* sums = sums_ + ((row - top_) * g_.columns + s_.pad_left) * g_.pixel;
      T* grad_input = members_.grad_input + (row - s_.pad_top) * s_.in_w * pixel_of(s_);
      if (s_.layout == Layout::nchw) {
        for (int64_t m = 0; m < members_.count; ++m) copy(sums + m * g_.member_stride, grad_input + m * members_.input_stride, s_.in_w);
      } else {
        for (int64_t iw = 0; iw < s_.in_w; ++iw) copy(sums + iw * g_.pixel, grad_input + iw * s_.channels, members_.count);
      }
    }
  }

  // Moves the rows from `row` on to the top.
  void advance_to(int64_t row) {
    const int64_t row_elements = g_.columns * g_.pixel, kept = (end() - row) * row_elements, all = g_.rows * row_elements;
    for (int64_t m = 0; m < (s_.layout == Layout::nchw ? members_.count : 1); ++m) {
      T* sums = sums_ + m * g_.member_stride;
      copy(sums + all - kept, sums, kept);
      clear(sums + kept, all - kept);
    }
    top_ = row;
  }

 private:
  const Pool2dShape& s_;
  const Grouping& g_;
  const Members<T, Offset> members_;
  const int32_t* distances_;
  T* sums_;
  int64_t top_ = 0;
};

// The input rows [first, last) of one group.
template <class T, class Offset>
void backward_range(const Pool2dShape& s, const Grouping& g, Sums<T, Offset>& sums, int64_t first, int64_t last) {
  int64_t row = first + s.pad_top;
  const int64_t end = last + s.pad_top;
  int64_t oh = larger(0, ceil_div(larger(0, row - g.window_rows + 1), s.stride_h));
  const int64_t last_oh = smaller(s.out_h, (end - 1) / s.stride_h + 1);
  sums.start(smaller(row, oh * s.stride_h));
  while (row < end) {
    for (; oh < last_oh && oh * s.stride_h + g.window_rows <= sums.end(); ++oh) sums.add_row(oh);
    const int64_t complete = smaller(sums.end(), oh < last_oh ? oh * s.stride_h : end);
    sums.write(row, smaller(complete, end));
    row = larger(row, complete);
    if (row < end) sums.advance_to(complete);
  }
}

template <class T, class Offset>
void backward(const Pool2dShape& s, const Pool2dBuffers& b, void* workspace, int threads) {
  Carver carver(workspace);
  const Grouping g = grouping_of<T>(s, threads);
  const Scratch<T> scratch = carve_scratch<T>(s, g, carver, threads);
  fill_distances(s, g, scratch.distances);
  parallel_for(threads, g.tasks(), [&](int worker, int64_t task) {
    const int64_t first = task % g.ranges * g.rows_per_range, last = smaller(s.in_h, first + g.rows_per_range);
    Sums<T, Offset> sums(s, g, members_of<T, Offset>(s, b, g, task / g.ranges), scratch.distances,
                         scratch.sums + worker * g.scratch_elements());
    if (first < last) backward_range(s, g, sums, first, last);
  });
}

// The other way, to gather at each element what its windows bring it, costs as many steps as windows meet there, but takes a whole vector
// at each; it does not serve nchw with strides beyond 2.
bool accepts(const Pool2dShape& s) {
  if (!accepts_float_and_double(s)) return false;
  if constexpr (kHasInPlace) {
    if (every_window_meets_input(s)) return false;
  }
  const int64_t lanes = s.dtype == DType::float32 ? kLanes<float> : kLanes<double>;
  if (s.layout == Layout::nhwc) return 4 * taps_of(s) * s.out_h * s.out_w > kStepsOfFourOutputs * lanes * s.in_h * s.in_w;
  if constexpr (kHasPairs) {
    if (gathers_pairs(s)) return false;
  }
  return s.stride_w > 2 || 5 * taps_of(s) * output_vectors_of(s, lanes) > kStepsOfFiveOutputs * s.out_h * s.out_w;
}

template <class T>
Plan plan_for(const Pool2dShape& s, int threads) {
  const Grouping g = grouping_of<T>(s, threads);
  Carver carver(nullptr);
  carve_scratch<T>(s, g, carver, threads);
  return {g.members, 1, g.tasks(), carver.used()};
}

Plan plan(const Pool2dShape& s, int threads) {
  return s.dtype == DType::float32 ? plan_for<float>(s, threads) : plan_for<double>(s, threads);
}

void run(const Pool2dShape& s, const Pool2dBuffers& b, void* workspace, int threads) {
  if (s.dtype == DType::float32) {
    (has_small_offsets(s) ? backward<float, uint8_t> : backward<float, int32_t>)(s, b, workspace, threads);
  } else {
    (has_small_offsets(s) ? backward<double, uint8_t> : backward<double, int32_t>)(s, b, workspace, threads);
  }
}

}  // namespace

extern const Pool2dKernel max_pool2d_backward_scatter = {
    CNN_EXT_KERNEL_NAME("max_pool2d_backward_scatter"), Isa::CNN_EXT_ISA, Pool2dOp::max, Pool2dDirection::backward, accepts, plan, run};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
