// The gradient of a depthwise convolution's input, of nchw maps, for strides of 2, kernels of 3, 5 or 7 rows, any number of columns, no
// dilation, one output channel per channel.
//
// A vector is neighbouring columns of grad_output, staged in strips as conv2d_depthwise_planes.cpp does it. A column of grad_output meets
// targets at even and at odd places; a lane belongs to such a pair, and the sums of its two halves are interleaved at the store.
//
// Tile: 1 to 4 vectors of pairs, and as many rows of both halves' sums as the kernel has tap rows. They roll down the strip: each source
// row is loaded once for each distance of columns that has a tap and added to all of them, then two rows of sums are complete and two new
// ones begin. So no phase of the stride reads the strip again.
//
// Source rows outside the map are skipped, columns outside are zeros, so that the weights must be finite. A target is one chain: its
// sources from top to bottom and from left to right.
#include "cpu/kernels/conv2d_depthwise_strided_tile.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

// The sizes and scratch of one call.
template <class T>
struct Job {
  Conv2dShape s;
  int64_t first_distance;  // source column of the first distance for the pair 0
  StripColumns columns;    // targets: pairs; taps: distances
  StripLayout<T> strip;
  int64_t units, tile_vectors;
  int64_t rows_per_task, channels_per_task;
  int64_t stage_elements;

  uint8_t* halves;  // [distance]
  T* weights;       // [channel, distance, half that has a tap, tap row]
  char* scratch;    // per worker: stage, pieces, whether the stage was cleared
  int64_t scratch_bytes;

  int64_t strips() const { return ceil_div(s.batch, units); }
  int64_t row_tasks() const { return ceil_div(s.in_h, rows_per_task); }
  int64_t channel_tasks() const { return ceil_div(s.in_channels, channels_per_task); }
  int64_t tasks() const { return strips() * channel_tasks() * row_tasks(); }
  int64_t source_map() const { return s.out_h * s.out_w; }
  int64_t target_map() const { return s.in_h * s.in_w; }
};

// The tap column that connects half `half` of a pair with the source at a distance, if there is one.
template <class T>
int64_t tap_column(const Job<T>& job, int64_t distance, int64_t half) {
  return half + job.s.pad_left - kStride * (job.first_distance + distance);
}

template <class T>
bool has_tap(const Job<T>& job, int64_t distance, int64_t half) {
  const int64_t column = tap_column(job, distance, half);
  return column >= 0 && column < job.s.kernel_w;
}

struct RowRange {
  int64_t first, last;
};

// The source rows that the target rows [row, last_row) meet, also outside the map.
inline RowRange source_rows(const Conv2dShape& s, int64_t row, int64_t last_row) {
  return {floor_div(row + s.pad_top - (s.kernel_h - 1) + kStride - 1, kStride), floor_div(last_row - 1 + s.pad_top, kStride) + 1};
}

inline RowRange clip(const RowRange& rows, int64_t height) {
  const int64_t first = smaller(height, larger(0, rows.first));
  return {first, larger(first, smaller(height, rows.last))};
}

// Units of a strip: as many as make the best use of the vectors.
template <class T>
void choose_strip(Job<T>& job) {
  constexpr int64_t kMostUnits = 8, kTileRow = 40;  // what a tile does beside a row's multiplications
  const int64_t most = most_vectors(static_cast<int>(job.s.kernel_h));
  int64_t least_cost = 0;
  for (int64_t units = 1; units <= larger(1, smaller(kMostUnits, job.s.batch)); ++units) {
    const StripLayout<T> strip = strip_layout<T>(job.columns, units);
    const int64_t tiles = ceil_div(strip.vectors, most), vectors = ceil_div(strip.vectors, tiles);
    const int64_t cost = tiles * (job.s.kernel_h * job.s.kernel_w * vectors + kTileRow) * 64 / units;
    if (units > 1 && cost * 16 >= least_cost * 15) continue;
    least_cost = cost;
    job.units = units;
    job.strip = strip;
    job.tile_vectors = vectors;
  }
}

// Tasks for each thread to choose from: several small maps, or some rows of a map. A stage stays in the first cache.
template <class T>
void share_out(Job<T>& job, int threads) {
  constexpr int64_t kStageBytes = 24 << 10, kTaskBytes = 64 << 10;
  const int64_t scalar = sizeof(T), fitting = larger(kStageBytes / (job.strip.row * scalar), 2 * job.s.kernel_h) * kStride;
  const int64_t wanted = threads > 1 ? 4 * static_cast<int64_t>(threads) : 1, maps = larger(1, job.strips() * job.s.in_channels);
  const int64_t fair_rows = ceil_div(job.s.in_h, ceil_div(wanted, maps));
  job.rows_per_task = ceil_div(job.s.in_h, ceil_div(job.s.in_h, larger(job.s.kernel_h, smaller(fitting, fair_rows))));
  const int64_t bytes = job.units * job.rows_per_task * job.s.in_w * scalar;
  job.channels_per_task = job.row_tasks() > 1 ? 1 : larger(1, smaller(kTaskBytes / bytes, maps / wanted));
}

