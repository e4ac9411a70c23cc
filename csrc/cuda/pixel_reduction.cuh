// Sums over all pixels (n, oh, ow) of a batch, in two launches: the pixels are divided into splits, whose partial sums go to the workspace,
// and a second kernel adds the splits up in order. The division depends on the shape alone and there are no atomics: the same bits in every
// run.
//
// workspace: partials[splits][targets], where the targets are the elements of the result in memory order, in the type of sums.
#pragma once

#include "cuda/common.cuh"

namespace cnn_ext::cuda {

struct Splits {
  int64_t count;
  int64_t size;  // terms of one split; the last may have fewer
};

// Enough blocks to fill 132 multiprocessors twice, twice over, but at least 1024 terms to a split and at most 2^24 partial sums in all.
constexpr int64_t kWantedBlocks = 528;
constexpr int64_t kLeastTerms = 1024;
constexpr int64_t kMostPartials = int64_t{1} << 24;

// terms: of each sum; blocks: that a single split would launch. The size of a split is a multiple of `multiple`, and at least `least`.
inline Splits split_sum(int64_t terms, int64_t blocks, int64_t targets, int64_t multiple, int64_t least = kLeastTerms) {
  if (terms == 0 || targets == 0) return {1, multiple};
  const int64_t by_blocks = ceil_div(kWantedBlocks, blocks), by_terms = ceil_div(terms, least), by_memory = kMostPartials / targets;
  int64_t wanted = by_blocks < by_terms ? by_blocks : by_terms;
  wanted = wanted < by_memory ? wanted : by_memory;
  const int64_t size = ceil_div(ceil_div(terms, wanted > 0 ? wanted : 1), multiple) * multiple;
  return {ceil_div(terms, size), size};
}

inline size_t partials_bytes(DType dtype, const Splits& splits, int64_t targets) {
  return static_cast<size_t>(splits.count * targets) * (dtype == DType::float64 ? sizeof(double) : sizeof(float));
}

// Threads that share a sum's splits where there are many: they wait for memory one after the other otherwise.
inline int sum_lanes(const Splits& splits) { return splits.count < 32 ? 1 : splits.count < 128 ? 8 : 32; }

// Where a result lies: as the partial sums are numbered.
struct SameOrder {
  __device__ int64_t operator()(int64_t index) const { return index; }
};

template <class T, class Order>
__global__ void __launch_bounds__(kBlockThreads)
    sum_partials(const Accumulate<T>* partials, int64_t splits, int64_t targets, int lanes, T* result, Order order) {
  __shared__ Accumulate<T> sums[kBlockThreads];
  const int width = kBlockThreads / lanes, lane = static_cast<int>(threadIdx.x) / width;
  const int64_t target = static_cast<int64_t>(blockIdx.x) * width + threadIdx.x % width;
  Accumulate<T> sum = 0;
  if (target < targets) {
#pragma unroll 8
    for (int64_t split = lane; split < splits; split += lanes) sum += partials[split * targets + target];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (lane > 0 || target >= targets) return;
#pragma unroll 8
  for (int other = 1; other < lanes; ++other) sum += sums[other * width + threadIdx.x];
  result[order(target)] = narrow<T>(sum);
}

template <class T, class Order = SameOrder>
void launch_sum_partials(const void* partials, const Splits& splits, int64_t targets, void* result, cudaStream_t stream,
                         const Order& order = {}) {
  const int lanes = sum_lanes(splits);
  launch(sum_partials<T, Order>, ceil_div<int64_t>(targets, kBlockThreads / lanes), stream, static_cast<const Accumulate<T>*>(partials),
         splits.count, targets, lanes, static_cast<T*>(result), order);
}

// Walks over pixels at a fixed distance without a division.
template <class Integer>
class PixelCursor {
 public:
  __device__ PixelCursor(const Conv2dGeometryOf<Integer>& g, int64_t pixel, int distance)
      : height_(g.out_h), width_(g.out_w), at_(position(pixel)), step_(position(distance)) {}
  __device__ const PlaneIndexOf<Integer>& at() const { return at_; }
  __device__ void advance() {
    at_.w += step_.w;
    if (at_.w >= width_) at_.w -= width_, ++at_.h;
    at_.h += step_.h;
    if (at_.h >= height_) at_.h -= height_, ++at_.outer;
    at_.outer += step_.outer;
  }

 private:
  __device__ PlaneIndexOf<Integer> position(int64_t pixel) const {
    const int64_t row = pixel / width_;
    return {static_cast<Integer>(row / height_), static_cast<Integer>(row % height_), static_cast<Integer>(pixel % width_)};
  }
  Integer height_, width_;
  PlaneIndexOf<Integer> at_, step_;
};

// A block of 256 threads sums up one split: in nchw of a single target, with neighbouring threads on neighbouring pixels; in nhwc of 32
// neighbouring targets, eight pixels at a time. Then the threads of a target add up their sums as a tree. With 64-bit indices always of 32
// targets: there may be more of them than a grid has blocks.
template <class Integer>
constexpr int reduction_targets(Layout layout) {
  return layout == Layout::nchw && sizeof(Integer) == sizeof(int) ? 1 : 32;
}

// Terms offers
//   Acc                                    the type of sums
//   int64_t targets                        how many sums, numbered so that neighbours lie together in nhwc
//   Target target(int64_t)                 what a thread remembers of its target
//   Acc term(Target, pixel)                what a pixel, a PlaneIndexOf<Integer>, adds to it
//   int64_t offset(Target)                 where the result lies in memory
template <class Terms, int kTargets, class Integer>
__global__ void __launch_bounds__(kBlockThreads, /*blocks=*/1)  // with more, the assembler spills a register
    reduce_pixels(Terms terms, Conv2dGeometryOf<Integer> g, int64_t pixels, Splits splits, typename Terms::Acc* partials) {
  constexpr int kLanes = kBlockThreads / kTargets;
  __shared__ typename Terms::Acc sums[kBlockThreads];
  const int64_t target_blocks = ceil_div<int64_t>(terms.targets, kTargets);
  const int64_t split = blockIdx.x / target_blocks;
  const int64_t index = blockIdx.x % target_blocks * kTargets + threadIdx.x % kTargets;
  const bool exists = index < terms.targets;
  const typename Terms::Target target = terms.target(exists ? index : 0);
  const int64_t begin = split * splits.size + threadIdx.x / kTargets;
  const int64_t end = exists ? smaller(pixels, (split + 1) * splits.size) : begin;
  typename Terms::Acc sum = 0;
  PixelCursor<Integer> cursor(g, begin, kLanes);
  for (int64_t pixel = begin; pixel < end; pixel += kLanes, cursor.advance()) sum += terms.term(target, cursor.at());
  sums[threadIdx.x] = sum;
  __syncthreads();
#pragma unroll
  for (int half = kBlockThreads / 2; half >= kTargets; half /= 2) {
    if (threadIdx.x < static_cast<unsigned>(half)) sums[threadIdx.x] += sums[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x < kTargets && exists) partials[split * terms.targets + terms.offset(target)] = sums[threadIdx.x];
}

template <class Integer>
int64_t reduction_blocks(const Conv2dShape& s, int64_t targets) {
  return ceil_div<int64_t>(targets, reduction_targets<Integer>(s.layout));
}

inline int64_t pixels_of(const Conv2dShape& s) { return s.batch * s.out_h * s.out_w; }

template <class Integer>
Splits reduction_splits(const Conv2dShape& s, int64_t targets) {
  return split_sum(pixels_of(s), reduction_blocks<Integer>(s, targets), targets, kBlockThreads);
}

template <class Integer>
Plan plan_reduction(const Conv2dShape& s, int64_t targets) {
  const Splits splits = reduction_splits<Integer>(s, targets);
  const int of_block = reduction_targets<Integer>(s.layout);
  return {of_block, kBlockThreads / of_block, reduction_blocks<Integer>(s, targets) * splits.count,
          partials_bytes(s.dtype, splits, targets)};
}

// Both launches: the sums of Terms over all pixels, rounded to T, in result.
template <class T, class Integer, class Terms>
void run_reduction(const Conv2dShape& s, const Terms& terms, void* workspace, void* result, cudaStream_t stream) {
  const Splits splits = reduction_splits<Integer>(s, terms.targets);
  constexpr int kNchw = reduction_targets<Integer>(Layout::nchw), kNhwc = reduction_targets<Integer>(Layout::nhwc);
  const auto kernel = s.layout == Layout::nchw ? reduce_pixels<Terms, kNchw, Integer> : reduce_pixels<Terms, kNhwc, Integer>;
  launch(kernel, plan_reduction<Integer>(s, terms.targets).blocks, stream, terms, Conv2dGeometryOf<Integer>(s), pixels_of(s), splits,
         static_cast<Accumulate<T>*>(workspace));
  launch_sum_partials<T>(workspace, splits, terms.targets, result, stream);
}

}  // namespace cnn_ext::cuda
