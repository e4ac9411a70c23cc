// Direct convolution of bfloat16 with the processor's matrix unit (AMX), forward and backward_input, in both layouts: the gather
// convolutions of conv2d_direct_gather.inl as products of tiles. A tile of the source is 16 grid points x 32 channels, one of the weights
// 32 channels x 16 outputs, kept as pairs of channels; 2 x 2 tiles of sums (32 points x 32 outputs in float32) take 4 loads for 4 products
// of 16 cycles each, so that the unit and not the loads is the limit. All channels and taps are summed in the tiles.
//
// A task stages the source of some rows of one or several images as [row][column][channel], zeros outside and in the channels behind the
// last. Without a stride its points are numbered through, rows and images alike: what lies between the rows is computed and thrown away,
// which wastes less than tiles that end with a row (7x7 maps: 22 % instead of 56 %). With a stride tiles do end with a row.
//
// The unit takes subnormal numbers for zeros and rounds to nearest even after each pair of products: the error is within that of float32
// sums, plus |other operand| * 2^-126 for each subnormal bfloat16. Not for few channels, which leave most of a tile empty.
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
constexpr int64_t kFewestChannels = 16;
constexpr int64_t kPoints = 2 * kTilePoints, kOutputs = 2 * kTileOutputs;  // of a step

// sums[32 points][32 outputs] = source x weights over `steps` pairs of (source, weights) tiles. offsets: from the first point of a tile to
// what a step reads, in elements.
void multiply(const BFloat16* points_0, const BFloat16* points_1, int64_t point_pitch, const int32_t* offsets, int64_t steps,
              const BFloat16* weights, float* sums) {
  const int64_t pitch = point_pitch * static_cast<int64_t>(sizeof(BFloat16));
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < steps; ++i, weights += 2 * kTileElements) {
    _tile_loadd(4, points_0 + offsets[i], pitch);
    _tile_loadd(6, weights, 64);
    _tile_loadd(7, weights + kTileElements, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, points_1 + offsets[i], pitch);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  constexpr int64_t row = kOutputs * sizeof(float);
  _tile_stored(0, sums, row);
  _tile_stored(1, sums + kTileOutputs, row);
  _tile_stored(2, sums + kTilePoints * kOutputs, row);
  _tile_stored(3, sums + kTilePoints * kOutputs + kTileOutputs, row);
}

