// grad_weight by Winograd's algorithm: F(r x r, m x m) has the r x r taps for outputs and m x m outputs of the convolution for a filter,
//   grad_weight[k, c] = sum over tiles of A^T [(G dy G^T) * (B^T d B)] A          * elementwise
// with the same points, and so the same B, as forward has with the same alpha = m + r - 1.
//
// A job sums one range of output channels times one range of input channels over one range of blocks of tiles, as in
// conv2d_backward_weight_split.inl, and shares nothing with other jobs. Of each block it stages and transforms both tensors; then, for
// every unit of output channels and kPartChannels input channels, the products of each point are a matrix product [outputs x tiles] x
// [tiles x inputs], and what they sum up to is transformed back and added to the taps, [unit][tap][input channel][output channel]. So the
// transformed sums, alpha^2 for r^2 taps, stay in the second cache.
//
// Register tile: 2 vectors of output channels x 8 (4) input channels: 16 (8) sums are enough to hide the latency of the additions, and
// divide a vector, as 14 (6) would not.
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/conv2d_backward_weight_split.inl"
#include "cpu/kernels/conv2d_backward_weight_write.inl"
#include "cpu/kernels/conv2d_winograd_blocking.inl"
#include "cpu/kernels/conv2d_winograd_transform.inl"
#include "cpu/parallel.h"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

constexpr int64_t kTileBytes = 1 << 20;  // of a block's transformed tensors: with the sums beside them they stay in the second cache
constexpr int64_t kPartChannels = 32;    // input channels whose transformed sums are kept

template <class T>
constexpr int kEntries = kVectorRegisters == 32 && kLanes<T> >= 8 ? 8
                         : kLanes<T> < 4                          ? kLanes<T>
                                                                  : 4;

// sums[entry][vector] = the products of a point, added up over tiles: outputs [tile][kVectors][lane], inputs [tile][lane] from the first
// entry on. What the next point reads lies `next_outputs` and `next_inputs` elements further on, and is fetched ahead.
template <class T, int kVectors>
void multiply_over_tiles(const T* outputs, const T* inputs, int64_t tiles, int64_t next_outputs, int64_t next_inputs, T* sums) {
  constexpr int kV = kLanes<T>;
  Vec<T> sum[kEntries<T>][kVectors] = {};
  for (const T* const end = inputs + tiles * kV; inputs != end; inputs += kV, outputs += kVectors * kV) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) __builtin_prefetch(outputs + next_outputs + v * kV);
    __builtin_prefetch(inputs + next_inputs);
    Vec<T> output[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) output[v] = load(outputs + v * kV);
#pragma GCC unroll 8
    for (int e = 0; e < kEntries<T>; ++e) {
      const Vec<T> input = broadcast_from(inputs + e);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[e][v] = fma(input, output[v], sum[e][v]);
    }
  }
#pragma GCC unroll 8
  for (int e = 0; e < kEntries<T>; ++e) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(sums + (e * kVectors + v) * kV, sum[e][v]);
  }
}

// What a shape costs in cycles of one core, two products in each: see winograd_cost.
constexpr double kTransformCycles = 4;  // of a vector, for each point

template <class T>
struct WeightCost {
  int64_t points, tiles;  // of a tile; of a batch

  // Tiles of a block, of which a job of so many channels in all transforms both tensors.
  int64_t block_tiles(int64_t channels) const {
    return at_least_1(smaller(tiles, kTileBytes / (channels * points * static_cast<int64_t>(sizeof(T)))));
  }

  double operator()(const Work& w, const Split& split) const {
    const double out_vectors = static_cast<double>(ceil_div(w.group_out, kLanes<T>));
    const double in_vectors = static_cast<double>(ceil_div(w.group_in, kLanes<T>)), group_in = static_cast<double>(w.group_in);
    const int64_t channels = ceil_div(w.out_blocks, split.out_ranges) * w.out_block + ceil_div(w.in_blocks, split.in_ranges) * kLanes<T>;
    const double products = 0.5 * out_vectors * group_in;
    const double back = kTransformCycles * out_vectors * group_in / static_cast<double>(block_tiles(channels));
    const double transforms =
        kTransformCycles * (in_vectors * static_cast<double>(split.out_ranges) + out_vectors * static_cast<double>(split.in_ranges));
    const double work = static_cast<double>(w.groups * tiles * points) * (products + back + transforms);
    const int64_t jobs = w.groups * split.out_ranges * split.in_ranges * split.pixel_ranges;
    const double sums = static_cast<double>(w.groups * w.out_blocks * w.out_block * w.group_in * w.taps * split.pixel_ranges);
    return work * static_cast<double>(divide_up(jobs, kPlannedTeam)) / static_cast<double>(jobs) + 0.5 * sums;
  }
};

