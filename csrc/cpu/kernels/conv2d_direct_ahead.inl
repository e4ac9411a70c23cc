// Memory that will be touched soon is fetched towards the second cache while register tiles sum, a line at a step of a tile at most: more
// at once would make the tile itself wait for its loads.
#pragma once

#include <cstdint>

namespace cnn_ext::cpu::CNN_EXT_ISA {

// What a register tile fetches on its way: at each of its first `count` steps the line at `at`, which then moves on by `step` bytes, and
// after them the last one again. (Where there is nothing to fetch: any line at hand. A null pointer is looked up every time.)
struct Fetch {
  const char* at;
  int64_t step, count;
};

}  // namespace cnn_ext::cpu::CNN_EXT_ISA

namespace {

using cnn_ext::cpu::CNN_EXT_ISA::Fetch;

constexpr int64_t kLineBytes = 64;

template <class T>
Fetch fetch_nothing(const T* at_hand) {
  return {reinterpret_cast<const char*>(at_hand), 0, 0};
}

// Runs of `run` neighbouring elements at the places of three nested loops, handed out piece by piece to a number of tiles.
template <class T>
class Ahead {
 public:
  struct Loop {
    int64_t count, stride;
  };

  Ahead() = default;
  Ahead(const T* first, Loop outer, Loop middle, Loop inner, int64_t run) : loops_{outer, middle, inner}, run_(run), place_(first) {
    runs_left_ = run > 0 ? outer.count * middle.count * inner.count : 0;
  }

  Ahead(const T* first, int64_t run) : Ahead(first, {1, 0}, {1, 0}, {1, 0}, run) {}

  void share_out(int64_t tiles) {
    const int64_t pieces = runs_left_ == 0 ? 0 : tiles / runs_left_;  // of a run
    piece_ = pieces > 1 ? (run_ + pieces - 1) / pieces : run_;
  }

  // The next piece, spread over the steps of a tile; if there is none, `at_hand`.
  Fetch next(int64_t steps, const T* at_hand) {
    if (runs_left_ == 0 || steps == 0) return fetch_nothing(at_hand);
    const int64_t left = run_ - done_, count = piece_ < left ? piece_ : left;
    const Fetch fetch{reinterpret_cast<const char*>(place_ + done_), (count * kSize + steps - 1) / steps, steps};
    done_ += count;
    if (done_ == run_) next_run();
    return fetch;
  }

 private:
  static constexpr int64_t kSize = sizeof(T);

  void next_run() {
    --runs_left_;
    done_ = 0;
    for (int i = 2; i >= 0; --i) {
      place_ += loops_[i].stride;
      if (++turn_[i] < loops_[i].count) return;
      place_ -= loops_[i].count * loops_[i].stride;
      turn_[i] = 0;
    }
  }

  Loop loops_[3] = {};
  int64_t turn_[3] = {};
  int64_t run_ = 0, piece_ = 0, done_ = 0;  // elements of a run, of a piece, and those of the present run that were handed out
  const T* place_ = nullptr;                // of the present run
  int64_t runs_left_ = 0;
};

}  // namespace
