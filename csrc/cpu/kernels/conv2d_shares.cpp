// backward_input of layers with few input channels: every output has a share in the inputs of its window, which are added up where they
// meet.
//
// The shares of all taps are a product, (input channels * taps) x output channels x points, whose large operand is grad_output:
// neighbouring points lie in the lanes, a tile is 2 vectors of points x up to 14 taps (6 with 16 registers), and each vector that is read
// serves a whole tile of taps, where a gather convolution with few channels reads it once for each. grad_output is copied, or transposed, a
// block at a time, for its planes may lie so far apart that they compete for places in the caches; the next block is fetched meanwhile.
// Then the shares of a row of outputs are added to the rows of input that they meet, a tap being a shift along the row
// (conv2d_shares_fold.inl).
//
// A task is a band of rows of an image; the rows of outputs that reach over its edge are computed for both bands. Blocks of outputs are
// such that their shares stay in the second cache. An input is one chain: the bias, then output row by output row, in each tap column by
// tap column, of sums over all output channels. Nothing is padded: outputs that do not exist have no share.
#include "cpu/kernel.h"
#include "cpu/kernels/conv2d_shares_fold.inl"
#include "cpu/parallel.h"
#include "cpu/simd/transpose.h"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

constexpr int kSums = kVectorRegisters == 32 ? 28 : 12;
constexpr int kMostTaps = kSums / 2, kFewestTaps = kMostTaps / 2 + 1;  // of a tile
constexpr int64_t kBlockBytes = 384 << 10;                             // of a block's shares and source
constexpr int64_t kMostRowBytes = 1 << 20;                             // of the same of one row
constexpr int64_t kBandBytes = 512 << 10;
constexpr int64_t kTasksPerThread = 4;
// Output channels, in all and for each input channel: with fewer, adding the shares up takes as long as computing them.
constexpr int64_t kFewestOutputs = 16, kOutputsPerInput = 8;

// How a call is cut, and where things lie in a worker's scratch.
template <class T>
struct Job {
  Job(const Conv2dShape& shape, int threads) : s(shape), fold(shape) {
    shares = s.in_channels * s.kernel_h * s.kernel_w;
    units = ceil_div(shares, kMostTaps), width = larger(kFewestTaps, ceil_div(shares, units));
    const int64_t wanted = threads > 1 ? threads * kTasksPerThread : 1;
    const int64_t fitting = larger(1, kBandBytes / (fold.row_elements<T>() * kSize));
    const int64_t fewest = 2 * fold.window_rows();  // rows: fewer would compute more shares twice
    band_rows = smaller(fitting, larger(fewest, s.batch == 0 ? s.in_h : ceil_div(s.in_h, ceil_div(wanted, s.batch))));
    bands = ceil_div(s.in_h, band_rows), band_rows = ceil_div(s.in_h, band_rows == 0 ? 1 : bands);
    block_rows = larger(1, kBlockBytes / row_bytes(s)), block_rows = smaller(block_rows, s.out_h);
    pitch = (ceil_div(block_rows * s.out_w, 2 * kLanes<T>) * 2 + 1) * kLanes<T>;
    source_elements = s.out_channels * pitch;
    share_elements = units * width * pitch;
    band_elements = band_rows * fold.row_elements<T>();
    weight_elements = units * width * s.out_channels;
  }
  static constexpr int64_t kSize = sizeof(T);
  static int64_t aligned_lanes(int64_t count) { return ceil_div(count, kLanes<T>) * kLanes<T>; }
  static int64_t row_bytes(const Conv2dShape& s) { return (s.in_channels * s.kernel_h * s.kernel_w + s.out_channels) * s.out_w * kSize; }

  int64_t tasks() const { return s.batch * bands; }
  int64_t worker_elements() const { return source_elements + share_elements + band_elements; }
  int64_t workspace_bytes(int threads) const { return (aligned_lanes(weight_elements) + threads * worker_elements()) * kSize; }

  Conv2dShape s;
  Fold fold;
  int64_t shares, units, width;  // taps of all input channels, in units of `width`, the last of them filled up
  int64_t band_rows, bands;      // of the input
  int64_t block_rows;            // of the output
  int64_t pitch;                 // of a channel of a block's source and of the shares of a tap: whole tiles, and an odd number of vectors
  int64_t source_elements, share_elements, band_elements, weight_elements;
};

// One tile: the shares of kWidth taps at 2 vectors of points, over all channels of grad_output.
template <class T>
struct ShareTile {
  const T* weights;  // [channels][width]
  const T* source;   // [channels][pitch]
  int64_t channels;
  T* shares;  // [width][pitch]
  int64_t pitch;
  // What is fetched meanwhile: a line at every step, `ahead_step` elements apart, and another one `second_ahead` behind it.
  const T* ahead;
  int64_t ahead_step, second_ahead;
};

