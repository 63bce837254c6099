// FSQ on CUDA. Memory bound: every kernel reads and writes each element once, in 16-byte accesses
// where layout allows.
//
//   planar   a thread owns kWidth neighbouring tokens and loops over the channels; neighbouring
//   threads read neighbouring
//            vectors. With kWidth 1 this also serves any other strides.
//   packed   the D channels of a token are neighbours in memory: a block copies kTokens * D
//   elements to shared memory in
//            16-byte accesses, each thread quantizes one token there, and the block copies the
//            codes back.
#include "../core/dispatch.h"
#include "../core/launch.cuh"
#include "fsq.h"
#include "fsq_math.h"

namespace vtok {
namespace {

constexpr int kThreads = 256;
// Shared memory of the packed kernel: 256 tokens x 16 channels x 4 B = 16 KB at most, so that
// occupancy is not limited.
constexpr int kTokens = kThreads;
constexpr int64_t kMaxBlocks = 0x7fffffff;

struct Offsets {
  int64_t z, code, index;
};

// Element offsets of token number `token`.
VTOK_FUNCTION Offsets offsets_of(const FsqTokens& tokens, int64_t token) {
  Offsets offsets{0, 0, 0};
  for (int dim = tokens.num_dims - 1; dim >= 0; --dim) {
    const int64_t coordinate = dim == 0 ? token : token % tokens.sizes[dim];
    token = dim == 0 ? 0 : token / tokens.sizes[dim];
    offsets.z += coordinate * tokens.z_strides[dim];
    offsets.code += coordinate * tokens.code_strides[dim];
    offsets.index += coordinate * tokens.index_strides[dim];
  }
  return offsets;
}

// A token's index while its channels are visited. NaN in any channel gives -1.
template <typename Index>
struct IndexSum {
  Index sum = 0;
  bool has_nan = false;

  __device__ __forceinline__ void add(float z, int32_t level, const FsqChannel& channel) {
    sum += static_cast<Index>(level) * static_cast<Index>(channel.basis);
    has_nan |= z != z;
  }

  __device__ __forceinline__ Index value() const { return has_nan ? Index(-1) : sum; }
};

// The branch is uniform: every thread of a launch sees the same channel.
__device__ __forceinline__ int32_t level_of(float z, const FsqConstants<float>& c,
                                            const FsqChannel& channel) {
  const auto boundary = [&](int k) { return channel.boundary[k]; };
  if (channel.levels <= 8) return fsq_level<7>(z, c, boundary);
  if (channel.levels <= kFsqMaxCompared) return fsq_level<15>(z, c, boundary);
  return fsq_level<0>(z, c, boundary);
}

template <typename T, typename Index, int kWidth>
__global__ void __launch_bounds__(kThreads)
    fsq_forward_kernel(const FsqLayout layout,
                       const T* __restrict__ z,        // [tokens, D]
                       T* __restrict__ codes,          // [tokens, D]
                       Index* __restrict__ indices) {  // [tokens]
  const int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kWidth;
  if (first >= layout.tokens.num_tokens) return;
  const Offsets at = offsets_of(layout.tokens, first);
  IndexSum<Index> index[kWidth];
  for (int d = 0; d < layout.channels; ++d) {
    const FsqConstants<float> c = fsq_constants<float>(layout.channel[d]);
    auto values = load_vector<Vector<T, kWidth>>(z + at.z + d * layout.z_channel_stride);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float value = to_float(values.values[i]);
      const int32_t level = level_of(value, c, layout.channel[d]);
      index[i].add(value, level, layout.channel[d]);
      values.values[i] = from_float<T>(fsq_code(value, level, c.half_width));
    }
    store_vector(codes + at.code + d * layout.code_channel_stride, values);
  }
  const int64_t step = layout.tokens.index_strides[layout.tokens.num_dims - 1];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) indices[at.index + i * step] = index[i].value();
}

