// The loops around the register tile of grouped convolutions.
#pragma once

#include "cpu/kernels/conv2d_direct_pack.inl"
#include "cpu/kernels/conv2d_direct_write.inl"
#include "cpu/kernels/conv2d_grouped_plan.inl"
#include "cpu/kernels/conv2d_grouped_stage.inl"
#include "cpu/packed.h"
#include "cpu/parallel.h"

namespace {

using cnn_ext::Conv2dBuffers;
using cnn_ext::cpu::Outcome;
using cnn_ext::cpu::Packed;
using cnn_ext::cpu::PackedForm;
using cnn_ext::cpu::Plan;
using cnn_ext::cpu::CNN_EXT_ISA::GroupedTile;
using cnn_ext::cpu::CNN_EXT_ISA::run_grouped_tile;

class GroupedRun {
 public:
  GroupedRun(const Grouping& grouping, const float* source, float* dest, Packed packed, void* workspace, int threads)
      : g_(grouping),
        source_(source),
        dest_(dest),
        packed_(static_cast<float*>(packed.data)),
        is_packed_(packed.is_ready),
        threads_(threads) {
    char* at = static_cast<char*>(workspace);
    const auto take = [&at](int64_t bytes) {
      char* const part = at;
      at += bytes;
      return part;
    };
    char* const own_packed = take(g_.packed_bytes());
    if (packed_ == nullptr) packed_ = reinterpret_cast<float*>(own_packed);
    bias_ = reinterpret_cast<float*>(take(g_.bias_bytes()));
    steps_ = reinterpret_cast<GroupedStep*>(take(g_.steps_bytes()));
    places_ = reinterpret_cast<int32_t*>(take(g_.places_bytes()));
    workers_ = at;
  }

  Outcome run(const float* weight, const float* bias) const {
    if (!is_packed_ && !pack(weight)) return Outcome::not_finite;
    pack_bias(bias);
    fill_steps();
    fill_places(g_, places_);
    parallel_for(threads_, g_.tasks(), [&](int worker, int64_t task) { run_task(worker, task); });
    return Outcome::done;
  }

 private:
  static constexpr int64_t kV = Grouping::kV;
  static constexpr int64_t kMostLines = 256;       // fetched by a tile
  static constexpr int64_t kSerialPack = 1 << 14;  // weights

  const float* unit_weights(int64_t group, int64_t unit) const {
    return packed_ + group * g_.packed_group() + g_.unit_begin(unit) * kV * g_.taps() * g_.gather().channels;
  }

  bool pack(const float* weight) const {
    const Gather g = g_.packed_gather();
    int finite = 1;
    const int team = g.groups * g_.packed_group() < kSerialPack ? 1 : threads_;
    parallel_for(team, g.groups * g_.units, [&](int, int64_t i) {
      const int64_t group = i / g_.units, unit = i % g_.units, first = g_.unit_begin(unit) * kV, width = g_.unit_vectors(unit) * kV;
      const float* src = weight + group * g.weight_group + first * g.weight_output;
      float* dst = const_cast<float*>(unit_weights(group, unit));
      if (!pack_unit(g, g_.packed_order(), src, smaller(width, g.outputs - first), width, g.channels, dst))
        __atomic_store_n(&finite, 0, __ATOMIC_RELAXED);
    });
    return finite != 0;
  }

  void pack_bias(const float* bias) const {
    const int64_t outputs = g_.gather().outputs, width = g_.vectors * kV;
    for (int64_t group = 0; group < g_.gather().groups; ++group) {
      for (int64_t k = 0; k < width; ++k) bias_[group * width + k] = bias != nullptr && k < outputs ? bias[group * outputs + k] : 0.0f;
    }
  }

  // The steps of a phase follow those of the phases before; a kernel position belongs to one phase.
  void fill_steps() const {
    GroupedStep* step = steps_;
    for (int64_t i = 0; i < g_.phases; ++i) {
      const Gather& g = g_.phase(i);
      for (int64_t r = 0; r < g.h.taps; ++r) {
        for (int64_t t = 0; t < g.w.taps; ++t) {
          const int64_t tap = (g.h.kernel_first + r * g.h.kernel_step) * g_.packed_gather().w.taps + g.w.kernel_first + t * g.w.kernel_step;
          const int64_t row = g.h.source_first + r * g.h.tap_step - g_.reach_h.first;
          const int64_t col = g.w.source_first + t * g.w.tap_step - g_.reach_w.first;
          for (int64_t b = 0; b < g_.blocks; ++b) {
            step->source = static_cast<int32_t>(b * g_.block_pitch() + row * g_.row_pitch + place_of_col(g_, col));
            step->weights = static_cast<int32_t>(tap * g.channels + b * kV);
            step->channels = static_cast<int32_t>(smaller(kV, g.channels - b * kV));
            ++step;
          }
        }
      }
    }
  }

