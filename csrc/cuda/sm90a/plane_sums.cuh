// From the sums of a tile in shared memory, a line of pixels for each channel, to the planes of nchw: a warp stores a line, and each of its
// lanes the same pixels of every line, whose places it works out once.
#pragma once

#include "cuda/common.cuh"
#include "cuda/relu_pool.cuh"

namespace cnn_ext::cuda {

// Neighbouring pixels of a plane, which are stored at once.
template <class T, int kPixels>
struct alignas(kPixels * sizeof(T)) PlaneUnit {
  T pixels[kPixels];
};

// kLine: pixels of a line; kPixels: of a unit, 1, 2 or 4.
template <class T, int kLine, int kPixels>
class PlaneLanes {
 public:
  // place_of(i): where pixel i of the line lies in channel 0; null: it does not exist. A unit exists where its first pixel does.
  template <class PlaceOf>
  __device__ explicit PlaneLanes(const PlaceOf& place_of) {
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) places_[unit] = place_of(first_pixel(unit));
  }

  // offset: of the channel in the result, in elements.
  __device__ void store(const float* line, int64_t offset, float bias, bool relu) const {
    PlaneUnit<float, kPixels> sums[kUnits];
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) sums[unit] = *reinterpret_cast<const PlaneUnit<float, kPixels>*>(line + first_pixel(unit));
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
      PlaneUnit<T, kPixels> stored;
#pragma unroll
      for (int i = 0; i < kPixels; ++i) stored.pixels[i] = narrow<T>(activated(sums[unit].pixels[i] + bias, relu));
      if (places_[unit] != nullptr) *reinterpret_cast<PlaneUnit<T, kPixels>*>(places_[unit] + offset) = stored;
    }
  }

 private:
  static constexpr int kUnits = kLine / 32 / kPixels;  // of a lane
  __device__ static int first_pixel(int unit) { return (unit * 32 + static_cast<int>(threadIdx.x) % 32) * kPixels; }

  T* places_[kUnits];
};

}  // namespace cnn_ext::cuda
