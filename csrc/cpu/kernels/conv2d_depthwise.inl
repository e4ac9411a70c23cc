// What the depthwise kernels share. Each channel is convolved by itself, so a vector holds one channel in each lane, kLanes neighbouring
// ones: a channel block. A block of rows is staged as [row][column][lane] with zeros around it; nchw is transposed on the way in and out,
// nhwc copied. From there on layouts, padding, and maps narrower than a vector make no difference.
#pragma once

#include "cpu/kernel.h"
#include "cpu/parallel.h"
#include "cpu/simd/lanes.h"
#include "cpu/simd/pieces.h"

namespace {

using cnn_ext::Conv2dBuffers;
using cnn_ext::Conv2dDirection;
using cnn_ext::Conv2dShape;
using cnn_ext::DType;
using cnn_ext::Layout;
using cnn_ext::cpu::Conv2dKernel;
using cnn_ext::cpu::Isa;
using cnn_ext::cpu::Outcome;
using cnn_ext::cpu::Plan;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t align_64(int64_t bytes) { return (bytes + 63) / 64 * 64; }

inline int64_t multiplier_of(const Conv2dShape& s) { return s.out_channels / s.groups; }
inline int64_t taps_of(const Conv2dShape& s) { return s.kernel_h * s.kernel_w; }

// Fewer channels than half a vector leave more lanes idle than the other kernels do.
inline bool accepts_depthwise(const Conv2dShape& s) {
  const int lanes = s.dtype == DType::float32 ? kLanes<float> : kLanes<double>;
  return (s.dtype == DType::float32 || s.dtype == DType::float64) && s.groups > 1 && s.groups == s.in_channels && 2 * s.groups >= lanes;
}

// One axis of the gather. Target t has the phase (t + target_pad) % phases and the place q = (t + target_pad) / phases; tap k, if it
// belongs to the phase, reads source position q * source_step + offset(k, phase).
struct Axis {
  int64_t source, target, taps;
  int64_t stride, pad, dilation;
  bool forward;

