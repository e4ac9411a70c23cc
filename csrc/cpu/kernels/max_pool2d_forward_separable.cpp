// Max pooling in nchw, rows first: the maximum of each window's part of an input row is found once, with its column, and shared by all
// windows that the row meets; a window's maximum is then that of its rows. Rows in order and columns in order are the order of the taps, so
// ties still go to the first tap and NaNs to the last. A window of k x k costs 2k steps or fewer instead of k * k. The maxima of rows are
// kept in a ring of as many rows as a window spans.
//
// A vector holds neighbouring outputs; for stride 2 two loads hold the even and the odd taps. Where each vector begins and which of its
// lanes are inside the input depends on the column alone: a call computes that once, and the loop over rows has neither border code nor
// scalar tails. Lanes outside load as a value that is not greater than any inside, and each lane's offset starts at its first tap inside:
// so a border can neither win nor claim an offset.
//
// A row is first taken to be finite: then one comparison per tap will do, and the lowest finite value stands outside. A product with 0,
// added up beside, tells afterwards; a row with an infinity or a NaN is done again with care for both.
//
// Windows that are wide and few leave most lanes idle.
#include "cpu/kernels/max_pool2d.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

// What a vector of outputs loads for one tap, or for stride 2 without dilation for two neighbours: elements from `column` on, in the lanes
// that are inside the input. The second set is that of the second load of stride 2.
struct TapLoad {
  int64_t column;
  LaneSet lanes[2];
};

// A place of the ring: the input row, counted through all planes, whose maxima it holds.
struct Held {
  int64_t row;
  bool is_finite;
};

// What the tasks of a call share, and their scratch.
template <class T>
struct Scratch {
  TapLoad* loads;     // [vectors, loads_per_vector]
  Int<T>* first_tap;  // [outputs of a row] the first tap inside the input
  Int<T>* any_tap;    // [outputs of a row] all ones if there is one, else 0
  bool has_empty_windows;
  int64_t loads_per_vector, row_size, ring_rows;
  // Per worker:
  T* values;     // [ring_rows, row_size] the maxima of windows' rows
  Int<T>* taps;  // [ring_rows, row_size] and their columns
  Held* held;    // [ring_rows] what lies there
};

bool loads_two_taps(const Pool2dShape& s) { return s.stride_w == 2 && s.dilation_w == 1; }

// Per worker, whole cache lines: two workers must not write one.
template <class T>
int64_t held_size(const Scratch<T>& scratch) {
  return ceil_div(scratch.ring_rows, 4) * 4;
}

template <class T>
Scratch<T> carve_scratch(const Pool2dShape& s, Carver& carver, int threads) {
  Scratch<T> scratch{};
  scratch.row_size = ceil_div(s.out_w, kLanes<T>) * kLanes<T>;
  scratch.ring_rows = (s.kernel_h - 1) * s.dilation_h + 1;
  scratch.loads_per_vector = loads_two_taps(s) ? ceil_div(s.kernel_w, 2) : s.kernel_w;
  scratch.loads = carver.take<TapLoad>(scratch.row_size / kLanes<T> * scratch.loads_per_vector);
  scratch.first_tap = carver.take<Int<T>>(scratch.row_size);
  scratch.any_tap = carver.take<Int<T>>(scratch.row_size);
  scratch.values = carver.take<T>(scratch.ring_rows * scratch.row_size * threads);
  scratch.taps = carver.take<Int<T>>(scratch.ring_rows * scratch.row_size * threads);
  scratch.held = carver.take<Held>(held_size(scratch) * threads);
  return scratch;
}

template <class T>
TapLoad tap_load(const Pool2dShape& s, int64_t column) {
  if (s.stride_w != 2) return {column, {lanes_inside<T>(column, s.stride_w, s.in_w), {}}};
  return {column, {lanes_inside<T>(column, 1, s.in_w), lanes_inside<T>(column + kLanes<T>, 1, s.in_w)}};
}

template <class T>
void fill_tables(const Pool2dShape& s, Scratch<T>& scratch) {
  for (int64_t ow = 0; ow < scratch.row_size; ++ow) {
    const Taps taps = taps_inside(ow * s.stride_w - s.pad_left, s.kernel_w, s.dilation_w, s.in_w);
    scratch.first_tap[ow] = static_cast<Int<T>>(taps.first);
    scratch.any_tap[ow] = taps.empty() ? 0 : -1;
    scratch.has_empty_windows |= ow < s.out_w && taps.empty();
  }
  TapLoad* loads = scratch.loads;
  for (int64_t ow = 0; ow < s.out_w; ow += kLanes<T>) {
    const int64_t start = ow * s.stride_w - s.pad_left, distance = loads_two_taps(s) ? 2 : s.dilation_w;
    for (int64_t i = 0; i < scratch.loads_per_vector; ++i) *loads++ = tap_load<T>(s, start + i * distance);
  }
}

