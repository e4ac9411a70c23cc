// grad_input[n, c, ih, iw] of few input channels (fewer than 16, one group) on tensor cores, in TF32 (where the policy allows it), float16
// and bfloat16.
//
// The idea: a product whose columns are the few input channels would be nearly empty. So its columns are the terms (s, c) of a row r of the
// kernel, its rows pixels of the output, its depth the output channels: the shares that a pixel gives to the inputs under a row of its
// window. A block computes the shares that reach its tile of the input, in shared memory, and each input adds up its own: nothing is
// scattered, and with a stride no product is wasted. Of one row r only the outputs that it leads to are needed, so what lies beside the
// tile is computed twice only to the left and right of it.
//
// The tile: 8 x 32 inputs, 16 rows with a vertical and 64 columns with a horizontal stride. As many rows r at a time as fit shared memory;
// what inputs have added up waits there for the next ones. A warp takes 32 outputs at a time and up to 32 terms. It reads grad_output from
// memory straight into fragments: a thread takes 16 bytes of neighbouring channels of a pixel in nhwc, four neighbouring pixels of a
// channel in nchw, and pixels and channels are numbered so that this is what it needs. The filters stay in shared memory, as fragments.
//
// Bound by reading grad_output, once for each row of the kernel over the stride, mostly from the first-level cache, and by adding up.
//
// Order of additions: the tensor core adds up a share over the output channels; an input adds up its shares by r, then s.
//
// Padding never multiplies: only shares of outputs that exist are added.
//
// Not handled: groups, float64, strict float32, and filters or shares that do not fit shared memory.
#include "cuda/limits.h"
#include "cuda/mma_gemm.cuh"
#include "cuda/patch.cuh"

namespace cnn_ext::cuda {
namespace {

constexpr int kUnitPixels = 32;  // of a warp at a time
constexpr int kTermTiles = 4;    // of 8 terms, at a time
constexpr int kGroupWords = 16;  // of depth: two instructions deep, 4 words of each of a fragment's four columns

// Shares and filters of a block, and where they lie in shared memory, in bytes from its start: the filters, the shares, the sums of the
// inputs, and for each column of the tile where its shares are.
struct Shares {
  Shares(const Conv2dGeometry& g, const PatchTiles& tiles, DType dtype)
      : term_tiles(ceil_div(g.kernel_w * g.group_in, 8)),
        groups(ceil_div(ceil_div(g.group_out * bytes_of(dtype), 4), kGroupWords)),
        height(ceil_div(tiles.height, g.stride_h)),
        width(smaller(ceil_div((tiles.width - 1 + (g.kernel_w - 1) * g.dilation_w) / g.stride_w + 4, 4), ceil_div(g.out_w, 4)) * 4),
        units(ceil_div(height * width, kUnitPixels)),
        pitch(units * kUnitPixels + 4),
        row_bytes(term_tiles * 8 * pitch * static_cast<int>(sizeof(float))),
        columns(tiles.width * (g.layout == Layout::nhwc ? g.group_in : 1)),
        shares(g.kernel_h * term_tiles * groups * 32 * kChunkBytes),
        fixed_bytes(shares + tiles.height * tiles.width * g.group_in * static_cast<int>(sizeof(float)) +
                    columns * static_cast<int>(sizeof(int2))),
        rows(smaller(g.kernel_h, larger(1, (kMostSharedBytes - smaller(fixed_bytes, kMostSharedBytes)) / row_bytes))),
        sums(shares + rows * row_bytes),
        column_places(sums + tiles.height * tiles.width * g.group_in * static_cast<int>(sizeof(float))),
        shared_bytes(column_places + columns * static_cast<int>(sizeof(int2))) {}

  int term_tiles;     // of 8 terms (s, c)
  int groups;         // of 16 words of the output channels
  int height, width;  // of the outputs that a row r of the kernel leads to
  int units, pitch;   // of them, in units of a warp, and from term to term
  int row_bytes;      // of the shares of one r
  int columns;        // of the tile: w, in nhwc (w, c)
  int shares, fixed_bytes;
  int rows;  // r at a time
  int sums, column_places, shared_bytes;
};

PatchTiles input_tiles(const Conv2dGeometry& g) { return {g.stride_w > 1 ? 6 : 5, g.stride_h > 1 ? 16 : 8, g.in_h, g.in_w}; }

template <class T>
struct InputProblem {
  InputProblem(const Conv2dShape& s, const Conv2dBuffers& b)
      : g(s),
        tiles(input_tiles(g)),
        shares(g, tiles, s.dtype),
        grad_output(static_cast<const T*>(b.grad_output)),
        weight(static_cast<const T*>(b.weight)),
        bias(static_cast<const T*>(b.bias)),
        grad_input(static_cast<T*>(b.grad_input)),
        stride_h(g.stride_h),
        width(shares.width),
        channel(g.group_in),
        has_vectors(is_aligned(b.grad_output) && (g.layout == Layout::nhwc ? g.group_out % kChunk<T> == 0 : g.out_w % 4 == 0)) {
    const Phase phase = phase_of(0, g.stride_w, g.pad_left, g.dilation_w, g.kernel_w);
    next_share = phase.tap_step * g.group_in * shares.pitch - phase.step;
  }

