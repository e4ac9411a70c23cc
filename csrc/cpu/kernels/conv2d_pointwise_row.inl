// The functions of a 1x1 convolution's table rows: which layers they take, and with which register tile.
#pragma once

#include "cpu/kernels/conv2d_pointwise_exchanged.inl"
#include "cpu/kernels/conv2d_pointwise_few.inl"
#include "cpu/kernels/conv2d_pointwise_run.inl"

namespace {

using cnn_ext::Conv2dBuffers;
using cnn_ext::cpu::Outcome;
using cnn_ext::cpu::PackedForm;

template <class T>
void fill_zeros(T* p, int64_t count, int threads) {
  constexpr int64_t kChunk = 1 << 16;
  parallel_for(threads, divide_up(count, kChunk), [&](int, int64_t i) {
    const int64_t end = smaller(count, (i + 1) * kChunk);
    for (int64_t j = i * kChunk; j < end; ++j) p[j] = T(0);
  });
}

// Whether points belong in the lanes: compares what both tiles pay for a line, in FMA slots.
template <class T>
bool prefers_point_lanes(const Product& p) {
  if constexpr (kClosesGaps) {
    if (closes_gaps(p) || fills_gaps(p)) return p.points > kWholePlane;
  }
  if (p.source_point != 1 || p.dest_point != 1 || p.dest_channel == 1) return false;
  constexpr int64_t kV = kLanes<T>;
  // What is paid beside each sum, as steps: writing it as it lies, or through a transposed square.
  constexpr int64_t kWrite = 2, kTransposed = 12;
  const int64_t load_slots = 4 * PointLanes<T>::units(p.outputs) + p.outputs, fma_slots = 2 * p.outputs;
  const int64_t outputs_cost = 2 * divide_up(p.outputs, kV) * p.points * (p.channels + kTransposed);
  const int64_t points_cost = larger(load_slots, fma_slots) * divide_up(p.points, kV) * (p.channels + kWrite);
  return points_cost <= outputs_cost;
}

// Whether a copy of planes that are read with gaps pays: they share pages, so that fetching a line of each is cheap, and leave the weights
// their place in the second cache.
template <class T>
bool copies_gaps(const Product& p) {
  constexpr int64_t kSize = sizeof(T);
  return OutputLanes<T>::units(p.outputs) >= kFewestRowPanelUnits && p.source_channel * kSize <= kMostGapPlane &&
         p.outputs * p.channels * kSize <= kMostGapWeights;
}

// Where the direct rows are faster: narrow groups would leave most lanes empty, and a copy of planes with gaps must pay.
template <class T>
bool is_served_best(const Product& p) {
  if constexpr (kClosesGaps) {
    if (closes_gaps(p)) return prefers_point_lanes<T>(p) || OutputLanes<T>::units(p.outputs) >= kFewestCopiedUnits;
  }
  const bool reads_gaps = p.source_point != 1 && p.source_channel != 1;
  if (reads_gaps) return copies_gaps<T>(p);
  return p.groups == 1 || 2 * p.outputs > kLanes<T> || prefers_point_lanes<T>(p);
}

template <class T>
Plan plan_product(const Product& p, int threads) {
  const auto plan = [&](auto tile) -> Plan {
    using Tile = decltype(tile);
    if (p.is_empty()) return {Tile::kMaxWidth, Tile::kMaxPoints, 0, 0};
    const PointwiseBlocking b = make_pointwise_blocking<T, Tile>(p, threads);
    return {Tile::kMaxWidth, Tile::kMaxPoints, b.tasks, static_cast<size_t>(make_pointwise_scratch<T, Tile>(p, b).total(threads))};
  };
  return prefers_point_lanes<T>(p) ? plan(PointLanes<T>{}) : plan(OutputLanes<T>{});
}

template <class T>
void run_product(const Product& p, const T* source, const T* weight, const T* bias, T* dest, Packed packed, void* workspace, int threads,
                 Adding<kHasPatchRows> adding = {}) {
  if (prefers_point_lanes<T>(p)) {
    PointwiseRun<T, PointLanes<T>>(p, source, weight, bias, dest, packed, workspace, threads, adding).run();
  } else {
    PointwiseRun<T, OutputLanes<T>>(p, source, weight, bias, dest, packed, workspace, threads, adding).run();
  }
}

// Weights that are kept packed are not exchanged: the scratch suffices for either.
template <class T>
Plan plan_layer(const Product& p, int threads) {
  Plan plan = plan_product<T>(p, threads);
  if constexpr (kExchangesOperands) {
    if (!exchanges_operands(p)) return plan;
    const size_t bytes = ExchangedRun<T>(p, threads).workspace_bytes();
    if (plan.workspace_bytes < bytes) plan.workspace_bytes = bytes;
  }
  return plan;
}

template <class T, Conv2dDirection kDirection>
Outcome run_layer(const Conv2dShape& s, const Conv2dBuffers& buffers, Packed packed, void* workspace, int threads) {
  constexpr bool forward = kDirection == Conv2dDirection::forward;
  const Product p = make_product(kDirection, s);
  const T* source = static_cast<const T*>(forward ? buffers.input : buffers.grad_output);
  const T* weight = static_cast<const T*>(buffers.weight);
  const T* bias = static_cast<const T*>(forward ? buffers.bias : nullptr);
  T* dest = static_cast<T*>(forward ? buffers.output : buffers.grad_input);
  const bool writes_gaps = p.writes_planes() && (kClosesGaps || !prefers_point_lanes<T>(p)) && !p.is_empty();
  if (p.dest_has_gaps && !writes_gaps) fill_zeros(dest, s.batch * s.in_channels * s.in_h * s.in_w, threads);
  if constexpr (kExchangesOperands) {
    if (packed.data == nullptr && exchanges_operands(p)) {
      ExchangedRun<T>(p, threads).run(weight, source, bias, dest, workspace);
      return Outcome::done;
    }
  }
  if constexpr (kServesFewPoints && !forward) {
    if (has_few_points<T>(p)) {
      FewPoints<T>(p, source, weight, dest, threads).run();
      return Outcome::done;
    }
  }
  if (!p.is_empty()) run_product<T>(p, source, weight, bias, dest, packed, workspace, threads);
  return Outcome::done;
}

// Whether the rows of patches are products: each reads grad_output again (backward_input) or what the output holds (forward), which sums
// must be long enough for. Elsewhere conv2d_patches and conv2d_direct are faster.
inline bool patch_rows_pay(Conv2dDirection direction, const Conv2dShape& s) {
  constexpr int64_t kFewestOutputs = 4 * kLanes<float>, kFewestSources = 32, kFewestTerms = 96;
  const Product p = make_patch_row_product(direction, s);
  const int64_t fewest = direction == Conv2dDirection::forward ? kFewestTerms : kFewestSources * s.kernel_h;
  return p.outputs >= kFewestOutputs && p.channels >= fewest;
}

// Each tile packs in a form of its own.
template <class T>
PackedForm product_form(const Product& p) {
  const bool point_lanes = prefers_point_lanes<T>(p);
  const int64_t bytes = point_lanes ? packed_bytes<T, PointLanes<T>>(p) : packed_bytes<T, OutputLanes<T>>(p);
  return {static_cast<size_t>(bytes), point_lanes ? 1 : 0};
}

// A product for each row of the patches; in forward those behind the first add to what the output holds.
template <class T, Conv2dDirection kDirection>
Outcome run_patch_rows(const Conv2dShape& s, const Conv2dBuffers& buffers, Packed packed, void* workspace, int threads) {
  constexpr bool forward = kDirection == Conv2dDirection::forward;
  const Product p = make_patch_row_product(kDirection, s);
  const int64_t in_row = s.in_w * s.in_channels, run = s.kernel_w * s.in_channels, packed_row = product_form<T>(p).bytes;
  const T *source = static_cast<const T*>(forward ? buffers.input : buffers.grad_output), *weight = static_cast<const T*>(buffers.weight);
  const T* bias = static_cast<const T*>(forward ? buffers.bias : nullptr);
  T* dest = static_cast<T*>(forward ? buffers.output : buffers.grad_input);
  for (int64_t row = 0; row < s.kernel_h && !p.is_empty(); ++row) {
    Packed packed_weight = packed;
    if (packed.data != nullptr) packed_weight.data = static_cast<char*>(packed.data) + row * packed_row;
    run_product<T>(p, source, weight, bias, dest, packed_weight, workspace, threads, {forward && row > 0});
    weight += run;
    if constexpr (forward) {
      source += in_row;
    } else {
      dest += in_row;
    }
  }
  return Outcome::done;
}

// The functions of a table row.
template <Conv2dDirection kDirection>
struct PointwiseRow {
  static bool accepts(const Conv2dShape& s) {
    if constexpr (kHasPatchRows) {
      const bool is_floating = s.dtype == cnn_ext::DType::float32 || s.dtype == cnn_ext::DType::float64;
      if (cuts_patches(s)) return is_floating && patch_rows_pay(kDirection, s);
    }
    if (!is_pointwise(s) && !covers_input(s)) return false;
    if (s.dtype == cnn_ext::DType::float32) return is_served_best<float>(make_product(kDirection, s));
    return s.dtype == cnn_ext::DType::float64 && is_served_best<double>(make_product(kDirection, s));
  }
  static Plan plan(const Conv2dShape& s, int threads) {
    const Product p = product_of(s);
    return s.dtype == cnn_ext::DType::float32 ? plan_layer<float>(p, threads) : plan_layer<double>(p, threads);
  }
  static Outcome run_packed(const Conv2dShape& s, const Conv2dBuffers& buffers, Packed packed, void* workspace, int threads) {
    if constexpr (kHasPatchRows) {
      if (cuts_patches(s)) {
        const auto run = s.dtype == cnn_ext::DType::float32 ? run_patch_rows<float, kDirection> : run_patch_rows<double, kDirection>;
        return run(s, buffers, packed, workspace, threads);
      }
    }
    return s.dtype == cnn_ext::DType::float32 ? run_layer<float, kDirection>(s, buffers, packed, workspace, threads)
                                              : run_layer<double, kDirection>(s, buffers, packed, workspace, threads);
  }
  static Outcome run(const Conv2dShape& s, const Conv2dBuffers& buffers, void* workspace, int threads) {
    return run_packed(s, buffers, {}, workspace, threads);
  }
  static Product product_of(const Conv2dShape& s) {
    if constexpr (kHasPatchRows) {
      if (cuts_patches(s)) return make_patch_row_product(kDirection, s);
    }
    return make_product(kDirection, s);
  }
  static PackedForm form(const Conv2dShape& s) {
    const Product p = product_of(s);
    PackedForm form = s.dtype == cnn_ext::DType::float32 ? product_form<float>(p) : product_form<double>(p);
    if constexpr (kHasPatchRows) {
      if (cuts_patches(s)) form.bytes *= s.kernel_h;
    }
    return form;
  }
};

}  // namespace
