// The loops around a register tile: what both tiles (channels or pixels in the lanes) and both directions share, up to a table row's
// functions.
#pragma once

#include "cpu/kernels/conv2d_direct_blocking.inl"
#include "cpu/kernels/conv2d_direct_pack.inl"
#include "cpu/packed.h"
#include "cpu/parallel.h"

namespace {

using cnn_ext::Conv2dBuffers;
using cnn_ext::cpu::Outcome;
using cnn_ext::cpu::Packed;
using cnn_ext::cpu::PackedForm;

constexpr int64_t kSerialPack = 1 << 14;     // weights
constexpr int64_t kNearWeights = 512 << 10;  // bytes

template <class T, class Tile, class Source, class Sink>
class GatherRun {
 public:
  GatherRun(const Gather& g, const Source& source, const T* weight, const T* bias, const Sink& sink, Packed packed, void* workspace,
            int threads)
      : g_(g),
        b_(make_blocking<T, Tile>(g, threads)),
        scratch_(make_scratch<T, Tile, Source, Sink>(g, b_)),
        leaves_out_columns_(leaves_out_columns(g)),
        layout_(staged_layout<T>(g, b_.channels, b_.rows, b_.cols)),
        source_(source),
        weight_(weight),
        bias_(bias),
        sink_(sink),
        memory_(static_cast<char*>(workspace)),
        packed_(static_cast<T*>(packed.data != nullptr ? packed.data : workspace)),
        packs_in_tasks_(packed.data == nullptr && scratch_.packs_in_tasks),
        is_packed_(packed.is_ready),
        threads_(threads) {}

  Outcome run() const {
    if (!is_packed_ && !packs_in_tasks_) pack_all();
    if (!is_finite_) return Outcome::not_finite;
    pack_bias();
    fill_offsets(g_, layout_, b_.channels, offsets(0));
    fill_offsets(g_, layout_, channels_of(b_.channel_blocks - 1), offsets(b_.channel_blocks - 1));
    parallel_for(threads_, b_.tasks, [&](int worker, int64_t task) { run_task(worker, task); });
    return is_finite_ ? Outcome::done : Outcome::not_finite;
  }

 private:
  static constexpr int64_t kSize = sizeof(T);

  T* packed_bias() const { return reinterpret_cast<T*>(memory_ + scratch_.bias); }
  T* own_weights(int worker) const { return reinterpret_cast<T*>(memory_ + scratch_.workers + worker * scratch_.worker_bytes); }
  T* staged(int worker) const { return own_weights(worker) + scratch_.weights_bytes / kSize; }
  T* sums(int worker) const { return staged(worker) + scratch_.staged_bytes / kSize; }
  T* line(int worker) const { return sums(worker) + scratch_.sums_bytes / kSize; }
  T* pooled(int worker) const { return line(worker) + Source::line_elements(g_); }

  // Those of the last block of channels, which may be smaller, are kept apart.
  int32_t* offsets(int64_t channel_block) const {
    const bool last = channel_block == b_.channel_blocks - 1;
    return reinterpret_cast<int32_t*>(memory_ + scratch_.offsets) + (last ? b_.channels * g_.taps() : 0);
  }

  // Of the steps of a block of channels, those of the taps that a tile needs.
  void choose_steps(TileTask<T>& tile, const T* weights, const TapRange& rows, const TapRange& cols, int64_t block, int64_t width) const {
    const int64_t channels = channels_of(block), row_steps = g_.w.taps * channels;
    const int64_t chosen = rows.count() == 0 ? 0 : cols.count() * channels;  // of a tap row
    const bool all = chosen == row_steps;
    tile.runs = all ? 1 : rows.count(), tile.run_steps = all ? rows.count() * row_steps : chosen, tile.gap = row_steps - chosen;
    const int64_t first = rows.begin * row_steps + cols.begin * channels;
    tile.weights = weights + first * width, tile.offsets = offsets(block) + first;
  }

  int64_t channels_of(int64_t channel_block) const { return clamp(g_.channels - channel_block * b_.channels, 0, b_.channels); }

  // The output channels of a unit that exist.
  int64_t outputs_of(int64_t unit) const { return clamp(g_.outputs - Tile::first(g_.outputs, unit), 0, Tile::width(g_.outputs, unit)); }

