// grad_input[n, c, ih, iw] of few input channels (fewer than 16, one group) on tensor cores, in TF32 (where the policy allows it), float16
// and bfloat16.
//
// The idea: the inputs are divided into cells, each of as many rows and columns as the stride, or a few times as many. All cells read
// outputs at the same distances; so a cell's inputs and channels are the rows of one product, whose columns are cells and whose depth is
// (output channels, distances). Its filters are those of the convolution in other places, with zeros where a distance leads to no tap.
// Nothing is scattered and each input is added up in registers. Where the stride is the kernel there is one distance, and no zeros.
//
// The tile: 256 cells, a warp has 32 of them. As many outputs to a cell (axis by axis) as leave the least work for an output, while the
// rows of a cell fit one fragment, of 8 or of 16. If its rows are more by the stride alone, a warp has 16 cells and up to four fragments;
// if there are too few tiles, 8 cells, or 16 where they are the fragment's rows. The filters of all distances stay in shared memory, as
// fragments; where they would not fit it, blocks share a cell, each with one fragment of its rows. The gradients that a tile reads are
// staged through registers, a group of the depth or more at a time, while the one before is multiplied: in each row of outputs one phase of
// the cells' width after the other, for so the outputs of neighbouring cells at one distance are neighbours.
//
// Bound by reading grad_output, in large layers of small strides by reading fragments from shared memory.
//
// Order of additions: that of the tensor core along the depth, by groups of output channels, then by distances.
//
// Padding never multiplies: outputs that do not exist are staged as zeros. A sum that is NaN is added up again from the products that
// exist.
//
// Not handled: groups, float64, strict float32, cells of more than 128 rows, and filters of a fragment that do not fit shared memory:
// `patch` does it.
#include "cuda/cells.cuh"
#include "cuda/mma_fragments.cuh"

namespace cnn_ext::cuda {
namespace {

template <class T>
struct CellProblem {
  CellProblem(const Conv2dShape& s, const Conv2dBuffers& b)
      : g(s),
        cells(cells_of(g, s.dtype)),
        tiles(cell_tiles(cells, eights_of(cells, s.batch))),
        patch(g, cells, tiles),
        grad_output(static_cast<const T*>(b.grad_output)),
        weight(static_cast<const T*>(b.weight)),
        bias(static_cast<const T*>(b.bias)),
        grad_input(static_cast<T*>(b.grad_input)),
        width(patch.width),
        plane(patch.height * patch.width),
        row_terms(cells.row_terms),
        channel(g.group_in),
        filter(g.group_in * g.kernel_h * g.kernel_w),
        decoder(g.group_in, g.kernel_h, g.kernel_w) {}

  Conv2dGeometry g;
  Cells cells;
  PatchTiles tiles;  // of cells
  CellPatch patch;
  const T* grad_output;
  const T* weight;
  const T* bias;  // null: none
  T* grad_input;
  FastDivisor width, plane, row_terms, channel, filter;
  TapDecoder<Layout::nchw> decoder;
};

// kVector: grad_output may be read by chunks. kNarrow: cells are the rows of fragments. kEights: times 8 cells of a warp.
template <class T, bool kVector, bool kNarrow, int kFragments, int kEights>
class CellBackwardInput {
 public:
  __device__ CellBackwardInput(const CellProblem<T>& problem, int share)
      : p(problem),
        g(problem.g),
        c(problem.cells),
        t(problem.patch),
        first_fragment_(share * problem.cells.block_fragments),
        shared_(dynamic_shared<unsigned char>()) {
#pragma unroll
    for (int j = 0; j < kEights; ++j) {
      const int cell = cell_of(j, group());
      const int output = p.tiles.row_of(cell) * c.h.outputs * t.row_pitch + p.tiles.col_of(cell);
      cells_[j] = t.outputs + output * kGroupBytes + pair() * kChunkBytes;
    }
  }

