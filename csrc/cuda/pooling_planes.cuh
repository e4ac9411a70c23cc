// Pooling by whole planes, where windows overlap so much that what a window needs is worth keeping in shared memory: a block takes the
// planes of kLanes neighbouring channels of an image. They lie there as (row, column, lane), the lanes fastest.
#pragma once

#include <type_traits>

#include "cuda/pooling.cuh"
#include "cuda/primitives.cuh"

namespace cnn_ext::cuda {

constexpr size_t kMostPlaneBytes = 96 * 1024;  // of shared memory: one block to a multiprocessor of sm_80, two to one of sm_90

// Shared memory is asked for in whole chunks.
constexpr size_t whole_chunks(size_t bytes) { return ceil_div<size_t>(bytes, kChunkBytes) * kChunkBytes; }

// Columns from a row to the next one: an odd number of them, so that the rows of a column lie in different banks.
CNN_EXT_HOST_DEVICE constexpr int odd_pitch(int columns) { return columns | 1; }

// The planes of a launch, numbered with the channels fastest.
template <int kLanes>
class PlaneBlocks {
 public:
  explicit PlaneBlocks(const Pool2dShape& s)
      : channels(static_cast<int>(pool_channels(s))),
        count_(pool_images(s) * ceil_div<int64_t>(pool_channels(s), kLanes)),
        of_image_(static_cast<int>(ceil_div<int64_t>(pool_channels(s), kLanes))) {}

  struct Planes {
    int image, channel;  // the first one
  };
  __device__ Planes at(int block) const {
    const int image = of_image_.quotient(block);
    return {image, (block - image * of_image_.divisor()) * kLanes};
  }
  // A lane behind the last channel computes that one, too.
  __device__ int channel_of(const Planes& planes, int lane) const { return smaller(planes.channel + lane, channels - 1); }
  int64_t count() const { return count_; }

  int channels;  // of a pixel

 private:
  int64_t count_;
  FastDivisor of_image_;
};

template <int kLanes>
constexpr int kPlaneThreads = kLanes <= 2 ? 512 : 1024;  // of a block, at most

constexpr int64_t kEnoughBlocks = 128;  // for a GPU: one to a multiprocessor, about

// Of a block: where several share a multiprocessor, half as many.
template <int kLanes>
int plane_threads(const PlaneBlocks<kLanes>& blocks) {
  return blocks.count() >= 4 * kEnoughBlocks ? kPlaneThreads<kLanes> / 2 : kPlaneThreads<kLanes>;
}

// Calls function(lanes) with the lanes of a block as a constant: in nhwc eight, or as many as shared_bytes(shape, lanes) leaves room for,
// or four where eight leave few blocks. Blocks that write a part of a sector of memory each wait for one another. No result depends on it.
constexpr int kFewestLanes = 2;

template <class SharedBytes, class Function>
void with_plane_lanes(const Pool2dShape& s, const SharedBytes& shared_bytes, const Function& function) {
  const auto fits = [&](int64_t lanes) { return shared_bytes(s, lanes) <= kMostPlaneBytes; };
  if (s.layout == Layout::nchw) return function(std::integral_constant<int, 1>{});
  if (s.batch * s.channels >= 8 * kEnoughBlocks && fits(8)) return function(std::integral_constant<int, 8>{});
  if (fits(4)) return function(std::integral_constant<int, 4>{});
  function(std::integral_constant<int, kFewestLanes>{});
}

template <class SharedBytes>
bool fits_planes(const Pool2dShape& s, const SharedBytes& shared_bytes) {
  return all_below(kMostPlaneBytes, {s.in_h, s.in_w, s.out_h, s.out_w}) &&
         shared_bytes(s, s.layout == Layout::nchw ? 1 : kFewestLanes) <= kMostPlaneBytes;
}

}  // namespace cnn_ext::cuda
