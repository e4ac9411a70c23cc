// Depthwise convolution, forward and backward_input, of nchw maps, any number of output channels per channel, kernel and dilation. The
// stride of columns is 1 or 2 in forward, that of rows any; in backward_input both are 1, which is a forward with the taps in reverse.
//
// A vector is neighbouring columns. Rows of a map, with zeros around them, are staged side by side with the same rows of the channel's maps
// of other images: a strip (conv2d_depthwise_planes_strip.inl), in which padding, strides and maps narrower than a vector make no
// difference.
//
// Tile: 1 to 4 vectors of a strip, and as many rows of sums as the kernel has tap rows, up to 7 (larger kernels take several passes). The
// sums roll down the strip: each source row is loaded once for each tap column and added to all of them, then one row of sums is complete
// and a new one begins. So each load, which at an odd address costs two, serves all tap rows, and each weight, which is broadcast from
// memory, all vectors; 8 sums or more keep two multipliers of latency 4 busy.
//
// Source rows outside the map are skipped, columns outside are zeros, so that the weights must be finite. A target is one chain: bias, then
// its taps in the order of their sources (map by map, rows from top to bottom, in a row from left to right), whatever lies beside it in the
// strip.
#include "cpu/kernels/conv2d_depthwise_planes_tile.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

// The sizes and scratch of one call. Either direction is a convolution of source maps into target maps.
template <class T>
struct Job {
  Conv2dShape s;
  bool forward;
  int64_t source_h, target_h, pad_top, stride_h;
  StripColumns columns;
  int64_t source_maps;   // that add up in one target map
  int64_t channels;      // of the target
  int64_t row_classes;   // target rows this far apart share source rows
  int64_t index_stride;  // of a class: source rows, a dilation apart, from a target row to the next
  int64_t pass_rows;     // tap rows of a pass, at most
  StripLayout<T> strip;
  int64_t units, tile_vectors;
  int64_t rows_per_task, channels_per_task;
  int64_t stage_elements, sums_elements;

  int64_t* tap_columns;  // [tap column]: elements of the stage
  T* weights;            // [channel, source map], in the order in which the passes and tiles take them
  char* scratch;         // per worker: stage, sums between passes, pieces, whether the stage was cleared
  int64_t scratch_bytes;

  int64_t strips() const { return ceil_div(s.batch, units); }
  int64_t row_tasks() const { return ceil_div(target_h, rows_per_task); }
  int64_t channel_tasks() const { return ceil_div(channels, channels_per_task); }
  int64_t tasks() const { return strips() * channel_tasks() * row_tasks(); }
  int64_t source_map() const { return source_h * columns.source; }
  int64_t target_map() const { return target_h * columns.target; }
  int64_t weights_of_channel() const { return source_maps * taps_of(s); }
  bool one_pass() const { return source_maps == 1 && s.kernel_h <= pass_rows; }
};

// The source rows that the target rows [row, last_row) read.
struct RowRange {
  int64_t first, last;
  int64_t count() const { return last - first; }
};

template <class T>
RowRange source_rows(const Job<T>& job, int64_t row, int64_t last_row) {
  const int64_t first = row * job.stride_h - job.pad_top;
  const int64_t last = (last_row - 1) * job.stride_h - job.pad_top + (job.s.kernel_h - 1) * job.s.dilation_h + 1;
  const int64_t clipped = smaller(job.source_h, larger(0, first));
  return {clipped, larger(clipped, smaller(job.source_h, last))};
}

// What a row of a strip costs each of its units, in multiplications: a tile of fewer than 8 sums waits for its own additions.
template <class T>
int64_t cost_of_unit(const Job<T>& job, const StripLayout<T>& strip, int64_t units, int64_t sums) {
  constexpr int64_t kTileRow = 40;  // what a tile does beside
  const int64_t tiles = ceil_div(strip.vectors, most_vectors(sums)), vectors = ceil_div(strip.vectors, tiles);
  return tiles * (larger(8, sums * vectors) * job.s.kernel_w + kTileRow) * 64 / units;
}

