// What a row of the table needs of the products of tiles: its plan and its run, one gather convolution after the other.
#pragma once

#include "cpu/float_rows.h"
#include "cpu/kernels/amx/conv2d_amx_run.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

// The functions of a table row of one type on one unit. A float16 that is not finite has parts that make NaNs of infinities, and so has
// what is read beyond a run: an image that met one is computed again by the row of a lesser instruction set, which converts, alone, so that
// the others keep their bits.
template <class Element, class Unit, class Staged, Conv2dDirection kDirection>
struct TileRow {
  using Run = TileRun<Element, Unit, Staged>;
  static constexpr bool kForward = kDirection == Conv2dDirection::forward, kHasSuspects = kParts<Element> > 1 || Staged::kReadsOn;
  static Conv2dShape one_image(Conv2dShape s) {
    s.batch = 1;
    return s;
  }
  static size_t suspects_bytes(const Conv2dShape& s) { return kHasSuspects ? static_cast<size_t>(aligned(s.batch)) : 0; }

  static Plan plan(const Conv2dShape& s, int threads) {
    Plan plan{kOutputs, kPoints, 0, 0};
    for (int64_t i = 0; i < gather_count(kDirection, s); ++i) {
      const Gather g = make_gather_of_rows(kDirection, s, i);
      if (g.is_empty()) continue;
      const Plan one = Run(g, nullptr, nullptr, nullptr, nullptr, {}, nullptr, nullptr, threads).plan();
      plan.tasks += one.tasks;
      if (one.workspace_bytes > plan.workspace_bytes) plan.workspace_bytes = one.workspace_bytes;
    }
    plan.workspace_bytes += suspects_bytes(s);
    return plan;
  }

  static Outcome run(const Conv2dShape& s, const Conv2dBuffers& b, Packed packed, void* workspace, int threads) {
    const auto* source = static_cast<const Element*>(kForward ? b.input : b.grad_output);
    auto* dest = static_cast<Element*>(kForward ? b.output : b.grad_input);
    const auto *weight = static_cast<const Element*>(b.weight), *bias = static_cast<const Element*>(b.bias);
    uint8_t* const suspects = kHasSuspects ? static_cast<uint8_t*>(workspace) : nullptr;
    if constexpr (kHasSuspects) __builtin_memset(suspects, 0, suspects_bytes(s));
    char* const memory = static_cast<char*>(workspace) + suspects_bytes(s);
    for (int64_t i = 0; i < gather_count(kDirection, s); ++i) {
      const Gather g = make_gather_of_rows(kDirection, s, i);
      if (g.is_empty()) continue;
      if (Run(g, source, weight, bias, dest, packed, suspects, memory, threads).run() == Outcome::not_finite) {
        return Outcome::not_finite;
      }
    }
    for (int64_t n = 0; kHasSuspects && n < s.batch; ++n) {
      if (suspects[n] != 0) run_again(s, b, n, threads);
    }
    return Outcome::done;
  }

  static PackedForm form(const Conv2dShape& s) {
    const Gather g = make_gather_of_rows(Conv2dDirection::forward, s, 0);
    return {Run(g, nullptr, nullptr, nullptr, nullptr, {}, nullptr, nullptr, 1).packed_bytes(), 0};
  }

 private:
  static void run_again(const Conv2dShape& s, const Conv2dBuffers& b, int64_t n, int threads) {
    const int64_t input = n * s.in_channels * s.in_h * s.in_w, output = n * s.out_channels * s.out_h * s.out_w;
    Conv2dBuffers image = b;
    if (kForward) {
      image.input = static_cast<const Element*>(b.input) + input, image.output = static_cast<Element*>(b.output) + output;
    } else {
      image.grad_output = static_cast<const Element*>(b.grad_output) + output,
      image.grad_input = static_cast<Element*>(b.grad_input) + input;
    }
    run_float_row(kDirection, one_image(s), image, Isa::avx512, threads);
  }
};

}  // namespace
}  // namespace cnn_ext::cpu::CNN_EXT_ISA
