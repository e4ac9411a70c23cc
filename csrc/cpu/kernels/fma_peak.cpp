// Not a kernel but what kernels are measured against: multiply-adds that depend on nothing but their own accumulator.
//
// 12 accumulators: 2 units x 4 cycles of latency need 8 at least, and 12 with the two operands fit the 16 registers of avx2. An empty asm
// statement per round keeps the compiler from folding the rounds into one. Baseline has no FMA and multiplies and adds apart.
#include "cpu/parallel.h"
#include "cpu/peak.h"
#include "cpu/simd/vec.h"

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

constexpr int kAccumulators = 12;

template <class T>
constexpr int64_t kFlopsPerRound = int64_t{2} * kAccumulators * kLanes<T>;

template <class T>
void run_on_this_thread(int64_t rounds) {
  Vec<T> factor = broadcast<T>(T(0.5)), summand = broadcast<T>(T(1));
  asm volatile("" : "+" CNN_EXT_VECTOR_REGISTER(factor), "+" CNN_EXT_VECTOR_REGISTER(summand));
  Vec<T> sums[kAccumulators] = {};
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kAccumulators; ++i) sums[i] = fma(sums[i], factor, summand);
#pragma GCC unroll 12
    for (int i = 0; i < kAccumulators; ++i) asm volatile("" : "+" CNN_EXT_VECTOR_REGISTER(sums[i]));
  }
}

template <class T>
void run(int64_t rounds, int threads) {
  parallel_for(threads, threads, [&](int, int64_t) { run_on_this_thread<T>(rounds); });
}

}  // namespace

extern const FmaLoop fma_loop = {Isa::CNN_EXT_ISA, kFlopsPerRound<float>, kFlopsPerRound<double>, &run<float>, &run<double>};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA
