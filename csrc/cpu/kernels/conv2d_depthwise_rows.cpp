// Depthwise convolution, forward and backward_input, of nchw maps as they lie in memory, 3x3 or 5x5, with a stride of 1 or 2.
//
// A vector is neighbouring columns of a row. A tap is a load at a distance from the row, whatever lies there: columns outside the map are
// masked to zeros at the map's edges, rows outside are skipped, and lanes behind a row's last target are written where the next row, which
// is computed later, takes their place. So nothing is staged or transposed, and a task reads and writes maps one behind the other, as the
// processor fetches them by itself. Reads beyond the tensor's ends are the exception: there the rows are copied first.
//
// Tiles (conv2d_depthwise_rows_tile.inl) take one or two vectors of a row and roll down the map. Wider maps take several, from right to
// left: what a tile writes behind its rows is then computed later, too. Rows that fill less than 3/4 of their vectors are left to the
// kernels with a channel in each lane.
//
// The zeros outside meet weights, which must be finite. A target is one chain: bias, then its sources from top to bottom and from left to
// right.
#include "cpu/kernels/conv2d_depthwise_rows_tile.inl"
#include "cpu/simd/caches.h"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

// Measured with avx2; whether longer vectors gain by it is open.
constexpr bool kIsFast = kVectorBytes == 32;

using Tile = void (*)(const TileArguments&);
constexpr int kMostVectors = 2;

// How the lanes of a row of targets lie to those of the source.
struct RowColumns {
  int64_t source, target;            // columns of a map
  int64_t lanes;                     // of a row
  int64_t source_step, target_step;  // columns from a lane to the next
  int64_t first, last;               // the sources of lane 0 for the first tap column, or the least distance, and the last one

  int64_t vectors() const { return ceil_div(lanes, kLanes<float>); }
  // Where a tile's loads end, from a row's first column on.
  int64_t read_end() const { return vectors() * kLanes<float> * source_step + last; }
  int64_t source_of(int64_t lane, int64_t distance) const { return lane * source_step + distance; }
};

// The stride of backward_input, whose lanes have two targets each.
inline bool has_pairs(const Conv2dShape& s, bool forward) { return !forward && s.stride_w == kPairStride; }

RowColumns columns_of(const Conv2dShape& s, bool forward) {
  const int64_t taps = s.kernel_w;
  if (forward) return {s.in_w, s.out_w, s.out_w, s.stride_w, 1, -s.pad_left, taps - 1 - s.pad_left};
  if (!has_pairs(s, forward)) return {s.out_w, s.in_w, s.in_w, 1, 1, s.pad_left - (taps - 1), s.pad_left};
  const int64_t pad = reach_of(static_cast<int>(taps));
  return {s.out_w, s.in_w, ceil_div(s.in_w, kPairStride), 1, kPairStride, -((taps - 1 - pad) / 2), (pad + 1) / 2};
}

// The sizes and scratch of one call.
struct Job {
  Conv2dShape s;
  bool forward;
  RowColumns columns;
  int64_t source_h, target_h, pad_top;
  int64_t source_rows_step, target_rows_step;  // so many source rows for so many targets
  int64_t rows_per_block, blocks_per_map, blocks_per_task;
  EdgeMasks inside, left, right;
  Tile tiles[kMostVectors];  // of one vector, of two
  int64_t tile_vectors;
  float* scratch;  // per worker: a block's source
  int64_t scratch_size;

  int64_t source_map() const { return source_h * columns.source; }
  int64_t target_map() const { return target_h * columns.target; }
  int64_t maps() const { return s.batch * s.in_channels; }
  int64_t blocks() const { return maps() * blocks_per_map; }
  int64_t tasks() const { return ceil_div(blocks(), blocks_per_task); }
};

struct RowRange {
  int64_t first, last;
  int64_t count() const { return last - first; }
};

// The source rows of the map that the target rows meet.
RowRange source_rows(const Job& job, RowRange targets) {
  const int64_t taps = job.s.kernel_h;
  RowRange rows;
  if (has_pairs(job.s, job.forward)) {
    rows = {ceil_div(larger(0, targets.first + job.pad_top - (taps - 1)), kPairStride), (targets.last - 1 + job.pad_top) / kPairStride + 1};
  } else {
    const int64_t stride = job.forward ? job.s.stride_h : 1;
    rows = {larger(0, targets.first * stride - job.pad_top), (targets.last - 1) * stride - job.pad_top + taps};
  }
  rows.last = larger(0, smaller(job.source_h, rows.last));
  rows.first = smaller(rows.first, rows.last);
  return rows;
}

void fill_mask(const RowColumns& columns, int64_t first_lane, int64_t distance, LaneMask& mask) {
  for (int64_t i = 0; i < kLanes<float>; ++i) {
    const int64_t source = columns.source_of(first_lane + i, distance);
    mask.lanes[i] = source >= 0 && source < columns.source ? -1 : 0;
  }
}

