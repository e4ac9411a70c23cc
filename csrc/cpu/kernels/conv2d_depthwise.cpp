// Depthwise convolution, forward and backward_input, for any number of output channels per channel, kernel, stride and dilation.
//
// Both are one gather: a target pixel adds up taps of a staged source (conv2d_depthwise.inl). The forward reads input rows `stride` apart.
// The backward_input of stride s falls into s * s phases (target position plus padding, modulo s), in each of which the source pixels of a
// tap are neighbours. A list per phase says where its taps lie in the stage and which weights they take.
//
// Tile: up to 11 pixels of each of two rows (avx2: 6) or 14 of one, times one vector of channels. Two rows meet in the same source rows: a
// source pixel is loaded once for both, and two weights stay in registers with the sums, so that 9 loads serve 14 multiplications of 7
// pixels. A single row takes one operand of each multiplication from L1; two FMA ports of latency 4 want 8 sums or more. A target is one
// chain: bias, then its taps in row-major order (backward_input: from the last to the first).
//
// The zeros staged for padding meet weights, which must be finite. Channels come in blocks of a vector: a rest leaves lanes idle.
#include "cpu/kernels/conv2d_depthwise_tile.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

// The taps of a phase. Row 0 of a tile has a tap `between_rows` later than row 1 that meets the same source.
struct TapList {
  TapRange taps;
  int64_t between_rows;
};

// The target columns of one phase, and the tiles that share them out evenly: 28 = 14 + 14, 20 = 10 + 10.
struct PhaseColumns {
  int64_t first, count;
  int64_t place;           // of the first
  int64_t tile_pixels[2];  // of a tile of one row, of two rows
};

// The sizes and scratch of one call.
template <class T>
struct Job {
  Conv2dShape s;
  bool forward;
  Axis h, w;
  int64_t blocks;         // channel blocks
  int64_t rows_per_task;  // target rows
  int64_t row_tasks;
  int64_t stage_columns, stage_rows;  // of the source
  Tap* taps;                          // [phase of h, phase of w] lists, one behind the other
  TapList* lists;                     // [phase of h, phase of w]
  PhaseColumns* columns;              // [phase of w]
  T* weights;                         // [blocks, multiplier, taps, lanes]
  T* scratch;                         // per worker: source stage, target stage, bias
  int64_t scratch_size;               // elements

  int64_t tasks() const { return s.batch * blocks * row_tasks; }
  int64_t source_elements() const { return stage_rows * stage_columns * kLanes<T>; }
  int64_t target_elements() const { return rows_per_task * w.target * kLanes<T>; }
};

// Target rows per task: a stage of at most 128 KB (with the target's it stays in L2) but not much more halo than rows, and enough tasks.
template <class T>
int64_t rows_per_task(const Job<T>& job, int threads) {
  constexpr int64_t kStageBytes = 128 << 10;
  const int64_t row_bytes = job.stage_columns * kVectorBytes;
  const int64_t halo = job.h.last_source(1) - job.h.first_source(0);
  const int64_t fitting = larger((kStageBytes / row_bytes - halo) / job.h.source_step(), halo * job.h.phases() / job.h.source_step());
  const int64_t wanted_tasks = threads > 1 ? 4 * static_cast<int64_t>(threads) : 1;
  const int64_t fair = ceil_div(job.h.target * job.s.batch * job.blocks, wanted_tasks);
  return larger(1, smaller(job.h.target, smaller(fitting, fair)));
}