  T* packed_weights(int64_t group, int64_t unit, int64_t channel_block) const {
    return packed_ + group * scratch_.group_weights + Tile::first(g_.outputs, unit) * g_.terms() +
           channel_block * b_.channels * g_.taps() * Tile::width(g_.outputs, unit);
  }

  void pack(int64_t group, int64_t unit, int64_t channel_block, T* packed) const {
    const T* src = weight_ + group * g_.weight_group + Tile::first(g_.outputs, unit) * g_.weight_output +
                   channel_block * b_.channels * g_.weight_channel;
    if (!pack_unit(g_, src, outputs_of(unit), Tile::width(g_.outputs, unit), channels_of(channel_block), packed))
      __atomic_store_n(&is_finite_, false, __ATOMIC_RELAXED);
  }

  void pack_all() const {
    const int64_t units = Tile::units(g_.outputs);
    const int team = g_.groups * scratch_.group_weights < kSerialPack ? 1 : threads_;
    parallel_for(team, g_.groups * units * b_.channel_blocks, [&](int, int64_t i) {
      const int64_t channel_block = i % b_.channel_blocks, unit = i / b_.channel_blocks % units, group = i / b_.channel_blocks / units;
      pack(group, unit, channel_block, packed_weights(group, unit, channel_block));
    });
  }

  void pack_bias() const {
    for (int64_t group = 0; group < g_.groups; ++group) {
      T* dst = packed_bias() + group * scratch_.group_bias;
      for (int64_t k = 0; k < scratch_.group_bias; ++k) dst[k] = bias_ != nullptr && k < g_.outputs ? bias_[group * g_.outputs + k] : T(0);
    }
  }

  // A task's place: which images, group, units and block of the grid.
  struct Place {
    int64_t group, n, images, y, rows, x, cols, unit, unit_end;
  };

  static void place_pieces(const Pieces& axis, int64_t pieces, int64_t block, int64_t& first, int64_t& count) {
    first = block * pieces * axis.step, count = axis.points(smaller(axis.count - block * pieces, pieces));
  }

  Place place_of(int64_t task) const {
    Place p{};
    const auto next = [&task](int64_t blocks) {
      const int64_t block = task % blocks;
      task /= blocks;
      return block;
    };
    p.unit = next(b_.unit_blocks) * b_.units, p.unit_end = smaller(p.unit + b_.units, Tile::units(g_.outputs));
    place_pieces(g_.cols, b_.col_pieces, next(b_.col_blocks), p.x, p.cols);
    place_pieces(g_.rows, b_.row_pieces, next(b_.row_blocks), p.y, p.rows);
    p.group = next(g_.groups);
    p.n = task * b_.images, p.images = smaller(g_.batch - p.n, b_.images);
    return p;
  }

  void run_task(int worker, int64_t task) const {
    const Place p = place_of(task);
    for (int64_t block = 0; block < b_.channel_blocks; ++block) {
      stage_images(worker, p, block);
      Ahead<T> ahead = source_ahead(task, p, block);
      for (int64_t unit = p.unit; unit < p.unit_end; ++unit) run_unit(worker, p, block, unit, ahead, weights_ahead(task, p, block, unit));
    }
  }

  StageTask stage_task(const Place& p, int64_t channel_block) const {
    StageTask block{};
    block.n = p.n;
    block.channel = p.group * g_.channels + channel_block * b_.channels;
    block.channels = channels_of(channel_block);
    block.rows = p.rows;
    block.first_row = p.y * g_.h.source_step + g_.h.source_first - window_of(g_.h, 1).tap_origin;
    block.first_col = p.x * g_.w.source_step + g_.w.source_first - window_of(g_.w, 1).tap_origin;
    return block;
  }

  void stage_images(int worker, const Place& p, int64_t channel_block) const {
    StageTask block = stage_task(p, channel_block);
    for (int64_t i = 0; i < p.images; ++i, ++block.n) {
      stage(g_, layout_, block, source_, line(worker), staged(worker) + i * layout_.image_pitch);
    }
  }

