// Convolution of nhwc tensors in groups of 1 (depthwise), 2, 4 or 8 channels with as many outputs, forward and backward_input, for any
// kernel, stride and dilation, straight from memory: a vector is neighbouring channels of one pixel, no copy of the source is made, and
// padding is left out of the sums instead of being multiplied.
//
// Both directions are one gather (Axis in conv2d_depthwise.inl). backward_input of stride s falls into s * s phases, each with its own
// taps.
//
// Tile: 7 pixels of a row times 4 vectors of channels (avx2: 2): 28 sums and 4 vectors of weights fill AVX-512's 32 registers, the source
// is a memory operand. 7, for maps are 7, 14, 28, 56 or 112 wide. At borders and at a row's end a bit mask per tap column says which pixels
// of the tile have a source; a predictable branch per pixel skips the others.
//
// In wider groups every lane adds up the source channels of its own group: a shuffle of the pixel's vector brings channel j of each group
// to the group's lanes, for j = 0, 1, ...; 14 sums then leave registers for the shuffled vectors. Shuffles share a port with half of the
// multiplications, so half of the peak is the most there is; a group of 16 is a vector, and conv2d_direct.cpp serves it. With avx2 such a
// tile has 6 pixels.
//
// Order of the tiles: kernels of up to 3 rows read along the rows, all channels of a pixel, as memory lies: they wait for memory, and the
// rows come from L2. Taller kernels wait for arithmetic; they take 4 vectors of channels over all rows, so that the rows are still in L1.
// With avx2, whose 2 vectors are one line of each pixel, all read along the rows, and tiles fetch what the row below will meet first.
//
// A target is one chain: bias, then its taps in row-major order, of each tap the channels of the group. Fewer channels than a vector are
// left to conv2d_depthwise.cpp; a rest of channels is computed as the last full vector, which repeats some sums to the same bits.
#include "cpu/kernels/conv2d_depthwise_channels_tile.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

constexpr bool kFetchesAhead = kVectorBytes == 32;

// The taps of each phase of an axis, and how they meet the source.
struct TapLists {
  Tap* taps;       // [phases] lists, one behind the other
  int64_t* begin;  // [phases + 1]
};

// The sizes and scratch of one call.
template <class T>
struct Job {
  Conv2dShape s;
  Axis h, w;
  TapLists h_lists, w_lists;
  int64_t channels, vectors, group;  // group: channels of one
  int64_t pixels() const { return tile_pixels(group); }
  int64_t rows_per_task, row_tasks;
  int64_t tiles;     // per phase of w
  bool by_channels;  // the channels of one tile over all rows, then the next ones
  uint32_t* masks;   // [phases of w, tiles, taps of the phase (kernel_w)]
  T* weights;        // [taps, channels of a group, channels]
  T* zeros;          // [channels]
  int64_t tasks() const { return s.batch * row_tasks; }
};

template <class T>
Job<T> make_job(const Conv2dShape& s, bool forward, int threads, void* workspace, int64_t* bytes) {
  Job<T> job{};
  job.s = s;
  job.h = {forward ? s.in_h : s.out_h, forward ? s.out_h : s.in_h, s.kernel_h, s.stride_h, s.pad_top, s.dilation_h, forward};
  job.w = {forward ? s.in_w : s.out_w, forward ? s.out_w : s.in_w, s.kernel_w, s.stride_w, s.pad_left, s.dilation_w, forward};
  job.channels = s.in_channels;
  job.group = s.in_channels / s.groups;
  job.vectors = job.channels / kLanes<T>;
  job.tiles = ceil_div(ceil_div(job.w.target, job.w.phases()), job.pixels());
  job.by_channels = !kFetchesAhead && s.kernel_h > 3;
  job.rows_per_task = larger(1, smaller(job.h.target, job.h.target * s.batch / (8 * static_cast<int64_t>(threads))));
  job.row_tasks = ceil_div(job.h.target, job.rows_per_task);
  const int64_t sizes[] = {align_64(s.kernel_h * static_cast<int64_t>(sizeof(Tap))),
                           align_64(s.kernel_w * static_cast<int64_t>(sizeof(Tap))),
                           align_64((job.h.phases() + 1) * 8),
                           align_64((job.w.phases() + 1) * 8),
                           align_64(job.w.phases() * job.tiles * s.kernel_w * 4),
                           align_64(taps_of(s) * job.group * job.channels * static_cast<int64_t>(sizeof(T))),
                           align_64(job.channels * static_cast<int64_t>(sizeof(T)))};
  void* parts[7];
  char* at = static_cast<char*>(workspace);
  int64_t total = 0;
  for (int i = 0; i < 7; ++i) {
    parts[i] = at == nullptr ? nullptr : at + total;
    total += sizes[i];
  }
  job.h_lists = {static_cast<Tap*>(parts[0]), static_cast<int64_t*>(parts[2])};
  job.w_lists = {static_cast<Tap*>(parts[1]), static_cast<int64_t*>(parts[3])};
  job.masks = static_cast<uint32_t*>(parts[4]);
  job.weights = static_cast<T*>(parts[5]);
  job.zeros = static_cast<T*>(parts[6]);
  *bytes = total;
  return job;
}

