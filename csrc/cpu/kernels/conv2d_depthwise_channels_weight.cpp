// The gradient of depthwise weights from nhwc tensors with one output channel per channel, and of groups of 2, 4 or 8 channels with as many
// outputs, for kernels of up to 7 columns, any stride and dilation, straight from memory: a vector is neighbouring channels of one pixel,
// and a tap's gradient is a vector that adds up grad_output[pixel] * input[pixel shifted by the tap], the padding left out.
//
// In a group of G channels every input channel meets G outputs: the vector of grad_output is turned within its groups by 0, 1, ... G - 1
// lanes, once per pixel, and a tap has a sum for each turn.
//
// Tile: the taps of up to 5 rows and all columns, 28 sums (avx2: 14), over a row of pixels: one load of grad_output serves all taps, the
// input is a memory operand. Depthwise 3x3 kernels take two vectors at a time. A bit mask per pixel says which taps have an input there;
// between the borders no mask is looked at.
//
// Order: pixels of a row in registers, rows and images of a chunk in memory, then the chunks in ascending order. Chunks are a function of
// the shape and the instruction set, never of the threads.
#include "cpu/kernels/conv2d_depthwise.inl"
#include "cpu/simd/caches.h"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

constexpr int kTileRows = 5;
constexpr int kTileColumns = 7;
constexpr int kTileSums = kVectorRegisters == 32 ? 28 : 14;
constexpr int kBlockVectors = 4;  // of the channels of a task: 256 bytes of each pixel

template <class T>
struct Job {
  Conv2dShape s;
  int64_t group;                   // channels of one, and sums per tap
  int64_t blocks;                  // of channels
  int64_t chunk_rows, row_chunks;  // output rows of a chunk, chunks of an image
  int64_t chunk_images, chunks;    // in all
  int64_t tile_rows;               // tap rows of a tile
  int64_t first_full, last_full;   // output columns where all tap columns have an input
  uint32_t* masks;                 // [out_w]: bit c of tap column c, repeated for each tap row of a tile
  T* sums;                         // [chunks, taps, turns, vectors, lanes]

  int64_t channels() const { return s.in_channels; }
  int64_t vectors() const { return ceil_div(channels(), kLanes<T>); }
  // A rest of channels is computed as the last full vector; its first lanes repeat the vector before and are thrown away.
  int64_t first_channel(int64_t vector) const { return smaller(vector * kLanes<T>, channels() - kLanes<T>); }
  int64_t sums_of_chunk() const { return taps_of(s) * group * vectors() * kLanes<T>; }
};

// One output row for a tile of taps.
template <class T>
struct RowArguments {
  const T *grad, *input;  // at output column 0; the input of tap 0, which may lie outside
  int64_t columns, first_full, last_full;
  int64_t channels;
  int64_t input_pixel, tap_row, tap_column;  // elements from one output pixel, tap row, tap column to the next
  const uint32_t* masks;
  uint32_t row_mask;  // the bits of the tap rows that have an input
  T* sums;            // of tap 0
  int64_t sums_step;  // from one turn's or tap's to the next
};

// Within each group of kGroup lanes, lane l takes lane l + kTurn.
template <class T, int kGroup, int kTurn, int... J>
inline Vec<T> turn(Vec<T> v, Lanes<J...>) {
  return __builtin_shufflevector(v, v, (J / kGroup * kGroup + (J + kTurn) % kGroup)...);
}

template <class T, int... kTurn>
inline void turn_all(Vec<T> v, Vec<T> (&turned)[sizeof...(kTurn)], Lanes<kTurn...>) {
  ((turned[kTurn] = turn<T, sizeof...(kTurn), kTurn>(v, typename CountedLanes<kLanes<T>>::type{})), ...);
}

