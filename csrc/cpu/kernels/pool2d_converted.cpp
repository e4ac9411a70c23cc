// Max and average pooling of the half types: converted.inl with the float32 rows of the operator. What a part costs beside them is one pass
// over it in the second cache.
#include "cpu/kernels/converted.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

Parts parts_of(const Pool2dShape& s) { return cut(s.layout, s.batch, s.channels, 1, larger(s.in_h * s.in_w, s.out_h * s.out_w)); }

int64_t offset_bytes(const Pool2dShape& s) { return s.kernel_h * s.kernel_w <= 256 ? 1 : 4; }

// A worker's scratch: the inputs of a part, its outputs, its offsets.
struct Scratch {
  explicit Scratch(const Pool2dShape& s, const Parts& parts)
      : inputs(part_bytes(parts.images * parts.units * s.in_h * s.in_w)),
        outputs(part_bytes(parts.images * parts.units * s.out_h * s.out_w)) {}
  int64_t total() const { return inputs + 2 * outputs; }
  int64_t inputs, outputs;
};

template <class Element, Pool2dOp kOp, Pool2dDirection kDirection>
void run_part(const Pool2dShape& s, const Pool2dBuffers& b, const Parts& parts, int64_t index, char* memory) {
  const int64_t image = index / parts.unit_parts * parts.images, channel = index % parts.unit_parts * parts.units;
  Pool2dShape part = s;
  part.dtype = DType::float32;
  part.batch = smaller(parts.images, s.batch - image), part.channels = smaller(parts.units, s.channels - channel);
  const Slice in = slice_of(s.layout, s.channels, s.in_h * s.in_w, image, part.batch, channel, part.channels);
  const Slice out = slice_of(s.layout, s.channels, s.out_h * s.out_w, image, part.batch, channel, part.channels);
  const Scratch scratch(s, parts);
  float* inputs = reinterpret_cast<float*>(memory);
  float* outputs = reinterpret_cast<float*>(memory + scratch.inputs);
  char* offsets = memory + scratch.inputs + scratch.outputs;
  Pool2dBuffers buffers{};
  buffers.offsets = offsets_of(b.offsets, out, offset_bytes(s), offsets);
  if constexpr (kDirection == Pool2dDirection::backward) {
    widen(static_cast<const Element*>(b.grad_output), out, outputs);
    buffers.grad_output = outputs, buffers.grad_input = inputs;
  } else {
    widen(static_cast<const Element*>(b.input), in, inputs);
    buffers.input = inputs, buffers.output = outputs;
  }
  if constexpr (kDirection != Pool2dDirection::forward) move_offsets<false>(b.offsets, out, offset_bytes(s), offsets);
  run_float_row(kOp, kDirection, part, buffers, Isa::CNN_EXT_ISA, 1);
  if constexpr (kDirection == Pool2dDirection::backward) {
    narrow(inputs, in, static_cast<Element*>(b.grad_input));
  } else {
    narrow(outputs, out, static_cast<Element*>(b.output));
  }
  if constexpr (kDirection == Pool2dDirection::forward) move_offsets<true>(b.offsets, out, offset_bytes(s), offsets);
}

template <Pool2dOp kOp, Pool2dDirection kDirection>
void run(const Pool2dShape& s, const Pool2dBuffers& b, void* workspace, int threads) {
  const Parts parts = parts_of(s);
  const int64_t worker_bytes = Scratch(s, parts).total();
  with_half(s.dtype, [&](auto element) {
    parallel_for(threads, parts.image_parts * parts.unit_parts, [&](int worker, int64_t index) {
      run_part<decltype(element), kOp, kDirection>(s, b, parts, index, static_cast<char*>(workspace) + worker * worker_bytes);
    });
  });
}

Plan plan(const Pool2dShape& s, int threads) {
  const Parts parts = parts_of(s);
  return {parts.units, 1, parts.image_parts * parts.unit_parts, static_cast<size_t>(threads * Scratch(s, parts).total())};
}

bool accepts(const Pool2dShape& s) { return is_half(s.dtype); }

}  // namespace

#define CNN_EXT_CONVERTED_ROW(op, direction)                                                                                    \
  extern const Pool2dKernel op##_pool2d_##direction##_converted = {CNN_EXT_KERNEL_NAME(#op "_pool2d_" #direction "_converted"), \
                                                                   Isa::CNN_EXT_ISA,                                            \
                                                                   Pool2dOp::op,                                                \
                                                                   Pool2dDirection::direction,                                  \
                                                                   accepts,                                                     \
                                                                   plan,                                                        \
                                                                   run<Pool2dOp::op, Pool2dDirection::direction>};
CNN_EXT_CONVERTED_ROW(max, forward)
CNN_EXT_CONVERTED_ROW(max, backward)
CNN_EXT_CONVERTED_ROW(max, gather)
CNN_EXT_CONVERTED_ROW(avg, forward)
CNN_EXT_CONVERTED_ROW(avg, backward)

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
