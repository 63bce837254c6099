// Convolution kernels of one format, see causal_conv3d_gemm.cuh.
#include "causal_conv3d_gemm_dispatch.cuh"

namespace vtok {

template void run_conv_gemm<ConvMath::kFloat16>(const ConvGemm& params, Stream stream);

}  // namespace vtok
