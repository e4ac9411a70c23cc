// From the sums of register tiles to the destination: a tensor, or the tensor of its pooled rectified values.
#pragma once

#include "cpu/kernels/conv2d_direct_gather.inl"
#include "cpu/simd/lanes.h"
#include "cpu/simd/transpose.h"

namespace {

using cnn_ext::kNoGradient;

// The first `count` lanes to p[0], p[stride], p[2 * stride], ...; what lies between is not touched.
#if defined(__AVX512F__)
inline void store_strided(float* p, Vec<float> v, int64_t stride, int count) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  if (stride == 2) {
    const uint32_t places = static_cast<uint32_t>((uint64_t{1} << (2 * count)) - 1) & 0x55555555u;
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>(places), interleave_lower<float>(v, v));
    _mm512_mask_storeu_ps(p + 16, static_cast<__mmask16>(places >> 16), interleave_upper<float>(v, v));
  } else {
    const __m512i index = _mm512_mullo_epi32(lane, _mm512_set1_epi32(static_cast<int>(stride)));
    _mm512_mask_i32scatter_ps(p, static_cast<__mmask16>(first_bits(count)), index, v, 4);
  }
}
inline void store_strided(double* p, Vec<double> v, int64_t stride, int count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i index = _mm256_mullo_epi32(lane, _mm256_set1_epi32(static_cast<int>(stride)));
  _mm512_mask_i32scatter_pd(p, static_cast<__mmask8>(first_bits(count)), index, v, 8);
}
#else
template <class T>
inline void store_strided(T* p, Vec<T> v, int64_t stride, int count) {
  for (int i = 0; i < count; ++i) p[i * stride] = v[i];
}
#endif

// The first `count` lanes to every stride-th place from p on: as they are, or, if they hold integers, as one byte each, side by side.
template <class T>
inline void store_items(T* p, Vec<T> v, int64_t stride, int count) {
  if (stride == 1) return store_first(p, v, count);
  store_strided(p, v, stride, count);
}
template <class T>
inline void store_items(uint8_t* p, Vec<T> v, int64_t, int count) {
  store_offsets<T>(p, (IntVec<T>)v, first_lanes<T>(count));
}

// Writes a matrix (lanes innermost, `pitch` apart) to where its rows and columns belong.
template <class T, class Out>
__attribute__((noinline)) void write_matrix(const T* src, int64_t pitch, int64_t rows, int64_t cols, Out* dst, int64_t row_stride,
                                            int64_t col_stride) {
  constexpr int kV = kLanes<T>;
  if (col_stride == 1) {
    for (int64_t i = 0; i < rows; ++i) {
      int64_t j = 0;
      for (; j + kV <= cols; j += kV) store_items<T>(dst + i * row_stride + j, load(src + i * pitch + j), 1, kV);
      if (j < cols) store_items<T>(dst + i * row_stride + j, load(src + i * pitch + j), 1, static_cast<int>(cols - j));
    }
  } else if (sizeof(Out) == sizeof(T) && col_stride < row_stride) {  // every col_stride-th element of a row
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; j += kV) {
        store_items<T>(dst + i * row_stride + j * col_stride, load(src + i * pitch + j), col_stride,
                       static_cast<int>(cols - j < kV ? cols - j : kV));
      }
    }
  } else {
    for (int64_t j = 0; j < cols; j += kV) {
      for (int64_t i = 0; i < rows; i += kV) {
        const int items = static_cast<int>(rows - i < kV ? rows - i : kV);
        Vec<T> square[kV];
#pragma GCC unroll 16
        for (int k = 0; k < kV; ++k) square[k] = k < items ? load(src + (i + k) * pitch + j) : Vec<T>{};
        transpose<T>(square);
#pragma GCC unroll 16
        for (int k = 0; k < kV; ++k) {
          if (j + k < cols) store_items<T>(dst + (j + k) * col_stride + i * row_stride, square[k], row_stride, items);
        }
      }
    }
  }
}

// Writes `count` elements, of `even` and `odd` in turn.
template <class T>
inline void interleave_rows(const T* even, const T* odd, int64_t count, T* dst) {
  constexpr int kV = kLanes<T>;
  for (int64_t i = 0; i < count; i += 2 * kV) {
    const Vec<T> a = load(even + i / 2), b = load(odd + i / 2);
    const int64_t left = count - i;
    store_first(dst + i, interleave_lower<T>(a, b), static_cast<int>(left < kV ? left : kV));
    if (left > kV) store_first(dst + i + kV, interleave_upper<T>(a, b), static_cast<int>(left < 2 * kV ? left - kV : kV));
  }
}

template <class T>
inline void transpose_square(const T* src, int64_t pitch, int64_t rows, T* square) {
  constexpr int kV = kLanes<T>;
  Vec<T> lanes[kV];
#pragma GCC unroll 16
  for (int k = 0; k < kV; ++k) lanes[k] = k < rows ? load(src + k * pitch) : Vec<T>{};
  transpose<T>(lanes);
#pragma GCC unroll 16
  for (int k = 0; k < kV; ++k) store(square + k * kV, lanes[k]);
}

