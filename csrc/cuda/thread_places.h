// Which thread computes what, where neighbouring threads take neighbouring elements.
#pragma once

#include "cuda/geometry.h"

namespace cnn_ext::cuda {

// The nearest place in [begin, end).
CNN_EXT_HOST_DEVICE constexpr int clamp(int value, int begin, int end) { return larger(begin, smaller(value, end - 1)); }

// Numbers the threads of a launch as (image, row, column, vector of channels), the last one fastest.
class ThreadPlaces {
 public:
  ThreadPlaces(int64_t images, int64_t rows, int64_t columns, int64_t vectors)
      : count_(static_cast<int>(images * rows * columns * vectors)),
        rows_(static_cast<int>(rows)),
        columns_(static_cast<int>(columns)),
        vectors_(static_cast<int>(vectors)) {}

  struct Place {
    int image, row, column, vector;
  };
  CNN_EXT_HOST_DEVICE Place at(int index) const {
    const int pixel = vectors_.quotient(index), line = columns_.quotient(pixel), image = rows_.quotient(line);
    return {image, line - image * rows_.divisor(), pixel - line * columns_.divisor(), index - pixel * vectors_.divisor()};
  }
  CNN_EXT_HOST_DEVICE int count() const { return count_; }

 private:
  int count_;
  FastDivisor rows_, columns_, vectors_;
};

}  // namespace cnn_ext::cuda
