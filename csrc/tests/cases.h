// The case files that pytest reads too (tests/cases/*.csv), and the shapes of their lines.
#pragma once

#include <cstdint>
#include <fstream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/shapes.h"
#include "core/sized_pool2d.h"

namespace cnn_ext::tests {

// Of the cases, every so many-th is run with the half types.
constexpr size_t kHalfStep = 5;

// One line of a case file: the columns by name.
struct Case {
  std::string name;
  std::map<std::string, int64_t> fields;
  int64_t operator[](const std::string& field) const { return fields.at(field); }
};

inline std::vector<std::string> split(const std::string& line) {
  std::vector<std::string> items;
  std::stringstream stream(line);
  for (std::string item; std::getline(stream, item, ',');) items.push_back(item);
  return items;
}

inline std::vector<Case> read_cases(const char* path) {
  std::ifstream file(path);
  std::string line;
  if (!std::getline(file, line)) throw std::runtime_error(std::string(path) + " cannot be read");
  const std::vector<std::string> header = split(line);
  std::vector<Case> cases;
  while (std::getline(file, line)) {
    const std::vector<std::string> items = split(line);
    if (items.size() != header.size()) throw std::runtime_error(std::string(path) + ": malformed line: " + line);
    cases.push_back({items[0], {}});
    for (size_t i = 1; i < items.size(); ++i) cases.back().fields[header[i]] = std::stoll(items[i]);
  }
  return cases;
}

inline int64_t extent(int64_t size, int64_t before, int64_t after, int64_t kernel, int64_t stride, int64_t dilation, bool ceil_mode) {
  const int64_t out = (size + before + after - dilation * (kernel - 1) - 1 + (ceil_mode ? stride - 1 : 0)) / stride + 1;
  return ceil_mode && (out - 1) * stride >= size + before ? out - 1 : out;
}

// As the operators describe a problem: the stride of an axis with one output is 1.
inline int64_t stride_of(int64_t stride, int64_t outputs) { return outputs == 1 ? 1 : stride; }

inline Conv2dShape conv2d_shape(const Case& c, DType dtype, Layout layout, Layout weight_layout) {
  const int64_t out_h = extent(c["in_h"], c["pad_top"], c["pad_bottom"], c["kernel_h"], c["stride_h"], c["dilation_h"], false);
  const int64_t out_w = extent(c["in_w"], c["pad_left"], c["pad_right"], c["kernel_w"], c["stride_w"], c["dilation_w"], false);
  return {c["batch"],
          c["in_channels"],
          c["in_h"],
          c["in_w"],
          c["out_channels"],
          out_h,
          out_w,
          c["kernel_h"],
          c["kernel_w"],
          stride_of(c["stride_h"], out_h),
          stride_of(c["stride_w"], out_w),
          c["pad_top"],
          c["pad_left"],
          c["dilation_h"],
          c["dilation_w"],
          c["groups"],
          dtype,
          layout,
          weight_layout,
          /*allow_winograd=*/1,
          PaddingMode::zeros,
          /*allow_tf32=*/1};
}

// The poolings that convolutions are fused with: window and stride, the same along both axes.
constexpr int64_t kFusedPools[][2] = {{1, 1}, {2, 2}, {3, 2}, {2, 1}};

// pooled_h or pooled_w < 1: the window does not fit.
inline Conv2dReluPoolShape fused_shape(Conv2dShape conv, int64_t window, int64_t stride) {
  conv.allow_winograd = 0;
  const auto pooled = [=](int64_t size) { return size < window ? 0 : extent(size, 0, 0, window, stride, 1, false); };
  return {conv, window, window, stride, stride, pooled(conv.out_h), pooled(conv.out_w)};
}

inline Pool2dShape pool2d_shape(const Case& c, DType dtype, Layout layout) {
  const bool ceil_mode = c["ceil_mode"] != 0;
  const int64_t out_h = extent(c["in_h"], c["pad_top"], c["pad_bottom"], c["kernel_h"], c["stride_h"], c["dilation_h"], ceil_mode);
  const int64_t out_w = extent(c["in_w"], c["pad_left"], c["pad_right"], c["kernel_w"], c["stride_w"], c["dilation_w"], ceil_mode);
  return {c["batch"],
          c["channels"],
          c["in_h"],
          c["in_w"],
          out_h,
          out_w,
          c["kernel_h"],
          c["kernel_w"],
          stride_of(c["stride_h"], out_h),
          stride_of(c["stride_w"], out_w),
          c["pad_top"],
          c["pad_bottom"],
          c["pad_left"],
          c["pad_right"],
          c["dilation_h"],
          c["dilation_w"],
          c["divisor_override"],
          static_cast<int32_t>(c["count_include_pad"]),
          dtype,
          layout};
}

// The sizes of a pooling.
inline SizedPool2dShape sized_pool2d_shape(const Pool2dShape& s) {
  return {s.batch, s.channels, s.in_h, s.in_w, s.out_h, s.out_w, s.dtype, s.layout};
}

}  // namespace cnn_ext::tests
