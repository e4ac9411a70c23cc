// Plan and run of the gather convolutions that a direction is made of.
#pragma once

#include "cpu/kernels/conv2d_direct_run.inl"

namespace {

using cnn_ext::cpu::PackedForm;

// `Ends` makes a problem's gather, source and sink.
template <class T, class Tile, class Ends>
Plan plan_gathers(const Ends& ends, int threads) {
  Plan plan{Tile::kMaxWidth, Tile::kMaxPoints, 0, 0};
  for_bundles<T, Tile>(ends, [&](const Bundle& bundle) {
    const Plan one = plan_bundle<T, Tile, typename Ends::Source, typename Ends::Sink>(bundle, threads);
    plan.tasks += one.tasks;
    if (one.workspace_bytes > plan.workspace_bytes) plan.workspace_bytes = one.workspace_bytes;
  });
  return plan;
}

// packed: of a direction that is one problem.
template <class T, class Tile, class Ends>
Outcome run_gathers(const Ends& ends, const T* weight, const T* bias, Packed packed, void* workspace, int threads) {
  Outcome outcome = Outcome::done;
  for_bundles<T, Tile>(ends, [&](const Bundle& bundle) {
    if (outcome != Outcome::done) return;
    outcome = GatherRun<T, Tile, Ends>(bundle, ends, weight, bias, packed, workspace, threads).run();
  });
  return outcome;
}

template <class T, class Tile>
PackedForm packed_form(const Gather& g) {
  return {static_cast<size_t>(packed_bytes<T, Tile>(g)), 0};
}

}  // namespace
