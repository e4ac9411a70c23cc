// The gradient of max pooling as a gather: every element of grad_input adds up the grad_outputs whose offset names it, in ascending order
// of the outputs, and is written once. No zero-fill of the tensor, no two tasks that write one element.
//
// nchw, stride 1 or 2: a vector holds the columns of one phase (column modulo stride), so that the outputs that a tap connects them to are
// neighbours; the two phases of stride 2 are interleaved at the store. Where the vectors begin depends on the column alone and is computed
// once per call.
//
// nhwc: a vector holds neighbouring channels of one pixel.
//
// A tap costs a masked load of offsets, one of grad_output, a comparison and an addition. Where many windows meet in an element, scattering
// is cheaper: max_pool2d_backward_scatter.cpp.
#include "cpu/kernels/pool2d.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

// What one tap contributes to a vector of input columns of its phase: outputs from `out` on, in the lanes inside the output.
struct VectorCover {
  int64_t out, tap;
  LaneSet lanes;
};

// For each vector of input columns (stride_w * lanes of them) and each phase the covers by ascending output. Every vector has the same
// number of covers, kernel_w, and phase p those from begin[p] on.
struct Tables {
  AxisCovers rows;
  AxisCovers columns;   // nhwc
  VectorCover* covers;  // nchw: [vectors, kernel_w]
  int64_t begin[3];     // nchw
};

// A vector q covers columns from q * lanes * stride_w - pad_left on.
template <class T>
int64_t vectors_of(const Pool2dShape& s) {
  return ceil_div(s.in_w + s.pad_left, kLanes<T> * s.stride_w);
}

template <class T>
Tables carve_tables(const Pool2dShape& s, Carver& carver) {
  Tables t{};
  t.rows = carve_covers(carver, s.in_h, s.out_h, s.kernel_h);
  if (s.layout == Layout::nhwc) t.columns = carve_covers(carver, s.in_w, s.out_w, s.kernel_w);
  if (s.layout == Layout::nchw) t.covers = carver.take<VectorCover>(vectors_of<T>(s) * s.kernel_w);
  return t;
}

template <class T>
void fill_tables(const Pool2dShape& s, Tables& t) {
  fill_row_covers(t.rows, s);
  if (s.layout == Layout::nhwc) fill_column_covers(t.columns, s);
  if (s.layout == Layout::nhwc) return;
  VectorCover* cover = t.covers;
  for (int64_t v = 0; v < vectors_of<T>(s); ++v) {
    for (int64_t phase = 0; phase < s.stride_w; ++phase) {
      t.begin[phase] = cover - t.covers - v * s.kernel_w;
      for (int64_t tap = s.kernel_w - 1; tap >= 0; --tap) {
        if (tap * s.dilation_w % s.stride_w != phase) continue;
        const int64_t out = v * kLanes<T> - tap * s.dilation_w / s.stride_w;
        *cover++ = {out, tap, lanes_inside<T>(out, 1, s.out_w)};
      }
    }
  }
  t.begin[s.stride_w] = s.kernel_w;
}

// The outputs of one plane.
template <class T, class Offset>
struct Outputs {
  const T* grad;
  const Offset* offsets;
};

// Adds to the sums the gradients, from `grad` on, whose offsets name the tap, in the lanes of the set. (A sum of gradients is never -0.0,
// so that leaving a lane alone is adding 0 to it.)
template <class T, class Offset>
inline Vec<T> add_named(Vec<T> sum, const T* grad, const Offset* offsets, int64_t tap, LaneSet lanes) {
#if defined(__AVX512BW__)
  if constexpr (sizeof(T) == 4 && sizeof(Offset) == 1) {
    const __m128i named = _mm_set1_epi8(static_cast<char>(tap));
    if (lanes.bits == 0xffff) {
      const __mmask16 here = _mm_cmpeq_epi8_mask(_mm_loadu_si128(reinterpret_cast<const __m128i*>(offsets)), named);
      return _mm512_mask_add_ps(sum, here, sum, load(grad));
    }
    const __mmask16 inside = static_cast<__mmask16>(lanes.bits);
    const __mmask16 here = _mm_mask_cmpeq_epi8_mask(inside, _mm_maskz_loadu_epi8(inside, offsets), named);
    return _mm512_mask_add_ps(sum, here, sum, _mm512_maskz_loadu_ps(here, grad));
  }
#endif
  const auto here = equal(load_offsets<T>(offsets, lanes), broadcast(static_cast<Int<T>>(tap)));
  return sum + select(here, load_lanes(grad, lanes, Vec<T>{}), Vec<T>{});
}

// The gradients of a vector of input columns: row covers [row, last_row), column covers [column, last_column).
template <class T, class Offset>
Vec<T> gather_columns(const Pool2dShape& s, Outputs<T, Offset> outputs, const Cover* row, const Cover* last_row, const VectorCover* column,
                      const VectorCover* last_column) {
  Vec<T> sum{};
  for (; row < last_row; ++row) {
    const T* grad = outputs.grad + row->out * s.out_w;
    const Offset* offsets = outputs.offsets + row->out * s.out_w;
    for (const VectorCover* c = column; c < last_column; ++c) {
      sum = add_named(sum, grad + c->out, offsets + c->out, row->tap * s.kernel_w + c->tap, c->lanes);
    }
  }
  return sum;
}

