// The gradient of average pooling as a gather: each row of grad_input adds up what the rows of outputs over it contribute, in ascending
// order, and is written once. What a row of outputs contributes is prepared when the first input row needs it, and kept in a ring of rows
// while others may:
//
// nchw: a whole row as wide as the input, the shares (grad_output / divisor) already spread and added along the row. A vector holds the
// columns of one phase (column modulo stride), interleaved at the store, for strides 1 and 2; larger ones spread their few outputs one by
// one.
//
// nhwc: the shares alone; a vector holds neighbouring channels of one pixel. Fewer channels than a vector has lanes would leave most of
// it idle in every row of the input: their rows are spread, too, so that whole vectors are added and written.
//
// So a share is divided once, and what a single window covers is copied from L1.
//
// nchw, one window over all of a plane: its share fills the plane.
#include "cpu/kernels/avg_pool2d.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

template <class T>
struct Scratch {
  AxisCovers rows;
  AxisCovers columns;  // nhwc
  T* column_divisors;
  int64_t shares_size, ring_rows, ring_row_size;
  int64_t spread_before;  // elements of a spread row before the first of the input
  T* shares;              // where rows are spread, per worker: one row of shares amid zeros
  T* ring;                // per worker: [ring_rows, ring_row_size]
};

// Zeros before the shares of a row, so that no tap needs a border.
int64_t shares_before(const Pool2dShape& s) { return (s.kernel_w - 1) * s.dilation_w / s.stride_w; }

// Whether a row of outputs is spread over the columns of the input before it is added to others.
template <class T>
bool spreads_rows(const Pool2dShape& s) {
  return s.layout == Layout::nchw || s.channels < kLanes<T>;
}

// Of a column's divisor: where rows are spread, one for each channel of a pixel.
template <class T>
int64_t divisor_copies(const Pool2dShape& s) {
  return spreads_rows<T>(s) ? pixel_of(s) : 1;
}

template <class T>
Scratch<T> carve_scratch(const Pool2dShape& s, Carver& carver, int threads) {
  const bool nchw = s.layout == Layout::nchw;
  Scratch<T> scratch{};
  scratch.rows = carve_covers(carver, s.in_h, s.out_h, s.kernel_h);
  if (!nchw) scratch.columns = carve_covers(carver, s.in_w, s.out_w, s.kernel_w);
  scratch.column_divisors = carve_column_divisors<T>(s, divisor_copies<T>(s), carver);
  const int64_t span = larger(s.pad_left + s.in_w, (s.out_w - 1) * s.stride_w + (s.kernel_w - 1) * s.dilation_w + 1);
  scratch.ring_rows = (s.kernel_h - 1) * s.dilation_h / s.stride_h + 1;
  if (nchw) {
    scratch.shares_size = shares_before(s) + larger(s.out_w, ceil_div(span, s.stride_w)) + 2 * kLanes<T>;
    scratch.ring_row_size = span + 2 * kLanes<T>;
    scratch.spread_before = s.pad_left;
  } else {
    const int64_t beyond = spreads_rows<T>(s) ? kLanes<T> : 0;
    scratch.shares_size = spreads_rows<T>(s) ? s.out_w * s.channels + beyond : 0;
    scratch.ring_row_size = (spreads_rows<T>(s) ? s.in_w : s.out_w) * s.channels + beyond;
  }
  scratch.shares = carver.take<T>(scratch.shares_size * threads);
  scratch.ring = carver.take<T>(scratch.ring_rows * scratch.ring_row_size * threads);
  return scratch;
}

// Adds up a row of shares along the row, for the stride 1 or 2: spread[column + pad_left].
template <class T, int kStride>
void spread_by_phases(const Pool2dShape& s, const T* shares, T* spread) {
  const int64_t columns = s.pad_left + s.in_w;
  for (int64_t q = 0; q * kStride < columns; q += kLanes<T>) {
    Vec<T> phases[2] = {};
    for (int64_t k = s.kernel_w - 1; k >= 0; --k) {
      const int64_t distance = k * s.dilation_w;
      const Vec<T> share = load(shares + q - distance / kStride);
      if (kStride == 1 || distance % 2 == 0) {
        phases[0] += share;
      } else {
        phases[1] += share;
      }
    }
    if constexpr (kStride == 1) {
      store(spread + q, phases[0]);
    } else {
      store(spread + 2 * q, interleave_lower<T>(phases[0], phases[1]));
      store(spread + 2 * q + kLanes<T>, interleave_upper<T>(phases[0], phases[1]));
    }
  }
}

