// grad_weight by jobs: the loop nest that the rows of backward_weight share. `Tiles` says which window of the input a block of outputs
// needs and how the taps are grouped into register tiles.
//
// A job goes through its pixels block by block. It packs grad_output as [block of output channels][pixel][channel] and the input as [block
// of input channels][pixel][channel], and adds patches of about kPatchPixels pixels to its sums [output block][input block][tap][input
// channel][output channel], for all pairs of channel blocks and all taps while the patch is in the level-1 cache.
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/conv2d_backward_weight_pack.inl"
#include "cpu/kernels/conv2d_backward_weight_split.inl"
#include "cpu/kernels/conv2d_backward_weight_write.inl"
#include "cpu/parallel.h"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

// Tiles of a patch up to which packing takes long enough beside them for its memory to be fetched ahead. Those of one vector wait for their
// loads already. With 16 registers a tile is less than a quarter as much work.
constexpr int64_t kFewTiles = kVectorRegisters == 32 ? 64 : 288, kFewNarrowTiles = 4;

// A block of output pixels.
struct Block {
  Range images, rows;
};

// What pack_run() reads of some images. In channels_last that is fetched where all channels are read: parts of pixels are short runs.
template <class T>
inline Ahead<T> run_ahead(Layout layout, const T* tensor, int64_t planes, int64_t plane, Range images, int64_t channel, int64_t channels,
                          int64_t pixel, int64_t pixels) {
  const T* first = tensor + images.begin * planes * plane;
  if (layout == Layout::nchw) return {first + channel * plane + pixel, {images.size(), planes * plane}, {channels, plane}, {1, 0}, pixels};
  if (channels < planes) return {};
  return {first + pixel * planes, {images.size(), planes * plane}, {1, 0}, {1, 0}, pixels * planes};
}

// What is packed next, fetched while tiles sum.
template <class T>
struct NextBlock {
  void share_out(int64_t tiles) { gradient.share_out(tiles), input.share_out(tiles); }

  // Gives a tile its part.
  void next(Patch& patch, const T* at_hand) {
    patch.gradient_ahead = gradient.next(pixels_of(patch), at_hand);
    patch.input_ahead = input.next(pixels_of(patch), at_hand);
  }

  Ahead<T> gradient, input;
};

// What Tiles::add() sums: a patch of a packed block, of one output block times one input block.
template <class T>
struct PackedPatch {
  Window window;        // of the packed input
  Range rows, columns;  // of the patch; images are counted from the block's first
  Range images;
  int64_t block_row;     // the first packed row of grad_output
  int64_t image_pixels;  // of grad_output, packed
  int vectors;           // of output channels
  int channels;          // input channels
  const T* grad_output;
  const T* input;
  T* sums;
  bool fetches;  // whether `next` has something
  NextBlock<T>& next;
};

// Of a tensor as it lies in memory. (A fused backward pass makes its rows and pixels up: conv2d_direct_pooled.inl.)
template <class T>
struct TensorGradient {
  static int64_t line_elements(int64_t) { return 0; }

  // Pixels [pixel, pixel + pixels) of channels [channel, channel + channels) of image n.
  void pack(const Conv2dShape& s, int64_t n, int64_t channel, int64_t channels, int64_t pixel, int64_t pixels, T*, T* destination,
            int64_t step) const {
    const int64_t plane = s.out_h * s.out_w;
    pack_run<true>(s.layout, data + n * s.out_channels * plane, s.out_channels, plane, channel, channels, pixel, pixels, destination, step);
  }

  Ahead<T> ahead(const Conv2dShape& s, Range images, int64_t channel, int64_t channels, int64_t pixel, int64_t pixels) const {
    return run_ahead(s.layout, data, s.out_channels, s.out_h * s.out_w, images, channel, channels, pixel, pixels);
  }

  const T* data;
};

