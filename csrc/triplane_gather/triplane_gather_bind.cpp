// Python bindings of the triplane lookup: turns tensor views into shapes and positions and picks
// the device.
#include "../core/bind.h"
#include "triplane_gather.h"

#include <string>
#include <vector>

namespace vtok {
namespace {

TriplaneReduce parse_reduce(const std::string& name) {
  if (name == "cat") return TriplaneReduce::kCat;
  if (name == "sum") return TriplaneReduce::kSum;
  VTOK_CHECK_VALUE(name == "product",
                   "triplane_gather: reduce must be 'cat', 'sum' or 'product', got '", name, "'");
  return TriplaneReduce::kProduct;
}

void check_contiguous(const char* name, const TensorView& view, const std::vector<int64_t>& shape) {
  bool matches = view.num_dims == static_cast<int>(shape.size());
  for (int dim = 0; matches && dim < view.num_dims; ++dim) matches = view.shape[dim] == shape[dim];
  int64_t stride = 1;
  for (int dim = view.num_dims - 1; matches && dim >= 0; --dim) {
    matches = view.shape[dim] <= 1 || view.strides[dim] == stride || view.num_elements() == 0;
    stride *= view.shape[dim];
  }
  TensorView expected;
  expected.num_dims = static_cast<int>(shape.size());
  for (int dim = 0; dim < expected.num_dims; ++dim) expected.shape[dim] = shape[dim];
  VTOK_CHECK_VALUE(matches, "triplane_gather: ", name, " must be contiguous ",
                   shape_string(expected), ", got ", shape_string(view));
}

TriplaneShape make_shape(const TensorView (&planes)[kTriplanePlanes], int64_t num_points) {
  const TensorView& xy = planes[0];
  VTOK_CHECK_VALUE(xy.num_dims == 4 && planes[1].num_dims == 4,
                   "triplane_gather: planes must have 4 dimensions, got ", shape_string(xy),
                   " and ", shape_string(planes[1]));
  TriplaneShape shape{
      xy.shape[0], num_points, xy.shape[3], {planes[1].shape[1], xy.shape[1], xy.shape[2]}};
  static const char* const names[] = {"plane_xy", "plane_yt", "plane_xt"};
  for (int p = 0; p < kTriplanePlanes; ++p) {
    check_contiguous(names[p], planes[p],
                     {shape.batch, shape.resolution[triplane_row_axis(p)],
                      shape.resolution[triplane_column_axis(p)], shape.channels});
    VTOK_CHECK_TYPE(planes[p].dtype == xy.dtype, "triplane_gather: ", names[p], " must be ",
                    name_of(xy.dtype), ", got ", name_of(planes[p].dtype));
    // Offsets inside one plane are 32-bit.
    VTOK_CHECK_VALUE(triplane_elements(shape, p) > 0 && triplane_elements(shape, p) <= INT32_MAX,
                     "triplane_gather: ", names[p], " must have 1 to 2^31 - 1 elements, got ",
                     shape_string(planes[p]));
  }
  for (const int64_t resolution : shape.resolution) {
    VTOK_CHECK_VALUE(resolution <= kTriplaneMaxResolution,
                     "triplane_gather: planes must have at most 2^24 rows and columns, got ",
                     resolution);
  }
  VTOK_CHECK_VALUE(shape.channels <= kTriplaneMaxChannels,
                   "triplane_gather: planes must have at most 2^22 channels, got ", shape.channels);
  VTOK_CHECK_VALUE(num_points <= INT32_MAX,
                   "triplane_gather: coords must have at most 2^31 - 1 points, got ", num_points);
  return shape;
}

void set_divisors(TriplanePoints& points, const std::vector<int64_t>& grid) {
  const bool is_index = points.dtype == DType::kInt32 || points.dtype == DType::kInt64;
  VTOK_CHECK_VALUE(grid.size() == (is_index ? size_t{kTriplaneAxes} : 0),
                   "triplane_gather: grid must have 3 sizes for integer coords and none for real "
                   "ones, got ",
                   grid.size());
  for (int a = 0; a < kTriplaneAxes; ++a) {
    points.divisor[a] = is_index && grid[a] > 1 ? grid[a] - 1 : 1;
  }
}

// coords is [B, N, 3], or the t axis [N_t] of a lattice whose x and y axes are given.
TriplanePoints make_points(const TensorView& coords, const TensorView& axis_x,
                           const TensorView& axis_y, const std::vector<int64_t>& grid,
                           int64_t batch, DType plane_dtype) {
  TriplanePoints points{};
  points.dtype = coords.dtype;
  const DType real = plane_dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  VTOK_CHECK_TYPE(
      coords.dtype == real || coords.dtype == DType::kInt32 || coords.dtype == DType::kInt64,
      "triplane_gather: coords must be ", name_of(real), ", int32 or int64, got ",
      name_of(coords.dtype));
  set_divisors(points, grid);
  points.is_lattice = axis_x.num_dims == 1 && axis_y.num_dims == 1;
  if (points.is_lattice) {
    const TensorView* axes[] = {&coords, &axis_x, &axis_y};
    for (int a = 0; a < kTriplaneAxes; ++a) {
      VTOK_CHECK_VALUE(axes[a]->num_dims == 1 && axes[a]->dtype == coords.dtype,
                       "triplane_gather: lattice axes must be [N] of one dtype, got ",
                       shape_string(*axes[a]), " ", name_of(axes[a]->dtype));
      points.axis[a] = axes[a]->data;
      points.stride[a] = axes[a]->strides[0];
      points.lattice_size[a] = axes[a]->shape[0];
    }
    return points;
  }
  VTOK_CHECK_VALUE(coords.num_dims == 3 && coords.shape[0] == batch && coords.shape[2] == 3,
                   "triplane_gather: coords must be [", batch, ", N, 3], got ",
                   shape_string(coords));
  points.batch_stride = coords.strides[0];
  for (int a = 0; a < kTriplaneAxes; ++a) {
    points.axis[a] = static_cast<const char*>(coords.data) +
                     a * coords.strides[2] * static_cast<int64_t>(size_of(coords.dtype));
    points.stride[a] = coords.strides[1];
  }
  return points;
}

int64_t count_points(const TensorView& coords, const TensorView& axis_x, const TensorView& axis_y) {
  if (coords.num_dims == 3) return coords.shape[1];
  return coords.num_elements() * axis_x.num_elements() * axis_y.num_elements();
}

void forward(const TensorView& plane_xy, const TensorView& plane_yt, const TensorView& plane_xt,
             const TensorView& coords, const TensorView& axis_x, const TensorView& axis_y,
             const std::vector<int64_t>& grid, const std::string& reduce, const OutputView& out,
             const CallContext& context) {
  const TensorView planes[] = {plane_xy, plane_yt, plane_xt};
  const TriplaneShape shape = make_shape(planes, count_points(coords, axis_x, axis_y));
  TriplaneForward params{shape,
                         make_points(coords, axis_x, axis_y, grid, shape.batch, plane_xy.dtype),
                         parse_reduce(reduce),
                         {plane_xy, plane_yt, plane_xt},
                         out,
                         context.num_threads};
  check_contiguous(
      "out", out,
      {shape.batch, shape.num_points, triplane_out_channels(params.reduce, shape.channels)});
  VTOK_CHECK_TYPE(out.dtype == plane_xy.dtype, "triplane_gather: out must be ",
                  name_of(plane_xy.dtype), ", got ", name_of(out.dtype));
  check_same_device("triplane_gather", plane_xy, plane_yt, plane_xt, coords, axis_x, axis_y, out);
  if (out.num_elements() == 0) return;
  VTOK_CALL_DEVICE(plane_xy, context, triplane_gather_forward, params);
}

int64_t workspace_elements(const TriplaneShape& shape, TriplaneReduce reduce, DType dtype,
                           DeviceType device) {
  const int64_t entry = triplane_offset(shape, kTriplanePlanes);
  if (device == DeviceType::kCPU) {
    if (triplane_gather_is_direct_cpu(shape, dtype)) return 0;
    return shape.batch * triplane_gather_chunks_cpu(shape) * entry;
  }
  const int64_t features = shape.batch * shape.num_points * kTriplanePlanes * shape.channels;
  return shape.batch * triplane_gather_chunks_cuda(shape) * entry +
         (reduce == TriplaneReduce::kProduct ? features : 0);
}

// For planes [B, R0, R1, C], ... with `num_frames` cells along t.
int64_t workspace(const TensorView& plane_xy, int64_t num_frames, int64_t num_points,
                  const std::string& reduce) {
  VTOK_CHECK_VALUE(plane_xy.num_dims == 4, "triplane_gather: plane_xy must have 4 dimensions, got ",
                   shape_string(plane_xy));
  const TriplaneShape shape{plane_xy.shape[0],
                            num_points,
                            plane_xy.shape[3],
                            {num_frames, plane_xy.shape[1], plane_xy.shape[2]}};
  return workspace_elements(shape, parse_reduce(reduce), plane_xy.dtype, plane_xy.device);
}

void check_gradients(const TriplaneBackward& params) {
  const TriplaneShape& shape = params.shape;
  const DType dtype = params.planes[0].dtype;
  const DType real = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  check_contiguous(
      "grad_out", params.grad_out,
      {shape.batch, shape.num_points, triplane_out_channels(params.reduce, shape.channels)});
  VTOK_CHECK_TYPE(params.grad_out.dtype == dtype, "triplane_gather: grad_out must be ",
                  name_of(dtype), ", got ", name_of(params.grad_out.dtype));
  for (int p = 0; p < kTriplanePlanes; ++p) {
    const OutputView& grad = params.grad_planes[p];
    if (grad.num_dims == 0) continue;
    check_contiguous(
        "a plane's gradient", grad,
        {shape.batch, params.planes[p].shape[1], params.planes[p].shape[2], shape.channels});
    VTOK_CHECK_TYPE(grad.dtype == dtype, "triplane_gather: a plane's gradient must be ",
                    name_of(dtype), ", got ", name_of(grad.dtype));
  }
  if (params.grad_coords.num_dims != 0) {
    check_contiguous("grad_coords", params.grad_coords, {shape.batch, shape.num_points, 3});
    VTOK_CHECK_TYPE(params.grad_coords.dtype == real && params.points.dtype == real,
                    "triplane_gather: coords with a gradient must be ", name_of(real), ", got ",
                    name_of(params.points.dtype));
  }
  const int64_t elements = workspace_elements(shape, params.reduce, dtype, params.planes[0].device);
  VTOK_CHECK_VALUE(params.workspace.num_dims == 1 && params.workspace.dtype == real &&
                       params.workspace.shape[0] >= elements,
                   "triplane_gather: workspace must be [", elements, "] ", name_of(real), ", got ",
                   shape_string(params.workspace), " ", name_of(params.workspace.dtype));
}

void backward(const TensorView& grad_out, const TensorView& plane_xy, const TensorView& plane_yt,
              const TensorView& plane_xt, const TensorView& coords, const TensorView& axis_x,
              const TensorView& axis_y, const std::vector<int64_t>& grid, const std::string& reduce,
              const OutputView& grad_xy, const OutputView& grad_yt, const OutputView& grad_xt,
              const OutputView& grad_coords, const WorkspaceView& workspace,
              const CallContext& context) {
  const TensorView planes[] = {plane_xy, plane_yt, plane_xt};
  const TriplaneShape shape = make_shape(planes, count_points(coords, axis_x, axis_y));
  TriplaneBackward params{shape,
                          make_points(coords, axis_x, axis_y, grid, shape.batch, plane_xy.dtype),
                          parse_reduce(reduce),
                          {plane_xy, plane_yt, plane_xt},
                          grad_out,
                          {grad_xy, grad_yt, grad_xt},
                          grad_coords,
                          workspace,
                          context.num_threads};
  check_gradients(params);
  check_same_device("triplane_gather backward", plane_xy, plane_yt, plane_xt, grad_out, coords,
                    axis_x, axis_y, grad_xy, grad_yt, grad_xt, grad_coords, workspace);
  if (shape.batch == 0) return;
  VTOK_CALL_DEVICE(plane_xy, context, triplane_gather_backward, params);
}

}  // namespace

void throw_triplane_nan(bool is_lattice, int64_t batch, int64_t point, int axis) {
  const char name = "txy"[axis];
  VTOK_CHECK_VALUE(!is_lattice, "triplane_gather: coords must not be NaN, got NaN on axis ", name,
                   " of the lattice");
  throw std::invalid_argument(
      join_message("triplane_gather: coords must not be NaN, got NaN at batch ", batch, ", point ",
                   point, ", axis ", name));
}

void bind_triplane_gather(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("triplane_gather_forward", forward, py::arg("plane_xy"), py::arg("plane_yt"),
        py::arg("plane_xt"), py::arg("coords"), py::arg("axis_x"), py::arg("axis_y"),
        py::arg("grid"), py::arg("reduce"), py::arg("out"), py::arg("context"));
  m.def("triplane_gather_workspace", workspace, py::arg("plane_xy"), py::arg("num_frames"),
        py::arg("num_points"), py::arg("reduce"));
  m.def("triplane_gather_backward", backward, py::arg("grad_out"), py::arg("plane_xy"),
        py::arg("plane_yt"), py::arg("plane_xt"), py::arg("coords"), py::arg("axis_x"),
        py::arg("axis_y"), py::arg("grid"), py::arg("reduce"), py::arg("grad_xy"),
        py::arg("grad_yt"), py::arg("grad_xt"), py::arg("grad_coords"), py::arg("workspace"),
        py::arg("context"));
}

}  // namespace vtok
