// Depthwise convolution, forward and backward_input, of nchw maps: 3x3 and 5x5 kernels as the maps lie in memory, with a stride of 1 or 2,
// others of up to 25 taps, any dilation and in forward any stride of rows, from a copy of their rows.
//
// In place, a vector is neighbouring columns of a row. A tap is a load at a distance from the row, whatever lies there: columns outside the
// map are masked to zeros at the map's edges, rows outside are skipped, and lanes behind a row's last target are written where the next
// row, which is computed later, takes their place. So nothing is staged or transposed, and a task reads and writes maps one behind the
// other, as the processor fetches them by itself. Reads beyond the tensor's ends are the exception: there the rows are copied first.
//
// Where more columns would have to be masked, or rows that a dilation keeps apart could not take each other's place in registers, a block's
// rows are copied with zeros around them first (conv2d_depthwise_rows_copied.inl). That costs a quarter of the time of 3x3.
//
// Tiles (conv2d_depthwise_rows_tile.inl) take one or two vectors of a row and roll down the map. Wider maps take several, from right to
// left: what a tile writes behind its rows is then computed later, too. Rows of less than 3/4 of a vector are left to the kernels with
// a channel in each lane.
//
// The zeros outside meet weights, which must be finite. A target is one chain: bias, then its sources from top to bottom and from left to
// right.
#include "cpu/kernels/conv2d_depthwise_rows_copied.inl"
#include "cpu/simd/caches.h"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

using Tile = void (*)(const TileArguments&);

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

inline int64_t reach_h(const Conv2dShape& s) { return (s.kernel_h - 1) * s.dilation_h; }
inline int64_t reach_w(const Conv2dShape& s) { return (s.kernel_w - 1) * s.dilation_w; }

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
  int64_t rows_per_block, blocks_per_map, blocks_per_task;
  EdgeMasks inside, left, right;
  Tile tiles[kMostVectors];                          // of one vector, of two
  int64_t vectors, tile_vectors, last_tile_vectors;  // of a row, a tile, the tile at its end
  int64_t first_source;                              // of lane 0, for a tile
  bool copies;                                       // blocks are copied
  RowCopy copy;
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
  const int64_t taps = reach_h(job.s) + 1;
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

// No tap may reach further beyond the map than the outer ones that are masked, nor from other vectors than the outer ones.
bool reaches_masked_columns(const RowColumns& columns, int64_t reach) {
  const int64_t last_vector = columns.lanes - (columns.vectors() - 1) * kLanes<float>;
  return columns.first >= -reach && columns.source_of(columns.lanes - 1, columns.last) < columns.source + reach &&
         columns.source_of(last_vector, 0) >= reach;
}

// 3x3 and 5x5 kernels whose outer tap columns alone reach beyond the map.
bool reads_in_place(const Conv2dShape& s, bool forward) {
  if (s.kernel_h != s.kernel_w || (s.kernel_w != 3 && s.kernel_w != 5)) return false;
  if (s.dilation_h != 1 || s.dilation_w != 1 || s.stride_h != s.stride_w || s.stride_w > 2) return false;
  const int64_t reach = reach_of(static_cast<int>(s.kernel_w));
  const RowColumns columns = columns_of(s, forward);
  if (has_pairs(s, forward) && (s.pad_left != reach || columns.source != columns.lanes)) return false;
  return reaches_masked_columns(columns, reach);
}

// A kernel that is no larger than the map, and rows of which a few stay near. With more taps the loads at odd addresses outnumber what a
// channel in each lane (conv2d_depthwise.cpp) costs to transpose.
bool can_copy(const Conv2dShape& s, bool forward) {
  constexpr int64_t kStageBytes = 64 << 10, kMostTaps = 25;
  if (taps_of(s) > kMostTaps) return false;
  if (forward ? s.stride_w > 2 : s.stride_w > 1 || s.stride_h > 1) return false;
  const int64_t source_h = forward ? s.in_h : s.out_h, source_w = forward ? s.in_w : s.out_w, h = reach_h(s), w = reach_w(s);
  if (h > source_h || w > source_w || s.pad_top > h || s.pad_left > w) return false;
  return (h + 1) * (source_w + 2 * w) * static_cast<int64_t>(sizeof(float)) <= kStageBytes;
}

// Blocks of rows, source and target, stay in half of the first cache; tasks are some of them, one behind the other.
void share_out(Job& job, int threads) {
  constexpr int64_t kBlockBytes = kFirstCacheBytes / 2, kTaskBytes = 64 << 10, scalar = sizeof(float);
  const int64_t wanted = threads > 1 ? 4 * static_cast<int64_t>(threads) : 1, map_bytes = (job.source_map() + job.target_map()) * scalar;
  const int64_t wanted_blocks = larger(ceil_div(map_bytes, kBlockBytes), ceil_div(wanted, larger(1, job.maps())));
  job.rows_per_block = larger(reach_h(job.s) + 1, ceil_div(job.target_h, wanted_blocks));
  job.blocks_per_map = ceil_div(job.target_h, job.rows_per_block);
  const int64_t fair = job.blocks() / wanted, fitting = kTaskBytes * job.blocks_per_map / larger(1, map_bytes);
  job.blocks_per_task = larger(1, smaller(fitting, fair));
}