  struct Place {
    int64_t n, images, group, row, rows;
  };

  // Where channels are innermost, neighbouring groups are neighbouring tasks: they share pages. Planes share them with the next rows.
  Place place_of(int64_t task) const {
    const auto next = [&task](int64_t count) {
      const int64_t i = task % count;
      task /= count;
      return i;
    };
    Place p{};
    if (g_.is_nchw()) {
      p.row = next(g_.row_blocks()) * g_.rows, p.group = next(g_.gather().groups);
    } else {
      p.group = next(g_.gather().groups), p.row = next(g_.row_blocks()) * g_.rows;
    }
    p.n = task * g_.images, p.images = smaller(g_.images, g_.gather().batch - p.n);
    p.rows = smaller(g_.rows, g_.grid_h - p.row);
    return p;
  }

  // What a task of a worker has at hand.
  struct Work {
    Place place;
    const float* staged;
    float* sums;
    // Lines of what is staged next, and of the planes that the sums go to; those of a tile.
    Lines source_ahead, dest_ahead;
    int64_t source_share, dest_share;
  };

  float* staged(int worker) const { return reinterpret_cast<float*>(workers_ + worker * g_.worker_bytes()); }

  StagedPart part_of(const Place& p, int64_t image) const {
    const Gather& g = g_.gather();
    return {source_ + (p.n + image) * g.source.n + p.group * g.channels * g.source.c, p.row * g_.step_h() + g_.reach_h.first,
            g_.staged_rows(p.rows)};
  }

  void run_task(int worker, int64_t task) const {
    Work work{place_of(task), staged(worker), staged(worker) + g_.staged_bytes() / static_cast<int64_t>(sizeof(float)), {}, {}, 0, 0};
    const Place& p = work.place;
    for (int64_t image = 0; image < p.images; ++image) {
      stage_part(g_, part_of(p, image), places_, staged(worker) + image * g_.image_pitch());
    }
    if (task + 1 < g_.tasks()) {
      const Place next = place_of(task + 1);
      work.source_ahead = lines_of_part(g_, part_of(next, 0), next.images);
      work.source_share = smaller(ceil_div(work.source_ahead.count(), tiles_of(p, 0, g_.units)), kMostLines / 2);
    }
    for (int64_t unit = 0; unit < g_.units; ++unit) {
      if (g_.is_nchw()) {
        const Gather& g = g_.gather();
        work.dest_ahead = lines_of_planes(planes_of(p, unit), g.dest, p.images, outputs_of(unit), dest_rows(p) * g_.dest_w);
        work.dest_share = smaller(ceil_div(work.dest_ahead.count(), tiles_of(p, unit, unit + 1)), kMostLines / 2);
      }
      run_unit(work, unit);
      if (g_.is_nchw()) write_planes(work, unit);
    }
  }

  // The output channels of a unit that exist.
  int64_t outputs_of(int64_t unit) const { return smaller(g_.unit_vectors(unit) * kV, g_.gather().outputs - g_.unit_begin(unit) * kV); }

  // What a task writes of the planes of a unit: the rows of the destination, and the first of them.
  int64_t dest_rows(const Place& p) const {
    const int64_t step = g_.gather().h.dest_step;
    return smaller((p.row + p.rows) * step, g_.dest_h) - p.row * step;
  }
  float* planes_of(const Place& p, int64_t unit) const {
    const Gather& g = g_.gather();
    return dest_ + p.n * g.dest.n + (p.group * g.outputs + g_.unit_begin(unit) * kV) * g.dest.c + p.row * g.h.dest_step * g.dest.h;
  }

  // Tiles of some units, about.
  int64_t tiles_of(const Place& p, int64_t first_unit, int64_t last_unit) const {
    int64_t tiles = 0;
    for (int64_t unit = first_unit; unit < last_unit; ++unit) {
      const int vectors = static_cast<int>(g_.unit_vectors(unit)), rows = rows_at_once(vectors, g_.grid_w);
      tiles += g_.phases * ceil_div(p.images * p.rows, rows) * ceil_div(g_.grid_w, most_cols(vectors, rows));
    }
    return tiles;
  }

  void run_unit(Work& work, int64_t unit) const {
    const Place& p = work.place;
    const GroupedStep* steps = steps_;
    for (int64_t i = 0; i < g_.phases; ++i) {
      const Gather& g = g_.phase(i);
      const int64_t end = smaller(p.row + p.rows, g.h.count);
      for (int64_t row = p.row, next; row < end; row = next) {  // rows with the same taps
        const TapRange taps = taps_inside(g.h, row, 1);
        for (next = row + 1; next < end && is_same(taps, taps_inside(g.h, next, 1)); ++next) {
        }
        run_rows(work, unit, g, steps, taps, row, next);
      }
      steps += g.taps() * g_.blocks;
    }
  }

