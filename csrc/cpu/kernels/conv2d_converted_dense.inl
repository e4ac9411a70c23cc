// Dense convolution of the half types by way of float32, within bounded scratch. A part is some images, or some rows of one where an image
// is large, for a block of output channels (of input channels in backward_input; of groups where there are several), so that neither a part
// nor the weights are ever converted whole. Parts follow each other, with all threads at work in each.
//
// Rows are cut by the sizes of one image: which float32 row serves a part may depend on its height. The number of images and the threads
// play no part in the sums.
//
// Where a window reaches over most of the rows, as with a wide dilation, each part of few rows would convert nearly the whole image again.
// Instead the channels of the tensor that is read are cut as well, and the results of these blocks are added up in float32.
#pragma once

#include "cpu/kernels/converted.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

constexpr int64_t kLeastPartBytes = 1 << 20, kMostPartBytes = 50 << 20;  // of a part's floats
constexpr int64_t kBlockChannels = 32;
constexpr int64_t kMostConversions = 2;  // of an element, by parts that read it for others' rows

inline int64_t limited(int64_t value, int64_t low, int64_t high) { return larger(low, smaller(high, value)); }

// Some images and, of these, the rows of the input and of the output that belong together.
struct Slab {
  int64_t image, images;
  int64_t in_first, in_rows, out_first, out_rows;
  int64_t pad_top;  // of the part
};

// Some channels of both tensors, in `groups` groups, and their weights.
struct Block {
  int64_t in_first, in_channels, out_first, out_channels, groups;
  Slice weights;
};

// How a convolution is cut into slabs and blocks.
class DenseCut {
 public:
  DenseCut(Conv2dDirection direction, const Conv2dShape& shape)
      : s(shape),
        direction_(direction),
        cuts_input_(direction == Conv2dDirection::backward_input),
        window_((s.kernel_h - 1) * s.dilation_h + 1),
        height_(cuts_input_ ? s.in_h : s.out_h),
        rows_(height_),
        written_(larger(1, written_channels())),
        read_(larger(1, read_channels())) {
    cut_slabs();
    cut_blocks();
  }

  int64_t slabs() const { return image_parts_ * row_parts_; }
  // Of the channels (groups) that are written, and of those that are read for each of them; of backward_weight: outputs, and inputs.
  int64_t blocks() const { return divide_up(written_channels(), written_); }
  int64_t addends() const { return s.groups > 1 ? 1 : larger(1, divide_up(read_channels(), read_)); }

  // Slab after slab, each for all blocks, the weights are converted for every slab; the other way round what is read, for every block.
  bool goes_slab_by_slab() const {
    const int64_t weights = (slabs() - 1) * s.kernel_h * s.kernel_w * written_channels() * read_channels();
    return weights <= (blocks() - 1) * s.batch * read_channels() * read_plane() || s.groups > 1;
  }

  Slab slab(int64_t index) const {
    const int64_t first = index % row_parts_ * rows_, end = smaller(height_, first + rows_), image = index / row_parts_ * images_;
    Slab slab{image, smaller(images_, s.batch - image), 0, s.in_h, 0, s.out_h, s.pad_top};
    if (row_parts_ == 1) return slab;
    if (cuts_input_) {
      // From the first output whose window reaches the rows on, rounded down so that the padding is not negative.
      const int64_t reaching = first + s.pad_top - (window_ - 1);
      slab.in_first = first, slab.in_rows = end - first;
      slab.out_first = limited(reaching < 0 ? 0 : reaching / s.stride_h, 0, s.out_h - 1);
      slab.out_rows = limited((end - 1 + s.pad_top) / s.stride_h + 1, slab.out_first + 1, s.out_h) - slab.out_first;
      slab.pad_top = first + s.pad_top - slab.out_first * s.stride_h;
    } else {
      const int64_t read = first * s.stride_h - s.pad_top, read_end = (end - 1) * s.stride_h - s.pad_top + window_;
      slab.out_first = first, slab.out_rows = end - first;
      slab.in_first = larger(0, read);
      slab.in_rows = limited(read_end, slab.in_first + 1, s.in_h) - slab.in_first;
      slab.pad_top = slab.in_first - read;
    }
    return slab;
  }

  Block block(int64_t index, int64_t addend) const {
    const int64_t in = s.in_channels / s.groups, out = s.out_channels / s.groups, taps = s.kernel_h * s.kernel_w;
    const int64_t first = index * written_, count = smaller(written_, written_channels() - first);
    if (s.groups > 1)
      return {first * in, count * in, first * out, count * out, count, {first * out * in * taps, 1, count * out * in * taps, 0}};
    const int64_t read_first = addend * read_, read_count = smaller(read_, read_channels() - read_first);
    return cuts_input_ ? block_of(first, count, read_first, read_count) : block_of(read_first, read_count, first, count);
  }