template <class T, int kWidth>
__attribute__((noinline)) void share_tile(const ShareTile<T>& tile) {
  constexpr int kV = kLanes<T>;
  Vec<T> sum[kWidth][2] = {};
  const T *weights = tile.weights, *source = tile.source, *ahead = tile.ahead;
  const int64_t second_ahead = tile.second_ahead;
  for (int64_t k = tile.channels; k > 0; --k, source += tile.pitch, weights += kWidth, ahead += tile.ahead_step) {
    const Vec<T> x[2] = {load(source), load(source + kV)};
#pragma GCC unroll 14
    for (int i = 0; i < kWidth; ++i) {
      const Vec<T> weight = broadcast_from(weights + i);
      sum[i][0] = fma(x[0], weight, sum[i][0]);
      sum[i][1] = fma(x[1], weight, sum[i][1]);
    }
    __builtin_prefetch(ahead, 0, 2);
    __builtin_prefetch(ahead + second_ahead, 0, 2);
  }
#pragma GCC unroll 14
  for (int i = 0; i < kWidth; ++i) {
    store(tile.shares + i * tile.pitch, sum[i][0]);
    store(tile.shares + i * tile.pitch + kV, sum[i][1]);
  }
}

template <int kWidth, class T>
void run_tile(const ShareTile<T>& tile, int64_t width) {
  if (width == kWidth) return share_tile<T, kWidth>(tile);
  if constexpr (kWidth > kFewestTaps) run_tile<kWidth - 1>(tile, width);
}

// `points` pixels of `channels` channels to rows `pitch` apart, filled up to whole vectors.
template <class T>
void transpose_pixels(const T* pixels, int64_t points, int64_t channels, T* rows, int64_t pitch) {
  constexpr int kV = kLanes<T>;
  for (int64_t p = 0; p < points; p += kV) {
    for (int64_t k = 0; k < channels; k += kV) {
      const int lanes = static_cast<int>(smaller(kV, channels - k));
      Vec<T> square[kV];
#pragma GCC unroll 16
      for (int i = 0; i < kV; ++i) square[i] = p + i < points ? load_first(pixels + (p + i) * channels + k, lanes) : Vec<T>{};
      transpose<T>(square);
#pragma GCC unroll 16
      for (int i = 0; i < kV; ++i) {
        if (i < lanes) store(rows + (k + i) * pitch + p, square[i]);
      }
    }
  }
}

// `points` points of `channels` planes to rows `pitch` apart, filled up to whole vectors.
template <class T>
void copy_planes(const T* planes, int64_t plane, int64_t points, int64_t channels, T* rows, int64_t pitch) {
  constexpr int kV = kLanes<T>;
  for (int64_t k = 0; k < channels; ++k, planes += plane, rows += pitch) {
    int64_t p = 0;
    for (; p + kV <= points; p += kV) store(rows + p, load(planes + p));
    if (p < points) store(rows + p, load_first(planes + p, static_cast<int>(points - p)));
  }
}

template <class T>
class ShareRun {
 public:
  ShareRun(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, int threads)
      : job_(s, threads),
        grad_output_(static_cast<const T*>(b.grad_output)),
        weight_(static_cast<const T*>(b.weight)),
        bias_(static_cast<const T*>(b.bias)),
        grad_input_(static_cast<T*>(b.grad_input)),
        weights_(static_cast<T*>(workspace)),
        scratch_(weights_ + Job<T>::aligned_lanes(job_.weight_elements)) {
    pack_weights();
    parallel_for(threads, job_.tasks(), [&](int worker, int64_t task) { run_band(worker, task / job_.bands, task % job_.bands); });
  }

 private:
  // [unit][channel][width]; a tap's place among the shares is that in the weight.
  void pack_weights() const {
    const int64_t channels = job_.s.out_channels, width = job_.width;
    T* to = weights_;
    for (int64_t unit = 0; unit < job_.units; ++unit) {
      for (int64_t k = 0; k < channels; ++k) {
        for (int64_t i = unit * width; i < (unit + 1) * width; ++i) *to++ = i < job_.shares ? weight_[k * job_.shares + i] : T(0);
      }
    }
  }

