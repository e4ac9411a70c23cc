// The only file with OpenMP in it. Included by the per-ISA sources: everything here has internal linkage.
#pragma once

#include <omp.h>

#include <cstdint>

namespace {

// One thread's share of the work: the next index to run, on a cache line of its own.
struct alignas(64) Share {
  int64_t next, end;
};
constexpr int kMaxShares = 256;

// One thread's part in a team: its own share, then what is left of the others'.
using RunShares = void (*)(const void* body, Share* shares, int team, int worker);

template <class Body>
void run_shares(const void* body, Share* shares, int team, int worker) {
  for (int other = 0; other < team; ++other) {
    Share& share = shares[(worker + other) % team];
    const auto next = [&] { return team == 1 ? share.next++ : __atomic_fetch_add(&share.next, 1, __ATOMIC_RELAXED); };
    for (int64_t i; (i = next()) < share.end;) (*static_cast<const Body*>(body))(worker, i);
  }
}

// Called through a pointer, once for each thread, so that a body is compiled once: alone and in a team, it would be two large copies.
__attribute__((noinline, noclone)) inline void run_team(int threads, int64_t count, const void* body, RunShares run) {
  if (threads <= 1 || count <= 1) {
    Share all{0, count};
    run(body, &all, 1, 0);
    return;
  }
  const int64_t most = threads < kMaxShares ? threads : kMaxShares;
  const int team = static_cast<int>(count < most ? count : most);
  Share shares[kMaxShares];
  for (int i = 0; i < team; ++i) shares[i] = {count * i / team, count * (i + 1) / team};
#pragma omp parallel num_threads(team)
  run(body, shares, team, omp_get_thread_num());
}

// body(worker, i) for every i in [0, count), on up to `threads` threads; each i runs whole on one thread, in no particular order.
// 0 <= worker < threads, and no two bodies that run at the same time share a worker number, so it may index per-thread scratch.
// With one thread or one piece of work no OpenMP region is entered.
//
// Each thread first runs its own share of neighbouring indices, the same in every call, so that it finds in its caches what it wrote there
// in the call before; then it takes what is left of the others'.
template <class Body>
inline void parallel_for(int threads, int64_t count, const Body& body) {
  run_team(threads, count, &body, run_shares<Body>);
}

}  // namespace
