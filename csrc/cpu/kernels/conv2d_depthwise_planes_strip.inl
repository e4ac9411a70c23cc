// How conv2d_depthwise_planes.cpp lays maps side by side: a strip is one row of the map of a channel behind the other, of several images,
// with zeros between and around them, so that it fills whole vectors and every tap of it is a load at a fixed distance.
#pragma once

#include "cpu/kernels/conv2d_depthwise_planes.inl"

namespace {

inline int64_t floor_div(int64_t a, int64_t b) { return a < 0 ? -ceil_div(-a, b) : a / b; }
inline int64_t align_to(int64_t n, int64_t unit) { return floor_div(n + unit - 1, unit) * unit; }

// The lanes of a vector of sums that belong to one unit. Lane 0 lies (or would) so many elements behind the strip's first target of the
// row, and its source behind that one's.
struct Piece {
  int64_t target, source;
  uint32_t lanes;
};

// The columns of a strip. In the padded source column q * stride + phase is the q-th of its phase; a stride of 2 is taken apart while
// staging, so that the sources of neighbouring targets are neighbours.
struct StripColumns {
  int64_t source, target, taps;  // columns of a map; tap columns
  int64_t stride, pad, dilation;

  int64_t reach() const { return (taps - 1) * dilation; }
  // The first column of the source that belongs to the phase, and its q.
  int64_t first_source(int64_t phase) const { return ((phase - pad) % stride + stride) % stride; }
  int64_t first_q(int64_t phase) const { return floor_div(first_source(phase) + pad, stride); }
  // Lanes from a unit to the next: neither meets the other's sources.
  int64_t unit() const {
    const int64_t least_q = floor_div(pad, stride), most_q = floor_div(source - 1 + pad, stride);
    return larger(target, larger(target + reach() / stride - least_q, most_q + 1));
  }
};

// A strip of `units` maps, staged: [row][phase][lane].
template <class T>
struct StripLayout {
  int64_t lead;        // lanes before the first target's
  int64_t unit;        // lanes from a unit to the next
  int64_t phase, row;  // elements from a phase, a row to the next
  int64_t vectors;     // of targets
};

template <class T>
StripLayout<T> strip_layout(const StripColumns& c, int64_t units) {
  StripLayout<T> strip;
  strip.unit = c.unit();
  const int64_t least_q = floor_div(c.pad, c.stride), before = (units - 1) * strip.unit;
  strip.lead = align_to(least_q, kLanes<T>) - least_q;
  strip.vectors = ceil_div(before + c.target, kLanes<T>);
  const int64_t staged = least_q + 1 + align_to(ceil_div(c.source, c.stride), kLanes<T>), read = c.target + c.reach() / c.stride;
  strip.phase = align_to(strip.lead + before + larger(staged, read), kLanes<T>);
  strip.row = c.stride * strip.phase;
  return strip;
}

// Elements of a stage of `rows` rows, with what the tiles read behind it.
template <class T>
int64_t stage_size(const StripColumns& c, const StripLayout<T>& strip, int64_t rows) {
  return rows * strip.row + align_to(strip.lead + c.reach() / c.stride, kLanes<T>) + (strip.vectors + 1) * kLanes<T>;
}

// Stages `rows` rows of `columns` elements. Writes whole vectors, zeros behind the last element: what is staged next to the right comes
// later.
template <class T>
void stage_rows(const T* source, int64_t columns, int64_t rows, T* stage, int64_t stage_row) {
  const int64_t last = (columns - 1) / kLanes<T> * kLanes<T>;  // of the vectors
  const uint32_t last_bits = first_bits_of(columns - last);
  for (int64_t row = 0; row < rows; ++row, source += columns, stage += stage_row) {
    for (int64_t i = 0; i < last; i += kLanes<T>) store(stage + i, load(source + i));
    store(stage + last, load_bits(source + last, last_bits));
  }
}

// The same with a stride of 2: the row's elements at even places, and those at odd ones.
template <class T>
void stage_two_phases(const T* source, int64_t columns, int64_t rows, T* first, T* second, int64_t stage_row) {
  constexpr int64_t kBoth = 2 * kLanes<T>;
  const int64_t last = (columns - 1) / kBoth * kBoth;  // of the pairs of vectors
  const uint32_t lower = first_bits_of(smaller(columns - last, kLanes<T>)),
                 upper = first_bits_of(smaller(columns - last - kLanes<T>, kLanes<T>));
  for (int64_t row = 0; row < rows; ++row, source += columns, first += stage_row, second += stage_row) {
    for (int64_t i = 0; i < last; i += kBoth) {
      const Vec<T> a = load(source + i), b = load(source + i + kLanes<T>);
      store(first + i / 2, even_lanes<T>(a, b));
      store(second + i / 2, odd_lanes<T>(a, b));
    }
    const Vec<T> a = load_bits(source + last, lower), b = load_bits(source + last + kLanes<T>, upper);
    store(first + last / 2, even_lanes<T>(a, b));
    store(second + last / 2, odd_lanes<T>(a, b));
  }
}

// Stages `rows` rows of `units` maps, `image` elements apart, from `source` on.
template <class T>
void stage_strip(const StripColumns& c, const StripLayout<T>& strip, const T* source, int64_t image, int64_t units, int64_t rows,
                 T* stage) {
  const auto place = [&](int64_t phase) { return stage + phase * strip.phase + strip.lead + c.first_q(phase); };
  for (int64_t unit = 0; unit < units; ++unit, source += image, stage += strip.unit) {
    if (c.stride == 1) {
      stage_rows(source, c.source, rows, place(0), strip.row);
    } else {
      const int64_t phase = c.first_source(0);  // of column 0
      stage_two_phases(source, c.source, rows, place(phase), place(1 - phase), strip.row);
    }
  }
}

// The pieces of a strip's vectors, and the first of each vector. Units lie `source_image` and `target_image` elements apart.
template <class T>
void list_pieces(const StripColumns& c, const StripLayout<T>& strip, int64_t source_image, int64_t target_image, int64_t units,
                 Piece* pieces, int64_t* vector_pieces) {
  int64_t used = 0;
  for (int64_t v = 0; v < strip.vectors; ++v) {
    vector_pieces[v] = used;
    for (int64_t unit = 0; unit < units; ++unit) {
      const int64_t column = v * kLanes<T> - unit * strip.unit;  // of lane 0
      const uint32_t lanes = first_bits_of(smaller(c.target - column, kLanes<T>)) & ~first_bits_of(-column);
      if (lanes != 0) pieces[used++] = {unit * target_image + column, unit * source_image + column * c.stride, lanes};
    }
  }
  vector_pieces[strip.vectors] = used;
}

}  // namespace
