// The gather of 3x3 windows with stride 2 in nchw where lanes are not masked for nothing (without AVX-512): two rows and two columns of
// grad_input at a time. Their four elements meet two rows and two columns of windows, nine taps in all, so that each vector of outputs is
// loaded once and compared with all names that it may have; a gather step by step loads one for each tap, and its loops of one to four
// steps end at another place in every row.
//
// Outputs are copied to a stage first, some rows of a plane at a time: offsets as wide as gradients, and names that no tap has on either
// side of a row, so that all loads are of whole vectors.
#pragma once

#include "cpu/kernels/max_pool2d_backward.inl"
#include "cpu/simd/caches.h"

namespace {

// A row of staged outputs: its first window.
template <class T>
struct StagedRow {
  T* gradients;
  Int<T>* names;
};

// The first row of a stage is blank: it stands for windows above and below the plane.
template <class T>
class Stage {
 public:
  explicit Stage(const Pool2dShape& s) : out_h_(s.out_h), out_w_(s.out_w) {
    constexpr int64_t kStageBytes = kFirstCacheBytes / 2;
    const int64_t reach = ceil_div(s.in_w, 2 * kLanes<T>) * kLanes<T>;  // of the vectors that are gathered
    width_ = 1 + larger(s.out_w, reach) + 1;
    const int64_t rows_that_fit = kStageBytes / (width_ * static_cast<int64_t>(sizeof(T) + sizeof(Int<T>)));
    pairs_ = larger(1, smaller(rows_that_fit - 2, s.in_h / 2 + 1));
  }

  // Of rows of grad_input, from one filling: they meet a row of windows more.
  int64_t pairs() const { return pairs_; }
  int64_t elements() const { return (2 + pairs_) * width_; }

  void place(T* gradients, Int<T>* names) {
    gradients_ = gradients;
    names_ = names;
    for (int64_t i = 0; i < width_; ++i) names_[i] = -1;
    for (int64_t row = 1; row < 2 + pairs_; ++row) {
      Int<T>* of_row = names_ + row * width_;
      of_row[0] = -1;
      for (int64_t i = 1 + out_w_; i < width_; ++i) of_row[i] = -1;
    }
  }

  // The rows [first, last) of windows of a plane.
  template <class Offset>
  void fill(const T* gradients, const Offset* offsets, int64_t first, int64_t last) {
    first_ = larger(0, first);
    last_ = smaller(last, out_h_);
    for (int64_t out = first_; out < last_; ++out) copy(gradients + out * out_w_, offsets + out * out_w_, row(out));
  }

  StagedRow<T> row(int64_t out) const {
    const int64_t at = (out < first_ || out >= last_ ? 0 : 1 + out - first_) * width_ + 1;
    return {gradients_ + at, names_ + at};
  }

 private:
  // Whole vectors, of which the last one ends with the row.
  template <class Offset>
  void copy(const T* gradients, const Offset* offsets, StagedRow<T> to) const {
    if (out_w_ < kLanes<T>) {
      for (int64_t i = 0; i < out_w_; ++i) {
        to.gradients[i] = gradients[i];
        to.names[i] = offsets[i];
      }
      return;
    }
    const auto copy_vector = [&](int64_t i) {
      constexpr int64_t kAhead = 256;
      fetch_to_read(gradients + i + kAhead);
      store(to.gradients + i, load(gradients + i));
      store(to.names + i, load_offsets<T>(offsets + i, first_lanes<T>(kLanes<T>)));
    };
    for (int64_t i = 0; i + kLanes<T> < out_w_; i += kLanes<T>) copy_vector(i);
    copy_vector(out_w_ - kLanes<T>);
  }

  int64_t out_h_, out_w_, width_, pairs_;
  int64_t first_ = 0, last_ = 0;
  T* gradients_ = nullptr;
  Int<T>* names_ = nullptr;
};

// A vector of windows of one row, and the windows beside them that meet the same columns: the left ones without padding, else the right.
template <class T, int kPad>
class Windows {
 public:
  explicit Windows(StagedRow<T> row, int64_t q) {
    constexpr int64_t kBeside = kPad == 0 ? -1 : 1;
    gradients_ = load(row.gradients + q);
    gradients_beside_ = load(row.gradients + q + kBeside);
    names_ = load(row.names + q);
    names_beside_ = load(row.names + q + kBeside);
  }

