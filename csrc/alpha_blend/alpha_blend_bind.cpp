// Python bindings of alpha_blend: sorts and merges dimensions into a BlendLayout and picks the
// device.
#include "../core/bind.h"
#include "alpha_blend.h"

#include <algorithm>
#include <vector>

namespace vtok {
namespace {

using Tensors = const TensorView* [kNumBlendTensors];

// Strides of dimension `dim` of `shape` in every tensor; 0 for an absent one. The factor's shape is
// aligned at the right, and its dimensions of size 1 repeat.
BlendDim make_dim(const TensorView& shape, const Tensors& tensors, int dim) {
  BlendDim result{shape.shape[dim], {}};
  for (int tensor = 0; tensor < kBlendFactor; ++tensor) {
    const TensorView* view = tensors[tensor];
    if (view == nullptr || view->data == nullptr) continue;
    VTOK_CHECK_VALUE(view->num_dims == shape.num_dims && view->shape[dim] == shape.shape[dim],
                     "alpha_blend: tensors must have shape ", shape_string(shape), ", got ",
                     shape_string(*view));
    result.strides[tensor] = view->strides[dim];
  }
  const TensorView& factor = *tensors[kBlendFactor];
  const int factor_dim = dim - (shape.num_dims - factor.num_dims);
  if (factor_dim >= 0 && factor.shape[factor_dim] != 1) {
    VTOK_CHECK_VALUE(factor.shape[factor_dim] == shape.shape[dim], "alpha_blend: mix_factor ",
                     shape_string(factor), " must broadcast to ", shape_string(shape));
    result.strides[kBlendFactor] = factor.strides[factor_dim];
  }
  return result;
}

bool can_merge(const BlendDim& outer, const BlendDim& inner) {
  for (int tensor = 0; tensor < kNumBlendTensors; ++tensor) {
    if (outer.strides[tensor] != inner.size * inner.strides[tensor]) return false;
  }
  return true;
}

// Dimensions in the memory order of `order`, outermost first, merged where every tensor allows it.
std::vector<BlendDim> merged_dims(const TensorView& shape, const Tensors& tensors, int order) {
  std::vector<BlendDim> dims;
  for (int dim = 0; dim < shape.num_dims; ++dim) {
    if (shape.shape[dim] != 1) dims.push_back(make_dim(shape, tensors, dim));
  }
  std::stable_sort(dims.begin(), dims.end(), [&](const BlendDim& x, const BlendDim& y) {
    return x.strides[order] > y.strides[order];
  });
  std::vector<BlendDim> merged;
  for (const BlendDim& dim : dims) {
    if (!merged.empty() && can_merge(merged.back(), dim)) {
      const int64_t size = merged.back().size * dim.size;
      merged.back() = dim;
      merged.back().size = size;
    } else {
      merged.push_back(dim);
    }
  }
  if (merged.empty()) merged.push_back(BlendDim{1, {1, 1, 1, 1, 1, 0}});
  return merged;
}

// `max_blocks` is the number of blocks that the workspace has room for.
BlendLayout make_layout(const TensorView& shape, const Tensors& tensors, int order, bool is_logit,
                        int64_t max_blocks) {
  VTOK_CHECK_VALUE(tensors[kBlendFactor]->num_dims <= shape.num_dims,
                   "alpha_blend: mix_factor must have at most ", shape.num_dims,
                   " dimensions, got ", tensors[kBlendFactor]->num_dims);
  BlendLayout layout{};
  layout.is_logit = is_logit;
  layout.num_groups = layout.num_rows = 1;
  std::vector<BlendDim> dims = merged_dims(shape, tensors, order);
  layout.run = dims.back();
  layout.run_has_factors = layout.run.strides[kBlendFactor] != 0;
  dims.pop_back();
  for (const BlendDim& dim : dims) {
    if (dim.strides[kBlendFactor] != 0) {
      layout.group_dims[layout.num_group_dims++] = dim;
      layout.num_groups *= dim.size;
    } else {
      layout.row_dims[layout.num_row_dims++] = dim;
      layout.num_rows *= dim.size;
    }
  }
  const int64_t elements = layout.num_rows * layout.run.size;  // of a group
  const int64_t pieces = layout.run_has_factors ? layout.num_rows : elements;
  layout.num_blocks = (elements + kBlendBlockElements - 1) / kBlendBlockElements;
  layout.num_blocks = std::max<int64_t>(1, std::min({layout.num_blocks, pieces, max_blocks}));
  return layout;
}

void check_dtypes(const TensorView& a, const TensorView& factor) {
  const DType expected = a.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  VTOK_CHECK_TYPE(factor.dtype == expected, "alpha_blend: mix_factor must be ", name_of(expected),
                  ", got ", name_of(factor.dtype));
}

void forward(const TensorView& a, const TensorView& b, const TensorView& factor,
             const OutputView& out, bool is_logit, const CallContext& context) {
  VTOK_CHECK_TYPE(b.dtype == a.dtype && out.dtype == a.dtype, "alpha_blend: b and out must be ",
                  name_of(a.dtype));
  check_dtypes(a, factor);
  check_same_device("alpha_blend", out, a, b, factor);
  if (out.num_elements() == 0) return;
  const Tensors tensors = {&a, &b, &out, nullptr, nullptr, &factor};
  const BlendForward params{make_layout(out, tensors, kBlendOut, is_logit, kBlendMaxBlocks),
                            a,
                            b,
                            factor,
                            out,
                            context.num_threads};
  VTOK_CALL_DEVICE(out, context, alpha_blend_forward, params);
}

void check_backward(const BlendBackward& params) {
  const TensorView& grad_out = params.grad_out;
  for (const TensorView* view :
       {&params.a, &params.b, static_cast<const TensorView*>(&params.grad_a),
        static_cast<const TensorView*>(&params.grad_b)}) {
    VTOK_CHECK_TYPE(view->data == nullptr || view->dtype == grad_out.dtype,
                    "alpha_blend backward: tensors must be ", name_of(grad_out.dtype));
  }
  check_dtypes(grad_out, params.factor);
  const bool needs_sums = params.grad_factor.data != nullptr;
  VTOK_CHECK_VALUE(needs_sums == (params.a.data != nullptr) &&
                       needs_sums == (params.b.data != nullptr) &&
                       needs_sums == (params.partials.data != nullptr),
                   "alpha_blend backward: a, b and partials must come with grad_factor only");
  if (!needs_sums) return;
  VTOK_CHECK_TYPE(params.partials.dtype == params.factor.dtype &&
                      params.grad_factor.dtype == params.factor.dtype,
                  "alpha_blend backward: partials and grad_factor must be ",
                  name_of(params.factor.dtype));
  int64_t expected_stride = 1;
  for (int dim = params.factor.num_dims - 1; dim >= 0; --dim) {
    for (const TensorView* view :
         {&params.factor, static_cast<const TensorView*>(&params.grad_factor)}) {
      VTOK_CHECK_VALUE(
          view->num_dims == params.factor.num_dims &&
              view->shape[dim] == params.factor.shape[dim] &&
              (view->shape[dim] == 1 || view->strides[dim] == expected_stride),
          "alpha_blend backward: mix_factor and grad_factor must be contiguous and equal in shape");
    }
    expected_stride *= params.factor.shape[dim];
  }
  VTOK_CHECK_VALUE(
      params.partials.num_dims == 1 &&
          params.partials.num_elements() >= params.factor.num_elements(),
      "alpha_blend backward: partials must be [n] with n >= ", params.factor.num_elements());
}

void backward(const TensorView& grad_out, const TensorView& a, const TensorView& b,
              const TensorView& factor, const OutputView& grad_a, const OutputView& grad_b,
              const OutputView& grad_factor, const WorkspaceView& partials, bool is_logit,
              const CallContext& context) {
  BlendBackward params{{},     grad_out, a,           b,        factor,
                       grad_a, grad_b,   grad_factor, partials, context.num_threads};
  check_backward(params);
  check_same_device("alpha_blend backward", grad_out, a, b, factor, grad_a, grad_b, grad_factor,
                    partials);
  if (grad_out.num_elements() == 0) return;
  const bool needs_sums = partials.data != nullptr;
  const int64_t max_blocks =
      needs_sums ? partials.num_elements() / factor.num_elements() : kBlendMaxBlocks;
  const Tensors tensors = {&a, &b, &grad_out, &grad_a, &grad_b, &factor};
  const int order =
      grad_a.data != nullptr ? kBlendGradA : (grad_b.data != nullptr ? kBlendGradB : kBlendA);
  params.layout =
      make_layout(grad_out, tensors, order, is_logit, std::min(max_blocks, kBlendMaxBlocks));
  VTOK_CALL_DEVICE(grad_out, context, alpha_blend_backward, params);
}

}  // namespace

void bind_alpha_blend(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("alpha_blend_forward", forward, py::arg("a"), py::arg("b"), py::arg("mix_factor"),
        py::arg("out"), py::arg("is_logit"), py::arg("context"));
  m.def("alpha_blend_backward", backward, py::arg("grad_out"), py::arg("a"), py::arg("b"),
        py::arg("mix_factor"), py::arg("grad_a"), py::arg("grad_b"), py::arg("grad_mix_factor"),
        py::arg("partials"), py::arg("is_logit"), py::arg("context"));
}

}  // namespace vtok
