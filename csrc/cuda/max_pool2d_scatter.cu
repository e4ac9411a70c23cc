// Max pooling backward where many windows cover an input, by whole planes (pooling_planes.cuh). A window is looked at once: a thread goes
// along a row of windows and adds the gradient of each to the input that its offset names. Rows of windows do so at the same time, each
// into a slab of its own, the kernel_h rows of inputs below it. Then an input adds up what the slabs hold for it. No atomics: the windows
// of a row are added from left to right, then the rows from the top.
//
// Not handled: dilation; windows of more than 256 taps; planes whose slabs do not fit.
#include "cuda/pooling_backward.cuh"
#include "cuda/pooling_planes.cuh"

namespace cnn_ext::cuda {
namespace {

// What a window passes on, and where to in its slab.
template <class Acc>
struct Passed {
  Acc gradient;
  int place;
};

// Elements from a slab to the next one, for each lane: windows below each other with the same maximum add to different banks. Behind the
// rows there is at least one element for what is passed nowhere.
CNN_EXT_HOST_DEVICE constexpr int slab_pitch(int kernel_h, int in_w) { return in_w + (((kernel_h - 1) * in_w + 1) | 1); }

template <class Acc, int kLanes>
CNN_EXT_HOST_DEVICE constexpr int slab_chunks(int kernel_h, int in_w, int out_h) {
  return ceil_div(out_h * slab_pitch(kernel_h, in_w) * kLanes, kChunk<Acc>);
}

// Windows that a thread has read before it adds the first, and how many stand in a row of them, with some that pass nothing.
constexpr int kAhead = 4;
CNN_EXT_HOST_DEVICE constexpr int whole_row(int out_w) { return ceil_div(out_w, kAhead) * kAhead; }

struct ScatterSizes {
  explicit ScatterSizes(const Pool2dShape& s)
      : in_w(static_cast<int>(s.in_w)), row(whole_row(static_cast<int>(s.out_w))), kernel_w(static_cast<int>(s.kernel_w)) {}
  FastDivisor in_w, row, kernel_w;
};

template <class T, int kLanes>
__global__ void __launch_bounds__(kPlaneThreads<kLanes>)
    max_pool_scatter(Pool2dGeometry g, PoolStrides strides, ScatterSizes sizes, PlaneBlocks<kLanes> blocks,
                     const T* __restrict__ grad_output, const uint8_t* __restrict__ offsets, T* __restrict__ grad_input) {
  using Acc = Accumulate<T>;
  const auto planes = blocks.at(blockIdx.x);
  const int pitch = slab_pitch(g.kernel_h, g.in_w) * kLanes, chunks = slab_chunks<Acc, kLanes>(g.kernel_h, g.in_w, g.out_h);
  const int row = whole_row(g.out_w), row_pitch = odd_pitch(row) * kLanes;
  Acc* slabs = dynamic_shared<Acc>();
  Passed<Acc>* passed = reinterpret_cast<Passed<Acc>*>(slabs + chunks * kChunk<Acc>);
  for (int i = threadIdx.x; i < chunks; i += blockDim.x) store_vector(slabs + i * kChunk<Acc>, Vector<Acc, kChunk<Acc>>{});
  const int outputs = planes.image * g.out_h * g.out_w, nowhere = g.kernel_h * g.in_w;
#pragma unroll 2
  for (int i = threadIdx.x; i < g.out_h * row * kLanes; i += blockDim.x) {
    const int lane = i % kLanes, place = i / kLanes, oh = sizes.row.quotient(place), ow = place - oh * row;
    const int output = (outputs + oh * g.out_w + smaller(ow, g.out_w - 1)) * blocks.channels + blocks.channel_of(planes, lane);
    const int tap = offsets[output], r = sizes.kernel_w.quotient(tap);
    const int w = ow * g.stride_w - g.pad_left + tap - r * g.kernel_w;
    const bool exists = ow < g.out_w && r < g.kernel_h && w >= 0 && w < g.in_w;
    passed[oh * row_pitch + ow * kLanes + lane] = {widen(grad_output[output]), (exists ? r * g.in_w + w : nowhere) * kLanes};
  }
  __syncthreads();
  for (int i = threadIdx.x; i < g.out_h * kLanes; i += blockDim.x) {
    const int lane = i % kLanes, oh = i / kLanes;
    const Passed<Acc>* windows = passed + oh * row_pitch + lane;
    Acc* slab = slabs + oh * pitch + lane;
    for (int first = 0; first < row; first += kAhead) {
      Passed<Acc> ahead[kAhead];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) ahead[a] = windows[(first + a) * kLanes];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) slab[ahead[a].place] += ahead[a].gradient;
    }
  }
  __syncthreads();
  const int inputs = planes.image * g.in_h * g.in_w;
  for (int i = threadIdx.x; i < g.in_h * g.in_w * kLanes; i += blockDim.x) {
    const int lane = i % kLanes, pixel = i / kLanes, h = sizes.in_w.quotient(pixel), w = pixel - h * g.in_w;
    const int padded_h = h + g.pad_top;
    const Range rows = windows_over(padded_h, strides.h, g.kernel_h, g.out_h);
    Acc sum = 0;
#pragma unroll 4
    for (int oh = rows.begin; oh < rows.end; ++oh) {
      sum += slabs[oh * pitch + ((padded_h - oh * g.stride_h) * g.in_w + w) * kLanes + lane];
    }
    if (planes.channel + lane < blocks.channels) {
      grad_input[(inputs + pixel) * blocks.channels + planes.channel + lane] = narrow<T>(sum);
    }
  }
}