template <class T, int kOutputs, int kTaps, class Gradient>
class WinogradWeight {
 public:
  explicit WinogradWeight(const Conv2dShape& s) : s_(s), work_(work_of(s)) {
    const int64_t tiles = s.batch * ceil_div(s.out_h, kOutputs) * ceil_div(s.out_w, kOutputs);
    const WeightCost<T> cost{kPoints, at_least_1(tiles)};
    split_ = cheapest_split(work_, cost, kPartialBytes);
    max_units_ = divide_up(work_.out_blocks, split_.out_ranges), max_vectors_ = divide_up(work_.in_blocks, split_.in_ranges);
    const int64_t fitting = cost.block_tiles(max_units_ * work_.out_block + max_vectors_ * kV);
    fit_tile_blocks(s.batch, s.out_h, s.out_w, kOutputs, blocks_,
                    [&] { return blocks_.tiles() <= fitting && blocks_.count() >= split_.pixel_ranges; });
    split_.pixel_ranges = larger(1, smaller(split_.pixel_ranges, blocks_.count()));
    outputs_pitch_ = plane_vectors(max_units_ * kUnitVectors * blocks_.tiles()) * kV;
    inputs_pitch_ = plane_vectors(max_vectors_ * blocks_.tiles()) * kV;
    sums_pitch_ = plane_vectors(kPartChannels * kUnitVectors) * kV;
  }

  Plan plan(int threads) const {
    return {kUnit, kOutputs * kOutputs, jobs(), static_cast<size_t>((shared_elements() + threads * worker_elements()) * element())};
  }

  Outcome run(const Gradient& gradient, const T* input, T* grad_weight, void* workspace, int threads) const {
    if (s_.batch == 0) {
      fill_zeros(grad_weight, s_.out_channels * work_.group_in * work_.taps);
      return Outcome::done;
    }
    T* const shared = static_cast<T*>(workspace);
    const TensorSource<T> source{input, dense_strides(s_.layout, s_.in_channels, s_.in_h, s_.in_w)};
    const Stagers stagers{{gradient, s_.out_h, s_.out_w}, {source, s_.in_h, s_.in_w}};
    int finite = 1;
    parallel_for(threads, jobs(), [&](int worker, int64_t job) {
      T* const own = shared + shared_elements() + worker * worker_elements();
      T* const taps = split_.pixel_ranges > 1 ? shared + job * taps_elements() : own + scratch_elements();
      if (!run_job(stagers, job, own, taps)) __atomic_store_n(&finite, 0, __ATOMIC_RELAXED);
      if (split_.pixel_ranges == 1) write(grad_weight, job, taps);
    });
    if (split_.pixel_ranges > 1) {
      parallel_for(threads, jobs() / split_.pixel_ranges,
                   [&](int, int64_t job) { write(grad_weight, job, shared + job * taps_elements()); });
    }
    return finite ? Outcome::done : Outcome::not_finite;
  }

 private:
  static constexpr int kV = kLanes<T>, kAlpha = kOutputs + kTaps - 1, kPoints = kAlpha * kAlpha, kUnit = kUnitVectors * kV;

  struct Stagers {
    TileStager<T, Gradient> outputs;
    TileStager<T, TensorSource<T>> inputs;
  };

  // The channels of a job: units and vectors [begin, end) of a group's output and input channels.
  struct Channels {
    int64_t group;
    Range units, vectors;
  };

  static constexpr int64_t element() { return sizeof(T); }

