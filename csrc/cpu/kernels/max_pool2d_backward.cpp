// The gradient of max pooling as a gather: every element of grad_input adds up the grad_outputs whose offset names it, in ascending order
// of the outputs, and is written once. No zero-fill of the tensor, no two tasks that write one element.
//
// nchw, column strides of 1 and 2: a vector holds the columns of one phase (column modulo stride), which a tap connects to neighbouring
// outputs; the two phases of stride 2 are interleaved at the store. What a row of the input meets (rows of outputs and taps) is listed
// once per call, a step each, and which lanes of a step lie inside the row of outputs. A plane as large as its output is gathered as one
// row, so that narrow rows leave no lane idle.
//
// nhwc: a vector holds neighbouring channels of one pixel.
//
// 3x3 windows with stride 2 in nchw, without AVX-512: max_pool2d_backward_pairs.inl.
//
// A step costs a load of offsets, one of grad_output, a comparison and an addition. Where many windows meet in an element, scattering
// is cheaper: max_pool2d_backward_scatter.cpp, max_pool2d_backward_in_place.cpp.
#include "cpu/kernels/max_pool2d_backward_pairs.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

// To the input column stride * q + phase a tap brings the output column q + out.
struct ColumnTap {
  int64_t out, number;
};

// The same for a row of the input: outputs count in the plane, `name` is what their offsets are compared with.
struct Step {
  int64_t out;
  int32_t name, tap;
};

// The steps of a row: those of the first phase are [even, odd), those of the second [odd, end).
struct RowSteps {
  const Step *even, *odd, *end;
};

struct Tables {
  AxisCovers rows;               // nchw: of the rows as they are gathered
  AxisCovers columns;            // nhwc
  ColumnTap* taps;               // nchw: of a row, by phase and ascending output; phase p has those from begin[p] on
  int64_t begin[3], tap_count;   // nchw
  LaneSet* lanes;                // nchw: [vectors of a phase, taps] inside the row of outputs
  int64_t first_full, end_full;  // nchw: the columns of a phase from where vectors are inside with all lanes of all taps
  Step* steps;                   // nchw: [covers of rows, taps]; of a row by phase and ascending output
};

// The rows of nchw as they are gathered.
int64_t rows_of_plane(const Pool2dShape& s) { return joins_rows(s) ? 1 : s.in_h; }
int64_t row_size(const Pool2dShape& s) { return joins_rows(s) ? s.in_h * s.in_w : s.in_w; }
int64_t output_row_size(const Pool2dShape& s) { return joins_rows(s) ? s.out_h * s.out_w : s.out_w; }

template <class T>
int64_t vectors_of_phase(const Pool2dShape& s) {
  return ceil_div(row_size(s), kLanes<T> * s.stride_w);
}

template <class T>
Tables carve_tables(const Pool2dShape& s, Carver& carver) {
  Tables t{};
  t.rows = carve_covers(carver, s.in_h, s.out_h, s.kernel_h);
  if (s.layout == Layout::nhwc) {
    t.columns = carve_covers(carver, s.in_w, s.out_w, s.kernel_w);
    return t;
  }
  t.tap_count = joins_rows(s) ? taps_of(s) : s.kernel_w;
  t.taps = carver.take<ColumnTap>(t.tap_count);
  t.lanes = carver.take<LaneSet>(vectors_of_phase<T>(s) * t.tap_count);
  t.steps = carver.take<Step>(joins_rows(s) ? taps_of(s) : s.out_h * taps_of(s));
  return t;
}

void fill_taps(const Pool2dShape& s, Tables& t) {
  const bool joins = joins_rows(s);
  ColumnTap* tap = t.taps;
  for (int64_t phase = 0; phase < s.stride_w; ++phase) {
    t.begin[phase] = tap - t.taps;
    for (int64_t r = joins ? s.kernel_h - 1 : 0; r >= 0; --r) {
      for (int64_t k = s.kernel_w - 1; k >= 0; --k) {
        const int64_t distance = phase + s.pad_left - k * s.dilation_w;
        if (distance % s.stride_w != 0) continue;
        *tap++ = {distance / s.stride_w + (joins ? (s.pad_top - r) * s.out_w : 0), r * s.kernel_w + k};
      }
    }
  }
  t.begin[s.stride_w] = tap - t.taps;
}

