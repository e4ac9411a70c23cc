// grad_weight of 1x1 kernels in nchw, with the 16 registers of AVX2. Pixels are in the lanes: a weight's gradient is the product of two
// planes, grad_output's and the input's, added up lane by lane; the lanes are added at the end of a block. So nothing is transposed, as it
// is for conv2d_backward_weight_direct, whose lanes are output channels. Planes whose pixels come in whole lines are read where they lie.
// Others are copied, without what a stride leaves out and with the pixels of several small maps one after the other.
//
// Tile: 4 x 3 or 3 x 4 channels of the two sides, whichever takes fewer tiles: 12 sums, and 7 loads for 12 multiply-adds. Channels are cut
// evenly, so that few of them leave no lanes idle. A block is at most kBlockPixels pixels: the planes of a tile are then half of the
// nearest cache, and adding the lanes takes less than a tenth of the time.
//
// Order: the pixels of a block in a register's lanes, then the lanes, then the blocks of a range of pixels, then the ranges.
//
// Not for many channels on both sides without a stride: there conv2d_backward_weight_direct transposes little beside what it multiplies,
// and reads less.
#include "cpu/kernel.h"
#include "cpu/kernels/conv2d_backward_weight_planes_tile.inl"
#include "cpu/kernels/conv2d_backward_weight_split.inl"
#include "cpu/kernels/conv2d_pointwise_product.inl"
#include "cpu/parallel.h"
#include "cpu/simd/caches.h"
#include "cpu/simd/lanes.h"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

constexpr int64_t kBlockPixels = 512;
constexpr int64_t kPlanesBytes = kSecondCacheBytes * 13 / 16;  // of a block
constexpr int64_t kNearSums = kSecondCacheBytes / 4;
constexpr int64_t kAliasBytes = 4096;   // planes that lie a multiple of this apart compete for the same places in the caches
constexpr int64_t kNearTiles = 3;       // whose input planes stay in the nearest cache while those of grad_output pass by
constexpr int64_t kFewestPixels = 16;   // of a map
constexpr int64_t kManyChannels = 160;  // of both sides, where they have as many

// One side of the product: grad_output or the input.
struct Side {
  const float* data;
  int64_t channels;            // of all groups
  int64_t height, width;       // of a map
  int64_t stride_h, stride_w;  // from one pixel of the product to the next

  int64_t plane() const { return height * width; }
};

// Pixels of the product: rows of images.
struct Pixels {
  Range images, rows;
};

// The first of these channels' pixels.
inline const float* first_pixel(const Side& side, Range channels, const Pixels& pixels) {
  return side.data + (pixels.images.begin * side.channels + channels.begin) * side.plane() + pixels.rows.begin * side.stride_h * side.width;
}

inline void copy_run(const float* source, int64_t count, float* destination) {
  int64_t i = 0;
  for (; i + kLanesOfVector <= count; i += kLanesOfVector) store(destination + i, load(source + i));
  if (i < count) store(destination + i, load_first(source + i, static_cast<int>(count - i)));
}

// `count` elements, `stride` apart.
inline void copy_apart(const float* source, int64_t stride, int64_t count, float* destination) {
  int64_t i = 0;
  if (stride == 2) {
    // Another element follows, so that the one behind the vector's last may be read.
    for (; i + kLanesOfVector < count; i += kLanesOfVector) {
      const float* p = source + 2 * i;
      store(destination + i, even_lanes<float>(load(p), load(p + kLanesOfVector)));
    }
  }
  for (; i < count; i += kLanesOfVector) {
    store(destination + i, load_apart(source + i * stride, stride, static_cast<int>(smaller(kLanesOfVector, count - i))));
  }
}

// Copies the pixels of some channels to planes from `destination` on. Each run is written as whole vectors: what is too much the next one
// overwrites, and the last turn is filled up with zeros.
void copy_planes(const Side& side, Range channels, const Pixels& pixels, int64_t out_w, float* destination, int64_t pitch) {
  const float* first = first_pixel(side, channels, pixels);
  const bool in_one_run = side.stride_h == 1 && side.stride_w == 1 && side.width == out_w;
  const int64_t run = pixels.rows.size() * out_w, count = pixels.images.size() * run, end = divide_up(count, kTurnPixels) * kTurnPixels;
  for (int64_t n = 0; n < pixels.images.size(); ++n) {
    for (int64_t c = 0; c < channels.size(); ++c) {
      const float* source = first + (n * side.channels + c) * side.plane();
      float* to = destination + c * pitch + n * run;
      if (in_one_run) {
        copy_run(source, run, to);
        continue;
      }
      for (int64_t row = 0; row < pixels.rows.size(); ++row) {
        copy_apart(source + row * side.stride_h * side.width, side.stride_w, out_w, to + row * out_w);
      }
    }
  }
  for (int64_t c = 0; c < channels.size(); ++c) {
    for (int64_t i = count; i < end; i += kLanesOfVector) store(destination + c * pitch + i, Vector{});
  }
}

