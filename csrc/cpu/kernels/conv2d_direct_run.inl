// The loops around a register tile: what both tiles (channels or pixels in the lanes) and both directions share, up to a table row's
// functions.
#pragma once

#include "cpu/kernels/conv2d_direct_blocking.inl"
#include "cpu/kernels/conv2d_direct_pack.inl"
#include "cpu/kernels/conv2d_direct_sums.inl"
#include "cpu/packed.h"
#include "cpu/parallel.h"

namespace {

using cnn_ext::Conv2dBuffers;
using cnn_ext::cpu::Outcome;
using cnn_ext::cpu::Packed;

constexpr int64_t kSerialPack = 1 << 14;                 // weights
constexpr int64_t kNearWeights = kSecondCacheBytes / 4;  // bytes

template <class T, class Tile, class Ends>
class GatherRun {
  using Source = typename Ends::Source;
  using Sink = typename Ends::Sink;

 public:
  GatherRun(const Bundle& bundle, const Ends& ends, const T* weight, const T* bias, Packed packed, void* workspace, int threads)
      : bundle_(bundle),
        cover_(bundle.cover),
        b_(make_blocking<T, Tile>(bundle, threads)),
        scratch_(make_scratch<T, Tile, Source, Sink>(bundle, b_)),
        layout_(staged_layout<T>(cover_, b_.channels, b_.rows, b_.cols)),
        source_(ends.source(cover_)),
        ends_(ends),
        weight_(weight),
        bias_(bias),
        memory_(static_cast<char*>(workspace)),
        packed_(static_cast<T*>(packed.data != nullptr ? packed.data : workspace)),
        packs_in_tasks_(packed.data == nullptr && scratch_.packs_in_tasks),
        is_packed_(packed.is_ready),
        threads_(threads) {
    int64_t offsets = 0;
    for (int i = 0; i < bundle_.count; ++i) {
      const Gather& g = bundle_.parts[i];
      parts_[i] = {&g, reduction_of(g), leaves_out_columns(g), weights_, offsets};
      weights_ += packed_bytes<T, Tile>(g) / kSize, offsets += step_offsets(g);
      blocks_ += parts_[i].reduction.blocks;
    }
  }

  Outcome run() const {
    if (!is_packed_ && !packs_in_tasks_) pack_all();
    if (!is_finite_) return Outcome::not_finite;
    pack_bias();
    for (int i = 0; i < bundle_.count; ++i) {
      const Part& part = parts_[i];
      const int64_t last = part.reduction.blocks - 1;
      fill_offsets<T>(*part.g, layout_, part.reduction.channels, offsets(part, 0));
      fill_offsets<T>(*part.g, layout_, channels_of(part, last), offsets(part, last));
    }
    parallel_for(threads_, b_.tasks, [&](int worker, int64_t task) { run_task(worker, task); });
    return is_finite_ ? Outcome::done : Outcome::not_finite;
  }

 private:
  static constexpr int64_t kSize = sizeof(T);

  // One of the bundle's problems.
  struct Part {
    const Gather* g;
    Reduction reduction;
    bool leaves_out_columns;
    int64_t weights, offsets;  // where its packed weights and its offsets begin
  };

  T* packed_bias() const { return reinterpret_cast<T*>(memory_ + scratch_.bias); }
  T* own_weights(int worker) const { return reinterpret_cast<T*>(memory_ + scratch_.workers + worker * scratch_.worker_bytes); }
  T* staged(int worker) const { return own_weights(worker) + scratch_.weights_bytes / kSize; }
  T* sums(int worker) const { return staged(worker) + scratch_.staged_bytes / kSize; }
  T* line(int worker) const { return sums(worker) + scratch_.sums_bytes / kSize; }
  T* pooled(int worker) const { return line(worker) + Source::line_elements(cover_); }

  // Those of the last block of channels, which may be smaller, are kept apart.
  int32_t* offsets(const Part& part, int64_t channel_block) const {
    const bool last = channel_block == part.reduction.blocks - 1;
    return reinterpret_cast<int32_t*>(memory_ + scratch_.offsets) + part.offsets + (last ? part.reduction.channels * part.g->taps() : 0);
  }