// source_step, weight_step: elements from a source position, a tap, to the next.
inline void fill_lists(const Axis& axis, int64_t source_step, int64_t weight_step, const TapLists& lists) {
  int64_t used = 0;
  for (int64_t phase = 0; phase < axis.phases(); ++phase) {
    lists.begin[phase] = used;
    for (int64_t k = 0; k < axis.taps; ++k) {
      if (axis.has_tap(k, phase)) lists.taps[used++] = {axis.offset(k, phase), axis.offset(k, phase) * source_step, k * weight_step};
    }
  }
  lists.begin[axis.phases()] = used;
}

// The first target of a phase.
inline int64_t first_target(const Axis& axis, int64_t phase) {
  return (phase - axis.target_pad() % axis.phases() + axis.phases()) % axis.phases();
}

template <class T>
void fill_masks(const Job<T>& job) {
  const Axis& w = job.w;
  for (int64_t phase = 0; phase < w.phases(); ++phase) {
    for (int64_t tile = 0; tile < job.tiles; ++tile) {
      uint32_t* masks = job.masks + (phase * job.tiles + tile) * w.taps;
      for (int64_t i = job.w_lists.begin[phase]; i < job.w_lists.begin[phase + 1]; ++i) {
        uint32_t mask = 0;
        for (int64_t pixel = 0; pixel < job.pixels(); ++pixel) {
          const int64_t target = first_target(w, phase) + (tile * job.pixels() + pixel) * w.phases();
          const int64_t source = w.place(target) * w.source_step() + job.w_lists.taps[i].offset;
          if (target < w.target && source >= 0 && source < w.source) mask |= 1u << pixel;
        }
        *masks++ = mask;
      }
    }
  }
}

// Where the weight lies that connects a target channel with the source channel `term` of its group. A group has a power of 2 of channels.
template <class T>
int64_t weight_index(const Job<T>& job, int64_t channel, int64_t term, int64_t tap) {
  const int64_t group_channel = channel & (job.group - 1), first = channel - group_channel, taps = taps_of(job.s);
  const int64_t k = job.h.forward ? channel : first + term, c = job.h.forward ? term : group_channel;
  return job.s.weight_layout == Layout::nchw ? (k * job.group + c) * taps + tap : (k * taps + tap) * job.group + c;
}

// The weights of kLanes channels in groups of one, as [tap, channel]. In either layout a channel's taps lie together.
template <class T>
void pack_depthwise(const Job<T>& job, const T* weight, int64_t first) {
  const int64_t taps = taps_of(job.s);
  for (int64_t tap = 0; tap < taps; ++tap) {
    store(job.weights + tap * job.channels + first, load_strided(weight + first * taps + tap, taps, first_lanes<T>(kLanes<T>), Vec<T>{}));
  }
}

// The weights of kLanes target channels as [tap, term, channel].
template <class T>
void pack_channels(const Job<T>& job, const T* weight, int64_t first) {
  if constexpr (kVectorBytes == 32) {
    if (job.group == 1) return pack_depthwise(job, weight, first);
  }
  for (int64_t tap = 0; tap < taps_of(job.s); ++tap) {
    for (int64_t term = 0; term < job.group; ++term) {
      T* packed = job.weights + (tap * job.group + term) * job.channels + first;
      for (int64_t i = 0; i < kLanes<T>; ++i) packed[i] = weight[weight_index(job, first + i, term, tap)];
    }
  }
}

template <class T>
void pack_weights(const Job<T>& job, const T* weight, int threads) {
  parallel_for(threads, job.vectors, [&](int, int64_t vector) { pack_channels(job, weight, vector * kLanes<T>); });
  if (job.channels % kLanes<T> != 0) pack_channels(job, weight, job.channels - kLanes<T>);
}