template <class T, class Tiles, class Gradient>
class BackwardWeight {
 public:
  explicit BackwardWeight(const Conv2dShape& shape)
      : s_(shape), work_(work_of(shape)), split_(cheapest_split(work_, estimated_cycles, partial_bytes_for(work_))) {
    max_out_ = divide_up(work_.out_blocks, split_.out_ranges) * work_.out_block;
    max_in_ = smaller(work_.group_in, divide_up(work_.in_blocks, split_.in_ranges) * divide_up(work_.group_in, work_.in_blocks));
    const int64_t row = Tiles::window_columns(s_) * max_in_ * element();
    const int64_t new_rows = s_.stride_h / Tiles::row_step(s_);  // of the input, for every row of the output
    blocking_ = blocking_for(work_, split_.pixel_ranges, s_.out_w * max_out_ * element() + new_rows * row,
                             larger(0, (s_.kernel_h - 1) * s_.dilation_h + 1 - s_.stride_h) * row);
    split_.pixel_ranges = larger(1, smaller(split_.pixel_ranges, blocking_.blocks));
    const int64_t tiles = divide_up(work_.out_blocks, split_.out_ranges) * divide_up(work_.in_blocks, split_.in_ranges) * Tiles::tiles(s_);
    fetches_ = tiles <= (work_.out_block > kLanes<T> ? kFewTiles : kFewNarrowTiles);
    window_rows_ = Tiles::window(s_, {0, blocking_.rows}).rows;
    for (int64_t row0 = 0; row0 < s_.out_h; row0 += blocking_.rows) {
      window_rows_ = larger(window_rows_, Tiles::window(s_, {row0, smaller(s_.out_h, row0 + blocking_.rows)}).rows);
    }
  }

  Plan plan(int threads) const {
    return {work_.out_block, kPatchPixels, jobs(), static_cast<size_t>((threads * worker_elements() + shared_elements()) * element())};
  }

  Outcome run(const Gradient& gradient, const T* input, T* grad_weight, void* workspace, int threads) const {
    if (work_.group_in == 0) return Outcome::done;
    T* shared = static_cast<T*>(workspace);
    T* scratch = shared + shared_elements();
    int finite = 1;
    parallel_for(threads, jobs(), [&](int worker, int64_t job) {
      T* own = scratch + worker * worker_elements();
      T* sums = split_.pixel_ranges > 1 ? shared + job * sums_elements() : own + packed_elements();
      if (!run_job(gradient, input, job, own, sums)) __atomic_store_n(&finite, 0, __ATOMIC_RELAXED);
      if (split_.pixel_ranges == 1) write_ranges(grad_weight, job, sums, 0, work_.out_blocks);
    });
    if (split_.pixel_ranges > 1) {
      const int64_t ranges = jobs() / split_.pixel_ranges;
      parallel_for(threads, ranges * work_.out_blocks, [&](int, int64_t i) {
        const int64_t job = i / work_.out_blocks, block = i % work_.out_blocks;
        write_ranges(grad_weight, job, shared + job * sums_elements(), block, block + 1);
      });
    }
    return finite ? Outcome::done : Outcome::not_finite;
  }

 private:
  // The channels of a job: blocks [begin, end) of a group's output and input channels.
  struct Channels {
    int64_t group;
    Range out_blocks, in_blocks;
  };

  static constexpr int64_t element() { return sizeof(T); }
  static constexpr int64_t whole_vectors(int64_t elements) { return divide_up(elements, kLanes<T>) * kLanes<T>; }

  static Work work_of(const Conv2dShape& s) {
    const int64_t group_out = s.out_channels / s.groups, group_in = s.in_channels / s.groups;
    const int64_t out_block = group_out <= kLanes<T> ? kLanes<T> : kTileVectors * kLanes<T>;
    return {s.groups,
            s.batch,
            s.out_h,
            s.out_w,
            group_out,
            group_in,
            s.kernel_h * s.kernel_w,
            out_block,
            divide_up(group_out, out_block),
            larger(1, divide_up(group_in, Tiles::template channels<T>(static_cast<int>(out_block / kLanes<T>)))),
            divide_up(s.in_h, Tiles::row_step(s)) * divide_up(s.in_w, Tiles::column_step(s)),
            element()};
  }

  int64_t jobs() const { return work_.groups * split_.out_ranges * split_.in_ranges * split_.pixel_ranges; }
  int64_t grad_output_elements() const { return whole_vectors(blocking_.images * blocking_.rows * s_.out_w * max_out_); }
  int64_t input_elements() const { return whole_vectors(blocking_.images * window_rows_ * Tiles::window_columns(s_) * max_in_); }
  int64_t line_elements() const { return whole_vectors(Gradient::line_elements(blocking_.rows * s_.out_w)); }
  int64_t packed_elements() const { return grad_output_elements() + input_elements() + line_elements(); }
  int64_t sums_elements() const { return whole_vectors(max_out_ * max_in_ * work_.taps); }
  int64_t worker_elements() const { return packed_elements() + (split_.pixel_ranges > 1 ? 0 : sums_elements()); }
  int64_t shared_elements() const { return split_.pixel_ranges > 1 ? jobs() * sums_elements() : 0; }

