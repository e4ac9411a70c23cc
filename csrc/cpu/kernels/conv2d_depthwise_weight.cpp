// The gradient of depthwise weights, for any number of output channels per channel, kernel, stride and dilation.
//
// Input and grad_output are staged as [row][column][lane], a channel in each lane (conv2d_depthwise.inl); then a tap's gradient is a vector
// that adds up grad_output[pixel] * input[pixel shifted by the tap] over all pixels, without a horizontal sum.
//
// Tile: 2 or 3 tap rows times up to 7 tap columns, at most 14 sums, so that a vector of grad_output is read once for 14 multiplications
// whose other operand comes from L1; with the vector of grad_output they leave one of avx2's 16 registers.
//
// Order: pixels of a block of rows in a register, blocks and images of a chunk in memory, then the chunks in ascending order. Blocks and
// chunks are a function of the shape and the instruction set, never of the threads.
//
// The zeros staged for padding meet grad_output, which must be finite.
#include "cpu/kernels/conv2d_depthwise.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

constexpr int kTileRows = 3;
constexpr int kTileColumns = 7;
constexpr int kTileSums = 14;

// The sizes and scratch of one call.
template <class T>
struct Job {
  Conv2dShape s;
  int64_t blocks, multiplier;
  int64_t images_per_chunk, chunks;
  int64_t rows;                       // output rows staged at a time
  int64_t stage_rows, stage_columns;  // of the input
  T* sums;                            // [chunks, blocks, multiplier, taps, lanes]
  T* scratch;                         // per worker: input stage, grad_output stage
  int64_t scratch_size;               // elements

  int64_t input_elements() const { return stage_rows * stage_columns * kLanes<T>; }
  int64_t block_sums() const { return multiplier * taps_of(s) * kLanes<T>; }
};

// Lays out the call's scratch from `workspace` on (null: sizes only) and returns its bytes.
template <class T>
Job<T> make_job(const Conv2dShape& s, int threads, void* workspace, int64_t* bytes) {
  constexpr int64_t kStageBytes = 128 << 10;  // with grad_output's stage it stays in L2
  constexpr int64_t kWantedTasks = 16;
  Job<T> job{};
  job.s = s;
  job.blocks = ceil_div(s.groups, kLanes<T>);
  job.multiplier = multiplier_of(s);
  job.images_per_chunk = larger(1, s.batch / larger(1, ceil_div(kWantedTasks, job.blocks)));
  job.chunks = ceil_div(s.batch, job.images_per_chunk);
  const int64_t halo = (s.kernel_h - 1) * s.dilation_h + 1;
  job.stage_columns = (s.out_w - 1) * s.stride_w + (s.kernel_w - 1) * s.dilation_w + 1;
  const int64_t fitting = larger((kStageBytes / (job.stage_columns * kVectorBytes) - halo) / s.stride_h, halo / s.stride_h);
  job.rows = larger(1, smaller(s.out_h, fitting));
  job.stage_rows = (job.rows - 1) * s.stride_h + halo;
  job.scratch_size = job.input_elements() + job.rows * s.out_w * kLanes<T>;
  const int64_t scalar = sizeof(T), sums = align_64(job.chunks * job.blocks * job.block_sums() * scalar);
  if (workspace != nullptr) {
    job.sums = static_cast<T*>(workspace);
    job.scratch = reinterpret_cast<T*>(static_cast<char*>(workspace) + sums);
  }
  *bytes = sums + job.scratch_size * threads * scalar;
  return job;
}

// Rows of grad_output and the input pixels that tap 0 of a tile connects to them. Distances in elements of the stages.
template <class T>
struct Pixels {
  const T* grad;
  const T* input;
  int64_t rows, columns;
  int64_t input_row, input_pixel;  // from one output row, one output pixel to the next
  int64_t tap_row, tap_column;     // from one tap row, one tap column to the next
};