// kSums: of a tap, the turns of its group or, with a kGroup of 1, neighbouring vectors.
template <class T, int kRows, int kColumns, int kGroup, int kSums, bool kMasked>
inline __attribute__((always_inline)) void add_pixels(const RowArguments<T>& a, int64_t first, int64_t last,
                                                      Vec<T> (&sum)[kRows * kColumns][kSums]) {
  const T* grad = a.grad + first * a.channels;
  const T* input = a.input + first * a.input_pixel;
  const int64_t channels = a.channels, input_pixel = a.input_pixel, tap_row = a.tap_row, tap_column = a.tap_column;
  for (int64_t column = first; column < last; ++column, grad += channels, input += input_pixel) {
    const uint32_t mask = kMasked ? a.masks[column] & a.row_mask : 0;
    Vec<T> g[kSums];
    if constexpr (kGroup > 1) {
      turn_all<T>(load(grad), g, typename CountedLanes<kSums>::type{});
    } else {
#pragma GCC unroll 2
      for (int v = 0; v < kSums; ++v) g[v] = load(grad + v * kLanes<T>);
    }
    const T* row = input;
#pragma GCC unroll 5
    for (int r = 0; r < kRows; ++r, row += tap_row) {
      const T* tap = row;
#pragma GCC unroll 7
      for (int c = 0; c < kColumns; ++c, tap += tap_column) {
        hide_origin(tap);
        if (kMasked && (mask & (1u << (r * kColumns + c))) == 0) continue;
#pragma GCC unroll 8
        for (int v = 0; v < kSums; ++v) {
          sum[r * kColumns + c][v] = fma(load(tap + (kGroup > 1 ? 0 : v * kLanes<T>)), g[v], sum[r * kColumns + c][v]);
        }
      }
    }
  }
}

template <class T, int kRows, int kColumns, int kGroup, int kSums>
void compute_row(const RowArguments<T>& a) {
  constexpr int kTaps = kRows * kColumns;
  constexpr uint32_t kAll = static_cast<uint32_t>((uint64_t{1} << kTaps) - 1);
  Vec<T> sum[kTaps][kSums] = {};
  const bool full = a.row_mask == kAll;
  const int64_t first_full = full ? a.first_full : a.columns, last_full = full ? a.last_full : a.columns;
  add_pixels<T, kRows, kColumns, kGroup, kSums, true>(a, 0, first_full, sum);
  add_pixels<T, kRows, kColumns, kGroup, kSums, false>(a, first_full, last_full, sum);
  add_pixels<T, kRows, kColumns, kGroup, kSums, true>(a, last_full, a.columns, sum);
#pragma GCC unroll 28
  for (int i = 0; i < kTaps; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kSums; ++v) {
      T* total = a.sums + (kGroup > 1 ? (i * kGroup + v) * a.sums_step : i * a.sums_step + v * kLanes<T>);
      store(total, load(total) + sum[i][v]);
    }
  }
}

template <class T>
using Row = void (*)(const RowArguments<T>&);

// Whether a tile takes two vectors of channels at once.
constexpr bool takes_pairs(int64_t rows, int64_t columns, int64_t group) {
  return group == 1 && rows == 3 && columns == 3 && 2 * rows * columns <= kTileSums;
}

template <class T, int kGroup, int kRows, int kColumns>
Row<T> row_of(bool pair) {
  if constexpr (kRows * kColumns * kGroup > kTileSums || kGroup > kLanes<T>) {
    return nullptr;
  } else if constexpr (takes_pairs(kRows, kColumns, kGroup)) {
    return pair ? compute_row<T, kRows, kColumns, 1, 2> : compute_row<T, kRows, kColumns, 1, 1>;
  } else {
    return compute_row<T, kRows, kColumns, kGroup, kGroup>;
  }
}

template <class T, int kGroup, int kRows>
Row<T> row_of(int64_t columns, bool pair) {
  const Row<T> rows[kTileColumns] = {row_of<T, kGroup, kRows, 1>(pair), row_of<T, kGroup, kRows, 2>(pair),
                                     row_of<T, kGroup, kRows, 3>(pair), row_of<T, kGroup, kRows, 4>(pair),
                                     row_of<T, kGroup, kRows, 5>(pair), row_of<T, kGroup, kRows, 6>(pair),
                                     row_of<T, kGroup, kRows, 7>(pair)};
  return rows[columns - 1];
}

