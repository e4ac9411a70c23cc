// Unpooling. A block writes stretches of planes of the larger tensor, one after the other. Several elements of the smaller one may name a
// place of it: in each pass a place takes the first one that it has not taken yet, until none takes any, so that they come in their order
// without an atomic addition. Mostly that is one pass, and one more that finds nothing. gather is a thread per element. An index outside
// the plane is ignored, and gather reads 0 there: to refuse it would have to wait for the device.
#include "cuda/primitives.cuh"
#include "cuda/sized_pool2d.cuh"

namespace cnn_ext::cuda {
namespace {

constexpr int kThreadPlaces = 4;
constexpr int kPlaces = kThreadPlaces * kBlockThreads;  // of a block

constexpr int kOutputs = 1 << 14;  // that are looked through at a time, and numbered from their first one

// kAdds: a place is the sum of its elements, else the last one of them.
template <class T, bool kAdds>
__device__ void unpool_stretch(const SizedPool2dGeometry& g, int64_t plane, int64_t first, const T* small, const int64_t* indices,
                               T* large) {
  __shared__ int taken[kPlaces], next[kPlaces];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t image = plane / g.channels, channel = plane % g.channels;
  const int64_t small_plane = image * g.small.n + channel * g.small.c;
  const int64_t outputs = g.out_h * g.out_w, places = g.in_h * g.in_w;
  Accumulate<T> values[kThreadPlaces] = {};
  for (int64_t begin = 0; begin < outputs; begin += kOutputs) {
    const int64_t first_output = small_plane + begin * g.small.w;
    const int count = static_cast<int>(smaller<int64_t>(kOutputs, outputs - begin));
    for (int i = 0; i < kThreadPlaces; ++i) taken[i * kBlockThreads + thread] = -1;
    for (bool found = true; found;) {
      for (int i = 0; i < kThreadPlaces; ++i) next[i * kBlockThreads + thread] = count;
      __syncthreads();
      for (int o = thread; o < count; o += kBlockThreads) {
        const int64_t place = indices[first_output + o * g.small.w] - first;
        if (place >= 0 && place < kPlaces && o > taken[place]) atomic_min(&next[place], o);
      }
      __syncthreads();
      found = false;
      for (int i = 0; i < kThreadPlaces; ++i) {
        const int place = i * kBlockThreads + thread, o = next[place];
        if (o == count) continue;
        const Accumulate<T> value = widen(small[first_output + o * g.small.w]);
        values[i] = kAdds ? values[i] + value : value;
        taken[place] = o;
        found = true;
      }
      found = __syncthreads_or(found) != 0;
    }
  }
  for (int i = 0; i < kThreadPlaces; ++i) {
    const int64_t place = first + i * kBlockThreads + thread;
    if (place < places) large[image * g.large.n + channel * g.large.c + place * g.large.w] = narrow<T>(values[i]);
  }
}

template <class T, bool kAdds>
__global__ void unpool(SizedPool2dGeometry g, int64_t stretches, const T* __restrict__ small, const int64_t* __restrict__ indices,
                       T* __restrict__ large) {
  for (int64_t task = blockIdx.x; task < g.planes * stretches; task += gridDim.x) {
    unpool_stretch<T, kAdds>(g, task / stretches, task % stretches * kPlaces, small, indices, large);
  }
}

template <class T>
__global__ void unpool_gather(SizedPool2dGeometry g, const T* __restrict__ large, const int64_t* __restrict__ indices,
                              T* __restrict__ small) {
  const int64_t index = element_index();
  if (index >= g.small_elements) return;
  const ElementOf<int64_t> o = element_at(g.layout, index, g.channels, g.out_h, g.out_w);
  const int64_t place = indices[index];
  const bool inside = place >= 0 && place < g.in_h * g.in_w;
  small[index] = inside ? large[o.n * g.large.n + o.c * g.large.c + place * g.large.w] : narrow<T>(0);
}

int64_t stretches_of(const SizedPool2dShape& s) { return ceil_div<int64_t>(s.in_h * s.in_w, kPlaces); }

Plan plan_unpool(const SizedPool2dShape& s) {
  return {1, kPlaces, smaller<int64_t>(s.batch * s.channels * stretches_of(s), kMostGridBlocks), 0};
}

template <bool kAdds>
void run_unpool(const SizedPool2dShape& s, const SizedPool2dBuffers& b, cudaStream_t stream) {
  with_element_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    launch(unpool<T, kAdds>, plan_unpool(s).blocks, stream, SizedPool2dGeometry(s), stretches_of(s), static_cast<const T*>(b.small),
           b.indices, static_cast<T*>(b.large));
  });
}

void run_gather(const SizedPool2dShape& s, const SizedPool2dBuffers& b, cudaStream_t stream) {
  with_element_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    const SizedPool2dGeometry g(s);
    launch_elementwise(unpool_gather<T>, g.small_elements, stream, g, static_cast<const T*>(b.large), b.indices, static_cast<T*>(b.small));
  });
}

Plan plan_gather(const SizedPool2dShape& s) { return {1, 1, ceil_div<int64_t>(SizedPool2dGeometry(s).small_elements, kBlockThreads), 0}; }

}  // namespace

extern const SizedPool2dKernel max_unpool2d_forward_direct_sm80 = {"max_unpool2d_forward_direct_sm80",
                                                                   80,
                                                                   SizedPool2dOp::max_unpool,
                                                                   SizedPool2dDirection::forward,
                                                                   has_any_extents,
                                                                   plan_unpool,
                                                                   run_unpool<false>};
extern const SizedPool2dKernel max_unpool2d_scatter_direct_sm80 = {"max_unpool2d_scatter_direct_sm80",
                                                                   80,
                                                                   SizedPool2dOp::max_unpool,
                                                                   SizedPool2dDirection::scatter,
                                                                   has_any_extents,
                                                                   plan_unpool,
                                                                   run_unpool<true>};
extern const SizedPool2dKernel max_unpool2d_gather_direct_sm80 = {"max_unpool2d_gather_direct_sm80",
                                                                  80,
                                                                  SizedPool2dOp::max_unpool,
                                                                  SizedPool2dDirection::gather,
                                                                  has_any_extents,
                                                                  plan_gather,
                                                                  run_gather};

}  // namespace cnn_ext::cuda
