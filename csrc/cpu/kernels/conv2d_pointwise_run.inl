// The loops around a register tile of a 1x1 convolution.
#pragma once

#include "cpu/kernels/conv2d_pointwise_blocking.inl"
#include "cpu/kernels/conv2d_pointwise_pack.inl"
#include "cpu/packed.h"
#include "cpu/parallel.h"

namespace {

using cnn_ext::cpu::Packed;

// Of whole planes the next block of channels rather than a part of the next planes, all of whose channels may be more than stay near.
constexpr bool kFetchesChannelBlocks = kVectorRegisters < 32;

template <class T, class Tile>
class PointwiseRun : private Adding<kHasPatchRows> {
  static constexpr int64_t kLineElements = 64 / sizeof(T);

 public:
  PointwiseRun(const Product& p, const T* source, const T* weight, const T* bias, T* dest, Packed packed, void* workspace, int threads,
               Adding<kHasPatchRows> adding)
      : Adding<kHasPatchRows>(adding),
        p_(p),
        b_(make_pointwise_blocking<T, Tile>(p, threads)),
        scratch_(make_pointwise_scratch<T, Tile>(p, b_)),
        source_(source),
        weight_(weight),
        bias_(bias),
        dest_(dest),
        memory_(static_cast<char*>(workspace)),
        packed_(static_cast<T*>(packed.data != nullptr ? packed.data : workspace)),
        packs_in_tasks_(packed.data == nullptr && scratch_.packs_in_tasks),
        is_packed_(packed.is_ready),
        threads_(threads) {}

  void run() const {
    if (!is_packed_ && !packs_in_tasks_) pack_all();
    pack_bias();
    parallel_for(threads_, b_.tasks, [&](int worker, int64_t task) { run_task(worker, task); });
  }

 private:
  // Some blocks of points and some units of outputs of a group.
  struct Task {
    int64_t group, block, block_end, unit, unit_end;
  };

  // A block of points: lines from `line` on, each with `points` points from `point` on.
  struct Block {
    int64_t line, lines, point, points;
  };

  T* memory(int64_t offset) const { return reinterpret_cast<T*>(memory_ + offset); }
  T* own_weights(int worker) const { return memory(scratch_.workers + worker * scratch_.worker_bytes); }
  T* own_sums(int worker) const { return memory(scratch_.workers + worker * scratch_.worker_bytes + scratch_.sums); }
  T* own_rows(int worker) const { return memory(scratch_.workers + worker * scratch_.worker_bytes + scratch_.rows); }
  T* own_copy(int worker) const { return memory(scratch_.workers + worker * scratch_.worker_bytes + scratch_.copy); }
  T* own_planes(int worker) const { return memory(scratch_.workers + (worker + 1) * scratch_.worker_bytes - plane_bytes<T>(p_, b_)); }
  const T* bias_of(int64_t group, int64_t unit) const {
    return memory(scratch_.bias) + group * scratch_.group_outputs + Tile::first(p_.outputs, unit);
  }

  int64_t channels_of(int64_t channel_block) const { return smaller(b_.channels, p_.channels - channel_block * b_.channels); }
  // The outputs of a unit that exist.
  int64_t outputs_of(int64_t unit) const { return smaller(Tile::width(p_.outputs, unit), p_.outputs - Tile::first(p_.outputs, unit)); }

  T* packed_weights(int64_t group, int64_t unit, int64_t channel_block) const {
    return packed_ + (group * scratch_.group_outputs + Tile::first(p_.outputs, unit)) * p_.channels +
           channel_block * b_.channels * Tile::width(p_.outputs, unit);
  }

  void pack(int64_t group, int64_t unit, int64_t channel_block, T* packed) const {
    const T* weight = weight_ + group * p_.weight_group + Tile::first(p_.outputs, unit) * p_.weight_output +
                      channel_block * b_.channels * p_.weight_channel;
    pack_weights(weight, p_.weight_output, p_.weight_channel, outputs_of(unit), channels_of(channel_block), packed,
                 Tile::width(p_.outputs, unit));
  }