// The taps of a target row that exist in the source.
template <class T>
void clip_rows(const Job<T>& job, int64_t row, TileArguments<T>& a) {
  const Axis& h = job.h;
  const int64_t phase = h.phase(row), place = h.place(row) * h.source_step();
  a.row = job.h_lists.taps + job.h_lists.begin[phase];
  a.last_row = job.h_lists.taps + job.h_lists.begin[phase + 1];
  const auto outside = [&](const Tap* t) { return place + t->offset < 0 || place + t->offset >= h.source; };
  while (a.row < a.last_row && outside(a.row)) ++a.row;
  while (a.row < a.last_row && outside(a.last_row - 1)) --a.last_row;
}

// Vectors of channels that one tile takes: even shares, and the rest of the channels, less than a vector, as the last vector there is.
template <class T>
int64_t vectors_of_tile(const Job<T>& job, int64_t first_vector) {
  const int64_t left = job.vectors - first_vector;
  const int64_t most = job.group == 1 ? kTileVectors : kGroupedVectors;
  return left > 0 ? ceil_div(left, ceil_div(left, most)) : 1;
}

// What the row below a target row meets first, the next image behind the last: its source rows that are new there, and its own place. Each
// tile fetches a share, in the order of memory: by its own pixels, lines of one page here and there, took up to 1.4 times as long.
constexpr int64_t kLine = 64;
struct RowBelow {
  const char *source, *target;
  int64_t source_bytes, target_bytes;  // of a share
};

template <class T>
RowBelow row_below(const Job<T>& job, const T* source, const T* target, int64_t row, int64_t shares) {
  const int64_t first = job.h.last_source(row + 1), new_rows = job.h.last_source(row + 2) - first;
  const int64_t source_row = job.w.source * job.channels, target_row = job.w.target * job.channels;
  const auto share = [&](int64_t elements) { return ceil_div(elements * static_cast<int64_t>(sizeof(T)), shares * kLine) * kLine; };
  return {reinterpret_cast<const char*>(source + first * source_row), reinterpret_cast<const char*>(target + (row + 1) * target_row),
          share(new_rows * source_row), share(target_row)};
}

// (Inlined: of a function that fetches and does nothing else GCC takes the call for dead.)
inline __attribute__((always_inline)) void fetch_share(RowBelow& below) {
  for (int64_t i = 0; i < below.source_bytes; i += kLine) __builtin_prefetch(below.source + i);
  for (int64_t i = 0; i < below.target_bytes; i += kLine) __builtin_prefetch(below.target + i, 1);
  below.source += below.source_bytes;
  below.target += below.target_bytes;
}

// A tile of columns of one target row, the channel vectors [first_vector, last_vector).
template <class T>
void compute_columns(const Job<T>& job, TileArguments<T>& a, int64_t tile, int64_t first_vector, int64_t last_vector, const T* source,
                     RowBelow& below, const T* initial, T* target) {
  const Axis& w = job.w;
  const uint32_t every_pixel = (1u << job.pixels()) - 1;
  for (int64_t phase = 0; phase < w.phases(); ++phase) {
    const int64_t column = first_target(w, phase) + tile * job.pixels() * w.phases();
    if (column >= w.target) continue;
    a.column = job.w_lists.taps + job.w_lists.begin[phase];
    a.last_column = job.w_lists.taps + job.w_lists.begin[phase + 1];
    const int64_t count = smaller(job.pixels(), ceil_div(w.target - column, w.phases()));
    a.stored = (1u << count) - 1;
    a.masks = job.masks + (phase * job.tiles + tile) * w.taps;
    uint32_t all = a.stored;
    for (int64_t i = 0; i < a.last_column - a.column; ++i) all &= a.masks[i];
    for (int64_t vector = first_vector, vectors; vector < last_vector; vector += vectors) {
      vectors = vectors_of_tile(job, vector);
      const int64_t channel = smaller(vector * kLanes<T>, job.channels - vectors * kLanes<T>);
      a.source = source + w.place(column) * a.source_step + channel;
      a.weights = job.weights + channel;
      a.initial = initial + channel;
      a.target = target + column * job.channels + channel;
      if constexpr (kFetchesAhead) fetch_share(below);
      (all == every_pixel ? tile_of<T, false>(job.group, vectors) : tile_of<T, true>(job.group, vectors))(a);
    }
  }
}