template <class T>
void store_columns(T* row, int64_t column, Vec<T> v, const Pool2dShape& s) {
  store_in_stream(row + column, v, lanes_inside<T>(column, 1, s.in_w));
}

template <class T, class Offset, int kStride>
void backward_row_by_phases(const Pool2dShape& s, const Tables& t, Outputs<T, Offset> outputs, int64_t ih, T* grad_input) {
  const Cover* row = t.rows.covers + t.rows.begin[ih];
  const Cover* last_row = t.rows.covers + t.rows.begin[ih + 1];
  const VectorCover* covers = t.covers;
  for (int64_t column = -s.pad_left; column < s.in_w; column += kLanes<T> * kStride, covers += s.kernel_w) {
    const Vec<T> even = gather_columns(s, outputs, row, last_row, covers + t.begin[0], covers + t.begin[1]);
    if constexpr (kStride == 1) {
      store_columns(grad_input, column, even, s);
    } else {
      const Vec<T> odd = gather_columns(s, outputs, row, last_row, covers + t.begin[1], covers + t.begin[2]);
      store_columns(grad_input, column, interleave_lower<T>(even, odd), s);
      store_columns(grad_input, column + kLanes<T>, interleave_upper<T>(even, odd), s);
    }
  }
}

// The channels [channel, last_channel) of one row of one image.
template <class T, class Offset>
void backward_row_nhwc(const Pool2dShape& s, const Tables& t, Outputs<T, Offset> outputs, int64_t ih, T* grad_input, int64_t channel,
                       int64_t last_channel) {
  for (int64_t iw = 0; iw < s.in_w; ++iw) {
    for (int64_t c = channel; c < last_channel; c += kLanes<T>) {
      const LaneSet lanes = first_lanes<T>(last_channel - c);
      Vec<T> sum{};
      for (int64_t i = t.rows.begin[ih]; i < t.rows.begin[ih + 1]; ++i) {
        const Cover row = t.rows.covers[i];
        for (int64_t j = t.columns.begin[iw]; j < t.columns.begin[iw + 1]; ++j) {
          const Cover column = t.columns.covers[j];
          const int64_t at = (row.out * s.out_w + column.out) * s.channels + c;
          sum = add_named(sum, outputs.grad + at, outputs.offsets + at, row.tap * s.kernel_w + column.tap, lanes);
        }
      }
      store_lanes(grad_input + iw * s.channels + c, sum, lanes);
    }
  }
}

// The rows [ih, last) of one plane.
template <class T, class Offset>
void backward_rows(const Pool2dShape& s, const Tables& t, Outputs<T, Offset> outputs, int64_t ih, int64_t last, T* grad_input,
                   int64_t channel, int64_t last_channel) {
  for (; ih < last; ++ih) {
    T* row = grad_input + ih * s.in_w * pixel_of(s);
    if (s.layout == Layout::nhwc) {
      backward_row_nhwc(s, t, outputs, ih, row, channel, last_channel);
    } else if (s.stride_w == 1) {
      backward_row_by_phases<T, Offset, 1>(s, t, outputs, ih, row);
    } else {
      backward_row_by_phases<T, Offset, 2>(s, t, outputs, ih, row);
    }
  }
}

template <class T>
Split split_of(const Pool2dShape& s, int threads) {
  return split_rows(s, s.in_h, s.in_w * pixel_of(s), kLanes<T>, threads);
}

template <class T, class Offset>
void backward(const Pool2dShape& s, const Pool2dBuffers& b, void* workspace, int threads) {
  Carver carver(workspace);
  Tables tables = carve_tables<T>(s, carver);
  fill_tables<T>(s, tables);
  for_each_task(s, split_of<T>(s, threads), threads, [&](int, int64_t row, int64_t last_row, int64_t channel, int64_t last_channel) {
    for (int64_t plane = row / s.in_h; row < last_row; ++plane) {
      const int64_t first = row - plane * s.in_h, last = smaller(s.in_h, last_row - plane * s.in_h);
      const int64_t plane_outputs = s.out_h * s.out_w * pixel_of(s);
      const Outputs<T, Offset> outputs{static_cast<const T*>(b.grad_output) + plane * plane_outputs,
                                       static_cast<const Offset*>(b.offsets) + plane * plane_outputs};
      T* grad_input = static_cast<T*>(b.grad_input) + plane * s.in_h * s.in_w * pixel_of(s);
      backward_rows(s, tables, outputs, first, last, grad_input, channel, last_channel);
      row += last - first;
    }
  });
}

bool accepts(const Pool2dShape& s) { return accepts_float_and_double(s) && (s.layout == Layout::nhwc || s.stride_w <= 2); }

template <class T>
Plan plan_for(const Pool2dShape& s, int threads) {
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