template <class T, int kGroup>
Row<T> row_of(int64_t rows, int64_t columns, bool pair) {
  switch (rows) {
    case 1:
      return row_of<T, kGroup, 1>(columns, pair);
    case 2:
      return row_of<T, kGroup, 2>(columns, pair);
    case 3:
      return row_of<T, kGroup, 3>(columns, pair);
    case 4:
      return row_of<T, kGroup, 4>(columns, pair);
    default:
      return row_of<T, kGroup, 5>(columns, pair);
  }
}

template <class T>
Row<T> row_of(int64_t group, int64_t rows, int64_t columns, bool pair) {
  if (group == 1) return row_of<T, 1>(rows, columns, pair);
  if (group == 2) return row_of<T, 2>(rows, columns, pair);
  return group == 4 ? row_of<T, 4>(rows, columns, pair) : row_of<T, 8>(rows, columns, pair);
}

// Lays out the call's scratch from `workspace` on (null: sizes only) and returns its bytes.
template <class T>
Job<T> make_job(const Conv2dShape& s, void* workspace, int64_t* bytes) {
  constexpr int64_t kWantedTasks = 16;
  Job<T> job{};
  job.s = s;
  job.group = s.in_channels / s.groups;
  job.blocks = ceil_div(s.in_channels, kBlockVectors * kLanes<T>);
  const int64_t wanted_chunks = ceil_div(kWantedTasks, job.blocks);
  job.row_chunks = smaller(s.out_h, ceil_div(wanted_chunks, larger(1, s.batch)));
  job.chunk_rows = ceil_div(s.out_h, job.row_chunks);
  job.row_chunks = ceil_div(s.out_h, job.chunk_rows);
  job.chunk_images = job.row_chunks > 1 ? 1 : larger(1, s.batch / wanted_chunks);
  job.chunks = ceil_div(s.batch, job.chunk_images) * job.row_chunks;
  const int64_t most_rows = smaller(kTileRows, kTileSums / (s.kernel_w * job.group));
  job.tile_rows = ceil_div(s.kernel_h, ceil_div(s.kernel_h, most_rows));
  const int64_t masks = align_64(s.out_w * 4), sums = align_64(job.chunks * job.sums_of_chunk() * static_cast<int64_t>(sizeof(T)));
  if (workspace != nullptr) {
    job.masks = static_cast<uint32_t*>(workspace);
    job.sums = reinterpret_cast<T*>(static_cast<char*>(workspace) + masks);
  }
  *bytes = masks + sums;
  return job;
}

template <class T>
void fill_masks(Job<T>& job) {
  const Conv2dShape& s = job.s;
  job.first_full = s.out_w;
  job.last_full = s.out_w;
  for (int64_t ow = 0; ow < s.out_w; ++ow) {
    uint32_t mask = 0;
    int64_t valid = 0;
    for (int64_t c = 0; c < s.kernel_w; ++c) {
      const int64_t iw = ow * s.stride_w - s.pad_left + c * s.dilation_w;
      if (iw < 0 || iw >= s.in_w) continue;
      ++valid;
      for (int64_t r = 0; r < job.tile_rows; ++r) mask |= 1u << (r * s.kernel_w + c);
    }
    job.masks[ow] = mask;
    if (valid == s.kernel_w && job.first_full == s.out_w) job.first_full = ow;
    if (valid != s.kernel_w && job.first_full < s.out_w && job.last_full == s.out_w) job.last_full = ow;
  }
}

// A task reads two lines of each pixel, which no processor sees as one stream: it fetches what the next row of outputs meets first, the
// gradients and the input rows that are new there, behind an image's last row the next image's. Only where that takes a small share of the
// first cache, for a long row's lines, fetched all at once, wait for one another, and where a line is for two taps or more. (AVX-512: its
// lines are four in a row. Inlined: of a function that fetches and does nothing else GCC takes the call for dead.)
constexpr bool kFetchesAhead = kVectorBytes == 32;