template <class T>
void spread_by_outputs(const Pool2dShape& s, const T* shares, T* spread, int64_t size) {
  for (int64_t i = 0; i < size; ++i) spread[i] = T{0};
  for (int64_t ow = 0; ow < s.out_w; ++ow) {
    T* first = spread + ow * s.stride_w;
    for (int64_t k = 0; k < s.kernel_w; ++k) first[k * s.dilation_w] += shares[ow];
  }
}

// A row of shares: [column, channel].
template <class T>
void divide_row(const T* grad_output, const T* column_divisors, T row_divisor, int64_t count, T* shares) {
  const Vec<T> divisor = broadcast(row_divisor);
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const Vec<T> grad = load_lanes(grad_output + i, first_lanes<T>(count - i), Vec<T>{});
    store(shares + i, grad / (divisor * load(column_divisors + i)));
  }
}

template <class T>
void spread_row_nchw(const Pool2dShape& s, const T* shares, T* spread, int64_t size) {
  if (s.stride_w == 1) return spread_by_phases<T, 1>(s, shares, spread);
  if (s.stride_w == 2) return spread_by_phases<T, 2>(s, shares, spread);
  spread_by_outputs(s, shares, spread, size);
}

// Stores whole vectors from left to right: what lies behind a pixel's channels is overwritten by the next pixel's.
template <class T>
void spread_row_nhwc(const Pool2dShape& s, const AxisCovers& columns, const T* shares, T* spread) {
  for (int64_t iw = 0; iw < s.in_w; ++iw) {
    Vec<T> sum{};
    for (int64_t j = columns.begin[iw]; j < columns.begin[iw + 1]; ++j) sum += load(shares + columns.covers[j].out * s.channels);
    store(spread + iw * s.channels, sum);
  }
}

template <class T>
void prepare_row_nhwc(const Pool2dShape& s, const Scratch<T>& scratch, const T* grad_output, T row_divisor, T* shares, int64_t channel,
                      int64_t last_channel) {
  for (int64_t ow = 0; ow < s.out_w; ++ow, grad_output += s.channels, shares += s.channels) {
    const Vec<T> divisor = broadcast(row_divisor * scratch.column_divisors[ow]);
    for (int64_t c = channel; c < last_channel; c += kLanes<T>) {
      const LaneSet lanes = first_lanes<T>(last_channel - c);
      store_lanes(shares + c, load_lanes(grad_output + c, lanes, Vec<T>{}) / divisor, lanes);
    }
  }
}

// The contributions of the rows of outputs that the input rows at hand need.
template <class T>
class Ring {
 public:
  Ring(const Pool2dShape& s, const Scratch<T>& scratch, int worker, int64_t channel, int64_t last_channel)
      : s_(s),
        scratch_(scratch),
        shares_(scratch.shares + worker * scratch.shares_size + (s.layout == Layout::nchw ? shares_before(s) : 0)),
        rows_(scratch.ring + worker * scratch.ring_rows * scratch.ring_row_size),
        channel_(channel),
        last_channel_(last_channel) {
    for (int64_t i = 0; i < scratch.shares_size; ++i) scratch.shares[worker * scratch.shares_size + i] = T{0};
  }

  const T* row(int64_t oh) const { return rows_ + oh % scratch_.ring_rows * scratch_.ring_row_size; }

  void start_plane(const T* grad_output) {
    grad_output_ = grad_output;
    next_ = 0;
  }

