// Depthwise convolution, forward and backward_input, straight from nchw memory: maps whose rows fill most of a vector, any number of output
// channels per channel, kernel and dilation. Strides are 1 or, in forward, 2; backward_input with stride 1 is a forward with the taps in
// reverse.
//
// A vector is neighbouring columns of one map. The tile is 7 rows of 1 or 2 vectors, or 4 rows of 3 or 4 (avx2: 7 x 1, 4 x 2). It walks
// down the source rows: a vector loaded for one tap column serves every row of the tile that has a tap there, 2 to 5 of them, for at an odd
// address a load costs two and would be the bottleneck. The weights are broadcast from memory, each for all vectors of a row. Rows of the
// tile lie so far apart that they share source rows: neighbours, or a dilation apart.
//
// Border: source rows outside the map are skipped, columns outside are zero lanes, made by masked loads, so that the weights must be
// finite. A target is one chain: bias, then its taps in the order of their sources (map by map, rows from top to bottom, in a row from left
// to right).
//
// Kernels of 3x3 wait for memory, larger ones for the instructions around the multiplications, which run at about half of their peak.
#include "cpu/kernels/conv2d_depthwise_planes_tile.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

// Either direction as a convolution of source maps.
struct Problem {
  int64_t source_h, source_w, target_h, target_w;
  int64_t pad_top, pad_left;
  int64_t step;  // of the columns
};

Problem problem_of(const Conv2dShape& s, bool forward) {
  if (forward) return {s.in_h, s.in_w, s.out_h, s.out_w, s.pad_top, s.pad_left, s.stride_w};
  const int64_t reach_h = (s.kernel_h - 1) * s.dilation_h, reach_w = (s.kernel_w - 1) * s.dilation_w;
  return {s.out_h, s.out_w, s.in_h, s.in_w, reach_h - s.pad_top, reach_w - s.pad_left, 1};
}

// The sizes and scratch of one call.
template <class T>
struct Job {
  Conv2dShape s;
  bool forward;
  Problem p;
  int64_t source_maps;  // that add up in one target map
  int64_t vectors;      // of a tile
  int64_t tiles;        // of columns
  int64_t row_step;     // target rows from a sum of a tile to the next
  int64_t rows_per_task, row_tasks, maps_per_task;
  uint32_t* masks;   // [tile, tap column, vector, step]
  uint32_t* stored;  // [tile, vector]
  T* reversed;       // per worker: the weights of one target map (backward_input)

  int64_t target_maps() const { return s.batch * (forward ? s.out_channels : s.in_channels); }
  int64_t tasks() const { return ceil_div(target_maps(), maps_per_task) * row_tasks; }
  int64_t tile_columns() const { return vectors * kLanes<T>; }
  int64_t masks_of_tile() const { return s.kernel_w * vectors * p.step; }
  int64_t weights_of_map() const { return source_maps * taps_of(s); }
  // Elements of a worker's reversed weights: whole pairs of cache lines, which no two workers share.
  int64_t reversed_size() const {
    constexpr int64_t kPair = 128 / static_cast<int64_t>(sizeof(T));
    return forward ? 0 : ceil_div(weights_of_map(), kPair) * kPair;
  }
};

// Whether in tiles of up to `most` vectors every lane of the inner ones has a source, in every tap column.
template <class T>
bool inner_vectors_are_whole(const Job<T>& job, int64_t most) {
  const Problem& p = job.p;
  const int64_t all = ceil_div(p.target_w, kLanes<T>), vectors = ceil_div(all, ceil_div(all, most));
  if (vectors <= 2) return true;
  const int64_t last_tap = (job.s.kernel_w - 1) * job.s.dilation_w;
  for (int64_t vector = 0; vector < all; vector += vectors) {
    const int64_t first = (vector + 1) * kLanes<T>, last = (vector + vectors - 1) * kLanes<T> - 1;
    if (first * p.step - p.pad_left < 0 || last * p.step - p.pad_left + last_tap >= p.source_w || last >= p.target_w) return false;
  }
  return true;
}

// Tasks for each thread to choose from: several small maps, or some rows of a map.
template <class T>
void share_out(Job<T>& job, int threads) {
  constexpr int64_t kTaskBytes = 64 << 10;
  const Problem& p = job.p;
  const int64_t wanted = threads > 1 ? 4 * static_cast<int64_t>(threads) : 1, maps = larger(1, job.target_maps());
  const int64_t map_bytes = p.target_h * p.target_w * static_cast<int64_t>(sizeof(T));
  const int64_t row_tasks = smaller(ceil_div(p.target_h, 2 * kManyRows), ceil_div(wanted, maps));
  job.rows_per_task = ceil_div(p.target_h, row_tasks);
  job.row_tasks = ceil_div(p.target_h, job.rows_per_task);
  job.maps_per_task = larger(1, smaller(kTaskBytes / map_bytes, maps / wanted));
}

