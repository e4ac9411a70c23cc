// A 1x1 convolution without padding is a product of matrices: for every point, outputs = weights x channels. forward and backward_input
// are the same product with input and output exchanged and the weights transposed. So is a layer whose kernel covers its whole input: its
// input is one point, with every element of a sample for a channel.
//
// Points lie on lines of equal distances: a whole image, or all images where channels are innermost, and a row where a stride leaves
// gaps. backward_input of a strided layer writes the points that forward reads; the others of grad_input are zero.
#pragma once

#include "core/shapes.h"
#include "cpu/simd/vec.h"

namespace {

using cnn_ext::Conv2dDirection;
using cnn_ext::Conv2dShape;
using cnn_ext::Layout;

struct Product {
  int64_t groups;
  int64_t channels, outputs;     // of a group: those that are summed over, those that are computed
  int64_t images, rows, points;  // lines = images * rows, and the points of a line
  // Distances in elements.
  int64_t source_image, source_row, source_point, source_channel;
  int64_t dest_image, dest_row, dest_point, dest_channel;
  int64_t weight_group, weight_output, weight_channel;
  int64_t dest_map;    // elements of a plane of the destination
  bool dest_has_gaps;  // between its points, which are to be zeros

  int64_t lines() const { return images * rows; }
  int64_t source_line(int64_t line) const { return line / rows * source_image + line % rows * source_row; }
  int64_t dest_line(int64_t line) const { return line / rows * dest_image + line % rows * dest_row; }
  // Rather than channels side by side.
  bool writes_planes() const { return dest_channel != 1; }
  // From the point `point` of a line to where the next line begins, or the plane ends.
  int64_t dest_until_next(int64_t line, int64_t point) const {
    const int64_t row = line % rows;
    return (row + 1 < rows ? dest_row : dest_map - row * dest_row) - point * dest_point;
  }
  bool is_empty() const { return groups * outputs * lines() * points == 0; }
};

inline bool is_pointwise(const Conv2dShape& s) {
  const auto fits = [](int64_t in, int64_t out, int64_t stride) { return (out - 1) * stride < in; };
  return s.kernel_h == 1 && s.kernel_w == 1 && s.pad_top == 0 && s.pad_left == 0 && fits(s.in_h, s.out_h, s.stride_h) &&
         fits(s.in_w, s.out_w, s.stride_w);
}

// Whether the kernel sees the whole input, once and without padding, and both lie in the same order.
inline bool covers_input(const Conv2dShape& s) {
  const bool same_order = s.layout == s.weight_layout || s.in_channels == 1 || s.in_h * s.in_w == 1;
  return s.groups == 1 && s.out_h == 1 && s.out_w == 1 && s.kernel_h == s.in_h && s.kernel_w == s.in_w && s.pad_top == 0 &&
         s.pad_left == 0 && s.dilation_h == 1 && s.dilation_w == 1 && same_order;
}

// With 16 registers: whether a layer cuts its input into patches (stride = kernel, no padding: patch embeddings and downsampling) in
// channels_last. There a row of a patch is a run of kernel_w * in_channels elements, as are the channels of a point, in a product of its
// own for each row of the kernel (make_patch_row_product).
constexpr bool kHasPatchRows = kVectorRegisters < 32;
inline bool cuts_patches(const Conv2dShape& s) {
  return kHasPatchRows && s.groups == 1 && s.layout == Layout::nhwc && s.weight_layout == Layout::nhwc && s.kernel_h * s.kernel_w > 1 &&
         s.stride_h == s.kernel_h && s.stride_w == s.kernel_w && s.dilation_h == 1 && s.dilation_w == 1 && s.pad_top == 0 &&
         s.pad_left == 0 && s.in_h == s.out_h * s.kernel_h && s.in_w == s.out_w * s.kernel_w && !covers_input(s);
}

// Whether the sums of a run are added to what the destination holds. (A base, which is nothing where there are no rows of patches.)
template <bool kMayAdd>
struct Adding {
  static constexpr bool adds = false;
};
template <>
struct Adding<true> {
  bool adds = false;
};

// The same layer, where its kernel covers its input, as a 1x1 convolution of one pixel.
inline Conv2dShape on_one_pixel(Conv2dShape s) {
  s.in_channels *= s.in_h * s.in_w;
  s.in_h = s.in_w = s.kernel_h = s.kernel_w = s.stride_h = s.stride_w = 1;
  return s;
}

constexpr int64_t kWholePlane = 256;  // points of a planar map that is not cut, so that it lies in one piece

// Whether a stride leaves gaps between the points that are read of planes. With 16 registers these are copied without the gaps, and all
// their rows, dest_row points each, are one line: rows are so short that many tiles of one would have few points.
constexpr bool kClosesGaps = kVectorRegisters < 32;
inline bool closes_gaps(const Product& p) {
  const bool reads_gaps = p.source_channel != 1 && p.source_point != 1, writes_rows = p.dest_point == 1 && p.dest_row > 1;
  return kClosesGaps && reads_gaps && writes_rows;
}

// Whether the gaps between points that are written of planes are filled with zeros on the way. With 16 registers all rows of such a plane,
// source_row points each, are one line, too (its source has no gaps).
inline bool fills_gaps(const Product& p) { return p.dest_has_gaps && p.writes_planes(); }

// The shortest description: rows without gaps become one line, and so do images. Gaps in planes are filled row by row.
inline void join_lines(Product& p) {
  if (closes_gaps(p) || (kClosesGaps && fills_gaps(p))) {
    p.points *= p.rows;
    p.rows = 1;
    return;
  }
  if (fills_gaps(p)) return;
  if (p.source_row == p.points * p.source_point && p.dest_row == p.points * p.dest_point) {
    p.points *= p.rows;
    p.rows = 1;
  }
  if (p.rows > 1) return;
  if (p.points == 1) {  // channels side by side, whatever the layout
    p.source_point = p.source_image, p.dest_point = p.dest_image;
  }
  if (p.source_image == p.points * p.source_point && p.dest_image == p.points * p.dest_point) {
    p.points *= p.images;
    p.images = 1;
  }
}

// From forward to backward_input.
inline void exchange(Product& p) {
  const Product f = p;
  p.channels = f.outputs, p.outputs = f.channels;
  p.source_image = f.dest_image, p.source_row = f.dest_row, p.source_point = f.dest_point, p.source_channel = f.dest_channel;
  p.dest_image = f.source_image, p.dest_row = f.source_row, p.dest_point = f.source_point, p.dest_channel = f.source_channel;
  p.weight_output = f.weight_channel, p.weight_channel = f.weight_output;
}

inline Product make_product(Conv2dDirection direction, const Conv2dShape& shape) {
  const Conv2dShape s = covers_input(shape) ? on_one_pixel(shape) : shape;
  const bool nchw = s.layout == Layout::nchw, forward = direction == Conv2dDirection::forward;
  const int64_t group_in = s.in_channels / s.groups, group_out = s.out_channels / s.groups;
  const int64_t in_pixel = nchw ? 1 : s.in_channels, in_channel = nchw ? s.in_h * s.in_w : 1;
  const int64_t out_pixel = nchw ? 1 : s.out_channels, out_channel = nchw ? s.out_h * s.out_w : 1;
  Product p{};
  p.groups = s.groups, p.images = s.batch, p.rows = s.out_h, p.points = s.out_w;
  p.channels = group_in, p.outputs = group_out;
  p.source_image = s.in_channels * s.in_h * s.in_w, p.source_channel = in_channel;
  p.source_row = s.stride_h * s.in_w * in_pixel, p.source_point = s.stride_w * in_pixel;
  p.dest_image = s.out_channels * s.out_h * s.out_w, p.dest_channel = out_channel;
  p.dest_row = s.out_w * out_pixel, p.dest_point = out_pixel;
  p.weight_group = group_out * group_in, p.weight_output = group_in, p.weight_channel = 1;
  if (!forward) {
    exchange(p);
    p.dest_has_gaps = s.out_h * s.out_w < s.in_h * s.in_w;
  }
  p.dest_map = forward ? s.out_h * s.out_w : s.in_h * s.in_w;
  join_lines(p);
  return p;
}

// Of a layer that cuts_patches(), what one row of the patches has to do with the output: the first one's, from whose places those of row r
// lie r rows of the input and r runs of the weight away. In forward the sums of all rows are added up.
inline Product make_patch_row_product(Conv2dDirection direction, const Conv2dShape& s) {
  const int64_t run = s.kernel_w * s.in_channels;
  Product p{};
  p.groups = 1, p.images = s.batch, p.rows = s.out_h, p.points = s.out_w;
  p.channels = run, p.outputs = s.out_channels;
  p.source_image = s.in_h * s.out_w * run, p.source_row = s.kernel_h * s.out_w * run, p.source_point = run, p.source_channel = 1;
  p.dest_image = s.out_h * s.out_w * s.out_channels, p.dest_row = s.out_w * s.out_channels, p.dest_point = s.out_channels;
  p.dest_channel = 1;
  p.weight_output = s.kernel_h * run, p.weight_channel = 1;
  if (direction != Conv2dDirection::forward) exchange(p);
  p.dest_map = direction == Conv2dDirection::forward ? s.out_h * s.out_w : s.in_h * s.in_w;
  join_lines(p);
  return p;
}

}  // namespace