// Lays out the call's scratch from `workspace` on (null: sizes only) and returns its bytes.
template <class T>
Job<T> make_job(const Conv2dShape& s, bool forward, int threads, void* workspace, int64_t* bytes) {
  Job<T> job{};
  job.s = s;
  job.forward = forward;
  job.h = {forward ? s.in_h : s.out_h, forward ? s.out_h : s.in_h, s.kernel_h, s.stride_h, s.pad_top, s.dilation_h, forward};
  job.w = {forward ? s.in_w : s.out_w, forward ? s.out_w : s.in_w, s.kernel_w, s.stride_w, s.pad_left, s.dilation_w, forward};
  job.blocks = ceil_div(s.groups, kLanes<T>);
  job.stage_columns = job.w.last_source(job.w.target) - job.w.first_source(0);
  job.rows_per_task = rows_per_task(job, threads);
  job.row_tasks = ceil_div(job.h.target, job.rows_per_task);
  job.stage_rows = (job.rows_per_task / job.h.phases() + 1) * job.h.source_step() + job.h.last_source(1) - job.h.first_source(0);
  job.scratch_size = job.source_elements() + job.target_elements() + kLanes<T>;
  const int64_t scalar = sizeof(T);
  const int64_t sizes[] = {align_64(taps_of(s) * static_cast<int64_t>(sizeof(Tap))),
                           align_64(job.h.phases() * job.w.phases() * static_cast<int64_t>(sizeof(TapList))),
                           align_64(job.w.phases() * static_cast<int64_t>(sizeof(PhaseColumns))),
                           align_64(job.blocks * multiplier_of(s) * taps_of(s) * kLanes<T> * scalar), job.scratch_size * threads * scalar};
  char* at = static_cast<char*>(workspace);
  if (at != nullptr) {
    job.taps = reinterpret_cast<Tap*>(at);
    job.lists = reinterpret_cast<TapList*>(at + sizes[0]);
    job.columns = reinterpret_cast<PhaseColumns*>(at + sizes[0] + sizes[1]);
    job.weights = reinterpret_cast<T*>(at + sizes[0] + sizes[1] + sizes[2]);
    job.scratch = reinterpret_cast<T*>(at + sizes[0] + sizes[1] + sizes[2] + sizes[3]);
  }
  *bytes = sizes[0] + sizes[1] + sizes[2] + sizes[3] + sizes[4];
  return job;
}

template <class T>
void fill_taps(const Job<T>& job) {
  const Conv2dShape& s = job.s;
  Tap* used = job.taps;
  TapList* list = job.lists;
  for (int64_t ph = 0; ph < job.h.phases(); ++ph) {
    for (int64_t pw = 0; pw < job.w.phases(); ++pw) {
      list->taps.first = used;
      for (int64_t i = 0; i < taps_of(s); ++i) {
        const int64_t tap = job.forward ? i : taps_of(s) - 1 - i;
        const int64_t r = tap / s.kernel_w, c = tap % s.kernel_w;
        if (!job.h.has_tap(r, ph) || !job.w.has_tap(c, pw)) continue;
        const int64_t row = job.h.offset(r, ph);
        *used++ = {(row * job.stage_columns + job.w.offset(c, pw)) * kLanes<T>, tap * kLanes<T>, row};
      }
      list->taps.last = used;
      list->between_rows = taps_between_rows(list->taps, job.h.source_step());
      ++list;
    }
  }
}

template <class T>
void fill_columns(const Job<T>& job) {
  const Axis& w = job.w;
  for (int64_t phase = 0; phase < w.phases(); ++phase) {
    PhaseColumns& c = job.columns[phase];
    c.first = (phase - w.target_pad() % w.phases() + w.phases()) % w.phases();
    c.count = c.first < w.target ? ceil_div(w.target - c.first, w.phases()) : 0;
    c.place = w.place(c.first);
    for (int64_t rows = 1; rows <= 2; ++rows) {
      const int64_t tiles = ceil_div(c.count, rows == 2 ? kTwoRowPixels : kTilePixels);
      c.tile_pixels[rows - 1] = tiles > 0 ? ceil_div(c.count, tiles) : 0;
    }
  }
}

// Packs the weights of each channel block and multiple j as [tap][lane]. Whether all are finite.
template <class T>
bool pack_weights(const Job<T>& job, const T* weight, int threads) {
  const int64_t multiplier = multiplier_of(job.s), taps = taps_of(job.s);
  int32_t infinite = 0;
  parallel_for(threads, job.blocks * multiplier, [&](int, int64_t i) {
    const int64_t first = i / multiplier * kLanes<T>;
    const ChannelBlock<const T> channels = {
        weight + i % multiplier * taps, first * multiplier, multiplier, smaller(kLanes<T>, job.s.groups - first), 0, 1, taps, Layout::nchw};
    const Stage<T> packed{job.weights + i * taps * kLanes<T>, 0, 0, 1, taps};
    fill_stage(channels, packed);
    if (!holds_finite_values(packed)) __atomic_store_n(&infinite, 1, __ATOMIC_RELAXED);
  });
  return infinite == 0;
}

