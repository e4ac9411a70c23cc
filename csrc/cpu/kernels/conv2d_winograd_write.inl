// From the outputs of Winograd tiles, a row of tiles and a vector of channels at a time, to the destination: a tensor, or the tensor of its
// pooled rectified values.
#pragma once

#include "cpu/kernels/conv2d_direct_write.inl"

namespace {

// Where a row of tiles belongs: image, the channels of a vector that exist, the first output, and how many tiles there are.
struct TileRow {
  int64_t n, channel;
  int lanes;
  int64_t y, x, tiles;
};

// Both destinations: Row(destination, place, scratch) begins a row, put() takes a tile of outputs in registers, finish() ends the row.
// Scratch holds the outputs of a row of tiles.

// A tensor: tiles are written to it as they come where its channels are innermost, and otherwise by way of scratch.
template <class T, int kOutputs>
struct TileTensorSink {
  static constexpr int kV = kLanes<T>;

  TileTensorSink(const Gather& g, T* tensor, bool rectifies)
      : data(tensor), strides(g.dest), height(g.h.count), width(g.w.count), relu(rectifies) {}

  class Row {
   public:
    Row(const TileTensorSink& sink, const TileRow& place, T* scratch)
        : sink_(sink),
          height_(smaller(kOutputs, sink.height - place.y)),
          width_(smaller(place.tiles * kOutputs, sink.width - place.x)),
          lanes_(place.lanes),
          dest_(sink.data + place.n * sink.strides.n + place.channel * sink.strides.c + place.y * sink.strides.h +
                place.x * sink.strides.w),
          staged_(sink.strides.c != 1) {
      first_ = staged_ ? scratch : dest_;
      row_pitch_ = staged_ ? width_ * kV : sink.strides.h, col_pitch_ = staged_ ? kV : sink.strides.w;
    }

    void put(const Vec<T> (&y)[kOutputs][kOutputs], int64_t tile) const {
      const int64_t width = smaller(kOutputs, width_ - tile * kOutputs), row_pitch = row_pitch_, col_pitch = col_pitch_;
      const int lanes = staged_ ? kV : lanes_;
      T* const place = first_ + tile * kOutputs * col_pitch;
      if (height_ == kOutputs && width == kOutputs && lanes == kV) {
#pragma GCC unroll 4
        for (int i = 0; i < kOutputs; ++i) {
#pragma GCC unroll 4
          for (int j = 0; j < kOutputs; ++j) store(place + i * row_pitch + j * col_pitch, final_value(y[i][j]));
        }
        return;
      }
#pragma GCC unroll 4
      for (int i = 0; i < kOutputs; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < kOutputs; ++j) {
          if (i < height_ && j < width) store_first(place + i * row_pitch + j * col_pitch, final_value(y[i][j]), lanes);
        }
      }
    }

    void finish() const {
      if (!staged_) return;
      const Strides& s = sink_.strides;
      if (width_ == s.h) {  // whole rows: one run
        write_matrix(first_, kV, height_ * width_, lanes_, dest_, 1, s.c);
      } else {
        for (int64_t i = 0; i < height_; ++i) write_matrix(first_ + i * row_pitch_, kV, width_, lanes_, dest_ + i * s.h, 1, s.c);
      }
    }

   private:
    Vec<T> final_value(Vec<T> v) const { return sink_.relu ? rectified<T>(v) : v; }

    const TileTensorSink& sink_;
    const int64_t height_, width_;  // outputs that exist
    const int lanes_;
    T* const dest_;
    const bool staged_;
    T* first_;
    int64_t row_pitch_, col_pitch_;
  };

  T* data;
  Strides strides;
  int64_t height, width;
  bool relu;
};

// The pooled tensor of 2x2 windows with stride 2, which never reach over the edge of a tile.
template <class T, int kOutputs>
struct TilePoolSink {
  static constexpr int kV = kLanes<T>, kWindows = kOutputs / 2;

  class Row {
   public:
    Row(const TilePoolSink& sink, const TileRow& place, T* scratch)
        : sink_(sink),
          place_(place),
          height_(smaller(kWindows, sink.height - place.y / 2)),
          width_(smaller(place.tiles * kWindows, sink.width - place.x / 2)),
          row_pitch_(place.tiles * kWindows * kV),
          values_(scratch),
          offsets_(scratch + kWindows * row_pitch_) {}

    void put(const Vec<T> (&y)[kOutputs][kOutputs], int64_t tile) const {
#pragma GCC unroll 2
      for (int i = 0; i < kWindows; ++i) {
#pragma GCC unroll 2
        for (int j = 0; j < kWindows; ++j) {
          WindowMaximum<T> maximum(y[2 * i][2 * j]);
          maximum.meet(y[2 * i][2 * j + 1], IntVec<T>{} + 1);
          maximum.meet(y[2 * i + 1][2 * j], IntVec<T>{} + 2);
          maximum.meet(y[2 * i + 1][2 * j + 1], IntVec<T>{} + 3);
          const int64_t at = i * row_pitch_ + (tile * kWindows + j) * kV;
          store(values_ + at, maximum.rectified_value());
          store(offsets_ + at, (Vec<T>)maximum.mask());
        }
      }
    }

    void finish() const {
      const Strides& s = sink_.strides;
      for (int64_t i = 0; i < height_; ++i) {
        const int64_t corner = place_.n * s.n + place_.channel * s.c + (place_.y / 2 + i) * s.h + place_.x / 2 * s.w;
        write_matrix(values_ + i * row_pitch_, kV, width_, place_.lanes, sink_.output + corner, s.w, s.c);
        if (sink_.offsets == nullptr) continue;
        write_matrix(offsets_ + i * row_pitch_, kV, width_, place_.lanes, sink_.offsets + corner, s.w, s.c);
      }
    }

   private:
    const TilePoolSink& sink_;
    const TileRow place_;
    const int64_t height_, width_;  // pooled outputs that exist
    const int64_t row_pitch_;
    T* const values_;
    T* const offsets_;
  };

  T* output;
  uint8_t* offsets;  // null: not asked for
  Strides strides;
  int64_t height, width;  // pooled
};

}  // namespace
