// The steps of a Winograd convolution around its transforms and products, and the two schedules of _blocking.
#pragma once

#include "cpu/kernels/conv2d_direct_run.inl"
#include "cpu/kernels/conv2d_winograd_blocking.inl"
#include "cpu/kernels/conv2d_winograd_transform.inl"
#include "cpu/kernels/conv2d_winograd_write.inl"

namespace {

template <class T, int kOutputs, int kTaps, class Source, class Sink>
class WinogradRun {
 public:
  WinogradRun(const Gather& g, const Source& source, const T* weight, const T* bias, const Sink& sink, void* workspace, int threads)
      : g_(g),
        b_(make_winograd_blocking<T, kOutputs, kTaps>(g, threads)),
        scratch_(make_winograd_scratch<T, kOutputs, kTaps, Source>(g, b_)),
        stager_(source, g.h.source_size, g.w.source_size),
        weight_(weight),
        bias_(bias),
        sink_(sink),
        memory_(static_cast<char*>(workspace)),
        threads_(threads) {}

  void run() const {
    for (int64_t n = 0; n < g_.batch; ++n) suspects()[n] = 0;
    if (b_.by_units) {
      run_by_units();
    } else {
      run_by_blocks();
    }
  }

  // For every image, whether it met sums that are not finite; the first thing in the workspace.
  int32_t* suspects() const { return reinterpret_cast<int32_t*>(memory_); }

 private:
  static constexpr int kV = kLanes<T>, kAlpha = kOutputs + kTaps - 1, kPoints = kAlpha * kAlpha;
  static constexpr int kUnit = kUnitVectors * kV;
  static constexpr int kOverlap = kTaps - 1;

  T* at(int64_t offset) const { return reinterpret_cast<T*>(memory_ + offset); }
  T* own(int worker, int64_t offset) const { return at(scratch_.workers + worker * scratch_.worker_bytes + offset); }

  void run_by_blocks() const {
    parallel_for(threads_, g_.groups * b_.units * b_.channel_blocks, [&](int worker, int64_t i) {
      const int64_t channel_block = i % b_.channel_blocks, unit = i / b_.channel_blocks;
      T* const weights = at(scratch_.weights) + unit * scratch_.unit_weights + channel_block * scratch_.block_weights;
      transform_weights(worker, unit / b_.units, unit % b_.units, channel_block, weights);
    });
    const int64_t blocks = b_.blocks.count();
    parallel_for(threads_, g_.groups * blocks, [&](int worker, int64_t i) {
      const int64_t group = i / blocks;
      const TileBlock block = b_.blocks.block(i % blocks);
      T* const tiles = own(worker, scratch_.own_tiles);
      for (int64_t image = 0; image < block.images; ++image) {
        for (int64_t v = 0; v < b_.channel_vectors; ++v) transform_input(worker, group, block, image, v, tiles);
      }
      const TileRange all{0, block.tiles()};
      for (int64_t unit = 0; unit < b_.units; ++unit) {
        const T* weights = at(scratch_.weights) + (group * b_.units + unit) * scratch_.unit_weights;
        for (int64_t c = 0; c < b_.channel_blocks; ++c) multiply(worker, block, all, unit, c, weights + c * scratch_.block_weights, tiles);
        transform_output(worker, group, block, all, unit);
      }
    });
  }

  void run_by_units() const {
    T* const tiles = at(scratch_.tiles);
    const int64_t blocks = b_.blocks.count();
    for (int64_t i = 0; i < g_.groups * blocks; ++i) {
      const int64_t group = i / blocks;
      const TileBlock block = b_.blocks.block(i % blocks);
      parallel_for(threads_, block.images * b_.channel_vectors, [&](int worker, int64_t j) {
        transform_input(worker, group, block, j / b_.channel_vectors, j % b_.channel_vectors, tiles);
      });
      parallel_for(threads_, b_.units, [&](int worker, int64_t unit) { run_unit(worker, group, block, unit, tiles); });
    }
  }

