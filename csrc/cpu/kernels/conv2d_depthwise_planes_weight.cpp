// The gradient of depthwise weights, straight from nchw memory, for column strides of 1 and 2, any number of output channels per channel,
// dilation, and kernels of up to 5x5 taps (avx2: 3x3). A vector is neighbouring columns of one map, and a tap's gradient is a vector that
// adds up grad_output[pixel] * input[pixel shifted by the tap] over the rows of all images of a chunk; its lanes are added at the end.
//
// Tile: all taps over 4 rows of grad_output (avx2: 3), which stay in registers: a vector of the input, which at an odd address costs two
// loads, is loaded for one tap column and serves each of the rows whose tap meets it. The rows lie so far apart that they share input rows:
// neighbours, or a dilation apart.
//
// Order: the pixels of a chunk in a register's lanes, then the lanes, then the chunks in ascending order. Chunks are a function of the
// shape alone.
//
// Border: input rows outside the map are skipped, columns outside are zero lanes. Where a sum is not finite, a zero may have met an
// infinity: the next row decides.
#include "cpu/kernels/conv2d_depthwise_planes.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

constexpr bool kManyRegisters = kVectorRegisters == 32;
constexpr int kMostTaps = kManyRegisters ? 5 : 3;  // of each axis of a tile
constexpr int kGradRows = kManyRegisters ? 4 : 3;

// A chunk of images of one output channel.
template <class T>
struct ChunkArguments {
  const T *grad, *input;
  int64_t images, grad_image, input_image;  // elements from one image to the next
  int64_t grad_rows, grad_columns;
  int64_t input_rows, input_columns;
  int64_t stride, row_step;           // input rows from one row of grad_output, from one tap row to the next
  int64_t row_classes;                // rows of grad_output this far apart share input rows
  int64_t first_row;                  // the input row of tap row 0 for row 0 of grad_output
  int64_t first_column, column_step;  // the input column of tap column 0 for column 0; columns from one tap column to the next
  int64_t vectors;
  const uint32_t* masks;  // [vector, tap column of the kernel, step]: lanes (with a step of 2 elements) that have an input
  int64_t vector_masks;   // masks of one vector
  T* sums;                // [tap, lane]
};

// A vector of columns of one image.
template <class T, int kColumns, int kStep>
struct ColumnVector {
  const T* grad;   // at row 0
  const T* input;  // the input column of tap column 0, at row 0
  uint32_t grad_bits;
  uint32_t masks[kColumns * kStep];
};

template <class T, int kStep>
inline Vec<T> load_input(const T* p, const uint32_t* masks) {
  if constexpr (kStep == 1) return load_bits(p, masks[0]);
  return even_lanes<T>(load_bits(p, masks[0]), load_bits(p + kLanes<T>, masks[1]));
}

// kGrads rows of grad_output from `row` on.
template <class T, int kGrads, int kRows, int kColumns, int kStep>
inline __attribute__((always_inline)) void add_rows(const ChunkArguments<T>& a, int64_t row, const ColumnVector<T, kColumns, kStep>& vector,
                                                    Vec<T> (&sum)[kRows][kColumns]) {
  Vec<T> g[kGrads];
  const int64_t grad_step = a.row_classes * a.grad_columns;
  const T* grad = vector.grad + row * a.grad_columns;
#pragma GCC unroll 4
  for (int o = 0; o < kGrads; ++o) g[o] = load_bits(grad + o * grad_step, vector.grad_bits);
  int64_t input_row = row * a.stride + a.first_row;
  const int64_t row_step = a.row_step, column_step = a.column_step, row_elements = row_step * a.input_columns;
  const T* row_input = vector.input + input_row * a.input_columns;
#pragma GCC unroll 16
  for (int i = 0; i < kRows + (kGrads - 1) * kStep; ++i, input_row += row_step, row_input += row_elements) {
    if (input_row < 0 || input_row >= a.input_rows) continue;
    const T* p = row_input;
#pragma GCC unroll 5
    for (int c = 0; c < kColumns; ++c, p += column_step) {
      hide_origin(p);
      Vec<T> x = load_input<T, kStep>(p, vector.masks + c * kStep);
      keep_loaded(x);
#pragma GCC unroll 4
      for (int o = 0; o < kGrads; ++o) {
        const int r = i - o * kStep;
        if (r >= 0 && r < kRows) sum[r][c] = fma(x, g[o], sum[r][c]);
      }
    }
  }
}