  void pack_all() const {
    const int64_t units = Tile::units(p_.outputs);
    const int team = p_.groups * scratch_.group_outputs * p_.channels < kSerialPack ? 1 : threads_;
    parallel_for(team, p_.groups * units * b_.channel_blocks, [&](int, int64_t i) {
      const int64_t channel_block = i % b_.channel_blocks, unit = i / b_.channel_blocks % units, group = i / b_.channel_blocks / units;
      pack(group, unit, channel_block, packed_weights(group, unit, channel_block));
    });
  }

  void pack_bias() const {
    for (int64_t group = 0; group < p_.groups; ++group) {
      T* dst = memory(scratch_.bias) + group * scratch_.group_outputs;
      for (int64_t k = 0; k < scratch_.group_outputs; ++k)
        dst[k] = bias_ != nullptr && k < p_.outputs ? bias_[group * p_.outputs + k] : T(0);
    }
  }

  Task task_at(int64_t index) const {
    const int64_t point_tasks = divide_up(b_.blocks, b_.task_blocks);
    const int64_t unit = index % b_.unit_blocks * b_.units, block = index / b_.unit_blocks % point_tasks * b_.task_blocks;
    return {index / b_.unit_blocks / point_tasks, block, smaller(b_.blocks, block + b_.task_blocks), unit,
            smaller(Tile::units(p_.outputs), unit + b_.units)};
  }

  Block block_at(int64_t index) const {
    const int64_t line = index / b_.point_blocks * b_.lines, point = index % b_.point_blocks * b_.points;
    return {line, smaller(b_.lines, p_.lines() - line), point, smaller(b_.points, p_.points - point)};
  }

  void run_task(int worker, int64_t index) const {
    const Task task = task_at(index);
    for (int64_t i = task.block; i < task.block_end; ++i) {
      const Block block = block_at(i);
      for (int64_t channel_block = 0; channel_block < b_.channel_blocks; ++channel_block) {
        Ahead ahead = has_channels_behind(channel_block) ? ahead_of_planes(task, block, task.group, block, channel_block + 1)
                      : i + 1 < task.block_end           ? ahead_of(task, block, task.group, block_at(i + 1), channel_block)
                                                         : ahead_of_next_task(task, index, block, channel_block);
        const Source source = source_of(worker, task.group, block, channel_block);
        for (int64_t unit = task.unit; unit < task.unit_end; ++unit) run_unit(worker, task, block, source, unit, channel_block, ahead);
      }
    }
  }

  // Where a block of channels of a block of points lies: `first` is its first channel at its first point of its first line.
  struct Source {
    const T* first;
    int64_t line, point, channel;  // distances; `line` only of copies, `channel` not of panels, whose rows are as long as their tile
  };

