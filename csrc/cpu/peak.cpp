#include "cpu/peak.h"

#include <chrono>
#include <stdexcept>

#include "cpu/isa.h"

namespace cnn_ext::cpu {

namespace baseline {
extern const FmaLoop fma_loop;
}
#if defined(__x86_64__)
namespace avx2 {
extern const FmaLoop fma_loop;
}
namespace avx512 {
extern const FmaLoop fma_loop;
}
#endif

namespace {

const FmaLoop& best_loop() {
#if defined(__x86_64__)
  if (best_isa() >= Isa::avx512) return avx512::fma_loop;
  if (best_isa() == Isa::avx2) return avx2::fma_loop;
#endif
  return baseline::fma_loop;
}

template <class Work>
double seconds_of(const Work& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

double fma_gflops(DType dtype, int threads, double seconds) {
  if (dtype != DType::float32 && dtype != DType::float64) throw std::invalid_argument("dtype: expected float32 or float64");
  const FmaLoop& loop = best_loop();
  const auto run = dtype == DType::float32 ? loop.run_float32 : loop.run_float64;
  const int64_t flops_per_round = dtype == DType::float32 ? loop.flops_per_round_float32 : loop.flops_per_round_float64;

  // Rounds are added until one go takes half of the time: a short go would measure how long the threads take to wake.
  int64_t rounds = 100'000;
  for (;;) {
    const double elapsed = seconds_of([&] { run(rounds, threads); });
    if (elapsed >= seconds / 2) return 1e-9 * static_cast<double>(rounds) * static_cast<double>(flops_per_round) * threads / elapsed;
    rounds *= 2;
  }
}

}  // namespace cnn_ext::cpu
