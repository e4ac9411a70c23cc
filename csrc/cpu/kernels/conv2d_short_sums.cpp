// forward of sums with few terms, as those of first layers, with the 16 registers of AVX2. With 27 terms a register tile is done after some
// 200 cycles, and what the loops of conv2d_direct do between two tiles takes a third of the time; here the tiles of a row are one call
// (conv2d_short_sums_tile.inl). Source rows are staged as there, and all terms of a sum are one block, in the same order at every place.
//
// Tile: in channels_last, output channels in the lanes, as many vectors of them as there are up to 4: 4 x 3, 3 x 4, 2 x 6 or 1 x 12
// grid points. A grid point's channels are then written side by side, and memory is written in the order in which it lies. In nchw 2
// vectors of grid points x up to 6 output channels, whose planes are written before the next ones'.
//
// Not handled: groups, output channels that leave lanes empty in channels_last, rows that fill less than 3/4 of their tiles; and many
// terms, beside which it does not count what stands between tiles.
#include "cpu/kernel.h"
#include "cpu/kernels/conv2d_direct_pack.inl"
#include "cpu/kernels/conv2d_direct_stage.inl"
#include "cpu/kernels/conv2d_short_sums_tile.inl"
#include "cpu/packed.h"
#include "cpu/parallel.h"
#include "cpu/simd/caches.h"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

constexpr int kSums = 12;  // of a tile
constexpr int kMostVectors = 4, kPlaneVectors = 2, kMostPlanes = kSums / kPlaneVectors;
constexpr int64_t kMostTerms = 160;
constexpr int64_t kMostSharedTerms = 64;  // where conv2d_direct's tap columns share what they broadcast
constexpr int64_t kFewestOutputs = 8;
constexpr int64_t kStagedBytes = kSecondCacheBytes / 8;  // of a task
constexpr int64_t kTasksPerThread = 4;                   // with fewer, the last one to finish is waited for too long
constexpr int64_t kPointTilesAhead = 8;                  // how far ahead the places of sums are fetched where channels are innermost
constexpr int64_t kAlignment = 64;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t aligned(int64_t bytes) { return divide_up(bytes, kAlignment) * kAlignment; }

using RunTiles = void (*)(const TileRow&);

template <int kItems>
RunTiles tiles_of_planes(int64_t outputs) {
  if constexpr (kItems > 1) {
    if (outputs < kItems) return tiles_of_planes<kItems - 1>(outputs);
  }
  return run_tiles<false, kPlaneVectors, kItems>;
}

template <int kVectors>
RunTiles tiles_of_points(int64_t vectors) {
  if constexpr (kVectors > 1) {
    if (vectors < kVectors) return tiles_of_points<kVectors - 1>(vectors);
  }
  return run_tiles<true, kVectors, kSums / kVectors>;
}

// The output channels are shared out evenly among units, each as wide as a tile: in channels_last in whole vectors.
struct Units {
  explicit Units(const Conv2dShape& s)
      : channel_lanes(s.layout == Layout::nhwc),
        step(channel_lanes ? kLanes<float> : 1),
        steps(s.out_channels / step),
        count(divide_up(steps, channel_lanes ? kMostVectors : kMostPlanes)) {}

  int64_t first(int64_t unit) const { return unit * steps / count * step; }
  int64_t width(int64_t unit) const { return first(unit + 1) - first(unit); }
  int64_t tile_points(int64_t unit) const { return channel_lanes ? kSums / (width(unit) / step) : kPlaneVectors * kLanes<float>; }
  RunTiles tiles(int64_t unit) const {
    return channel_lanes ? tiles_of_points<kMostVectors>(width(unit) / step) : tiles_of_planes<kMostPlanes>(width(unit));
  }

  bool channel_lanes;
  int64_t step, steps, count;
};

// How a layer is cut: a task is some rows of an image.
struct Job {
  Job(const Conv2dShape& s, int threads) : g(make_gather_of_rows(Conv2dDirection::forward, s, 0)), units(s) {
    const int64_t wanted = threads > 1 ? threads * kTasksPerThread : 1;
    rows = larger(1, s.out_h);
    while (rows > 1 && (staged_bytes(rows) > kStagedBytes || s.batch * divide_up(s.out_h, rows) < wanted)) rows = divide_up(rows, 2);
    row_blocks = divide_up(s.out_h, rows);
    layout = staged_layout<float>(g, g.channels, rows, g.w.count);
    bias = aligned(g.outputs * g.terms() * static_cast<int64_t>(sizeof(float)));
    offsets = bias + aligned(g.outputs * static_cast<int64_t>(sizeof(float)));
    workers = offsets + aligned(g.terms() * static_cast<int64_t>(sizeof(int32_t)));
    worker_bytes = aligned(staged_bytes(rows) + kVectorBytes);
  }

