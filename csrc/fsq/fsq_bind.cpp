// Python bindings of FSQ: turns tensor views into an FsqLayout and picks the device.
#include "../core/bind.h"
#include "fsq_channel.h"

#include <vector>

namespace vtok {
namespace {

void set_channels(FsqLayout& layout, const std::vector<int64_t>& levels) {
  VTOK_CHECK_VALUE(!levels.empty() && levels.size() <= size_t{kFsqMaxChannels},
                   "fsq: levels must have 1 to ", kFsqMaxChannels, " entries, got ", levels.size());
  layout.channels = static_cast<int>(levels.size());
  int64_t basis = 1;
  for (int d = 0; d < layout.channels; ++d) {
    VTOK_CHECK_VALUE(levels[d] >= 2 && levels[d] <= 256, "fsq: levels must be in [2, 256], got ",
                     levels[d]);
    layout.channel[d] = fsq_channel(levels[d], basis);
    VTOK_CHECK_VALUE(basis <= INT64_MAX / levels[d], "fsq: levels must have a product below 2^63");
    basis *= levels[d];
  }
}

// Appends a token dimension, or merges it into the one before where all three tensors allow that.
void append_dim(FsqTokens& tokens, int64_t size, int64_t z_stride, int64_t code_stride,
                int64_t index_stride) {
  tokens.num_tokens *= size;
  if (size == 1) return;
  const int last = tokens.num_dims - 1;
  if (last >= 0 && tokens.z_strides[last] == size * z_stride &&
      tokens.code_strides[last] == size * code_stride &&
      tokens.index_strides[last] == size * index_stride) {
    tokens.sizes[last] *= size;
    tokens.z_strides[last] = z_stride;
    tokens.code_strides[last] = code_stride;
    tokens.index_strides[last] = index_stride;
    return;
  }
  VTOK_CHECK_VALUE(tokens.num_dims < kFsqMaxTokenDims, "fsq: z must have at most ",
                   kFsqMaxTokenDims, " token dimensions after merging contiguous ones");
  const int dim = tokens.num_dims++;
  tokens.sizes[dim] = size;
  tokens.z_strides[dim] = z_stride;
  tokens.code_strides[dim] = code_stride;
  tokens.index_strides[dim] = index_stride;
}

// `z` and `codes` are [..., num_codebooks * D, ...] with the channels at `channel_dim`; `indices`
// has num_codebooks there, or lacks the dimension when num_codebooks is 1 and it has one dimension
// less. Shapes were checked in Python.
FsqLayout make_layout(const TensorView& z, const TensorView& codes, const TensorView* indices,
                      int channel_dim, int64_t num_codebooks, const std::vector<int64_t>& levels) {
  FsqLayout layout{};
  set_channels(layout, levels);
  VTOK_CHECK_VALUE(channel_dim >= 0 && channel_dim < z.num_dims && codes.num_dims == z.num_dims &&
                       z.shape[channel_dim] == layout.channels * num_codebooks,
                   "fsq: z must have ", layout.channels * num_codebooks, " channels at dimension ",
                   channel_dim, ", got shape ", shape_string(z));
  const bool has_codebook_dim = indices != nullptr && indices->num_dims == z.num_dims;
  VTOK_CHECK_VALUE(indices == nullptr || has_codebook_dim ||
                       (num_codebooks == 1 && indices->num_dims == z.num_dims - 1),
                   "fsq: indices have the wrong rank for z of shape ", shape_string(z));
  layout.z_channel_stride = z.strides[channel_dim];
  layout.code_channel_stride = codes.strides[channel_dim];
  layout.tokens.num_tokens = 1;
  for (int dim = 0, index_dim = 0; dim < z.num_dims; ++dim) {
    VTOK_CHECK_VALUE(codes.shape[dim] == z.shape[dim], "fsq: codes must have shape ",
                     shape_string(z), ", got ", shape_string(codes));
    const bool is_channel = dim == channel_dim;
    const bool consumes_index_dim = !is_channel || has_codebook_dim;
    const int64_t size = is_channel ? num_codebooks : z.shape[dim];
    const int64_t step = is_channel ? layout.channels : 1;
    VTOK_CHECK_VALUE(indices == nullptr || !consumes_index_dim || indices->shape[index_dim] == size,
                     "fsq: indices have shape ", shape_string(*indices),
                     ", which does not match z ", shape_string(z));
    const int64_t index_stride =
        indices != nullptr && consumes_index_dim ? indices->strides[index_dim] : 0;
    append_dim(layout.tokens, size, z.strides[dim] * step, codes.strides[dim] * step, index_stride);
    index_dim += consumes_index_dim ? 1 : 0;
  }
  if (layout.tokens.num_dims == 0) {  // a single token
    layout.tokens.num_dims = 1;
    layout.tokens.sizes[0] = 1;
  }
  return layout;
}

void forward(const TensorView& z, const OutputView& codes, const OutputView& indices,
             const std::vector<int64_t>& levels, int channel_dim, int64_t num_codebooks,
             const CallContext& context) {
  VTOK_CHECK_TYPE(codes.dtype == z.dtype, "fsq: codes must have the dtype of z, ", name_of(z.dtype),
                  ", got ", name_of(codes.dtype));
  FsqForward params{make_layout(z, codes, &indices, channel_dim, num_codebooks, levels), z, codes,
                    indices, context.num_threads};
  const FsqChannel& last = params.layout.channel[params.layout.channels - 1];
  VTOK_CHECK_VALUE(indices.dtype == DType::kInt64 || last.basis * last.levels <= int64_t{1} << 31,
                   "fsq: indices must be int64 for a codebook above 2^31");
  check_same_device("fsq", z, codes, indices);
  if (params.layout.tokens.num_tokens == 0) return;
  VTOK_CALL_DEVICE(z, context, fsq_forward, params);
}

void backward(const TensorView& z, const TensorView& grad_codes, const OutputView& grad_z,
              const std::vector<int64_t>& levels, int channel_dim, int64_t num_codebooks,
              const CallContext& context) {
  VTOK_CHECK_TYPE(grad_codes.dtype == z.dtype && grad_z.dtype == z.dtype,
                  "fsq backward: gradients must be ", name_of(z.dtype));
  VTOK_CHECK_VALUE(grad_codes.num_dims == grad_z.num_dims,
                   "fsq backward: gradients must have equal shapes");
  for (int dim = 0; dim < grad_z.num_dims; ++dim) {
    VTOK_CHECK_VALUE(grad_codes.strides[dim] == grad_z.strides[dim] || grad_z.shape[dim] <= 1,
                     "fsq backward: gradients must have equal strides");
  }
  FsqBackward params{make_layout(z, grad_z, nullptr, channel_dim, num_codebooks, levels), z,
                     grad_codes, grad_z, context.num_threads};
  check_same_device("fsq backward", z, grad_codes, grad_z);
  if (params.layout.tokens.num_tokens == 0) return;
  VTOK_CALL_DEVICE(z, context, fsq_backward, params);
}

void decode(const TensorView& indices, const OutputView& codes, const std::vector<int64_t>& levels,
            int channel_dim, int64_t num_codebooks, const CallContext& context) {
  FsqDecode params{make_layout(codes, codes, &indices, channel_dim, num_codebooks, levels), indices,
                   codes, context.num_threads};
  check_same_device("fsq_indices_to_codes", codes, indices);
  if (params.layout.tokens.num_tokens == 0) return;
  VTOK_CALL_DEVICE(codes, context, fsq_decode, params);
}

}  // namespace

void bind_fsq(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("fsq_forward", forward, py::arg("z"), py::arg("codes"), py::arg("indices"),
        py::arg("levels"), py::arg("channel_dim"), py::arg("num_codebooks"), py::arg("context"));
  m.def("fsq_backward", backward, py::arg("z"), py::arg("grad_codes"), py::arg("grad_z"),
        py::arg("levels"), py::arg("channel_dim"), py::arg("num_codebooks"), py::arg("context"));
  m.def("fsq_decode", decode, py::arg("indices"), py::arg("codes"), py::arg("levels"),
        py::arg("channel_dim"), py::arg("num_codebooks"), py::arg("context"));
}

}  // namespace vtok
