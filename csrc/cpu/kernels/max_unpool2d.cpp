// Max unpooling, its derivatives, and the gradient of adaptive max pooling: values go to, or come from, the places that indices name.
//
// A task owns the whole plane that it writes to (nchw: one channel of one image; nhwc: some neighbouring channels of one image), so that
// where several values meet at one place they do so in the order of the outputs. What the memory allows is what there is to reach: an index
// is eight bytes, and its place is anywhere.
#include "cpu/kernels/sized_pool2d.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

// The channels [first, last) of one plane, `pixel` elements apart from position to position.
struct Part {
  int64_t plane, first, last;
};

// Channels of a task in nhwc: whole cache lines, unless there are too few images to go round.
int64_t channels_per_part(const SizedPool2dShape& s, int threads) {
  constexpr int64_t kLine = 16;
  if (s.layout == Layout::nchw) return 1;
  const int64_t shares = threads > 1 && s.batch > 0 ? (4 * static_cast<int64_t>(threads) + s.batch - 1) / s.batch : 1;
  const int64_t channels = (s.channels + shares - 1) / shares;
  return (channels + kLine - 1) / kLine * kLine;
}

int64_t parts_of(const SizedPool2dShape& s, int threads) {
  const int64_t per_part = channels_per_part(s, threads);
  return (pixel_of(s) + per_part - 1) / per_part;
}

// body(part) for every part of every plane.
template <class Body>
void for_each_part(const SizedPool2dShape& s, int threads, const Body& body) {
  const int64_t parts = parts_of(s, threads), per_part = channels_per_part(s, threads), pixel = pixel_of(s);
  parallel_for(threads, planes_of(s) * parts, [&](int, int64_t task) {
    const int64_t first = task % parts * per_part, last = first + per_part;
    body(Part{task / parts, first, last < pixel ? last : pixel});
  });
}

// visit(element of small, element of large) for every value of a part, in the order of the outputs.
template <class Visit>
void for_each_value(const SizedPool2dShape& s, const int64_t* indices, const Part& part, const Visit& visit) {
  const int64_t pixel = pixel_of(s), small = part.plane * s.out_h * s.out_w * pixel, large = part.plane * s.in_h * s.in_w * pixel;
  for (int64_t i = 0; i < s.out_h * s.out_w; ++i) {
    for (int64_t c = part.first; c < part.last; ++c) {
      const int64_t at = small + i * pixel + c;
      visit(at, large + indices[at] * pixel + c);
    }
  }
}

template <class T>
void fill_zeros(const SizedPool2dShape& s, T* large, const Part& part) {
  const int64_t pixel = pixel_of(s);
  T* plane = large + part.plane * s.in_h * s.in_w * pixel;
  for (int64_t i = 0; i < s.in_h * s.in_w; ++i) {
    for (int64_t c = part.first; c < part.last; ++c) plane[i * pixel + c] = T{0};
  }
}

template <class T, SizedPool2dDirection kDirection>
void move_values(const SizedPool2dShape& s, const SizedPool2dBuffers& b, int threads) {
  T *large = static_cast<T*>(b.large), *small = static_cast<T*>(b.small);
  for_each_part(s, threads, [&](const Part& part) {
    if constexpr (kDirection != SizedPool2dDirection::gather) fill_zeros(s, large, part);
    for_each_value(s, b.indices, part, [&](int64_t from, int64_t to) {
      if constexpr (kDirection == SizedPool2dDirection::forward) large[to] = small[from];
      if constexpr (kDirection == SizedPool2dDirection::scatter) large[to] += small[from];
      if constexpr (kDirection == SizedPool2dDirection::gather) small[from] = large[to];
    });
  });
}

Plan plan(const SizedPool2dShape& s, int threads) { return {channels_per_part(s, threads), 1, planes_of(s) * parts_of(s, threads), 0}; }

template <SizedPool2dDirection kDirection>
void run(const SizedPool2dShape& s, const SizedPool2dBuffers& b, void*, int threads) {
  (s.dtype == DType::float32 ? move_values<float, kDirection> : move_values<double, kDirection>)(s, b, threads);
}

}  // namespace

extern const SizedPool2dKernel max_unpool2d_forward_direct = {CNN_EXT_KERNEL_NAME("max_unpool2d_forward_direct"),
                                                              Isa::CNN_EXT_ISA,
                                                              SizedPool2dOp::max_unpool,
                                                              SizedPool2dDirection::forward,
                                                              accepts_float_and_double,
                                                              plan,
                                                              run<SizedPool2dDirection::forward>};
extern const SizedPool2dKernel max_unpool2d_scatter_direct = {CNN_EXT_KERNEL_NAME("max_unpool2d_scatter_direct"),
                                                              Isa::CNN_EXT_ISA,
                                                              SizedPool2dOp::max_unpool,
                                                              SizedPool2dDirection::scatter,
                                                              accepts_float_and_double,
                                                              plan,
                                                              run<SizedPool2dDirection::scatter>};
extern const SizedPool2dKernel max_unpool2d_gather_direct = {CNN_EXT_KERNEL_NAME("max_unpool2d_gather_direct"),
                                                             Isa::CNN_EXT_ISA,
                                                             SizedPool2dOp::max_unpool,
                                                             SizedPool2dDirection::gather,
                                                             accepts_float_and_double,
                                                             plan,
                                                             run<SizedPool2dDirection::gather>};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