  Source source_of(int worker, int64_t group, const Block& block, int64_t channel_block) const {
    const int64_t point = closes_gaps(p_) ? 0 : block.point;  // a copy without gaps finds its points itself
    const T* source = source_ + (group * p_.channels + channel_block * b_.channels) * p_.source_channel + point * p_.source_point;
    if (b_.reading == Reading::in_place) return {source, 0, p_.source_point, p_.source_channel};
    const int64_t channels = channels_of(channel_block), rows = Tile::kPointsInLanes ? channels : block.points;
    const int64_t copied_line = b_.reading == Reading::panels ? block.points * channels : rows * b_.copy_pitch;
    T* const copy = own_copy(worker);
    for (int64_t i = 0; i < block.lines; ++i) {
      const T* line = source + p_.source_line(block.line + i);
      if (b_.reading == Reading::panels) {
        if constexpr (kEvenTiles) {
          if (closes_gaps(p_)) {
            T* const planes = own_planes(worker);
            copy_planes(line, channels, block, planes, p_.points);
            copy_even_panels<T, Tile, false>(planes, 1, p_.points, channels, p_.points, copy + i * copied_line);
            continue;
          }
          const auto copy_line = p_.source_point == 1 ? copy_even_panels<T, Tile, false> : copy_even_panels<T, Tile, true>;
          copy_line(line, p_.source_point, p_.source_channel, channels, block.points, copy + i * copied_line);
        } else {
          copy_panels(line, p_.source_point, p_.source_channel, channels, block.points, Tile::tile_points(block.points),
                      copy + i * copied_line);
        }
      } else if constexpr (Tile::kPointsInLanes) {
        if constexpr (kClosesGaps) {
          if (closes_gaps(p_)) {
            copy_planes(line, channels, block, copy + i * copied_line, b_.copy_pitch);
            continue;
          }
        }
        copy_rows(line, p_.source_channel, rows, block.points, copy + i * copied_line, b_.copy_pitch);
      } else {
        copy_rows(line, p_.source_point, rows, channels, copy + i * copied_line, b_.copy_pitch);
      }
    }
    if (b_.reading == Reading::panels) return {copy, copied_line, 1, 0};
    if constexpr (Tile::kPointsInLanes) return {copy, copied_line, 1, b_.copy_pitch};
    return {copy, copied_line, b_.copy_pitch, 1};
  }

  // The points of a block, of planes with gaps, to planes without.
  void copy_planes(const T* source, int64_t channels, const Block& block, T* planes, int64_t pitch) const {
    for (int64_t c = 0; c < channels; ++c) {
      copy_without_gaps(source + c * p_.source_channel, p_.source_row, p_.source_point, p_.dest_row, block.point, block.points,
                        planes + c * pitch);
    }
  }

  const T* line_of(const Source& source, const Block& block, int64_t i) const {
    return source.first + (b_.reading == Reading::in_place ? p_.source_line(block.line + i) : i * source.line);
  }

  // What is fetched while a block is summed: the source of the next one, a part of it with every tile. A source that lies in one piece is
  // walked through; of larger planes every tile fetches the pieces of some channels, line after line, as memory likes to be read, or, with
  // outputs in the lanes, a line of each.
  struct Ahead {
    const T* source;
    int64_t part;           // elements from tile to tile, ...
    int64_t slices, slice;  // ... after that many tiles, each so many elements further
    int64_t step, jump;
    int64_t tiles, tile;  // that fetch; those that did
  };

  // Whether the next block of channels of the same whole planes is fetched.
  bool has_channels_behind(int64_t channel_block) const {
    return kFetchesChannelBlocks && has_whole_planes() && channel_block + 1 < b_.channel_blocks;
  }
  bool has_whole_planes() const { return p_.source_channel != 1 && p_.rows == 1 && b_.point_blocks == 1; }

  // A block of channels of whole planes, which lie in one piece in each image, for all tiles of a block of channels.
  Ahead ahead_of_planes(const Task& task, const Block& block, int64_t next_group, const Block& next, int64_t next_channel_block) const {
    const int64_t first = next_group * p_.channels + next_channel_block * b_.channels;
    const int64_t tiles = larger(1, (task.unit_end - task.unit) * block.lines * Tile::tiles(block.points) / next.lines);
    const int64_t step = divide_up(channels_of(next_channel_block) * p_.source_channel, tiles * b_.channels);
    const T* const begin = source_ + p_.source_line(next.line) + first * p_.source_channel;
    return {begin, step * b_.channels, next.lines, p_.source_image, step, 0, tiles * next.lines, 0};
  }

