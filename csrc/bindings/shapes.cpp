// The shape structs for Python, constructed from keywords named as their fields. What pybind11 instantiates for a function costs the
// compiler 0.1 s: hence the enumerations that are Python's own, and one reader of all fields.
#include "core/shapes.h"

#include <pybind11/native_enum.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "core/sized_pool2d.h"

namespace py = pybind11;

namespace cnn_ext {
namespace {

// Sets every field of a shape from the keyword of its name; a missing or a surplus keyword is an error.
template <class Shape>
class FromKeywords {
 public:
  explicit FromKeywords(const py::kwargs& keywords) : keywords_(keywords) {}

  template <class T>
  FromKeywords& set(const char* name, T Shape::* field) {
    if (!keywords_.contains(name)) throw py::type_error(std::string("missing field ") + name);
    shape_.*field = keywords_[name].template cast<T>();
    ++used_;
    return *this;
  }

  Shape finish() const {
    if (used_ != keywords_.size()) throw py::type_error("unknown field among the keywords");
    return shape_;
  }

 private:
  const py::kwargs& keywords_;
  size_t used_ = 0;
  Shape shape_{};
};

// Visits every field of a shape with its name, in one place for construction and for reading.
template <class Visitor>
void visit_fields(Visitor& v, Conv2dShape*) {
  using S = Conv2dShape;
  v.set("batch", &S::batch).set("in_channels", &S::in_channels).set("in_h", &S::in_h).set("in_w", &S::in_w);
  v.set("out_channels", &S::out_channels).set("out_h", &S::out_h).set("out_w", &S::out_w);
  v.set("kernel_h", &S::kernel_h).set("kernel_w", &S::kernel_w).set("stride_h", &S::stride_h).set("stride_w", &S::stride_w);
  v.set("pad_top", &S::pad_top).set("pad_left", &S::pad_left).set("dilation_h", &S::dilation_h).set("dilation_w", &S::dilation_w);
  v.set("groups", &S::groups).set("dtype", &S::dtype).set("layout", &S::layout).set("weight_layout", &S::weight_layout);
  v.set("allow_winograd", &S::allow_winograd).set("allow_tf32", &S::allow_tf32);
  v.set("padding_mode", &S::padding_mode);
}

template <class Visitor>
void visit_fields(Visitor& v, Conv2dReluPoolShape*) {
  using S = Conv2dReluPoolShape;
  v.set("conv", &S::conv).set("pool_h", &S::pool_h).set("pool_w", &S::pool_w);
  v.set("pool_stride_h", &S::pool_stride_h).set("pool_stride_w", &S::pool_stride_w);
  v.set("pooled_h", &S::pooled_h).set("pooled_w", &S::pooled_w);
}

template <class Visitor>
void visit_fields(Visitor& v, Pool2dShape*) {
  using S = Pool2dShape;
  v.set("batch", &S::batch).set("channels", &S::channels).set("in_h", &S::in_h).set("in_w", &S::in_w);
  v.set("out_h", &S::out_h).set("out_w", &S::out_w).set("kernel_h", &S::kernel_h).set("kernel_w", &S::kernel_w);
  v.set("stride_h", &S::stride_h).set("stride_w", &S::stride_w).set("pad_top", &S::pad_top).set("pad_bottom", &S::pad_bottom);
  v.set("pad_left", &S::pad_left).set("pad_right", &S::pad_right).set("dilation_h", &S::dilation_h).set("dilation_w", &S::dilation_w);
  v.set("divisor_override", &S::divisor_override).set("count_include_pad", &S::count_include_pad);
  v.set("dtype", &S::dtype).set("layout", &S::layout);
}

template <class Visitor>
void visit_fields(Visitor& v, SizedPool2dShape*) {
  using S = SizedPool2dShape;
  v.set("batch", &S::batch).set("channels", &S::channels).set("in_h", &S::in_h).set("in_w", &S::in_w);
  v.set("out_h", &S::out_h).set("out_w", &S::out_w).set("dtype", &S::dtype).set("layout", &S::layout);
}

// Reads the field that has the wanted name; without one, `value` stays empty.
template <class Shape>
struct FieldReader {
  const Shape& shape;
  const std::string& wanted;
  py::object value{};