size_t shared_bytes(const Pool2dShape& s, int64_t lanes) {
  const int64_t slabs = s.out_h * slab_pitch(static_cast<int>(s.kernel_h), static_cast<int>(s.in_w)) * lanes;
  const int64_t windows = s.out_h * odd_pitch(whole_row(static_cast<int>(s.out_w))) * lanes;
  size_t bytes = 0;
  with_element_type(s.dtype, [&](auto element) {
    using Acc = Accumulate<decltype(element)>;
    bytes = whole_chunks(slabs * sizeof(Acc)) + whole_chunks(windows * sizeof(Passed<Acc>));
  });
  return bytes;
}

constexpr int64_t kLeastWindows = 16;  // over an input: fewer are gathered as fast

bool accepts(const Pool2dShape& s) {
  const int64_t taps = s.kernel_h * s.kernel_w;
  return suits_pool_strips(s) && taps <= 256 && taps / kLeastWindows >= s.stride_h * s.stride_w && fits_planes(s, shared_bytes);
}

Plan plan(const Pool2dShape& s) {
  Plan plan{};
  with_plane_lanes(s, shared_bytes, [&](auto lanes) { plan = {lanes, s.in_h * s.in_w, PlaneBlocks<lanes>(s).count(), 0}; });
  return plan;
}

void run(const Pool2dShape& s, const Pool2dBuffers& b, cudaStream_t stream) {
  with_element_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    with_plane_lanes(s, shared_bytes, [&](auto lanes) {
      const PlaneBlocks<lanes> blocks(s);
      launch(max_pool_scatter<T, lanes>, Grid(blocks.count(), plane_threads(blocks), shared_bytes(s, lanes)), stream, Pool2dGeometry(s),
             PoolStrides(s), ScatterSizes(s), blocks, static_cast<const T*>(b.grad_output), static_cast<const uint8_t*>(b.offsets),
             static_cast<T*>(b.grad_input));
    });
  });
}

}  // namespace

extern const Pool2dKernel max_pool2d_backward_scatter_sm80 = {
    "max_pool2d_backward_scatter_sm80", 80, Pool2dOp::max, Pool2dDirection::backward, accepts, plan, run, /*needs_proof=*/true};

}  // namespace cnn_ext::cuda