  // For the tiles of a block of channels, which fetch these channels.
  Ahead ahead_of(const Task& task, const Block& block, int64_t next_group, const Block& next, int64_t channel_block) const {
    if constexpr (kFetchesChannelBlocks) {
      if (has_whole_planes()) return ahead_of_planes(task, block, next_group, next, 0);
    }
    if constexpr (kClosesGaps) {
      if (closes_gaps(p_) && b_.point_blocks > 1) return ahead_of_gaps(next_group, next, channel_block);
    }
    const T* source = source_ + next_group * p_.channels * p_.source_channel + p_.source_line(next.line) + next.point * p_.source_point;
    const int64_t tiles = (task.unit_end - task.unit) * block.lines * Tile::tiles(block.points);
    if (p_.source_channel == 1 || (p_.rows == 1 && b_.point_blocks == 1)) {
      int64_t elements = next.lines * next.points * larger(p_.source_point, p_.channels);
      if (closes_gaps(p_)) elements = next.lines * p_.channels * p_.source_channel;
      const int64_t step = divide_up(elements, tiles * larger(1, p_.channels)), part = step * b_.channels;
      return {source + channel_block * tiles * part, part, 1, 0, step, 0, tiles, 0};
    }
    source += channel_block * b_.channels * p_.source_channel;
    if (!Tile::kPointsInLanes) {
      const bool is_one_piece = p_.source_row == next.points * p_.source_point;
      const int64_t pieces = is_one_piece ? 1 : next.lines, points = is_one_piece ? next.lines * next.points : next.points;
      const int64_t lines = 1 + divide_up(points * p_.source_point, kLineElements);
      return {source, kLineElements, pieces, p_.source_row, p_.source_channel, 0, pieces * lines, 0};
    }
    // A run of steps fetches a part of a plane's piece, as small as there are tiles for: lines that come together wait for buffers that the
    // tiles' own loads need.
    const int64_t channels = channels_of(channel_block), planes = larger(1, divide_up(channels, kAheadRun));
    const int64_t of_a_part = divide_up(channels, planes);
    int64_t parts = 1;
    while (parts < kAheadRun && 2 * parts * of_a_part <= tiles) parts *= 2;
    const int64_t step = kLineElements / parts;
    return {source, planes * p_.source_channel, parts, kAheadRun * step, step, p_.source_channel - kAheadRun * step, parts * of_a_part, 0};
  }

  // As above, for a part of planes with gaps: rows that are read, one after the other, or, where they are long, what lies between the first
  // point and the last.
  Ahead ahead_of_gaps(int64_t next_group, const Block& next, int64_t channel_block) const {
    const int64_t channels = channels_of(channel_block), planes = larger(1, divide_up(channels, kAheadRun));
    const int64_t first_row = next.point / p_.dest_row, rows = (next.point + next.points - 1) / p_.dest_row - first_row + 1;
    const int64_t plane = (next_group * p_.channels + channel_block * b_.channels) * p_.source_channel;
    const int64_t of_a_row = divide_up(p_.dest_row * p_.source_point, kAheadRun - 1), step = smaller(kLineElements, of_a_row);
    const bool whole_rows = of_a_row <= kLineElements;
    const int64_t piece = whole_rows ? p_.source_row : kAheadRun * kLineElements;
    const int64_t pieces = whole_rows ? rows : divide_up(rows * p_.source_row, piece);
    const T* const begin = source_ + p_.source_line(next.line) + plane + first_row * p_.source_row;
    const int64_t runs = pieces * divide_up(channels, planes), next_plane = p_.source_channel - kAheadRun * step;
    return {begin, planes * p_.source_channel, pieces, piece, step, next_plane, runs, 0};
  }

  // Behind the last block of a task, for the task that the same thread mostly runs next.
  Ahead ahead_of_next_task(const Task& task, int64_t index, const Block& block, int64_t channel_block) const {
    if constexpr (kFetchesForNextTask) {
      if (index + 1 == b_.tasks) return {};
      const Task next = task_at(index + 1);
      const bool is_same_block = next.group == task.group && next.block + 1 == task.block_end;
      if (!is_same_block) return ahead_of(task, block, next.group, block_at(next.block), channel_block);
    }
    return {};
  }