  template <class T>
  FieldReader& set(const char* name, T Shape::* field) {
    if (wanted == name) value = py::cast(shape.*field);
    return *this;
  }
};

void set_tf32(Conv2dShape& shape, bool allowed) { shape.allow_tf32 = allowed; }
void set_tf32(Conv2dReluPoolShape& shape, bool allowed) { shape.conv.allow_tf32 = allowed; }
void set_tf32(Pool2dShape&, bool) {}
void set_tf32(SizedPool2dShape&, bool) {}

template <class Shape>
void bind_shape(py::module_& m, const char* name) {
  py::class_<Shape> type(m, name);
  type.def(py::init([](const py::kwargs& keywords) {
    FromKeywords<Shape> fields(keywords);
    visit_fields(fields, static_cast<Shape*>(nullptr));
    return fields.finish();
  }));
  type.def("__getattr__", [](const Shape& shape, const std::string& name) {
    FieldReader<Shape> reader{shape, name};
    visit_fields(reader, static_cast<Shape*>(nullptr));
    if (!reader.value) throw py::attribute_error(name);
    return reader.value;
  });
  type.def("with_tf32", [](Shape shape, bool allowed) {
    set_tf32(shape, allowed);
    return shape;
  });
}

}  // namespace

void bind_shapes(py::module_& m) {
  py::native_enum<DType>(m, "DType", "enum.Enum")
      .value("float32", DType::float32)
      .value("float64", DType::float64)
      .value("float16", DType::float16)
      .value("bfloat16", DType::bfloat16)
      .finalize();
  py::native_enum<Layout>(m, "Layout", "enum.Enum").value("nchw", Layout::nchw).value("nhwc", Layout::nhwc).finalize();
  py::native_enum<PaddingMode>(m, "PaddingMode", "enum.Enum")
      .value("zeros", PaddingMode::zeros)
      .value("reflect", PaddingMode::reflect)
      .value("replicate", PaddingMode::replicate)
      .value("circular", PaddingMode::circular)
      .finalize();
  py::native_enum<Conv2dDirection>(m, "Conv2dDirection", "enum.Enum")
      .value("forward", Conv2dDirection::forward)
      .value("backward_input", Conv2dDirection::backward_input)
      .value("backward_weight", Conv2dDirection::backward_weight)
      .value("backward_bias", Conv2dDirection::backward_bias)
      .finalize();
  py::native_enum<Pool2dOp>(m, "Pool2dOp", "enum.Enum").value("max", Pool2dOp::max).value("avg", Pool2dOp::avg).finalize();
  py::native_enum<Pool2dDirection>(m, "Pool2dDirection", "enum.Enum")
      .value("forward", Pool2dDirection::forward)
      .value("backward", Pool2dDirection::backward)
      .value("gather", Pool2dDirection::gather)
      .finalize();
  py::native_enum<SizedPool2dOp>(m, "SizedPool2dOp", "enum.Enum")
      .value("adaptive_max", SizedPool2dOp::adaptive_max)
      .value("adaptive_avg", SizedPool2dOp::adaptive_avg)
      .value("max_unpool", SizedPool2dOp::max_unpool)
      .finalize();
  py::native_enum<SizedPool2dDirection>(m, "SizedPool2dDirection", "enum.Enum")
      .value("forward", SizedPool2dDirection::forward)
      .value("backward", SizedPool2dDirection::backward)
      .value("scatter", SizedPool2dDirection::scatter)
      .value("gather", SizedPool2dDirection::gather)
      .finalize();
  bind_shape<Conv2dShape>(m, "Conv2dShape");
  bind_shape<Conv2dReluPoolShape>(m, "Conv2dReluPoolShape");
  bind_shape<Pool2dShape>(m, "Pool2dShape");
  bind_shape<SizedPool2dShape>(m, "SizedPool2dShape");
}

}  // namespace cnn_ext