template <typename T, typename Index>
__global__ void __launch_bounds__(kThreads)
    fsq_forward_packed_kernel(const FsqLayout layout,
                              const T* __restrict__ z,        // [tokens, D]
                              T* __restrict__ codes,          // [tokens, D]
                              Index* __restrict__ indices) {  // [tokens]
  constexpr int kWidth = 16 / sizeof(T);
  using Word = Vector<T, kWidth>;
  VTOK_DYNAMIC_SHARED(T, tile);  // [kTokens, D]
  const int64_t first_token = int64_t{blockIdx.x} * kTokens;
  const int64_t remaining = layout.tokens.num_tokens - first_token;
  const int num_tokens = remaining < kTokens ? static_cast<int>(remaining) : kTokens;
  const int num_elements = num_tokens * layout.channels;
  const int num_words = num_elements / kWidth;
  const T* block_z = z + first_token * layout.channels;
  T* block_codes = codes + first_token * layout.channels;

  for (int word = threadIdx.x; word < num_words; word += kThreads) {
    store_vector(tile + word * kWidth, load_vector<Word>(block_z + word * kWidth));
  }
  for (int e = num_words * kWidth + threadIdx.x; e < num_elements; e += kThreads)
    tile[e] = block_z[e];
  __syncthreads();

  if (static_cast<int>(threadIdx.x) < num_tokens) {
    T* token = tile + threadIdx.x * layout.channels;
    IndexSum<Index> index;
    for (int d = 0; d < layout.channels; ++d) {
      const FsqConstants<float> c = fsq_constants<float>(layout.channel[d]);
      const float value = to_float(token[d]);
      const int32_t level = level_of(value, c, layout.channel[d]);
      index.add(value, level, layout.channel[d]);
      token[d] = from_float<T>(fsq_code(value, level, c.half_width));
    }
    indices[(first_token + threadIdx.x) * layout.tokens.index_strides[0]] = index.value();
  }
  __syncthreads();

  for (int word = threadIdx.x; word < num_words; word += kThreads) {
    store_vector(block_codes + word * kWidth, load_vector<Word>(tile + word * kWidth));
  }
  for (int e = num_words * kWidth + threadIdx.x; e < num_elements; e += kThreads)
    block_codes[e] = tile[e];
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    fsq_backward_kernel(const FsqLayout layout,
                        const T* __restrict__ z,           // [tokens, D]
                        const T* __restrict__ grad_codes,  // [tokens, D]
                        T* __restrict__ grad_z) {          // [tokens, D]
  const int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kWidth;
  if (first >= layout.tokens.num_tokens) return;
  const Offsets at = offsets_of(layout.tokens, first);
  for (int d = 0; d < layout.channels; ++d) {
    const FsqConstants<float> c = fsq_constants<float>(layout.channel[d]);
    const auto values = load_vector<Vector<T, kWidth>>(z + at.z + d * layout.z_channel_stride);
    const int64_t grad_offset = at.code + d * layout.code_channel_stride;
    auto grad = load_vector<Vector<T, kWidth>>(grad_codes + grad_offset);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      grad.values[i] =
          from_float<T>(to_float(grad.values[i]) * fsq_slope(to_float(values.values[i]), c));
    }
    store_vector(grad_z + grad_offset, grad);
  }
}

// Packed: the channel of an element is its position modulo D, so no grouping by token is needed.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    fsq_backward_packed_kernel(const FsqLayout layout,
                               const T* __restrict__ z,  // [tokens, D]
                               const T* __restrict__ grad_codes, T* __restrict__ grad_z) {
  const int64_t num_elements = layout.tokens.num_tokens * layout.channels;
  const int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kWidth;
  if (first >= num_elements) return;
  int d = static_cast<int>(first % layout.channels);
  const auto values = load_vector<Vector<T, kWidth>>(z + first);
  auto grad = load_vector<Vector<T, kWidth>>(grad_codes + first);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const FsqConstants<float> c = fsq_constants<float>(layout.channel[d]);
    grad.values[i] =
        from_float<T>(to_float(grad.values[i]) * fsq_slope(to_float(values.values[i]), c));
    d = d + 1 == layout.channels ? 0 : d + 1;
  }
  store_vector(grad_z + first, grad);
}

template <typename T, typename Index>
__global__ void __launch_bounds__(kThreads)
    fsq_decode_kernel(const FsqLayout layout,
                      const Index* __restrict__ indices,  // [tokens]
                      T* __restrict__ codes) {            // [tokens, D]
  const int64_t token = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (token >= layout.tokens.num_tokens) return;
  const Offsets at = offsets_of(layout.tokens, token);
  Index rest = indices[at.index];
  for (int d = 0; d < layout.channels; ++d) {
    const FsqChannel& channel = layout.channel[d];
    const float digit = static_cast<float>(rest % channel.levels - channel.half_width);
    codes[at.code + d * layout.code_channel_stride] =
        from_float<T>(digit / static_cast<float>(channel.half_width));
    rest /= channel.levels;
  }
}

bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// Whether kWidth consecutive tokens are one aligned vector in z and codes, for every row and
// channel.
bool is_planar(const FsqLayout& layout, int width) {
  const FsqTokens& tokens = layout.tokens;
  const int inner = tokens.num_dims - 1;
  bool planar = tokens.z_strides[inner] == 1 && tokens.code_strides[inner] == 1 &&
                tokens.sizes[inner] % width == 0 && layout.z_channel_stride % width == 0 &&
                layout.code_channel_stride % width == 0;
  for (int dim = 0; dim < inner; ++dim) {
    planar = planar && tokens.z_strides[dim] % width == 0 && tokens.code_strides[dim] % width == 0;
  }
  return planar;
}

