// The definition of adaptive pooling, of unpooling and of their derivatives, as loop nests: slow, for any shape, and the truth that every
// other row is tested against. Sums are kept in double.
#include <algorithm>
#include <limits>

#include "cpu/naive.h"
#include "cpu/parallel.h"
#include "cpu/sized_pool2d_kernel.h"

namespace cnn_ext::cpu::naive {
namespace {

struct Window {
  int64_t first, last;
  int64_t size() const { return last - first; }
};

Window window_of(int64_t out, int64_t in_size, int64_t out_size) {
  return {out * in_size / out_size, ((out + 1) * in_size + out_size - 1) / out_size};
}

// One plane (an image's channel) of a tensor.
template <class T>
struct Plane {
  T* data;
  Strides strides;
  T& at(int64_t h, int64_t w) const { return data[h * strides.h + w * strides.w]; }
};

template <class T>
Plane<T> plane_of(T* tensor, const SizedPool2dShape& s, int64_t h, int64_t w, int64_t plane) {
  const Strides t = strides_of(s.layout, s.channels, h, w);
  return {tensor + plane / s.channels * t.n + plane % s.channels * t.c, t};
}

// The planes of one image's channel in the three tensors.
template <class T>
struct Planes {
  Planes(const SizedPool2dShape& s, const SizedPool2dBuffers& b, int64_t plane)
      : large(plane_of(static_cast<T*>(b.large), s, s.in_h, s.in_w, plane)),
        small(plane_of(static_cast<T*>(b.small), s, s.out_h, s.out_w, plane)),
        indices(plane_of(b.indices, s, s.out_h, s.out_w, plane)) {}
  Plane<T> large, small;
  Plane<int64_t> indices;
};

// body(planes, oh, ow) for every element of `small`.
template <class T, class Body>
void for_each_small(const SizedPool2dShape& s, const Planes<T>& planes, const Body& body) {
  for (int64_t oh = 0; oh < s.out_h; ++oh) {
    for (int64_t ow = 0; ow < s.out_w; ++ow) body(planes, oh, ow);
  }
}

template <class T, class Visit>
void for_each_tap(const SizedPool2dShape& s, int64_t oh, int64_t ow, const Visit& visit) {
  const Window rows = window_of(oh, s.in_h, s.out_h), columns = window_of(ow, s.in_w, s.out_w);
  for (int64_t ih = rows.first; ih < rows.last; ++ih) {
    for (int64_t iw = columns.first; iw < columns.last; ++iw) visit(ih, iw);
  }
}

double window_size(const SizedPool2dShape& s, int64_t oh, int64_t ow) {
  return static_cast<double>(window_of(oh, s.in_h, s.out_h).size() * window_of(ow, s.in_w, s.out_w).size());
}

template <class T>
T rounded(double x) {
  return static_cast<T>(static_cast<Compute<T>>(x));
}

// Ties go to the first element, NaNs to the last one.
struct MaxForward {
  static constexpr bool kHasSums = false;
  template <class T>
  static void of(const SizedPool2dShape& s, const SizedPool2dBuffers& b, const Planes<T>& planes, double*) {
    for_each_small(s, planes, [&](const Planes<T>& p, int64_t oh, int64_t ow) {
      Compute<T> best = -std::numeric_limits<Compute<T>>::infinity();
      int64_t index = -1;
      for_each_tap<T>(s, oh, ow, [&](int64_t ih, int64_t iw) {
        const Compute<T> value = p.large.at(ih, iw);
        if (index >= 0 && !(value > best) && value == value) return;
        best = value;
        index = ih * s.in_w + iw;
      });
      p.small.at(oh, ow) = static_cast<T>(best);
      if (b.indices != nullptr) p.indices.at(oh, ow) = index;
    });
  }
};

struct AvgForward {
  static constexpr bool kHasSums = false;
  template <class T>
  static void of(const SizedPool2dShape& s, const SizedPool2dBuffers&, const Planes<T>& planes, double*) {
    for_each_small(s, planes, [&](const Planes<T>& p, int64_t oh, int64_t ow) {
      double sum = 0;
      for_each_tap<T>(s, oh, ow, [&](int64_t ih, int64_t iw) { sum += static_cast<double>(p.large.at(ih, iw)); });
      p.small.at(oh, ow) = rounded<T>(sum / window_size(s, oh, ow));
    });
  }
};

// Writes `large` from `sums`, as many as it has elements, that add() fills.
template <class T, class Add>
void write_sums(const SizedPool2dShape& s, const Plane<T>& large, double* sums, const Add& add) {
  std::fill_n(sums, s.in_h * s.in_w, 0.0);
  add();
  for (int64_t i = 0; i < s.in_h * s.in_w; ++i) large.at(i / s.in_w, i % s.in_w) = rounded<T>(sums[i]);
}

struct AvgBackward {
  static constexpr bool kHasSums = true;
  template <class T>
  static void of(const SizedPool2dShape& s, const SizedPool2dBuffers&, const Planes<T>& planes, double* sums) {
    write_sums(s, planes.large, sums, [&] {
      for_each_small(s, planes, [&](const Planes<T>& p, int64_t oh, int64_t ow) {
        const double share = static_cast<double>(p.small.at(oh, ow)) / window_size(s, oh, ow);
        for_each_tap<T>(s, oh, ow, [&](int64_t ih, int64_t iw) { sums[ih * s.in_w + iw] += share; });
      });
    });
  }
};

struct UnpoolForward {
  static constexpr bool kHasSums = true;
  template <class T>
  static void of(const SizedPool2dShape& s, const SizedPool2dBuffers&, const Planes<T>& planes, double* sums) {
    write_sums(s, planes.large, sums, [&] {
      for_each_small(s, planes, [&](const Planes<T>& p, int64_t oh, int64_t ow) {
        sums[p.indices.at(oh, ow)] = static_cast<double>(p.small.at(oh, ow));
      });
    });
  }
};

struct UnpoolScatter {
  static constexpr bool kHasSums = true;
  template <class T>
  static void of(const SizedPool2dShape& s, const SizedPool2dBuffers&, const Planes<T>& planes, double* sums) {
    write_sums(s, planes.large, sums, [&] {
      for_each_small(s, planes, [&](const Planes<T>& p, int64_t oh, int64_t ow) {
        sums[p.indices.at(oh, ow)] += static_cast<double>(p.small.at(oh, ow));
      });
    });
  }
};

struct UnpoolGather {
  static constexpr bool kHasSums = false;
  template <class T>
  static void of(const SizedPool2dShape& s, const SizedPool2dBuffers&, const Planes<T>& planes, double*) {
    for_each_small(s, planes, [&](const Planes<T>& p, int64_t oh, int64_t ow) {
      const int64_t index = p.indices.at(oh, ow);
      p.small.at(oh, ow) = p.large.at(index / s.in_w, index % s.in_w);
    });
  }
};

bool accepts(const SizedPool2dShape&) { return true; }

int64_t sums_of(const SizedPool2dShape& s) { return s.in_h * s.in_w; }  // of a worker

template <class Work>
Plan plan(const SizedPool2dShape& s, int threads) {
  return {1, 1, s.batch * s.channels, Work::kHasSums ? static_cast<size_t>(threads * sums_of(s)) * sizeof(double) : 0};
}

// Work::of() does one plane.
template <class Work>
void run(const SizedPool2dShape& s, const SizedPool2dBuffers& b, void* workspace, int threads) {
  with_scalar(s.dtype, [&](auto scalar) {
    using T = decltype(scalar);
    parallel_for(threads, s.batch * s.channels, [&](int worker, int64_t plane) {
      double* const sums = Work::kHasSums ? static_cast<double*>(workspace) + worker * sums_of(s) : nullptr;
      Work::of(s, b, Planes<T>(s, b, plane), sums);
    });
  });
}

template <class Work>
constexpr SizedPool2dKernel row(const char* name, SizedPool2dOp op, SizedPool2dDirection direction) {
  return {name, Isa::baseline, op, direction, accepts, plan<Work>, run<Work>};
}

}  // namespace

extern const SizedPool2dKernel adaptive_max_pool2d_forward =
    row<MaxForward>("adaptive_max_pool2d_forward_naive_baseline", SizedPool2dOp::adaptive_max, SizedPool2dDirection::forward);
extern const SizedPool2dKernel adaptive_avg_pool2d_forward =
    row<AvgForward>("adaptive_avg_pool2d_forward_naive_baseline", SizedPool2dOp::adaptive_avg, SizedPool2dDirection::forward);
extern const SizedPool2dKernel adaptive_avg_pool2d_backward =
    row<AvgBackward>("adaptive_avg_pool2d_backward_naive_baseline", SizedPool2dOp::adaptive_avg, SizedPool2dDirection::backward);
extern const SizedPool2dKernel max_unpool2d_forward =
    row<UnpoolForward>("max_unpool2d_forward_naive_baseline", SizedPool2dOp::max_unpool, SizedPool2dDirection::forward);
extern const SizedPool2dKernel max_unpool2d_scatter =
    row<UnpoolScatter>("max_unpool2d_scatter_naive_baseline", SizedPool2dOp::max_unpool, SizedPool2dDirection::scatter);
extern const SizedPool2dKernel max_unpool2d_gather =
    row<UnpoolGather>("max_unpool2d_gather_naive_baseline", SizedPool2dOp::max_unpool, SizedPool2dDirection::gather);

}  // namespace cnn_ext::cpu::naive
