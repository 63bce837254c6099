// Python bindings of norm_act: turns tensor views into a NormActLayout and picks the device.
#include "../core/bind.h"
#include "norm_act.h"
#include "norm_act_math.h"

#include <array>

namespace vtok {
namespace {

// What Python says beyond the tensors: (kind, num_groups, eps, act, front, replicate).
using Options = std::tuple<int, int64_t, double, bool, int64_t, bool>;

// Appends a dimension, or merges it into the one before where x and y allow that. `keep` dimensions
// stay apart whatever their size.
void append_dim(NormActRows& rows, int64_t size, int64_t x_stride, int64_t y_stride, bool keep) {
  if (size == 1 && !keep) return;
  const int last = rows.num_dims - 1;
  if (!keep && last >= 0 && last != rows.frame_dim && rows.x_strides[last] == size * x_stride &&
      rows.y_strides[last] == size * y_stride) {
    rows.sizes[last] *= size;
    rows.x_strides[last] = x_stride;
    rows.y_strides[last] = y_stride;
    return;
  }
  const int dim = rows.num_dims++;
  rows.sizes[dim] = size;
  rows.x_strides[dim] = x_stride;
  rows.y_strides[dim] = y_stride;
}

// x and y are [B, C, T, H, W]: which dimensions count rows, outermost first.
constexpr int kRowDims[] = {0, 2, 3, 4};
constexpr int kFrameDim = 2;

NormActRows make_rows(const TensorView& x, const NormActBuffer& buffer, int64_t channels) {
  NormActRows rows{};
  rows.frame_dim = -1;
  rows.y_offset = buffer.front * buffer.frame_stride;
  rows.num_rows = x.shape[0] * x.shape[2] * x.shape[3] * x.shape[4];
  VTOK_CHECK_VALUE(rows.num_rows < (int64_t{1} << 31),
                   "norm_act: x must have fewer than 2^31 positions, got ", rows.num_rows);
  const int64_t line = (buffer.width + buffer.right) * channels;
  const int64_t y_strides[] = {(buffer.front + buffer.frames) * buffer.frame_stride,
                               buffer.frame_stride, line, channels};
  const bool needs_frames = buffer.replicate && buffer.front > 0;
  for (int i = 0; i < 4; ++i) {
    const int dim = kRowDims[i];
    const bool keep = needs_frames && dim == kFrameDim;
    append_dim(rows, x.shape[dim], x.strides[dim], y_strides[i], keep);
    if (keep) rows.frame_dim = rows.num_dims - 1;
  }
  if (rows.num_dims == 0 || rows.frame_dim == rows.num_dims - 1) {
    const int dim = rows.num_dims++;  // runs of rows lie within a frame
    rows.sizes[dim] = 1;
    rows.x_strides[dim] = rows.y_strides[dim] = 0;
  }
  if (rows.num_rows > 0) {
    for (int dim = 0; dim < rows.num_dims; ++dim) set_divider(rows, dim);
  }
  return rows;
}

NormActLayout make_layout(const TensorView& x, const TensorView& y, const Options& options) {
  const auto& [kind, num_groups, eps, act, front, replicate] = options;
  VTOK_CHECK_VALUE(x.num_dims == 5 && y.num_dims == 5, "norm_act: x and y must be 5-D, got ",
                   shape_string(x), " and ", shape_string(y));
  VTOK_CHECK_VALUE(kind >= 0 && kind <= 3, "norm_act: kind must be in [0, 3], got ", kind);
  NormActLayout layout{};
  layout.channels = x.shape[1];
  layout.kind = static_cast<NormKind>(kind);
  layout.num_groups = is_grouped(layout.kind) ? num_groups : 1;
  layout.rows_per_frame = x.shape[3] * x.shape[4];
  layout.eps = eps;
  layout.act = act;
  VTOK_CHECK_VALUE(layout.num_groups >= 1 && layout.channels % layout.num_groups == 0,
                   "norm_act: num_groups must divide ", layout.channels, ", got ", num_groups);
  NormActBuffer& buffer = layout.buffer;
  buffer = {x.shape[0],
            front,
            x.shape[2],
            x.shape[3],
            x.shape[4],
            y.shape[3] - x.shape[3],
            y.shape[4] - x.shape[4],
            replicate,
            y.shape[3] * y.shape[4] * layout.channels};
  VTOK_CHECK_VALUE(y.shape[0] == x.shape[0] && y.shape[1] == x.shape[1] && front >= 0 &&
                       y.shape[2] == front + x.shape[2] && buffer.bottom >= 0 && buffer.right >= 0,
                   "norm_act: y must hold ", shape_string(x), " and ", front,
                   " frames in front, got ", shape_string(y));
  VTOK_CHECK_VALUE(x.strides[1] == 1 || x.shape[1] == 1,
                   "norm_act: x must have channel stride 1, got ", x.strides[1]);
  layout.rows = make_rows(x, buffer, layout.channels);
  return layout;
}

// Whether a [B, C, T, H, W] tensor is dense in channels_last_3d order; size-1 dimensions may have
// any stride.
void check_dense(const char* name, const TensorView& view) {
  constexpr int kOrder[] = {1, 4, 3, 2, 0};
  int64_t expected = 1;
  for (const int dim : kOrder) {
    VTOK_CHECK_VALUE(
        view.shape[dim] <= 1 || view.strides[dim] == expected || view.num_elements() == 0,
        "norm_act: ", name, " must be dense channels_last_3d, got shape ", shape_string(view));
    expected *= view.shape[dim];
  }
}

void check_same_shape(const char* name, const TensorView& view, const TensorView& x) {
  bool equal = view.num_dims == x.num_dims;
  for (int dim = 0; equal && dim < x.num_dims; ++dim) equal = view.shape[dim] == x.shape[dim];
  VTOK_CHECK_VALUE(equal, "norm_act: ", name, " must be ", shape_string(x), ", got ",
                   shape_string(view));
}

bool is_floating(DType dtype, DeviceType device) {
  return dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBFloat16 ||
         (dtype == DType::kFloat64 && device == DeviceType::kCPU);
}

// Kernels read other dtypes as float32.
void check_floating(const char* name, const TensorView& view) {
  VTOK_CHECK_TYPE(is_floating(view.dtype, view.device), "norm_act: ", name,
                  " must be a floating type of its device, got ", name_of(view.dtype));
}

void check_channels(const char* name, const TensorView& view, int64_t channels) {
  if (view.data == nullptr) return;
  VTOK_CHECK_VALUE(
      view.num_dims == 1 && view.shape[0] == channels && (channels <= 1 || view.strides[0] == 1),
      "norm_act: ", name, " must be contiguous [", channels, "], got ", shape_string(view));
  check_floating(name, view);
}

void check_stats(const TensorView& stats, const NormActLayout& layout, DType x_dtype) {
  const bool grouped = is_grouped(layout.kind);
  if (stats.data == nullptr && (!grouped || layout.rows.num_rows == 0)) return;
  const DType expected = x_dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const NormActBuffer& buffer = layout.buffer;
  const int64_t per_frame = grouped ? layout.num_groups : layout.rows_per_frame;
  VTOK_CHECK_VALUE(stats.num_elements() == buffer.batch * buffer.frames * per_frame * 2 &&
                       stats.dtype == expected,
                   "norm_act: stats must be [", buffer.batch, ", ", buffer.frames, ", ", per_frame,
                   ", 2] ", name_of(expected), ", got ", shape_string(stats), " ",
                   name_of(stats.dtype));
}

int64_t workspace_size(const NormActLayout& layout, bool backward, bool is_cuda, int device_index) {
#ifdef VTOK_WITH_CUDA
#ifdef VTOK_EMULATE_CUDA
  is_cuda = true;
#endif
  if (is_cuda) return norm_act_workspace_cuda(layout, backward, device_index);
#else
  (void)is_cuda;
  (void)device_index;
#endif
  return norm_act_workspace_cpu(layout, backward);
}

void check_workspace(const WorkspaceView& workspace, int64_t size) {
  VTOK_CHECK_VALUE(workspace.dtype == DType::kFloat32 && workspace.num_elements() >= size,
                   "norm_act: workspace must have ", size, " float32 elements, got ",
                   workspace.num_elements());
}

// float32 elements of workspace for x of `shape` [B, C, T, H, W]; device_index is -1 for the CPU.
int64_t workspace(const std::array<int64_t, 5>& shape, int kind, int64_t num_groups, bool backward,
                  int device_index) {
  NormActLayout layout{};
  layout.channels = shape[1];
  layout.kind = static_cast<NormKind>(kind);
  layout.num_groups = is_grouped(layout.kind) ? num_groups : 1;
  layout.rows_per_frame = shape[3] * shape[4];
  layout.rows.num_rows = shape[0] * shape[2] * shape[3] * shape[4];
  layout.buffer.batch = shape[0];
  layout.buffer.frames = shape[2];
  return workspace_size(layout, backward, device_index >= 0, device_index);
}

void forward(const TensorView& x, const TensorView& weight, const TensorView& bias,
             const TensorView& state, const OutputView& y, const OutputView& stats,
             const WorkspaceView& workspace, const Options& options, const CallContext& context) {
  NormActForward params{make_layout(x, y, options), x, weight, bias, state, y, stats, workspace,
                        context.num_threads};
  const NormActLayout& layout = params.layout;
  check_same_device("norm_act", x, weight, bias, state, y, stats, workspace);
  check_floating("y", y);
  check_dense("y", y);
  check_channels("weight", weight, layout.channels);
  check_channels("bias", bias, layout.channels);
  check_stats(stats, layout, x.dtype);
  check_workspace(workspace,
                  workspace_size(layout, false, x.device == DeviceType::kCUDA, x.device_index));
  if (state.data != nullptr) {
    TensorView expected = x;
    expected.shape[kFrameDim] = layout.buffer.front;
    check_same_shape("state", state, expected);
    check_dense("state", state);
    VTOK_CHECK_TYPE(state.dtype == y.dtype, "norm_act: state must be ", name_of(y.dtype), ", got ",
                    name_of(state.dtype));
  }
  if (y.num_elements() == 0) return;
  VTOK_CALL_DEVICE(x, context, norm_act_forward, params);
}

void backward(const TensorView& grad_y, const TensorView& x, const TensorView& weight,
              const TensorView& bias, const TensorView& stats, const OutputView& grad_x,
              const OutputView& grad_weight, const OutputView& grad_bias,
              const WorkspaceView& workspace, const Options& options, const CallContext& context) {
  NormActBackward params{make_layout(x, grad_y, options),
                         grad_y,
                         x,
                         weight,
                         bias,
                         stats,
                         grad_x,
                         grad_weight,
                         grad_bias,
                         workspace,
                         context.num_threads};
  const NormActLayout& layout = params.layout;
  check_same_device("norm_act backward", x, grad_y, weight, bias, stats, grad_x, grad_weight,
                    grad_bias, workspace);
  check_floating("grad_y", grad_y);
  check_dense("grad_y", grad_y);
  if (grad_x.data != nullptr) {
    check_same_shape("grad_x", grad_x, x);
    check_dense("grad_x", grad_x);
    VTOK_CHECK_TYPE(grad_x.dtype == x.dtype, "norm_act: grad_x must be ", name_of(x.dtype));
  }
  check_channels("weight", weight, layout.channels);
  check_channels("bias", bias, layout.channels);
  check_channels("grad_weight", grad_weight, layout.channels);
  check_channels("grad_bias", grad_bias, layout.channels);
  check_stats(stats, layout, x.dtype);
  check_workspace(workspace,
                  workspace_size(layout, true, x.device == DeviceType::kCUDA, x.device_index));
  if (x.num_elements() == 0) return;
  VTOK_CALL_DEVICE(x, context, norm_act_backward, params);
}

}  // namespace

void bind_norm_act(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("norm_act_workspace", workspace, py::arg("shape"), py::arg("kind"), py::arg("num_groups"),
        py::arg("backward"), py::arg("device_index"));
  m.def("norm_act_forward", forward, py::arg("x"), py::arg("weight"), py::arg("bias"),
        py::arg("state"), py::arg("y"), py::arg("stats"), py::arg("workspace"), py::arg("options"),
        py::arg("context"));
  m.def("norm_act_backward", backward, py::arg("grad_y"), py::arg("x"), py::arg("weight"),
        py::arg("bias"), py::arg("stats"), py::arg("grad_x"), py::arg("grad_weight"),
        py::arg("grad_bias"), py::arg("workspace"), py::arg("options"), py::arg("context"));
}

}  // namespace vtok
