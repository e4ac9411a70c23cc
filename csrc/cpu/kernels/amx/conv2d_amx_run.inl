// A gather convolution in tiles: cut into tasks, staged, multiplied and written.
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/amx/conv2d_amx_pack.inl"
#include "cpu/kernels/amx/conv2d_amx_stage.inl"
#include "cpu/kernels/amx/conv2d_amx_write.inl"
#include "cpu/kernels/amx/tile_state.inl"
#include "cpu/packed.h"
#include "cpu/parallel.h"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

constexpr int64_t kStagedBytes = 256 << 10;  // of a task's source: with a unit's weights beside it, it stays in the second cache
constexpr int64_t kMostPoints = 1024;
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kPoints = 2 * kTilePoints, kOutputs = 2 * kTileOutputs;  // of a step

// The operands of 32 points and a unit of outputs.
struct Operands {
  const BFloat16 *points_0, *points_1;  // of 16 points each
  int64_t point_pitch;
  const int32_t* offsets;  // from the first point of a tile to what a step reads, in elements
  int64_t steps;
  const BFloat16* weights;
};

// Two units compute sums[32 points][16 or 32 outputs, 32 apart] = source x weights, over all steps and all pairs of parts: the matrix unit,
// and the vector unit's dot products of pairs, in the order of the same tiles.
class MatrixUnit {
 public:
  using State = TileState;

  template <int64_t kPartsOfElement, bool kTwoOutputs>
  static void multiply(const Operands& o, float* sums) {
    const int64_t pitch = o.point_pitch * static_cast<int64_t>(sizeof(BFloat16));
    const BFloat16* weights = o.weights;
    const auto load_points = [&](int64_t offset) {
      _tile_loadd(4, o.points_0 + offset, pitch);
      _tile_loadd(5, o.points_1 + offset, pitch);
    };
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < o.steps; ++i, weights += kPartsOfElement * 2 * kTileElements) {
      load_points(o.offsets[i]);
      load_weights<kTwoOutputs>(weights);
      add_products<kTwoOutputs>();
      if constexpr (kPartsOfElement == 2) {
        load_weights<kTwoOutputs>(weights + 2 * kTileElements);
        add_products<kTwoOutputs>();
        load_points(o.offsets[i] + kTileChannels);
        add_products<kTwoOutputs>();
        load_weights<kTwoOutputs>(weights);
        add_products<kTwoOutputs>();
      }
    }
    constexpr int64_t row = kOutputs * sizeof(float);
    _tile_stored(0, sums, row);
    if constexpr (kTwoOutputs) _tile_stored(1, sums + kTileOutputs, row);
    _tile_stored(2, sums + kTilePoints * kOutputs, row);
    if constexpr (kTwoOutputs) _tile_stored(3, sums + kTilePoints * kOutputs + kTileOutputs, row);
  }

 private:
  // The tiles of a step's weights, 32 channels x 16 or 32 outputs.
  template <bool kTwoOutputs>
  static void load_weights(const BFloat16* weights) {
    _tile_loadd(6, weights, 64);
    if constexpr (kTwoOutputs) _tile_loadd(7, weights + kTileElements, 64);
  }

  template <bool kTwoOutputs>
  static void add_products() {
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kTwoOutputs) _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (kTwoOutputs) _tile_dpbf16ps(3, 5, 7);
  }
};

struct DotProducts {
  struct State {};

  template <int64_t kPartsOfElement, bool kTwoOutputs>
  static void multiply(const Operands& o, float* sums) {
    static_assert(kPartsOfElement == 1, "a float16 takes four products, more than float32 arithmetic");
    for (int64_t point = 0; point < 2 * kTilePoints; point += kSomePoints) {
      const BFloat16* const points = (point < kTilePoints ? o.points_0 : o.points_1) + point % kTilePoints * o.point_pitch;
      add_products<kTwoOutputs>(o, points, sums + point * kOutputs);
    }
  }

 private:
  static constexpr int64_t kSomePoints = 8;  // x 2 vectors of outputs: 16 sums cover the latency

  template <bool kTwoOutputs>
  static void add_products(const Operands& o, const BFloat16* points, float* sums) {
    constexpr int kVectors = 1 + kTwoOutputs;
    Vec<float> sum[kSomePoints][kVectors] = {};
    const BFloat16* weights = o.weights;
    for (int64_t i = 0; i < o.steps; ++i, weights += 2 * kTileElements) {
      const BFloat16* source = points + o.offsets[i];
      const BFloat16* row = weights;
      for (int64_t c = 0; c < kTileChannels; c += 2, source += 2, row += 2 * kTileOutputs) {
        Vec<float> weight[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) weight[v] = _mm512_loadu_ps(row + v * kTileElements);
#pragma GCC unroll 8
        for (int p = 0; p < kSomePoints; ++p) {
          const Vec<float> pair = broadcast_from(reinterpret_cast<const float*>(source + p * o.point_pitch));
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) sum[p][v] = _mm512_dpbf16_ps(sum[p][v], (__m512bh)pair, (__m512bh)weight[v]);
        }
      }
    }
#pragma GCC unroll 8
    for (int p = 0; p < kSomePoints; ++p) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) store(sums + p * kOutputs + v * kTileOutputs, sum[p][v]);
    }
  }
};