template <class T>
void fill_lanes(const Pool2dShape& s, Tables& t) {
  const int64_t size = output_row_size(s), vectors = vectors_of_phase<T>(s);
  LaneSet* lanes = t.lanes;
  t.end_full = vectors * kLanes<T>;
  for (int64_t v = 0; v < vectors; ++v) {
    for (const ColumnTap* tap = t.taps; tap < t.taps + t.tap_count; ++tap) {
      const int64_t out = v * kLanes<T> + tap->out;
      *lanes++ = lanes_inside<T>(out, 1, size);
      if (out < 0) t.first_full = (v + 1) * kLanes<T>;
      if (out + kLanes<T> > size) t.end_full = smaller(t.end_full, v * kLanes<T>);
    }
  }
}

// The outputs of one plane.
template <class T, class Offset>
struct Outputs {
  const T* grad;
  const Offset* offsets;
};

// What a tap's offsets are compared with. With AVX-512 bytes are compared as they lie, with the number in each byte.
template <class Offset>
int32_t name_of(int64_t tap) {
#if defined(__AVX512BW__)
  if constexpr (sizeof(Offset) == 1) return static_cast<int32_t>(static_cast<uint32_t>(tap) * 0x01010101u);
#endif
  return static_cast<int32_t>(tap);
}

// Adds to the sums the gradients, from `grad` on, whose offsets have the name, in the lanes of the set (kFull: in all). (A sum of gradients
// is never -0.0, so that leaving a lane alone is adding 0 to it.)
template <bool kFull, class T, class Offset>
inline Vec<T> add_named(Vec<T> sum, const T* grad, const Offset* offsets, int32_t name, LaneSet lanes) {
#if defined(__AVX512BW__)
  if constexpr (sizeof(Offset) == 1) {
    const __m128i names = _mm_set1_epi32(name);
    if constexpr (sizeof(T) == 4 && kFull) {
      const __mmask16 here = _mm_cmpeq_epi8_mask(_mm_loadu_si128(reinterpret_cast<const __m128i*>(offsets)), names);
      return _mm512_mask_add_ps(sum, here, sum, load(grad));
    }
    const auto inside = static_cast<__mmask16>(lanes.bits);
    const __mmask16 here = _mm_mask_cmpeq_epi8_mask(inside, _mm_maskz_loadu_epi8(inside, offsets), names);
    const Vec<T> gradients = load_lanes(grad, LaneSet{here}, Vec<T>{});
    if constexpr (sizeof(T) == 4) return _mm512_mask_add_ps(sum, here, sum, gradients);
    if constexpr (sizeof(T) == 8) return _mm512_mask_add_pd(sum, static_cast<__mmask8>(here), sum, gradients);
  }
#endif
  const auto here = equal(load_offsets<T>(offsets, lanes), broadcast(static_cast<Int<T>>(name)));
  return sum + select(here, load_lanes(grad, lanes, Vec<T>{}), Vec<T>{});
}

template <class Offset>
void fill_steps(const Pool2dShape& s, Tables& t) {
  const int64_t size = output_row_size(s);
  Step* step = t.steps;
  for (int64_t row = 0; row < rows_of_plane(s); ++row) {
    for (int64_t phase = 0; phase < s.stride_w; ++phase) {
      for (int64_t i = t.rows.begin[row]; i < t.rows.begin[row + 1]; ++i) {
        for (int64_t tap = t.begin[phase]; tap < t.begin[phase + 1]; ++tap) {
          const int32_t name = name_of<Offset>(t.rows.covers[i].tap * s.kernel_w + t.taps[tap].number);
          *step++ = {t.rows.covers[i].out * size + t.taps[tap].out, name, static_cast<int32_t>(tap)};
        }
      }
    }
  }
}

template <class T, class Offset>
void fill_tables(const Pool2dShape& s, Tables& t) {
  if (joins_rows(s)) {
    fill_covers(t.rows, 1, 1, 1, 1, 0, 1);
  } else {
    fill_row_covers(t.rows, s);
  }
  if (s.layout == Layout::nhwc) return fill_column_covers(t.columns, s);
  fill_taps(s, t);
  fill_lanes<T>(s, t);
  fill_steps<Offset>(s, t);
}

