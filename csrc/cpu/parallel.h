// The only file with OpenMP in it. Included by the per-ISA sources: everything here has internal linkage.
#pragma once

#include <omp.h>

#include <cstdint>

namespace {

// body(worker, i) for every i in [0, count), on up to `threads` threads; each i runs whole on one thread, in no particular order.
// 0 <= worker < threads, and no two bodies that run at the same time share a worker number, so it may index per-thread scratch.
// With one thread or one piece of work no OpenMP region is entered.
template <class Body>
inline void parallel_for(int threads, int64_t count, const Body& body) {
  if (threads <= 1 || count <= 1) {
    for (int64_t i = 0; i < count; ++i) body(0, i);
    return;
  }
  const int team = count < threads ? static_cast<int>(count) : threads;
#pragma omp parallel num_threads(team)
  {
    const int worker = omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; ++i) body(worker, i);
  }
}

}  // namespace