  void prepare_for(int64_t ih) {
    const int64_t from = ih + s_.pad_top - (s_.kernel_h - 1) * s_.dilation_h;
    const int64_t last = smaller(s_.out_h - 1, (ih + s_.pad_top) / s_.stride_h);
    if (from > 0) next_ = larger(next_, ceil_div(from, s_.stride_h));
    for (; next_ <= last; ++next_) prepare(next_);
  }

 private:
  void prepare(int64_t oh) {
    const T* grad_output = grad_output_ + oh * s_.out_w * pixel_of(s_);
    const T divisor = static_cast<T>(row_divisor(s_, oh));
    T* row = rows_ + oh % scratch_.ring_rows * scratch_.ring_row_size;
    if (!spreads_rows<T>(s_)) return prepare_row_nhwc(s_, scratch_, grad_output, divisor, row, channel_, last_channel_);
    divide_row(grad_output, scratch_.column_divisors, divisor, s_.out_w * pixel_of(s_), shares_);
    if (s_.layout == Layout::nchw) {
      spread_row_nchw(s_, shares_, row, scratch_.ring_row_size);
    } else {
      spread_row_nhwc(s_, scratch_.columns, shares_, row);
    }
  }

  const Pool2dShape& s_;
  const Scratch<T>& scratch_;
  T* shares_;
  T* rows_;
  int64_t channel_, last_channel_;
  const T* grad_output_ = nullptr;
  int64_t next_ = 0;  // rows of outputs of this plane before it are prepared or no longer needed
};

// Adding to 0 makes a 0.0 of a -0.0, as a sum does.
template <class T>
void copy_sums(const T* from, T* to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) store_in_stream(to + i, Vec<T>{} + load(from + i));
  const LaneSet lanes = first_lanes<T>(count - i);
  if (i < count) store_lanes(to + i, Vec<T>{} + load_lanes(from + i, lanes, Vec<T>{}), lanes);
}

template <class T>
void add_spread_rows(const Scratch<T>& scratch, const Ring<T>& ring, int64_t ih, int64_t count, T* grad_input) {
  const Cover* first = scratch.rows.covers + scratch.rows.begin[ih];
  const Cover* last = scratch.rows.covers + scratch.rows.begin[ih + 1];
  if (last - first == 1) return copy_sums(ring.row(first->out) + scratch.spread_before, grad_input, count);
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    Vec<T> sum{};
    for (const Cover* cover = first; cover < last; ++cover) sum += load(ring.row(cover->out) + scratch.spread_before + i);
    store_in_stream(grad_input + i, sum, first_lanes<T>(count - i));
  }
}

template <class T>
void backward_row_nhwc(const Pool2dShape& s, const Scratch<T>& scratch, const Ring<T>& ring, int64_t ih, T* grad_input, int64_t channel,
                       int64_t last_channel) {
  const AxisCovers &rows = scratch.rows, &columns = scratch.columns;
  const bool in_one_row = rows.begin[ih + 1] - rows.begin[ih] == 1;
  for (int64_t iw = 0; iw < s.in_w; ++iw) {
    if (in_one_row && columns.begin[iw + 1] - columns.begin[iw] == 1) {
      const T* shares = ring.row(rows.covers[rows.begin[ih]].out) + columns.covers[columns.begin[iw]].out * s.channels;
      copy_sums(shares + channel, grad_input + iw * s.channels + channel, last_channel - channel);
      continue;
    }
    for (int64_t c = channel; c < last_channel; c += kLanes<T>) {
      const LaneSet lanes = first_lanes<T>(last_channel - c);
      Vec<T> sum{};
      for (int64_t i = rows.begin[ih]; i < rows.begin[ih + 1]; ++i) {
        const T* shares = ring.row(rows.covers[i].out) + c;
        for (int64_t j = columns.begin[iw]; j < columns.begin[iw + 1]; ++j) {
          sum += load_lanes(shares + columns.covers[j].out * s.channels, lanes, Vec<T>{});
        }
      }
      store_lanes(grad_input + iw * s.channels + c, sum, lanes);
    }
  }
}