// Units of a strip: as many as make the best use of the vectors, while a strip of whole maps stays in the first cache.
template <class T>
void choose_strip(Job<T>& job, int64_t sums) {
  constexpr int64_t kStageBytes = 24 << 10, kMostUnits = 8;
  int64_t least_cost = 0;
  for (int64_t units = 1; units <= larger(1, smaller(kMostUnits, job.s.batch)); ++units) {
    const StripLayout<T> strip = strip_layout<T>(job.columns, units);
    if (units > 1 && strip.row * job.source_h * static_cast<int64_t>(sizeof(T)) > kStageBytes) break;
    const int64_t cost = cost_of_unit(job, strip, units, sums);
    if (units > 1 && cost * 16 >= least_cost * 15) continue;
    least_cost = cost;
    job.units = units;
    job.strip = strip;
  }
  job.tile_vectors = ceil_div(job.strip.vectors, ceil_div(job.strip.vectors, most_vectors(sums)));
  const int64_t row_bytes = job.strip.row * static_cast<int64_t>(sizeof(T));
  job.rows_per_task = larger(kStageBytes / row_bytes, 2 * (job.s.kernel_h - 1) * job.s.dilation_h) / job.stride_h;
}

// Tasks for each thread to choose from: several small maps, or some rows of a map.
template <class T>
void share_out(Job<T>& job, int threads) {
  constexpr int64_t kTaskBytes = 64 << 10;
  const int64_t wanted = threads > 1 ? 4 * static_cast<int64_t>(threads) : 1, maps = larger(1, job.strips() * job.channels);
  const int64_t fair_rows = ceil_div(job.target_h, ceil_div(wanted, maps));
  const int64_t row_tasks = ceil_div(job.target_h, larger(1, smaller(job.rows_per_task, larger(fair_rows, job.s.kernel_h))));
  job.rows_per_task = ceil_div(job.target_h, row_tasks);
  const int64_t bytes = job.units * job.rows_per_task * job.columns.target * static_cast<int64_t>(sizeof(T));
  job.channels_per_task = row_tasks > 1 ? 1 : larger(1, smaller(kTaskBytes / bytes, maps / wanted));
}

// Lays out the call's scratch from `workspace` on (null: sizes only) and returns its bytes.
template <class T>
Job<T> make_job(const Conv2dShape& s, bool forward, int threads, void* workspace, int64_t* bytes) {
  Job<T> job{};
  job.s = s;
  job.forward = forward;
  const int64_t reach_h = (s.kernel_h - 1) * s.dilation_h, reach_w = (s.kernel_w - 1) * s.dilation_w;
  job.source_h = forward ? s.in_h : s.out_h;
  job.target_h = forward ? s.out_h : s.in_h;
  job.pad_top = forward ? s.pad_top : reach_h - s.pad_top;
  job.stride_h = forward ? s.stride_h : 1;
  job.columns = {forward ? s.in_w : s.out_w,
                 forward ? s.out_w : s.in_w,
                 s.kernel_w,
                 forward ? s.stride_w : 1,
                 forward ? s.pad_left : reach_w - s.pad_left,
                 s.dilation_w};
  job.source_maps = forward ? 1 : multiplier_of(s);
  job.channels = forward ? s.out_channels : s.in_channels;
  const int64_t common = greatest_common_divisor(job.stride_h, s.dilation_h);
  job.row_classes = s.dilation_h / common;
  job.index_stride = job.stride_h / common;
  const int64_t passes = ceil_div(s.kernel_h, kMostSums * job.index_stride);
  job.pass_rows = ceil_div(s.kernel_h, passes);
  choose_strip(job, ceil_div(job.pass_rows, job.index_stride));
  share_out(job, threads);
  int64_t most_rows = 0;
  for (int64_t row = 0; row < job.target_h; row += job.rows_per_task) {
    most_rows = larger(most_rows, source_rows(job, row, smaller(job.target_h, row + job.rows_per_task)).count());
  }
  const int64_t scalar = sizeof(T);
  job.stage_elements = align_to(stage_size(job.columns, job.strip, most_rows), kLanes<T>);
  job.sums_elements = job.one_pass() ? 0 : job.rows_per_task * job.strip.vectors * kLanes<T>;
  const int64_t pieces = job.strip.vectors + job.units;
  job.scratch_bytes = align_64((job.stage_elements + job.sums_elements) * scalar) + align_64(pieces * static_cast<int64_t>(sizeof(Piece))) +
                      align_64((job.strip.vectors + 1) * 8) + 64;
  const int64_t sizes[] = {align_64(s.kernel_w * 8), align_64(job.channels * job.weights_of_channel() * scalar),
                           job.scratch_bytes * threads};
  char* at = static_cast<char*>(workspace);
  if (at != nullptr) {
    job.tap_columns = reinterpret_cast<int64_t*>(at);
    job.weights = reinterpret_cast<T*>(at + sizes[0]);
    job.scratch = at + sizes[0] + sizes[1];
  }
  *bytes = sizes[0] + sizes[1] + sizes[2];
  return job;
}