void fill_masks(Job& job) {
  const RowColumns& columns = job.columns;
  for (int64_t i = 0; i < kMostReach; ++i) {
    for (int32_t& lane : job.inside[i].lanes) lane = -1;
    fill_mask(columns, 0, columns.first + i, job.left[i]);
    fill_mask(columns, (columns.vectors() - 1) * kLanes<float>, columns.last - i, job.right[i]);
  }
}

// Blocks of rows, source and target, stay in half of the first cache; tasks are some of them, one behind the other.
void share_out(Job& job, int threads) {
  constexpr int64_t kBlockBytes = kFirstCacheBytes / 2, kTaskBytes = 64 << 10, scalar = sizeof(float);
  const int64_t wanted = threads > 1 ? 4 * static_cast<int64_t>(threads) : 1, map_bytes = (job.source_map() + job.target_map()) * scalar;
  const int64_t wanted_blocks = larger(ceil_div(map_bytes, kBlockBytes), ceil_div(wanted, larger(1, job.maps())));
  job.rows_per_block = larger(job.s.kernel_h, ceil_div(job.target_h, wanted_blocks));
  job.blocks_per_map = ceil_div(job.target_h, job.rows_per_block);
  const int64_t fair = job.blocks() / wanted, fitting = kTaskBytes * job.blocks_per_map / larger(1, map_bytes);
  job.blocks_per_task = larger(1, smaller(fitting, fair));
}

template <int kTaps>
void choose_tiles(Job& job) {
  job.tile_vectors = has_pairs(job.s, job.forward) ? 1 : kMostVectors;
  if (has_pairs(job.s, job.forward)) {
    job.tiles[0] = compute_pairs_tile<kTaps>;
  } else if (!job.forward) {
    job.tiles[0] = compute_gather_tile<kTaps, 1, true, 1>;
    job.tiles[1] = compute_gather_tile<kTaps, 1, true, 2>;
  } else if (job.s.stride_w == 1) {
    job.tiles[0] = compute_gather_tile<kTaps, 1, false, 1>;
    job.tiles[1] = compute_gather_tile<kTaps, 1, false, 2>;
  } else {
    job.tiles[0] = compute_gather_tile<kTaps, 2, false, 1>;
    job.tiles[1] = compute_gather_tile<kTaps, 2, false, 2>;
  }
}

Job make_job(const Conv2dShape& s, bool forward, int threads, void* workspace, int64_t* bytes) {
  Job job{};
  job.s = s;
  job.forward = forward;
  job.columns = columns_of(s, forward);
  job.source_h = forward ? s.in_h : s.out_h;
  job.target_h = forward ? s.out_h : s.in_h;
  job.pad_top = forward || has_pairs(s, forward) ? s.pad_top : s.kernel_h - 1 - s.pad_top;
  fill_masks(job);
  share_out(job, threads);
  if constexpr (kIsFast) s.kernel_w == 3 ? choose_tiles<3>(job) : choose_tiles<5>(job);
  int64_t most_rows = 0;
  for (int64_t row = 0; row < job.target_h; row += job.rows_per_block) {
    most_rows = larger(most_rows, source_rows(job, {row, smaller(job.target_h, row + job.rows_per_block)}).count());
  }
  job.scratch_size = align_to(most_rows * job.columns.source + job.columns.read_end() - job.columns.first, 64);
  job.scratch = static_cast<float*>(workspace);
  *bytes = threads * job.scratch_size * static_cast<int64_t>(sizeof(float));
  return job;
}

// The source of a block, from row rows.first on: in the tensor, or a copy where tiles would read beyond its ends.
const float* readable_source(const Job& job, const float* tensor, int64_t map, RowRange rows, float* scratch) {
  const int64_t begin = map * job.source_map() + rows.first * job.columns.source;
  const int64_t read_begin = begin + job.columns.first, read_end = begin + (rows.count() - 1) * job.columns.source + job.columns.read_end();
  if (read_begin >= 0 && read_end <= job.maps() * job.source_map()) return tensor + begin;
  for (int64_t i = 0; i < job.scratch_size; i += kLanes<float>) store(scratch + i, Vec<float>{});
  __builtin_memcpy(scratch - job.columns.first, tensor + begin, rows.count() * job.columns.source * sizeof(float));
  return scratch - job.columns.first;
}