// Lays out the call's scratch from `workspace` on (null: sizes only) and returns its bytes.
template <class T>
Job<T> make_job(const Conv2dShape& s, bool forward, int threads, void* workspace, int64_t* bytes) {
  Job<T> job{};
  job.s = s;
  job.forward = forward;
  job.p = problem_of(s, forward);
  job.source_maps = forward ? 1 : multiplier_of(s);
  const int64_t vectors = ceil_div(job.p.target_w, kLanes<T>);
  job.tiles = ceil_div(vectors, inner_vectors_are_whole(job, kTileVectors) ? kTileVectors : 2);
  job.vectors = ceil_div(vectors, job.tiles);
  job.row_step = forward ? s.dilation_h / greatest_common_divisor(s.stride_h, s.dilation_h) : s.dilation_h;
  share_out(job, threads);
  const int64_t reversed = job.reversed_size() * threads * static_cast<int64_t>(sizeof(T));
  const int64_t sizes[] = {align_64(job.tiles * job.masks_of_tile() * 4), align_64(job.tiles * job.vectors * 4), reversed};
  char* at = static_cast<char*>(workspace);
  if (at != nullptr) {
    job.masks = reinterpret_cast<uint32_t*>(at);
    job.stored = reinterpret_cast<uint32_t*>(at + sizes[0]);
    job.reversed = reinterpret_cast<T*>(at + sizes[0] + sizes[1]);
  }
  *bytes = sizes[0] + sizes[1] + sizes[2];
  return job;
}

template <class T>
void fill_masks(const Job<T>& job) {
  const Problem& p = job.p;
  for (int64_t tile = 0; tile < job.tiles; ++tile) {
    uint32_t* mask = job.masks + tile * job.masks_of_tile();
    for (int64_t tap = 0; tap < job.s.kernel_w; ++tap) {
      for (int64_t v = 0; v < job.vectors; ++v, mask += p.step) {
        const int64_t column = tile * job.tile_columns() + v * kLanes<T>, source = column * p.step - p.pad_left + tap * job.s.dilation_w;
        write_mask<T>(lanes_with_source<T>(p.target_w - column, source, p.step, p.source_w), p.step, mask);
      }
    }
    for (int64_t v = 0; v < job.vectors; ++v) {
      const int64_t left = p.target_w - tile * job.tile_columns() - v * kLanes<T>;
      job.stored[tile * job.vectors + v] = first_bits_of(smaller(left, kLanes<T>));
    }
  }
}

// Of two tiles with fewer or more rows, that which takes `rows` rows.
template <class T, int kVectors, int kStep>
void compute_tile(const TileArguments<T>& a) {
  if constexpr (most_rows(kVectors) == kManyRows) {
    if (a.rows > kFewRows) return compute_sums<T, kManyRows, kVectors, kStep>(a);
  }
  compute_sums<T, kFewRows, kVectors, kStep>(a);
}

template <class T, int kStep>
void compute_tile(const TileArguments<T>& a, int64_t vectors) {
  if (vectors == 1) return compute_tile<T, 1, kStep>(a);
  if (kTileVectors == 2 || vectors == 2) return compute_tile<T, 2, kStep>(a);
  if constexpr (kTileVectors > 2) vectors == 3 ? compute_tile<T, 3, kStep>(a) : compute_tile<T, 4, kStep>(a);
}

// A target map and what it is computed from.
template <class T>
struct Maps {
  const T* source;
  const T* weights;
  T initial;
  T* target;
};

