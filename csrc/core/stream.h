// A CUDA stream as the bindings pass it: torch.cuda.current_stream().cuda_stream, a cudaStream_t.
// Host code and builds without CUDA need no CUDA header for it.
#pragma once

namespace vtok {

using Stream = void*;

}  // namespace vtok
