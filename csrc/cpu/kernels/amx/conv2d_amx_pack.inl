// The weights of 32 outputs for the matrix unit: [block of 32 channels][tap row][tap column][half of the outputs], each a tile of 16 pairs
// of channels x 16 outputs x 2. Where an element has two parts, the tiles of the upper one are followed by those of the rest.
#pragma once

#include "cpu/kernels/amx/conv2d_amx_stage.inl"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

// The pairs of channels of one tile: rows of 16 outputs.
using PairRows = Vec<float>[kTilePoints];

// src: the first channel of the first output at one tap; `channels` and `outputs` of them exist.
template <class Element>
inline void load_pairs(const Gather& g, const Element* src, int64_t channels, int64_t outputs, PairRows& pairs) {
  constexpr int kV = kLanes<float>;
  if (g.weight_output == 1) {
    const auto row = [&](int64_t c) {
      const int count = c < channels ? static_cast<int>(clamp(outputs, 0, kV)) : 0;
      return __builtin_convertvector(bits_between(src + c * g.weight_channel, 0, count), FloatBits);
    };
#pragma GCC unroll 16
    for (int q = 0; q < kV; ++q) pairs[q] = (Vec<float>)(row(2 * q) | row(2 * q + 1) << 16);
    return;
  }
  const __mmask32 mask = channels >= kTileChannels ? ~__mmask32{0} : (__mmask32{1} << channels) - 1;
  for (int o = 0; o < kV; ++o) {
    const Element* output = src + o * g.weight_output;
    if (o >= outputs) {
      pairs[o] = Vec<float>{};
    } else if (g.weight_channel == 1) {
      pairs[o] = (Vec<float>)_mm512_maskz_loadu_epi16(mask, output);
    } else if (g.channels % 2 == 0) {
      // Words that hold an even channel in the lower half, and words that hold an odd one in the upper half, so that none reaches over the
      // end.
      const Pairs lane = (Pairs)_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      const __m512i at = (__m512i)(lane * static_cast<uint32_t>(2 * g.weight_channel));
      const __mmask16 lanes = static_cast<__mmask16>(first_bits(static_cast<int>(clamp(channels, 0, kTileChannels) / 2)));
      const Pairs even = (Pairs)_mm512_mask_i32gather_epi32(__m512i{}, lanes, at, output, sizeof(Element));
      const Pairs odd = (Pairs)_mm512_mask_i32gather_epi32(__m512i{}, lanes, at, output + g.weight_channel - 1, sizeof(Element));
      pairs[o] = (Vec<float>)((even & 0xffff) | (odd & 0xffff0000u));
    } else {
      alignas(64) uint16_t values[kTileChannels] = {};
      for (int64_t c = 0; c < clamp(channels, 0, kTileChannels); ++c) values[c] = output[c * g.weight_channel].bits;
      pairs[o] = _mm512_load_ps(values);
    }
  }
  transpose<float>(pairs);
}

// Whether all weights are finite.
template <class Element>
inline bool pack_unit(const Gather& g, const Staged& staged, const Element* src, int64_t outputs, BFloat16* dst) {
  __mmask32 not_finite = 0;
  for (int64_t block = 0; block < staged.channel_blocks; ++block) {
    for (int64_t r = 0; r < g.h.taps; ++r) {
      for (int64_t s = 0; s < g.w.taps; ++s) {
        const Element* tap = src + block * kTileChannels * g.weight_channel + (g.h.kernel_first + r * g.h.kernel_step) * g.weight_h +
                             (g.w.kernel_first + s * g.w.kernel_step) * g.weight_w;
        for (int64_t half = 0; half < 2; ++half) {
          PairRows pairs;
          load_pairs(g, tap + half * kTileOutputs * g.weight_output, g.channels - block * kTileChannels, outputs - half * kTileOutputs,
                     pairs);
          for (int q = 0; q < kTilePoints; ++q) {
            BFloat16* const row = dst + half * kTileElements + q * 2 * kTileOutputs;
            const Pairs upper = store_parts((Pairs)pairs[q], row, 2 * kTileElements, Element{});
            const __m512i magnitude = (__m512i)(upper & 0x7fff7fffu);
            not_finite |= _mm512_cmpge_epu16_mask(magnitude, _mm512_set1_epi16(0x7f80));
          }
        }
        dst += kParts<Element> * 2 * kTileElements;
      }
    }
  }
  return not_finite == 0;
}

}  // namespace
}  // namespace cnn_ext::cpu::CNN_EXT_ISA