// The taps of a list whose source rows, `first_row` away from them, are inside the map: the rows of a list ascend.
inline TapRange clip_taps(TapRange taps, int64_t first_row, int64_t rows) {
  while (taps.first < taps.last && first_row + taps.first->row < 0) ++taps.first;
  while (taps.first < taps.last && first_row + (taps.last - 1)->row >= rows) --taps.last;
  return taps;
}

// The columns of phase `phase_w` in `rows` target rows of phase `phase_h`, the first of them at `place`; `initial` as for the tile, but
// null for the target itself.
template <class T>
void compute_phase(const Job<T>& job, const Stage<T>& source, const T* weights, int64_t row, int64_t rows, int64_t phase_h, int64_t place,
                   int64_t phase_w, const T* initial, const Stage<T>& target) {
  const Axis &h = job.h, &w = job.w;
  const PhaseColumns& columns = job.columns[phase_w];
  const TapList& list = job.lists[phase_h * w.phases() + phase_w];
  const int64_t source_row = place * h.source_step();
  TileArguments<T> a;
  a.source_step = w.source_step() * kLanes<T>;
  a.source_row = h.source_step() * source.columns * kLanes<T>;
  for (int64_t r = 0; r < rows; ++r) a.taps[r] = clip_taps(list.taps, source_row + r * h.source_step(), h.source);
  a.taps_between = list.between_rows;
  a.weights = weights;
  a.target_step = w.phases() * kLanes<T>;
  a.target_row = h.phases() * target.columns * kLanes<T>;
  a.initial_step = initial != nullptr ? 0 : a.target_step;
  a.initial_row = initial != nullptr ? 0 : a.target_row;
  for (int64_t i = 0, pixels; i < columns.count; i += pixels) {
    pixels = smaller(columns.count - i, columns.tile_pixels[rows - 1]);
    a.target = target.at(row, columns.first + i * w.phases());
    a.initial = initial != nullptr ? initial : a.target;
    a.source = source.at(source_row, (columns.place + i) * w.source_step());
    compute_tile<T>(a, rows, pixels);
  }
}

template <class T>
void compute_rows(const Job<T>& job, const Stage<T>& source, const T* weights, const T* initial, const Stage<T>& target) {
  const int64_t phases = job.h.phases(), end = target.row + target.rows;
  for (int64_t start = target.row; start < smaller(end, target.row + phases); ++start) {
    const int64_t phase = job.h.phase(start);
    int64_t place = job.h.place(start);
    for (int64_t row = start, rows; row < end; row += rows * phases, place += rows) {
      rows = row + phases < end ? 2 : 1;
      for (int64_t phase_w = 0; phase_w < job.w.phases(); ++phase_w) {
        compute_phase(job, source, weights, row, rows, phase, place, phase_w, initial, target);
      }
    }
  }
}

// A task: some target rows of one channel block of one image.
template <class T>
class Task {
 public:
  Task(const Job<T>& job, const Conv2dBuffers& buffers, int worker, int64_t index) : job_(job), buffers_(buffers) {
    const int64_t row = index / job.blocks % job.row_tasks * job.rows_per_task;
    const int64_t last_row = smaller(job.h.target, row + job.rows_per_task);
    block_ = index % job.blocks;
    image_ = index / job.blocks / job.row_tasks;
    T* scratch = job.scratch + worker * job.scratch_size;
    const int64_t source_row = job.h.first_source(row);
    source_ = {scratch, source_row, job.w.first_source(0), job.h.last_source(last_row) - source_row, job.stage_columns};
    target_ = {scratch + job.source_elements(), row, 0, last_row - row, job.w.target};
    initial_ = target_.data + job.target_elements();
    store(initial_, Vec<T>{});
  }

