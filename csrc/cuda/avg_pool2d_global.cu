// Average pooling over whole planes, as a reduction.
//
// forward in nchw: a warp, for large planes a block, adds up a plane, each thread every 32nd or 256th chunk of 16 bytes. In nhwc a block
// adds up some chunks of channels of an image, its threads every so many pixels. A thread keeps a sum for each element of its chunk; then
// sums are added up as a tree. backward, in nchw alone, writes grad_input a chunk for each thread.
//
// The order of additions follows the size of the plane alone.
#include "cuda/global_pooling.cuh"

namespace cnn_ext::cuda {
namespace {

constexpr int kWarp = 32;
// Adds chunk number `chunk`, of `size` elements in all.
template <class T>
__device__ void add_chunk(const T* source, int chunk, int size, bool is_whole, Accumulate<T> (&sums)[kChunk<T>]) {
  Accumulate<T> values[kChunk<T>];
  const int count = smaller(kChunk<T>, size - chunk * kChunk<T>);
  load_chunk(source + chunk * kChunk<T>, count, is_whole && count == kChunk<T>, values);
#pragma unroll
  for (int i = 0; i < kChunk<T>; ++i) sums[i] += values[i];
}

// kThreads: for each plane.
template <class T, int kThreads>
__global__ void __launch_bounds__(kBlockThreads)
    global_avg_planes(int planes, int size, bool is_whole, Accumulate<T> divisor, const T* __restrict__ input, T* __restrict__ output) {
  using Acc = Accumulate<T>;
  __shared__ Acc warp_sums[kBlockThreads / kWarp];
  const int lane = threadIdx.x % kThreads, warp = threadIdx.x / kWarp;
  const int plane = blockIdx.x * (kBlockThreads / kThreads) + threadIdx.x / kThreads;
  Acc sums[kChunk<T>] = {};
  if (plane < planes) {
    const T* source = input + plane * size;
#pragma unroll 4
    for (int chunk = lane; chunk * kChunk<T> < size; chunk += kThreads) add_chunk(source, chunk, size, is_whole, sums);
  }
  Acc sum = sums[0];
#pragma unroll
  for (int i = 1; i < kChunk<T>; ++i) sum += sums[i];
#pragma unroll
  for (int half = kWarp / 2; half > 0; half /= 2) sum += __shfl_down_sync(0xFFFFFFFF, sum, half);
  if (kThreads > kWarp) {
    if (lane % kWarp == 0) warp_sums[warp] = sum;
    __syncthreads();
#pragma unroll
    for (int i = 1; i < kThreads / kWarp; ++i) sum += warp_sums[i];
  }
  if (lane == 0 && plane < planes) output[plane] = narrow<T>(sum / divisor);
}

// Chunks for each block in nhwc: the longer the sum, the more threads for one of its chunks; two are a whole sector of memory. Few blocks
// then have large planes, and a multiprocessor has one of them: it has as many threads as a block can have.
constexpr int kFewChunks = 2, kManyChunks = 8;
template <int kChunks>
constexpr int kPixelThreads = kChunks == kFewChunks ? 1024 : kBlockThreads;

// kChunks: of channels, for each block.
template <class T, int kChunks>
__global__ void __launch_bounds__(kPixelThreads<kChunks>, kChunks == kFewChunks ? 1 : 4)
    global_avg_pixels(int channels, int pixels, bool is_whole, Accumulate<T> divisor, const T* __restrict__ input, T* __restrict__ output) {
  using Acc = Accumulate<T>;
  __shared__ Acc tree[kPixelThreads<kChunks> / kChunks][kChunks][kChunk<T>];
  const int chunk_blocks = ceil_div(channels, kChunks * kChunk<T>), image = blockIdx.x / chunk_blocks;
  const int chunk = threadIdx.x % kChunks, lane = threadIdx.x / kChunks;
  const int first = (blockIdx.x % chunk_blocks * kChunks + chunk) * kChunk<T>, count = smaller(kChunk<T>, channels - first);
  add_up_pixels<kChunks == kFewChunks ? 6 : 4>(input + image * pixels * channels + first, {channels, count, is_whole}, pixels, tree);
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) {
      if (i < count) output[image * channels + first + i] = narrow<T>(tree[0][chunk][i] / divisor);
    }
  }
}