template <class T>
inline __attribute__((always_inline)) void fetch_pixels(const T* first, int64_t pixels, int64_t pixel, int64_t channels) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < pixels; ++i) {
    for (int64_t c = 0; c < channels; c += kLine) __builtin_prefetch(first + i * pixel + c);
  }
}

template <class T>
inline __attribute__((always_inline)) void fetch_next_row(const Job<T>& job, const T* input, const T* grad, int64_t oh, int64_t first,
                                                          int64_t last) {
  constexpr int64_t kMostBytes = kFirstCacheBytes / 4;
  const Conv2dShape& s = job.s;
  const int64_t new_pixels = s.stride_h * s.in_w, channels = (last - first) * kLanes<T>;
  if ((new_pixels + s.out_w) * channels * static_cast<int64_t>(sizeof(T)) > kMostBytes) return;
  if (2 * (s.stride_h * s.stride_w + 1) > taps_of(s)) return;
  const int64_t below = oh * s.stride_h - s.pad_top + (s.kernel_h - 1) * s.dilation_h + 1, channel = job.first_channel(first);
  fetch_pixels(input + below * s.in_w * job.channels() + channel, new_pixels, job.channels(), channels);
  fetch_pixels(grad + (oh + 1) * s.out_w * job.channels() + channel, s.out_w, job.channels(), channels);
}

// One output row of one image for the vectors of channels [first, last).
template <class T>
void add_row(const Job<T>& job, const T* input, const T* grad, int64_t oh, int64_t first, int64_t last, T* sums) {
  const Conv2dShape& s = job.s;
  RowArguments<T> a;
  a.columns = s.out_w;
  a.first_full = job.first_full;
  a.last_full = job.last_full;
  a.channels = job.channels();
  a.input_pixel = s.stride_w * job.channels();
  a.tap_row = s.dilation_h * s.in_w * job.channels();
  a.tap_column = s.dilation_w * job.channels();
  a.masks = job.masks;
  a.sums_step = job.vectors() * kLanes<T>;
  if constexpr (kFetchesAhead) fetch_next_row(job, input, grad, oh, first, last);
  for (int64_t tap_row = 0, rows; tap_row < s.kernel_h; tap_row += rows) {
    rows = smaller(job.tile_rows, s.kernel_h - tap_row);
    const int64_t ih = oh * s.stride_h - s.pad_top + tap_row * s.dilation_h;
    a.row_mask = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const bool inside = ih + r * s.dilation_h >= 0 && ih + r * s.dilation_h < s.in_h;
      if (inside) a.row_mask |= ((1u << s.kernel_w) - 1) << (r * s.kernel_w);
    }
    if (a.row_mask == 0) continue;
    const T* tap_input = input + (ih * s.in_w - s.pad_left) * job.channels();
    for (int64_t vector = first, vectors; vector < last; vector += vectors) {
      vectors = takes_pairs(rows, s.kernel_w, job.group) && (vector + 2) * kLanes<T> <= job.channels() && vector + 2 <= last ? 2 : 1;
      a.input = tap_input + job.first_channel(vector);
      a.grad = grad + oh * s.out_w * job.channels() + job.first_channel(vector);
      a.sums = sums + tap_row * s.kernel_w * job.group * a.sums_step + vector * kLanes<T>;
      row_of<T>(job.group, rows, s.kernel_w, vectors == 2)(a);
    }
  }
}

// A chunk of rows or images of one block of channels.
template <class T>
void run_task(const Job<T>& job, const Conv2dBuffers& b, int64_t task) {
  const Conv2dShape& s = job.s;
  const int64_t block = task % job.blocks, chunk = task / job.blocks;
  const int64_t first = block * kBlockVectors, last = smaller(job.vectors(), first + kBlockVectors);
  const int64_t image = chunk / job.row_chunks * job.chunk_images, row = chunk % job.row_chunks * job.chunk_rows;
  T* sums = job.sums + chunk * job.sums_of_chunk();
  for (int64_t i = 0; i < taps_of(s) * job.group; ++i) clear_pixels(sums + (i * job.vectors() + first) * kLanes<T>, last - first);
  for (int64_t n = image; n < smaller(s.batch, image + job.chunk_images); ++n) {
    const T* input = static_cast<const T*>(b.input) + n * s.in_h * s.in_w * job.channels();
    const T* grad = static_cast<const T*>(b.grad_output) + n * s.out_h * s.out_w * job.channels();
    for (int64_t oh = row; oh < smaller(s.out_h, row + job.chunk_rows); ++oh) add_row(job, input, grad, oh, first, last, sums);
  }
}