// The maxima of one input row under each window; returns whether the row is finite. kFinite: whether to take it to be; if that turns out
// wrong the maxima are of no use. kStride: 1, 2, or 0 for any other.
template <class T, class Offset, bool kFinite, int kStride>
bool row_maxima(const Pool2dShape& s, const Scratch<T>& scratch, const T* row, T* values, Int<T>* taps) {
  const bool two_taps = kStride == 2 && s.dilation_w == 1;
  const Vec<T> outside = broadcast(kFinite ? kLowestFinite<T> : kLowest<T>);
  Vec<T> zero{};  // or NaN
  const TapLoad* tap = scratch.loads;
  for (int64_t ow = 0; ow < s.out_w; ow += kLanes<T>) {
    Best<T, Offset> best;
    best.offset = load(scratch.first_tap + ow);
    const auto take = [&](Vec<T> candidate, int64_t k) {
      if (k == 0) {
        best.value = candidate;
      } else {
        best.template take<!kFinite>(candidate, broadcast(static_cast<Int<T>>(k)));
      }
    };
    for (int64_t k = 0; k < s.kernel_w; ++k, ++tap) {
      const T* p = row + tap->column;
      if constexpr (kStride == 2) {
        const Vec<T> lower = load_lanes(p, tap->lanes[0], outside), upper = load_lanes(p + kLanes<T>, tap->lanes[1], outside);
        if constexpr (kFinite) zero = fma(lower, Vec<T>{}, fma(upper, Vec<T>{}, zero));
        take(even_lanes<T>(lower, upper), k);
        if (two_taps && k + 1 < s.kernel_w) take(odd_lanes<T>(lower, upper), ++k);
      } else {
        const Vec<T> value = kStride == 1 ? load_lanes(p, tap->lanes[0], outside) : load_strided(p, s.stride_w, tap->lanes[0], outside);
        if constexpr (kFinite) zero = fma(value, Vec<T>{}, zero);
        take(value, k);
      }
    }
    store(values + ow, best.value);
    if constexpr (kTracksOffsets<Offset>) store(taps + ow, best.offset);
  }
  return kFinite && !any(is_nan(zero));
}

// The rows of maxima of one worker.
template <class T, class Offset, int kStride>
class Ring {
 public:
  Ring(const Pool2dShape& s, const Scratch<T>& scratch, int worker)
      : s_(s),
        scratch_(scratch),
        values_(scratch.values + worker * scratch.ring_rows * scratch.row_size),
        taps_(scratch.taps + worker * scratch.ring_rows * scratch.row_size),
        held_(scratch.held + worker * held_size(scratch)) {
    for (int64_t i = 0; i < scratch.ring_rows; ++i) held_[i].row = -1;
  }

  // One row of outputs, whose windows begin at the row `top` of the plane that begins with row `plane_row` of the input.
  void forward_row(const T* input, int64_t plane_row, int64_t top, T* output, Offset* offsets) {
    const Taps rows = taps_inside(top, s_.kernel_h, s_.dilation_h, s_.in_h);
    bool finite = true;
    for (int64_t r = rows.first; r < rows.last; ++r) finite &= prepare(input, plane_row + top + r * s_.dilation_h);
    finite ? maxima<true>(rows, plane_row + top, output, offsets) : maxima<false>(rows, plane_row + top, output, offsets);
  }

 private:
  // Fills the ring's place for an input row, if it does not hold it already; returns whether the row is finite.
  bool prepare(const T* input, int64_t row) {
    const int64_t slot = row % scratch_.ring_rows;
    Held& held = held_[slot];
    if (held.row == row) return held.is_finite;
    const T* elements = input + row * s_.in_w;
    T* values = values_ + slot * scratch_.row_size;
    Int<T>* taps = taps_ + slot * scratch_.row_size;
    const bool finite = !scratch_.has_empty_windows && row_maxima<T, Offset, true, kStride>(s_, scratch_, elements, values, taps);
    if (!finite) row_maxima<T, Offset, false, kStride>(s_, scratch_, elements, values, taps);
    held = {row, finite};
    return finite;
  }