  // The float32 problem of a part.
  Conv2dShape part(const Slab& slab, const Block& block) const {
    Conv2dShape part = s;
    part.dtype = DType::float32, part.allow_winograd = 0;
    part.batch = slab.images, part.groups = block.groups;
    part.in_channels = block.in_channels, part.in_h = slab.in_rows, part.out_channels = block.out_channels, part.out_h = slab.out_rows;
    part.pad_top = slab.pad_top;
    return part;
  }

  // At most, of a part.
  int64_t input_bytes() const { return part_bytes(images_ * block(0, 0).in_channels * in_rows(rows_) * s.in_w); }
  int64_t output_bytes() const { return part_bytes(images_ * block(0, 0).out_channels * out_rows(rows_) * s.out_w); }
  int64_t weight_bytes() const { return part_bytes(block(0, 0).weights.size()); }
  int64_t bias_bytes() const { return part_bytes(larger(block(0, 0).in_channels, block(0, 0).out_channels)); }
  // Of what an addend is added to.
  int64_t sums_bytes() const {
    if (direction_ == Conv2dDirection::backward_weight) return weight_bytes();
    return addends() == 1 ? 0 : cuts_input_ ? input_bytes() : output_bytes();
  }
  // Of the float32 row, for a part that lies inside: those at the edges read less.
  size_t row_bytes(int threads) const {
    return float_row_bytes(direction_, part(slab(slabs() / 2), block(0, 0)), Isa::CNN_EXT_ISA, threads);
  }
  size_t bytes(int threads) const {
    return static_cast<size_t>(input_bytes() + output_bytes() + weight_bytes() + bias_bytes() + sums_bytes()) + row_bytes(threads);
  }

  const Conv2dShape s;

 private:
  // Of the tensor that is not cut itself, all rows belong to all of the other's, also those that no window meets.
  int64_t in_rows(int64_t rows) const {
    if (cuts_input_) return rows;
    return rows == height_ ? s.in_h : limited((rows - 1) * s.stride_h + window_, 0, s.in_h);
  }
  int64_t out_rows(int64_t rows) const {
    if (!cuts_input_) return rows;
    return rows == height_ ? s.out_h : limited((rows - 1 + window_ - 1) / s.stride_h + 2, 0, s.out_h);
  }

  // One group: some channels of both tensors.
  Block block_of(int64_t in_first, int64_t in_count, int64_t out_first, int64_t out_count) const {
    const int64_t in = s.in_channels, taps = s.kernel_h * s.kernel_w;
    Slice weights{(out_first * in + in_first) * taps, out_count, in_count * taps, in * taps};
    if (s.weight_layout == Layout::nhwc) weights = {out_first * taps * in + in_first, out_count * taps, in_count, in};
    if (in_count == in) weights = {out_first * in * taps, 1, out_count * in * taps, 0};
    return {in_first, in_count, out_first, out_count, 1, weights};
  }

  // A part may take a fifth of the larger activation, of halves.
  void cut_slabs() {
    const int64_t image_elements = larger(s.in_channels * s.in_h * s.in_w, s.out_channels * s.out_h * s.out_w);
    const auto budget = [&](int64_t images) { return limited(images * image_elements * 2 / 5, kLeastPartBytes, kMostPartBytes); };
    const auto image_bytes = [&] {
      return part_bytes(s.in_channels * in_rows(rows_) * s.in_w) + part_bytes(s.out_channels * out_rows(rows_) * s.out_w);
    };
    const bool windows_begin_inside = (s.out_h - 1) * s.stride_h - s.pad_top < s.in_h;
    while (windows_begin_inside && rows_ > 1 && image_bytes() > budget(1)) rows_ = divide_up(rows_, 2);
    row_parts_ = larger(1, divide_up(height_, larger(1, rows_)));
    images_ = row_parts_ > 1 ? 1 : limited(budget(s.batch) / larger(1, image_bytes()), 1, larger(1, s.batch));
    const bool converts_often =
        cuts_input_ ? row_parts_ * out_rows(rows_) > kMostConversions * s.out_h : row_parts_ * in_rows(rows_) > kMostConversions * s.in_h;
    if (converts_often && s.groups == 1) cut_channels(budget(s.batch));
    image_parts_ = divide_up(s.batch, images_);
  }