  __device__ void run(int range, int ranges) {
    place();
    __syncthreads();
    TileCursor next(p.tiles, range, ranges);
    int next_group = 0;
    fetch(next.at(), 0, 0);
    stage_filters();
    for (TileCursor tile(p.tiles, range, ranges); tile.is_in(g.batch); tile.advance()) {
      const PlaneIndex at = tile.at();
      clear();
#pragma unroll 1
      for (int first = 0; first < c.groups; first += t.depth) {
        __syncthreads();
        stage(at, first);
        __syncthreads();
        next_group += t.depth;
        if (next_group >= c.groups) next_group = 0, next.advance();
        if (next.is_in(g.batch)) fetch(next.at(), next_group, 0);
        multiply(first);
      }
      store(at);
    }
  }

 private:
  static constexpr int kTiles = kNarrow ? kEights / 2 : kEights;  // of a product's cells
  static constexpr bool kFewCells = kEights < 4;                  // and so few warps to hide latency
  // Of a thread, on their way together. TF32 has twice as many; where cells are rows, registers are left for them.
  static constexpr int kLoads = kFewCells && kNarrow && sizeof(T) == 4 ? 8 : 4;
  static constexpr int kTapsAtOnce = kFewCells ? 4 : 2;
  static constexpr int kGroupChunks = kGroupBytes / kChunkBytes;
  static constexpr int kTapBytes = (kNarrow ? kNarrowRows : kFragmentRows) * kGroupBytes;

  __device__ static int warp() { return threadIdx.x / 32; }
  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static int group() { return lane() / 4; }
  __device__ static int pair() { return lane() % 4; }
  // The number of one of a warp's cells in the tile.
  __device__ static int cell_of(int j, int i) { return (warp() * kEights + j) * 8 + i; }
  __device__ int* places() const { return reinterpret_cast<int*>(shared_ + t.places); }
  // Of the rows, then of the columns of a filter: the first row of the product, and the distance.
  __device__ int2* filter_places() const { return reinterpret_cast<int2*>(shared_ + t.filter_places); }

  // Of the outputs of a group: (h, w) in the patch as halves of a word, and the place.
  __device__ int2* output_places() const { return reinterpret_cast<int2*>(shared_ + t.output_places); }

  // Zeros for the filters, and all places.
  __device__ void place() const {
    for (int i = threadIdx.x * kChunkBytes; i < c.filter_bytes; i += kBlockThreads * kChunkBytes)
      *reinterpret_cast<uint4*>(shared_ + i) = make_uint4(0, 0, 0, 0);
    for (int tap = threadIdx.x; tap < c.taps; tap += kBlockThreads) {
      const int row = tap / c.w.taps;
      places()[tap] = place_of(row, tap - row * c.w.taps);
    }
    for (int r = threadIdx.x; r < g.kernel_h; r += kBlockThreads)
      filter_places()[r] = {c.h.input_of(r, g.stride_h, g.dilation_h) * c.row_terms, c.h.tap_of(r, g.stride_h, g.dilation_h) * c.w.taps};
    for (int s = threadIdx.x; s < g.kernel_w; s += kBlockThreads) {
      filter_places()[g.kernel_h + s] = {c.w.input_of(s, g.stride_w, g.dilation_w) * g.group_in, c.w.tap_of(s, g.stride_w, g.dilation_w)};
    }
    for (int i = threadIdx.x; i < p.plane.divisor(); i += kBlockThreads) {
      const int row = p.width.quotient(i), column = i - row * t.width;
      output_places()[i] = {row << 16 | column, t.outputs + place_of(row, column)};
    }
  }

  // Of an output in a group.
  __device__ int place_of(int row, int column) const {
    const int moved = column / c.w.outputs;
    return (row * t.row_pitch + (column - moved * c.w.outputs) * t.phase_pitch + moved) * kGroupBytes;
  }

  // The filters as fragments, [fragment][group][distance], where in that: `place_filter`.
  __device__ void stage_filters() const {
    const int elements = g.group_out * p.filter.divisor();
#pragma unroll 4
    for (int index = threadIdx.x; index < elements; index += kBlockThreads) {
      const int k = p.filter.quotient(index);
      const Tap tap = p.decoder.at(index - k * p.filter.divisor());
      place_filter(k, tap, bits_of(p.weight[k * g.filter.n + tap.channel * g.filter.c + tap.r * g.filter.h + tap.s * g.filter.w]));
    }
  }