template <int kTaps>
void choose_tiles(Job& job) {
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

void plan_rows_in_place(Job& job) {
  const Conv2dShape& s = job.s;
  s.kernel_w == 3 ? choose_tiles<3>(job) : choose_tiles<5>(job);
  fill_masks(job);
  job.vectors = job.columns.vectors();
  job.tile_vectors = has_pairs(s, job.forward) ? 1 : kMostVectors;
  job.last_tile_vectors = (job.vectors - 1) % job.tile_vectors + 1;
  job.first_source = has_pairs(s, job.forward) ? 0 : job.columns.first;
  int64_t most_rows = 0;
  for (int64_t row = 0; row < job.target_h; row += job.rows_per_block) {
    most_rows = larger(most_rows, source_rows(job, {row, smaller(job.target_h, row + job.rows_per_block)}).count());
  }
  job.scratch_size = align_to(most_rows * job.columns.source + job.columns.read_end() - job.columns.first, 64);
}

RowCopy copy_of(const Conv2dShape& s, bool forward) {
  RowCopy copy{};
  copy.columns = {forward ? s.in_w : s.out_w,
                  forward ? s.out_w : s.in_w,
                  s.kernel_w,
                  forward ? s.stride_w : 1,
                  forward ? s.pad_left : reach_w(s) - s.pad_left,
                  s.dilation_w};
  copy.layout = strip_layout<float>(copy.columns, 1);
  copy.kernel_h = s.kernel_h;
  copy.stride_h = forward ? s.stride_h : 1;
  copy.dilation_h = s.dilation_h;
  return copy;
}

Job make_job(const Conv2dShape& s, bool forward, int threads, void* workspace, int64_t* bytes) {
  Job job{};
  job.s = s;
  job.forward = forward;
  job.columns = columns_of(s, forward);
  job.source_h = forward ? s.in_h : s.out_h;
  job.target_h = forward ? s.out_h : s.in_h;
  job.pad_top = forward || has_pairs(s, forward) ? s.pad_top : reach_h(s) - s.pad_top;
  share_out(job, threads);
  job.copies = !reads_in_place(s, forward);
  if (job.copies) {
    job.copy = copy_of(s, forward);
    job.scratch_size = align_to(job.copy.size(job.rows_per_block), 64);
  } else {
    plan_rows_in_place(job);
  }
  const int64_t distances = job.copies ? align_64(taps_of(s) * static_cast<int64_t>(sizeof(int32_t))) : 0;
  job.copy.distances = static_cast<int32_t*>(workspace);
  job.scratch = reinterpret_cast<float*>(static_cast<char*>(workspace) + distances);
  *bytes = distances + threads * job.scratch_size * static_cast<int64_t>(sizeof(float));
  return job;
}

// Some blocks, one behind the other.
class Task {
 public:
  Task(const Job& job, const Conv2dBuffers& b, int64_t first, int64_t last, float* scratch)
      : job_(job),
        tensor_(static_cast<const float*>(job.forward ? b.input : b.grad_output)),
        tensor_end_(tensor_ + job.maps() * job.source_map()),
        bias_(job.forward ? static_cast<const float*>(b.bias) : nullptr),
        scratch_(scratch),
        block_(first % job.blocks_per_map),
        channel_(first / job.blocks_per_map % job.s.in_channels) {
    const int64_t map = first / job.blocks_per_map;
    float* result = static_cast<float*>(job.forward ? b.output : b.grad_input);
    source_map_ = tensor_ + map * job.source_map();
    target_map_ = result + map * job.target_map();
    weights_ = static_cast<const float*>(b.weight);
    a_.source_row = job.columns.source;
    a_.source_rows = job.source_h;
    a_.pad_top = job.pad_top;
    a_.target_row = job.columns.target;
    a_.target_end = result + last / job.blocks_per_map * job.target_map() + first_row(last % job.blocks_per_map) * job.columns.target;
    if (job.copies) clear_pixels(scratch_, job.scratch_size / kLanes<float>);
    choose_rows();
    for (int64_t block = first; block < last; ++block) {
      job.copies ? compute_copied() : compute_in_place();
      advance();
    }
  }

 private:
  int64_t first_row(int64_t block) const { return smaller(job_.target_h, block * job_.rows_per_block); }

  void choose_rows() {
    a_.first_target = first_row(block_);
    a_.last_target = first_row(block_ + 1);
    rows_ = source_rows(job_, {a_.first_target, a_.last_target});
  }

  void advance() {
    if (++block_ == job_.blocks_per_map) {
      block_ = 0;
      source_map_ += job_.source_map();
      target_map_ += job_.target_map();
      if (++channel_ == job_.s.in_channels) channel_ = 0;
    }
    if (job_.blocks_per_map > 1) choose_rows();
  }

  // Row 0 of the map: in the tensor, or, where tiles would read beyond the tensor's ends, of a copy of the block's rows.
  const float* readable_source() const {
    const int64_t width = job_.columns.source, begin = rows_.first * width;
    const int64_t read_begin = begin + job_.columns.first, read_end = (rows_.last - 1) * width + job_.columns.read_end();
    if (source_map_ - tensor_ >= -read_begin && tensor_end_ - source_map_ >= read_end) return source_map_;
    for (int64_t i = 0; i < job_.scratch_size; i += kLanes<float>) store(scratch_ + i, Vec<float>{});
    __builtin_memcpy(scratch_ - job_.columns.first, source_map_ + begin, rows_.count() * width * sizeof(float));
    return scratch_ - read_begin;
  }

  void compute_copied() {
    const RowCopy& copy = job_.copy;
    const CopiedBlock block{source_map_, job_.source_h, a_.first_target * copy.stride_h - job_.pad_top, a_.last_target - a_.first_target,
                            scratch_};
    CopiedTileArguments a;
    a.source_row = copy.stride_h * copy.layout.row;
    a.distances = copy.distances;
    a.taps = copy.taps();
    a.weights = weights_ + channel_ * a.taps + (job_.forward ? 0 : a.taps - 1);
    a.weight_step = job_.forward ? 1 : -1;
    a.initial = bias_ != nullptr ? bias_[channel_] : 0.0f;
    a.target = target_map_ + a_.first_target * job_.columns.target;
    a.target_row = job_.columns.target;
    a.target_end = a_.target_end;
    a.next_source = source_map_ + rows_.last * job_.columns.source;
    a.next_target = target_map_ + a_.last_target * job_.columns.target;
    copy_rows(copy, block);
    compute_copied_block(copy, block, a);
  }

  void compute_in_place() {
    const RowColumns& columns = job_.columns;
    const float* source = readable_source() + job_.first_source;
    a_.weights = weights_ + channel_ * taps_of(job_.s);
    a_.initial = bias_ != nullptr ? bias_[channel_] : 0.0f;
    a_.right = &job_.right;
    // The next block lies behind this one. Its lines are shared out evenly: each tile fetches as much as it computes.
    const int64_t rows = a_.last_target - a_.first_target, tile = job_.tile_vectors * kLanes<float> * rows;
    a_.next_target = target_map_ + a_.last_target * columns.target;
    a_.next_source = source_map_ + rows_.last * columns.source;
    int64_t vectors = job_.last_tile_vectors;
    for (int64_t first = job_.vectors - vectors; first >= 0; first -= vectors) {
      a_.left = first == 0 ? &job_.left : &job_.inside;
      a_.source = source + first * kLanes<float> * columns.source_step;
      a_.target = target_map_ + first * kLanes<float> * columns.target_step;
      job_.tiles[vectors - 1](a_);
      a_.right = &job_.inside;
      a_.next_target += tile * columns.target_step * columns.target_step;
      a_.next_source += tile * columns.source_step * columns.source_step;
      vectors = job_.tile_vectors;
    }
  }

  const Job& job_;
  const float *const tensor_, *const tensor_end_, *const bias_;
  float* const scratch_;
  const float *weights_, *source_map_;
  float* target_map_;
  int64_t block_, channel_;  // the block's number in its map
  RowRange rows_;            // of the source, that the block meets
  TileArguments a_;
};

template <bool kForward>
Outcome run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, int threads) {
  int64_t bytes;
  const Job job = make_job(s, kForward, threads, workspace, &bytes);
  if (!all_finite(static_cast<const float*>(b.weight), s.in_channels * taps_of(s))) return Outcome::not_finite;
  if (job.copies) fill_distances(job.copy);
  parallel_for(threads, job.tasks(), [&](int worker, int64_t task) {
    const int64_t first = task * job.blocks_per_task;
    Task(job, b, first, smaller(job.blocks(), first + job.blocks_per_task), job.scratch + worker * job.scratch_size);
  });
  return Outcome::done;
}

template <bool kForward>
Plan plan(const Conv2dShape& s, int threads) {
  int64_t bytes;
  const Job job = make_job(s, kForward, threads, nullptr, &bytes);
  const int64_t vectors = job.copies ? widest_copied_tile(job.copy) : job.tile_vectors;
  return {1, vectors * kLanes<float>, job.tasks(), static_cast<size_t>(bytes)};
}

template <bool kForward>
bool accepts(const Conv2dShape& s) {
  if (s.dtype != DType::float32 || s.layout != Layout::nchw || s.groups < 2 || s.groups != s.in_channels) return false;
  if (multiplier_of(s) != 1 || 4 * columns_of(s, kForward).lanes < 3 * kLanes<float>) return false;
  return reads_in_place(s, kForward) || can_copy(s, kForward);
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