// What a block reads, gaps of strides included.
Ahead<float> planes_ahead(const Side& side, Range channels, const Pixels& pixels) {
  return {first_pixel(side, channels, pixels),
          {pixels.images.size(), side.channels * side.plane()},
          {channels.size(), side.plane()},
          {1, 0},
          ((pixels.rows.size() - 1) * side.stride_h + 1) * side.width};
}

// Maps without a stride whose pixels are whole turns have rows of one turn: so they are cut into even blocks.
Conv2dShape in_turns(Conv2dShape s) {
  const bool strided = s.stride_h > 1 || s.stride_w > 1 || s.in_h != s.out_h || s.in_w != s.out_w;
  if (strided || s.out_h * s.out_w % kTurnPixels != 0) return s;
  s.in_h = s.out_h = s.out_h * s.out_w / kTurnPixels;
  s.in_w = s.out_w = kTurnPixels;
  return s;
}

// Whether planes are read where they lie. Of maps that are a block or more; and not in places that compete with each other.
bool reads_in_place(const Conv2dShape& s) {
  const int64_t plane = s.out_h * s.out_w;
  return s.in_w == kTurnPixels && s.out_w == kTurnPixels && s.in_h == s.out_h && 2 * plane > kBlockPixels &&
         plane * static_cast<int64_t>(sizeof(float)) % kAliasBytes != 0;
}

class PlanesWeight {
 public:
  explicit PlanesWeight(const Conv2dShape& shape) : s_(in_turns(shape)), work_(work_of(s_)), in_place_(reads_in_place(s_)) {
    split_ = cheapest_split(work_, cycles_of, partial_bytes_for(work_));
    const int64_t channels = channels_of_job(work_, split_);
    blocking_ = blocking_for(work_, split_.pixel_ranges, divide_up(kBlockBytes, pixels_of_block(channels)) * s_.out_w, 0);
    split_.pixel_ranges = larger(1, smaller(split_.pixel_ranges, blocking_.blocks));
    // A whole line more than a block takes, and an odd number of lines: planes do not compete for the same places in the nearest cache.
    pitch_ = (divide_up(blocking_.images * blocking_.rows * s_.out_w, 2 * kTurnPixels) * 2 + 1) * kTurnPixels;
  }

  Plan plan(int threads) const {
    const int64_t elements = partial_elements() + threads * worker_elements();
    return {kWideSide, kTurnPixels, jobs(), static_cast<size_t>(elements) * sizeof(float)};
  }

  Outcome run(const Conv2dBuffers& b, void* workspace, int threads) const {
    float* grad_weight = static_cast<float*>(b.grad_weight);
    float* partials = static_cast<float*>(workspace);
    float* scratch = partials + partial_elements();
    const Side gradient{static_cast<const float*>(b.grad_output), s_.out_channels, s_.out_h, s_.out_w, 1, 1};
    const Side input{static_cast<const float*>(b.input), s_.in_channels, s_.in_h, s_.in_w, s_.stride_h, s_.stride_w};
    parallel_for(threads, jobs(), [&](int worker, int64_t job) {
      run_job(gradient, input, job, scratch + worker * worker_elements(), split_.pixel_ranges > 1 ? partials : grad_weight);
    });
    if (split_.pixel_ranges > 1) {
      const int64_t vectors = divide_up(weights(), kLanesOfVector);
      parallel_for(threads, divide_up(vectors, kSumVectors), [&](int, int64_t i) {
        add_partials(partials, {i * kSumVectors, smaller(vectors, (i + 1) * kSumVectors)}, grad_weight);
      });
    }
    return Outcome::done;
  }

 private:
  static constexpr int64_t kSumVectors = 512;  // of partial sums that are added up as one piece of work

  // The channels of a job, in all groups, and the pixel range.
  struct Job {
    int64_t group;
    Range out_tiles, in_tiles, blocks;
    int64_t pixel_range;
  };

  static Work work_of(const Conv2dShape& s) {
    const int64_t group_out = s.out_channels / s.groups, group_in = s.in_channels / s.groups;
    const bool wide_out = divide_up(group_out, kWideSide) * divide_up(group_in, kNarrowSide) <=
                          divide_up(group_out, kNarrowSide) * divide_up(group_in, kWideSide);
    const int64_t out_side = wide_out ? kWideSide : kNarrowSide, in_side = wide_out ? kNarrowSide : kWideSide;
    return {s.groups,
            s.batch,
            s.out_h,
            s.out_w,
            group_out,
            group_in,
            1,
            out_side,
            divide_up(group_out, out_side),
            divide_up(group_in, in_side),
            s.out_h * s.out_w,
            static_cast<int64_t>(sizeof(float))};
  }