// Where the gradient lies that connects input channel `channel` with the output `turn` lanes further in its group.
template <class T>
int64_t weight_index(const Job<T>& job, int64_t channel, int64_t turn, int64_t tap) {
  const int64_t c = channel % job.group, k = channel - c + (c + turn) % job.group, taps = taps_of(job.s);
  return job.s.weight_layout == Layout::nchw ? (k * job.group + c) * taps + tap : (k * taps + tap) * job.group + c;
}

// Adds up the chunks of one vector of channels and writes them.
template <class T>
void write_vector(const Job<T>& job, int64_t vector, T* grad_weight) {
  const int64_t first = job.first_channel(vector);
  for (int64_t tap = 0; tap < taps_of(job.s); ++tap) {
    for (int64_t turn = 0; turn < job.group; ++turn) {
      const T* sums = job.sums + ((tap * job.group + turn) * job.vectors() + vector) * kLanes<T>;
      Vec<T> total{};
      for (int64_t chunk = 0; chunk < job.chunks; ++chunk) total += load(sums + chunk * job.sums_of_chunk());
      for (int64_t i = vector * kLanes<T> - first; i < kLanes<T>; ++i) grad_weight[weight_index(job, first + i, turn, tap)] = total[i];
    }
  }
}

template <class T>
Outcome run_job(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, int threads) {
  int64_t bytes;
  Job<T> job = make_job<T>(s, workspace, &bytes);
  fill_masks(job);
  parallel_for(threads, job.chunks * job.blocks, [&](int, int64_t task) { run_task(job, b, task); });
  parallel_for(threads, job.vectors(), [&](int, int64_t vector) { write_vector(job, vector, static_cast<T*>(b.grad_weight)); });
  return Outcome::done;
}

template <class T>
Plan plan_job(const Conv2dShape& s) {
  int64_t bytes;
  const Job<T> job = make_job<T>(s, nullptr, &bytes);
  return {kLanes<T>, 1, job.chunks * job.blocks, static_cast<size_t>(bytes)};
}

Plan plan(const Conv2dShape& s, int) { return plan_job<float>(s); }

Outcome run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, int threads) { return run_job<float>(s, b, workspace, threads); }

// Where fewer than a third of the columns lie between the borders (7x7 on 7x7 maps), the masks cost more than the other kernel's stage.
bool accepts_depthwise_weight(const Conv2dShape& s) {
  if (!accepts_depthwise_channels(s) || s.kernel_w > kTileColumns) return false;
  const int64_t reach = (s.kernel_w - 1) * s.dilation_w;
  return 3 * (s.in_w - reach) >= s.out_w * s.stride_w;
}

bool accepts_grouped_weight(const Conv2dShape& s) {
  return accepts_grouped_channels(s) && s.kernel_w <= kTileColumns && s.kernel_w * (s.in_channels / s.groups) <= kTileSums;
}

}  // namespace

extern const Conv2dKernel conv2d_backward_weight_depthwise_channels = {CNN_EXT_KERNEL_NAME("conv2d_backward_weight_depthwise_channels"),
                                                                       Isa::CNN_EXT_ISA,
                                                                       Conv2dDirection::backward_weight,
                                                                       accepts_depthwise_weight,
                                                                       plan,
                                                                       run};
extern const Conv2dKernel conv2d_backward_weight_grouped_channels = {CNN_EXT_KERNEL_NAME("conv2d_backward_weight_grouped_channels"),
                                                                     Isa::CNN_EXT_ISA,
                                                                     Conv2dDirection::backward_weight,
                                                                     accepts_grouped_weight,
                                                                     plan,
                                                                     run};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