  __device__ void place_filter(int k, const Tap& tap, uint32_t bits) const {
    const int word = k / kPerWord<T>, group = word / kGroupWords, pair = word % kGroupWords / 4, v = word % 4;
    const int2 from_h = filter_places()[tap.r], from_w = filter_places()[g.kernel_h + tap.s];
#pragma unroll 1
    for (int i = 0; i < c.h.outputs; ++i) {
#pragma unroll 1
      for (int j = 0; j < c.w.outputs; ++j) {
        const int row = from_h.x + i * g.stride_h * c.row_terms + from_w.x + j * g.stride_w * g.group_in + tap.channel;
        const int distance = from_h.y + i * c.w.taps + from_w.y + j;
        const int own = kNarrow ? 0 : row / kFragmentRows - first_fragment_;
        if (own < 0 || own >= c.block_fragments) continue;
        const int fragment = (own * c.groups + group) * c.taps + distance;
        const int word_of_lane = kNarrow ? v : v % 2 * 2 + row / 8 % 2, instruction = kNarrow ? 0 : v / 2;
        const int place = fragment * kTapBytes + (instruction * 32 + row % 8 * 4 + pair) * kChunkBytes + word_of_lane * 4;
        if constexpr (sizeof(T) == 4) {
          *reinterpret_cast<uint32_t*>(shared_ + place) = bits;
        } else {
          *reinterpret_cast<uint16_t*>(shared_ + place + k % 2 * 2) = static_cast<uint16_t>(bits);
        }
      }
    }
  }

  // Reads this thread's chunks from number `first` on, of the groups from `group` on, of a tile.
  __device__ void fetch(const PlaneIndex& at, int group, int first) {
    const int first_h = at.h * c.h.outputs + c.h.first, first_w = at.w * c.w.outputs + c.w.first;
    const T* image = p.grad_output + at.outer * g.out.n;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int index = first + i * kBlockThreads + threadIdx.x, output = index / kGroupChunks, chunk = index % kGroupChunks;
      const int part = p.plane.quotient(output);
      const int2 place = output_places()[output - part * p.plane.divisor()];
      const int h = first_h + (place.x >> 16), w = first_w + (place.x & 0xFFFF), k = ((group + part) * kGroupChunks + chunk) * kChunk<T>;
      const bool is_pixel = index < t.chunks && h >= 0 && h < g.out_h && w >= 0 && w < g.out_w;
      const T* source = image + h * g.out.h + w * g.out.w + k * g.out.c;
      places_[i] = index < t.chunks ? place.y + part * t.group_bytes + chunk * kChunkBytes : -1;
      counts_[i] = is_pixel ? g.group_out - k : 0;
      if constexpr (kVector) {
        load_words<4>(counts_[i] > 0 ? source : p.grad_output, words_[i]);
      } else {
#pragma unroll
        for (int e = 0; e < kChunk<T>; ++e) elements_[i][e] = e < counts_[i] ? source[e * g.out.c] : narrow<T>(0);
      }
    }
  }

  // Puts what has been fetched into shared memory, and what is left of the groups from `group` on.
  __device__ void stage(const PlaneIndex& at, int group) {
#pragma unroll 1
    for (int first = 0;;) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) put(i);
      first += kLoads * kBlockThreads;
      if (first >= t.chunks) return;
      fetch(at, group, first);
    }
  }

  __device__ void put(int i) const {
    if (places_[i] < 0) return;
    uint32_t words[4] = {};
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      if constexpr (kVector) {
        const uint32_t word = sizeof(T) == 4 ? to_tf32(__uint_as_float(words_[i][v])) : words_[i][v];
        words[v] = counts_[i] > 0 ? word : 0;
      } else {
#pragma unroll
        for (int e = 0; e < kPerWord<T>; ++e) words[v] |= bits_of(elements_[i][v * kPerWord<T> + e]) << (16 * e);
      }
    }
    *reinterpret_cast<uint4*>(shared_ + places_[i]) = make_uint4(words[0], words[1], words[2], words[3]);
  }

  // The products of the groups that are staged, of which `first` is the first.
  __device__ void multiply(int first) {
    const int groups = smaller(t.depth, c.groups - first);
    const int fragment_bytes = c.groups * c.taps * kTapBytes;
    const unsigned char* filters = shared_ + first * c.taps * kTapBytes + lane() * kChunkBytes;
#pragma unroll 1
    for (int part = 0; part < groups; ++part) {
      const unsigned char* outputs = shared_ + part * t.group_bytes;
#pragma unroll kTapsAtOnce
      for (int tap = 0; tap < c.taps; ++tap, filters += kTapBytes) {
        const int place = places()[tap];
        uint4 outputs_of[kEights];
#pragma unroll
        for (int j = 0; j < kEights; ++j) outputs_of[j] = *reinterpret_cast<const uint4*>(outputs + cells_[j] + place);
        if constexpr (kNarrow) {
          multiply_narrow(*reinterpret_cast<const uint4*>(filters), outputs_of);
        } else {
#pragma unroll
          for (int i = 0; i < kFragments; ++i) {
            if (kFragments > 1 && i >= c.block_fragments) break;
            const uint4* a = reinterpret_cast<const uint4*>(filters + i * fragment_bytes);
            multiply_wide(a[0], a[32], outputs_of, sums_[i]);
          }
        }
      }
    }
  }

  __device__ void multiply_wide(const uint4& x, const uint4& y, const uint4 (&b)[kEights], float (&sums)[kTiles][4]) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) mma(sums[j], {x.x, x.y, x.z, x.w}, {b[j].x, b[j].y}, T{});