// A worker's scratch.
template <class T>
struct Scratch {
  T *stage, *sums;
  Piece* pieces;
  int64_t* vector_pieces;
  int64_t* is_cleared;

  Scratch(const Job<T>& job, int worker) {
    char* at = job.scratch + worker * job.scratch_bytes;
    stage = reinterpret_cast<T*>(at);
    sums = stage + job.stage_elements;
    at += align_64((job.stage_elements + job.sums_elements) * static_cast<int64_t>(sizeof(T)));
    pieces = reinterpret_cast<Piece*>(at);
    at += align_64((job.strip.vectors + job.units) * static_cast<int64_t>(sizeof(Piece)));
    vector_pieces = reinterpret_cast<int64_t*>(at);
    is_cleared = reinterpret_cast<int64_t*>(at + align_64((job.strip.vectors + 1) * 8));
  }
};

template <class T>
void prepare_scratch(const Job<T>& job, int threads) {
  for (int64_t c = 0; c < job.s.kernel_w; ++c) {
    const int64_t column = c * job.s.dilation_w;
    job.tap_columns[c] = column % job.columns.stride * job.strip.phase + column / job.columns.stride;
  }
  for (int worker = 0; worker < threads; ++worker) *Scratch<T>(job, worker).is_cleared = 0;
}

// Tap rows of the pass that begins with tap row `first`.
template <class T>
int64_t rows_of_pass(const Job<T>& job, int64_t first) {
  const int64_t left = job.s.kernel_h - first;
  return ceil_div(left, ceil_div(left, job.pass_rows));
}

// The weights of one source map in the order in which the tiles take them; whether all are finite.
template <class T>
bool pack_map(const Job<T>& job, const T* weights, T* packed) {
  const int64_t columns = job.s.kernel_w, taps = taps_of(job.s);
  for (int64_t first = 0, rows; first < job.s.kernel_h; first += rows) {
    rows = rows_of_pass(job, first);
    for (int64_t phase = 0; phase < smaller(rows, job.index_stride); ++phase) {
      for (int64_t c = 0; c < columns; ++c) {
        for (int64_t r = phase; r < rows; r += job.index_stride) {
          const int64_t tap = (first + r) * columns + c;
          *packed++ = weights[job.forward ? tap : taps - 1 - tap];
        }
      }
    }
  }
  return all_finite(weights, taps);
}