  int64_t phases() const { return forward ? 1 : stride; }
  int64_t source_step() const { return forward ? stride : 1; }
  int64_t target_pad() const { return forward ? 0 : pad; }
  int64_t phase(int64_t t) const { return (t + target_pad()) % phases(); }
  int64_t place(int64_t t) const { return (t + target_pad()) / phases(); }
  bool has_tap(int64_t k, int64_t phase) const { return forward || k * dilation % stride == phase; }
  int64_t offset(int64_t k, int64_t phase) const { return forward ? k * dilation - pad : -((k * dilation - phase) / stride); }
  // The source positions that the targets [t, last) read, unclipped.
  int64_t first_source(int64_t t) const { return place(t) * source_step() + (forward ? -pad : -((taps - 1) * dilation / stride)); }
  int64_t last_source(int64_t last) const { return place(last - 1) * source_step() + (forward ? (taps - 1) * dilation - pad : 0) + 1; }
};

// nhwc tensors in float32 of at least a vector of channels, one output channel each: what the kernels without a stage take. With avx2, tall
// kernels are faster from a stage, of which a tile of two rows loads half as much, side by side (31x31: 1.6 times).
inline bool accepts_depthwise_channels(const Conv2dShape& s) {
  constexpr int64_t kTallRows = 15;
  return accepts_depthwise(s) && s.dtype == DType::float32 && s.layout == Layout::nhwc && multiplier_of(s) == 1 &&
         s.groups >= kLanes<float> && (kVectorBytes != 32 || s.kernel_h < kTallRows);
}

// nhwc tensors in float32 of at least a vector of channels in groups of 2, 4 or 8, as many outputs as inputs.
inline bool accepts_grouped_channels(const Conv2dShape& s) {
  if (s.dtype != DType::float32 || s.layout != Layout::nhwc) return false;
  const int64_t lanes = kLanes<float>, group = s.in_channels / s.groups;
  return s.groups > 1 && s.in_channels == s.out_channels && s.in_channels >= lanes && group <= lanes &&
         (group == 2 || group == 4 || group == 8);
}

// Keeps the compiler from knowing how a pointer came about: it would otherwise hold a sum for every pixel of a tile in a register, spill
// most of them and load each from the stack, where base + index * scale + displacement of a load costs nothing.
template <class T>
inline void hide_origin(T& pointer) {
  asm("" : "+r"(pointer));
}

// Keeps a loaded vector in a register: GCC otherwise loads it again for each of its uses, which at an odd address costs two loads each.
template <class V>
inline void keep_loaded(V& v) {
  asm("" : "+" CNN_EXT_VECTOR_REGISTER(v));
}

// The channels first + i * step, i < count <= lanes, of one image of a tensor of height x width maps.
template <class T>
struct ChannelBlock {
  T* image;
  int64_t first, step, count;
  int64_t channels, height, width;
  Layout layout;
};

// A rectangle of a staged tensor: rows of `columns` pixels of kLanes channels each, whose first pixel is (row, column) of the tensor.
template <class T>
struct Stage {
  T* data;
  int64_t row, column;  // may lie before the tensor
  int64_t rows, columns;
  T* at(int64_t r, int64_t c) const { return data + ((r - row) * columns + (c - column)) * kLanes<T>; }
};

// Few pixels most often, for which GCC's call of memset would take longer.
template <class T>
void clear_pixels(T* first, int64_t count) {
  for (T* last = first + count * kLanes<T>; first < last; first += kLanes<T>) {
    hide_origin(first);
    store(first, Vec<T>{});
  }
}

// Zeros for the pixels of the stage outside the tensor.
template <class T>
void clear_border(const Stage<T>& stage, int64_t height, int64_t width) {
  const int64_t left = smaller(stage.columns, larger(0, -stage.column));
  const int64_t right = smaller(stage.columns, larger(left, width - stage.column));
  for (int64_t r = stage.row; r < stage.row + stage.rows; ++r) {
    T* row = stage.at(r, stage.column);
    const bool inside = r >= 0 && r < height;
    clear_pixels(row, inside ? left : stage.columns);
    if (inside) clear_pixels(row + right * kLanes<T>, stage.columns - right);
  }
}

// One vector of the channels of one pixel.
template <class T>
Vec<T> load_pixel(const ChannelBlock<const T>& b, int64_t pixel) {
  const T* p = b.image + pixel * b.channels + b.first;
  const LaneSet lanes = first_lanes<T>(b.count);
  return b.step == 1 ? load_lanes(p, lanes, Vec<T>{}) : load_strided(p, b.step, lanes, Vec<T>{});
}

template <class T>
void store_pixel(const ChannelBlock<T>& b, int64_t pixel, Vec<T> v) {
  T* p = b.image + pixel * b.channels + b.first;
  if (b.step == 1) return store_lanes(p, v, first_lanes<T>(b.count));
  for (int64_t i = 0; i < b.count; ++i) p[i * b.step] = v[i];
}

// The nchw maps of a block's channels. A lane without a channel repeats the last one.
template <class T>
struct BlockMaps {
  T* map[kLanes<T>];
  explicit BlockMaps(const ChannelBlock<T>& b) {
    const int64_t plane = b.height * b.width, step = b.step * plane;
    T* next = b.image + b.first * plane;
    for (int i = 0; i < kLanes<T>; ++i) {
      map[i] = next;
      if (i + 1 < b.count) next += step;
    }
  }
};

// Calls piece(i) with the starts of pieces that cover [0, count): the last one is moved back to end with it. Too few for a piece are left
// to single(i).
template <class T, class Piece, class Single>
void for_each_piece(int64_t count, const Piece& piece, const Single& single) {
  for (int64_t i = 0; count < kPieceLanes<T> && i < count; ++i) single(i);
  for (int64_t i = 0; count >= kPieceLanes<T> && i < count; i += kPieceLanes<T>) piece(smaller(i, count - kPieceLanes<T>));
}

// Copies `count` neighbouring pixels, from `pixel` on, and transposes them to one vector per pixel.
template <class T>
void stage_pixels(const BlockMaps<const T>& maps, int64_t pixel, int64_t count, T* stage) {
  const auto piece = [&](int64_t i) {
    Vec<T> vectors[kPieceLanes<T>];
#pragma GCC unroll 4
    for (int j = 0; j < kPieceLanes<T>; ++j) vectors[j] = load_pieces<T>(maps.map + j, pixel + i);
    transpose_pieces<T>(vectors);
#pragma GCC unroll 4
    for (int j = 0; j < kPieceLanes<T>; ++j) store(stage + (i + j) * kLanes<T>, vectors[j]);
  };
  const auto single = [&](int64_t i) {
    for (int lane = 0; lane < kLanes<T>; ++lane) stage[i * kLanes<T> + lane] = maps.map[lane][pixel + i];
  };
  for_each_piece<T>(count, piece, single);
}

// The way back. Lanes are stored in descending order, so that those without a channel come before the last channel, which they repeat.
template <class T>
void write_pixels(const T* stage, int64_t count, const BlockMaps<T>& maps, int64_t pixel) {
  const auto piece = [&](int64_t i) {
    Vec<T> vectors[kPieceLanes<T>];
#pragma GCC unroll 4
    for (int j = 0; j < kPieceLanes<T>; ++j) vectors[j] = load(stage + (i + j) * kLanes<T>);
    transpose_pieces<T>(vectors);
    store_pieces<T>(vectors, maps.map, pixel + i);
  };
  const auto single = [&](int64_t i) {
    for (int lane = kLanes<T> - 1; lane >= 0; --lane) maps.map[lane][pixel + i] = stage[i * kLanes<T> + lane];
  };
  for_each_piece<T>(count, piece, single);
}

template <class T>
void stage_rows_nchw(const ChannelBlock<const T>& b, const Stage<T>& stage, int64_t first_row, int64_t last_row) {
  const BlockMaps<const T> maps(b);
  const int64_t first = larger(0, stage.column), last = smaller(b.width, stage.column + stage.columns);
  for (int64_t r = first_row; r < last_row; ++r) {
    stage_pixels(maps, r * b.width + first, last - first, stage.at(r, first));
  }
}

template <class T>
void stage_rows_nhwc(const ChannelBlock<const T>& b, const Stage<T>& stage, int64_t first_row, int64_t last_row) {
  const int64_t first = larger(0, stage.column), last = smaller(b.width, stage.column + stage.columns);
  for (int64_t r = first_row; r < last_row; ++r) {
    for (int64_t c = first; c < last; ++c) store(stage.at(r, c), load_pixel(b, r * b.width + c));
  }
}

// Fills the stage from the tensor, zeros where it reaches outside.
template <class T>
void fill_stage(const ChannelBlock<const T>& b, const Stage<T>& stage) {
  clear_border(stage, b.height, b.width);
  const int64_t first_row = larger(0, stage.row), last_row = smaller(b.height, stage.row + stage.rows);
  (b.layout == Layout::nchw ? stage_rows_nchw<T> : stage_rows_nhwc<T>)(b, stage, first_row, last_row);
}

// Writes a stage that covers whole rows of the tensor.
template <class T>
void write_stage(const Stage<T>& stage, const ChannelBlock<T>& b) {
  const int64_t first_pixel = stage.row * b.width, pixels = stage.rows * b.width;
  if (b.layout == Layout::nhwc) {
    for (int64_t p = 0; p < pixels; ++p) store_pixel(b, first_pixel + p, load(stage.data + p * kLanes<T>));
    return;
  }
  write_pixels(stage.data, pixels, BlockMaps<T>(b), first_pixel);
}

// A product with 0 is NaN for an infinity or a NaN, else 0.
template <class T>
bool is_finite(Vec<T> v) {
  const auto nan = is_nan(v * broadcast(T{0}));
#if defined(__AVX512F__)
  return nan == 0;
#else
  bool finite = true;
  for (int i = 0; i < kLanes<T>; ++i) finite = finite && nan[i] == 0;
  return finite;
#endif
}

template <class T>
bool holds_finite_values(const Stage<T>& stage) {
  Vec<T> sum{};
  for (int64_t i = 0; i < stage.rows * stage.columns; ++i) sum = fma(load(stage.data + i * kLanes<T>), broadcast(T{0}), sum);
  return is_finite<T>(sum);
}

}  // namespace