  // Of the steps of a block of channels, those of the taps that a tile needs.
  void choose_steps(TileTask<T>& tile, const Part& part, const T* weights, const TapRange& rows, const TapRange& cols, int64_t block,
                    int64_t width) const {
    const int64_t channels = channels_of(part, block), row_steps = part.g->w.taps * channels;
    const int64_t chosen = rows.count() == 0 ? 0 : cols.count() * channels;  // of a tap row
    const bool all = chosen == row_steps;
    tile.runs = all ? 1 : rows.count(), tile.run_steps = all ? rows.count() * row_steps : chosen, tile.gap = row_steps - chosen;
    const int64_t first = rows.begin * row_steps + cols.begin * channels;
    tile.weights = weights + first * width, tile.offsets = offsets(part, block) + first;
  }

  int64_t channels_of(const Part& part, int64_t channel_block) const {
    return clamp(cover_.channels - channel_block * part.reduction.channels, 0, part.reduction.channels);
  }

  // The output channels of a unit that exist.
  int64_t outputs_of(int64_t unit) const {
    return clamp(cover_.outputs - Tile::first(cover_.outputs, unit), 0, Tile::width(cover_.outputs, unit));
  }

  T* packed_weights(const Part& part, int64_t group, int64_t unit, int64_t channel_block) const {
    const int64_t taps = part.g->taps(), first = Tile::first(cover_.outputs, unit);
    return packed_ + part.weights + (group * scratch_.group_bias + first) * part.g->terms() +
           channel_block * part.reduction.channels * taps * Tile::width(cover_.outputs, unit);
  }

  void pack(const Part& part, int64_t group, int64_t unit, int64_t channel_block, T* packed) const {
    const Gather& g = *part.g;
    const T* src = weight_ + group * g.weight_group + Tile::first(g.outputs, unit) * g.weight_output +
                   channel_block * part.reduction.channels * g.weight_channel;
    if (!pack_unit(g, src, outputs_of(unit), Tile::width(g.outputs, unit), channels_of(part, channel_block), packed))
      __atomic_store_n(&is_finite_, false, __ATOMIC_RELAXED);
  }

  // The parts of one unit follow each other: they read the same lines of the weight.
  void pack_all() const {
    const int64_t units = Tile::units(cover_.outputs);
    const int team = weights_ < kSerialPack ? 1 : threads_;
    parallel_for(team, cover_.groups * units * blocks_, [&](int, int64_t i) {
      const int64_t unit = i / blocks_ % units, group = i / blocks_ / units;
      const Part* part = parts_;
      int64_t block = i % blocks_;
      for (; block >= part->reduction.blocks; ++part) block -= part->reduction.blocks;
      pack(*part, group, unit, block, packed_weights(*part, group, unit, block));
    });
  }

  void pack_bias() const {
    for (int64_t group = 0; group < cover_.groups; ++group) {
      T* dst = packed_bias() + group * scratch_.group_bias;
      for (int64_t k = 0; k < scratch_.group_bias; ++k)
        dst[k] = bias_ != nullptr && k < cover_.outputs ? bias_[group * cover_.outputs + k] : T(0);
    }
  }

  // A task's place: which images, group, units and block of the grid.
  struct Place {
    int64_t group, n, images, y, rows, x, cols, unit, unit_end;
  };

  static void place_pieces(const Pieces& axis, const BlockShare& share, int64_t& first, int64_t& count) {
    first = share.first * axis.step, count = axis.points(share.count);
  }

  Place place_of(int64_t task) const {
    Place p{};
    const auto next = [&task](int64_t blocks) {
      const int64_t block = task % blocks;
      task /= blocks;
      return block;
    };
    p.unit = next(b_.unit_blocks) * b_.units, p.unit_end = smaller(p.unit + b_.units, Tile::units(cover_.outputs));
    place_pieces(cover_.cols, share_of(cover_.cols.count, b_.col_pieces, b_.col_blocks, next(b_.col_blocks)), p.x, p.cols);
    place_pieces(cover_.rows, share_of(cover_.rows.count, b_.rows_together, b_.row_blocks, next(b_.row_blocks)), p.y, p.rows);
    p.group = next(cover_.groups);
    const BlockShare images = share_of(cover_.batch, 1, b_.image_blocks, task);
    p.n = images.first, p.images = images.count;
    return p;
  }