// Lays out the call's scratch from `workspace` on (null: sizes only) and returns its bytes.
template <class T>
Job<T> make_job(const Conv2dShape& s, int threads, void* workspace, int64_t* bytes) {
  Job<T> job{};
  job.s = s;
  job.first_distance = floor_div(s.pad_left - (s.kernel_w - 1) + kStride - 1, kStride);
  const int64_t last_distance = floor_div(s.pad_left + 1, kStride);
  job.columns = {s.out_w, ceil_div(s.in_w, kStride), last_distance - job.first_distance + 1, 1, -job.first_distance, 1};
  choose_strip(job);
  share_out(job, threads);
  int64_t most_rows = 0;
  for (int64_t row = 0; row < s.in_h; row += job.rows_per_task) {
    const RowRange rows = clip(source_rows(s, row, smaller(s.in_h, row + job.rows_per_task)), s.out_h);
    most_rows = larger(most_rows, rows.last - rows.first);
  }
  const int64_t scalar = sizeof(T);
  job.stage_elements = align_to(stage_size(job.columns, job.strip, most_rows), kLanes<T>);
  job.scratch_bytes = align_64(job.stage_elements * scalar) +
                      align_64((job.strip.vectors + job.units) * static_cast<int64_t>(sizeof(PairPiece))) +
                      align_64((job.strip.vectors + 1) * 8) + 64;
  const int64_t sizes[] = {align_64(job.columns.taps), align_64(s.in_channels * taps_of(s) * scalar), job.scratch_bytes * threads};
  char* at = static_cast<char*>(workspace);
  if (at != nullptr) {
    job.halves = reinterpret_cast<uint8_t*>(at);
    job.weights = reinterpret_cast<T*>(at + sizes[0]);
    job.scratch = at + sizes[0] + sizes[1];
  }
  *bytes = sizes[0] + sizes[1] + sizes[2];
  return job;
}

// A worker's scratch.
template <class T>
struct Scratch {
  T* stage;
  PairPiece* pieces;
  int64_t* vector_pieces;
  int64_t* is_cleared;

  Scratch(const Job<T>& job, int worker) {
    char* at = job.scratch + worker * job.scratch_bytes;
    stage = reinterpret_cast<T*>(at);
    at += align_64(job.stage_elements * static_cast<int64_t>(sizeof(T)));
    pieces = reinterpret_cast<PairPiece*>(at);
    at += align_64((job.strip.vectors + job.units) * static_cast<int64_t>(sizeof(PairPiece)));
    vector_pieces = reinterpret_cast<int64_t*>(at);
    is_cleared = reinterpret_cast<int64_t*>(at + align_64((job.strip.vectors + 1) * 8));
  }
};

template <class T>
void prepare_scratch(const Job<T>& job, int threads) {
  for (int64_t d = 0; d < job.columns.taps; ++d) {
    job.halves[d] = static_cast<uint8_t>((has_tap(job, d, 0) ? 1 : 0) + (has_tap(job, d, 1) ? 2 : 0));
  }
  for (int worker = 0; worker < threads; ++worker) *Scratch<T>(job, worker).is_cleared = 0;
}

// The weights in the order in which the tiles take them; whether all are finite.
template <class T>
bool pack_weights(const Job<T>& job, const T* weight) {
  const int64_t taps = taps_of(job.s);
  T* packed = job.weights;
  for (const T *map = weight, *last = weight + job.s.in_channels * taps; map < last; map += taps) {
    for (int64_t d = 0; d < job.columns.taps; ++d) {
      for (int64_t half = 0; half < 2; ++half) {
        for (int64_t r = 0; has_tap(job, d, half) && r < job.s.kernel_h; ++r) {
          *packed++ = map[r * job.s.kernel_w + tap_column(job, d, half)];
        }
      }
    }
  }
  return all_finite(weight, job.s.in_channels * taps);
}

// The elements of a vector's two halves, interleaved, that exist: `columns` of them from its first one on.
template <class T>
void write_pair_lanes(uint32_t pairs, int64_t columns, uint32_t (&lanes)[2]) {
  write_mask<T>(pairs, kStride, lanes);
  for (int64_t i = 0; i < 2; ++i) lanes[i] = (lanes[i] | lanes[i] << 1) & first_bits_of(columns - i * kLanes<T>);
}

template <class T>
void list_pieces(const Job<T>& job, int64_t units, const Scratch<T>& scratch) {
  const int64_t source_image = job.s.in_channels * job.source_map(), target_image = job.s.in_channels * job.target_map();
  int64_t used = 0;
  for (int64_t v = 0; v < job.strip.vectors; ++v) {
    scratch.vector_pieces[v] = used;
    for (int64_t unit = 0; unit < units; ++unit) {
      const int64_t pair = v * kLanes<T> - unit * job.strip.unit;  // of lane 0
      const uint32_t pairs = first_bits_of(smaller(job.columns.target - pair, kLanes<T>)) & ~first_bits_of(-pair);
      if (pairs == 0) continue;
      PairPiece& piece = scratch.pieces[used++];
      piece.target = unit * target_image + kStride * pair;
      piece.source = unit * source_image + pair;
      write_pair_lanes<T>(pairs, job.s.in_w - kStride * pair, piece.lanes);
    }
  }
  scratch.vector_pieces[job.strip.vectors] = used;
}