  // In place of rows: blocks of what is read, and of what is written and added to, of as many images as are converted at once.
  void cut_channels(int64_t budget) {
    rows_ = height_, row_parts_ = 1, images_ = larger(1, s.batch);
    const auto read_bytes = [&] { return part_bytes(images_ * read_ * read_plane()); };
    const auto written_bytes = [&] { return part_bytes(images_ * written_ * written_plane()); };
    while (images_ > 1 && part_bytes(images_ * kBlockChannels * larger(read_plane(), written_plane())) > budget)
      images_ = divide_up(images_, 2);
    while (read_ > kBlockChannels && read_bytes() > budget) read_ = half_of(read_);
    while (written_ > kBlockChannels && written_bytes() > budget) written_ = half_of(written_);
  }

  // Of a block of channels, in whole vectors.
  static int64_t half_of(int64_t channels) { return divide_up(divide_up(channels, 2), kBlockChannels) * kBlockChannels; }

  // The float32 row packs what is converted, or adds up as much: two or three copies of a block, which together are not much larger than
  // the weights.
  void cut_blocks() {
    const int64_t copies = direction_ == Conv2dDirection::backward_weight ? 3 : 2, slack = (copies - 1) << 18;
    const auto weight_bytes = [&](int64_t written, int64_t read) { return part_bytes(written * read * s.kernel_h * s.kernel_w); };
    const int64_t group = (s.out_channels / s.groups) * (s.in_channels / s.groups);  // weights of a unit that is written
    const int64_t all = s.groups > 1 ? weight_bytes(s.groups, group) : weight_bytes(written_channels(), read_channels());
    const int64_t block = s.groups > 1 ? weight_bytes(written_, group) : weight_bytes(written_, read_);
    const int64_t blocks = divide_up(copies * block, all + slack);
    written_ = larger(1, divide_up(written_, larger(1, blocks)));
    if (s.groups == 1 && blocks > 1) written_ = divide_up(written_, kBlockChannels) * kBlockChannels;
  }

  int64_t written_channels() const { return s.groups > 1 ? s.groups : cuts_input_ ? s.in_channels : s.out_channels; }
  int64_t read_channels() const { return cuts_input_ ? s.out_channels : s.in_channels; }
  int64_t written_plane() const { return cuts_input_ ? s.in_h * s.in_w : s.out_h * s.out_w; }
  int64_t read_plane() const { return cuts_input_ ? s.out_h * s.out_w : s.in_h * s.in_w; }

  const Conv2dDirection direction_;
  const bool cuts_input_;  // into rows, and its channels into blocks; else the output
  const int64_t window_, height_;
  int64_t rows_, row_parts_, images_, image_parts_;
  int64_t written_, read_;
};

// `count` channels from `channel` on and `rows` rows from `row` on of some images of a tensor.
inline Slice slice_of_slab(Layout layout, int64_t channels, int64_t height, int64_t width, int64_t image, int64_t images, int64_t channel,
                           int64_t count, int64_t row, int64_t rows) {
  const int64_t plane = height * width, first = image * channels * plane;
  if (layout == Layout::nhwc) {
    const int64_t begin = first + row * width * channels + channel, pixels = images * rows * width;
    return count == channels ? Slice{begin, 1, pixels * channels, 0} : Slice{begin, pixels, count, channels};
  }
  const int64_t begin = first + channel * plane + row * width;
  if (rows < height) return {begin, count, rows * width, plane};  // of one image
  return count == channels ? Slice{begin, 1, images * count * plane, 0} : Slice{begin, images, count * plane, channels * plane};
}

template <class Element, Conv2dDirection kDirection>
class DenseRun {
 public:
  DenseRun(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, int threads) : cut_(kDirection, s), b_(b), threads_(threads) {
    char* memory = static_cast<char*>(workspace);
    const auto take = [&memory](int64_t bytes) {
      float* place = reinterpret_cast<float*>(memory);
      memory += bytes;
      return place;
    };
    input_ = take(cut_.input_bytes()), output_ = take(cut_.output_bytes()), weight_ = take(cut_.weight_bytes());
    bias_ = take(cut_.bias_bytes()), sums_ = take(cut_.sums_bytes());
    scratch_ = {memory, cut_.row_bytes(threads)};
  }

  void run() const {
    if constexpr (kDirection == Conv2dDirection::backward_weight) {
      for (int64_t j = 0; j < cut_.blocks(); ++j) {
        for (int64_t k = 0; k < cut_.addends(); ++k) run_weights(cut_.block(j, k));
      }
    } else {
      const int64_t slabs = cut_.slabs(), blocks = cut_.blocks();
      const bool slab_by_slab = cut_.goes_slab_by_slab();
      for (int64_t i = 0; i < slabs * blocks; ++i) {
        slab_by_slab ? run_part(i / blocks, i % blocks, i % blocks > 0, false) : run_part(i % slabs, i / slabs, false, i % slabs > 0);
      }
    }
  }