// How a gather is cut: a task is `images` images x `rows` grid rows x `units` units of 32 outputs.
struct Blocking {
  int64_t images, image_blocks, rows, row_blocks, units, unit_blocks;
  int64_t tasks(int64_t groups) const { return image_blocks * row_blocks * unit_blocks * groups; }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t aligned(int64_t bytes) { return ceil_div(bytes, 64) * 64; }

Blocking make_blocking(const Gather& g, int threads) {
  Blocking b{1, g.batch, g.h.count, 1, ceil_div(g.outputs, kOutputs), 1};
  const auto fits = [&] {
    return b.images * b.rows * g.w.count <= kMostPoints && b.images * Staged(g, b.rows).image_bytes() <= kStagedBytes;
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

class TileRun {
 public:
  TileRun(const Gather& g, const BFloat16* source, const BFloat16* weight, const BFloat16* bias, BFloat16* dest, Packed packed,
          void* workspace, int threads)
      : g_(g),
        b_(make_blocking(g, threads)),
        staged_(g, b_.rows),
        source_(source),
        weight_(weight),
        bias_(bias),
        dest_(dest + g.h.dest_first * g.dest.h + g.w.dest_first * g.dest.w),
        memory_(static_cast<char*>(workspace)),
        packed_(static_cast<BFloat16*>(packed.data != nullptr ? packed.data : workspace)),
        is_packed_(packed.is_ready),
        threads_(threads) {}

  Plan plan() const { return {kOutputs, kPoints, b_.tasks(g_.groups), static_cast<size_t>(worker_place(threads_))}; }

  size_t packed_bytes() const { return static_cast<size_t>(offsets_place()); }

  Outcome run() const {
    if (!is_packed_ && !pack()) return Outcome::not_finite;
    fill_offsets(g_, staged_, offsets());
    parallel_for(threads_, b_.tasks(g_.groups), [&](int worker, int64_t task) { run_task(worker, task); });
    return Outcome::done;
  }

 private:
  int64_t units() const { return ceil_div(g_.outputs, kOutputs); }
  int64_t steps() const { return staged_.channel_blocks * g_.taps(); }
  int64_t unit_weights() const { return steps() * 2 * kTileElements; }

  // In the workspace: weights, offsets of the steps, and for each worker sums, staged source.
  int64_t offsets_place() const { return aligned(g_.groups * units() * unit_weights() * static_cast<int64_t>(sizeof(BFloat16))); }
  int64_t worker_place(int worker) const {
    const int64_t first = offsets_place() + aligned(steps() * static_cast<int64_t>(sizeof(int32_t)));
    return first + worker * (sums_bytes() + b_.images * staged_.image_bytes() + staged_.slack_bytes());
  }
  static constexpr int64_t sums_bytes() { return kPoints * kOutputs * sizeof(float); }

  int32_t* offsets() const { return reinterpret_cast<int32_t*>(memory_ + offsets_place()); }
  float* sums(int worker) const { return reinterpret_cast<float*>(memory_ + worker_place(worker)); }
  BFloat16* staged(int worker) const { return reinterpret_cast<BFloat16*>(memory_ + worker_place(worker) + sums_bytes()); }

  bool pack() const {
    int finite = 1;
    parallel_for(threads_, g_.groups * units(), [&](int, int64_t i) {
      const int64_t group = i / units(), first = i % units() * kOutputs;
      const BFloat16* src = weight_ + group * g_.weight_group + first * g_.weight_output;
      if (!pack_unit(g_, src, smaller(kOutputs, g_.outputs - first), staged_.channel_blocks, packed_ + i * unit_weights())) {
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
      stage_image(g_, staged_, source_ + (p.n + i) * g_.source.n + p.group * g_.channels * g_.source.c, p.y, p.rows,
                  staged(worker) + i * staged_.image_elements);
    }
    const TileState state;
    for (int64_t unit = p.unit; unit < p.unit_end; ++unit) {
      if (staged_.is_linear()) {
        run_points(worker, p, unit, 0, (p.images - 1) * staged_.image_points() + (p.rows - 1) * staged_.row_points() + g_.w.count);
        continue;
      }
      for (int64_t i = 0; i < p.images * p.rows; ++i) {
        const int64_t first = i / p.rows * staged_.image_points() + i % p.rows * staged_.row_points();
        run_points(worker, p, unit, first, first + g_.w.count);
      }
    }
  }

  // The points [begin, end), in the numbering of staged_.
  void run_points(int worker, const Place& p, int64_t unit, int64_t begin, int64_t end) const {
    const BFloat16* weights = packed_ + (p.group * units() + unit) * unit_weights();
    for (int64_t point = begin; point < end; point += kPoints) {
      const BFloat16* first = staged(worker) + point * staged_.point_pitch;
      multiply(first, first + kTilePoints * staged_.point_pitch, staged_.point_pitch, offsets(), steps(), weights, sums(worker));
      write(p, unit, point, smaller(point + kPoints, end), sums(worker));
    }
  }

  // Those of the points [begin, end) that are grid points, row by row.
  void write(const Place& p, int64_t unit, int64_t begin, int64_t end, float* sums) const {
    const int64_t first = unit * kOutputs, count = smaller(kOutputs, g_.outputs - first), channel = p.group * g_.outputs + first;
    if (bias_ != nullptr) add_bias(channel, static_cast<int>(count), end - begin, sums);
    for (int64_t point = begin; point < end;) {
      const int64_t image = point / staged_.image_points(), in_image = point % staged_.image_points();
      const int64_t row = in_image / staged_.row_points(), x = in_image % staged_.row_points();
      const int64_t next = smaller(end, point - x + staged_.row_points());
      const int64_t points = smaller(next, point - x + g_.w.count) - point;
      if (row < p.rows && points > 0) {
        BFloat16* to = dest_ + (p.n + image) * g_.dest.n + channel * g_.dest.c + (p.y + row) * g_.h.dest_step * g_.dest.h +
                       x * g_.w.dest_step * g_.dest.w;
        write_points(sums + (point - begin) * kOutputs, kOutputs, points, count, to, g_.w.dest_step * g_.dest.w, g_.dest.c);
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
  const BFloat16* const source_;
  const BFloat16* const weight_;
  const BFloat16* const bias_;
  BFloat16* const dest_;
  char* const memory_;
  BFloat16* const packed_;
  const bool is_packed_;
  const int threads_;
};

template <Conv2dDirection kDirection>
Plan plan(const Conv2dShape& s, int threads) {
  Plan plan{kOutputs, kPoints, 0, 0};
  for (int64_t i = 0; i < gather_count(kDirection, s); ++i) {
    const Gather g = make_gather_of_rows(kDirection, s, i);
    if (g.is_empty()) continue;
    const Plan one = TileRun(g, nullptr, nullptr, nullptr, nullptr, {}, nullptr, threads).plan();
    plan.tasks += one.tasks;
    if (one.workspace_bytes > plan.workspace_bytes) plan.workspace_bytes = one.workspace_bytes;
  }
  return plan;
}

template <Conv2dDirection kDirection>
Outcome run_packed(const Conv2dShape& s, const Conv2dBuffers& b, Packed packed, void* workspace, int threads) {
  constexpr bool kForward = kDirection == Conv2dDirection::forward;
  const auto* source = static_cast<const BFloat16*>(kForward ? b.input : b.grad_output);
  auto* dest = static_cast<BFloat16*>(kForward ? b.output : b.grad_input);
  const auto* bias = static_cast<const BFloat16*>(b.bias);
  for (int64_t i = 0; i < gather_count(kDirection, s); ++i) {
    const Gather g = make_gather_of_rows(kDirection, s, i);
    if (g.is_empty()) continue;
    const TileRun tiles(g, source, static_cast<const BFloat16*>(b.weight), bias, dest, packed, workspace, threads);
    if (tiles.run() == Outcome::not_finite) return Outcome::not_finite;
  }
  return Outcome::done;
}

template <Conv2dDirection kDirection>
Outcome run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, int threads) {
  return run_packed<kDirection>(s, b, {}, workspace, threads);
}

PackedForm form(const Conv2dShape& s) {
  const Gather g = make_gather_of_rows(Conv2dDirection::forward, s, 0);
  return {TileRun(g, nullptr, nullptr, nullptr, nullptr, {}, nullptr, 1).packed_bytes(), 0};
}

bool accepts(const Conv2dShape& s) {
  return s.dtype == DType::bfloat16 && s.in_channels / s.groups >= kFewestChannels && s.out_channels / s.groups >= kFewestChannels;
}

}  // namespace

extern const Conv2dKernel conv2d_forward_amx = {CNN_EXT_KERNEL_NAME("conv2d_forward_amx"),
                                                Isa::CNN_EXT_ISA,
                                                Conv2dDirection::forward,
                                                accepts,
                                                plan<Conv2dDirection::forward>,
                                                run<Conv2dDirection::forward>};
extern const Conv2dKernel conv2d_backward_input_amx = {CNN_EXT_KERNEL_NAME("conv2d_backward_input_amx"),
                                                       Isa::CNN_EXT_ISA,
                                                       Conv2dDirection::backward_input,
                                                       accepts,
                                                       plan<Conv2dDirection::backward_input>,
                                                       run<Conv2dDirection::backward_input>,
                                                       /*adds_bias=*/true};

extern const PackingConv2d conv2d_forward_amx_packing = {&conv2d_forward_amx, form, run_packed<Conv2dDirection::forward>};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