bool is_packed(const FsqLayout& layout) {
  return layout.tokens.num_dims == 1 && layout.z_channel_stride == 1 &&
         layout.code_channel_stride == 1 && layout.tokens.z_strides[0] == layout.channels &&
         layout.tokens.code_strides[0] == layout.channels;
}

unsigned blocks_for(const char* op, int64_t items, int64_t items_per_block) {
  const int64_t blocks = (items + items_per_block - 1) / items_per_block;
  VTOK_CHECK_VALUE(blocks <= kMaxBlocks, op, ": z has too many tokens for one launch, got ", items);
  return static_cast<unsigned>(blocks);
}

}  // namespace

void fsq_forward_cuda(const FsqForward& params, Stream stream) {
  const DeviceGuard device(params.z.device_index);
  const FsqLayout& layout = params.layout;
  const int64_t num_tokens = layout.tokens.num_tokens;
  dispatch_floating_cuda("fsq", "z", params.z.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    dispatch_index("fsq", "indices", params.indices.dtype, [&](auto index_type) {
      using Index = typename decltype(index_type)::type;
      constexpr int kWidth = 16 / sizeof(T);
      const T* z = params.z.data_as<T>();
      T* codes = params.codes.data_as<T>();
      Index* indices = params.indices.data_as<Index>();
      const bool aligned = is_aligned(z) && is_aligned(codes);
      if (aligned && is_packed(layout)) {
        const unsigned shared_bytes = static_cast<unsigned>(kTokens * layout.channels * sizeof(T));
        VTOK_LAUNCH((fsq_forward_packed_kernel<T, Index>),
                    dim3(blocks_for("fsq", num_tokens, kTokens)), dim3(kThreads), shared_bytes,
                    stream, layout, z, codes, indices);
      } else if (aligned && is_planar(layout, kWidth)) {
        VTOK_LAUNCH((fsq_forward_kernel<T, Index, kWidth>),
                    dim3(blocks_for("fsq", num_tokens, kThreads * kWidth)), dim3(kThreads), 0,
                    stream, layout, z, codes, indices);
      } else {
        VTOK_LAUNCH((fsq_forward_kernel<T, Index, 1>),
                    dim3(blocks_for("fsq", num_tokens, kThreads)), dim3(kThreads), 0, stream,
                    layout, z, codes, indices);
      }
    });
  });
}

void fsq_backward_cuda(const FsqBackward& params, Stream stream) {
  const DeviceGuard device(params.z.device_index);
  const FsqLayout& layout = params.layout;
  const int64_t num_tokens = layout.tokens.num_tokens;
  dispatch_floating_cuda("fsq backward", "z", params.z.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kWidth = 16 / sizeof(T);
    const T* z = params.z.data_as<T>();
    const T* grad_codes = params.grad_codes.data_as<T>();
    T* grad_z = params.grad_z.data_as<T>();
    const bool aligned = is_aligned(z) && is_aligned(grad_codes) && is_aligned(grad_z);
    const int64_t num_elements = num_tokens * layout.channels;
    if (aligned && is_packed(layout) && num_elements % kWidth == 0) {
      VTOK_LAUNCH((fsq_backward_packed_kernel<T, kWidth>),
                  dim3(blocks_for("fsq backward", num_elements, kThreads * kWidth)), dim3(kThreads),
                  0, stream, layout, z, grad_codes, grad_z);
    } else if (aligned && is_planar(layout, kWidth)) {
      VTOK_LAUNCH((fsq_backward_kernel<T, kWidth>),
                  dim3(blocks_for("fsq backward", num_tokens, kThreads * kWidth)), dim3(kThreads),
                  0, stream, layout, z, grad_codes, grad_z);
    } else {
      VTOK_LAUNCH((fsq_backward_kernel<T, 1>),
                  dim3(blocks_for("fsq backward", num_tokens, kThreads)), dim3(kThreads), 0, stream,
                  layout, z, grad_codes, grad_z);
    }
  });
}

void fsq_decode_cuda(const FsqDecode& params, Stream stream) {
  const DeviceGuard device(params.codes.device_index);
  const FsqLayout& layout = params.layout;
  dispatch_floating_cuda("fsq_indices_to_codes", "codes", params.codes.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    dispatch_index("fsq_indices_to_codes", "indices", params.indices.dtype, [&](auto index_type) {
      using Index = typename decltype(index_type)::type;
      VTOK_LAUNCH((fsq_decode_kernel<T, Index>),
                  dim3(blocks_for("fsq_indices_to_codes", layout.tokens.num_tokens, kThreads)),
                  dim3(kThreads), 0, stream, layout, params.indices.data_as<Index>(),
                  params.codes.data_as<T>());
    });
  });
}

}  // namespace vtok