#pragma unroll
    for (int j = 0; j < kTiles; ++j) mma(sums[j], {y.x, y.y, y.z, y.w}, {b[j].z, b[j].w}, T{});
  }

  __device__ void multiply_narrow(const uint4& b, const uint4 (&a)[kEights]) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) mma(sums_[0][j], {a[2 * j].x, a[2 * j + 1].x, a[2 * j].y, a[2 * j + 1].y}, {b.x, b.y}, T{});
#pragma unroll
    for (int j = 0; j < kTiles; ++j) mma(sums_[0][j], {a[2 * j].z, a[2 * j + 1].z, a[2 * j].w, a[2 * j + 1].w}, {b.z, b.w}, T{});
  }

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int v = 0; v < 4; ++v) sums_[i][j][v] = 0;
      }
    }
  }

  __device__ void store(const PlaneIndex& at) const {
    T* image = p.grad_input + at.outer * g.in.n;
#pragma unroll
    for (int i = 0; i < 2 * kFragments; ++i) {
      const int row = kNarrow ? pair() * 2 + i : first_fragment_ * kFragmentRows + i * 8 + group(), y = p.row_terms.quotient(row),
                term = row - y * c.row_terms;
      if (row >= c.rows) continue;
      const int x = p.channel.quotient(term), channel = term - x * g.group_in;
      const float bias = p.bias != nullptr ? widen(p.bias[channel]) : 0;
#pragma unroll
      for (int j = 0; j < (kNarrow ? kEights : 2 * kEights); ++j) {
        const int cell = kNarrow ? cell_of(j, group()) : cell_of(j / 2, pair() * 2 + j % 2);
        const int h = (at.h + p.tiles.row_of(cell)) * c.h.size + y, w = (at.w + p.tiles.col_of(cell)) * c.w.size + x;
        if (h >= g.in_h || w >= g.in_w) continue;
        float sum = kNarrow ? sums_[0][j / 2][j % 2 * 2 + i] : sums_[i / 2][j / 2][i % 2 * 2 + j % 2];
        if (isnan(sum)) sum = exact_sum(at.outer, channel, h, w);
        image[h * g.in.h + w * g.in.w + channel * g.in.c] = narrow<T>(sum + bias);
      }
    }
  }

  // The sum of the products that exist.
  __device__ float exact_sum(int n, int channel, int h, int w) const {
    float sum = 0;
#pragma unroll 1
    for (int r = 0; r < g.kernel_h; ++r) {
      const int reach_h = h + g.pad_top - r * g.dilation_h, oh = reach_h / g.stride_h;
      if (reach_h < 0 || oh * g.stride_h != reach_h || oh >= g.out_h) continue;
#pragma unroll 1
      for (int s = 0; s < g.kernel_w; ++s) {
        const int reach_w = w + g.pad_left - s * g.dilation_w, ow = reach_w / g.stride_w;
        if (reach_w < 0 || ow * g.stride_w != reach_w || ow >= g.out_w) continue;
        const T* source = p.grad_output + n * g.out.n + oh * g.out.h + ow * g.out.w;
        const T* filter = p.weight + channel * g.filter.c + r * g.filter.h + s * g.filter.w;
#pragma unroll 1
        for (int k = 0; k < g.group_out; ++k) sum = fmaf(widen(source[k * g.out.c]), widen(filter[k * g.filter.n]), sum);
      }
    }
    return sum;
  }

  const CellProblem<T>& p;
  const Conv2dGeometry& g;
  const Cells& c;
  const CellPatch& t;
  const int first_fragment_;  // of the block's
  unsigned char* shared_;
  int cells_[kEights];  // where this thread's cells read their first output, in bytes of shared memory
  int places_[kLoads];  // of the chunks fetched, in shared memory; -1: there is none
  int counts_[kLoads];  // channels of the chunks fetched, from their first on; 0: no such output
  uint32_t words_[kLoads][4];
  T elements_[kLoads][kChunk<T>];
  float sums_[kFragments][kTiles][4];
};