  Conv2dGeometry g;
  PatchTiles tiles;  // of the input
  Shares shares;
  const T* grad_output;
  const T* weight;
  const T* bias;  // null: none
  T* grad_input;
  FastDivisor stride_h, width, channel;
  int next_share;    // from one share of an input to the next one of a row of the kernel
  bool has_vectors;  // whether grad_output may be read by words
};

template <class T, bool kNhwc>
class PatchBackwardInput {
 public:
  __device__ explicit PatchBackwardInput(const InputProblem<T>& problem)
      : p(problem), g(problem.g), t(problem.shares), shared_(dynamic_shared<unsigned char>()) {}

  __device__ void run(int range, int ranges) {
    stage_filters();
    for (TileCursor tile(p.tiles, range, ranges); tile.is_in(g.batch); tile.advance()) {
      const PlaneIndex at = tile.at();
      const int first_w = larger(0, ceil_quotient(at.w + g.pad_left - (g.kernel_w - 1) * g.dilation_w, g.stride_w)) & ~3;
      place_columns(at.w, first_w);
#pragma unroll 1
      for (int r = 0; r < g.kernel_h; r += t.rows) {
        __syncthreads();
        const int rows = smaller(t.rows, g.kernel_h - r);
#pragma unroll 1
        for (int unit = warp(); unit < rows * t.units; unit += kBlockThreads / 32) {
          const int row = unit / t.units;
          float* target = shares() + row * (t.row_bytes / static_cast<int>(sizeof(float)));
          if (p.has_vectors) {
            multiply<true>(at, r + row, unit - row * t.units, first_w, target);
          } else {
            multiply<false>(at, r + row, unit - row * t.units, first_w, target);
          }
        }
        __syncthreads();
        add_up(at, r, rows);
      }
      __syncthreads();
    }
  }

 private:
  __device__ static int warp() { return threadIdx.x / 32; }
  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static int group() { return lane() / 4; }
  __device__ static int pair() { return lane() % 4; }
  __device__ float* shares() const { return reinterpret_cast<float*>(shared_ + t.shares); }
  __device__ float* sums() const { return reinterpret_cast<float*>(shared_ + t.sums); }
  // Of a column of the tile: its first share, less that of channel 0 in nchw, and how many there are.
  __device__ int2* column_places() const { return reinterpret_cast<int2*>(shared_ + t.column_places); }

  // The output that a row r of the kernel leads to first from the tile.
  __device__ int first_output(const PlaneIndex& at, int r) const { return ceil_quotient(at.h + g.pad_top - r * g.dilation_h, g.stride_h); }

  // The filters as fragments, [r][term tile][group][lane][4 words]: of term `group`, words 4 * pair + {0, 1, 2, 3} of the group.
  __device__ void stage_filters() const {
    uint32_t* filters = reinterpret_cast<uint32_t*>(shared_);
    const int count = g.kernel_h * t.term_tiles * t.groups * 32 * 4;
#pragma unroll 4
    for (int index = threadIdx.x; index < count; index += kBlockThreads) {
      const int fragment = index / 128, tile = fragment / t.groups, r = tile / t.term_tiles;
      const int word = (fragment - tile * t.groups) * kGroupWords + index % 16;
      const int term = (tile - r * t.term_tiles) * 8 + index % 128 / 16;
      const int s = p.channel.quotient(term), c = term - s * g.group_in;
      uint32_t bits = 0;
#pragma unroll
      for (int i = 0; i < kPerWord<T>; ++i) {
        const int k = word * kPerWord<T> + i;
        const int64_t offset = k * g.filter.n + c * g.filter.c + r * g.filter.h + s * g.filter.w;
        if (s < g.kernel_w && k < g.group_out) bits |= bits_of(p.weight[offset]) << (16 * i);
      }
      filters[index] = bits;
    }
  }