// `rows` target rows from `row` on, row_step apart.
template <class T>
void compute_rows(const Job<T>& job, const Maps<T>& m, int64_t row, int64_t rows) {
  const Conv2dShape& s = job.s;
  const Problem& p = job.p;
  const int64_t stride = job.forward ? s.stride_h : 1, source_row = row * stride - p.pad_top;
  const int64_t indices = s.kernel_h + (rows - 1) * p.step, behind = source_row + (indices - 1) * s.dilation_h - (p.source_h - 1);
  TileArguments<T> a;
  a.maps = job.source_maps;
  a.source_map = p.source_h * p.source_w;
  a.source_row = s.dilation_h * p.source_w;
  a.first_index = source_row < 0 ? ceil_div(-source_row, s.dilation_h) : 0;
  a.last_index = behind > 0 ? indices - ceil_div(behind, s.dilation_h) : indices;
  a.source_column = s.dilation_w;
  a.weights = m.weights;
  a.tap_rows = s.kernel_h;
  a.tap_columns = s.kernel_w;
  a.rows = rows;
  a.initial = m.initial;
  a.target_row = job.row_step * p.target_w;
  for (int64_t tile = 0; tile < job.tiles; ++tile) {
    const int64_t column = tile * job.tile_columns();
    a.source = m.source + source_row * p.source_w + column * p.step - p.pad_left;
    a.masks = job.masks + tile * job.masks_of_tile();
    a.target = m.target + row * p.target_w + column;
    a.stored = job.stored + tile * job.vectors;
    p.step == 1 ? compute_tile<T, 1>(a, job.vectors) : compute_tile<T, 2>(a, job.vectors);
  }
}

// The weights of a target map in the order of the sources.
template <class T>
const T* order_weights(const Job<T>& job, const T* weights, int worker) {
  if (job.forward) return weights;
  T* reversed = job.reversed + worker * job.reversed_size();
  const int64_t taps = taps_of(job.s);
  for (int64_t map = 0; map < job.source_maps; ++map) {
    for (int64_t tap = 0; tap < taps; ++tap) reversed[map * taps + tap] = weights[map * taps + taps - 1 - tap];
  }
  return reversed;
}

// Rows [first_row, last_row) of one target map; whether its weights are finite.
template <class T>
bool compute_map(const Job<T>& job, const Conv2dBuffers& b, int worker, int64_t map, int64_t first_row, int64_t last_row) {
  const Conv2dShape& s = job.s;
  const Problem& p = job.p;
  const int64_t channels = job.forward ? s.out_channels : s.in_channels, multiplier = multiplier_of(s), channel = map % channels;
  const T* weights = static_cast<const T*>(b.weight) + channel * job.weights_of_map();
  if (!all_finite(weights, job.weights_of_map())) return false;
  Maps<T> m;
  m.source = static_cast<const T*>(job.forward ? b.input : b.grad_output) +
             (job.forward ? map / multiplier : map * multiplier) * p.source_h * p.source_w;
  m.weights = order_weights(job, weights, worker);
  m.initial = job.forward && b.bias != nullptr ? static_cast<const T*>(b.bias)[channel] : T{0};
  m.target = static_cast<T*>(job.forward ? b.output : b.grad_input) + map * p.target_h * p.target_w;
  for (int64_t start = first_row; start < smaller(last_row, first_row + job.row_step); ++start) {
    for (int64_t row = start, rows; row < last_row; row += rows * job.row_step) {
      const int64_t left = ceil_div(last_row - row, job.row_step);
      rows = left == 2 * kFewRows ? kFewRows : smaller(most_rows(job.vectors), left);
      compute_rows(job, m, row, rows);
    }
  }
  return true;
}

template <class T>
Outcome run_job(const Conv2dShape& s, const Conv2dBuffers& b, bool forward, void* workspace, int threads) {
  int64_t bytes;
  const Job<T> job = make_job<T>(s, forward, threads, workspace, &bytes);
  fill_masks(job);
  int32_t infinite = 0;
  parallel_for(threads, job.tasks(), [&](int worker, int64_t task) {
    const int64_t row = task % job.row_tasks * job.rows_per_task, last_row = smaller(job.p.target_h, row + job.rows_per_task);
    const int64_t map = task / job.row_tasks * job.maps_per_task;
    for (int64_t m = map; m < smaller(job.target_maps(), map + job.maps_per_task); ++m) {
      if (!compute_map(job, b, worker, m, row, last_row)) __atomic_store_n(&infinite, 1, __ATOMIC_RELAXED);
    }
  });
  return infinite == 0 ? Outcome::done : Outcome::not_finite;
}

template <class T>
Plan plan_job(const Conv2dShape& s, bool forward, int threads) {
  int64_t bytes;
  const Job<T> job = make_job<T>(s, forward, threads, nullptr, &bytes);
  return {1, most_rows(job.vectors) * job.tile_columns(), job.tasks(), static_cast<size_t>(bytes)};
}

template <bool kForward>
Plan plan(const Conv2dShape& s, int threads) {
  return plan_job<float>(s, kForward, threads);
}

template <bool kForward>
Outcome run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, int threads) {
  return run_job<float>(s, b, kForward, workspace, threads);
}

bool accepts_forward(const Conv2dShape& s) { return accepts_planes(s, s.out_w) && accepts_planes_stride(s); }

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
