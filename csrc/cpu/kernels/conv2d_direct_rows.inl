// The functions of a row of gather convolutions in float32 and float64.
#pragma once

#include "cpu/kernels/conv2d_direct_gathers.inl"

namespace {

// From tensor to tensor.
template <class T, Conv2dDirection kDirection>
struct TensorEnds {
  using Source = TensorSource<T>;
  using Sink = TensorSink<T>;
  static constexpr bool kForward = kDirection == Conv2dDirection::forward;

  int64_t count() const { return gather_count(kDirection, shape); }
  Gather gather(int64_t i) const { return make_gather(kDirection, shape, i); }
  Source source(const Gather& g) const { return {static_cast<const T*>(kForward ? buffers.input : buffers.grad_output), g.source}; }
  Sink sink(const Gather& g) const { return {g, static_cast<T*>(kForward ? buffers.output : buffers.grad_input), false}; }

  const Conv2dShape& shape;
  const Conv2dBuffers& buffers;
};

// The functions of a table row of one type.
template <class T, class Tile, Conv2dDirection kDirection>
struct GatherRow {
  static Plan plan(const Conv2dShape& s, int threads) { return plan_gathers<T, Tile>(TensorEnds<T, kDirection>{s, {}}, threads); }
  static Outcome run_packed(const Conv2dShape& s, const Conv2dBuffers& buffers, Packed packed, void* workspace, int threads) {
    const TensorEnds<T, kDirection> ends{s, buffers};
    const T* bias = static_cast<const T*>(buffers.bias);
    return run_gathers<T, Tile>(ends, static_cast<const T*>(buffers.weight), bias, packed, workspace, threads);
  }
  static Outcome run(const Conv2dShape& s, const Conv2dBuffers& buffers, void* workspace, int threads) {
    return run_packed(s, buffers, {}, workspace, threads);
  }
  static PackedForm form(const Conv2dShape& s) { return packed_form<T, Tile>(make_gather(kDirection, s, 0)); }
};

template <template <class> class Tile, Conv2dDirection kDirection>
struct FloatingRow {
  using Float = GatherRow<float, Tile<float>, kDirection>;
  using Double = GatherRow<double, Tile<double>, kDirection>;

  static bool is_float(const Conv2dShape& s) { return s.dtype == cnn_ext::DType::float32; }
  static Plan plan(const Conv2dShape& s, int threads) { return (is_float(s) ? Float::plan : Double::plan)(s, threads); }
  static Outcome run(const Conv2dShape& s, const Conv2dBuffers& b, void* workspace, int threads) {
    return (is_float(s) ? Float::run : Double::run)(s, b, workspace, threads);
  }
  static PackedForm form(const Conv2dShape& s) { return (is_float(s) ? Float::form : Double::form)(s); }
  static Outcome run_packed(const Conv2dShape& s, const Conv2dBuffers& b, Packed packed, void* workspace, int threads) {
    return (is_float(s) ? Float::run_packed : Double::run_packed)(s, b, packed, workspace, threads);
  }
};

}  // namespace
