// Python bindings of temporal_resample: sorts and merges the pixel dimensions into a
// ResampleLayout, checks that the timing stays inside the tensors, and picks the device.
#include "../core/bind.h"
#include "temporal_resample.h"

#include <algorithm>
#include <array>
#include <vector>

namespace vtok {
namespace {

constexpr int kVideoDims = 5;  // [B, C, T, H, W]
constexpr int kTimeDim = 2;
constexpr int64_t kMaxFrames = int64_t{1} << 29;  // twice as many still fit into an int

using Views = std::array<const TensorView*, kNumResampleTensors>;

// Frames of each tensor as the timing asks for.
int64_t frames_of(const ResampleTiming& timing, int tensor) {
  switch (tensor) {
    case kResampleX:
    case kResampleGradX: return timing.num_sources - timing.num_carried;
    case kResampleCarried:
    case kResampleGradCarried: return timing.num_carried;
    case kResampleFront:
    case kResampleGradFront: return timing.num_padding;
    default: return timing.num_outputs;
  }
}

void check_view(const TensorView& view, const TensorView& out, int64_t frames) {
  VTOK_CHECK_TYPE(view.dtype == out.dtype, "temporal_resample: tensors must be ",
                  name_of(out.dtype), ", got ", name_of(view.dtype));
  bool fits = view.num_dims == kVideoDims;
  for (int dim = 0; fits && dim < kVideoDims; ++dim) {
    fits = view.shape[dim] == (dim == kTimeDim ? frames : out.shape[dim]);
  }
  VTOK_CHECK_VALUE(fits, "temporal_resample: a tensor must have ", frames, " frames of ",
                   shape_string(out), ", got ", shape_string(view));
}

bool can_merge(const ResampleDim& outer, const ResampleDim& inner) {
  for (int tensor = 0; tensor < kNumResampleTensors; ++tensor) {
    if (outer.strides[tensor] != inner.size * inner.strides[tensor]) return false;
  }
  return true;
}

// `order` is the tensor whose memory order the pixels follow.
ResampleLayout make_layout(const ResampleTiming& timing, const Views& views, int order) {
  ResampleLayout layout{};
  layout.timing = timing;
  layout.num_pixels = 1;
  const TensorView& out = *views[kResampleOut];
  VTOK_CHECK_VALUE(out.num_dims == kVideoDims, "temporal_resample: out must be [B, C, T, H, W]");
  std::vector<ResampleDim> dims;
  for (const int dim : {0, 1, 3, 4}) {
    layout.num_pixels *= out.shape[dim];
    if (out.shape[dim] == 1) continue;
    dims.push_back({out.shape[dim], {}});
    for (int tensor = 0; tensor < kNumResampleTensors; ++tensor) {
      const TensorView* view = views[tensor];
      if (view != nullptr && view->data != nullptr)
        dims.back().strides[tensor] = view->strides[dim];
    }
  }
  for (int tensor = 0; tensor < kNumResampleTensors; ++tensor) {
    const TensorView* view = views[tensor];
    if (view == nullptr || view->data == nullptr) continue;
    check_view(*view, out, frames_of(timing, tensor));
    layout.frame_strides[tensor] = view->strides[kTimeDim];
  }
  std::stable_sort(dims.begin(), dims.end(), [&](const ResampleDim& x, const ResampleDim& y) {
    return x.strides[order] > y.strides[order];
  });
  if (dims.empty()) dims.push_back({1, {1, 1, 1, 1, 1, 1, 1, 1, 1}});
  layout.run = dims.front();
  for (size_t i = 1; i < dims.size(); ++i) {
    const int64_t size = layout.run.size;
    const bool merges = can_merge(layout.run, dims[i]);
    if (!merges) layout.outer[layout.num_outer++] = layout.run;
    layout.run = dims[i];
    if (merges) layout.run.size *= size;
  }
  return layout;
}

// (mode, num_padding, replicate, has_front, num_carried, num_sources, segment, skip, num_outputs)
ResampleTiming make_timing(const std::vector<int64_t>& numbers) {
  VTOK_CHECK_VALUE(numbers.size() == 9, "temporal_resample: timing must have 9 entries, got ",
                   numbers.size());
  for (const int64_t number : numbers) {
    VTOK_CHECK_VALUE(number >= 0 && number <= kMaxFrames,
                     "temporal_resample: timing must be in [0, 2^29], got ", number);
  }
  const auto at = [&](int entry) { return static_cast<int>(numbers[entry]); };
  VTOK_CHECK_VALUE(at(0) <= 2, "temporal_resample: mode must be 0, 1 or 2, got ", at(0));
  const ResampleTiming timing{static_cast<ResampleMode>(at(0)),
                              at(1),
                              at(2) != 0,
                              at(3) != 0,
                              at(4),
                              at(5),
                              at(6),
                              at(7),
                              at(8)};
  const bool is_mean = timing.mode == ResampleMode::kMeanOfThree;
  VTOK_CHECK_VALUE(timing.num_padding <= (is_mean ? 1 : kResampleMaxPadding) &&
                       timing.num_carried <= timing.num_sources && !(is_mean && timing.has_front),
                   "temporal_resample: padding or carried frames out of range");
  // The last output frame must not lie behind the last source frame (a mean may use one of zeros).
  const int last = is_mean ? 2 * timing.num_outputs - timing.num_padding - 1
                           : (timing.num_outputs - timing.num_padding + timing.skip + 1) / 2 - 1;
  VTOK_CHECK_VALUE(timing.num_outputs == 0 || last < timing.num_sources,
                   "temporal_resample: out must not need frame ", last, " of ", timing.num_sources);
  const bool copies_first = timing.replicate && timing.num_padding > 0 && timing.num_outputs > 0;
  VTOK_CHECK_VALUE(!copies_first || timing.num_sources > 0,
                   "temporal_resample: x must have a frame to replicate");
  return timing;
}

void check_factor(const TensorView& factor, const TensorView& out) {
  const DType expected = out.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  VTOK_CHECK_TYPE(factor.dtype == expected, "temporal_resample: mix_factor must be ",
                  name_of(expected), ", got ", name_of(factor.dtype));
  VTOK_CHECK_VALUE(factor.num_elements() == 1,
                   "temporal_resample: mix_factor must have one element, got ",
                   shape_string(factor));
}

bool needs(const ResampleTiming& timing, const TensorView& view, int tensor) {
  return view.data != nullptr || frames_of(timing, tensor) == 0;
}

void forward(const TensorView& x, const TensorView& carried, const TensorView& front,
             const TensorView& y, const TensorView& factor, const OutputView& out,
             const std::vector<int64_t>& numbers, const CallContext& context) {
  const ResampleTiming timing = make_timing(numbers);
  check_same_device("temporal_resample", out, x, carried, front, y, factor);
  if (out.num_elements() == 0) return;
  const Views views = {&x, &carried, &front, &y, &out, nullptr, nullptr, nullptr, nullptr};
  ResampleForward params{make_layout(timing, views, kResampleOut),
                         x,
                         carried,
                         front,
                         y,
                         factor,
                         out,
                         context.num_threads};
  VTOK_CHECK_VALUE(needs(timing, x, kResampleX) && needs(timing, carried, kResampleCarried) &&
                       (front.data != nullptr) == timing.has_front &&
                       (y.data != nullptr) == (factor.data != nullptr),
                   "temporal_resample: x, carried, front, y or mix_factor is missing");
  params.layout.is_blend = y.data != nullptr;
  if (params.layout.is_blend) check_factor(factor, out);
  VTOK_CALL_DEVICE(out, context, temporal_resample_forward, params);
}

void check_sum(const ResampleBackward& params) {
  const ResampleTiming& timing = params.layout.timing;
  const int64_t segments = (timing.num_outputs + kResampleFrames - 1) / kResampleFrames;
  const int64_t blocks = (params.layout.num_pixels + kResampleThreads - 1) / kResampleThreads;
  VTOK_CHECK_VALUE(params.y.data != nullptr && needs(timing, params.x, kResampleX) &&
                       needs(timing, params.carried, kResampleCarried),
                   "temporal_resample backward: x, carried and y must come with grad_mix_factor");
  check_factor(params.grad_factor, params.grad_out);
  VTOK_CHECK_TYPE(params.partials.dtype == params.factor.dtype,
                  "temporal_resample backward: partials must be ", name_of(params.factor.dtype));
  VTOK_CHECK_VALUE(
      params.partials.num_dims == 1 && params.partials.num_elements() >= segments * blocks,
      "temporal_resample backward: partials must be [n] with n >= ", segments * blocks);
}

void backward(const TensorView& grad_out, const TensorView& x, const TensorView& carried,
              const TensorView& y, const TensorView& factor, const OutputView& grad_x,
              const OutputView& grad_carried, const OutputView& grad_front,
              const OutputView& grad_y, const OutputView& grad_factor,
              const WorkspaceView& partials, const std::vector<int64_t>& numbers,
              const CallContext& context) {
  const ResampleTiming timing = make_timing(numbers);
  check_same_device("temporal_resample backward", grad_out, x, carried, y, factor, grad_x,
                    grad_carried, grad_front, grad_y, grad_factor, partials);
  if (grad_out.num_elements() == 0) return;
  const Views views = {&x,      &carried,      nullptr,     &y,     &grad_out,
                       &grad_x, &grad_carried, &grad_front, &grad_y};
  const int order = grad_x.data != nullptr
                        ? kResampleGradX
                        : (grad_y.data != nullptr ? kResampleGradY : kResampleOut);
  ResampleBackward params{make_layout(timing, views, order),
                          grad_out,
                          x,
                          carried,
                          y,
                          factor,
                          grad_x,
                          grad_carried,
                          grad_front,
                          grad_y,
                          grad_factor,
                          partials,
                          context.num_threads};
  params.layout.is_blend = factor.data != nullptr;
  if (params.layout.is_blend) check_factor(factor, grad_out);
  if (grad_factor.data != nullptr) check_sum(params);
  VTOK_CALL_DEVICE(grad_out, context, temporal_resample_backward, params);
}

}  // namespace

void bind_temporal_resample(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("temporal_resample_forward", forward, py::arg("x"), py::arg("carried"), py::arg("front"),
        py::arg("y"), py::arg("mix_factor"), py::arg("out"), py::arg("timing"), py::arg("context"));
  m.def("temporal_resample_backward", backward, py::arg("grad_out"), py::arg("x"),
        py::arg("carried"), py::arg("y"), py::arg("mix_factor"), py::arg("grad_x"),
        py::arg("grad_carried"), py::arg("grad_front"), py::arg("grad_y"),
        py::arg("grad_mix_factor"), py::arg("partials"), py::arg("timing"), py::arg("context"));
}

}  // namespace vtok