  // What will be staged next: this task's next block of channels or, as a thread most often runs neighbouring tasks, the task behind it.
  Ahead<T> source_ahead(int64_t task, const Place& p, int64_t channel_block) const {
    const bool stays = channel_block + 1 < b_.channel_blocks;
    if (!stays && task + 1 == b_.tasks) return {};
    const Place next = stays ? p : place_of(task + 1);
    Ahead<T> ahead = source_.ahead(g_, layout_, stage_task(next, stays ? channel_block + 1 : 0), next.images);
    ahead.share_out((p.unit_end - p.unit) * tiles_of(p));
    return ahead;
  }

  // The packed weights that will be read next; few of them stay in the second cache in any case.
  Ahead<T> weights_ahead(int64_t task, const Place& p, int64_t channel_block, int64_t unit) const {
    if (packs_in_tasks_ || g_.groups * scratch_.group_weights * kSize <= kNearWeights) return {};
    Place next = p;
    if (unit + 1 < p.unit_end) {
      next.unit = unit + 1;
    } else if (++channel_block == b_.channel_blocks) {
      if (task + 1 == b_.tasks) return {};
      next = place_of(task + 1), channel_block = 0;
    }
    const int64_t terms = channels_of(channel_block) * g_.taps();
    Ahead<T> ahead(packed_weights(next.group, next.unit, channel_block), terms * Tile::width(g_.outputs, next.unit));
    ahead.share_out(tiles_of(p));
    return ahead;
  }

  // Tiles of a unit, about.
  int64_t tiles_of(const Place& p) const {
    return p.images * ceil_div(p.rows, Tile::rows(Tile::kMaxWidth, p.cols, p.rows)) * Tile::tiles(p.cols);
  }

  // The sums of more than a tile are kept while blocks of channels are added to them, and for a sink that takes units.
  bool keeps_sums() const { return b_.channel_blocks > 1 || Sink::kTakesUnits; }

  // How a unit's sums get to their destination.
  enum class Writing {
    in_scratch,  // not yet, or by a sink that takes units
    in_place,    // tiles store them there: the lanes are innermost there too
    by_tiles,    // from scratch, tile by tile
    by_units     // from scratch, when all of a unit's are complete
  };

  Writing writing_of(int64_t channel_block, int64_t unit) const {
    if constexpr (Sink::kTakesUnits) {
      return Writing::in_scratch;
    } else {
      if (channel_block + 1 < b_.channel_blocks) return Writing::in_scratch;
      const Strides& grid = sink_.grid;
      const bool lanes_are_inner = Tile::kChannelsInner ? grid.c == 1 && Tile::width(g_.outputs, unit) == outputs_of(unit) : grid.w == 1;
      if (lanes_are_inner) return Writing::in_place;
      return Tile::kChannelsInner && keeps_sums() ? Writing::by_units : Writing::by_tiles;
    }
  }