// Adds the gradients of kRows x kColumns taps to sums[row * sums_row + column * lanes]. kDense: tap_column is one pixel.
template <class T, int kRows, int kColumns, bool kDense>
void compute_tile(const Pixels<T>& p, T* sums, int64_t sums_row) {
  const int64_t tap_column = kDense ? kLanes<T> : p.tap_column;
  Vec<T> sum[kRows][kColumns] = {};
  for (int64_t oh = 0; oh < p.rows; ++oh) {
    const T* grad = p.grad + oh * p.columns * kLanes<T>;
    const T* input = p.input + oh * p.input_row;
    for (int64_t ow = 0; ow < p.columns; ++ow, grad += kLanes<T>, input += p.input_pixel) {
      const Vec<T> g = load(grad);
#pragma GCC unroll 3
      for (int r = 0; r < kRows; ++r) {
        const T* row = input + r * p.tap_row;
#pragma GCC unroll 7
        for (int c = 0; c < kColumns; ++c) sum[r][c] = fma(load(row + c * tap_column), g, sum[r][c]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c) {
      T* total = sums + r * sums_row + c * kLanes<T>;
      store(total, load(total) + sum[r][c]);
    }
  }
}

template <class T>
using Tile = void (*)(const Pixels<T>&, T*, int64_t);

template <class T, bool kDense>
Tile<T> tile_of(int64_t rows, int64_t columns) {
  static constexpr Tile<T> tiles[kTileRows][kTileColumns] = {
      {compute_tile<T, 1, 1, kDense>, compute_tile<T, 1, 2, kDense>, compute_tile<T, 1, 3, kDense>, compute_tile<T, 1, 4, kDense>,
       compute_tile<T, 1, 5, kDense>, compute_tile<T, 1, 6, kDense>, compute_tile<T, 1, 7, kDense>},
      {compute_tile<T, 2, 1, kDense>, compute_tile<T, 2, 2, kDense>, compute_tile<T, 2, 3, kDense>, compute_tile<T, 2, 4, kDense>,
       compute_tile<T, 2, 5, kDense>, compute_tile<T, 2, 6, kDense>, compute_tile<T, 2, 7, kDense>},
      {compute_tile<T, 3, 1, kDense>, compute_tile<T, 3, 2, kDense>, compute_tile<T, 3, 3, kDense>, compute_tile<T, 3, 4, kDense>, nullptr,
       nullptr, nullptr}};
  return tiles[rows - 1][columns - 1];
}

// All taps, over the staged rows. Tap columns are shared out evenly: 31 = 7 + 6 + 6 + 6 + 6.
template <class T>
void compute_taps(const Job<T>& job, const Stage<T>& input, const Stage<T>& grad, T* sums) {
  const Conv2dShape& s = job.s;
  Pixels<T> p{grad.data,
              nullptr,
              grad.rows,
              grad.columns,
              s.stride_h * input.columns * kLanes<T>,
              s.stride_w * kLanes<T>,
              s.dilation_h * input.columns * kLanes<T>,
              s.dilation_w * kLanes<T>};
  for (int64_t c = 0, columns; c < s.kernel_w; c += columns) {
    columns = ceil_div(s.kernel_w - c, ceil_div(s.kernel_w - c, kTileColumns));
    const int64_t most_rows = smaller(kTileRows, kTileSums / columns);
    for (int64_t r = 0, rows; r < s.kernel_h; r += rows) {
      rows = ceil_div(s.kernel_h - r, ceil_div(s.kernel_h - r, most_rows));
      p.input = input.data + r * p.tap_row + c * p.tap_column;
      const Tile<T> tile = s.dilation_w == 1 ? tile_of<T, true>(rows, columns) : tile_of<T, false>(rows, columns);
      tile(p, sums + (r * s.kernel_w + c) * kLanes<T>, s.kernel_w * kLanes<T>);
    }
  }
}

// A chunk of images of one channel block. Whether grad_output was finite.
template <class T>
bool run_task(const Job<T>& job, const Conv2dBuffers& b, int worker, int64_t task) {
  const Conv2dShape& s = job.s;
  const int64_t block = task % job.blocks, chunk = task / job.blocks, first = block * kLanes<T>;
  const int64_t count = smaller(kLanes<T>, s.groups - first);
  T* sums = job.sums + task * job.block_sums();
  T* scratch = job.scratch + worker * job.scratch_size;
  clear_pixels(sums, job.block_sums() / kLanes<T>);
  bool finite = true;
  for (int64_t n = chunk * job.images_per_chunk; n < smaller(s.batch, (chunk + 1) * job.images_per_chunk); ++n) {
    const T* input = static_cast<const T*>(b.input) + n * s.in_channels * s.in_h * s.in_w;
    const T* grad_output = static_cast<const T*>(b.grad_output) + n * s.out_channels * s.out_h * s.out_w;
    for (int64_t row = 0; row < s.out_h; row += job.rows) {
      const int64_t rows = smaller(job.rows, s.out_h - row);
      const int64_t input_rows = (rows - 1) * s.stride_h + (s.kernel_h - 1) * s.dilation_h + 1;
      const Stage<T> x{scratch, row * s.stride_h - s.pad_top, -s.pad_left, input_rows, job.stage_columns};
      const Stage<T> grad{scratch + job.input_elements(), row, 0, rows, s.out_w};
      fill_stage<T>({input, first, 1, count, s.in_channels, s.in_h, s.in_w, s.layout}, x);
      for (int64_t j = 0; j < job.multiplier; ++j) {
        fill_stage<T>({grad_output, first * job.multiplier + j, job.multiplier, count, s.out_channels, s.out_h, s.out_w, s.layout}, grad);
        finite = holds_finite_values(grad) && finite;
        compute_taps(job, x, grad, sums + j * taps_of(s) * kLanes<T>);
      }
    }
  }
  return finite;
}

// Adds the chunks of a channel block's sums and writes them as [channel, tap].
template <class T>
void write_block(const Job<T>& job, int64_t block, T* grad_weight) {
  const int64_t first = block * kLanes<T>, taps = taps_of(job.s);
  for (int64_t j = 0; j < job.multiplier; ++j) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      Vec<T> total{};
      for (int64_t chunk = 0; chunk < job.chunks; ++chunk) {
        total += load(job.sums + (chunk * job.blocks + block) * job.block_sums() + (j * taps + tap) * kLanes<T>);
      }
      for (int i = 0; i < smaller(kLanes<T>, job.s.groups - first); ++i)
        grad_weight[((first + i) * job.multiplier + j) * taps + tap] = total[i];
    }
  }
}