  // Job = ((pixel range * groups + group) * out_ranges + output range) * in_ranges + input range.
  Channels channels_of(int64_t job) const {
    const int64_t in = job % split_.in_ranges, out = job / split_.in_ranges % split_.out_ranges;
    return {job / (split_.in_ranges * split_.out_ranges) % work_.groups, part_of(work_.out_blocks, split_.out_ranges, out),
            part_of(work_.in_blocks, split_.in_ranges, in)};
  }
  Range pixel_blocks_of(int64_t job) const {
    return part_of(blocking_.blocks, split_.pixel_ranges, job / (split_.in_ranges * split_.out_ranges * work_.groups));
  }
  Block block_at(int64_t i) const {
    const int64_t image = i / blocking_.row_blocks * blocking_.images, row = i % blocking_.row_blocks * blocking_.rows;
    return {{image, smaller(s_.batch, image + blocking_.images)}, {row, smaller(s_.out_h, row + blocking_.rows)}};
  }

  // The first input channel of a block, within the group.
  int64_t first_in(int64_t block) const { return part_of(work_.group_in, work_.in_blocks, block).begin; }
  int vectors_of(int64_t out_block) const { return work_.group_out - out_block * work_.out_block > kLanes<T> ? kTileVectors : 1; }

  bool run_job(const Gradient& gradient, const T* input, int64_t job, T* scratch, T* sums) const {
    const Channels channels = channels_of(job);
    T* packed_gradient = scratch;
    T* packed_input = packed_gradient + grad_output_elements();
    T* line = packed_input + input_elements();
    fill_zeros(sums, sums_elements());
    bool finite = true;
    const Range blocks = pixel_blocks_of(job);
    for (int64_t i = blocks.begin; i < blocks.end; ++i) {
      const Block block = block_at(i);
      pack_gradient(gradient, channels, block, line, packed_gradient);
      if (Tiles::multiplies_padding(s_)) finite = finite && all_finite(channels, block, packed_gradient);
      const Window window = Tiles::window(s_, block.rows);
      pack_input(input, channels, block, window, packed_input);
      NextBlock<T> next = next_block(gradient, input, job, i);
      add_block(channels, block, window, packed_gradient, packed_input, sums, next);
    }
    return finite;
  }

  // Behind block i of a job.
  NextBlock<T> next_block(const Gradient& gradient, const T* input, int64_t job, int64_t i) const {
    if (!fetches_) return {};
    if (i + 1 < pixel_blocks_of(job).end) return block_ahead(gradient, input, channels_of(job), block_at(i + 1));
    if (job + 1 == jobs()) return {};
    return block_ahead(gradient, input, channels_of(job + 1), block_at(pixel_blocks_of(job + 1).begin));  // most often this thread's next
  }

  NextBlock<T> block_ahead(const Gradient& gradient, const T* input, const Channels& channels, const Block& block) const {
    const Window window = Tiles::window(s_, block.rows);
    const int64_t first_out = channels.out_blocks.begin * work_.out_block, first = first_in(channels.in_blocks.begin);
    const int64_t outputs = smaller(work_.group_out, channels.out_blocks.end * work_.out_block) - first_out;
    const Range rows = common({window.row, window.row + window.rows * window.row_step}, {0, s_.in_h});
    return {gradient.ahead(s_, block.images, channels.group * work_.group_out + first_out, outputs, block.rows.begin * s_.out_w,
                           block.rows.size() * s_.out_w),
            run_ahead(s_.layout, input, s_.in_channels, s_.in_h * s_.in_w, block.images, channels.group * work_.group_in + first,
                      first_in(channels.in_blocks.end) - first, rows.begin * s_.in_w, larger(0, rows.size()) * s_.in_w)};
  }

