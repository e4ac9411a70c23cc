// Launches that begin while the one before them on the stream still runs (sm_90): their blocks are set up, then wait for its results. A
// kernel that is launched so calls wait_for_launch_before() before it touches global memory.
#pragma once

#include "cuda/launch.cuh"

namespace cnn_ext::cuda {

inline Grid overlapping(Grid grid) {
  grid.overlaps = true;
  return grid;
}

// Returns when all of the launch before has ended and its results are there; lets the next one begin.
__device__ inline void wait_for_launch_before() { asm volatile("griddepcontrol.wait; griddepcontrol.launch_dependents;" ::: "memory"); }

}  // namespace cnn_ext::cuda
