// forward with its operands exchanged, for 16 registers, where points are few: one pixel of some samples, or a small map in channels_last.
// The weights are what is read where it lies, as points otherwise are, and the points are what is packed. (To pack the weights for some
// points takes as long as multiplying them.)
//
// Order: as in the product, so that a sum has the same bits whichever operand is packed: fma(x, w, sum) is fma(w, x, sum), blocks of
// channels are the same, and the bias comes first. So the choice may look at the number of samples.
#pragma once

#include "cpu/kernels/conv2d_pointwise_run.inl"

namespace {

constexpr bool kExchangesOperands = kVectorRegisters < 32;
constexpr int64_t kMostExchangedTiles = 4;  // of a task, whose slice of 256 channels stays in the nearest cache

// Whether points, side by side like their channels, are so few that fewer elements are transposed: the sources and the sums of all points,
// rather than all weights.
inline bool exchanges_operands(const Product& p) {
  const bool is_one_line = p.groups == 1 && p.lines() == 1 && p.source_channel == 1 && p.dest_channel == 1 && p.weight_channel == 1;
  return kExchangesOperands && is_one_line && !p.is_empty() && p.points * (p.channels + p.outputs) < p.channels * p.outputs;
}

// Its outputs are the points.
inline Product exchanged(const Product& p) {
  Product e = p;
  e.points = e.dest_map = p.outputs, e.outputs = p.points;
  e.source_point = p.weight_output, e.source_channel = p.weight_channel;
  e.dest_point = p.dest_channel, e.dest_channel = p.dest_point;
  e.weight_output = p.source_point, e.weight_channel = p.source_channel;
  return e;
}

// In the terms of the exchanged product: a task takes some points, one slice of channels after the other, each for all outputs; the sums
// stay in scratch until its last slice. Nothing is fetched ahead: rows of weights are long, and a processor sees them coming.
template <class T>
class ExchangedRun {
  using Tile = OutputLanes<T>;

 public:
  // Of a product that is not exchanged yet.
  ExchangedRun(const Product& product, int threads)
      : p_(exchanged(product)),
        threads_(threads),
        channel_blocks_(larger(1, divide_up(p_.channels, kReductionChannels))),
        channels_(divide_up(p_.channels, channel_blocks_)),
        units_(Tile::units(p_.outputs)),
        points_(Tile::kMaxPoints * larger(1, smaller(kMostExchangedTiles, p_.points / (Tile::kMaxPoints * threads * kTasksPerThread)))),
        tasks_(divide_up(p_.points, points_)) {}

  size_t workspace_bytes() const { return static_cast<size_t>(packed_bytes<T, Tile>(p_) + threads_ * sums_bytes()); }

  void run(const T* weight, const T* input, const T* bias, T* output, void* workspace) const {
    T* const packed = static_cast<T*>(workspace);
    T* const sums = reinterpret_cast<T*>(static_cast<char*>(workspace) + packed_bytes<T, Tile>(p_));
    pack(input, packed);
    parallel_for(threads_, tasks_, [&](int worker, int64_t task) {
      const int64_t point = task * points_, points = smaller(points_, p_.points - point);
      T* const own_sums = sums + worker * sums_bytes() / static_cast<int64_t>(sizeof(T));
      begin_sums(bias, point, points, own_sums);
      for (int64_t i = 0; i < channel_blocks_; ++i) {
        add_slice(weight + point * p_.source_point + i * channels_, packed, i, points, own_sums);
      }
      write(own_sums, points, output + point);
    });
  }

 private:
  int64_t unit_sums() const { return points_ * Tile::kMaxWidth; }  // [point][output]
  int64_t sums_bytes() const { return aligned(units_ * unit_sums() * static_cast<int64_t>(sizeof(T))); }
  int64_t outputs_of(int64_t unit) const { return smaller(Tile::kMaxWidth, p_.outputs - Tile::first(p_.outputs, unit)); }
  int64_t channels_of(int64_t channel_block) const { return smaller(channels_, p_.channels - channel_block * channels_); }

  // Where the channels of a unit's outputs lie packed, from the first channel of a block on.
  int64_t packed_at(int64_t unit, int64_t channel_block) const {
    return Tile::first(p_.outputs, unit) * p_.channels + channel_block * channels_ * Tile::width(p_.outputs, unit);
  }

  void pack(const T* input, T* packed) const {
    const int team = packed_outputs<Tile>(p_) * p_.channels < kSerialPack ? 1 : threads_;
    parallel_for(team, units_ * channel_blocks_, [&](int, int64_t i) {
      const int64_t unit = i / channel_blocks_, channel_block = i % channel_blocks_;
      const T* points = input + Tile::first(p_.outputs, unit) * p_.weight_output + channel_block * channels_;
      pack_weights(points, p_.weight_output, p_.weight_channel, outputs_of(unit), channels_of(channel_block),
                   packed + packed_at(unit, channel_block), Tile::width(p_.outputs, unit));
    });
  }

  void begin_sums(const T* bias, int64_t point, int64_t points, T* sums) const {
    for (int64_t unit = 0; unit < units_; ++unit, sums += unit_sums()) {
      for (int64_t i = 0; i < points; ++i) {
        const Vec<T> first = bias != nullptr ? broadcast_from(bias + point + i) : Vec<T>{};
        for (int64_t lane = 0; lane < Tile::kMaxWidth; lane += Tile::kV) store(sums + i * Tile::kMaxWidth + lane, first);
      }
    }
  }

  void add_slice(const T* weight, const T* packed, int64_t channel_block, int64_t points, T* sums) const {
    for (int64_t unit = 0; unit < units_; ++unit, sums += unit_sums()) {
      PointwiseTile<T> tile{};
      tile.weights = tile.ahead = tile.out_ahead = packed + packed_at(unit, channel_block);
      tile.channels = channels_of(channel_block);
      tile.source_point = p_.source_point, tile.source_channel = p_.source_channel;
      tile.pitch = Tile::kMaxWidth, tile.last = Tile::kV;
      for (int64_t begin = 0, count; begin < points; begin += count) {
        count = Tile::next_tile(points - begin);
        tile.source = weight + begin * p_.source_point;
        tile.out = sums + begin * Tile::kMaxWidth;
        Tile::run(tile, Tile::width(p_.outputs, unit), count);
      }
    }
  }

  void write(const T* sums, int64_t points, T* output) const {
    for (int64_t unit = 0; unit < units_; ++unit, sums += unit_sums(), output += Tile::kMaxWidth * p_.dest_channel)
      write_planes(sums, Tile::kMaxWidth, points, outputs_of(unit), output, p_.dest_channel);
  }

  const Product p_;
  const int threads_;
  const int64_t channel_blocks_, channels_;  // a slice, as the product's
  const int64_t units_;                      // of outputs
  const int64_t points_, tasks_;             // of a task
};

}  // namespace