 private:
  Slice input_slice(const Slab& slab, const Block& block) const {
    const Conv2dShape& s = cut_.s;
    return slice_of_slab(s.layout, s.in_channels, s.in_h, s.in_w, slab.image, slab.images, block.in_first, block.in_channels, slab.in_first,
                         slab.in_rows);
  }
  Slice output_slice(const Slab& slab, const Block& block) const {
    const Conv2dShape& s = cut_.s;
    return slice_of_slab(s.layout, s.out_channels, s.out_h, s.out_w, slab.image, slab.images, block.out_first, block.out_channels,
                         slab.out_first, slab.out_rows);
  }

  const float* widened(const void* tensor, const Slice& slice, float* place) const {
    if (tensor == nullptr) return nullptr;
    widen(static_cast<const Element*>(tensor), slice, place, threads_);
    return place;
  }

  // The sum of the addends of a block, rounded. Same slab, same block: as of the part before.
  void run_part(int64_t slab_index, int64_t index, bool same_slab, bool same_block) const {
    const Slab slab = cut_.slab(slab_index);
    const int64_t addends = cut_.addends();
    float* const result = kForward ? output_ : input_;
    float* const sums = addends > 1 ? sums_ : result;
    const Slice written = kForward ? output_slice(slab, cut_.block(index, 0)) : input_slice(slab, cut_.block(index, 0));
    for (int64_t k = 0; k < addends; ++k) {
      const Block block = cut_.block(index, k);
      if (addends > 1 || !same_block) widened(b_.weight, block.weights, weight_);
      if (addends > 1 || !same_slab || cut_.s.groups > 1) widen_read(slab, block);
      run_addend(slab, block, /*adds_bias=*/k == 0, k == 0 ? sums : result);
      if (k > 0) add(result, written.size(), sums);
    }
    narrow(sums, written, static_cast<Element*>(kForward ? b_.output : b_.grad_input), threads_);
  }

  void widen_read(const Slab& slab, const Block& block) const {
    kForward ? widened(b_.input, input_slice(slab, block), input_) : widened(b_.grad_output, output_slice(slab, block), output_);
  }

  void run_addend(const Slab& slab, const Block& block, bool adds_bias, float* result) const {
    Conv2dBuffers part{};
    part.weight = weight_;
    if constexpr (kForward) {
      part.input = input_, part.output = result;
      part.bias = adds_bias ? widened(b_.bias, {block.out_first, 1, block.out_channels, 0}, bias_) : nullptr;
    } else {
      part.grad_output = output_, part.grad_input = result;
      part.bias = adds_bias ? widened(b_.bias, {block.in_first, 1, block.in_channels, 0}, bias_) : nullptr;
    }
    run_float_row(kDirection, cut_.part(slab, block), part, Isa::CNN_EXT_ISA, threads_, scratch_);
  }

  void run_weights(const Block& block) const {
    for (int64_t i = 0; i < block.weights.size(); ++i) sums_[i] = 0;
    for (int64_t i = 0; i < cut_.slabs(); ++i) {
      const Slab slab = cut_.slab(i);
      Conv2dBuffers part{};
      part.input = widened(b_.input, input_slice(slab, block), input_);
      part.grad_output = widened(b_.grad_output, output_slice(slab, block), output_);
      part.grad_weight = weight_;
      run_float_row(kDirection, cut_.part(slab, block), part, Isa::CNN_EXT_ISA, threads_, scratch_);
      add(weight_, block.weights.size(), sums_);
    }
    narrow(sums_, block.weights, static_cast<Element*>(b_.grad_weight), threads_);
  }

  void add(const float* addend, int64_t count, float* sums) const {
    for_each_piece({0, 1, count, 0}, threads_, [&](const Slice& piece, int64_t begin) {
      for (int64_t i = begin; i < begin + piece.length; ++i) sums[i] += addend[i];
    });
  }

  static constexpr bool kForward = kDirection == Conv2dDirection::forward;

  const DenseCut cut_;
  const Conv2dBuffers& b_;
  const int threads_;
  float *input_, *output_, *weight_, *bias_, *sums_;
  RowScratch scratch_;
};

template <Conv2dDirection kDirection>
Plan plan_dense(const Conv2dShape& s, int threads) {
  const DenseCut cut(kDirection, s);
  return {cut.block(0, 0).out_channels, 1, cut.slabs() * cut.blocks(), cut.bytes(threads)};
}

}  // namespace
}  // namespace cnn_ext::cpu::CNN_EXT_ISA