template <class T, int kRows, int kColumns, int kStep>
void add_chunk(const ChunkArguments<T>& a) {
  Vec<T> sum[kRows][kColumns] = {};
  for (int64_t image = 0; image < a.images; ++image) {
    for (int64_t v = 0; v < a.vectors; ++v) {
      ColumnVector<T, kColumns, kStep> vector;
      vector.grad = a.grad + image * a.grad_image + v * kLanes<T>;
      vector.input = a.input + image * a.input_image + v * kLanes<T> * kStep + a.first_column;
      vector.grad_bits = first_bits_of(smaller(a.grad_columns - v * kLanes<T>, kLanes<T>));
#pragma GCC unroll 10
      for (int i = 0; i < kColumns * kStep; ++i) vector.masks[i] = a.masks[v * a.vector_masks + i];
      for (int64_t start = 0; start < smaller(a.row_classes, a.grad_rows); ++start) {
        int64_t row = start;
        for (; row + (kGradRows - 1) * a.row_classes < a.grad_rows; row += kGradRows * a.row_classes) {
          add_rows<T, kGradRows, kRows, kColumns, kStep>(a, row, vector, sum);
        }
        for (; row < a.grad_rows; row += a.row_classes) {
          add_rows<T, 1, kRows, kColumns, kStep>(a, row, vector, sum);
        }
      }
    }
  }
#pragma GCC unroll 5
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 5
    for (int c = 0; c < kColumns; ++c) store(a.sums + (r * kColumns + c) * kLanes<T>, sum[r][c]);
  }
}

template <class T>
using Tile = void (*)(const ChunkArguments<T>&);

template <class T, int kStep, int kRows>
Tile<T> tile_of(int64_t columns) {
  if constexpr (kMostTaps == 5) {
    static constexpr Tile<T> tiles[] = {add_chunk<T, kRows, 1, kStep>, add_chunk<T, kRows, 2, kStep>, add_chunk<T, kRows, 3, kStep>,
                                        add_chunk<T, kRows, 4, kStep>, add_chunk<T, kRows, 5, kStep>};
    return tiles[columns - 1];
  } else {
    static constexpr Tile<T> tiles[] = {add_chunk<T, kRows, 1, kStep>, add_chunk<T, kRows, 2, kStep>, add_chunk<T, kRows, 3, kStep>};
    return tiles[columns - 1];
  }
}

template <class T, int kStep>
Tile<T> tile_of(int64_t rows, int64_t columns) {
  if (rows == 1) return tile_of<T, kStep, 1>(columns);
  if (rows == 2) return tile_of<T, kStep, 2>(columns);
  if constexpr (kMostTaps == 5) {
    if (rows == 4) return tile_of<T, kStep, 4>(columns);
    if (rows == 5) return tile_of<T, kStep, 5>(columns);
  }
  return tile_of<T, kStep, 3>(columns);
}

template <class T>
Tile<T> tile_of(int64_t rows, int64_t columns, int64_t step) {
  return step == 1 ? tile_of<T, 1>(rows, columns) : tile_of<T, 2>(rows, columns);
}

// The sizes and scratch of one call.
template <class T>
struct Job {
  Conv2dShape s;
  int64_t row_classes;  // see ChunkArguments
  int64_t vectors;      // of columns
  int64_t images_per_chunk, chunks;
  uint32_t* masks;  // [vector, tap column, step]
  T* totals;        // [chunk, output channel, tap], unless there is one chunk
  T* scratch;       // per worker: [tap, lane]

  int64_t scratch_size() const { return ceil_div(taps_of(s), kLanes<T>) * kLanes<T> * kLanes<T>; }
  int64_t weights() const { return s.out_channels * taps_of(s); }
};

// Some chunks are wanted where channels are few.
inline int64_t images_per_chunk(const Conv2dShape& s) {
  constexpr int64_t kWantedTasks = 16;
  return larger(1, ceil_div(s.batch, ceil_div(kWantedTasks, s.out_channels)));
}

// Lays out the call's scratch from `workspace` on (null: sizes only) and returns its bytes.
template <class T>
Job<T> make_job(const Conv2dShape& s, int threads, void* workspace, int64_t* bytes) {
  Job<T> job{};
  job.s = s;
  job.row_classes = s.dilation_h / greatest_common_divisor(s.stride_h, s.dilation_h);
  job.vectors = ceil_div(s.out_w, kLanes<T>);
  job.images_per_chunk = images_per_chunk(s);
  job.chunks = larger(1, ceil_div(s.batch, job.images_per_chunk));
  const int64_t scalar = sizeof(T);
  const int64_t sizes[] = {align_64(job.vectors * s.kernel_w * s.stride_w * 4),
                           job.chunks > 1 ? align_64(job.chunks * job.weights() * scalar) : 0, job.scratch_size() * threads * scalar};
  char* at = static_cast<char*>(workspace);
  if (at != nullptr) {
    job.masks = reinterpret_cast<uint32_t*>(at);
    job.totals = reinterpret_cast<T*>(at + sizes[0]);
    job.scratch = reinterpret_cast<T*>(at + sizes[0] + sizes[1]);
  }
  *bytes = sizes[0] + sizes[1] + sizes[2];
  return job;
}