  // What of a task's place a part has: the grids of a bundle differ by a row and a column.
  Place place_in(const Part& part, Place p) const {
    p.rows = clamp(part.g->h.count - p.y, 0, p.rows), p.cols = clamp(part.g->w.count - p.x, 0, p.cols);
    return p;
  }

  // The blocks of channels that are staged at once.
  TapRange staged_blocks(const Part& part, int64_t staging) const {
    return b_.stagings == 1 ? TapRange{0, part.reduction.blocks} : TapRange{staging, staging + 1};
  }

  void run_task(int worker, int64_t task) const {
    const Place p = place_of(task);
    for (int64_t staging = 0; staging < b_.stagings; ++staging) {
      stage_images(worker, p, staging);
      Ahead<T> ahead = source_ahead(task, p, staging);
      for (int64_t unit = p.unit; unit < p.unit_end; ++unit) {
        for (int i = 0; i < bundle_.count; ++i) {
          T* const first = sums(worker) + (b_.stagings > 1 ? (unit - p.unit) * unit_sums<Tile>(b_) : 0);
          const int together = interleaves(bundle_, i) ? 2 : 1;
          for (int k = 0; k < together; ++k) {
            run_part(worker, task, p, staging, i + k, unit, together > 1, first + k * unit_sums<Tile>(b_), ahead);
          }
          if (together > 1) write_interleaved(p, i, unit, first), ++i;
        }
      }
    }
  }

  void run_part(int worker, int64_t task, const Place& p, int64_t staging, int i, int64_t unit, bool interleaved, T* sums_of_unit,
                Ahead<T>& ahead) const {
    const Place place = place_in(parts_[i], p);
    if (place.rows == 0 || place.cols == 0) return;
    for (int64_t block = staged_blocks(parts_[i], staging).begin; block < staged_blocks(parts_[i], staging).end; ++block)
      run_unit(worker, place, parts_[i], block, unit, interleaved, sums_of_unit, ahead, weights_ahead(task, p, staging, i, block, unit));
  }

  StageTask stage_task(const Place& p, int64_t staging) const {
    StageTask block{};
    block.n = p.n;
    block.channel = p.group * cover_.channels + staging * b_.channels;
    block.channels = clamp(cover_.channels - staging * b_.channels, 0, b_.channels);
    block.rows = p.rows;
    block.first_row = p.y * cover_.h.source_step + cover_.h.source_first - window_of(cover_.h, 1).tap_origin;
    block.first_col = p.x * cover_.w.source_step + cover_.w.source_first - window_of(cover_.w, 1).tap_origin;
    return block;
  }

  void stage_images(int worker, const Place& p, int64_t staging) const {
    StageTask block = stage_task(p, staging);
    for (int64_t i = 0; i < p.images; ++i, ++block.n) {
      stage(cover_, layout_, block, source_, line(worker), staged(worker) + i * layout_.image_pitch);
    }
  }

  // What will be staged next: this task's next channels or, as a thread most often runs neighbouring tasks, the task behind it.
  Ahead<T> source_ahead(int64_t task, const Place& p, int64_t staging) const {
    const bool stays = staging + 1 < b_.stagings;
    if (!stays && task + 1 == b_.tasks) return {};
    const Place next = stays ? p : place_of(task + 1);
    Ahead<T> ahead = source_.ahead(cover_, layout_, stage_task(next, stays ? staging + 1 : 0), next.images);
    ahead.share_out((p.unit_end - p.unit) * (b_.stagings == 1 ? blocks_ : 1) * tiles_of(p));
    return ahead;
  }

