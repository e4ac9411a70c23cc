// The packed weight of one layer, kept between its calls.
#pragma once

#include <cstdlib>
#include <memory>
#include <mutex>

#include "cpu/packed.h"

namespace cnn_ext::cpu {

// Keeps one weight in the form that the last call needed: no more than one, however many shapes come. It belongs to one weight that does
// not change; who changes the weight takes a new object. Calls may come from several threads.
class PackedWeight {
 public:
  // A packed weight and what it was packed for.
  struct Content {
    const void* row;  // of the table
    PackedForm form;
    int64_t groups;
    std::unique_ptr<void, void (*)(void*)> data{nullptr, std::free};

    bool matches(const Content& other) const {
      return row == other.row && groups == other.groups && form.bytes == other.form.bytes && form.variant == other.form.variant;
    }
  };

  // What is kept, if anything; it stays alive with the pointer.
  std::shared_ptr<const Content> get() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return content_;
  }
  void set(std::shared_ptr<const Content> content) {
    const std::lock_guard<std::mutex> lock(mutex_);
    content_ = std::move(content);
  }
  size_t bytes() const {
    const auto content = get();
    return content == nullptr ? 0 : content->form.bytes;
  }

 private:
  mutable std::mutex mutex_;
  std::shared_ptr<const Content> content_;
};

}  // namespace cnn_ext::cpu
