// Half types by way of float32, part by part: a part of a tensor becomes floats in scratch, small enough for the caches, the float32 row
// does the work, and the result is rounded on its way back. A part is some channels of an image, or several whole images: nothing in the
// float32 rows depends on which.
#pragma once

#include "cpu/float_rows.h"
#include "cpu/parallel.h"
#include "cpu/simd/half.h"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

constexpr int64_t kPartElements = 1 << 16;
constexpr int64_t kRowAlignment = 64;  // bytes, of the scratch of a row
constexpr int64_t kPartChannels = 16;  // channels_last: a multiple of these, the lanes of the widest vector

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How a batch is cut, along images and along units of channels that belong together (a channel, or a group of a convolution).
struct Parts {
  int64_t units, images;  // of one part
  int64_t unit_parts, image_parts;
};

// Some whole images, of `image_elements` elements each in the larger of the tensors.
inline Parts cut_images(int64_t batch, int64_t units, int64_t image_elements, int64_t part_elements) {
  Parts parts{units, larger(1, smaller(batch, part_elements / larger(1, image_elements))), 1, 0};
  parts.image_parts = divide_up(batch, parts.images);
  return parts;
}

// unit_channels: of one unit; unit_elements: of one unit of an image, in the larger of the tensors.
inline Parts cut(Layout layout, int64_t batch, int64_t units, int64_t unit_channels, int64_t unit_elements) {
  int64_t whole = 1;  // units that make whole vectors
  while (layout == Layout::nhwc && whole * unit_channels % kPartChannels != 0) ++whole;
  const int64_t part = divide_up(larger(1, kPartElements / larger(1, unit_elements)), whole) * whole;
  if (part >= units) return cut_images(batch, units, units * unit_elements, kPartElements);
  return {part, 1, divide_up(units, part), batch};
}

// One part of a tensor as it lies: `runs` runs of `length` neighbours, `distance` apart. In scratch they follow each other.
struct Slice {
  int64_t first, runs, length, distance;
  int64_t size() const { return runs * length; }
};

// Channels [channel, channel + count) of the images [image, image + images) of a tensor of `channels` planes of `plane` elements.
inline Slice slice_of(Layout layout, int64_t channels, int64_t plane, int64_t image, int64_t images, int64_t channel, int64_t count) {
  const int64_t first = image * channels * plane;
  if (count == channels) return {first, 1, images * channels * plane, 0};
  if (layout == Layout::nchw) return {first + channel * plane, 1, count * plane, 0};
  return {first + channel, images * plane, count, channels};
}

template <class Element>
inline void widen(const Element* tensor, const Slice& slice, float* part) {
  constexpr int64_t lanes = kLanes<float>;
  for (int64_t run = 0; run < slice.runs; ++run, part += slice.length) {
    const Element* from = tensor + slice.first + run * slice.distance;
    int64_t i = 0;
    for (; i + lanes <= slice.length; i += lanes) store(part + i, load(from + i));
    if (i < slice.length)
      store_first(part + i, load_first(from + i, static_cast<int>(slice.length - i)), static_cast<int>(slice.length - i));
  }
}

template <class Element>
inline void narrow(const float* part, const Slice& slice, Element* tensor) {
  constexpr int64_t lanes = kLanes<float>;
  for (int64_t run = 0; run < slice.runs; ++run, part += slice.length) {
    Element* to = tensor + slice.first + run * slice.distance;
    int64_t i = 0;
    for (; i + lanes <= slice.length; i += lanes) store(to + i, load(part + i));
    if (i < slice.length) store_first(to + i, load_first(part + i, static_cast<int>(slice.length - i)), static_cast<int>(slice.length - i));
  }
}

// The same on several threads, in pieces of one run or of some whole runs; body(piece, where it begins in the part).
template <class Body>
inline void for_each_piece(const Slice& slice, int threads, const Body& body) {
  if (slice.runs != 1) {
    const int64_t some = larger(1, kPartElements / larger(1, slice.length));
    return parallel_for(threads, divide_up(slice.runs, some), [&](int, int64_t i) {
      const int64_t run = i * some;
      body(Slice{slice.first + run * slice.distance, smaller(some, slice.runs - run), slice.length, slice.distance}, run * slice.length);
    });
  }
  parallel_for(threads, divide_up(slice.length, kPartElements), [&](int, int64_t i) {
    const int64_t begin = i * kPartElements;
    body(Slice{slice.first + begin, 1, smaller(kPartElements, slice.length - begin), 0}, begin);
  });
}

template <class Element>
inline void widen(const Element* tensor, const Slice& slice, float* part, int threads) {
  for_each_piece(slice, threads, [&](const Slice& piece, int64_t begin) { widen(tensor, piece, part + begin); });
}

template <class Element>
inline void narrow(const float* part, const Slice& slice, Element* tensor, int threads) {
  for_each_piece(slice, threads, [&](const Slice& piece, int64_t begin) { narrow(part + begin, piece, tensor); });
}

// The offsets of a part, of `bytes` bytes each, which are dense in the tensor or else pass through scratch.
inline void* offsets_of(void* tensor, const Slice& slice, int64_t bytes, void* scratch) {
  return tensor == nullptr ? nullptr : slice.runs == 1 ? static_cast<char*>(tensor) + slice.first * bytes : scratch;
}

template <bool kToTensor>
inline void move_offsets(void* tensor, const Slice& slice, int64_t bytes, void* scratch) {
  if (tensor == nullptr || slice.runs == 1) return;
  for (int64_t run = 0; run < slice.runs; ++run) {
    char* in_tensor = static_cast<char*>(tensor) + (slice.first + run * slice.distance) * bytes;
    char* in_scratch = static_cast<char*>(scratch) + run * slice.length * bytes;
    const size_t count = static_cast<size_t>(slice.length * bytes);
    __builtin_memcpy(kToTensor ? in_tensor : in_scratch, kToTensor ? in_scratch : in_tensor, count);
  }
}

// Scratch for one worker, in bytes: parts of the tensors behind each other, each aligned.
inline int64_t aligned(int64_t bytes) { return divide_up(bytes, kRowAlignment) * kRowAlignment; }
inline int64_t part_bytes(int64_t elements) { return aligned(elements * static_cast<int64_t>(sizeof(float))); }

}  // namespace
}  // namespace cnn_ext::cpu::CNN_EXT_ISA