template <class T>
bool pack_weights(const Job<T>& job, const T* weights, int threads) {
  constexpr int64_t kChannels = 64;
  int32_t infinite = 0;
  const int64_t maps = job.channels * job.source_maps, taps = taps_of(job.s);
  parallel_for(threads, ceil_div(maps, kChannels), [&](int, int64_t block) {
    for (int64_t map = block * kChannels; map < smaller(maps, (block + 1) * kChannels); ++map) {
      if (!pack_map(job, weights + map * taps, job.weights + map * taps)) __atomic_store_n(&infinite, 1, __ATOMIC_RELAXED);
    }
  });
  return infinite == 0;
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
        last_row_(smaller(job.target_h, row + job.rows_per_task)),
        image_(image),
        units_(smaller(job.units, job.s.batch - image)),
        vectors_(ceil_div((units_ - 1) * job.strip.unit + job.columns.target, kLanes<T>)),
        staged_(source_rows(job, row, last_row_)) {
    list_pieces(job.columns, job.strip, source_image(), job.channels * job.target_map(), units_, scratch_.pieces, scratch_.vector_pieces);
    if (*scratch_.is_cleared == 0) {
      for (int64_t i = 0; i < job.stage_elements; i += kLanes<T>) store(scratch_.stage + i, Vec<T>{});
      *scratch_.is_cleared = 1;
    }
  }

  void compute_channel(int64_t channel) {
    const Conv2dShape& s = job_.s;
    const int64_t multiplier = multiplier_of(s), source_channel = job_.forward ? channel / multiplier : channel * multiplier;
    source_ = static_cast<const T*>(job_.forward ? buffers_.input : buffers_.grad_output) + image_ * source_image() +
              source_channel * job_.source_map();
    const T bias = job_.forward && buffers_.bias != nullptr ? static_cast<const T*>(buffers_.bias)[channel] : T{0};
    store(initial_, broadcast(bias));
    target_ =
        static_cast<T*>(job_.forward ? buffers_.output : buffers_.grad_input) + (image_ * job_.channels + channel) * job_.target_map();
    const T* weights = job_.weights + channel * job_.weights_of_channel();
    for (int64_t map = 0; map < job_.source_maps; ++map, source_ += job_.source_map()) {
      stage_strip(job_.columns, job_.strip, source_ + staged_.first * job_.columns.source, source_image(), units_, staged_.count(),
                  scratch_.stage);
      for (int64_t tap = 0, rows; tap < s.kernel_h; tap += rows) {
        rows = rows_of_pass(job_, tap);
        compute_pass(map == 0 && tap == 0, map == job_.source_maps - 1 && tap + rows == s.kernel_h, tap, rows, weights);
        weights += rows * s.kernel_w;
      }
    }
  }

 private:
  int64_t source_image() const { return (job_.forward ? job_.s.in_channels : job_.s.out_channels) * job_.source_map(); }

  // Adds tap rows [tap, tap + rows) of the staged map.
  void compute_pass(bool first, bool last, int64_t tap, int64_t rows, const T* weights) {
    const int64_t sums_row = job_.strip.vectors * kLanes<T>;
    for (int64_t row = row_; row < smaller(last_row_, row_ + job_.row_classes); ++row) {
      TileArguments<T> a;
      const int64_t source_row = row * job_.stride_h - job_.pad_top + tap * job_.s.dilation_h;  // of index 0
      a.source_index = job_.s.dilation_h * job_.strip.row;
      a.first_index = source_row < staged_.first ? ceil_div(staged_.first - source_row, job_.s.dilation_h) : 0;
      a.last_index = source_row < staged_.last ? ceil_div(staged_.last - source_row, job_.s.dilation_h) : 0;
      a.stride = job_.index_stride;
      a.tap_rows = rows;
      a.tap_columns = job_.s.kernel_w;
      a.columns = job_.tap_columns;
      a.weights = weights;
      a.rows = ceil_div(last_row_ - row, job_.row_classes);
      a.initial_row = first ? 0 : job_.row_classes * sums_row;
      a.initial_vector = first ? 0 : kLanes<T>;
      a.sums_row = job_.row_classes * sums_row;
      a.target = target_ + row * job_.columns.target;
      a.target_row = job_.row_classes * job_.columns.target;
      const int64_t next_rows = job_.row_tasks() > 1 ? last_row_ - row_ : job_.target_h;
      a.next_source = source_ + (row + next_rows) * job_.stride_h * job_.columns.source;
      a.next_source_row = job_.row_classes * job_.stride_h * job_.columns.source;
      a.next_target = a.target + next_rows * job_.columns.target;
      a.pieces = scratch_.pieces;
      for (int64_t v = 0; v < vectors_; v += job_.tile_vectors) {
        T* sums = scratch_.sums + (row - row_) * sums_row + v * kLanes<T>;
        a.source = scratch_.stage + (source_row - staged_.first) * job_.strip.row + job_.strip.lead + v * kLanes<T>;
        a.initial = first ? initial_ : sums;
        a.sums = last ? nullptr : sums;
        a.vector_pieces = scratch_.vector_pieces + v;
        compute_tile(a, smaller(job_.tile_vectors, vectors_ - v));
      }
    }
  }

  const Job<T>& job_;
  const Conv2dBuffers& buffers_;
  const Scratch<T> scratch_;
  const int64_t row_, last_row_;
  const int64_t image_, units_, vectors_;
  const RowRange staged_;
  T initial_[kLanes<T>];
  const T* source_;  // row 0 of the map, of the strip's first image
  T* target_;
};