// Neighbouring vectors of a phase, from its column q on. lanes: of one vector's taps, where not all are inside.
template <int kVectors, bool kFull, class T, class Offset>
inline void gather_vectors(Outputs<T, Offset> outputs, const Step* step, const Step* last, int64_t q, const LaneSet* lanes, Vec<T>* sums) {
  for (int v = 0; v < kVectors; ++v) sums[v] = Vec<T>{};
  for (; step < last; ++step) {
    const T* grad = outputs.grad + step->out + q;
    const Offset* offsets = outputs.offsets + step->out + q;
    const LaneSet inside = kFull ? first_lanes<T>(kLanes<T>) : lanes[step->tap];
    for (int v = 0; v < kVectors; ++v) {
      sums[v] = add_named<kFull>(sums[v], grad + v * kLanes<T>, offsets + v * kLanes<T>, step->name, inside);
    }
  }
}

// One vector of each phase.
template <class T, class Offset, int kStride, bool kFull>
inline void gather_phases(const Tables& t, Outputs<T, Offset> outputs, RowSteps steps, int64_t q, T* row, int64_t size) {
  const LaneSet* lanes = t.lanes + q / kLanes<T> * t.tap_count;
  Vec<T> even, odd;
  gather_vectors<1, kFull>(outputs, steps.even, steps.odd, q, lanes, &even);
  if constexpr (kStride == 1) return store_columns(row, q, even, size);
  gather_vectors<1, kFull>(outputs, steps.odd, steps.end, q, lanes, &odd);
  store_columns(row, 2 * q, interleave_lower<T>(even, odd), size);
  store_columns(row, 2 * q + kLanes<T>, interleave_upper<T>(even, odd), size);
}

// With many taps, one sum waits for its addition: kTogether sums go on meanwhile.
template <class T, class Offset, int kStride>
void gather_row(const Tables& t, Outputs<T, Offset> outputs, RowSteps steps, T* row, int64_t size) {
  constexpr int kTogether = 4;
  int64_t q = 0;
  for (; q * kStride < size && q < t.first_full; q += kLanes<T>) gather_phases<T, Offset, kStride, false>(t, outputs, steps, q, row, size);
  if constexpr (kStride == 1) {
    for (; q + kTogether * kLanes<T> <= smaller(size, t.end_full); q += kTogether * kLanes<T>) {
      Vec<T> sums[kTogether];
      gather_vectors<kTogether, true>(outputs, steps.even, steps.end, q, t.lanes, sums);
      for (int v = 0; v < kTogether; ++v) store_in_stream(row + q + v * kLanes<T>, sums[v]);
    }
  }
  for (; q < t.end_full; q += kLanes<T>) gather_phases<T, Offset, kStride, true>(t, outputs, steps, q, row, size);
  for (; q * kStride < size; q += kLanes<T>) gather_phases<T, Offset, kStride, false>(t, outputs, steps, q, row, size);
}

// The rows [row, last) of one plane.
template <class T, class Offset>
void gather_rows(const Pool2dShape& s, const Tables& t, Outputs<T, Offset> outputs, int64_t row, int64_t last, T* grad_input) {
  const int64_t size = row_size(s);
  for (; row < last; ++row) {
    const int64_t first = t.rows.begin[row], covers = t.rows.begin[row + 1] - first;
    const Step* step = t.steps + first * t.tap_count;
    const RowSteps steps{step, step + covers * t.begin[1], step + covers * t.tap_count};
    if (s.stride_w == 1) {
      gather_row<T, Offset, 1>(t, outputs, steps, grad_input + row * size, size);
    } else {
      gather_row<T, Offset, 2>(t, outputs, steps, grad_input + row * size, size);
    }
  }
}