  // Of both sides, at most.
  static int64_t channels_of_job(const Work& w, const Split& split) {
    return divide_up(w.out_blocks, split.out_ranges) * divide_up(w.group_out, w.out_blocks) +
           divide_up(w.in_blocks, split.in_ranges) * divide_up(w.group_in, w.in_blocks);
  }

  static int64_t pixels_of_block(int64_t channels) {
    return larger(kTurnPixels, smaller(kBlockPixels, kPlanesBytes / static_cast<int64_t>(sizeof(float)) / channels));
  }

  // Estimated: a cycle for 16 multiply-adds, a third of one to copy an element, 2 to add the lanes of a sum at the end of a block, 6 where
  // a job's sums do not stay near.
  static double cycles_of(const Work& w, const Split& split) {
    const double pixels = static_cast<double>(w.batch * w.out_h * w.out_w);
    const double sums = static_cast<double>(w.group_out * w.group_in);
    const double copied = static_cast<double>(w.group_in * split.out_ranges + w.group_out * split.in_ranges);
    const int64_t whole_blocks = divide_up(w.batch * w.out_h * w.out_w, pixels_of_block(channels_of_job(w, split)));
    const double blocks = static_cast<double>(larger(split.pixel_ranges, whole_blocks));  // lanes are added once for each
    const bool near = w.group_out * w.group_in * w.element_bytes <= kNearSums * split.out_ranges * split.in_ranges;
    const double add = split.pixel_ranges > 1 ? 0.25 * sums * static_cast<double>(split.pixel_ranges) : 0.0;
    const int64_t jobs = w.groups * split.out_ranges * split.in_ranges * split.pixel_ranges;
    const double rounds = static_cast<double>(divide_up(jobs, kPlannedTeam)) / static_cast<double>(jobs);
    const double work = pixels * (sums / 16 + copied / 3) + sums * blocks * (near ? 2 : 6);
    return static_cast<double>(w.groups) * (work * rounds + add / static_cast<double>(kPlannedTeam)) + 1000.0 * static_cast<double>(jobs);
  }

  int64_t jobs() const { return work_.groups * split_.out_ranges * split_.in_ranges * split_.pixel_ranges; }
  int64_t weights() const { return s_.out_channels * work_.group_in; }
  int64_t weights_pitch() const { return divide_up(weights(), kLanesOfVector) * kLanesOfVector; }
  int64_t partial_elements() const { return split_.pixel_ranges > 1 ? split_.pixel_ranges * weights_pitch() : 0; }
  int64_t worker_elements() const { return in_place_ ? 0 : channels_of_job(work_, split_) * pitch_; }
  int64_t first_out(int64_t tile) const { return part_of(work_.group_out, work_.out_blocks, tile).begin; }
  int64_t first_in(int64_t tile) const { return part_of(work_.group_in, work_.in_blocks, tile).begin; }

  // Job = ((pixel range * groups + group) * out_ranges + output range) * in_ranges + input range.
  Job job_at(int64_t i) const {
    const int64_t in = i % split_.in_ranges, out = i / split_.in_ranges % split_.out_ranges;
    const int64_t group = i / (split_.in_ranges * split_.out_ranges), pixel_range = group / work_.groups;
    return {group % work_.groups, part_of(work_.out_blocks, split_.out_ranges, out), part_of(work_.in_blocks, split_.in_ranges, in),
            part_of(blocking_.blocks, split_.pixel_ranges, pixel_range), pixel_range};
  }
  Pixels block_at(int64_t i) const {
    const int64_t image = i / blocking_.row_blocks * blocking_.images, row = i % blocking_.row_blocks * blocking_.rows;
    return {{image, smaller(s_.batch, image + blocking_.images)}, {row, smaller(s_.out_h, row + blocking_.rows)}};
  }
  Range out_channels_of(const Job& job) const {
    const int64_t group = job.group * work_.group_out;
    return {group + first_out(job.out_tiles.begin), group + first_out(job.out_tiles.end)};
  }
  Range in_channels_of(const Job& job) const {
    const int64_t group = job.group * work_.group_in;
    return {group + first_in(job.in_tiles.begin), group + first_in(job.in_tiles.end)};
  }

  Planes planes_of(const Side& side, Range channels, const Pixels& pixels, float* scratch) const {
    if (in_place_) return {first_pixel(side, channels, pixels), side.plane()};
    copy_planes(side, channels, pixels, s_.out_w, scratch, pitch_);
    return {scratch, pitch_};
  }

  // The sums go to `sums`, or those of the job's pixel range.
  void run_job(const Side& gradient, const Side& input, int64_t number, float* scratch, float* sums) const {
    const Job job = job_at(number);
    const Range out = out_channels_of(job), in = in_channels_of(job);
    TileArguments tile{};
    tile.sums_row = work_.group_in;
    for (int64_t i = job.blocks.begin; i < job.blocks.end; ++i) {
      const Pixels pixels = block_at(i);
      tile.gradient = planes_of(gradient, out, pixels, scratch);
      tile.input = planes_of(input, in, pixels, scratch + out.size() * pitch_);
      tile.turns = divide_up(pixels.images.size() * pixels.rows.size() * s_.out_w, kTurnPixels);
      tile.sums = sums + job.pixel_range * weights_pitch() + out.begin * work_.group_in + in.begin - job.group * work_.group_in;
      tile.adds = i > job.blocks.begin;
      Ahead<float> gradient_ahead, input_ahead;
      if (i + 1 < job.blocks.end) {
        gradient_ahead = planes_ahead(gradient, out, block_at(i + 1));
        input_ahead = planes_ahead(input, in, block_at(i + 1));
      } else if (number + 1 < jobs()) {  // most often this thread's next
        const Job next = job_at(number + 1);
        gradient_ahead = planes_ahead(gradient, out_channels_of(next), block_at(next.blocks.begin));
        input_ahead = planes_ahead(input, in_channels_of(next), block_at(next.blocks.begin));
      }
      add_block(job, tile, gradient_ahead, input_ahead);
    }
  }

  // All tiles of a block. `whole` is about the first channels of both sides.
  void add_block(const Job& job, const TileArguments& whole, Ahead<float>& gradient_ahead, Ahead<float>& input_ahead) const {
    const int64_t tiles = job.out_tiles.size() * job.in_tiles.size();
    gradient_ahead.share_out(tiles), input_ahead.share_out(tiles);
    const int64_t first_row = first_out(job.out_tiles.begin), first_column = first_in(job.in_tiles.begin);
    TileArguments tile = whole;
    for (int64_t near = job.in_tiles.begin; near < job.in_tiles.end; near += kNearTiles) {
      for (int64_t out = job.out_tiles.begin; out < job.out_tiles.end; ++out) {
        const int64_t row = first_out(out) - first_row, rows = first_out(out + 1) - first_out(out);
        tile.gradient.first = whole.gradient.first + row * whole.gradient.pitch;
        for (int64_t in = near; in < smaller(job.in_tiles.end, near + kNearTiles); ++in) {
          const int64_t column = first_in(in) - first_column, columns = first_in(in + 1) - first_in(in);
          tile.input.first = whole.input.first + column * whole.input.pitch;
          tile.sums = whole.sums + row * whole.sums_row + column;
          tile.gradient_ahead = gradient_ahead.next(tile.turns, whole.gradient.first);
          tile.input_ahead = input_ahead.next(tile.turns, whole.input.first);
          kTiles[rows - 1][columns - 1](tile);
        }
      }
    }
  }

  // The sums of the pixel ranges, in their order.
  void add_partials(const float* partials, Range vectors, float* grad_weight) const {
    for (int64_t v = vectors.begin; v < vectors.end; ++v) {
      const int64_t first = v * kLanesOfVector;
      Vector sum = load(partials + first);
      for (int64_t i = 1; i < split_.pixel_ranges; ++i) sum += load(partials + i * weights_pitch() + first);
      store_first(grad_weight + first, sum, static_cast<int>(smaller(kLanesOfVector, weights() - first)));
    }
  }

  Conv2dShape s_;
  Work work_;
  bool in_place_;
  Split split_;
  Blocking blocking_;
  int64_t pitch_;  // elements from one copied plane to the next
};

Plan plan(const Conv2dShape& s, int threads) { return PlanesWeight(s).plan(threads); }

Outcome run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, int threads) {
  return PlanesWeight(s).run(b, workspace, threads);
}

// Transposing, which this row does without, takes a share of the time that goes with 1 / outputs + 1 / inputs of a group. Pixels that a
// stride keeps apart take longer still: they are gathered row by row.
bool has_few_channels(const Conv2dShape& s) {
  const int64_t outputs = s.out_channels / s.groups, inputs = s.in_channels / s.groups;
  return 2 * outputs * inputs <= kManyChannels * (outputs + inputs);
}

bool accepts(const Conv2dShape& s) {
  return s.dtype == DType::float32 && s.layout == Layout::nchw && is_pointwise(s) && s.out_h * s.out_w >= kFewestPixels &&
         s.in_channels > 0 && s.batch > 0 && (s.stride_h > 1 || s.stride_w > 1 || has_few_channels(s));
}

}  // namespace

extern const Conv2dKernel conv2d_backward_weight_planes = {
    CNN_EXT_KERNEL_NAME("conv2d_backward_weight_planes"), Isa::CNN_EXT_ISA, Conv2dDirection::backward_weight, accepts, plan, run};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