  __device__ void place_columns(int first_iw, int first_ow) const {
    for (int x = threadIdx.x; x < t.columns; x += kBlockThreads) {
      const int column = kNhwc ? p.channel.quotient(x) : x, c = x - column * g.group_in, w = first_iw + column;
      const Phase phase = phase_of((w + g.pad_left) % g.stride_w, g.stride_w, g.pad_left, g.dilation_w, g.kernel_w);
      const int last = phase.origin + (w - phase.first_position) / g.stride_w;  // the output of the phase's first tap
      const int begin = larger(0, ceil_quotient(last - g.out_w + 1, phase.step));
      const int end = last < 0 ? 0 : smaller(phase.taps, last / phase.step + 1);
      const int term = (phase.first_tap + begin * phase.tap_step) * g.group_in + (kNhwc ? c : 0);
      column_places()[x] = {term * t.pitch + last - begin * phase.step - first_ow, larger(0, end - begin)};
    }
  }

  // The shares of row r of the kernel in the 32 outputs of a unit. Vectors of two steps of the depth are on their way together.
  template <bool kVector>
  __device__ void multiply(const PlaneIndex& at, int r, int unit, int first_ow, float* target) const {
    const int pixel = unit * kUnitPixels + group() * 4, row = p.width.quotient(pixel);
    const int oh = first_output(at, r) + row, ow = first_ow + pixel - row * t.width;
    const int pixels = row < t.height && oh >= 0 && oh < g.out_h ? g.out_w - ow : 0;  // that exist, of this thread's four
    const T* source = p.grad_output + at.outer * g.out.n + oh * g.out.h + ow * g.out.w;
    constexpr int kAtOnce = kVector ? 2 : 1;
    const uint4* filters = reinterpret_cast<const uint4*>(shared_) + r * t.term_tiles * t.groups * 32 + lane();
#pragma unroll 1
    for (int first = 0; first < t.term_tiles; first += kTermTiles) {
      float sums[2][kTermTiles][4] = {};
#pragma unroll 1
      for (int depth = 0; depth < t.groups; depth += kAtOnce) {
        uint32_t a[kAtOnce][2][2][4];
#pragma unroll
        for (int d = 0; d < kAtOnce; ++d) load<kVector>(source, (depth + d) * kGroupWords + pair() * 4, pixels, a[d]);
#pragma unroll
        for (int d = 0; d < kAtOnce; ++d) {
          if (depth + d >= t.groups) break;
#pragma unroll
          for (int j = 0; j < kTermTiles; ++j) {
            if (first + j >= t.term_tiles) break;
            const uint4 b = filters[((first + j) * t.groups + depth + d) * 32];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              mma(sums[i][j], a[d][0][i], {b.x, b.y}, T{});
              mma(sums[i][j], a[d][1][i], {b.z, b.w}, T{});
            }
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kTermTiles; ++j) {
        if (first + j >= t.term_tiles) break;
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          const int term = (first + j) * 8 + pair() * 2 + v;
          *reinterpret_cast<float4*>(target + term * t.pitch + pixel) =
              make_float4(sums[0][j][v], sums[0][j][2 + v], sums[1][j][v], sums[1][j][2 + v]);
        }
      }
    }
  }

  // The fragments [instruction][row fragment] of four pixels, of which `pixels` exist, from `word` of their channels on. Pixel i is row
  // `group`, or group + 8, of fragment i / 2.
  template <bool kVector>
  __device__ void load(const T* source, int word, int pixels, uint32_t (&a)[2][2][4]) const {
    const int first = word * kPerWord<T>;
    if constexpr (kNhwc) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t words[4];
        read_words<kVector>(source + i * g.out.w + first, i < pixels ? g.group_out - first : 0, p.grad_output, words);
#pragma unroll
        for (int v = 0; v < 4; ++v) a[v / 2][i / 2][v % 2 * 2 + i % 2] = words[v];
      }
    } else {
      source += first * g.out.c;
#pragma unroll
      for (int v = 0; v < 4; ++v) {  // words of depth
        uint32_t words[kPerWord<T>][4 / kPerWord<T>];
#pragma unroll
        for (int k = 0; k < kPerWord<T>; ++k, source += g.out.c) {
          read_words<kVector>(source, first + v * kPerWord<T> + k < g.group_out ? pixels : 0, p.grad_output, words[k]);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if constexpr (sizeof(T) == 4) {
            a[v / 2][i][v % 2 * 2] = words[0][2 * i], a[v / 2][i][v % 2 * 2 + 1] = words[0][2 * i + 1];
          } else {
            a[v / 2][i][v % 2 * 2] = (words[0][i] & 0xFFFF) | words[1][i] << 16;
            a[v / 2][i][v % 2 * 2 + 1] = words[0][i] >> 16 | (words[1][i] & 0xFFFF0000);
          }
        }
      }
    }
  }

