// The register tiles of output channels in the lanes (ChannelTile, WideTile): 32 registers hold 28 accumulators, 16 hold 12.
#include "cpu/kernels/conv2d_direct_steps.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

// Adds the taps of a span to the sums of kRows x kCols grid points. Each element is broadcast once for all the points that read it, and the
// elements are gone through so that a sum gets its taps in order, in all rows at once: an addition to a sum then has others between itself
// and the next. What the sums leave of the registers holds weights; the others stay in memory.
template <int kTaps, int kSpanStep, int kVectors, int kRows, int kCols, class T>
inline __attribute__((always_inline)) void add_span(Vec<T> (&sum)[kRows * kCols][kVectors], const T* in, int64_t row_step,
                                                    const T* weights) {
  constexpr int kV = kLanes<T>, kHeld = kVectorRegisters - 1 - kRows * kCols * kVectors;
  Vec<T> held[kVectors][kTaps];
#pragma GCC unroll 6
  for (int i = 0; i < kVectors * kTaps && i < kHeld; ++i) {
    const int v = i / kTaps, t = i % kTaps;
    held[v][t] = load(weights + (t * kVectors + v) * kV);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCols + kTaps - 1; ++i) {
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) {
      const Vec<T> x = broadcast_from(in + r * row_step + (kSpanStep > 0 ? i : kCols - 1 - i));
#pragma GCC unroll 3
      for (int t = 0; t < kTaps; ++t) {
        if (i - t < 0 || i - t >= kCols) continue;
        Vec<T>* const point = sum[r * kCols + (kSpanStep > 0 ? i - t : kCols - 1 - (i - t))];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          if (v * kTaps + t < kHeld) {
            accumulate(point[v], x, held[v][t]);
          } else {
            accumulate(point[v], x, weights + (t * kVectors + v) * kV);
          }
        }
      }
    }
  }
}

// The same for a row of as many points as find registers beside their sums and one vector of weights: at each tap the first one's element
// gives way to the next one behind the last, and each vector of weights is loaded once for all points.
template <int kTaps, int kSpanStep, int kVectors, int kCols, class T>
inline __attribute__((always_inline)) void add_span_of_few(Vec<T> (&sum)[kCols][kVectors], const T* in, const T* weights) {
  constexpr auto at = [](int i) { return kSpanStep > 0 ? i : kCols - 1 - i; };
  Vec<T> x[kCols];
#pragma GCC unroll 2
  for (int i = 0; i < kCols - 1; ++i) x[i] = broadcast_from(in + at(i));
#pragma GCC unroll 7
  for (int t = 0; t < kTaps; ++t) {
    x[(t + kCols - 1) % kCols] = broadcast_from(in + at(t + kCols - 1));
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const Vec<T> weight = load(weights + (t * kVectors + v) * kLanes<T>);
#pragma GCC unroll 3
      for (int i = 0; i < kCols; ++i) accumulate(sum[at(i)][v], x[(t + i) % kCols], weight);
    }
  }
}