  void run() {
    const int64_t multiplier = multiplier_of(job_.s);
    const T* tensor = static_cast<const T*>(job_.forward ? buffers_.input : buffers_.grad_output);
    T* result = static_cast<T*>(job_.forward ? buffers_.output : buffers_.grad_input);
    for (int64_t j = 0; j < multiplier; ++j) {
      if (!job_.forward || j == 0) fill_stage(channels(tensor, j, job_.h.source, job_.w.source, job_.forward), source_);
      if (job_.forward) load_bias(j);
      compute_rows(job_, source_, job_.weights + (block_ * multiplier + j) * taps_of(job_.s) * kLanes<T>,
                   job_.forward || j == 0 ? initial_ : nullptr, target_);
      if (job_.forward || j == multiplier - 1) write_stage(target_, channels(result, j, job_.h.target, job_.w.target, !job_.forward));
    }
  }

 private:
  // The block's channels of the task's image, of the input's side or those with multiple j of the output's.
  template <class U>
  ChannelBlock<U> channels(U* tensor, int64_t j, int64_t height, int64_t width, bool of_input) const {
    const int64_t step = of_input ? 1 : multiplier_of(job_.s), first = block_ * kLanes<T>, channels = job_.s.groups * step;
    return {tensor + image_ * channels * height * width,
            first * step + (of_input ? 0 : j),
            step,
            smaller(kLanes<T>, job_.s.groups - first),
            channels,
            height,
            width,
            job_.s.layout};
  }

  void load_bias(int64_t j) {
    if (buffers_.bias == nullptr) return;
    const int64_t multiplier = multiplier_of(job_.s), first = block_ * kLanes<T>;
    store(initial_, load_strided(static_cast<const T*>(buffers_.bias) + first * multiplier + j, multiplier,
                                 first_lanes<T>(job_.s.groups - first), Vec<T>{}));
  }

  const Job<T>& job_;
  const Conv2dBuffers& buffers_;
  int64_t image_, block_;
  Stage<T> source_, target_;
  T* initial_;  // one vector: the bias or zeros
};

template <class T>
Outcome run_job(const Conv2dShape& s, const Conv2dBuffers& b, bool forward, void* workspace, int threads) {
  int64_t bytes;
  const Job<T> job = make_job<T>(s, forward, threads, workspace, &bytes);
  fill_taps(job);
  fill_columns(job);
  if (!pack_weights(job, static_cast<const T*>(b.weight), threads)) return Outcome::not_finite;
  // Of nhwc a channel block is one cache line of each pixel; the lines beside it, which the processor fetches along, belong to the same
  // thread.
  const int64_t group = s.layout == Layout::nhwc && job.tasks() >= 16 * static_cast<int64_t>(threads) ? 4 : 1;
  parallel_for(threads, ceil_div(job.tasks(), group), [&](int worker, int64_t first) {
    for (int64_t i = first * group; i < smaller(job.tasks(), (first + 1) * group); ++i) Task<T>(job, b, worker, i).run();
  });
  return Outcome::done;
}

template <class T>
Plan plan_job(const Conv2dShape& s, bool forward, int threads) {
  int64_t bytes;
  const Job<T> job = make_job<T>(s, forward, threads, nullptr, &bytes);
  return {kLanes<T>, kTilePixels, job.tasks(), static_cast<size_t>(bytes)};
}

template <bool kForward>
Plan plan(const Conv2dShape& s, int threads) {
  return s.dtype == DType::float32 ? plan_job<float>(s, kForward, threads) : plan_job<double>(s, kForward, threads);
}

template <bool kForward>
Outcome run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, int threads) {
  return s.dtype == DType::float32 ? run_job<float>(s, b, kForward, workspace, threads)
                                   : run_job<double>(s, b, kForward, workspace, threads);
}

}  // namespace

extern const Conv2dKernel conv2d_forward_depthwise = {
    CNN_EXT_KERNEL_NAME("conv2d_forward_depthwise"), Isa::CNN_EXT_ISA, Conv2dDirection::forward, accepts_depthwise, plan<true>, run<true>};
extern const Conv2dKernel conv2d_backward_input_depthwise = {CNN_EXT_KERNEL_NAME("conv2d_backward_input_depthwise"),
                                                             Isa::CNN_EXT_ISA,
                                                             Conv2dDirection::backward_input,
                                                             accepts_depthwise,
                                                             plan<false>,
                                                             run<false>};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
