// The main loop of the products: steps of the depth are fetched into a ring of stages while two warpgroups multiply them.
#pragma once

#include "cuda/common.cuh"
#include "cuda/sm90a/tensor_map.cuh"
#include "cuda/sm90a/wgmma.cuh"

namespace cnn_ext::cuda {

constexpr int kMostStages = 8;
// Of the device that tiles and splits are chosen for.
constexpr int64_t kMultiprocessors = 132;
// Blocks in clusters that it runs at once, one to a multiprocessor: a cluster lies within a group of 16 or 18 of them, some of which are
// taken.
inline int64_t blocks_at_once(int64_t cluster_blocks) {
  return cluster_blocks == 1 ? kMultiprocessors : cluster_blocks == 2 ? 128 : cluster_blocks == 4 ? 112 : 96;
}

// As many stages as fit a block besides other_bytes; where narrow tiles run two to a multiprocessor, half of its shared memory.
inline int pipeline_stages(int stage_bytes, bool two_blocks, int other_bytes = 0) {
  constexpr int kBlockBytes = 224 * 1024;
  const int fitting = ((two_blocks ? kBlockBytes / 2 : kBlockBytes) - other_bytes) / stage_bytes;
  return fitting < kMostStages ? fitting : kMostStages;
}

// All threads of the block come here before the pipeline.
__device__ inline void init_pipeline(uint64_t* barriers, int stages) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < stages; ++i) init_barrier(barriers + i);
    fence_barriers();
  }
  __syncthreads();
}

// The next of the stages, and which of its uses it is.
class Ring {
 public:
  __device__ explicit Ring(int stages, int stage = 0) : stages_(stages), stage_(stage) {}
  __device__ void advance() {
    if (++stage_ == stages_) stage_ = 0, parity_ ^= 1;
  }
  __device__ int stage() const { return stage_; }
  __device__ int parity() const { return parity_; }

 private:
  int stages_, stage_, parity_ = 0;
};

// Called by all threads: fetch(stage, step) announces and fetches a step, multiply(stage, step) queues its products. One stage is
// multiplied, one has just been, the others are on their way. Afterwards shared memory is free.
template <class Fetch, class Multiply>
__device__ void pipeline(uint64_t* barriers, int stages, int steps, const Fetch& fetch, const Multiply& multiply) {
  const int ahead = stages - 2;
  for (int step = 0; step < smaller(ahead, steps); ++step) fetch(step, step);
  Ring ring(stages), next(stages, ahead);
  for (int step = 0; step < steps; ++step) {
    __syncthreads();  // all warpgroups are done with the step before the last, whose stage is the next to be filled
    wait_barrier(barriers + ring.stage(), ring.parity());
    multiply(ring.stage(), step);
    if (step + ahead < steps) fetch(next.stage(), step + ahead);
    ring.advance();
    next.advance();
    wgmma_wait<1>();
  }
  wgmma_wait<0>();
  __syncthreads();
}

}  // namespace cnn_ext::cuda