template <class T, int kVectors, int kRows, int kCols, int kTaps, int kSpanStep>
__attribute__((noinline)) void channel_tile(const TileTask<T>& task) {
  constexpr int kV = kLanes<T>, kPoints = kRows * kCols;
  Vec<T> sum[kPoints][kVectors] = {};
  const T* const staged = task.staged;
  const int64_t row_step = task.row_step;
  if constexpr (kVectors == WideTile::kVectors) {
    for_steps<kVectors * kV, 1, kTaps>(task, [&](int64_t offset, const T* weights) __attribute__((always_inline)) {
      add_span_of_few<kTaps, kSpanStep, kVectors, kCols>(sum, at_offset(staged, offset), weights);
    });
  } else if constexpr (kTaps > 1) {
    for_steps<kVectors * kV, 1, kTaps>(task, [&](int64_t offset, const T* weights) __attribute__((always_inline)) {
      add_span<kTaps, kSpanStep, kVectors, kRows, kCols>(sum, at_offset(staged, offset), row_step, weights);
    });
  } else {
    for_steps<kVectors * kV>(task, [&](int64_t offset, const T* weights) __attribute__((always_inline)) {
      const T* in = at_offset(staged, offset);
      Vec<T> weight[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) weight[v] = load(weights + v * kV);
#pragma GCC unroll 28
      for (int i = 0; i < kPoints; ++i) {
        const Vec<T> x = broadcast_from(in + (i / kCols) * row_step + i % kCols);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) accumulate(sum[i][v], x, weight[v]);
      }
    });
  }
  const auto write = [&](const auto& store_last) __attribute__((always_inline)) {
#pragma GCC unroll 28
    for (int i = 0; i < kPoints; ++i) {
      const T* from = task.before + i / kCols * task.before_row_pitch + i % kCols * task.before_pitch;
      T* to = task.out + i / kCols * task.row_pitch + i % kCols * task.pitch;
#pragma GCC unroll 3
      for (int v = 0; v < kVectors - 1; ++v) store(to + v * kV, load(from + v * kV) + sum[i][v]);
      store_last(to + (kVectors - 1) * kV, load(from + (kVectors - 1) * kV) + sum[i][kVectors - 1]);
    }
  };
  const int last = task.last;
  if (last == kV) {
    write([](T* to, Vec<T> total) __attribute__((always_inline)) { store(to, total); });
  } else {
    write([last](T* to, Vec<T> total) __attribute__((always_inline)) { store_first(to, total, last); });
  }
}

template <int kTaps, int kSpanStep, int kVectors, int kRows, int kCols, class T>
void run_cols(const TileTask<T>& task, int cols) {
  if (cols == kCols) return channel_tile<T, kVectors, kRows, kCols, kTaps, kSpanStep>(task);
  if constexpr (kCols > 1) run_cols<kTaps, kSpanStep, kVectors, kRows, kCols - 1>(task, cols);
}

template <int kTaps, int kSpanStep, int kVectors, class T>
void run_rows(const TileTask<T>& task, int rows, int cols) {
  constexpr int kPoints = kAccumulators / 2;
  rows == 1 ? run_cols<kTaps, kSpanStep, kVectors, 1, kPoints>(task, cols)
            : run_cols<kTaps, kSpanStep, kVectors, 2, kPoints / kVectors>(task, cols);
}

template <int kTaps, int kSpanStep, class T>
void run_vectors(const TileTask<T>& task, int vectors, int rows, int cols) {
  vectors == 1 ? run_rows<kTaps, kSpanStep, 1>(task, rows, cols) : run_rows<kTaps, kSpanStep, 2>(task, rows, cols);
}

template <int kTaps, class T>
void run_wide(const TileTask<T>& task, int cols) {
  constexpr int kVectors = WideTile::kVectors, kPoints = WideTile::kMaxPoints;
  task.span_step > 0 ? run_cols<kTaps, 1, kVectors, 1, kPoints>(task, cols) : run_cols<kTaps, -1, kVectors, 1, kPoints>(task, cols);
}

template <class T>
void run(const TileTask<T>& task, int vectors, int rows, int cols) {
  if constexpr (kHasSpans && sizeof(T) == sizeof(float)) {
    const auto wide = task.span_taps == 3 ? run_wide<3, T> : task.span_taps == 5 ? run_wide<5, T> : run_wide<7, T>;
    if (vectors == WideTile::kVectors) return wide(task, cols);
  }
  if constexpr (kHasSpans) {
    if (task.span_taps == 2) return run_vectors<2, -1>(task, vectors, rows, cols);
    if (task.span_taps == 3) return (task.span_step > 0 ? run_vectors<3, 1, T> : run_vectors<3, -1, T>)(task, vectors, rows, cols);
  }
  run_vectors<1, 0>(task, vectors, rows, cols);
}

}  // namespace

void run_channel_tile(const TileTask<float>& task, int vectors, int rows, int cols) { run(task, vectors, rows, cols); }
void run_channel_tile(const TileTask<double>& task, int vectors, int rows, int cols) { run(task, vectors, rows, cols); }

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
