// Max pooling forward of large windows with stride 1, by whole planes (pooling_planes.cuh): first the maxima of the rows of windows, then
// down the columns, so that a window of k x k costs 2 k comparisons. kStrip windows that are neighbours share the taps that they have in
// common, 1.3 to 2.3 comparisons in place of 4 for windows of 13 or 5.
//
// A part's maximum carries its place in the plane. Taps outside the input are read at its edge, which belongs to the window as well: taking
// a tap twice changes nothing.
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

struct PlaneSizes {
  explicit PlaneSizes(const Pool2dShape& s)
      : in_h(static_cast<int>(s.in_h)), in_w(static_cast<int>(s.in_w)), out_w(static_cast<int>(s.out_w)) {}
  FastDivisor in_h, in_w, out_w;
};

template <class T, int kLanes>
__global__ void __launch_bounds__(kBlockThreads)
    max_pool_planes(MaxForward<T> op, Pool2dGeometry g, PlaneSizes sizes, PlaneBlocks<kLanes> blocks, const T* __restrict__ input) {
  using Acc = Accumulate<T>;
  using Part = Maximum<Acc>;
  const auto planes = blocks.at(blockIdx.x);
  const int in_pitch = odd_pitch(g.in_w) * kLanes, part_pitch = odd_pitch(g.out_w) * kLanes;
  Acc* values = dynamic_shared<Acc>();
  Acc* maxima = values + g.in_h * in_pitch;
  uint8_t* taps = reinterpret_cast<uint8_t*>(maxima + g.in_h * part_pitch);  // of the maxima, in their rows of their windows
  const T* source = input + planes.image * g.in_h * g.in_w * blocks.channels;
#pragma unroll 2
  for (int i = threadIdx.x; i < g.in_h * g.in_w * kLanes; i += kBlockThreads) {
    const int lane = i % kLanes, pixel = i / kLanes, h = sizes.in_w.quotient(pixel), w = pixel - h * g.in_w;
    values[h * in_pitch + w * kLanes + lane] = widen(source[pixel * blocks.channels + blocks.channel_of(planes, lane)]);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < ceil_div(g.out_w, kStrip) * g.in_h * kLanes; i += kBlockThreads) {
    const int lane = i % kLanes, line = i / kLanes, strip = sizes.in_h.quotient(line), h = line - strip * g.in_h;
    const int first = strip * kStrip - g.pad_left;
    const Acc* row = values + h * in_pitch + lane;
    Part windows[kStrip];
    take_strip(
        first, g.kernel_w,
        [&](int w) {
          const int inside = clamp(w, 0, g.in_w);
          return Part(row[inside * kLanes], inside);
        },
        windows);
#pragma unroll
    for (int u = 0; u < kStrip; ++u) {
      const int ow = strip * kStrip + u, part = h * part_pitch + ow * kLanes + lane;
      if (ow >= g.out_w) continue;
      maxima[part] = windows[u].value;
      taps[part] = static_cast<uint8_t>(windows[u].tap - (first + u));
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < ceil_div(g.out_h, kStrip) * g.out_w * kLanes; i += kBlockThreads) {
    const int lane = i % kLanes, column = i / kLanes, strip = sizes.out_w.quotient(column), ow = column - strip * g.out_w;
    const int first = strip * kStrip - g.pad_top;
    Part windows[kStrip];
    take_strip(
        first, g.kernel_h,
        [&](int h) {
          const int inside = clamp(h, 0, g.in_h), part = inside * part_pitch + ow * kLanes + lane;
          return Part(maxima[part], inside * g.kernel_w + taps[part]);
        },
        windows);
    const Range cols = taps_inside(ow - g.pad_left, 1, g.kernel_w, g.in_w);
#pragma unroll
    for (int u = 0; u < kStrip; ++u) {
      const int oh = strip * kStrip + u;
      if (oh >= g.out_h || planes.channel + lane >= blocks.channels) continue;
      const Range rows = taps_inside(first + u, 1, g.kernel_h, g.in_h);
      const bool is_empty = rows.begin >= rows.end || cols.begin >= cols.end;
      const Part window[] = {is_empty ? Part(0) : Part(windows[u].value, windows[u].tap - (first + u) * g.kernel_w)};
      op.write(((planes.image * g.out_h + oh) * g.out_w + ow) * blocks.channels + planes.channel + lane, window, 1, true);
    }
  }
}

size_t shared_bytes(const Pool2dShape& s, int64_t lanes) {
  const int64_t parts = s.in_h * odd_pitch(static_cast<int>(s.out_w));
  size_t bytes = 0;
  with_element_type(s.dtype, [&](auto element) {
    bytes = (s.in_h * odd_pitch(static_cast<int>(s.in_w)) + parts) * lanes * sizeof(Accumulate<decltype(element)>);
  });
  return whole_chunks(bytes + parts * lanes);
}

bool accepts(const Pool2dShape& s) {
  return suits_pool_strips(s) && s.stride_h == 1 && s.stride_w == 1 && s.kernel_h >= kStrip && s.kernel_w >= kStrip &&
         s.kernel_h * s.kernel_w <= 256 && all_below(kMostPlaneBytes, {s.in_h, s.in_w, s.out_w}) &&
         shared_bytes(s, kFewLanes) <= kMostPlaneBytes;
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
      launch(max_pool_planes<T, lanes>, Grid(blocks.count(), kBlockThreads, shared_bytes(s, lanes)), stream, op, Pool2dGeometry(s),
             PlaneSizes(s), blocks, static_cast<const T*>(b.input));
    });
  });
}

}  // namespace

extern const Pool2dKernel max_pool2d_forward_separable_sm80 = {
    "max_pool2d_forward_separable_sm80", 80, Pool2dOp::max, Pool2dDirection::forward, accepts, plan, run, /*needs_proof=*/true};

}  // namespace cnn_ext::cuda
