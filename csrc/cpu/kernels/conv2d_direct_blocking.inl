// How a gather convolution is cut into tasks, and what scratch they need.
//
// The reduction is cut into blocks of channels of about kReductionTerms terms, a function of one sample's shape alone: each block is summed
// from zero and then added to the bias or to the blocks before, which keeps a block's weights in the nearest cache and the error of long
// sums small. A task is a block of the grid, of several images where these are small, for all or some units of output channels; how tasks
// are cut changes no sum.
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/conv2d_direct_stage.inl"
#include "cpu/kernels/conv2d_direct_tile.inl"
#include "cpu/kernels/conv2d_direct_write.inl"
#include "cpu/simd/caches.h"

namespace {

using cnn_ext::cpu::Plan;

constexpr int64_t kReductionTerms = 208;    // the weights of a tile, 26 KB, stay in the nearest cache beside the source that it reads
constexpr int64_t kSomeLeftOutTerms = 256;  // where tiles at the edge leave out tap columns, and sum fewer
constexpr int64_t kSpanTerms = 288;         // where 3 tap columns are a span, and what a tile costs beside its steps weighs more
constexpr int64_t kWholeVectorTerms = 288;  // where a block is widened to whole vectors of channels
constexpr int64_t kFewPoints = 256;         // of an image: packing is then a large part of the time
constexpr int64_t kStagedBytes = kSecondCacheBytes / 8;  // a block's source, which stays there beside weights, sums and what is fetched
constexpr int64_t kSharedBytes = kSecondCacheBytes / 4;  // one that is staged once for several problems
// With 16 registers, what such a source may come to once its rows are whole tiles' and its channels stand apart.
constexpr int64_t kMostSharedBytes = kVectorRegisters == 32 ? kSharedBytes : kSecondCacheBytes / 2;
constexpr int64_t kTaskPoints = 512;  // grid points that read the same packed weights while these are near
constexpr int64_t kFewestPoints = 28;
constexpr int64_t kTasksPerThread = 4;  // with fewer, the last one to finish is waited for too long; with more, more is staged twice
constexpr int64_t kWholeGridShare = 2;  // of these, where each stages the source of the whole grid
constexpr int64_t kReadingCost = 6;     // of a unit's packed weight, relative to the staging of a source element
constexpr int64_t kAlignment = 64;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t at_least_1(int64_t x) { return x < 1 ? 1 : x; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// How one gather convolution is cut. A task is `images` x `rows` x `cols` grid points x `units` units of output channels of one group.
struct Blocking {
  int64_t channels, stagings;  // that are staged at once: a block of the reduction, or all where problems share them
  int64_t images, image_blocks;
  int64_t row_pieces, rows, row_blocks;  // pieces of a task at most, and the grid points that they are
  int64_t col_pieces, cols, col_blocks;
  int64_t rows_together;  // pieces that a tile takes together
  int64_t units, unit_blocks;
  int64_t tasks;
};

// Whether tap columns read neighbouring elements of what is staged, in neighbouring steps.
inline bool has_neighbouring_taps(const Gather& g) {
  return g.w.source_step == 1 && g.w.tap_step * g.w.tap_step == 1 && !leaves_out_columns(g);
}

// The neighbouring steps that are a span.
template <class Tile>
int span_taps(const Gather& g) {
  return has_neighbouring_taps(g) ? Tile::span_taps(g.w.taps, g.w.tap_step) : 1;
}

template <class T>
int64_t staged_bytes(const Gather& g, const Blocking& b) {
  return b.images * staged_layout<T>(g, b.channels, b.rows, b.cols).image_pitch * static_cast<int64_t>(sizeof(T));
}

// Of a block's source, what is written and read: rows between those of the taps are left out.
template <class T>
int64_t read_bytes(const Gather& g, const Blocking& b) {
  const StagedLayout l = staged_layout<T>(g, b.channels, b.rows, b.cols);
  int64_t rows = 0;
  for (int64_t r = 0; r < l.rows; ++r) rows += is_read(g.h, b.rows, r) ? 1 : 0;
  return b.images * b.channels * rows * l.row_pitch * static_cast<int64_t>(sizeof(T));
}

inline void set_rows(const Gather& g, int64_t pieces, Blocking& b) { b.row_pieces = pieces, b.rows = g.rows.points(pieces); }
inline void set_cols(const Gather& g, int64_t pieces, Blocking& b) { b.col_pieces = pieces, b.cols = g.cols.points(pieces); }

inline void count_blocks(const Gather& g, int64_t units, Blocking& b) {
  b.image_blocks = ceil_div(g.batch, b.images);
  b.row_blocks = ceil_div(g.rows.count, b.row_pieces);
  b.col_blocks = ceil_div(g.cols.count, b.col_pieces);
  b.unit_blocks = ceil_div(units, b.units);
  b.tasks = b.image_blocks * g.groups * b.row_blocks * b.col_blocks * b.unit_blocks;
}

// Elements that a block reads for a channel: of the source, whose rows begin and end within lines, and of the weights.
template <class T>
int64_t read_elements(const Gather& g, const Blocking& b) {
  const StagedLayout l = staged_layout<T>(g, 1, b.rows, b.cols);
  return l.rows * (l.row_pitch + kLineBytes / static_cast<int64_t>(sizeof(T))) + g.outputs * g.taps();
}

// Where channels are innermost, and rows of the whole width fit in such small numbers that much of the source is transposed for several
// blocks: cuts columns, too, into the block that reads least for each of its points. Planes keep their rows, which are read and written
// as long runs.
template <class T, class Tile, class Fits, class WholeTiles>
void fit_area(const Gather& g, const Fits& fits, const WholeTiles& whole_tiles, Blocking& b) {
  const bool is_whole = b.row_pieces == g.rows.count && b.col_pieces == g.cols.count;
  if (g.source.w == 1 || is_whole || 2 * window_of(g.h, b.rows).span <= 3 * b.rows * g.h.source_step) return;
  Blocking best = b;
  set_cols(g, g.cols.count, b);
  while (true) {
    set_rows(g, clamp(kTaskPoints / (b.cols * g.rows.step), 1, g.rows.count), b);
    while (b.row_pieces > 1 && !fits()) set_rows(g, b.row_pieces - 1, b);
    const int64_t pieces = b.row_pieces * b.col_pieces, best_pieces = best.row_pieces * best.col_pieces;
    if (fits() && read_elements<T>(g, b) * best_pieces < read_elements<T>(g, best) * pieces) best = b;
    if (b.cols <= 4 * Tile::kMaxPoints || b.col_pieces == 1) break;
    set_cols(g, whole_tiles(ceil_div(b.col_pieces, 2)), b);
  }
  b = best;
}

// The largest block of grid points whose source fits, of several images where one is small.
template <class T, class Tile>
void fit_points(const Gather& g, int64_t most_bytes, Blocking& b) {
  const auto fits = [&] { return b.images * b.rows * b.cols <= kTaskPoints && read_bytes<T>(g, b) <= most_bytes; };
  const auto whole_tiles = [&](int64_t pieces) {
    return at_least_1(ceil_div(pieces * g.cols.step, Tile::kMaxPoints) * Tile::kMaxPoints / g.cols.step);
  };
  b.images = 1;
  set_rows(g, g.rows.count, b);
  set_cols(g, g.cols.count, b);
  while (b.row_pieces > 1 && !fits()) set_rows(g, ceil_div(b.row_pieces, 2), b);
  while (b.cols > 4 * Tile::kMaxPoints && !fits()) set_cols(g, whole_tiles(ceil_div(b.col_pieces, 2)), b);
  if constexpr (kVectorRegisters == 16) fit_area<T, Tile>(g, fits, whole_tiles, b);
  if (b.row_pieces < g.rows.count || b.col_pieces < g.cols.count) return;
  b.images = smaller(g.batch, kTaskPoints);
  while (b.images > 1 && !fits()) b.images = ceil_div(b.images, 2);
}

// Whether a block of the grid is all of it: the units alone cut the tasks, and every weight is read by one task.
inline bool is_whole_grid(const Blocking& b) { return b.image_blocks * b.row_blocks * b.col_blocks == 1; }

// Halves tasks until there are enough. Fewer points per task read the weights more often, fewer units stage the source more often. Where
// the units make enough tasks of the whole grid, it stays whole: then a thread reads only weights that it packed itself.
template <class T, class Tile>
void split_tasks(const Gather& g, int64_t wanted, Blocking& b) {
  const int64_t units = b.units;
  for (count_blocks(g, units, b); b.tasks < wanted; count_blocks(g, units, b)) {
    if (is_whole_grid(b) && g.groups * units >= wanted) {
      if (b.tasks >= wanted / kWholeGridShare) return;
      b.units = ceil_div(b.units, 2);
      continue;
    }
    const int64_t points = b.images * b.rows * b.cols;
    const bool may_split_points = b.images > 1 || (b.row_pieces > 1 && points >= 2 * kFewestPoints);
    const int64_t staged = staged_bytes<T>(g, b) / (b.channels * static_cast<int64_t>(sizeof(T)));  // of a channel
    if (b.units > 1 && (!may_split_points || kReadingCost * staged < b.units * Tile::kMaxWidth * g.taps())) {
      b.units = ceil_div(b.units, 2);
    } else if (may_split_points && b.images > 1) {
      b.images = ceil_div(b.images, 2);
    } else if (may_split_points) {
      set_rows(g, ceil_div(b.row_pieces, 2), b);
    } else {
      return;
    }
  }
}

// A block's share of `count` items, of which `together` in a row are not parted. Shares are as even as they can be: threads that run as
// many tasks shall be done at the same time.
struct BlockShare {
  int64_t first, count;
};

inline BlockShare share_of(int64_t count, int64_t together, int64_t blocks, int64_t block) {
  const int64_t parts = ceil_div(count, together), first = parts * block / blocks * together;
  return {first, smaller(count, parts * (block + 1) / blocks * together) - first};
}

// The blocks of the reduction.
struct Reduction {
  int64_t channels, blocks;
};

// Whether weights are packed in vectors of channels, for few grid points: where part of a vector is left, packing takes as long as for a
// whole one.
inline bool packs_vectors_of_channels(const Gather& g) {
  return g.weight_channel == 1 && g.weight_output != 1 && g.h.count * g.w.count <= kFewPoints;
}

// Whether a block of `terms` is staged for a few rows of the grid at once: planes are cut into whole rows.
inline bool stages_rows(const Gather& g, int64_t terms) {
  constexpr int64_t kFewRows = 4;
  const int64_t bytes_of_channel = window_of(g.h, kFewRows).span * g.w.source_size * static_cast<int64_t>(sizeof(float));
  return g.source.w != 1 || terms * bytes_of_channel <= g.taps() * kStagedBytes;
}

inline int64_t most_terms(const Gather& g) {
  if constexpr (kHasSpans) {
    if (g.w.taps == 3 && has_neighbouring_taps(g) && stages_rows(g, kSpanTerms)) return kSpanTerms;
  }
  return leaves_out_columns(g) ? kSomeLeftOutTerms : kReductionTerms;
}

inline Reduction reduction_of(const Gather& g) {
  constexpr int64_t kVector = kLanes<float>;
  const int64_t most = most_terms(g);
  int64_t channels = at_least_1(ceil_div(g.channels, at_least_1(ceil_div(g.terms(), most))));
  const int64_t whole = ceil_div(channels, kVector) * kVector;
  if (packs_vectors_of_channels(g) && whole * g.taps() <= kWholeVectorTerms) channels = smaller(whole, at_least_1(g.channels));
  return {channels, at_least_1(ceil_div(g.channels, channels))};
}

template <class T, class Tile>
Blocking make_blocking(const Bundle& bundle, int threads) {
  const Gather& g = bundle.cover;
  const bool shares = bundle.count > 1;
  Blocking b{};
  b.channels = shares ? at_least_1(g.channels) : reduction_of(g).channels;
  b.stagings = shares ? 1 : reduction_of(g).blocks;
  fit_points<T, Tile>(g, shares ? kSharedBytes : kStagedBytes, b);
  b.units = Tile::units(g.outputs);
  split_tasks<T, Tile>(g, threads > 1 ? threads * kTasksPerThread : 1, b);
  const int64_t width = Tile::width(g.outputs, 0);
  const bool pairs_rows = Tile::rows(width, b.cols, 2) == 2 || Tile::body(width, b.cols) < b.cols;
  b.rows_together = pairs_rows && g.rows.step == 1 ? 2 : 1;
  if (b.row_pieces < g.rows.count) set_rows(g, ceil_div(b.row_pieces, b.rows_together) * b.rows_together, b);
  count_blocks(g, Tile::units(g.outputs), b);
  return b;
}

// Where things lie in the workspace, in bytes.
struct Scratch {
  bool packs_in_tasks;                                            // every weight is read by one task alone, which packs it
  int64_t group_bias;                                             // elements
  int64_t bias, offsets, workers;                                 // offsets into the workspace, behind the weights packed beforehand
  int64_t weights_bytes, staged_bytes, sums_bytes, worker_bytes;  // a worker's are followed by what its source and its sink need
  int64_t total(int threads) const { return workers + threads * worker_bytes; }
};

// The sums of a unit for all grid points of a task.
template <class Tile>
int64_t unit_sums(const Blocking& b) {
  return b.images * b.rows * Tile::row_sums(Tile::kMaxWidth, b.cols);
}

inline int64_t aligned(int64_t bytes) { return ceil_div(bytes, kAlignment) * kAlignment; }

// The output channels of a group in whole units, as their weights are packed.
template <class Tile>
int64_t packed_outputs(const Gather& g) {
  const int64_t last = Tile::units(g.outputs) - 1;
  return last < 0 ? 0 : Tile::first(g.outputs, last) + Tile::width(g.outputs, last);
}

template <class T, class Tile>
int64_t packed_bytes(const Gather& g) {
  return aligned(g.groups * packed_outputs<Tile>(g) * g.terms() * static_cast<int64_t>(sizeof(T)));
}

// Whether part i and the next, the even and the odd columns of the same rows, are written together, so that the destination's lines are.
inline bool interleaves(const Bundle& bundle, int i) {
  if (i + 1 >= bundle.count) return false;
  const Gather &even = bundle.parts[i], &odd = bundle.parts[i + 1];
  return even.dest.w == 1 && even.w.dest_step == 2 && even.w.dest_first == 0 && even.h.dest_first == odd.h.dest_first;
}

// Offsets of the steps of a whole block of the reduction and of the last one, which may be smaller.
inline int64_t step_offsets(const Gather& g) { return 2 * reduction_of(g).channels * g.taps(); }

template <class T, class Tile, class Source, class Sink>
Scratch make_scratch(const Bundle& bundle, const Blocking& b) {
  constexpr int64_t kSize = sizeof(T);
  const Gather& g = bundle.cover;
  Scratch s{};
  s.group_bias = packed_outputs<Tile>(g);
  s.packs_in_tasks = is_whole_grid(b);
  int64_t offsets = 0, block_weights = 0;
  bool complete_at_once = !Tile::kWritesUnits;
  for (int i = 0; i < bundle.count; ++i) {
    const Gather& part = bundle.parts[i];
    const int64_t weights = reduction_of(part).channels * part.taps() * Tile::kMaxWidth;
    if (weights > block_weights) block_weights = weights;
    if (!s.packs_in_tasks) s.bias += packed_bytes<T, Tile>(part);
    offsets += step_offsets(part);
    complete_at_once = complete_at_once && reduction_of(part).blocks == 1 && !interleaves(bundle, i);
  }
  s.offsets = s.bias + aligned(g.groups * s.group_bias * kSize);
  s.workers = s.offsets + aligned(offsets * static_cast<int64_t>(sizeof(int32_t)));
  s.weights_bytes = s.packs_in_tasks ? aligned(block_weights * kSize) : 0;
  s.staged_bytes = aligned(staged_bytes<T>(g, b) + kVectorBytes);
  // One tile's sums; those of a unit, where they are taken together; or, while what is staged later adds to them, of the whole task.
  const int64_t complete_sums = !complete_at_once || Sink::kTakesUnits ? unit_sums<Tile>(b) : Tile::kSums;
  const int64_t sums = b.stagings > 1 ? b.units * unit_sums<Tile>(b) : (interleaves(bundle, 0) ? 2 : 1) * complete_sums;
  s.sums_bytes = aligned(sums * kSize);
  const int64_t pooled = Sink::kTakesUnits ? 2 * b.row_pieces * b.col_pieces * Tile::kMaxWidth : 0;
  s.worker_bytes = s.weights_bytes + s.staged_bytes + s.sums_bytes + aligned((Source::line_elements(g) + pooled) * kSize);
  return s;
}

// Calls body(bundle) for the problems that `ends` has: one bundle of all, where they are a few and the source of some rows of the grid
// fits with all its channels; else one for each. Problems without a point are left out.
template <class T, class Tile, class Ends, class Body>
void for_bundles(const Ends& ends, const Body& body) {
  Bundle bundle{};
  const int64_t count = ends.count();
  const auto add = [&](int64_t i) {
    bundle.parts[bundle.count] = ends.gather(i);
    if (!bundle.parts[bundle.count].is_empty()) ++bundle.count;
  };
  if (count > 1 && count <= kMaxParts) {
    for (int64_t i = 0; i < count; ++i) add(i);
    if (bundle.count == 0) return;
    cover_parts(bundle);
    if (staged_bytes<T>(bundle.cover, make_blocking<T, Tile>(bundle, 1)) <= kMostSharedBytes) return body(bundle);
  }
  for (int64_t i = 0; i < count; ++i) {
    bundle.count = 0;
    add(i);
    if (bundle.count == 0) continue;
    cover_parts(bundle);
    body(bundle);
  }
}

template <class T, class Tile, class Source, class Sink>
Plan plan_bundle(const Bundle& bundle, int threads) {
  Plan plan{Tile::kMaxWidth, Tile::kMaxPoints, 0, 0};
  if (bundle.cover.is_empty()) return plan;
  const Blocking b = make_blocking<T, Tile>(bundle, threads);
  plan.tasks = b.tasks;
  plan.workspace_bytes = static_cast<size_t>(make_scratch<T, Tile, Source, Sink>(bundle, b).total(threads));
  return plan;
}

}  // namespace