  // Sums up one block of channels for one unit of output channels.
  void run_unit(int worker, const Place& p, int64_t channel_block, int64_t unit, Ahead<T>& source, Ahead<T> next_weights) const {
    const int64_t width = Tile::width(g_.outputs, unit), row_sums = Tile::row_sums(width, p.cols), tiles = Tile::tiles(p.cols);
    const int64_t channel = p.group * g_.outputs + Tile::first(g_.outputs, unit);
    const int64_t pitch = Tile::kChannelsInner ? width : Tile::kMaxPoints, outputs = outputs_of(unit);
    if (packs_in_tasks_) pack(p.group, unit, channel_block, own_weights(worker));
    const T* weights = packs_in_tasks_ ? own_weights(worker) : packed_weights(p.group, unit, channel_block);
    T* sums_of_unit = sums(worker) + (b_.channel_blocks > 1 ? (unit - p.unit) * unit_sums<Tile>(b_) : 0);
    const Writing writing = writing_of(channel_block, unit);
    TileTask<T> tile{};
    tile.row_step = g_.h.source_step * layout_.row_pitch;
    tile.bias = channel_block == 0 ? packed_bias() + p.group * scratch_.group_bias + Tile::first(g_.outputs, unit) : nullptr;
    const bool rectifies = sink_.relu && channel_block + 1 == b_.channel_blocks;
    for (int64_t image = 0; image < p.images; ++image) {
      const T* staged_image = staged(worker) + image * layout_.image_pitch;
      int64_t rows = 0;
      for (int64_t y = 0; y < p.rows; y += rows) {
        rows = Tile::rows(width, p.cols, p.rows - y);
        const TapRange tap_rows = taps_inside(g_.h, p.y + y, rows);
        choose_steps(tile, weights, tap_rows, {0, g_.w.taps}, channel_block, width);
        int64_t x = 0;
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t end = Tile::tile_begin(p.cols, t + 1), cols = end - x;
          if (leaves_out_columns_) choose_steps(tile, weights, tap_rows, taps_inside(g_.w, p.x + x, cols), channel_block, width);
          tile.staged = staged_image + y * tile.row_step + x;
          tile.out = sums_of_unit, tile.pitch = pitch, tile.row_pitch = Tile::row_sums(width, cols), tile.last = kLanes<T>;
          if (keeps_sums()) tile.out += (image * p.rows + y) * row_sums + x * width, tile.row_pitch = row_sums;
          if (Tile::kChannelsInner && tile.bias != nullptr) {
            tile.before = tile.bias;
          } else {
            tile.before = tile.out, tile.before_pitch = tile.pitch, tile.before_row_pitch = tile.row_pitch;
          }
          tile.weights_ahead = next_weights.next(tile.run_steps, tile.weights);
          tile.source_ahead = source.next(tile.runs * tile.run_steps, tile.weights);
          if constexpr (!Sink::kTakesUnits) {
            T* const dst = sink_.point(p.n + image, channel, p.y + y, p.x + x);
            if (writing == Writing::in_place) write_in_place(tile, dst, cols);
            tile.dest_ahead = dest_ahead(tile, writing, dst, rows, cols, outputs);
            Tile::run(tile, width, rows, cols);
            if (rectifies) Tile::rectify(tile, width, rows, cols);
            if (writing == Writing::by_tiles) write_tile(tile, rows, cols, outputs, dst);
          } else {
            tile.dest_ahead = fetch_nothing(tile.weights);
            Tile::run(tile, width, rows, cols);
          }
          x = end;
        }
      }
    }
    if constexpr (Sink::kTakesUnits) {
      if (channel_block + 1 == b_.channel_blocks) {
        sink_.write({sums_of_unit, width, p.images, p.rows, p.cols, outputs, p.n, channel, p.y, p.x}, pooled(worker));
      }
    } else if (writing == Writing::by_units) {
      write_unit(p, sums_of_unit, width, outputs, channel);
    }
  }

  void write_in_place(TileTask<T>& tile, T* dst, int64_t cols) const {
    const Strides& grid = sink_.grid;
    tile.out = dst, tile.pitch = Tile::kChannelsInner ? grid.w : grid.c, tile.row_pitch = grid.h;
    tile.last = static_cast<int>((cols - 1) % kLanes<T> + 1);
  }

  // Of a tile's place in planes, the last line in each of them: the others are the tile's before, or follow soon. Where channels are
  // innermost, the place behind the tile's, which is most often the next one's.
  Fetch dest_ahead(const TileTask<T>& tile, Writing writing, const T* dst, int64_t rows, int64_t cols, int64_t outputs) const {
    const Strides& grid = sink_.grid;
    if (writing == Writing::in_scratch) return fetch_nothing(tile.weights);
    if (grid.c == 1) return {reinterpret_cast<const char*>(dst + cols * grid.w), grid.w * kSize, cols};
    return {reinterpret_cast<const char*>(dst + (rows - 1) * grid.h + (cols - 1) * grid.w), grid.c * kSize, outputs};
  }

  void write_tile(const TileTask<T>& tile, int64_t rows, int64_t cols, int64_t outputs, T* dst) const {
    const Strides& grid = sink_.grid;
    for (int64_t r = 0; r < rows; ++r) {
      write_sums(tile.out + r * tile.row_pitch, tile.pitch, cols, outputs, dst + r * grid.h);
    }
  }

  // Rows that follow each other without a gap are written as one.
  void write_unit(const Place& p, const T* sums, int64_t width, int64_t outputs, int64_t channel) const {
    const bool dense = sink_.grid.h == p.cols * sink_.grid.w;
    const int64_t runs = dense ? 1 : p.rows, cols = dense ? p.rows * p.cols : p.cols;
    for (int64_t image = 0; image < p.images; ++image) {
      for (int64_t r = 0; r < runs; ++r, sums += cols * width) {
        write_sums(sums, width, cols, outputs, sink_.point(p.n + image, channel, p.y + r, p.x));
      }
    }
  }