  // Adds the shares of `rows` rows of the kernel, from r on, to the sums of the inputs; after the last row stores them.
  __device__ void add_up(const PlaneIndex& at, int r, int rows) const {
    const int chunks = t.columns / 32, lines = kNhwc ? p.tiles.height : p.tiles.height * g.group_in;
    const bool is_last = r + rows == g.kernel_h;
    T* image = p.grad_input + at.outer * g.in.n;
#pragma unroll 1
    for (int index = warp(); index < lines * chunks; index += kBlockThreads / 32) {
      const int line = index / chunks, x = (index - line * chunks) * 32 + lane();
      const int row = kNhwc ? line : p.channel.quotient(line), column = kNhwc ? p.channel.quotient(x) : x;
      const int c = kNhwc ? x - column * g.group_in : line - row * g.group_in;
      const int h = at.h + row, w = at.w + column;
      float& kept = sums()[index * 32 + lane()];
      float sum = r == 0 ? 0 : kept;
      const int2 place = column_places()[x];
      const int first = place.x + (kNhwc ? 0 : c * t.pitch);
#pragma unroll 1
      for (int i = 0; i < rows; ++i) {
        const int reach = h + g.pad_top - (r + i) * g.dilation_h, oh = p.stride_h.quotient(larger(0, reach));
        if (reach < 0 || oh * g.stride_h != reach || oh >= g.out_h) continue;
        const float* share =
            shares() + i * (t.row_bytes / static_cast<int>(sizeof(float))) + (oh - first_output(at, r + i)) * t.width + first;
#pragma unroll 4
        for (int j = 0; j < place.y; ++j, share += p.next_share) sum += *share;
      }
      if (!is_last) {
        kept = sum;
      } else if (h < g.in_h && w < g.in_w) {
        if (p.bias != nullptr) sum += widen(p.bias[c]);
        image[h * g.in.h + w * g.in.w + c * g.in.c] = narrow<T>(sum);
      }
    }
  }

  const InputProblem<T>& p;
  const Conv2dGeometry& g;
  const Shares& t;
  unsigned char* shared_;
};

template <class T, bool kNhwc>
__global__ void __launch_bounds__(kBlockThreads, 2) backward_input_patch(InputProblem<T> problem, int ranges) {
  PatchBackwardInput<T, kNhwc>(problem).run(static_cast<int>(blockIdx.x), ranges);
}

bool accepts(const Conv2dShape& s) {
  // The filters' product first: what follows fits an int then.
  if (!suits_patch(s) || !all_below(kMostSharedBytes, {product({s.out_channels, s.in_channels, s.kernel_h, s.kernel_w})})) return false;
  const Conv2dGeometry g(s);
  return Shares(g, input_tiles(g), s.dtype).shared_bytes <= kMostSharedBytes;
}

Plan plan(const Conv2dShape& s) {
  const PatchTiles tiles = input_tiles(Conv2dGeometry(s));
  const int64_t all = s.batch * tiles.of_image, most = kMultiprocessors * 2;
  return {s.in_channels, int64_t{tiles.height} * tiles.width, all < most ? all : most, 0};
}

void run(const Conv2dShape& s, const Conv2dBuffers& b, void*, cudaStream_t stream) {
  with_single_type(s.dtype, [&](auto element) {
    using T = decltype(element);
    const InputProblem<T> problem(s, b);
    const int64_t blocks = plan(s).blocks;
    launch(s.layout == Layout::nhwc ? backward_input_patch<T, true> : backward_input_patch<T, false>,
           Grid(blocks, kBlockThreads, problem.shares.shared_bytes), stream, problem, static_cast<int>(blocks));
  });
}

}  // namespace

extern const Conv2dKernel conv2d_backward_input_patch_mma_sm80 = {"conv2d_backward_input_patch_mma_sm80",
                                                                  80,
                                                                  Conv2dDirection::backward_input,
                                                                  accepts,
                                                                  plan,
                                                                  run,
                                                                  /*needs_proof=*/true,
                                                                  /*adds_bias=*/true};

}  // namespace cnn_ext::cuda
