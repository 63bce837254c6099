// Python bindings of the convolution on CUDA: tensor views into the parameters of a product.
#include <algorithm>
#include <array>
#include <tuple>

#include "../core/bind.h"
#include "causal_conv3d.h"
#include "causal_conv3d_tiles.h"

#ifdef VTOK_WITH_CUDA
#define VTOK_PLAN(name, ...) causal_conv3d_##name##_cuda(__VA_ARGS__)
#else
#define VTOK_PLAN(name, ...) (::vtok::detail::no_plan(__VA_ARGS__))
#endif

namespace vtok {
#ifndef VTOK_WITH_CUDA
namespace detail {
struct NoPlan {
  operator ConvPlan() const { throw_no_cuda("causal_conv3d"); }
  operator int() const { throw_no_cuda("causal_conv3d"); }
};
template <typename... Arguments>
NoPlan no_plan(const Arguments&...) {
  return {};
}
}  // namespace detail
#endif
namespace {

// (taps, step, tap_step, offset, divisor, exact) of time, row and column.
using Axes = std::array<std::array<int, 6>, 3>;

ConvMath math_of(DType dtype, bool tf32) {
  switch (dtype) {
    case DType::kBFloat16: return ConvMath::kBFloat16;
    case DType::kFloat16: return ConvMath::kFloat16;
    case DType::kFloat32: return tf32 ? ConvMath::kTf32 : ConvMath::kFloat32;
    default:
      VTOK_CHECK_TYPE(false, "causal_conv3d: x must be float32, float16 or bfloat16 on CUDA, got ",
                      name_of(dtype));
  }
  return ConvMath::kFloat32;
}

int to_int(int64_t value) {
  VTOK_CHECK_VALUE(value >= 0 && value <= INT32_MAX,
                   "causal_conv3d: sizes must be below 2^31, got ", value);
  return static_cast<int>(value);
}

ConvStrides strides_of(const TensorView& view) {
  return {view.strides[0], view.strides[2], view.strides[3], view.strides[4]};
}

// [B, C, T, H, W] with neighbouring channels.
void check_video(const char* name, const TensorView& view, DType dtype) {
  VTOK_CHECK_VALUE(view.num_dims == 5 && (view.strides[1] == 1 || view.shape[1] == 1),
                   "causal_conv3d: ", name, " must be [B, C, T, H, W] with channel stride 1, got ",
                   shape_string(view));
  VTOK_CHECK_TYPE(view.dtype == dtype, "causal_conv3d: ", name, " must be ", name_of(dtype),
                  ", got ", name_of(view.dtype));
}

void check_same_layout(const char* name, const TensorView& view, const TensorView& out) {
  if (view.data == nullptr) return;
  check_video(name, view, out.dtype);
  for (int dim = 0; dim < 5; ++dim) {
    VTOK_CHECK_VALUE(view.shape[dim] == out.shape[dim] &&
                         (view.strides[dim] == out.strides[dim] || view.shape[dim] == 1),
                     "causal_conv3d: ", name, " must have the shape and strides of out ",
                     shape_string(out), ", got ", shape_string(view));
  }
}

void check_vector(const char* name, const TensorView& view, int64_t size, DType dtype) {
  if (view.data == nullptr) return;
  VTOK_CHECK_VALUE(
      view.num_dims == 1 && view.shape[0] == size && (size < 2 || view.strides[0] == 1),
      "causal_conv3d: ", name, " must be [", size, "], got ", shape_string(view));
  VTOK_CHECK_TYPE(view.dtype == dtype, "causal_conv3d: ", name, " must be ", name_of(dtype));
}

ConvAxis axis_of(const std::array<int, 6>& values, int64_t extent, int64_t outputs) {
  VTOK_CHECK_VALUE(values[0] >= 1 && values[4] >= 1,
                   "causal_conv3d: taps and divisor must be at least 1, got ", values[0], " and ",
                   values[4]);
  ConvAxis axis;
  axis.taps = values[0];
  axis.step = values[1];
  axis.tap_step = values[2];
  axis.offset = values[3];
  axis.divisor = values[4];
  axis.exact = values[5];
  axis.extent = to_int(extent);
  axis.outputs = to_int(outputs);
  return axis;
}

// See ConvSource::plain.
bool is_plain(const ConvSource& source, const TensorView& data) {
  int64_t last = 0;
  for (int dim = 0; dim < data.num_dims; ++dim) {
    last += std::max<int64_t>(data.shape[dim] - 1, 0) * data.strides[dim];
  }
  bool plain = source.state_frames == 0 && last < INT32_MAX;
  // Going back in time, only a gradient does, would not end at the first frame.
  plain &=
      !source.replicate || (source.time.tap_step > 0 && source.time.offset >= -kConvPlainBefore);
  for (const ConvAxis* axis : {&source.time, &source.row, &source.column}) {
    plain &= axis->divisor == 1 && axis->taps <= kConvPlainTaps;
  }
  for (int dim = 0; dim < data.num_dims; ++dim) plain &= data.strides[dim] >= 0;
  return plain;
}

// Where the kernel reads `source` [B, groups * channels, T, H, W] for `output` [B, ., T', H', W'].
ConvSource source_of(const TensorView& source, const TensorView& state, const TensorView& output,
                     const Axes& axes, int groups, bool replicate) {
  check_video("source", source, source.dtype);
  VTOK_CHECK_VALUE(
      groups >= 1 && source.shape[1] % groups == 0 && output.shape[0] == source.shape[0],
      "causal_conv3d: source ", shape_string(source), " does not match output ",
      shape_string(output), " and ", groups, " groups");
  ConvSource result;
  result.data = source.data;
  result.strides = strides_of(source);
  result.time = axis_of(axes[0], source.shape[2], output.shape[2]);
  result.row = axis_of(axes[1], source.shape[3], output.shape[3]);
  result.column = axis_of(axes[2], source.shape[4], output.shape[4]);
  result.replicate = replicate && source.shape[2] > 0;
  result.groups = groups;
  result.channels = to_int(source.shape[1] / groups);
  result.depth =
      to_int(int64_t{result.channels} * result.time.taps * result.row.taps * result.column.taps);
  result.batch = to_int(source.shape[0]);
  // 256 more, the rows of a tile, so that the last tile's positions are integers too.
  result.positions =
      to_int(output.shape[0] * output.shape[2] * output.shape[3] * output.shape[4] + 256) - 256;
  if (state.data != nullptr) {
    check_video("state", state, source.dtype);
    bool matches = state.shape[2] >= -result.time.offset;
    for (const int dim : {0, 1, 3, 4}) matches &= state.shape[dim] == source.shape[dim];
    VTOK_CHECK_VALUE(matches, "causal_conv3d: state ", shape_string(state),
                     " does not match source ", shape_string(source));
    result.state = state.data;
    result.state_strides = strides_of(state);
    result.state_frames = to_int(state.shape[2]);
  }
  result.plain = is_plain(result, source);
  return result;
}

// Whether every vector of `bytes` along the channels of `view` is aligned.
bool is_aligned(const TensorView& view, int bytes) {
  if (view.data == nullptr) return true;
  const int64_t width = bytes / static_cast<int64_t>(size_of(view.dtype));
  bool aligned = reinterpret_cast<uintptr_t>(view.data) % bytes == 0;
  for (int dim = 0; dim < view.num_dims; ++dim) {
    if (dim == 1 && view.num_dims == 5) continue;
    aligned &= view.shape[dim] == 1 || view.num_dims == 1 || view.strides[dim] % width == 0;
  }
  return aligned;
}

// Checks and collects what follows the sum of products.
ConvEpilogue epilogue_of(const TensorView& bias, const TensorView& residual,
                         const TensorView& other, const TensorView& mix_factor,
                         const OutputView& out, const OutputView& preactivation, bool silu) {
  check_vector("bias", bias, out.shape[1], out.dtype);
  check_vector("mix_factor", mix_factor, 1, DType::kFloat32);
  check_same_layout("residual", residual, out);
  check_same_layout("other", other, out);
  check_same_layout("preactivation", preactivation, out);
  VTOK_CHECK_VALUE((other.data == nullptr) == (mix_factor.data == nullptr),
                   "causal_conv3d: other and mix_factor must come together");
  ConvEpilogue epilogue;
  epilogue.bias = bias.data;
  epilogue.residual = residual.data;
  epilogue.other = other.data;
  epilogue.mix_factor = static_cast<const float*>(mix_factor.data);
  epilogue.silu = silu;
  epilogue.preactivation = preactivation.data;
  epilogue.out = out.data;
  epilogue.strides = strides_of(out);
  return epilogue;
}

void check_partial(const WorkspaceView& partial, int splits, int64_t elements_per_split) {
  const int64_t elements = int64_t{splits} * elements_per_split;
  VTOK_CHECK_VALUE(splits >= 1 && splits < 65536 && partial.num_elements() >= elements,
                   "causal_conv3d: partial must have ", elements, " elements, got ",
                   shape_string(partial));
}

void gemm(const TensorView& source, const TensorView& state, const TensorView& weight,
          const TensorView& bias, const TensorView& residual, const TensorView& other,
          const TensorView& mix_factor, const OutputView& out, const OutputView& preactivation,
          const WorkspaceView& partial, const Axes& axes,
          const std::tuple<int, bool, bool, bool, int, int>& options,
          [[maybe_unused]] const CallContext& context) {
  const auto [groups, replicate, silu, tf32, tile, splits] = options;
  check_video("out", out, source.dtype);
  ConvGemm params;
  params.math = math_of(source.dtype, tf32);
  params.source = source_of(source, state, out, axes, groups, replicate);
  params.columns = to_int(out.shape[1] / groups);
  VTOK_CHECK_VALUE(
      out.shape[1] % groups == 0 && weight.num_elements() == out.shape[1] * params.source.depth,
      "causal_conv3d: weight must have ", out.shape[1] * params.source.depth, " elements, got ",
      shape_string(weight));
  VTOK_CHECK_TYPE(weight.dtype == source.dtype, "causal_conv3d: weight must be ",
                  name_of(source.dtype), ", got ", name_of(weight.dtype));
  params.epilogue = epilogue_of(bias, residual, other, mix_factor, out, preactivation, silu);
  check_same_device("causal_conv3d", source, state, weight, bias, residual, other, mix_factor, out,
                    preactivation, partial);
  constexpr int kNumTiles = kNumConvTiles + kNumConvWarpgroupTiles;
  VTOK_CHECK_VALUE(tile >= 0 && tile < kNumTiles, "causal_conv3d: tile must be in 0..",
                   kNumTiles - 1, ", got ", tile);
  if (splits != 1) check_partial(partial, splits, params.source.positions * out.shape[1]);
  if (out.num_elements() == 0) return;
  params.weight = weight.data;
  params.splits = splits;
  params.partial = splits > 1 ? partial.data_as<float>() : nullptr;
  params.tile = tile;
  const int64_t width = 16 / static_cast<int64_t>(size_of(source.dtype));
  params.vectors = params.source.channels % width == 0 && is_aligned(source, 16) &&
                   is_aligned(state, 16) && reinterpret_cast<uintptr_t>(weight.data) % 16 == 0;
  params.wide = params.columns % width == 0;
  for (const TensorView* view : {static_cast<const TensorView*>(&out), &bias, &residual, &other,
                                 static_cast<const TensorView*>(&preactivation)}) {
    params.wide &= is_aligned(*view, 16);
  }
  params.device_index = source.device_index;
  const pybind11::gil_scoped_release no_gil;
  VTOK_CALL_CUDA(context, causal_conv3d_gemm, params);
}

void weight_gradient(const TensorView& source, const TensorView& state, const TensorView& grad,
                     const OutputView& grad_weight, const OutputView& grad_bias,
                     const WorkspaceView& partial, const Axes& axes,
                     const std::tuple<int, bool, bool, int, int>& options,
                     [[maybe_unused]] const CallContext& context) {
  const auto [groups, replicate, tf32, tile, splits] = options;
  check_video("grad", grad, source.dtype);
  ConvWeightGradient params;
  params.math = math_of(source.dtype, tf32);
  params.source = source_of(source, state, grad, axes, groups, replicate);
  VTOK_CHECK_VALUE(grad.shape[1] % groups == 0, "causal_conv3d: grad ", shape_string(grad),
                   " does not match ", groups, " groups");
  params.columns = to_int(grad.shape[1] / groups);
  int64_t dense = grad.shape[1];
  for (const int dim : {4, 3, 2, 0}) {
    VTOK_CHECK_VALUE(grad.shape[dim] == 1 || grad.strides[dim] == dense,
                     "causal_conv3d: grad must be in gapless channels_last_3d memory");
    dense *= grad.shape[dim];
  }
  const int taps = params.source.depth / std::max(params.source.channels, 1);
  VTOK_CHECK_VALUE(grad_weight.num_dims == 3 && grad_weight.shape[0] == grad.shape[1] &&
                       grad_weight.shape[1] == taps &&
                       grad_weight.shape[2] == params.source.channels,
                   "causal_conv3d: grad_weight must be [", grad.shape[1], ", ", taps, ", ",
                   params.source.channels, "], got ", shape_string(grad_weight));
  VTOK_CHECK_TYPE(grad_weight.dtype == source.dtype, "causal_conv3d: grad_weight must be ",
                  name_of(source.dtype), ", got ", name_of(grad_weight.dtype));
  check_vector("grad_bias", grad_bias, grad.shape[1], source.dtype);
  check_same_device("causal_conv3d", source, state, grad, grad_weight, grad_bias, partial);
  constexpr int kNumTiles = kNumConvGradientTiles + kNumConvGradientWarpgroupTiles;
  VTOK_CHECK_VALUE(tile >= 0 && tile < kNumTiles, "causal_conv3d: tile must be in 0..",
                   kNumTiles - 1, ", got ", tile);
  check_partial(partial, splits, grad.shape[1] * (params.source.depth + 1));
  if (grad_weight.num_elements() == 0) return;
  params.grad = grad.data;
  params.grad_weight = grad_weight.data;
  for (int dim = 0; dim < 3; ++dim) params.weight_strides[dim] = grad_weight.strides[dim];
  params.grad_bias = grad_bias.data;
  params.splits = splits;
  params.partial = partial.data_as<float>();
  params.tile = tile;
  const int64_t width = 16 / static_cast<int64_t>(size_of(source.dtype));
  params.vectors = params.source.channels % width == 0 && params.columns % width == 0 &&
                   is_aligned(source, 16) && is_aligned(state, 16) && is_aligned(grad, 16);
  params.device_index = source.device_index;
  const pybind11::gil_scoped_release no_gil;
  VTOK_CALL_CUDA(context, causal_conv3d_weight_gradient, params);
}

std::tuple<int, int> gemm_plan(int64_t positions, int64_t columns, int groups, int64_t depth,
                               bool is_half, bool tf32, bool may_split, int device_index) {
  const ConvMath math = math_of(is_half ? DType::kBFloat16 : DType::kFloat32, tf32);
  const ConvPlan plan =
      VTOK_PLAN(gemm_plan, positions, columns, groups, depth, math, may_split, device_index);
  return {plan.tile, plan.splits};
}

std::tuple<int, int> weight_gradient_plan(int64_t positions, int64_t columns, int groups,
                                          int64_t depth, bool is_half, bool tf32,
                                          int device_index) {
  const ConvMath math = math_of(is_half ? DType::kBFloat16 : DType::kFloat32, tf32);
  const ConvPlan plan =
      VTOK_PLAN(weight_gradient_plan, positions, columns, groups, depth, math, device_index);
  return {plan.tile, plan.splits};
}

int weight_gradient_splits(int64_t positions, int64_t columns, int groups, int64_t depth, int tile,
                           int device_index) {
  VTOK_CHECK_VALUE(tile >= 0 && tile < kNumConvGradientTiles + kNumConvGradientWarpgroupTiles,
                   "causal_conv3d: there is no gradient tile ", tile);
  return VTOK_PLAN(weight_gradient_splits, positions, columns, groups, depth, tile, device_index);
}

}  // namespace

void bind_causal_conv3d(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("causal_conv3d_gemm", gemm, py::arg("source"), py::arg("state"), py::arg("weight"),
        py::arg("bias"), py::arg("residual"), py::arg("other"), py::arg("mix_factor"),
        py::arg("out"), py::arg("preactivation"), py::arg("partial"), py::arg("axes"),
        py::arg("options"), py::arg("context"));
  m.def("causal_conv3d_weight_gradient", weight_gradient, py::arg("source"), py::arg("state"),
        py::arg("grad"), py::arg("grad_weight"), py::arg("grad_bias"), py::arg("partial"),
        py::arg("axes"), py::arg("options"), py::arg("context"));
  m.def("causal_conv3d_gemm_plan", gemm_plan, py::arg("positions"), py::arg("columns"),
        py::arg("groups"), py::arg("depth"), py::arg("is_half"), py::arg("tf32"),
        py::arg("may_split"), py::arg("device_index"));
  m.def("causal_conv3d_weight_gradient_plan", weight_gradient_plan, py::arg("positions"),
        py::arg("columns"), py::arg("groups"), py::arg("depth"), py::arg("is_half"),
        py::arg("tf32"), py::arg("device_index"));
  m.def("causal_conv3d_weight_gradient_splits", weight_gradient_splits, py::arg("positions"),
        py::arg("columns"), py::arg("groups"), py::arg("depth"), py::arg("tile"),
        py::arg("device_index"));
}

}  // namespace vtok