// Writes two matrices [point][channel] as rows of `points` elements for each channel: points of `even` and `odd` in turn.
template <class T>
__attribute__((noinline)) void interleave_matrices(const T* even, const T* odd, int64_t pitch, int64_t points, int64_t channels, T* dst,
                                                   int64_t channel_stride) {
  constexpr int kV = kLanes<T>;
  alignas(kVectorBytes) T even_square[kV * kV], odd_square[kV * kV];
  for (int64_t j = 0; j < channels; j += kV) {
    for (int64_t i = 0; i < points; i += 2 * kV) {
      const int64_t left = points - i, at = i / 2 * pitch + j;
      transpose_square(even + at, pitch, (left + 1) / 2, even_square);
      transpose_square(odd + at, pitch, left / 2, odd_square);
      for (int64_t k = 0; k < kV && j + k < channels; ++k) {
        interleave_rows(even_square + k * kV, odd_square + k * kV, left < 2 * kV ? left : 2 * kV, dst + (j + k) * channel_stride + i);
      }
    }
  }
}

// The sums of one unit of output channels for the grid points of a task, [image][row][column][width] (width = `pitch`).
template <class T>
struct UnitSums {
  const T* sums;
  int64_t pitch, images, rows, cols;
  int64_t outputs;           // channels that exist
  int64_t n, channel, y, x;  // of the first in the destination
};

// A destination that takes each tile's sums as soon as they are complete.
template <class T>
struct TensorSink {
  static constexpr bool kTakesUnits = false;
  TensorSink(const Gather& g, T* data, bool rectifies)
      : grid{g.dest.n, g.dest.c, g.dest.h * g.h.dest_step, g.dest.w * g.w.dest_step},
        origin(data + g.h.dest_first * g.dest.h + g.w.dest_first * g.dest.w),
        relu(rectifies) {}

  T* point(int64_t n, int64_t channel, int64_t y, int64_t x) const {
    return origin + n * grid.n + channel * grid.c + y * grid.h + x * grid.w;
  }

  Strides grid;  // from grid point to grid point
  T* origin;     // grid point 0
  bool relu;
};

// Unpadded max pooling of the rectified sums: [pooled row][pooled column] sees window_h x window_w grid points every stride_h x stride_w.
struct PoolWindow {
  int64_t height, width, stride_h, stride_w;
};

// The maximum of a pooling window, candidate by candidate: the first of equals, the last NaN.
template <class T>
class WindowMaximum {
 public:
  explicit WindowMaximum(Vec<T> first) : value_(first) {}

  void meet(Vec<T> candidate, IntVec<T> offset) {
    const auto wins = greater(candidate, value_) | is_nan(candidate);
    value_ = select(wins, candidate, value_);
    offset_ = select(wins, offset, offset_);
  }

  Vec<T> rectified_value() const { return select(passes(), value_, Vec<T>{}); }
  // The offset of the maximum, or kNoGradient.
  IntVec<T> mask() const { return select(passes(), offset_, IntVec<T>{} + kNoGradient); }

 private:
  auto passes() const { return greater(value_, Vec<T>{}) | is_nan(value_); }

  Vec<T> value_;
  IntVec<T> offset_{};
};

// A destination that takes a unit's sums for all grid points of a task, and keeps of each window the maximum and, if asked, the offset of
// the first one in the window.
template <class T>
struct PoolSink {
  static constexpr bool kTakesUnits = true;
  static constexpr bool relu = false;  // pooling first leaves less to rectify
  static constexpr int kV = kLanes<T>;

  void write(const UnitSums<T>& unit, T* scratch) const {
    const int64_t rows = (unit.rows - window.height) / window.stride_h + 1, cols = (unit.cols - window.width) / window.stride_w + 1;
    T* values = scratch;
    T* places = scratch + rows * cols * unit.pitch;
    const int64_t row_sums = unit.cols * unit.pitch;
    for (int64_t image = 0; image < unit.images; ++image) {
      const T* sums = unit.sums + image * unit.rows * row_sums;
      for (int64_t y = 0; y < rows; ++y) {
        for (int64_t x = 0; x < cols; ++x) {
          const int64_t at = (y * cols + x) * unit.pitch;
          pool(sums + y * window.stride_h * row_sums + x * window.stride_w * unit.pitch, row_sums, unit.pitch, values + at, places + at);
        }
      }
      const int64_t corner = (unit.n + image) * strides.n + unit.channel * strides.c + unit.y / window.stride_h * strides.h +
                             unit.x / window.stride_w * strides.w;
      write_plane(values, unit, rows, cols, output + corner);
      if (offsets != nullptr) write_plane(places, unit, rows, cols, offsets + corner);
    }
  }

  T* output;
  uint8_t* offsets;  // null: not asked for
  Strides strides;
  PoolWindow window;

 private:
  // One window, for all channels of the unit.
  void pool(const T* sums, int64_t row_sums, int64_t pitch, T* value, T* place) const {
    for (int64_t c = 0; c < pitch; c += kV) {
      WindowMaximum<T> maximum(load(sums + c));
      IntVec<T> offset{};
      for (int64_t r = 0; r < window.height; ++r) {
        for (int64_t s = 0; s < window.width; ++s) {
          maximum.meet(load(sums + r * row_sums + s * pitch + c), offset);
          offset += 1;
        }
      }
      store(value + c, maximum.rectified_value());
      store(place + c, (Vec<T>)maximum.mask());
    }
  }

  // The pooled points of one image, [row][column][pitch], to `dst`; rows that follow each other there are written as one.
  template <class Out>
  void write_plane(const T* src, const UnitSums<T>& unit, int64_t rows, int64_t cols, Out* dst) const {
    const bool dense = strides.h == cols * strides.w;
    const int64_t runs = dense ? 1 : rows, run = dense ? rows * cols : cols;
    for (int64_t i = 0; i < runs; ++i) {
      write_matrix(src + i * run * unit.pitch, unit.pitch, run, unit.outputs, dst + i * strides.h, strides.w, strides.c);
    }
  }
};

}  // namespace
