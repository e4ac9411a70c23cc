// Unpooling. A block writes a stretch of a plane of the larger tensor. Several elements of the smaller one may name a place of it: in each
// pass a place takes the first one that it has not taken yet, until none takes any, so that they come in their order without an atomic
// addition. Mostly that is one pass, and one more that finds nothing. gather is a thread per element. An index outside the plane is
// ignored, and gather reads 0 there: to refuse it would have to wait for the device.
#include "cuda/primitives.cuh"
#include "cuda/sized_pool2d.cuh"

namespace cnn_ext::cuda {
namespace {

constexpr int kThreadPlaces = 4;
constexpr int kPlaces = kThreadPlaces * kBlockThreads;  // of a block

// kAdds: a place is the sum of its elements, else the last one of them.
template <class T, bool kAdds>
__global__ void unpool(SizedPool2dGeometry g, int stretches, const T* __restrict__ small, const int64_t* __restrict__ indices,
                       T* __restrict__ large) {
  __shared__ int taken[kPlaces], next[kPlaces];
  const int64_t plane = blockIdx.x / stretches;
  const int first = static_cast<int>(blockIdx.x % stretches) * kPlaces, thread = static_cast<int>(threadIdx.x);
  const int64_t image = plane / g.channels, channel = plane % g.channels;
  const int64_t small_plane = image * g.small.n + channel * g.small.c;
  const int outputs = g.out_h * g.out_w, places = g.in_h * g.in_w;
  Accumulate<T> values[kThreadPlaces] = {};
  for (int i = 0; i < kThreadPlaces; ++i) taken[i * kBlockThreads + thread] = -1;
  for (bool found = true; found;) {
    for (int i = 0; i < kThreadPlaces; ++i) next[i * kBlockThreads + thread] = outputs;
    __syncthreads();
    for (int o = thread; o < outputs; o += kBlockThreads) {
      const int64_t place = indices[small_plane + o * g.small.w] - first;
      if (place >= 0 && place < kPlaces && o > taken[place]) atomic_min(&next[place], o);
    }
    __syncthreads();
    found = false;
    for (int i = 0; i < kThreadPlaces; ++i) {
      const int place = i * kBlockThreads + thread, o = next[place];
      if (o == outputs) continue;
      const Accumulate<T> value = widen(small[small_plane + o * g.small.w]);
      values[i] = kAdds ? values[i] + value : value;
      taken[place] = o;
      found = true;
    }
    found = __syncthreads_or(found) != 0;
  }
  for (int i = 0; i < kThreadPlaces; ++i) {
    const int place = first + i * kBlockThreads + thread;
    if (place < places) large[image * g.large.n + channel * g.large.c + place * g.large.w] = narrow<T>(values[i]);
  }
}

template <class T>
__global__ void unpool_gather(SizedPool2dGeometry g, const T* __restrict__ large, const int64_t* __restrict__ indices,
                              T* __restrict__ small) {
  const int64_t index = element_index();
  if (index >= g.small_elements) return;
  const Element o = element_at(g.layout, index, g.channels, g.out_h, g.out_w);
  const int64_t place = indices[index];
  const bool inside = place >= 0 && place < static_cast<int64_t>(g.in_h) * g.in_w;
  small[index] = inside ? large[o.n * g.large.n + o.c * g.large.c + place * g.large.w] : narrow<T>(0);
}

int64_t stretches_of(const SizedPool2dShape& s) { return ceil_div<int64_t>(s.in_h * s.in_w, kPlaces); }

template <bool kAdds>
void run_unpool(const SizedPool2dShape& s, const SizedPool2dBuffers& b, cudaStream_t stream) {
  with_element_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    const SizedPool2dGeometry g(s);
    const int64_t stretches = stretches_of(s);
    launch(unpool<T, kAdds>, g.planes * stretches, stream, g, static_cast<int>(stretches), static_cast<const T*>(b.small), b.indices,
           static_cast<T*>(b.large));
  });
}

void run_gather(const SizedPool2dShape& s, const SizedPool2dBuffers& b, cudaStream_t stream) {
  with_element_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    const SizedPool2dGeometry g(s);
    launch_elementwise(unpool_gather<T>, g.small_elements, stream, g, static_cast<const T*>(b.large), b.indices, static_cast<T*>(b.small));
  });
}

Plan plan_unpool(const SizedPool2dShape& s) { return {1, kPlaces, s.batch * s.channels * stretches_of(s), 0}; }
Plan plan_gather(const SizedPool2dShape& s) { return {1, 1, ceil_div<int64_t>(SizedPool2dGeometry(s).small_elements, kBlockThreads), 0}; }

}  // namespace

extern const SizedPool2dKernel max_unpool2d_forward_direct_sm80 = {"max_unpool2d_forward_direct_sm80",
                                                                   80,
                                                                   SizedPool2dOp::max_unpool,
                                                                   SizedPool2dDirection::forward,
                                                                   has_int_extents,
                                                                   plan_unpool,
                                                                   run_unpool<false>};
extern const SizedPool2dKernel max_unpool2d_scatter_direct_sm80 = {"max_unpool2d_scatter_direct_sm80",
                                                                   80,
                                                                   SizedPool2dOp::max_unpool,
                                                                   SizedPool2dDirection::scatter,
                                                                   has_int_extents,
                                                                   plan_unpool,
                                                                   run_unpool<true>};
extern const SizedPool2dKernel max_unpool2d_gather_direct_sm80 = {"max_unpool2d_gather_direct_sm80",
                                                                  80,
                                                                  SizedPool2dOp::max_unpool,
                                                                  SizedPool2dDirection::gather,
                                                                  has_int_extents,
                                                                  plan_gather,
                                                                  run_gather};

}  // namespace cnn_ext::cuda