  static Work work_of(const Conv2dShape& s) {
    const int64_t group_out = s.out_channels / s.groups, group_in = s.in_channels / s.groups;
    return {s.groups,      s.batch, ceil_div(s.out_h, kOutputs), ceil_div(s.out_w, kOutputs), group_out, group_in,
            kTaps * kTaps, kUnit,   divide_up(group_out, kUnit), divide_up(group_in, kV),     0,         element()};
  }

  int64_t jobs() const { return work_.groups * split_.out_ranges * split_.in_ranges * split_.pixel_ranges; }

  // Scratch, in elements and whole vectors: transformed outputs and inputs of a block, sums of a part, staged positions of a vector.
  int64_t staged_elements() const { return (blocks_.rows * kOutputs + kTaps - 1) * (blocks_.cols * kOutputs + kTaps - 1) * kV; }
  int64_t line_elements() const { return TileStager<T, Gradient>::line_elements(blocks_.rows * kOutputs, rounded_up(s_.out_w, kV)); }
  int64_t scratch_elements() const {
    return kPoints * (outputs_pitch_ + inputs_pitch_ + sums_pitch_) + staged_elements() + line_elements();
  }
  int64_t taps_elements() const { return max_units_ * kUnit * max_vectors_ * kV * work_.taps; }
  int64_t worker_elements() const { return scratch_elements() + (split_.pixel_ranges > 1 ? 0 : taps_elements()); }
  int64_t shared_elements() const { return split_.pixel_ranges > 1 ? jobs() * taps_elements() : 0; }

  // Job = ((pixel range * groups + group) * out_ranges + output range) * in_ranges + input range.
  Channels channels_of(int64_t job) const {
    const int64_t in = job % split_.in_ranges, out = job / split_.in_ranges % split_.out_ranges;
    return {job / (split_.in_ranges * split_.out_ranges) % work_.groups, part_of(work_.out_blocks, split_.out_ranges, out),
            part_of(work_.in_blocks, split_.in_ranges, in)};
  }
  Range blocks_of(int64_t job) const {
    return part_of(blocks_.count(), split_.pixel_ranges, job / (split_.in_ranges * split_.out_ranges * work_.groups));
  }

  int64_t width_of(int64_t unit) const { return unit_width(work_.group_out, unit, kV); }
  int64_t inputs_of(const Channels& c) const { return smaller(work_.group_in, c.vectors.end * kV) - c.vectors.begin * kV; }
  // Where a unit's taps begin among those of its job.
  int64_t taps_of(const Channels& c, int64_t unit) const { return (unit - c.units.begin) * kUnit * inputs_of(c) * work_.taps; }

  bool run_job(const Stagers& stagers, int64_t job, T* scratch, T* taps) const {
    const Channels channels = channels_of(job);
    T* const outputs = scratch;
    T* const inputs = outputs + kPoints * outputs_pitch_;
    T* const sums = inputs + kPoints * inputs_pitch_;
    T* const staged = sums + kPoints * sums_pitch_;
    T* const line = staged + staged_elements();
    for (int64_t i = 0; i < taps_elements(); i += kV) store(taps + i, Vec<T>{});
    Vec<T> residue{};
    const Range range = blocks_of(job);
    for (int64_t i = range.begin; i < range.end; ++i) {
      const TileBlock block = blocks_.block(i);
      for (int64_t unit = channels.units.begin; unit < channels.units.end; ++unit) {
        transform_outputs(stagers, channels, block, unit, line, staged, outputs);
      }
      for (int64_t v = channels.vectors.begin; v < channels.vectors.end; ++v) {
        transform_inputs(stagers, channels, block, v, staged, inputs + (v - channels.vectors.begin) * block.tiles() * kV);
      }
      for (int64_t unit = channels.units.begin; unit < channels.units.end; ++unit) {
        const T* unit_outputs = outputs + (unit - channels.units.begin) * block.tiles() * kUnit;
        if (width_of(unit) == kUnit) {
          add_unit<kUnitVectors>(channels, block, unit_outputs, inputs, sums, taps + taps_of(channels, unit), residue);
        } else {
          add_unit<1>(channels, block, unit_outputs, inputs, sums, taps + taps_of(channels, unit), residue);
        }
      }
    }
    return is_zero(residue);
  }

  static bool is_zero(Vec<T> v) {
    bool zero = true;
    for (int i = 0; i < kV; ++i) zero &= v[i] == 0;
    return zero;
  }