  // The packed weights that will be read next; few of them stay in the second cache in any case.
  Ahead<T> weights_ahead(int64_t task, const Place& p, int64_t staging, int i, int64_t block, int64_t unit) const {
    if (packs_in_tasks_ || weights_ * kSize <= kNearWeights) return {};
    Place next = p;
    next.unit = unit;
    if (++block == staged_blocks(parts_[i], staging).end) {
      if (++i == bundle_.count) {
        i = 0;
        if (++next.unit == p.unit_end) {
          next.unit = p.unit;
          if (++staging == b_.stagings) {
            if (task + 1 == b_.tasks) return {};
            staging = 0, next = place_of(task + 1);
          }
        }
      }
      block = staged_blocks(parts_[i], staging).begin;
    }
    const Part& part = parts_[i];
    const int64_t terms = channels_of(part, block) * part.g->taps();
    Ahead<T> ahead(packed_weights(part, next.group, next.unit, block), terms * Tile::width(cover_.outputs, next.unit));
    ahead.share_out(tiles_of(p));
    return ahead;
  }

  // Tiles of a unit, about.
  int64_t tiles_of(const Place& p) const {
    int64_t tiles = 0;
    for_column_ranges<Tile>(Tile::kMaxWidth, p.cols, [&](int64_t, int64_t range) {
      tiles += ceil_div(p.rows, Tile::rows(Tile::kMaxWidth, range, p.rows)) * Tile::tiles(range);
    });
    return p.images * tiles;
  }

  Writing writing_of(const Part& part, int64_t channel_block, const Sink& sink) const {
    if constexpr (Sink::kTakesUnits) {
      return Writing::in_scratch;
    } else {
      if (channel_block + 1 < part.reduction.blocks) return Writing::in_scratch;
      const Strides& grid = sink.grid;
      const bool lanes_are_inner = (Tile::kChannelsInner ? grid.c : grid.w) == 1;
      if (lanes_are_inner) return Writing::in_place;
      return Tile::kWritesUnits || (Tile::kChannelsInner && part.reduction.blocks > 1) ? Writing::by_units : Writing::by_tiles;
    }
  }