// Some target rows of a strip.
template <class T>
class Task {
 public:
  Task(const Job<T>& job, const Conv2dBuffers& buffers, int worker, int64_t row, int64_t image)
      : job_(job),
        buffers_(buffers),
        scratch_(job, worker),
        row_(row),
        last_row_(smaller(job.s.in_h, row + job.rows_per_task)),
        image_(image),
        units_(smaller(job.units, job.s.batch - image)),
        vectors_(ceil_div((units_ - 1) * job.strip.unit + job.columns.target, kLanes<T>)),
        met_(source_rows(job.s, row, last_row_)),
        staged_(clip(met_, job.s.out_h)) {
    list_pieces(job, units_, scratch_);
    if (*scratch_.is_cleared == 0) {
      for (int64_t i = 0; i < job.stage_elements; i += kLanes<T>) store(scratch_.stage + i, Vec<T>{});
      *scratch_.is_cleared = 1;
    }
  }

  void compute_channel(int64_t channel) {
    const int64_t map = image_ * job_.s.in_channels + channel;
    const T* source = static_cast<const T*>(buffers_.grad_output) + map * job_.source_map();
    stage_strip(job_.columns, job_.strip, source + staged_.first * job_.s.out_w, job_.s.in_channels * job_.source_map(), units_,
                staged_.last - staged_.first, scratch_.stage);
    TileArguments<T> a;
    a.source_row = job_.strip.row;
    a.first_index = met_.first;
    a.last_index = met_.last;
    a.first_source = staged_.first;
    a.last_source = staged_.last;
    a.pad_top = job_.s.pad_top;
    a.first_target = row_;
    a.last_target = last_row_;
    a.distances = job_.columns.taps;
    a.halves = job_.halves;
    a.weights = job_.weights + channel * taps_of(job_.s);
    a.target = static_cast<T*>(buffers_.grad_input) + map * job_.target_map();
    a.target_row = job_.s.in_w;
    const int64_t next_rows = job_.row_tasks() > 1 ? last_row_ - row_ : job_.s.in_h;
    a.next_source = source + ceil_div(next_rows, kStride) * job_.s.out_w;
    a.next_source_row = job_.s.out_w;
    a.next_target = a.target + next_rows * job_.s.in_w;
    a.pieces = scratch_.pieces;
    for (int64_t v = 0; v < vectors_; v += job_.tile_vectors) {
      a.source = scratch_.stage - staged_.first * job_.strip.row + job_.strip.lead + v * kLanes<T>;
      a.vector_pieces = scratch_.vector_pieces + v;
      compute_tile(a, job_.s.kernel_h, smaller(job_.tile_vectors, vectors_ - v));
    }
  }

 private:
  const Job<T>& job_;
  const Conv2dBuffers& buffers_;
  const Scratch<T> scratch_;
  const int64_t row_, last_row_;
  const int64_t image_, units_, vectors_;
  const RowRange met_, staged_;
};

Outcome run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, int threads) {
  int64_t bytes;
  const Job<float> job = make_job<float>(s, threads, workspace, &bytes);
  if (!pack_weights(job, static_cast<const float*>(b.weight))) return Outcome::not_finite;
  prepare_scratch(job, threads);
  parallel_for(threads, job.tasks(), [&](int worker, int64_t index) {
    const int64_t row = index % job.row_tasks() * job.rows_per_task, block = index / job.row_tasks();
    const int64_t first = block % job.channel_tasks() * job.channels_per_task;
    Task<float> task(job, b, worker, row, block / job.channel_tasks() * job.units);
    for (int64_t c = first; c < smaller(s.in_channels, first + job.channels_per_task); ++c) task.compute_channel(c);
  });
  return Outcome::done;
}

Plan plan(const Conv2dShape& s, int threads) {
  int64_t bytes;
  const Job<float> job = make_job<float>(s, threads, nullptr, &bytes);
  return {1, 2 * job.tile_vectors * kLanes<float>, job.tasks(), static_cast<size_t>(bytes)};
}

// Narrower maps are faster with a channel in each lane (conv2d_depthwise.cpp).
bool accepts(const Conv2dShape& s) {
  const bool is_usual_kernel = s.kernel_h == 3 || s.kernel_h == 5 || s.kernel_h == 7;
  return accepts_planes(s, ceil_div(s.in_w, kStride)) && s.stride_h == kStride && s.stride_w == kStride && s.dilation_h == 1 &&
         s.dilation_w == 1 && multiplier_of(s) == 1 && is_usual_kernel && s.kernel_w > 1 && s.pad_left < s.kernel_w;
}

}  // namespace

extern const Conv2dKernel conv2d_backward_input_depthwise_strided = {
    CNN_EXT_KERNEL_NAME("conv2d_backward_input_depthwise_strided"), Isa::CNN_EXT_ISA, Conv2dDirection::backward_input, accepts, plan, run};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