// kVectors vectors of channels of one pixel, from channel 0 of `outputs` and grad_input on: neighbours, but for the last, which begins at
// last_from, with the lanes `inside` (kFull: all). (AVX2: a step for one vector alone costs more in counting than in adding.)
template <int kVectors, bool kFull, class T, class Offset>
void gather_channels(const Pool2dShape& s, const Tables& t, Outputs<T, Offset> outputs, int64_t ih, int64_t iw, T* grad_input,
                     int64_t last_from, LaneSet inside) {
  Vec<T> sums[kVectors] = {};
  const auto from = [&](int v) { return v + 1 < kVectors ? v * kLanes<T> : last_from; };
  for (int64_t i = t.rows.begin[ih]; i < t.rows.begin[ih + 1]; ++i) {
    const Cover row = t.rows.covers[i];
    for (int64_t j = t.columns.begin[iw]; j < t.columns.begin[iw + 1]; ++j) {
      const Cover column = t.columns.covers[j];
      const int64_t at = (row.out * s.out_w + column.out) * s.channels;
      const int32_t name = name_of<Offset>(row.tap * s.kernel_w + column.tap);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const LaneSet lanes = kFull ? first_lanes<T>(kLanes<T>) : inside;
        sums[v] = add_named<kFull>(sums[v], outputs.grad + at + from(v), outputs.offsets + at + from(v), name, lanes);
      }
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    if constexpr (kFull) store_in_stream(grad_input + from(v), sums[v]);
    if constexpr (!kFull) store_in_stream(grad_input + from(v), sums[v], inside);
  }
}

// From one vector of channels on, the last one ends with the channels: some are written twice, rather than lanes masked.
template <class T, class Offset>
void gather_pixel(const Pool2dShape& s, const Tables& t, Outputs<T, Offset> outputs, int64_t ih, int64_t iw, T* grad_input, int64_t channel,
                  int64_t last_channel) {
  constexpr int64_t kTogether = 4, kWhole = kTogether * kLanes<T>;
  const auto gather = [&](auto vectors, int64_t c, int64_t last_from) {
    const Outputs<T, Offset> from{outputs.grad + c, outputs.offsets + c};
    gather_channels<vectors.value, true>(s, t, from, ih, iw, grad_input + c, last_from, LaneSet{});
  };
  const int64_t channels = last_channel - channel;
  if (channels < kLanes<T>) {
    const Outputs<T, Offset> from{outputs.grad + channel, outputs.offsets + channel};
    return gather_channels<1, false>(s, t, from, ih, iw, grad_input + channel, 0, first_lanes<T>(channels));
  }
  int64_t c = channel;
  for (; c + kWhole <= last_channel; c += kWhole) gather(Count<kTogether>{}, c, kWhole - kLanes<T>);
  const int64_t last_from = last_channel - kLanes<T> - c;
  switch (ceil_div(last_channel - c, kLanes<T>)) {
    case 4:
      return gather(Count<4>{}, c, last_from);
    case 3:
      return gather(Count<3>{}, c, last_from);
    case 2:
      return gather(Count<2>{}, c, last_from);
    case 1:
      return gather(Count<1>{}, c, last_from);
    default:
      return;
  }
}

// The channels [channel, last_channel) of one row of one image.
template <class T, class Offset>
void gather_row_nhwc(const Pool2dShape& s, const Tables& t, Outputs<T, Offset> outputs, int64_t ih, T* grad_input, int64_t channel,
                     int64_t last_channel) {
  for (int64_t iw = 0; iw < s.in_w; ++iw) {
    if constexpr (kVectorBytes == 32) {
      gather_pixel(s, t, outputs, ih, iw, grad_input + iw * s.channels, channel, last_channel);
      continue;
    }
    for (int64_t c = channel; c < last_channel; c += kLanes<T>) {
      const LaneSet lanes = first_lanes<T>(last_channel - c);
      Vec<T> sum{};
      for (int64_t i = t.rows.begin[ih]; i < t.rows.begin[ih + 1]; ++i) {
        const Cover row = t.rows.covers[i];
        for (int64_t j = t.columns.begin[iw]; j < t.columns.begin[iw + 1]; ++j) {
          const Cover column = t.columns.covers[j];
          const int64_t at = (row.out * s.out_w + column.out) * s.channels + c;
          sum = add_named<false>(sum, outputs.grad + at, outputs.offsets + at, name_of<Offset>(row.tap * s.kernel_w + column.tap), lanes);
        }
      }
      store_lanes(grad_input + iw * s.channels + c, sum, lanes);
    }
  }
}

