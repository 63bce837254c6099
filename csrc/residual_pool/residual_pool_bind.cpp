// Python bindings of residual_pool: re-checks sizes, fills a ResidualPoolLayout, picks the device.
#include "../core/bind.h"
#include "residual_pool.h"

#include <initializer_list>

namespace vtok {
namespace {

void check_shape(const char* name, const TensorView& view, std::initializer_list<int64_t> shape,
                 DType dtype) {
  bool ok = view.num_dims == static_cast<int>(shape.size()) && view.dtype == dtype;
  int dim = 0;
  for (const int64_t size : shape) {
    ok = ok && view.shape[dim] == size;
    ++dim;
  }
  VTOK_CHECK_VALUE(ok, "residual_pool: ", name, " must fit frames, got ", shape_string(view), " ",
                   name_of(view.dtype));
}

void check_contiguous(const char* name, const TensorView& view) {
  int64_t expected = 1;
  for (int dim = view.num_dims - 1; dim >= 0; --dim) {
    VTOK_CHECK_VALUE(view.shape[dim] == 1 || view.strides[dim] == expected, "residual_pool: ", name,
                     " must be contiguous");
    expected *= view.shape[dim];
  }
}

// As check_shape for a dense tensor; nothing for an absent one.
void check_dense(const char* name, const TensorView& view, std::initializer_list<int64_t> shape,
                 DType dtype) {
  if (view.data == nullptr) return;
  check_shape(name, view, shape, dtype);
  check_contiguous(name, view);
}

// Layout of frames [B, T, N, C], key [B, N, C] and query [Q, C], all checked.
ResidualPoolLayout make_layout(const TensorView& frames, const TensorView& key,
                               const TensorView& query, int64_t outputs) {
  VTOK_CHECK_VALUE(frames.num_dims == 4 && query.num_dims == 2,
                   "residual_pool: frames must be [B, T, N, C] and query [Q, C], got ",
                   shape_string(frames), " and ", shape_string(query));
  ResidualPoolLayout layout{};
  layout.batch = frames.shape[0];
  layout.frames = frames.shape[1];
  layout.places = frames.shape[2];
  layout.channels = frames.shape[3];
  layout.outputs = outputs;
  check_shape("key", key, {layout.batch, layout.places, layout.channels}, frames.dtype);
  const int64_t queries = query.shape[0];
  VTOK_CHECK_VALUE(queries >= 1 && queries <= kResidualPoolMaxQueries &&
                       queries * layout.channels <= kResidualPoolMaxPooled,
                   "residual_pool: query must have 1 to ", kResidualPoolMaxQueries,
                   " rows and at most ", kResidualPoolMaxPooled, " elements, got ",
                   shape_string(query));
  VTOK_CHECK_VALUE(layout.places >= 1 && layout.channels >= 1,
                   "residual_pool: frames must have at least one place and channel, got ",
                   shape_string(frames));
  layout.num_queries = static_cast<int>(queries);
  for (int dim = 0; dim < 4; ++dim) layout.frame_strides[dim] = frames.strides[dim];
  for (int dim = 0; dim < 3; ++dim) layout.key_strides[dim] = key.strides[dim];
  // Limits of the grid: frames along x, pieces of 64 places and slices of 64 outputs along y.
  VTOK_CHECK_VALUE(layout.num_frames() < int64_t{1} << 31 && layout.places < int64_t{1} << 21 &&
                       outputs < int64_t{1} << 21,
                   "residual_pool: frames must have at most 2^31 frames, 2^21 places and outputs");
  return layout;
}

DType real_of(const TensorView& frames) {
  return frames.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

void forward(const TensorView& frames, const TensorView& key, const TensorView& position,
             const TensorView& query, const TensorView& weight, const TensorView& bias,
             const OutputView& out, const OutputView& pooled, const OutputView& log_sum,
             const WorkspaceView& partials, const CallContext& context) {
  VTOK_CHECK_VALUE(weight.num_dims == 2, "residual_pool: weight must be [D, Q * C], got ",
                   shape_string(weight));
  const ResidualPoolLayout layout = make_layout(frames, key, query, weight.shape[0]);
  const DType real = real_of(frames);
  const int64_t b = layout.batch, t = layout.frames, n = layout.places, c = layout.channels;
  const int64_t q = layout.num_queries, d = layout.outputs;
  check_dense("position", position, {n, c}, real);
  check_dense("query", query, {q, c}, real);
  check_dense("weight", weight, {d, q * c}, real);
  check_dense("bias", bias, {d}, real);
  check_dense("out", out, {b, t, d}, frames.dtype);
  check_dense("pooled", pooled, {b, t, q, c}, real);
  check_dense("log_sum", log_sum, {b, t, q}, real);
  check_dense("partials", partials, {layout.num_frames(), layout.num_pieces(), q, c + 2}, real);
  check_same_device("residual_pool", frames, key, position, query, weight, bias, out, pooled,
                    log_sum, partials);
  if (layout.num_frames() == 0 || d == 0) return;
  const ResidualPoolForward params{layout, frames, key,    position, query,    weight,
                                   bias,   out,    pooled, log_sum,  partials, context.num_threads};
  VTOK_CHECK_VALUE(frames.device != DeviceType::kCUDA || partials.data != nullptr,
                   "residual_pool: partials must be given on CUDA");
  VTOK_CALL_DEVICE(frames, context, residual_pool_forward, params);
}

void backward(const TensorView& frames, const TensorView& key, const TensorView& position,
              const TensorView& query, const TensorView& log_sum, const TensorView& grad_pooled,
              const TensorView& mean_grad, const OutputView& grad_frames,
              const OutputView& grad_key, const OutputView& grad_position,
              const OutputView& grad_query, const WorkspaceView& attention,
              const WorkspaceView& partials, const CallContext& context) {
  const ResidualPoolLayout layout = make_layout(frames, key, query, 1);
  const DType real = real_of(frames);
  const int64_t b = layout.batch, t = layout.frames, n = layout.places, c = layout.channels;
  const int64_t q = layout.num_queries;
  check_dense("position", position, {n, c}, real);
  check_dense("query", query, {q, c}, real);
  check_dense("log_sum", log_sum, {b, t, q}, real);
  check_dense("grad_pooled", grad_pooled, {b, t, q, c}, real);
  check_dense("mean_grad", mean_grad, {b, t, q}, real);
  check_dense("grad_frames", grad_frames, {b, t, n, c}, frames.dtype);
  check_dense("grad_key", grad_key, {b, n, c}, frames.dtype);
  check_dense("grad_position", grad_position, {n, c}, real);
  check_dense("grad_query", grad_query, {q, c}, real);
  check_dense("attention", attention, {2, b, t, q, n}, real);
  check_dense("partials", partials, {layout.num_frames(), layout.num_pieces(), q, c}, real);
  VTOK_CHECK_VALUE(
      attention.data != nullptr && (grad_query.data == nullptr || partials.data != nullptr),
      "residual_pool backward: attention and partials must be given");
  check_same_device("residual_pool backward", frames, key, position, query, log_sum, grad_pooled,
                    mean_grad, grad_frames, grad_key, grad_position, grad_query, attention,
                    partials);
  if (layout.num_frames() == 0) return;
  const ResidualPoolBackward params{
      layout,        frames,      key,       position,    query,
      log_sum,       grad_pooled, mean_grad, grad_frames, grad_key,
      grad_position, grad_query,  attention, partials,    context.num_threads};
  VTOK_CALL_DEVICE(frames, context, residual_pool_backward, params);
}

}  // namespace

void bind_residual_pool(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("residual_pool_forward", forward, py::arg("frames"), py::arg("key"), py::arg("position"),
        py::arg("query"), py::arg("weight"), py::arg("bias"), py::arg("out"), py::arg("pooled"),
        py::arg("log_sum"), py::arg("partials"), py::arg("context"));
  m.def("residual_pool_backward", backward, py::arg("frames"), py::arg("key"), py::arg("position"),
        py::arg("query"), py::arg("log_sum"), py::arg("grad_pooled"), py::arg("mean_grad"),
        py::arg("grad_frames"), py::arg("grad_key"), py::arg("grad_position"),
        py::arg("grad_query"), py::arg("attention"), py::arg("partials"), py::arg("context"));
}

}  // namespace vtok
