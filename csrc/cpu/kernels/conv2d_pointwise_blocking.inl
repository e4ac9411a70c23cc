// How the product of a 1x1 convolution is cut into tasks, and what scratch they need.
//
// The reduction is cut into blocks of at most kReductionChannels, by the number of channels alone: each is summed from zero and then added
// to the bias or to the blocks before, which keeps a block's weights in the nearest cache and the error of long sums small. A task takes
// some blocks of points, one after the other, and some units of outputs; how tasks are cut changes no sum.
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/conv2d_pointwise_product.inl"
#include "cpu/kernels/conv2d_pointwise_tile.inl"
#include "cpu/simd/caches.h"

namespace {

using cnn_ext::cpu::Plan;

constexpr int64_t kReductionChannels = 256;
constexpr int64_t kSourceBytes = 384 << 10;  // of a block of points: with the weights and the next block in the second cache
constexpr int64_t kBlockLine = 512;          // bytes of a plane that a block takes: the lines that a tile fetches of it for the next block
// Points share weights that are not near, so many that ...
constexpr int64_t kSliceBytes = kSecondCacheBytes * 25 / 128;  // ... a block of their channels (of the second cache) and ...
constexpr int64_t kSharingBytes = 1 << 20;                     // ... all their channels stay near, bytes
constexpr int64_t kPanelSums = 1 << 20;                        // bytes of the sums of a task that has several blocks of channels
constexpr int64_t kGapPoints = 512;                            // of planes with gaps that are copied at a time for points in the lanes, ...
constexpr int64_t kGapBytes = kSecondCacheBytes / 4;           // ... at most so many bytes
constexpr int64_t kMostGapPlane = 4096;                        // bytes: a page
constexpr int64_t kMostGapWeights = 384 << 10;                 // bytes that stay near beside a block of planes with its gaps
constexpr int64_t kNearWeights = 1 << 20;                      // bytes that stay near from one block of points to the next
constexpr int64_t kFewestCopiedUnits = 3;                      // units of outputs that pay for copying rows or panels of whole planes, ...
constexpr int64_t kFewestRowPanelUnits = 4;                    // ... and panels of a few rows of planes
constexpr bool kCopiesPoints = kVectorRegisters < 32;        // whether planes that have points in the lanes are read from panels, too, ...
constexpr int64_t kFewestPointUnits = 32;                    // ... from so many units on
constexpr int64_t kFewestPanelTiles = 4;                     // that pay for reading weights from the second cache
constexpr int64_t kAliasedPlane = 4096;                      // bytes: the distance of rows that compete, ...
constexpr int64_t kAliasedPixel = 2048;                      // ... half of it where a tile reads 14 of them side by side
constexpr int64_t kTasksPerThread = 8;                       // with fewer, the last one to finish is waited for too long; ...
constexpr int64_t kPanelTasksPerThread = 4;                  // ... with more, panels are copied more often
constexpr int64_t kSerialPack = 1 << 14;                     // weights that one thread packs
constexpr bool kFetchesForNextTask = kVectorRegisters < 32;  // rather than for the task's own next block alone
constexpr int64_t kAlignment = 64;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t aligned(int64_t bytes) { return divide_up(bytes, kAlignment) * kAlignment; }

// How tiles read the source of a block.
enum class Reading {
  in_place,
  rows,   // copied to [channel][points] or [point][channels], which lie closer together
  panels  // copied to [tile][channel][points of the tile]
};

// A block is `lines` x `points`: whole lines where they are short, else a part of one.
struct PointwiseBlocking {
  int64_t channels, channel_blocks;
  int64_t lines, points, point_blocks, blocks;
  int64_t task_blocks, units, unit_blocks;  // of a task
  int64_t tasks;
  Reading reading;
  int64_t copy_pitch;  // of rows
};

// A source is copied first where it is read often enough and its rows lie so far apart that they compete for the same few places in the
// caches, or where the points of a tile are a short piece of each of many planes: there every tile touches twice as many lines as it needs.
// (kCopiesPoints: and pages, as many as channels.)
template <class T, class Tile>
Reading choose_reading(const Product& p) {
  constexpr int64_t kSize = sizeof(T);
  const int64_t units = Tile::units(p.outputs);
  if (closes_gaps(p)) return Tile::kPointsInLanes ? Reading::rows : Reading::panels;
  if constexpr (Tile::kPointsInLanes && kCopiesPoints) return units < kFewestPointUnits ? Reading::in_place : Reading::panels;
  if (!Tile::kPointsInLanes && p.source_channel != 1) {
    return units < (p.rows == 1 ? kFewestCopiedUnits : kFewestRowPanelUnits) ? Reading::in_place : Reading::panels;
  }
  const bool is_aliased = Tile::kPointsInLanes ? p.source_channel * kSize % kAliasedPlane == 0
                                               : p.source_channel == 1 && p.source_point * kSize % kAliasedPixel == 0;
  return is_aliased && units >= kFewestCopiedUnits ? Reading::rows : Reading::in_place;
}

template <class T>
bool weights_are_near(const Product& p) {
  return p.outputs * p.channels * static_cast<int64_t>(sizeof(T)) <= kNearWeights;
}

// The points of a block that are worth the scratch and the cache that they need.
template <class T, class Tile>
int64_t fitting_points(const Product& p, const PointwiseBlocking& b) {
  constexpr int64_t kSize = sizeof(T);
  if (b.reading == Reading::rows && Tile::kPointsInLanes) {
    return closes_gaps(p) ? larger(4 * Tile::kMaxPoints, smaller(kGapPoints, kGapBytes / (b.channels * kSize))) : Tile::kMaxPoints;
  }
  const int64_t point_bytes = larger(1, p.channels * kSize);
  const int64_t few = b.reading == Reading::panels && p.rows == 1
                          ? kWholePlane
                          : larger(4 * Tile::kMaxPoints, smaller(kBlockLine / kSize, kSourceBytes / point_bytes));
  return weights_are_near<T>(p) || Tile::kPointsInLanes
             ? few
             : larger(few, smaller(kSliceBytes / (b.channels * kSize), kSharingBytes / point_bytes));
}

// A pitch of rows of so many elements that share the places of the nearest cache evenly: an odd number of its lines.
template <class T>
int64_t odd_lines(int64_t elements) {
  constexpr int64_t kLine = kAlignment / sizeof(T);
  return (divide_up(elements, kLine) | 1) * kLine;
}

template <class T, class Tile>
PointwiseBlocking make_pointwise_blocking(const Product& p, int threads) {
  PointwiseBlocking b{};
  b.channel_blocks = larger(1, divide_up(p.channels, kReductionChannels));
  b.channels = divide_up(p.channels, b.channel_blocks);
  b.reading = choose_reading<T, Tile>(p);
  const bool panels = b.reading == Reading::panels;
  int64_t fitting = fitting_points<T, Tile>(p, b);
  const int64_t units = Tile::units(p.outputs), wanted = threads > 1 ? threads * (panels ? kPanelTasksPerThread : kTasksPerThread) : 1;
  const int64_t all_points = p.lines() * p.points;
  // Few outputs and many points: smaller blocks rather than too few tasks, down to some tiles where that copies no panel twice.
  const int64_t fewest_units = panels ? kFewestCopiedUnits : 1;
  const int64_t shared_units = panels && weights_are_near<T>(p) ? units : fewest_units;
  const int64_t fewest_tiles = panels && weights_are_near<T>(p) ? kFewestPanelTiles : 1;
  if (p.groups * divide_up(units, shared_units) * divide_up(all_points, fitting) < wanted) {
    fitting = larger(fewest_tiles * Tile::kMaxPoints, smaller(fitting, divide_up(all_points * p.groups * units, wanted * shared_units)));
  }
  if (!Tile::kPointsInLanes && p.source_channel != 1 && p.points <= kWholePlane) fitting = larger(fitting, p.points);
  b.point_blocks = divide_up(p.points, fitting);
  b.points = divide_up(p.points, b.point_blocks);
  if (b.point_blocks > 1) b.points = divide_up(b.points, Tile::kMaxPoints) * Tile::kMaxPoints;
  b.point_blocks = divide_up(p.points, b.points);
  b.lines = b.point_blocks > 1 ? 1 : divide_up(p.lines(), divide_up(p.lines(), larger(1, fitting / p.points)));
  b.blocks = divide_up(p.lines(), b.lines) * b.point_blocks;
  b.task_blocks = larger(1, p.groups * b.blocks / wanted);
  const int64_t point_tasks = p.groups * divide_up(b.blocks, b.task_blocks);
  b.units = larger(smaller(units, fewest_units), units / larger(1, divide_up(wanted, point_tasks)));
  if (panels && b.channel_blocks > 1) {
    const int64_t unit_bytes = b.lines * b.points * Tile::kMaxWidth * static_cast<int64_t>(sizeof(T));
    b.units = divide_up(b.units, divide_up(b.units * unit_bytes, kPanelSums));
  }
  b.units = divide_up(units, divide_up(units, b.units));
  b.unit_blocks = divide_up(units, b.units);
  b.tasks = point_tasks * b.unit_blocks;
  if (b.reading == Reading::rows) {
    b.copy_pitch = Tile::kPointsInLanes ? divide_up(b.points, Tile::kV) * Tile::kV : divide_up(b.channels, Tile::kV) * Tile::kV + Tile::kV;
    if (closes_gaps(p)) b.copy_pitch = odd_lines<T>(b.points);
  }
  return b;
}

// Where things lie in the workspace, in bytes.
struct PointwiseScratch {
  bool packs_in_tasks;    // every weight is read by one block of points alone: who reads it packs it
  int64_t group_outputs;  // of a group, padded to whole units
  int64_t bias, workers;  // offsets into the workspace, behind the weights packed beforehand
  int64_t sums, rows, copy, worker_bytes;
  int64_t unit_sums, rows_pitch;  // elements
  int64_t total(int threads) const { return workers + threads * worker_bytes; }
};

// The outputs of a group in whole units, as their weights are packed.
template <class Tile>
int64_t packed_outputs(const Product& p) {
  const int64_t last = Tile::units(p.outputs) - 1;
  return Tile::first(p.outputs, last) + Tile::width(p.outputs, last);
}

template <class T, class Tile>
int64_t packed_bytes(const Product& p) {
  return aligned(p.groups * packed_outputs<Tile>(p) * p.channels * static_cast<int64_t>(sizeof(T)));
}

// Of the planes of a block of channels, without their gaps, that panels are made of: what a worker's memory ends with.
template <class T>
int64_t plane_bytes(const Product& p, const PointwiseBlocking& b) {
  return closes_gaps(p) && b.reading == Reading::panels ? aligned(b.channels * p.points * static_cast<int64_t>(sizeof(T))) : 0;
}

// Whether tiles write their sums to the destination, rather than to scratch from where they go to it as rows of planes.
template <class Tile>
CNN_EXT_INLINE bool writes_in_place(const Product& p) {
  if constexpr (Tile::kPointsInLanes) return !(kClosesGaps && fills_gaps(p));
  return p.dest_channel == 1;
}

template <class T, class Tile>
PointwiseScratch make_pointwise_scratch(const Product& p, const PointwiseBlocking& b) {
  constexpr int64_t kSize = sizeof(T);
  PointwiseScratch s{};
  s.packs_in_tasks = b.blocks == 1;
  s.group_outputs = packed_outputs<Tile>(p);
  s.bias = s.packs_in_tasks ? 0 : packed_bytes<T, Tile>(p);
  s.workers = s.bias + aligned(p.groups * s.group_outputs * kSize);
  s.sums = s.packs_in_tasks ? aligned(b.channels * Tile::kMaxWidth * kSize) : 0;
  const bool in_place = writes_in_place<Tile>(p);
  const int64_t summed_units = b.channel_blocks > 1 ? b.units : 1;
  s.unit_sums = in_place ? 0 : b.lines * b.points * Tile::kMaxWidth;
  if constexpr (Tile::kPointsInLanes) s.unit_sums = divide_up(s.unit_sums, Tile::kMaxWidth * Tile::kV) * Tile::kMaxWidth * Tile::kV;
  s.rows = s.sums + aligned(summed_units * s.unit_sums * kSize);
  s.rows_pitch = in_place || !p.dest_has_gaps ? 0 : divide_up(b.lines * b.points, Tile::kV) * Tile::kV;
  s.copy = s.rows + aligned(Tile::kV * s.rows_pitch * kSize);
  // Behind the last panel there is room for the rest of a vector.
  const int64_t copied =
      b.reading == Reading::panels ? b.points * b.channels : (Tile::kPointsInLanes ? b.channels : b.points) * b.copy_pitch;
  s.worker_bytes = s.copy + aligned((b.lines * copied + (b.reading == Reading::panels ? Tile::kV : 0)) * kSize);
  s.worker_bytes += plane_bytes<T>(p, b);
  return s;
}

}  // namespace
