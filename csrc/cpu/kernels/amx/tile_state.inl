// The matrix unit as its rows use it: eight tiles of 16 rows of 64 bytes.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace cnn_ext::cpu::CNN_EXT_ISA {
namespace {

// The state of the matrix unit belongs to the thread, and others may have left theirs.
class TileState {
 public:
  TileState() {
    _tile_storeconfig(&before_);
    Config config{};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = 16;
    _tile_loadconfig(&config);
  }
  ~TileState() { _tile_loadconfig(&before_); }
  TileState(const TileState&) = delete;
  TileState& operator=(const TileState&) = delete;

 private:
  struct alignas(64) Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  Config before_;
};

}  // namespace
}  // namespace cnn_ext::cpu::CNN_EXT_ISA