template <class T>
Outcome run_job(const Conv2dShape& s, const Conv2dBuffers& b, bool forward, void* workspace, int threads) {
  int64_t bytes;
  const Job<T> job = make_job<T>(s, forward, threads, workspace, &bytes);
  if (!pack_weights(job, static_cast<const T*>(b.weight), threads)) return Outcome::not_finite;
  prepare_scratch(job, threads);
  parallel_for(threads, job.tasks(), [&](int worker, int64_t index) {
    const int64_t row = index % job.row_tasks() * job.rows_per_task, block = index / job.row_tasks();
    const int64_t first = block % job.channel_tasks() * job.channels_per_task;
    Task<T> task(job, b, worker, row, block / job.channel_tasks() * job.units);
    for (int64_t c = first; c < smaller(job.channels, first + job.channels_per_task); ++c) task.compute_channel(c);
  });
  return Outcome::done;
}

template <class T>
Plan plan_job(const Conv2dShape& s, bool forward, int threads) {
  int64_t bytes;
  const Job<T> job = make_job<T>(s, forward, threads, nullptr, &bytes);
  return {1, job.tile_vectors * kLanes<T>, job.tasks(), static_cast<size_t>(bytes)};
}

template <bool kForward>
Plan plan(const Conv2dShape& s, int threads) {
  return plan_job<float>(s, kForward, threads);
}

template <bool kForward>
Outcome run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, int threads) {
  return run_job<float>(s, b, kForward, workspace, threads);
}

// With a stride of 2, narrow maps are faster with a channel in each lane (conv2d_depthwise.cpp): as fast in a batch, in which others fill
// the vectors, and half as fast again alone.
bool accepts_forward(const Conv2dShape& s) {
  return accepts_planes(s, s.out_w) && (s.stride_w == 1 || (s.stride_w == 2 && s.out_w > kLanes<float>));
}

bool accepts_backward_input(const Conv2dShape& s) { return accepts_planes(s, s.in_w) && s.stride_h == 1 && s.stride_w == 1; }

}  // namespace

extern const Conv2dKernel conv2d_forward_depthwise_planes = {CNN_EXT_KERNEL_NAME("conv2d_forward_depthwise_planes"),
                                                             Isa::CNN_EXT_ISA,
                                                             Conv2dDirection::forward,
                                                             accepts_forward,
                                                             plan<true>,
                                                             run<true>};
extern const Conv2dKernel conv2d_backward_input_depthwise_planes = {CNN_EXT_KERNEL_NAME("conv2d_backward_input_depthwise_planes"),
                                                                    Isa::CNN_EXT_ISA,
                                                                    Conv2dDirection::backward_input,
                                                                    accepts_backward_input,
                                                                    plan<false>,
                                                                    run<false>};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