// The planes [plane, last). Whole vectors are stored while what lies behind a plane is still to be filled.
template <class T>
void fill_planes(const Pool2dShape& s, const T* grad_output, int64_t plane, int64_t last, T* grad_input) {
  const T divisor = global_divisor<T>(s);
  const int64_t size = s.in_h * s.in_w;
  const T* end = grad_input + last * size;
  for (; plane < last; ++plane) {
    const Vec<T> share = broadcast(T{0} + grad_output[plane] / divisor);
    T *element = grad_input + plane * size, *next = element + size;
    for (; element < next; element += kLanes<T>) store_in_stream(element, share, first_lanes<T>(end - element));
  }
}

template <class T>
Split split_of(const Pool2dShape& s, int threads) {
  if (is_global(s)) return split_rows(s, 1, s.in_h * s.in_w, kLanes<T>, threads);
  return split_rows(s, s.in_h, s.in_w * pixel_of(s), kLanes<T>, threads);
}

template <class T>
void backward_global(const Pool2dShape& s, const Pool2dBuffers& b, int threads) {
  for_each_task(s, split_of<T>(s, threads), threads, [&](int, int64_t plane, int64_t last, int64_t, int64_t) {
    fill_planes(s, static_cast<const T*>(b.grad_output), plane, last, static_cast<T*>(b.grad_input));
  });
}

template <class T>
void backward(const Pool2dShape& s, const Pool2dBuffers& b, void* workspace, int threads) {
  if (is_global(s)) return backward_global<T>(s, b, threads);
  Carver carver(workspace);
  const Scratch<T> scratch = carve_scratch<T>(s, carver, threads);
  fill_row_covers(scratch.rows, s);
  if (s.layout == Layout::nhwc) fill_column_covers(scratch.columns, s);
  fill_column_divisors(s, divisor_copies<T>(s), scratch.column_divisors);
  const int64_t plane_outputs = s.out_h * s.out_w * pixel_of(s), row_elements = s.in_w * pixel_of(s);
  for_each_task(s, split_of<T>(s, threads), threads, [&](int worker, int64_t row, int64_t last_row, int64_t channel, int64_t last_channel) {
    Ring<T> ring(s, scratch, worker, channel, last_channel);
    int64_t plane = row / s.in_h, ih = row % s.in_h;
    ring.start_plane(static_cast<const T*>(b.grad_output) + plane * plane_outputs);
    for (; row < last_row; ++row) {
      ring.prepare_for(ih);
      T* grad_input = static_cast<T*>(b.grad_input) + row * row_elements;
      if (spreads_rows<T>(s)) {
        add_spread_rows(scratch, ring, ih, row_elements, grad_input);
      } else {
        backward_row_nhwc(s, scratch, ring, ih, grad_input, channel, last_channel);
      }
      if (++ih == s.in_h) {
        ih = 0;
        ring.start_plane(static_cast<const T*>(b.grad_output) + ++plane * plane_outputs);
      }
    }
  });
}

template <class T>
Plan plan_for(const Pool2dShape& s, int threads) {
  Carver carver(nullptr);
  carve_scratch<T>(s, carver, threads);
  const bool nchw = s.layout == Layout::nchw;
  return {nchw ? 1 : kLanes<T>, nchw ? kLanes<T> : 1, split_of<T>(s, threads).tasks, carver.used()};
}

Plan plan(const Pool2dShape& s, int threads) {
  return s.dtype == DType::float32 ? plan_for<float>(s, threads) : plan_for<double>(s, threads);
}

void run(const Pool2dShape& s, const Pool2dBuffers& b, void* workspace, int threads) {
  s.dtype == DType::float32 ? backward<float>(s, b, workspace, threads) : backward<double>(s, b, workspace, threads);
}

}  // namespace

extern const Pool2dKernel avg_pool2d_backward_direct = {CNN_EXT_KERNEL_NAME("avg_pool2d_backward_direct"),
                                                        Isa::CNN_EXT_ISA,
                                                        Pool2dOp::avg,
                                                        Pool2dDirection::backward,
                                                        accepts_float_and_double,
                                                        plan,
                                                        run};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