  // Sums of a row of grid points as they lie in scratch.
  void write_sums(const T* sums, int64_t pitch, int64_t cols, int64_t outputs, T* dst) const {
    const Strides& grid = sink_.grid;
    if constexpr (Tile::kChannelsInner) {
      write_matrix(sums, pitch, cols, outputs, dst, grid.w, grid.c);
    } else {
      write_matrix(sums, pitch, outputs, cols, dst, grid.c, grid.w);
    }
  }

  const Gather g_;
  const Blocking b_;
  const Scratch scratch_;
  const bool leaves_out_columns_;
  const StagedLayout layout_;
  const Source source_;
  const T* const weight_;
  const T* const bias_;
  const Sink sink_;
  char* const memory_;
  T* const packed_;
  const bool packs_in_tasks_, is_packed_;
  mutable bool is_finite_ = true;  // whether all weights packed so far are; tasks may set it at the same time
  const int threads_;
};

// Plan and run of the problems that a direction is made of. `Ends` makes a problem's gather, source and sink.
template <class T, class Tile, class Ends>
Plan plan_gathers(const Ends& ends, int threads) {
  Plan plan{Tile::kMaxWidth, Tile::kMaxPoints, 0, 0};
  for (int64_t i = 0; i < ends.count(); ++i) {
    const Plan one = plan_gather<T, Tile, typename Ends::Source, typename Ends::Sink>(ends.gather(i), threads);
    plan.tasks += one.tasks;
    if (one.workspace_bytes > plan.workspace_bytes) plan.workspace_bytes = one.workspace_bytes;
  }
  return plan;
}

// packed: of a direction that is one problem.
template <class T, class Tile, class Ends>
Outcome run_gathers(const Ends& ends, const T* weight, const T* bias, Packed packed, void* workspace, int threads) {
  for (int64_t i = 0; i < ends.count(); ++i) {
    const Gather g = ends.gather(i);
    if (g.is_empty()) continue;
    using Run = GatherRun<T, Tile, typename Ends::Source, typename Ends::Sink>;
    const Run run(g, ends.source(g), weight, bias, ends.sink(g), packed, workspace, threads);
    if (run.run() == Outcome::not_finite) return Outcome::not_finite;
  }
  return Outcome::done;
}

template <class T, class Tile>
PackedForm packed_form(const Gather& g) {
  return {static_cast<size_t>(packed_bytes<T, Tile>(g)), 0};
}

// From tensor to tensor.
template <class T, Conv2dDirection kDirection>
struct TensorEnds {
  using Source = TensorSource<T>;
  using Sink = TensorSink<T>;
  static constexpr bool kForward = kDirection == Conv2dDirection::forward;

  int64_t count() const { return gather_count(kDirection, shape); }
  Gather gather(int64_t i) const { return make_gather(kDirection, shape, i); }
  Source source(const Gather& g) const { return {static_cast<const T*>(kForward ? buffers.input : buffers.grad_output), g.source}; }
  Sink sink(const Gather& g) const { return {g, static_cast<T*>(kForward ? buffers.output : buffers.grad_input), false}; }

  const Conv2dShape& shape;
  const Conv2dBuffers& buffers;
};

// The functions of a table row of one type.
template <class T, class Tile, Conv2dDirection kDirection>
struct GatherRow {
  static Plan plan(const Conv2dShape& s, int threads) { return plan_gathers<T, Tile>(TensorEnds<T, kDirection>{s, {}}, threads); }
  static Outcome run_packed(const Conv2dShape& s, const Conv2dBuffers& buffers, Packed packed, void* workspace, int threads) {
    const TensorEnds<T, kDirection> ends{s, buffers};
    const T* bias = static_cast<const T*>(buffers.bias);
    return run_gathers<T, Tile>(ends, static_cast<const T*>(buffers.weight), bias, packed, workspace, threads);
  }
  static Outcome run(const Conv2dShape& s, const Conv2dBuffers& buffers, void* workspace, int threads) {
    return run_packed(s, buffers, {}, workspace, threads);
  }
  static PackedForm form(const Conv2dShape& s) { return packed_form<T, Tile>(make_gather(kDirection, s, 0)); }
};

}  // namespace