template <class T>
void fill_masks(const Job<T>& job) {
  const Conv2dShape& s = job.s;
  uint32_t* mask = job.masks;
  for (int64_t v = 0; v < job.vectors; ++v) {
    for (int64_t c = 0; c < s.kernel_w; ++c, mask += s.stride_w) {
      const int64_t column = v * kLanes<T>, first = column * s.stride_w + c * s.dilation_w - s.pad_left;
      write_mask<T>(lanes_with_source<T>(s.out_w - column, first, s.stride_w, s.in_w), s.stride_w, mask);
    }
  }
}

// All taps of one output channel over one chunk, into the worker's scratch.
template <class T>
void add_taps(const Job<T>& job, const Conv2dBuffers& b, int64_t channel, int64_t first_image, T* sums) {
  const Conv2dShape& s = job.s;
  const int64_t input_map = s.in_h * s.in_w, grad_map = s.out_h * s.out_w;
  ChunkArguments<T> a;
  a.grad_image = s.out_channels * grad_map;
  a.input_image = s.in_channels * input_map;
  a.grad = static_cast<const T*>(b.grad_output) + first_image * a.grad_image + channel * grad_map;
  a.input = static_cast<const T*>(b.input) + first_image * a.input_image + channel / multiplier_of(s) * input_map;
  a.images = smaller(job.images_per_chunk, s.batch - first_image);
  a.grad_rows = s.out_h;
  a.grad_columns = s.out_w;
  a.input_rows = s.in_h;
  a.input_columns = s.in_w;
  a.stride = s.stride_h;
  a.row_step = s.dilation_h;
  a.row_classes = job.row_classes;
  a.column_step = s.dilation_w;
  a.vectors = job.vectors;
  a.vector_masks = s.kernel_w * s.stride_w;
  a.first_row = -s.pad_top;
  a.first_column = -s.pad_left;
  a.masks = job.masks;
  a.sums = sums;
  tile_of<T>(s.kernel_h, s.kernel_w, s.stride_w)(a);
}

// Adds up the lanes of each tap; whether the results are finite.
template <class T>
bool reduce_lanes(const T* sums, int64_t taps, T* totals) {
  bool finite = true;
  for (int64_t first = 0; first < taps; first += kLanes<T>) {
    Vec<T> lanes[kLanes<T>];
    for (int i = 0; i < kLanes<T>; ++i) lanes[i] = load(sums + (first + i) * kLanes<T>);
    transpose<T>(lanes);
    Vec<T> total = lanes[0];
    for (int i = 1; i < kLanes<T>; ++i) total += lanes[i];
    const LaneSet present = first_lanes<T>(taps - first);
    store_lanes(totals + first, total, present);
    finite = finite && is_finite<T>(load_lanes(totals + first, present, Vec<T>{}));
  }
  return finite;
}

template <class T>
Outcome run_job(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, int threads) {
  int64_t bytes;
  const Job<T> job = make_job<T>(s, threads, workspace, &bytes);
  fill_masks(job);
  T* grad_weight = static_cast<T*>(b.grad_weight);
  T* totals = job.chunks > 1 ? job.totals : grad_weight;
  int32_t infinite = 0;
  parallel_for(threads, job.chunks * s.out_channels, [&](int worker, int64_t task) {
    T* sums = job.scratch + worker * job.scratch_size();
    add_taps(job, b, task % s.out_channels, task / s.out_channels * job.images_per_chunk, sums);
    if (!reduce_lanes(sums, taps_of(s), totals + task * taps_of(s))) __atomic_store_n(&infinite, 1, __ATOMIC_RELAXED);
  });
  if (infinite != 0) return Outcome::not_finite;
  for (int64_t i = 0; job.chunks > 1 && i < job.weights(); ++i) {
    T total = totals[i];
    for (int64_t chunk = 1; chunk < job.chunks; ++chunk) total += totals[chunk * job.weights() + i];
    grad_weight[i] = total;
  }
  return Outcome::done;
}

template <class T>
Plan plan_job(const Conv2dShape& s, int threads) {
  int64_t bytes;
  const Job<T> job = make_job<T>(s, threads, nullptr, &bytes);
  return {1, kGradRows * kLanes<T>, job.chunks * s.out_channels, static_cast<size_t>(bytes)};
}

Plan plan(const Conv2dShape& s, int threads) { return plan_job<float>(s, threads); }

Outcome run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, int threads) { return run_job<float>(s, b, workspace, threads); }

// Kernels of more than one tile are faster with a channel in each lane (conv2d_depthwise_weight.cpp).
bool accepts(const Conv2dShape& s) {
  return accepts_planes(s, s.out_w) && accepts_planes_stride(s) && s.kernel_h <= kMostTaps && s.kernel_w <= kMostTaps;
}

}  // namespace

extern const Conv2dKernel conv2d_backward_weight_depthwise_planes = {
    CNN_EXT_KERNEL_NAME("conv2d_backward_weight_depthwise_planes"), Isa::CNN_EXT_ISA, Conv2dDirection::backward_weight, accepts, plan, run};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
