// backward_input of a convolution whose padding holds values of the input (PaddingMode other than zeros), made of the row that serves it
// without padding: the gradient of the padded input is computed in scratch, some images at a time, and folded. An element of the input and
// its copies in the padding are added up row by row, then column by column, each in ascending order. Half types are widened first, so that
// the gradient is rounded once, behind the last sum.
#include <type_traits>
#include <vector>

#include "core/half.h"
#include "core/padding.h"
#include "cpu/api.h"
#include "cpu/parallel.h"

namespace cnn_ext::cpu::composed {
namespace {

constexpr int64_t kScratchBytes = 8 << 20;  // a level-3 cache's share, unless one image takes more

DType sum_dtype(DType dtype) { return is_half(dtype) ? DType::float32 : dtype; }

// The problem without padding, in the type of its sums: its input is what the windows read of the padded one.
Conv2dShape padded_shape(const Conv2dShape& s, int64_t images) {
  Conv2dShape padded = s;
  padded.batch = images;
  padded.in_h = (s.out_h - 1) * s.stride_h + (s.kernel_h - 1) * s.dilation_h + 1;
  padded.in_w = (s.out_w - 1) * s.stride_w + (s.kernel_w - 1) * s.dilation_w + 1;
  padded.pad_top = padded.pad_left = 0;
  padded.padding_mode = PaddingMode::zeros;
  padded.dtype = sum_dtype(s.dtype);
  return padded;
}

// Numbers of a pixel of a plane: planes are channels of images (nchw), or images whose pixels have the channels.
int64_t pixel_of(const Conv2dShape& s) { return s.layout == Layout::nchw ? 1 : s.in_channels; }

// What scratch holds, in numbers of the type of the sums: for each thread a row that it folds, of half types the operands widened, and the
// gradient of the padded input.
struct Scratch {
  Scratch(const Conv2dShape& s, int threads) {
    const Conv2dShape padded = padded_shape(s, 1);
    constexpr int64_t kLineNumbers = 16;  // no two threads write to one cache line
    const int64_t number = padded.dtype == DType::float64 ? 8 : 4;
    grad_input_image = padded.in_channels * padded.in_h * padded.in_w;
    row = (padded.in_w * pixel_of(s) + kLineNumbers - 1) / kLineNumbers * kLineNumbers;
    if (is_half(s.dtype)) {
      weight = s.out_channels * (s.in_channels / s.groups) * s.kernel_h * s.kernel_w;
      grad_output_image = s.out_channels * s.out_h * s.out_w;
    }
    const int64_t image = grad_input_image + grad_output_image, fitting = kScratchBytes / (image * number);
    images = fitting < 1 ? 1 : fitting < s.batch ? fitting : s.batch;
    bytes = (weight + images * image + threads * row) * number;
  }
  int64_t row, weight = 0, grad_output_image = 0, grad_input_image, images, bytes;
};

// The values in the type of their sums: themselves, or a half type's widened into scratch.
template <class T>
const void* widened(const T* from, int64_t count, Compute<T>* to, int threads) {
  if constexpr (std::is_same_v<T, Compute<T>>) return from;
  constexpr int64_t kPiece = 1 << 14;
  parallel_for(threads, (count + kPiece - 1) / kPiece, [&](int, int64_t piece) {
    const int64_t end = (piece + 1) * kPiece < count ? (piece + 1) * kPiece : count;
    for (int64_t i = piece * kPiece; i < end; ++i) to[i] = static_cast<Compute<T>>(from[i]);
  });
  return to;
}

// For every position of one axis of the input the padded positions that hold its value, ascending: those from begin[i] to begin[i + 1] - 1.
struct Copies {
  Copies(PaddingMode mode, int64_t size, int64_t pad, int64_t padded_size) {
    for (int64_t i = 0; i < size; ++i) {
      begin.push_back(static_cast<int64_t>(positions.size()));
      for (int64_t p = 0; p < padded_size; ++p) {
        if (source_position(mode, p - pad, size) == i) positions.push_back(p);
      }
    }
    begin.push_back(static_cast<int64_t>(positions.size()));
  }
  std::vector<int64_t> begin, positions;
};

template <class T>
class Fold {
 public:
  Fold(const Conv2dShape& s, const Conv2dShape& padded)
      : s_(s),
        padded_(padded),
        rows_(s.padding_mode, s.in_h, s.pad_top, padded.in_h),
        columns_(s.padding_mode, s.in_w, s.pad_left, padded.in_w),
        pixel_(pixel_of(s)) {}