  // A unit's tiles, as [point][tile][width].
  void transform_outputs(const Stagers& stagers, const Channels& channels, const TileBlock& block, int64_t unit, T* line, T* staged,
                         T* outputs) const {
    const int64_t width = width_of(unit);
    T* const first = outputs + (unit - channels.units.begin) * block.tiles() * kUnit;
    for (int64_t lane = 0; lane < width; lane += kV) {
      const int64_t channel = unit * kUnit + lane;
      const int lanes = static_cast<int>(smaller(kV, work_.group_out - channel));
      for (int64_t image = 0; image < block.images; ++image) {
        const TileWindow window{block.n + image,
                                channels.group * work_.group_out + channel,
                                lanes,
                                block.row * kOutputs,
                                block.rows * kOutputs,
                                block.col * kOutputs,
                                block.cols * kOutputs};
        const int64_t pitch = window.cols * kV;
        stagers.outputs.stage(window, pitch, line, staged);
        T* dst = first + image * block.rows * block.cols * width + lane;
        for (int64_t row = 0; row < block.rows; ++row) {
          for (int64_t col = 0; col < block.cols; ++col, dst += width) {
            transform_filter<T, kAlpha, kOutputs>(staged + row * kOutputs * pitch + col * kOutputs * kV, pitch, kV, dst, outputs_pitch_);
          }
        }
      }
    }
  }

  // A vector's tiles, as [point][tile][lane].
  void transform_inputs(const Stagers& stagers, const Channels& channels, const TileBlock& block, int64_t vector, T* staged, T* dst) const {
    const int lanes = static_cast<int>(smaller(kV, work_.group_in - vector * kV));
    for (int64_t image = 0; image < block.images; ++image) {
      const TileWindow window{block.n + image,
                              channels.group * work_.group_in + vector * kV,
                              lanes,
                              block.row * kOutputs - s_.pad_top,
                              block.rows * kOutputs + kTaps - 1,
                              block.col * kOutputs - s_.pad_left,
                              block.cols * kOutputs + kTaps - 1};
      const int64_t pitch = window.cols * kV;
      stagers.inputs.stage(window, pitch, nullptr, staged);
      for (int64_t row = 0; row < block.rows; ++row) {
        for (int64_t col = 0; col < block.cols; ++col, dst += kV) {
          transform_input_tile<T, kAlpha>(staged + row * kOutputs * pitch + col * kOutputs * kV, pitch, dst, inputs_pitch_);
        }
      }
    }
  }

  // Adds a block of tiles to the taps of a unit, [tap][input channel][kVectors][lane].
  template <int kVectors>
  void add_unit(const Channels& channels, const TileBlock& block, const T* outputs, const T* inputs, T* sums, T* taps,
                Vec<T>& residue) const {
    constexpr int64_t kEntry = kVectors * kV;
    const int64_t count = inputs_of(channels), tiles = block.tiles();
    for (int64_t first = 0; first < count; first += kPartChannels) {
      const int64_t part = smaller(kPartChannels, count - first);
      for (int64_t point = 0; point < kPoints; ++point) {
        for (int64_t c = 0; c < part; c += kEntries<T>) {
          const int64_t channel = first + c;
          const T* vector = inputs + point * inputs_pitch_ + channel / kV * tiles * kV + channel % kV;
          multiply_over_tiles<T, kVectors>(outputs + point * outputs_pitch_, vector, tiles, outputs_pitch_, inputs_pitch_,
                                           sums + point * sums_pitch_ + c * kEntry);
        }
      }
      for (int64_t c = 0; c < part; ++c) {
        for (int64_t lane = 0; lane < kEntry; lane += kV) {
          Vec<T> tap[kTaps][kTaps];
          transform_output_tile<T, kAlpha, kTaps>(sums + c * kEntry + lane, sums_pitch_, tap);
          add_taps(tap, taps + (first + c) * kEntry + lane, count * kEntry, residue);
        }
      }
    }
  }