  void pack_gradient(const Gradient& gradient, const Channels& channels, const Block& block, T* line, T* packed) const {
    const int64_t pixels = block.rows.size() * s_.out_w, run = s_.layout == Layout::nchw ? pixels : kPackPixels;
    for (int64_t n = 0; n < block.images.size(); ++n) {
      for (int64_t pixel = 0; pixel < pixels; pixel += run) {
        for (int64_t b = channels.out_blocks.begin; b < channels.out_blocks.end; ++b) {
          const int64_t first = b * work_.out_block, count = smaller(work_.out_block, work_.group_out - first);
          const int64_t step = vectors_of(b) * kLanes<T>, offset = (b - channels.out_blocks.begin) * work_.out_block;
          gradient.pack(s_, block.images.begin + n, channels.group * work_.group_out + first, count, block.rows.begin * s_.out_w + pixel,
                        smaller(run, pixels - pixel), line, packed + block.images.size() * pixels * offset + (n * pixels + pixel) * step,
                        step);
        }
      }
    }
  }

  // Zero times a finite number is zero, times any other it is not.
  bool all_finite(const Channels& channels, const Block& block, const T* packed) const {
    int64_t vectors = 0;
    for (int64_t b = channels.out_blocks.begin; b < channels.out_blocks.end; ++b) vectors += vectors_of(b);
    vectors *= block.images.size() * block.rows.size() * s_.out_w;
    constexpr int chains = 4;  // the latency of an addition
    Vec<T> chain[chains] = {};
    int64_t i = 0;
    for (; i + chains <= vectors; i += chains) {
      for (int j = 0; j < chains; ++j) chain[j] = fma(load(packed + (i + j) * kLanes<T>), Vec<T>{}, chain[j]);
    }
    for (; i < vectors; ++i) chain[0] = fma(load(packed + i * kLanes<T>), Vec<T>{}, chain[0]);
    const Vec<T> zeros = (chain[0] + chain[1]) + (chain[2] + chain[3]);
    for (int lane = 0; lane < kLanes<T>; ++lane) {
      if (!(zeros[lane] == 0)) return false;
    }
    return true;
  }

  void pack_input(const T* input, const Channels& channels, const Block& block, const Window& window, T* packed) const {
    const int64_t image = s_.in_channels * s_.in_h * s_.in_w, pixels = block.images.size() * window.rows * window.columns;
    const int64_t run = s_.layout == Layout::nchw ? larger(1, window.rows) : divide_up(kPackPixels, larger(1, window.columns));
    const int64_t first_channel = first_in(channels.in_blocks.begin);
    for (int64_t n = 0; n < block.images.size(); ++n) {
      for (int64_t row = 0; row < window.rows; row += run) {
        Window part = window;
        part.row += row * window.row_step, part.rows = smaller(run, window.rows - row);
        for (int64_t b = channels.in_blocks.begin; b < channels.in_blocks.end; ++b) {
          const int64_t first = first_in(b), count = first_in(b + 1) - first;
          pack_window(s_, input + (block.images.begin + n) * image, channels.group * work_.group_in + first, count, part,
                      packed + pixels * (first - first_channel) + (n * window.rows + row) * window.columns * count);
        }
      }
    }
  }

  // Cuts a block into patches and adds each to the sums of all channel blocks. Patches are parts of equal size, give or take one.
  void add_block(const Channels& channels, const Block& block, const Window& window, const T* grad_output, const T* input, T* sums,
                 NextBlock<T>& next) const {
    const int64_t column_parts = divide_up(s_.out_w, 2 * kPatchPixels), width = divide_up(s_.out_w, column_parts);
    const int64_t height = smaller(block.rows.size(), larger(1, kPatchPixels / width)), row_parts = divide_up(block.rows.size(), height);
    const int64_t depth = row_parts * column_parts > 1 ? 1 : larger(1, kPatchPixels / (width * height));
    next.share_out(divide_up(block.images.size(), depth) * row_parts * column_parts * channels.out_blocks.size() *
                   channels.in_blocks.size() * Tiles::tiles(s_));
    for (int64_t n = block.images.begin; n < block.images.end; n += depth) {
      const Range images{n, smaller(block.images.end, n + depth)};
      for (int64_t i = 0; i < row_parts; ++i) {
        const Range rows = part_of(block.rows.size(), row_parts, i);
        for (int64_t j = 0; j < column_parts; ++j) {
          const Range columns = part_of(s_.out_w, column_parts, j);
          add_patches(channels, block, window, images, {block.rows.begin + rows.begin, block.rows.begin + rows.end}, columns, grad_output,
                      input, sums, next);
        }
      }
    }
  }