  // All planes of the padded problem's batch; `rows`: `row` numbers for each thread.
  void run(const Compute<T>* from, T* to, Compute<T>* rows, int64_t row, int threads) const {
    const int64_t planes = padded_.batch * s_.in_channels / pixel_;
    parallel_for(threads, planes, [&](int worker, int64_t plane) {
      Compute<T>* const sums = rows + worker * row;
      for (int64_t ih = 0; ih < s_.in_h; ++ih) {
        add_rows(from + plane * padded_.in_h * padded_.in_w * pixel_, ih, sums);
        add_columns(sums, to + (plane * s_.in_h + ih) * s_.in_w * pixel_);
      }
    });
  }

 private:
  void add_rows(const Compute<T>* plane, int64_t ih, Compute<T>* sums) const {
    const int64_t elements = padded_.in_w * pixel_;
    for (int64_t i = 0; i < elements; ++i) sums[i] = 0;
    for (int64_t c = rows_.begin[ih]; c < rows_.begin[ih + 1]; ++c) {
      const Compute<T>* row = plane + rows_.positions[c] * elements;
      for (int64_t i = 0; i < elements; ++i) sums[i] += row[i];
    }
  }

  void add_columns(const Compute<T>* sums, T* row) const {
    for (int64_t iw = 0; iw < s_.in_w; ++iw, row += pixel_) {
      const int64_t first = columns_.begin[iw], last = columns_.begin[iw + 1];
      for (int64_t i = 0; i < pixel_; ++i) {
        Compute<T> sum = 0;
        for (int64_t c = first; c < last; ++c) sum += sums[columns_.positions[c] * pixel_ + i];
        row[i] = static_cast<T>(sum);
      }
    }
  }

  const Conv2dShape& s_;
  const Conv2dShape& padded_;
  const Copies rows_, columns_;
  const int64_t pixel_;
};

template <class T>
void backward_input(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, int threads) {
  const Scratch scratch(s, threads);
  Compute<T>* const rows = static_cast<Compute<T>*>(workspace);
  Compute<T>* const weight = rows + threads * scratch.row;
  Compute<T>* const grad_output = weight + scratch.weight;
  Compute<T>* const grad_padded = grad_output + scratch.images * scratch.grad_output_image;
  const int64_t grad_output_image = s.out_channels * s.out_h * s.out_w, grad_input_image = s.in_channels * s.in_h * s.in_w;
  Conv2dBuffers conv{};
  conv.weight = widened(static_cast<const T*>(b.weight), scratch.weight, weight, threads);
  conv.grad_input = grad_padded;
  for (int64_t n = 0; n < s.batch; n += scratch.images) {
    const Conv2dShape padded = padded_shape(s, scratch.images < s.batch - n ? scratch.images : s.batch - n);
    const T* const images = static_cast<const T*>(b.grad_output) + n * grad_output_image;
    conv.grad_output = widened(images, padded.batch * scratch.grad_output_image, grad_output, threads);
    run_conv2d_unforced(Conv2dDirection::backward_input, padded, conv, threads);
    Fold<T>(s, padded).run(grad_padded, static_cast<T*>(b.grad_input) + n * grad_input_image, rows, scratch.row, threads);
  }
}

bool accepts(const Conv2dShape& s) { return s.padding_mode != PaddingMode::zeros; }

Plan plan(const Conv2dShape& s, int threads) { return {1, 1, s.batch, static_cast<size_t>(Scratch(s, threads).bytes)}; }

Outcome run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, int threads) {
  with_scalar(s.dtype, [&](auto scalar) { backward_input<decltype(scalar)>(s, b, workspace, threads); });
  return Outcome::done;
}

}  // namespace

extern const Conv2dKernel conv2d_backward_input = {"conv2d_backward_input_folded_baseline",
                                                   Isa::baseline,
                                                   Conv2dDirection::backward_input,
                                                   accepts,
                                                   plan,
                                                   run,
                                                   /*adds_bias=*/false,
                                                   /*maps_padding=*/true};

}  // namespace cnn_ext::cpu::composed