// Some target rows of a map. `target_end`: of the task's targets.
void compute_block(const Job& job, const Conv2dBuffers& b, int64_t block, const float* target_end, float* scratch) {
  const RowColumns& columns = job.columns;
  const int64_t map = block / job.blocks_per_map, channel = map % job.s.in_channels, row = block % job.blocks_per_map * job.rows_per_block;
  const float* tensor = static_cast<const float*>(job.forward ? b.input : b.grad_output);
  TileArguments a{};
  a.first_target = row;
  a.last_target = smaller(job.target_h, row + job.rows_per_block);
  const RowRange rows = source_rows(job, {a.first_target, a.last_target});
  const float* source = readable_source(job, tensor, map, rows, scratch) - rows.first * columns.source;
  a.source_row = columns.source;
  a.source_rows = job.source_h;
  a.pad_top = job.pad_top;
  a.weights = static_cast<const float*>(b.weight) + channel * taps_of(job.s);
  a.initial = job.forward && b.bias != nullptr ? static_cast<const float*>(b.bias)[channel] : 0.0f;
  float* target = static_cast<float*>(job.forward ? b.output : b.grad_input) + map * job.target_map();
  a.target_row = columns.target;
  a.target_end = target_end;
  const int64_t lead = has_pairs(job.s, job.forward) ? 0 : columns.first, vectors = columns.vectors();
  if (vectors > job.tile_vectors) {  // what tiles that go down wide maps meet next, the processor does not foresee
    a.next_target = (a.last_target - a.first_target) * columns.target;
    a.next_source = (a.last_target - a.first_target) * job.source_map() / job.target_map() * columns.target;
  }
  for (int64_t last = vectors, first; last > 0; last = first) {
    first = (last - 1) / job.tile_vectors * job.tile_vectors;
    a.source = source + lead + first * kLanes<float> * columns.source_step;
    a.target = target + first * kLanes<float> * columns.target_step;
    a.left = first == 0 ? &job.left : &job.inside;
    a.right = last == vectors ? &job.right : &job.inside;
    job.tiles[last - first - 1](a);
  }
}

bool are_finite(const float* p, int64_t count) {
  Vec<float> sum{};
  for (int64_t i = 0; i < count; i += kLanes<float>) {
    sum = fma(load_lanes(p + i, first_lanes<float>(count - i), Vec<float>{}), Vec<float>{}, sum);
  }
  return is_finite<float>(sum);
}

template <bool kForward>
Outcome run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, int threads) {
  int64_t bytes;
  const Job job = make_job(s, kForward, threads, workspace, &bytes);
  if (!are_finite(static_cast<const float*>(b.weight), s.in_channels * taps_of(s))) return Outcome::not_finite;
  float* result = static_cast<float*>(kForward ? b.output : b.grad_input);
  parallel_for(threads, job.tasks(), [&](int worker, int64_t task) {
    const int64_t first = task * job.blocks_per_task, last = smaller(job.blocks(), first + job.blocks_per_task);
    const int64_t end_row = smaller(job.target_h, last % job.blocks_per_map * job.rows_per_block);
    const float* target_end = result + last / job.blocks_per_map * job.target_map() + end_row * job.columns.target;
    for (int64_t block = first; block < last; ++block) compute_block(job, b, block, target_end, job.scratch + worker * job.scratch_size);
  });
  return Outcome::done;
}

template <bool kForward>
Plan plan(const Conv2dShape& s, int threads) {
  int64_t bytes;
  const Job job = make_job(s, kForward, threads, nullptr, &bytes);
  return {1, job.tile_vectors * kLanes<float>, job.tasks(), static_cast<size_t>(bytes)};
}

// No tap may reach further beyond the map than the outer ones that are masked, nor from other vectors than the outer ones.
bool reaches_masked_columns(const RowColumns& columns, int64_t reach) {
  const int64_t last_vector = columns.lanes - (columns.vectors() - 1) * kLanes<float>;
  return columns.first >= -reach && columns.source_of(columns.lanes - 1, columns.last) < columns.source + reach &&
         columns.source_of(last_vector, 0) >= reach;
}

template <bool kForward>
bool accepts(const Conv2dShape& s) {
  if (!kIsFast || s.dtype != DType::float32 || s.layout != Layout::nchw || s.groups < 2 || s.groups != s.in_channels) return false;
  if (multiplier_of(s) != 1 || s.kernel_h != s.kernel_w || (s.kernel_w != 3 && s.kernel_w != 5)) return false;
  if (s.dilation_h != 1 || s.dilation_w != 1 || s.stride_h != s.stride_w || s.stride_w > 2) return false;
  const int64_t reach = reach_of(static_cast<int>(s.kernel_w));
  const RowColumns columns = columns_of(s, kForward);
  if (has_pairs(s, kForward) && (s.pad_left != reach || columns.source != columns.lanes)) return false;
  return reaches_masked_columns(columns, reach) && 4 * columns.lanes >= 3 * columns.vectors() * kLanes<float>;
}

}  // namespace

extern const Conv2dKernel conv2d_forward_depthwise_rows = {
    CNN_EXT_KERNEL_NAME("conv2d_forward_depthwise_rows"), Isa::CNN_EXT_ISA, Conv2dDirection::forward, accepts<true>, plan<true>, run<true>};
extern const Conv2dKernel conv2d_backward_input_depthwise_rows = {CNN_EXT_KERNEL_NAME("conv2d_backward_input_depthwise_rows"),
                                                                  Isa::CNN_EXT_ISA,
                                                                  Conv2dDirection::backward_input,
                                                                  accepts<false>,
                                                                  plan<false>,
                                                                  run<false>};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