template <class T>
void compute_rows(const Job<T>& job, const T* source, int64_t first_row, int64_t last_row, const T* initial, T* target) {
  const Axis &h = job.h, &w = job.w;
  TileArguments<T> a;
  a.source_step = w.source_step() * job.channels;
  a.target_step = w.phases() * job.channels;
  a.channels = job.channels;
  const int64_t all_vectors = ceil_div(job.channels, kLanes<T>);
  for (int64_t first_vector = 0, vectors; first_vector < all_vectors; first_vector += vectors) {
    vectors = job.by_channels ? vectors_of_tile(job, first_vector) : all_vectors;
    for (int64_t row = first_row; row < last_row; ++row) {
      clip_rows(job, row, a);
      const T* source_row = source + h.place(row) * h.source_step() * w.source * job.channels;
      RowBelow below{};
      if constexpr (kFetchesAhead) below = row_below(job, source, target, row, job.tiles * w.phases() * ceil_div(vectors, kTileVectors));
      for (int64_t tile = 0; tile < job.tiles; ++tile) {
        compute_columns(job, a, tile, first_vector, first_vector + vectors, source_row, below, initial,
                        target + row * w.target * job.channels);
      }
    }
  }
}

template <class T>
Outcome run_job(const Conv2dShape& s, const Conv2dBuffers& b, bool forward, void* workspace, int threads) {
  int64_t bytes;
  const Job<T> job = make_job<T>(s, forward, threads, workspace, &bytes);
  fill_lists(job.h, job.w.source * job.channels, s.kernel_w * job.group * job.channels, job.h_lists);
  fill_lists(job.w, job.channels, job.group * job.channels, job.w_lists);
  fill_masks(job);
  pack_weights(job, static_cast<const T*>(b.weight), threads);
  for (int64_t c = 0; c < job.channels; ++c) job.zeros[c] = 0;
  const T* source = static_cast<const T*>(forward ? b.input : b.grad_output);
  T* target = static_cast<T*>(forward ? b.output : b.grad_input);
  const T* initial = forward && b.bias != nullptr ? static_cast<const T*>(b.bias) : job.zeros;
  parallel_for(threads, job.tasks(), [&](int, int64_t task) {
    const int64_t image = task / job.row_tasks, row = task % job.row_tasks * job.rows_per_task;
    compute_rows(job, source + image * job.h.source * job.w.source * job.channels, row, smaller(job.h.target, row + job.rows_per_task),
                 initial, target + image * job.h.target * job.w.target * job.channels);
  });
  return Outcome::done;
}

template <class T>
Plan plan_job(const Conv2dShape& s, bool forward, int threads) {
  int64_t bytes;
  const Job<T> job = make_job<T>(s, forward, threads, nullptr, &bytes);
  return {kLanes<T> * (job.group == 1 ? kTileVectors : kGroupedVectors), tile_pixels(job.group), job.tasks(), static_cast<size_t>(bytes)};
}

template <bool kForward>
Plan plan(const Conv2dShape& s, int threads) {
  return plan_job<float>(s, kForward, threads);
}

template <bool kForward>
Outcome run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, int threads) {
  return run_job<float>(s, b, kForward, workspace, threads);
}

}  // namespace

extern const Conv2dKernel conv2d_forward_depthwise_channels = {CNN_EXT_KERNEL_NAME("conv2d_forward_depthwise_channels"),
                                                               Isa::CNN_EXT_ISA,
                                                               Conv2dDirection::forward,
                                                               accepts_depthwise_channels,
                                                               plan<true>,
                                                               run<true>};
extern const Conv2dKernel conv2d_backward_input_depthwise_channels = {CNN_EXT_KERNEL_NAME("conv2d_backward_input_depthwise_channels"),
                                                                      Isa::CNN_EXT_ISA,
                                                                      Conv2dDirection::backward_input,
                                                                      accepts_depthwise_channels,
                                                                      plan<false>,
                                                                      run<false>};

extern const Conv2dKernel conv2d_forward_grouped_channels = {CNN_EXT_KERNEL_NAME("conv2d_forward_grouped_channels"),
                                                             Isa::CNN_EXT_ISA,
                                                             Conv2dDirection::forward,
                                                             accepts_grouped_channels,
                                                             plan<true>,
                                                             run<true>};
extern const Conv2dKernel conv2d_backward_input_grouped_channels = {CNN_EXT_KERNEL_NAME("conv2d_backward_input_grouped_channels"),
                                                                    Isa::CNN_EXT_ISA,
                                                                    Conv2dDirection::backward_input,
                                                                    accepts_grouped_channels,
                                                                    plan<false>,
                                                                    run<false>};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