  // Several strips need the weights of all channels, again and again; for one they are transformed as they are needed.
  void run_unit(int worker, int64_t group, const TileBlock& block, int64_t unit, const T* tiles) const {
    T* const weights = own(worker, scratch_.own_weights);
    const TilePanels panels(block, b_.strip_rows);
    const int64_t pitch = b_.has_one_strip() ? 0 : scratch_.block_weights;
    for (int64_t c = 0; c < b_.channel_blocks; ++c) {
      transform_weights(worker, group, unit, c, weights + c * pitch);
      if (b_.has_one_strip()) multiply(worker, block, panels.strip(0), unit, c, weights, tiles);
    }
    for (int64_t i = 0; i < panels.strips(); ++i) {
      const TileRange strip = panels.strip(i);
      for (int64_t c = 0; c < b_.channel_blocks && !b_.has_one_strip(); ++c)
        multiply(worker, block, strip, unit, c, weights + c * pitch, tiles);
      transform_output(worker, group, block, strip, unit);
    }
  }

  int64_t block_vectors() const { return ceil_div(b_.channels, kV); }
  int64_t channels_of(int64_t channel_block) const { return smaller(b_.channels, g_.channels - channel_block * b_.channels); }
  int64_t width_of(int64_t unit) const { return unit_width(g_.outputs, unit, kV); }

  // The weights of a unit and a block of channels as [point][channel][unit width], a few channels at a time.
  void transform_weights(int worker, int64_t group, int64_t unit, int64_t channel_block, T* dst) const {
    const int64_t channels = channels_of(channel_block), width = width_of(unit), outputs = smaller(width, g_.outputs - unit * kUnit);
    const T* const src = weight_ + group * g_.weight_group + unit * kUnit * g_.weight_output;
    T* const packed = own(worker, scratch_.own_packed);
    for (int64_t c = 0; c < channels; c += kPackedChannels) {
      const int64_t part = smaller(kPackedChannels, channels - c);
      const T* const first = src + (channel_block * b_.channels + c) * g_.weight_channel;
      pack_unit(g_, StepOrder{kTaps, 1, kTaps * kTaps}, first, outputs, width, part, packed);
      transform_packed(packed, part, width, dst + c * width);
    }
  }

