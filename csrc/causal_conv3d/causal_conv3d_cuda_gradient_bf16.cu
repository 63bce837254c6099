// Kernels of the weight's gradient in one format, see causal_conv3d_gradient_dispatch.cuh.
#include "causal_conv3d_gradient_dispatch.cuh"

namespace vtok {

template void run_conv_weight_gradient<ConvMath::kBFloat16>(const ConvWeightGradient& params,
                                                            Stream stream);

}  // namespace vtok