template <class T, class Offset>
void gather_rows_nhwc(const Pool2dShape& s, const Tables& t, Outputs<T, Offset> outputs, int64_t row, int64_t last, T* grad_input,
                      int64_t channel, int64_t last_channel) {
  for (; row < last; ++row) gather_row_nhwc(s, t, outputs, row, grad_input + row * s.in_w * s.channels, channel, last_channel);
}

template <class T>
Split split_of(const Pool2dShape& s, int threads) {
  const bool nchw = s.layout == Layout::nchw;
  return split_rows(s, nchw ? rows_of_plane(s) : s.in_h, nchw ? row_size(s) : s.in_w * s.channels, kLanes<T>, threads);
}

template <class T, class Offset>
Outputs<T, Offset> outputs_of(const Pool2dShape& s, const Pool2dBuffers& b, int64_t plane) {
  const int64_t first = plane * s.out_h * s.out_w * pixel_of(s);
  return {static_cast<const T*>(b.grad_output) + first, static_cast<const Offset*>(b.offsets) + first};
}

template <class T, class Offset>
void backward(const Pool2dShape& s, const Pool2dBuffers& b, void* workspace, int threads) {
  if constexpr (kHasPairs) {
    if (gathers_pairs(s)) return backward_by_pairs<T, Offset>(s, b, workspace, threads, split_of<T>(s, threads));
  }
  Carver carver(workspace);
  Tables tables = carve_tables<T>(s, carver);
  fill_tables<T, Offset>(s, tables);
  const int64_t rows = s.layout == Layout::nchw ? rows_of_plane(s) : s.in_h, plane_elements = s.in_h * s.in_w * pixel_of(s);
  for_each_task(s, split_of<T>(s, threads), threads, [&](int, int64_t row, int64_t last_row, int64_t channel, int64_t last_channel) {
    for (int64_t plane = row / rows; row < last_row; ++plane) {
      const int64_t first = row - plane * rows, last = smaller(rows, last_row - plane * rows);
      const auto outputs = outputs_of<T, Offset>(s, b, plane);
      T* grad_input = static_cast<T*>(b.grad_input) + plane * plane_elements;
      if (s.layout == Layout::nchw) {
        gather_rows(s, tables, outputs, first, last, grad_input);
      } else {
        gather_rows_nhwc(s, tables, outputs, first, last, grad_input, channel, last_channel);
      }
      row += last - first;
    }
  });
}

bool accepts(const Pool2dShape& s) { return accepts_float_and_double(s) && (s.layout == Layout::nhwc || s.stride_w <= 2); }

template <class T>
Plan plan_for(const Pool2dShape& s, int threads) {
  if constexpr (kHasPairs) {
    if (gathers_pairs(s)) return {1, kLanes<T>, split_of<T>(s, threads).tasks, workspace_of_pairs<T>(s, threads)};
  }
  Carver carver(nullptr);
  carve_tables<T>(s, carver);
  const bool nchw = s.layout == Layout::nchw;
  return {nchw ? 1 : kLanes<T>, nchw ? kLanes<T> : 1, split_of<T>(s, threads).tasks, carver.used()};
}

Plan plan(const Pool2dShape& s, int threads) {
  return s.dtype == DType::float32 ? plan_for<float>(s, threads) : plan_for<double>(s, threads);
}

void run(const Pool2dShape& s, const Pool2dBuffers& b, void* workspace, int threads) {
  if (s.dtype == DType::float32) {
    (has_small_offsets(s) ? backward<float, uint8_t> : backward<float, int32_t>)(s, b, workspace, threads);
  } else {
    (has_small_offsets(s) ? backward<double, uint8_t> : backward<double, int32_t>)(s, b, workspace, threads);
  }
}

}  // namespace

extern const Pool2dKernel max_pool2d_backward_direct = {
    CNN_EXT_KERNEL_NAME("max_pool2d_backward_direct"), Isa::CNN_EXT_ISA, Pool2dOp::max, Pool2dDirection::backward, accepts, plan, run};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