  int64_t staged_bytes(int64_t block_rows) const {
    return staged_layout<float>(g, g.channels, block_rows, g.w.count).image_pitch * static_cast<int64_t>(sizeof(float));
  }
  int64_t tasks() const { return g.batch * row_blocks; }
  // The rows of an image that are a task's.
  int64_t first_row(int64_t task) const { return task % row_blocks * g.h.count / row_blocks; }
  int64_t rows_of(int64_t task) const { return (task % row_blocks + 1) * g.h.count / row_blocks - first_row(task); }
  size_t packed_bytes() const { return static_cast<size_t>(bias); }
  size_t workspace_bytes(int threads) const { return static_cast<size_t>(workers + threads * worker_bytes); }

  Gather g;
  Units units;
  int64_t rows, row_blocks;
  StagedLayout layout;
  int64_t bias, offsets, workers, worker_bytes;  // bytes: places in the workspace, behind the packed weights; of a worker
};

class ShortSums {
 public:
  ShortSums(const Conv2dShape& s, const Conv2dBuffers& b, Packed packed, void* workspace, int threads)
      : job_(s, threads),
        source_{static_cast<const float*>(b.input), job_.g.source},
        output_(static_cast<float*>(b.output)),
        memory_(static_cast<char*>(workspace)),
        weights_(static_cast<float*>(packed.data != nullptr ? packed.data : workspace)),
        threads_(threads) {
    is_finite_ = packed.is_ready || pack(static_cast<const float*>(b.weight));
    copy_bias(static_cast<const float*>(b.bias));
    fill_offsets<float>(job_.g, job_.layout, job_.g.channels, reinterpret_cast<int32_t*>(memory_ + job_.offsets));
  }

  Outcome run() const {
    if (!is_finite_) return Outcome::not_finite;
    parallel_for(threads_, job_.tasks(), [&](int worker, int64_t task) { run_task(worker, task); });
    return Outcome::done;
  }

 private:
  float* bias() const { return reinterpret_cast<float*>(memory_ + job_.bias); }
  float* staged(int worker) const { return reinterpret_cast<float*>(memory_ + job_.workers + worker * job_.worker_bytes); }

  // Whether all weights are finite.
  bool pack(const float* weight) const {
    const Gather& g = job_.g;
    bool finite = true;
    for (int64_t unit = 0; unit < job_.units.count; ++unit) {
      const int64_t first = job_.units.first(unit), width = job_.units.width(unit);
      finite &= pack_unit(g, weight + first * g.weight_output, width, width, g.channels, weights_ + first * g.terms());
    }
    return finite;
  }

  void copy_bias(const float* from) const {
    for (int64_t k = 0; k < job_.g.outputs; ++k) bias()[k] = from != nullptr ? from[k] : 0.0f;
  }

  void run_task(int worker, int64_t task) const {
    const Gather& g = job_.g;
    const int64_t image = task / job_.row_blocks, first = job_.first_row(task), end = first + job_.rows_of(task);
    const StageTask staging{image, 0, g.channels, end - first, first * g.h.source_step + g.h.source_first, g.w.source_first};
    stage(g, job_.layout, staging, source_, static_cast<float*>(nullptr), staged(worker));
    const float* const next = task + 1 < job_.tasks() ? source_of(task + 1) : nullptr;
    const auto run_row = [&](int64_t unit, int64_t y) {
      const float* const row = staged(worker) + (y - first) * g.h.source_step * job_.layout.row_pitch;
      run_unit(unit, row, output_ + image * g.dest.n + y * g.dest.h, source_ahead(next, unit, y - first));
    };
    // A row of all channels is written as it lies in channels_last; planes are written a few at a time.
    const int64_t units = job_.units.count;
    if (job_.units.channel_lanes) {
      for (int64_t y = first; y < end; ++y) {
        for (int64_t unit = 0; unit < units; ++unit) run_row(unit, y);
      }
    } else {
      for (int64_t unit = 0; unit < units; ++unit) {
        for (int64_t y = first; y < end; ++y) run_row(unit, y);
      }
    }
  }

