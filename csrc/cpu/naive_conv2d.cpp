// The definition of the convolution and of its gradients, as loop nests: slow, for any shape, and the truth that every other row is tested
// against. Sums are kept in double for every dtype. Only taps inside the input are multiplied.
//
// Letters: n image, g group, k output channel and c input channel within the group, r and s tap, oh and ow output, ih and iw input
// position.
#include "cpu/kernel.h"
#include "cpu/naive.h"
#include "cpu/parallel.h"

namespace cnn_ext::cpu::naive {
namespace {

template <class T>
void forward(const Conv2dShape& s, const Conv2dBuffers& b, int threads) {
  const Geometry geo(s);
  const T* input = static_cast<const T*>(b.input);
  const T* weight = static_cast<const T*>(b.weight);
  const T* bias = static_cast<const T*>(b.bias);
  T* output = static_cast<T*>(b.output);
  parallel_for(threads, s.batch * s.out_channels, [&](int, int64_t task) {
    const int64_t n = task / s.out_channels, channel = task % s.out_channels;
    for (int64_t oh = 0; oh < s.out_h; ++oh) {
      for (int64_t ow = 0; ow < s.out_w; ++ow) {
        output[at(geo.out, n, channel, oh, ow)] = static_cast<T>(output_at(s, geo, input, weight, bias, n, channel, oh, ow));
      }
    }
  });
}

// The output position that reads input position i through the tap at `offset` (tap index times dilation), or -1.
int64_t output_position(int64_t i, int64_t pad, int64_t offset, int64_t stride, int64_t out_size) {
  const int64_t scaled = i + pad - offset;
  if (scaled < 0 || scaled % stride != 0 || scaled / stride >= out_size) return -1;
  return scaled / stride;
}

// visit(position) for the input position i of an axis, and for every position of the padding that holds its value and is read.
template <class Visit>
void for_each_copy(PaddingMode mode, int64_t i, int64_t size, int64_t pad, int64_t span, const Visit& visit) {
  if (mode == PaddingMode::zeros) return visit(i);
  for (int64_t position = -pad; position < span - pad; ++position) {
    if (source_position(mode, position, size) == i) visit(position);
  }
}

template <class T>
void backward_input(const Conv2dShape& s, const Conv2dBuffers& b, int threads) {
  const Geometry geo(s);
  const T* grad_output = static_cast<const T*>(b.grad_output);
  const T* weight = static_cast<const T*>(b.weight);
  const T* bias = static_cast<const T*>(b.bias);
  T* grad_input = static_cast<T*>(b.grad_input);
  const int64_t span_h = (s.out_h - 1) * s.stride_h + (s.kernel_h - 1) * s.dilation_h + 1;  // positions that are read
  const int64_t span_w = (s.out_w - 1) * s.stride_w + (s.kernel_w - 1) * s.dilation_w + 1;
  parallel_for(threads, s.batch * s.in_channels, [&](int, int64_t task) {
    const int64_t n = task / s.in_channels, channel = task % s.in_channels;
    const int64_t c = channel % geo.group_in, first_out = channel / geo.group_in * geo.group_out;
    for (int64_t ih = 0; ih < s.in_h; ++ih) {
      for (int64_t iw = 0; iw < s.in_w; ++iw) {
        double sum = bias != nullptr ? static_cast<double>(bias[channel]) : 0.0;
        for_each_copy(s.padding_mode, ih, s.in_h, s.pad_top, span_h, [&](int64_t h) {
          for_each_copy(s.padding_mode, iw, s.in_w, s.pad_left, span_w, [&](int64_t w) {
            for (int64_t r = 0; r < s.kernel_h; ++r) {
              const int64_t oh = output_position(h, s.pad_top, r * s.dilation_h, s.stride_h, s.out_h);
              if (oh < 0) continue;
              for (int64_t t = 0; t < s.kernel_w; ++t) {
                const int64_t ow = output_position(w, s.pad_left, t * s.dilation_w, s.stride_w, s.out_w);
                if (ow < 0) continue;
                for (int64_t k = 0; k < geo.group_out; ++k) {
                  sum += static_cast<double>(grad_output[at(geo.out, n, first_out + k, oh, ow)]) *
                         static_cast<double>(weight[at(geo.weight, first_out + k, c, r, t)]);
                }
              }
            }
          });
        });
        grad_input[at(geo.in, n, channel, ih, iw)] = static_cast<T>(static_cast<Compute<T>>(sum));
      }
    }
  });
}

template <class T>
void backward_weight(const Conv2dShape& s, const Conv2dBuffers& b, int threads) {
  const Geometry geo(s);
  const T* grad_output = static_cast<const T*>(b.grad_output);
  const T* input = static_cast<const T*>(b.input);
  T* grad_weight = static_cast<T*>(b.grad_weight);
  parallel_for(threads, s.out_channels * geo.group_in, [&](int, int64_t task) {
    const int64_t k = task / geo.group_in, c = task % geo.group_in;
    const int64_t first_in = k / geo.group_out * geo.group_in;
    for (int64_t r = 0; r < s.kernel_h; ++r) {
      for (int64_t t = 0; t < s.kernel_w; ++t) {
        double sum = 0.0;
        for (int64_t n = 0; n < s.batch; ++n) {
          for (int64_t oh = 0; oh < s.out_h; ++oh) {
            const int64_t ih = source_position(s.padding_mode, oh * s.stride_h - s.pad_top + r * s.dilation_h, s.in_h);
            if (ih < 0) continue;
            for (int64_t ow = 0; ow < s.out_w; ++ow) {
              const int64_t iw = source_position(s.padding_mode, ow * s.stride_w - s.pad_left + t * s.dilation_w, s.in_w);
              if (iw < 0) continue;
              sum += static_cast<double>(grad_output[at(geo.out, n, k, oh, ow)]) *
                     static_cast<double>(input[at(geo.in, n, first_in + c, ih, iw)]);
            }
          }
        }
        grad_weight[at(geo.weight, k, c, r, t)] = static_cast<T>(static_cast<Compute<T>>(sum));
      }
    }
  });
}

template <class T>
void backward_bias(const Conv2dShape& s, const Conv2dBuffers& b, int threads) {
  const Geometry geo(s);
  const T* grad_output = static_cast<const T*>(b.grad_output);
  T* grad_bias = static_cast<T*>(b.grad_bias);
  parallel_for(threads, s.out_channels, [&](int, int64_t k) {
    double sum = 0.0;
    for (int64_t n = 0; n < s.batch; ++n) {
      for (int64_t oh = 0; oh < s.out_h; ++oh) {
        for (int64_t ow = 0; ow < s.out_w; ++ow) sum += static_cast<double>(grad_output[at(geo.out, n, k, oh, ow)]);
      }
    }
    grad_bias[k] = static_cast<T>(static_cast<Compute<T>>(sum));
  });
}

bool accepts(const Conv2dShape&) { return true; }

Plan plan(const Conv2dShape& s, int) { return {1, 1, s.batch * s.out_channels, 0}; }

}  // namespace

#define CNN_EXT_NAIVE_ROW(direction)                                                                                           \
  static Outcome run_##direction(const Conv2dShape& s, const Conv2dBuffers& b, void*, int threads) {                           \
    with_scalar(s.dtype, [&](auto scalar) { direction<decltype(scalar)>(s, b, threads); });                                    \
    return Outcome::done;                                                                                                      \
  }                                                                                                                            \
  extern const Conv2dKernel conv2d_##direction = {"conv2d_" #direction "_naive_baseline",                                      \
                                                  Isa::baseline,                                                               \
                                                  Conv2dDirection::direction,                                                  \
                                                  accepts,                                                                     \
                                                  plan,                                                                        \
                                                  run_##direction,                                                             \
                                                  /*adds_bias=*/Conv2dDirection::direction == Conv2dDirection::backward_input, \
                                                  /*maps_padding=*/true};
CNN_EXT_NAIVE_ROW(forward)
CNN_EXT_NAIVE_ROW(backward_input)
CNN_EXT_NAIVE_ROW(backward_weight)
CNN_EXT_NAIVE_ROW(backward_bias)

}  // namespace cnn_ext::cpu::naive