  // Adds what the windows' row of taps brings to the columns that two windows meet (the even ones without padding, else the odd ones) and
  // to the single ones between them, in ascending order of the windows.
  template <int kRow>
  void add_to(Vec<T>& shared, Vec<T>& single) const {
    const Vec<T> by_last = named(kPad == 0 ? names_beside_ : names_, kPad == 0 ? gradients_beside_ : gradients_, 3 * kRow + 2);
    const Vec<T> by_first = named(kPad == 0 ? names_ : names_beside_, kPad == 0 ? gradients_ : gradients_beside_, 3 * kRow);
    shared = shared + by_last + by_first;
    single = single + named(names_, gradients_, 3 * kRow + 1);
  }

 private:
  static Vec<T> named(IntVec<T> names, Vec<T> gradients, int name) {
    return select(equal(names, broadcast(static_cast<Int<T>>(name))), gradients, Vec<T>{});
  }

  Vec<T> gradients_, gradients_beside_;
  IntVec<T> names_, names_beside_;
};

template <class T, int kPad>
inline void store_pairs(T* row, int64_t column, Vec<T> shared, Vec<T> single, int64_t size) {
  const Vec<T> even = kPad == 0 ? shared : single, odd = kPad == 0 ? single : shared;
  store_columns(row, column, interleave_lower<T>(even, odd), size);
  store_columns(row, column + kLanes<T>, interleave_upper<T>(even, odd), size);
}

// The row that the windows of two rows meet, and the one that the lower windows meet alone, by their middle taps. Either may be null.
template <class T, int kPad>
void gather_pair(StagedRow<T> upper, StagedRow<T> lower, T* shared_row, T* single_row, int64_t size) {
  for (int64_t q = 0; 2 * q < size; q += kLanes<T>) {
    const Windows<T, kPad> above(upper, q), below(lower, q);
    if (shared_row != nullptr) {
      Vec<T> shared{}, single{};
      above.template add_to<2>(shared, single);
      below.template add_to<0>(shared, single);
      store_pairs<T, kPad>(shared_row, 2 * q, shared, single, size);
    }
    if (single_row != nullptr) {
      Vec<T> shared{}, single{};
      below.template add_to<1>(shared, single);
      store_pairs<T, kPad>(single_row, 2 * q, shared, single, size);
    }
  }
}

// The rows [row, last) of one plane. Pair i are the rows 2 * i - pad_top and the next.
template <class T, int kPad, class Offset>
void gather_pairs_of_plane(const Pool2dShape& s, Stage<T>& stage, const T* gradients, const Offset* offsets, int64_t row, int64_t last,
                           T* grad_input) {
  const int64_t end = (last - 1 + s.pad_top) / 2 + 1;
  const auto row_or_null = [&](int64_t ih) { return ih >= row && ih < last ? grad_input + ih * s.in_w : nullptr; };
  for (int64_t first = (row + s.pad_top) / 2; first < end; first += stage.pairs()) {
    const int64_t block_end = smaller(end, first + stage.pairs());
    stage.fill(gradients, offsets, first - 1, block_end);
    for (int64_t pair = first; pair < block_end; ++pair) {
      const int64_t ih = 2 * pair - s.pad_top;
      gather_pair<T, kPad>(stage.row(pair - 1), stage.row(pair), row_or_null(ih), row_or_null(ih + 1), s.in_w);
    }
  }
}

template <class T>
size_t workspace_of_pairs(const Pool2dShape& s, int threads) {
  Carver carver(nullptr);
  carver.take<T>(Stage<T>(s).elements() * threads);
  carver.take<Int<T>>(Stage<T>(s).elements() * threads);
  return carver.used();
}

template <class T, class Offset>
void backward_by_pairs(const Pool2dShape& s, const Pool2dBuffers& b, void* workspace, int threads, const Split& split) {
  Carver carver(workspace);
  const int64_t elements = Stage<T>(s).elements(), outputs = s.out_h * s.out_w;
  T* gradients = carver.take<T>(elements * threads);
  Int<T>* names = carver.take<Int<T>>(elements * threads);
  for_each_task(s, split, threads, [&](int worker, int64_t row, int64_t last_row, int64_t, int64_t) {
    Stage<T> stage(s);
    stage.place(gradients + worker * elements, names + worker * elements);
    for (int64_t plane = row / s.in_h; row < last_row; ++plane) {
      const int64_t first = row - plane * s.in_h, last = smaller(s.in_h, last_row - plane * s.in_h);
      const T* grad_output = static_cast<const T*>(b.grad_output) + plane * outputs;
      const Offset* offsets = static_cast<const Offset*>(b.offsets) + plane * outputs;
      T* grad_input = static_cast<T*>(b.grad_input) + plane * s.in_h * s.in_w;
      const auto gather = s.pad_left == 0 ? gather_pairs_of_plane<T, 0, Offset> : gather_pairs_of_plane<T, 1, Offset>;
      gather(s, stage, grad_output, offsets, first, last, grad_input);
      row += last - first;
    }
  });
}

}  // namespace
