// Average pooling over whole large planes in nhwc, forward: the pixels of some channels of an image are divided among the blocks of a
// cluster, whose first one adds up the others' sums through their shared memory, in order. There are enough blocks for all multiprocessors,
// and each reads runs of memory of 32 channels: blocks that take all pixels of a plane are few, or read a sector here and there.
//
// The order of additions follows the size of the plane alone. Not handled: float64; small planes.
#include "cuda/global_pooling.cuh"
#include "cuda/sm90a/wgmma.cuh"

namespace cnn_ext::cuda {
namespace {

constexpr int kParts = 8;     // of a plane's pixels: blocks of a cluster
constexpr int kColumns = 32;  // channels of a cluster

template <class T>
__global__ void __launch_bounds__(kBlockThreads, 4)
    global_avg_cluster(int channels, int pixels, bool is_whole, float divisor, const T* __restrict__ input, T* __restrict__ output) {
  constexpr int kChunks = kColumns / kChunk<T>;
  alignas(sizeof(float4)) __shared__ float tree[kBlockThreads / kChunks][kChunks][kChunk<T>];
  const int part = blockIdx.x % kParts, cluster = blockIdx.x / kParts;
  const int column_blocks = ceil_div(channels, kColumns), image = cluster / column_blocks;
  const int first_column = cluster % column_blocks * kColumns, first = first_column + threadIdx.x % kChunks * kChunk<T>;
  const int share = ceil_div(pixels, kParts), begin = smaller(part * share, pixels);
  add_up_pixels<4>(input + (image * pixels + begin) * channels + first, {channels, smaller(kChunk<T>, channels - first), is_whole},
                   smaller(share, pixels - begin), tree);
  cluster_barrier();
  const int column = threadIdx.x * 4;
  if (part == 0 && column < kColumns) {
    const float* sums = &tree[0][0][0] + column;
    float4 quads[kParts];
#pragma unroll
    for (int other = 0; other < kParts; ++other) quads[other] = read_of_block(sums, other);
    float4 total = quads[0];
#pragma unroll
    for (int other = 1; other < kParts; ++other) add_quad(total, quads[other]);
    const float values[] = {total.x, total.y, total.z, total.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (first_column + column + i < channels) output[image * channels + first_column + column + i] = narrow<T>(values[i] / divisor);
    }
  }
  cluster_barrier();  // the first block reads the others' shared memory
}

bool accepts(const Pool2dShape& s) {
  return is_global(s) && is_large(s) && s.layout == Layout::nhwc && s.dtype != DType::float64 &&
         all_below(kMaxExtent, {product({s.batch, s.channels, kParts})});
}

Plan plan(const Pool2dShape& s) {
  return {kColumns, ceil_div<int64_t>(plane_size(s), kParts), s.batch * ceil_div<int64_t>(s.channels, kColumns) * kParts, 0};
}

void run(const Pool2dShape& s, const Pool2dBuffers& b, cudaStream_t stream) {
  with_single_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    const T* input = static_cast<const T*>(b.input);
    launch(global_avg_cluster<T>, Grid(plan(s).blocks, kBlockThreads, 0, kParts), stream, static_cast<int>(s.channels),
           static_cast<int>(plane_size(s)), has_whole_vectors<kChunk<T>>(input, s.channels), static_cast<float>(divisor(s)), input,
           static_cast<T*>(b.output));
  });
}

}  // namespace

extern const Pool2dKernel avg_pool2d_forward_global_cluster_sm90a = {"avg_pool2d_forward_global_cluster_sm90a",
                                                                     90,
                                                                     Pool2dOp::avg,
                                                                     Pool2dDirection::forward,
                                                                     accepts,
                                                                     plan,
                                                                     run,
                                                                     /*needs_proof=*/true,
                                                                     /*arch_specific=*/true};

}  // namespace cnn_ext::cuda