  // The maxima of prepared rows.
  template <bool kFinite>
  void maxima(Taps rows, int64_t top, T* output, Offset* offsets) const {
    const int64_t first_slot = (top + rows.first * s_.dilation_h) % scratch_.ring_rows;
    for (int64_t ow = 0; ow < s_.out_w; ow += kLanes<T>) {
      Best<T, Offset> best;
      int64_t slot = first_slot;
      for (int64_t r = rows.first; r < rows.last; ++r) {
        const int64_t at = slot * scratch_.row_size + ow;
        const Vec<T> value = load(values_ + at);
        IntVec<T> offset{};
        if constexpr (kTracksOffsets<Offset>) offset = load(taps_ + at) + broadcast(static_cast<Int<T>>(r * s_.kernel_w));
        if (r == rows.first) {
          best = {value, offset & load(scratch_.any_tap + ow)};
        } else {
          best.template take<!kFinite>(value, offset);
        }
        slot += s_.dilation_h;
        if (slot >= scratch_.ring_rows) slot -= scratch_.ring_rows;
      }
      best.store_to(output + ow, offsets + ow, first_lanes<T>(s_.out_w - ow));
    }
  }

  const Pool2dShape& s_;
  const Scratch<T>& scratch_;
  T* values_;
  Int<T>* taps_;
  Held* held_;
};

template <class T>
Split split_of(const Pool2dShape& s, int threads) {
  return split_rows(s, s.out_h, larger(2 * s.stride_h * s.in_w, s.out_w), kLanes<T>, threads);
}

template <class T, class Offset, int kStride>
void forward_as(const Pool2dShape& s, const Pool2dBuffers& b, const Scratch<T>& scratch, int threads) {
  for_each_task(s, split_of<T>(s, threads), threads, [&](int worker, int64_t row, int64_t last_row, int64_t, int64_t) {
    Ring<T, Offset, kStride> ring(s, scratch, worker);
    int64_t plane = row / s.out_h, oh = row % s.out_h;
    for (; row < last_row; ++row) {
      ring.forward_row(static_cast<const T*>(b.input), plane * s.in_h, oh * s.stride_h - s.pad_top,
                       static_cast<T*>(b.output) + row * s.out_w, static_cast<Offset*>(b.offsets) + row * s.out_w);
      if (++oh == s.out_h) oh = 0, ++plane;
    }
  });
}

template <class T, class Offset>
void forward(const Pool2dShape& s, const Pool2dBuffers& b, void* workspace, int threads) {
  Carver carver(workspace);
  Scratch<T> scratch = carve_scratch<T>(s, carver, threads);
  fill_tables(s, scratch);
  if (s.stride_w == 1) return forward_as<T, Offset, 1>(s, b, scratch, threads);
  if (s.stride_w == 2) return forward_as<T, Offset, 2>(s, b, scratch, threads);
  forward_as<T, Offset, 0>(s, b, scratch, threads);
}

bool accepts(const Pool2dShape& s) { return accepts_float_and_double(s) && s.layout == Layout::nchw; }

template <class T>
Plan plan_for(const Pool2dShape& s, int threads) {
  Carver carver(nullptr);
  carve_scratch<T>(s, carver, threads);
  return {1, kLanes<T>, split_of<T>(s, threads).tasks, carver.used()};
}

Plan plan(const Pool2dShape& s, int threads) {
  return s.dtype == DType::float32 ? plan_for<float>(s, threads) : plan_for<double>(s, threads);
}

template <class T>
void run_for(const Pool2dShape& s, const Pool2dBuffers& b, void* workspace, int threads) {
  if (b.offsets == nullptr) return forward<T, NoOffset>(s, b, workspace, threads);
  if (has_small_offsets(s)) return forward<T, uint8_t>(s, b, workspace, threads);
  forward<T, int32_t>(s, b, workspace, threads);
}

void run(const Pool2dShape& s, const Pool2dBuffers& b, void* workspace, int threads) {
  s.dtype == DType::float32 ? run_for<float>(s, b, workspace, threads) : run_for<double>(s, b, workspace, threads);
}

}  // namespace

extern const Pool2dKernel max_pool2d_forward_separable = {
    CNN_EXT_KERNEL_NAME("max_pool2d_forward_separable"), Isa::CNN_EXT_ISA, Pool2dOp::max, Pool2dDirection::forward, accepts, plan, run};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