template <class T>
Outcome run_job(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, int threads) {
  int64_t bytes;
  const Job<T> job = make_job<T>(s, threads, workspace, &bytes);
  int32_t infinite = 0;
  parallel_for(threads, job.chunks * job.blocks, [&](int worker, int64_t task) {
    if (!run_task(job, b, worker, task)) __atomic_store_n(&infinite, 1, __ATOMIC_RELAXED);
  });
  if (infinite != 0) return Outcome::not_finite;
  parallel_for(threads, job.blocks, [&](int, int64_t block) { write_block(job, block, static_cast<T*>(b.grad_weight)); });
  return Outcome::done;
}

template <class T>
Plan plan_job(const Conv2dShape& s, int threads) {
  int64_t bytes;
  const Job<T> job = make_job<T>(s, threads, nullptr, &bytes);
  return {kLanes<T>, 1, job.chunks * job.blocks, static_cast<size_t>(bytes)};
}

Plan plan(const Conv2dShape& s, int threads) {
  return s.dtype == DType::float32 ? plan_job<float>(s, threads) : plan_job<double>(s, threads);
}

Outcome run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, int threads) {
  return s.dtype == DType::float32 ? run_job<float>(s, b, workspace, threads) : run_job<double>(s, b, workspace, threads);
}

}  // namespace

extern const Conv2dKernel conv2d_backward_weight_depthwise = {CNN_EXT_KERNEL_NAME("conv2d_backward_weight_depthwise"),
                                                              Isa::CNN_EXT_ISA,
                                                              Conv2dDirection::backward_weight,
                                                              accepts_depthwise,
                                                              plan,
                                                              run};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