  // Packed weights, [channel][tap][unit width].
  void transform_packed(const T* packed, int64_t channels, int64_t width, T* dst) const {
    // backward_input reads its taps backwards.
    const bool rotated = g_.h.tap_step < 0;
    const T* const first = packed + (rotated ? (kTaps * kTaps - 1) * width : 0);
    const int64_t col_pitch = rotated ? -width : width;
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t lane = 0; lane < width; lane += kV) {
        transform_filter<T, kAlpha, kTaps>(first + c * kTaps * kTaps * width + lane, kTaps * col_pitch, col_pitch, dst + c * width + lane,
                                           scratch_.point_weights);
      }
    }
  }

  // Stages one vector of channels of an image, and transforms it.
  void transform_input(int worker, int64_t group, const TileBlock& block, int64_t image, int64_t vector, T* tiles) const {
    T* const staged = own(worker, scratch_.own_staged);
    TileWindow window{};
    window.n = block.n + image, window.channel = group * g_.channels + vector * kV;
    window.lanes = static_cast<int>(smaller(kV, g_.channels - vector * kV));
    window.y = block.row * kOutputs + first_source(g_.h), window.rows = block.rows * kOutputs + kOverlap;
    window.x = block.col * kOutputs + first_source(g_.w), window.cols = block.cols * kOutputs + kOverlap;
    const int64_t pitch = window.cols * kV;
    stager_.stage(window, pitch, own(worker, scratch_.own_line), staged);
    const TilePanels panels(block, b_.strip_rows);
    int64_t tile = image * block.rows * block.cols;
    TileRange panel{};
    for (int64_t row = 0; row < block.rows; ++row) {
      for (int64_t col = 0; col < block.cols; ++col, ++tile) {
        if (tile >= panel.end) panel = panels.panel_of(tile);
        transform_input_tile<T, kAlpha>(staged + row * kOutputs * pitch + col * kOutputs * kV, pitch,
                                        tiles + place_of(panel, block.tiles(), vector) + (tile - panel.begin) * kV, scratch_.point_tiles);
      }
    }
  }

  // Where a vector of channels of a panel begins, in elements of a point's plane: [channel block][panel][vector][tile].
  int64_t place_of(const TileRange& panel, int64_t tiles, int64_t vector) const {
    const int64_t block = block_vectors(), first = vector / block * block, vectors = smaller(block, b_.channel_vectors - first);
    return (first * tiles + vectors * panel.begin + (vector - first) * panel.count()) * kV;
  }

  // The source position of the first tap of grid point 0.
  static int64_t first_source(const Axis& a) { return a.source_first + (a.tap_step < 0 ? (a.taps - 1) * a.tap_step : 0); }

  // Adds a block of channels up for a unit and the tiles of a strip.
  void multiply(int worker, const TileBlock& block, const TileRange& strip, int64_t unit, int64_t channel_block, const T* weights,
                const T* tiles) const {
    const int64_t panels = TilePanels::count(strip), width = width_of(unit), vector = channel_block * block_vectors();
    T* const sums = own(worker, scratch_.own_sums);
    Product<T> p{};
    p.channels = channels_of(channel_block);
    p.weights_step = ceil_div(width, panels);
    p.sums_pitch = strip.count() * kV;
    p.add = channel_block > 0;
    for (int64_t point = 0; point < kPoints; ++point) {
      p.weights = weights + point * scratch_.point_weights;
      for (int64_t i = 0; i < panels; ++i) {
        const TileRange panel = TilePanels::panel(strip, i);
        p.tiles = tiles + point * scratch_.point_tiles + place_of(panel, block.tiles(), vector);
        p.weights_next = p.weights + scratch_.point_weights + i * p.channels * p.weights_step;
        p.sums = sums + point * scratch_.point_sums + (panel.begin - strip.begin) * kV;
        if (width == kUnit) {
          multiply_tiles<T, kUnitVectors>(p, panel.count());
        } else {
          multiply_tiles<T, 1>(p, panel.count());
        }
      }
    }
  }

  // `strip`: whole rows of tiles.
  void transform_output(int worker, int64_t group, const TileBlock& block, const TileRange& strip, int64_t unit) const {
    const int64_t first = strip.begin / block.cols, last = strip.end / block.cols;
    for (int64_t lane = 0; lane < width_of(unit); lane += kV) {
      const T* sums = own(worker, scratch_.own_sums) + lane * strip.count();
      for (int64_t row = first; row < last; ++row, sums += block.cols * kV) {
        Vec<T> residue{};
        write_row(worker, group, block, row / block.rows, row % block.rows, unit * kUnit + lane, sums, residue);
        if (!is_zero(residue)) __atomic_store_n(suspects() + block.n + row / block.rows, 1, __ATOMIC_RELAXED);
      }
    }
  }

  static bool is_zero(Vec<T> v) {
    bool zero = true;
    for (int i = 0; i < kV; ++i) zero &= v[i] == 0;
    return zero;
  }

  // The outputs of one row of Winograd tiles and one vector of output channels.
  void write_row(int worker, int64_t group, const TileBlock& block, int64_t image, int64_t row, int64_t channel, const T* sums,
                 Vec<T>& residue) const {
    const int64_t first_channel = group * g_.outputs + channel;
    const TileRow place{
        block.n + image,      first_channel, static_cast<int>(smaller(kV, g_.outputs - channel)), (block.row + row) * kOutputs,
        block.col * kOutputs, block.cols};
    const typename Sink::Row outputs(sink_, place, own(worker, scratch_.own_outputs));
    const Vec<T> bias = bias_ == nullptr ? Vec<T>{} : load_first(bias_ + first_channel, place.lanes);
    for (int64_t col = 0; col < block.cols; ++col) {
      Vec<T> y[kOutputs][kOutputs];
      transform_output_tile<T, kAlpha, kOutputs>(sums + col * kV, scratch_.point_sums, y);
      residue += not_finite_residue(y);
      add_bias(y, bias);
      outputs.put(y, col);
    }
    outputs.finish();
  }

  static void add_bias(Vec<T> (&y)[kOutputs][kOutputs], Vec<T> bias) {
#pragma GCC unroll 4
    for (int i = 0; i < kOutputs; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kOutputs; ++j) y[i][j] += bias;
    }
  }

  // 0 where all outputs of a tile are finite, NaN where one is not: whatever was not finite in the inputs, the weights or on the way
  // reaches at least one output of the tile.
  static Vec<T> not_finite_residue(const Vec<T> (&y)[kOutputs][kOutputs]) {
    Vec<T> sum{};
#pragma GCC unroll 4
    for (int i = 0; i < kOutputs; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kOutputs; ++j) sum += y[i][j];
    }
    return sum - sum;
  }

  const Gather g_;
  const WinogradBlocking b_;
  const WinogradScratch scratch_;
  const TileStager<T, Source> stager_;
  const T* const weight_;
  const T* const bias_;
  const Sink sink_;
  char* const memory_;
  const int threads_;
};