  static void fetch_ahead(Ahead& ahead, PointwiseTile<T>& tile) {
    tile.ahead = tile.source, tile.ahead_step = 0, tile.ahead_jump = 0;
    if (ahead.tile == ahead.tiles) return;
    tile.ahead = ahead.source + ahead.tile / ahead.slices * ahead.part + ahead.tile % ahead.slices * ahead.slice;
    tile.ahead_step = ahead.step, tile.ahead_jump = ahead.jump;
    ++ahead.tile;
  }

  // The sums of a block to lines with gaps, one plane after the other.
  void write_lines(int worker, const Block& block, const T* sums, int64_t first, int64_t outputs) const {
    T* const rows = own_rows(worker);
    for (int64_t k = 0; k < outputs; k += Tile::kV) {
      const int64_t count = smaller(outputs - k, Tile::kV);
      transpose_sums(sums + k, Tile::kMaxWidth, block.lines * block.points, static_cast<int>(count), rows, scratch_.rows_pitch);
      if constexpr (kClosesGaps) {
        write_planes_with_gaps(block, rows, first + k, count);
        continue;
      }
      for (int64_t j = 0; j < count; ++j) {
        for (int64_t i = 0; i < block.lines; ++i) {
          T* const dest = dest_ + p_.dest_line(block.line + i) + (first + k + j) * p_.dest_channel + block.point * p_.dest_point;
          write_spread(rows + j * scratch_.rows_pitch + i * block.points, block.points, p_.dest_point, dest, written_elements(block, i),
                       p_.dest_channel);
        }
      }
    }
  }

  // The sums of a block, [output][points of all its lines], to planes with gaps, row by row.
  void write_planes_with_gaps(const Block& block, const T* sums, int64_t first, int64_t outputs) const {
    for (int64_t k = 0; k < outputs; ++k) {
      for (int64_t i = 0; i < block.lines; ++i) {
        T* const plane = dest_ + p_.dest_line(block.line + i) + (first + k) * p_.dest_channel;
        write_rows(sums + k * scratch_.rows_pitch + i * block.points, block.point, block.point + block.points, plane);
      }
    }
  }

  // Of a plane, the points from `point` to `end`: who writes the end of a row writes the gap behind it.
  void write_rows(const T* sums, int64_t point, int64_t end, T* plane) const {
    while (point < end) {
      const int64_t row = point / p_.source_row, x = point % p_.source_row, left = p_.source_row - x, count = smaller(left, end - point);
      const int64_t at = row * p_.dest_row + x * p_.dest_point;
      const int64_t next_row = point + left < p_.points ? (row + 1) * p_.dest_row : p_.dest_map;
      write_spread(sums, count, p_.dest_point, plane + at, count < left ? count * p_.dest_point : next_row - at, p_.dest_channel);
      point += count, sums += count;
    }
  }

  // Of a plane, with the i-th line of a block: who writes the end of a line writes the gap behind it.
  int64_t written_elements(const Block& block, int64_t i) const {
    const bool is_end = block.point + block.points == p_.points;
    return is_end ? p_.dest_until_next(block.line + i, block.point) : block.points * p_.dest_point;
  }

  // The points by which the places that a tile fetches lie behind its own, so that they are there in time where tiles have few steps.
  int64_t fetch_distance(int64_t channels) const {
    if constexpr (Tile::kFetchSteps == 0) return 0;
    return Tile::kFetchSteps / larger(1, channels) * Tile::kMaxPoints;
  }

  // Of the places where a tile's sums go, before they are first touched: in planes the last line of each output, else the points.
  void fetch_out(PointwiseTile<T>& tile, const T* place, int64_t points, int64_t outputs, int64_t channel_block) const {
    tile.out_ahead = tile.weights, tile.out_step = 0, tile.out_steps = 0;
    if constexpr (kClosesGaps) {
      if (fills_gaps(p_)) return;  // write_spread() fetches
    }
    const bool planes = p_.dest_channel != 1, in_place = writes_in_place<Tile>(p_);
    if (channel_block != (in_place ? 0 : b_.channel_blocks - 1)) return;
    tile.out_ahead = planes ? place + (points - 1) * p_.dest_point : place;
    tile.out_step = planes ? p_.dest_channel : p_.dest_point;
    tile.out_steps = planes ? outputs : points;
  }