// In nchw: element i belongs to plane i / size.
template <class T>
__global__ void global_avg_planes_backward(int elements, FastDivisor size, bool is_whole, Accumulate<T> divisor,
                                           const T* __restrict__ grad_output, T* __restrict__ grad_input) {
  const int first = static_cast<int>(element_index()) * kChunk<T>, count = smaller(kChunk<T>, elements - first);
  if (count <= 0) return;
  Accumulate<T> values[kChunk<T>];
#pragma unroll
  for (int i = 0; i < kChunk<T>; ++i) values[i] = widen(grad_output[size.quotient(smaller(first + i, elements - 1))]) / divisor;
  store_chunk(grad_input + first, count, is_whole && count == kChunk<T>, values);
}

int64_t pixel_blocks(const Pool2dShape& s, int64_t chunk) {
  return s.batch * ceil_div<int64_t>(s.channels, chunk * (is_large(s) ? kFewChunks : kManyChunks));
}

int64_t plane_blocks(const Pool2dShape& s) { return ceil_div<int64_t>(s.batch * s.channels, is_large(s) ? 1 : kBlockThreads / kWarp); }

Plan plan_forward(const Pool2dShape& s) {
  int64_t blocks = 0;
  with_element_type(
      s.dtype, [&](auto element) { blocks = s.layout == Layout::nchw ? plane_blocks(s) : pixel_blocks(s, kChunk<decltype(element)>); });
  return {1, 1, blocks, 0};
}

void run_forward(const Pool2dShape& s, const Pool2dBuffers& b, cudaStream_t stream) {
  const int64_t blocks = plan_forward(s).blocks;
  with_element_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    const bool nchw = s.layout == Layout::nchw;
    const auto planes = is_large(s) ? global_avg_planes<T, kBlockThreads> : global_avg_planes<T, kWarp>;
    const auto pixels = is_large(s) ? global_avg_pixels<T, kFewChunks> : global_avg_pixels<T, kManyChunks>;
    const int64_t neighbours = nchw ? plane_size(s) : s.channels, others = nchw ? s.batch * s.channels : plane_size(s);
    const bool is_whole = has_whole_vectors<kChunk<T>>(static_cast<const T*>(b.input), neighbours);
    const Grid grid(blocks, nchw ? kBlockThreads : is_large(s) ? kPixelThreads<kFewChunks> : kPixelThreads<kManyChunks>);
    launch(nchw ? planes : pixels, grid, stream, static_cast<int>(nchw ? others : neighbours), static_cast<int>(nchw ? neighbours : others),
           is_whole, static_cast<Accumulate<T>>(divisor(s)), static_cast<const T*>(b.input), static_cast<T*>(b.output));
  });
}

// Chunks of all planes, one for each thread.
Plan plan_backward(const Pool2dShape& s) {
  int64_t chunk = 0;
  with_element_type(s.dtype, [&](auto element) { chunk = kChunk<decltype(element)>; });
  return {1, chunk, ceil_div<int64_t>(Pool2dGeometry(s).in_elements, chunk * kBlockThreads), 0};
}

bool is_global_nchw(const Pool2dShape& s) { return is_global(s) && s.layout == Layout::nchw; }

void run_backward(const Pool2dShape& s, const Pool2dBuffers& b, cudaStream_t stream) {
  with_element_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    launch(global_avg_planes_backward<T>, plan_backward(s).blocks, stream, static_cast<int>(Pool2dGeometry(s).in_elements),
           FastDivisor(static_cast<int>(plane_size(s))), is_aligned(b.grad_input), static_cast<Accumulate<T>>(divisor(s)),
           static_cast<const T*>(b.grad_output), static_cast<T*>(b.grad_input));
  });
}

}  // namespace

extern const Pool2dKernel avg_pool2d_forward_global_sm80 = {
    "avg_pool2d_forward_global_sm80", 80, Pool2dOp::avg, Pool2dDirection::forward, is_global, plan_forward, run_forward};
extern const Pool2dKernel avg_pool2d_backward_global_sm80 = {
    "avg_pool2d_backward_global_sm80", 80, Pool2dOp::avg, Pool2dDirection::backward, is_global_nchw, plan_backward, run_backward};

}  // namespace cnn_ext::cuda