  static bool is_same(const TapRange& a, const TapRange& b) { return a.begin == b.begin && a.end == b.end; }

  // Grid rows [first, last) of all images of a task, as many at once as a tile takes.
  void run_rows(Work& work, int64_t unit, const Gather& g, const GroupedStep* steps, const TapRange& taps, int64_t first,
                int64_t last) const {
    const Place& p = work.place;
    const int vectors = static_cast<int>(g_.unit_vectors(unit));
    const int64_t channel = g_.unit_begin(unit) * kV, row_steps = g.w.taps * g_.blocks;
    GroupedTile tile{};
    tile.weights = unit_weights(p.group, unit);
    tile.steps = steps + taps.begin * row_steps, tile.step_count = taps.count() * row_steps;
    tile.bias = bias_ + p.group * g_.vectors * kV + channel;
    tile.last = g_.is_nchw() ? static_cast<int>(kV) : static_cast<int>(smaller(kV, g.outputs - channel - (vectors - 1) * kV));
    tile.out_step = g.w.dest_step * (g_.is_nchw() ? vectors * kV : g.dest.w);
    const int64_t left = last - first, count = p.images * left;
    int rows;
    for (int64_t i = 0; i < count; i += rows) {
      for (rows = rows_at_once(vectors, g.w.count); rows > count - i; rows /= 2) {
      }
      const float* source[cnn_ext::cpu::CNN_EXT_ISA::kMostRows];
      float* out[cnn_ext::cpu::CNN_EXT_ISA::kMostRows];
      for (int r = 0; r < rows; ++r) {
        const int64_t image = (i + r) / left, row = first + (i + r) % left;
        source[r] = work.staged + image * g_.image_pitch() + (row - p.row) * g_.step_h() * g_.row_pitch;
        out[r] = out_row(work, g, vectors, channel, image, row);
      }
      const int64_t tiles = ceil_div(g.w.count, most_cols(vectors, rows));
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t begin = t * g.w.count / tiles, end = (t + 1) * g.w.count / tiles;
        for (int r = 0; r < rows; ++r) tile.source[r] = source[r] + begin * kV, tile.out[r] = out[r] + begin * tile.out_step;
        run_tile(work, tile, vectors, rows, static_cast<int>(end - begin));
      }
    }
  }

  float* out_row(const Work& work, const Gather& g, int vectors, int64_t channel, int64_t image, int64_t row) const {
    const Place& p = work.place;
    const int64_t y = g.h.dest_first + row * g.h.dest_step, x = g.w.dest_first;
    if (g_.is_nchw()) {
      return work.sums + image * g_.sums_of_image() + ((y - p.row * g.h.dest_step) * g_.dest_w + x) * vectors * kV;
    }
    return dest_ + (p.n + image) * g.dest.n + y * g.dest.h + x * g.dest.w + p.group * g.outputs + channel;
  }

  void run_tile(Work& work, GroupedTile& tile, int vectors, int rows, int cols) const {
    const char* lines[kMostLines];
    const char** end = lines;
    if (g_.is_nchw()) {
      end = work.dest_ahead.take(work.dest_share, end);
    } else {
      for (int r = 0; r < rows; ++r) {
        for (int v = 0; v < vectors; ++v) {
          for (int i = 0; i < cols; ++i) *end++ = reinterpret_cast<const char*>(tile.out[r] + i * tile.out_step + v * kV);
        }
      }
    }
    end = work.source_ahead.take(work.source_share, end);
    tile.ahead = lines, tile.ahead_end = end;
    tile.ahead_step = tile.step_count == 0 ? 0 : ceil_div(end - lines, tile.step_count);
    run_grouped_tile(tile, vectors, rows, cols);
  }

  // A unit's sums for the rows of a task, all phases together.
  void write_planes(const Work& work, int64_t unit) const {
    const Strides& dest = g_.gather().dest;
    for (int64_t image = 0; image < work.place.images; ++image) {
      write_matrix(work.sums + image * g_.sums_of_image(), g_.unit_vectors(unit) * kV, dest_rows(work.place) * g_.dest_w, outputs_of(unit),
                   planes_of(work.place, unit) + image * dest.n, dest.w, dest.c);
    }
  }

  const Grouping& g_;
  const float* const source_;
  float* const dest_;
  float* packed_;
  const bool is_packed_;
  const int threads_;
  float* bias_;
  GroupedStep* steps_;
  int32_t* places_;
  char* workers_;
};

}  // namespace
