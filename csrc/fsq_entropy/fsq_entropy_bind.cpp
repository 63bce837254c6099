// Python bindings of the FSQ entropy kernels: layouts from tensor views, and the choice of device.
#include "../core/bind.h"
#include "../fsq/fsq_channel.h"
#include "fsq_entropy.h"

#include <vector>

namespace vtok {
namespace {

DType real_of(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

// Checks a [codebooks, tokens, size] tensor (size 0: [codebooks, tokens]) with contiguous rows.
void check_rows(const char* name, const TensorView& view, DType dtype, int64_t num_codebooks,
                int64_t num_tokens, int64_t size) {
  VTOK_CHECK_TYPE(view.dtype == dtype, "fsq_entropy: ", name, " must be ", name_of(dtype), ", got ",
                  name_of(view.dtype));
  const bool shape_fits = view.num_dims == (size ? 3 : 2) && view.shape[0] == num_codebooks &&
                          view.shape[1] == num_tokens && (size == 0 || view.shape[2] == size);
  VTOK_CHECK_VALUE(shape_fits, "fsq_entropy: ", name, " must be [", num_codebooks, ", ", num_tokens,
                   size ? ", " + std::to_string(size) : std::string(), "], got ",
                   shape_string(view));
  VTOK_CHECK_VALUE(size <= 1 || view.strides[2] == 1, "fsq_entropy: ", name,
                   " must have contiguous rows");
}

void check_optional(const char* name, const TensorView& view, DType dtype,
                    const FsqEntropyLayout& layout) {
  if (view.data) check_rows(name, view, dtype, layout.num_codebooks, layout.num_tokens, 0);
}

void check_scalar(const char* name, const TensorView& view, DType dtype) {
  VTOK_CHECK_TYPE(view.data == nullptr || view.dtype == dtype, "fsq_entropy: ", name, " must be ",
                  name_of(dtype), ", got ", name_of(view.dtype));
  VTOK_CHECK_VALUE(view.num_elements() == 1, "fsq_entropy: ", name, " must be a scalar, got ",
                   shape_string(view));
}

void check_flat(const char* name, const TensorView& view, DType dtype, int64_t size) {
  VTOK_CHECK_TYPE(view.dtype == dtype, "fsq_entropy: ", name, " must be ", name_of(dtype), ", got ",
                  name_of(view.dtype));
  VTOK_CHECK_VALUE(
      view.num_dims == 1 && view.shape[0] == size && (size <= 1 || view.strides[0] == 1),
      "fsq_entropy: ", name, " must be contiguous [", size, "], got ", shape_string(view));
}

FsqEntropyLayout make_layout(const TensorView& z, const std::vector<int64_t>& levels, int num_low,
                             double inverse_temperature) {
  FsqEntropyLayout layout{};
  const int64_t channels = static_cast<int64_t>(levels.size());
  VTOK_CHECK_VALUE(channels >= 1 && channels <= kFsqMaxChannels,
                   "fsq_entropy: levels must have 1 to ", kFsqMaxChannels, " entries");
  VTOK_CHECK_VALUE(z.num_dims == 3 && z.shape[2] == channels,
                   "fsq_entropy: z must be [codebooks, tokens, ", channels, "], got ",
                   shape_string(z));
  VTOK_CHECK_VALUE(num_low >= 1 && num_low <= channels,
                   "fsq_entropy: num_low must be in [1, channels], got ", num_low);
  layout.num_codebooks = z.shape[0];
  layout.num_tokens = z.shape[1];
  layout.channels = static_cast<int>(channels);
  layout.num_low = num_low;
  layout.low_size = layout.high_size = 1;
  int64_t basis = 1;
  for (int d = 0; d < layout.channels; ++d) {
    VTOK_CHECK_VALUE(levels[d] >= 2 && levels[d] <= 256,
                     "fsq_entropy: levels must be in [2, 256], got ", levels[d]);
    layout.channel[d] = fsq_channel(levels[d], basis);
    layout.reciprocal[d] = static_cast<uint32_t>(((uint64_t{1} << 32) + levels[d] - 1) / levels[d]);
    layout.slope_per_z[d] = 2 * inverse_temperature / layout.channel[d].half_width;
    layout.level_offset[d] = layout.level_sum;
    layout.level_sum += static_cast<int>(levels[d]);
    basis *= levels[d];
    VTOK_CHECK_VALUE(basis <= int64_t{1} << 30,
                     "fsq_entropy: levels must have a product of at most 2^30");
    (d < num_low ? layout.low_size : layout.high_size) *= static_cast<int>(levels[d]);
  }
  // A reciprocal divides exactly below 2^32 / levels.
  VTOK_CHECK_VALUE(layout.low_size <= 1 << 24 && layout.high_size <= 1 << 24,
                   "fsq_entropy: halves must have at most 2^24 combinations");
  return layout;
}

void factors(const TensorView& z, const OutputView& low, const OutputView& high,
             const OutputView& entropy, const OutputView& commitment, const OutputView& indices,
             const std::vector<int64_t>& levels, int num_low, double inverse_temperature,
             const CallContext& context) {
  const DType real = real_of(z.dtype);
  FsqEntropyFactors params{make_layout(z, levels, num_low, inverse_temperature),
                           z,
                           low,
                           high,
                           entropy,
                           commitment,
                           indices,
                           context.num_threads};
  const FsqEntropyLayout& layout = params.layout;
  check_rows("low", low, real, layout.num_codebooks, layout.num_tokens, layout.low_size);
  check_rows("high", high, real, layout.num_codebooks, layout.num_tokens, layout.high_size);
  check_optional("entropy", entropy, real, layout);
  check_optional("commitment", commitment, real, layout);
  check_optional("indices", indices, DType::kInt32, layout);
  if (layout.num_codebooks * layout.num_tokens == 0) return;
  VTOK_CALL_DEVICE(z, context, fsq_entropy_factors, params);
}

void backward(const TensorView& z, const TensorView& grad_low, const TensorView& grad_high,
              const TensorView& grad_entropy, const TensorView& grad_commitment,
              const OutputView& grad_z, const std::vector<int64_t>& levels, int num_low,
              double inverse_temperature, const CallContext& context) {
  const DType real = real_of(z.dtype);
  FsqEntropyBackward params{make_layout(z, levels, num_low, inverse_temperature),
                            z,
                            grad_low,
                            grad_high,
                            grad_entropy,
                            grad_commitment,
                            grad_z,
                            context.num_threads};
  const FsqEntropyLayout& layout = params.layout;
  VTOK_CHECK_TYPE(grad_z.dtype == z.dtype, "fsq_entropy: grad_z must be ", name_of(z.dtype));
  VTOK_CHECK_VALUE(grad_z.num_dims == 3 && grad_z.shape[0] == z.shape[0] &&
                       grad_z.shape[1] == z.shape[1] && grad_z.shape[2] == z.shape[2],
                   "fsq_entropy: grad_z must be ", shape_string(z), ", got ", shape_string(grad_z));
  if (layout.num_codebooks * layout.num_tokens == 0) return;
  VTOK_CHECK_VALUE((grad_low.data == nullptr) == (grad_high.data == nullptr),
                   "fsq_entropy: grad_low and grad_high must be given together");
  if (grad_low.data) {
    check_rows("grad_low", grad_low, real, layout.num_codebooks, layout.num_tokens,
               layout.low_size);
    check_rows("grad_high", grad_high, real, layout.num_codebooks, layout.num_tokens,
               layout.high_size);
  }
  check_scalar("grad_entropy", grad_entropy, real);
  check_scalar("grad_commitment", grad_commitment, real);
  VTOK_CALL_DEVICE(z, context, fsq_entropy_backward, params);
}

// Checks low and high against each other; the sizes must fit an int.
void check_halves(const TensorView& low, const TensorView& high) {
  VTOK_CHECK_VALUE(low.num_dims == 3 && high.num_dims == 3 && low.shape[2] >= 1 &&
                       high.shape[2] >= 1 && low.shape[2] <= 1 << 24 && high.shape[2] <= 1 << 24,
                   "fsq_entropy: low and high must be [codebooks, tokens, combinations], got ",
                   shape_string(low), " and ", shape_string(high));
  VTOK_CHECK_TYPE(low.dtype == real_of(low.dtype), "fsq_entropy: low must be float32 or float64");
  check_rows("low", low, low.dtype, low.shape[0], low.shape[1], low.shape[2]);
  check_rows("high", high, low.dtype, low.shape[0], low.shape[1], high.shape[2]);
}

void clamped_forward(const TensorView& low, const TensorView& high, const OutputView& entropy,
                     const CallContext& context) {
  check_halves(low, high);
  check_rows("entropy", entropy, low.dtype, low.shape[0], low.shape[1], 0);
  FsqEntropyClampedForward params{low.shape[0],
                                  low.shape[1],
                                  static_cast<int>(low.shape[2]),
                                  static_cast<int>(high.shape[2]),
                                  low,
                                  high,
                                  entropy,
                                  context.num_threads};
  if (params.num_codebooks * params.num_tokens == 0) return;
  VTOK_CALL_DEVICE(low, context, fsq_entropy_clamped_forward, params);
}

void clamped_backward(const TensorView& low, const TensorView& high, const TensorView& grad_entropy,
                      const OutputView& grad_low, const OutputView& grad_high,
                      const CallContext& context) {
  check_halves(low, high);
  check_rows("grad_low", grad_low, low.dtype, low.shape[0], low.shape[1], low.shape[2]);
  check_rows("grad_high", grad_high, low.dtype, low.shape[0], low.shape[1], high.shape[2]);
  VTOK_CHECK_VALUE(grad_entropy.data != nullptr, "fsq_entropy: grad_entropy must be given");
  check_scalar("grad_entropy", grad_entropy, low.dtype);
  FsqEntropyClampedBackward params{low.shape[0],
                                   low.shape[1],
                                   static_cast<int>(low.shape[2]),
                                   static_cast<int>(high.shape[2]),
                                   low,
                                   high,
                                   grad_entropy,
                                   grad_low,
                                   grad_high,
                                   context.num_threads};
  if (params.num_codebooks * params.num_tokens == 0) return;
  VTOK_CALL_DEVICE(low, context, fsq_entropy_clamped_backward, params);
}

void average_forward(const TensorView& average, const OutputView& partial_entropy,
                     const CallContext& context) {
  const DType real = real_of(average.dtype);
  const int64_t size = average.num_elements();
  check_flat("average", average, real, size);
  check_flat("partial_entropy", partial_entropy, real,
             (size + kFsqEntropyPartial - 1) / kFsqEntropyPartial);
  FsqEntropyAverageForward params{average, partial_entropy, context.num_threads};
  if (size == 0) return;
  VTOK_CALL_DEVICE(average, context, fsq_entropy_average_forward, params);
}

void average_backward(const TensorView& average, const TensorView& grad_entropy,
                      const OutputView& grad_average, const CallContext& context) {
  const DType real = real_of(average.dtype);
  check_flat("average", average, real, average.num_elements());
  check_flat("grad_average", grad_average, real, average.num_elements());
  VTOK_CHECK_VALUE(grad_entropy.data != nullptr, "fsq_entropy: grad_entropy must be given");
  check_scalar("grad_entropy", grad_entropy, real);
  FsqEntropyAverageBackward params{average, grad_entropy, grad_average, context.num_threads};
  if (average.num_elements() == 0) return;
  VTOK_CALL_DEVICE(average, context, fsq_entropy_average_backward, params);
}

}  // namespace

void bind_fsq_entropy(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("fsq_entropy_factors", factors, py::arg("z"), py::arg("low"), py::arg("high"),
        py::arg("entropy"), py::arg("commitment"), py::arg("indices"), py::arg("levels"),
        py::arg("num_low"), py::arg("inverse_temperature"), py::arg("context"));
  m.def("fsq_entropy_backward", backward, py::arg("z"), py::arg("grad_low"), py::arg("grad_high"),
        py::arg("grad_entropy"), py::arg("grad_commitment"), py::arg("grad_z"), py::arg("levels"),
        py::arg("num_low"), py::arg("inverse_temperature"), py::arg("context"));
  m.def("fsq_entropy_clamped_forward", clamped_forward, py::arg("low"), py::arg("high"),
        py::arg("entropy"), py::arg("context"));
  m.def("fsq_entropy_clamped_backward", clamped_backward, py::arg("low"), py::arg("high"),
        py::arg("grad_entropy"), py::arg("grad_low"), py::arg("grad_high"), py::arg("context"));
  m.def("fsq_entropy_average_forward", average_forward, py::arg("average"),
        py::arg("partial_entropy"), py::arg("context"));
  m.def("fsq_entropy_average_backward", average_backward, py::arg("average"),
        py::arg("grad_entropy"), py::arg("grad_average"), py::arg("context"));
}

}  // namespace vtok
