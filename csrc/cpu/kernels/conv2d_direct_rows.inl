// The functions of a row of gather convolutions in float32 and float64.
#pragma once

#include "cpu/kernels/conv2d_direct_run.inl"

namespace {

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