  void run_band(int worker, int64_t n, int64_t index) const {
    T* const source = scratch_ + worker * job_.worker_elements();
    T* const shares = source + job_.source_elements;
    T* const sums = shares + job_.share_elements;
    const Conv2dShape& s = job_.s;
    const Band band{index * job_.band_rows, smaller(s.in_h, (index + 1) * job_.band_rows)};
    job_.fold.begin(band, bias_, sums);
    const Span outputs = job_.fold.outputs_of(band);
    for (int64_t y = outputs.begin; y < outputs.end; y += job_.block_rows) {
      const int64_t end = smaller(outputs.end, y + job_.block_rows);
      const T* next = end < outputs.end ? block_at(n, end) : block_at(smaller(n + 1, s.batch - 1), 0);
      compute_shares(block_at(n, y), next, (end - y) * s.out_w, source, shares);
      for (int64_t row = y; row < end; ++row) job_.fold.add(band, row, shares + (row - y) * s.out_w, job_.pitch, sums);
    }
    job_.fold.write(band, sums, grad_input_ + n * s.in_channels * s.in_h * s.in_w);
  }

  bool is_nchw() const { return job_.s.layout == Layout::nchw; }

  // Row y of the outputs of image n.
  const T* block_at(int64_t n, int64_t y) const {
    const Conv2dShape& s = job_.s;
    return grad_output_ + (n * s.out_channels * s.out_h + (is_nchw() ? y : y * s.out_channels)) * s.out_w;
  }

  // The shares of the `points` outputs of a block; next: the block that follows.
  void compute_shares(const T* block, const T* next, int64_t points, T* source, T* shares) const {
    constexpr int64_t kTilePoints = 2 * kLanes<T>;
    const int64_t channels = job_.s.out_channels, plane = job_.s.out_h * job_.s.out_w;
    if (is_nchw()) {
      copy_planes(block, plane, points, channels, source, job_.pitch);
    } else {
      transpose_pixels(block, points, channels, source, job_.pitch);
    }
    for (int64_t p = 0; p < points; p += kTilePoints) {
      ShareTile<T> tile{};
      tile.source = source + p, tile.channels = channels, tile.pitch = job_.pitch;
      tile.ahead_step = is_nchw() ? plane : kTilePoints;
      for (int64_t unit = 0; unit < job_.units; ++unit) {
        fetch_ahead(tile, next + (is_nchw() ? p : p * channels), unit);
        tile.weights = weights_ + unit * channels * job_.width, tile.shares = shares + unit * job_.width * job_.pitch + p;
        run_tile<kMostTaps>(tile, job_.width);
      }
    }
  }

  // The two lines of a step are shared out between the first two units.
  void fetch_ahead(ShareTile<T>& tile, const T* next, int64_t unit) const {
    tile.ahead = next + (unit == 1 ? kLanes<T> : 0), tile.second_ahead = job_.units == 1 ? kLanes<T> : 0;
    if (unit > 1) tile.ahead = tile.weights, tile.ahead_step = 0;
  }

  const Job<T> job_;
  const T* const grad_output_;
  const T* const weight_;
  const T* const bias_;
  T* const grad_input_;
  T* const weights_;
  T* const scratch_;
};

template <class T>
bool accepts_for(const Conv2dShape& s) {
  return 2 * s.in_channels <= kLanes<T> && Job<T>::row_bytes(s) <= kMostRowBytes;
}

bool has_few_outputs(const Conv2dShape& s) { return s.out_channels < larger(kFewestOutputs, kOutputsPerInput * s.in_channels); }
bool is_float(const Conv2dShape& s) { return s.dtype == DType::float32; }

bool accepts(const Conv2dShape& s) {
  if (s.groups != 1 || s.kernel_h * s.kernel_w == 1 || has_few_outputs(s) || s.in_channels * s.out_h * s.out_w == 0) return false;
  return is_float(s) ? accepts_for<float>(s) : s.dtype == DType::float64 && accepts_for<double>(s);
}

template <class T>
Plan plan_for(const Conv2dShape& s, int threads) {
  const Job<T> job(s, threads);
  return {job.width, 2 * kLanes<T>, job.tasks(), static_cast<size_t>(job.workspace_bytes(threads))};
}

Plan plan(const Conv2dShape& s, int threads) { return is_float(s) ? plan_for<float>(s, threads) : plan_for<double>(s, threads); }

Outcome run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, int threads) {
  is_float(s) ? (void)ShareRun<float>(s, b, workspace, threads) : (void)ShareRun<double>(s, b, workspace, threads);
  return Outcome::done;
}

}  // namespace

extern const Conv2dKernel conv2d_backward_input_shares = {CNN_EXT_KERNEL_NAME("conv2d_backward_input_shares"),
                                                          Isa::CNN_EXT_ISA,
                                                          Conv2dDirection::backward_input,
                                                          accepts,
                                                          plan,
                                                          run,
                                                          /*adds_bias=*/true};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