// Plan and run with one tile. `Ends` makes the problem's gather, source and sink and names its tensors, and computes one image exactly.
template <int kOutputs, int kTaps, class Ends>
Plan plan_winograd(const Ends& ends, int threads) {
  using T = typename Ends::T;
  const Gather g = ends.gather();
  const WinogradBlocking b = make_winograd_blocking<T, kOutputs, kTaps>(g, threads);
  const size_t exact = static_cast<size_t>(suspects_bytes(g.batch)) + ends.exact_bytes(threads);
  const size_t own = static_cast<size_t>(make_winograd_scratch<T, kOutputs, kTaps, typename Ends::Source>(g, b).total(threads));
  return {kUnitVectors * kLanes<T>, kProductTiles * kOutputs * kOutputs, g.groups * (b.by_units ? b.units : b.blocks.count()),
          own > exact ? own : exact};
}

template <int kOutputs, int kTaps, class Ends>
Outcome run_winograd(const Ends& ends, void* workspace, int threads) {
  using T = typename Ends::T;
  using Sink = typename Ends::template Sink<kOutputs>;
  const Gather g = ends.gather();
  if (g.is_empty()) return Outcome::done;
  const WinogradRun<T, kOutputs, kTaps, typename Ends::Source, Sink> winograd(g, ends.source(g), ends.weight(), ends.bias(),
                                                                              ends.template sink<kOutputs>(g), workspace, threads);
  winograd.run();
  char* const exact = static_cast<char*>(workspace) + suspects_bytes(g.batch);
  for (int64_t n = 0; n < g.batch; ++n) {
    if (winograd.suspects()[n] != 0 && ends.run_exactly(n, exact, threads) == Outcome::not_finite) return Outcome::not_finite;
  }
  return Outcome::done;
}

// use(tile) with m and r of the tile that a convolution takes in a direction: tile.kOutputs, tile.kTaps.
template <int kM, int kR>
struct TileSize {
  static constexpr int kOutputs = kM, kTaps = kR;
};

template <class T, class Use>
auto with_tile(Conv2dDirection direction, const Conv2dShape& s, const Use& use) {
  if (s.kernel_h == 5) return use(TileSize<4, 5>{});
  return tile_outputs<T>(make_gather(direction, s, 0)) == 4 ? use(TileSize<4, 3>{}) : use(TileSize<2, 3>{});
}

inline Conv2dShape one_image(Conv2dShape s) {
  s.batch = 1;
  return s;
}

// p, `elements` elements later; null stays null.
template <class T>
inline const T* advanced(const void* p, int64_t elements) {
  return p == nullptr ? nullptr : static_cast<const T*>(p) + elements;
}
template <class T>
inline T* advanced(void* p, int64_t elements) {
  return p == nullptr ? nullptr : static_cast<T*>(p) + elements;
}

}  // namespace
