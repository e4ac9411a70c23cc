// The partial sums of backward_weight on sm_90a (backward_weight_wgmma.cuh), and the launch that adds up those of the clusters.
#pragma once

#include "cuda/sm90a/overlap.cuh"
#include "cuda/sm90a/weight_division.cuh"
#include "cuda/sm90a/wgmma.cuh"

namespace cnn_ext::cuda {

// What stands for a pixel of the depth in the patch row: a rectangle of an image (conv2d_backward_weight_patch_wgmma.cu). Elsewhere it is
// one pixel.
struct WeightRectangle {
  int lines, width, columns;  // columns: rectangles beside each other
  int pitch, positions;       // of a line in shared memory; of a step
  int stage_bytes;
};

template <class T>
struct WeightProblem {
  CUtensorMap grad_output_map, input_map;
  const T* grad_output;
  const T* input;
  float* partials;  // [cluster][output channel][panel][channel]; null: sums are stored at once
  T* grad_weight;
  Conv2dGeometry g;
  Strides in, out;
  int panels_of_tap, panels, pixels, split_pixels;
  int group_row_tiles, col_tiles, clusters, cluster_blocks, stages;  // clusters: that share the pixels
  FastDivisor tap_decoder, width_decoder;
  bool stores_quads;  // whether four neighbouring channels of the result are neighbours and aligned
  PlaneDecoder pixel_decoder;
  WeightRectangle rectangle;
};

// A panel of the columns: some channels of one tap, those of a group. Numbered by row of taps, channels, tap of the row.
struct Panel {
  int first_channel, r, s;
};

template <class T>
__device__ Panel panel_at(const WeightProblem<T>& p, int panel, int panel_channels) {
  const int rest = p.width_decoder.quotient(panel), r = p.tap_decoder.quotient(rest);
  return {(rest - r * p.panels_of_tap) * panel_channels, r, panel - rest * p.g.kernel_w};
}

template <class T>
struct alignas(4 * sizeof(T)) WeightQuad {
  T values[4];
};

// Four neighbouring channels of a panel -> the result, as far as they exist. k: among all output channels.
template <class T>
__device__ void store_quad(const WeightProblem<T>& p, int k, const Panel& panel, int channel, const float4& quad) {
  T* target = p.grad_weight + k * p.g.filter.n + channel * p.g.filter.c + panel.r * p.g.filter.h + panel.s * p.g.filter.w;
  const WeightQuad<T> weights{{narrow<T>(quad.x), narrow<T>(quad.y), narrow<T>(quad.z), narrow<T>(quad.w)}};
  if (p.stores_quads) {
    if (channel < p.g.group_in) *reinterpret_cast<WeightQuad<T>*>(target) = weights;
    return;
  }
#pragma unroll
  for (int e = 0; e < 4 && channel + e < p.g.group_in; ++e) target[e * p.g.filter.c] = weights.values[e];
}

// A thread adds up four sums; a few threads share their clusters where there are many (sum_lanes).
template <class T, int kPanelChannels>
__global__ void __launch_bounds__(kBlockThreads) sum_clusters(const __grid_constant__ WeightProblem<T> p, int quads, int lanes) {
  __shared__ float4 shares[kBlockThreads];
  const int width = kBlockThreads / lanes, lane = threadIdx.x / width, index = blockIdx.x * width + threadIdx.x % width;
  wait_for_launch_before();
  float4 sum = make_float4(0, 0, 0, 0);
  if (index < quads) {
    const float4* partials = reinterpret_cast<const float4*>(p.partials) + index;
#pragma unroll 8
    for (int cluster = lane; cluster < p.clusters; cluster += lanes) add_quad(sum, partials[static_cast<int64_t>(cluster) * quads]);
  }
  shares[threadIdx.x] = sum;
  __syncthreads();
  if (lane > 0 || index >= quads) return;
  for (int other = 1; other < lanes; ++other) add_quad(sum, shares[other * width + threadIdx.x]);
  const int line = p.panels * (kPanelChannels / 4), k = index / line, col = (index - k * line) * 4;
  const Panel panel = panel_at(p, col / kPanelChannels, kPanelChannels);
  store_quad(p, k, panel, panel.first_channel + col % kPanelChannels, sum);
}

// The same for weights in nchw: a block adds up some channels of all taps of one output channel, and puts taps innermost in shared memory,
// so that neighbours are written together.
template <class T, int kPanelChannels>
__global__ void __launch_bounds__(kBlockThreads) sum_clusters_to_planes(const __grid_constant__ WeightProblem<T> p) {
  constexpr int kQuads = kPanelChannels / 4, kTapsAtOnce = kBlockThreads / kQuads;
  T* weights = dynamic_shared<T>();  // [channel][tap]
  const int k = blockIdx.x / p.panels_of_tap, channel_panel = blockIdx.x % p.panels_of_tap, first_channel = channel_panel * kPanelChannels;
  const int taps = p.g.kernel_h * p.g.kernel_w, channel = threadIdx.x % kQuads * 4;
  const int64_t line = static_cast<int64_t>(p.panels) * kPanelChannels, sums = line * p.g.group_out * p.g.groups;
  wait_for_launch_before();
  for (int tap = threadIdx.x / kQuads; tap < taps; tap += kTapsAtOnce) {
    const int r = p.width_decoder.quotient(tap), s = tap - r * p.g.kernel_w;
    const int panel = (r * p.panels_of_tap + channel_panel) * p.g.kernel_w + s;
    const float* source = p.partials + k * line + panel * kPanelChannels + channel;
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 4
    for (int cluster = 0; cluster < p.clusters; ++cluster) {
      const float4 part = *reinterpret_cast<const float4*>(source + cluster * sums);
      add_quad(sum, part);
    }
    T* target = weights + channel * taps + tap;
    target[0] = narrow<T>(sum.x), target[taps] = narrow<T>(sum.y), target[2 * taps] = narrow<T>(sum.z), target[3 * taps] = narrow<T>(sum.w);
  }
  __syncthreads();
  const int count = smaller(kPanelChannels, p.g.group_in - first_channel) * taps;
  T* target = p.grad_weight + k * p.g.filter.n + first_channel * p.g.filter.c;
  for (int i = threadIdx.x; i < count; i += kBlockThreads) target[i] = weights[i];
}

template <class T, int kPanelChannels>
void launch_cluster_sums(const WeightProblem<T>& problem, const WeightDivision& d, cudaStream_t stream) {
  if (d.transposes) {
    const int64_t bytes = kPanelChannels * problem.g.kernel_h * problem.g.kernel_w * static_cast<int64_t>(sizeof(T));
    const Grid grid(problem.g.group_out * problem.g.groups * d.panels_of_tap, kBlockThreads, static_cast<size_t>(bytes));
    launch(sum_clusters_to_planes<T, kPanelChannels>, overlapping(grid), stream, problem);
    return;
  }
  const int lanes = sum_lanes({problem.clusters, d.splits.size});
  const int quads = static_cast<int>(d.sums / 4);
  launch(sum_clusters<T, kPanelChannels>, overlapping(Grid(ceil_div(quads, kBlockThreads / lanes))), stream, problem, quads, lanes);
}

}  // namespace cnn_ext::cuda
