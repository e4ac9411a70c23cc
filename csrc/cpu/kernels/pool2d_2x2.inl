// Tiles of 2x2 windows with stride 2 in nchw, all of them inside the input: as many outputs as a vector has lanes, and the two rows of
// inputs below them.
//
// Where a row of outputs fills a vector, a tile is a piece of a row; the last one is moved back to end with the row and computes a few
// outputs twice. Narrower rows are packed, as many whole ones as fit (two of 7, one of 14 outputs in 16 lanes): their inputs are one run
// of memory, four vectors at most. Of such a run the left and right columns of all windows come out of an even-odd split, wherever the rows
// begin; one more shuffle then parts upper from lower rows.
//
// With AVX2 a shuffle by places takes several instructions: where no two rows fit, a tile is one row, read and written as a wide one.
#pragma once

#include "cpu/kernels/pool2d.inl"

namespace {

inline bool has_2x2_windows(const Pool2dShape& s) {
  const bool by_two_h = s.kernel_h == 2 && s.dilation_h == 1 && s.pad_top == 0 && (s.stride_h == 2 || s.out_h == 1);
  const bool by_two_w = s.kernel_w == 2 && s.dilation_w == 1 && s.pad_left == 0 && (s.stride_w == 2 || s.out_w == 1);
  return s.layout == Layout::nchw && by_two_h && by_two_w && 2 * s.out_h <= s.in_h && 2 * s.out_w <= s.in_w;
}

// Packed rows must follow each other without a gap.
template <class T>
bool accepts_2x2_for(const Pool2dShape& s) {
  return has_2x2_windows(s) && (s.out_w >= kLanes<T> || s.in_w == 2 * s.out_w);
}

inline bool accepts_2x2(const Pool2dShape& s) {
  return (s.dtype == DType::float32 && accepts_2x2_for<float>(s)) || (s.dtype == DType::float64 && accepts_2x2_for<double>(s));
}

template <class T>
bool packs_rows(const Pool2dShape& s) {
  return s.out_w < kLanes<T>;
}

// Whether a row is a tile by itself, narrower than a vector.
template <class T>
bool has_narrow_rows(const Pool2dShape& s) {
  return kVectorBytes == 32 && s.out_w < kLanes<T> && 2 * s.out_w > kLanes<T>;
}

// How packed rows lie. A run of inputs, split into even and odd columns, is the sequence upper row, lower row, upper row ... of column
// pairs, 2 * lanes of them at most.
template <class T>
struct Packing {
  IntVec<T> upper, lower;  // [lane of a tile] its place in that sequence
  IntVec<T> output[2];     // [place] its lane of a tile
  IntVec<T> first_tap[2];  // [place] 0 in an upper row, 2 in a lower one
  int64_t rows;            // of outputs in a tile