template <class T, bool kVector, bool kNarrow, int kFragments, int kEights>
__global__ void __launch_bounds__(kBlockThreads, 2) backward_input_cells(CellProblem<T> problem, int ranges) {
  const int share = static_cast<int>(blockIdx.x) % problem.cells.shares, range = static_cast<int>(blockIdx.x) / problem.cells.shares;
  CellBackwardInput<T, kVector, kNarrow, kFragments, kEights>(problem, share).run(range, ranges);
}

constexpr int kMostCellFragments = 8;  // more share the reading of grad_output among too few

bool accepts(const Conv2dShape& s) {
  // The filters' product first: what follows fits an int then.
  if (!suits_patch(s) || !all_below(kMostSharedBytes, {product({s.out_channels, s.in_channels, s.kernel_h, s.kernel_w})})) return false;
  const Conv2dGeometry g(s);
  const Cells cells = least_cells(g, s.dtype);
  return cells.fragments <= kMostCellFragments && fits_shared(g, cells);
}

Plan plan(const Conv2dShape& s) {
  const Cells cells = cells_of(Conv2dGeometry(s), s.dtype);
  const PatchTiles tiles = cell_tiles(cells, eights_of(cells, s.batch));
  const int64_t all = s.batch * tiles.of_image, most = ceil_div(kMultiprocessors * 2, cells.shares);
  return {s.in_channels, int64_t{tiles.height} * tiles.width * cells.h.size * cells.w.size, (all < most ? all : most) * cells.shares, 0};
}

template <class T, bool kVector>
void launch_cells(const Conv2dShape& s, const Conv2dBuffers& b, cudaStream_t stream) {
  const CellProblem<T> problem(s, b);
  const int64_t blocks = plan(s).blocks;
  const int eights = eights_of(problem.cells, s.batch);
  const auto kernel = problem.cells.block_fragments > 1 ? backward_input_cells<T, kVector, false, kMostFragments, 2>
                      : problem.cells.is_narrow()
                          ? (eights == 4 ? backward_input_cells<T, kVector, true, 1, 4> : backward_input_cells<T, kVector, true, 1, 2>)
                          : (eights == 4 ? backward_input_cells<T, kVector, false, 1, 4> : backward_input_cells<T, kVector, false, 1, 1>);
  launch(kernel, Grid(blocks, kBlockThreads, problem.patch.shared_bytes), stream, problem, static_cast<int>(blocks / problem.cells.shares));
}

void run(const Conv2dShape& s, const Conv2dBuffers& b, void*, cudaStream_t stream) {
  with_single_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    const bool has_chunks = s.layout == Layout::nhwc && s.out_channels % kChunk<T> == 0 && is_aligned(b.grad_output);
    (has_chunks ? launch_cells<T, true> : launch_cells<T, false>)(s, b, stream);
  });
}

}  // namespace

extern const Conv2dKernel conv2d_backward_input_cells_mma_sm80 = {"conv2d_backward_input_cells_mma_sm80",
                                                                  80,
                                                                  Conv2dDirection::backward_input,
                                                                  accepts,
                                                                  plan,
                                                                  run,
                                                                  /*needs_proof=*/true,
                                                                  /*adds_bias=*/true};

}  // namespace cnn_ext::cuda