  // One block of channels for one unit of outputs.
  void run_unit(int worker, const Task& task, const Block& block, const Source& source, int64_t unit, int64_t channel_block,
                Ahead& ahead) const {
    const int64_t first = task.group * p_.outputs + Tile::first(p_.outputs, unit), outputs = outputs_of(unit);
    const int64_t width = Tile::width(p_.outputs, unit);
    int64_t tile_points = Tile::tile_points(block.points);
    const bool in_place = writes_in_place<Tile>(p_), panels = b_.reading == Reading::panels;
    const bool writes_sums = !in_place && channel_block == b_.channel_blocks - 1;
    PointwiseTile<T> tile{};
    tile.weights = packed_weights(task.group, unit, channel_block);
    if (packs_in_tasks_) {
      pack(task.group, unit, channel_block, own_weights(worker));
      tile.weights = own_weights(worker);
    }
    tile.channels = channels_of(channel_block);
    tile.source_point = source.point, tile.source_channel = source.channel;
    tile.bias = channel_block == 0 && !this->adds ? bias_of(task.group, unit) : nullptr;
    const int64_t sums_pitch = Tile::kPointsInLanes ? scratch_.rows_pitch : Tile::kMaxWidth;  // of points, or of outputs
    tile.pitch = !in_place ? sums_pitch : Tile::kPointsInLanes ? p_.dest_channel : p_.dest_point;
    tile.last = static_cast<int>(in_place ? (outputs - 1) % kLanes<T> + 1 : kLanes<T>);
    const int64_t distance = in_place ? fetch_distance(tile.channels) : 0;
    T* sums = own_sums(worker) + (b_.channel_blocks > 1 ? (unit - task.unit) * scratch_.unit_sums : 0);
    constexpr int64_t kSumsPoint = Tile::kPointsInLanes ? 1 : Tile::kMaxWidth;
    for (int64_t i = 0; i < block.lines; ++i, sums += block.points * kSumsPoint) {
      const T* const line = line_of(source, block, i);
      T* const dest = dest_ + p_.dest_line(block.line + i) + first * p_.dest_channel + block.point * p_.dest_point;
      for (int64_t begin = 0; begin < block.points; begin += tile_points) {
        if constexpr (kEvenTiles) tile_points = Tile::next_tile(block.points - begin);
        const int64_t points = smaller(tile_points, block.points - begin);
        tile.source = line + begin * (panels ? tile.channels : source.point);
        if (panels) tile.source_channel = points;
        fetch_ahead(ahead, tile);
        tile.out = in_place ? dest + begin * p_.dest_point : sums + begin * kSumsPoint;
        if constexpr (Tile::kPointsInLanes) tile.last = static_cast<int>((points - 1) % kLanes<T> + 1);
        fetch_out(tile, dest + (begin + distance) * p_.dest_point, points, outputs, channel_block);
        Tile::run(tile, width, points);
      }
      if (!Tile::kPointsInLanes && writes_sums && !p_.dest_has_gaps)
        write_planes(sums, Tile::kMaxWidth, block.points, outputs, dest, p_.dest_channel);
    }
    if constexpr (Tile::kPointsInLanes && kClosesGaps) {
      if (writes_sums) write_planes_with_gaps(block, sums - block.lines * block.points, first, outputs);
    } else if constexpr (!Tile::kPointsInLanes) {
      if (writes_sums && p_.dest_has_gaps) write_lines(worker, block, sums - block.lines * block.points * kSumsPoint, first, outputs);
    }
  }

  const Product p_;
  const PointwiseBlocking b_;
  const PointwiseScratch scratch_;
  const T* const source_;
  const T* const weight_;
  const T* const bias_;
  T* const dest_;
  char* const memory_;
  T* const packed_;
  const bool packs_in_tasks_, is_packed_;
  const int threads_;
};

}  // namespace
