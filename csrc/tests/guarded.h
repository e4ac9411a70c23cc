// Tensors whose first or last byte touches a page that may not be touched.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "core/half.h"

namespace cnn_ext::tests {

enum class Flush { start, end };

// Memory whose first byte lies behind a guard page, or whose last byte lies before one.
class Guarded {
 public:
  Guarded(size_t bytes, Flush flush) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t inner = std::max(page, (bytes + page - 1) / page * page);
    mapped_ = inner + 2 * page;
    base_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + page, inner, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
    data_ = base_ + page + (flush == Flush::end ? inner - bytes : 0);
#if defined(__SANITIZE_ADDRESS__)  // also what lies between the tensor and the page's other end
    ASAN_POISON_MEMORY_REGION(base_ + page, inner);
    ASAN_UNPOISON_MEMORY_REGION(data_, bytes);
#endif
  }
  ~Guarded() {
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(base_, mapped_);
#endif
    munmap(base_, mapped_);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  void* data() const { return data_; }

 private:
  char *base_, *data_;
  size_t mapped_;
};

// 64 bits for each number of a seed's sequence (splitmix64).
inline uint64_t random_bits(uint64_t seed, int64_t i) {
  uint64_t x = (seed << 40) + static_cast<uint64_t>(i) + 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// The tensors of one call, each guarded.
class Tensors {
 public:
  explicit Tensors(Flush flush) : flush_(flush) {}

  void* bytes(int64_t count, const void* source = nullptr) {
    blocks_.push_back(std::make_unique<Guarded>(static_cast<size_t>(count), flush_));
    void* data = blocks_.back()->data();
    if (source != nullptr) {
      std::memcpy(data, source, static_cast<size_t>(count));
    } else {
      std::memset(data, 0xFF, static_cast<size_t>(count));  // a NaN in every element that the kernel forgets to write
    }
    return data;
  }

  // Values in [-1, 1), the same for every call with this seed; half of them multiples of 1/4, so that a maximum meets ties, or all of
  // them (`exact`), so that sums of products meet ties, too: they are not rounded.
  template <class T>
  T* values(int64_t count, uint64_t seed, bool absolute, bool exact = false) {
    T* data = static_cast<T*>(bytes(count * static_cast<int64_t>(sizeof(T))));
    for (int64_t i = 0; i < count; ++i) {
      const uint64_t x = random_bits(seed, i);
      double value = static_cast<double>(x >> 11) / 4503599627370496.0 - 1.0;
      if (exact || (x & 1)) value = std::round(value * 4) / 4;
      data[i] = static_cast<T>(static_cast<Compute<T>>(absolute ? std::fabs(value) : value));
    }
    return data;
  }

 private:
  Flush flush_;
  std::vector<std::unique_ptr<Guarded>> blocks_;
};

}  // namespace cnn_ext::tests