  void add_patches(const Channels& channels, const Block& block, const Window& window, Range images, Range rows, Range columns,
                   const T* grad_output, const T* input, T* sums, NextBlock<T>& next) const {
    const int64_t pixels = block.images.size() * block.rows.size() * s_.out_w;
    const int64_t input_pixels = block.images.size() * window.rows * window.columns;
    const int64_t first_channel = first_in(channels.in_blocks.begin), in_channels = first_in(channels.in_blocks.end) - first_channel;
    for (int64_t b = channels.out_blocks.begin; b < channels.out_blocks.end; ++b) {
      const int64_t out_offset = (b - channels.out_blocks.begin) * work_.out_block;
      const int vectors = vectors_of(b);
      for (int64_t c = channels.in_blocks.begin; c < channels.in_blocks.end; ++c) {
        const int64_t offset = first_in(c) - first_channel, count = first_in(c + 1) - first_in(c);
        Tiles::add(s_, PackedPatch<T>{window,
                                      rows,
                                      columns,
                                      {images.begin - block.images.begin, images.end - block.images.begin},
                                      block.rows.begin,
                                      block.rows.size() * s_.out_w,
                                      vectors,
                                      static_cast<int>(count),
                                      grad_output + pixels * out_offset,
                                      input + input_pixels * offset,
                                      sums + (out_offset * in_channels + vectors * kLanes<T> * offset) * work_.taps,
                                      fetches_,
                                      next});
      }
    }
  }

  // Output blocks [begin, end) of the job's channels, where it has them.
  void write_ranges(T* grad_weight, int64_t job, const T* sums, int64_t begin, int64_t end) const {
    const Channels channels = channels_of(job);
    const int64_t first_channel = first_in(channels.in_blocks.begin), in_channels = first_in(channels.in_blocks.end) - first_channel;
    const Range out = common(channels.out_blocks, {begin, end});
    for (int64_t b = out.begin; b < out.end; ++b) {
      const int64_t out_offset = (b - channels.out_blocks.begin) * work_.out_block;
      for (int64_t c = channels.in_blocks.begin; c < channels.in_blocks.end; ++c) {
        const int64_t entry = vectors_of(b) * kLanes<T>;
        write_block(grad_weight, channels.group, b, c,
                    sums + (out_offset * in_channels + entry * (first_in(c) - first_channel)) * work_.taps);
      }
    }
  }

  void write_block(T* whole, int64_t group, int64_t out_block, int64_t in_block, const T* sums) const {
    const int64_t lanes = kLanes<T>, first = out_block * work_.out_block, channels = smaller(work_.out_block, work_.group_out - first);
    const int64_t in_first = first_in(in_block), out_channel = work_.group_in * work_.taps;
    T* grad_weight =
        whole + (group * work_.group_out + first) * out_channel + in_first * (s_.weight_layout == Layout::nchw ? work_.taps : 1);
    const int64_t entry = vectors_of(out_block) * lanes;
    for (int64_t k = 0; k < channels; k += lanes) {
      const SumsBlock<T> block{sums + k,
                               (first_in(in_block + 1) - in_first) * entry,
                               entry,
                               split_.pixel_ranges,
                               jobs() / split_.pixel_ranges * sums_elements(),
                               work_.taps,
                               first_in(in_block + 1) - in_first,
                               grad_weight + k * out_channel,
                               out_channel,
                               static_cast<int>(smaller(lanes, channels - k))};
      write_sums(block, s_.weight_layout, work_.group_in);
    }
  }

  Conv2dShape s_;
  Work work_;
  Split split_;
  Blocking blocking_;
  int64_t max_out_, max_in_;  // channels of a job at most
  int64_t window_rows_;       // input rows of a block at most
  bool fetches_;              // whether what is packed next is fetched ahead
};

// The functions of a table row of the plain convolution.
template <class Tiles>
struct TensorRow {
  template <class T>
  using Run = BackwardWeight<T, Tiles, TensorGradient<T>>;

  template <class T>
  static Outcome run_of(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, int threads) {
    return Run<T>(s).run({static_cast<const T*>(b.grad_output)}, static_cast<const T*>(b.input), static_cast<T*>(b.grad_weight), workspace,
                         threads);
  }
  static Plan plan(const Conv2dShape& s, int threads) {
    return s.dtype == DType::float32 ? Run<float>(s).plan(threads) : Run<double>(s).plan(threads);
  }
  static Outcome run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, int threads) {
    return s.dtype == DType::float32 ? run_of<float>(s, b, workspace, threads) : run_of<double>(s, b, workspace, threads);
  }
};

}  // namespace
}  // namespace cnn_ext::cpu::CNN_EXT_ISA