  explicit Packing(const Pool2dShape& s) : rows(kLanes<T> / s.out_w) {
    for (int64_t lane = 0; lane < kLanes<T>; ++lane) {
      const int64_t place = lane / s.out_w * 2 * s.out_w + lane % s.out_w;
      upper[lane] = static_cast<Int<T>>(place);
      lower[lane] = static_cast<Int<T>>(place + s.out_w);
    }
    for (int64_t place = 0; place < 2 * kLanes<T>; ++place) {
      const int64_t row = place / s.out_w;
      output[place / kLanes<T>][place % kLanes<T>] = static_cast<Int<T>>(row / 2 * s.out_w + place % s.out_w);
      first_tap[place / kLanes<T>][place % kLanes<T>] = static_cast<Int<T>>(row % 2 * 2);
    }
  }
};

// The lanes of a tile of packed rows, and of the vectors that its inputs fill.
template <class T>
struct PackedLanes {
  LaneSet outputs, inputs[4];
  explicit PackedLanes(int64_t outputs_of_tile) : outputs(first_lanes<T>(outputs_of_tile)) {
    for (int i = 0; i < 4; ++i) inputs[i] = first_lanes<T>(larger(0, 4 * outputs_of_tile - i * kLanes<T>));
  }
};

// Rows of all planes count on; returns where the inputs of row `row` of outputs begin.
inline int64_t input_of_row(const Pool2dShape& s, int64_t row) { return (row / s.out_h * s.in_h + row % s.out_h * 2) * s.in_w; }

// Calls body(input, output, lanes) with the tiles of packed rows in [row, last): the elements at which their inputs and outputs begin.
template <class T, class Body>
void for_each_packed_tile(const Pool2dShape& s, int64_t rows_per_tile, int64_t row, int64_t last, const Body& body) {
  const PackedLanes<T> full(rows_per_tile * s.out_w);
  while (row < last) {
    const int64_t end = s.in_h == 2 * s.out_h ? last : smaller(last, (row / s.out_h + 1) * s.out_h);  // of rows without a gap
    int64_t input = input_of_row(s, row), output = row * s.out_w;
    for (; row + rows_per_tile <= end; row += rows_per_tile, input += 4 * rows_per_tile * s.out_w, output += rows_per_tile * s.out_w) {
      body(input, output, full);
    }
    if (row < end) body(input, output, PackedLanes<T>((end - row) * s.out_w));
    row = end;
  }
}

// Calls body(input, output) with the tiles of narrow rows.
template <class Body>
void for_each_narrow_tile(const Pool2dShape& s, int64_t row, int64_t last, const Body& body) {
  while (row < last) {
    const int64_t end = smaller(last, (row / s.out_h + 1) * s.out_h);  // of this plane
    for (int64_t input = input_of_row(s, row); row < end; ++row, input += 2 * s.in_w) body(input, row * s.out_w);
  }
}

// The 4 * out_w inputs of a narrow tile, two rows without a gap, as the two vectors of each. What lies behind an upper row is read with it:
// the lower row, which is longer than that.
template <class T>
struct NarrowInputs {
  Vec<T> upper[2], lower[2];
  NarrowInputs(const T* p, int64_t out_w)
      : upper{load(p), load(p + kLanes<T>)},
        lower{load(p + 2 * out_w), load_first(p + 2 * out_w + kLanes<T>, static_cast<int>(2 * out_w - kLanes<T>))} {}
};

// The same of its gradients: what an upper row writes behind it, the lower one overwrites.
template <class T>
void store_narrow(T* p, int64_t out_w, Vec<T> upper_first, Vec<T> upper_second, Vec<T> lower_first, Vec<T> lower_second) {
  store_in_stream(p, upper_first);
  store(p + kLanes<T>, upper_second);
  store_in_stream(p + 2 * out_w, lower_first);
  store_first(p + 2 * out_w + kLanes<T>, lower_second, static_cast<int>(2 * out_w - kLanes<T>));
}

// Calls body(input, output) with the tiles of rows that fill vectors: the elements at which their upper inputs and outputs begin.
template <class T, class Body>
void for_each_wide_tile(const Pool2dShape& s, int64_t row, int64_t last, const Body& body) {
  for (; row < last; ++row) {
    const int64_t input = input_of_row(s, row);
    int64_t ow = 0;
    for (; ow + kLanes<T> <= s.out_w; ow += kLanes<T>) body(input + 2 * ow, row * s.out_w + ow);
    if (ow < s.out_w) body(input + 2 * (s.out_w - kLanes<T>), (row + 1) * s.out_w - kLanes<T>);
  }
}

// Fetches the inputs some tiles further on.
template <class T>
void fetch_rows(const T* upper, const T* lower) {
  constexpr int64_t kAhead = 2048 / static_cast<int64_t>(sizeof(T));
  fetch_to_read(upper + kAhead);
  fetch_to_read(lower + kAhead);
}

// Clears what no window covers: a last column and a last row, beyond the rows [row, last) of outputs.
template <class T>
void clear_uncovered(const Pool2dShape& s, int64_t row, int64_t last, T* grad_input) {
  if (s.in_h == 2 * s.out_h && s.in_w == 2 * s.out_w) return;
  for (; row < last; ++row) {
    T* upper = grad_input + input_of_row(s, row);
    const bool ends_plane = row % s.out_h + 1 == s.out_h;
    for (int64_t iw = 2 * s.out_w; iw < s.in_w; ++iw) upper[iw] = upper[s.in_w + iw] = T{0};
    for (int64_t i = 2 * s.in_w; ends_plane && i < (s.in_h - 2 * (s.out_h - 1)) * s.in_w; ++i) upper[i] = T{0};
  }
}

template <class T>
Split split_2x2(const Pool2dShape& s, int threads) {
  return split_rows(s, s.out_h, 4 * s.out_w, kLanes<T>, threads);
}

template <class T>
Plan plan_2x2_for(const Pool2dShape& s, int threads) {
  return {1, kLanes<T>, split_2x2<T>(s, threads).tasks, 0};
}

inline Plan plan_2x2(const Pool2dShape& s, int threads) {
  return s.dtype == DType::float32 ? plan_2x2_for<float>(s, threads) : plan_2x2_for<double>(s, threads);
}

}  // namespace