// How a gather is cut: a task is `images` images x `rows` grid rows x `units` units of 32 outputs.
struct Blocking {
  int64_t images, image_blocks, rows, row_blocks, units, unit_blocks;
  int64_t tasks(int64_t groups) const { return image_blocks * row_blocks * unit_blocks * groups; }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t aligned(int64_t bytes) { return ceil_div(bytes, 64) * 64; }

template <class Staged>
Blocking make_blocking(const Gather& g, int64_t parts, int threads) {
  Blocking b{1, g.batch, g.h.count, 1, ceil_div(g.outputs, kOutputs), 1};
  const auto fits = [&] {
    return b.images * b.rows * g.w.count <= kMostPoints && Staged(g, b.rows, b.images, parts).bytes() <= kStagedBytes;
  };
  while (b.rows > 1 && !fits()) b.rows = ceil_div(b.rows, 2);
  if (b.rows == g.h.count) {
    b.images = g.batch < kMostPoints ? g.batch : kMostPoints;
    while (b.images > 1 && !fits()) b.images = ceil_div(b.images, 2);
  }
  const int64_t units = b.units, wanted = threads > 1 ? threads * kTasksPerThread : 1;
  for (;;) {
    b.image_blocks = ceil_div(g.batch, b.images), b.row_blocks = ceil_div(g.h.count, b.rows), b.unit_blocks = ceil_div(units, b.units);
    if (b.tasks(g.groups) >= wanted) return b;
    if (b.images > 1) {
      b.images = ceil_div(b.images, 2);
    } else if (b.units > 1) {
      b.units = ceil_div(b.units, 2);
    } else if (b.rows > 4) {
      b.rows = ceil_div(b.rows, 2);
    } else {
      return b;
    }
  }
}

// suspects: a byte for each image, in which a run notes that it met what is not finite; null: none.
template <class Element, class Unit, class Staged>
class TileRun {
 public:
  TileRun(const Gather& g, const Element* source, const Element* weight, const Element* bias, Element* dest, Packed packed,
          uint8_t* suspects, void* workspace, int threads)
      : g_(g),
        b_(make_blocking<Staged>(g, kParts<Element>, threads)),
        staged_(g, b_.rows, b_.images, kParts<Element>),
        source_(source),
        weight_(weight),
        bias_(bias),
        dest_(dest + g.h.dest_first * g.dest.h + g.w.dest_first * g.dest.w),
        suspects_(suspects),
        memory_(static_cast<char*>(workspace)),
        packed_(static_cast<BFloat16*>(packed.data != nullptr ? packed.data : workspace)),
        is_packed_(packed.is_ready),
        threads_(threads) {}

  Plan plan() const { return {kOutputs, kPoints, b_.tasks(g_.groups), static_cast<size_t>(worker_place(threads_))}; }

  size_t packed_bytes() const { return static_cast<size_t>(offsets_place()); }

  Outcome run() const {
    if (!is_packed_ && !pack()) return Outcome::not_finite;
    fill_offsets(g_, staged_, kParts<Element>, offsets());
    if constexpr (Staged::kReadsOn) {
      parallel_for(threads_, threads_, [&](int, int64_t worker) {
        __builtin_memset(staged(static_cast<int>(worker)), 0, static_cast<size_t>(staged_.bytes() + staged_.slack_bytes()));
      });
    }
    parallel_for(threads_, b_.tasks(g_.groups), [&](int worker, int64_t task) { run_task(worker, task); });
    return Outcome::done;
  }

 private:
  int64_t units() const { return ceil_div(g_.outputs, kOutputs); }
  int64_t steps() const { return staged_.steps(g_); }
  int64_t unit_weights() const { return steps() * kParts<Element> * 2 * kTileElements; }

  // In the workspace: weights, offsets of the steps, and for each worker sums, staged source.
  int64_t offsets_place() const { return aligned(g_.groups * units() * unit_weights() * static_cast<int64_t>(sizeof(BFloat16))); }
  int64_t worker_place(int worker) const {
    const int64_t first = offsets_place() + aligned(steps() * static_cast<int64_t>(sizeof(int32_t)));
    return first + worker * (sums_bytes() + staged_.bytes() + staged_.slack_bytes());
  }
  static constexpr int64_t sums_bytes() { return kPoints * kOutputs * sizeof(float); }

  int32_t* offsets() const { return reinterpret_cast<int32_t*>(memory_ + offsets_place()); }
  float* sums(int worker) const { return reinterpret_cast<float*>(memory_ + worker_place(worker)); }
  BFloat16* staged(int worker) const { return reinterpret_cast<BFloat16*>(memory_ + worker_place(worker) + sums_bytes()); }