  // The first row that a task reads.
  const float* source_of(int64_t task) const {
    const Gather& g = job_.g;
    const int64_t y = clamp(job_.first_row(task) * g.h.source_step + g.h.source_first, 0, g.h.source_size);
    return source_.data + task / job_.row_blocks * g.source.n + y * g.source.h;
  }

  // What a row of tiles fetches of the rows behind `next`: as many as the next row of grid points is further on. Of all channels, a part
  // for each unit, where they are innermost; else each of the first units has a channel.
  Fetch source_ahead(const float* next, int64_t unit, int64_t row) const {
    const Gather& g = job_.g;
    const Units& units = job_.units;
    const bool channels_inner = g.source.c == 1;
    if (next == nullptr || (!channels_inner && unit >= g.channels)) return fetch_nothing(weights_);
    const int64_t rows = g.h.source_step * g.source.h, part = channels_inner ? divide_up(rows, units.count) : rows;
    const float* const at = next + row * rows + unit * (channels_inner ? part : g.source.c);
    const int64_t steps = divide_up(g.w.count, units.tile_points(unit)) * larger(1, g.terms() / kTermsTogether);
    return {reinterpret_cast<const char*>(at), divide_up(part * static_cast<int64_t>(sizeof(float)), steps), steps};
  }

  // A row of grid points of a unit. out: of the row's first output channel.
  void run_unit(int64_t unit, const float* staged_row, float* out, const Fetch& source) const {
    const Gather& g = job_.g;
    const Units& units = job_.units;
    const int64_t channel = units.first(unit);
    TileRow row{};
    row.weights = weights_ + channel * g.terms(), row.bias = bias() + channel;
    row.staged = staged_row, row.points = g.w.count;
    row.offsets = reinterpret_cast<const int32_t*>(memory_ + job_.offsets), row.terms = g.terms();
    row.out = out + channel * g.dest.c, row.pitch = units.channel_lanes ? g.dest.w : g.dest.c;
    row.ahead = units.channel_lanes ? kPointTilesAhead * units.tile_points(unit) * row.pitch : g.dest.h;
    row.source = source;
    units.tiles(unit)(row);
  }

  const Job job_;
  const TensorSource<float> source_;
  float* const output_;
  char* const memory_;
  float* const weights_;  // packed
  const int threads_;
  bool is_finite_;
};

bool accepts(const Conv2dShape& s) {
  if (s.dtype != DType::float32 || s.groups != 1 || s.kernel_h * s.kernel_w == 1) return false;
  const bool shares_columns = s.kernel_w % 3 == 0 && s.stride_w == 1 && s.dilation_w == 1;
  const int64_t terms = s.in_channels * s.kernel_h * s.kernel_w, most = shares_columns ? kMostSharedTerms : kMostTerms;
  if (terms == 0 || terms > most || s.out_channels < kFewestOutputs) return false;
  const Units units(s);
  if (s.out_channels % units.step != 0) return false;
  const int64_t points = units.tile_points(0);
  return s.out_w >= points && 4 * s.out_w >= 3 * divide_up(s.out_w, points) * points;
}

Plan plan(const Conv2dShape& s, int threads) {
  const Job job(s, threads);
  return {job.units.width(0), job.units.tile_points(0), job.tasks(), job.workspace_bytes(threads)};
}

Outcome run_packed(const Conv2dShape& s, const Conv2dBuffers& buffers, Packed packed, void* workspace, int threads) {
  return ShortSums(s, buffers, packed, workspace, threads).run();
}

Outcome run(const Conv2dShape& s, const Conv2dBuffers& buffers, void* workspace, int threads) {
  return run_packed(s, buffers, {}, workspace, threads);
}

// The units depend on the layout.
PackedForm form(const Conv2dShape& s) {
  const Job job(s, 1);
  return {job.packed_bytes(), job.units.channel_lanes ? 1 : 0};
}

}  // namespace

extern const Conv2dKernel conv2d_forward_short_sums = {CNN_EXT_KERNEL_NAME("conv2d_forward_short_sums"),
                                                       Isa::CNN_EXT_ISA,
                                                       Conv2dDirection::forward,
                                                       accepts,
                                                       plan,
                                                       run,
                                                       /*adds_bias=*/false,
                                                       /*maps_padding=*/true};

extern const PackingConv2d conv2d_forward_short_sums_packing = {&conv2d_forward_short_sums, form, run_packed};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