  // `residue` stays 0 while all taps are finite. Whatever was not finite in the tensors or on the way reaches at least one of them.
  static void add_taps(const Vec<T> (&tap)[kTaps][kTaps], T* taps, int64_t pitch, Vec<T>& residue) {
    Vec<T> all{};
#pragma GCC unroll 8
    for (int r = 0; r < kTaps; ++r) {
#pragma GCC unroll 8
      for (int s = 0; s < kTaps; ++s, taps += pitch) {
        const Vec<T> sum = load(taps) + tap[r][s];
        all += sum;
        store(taps, sum);
      }
    }
    residue += all - all;
  }

  void write(T* grad_weight, int64_t job, const T* taps) const {
    const Channels channels = channels_of(job);
    const int64_t first_in = channels.vectors.begin * kV, out_channel = work_.group_in * work_.taps;
    for (int64_t unit = channels.units.begin; unit < channels.units.end; ++unit) {
      const int64_t width = width_of(unit);
      for (int64_t lane = 0; lane < width; lane += kV) {
        const int64_t channel = unit * kUnit + lane;
        const SumsBlock<T> block{taps + taps_of(channels, unit) + lane,
                                 inputs_of(channels) * width,
                                 width,
                                 split_.pixel_ranges,
                                 jobs() / split_.pixel_ranges * taps_elements(),
                                 work_.taps,
                                 inputs_of(channels),
                                 grad_weight + (channels.group * work_.group_out + channel) * out_channel +
                                     first_in * (s_.weight_layout == Layout::nchw ? work_.taps : 1),
                                 out_channel,
                                 static_cast<int>(smaller(kV, work_.group_out - channel))};
        write_sums(block, s_.weight_layout, work_.group_in);
      }
    }
  }

  static void fill_zeros(T* p, int64_t count) {
    for (int64_t i = 0; i < count; ++i) p[i] = T{0};
  }

  Conv2dShape s_;
  Work work_;
  Split split_;
  TileBlocks blocks_{};
  int64_t max_units_, max_vectors_;                    // of a job at most
  int64_t outputs_pitch_, inputs_pitch_, sums_pitch_;  // from a point to the next: elements
};

// What an image costs, in vector operations: see winograd_cost. Every tile pays a share of transforming its block's sums back.
constexpr int64_t kBackShare = 4;

template <class T>
int64_t winograd_weight_cost(const Conv2dShape& s, int64_t outputs) {
  const int64_t alpha = outputs + s.kernel_h - 1, tiles = ceil_div(s.out_h, outputs) * ceil_div(s.out_w, outputs);
  const int64_t group_in = s.in_channels / s.groups, in_vectors = ceil_div(group_in, kLanes<T>);
  const int64_t out_vectors = ceil_div(s.out_channels / s.groups, kLanes<T>);
  const int64_t products = rounded_up(group_in, kEntries<T>) * out_vectors;
  return alpha * alpha * tiles * (products + products / kBackShare + kTransformCost * (in_vectors + out_vectors));
}

// m of F(r x r, m x m).
template <class T>
int64_t weight_tile_outputs(const Conv2dShape& s) {
  return s.kernel_h == 3 && winograd_weight_cost<T>(s, 2) <= winograd_weight_cost<T>(s, 4) ? 2 : 4;
}

template <class T>
bool weight_pays(const Conv2dShape& s) {
  const int64_t terms = s.out_h * s.out_w * s.kernel_h * s.kernel_w;
  const int64_t direct = terms * (s.in_channels / s.groups) * ceil_div(s.out_channels / s.groups, kLanes<T>);
  return 5 * winograd_weight_cost<T>(s, weight_tile_outputs<T>(s)) < 4 * direct;
}

// Whether backward_weight is served.
inline bool winograd_serves_weight(const Conv2dShape& s) { return is_winograd_problem(s) && weight_pays<float>(s); }

// use(WinogradWeight<T, ...>(s)) with the tile of a shape; the gradient is read from a Gradient.
template <class T, class Gradient, class Use>
auto with_weight_tile(const Conv2dShape& s, const Use& use) {
  if (s.kernel_h == 5) return use(WinogradWeight<T, 4, 5, Gradient>(s));
  return weight_tile_outputs<T>(s) == 4 ? use(WinogradWeight<T, 4, 3, Gradient>(s)) : use(WinogradWeight<T, 2, 3, Gradient>(s));
}

}  // namespace
}  // namespace cnn_ext::cpu::CNN_EXT_ISA