  bool pack() const {
    int finite = 1;
    parallel_for(threads_, g_.groups * units(), [&](int, int64_t i) {
      const int64_t group = i / units(), first = i % units() * kOutputs;
      const Element* src = weight_ + group * g_.weight_group + first * g_.weight_output;
      if (!pack_unit(g_, staged_, src, smaller(kOutputs, g_.outputs - first), packed_ + i * unit_weights())) {
        __atomic_store_n(&finite, 0, __ATOMIC_RELAXED);
      }
    });
    return finite != 0;
  }

  struct Place {
    int64_t group, n, images, y, rows, unit, unit_end;
  };

  Place place_of(int64_t task) const {
    Place p{};
    p.unit = task % b_.unit_blocks * b_.units, p.unit_end = smaller(p.unit + b_.units, units());
    task /= b_.unit_blocks;
    p.y = task % b_.row_blocks * b_.rows, p.rows = smaller(b_.rows, g_.h.count - p.y);
    task /= b_.row_blocks;
    p.group = task % g_.groups;
    p.n = task / g_.groups * b_.images, p.images = smaller(b_.images, g_.batch - p.n);
    return p;
  }

  void run_task(int worker, int64_t task) const {
    const Place p = place_of(task);
    for (int64_t i = 0; i < p.images; ++i) {
      const Element* const image = source_ + (p.n + i) * g_.source.n + p.group * g_.channels * g_.source.c;
      if (!stage_image(g_, staged_, image, i, p.y, p.rows, staged(worker))) suspect(p.n + i);
    }
    [[maybe_unused]] const typename Unit::State state{};
    const int64_t points = (p.images - 1) * staged_.image_points + (p.rows - 1) * staged_.row_points + g_.w.count;
    for (int64_t unit = p.unit; unit < p.unit_end; ++unit) run_points(worker, p, unit, points);
  }

  void suspect(int64_t n) const { __atomic_store_n(suspects_ + n, 1, __ATOMIC_RELAXED); }

  // The first `points` points, in the numbering of staged_.
  void run_points(int worker, const Place& p, int64_t unit, int64_t points) const {
    const auto product = g_.outputs - unit * kOutputs > kTileOutputs ? Unit::template multiply<kParts<Element>, true>
                                                                     : Unit::template multiply<kParts<Element>, false>;
    Operands o{};
    o.point_pitch = staged_.pixel, o.offsets = offsets(), o.steps = steps();
    o.weights = packed_ + (p.group * units() + unit) * unit_weights();
    for (int64_t point = 0; point < points; point += kPoints) {
      o.points_0 = staged(worker) + point * staged_.pixel, o.points_1 = o.points_0 + kTilePoints * staged_.pixel;
      product(o, sums(worker));
      write(p, unit, point, smaller(point + kPoints, points), sums(worker));
    }
  }

  // Those of the points [begin, end) that are grid points, row by row.
  void write(const Place& p, int64_t unit, int64_t begin, int64_t end, float* sums) const {
    const int64_t first = unit * kOutputs, count = smaller(kOutputs, g_.outputs - first), channel = p.group * g_.outputs + first;
    if (bias_ != nullptr) add_bias(channel, static_cast<int>(count), end - begin, sums);
    for (int64_t point = begin; point < end;) {
      const int64_t image = point / staged_.image_points, in_image = point % staged_.image_points;
      const int64_t row = in_image / staged_.row_points, x = in_image % staged_.row_points;
      const int64_t next = smaller(end, point - x + staged_.row_points);
      const int64_t points = smaller(next, point - x + g_.w.count) - point;
      if (row < p.rows && points > 0) {
        const float* of_points = sums + (point - begin) * kOutputs;
        Element* to = dest_ + (p.n + image) * g_.dest.n + channel * g_.dest.c + (p.y + row) * g_.h.dest_step * g_.dest.h +
                      x * g_.w.dest_step * g_.dest.w;
        write_points(of_points, kOutputs, points, count, to, g_.w.dest_step * g_.dest.w, g_.dest.c);
        if (kParts<Element> > 1 && !are_finite(of_points, kOutputs, points, count)) {
          suspect(p.n + image);
        }
      }
      point = next;
    }
  }

  void add_bias(int64_t channel, int count, int64_t points, float* sums) const {
    constexpr int kV = kLanes<float>;
    for (int k = 0; k < count; k += kV) {
      const Vec<float> bias = load_first(bias_ + channel + k, count - k < kV ? count - k : kV);
      for (int64_t i = 0; i < points; ++i) store(sums + i * kOutputs + k, load(sums + i * kOutputs + k) + bias);
    }
  }

  const Gather g_;
  const Blocking b_;
  const Staged staged_;
  const Element* const source_;
  const Element* const weight_;
  const Element* const bias_;
  Element* const dest_;
  uint8_t* const suspects_;
  char* const memory_;
  BFloat16* const packed_;
  const bool is_packed_;
  const int threads_;
};

}  // namespace
}  // namespace cnn_ext::cpu::CNN_EXT_ISA