  // Sums up one block of channels for one unit of output channels.
  void run_unit(int worker, const Place& p, const Part& part, int64_t channel_block, int64_t unit, bool interleaved, T* sums_of_unit,
                Ahead<T>& source, Ahead<T> next_weights) const {
    const Gather& g = *part.g;
    const int64_t width = Tile::width(g.outputs, unit), row_sums = Tile::row_sums(width, p.cols);
    const int64_t channel = p.group * g.outputs + Tile::first(g.outputs, unit);
    const int64_t pitch = Tile::kChannelsInner ? width : Tile::kMaxPoints, outputs = outputs_of(unit);
    if (packs_in_tasks_) pack(part, p.group, unit, channel_block, own_weights(worker));
    const T* weights = packs_in_tasks_ ? own_weights(worker) : packed_weights(part, p.group, unit, channel_block);
    const Sink sink = ends_.sink(g);
    const SumsWriter<T, Tile, Sink> writer{sink};
    Writing writing = writing_of(part, channel_block, sink);
    if (interleaved && writing != Writing::in_scratch) writing = Writing::interleaved;
    // The sums of more than a tile are kept while blocks of channels are added to them, and for who takes them together.
    const bool keeps_sums = Tile::kWritesUnits || part.reduction.blocks > 1 || interleaved || Sink::kTakesUnits;
    TileTask<T> tile{};
    tile.row_step = g.h.source_step * layout_.row_pitch;
    if constexpr (kHasSpans) tile.span_taps = span_taps<Tile>(g), tile.span_step = static_cast<int>(g.w.tap_step);
    tile.bias = channel_block == 0 ? packed_bias() + p.group * scratch_.group_bias + Tile::first(g.outputs, unit) : nullptr;
    const bool rectifies = sink.relu && channel_block + 1 == part.reduction.blocks;
    const T* const staged_channels =
        staged(worker) + (b_.stagings == 1 ? channel_block * part.reduction.channels : 0) * layout_.channel_pitch;
    for (int64_t image = 0; image < p.images; ++image) {
      const T* staged_image = staged_channels + image * layout_.image_pitch;
      for_column_ranges<Tile>(width, p.cols, [&](int64_t first_col, int64_t range) {
        int64_t rows = 0;
        for (int64_t y = 0; y < p.rows; y += rows) {
          rows = Tile::rows(width, range, p.rows - y);
          const TapRange tap_rows = taps_inside(g.h, p.y + y, rows);
          choose_steps(tile, part, weights, tap_rows, {0, g.w.taps}, channel_block, width);
          int64_t x = first_col;
          for (int64_t t = 0; t < Tile::tiles(range); ++t) {
            const int64_t end = first_col + Tile::tile_begin(range, t + 1), cols = end - x;
            if (part.leaves_out_columns) choose_steps(tile, part, weights, tap_rows, taps_inside(g.w, p.x + x, cols), channel_block, width);
            tile.staged = staged_image + y * tile.row_step + x;
            tile.out = sums_of_unit, tile.pitch = pitch, tile.row_pitch = Tile::row_sums(width, cols), tile.last = kLanes<T>;
            if (keeps_sums) tile.out += (image * p.rows + y) * row_sums + x * width, tile.row_pitch = row_sums;
            if (Tile::kChannelsInner && tile.bias != nullptr) {
              tile.before = tile.bias;
            } else {
              tile.before = tile.out, tile.before_pitch = tile.pitch, tile.before_row_pitch = tile.row_pitch;
            }
            tile.weights_ahead = next_weights.next(tile.run_steps, tile.weights);
            tile.source_ahead = source.next(tile.runs * tile.run_steps, tile.weights);
            if constexpr (!Sink::kTakesUnits) {
              T* const dst = sink.point(p.n + image, channel, p.y + y, p.x + x);
              if (writing == Writing::in_place) writer.write_in_place(tile, dst, cols, outputs);
              tile.dest_ahead = writer.ahead(tile, writing, dst, rows, cols, outputs);
              Tile::run(tile, width, rows, cols);
              if (rectifies) Tile::rectify(tile, writing == Writing::in_place ? outputs : width, rows, cols);
              if (writing == Writing::by_tiles) writer.write_tile(tile, rows, cols, outputs, dst);
            } else {
              tile.dest_ahead = fetch_nothing(tile.weights);
              Tile::run(tile, width, rows, cols);
            }
            x = end;
          }
        }
      });
    }
    const UnitSums<T> complete{sums_of_unit, width, p.images, p.rows, p.cols, outputs, p.n, channel, p.y, p.x};
    if constexpr (Sink::kTakesUnits) {
      if (channel_block + 1 == part.reduction.blocks) sink.write(complete, pooled(worker));
    } else if (writing == Writing::by_units) {
      writer.write_unit(complete);
    }
  }

  // A unit's sums of parts i and i + 1, the even and the odd columns of the same rows.
  void write_interleaved(const Place& p, int i, int64_t unit, const T* sums) const {
    if constexpr (!Sink::kTakesUnits) {
      const Place even = place_in(parts_[i], p), odd = place_in(parts_[i + 1], p);
      const int64_t channel = p.group * cover_.outputs + Tile::first(cover_.outputs, unit), width = Tile::width(cover_.outputs, unit);
      const SumsWriter<T, Tile, Sink> writer{ends_.sink(*parts_[i].g)};
      writer.write_interleaved({sums, width, p.images, even.rows, even.cols, outputs_of(unit), p.n, channel, p.y, p.x},
                               sums + unit_sums<Tile>(b_), odd.cols);
    }
  }

  const Bundle& bundle_;
  const Gather& cover_;
  const Blocking b_;
  const Scratch scratch_;
  const StagedLayout layout_;
  const Source source_;
  const Ends& ends_;
  const T* const weight_;
  const T* const bias_;
  char* const memory_;
  T* const packed_;
  const bool packs_in_tasks_, is_packed_;
  mutable bool is_finite_ = true;  // whether all weights packed so far are; tasks may set it at the same time
  const int threads_;
  Part parts_[kMaxParts];
  int64_t blocks_ = 0;   // of the reduction, of all parts
  int64_t weights_ = 0;  // packed, of all parts
};

}  // namespace
