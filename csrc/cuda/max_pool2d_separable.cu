// Max pooling forward of large windows with stride 1, by whole planes (pooling_planes.cuh): first the maxima of the rows of windows, then
// down the columns, so that a window of k x k costs 2 k comparisons. kStrip windows that are neighbours share the taps that they have in
// common, 1.3 to 2.3 comparisons in place of 4 for windows of 13 or 5.
//
// The columns of padding hold what lies at the edge, which belongs to the window as well: taking a tap twice changes nothing. A row's
// maximum carries its place, r * kernel_w + t if the window began in the input's first row.
//
// Not handled: dilation; strides; windows of fewer than kStrip taps along an axis, or of more than 256 taps; planes that do not fit.
#include "cuda/maximum.cuh"
#include "cuda/pooling_planes.cuh"

namespace cnn_ext::cuda {
namespace {

constexpr int kStrip = 4;

// The maxima of kStrip windows of `kernel` >= kStrip places, the first of which begins at `first`, each one place behind the last.
// read(place): the maximum of one place.
template <class Part, class Read>
__device__ void take_strip(int first, int kernel, const Read& read, Part (&windows)[kStrip]) {
  Part& common = windows[kStrip - 1];
  common = read(first + kStrip - 1);
#pragma unroll 4
  for (int place = first + kStrip; place < first + kernel; ++place) {
    const Part part = read(place);
    common.take(part.value, part.tap);
  }
#pragma unroll
  for (int i = kStrip - 2; i >= 0; --i) {
    windows[i] = read(first + i);
    windows[i].take(windows[i + 1].value, windows[i + 1].tap);
  }
  Part behind = read(first + kernel);
#pragma unroll
  for (int i = 1; i < kStrip; ++i) {
    if (i > 1) {
      const Part part = read(first + kernel + i - 1);
      behind.take(part.value, part.tap);
    }
    windows[i].take(behind.value, behind.tap);
  }
}

// Columns of a plane with its padding: all that strips of windows read.
constexpr int64_t padded_columns(const Pool2dShape& s) { return ceil_div<int64_t>(s.out_w, kStrip) * kStrip + s.kernel_w - 1; }

struct PlaneSizes {
  explicit PlaneSizes(const Pool2dShape& s)
      : padded_w(static_cast<int>(padded_columns(s))), in_h(static_cast<int>(s.in_h)), out_w(static_cast<int>(s.out_w)) {}
  FastDivisor padded_w, in_h, out_w;
};

template <class T, int kLanes>
__global__ void __launch_bounds__(kPlaneThreads<kLanes>)
    max_pool_planes(MaxForward<T> op, Pool2dGeometry g, PlaneSizes sizes, PlaneBlocks<kLanes> blocks, const T* __restrict__ input) {
  using Acc = Accumulate<T>;
  using Part = Maximum<Acc>;
  const auto planes = blocks.at(blockIdx.x);
  const int padded_w = sizes.padded_w.divisor(), padded_pitch = odd_pitch(padded_w) * kLanes, pitch = odd_pitch(g.out_w) * kLanes;
  Part* maxima = dynamic_shared<Part>();  // of the rows of windows
  Acc* values = reinterpret_cast<Acc*>(maxima + g.in_h * pitch);
  const T* source = input + planes.image * g.in_h * g.in_w * blocks.channels;
#pragma unroll 2
  for (int i = threadIdx.x; i < g.in_h * padded_w * kLanes; i += blockDim.x) {
    const int lane = i % kLanes, place = i / kLanes, h = sizes.padded_w.quotient(place), column = place - h * padded_w;
    const int pixel = h * g.in_w + clamp(column - g.pad_left, 0, g.in_w);
    values[h * padded_pitch + column * kLanes + lane] = widen(source[pixel * blocks.channels + blocks.channel_of(planes, lane)]);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < ceil_div(g.out_w, kStrip) * g.in_h * kLanes; i += blockDim.x) {
    const int lane = i % kLanes, line = i / kLanes, strip = sizes.in_h.quotient(line), h = line - strip * g.in_h;
    const Acc* row = values + h * padded_pitch + strip * kStrip * kLanes + lane;
    Part windows[kStrip];
    take_strip(0, g.kernel_w, [&](int column) { return Part(row[column * kLanes], column); }, windows);
    const int first_w = strip * kStrip - g.pad_left;
#pragma unroll
    for (int u = 0; u < kStrip; ++u) {
      if (strip * kStrip + u >= g.out_w) continue;
      const int tap = clamp(first_w + windows[u].tap, 0, g.in_w) - (first_w + u);
      maxima[h * pitch + (strip * kStrip + u) * kLanes + lane] = Part(windows[u].value, h * g.kernel_w + tap);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < ceil_div(g.out_h, kStrip) * g.out_w * kLanes; i += blockDim.x) {
    const int lane = i % kLanes, column = i / kLanes, strip = sizes.out_w.quotient(column), ow = column - strip * g.out_w;
    const int first_h = strip * kStrip - g.pad_top;
    Part windows[kStrip];
    take_strip(first_h, g.kernel_h, [&](int h) { return maxima[clamp(h, 0, g.in_h) * pitch + ow * kLanes + lane]; }, windows);
    const Range cols = taps_inside(ow - g.pad_left, 1, g.kernel_w, g.in_w);
#pragma unroll
    for (int u = 0; u < kStrip; ++u) {
      const int oh = strip * kStrip + u;
      if (oh >= g.out_h || planes.channel + lane >= blocks.channels) continue;
      const Range rows = taps_inside(first_h + u, 1, g.kernel_h, g.in_h);
      const bool is_empty = rows.begin >= rows.end || cols.begin >= cols.end;
      const Part window[] = {is_empty ? Part(0) : Part(windows[u].value, windows[u].tap - (first_h + u) * g.kernel_w)};
      op.write(((planes.image * g.out_h + oh) * g.out_w + ow) * blocks.channels + planes.channel + lane, window, 1, true);
    }
  }
}

size_t shared_bytes(const Pool2dShape& s, int64_t lanes) {
  size_t bytes = 0;
  with_element_type(s.dtype, [&](auto element) {
    using Acc = Accumulate<decltype(element)>;
    bytes = s.in_h * lanes *
            (odd_pitch(static_cast<int>(s.out_w)) * sizeof(Maximum<Acc>) + odd_pitch(static_cast<int>(padded_columns(s))) * sizeof(Acc));
  });
  return whole_chunks(bytes);
}

bool accepts(const Pool2dShape& s) {
  return suits_pool_strips(s) && s.stride_h == 1 && s.stride_w == 1 && s.kernel_h >= kStrip && s.kernel_w >= kStrip &&
         s.kernel_h * s.kernel_w <= 256 && fits_planes(s, shared_bytes);
}

Plan plan(const Pool2dShape& s) {
  Plan plan{};
  with_plane_lanes(s, shared_bytes, [&](auto lanes) { plan = {lanes, s.out_h * s.out_w, PlaneBlocks<lanes>(s).count(), 0}; });
  return plan;
}

void run(const Pool2dShape& s, const Pool2dBuffers& b, cudaStream_t stream) {
  with_element_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    const MaxForward<T> op{static_cast<T*>(b.output), static_cast<uint8_t*>(b.offsets), b.relu};
    with_plane_lanes(s, shared_bytes, [&](auto lanes) {
      const PlaneBlocks<lanes> blocks(s);
      launch(max_pool_planes<T, lanes>, Grid(blocks.count(), plane_threads(blocks), shared_bytes(s, lanes)), stream, op, Pool2dGeometry(s),
             PlaneSizes(s), blocks, static_cast<const T*>(b.input));
    });
  });
}

}  // namespace

extern const Pool2dKernel max_pool2d_forward_separable_sm80 = {
    "max_pool2d_forward_separable_sm80", 80, Pool2dOp::max, Pool2dDirection::forward, accepts, plan, run, /*needs_proof=*/true};

}  // namespace cnn_ext::cuda
