// FSQ on CUDA. Memory bound: every kernel reads and writes each element once, in 16-byte accesses
// where layout allows.
//
//   planar   a thread owns kWidth neighbouring tokens and walks through the channels; neighbouring
//            threads read neighbouring vectors. cp.async brings those of all channels to shared
//            memory at once: kept in registers, the next ones would be copied on, and waited for,
//            in every turn of the loop. With kWidth 1 this also serves any other strides.
//   packed   the D channels of a token are neighbours in memory, D from 3 to 6: a block copies
//            kTokens * D elements to shared memory by cp.async, each thread quantizes
//            kTokensPerThread neighbouring tokens from there, and the block copies the codes back.
//
// In both a thread takes one channel of several tokens at a time: what differs between channels
// (the method, its constants) is loaded and decided once for all of them.
//
// Note [Steps by saturation]
// A level is the number of boundaries below z (Note [Levels by comparison] in fsq_math.h). On a GPU
// a comparison and a selection run at half the rate of arithmetic, so that a step from 0 to 1 is
// saturate(z * 2^64 - boundary * 2^64) instead, one fused multiply-add: the product is exact, the
// sum has the sign of z - boundary, and where that is not 0 it is at least 2^-29 * 2^64, because
// all boundaries are larger than 2^-5 and half an ulp of those is 2^-29. A boundary of infinity and
// a z of NaN give NaN, which saturates to 0. Steps are added to 2^23, whose low bits then are the
// level.
#include "../core/dispatch.h"
#include "../core/launch.cuh"
#include "../core/mma.cuh"
#include "../core/quotient.h"
#include "fsq.h"
#include "fsq_math.h"

namespace vtok {
namespace {

constexpr int kThreads = 256;
// Of the packed kernel, whose shared memory then is 24 KB for 6 channels of float32.
constexpr int kTokensPerThread = 4;
constexpr int kTokens = kTokensPerThread * kThreads;
constexpr int kBackwardTurns = 4;  // vectors of a thread of the packed backward kernel
constexpr int64_t kMaxBlocks = 0x7fffffff;

struct Offsets {
  int64_t z, code, index;
};

// Element offsets of token number `token`.
VTOK_FUNCTION Offsets offsets_of(const FsqTokens& tokens, int64_t token) {
  Offsets offsets{0, 0, 0};
  for (int dim = kFsqMaxTokenDims - 1; dim >= 0; --dim) {  // a constant count: nvcc unrolls it
    if (dim >= tokens.num_dims) continue;
    const int64_t outer = dim == 0 ? 0 : quotient_of(token, tokens.sizes[dim]);
    const int64_t coordinate = token - outer * tokens.sizes[dim];
    token = outer;
    offsets.z += coordinate * tokens.z_strides[dim];
    offsets.code += coordinate * tokens.code_strides[dim];
    offsets.index += coordinate * tokens.index_strides[dim];
  }
  return offsets;
}

// N tokens while their channels are visited one by one.
template <typename Index, int N>
struct Tokens {
  // Wraps around: the magic bits that `steps` leaves in levels are taken off at the end.
  using Sum = std::make_unsigned_t<Index>;

  Sum sums[N] = {};
  float code_sums[N] = {};  // NaN after a NaN
  Sum magic_sum = 0;

  // Replaces the values of a channel by their codes.
  __device__ __forceinline__ void quantize(const FsqChannel& channel, float (&values)[N]) {
    if (channel.levels <= 8) return compare<7>(channel, values);
    if (channel.levels <= kFsqMaxCompared) return compare<kFsqMaxCompared - 1>(channel, values);
    const FsqConstants<float> c = fsq_constants<float>(channel);
    const auto unused = [](int) { return 0.0f; };
#pragma unroll 1
    for (int part = 0; part < N; ++part) {
      // One tanh for all N, which take turns in place 0: it is long, and few codebooks need it.
      const int32_t level = fsq_level<0>(values[0], c, unused);
      const float code = fsq_code(values[0], level, c.half_width);
      add(0, static_cast<Sum>(level) * static_cast<Sum>(channel.basis), code);
      rotate(values, code);
    }
  }

  // As quantize, for a channel of at most kBoundaries + 1 levels.
  template <int kBoundaries>
  __device__ __forceinline__ void compare(const FsqChannel& channel, float (&values)[N]) {
    float steps[N];
#pragma unroll
    for (float& step : steps) step = kMagic;
#pragma unroll
    for (int k = 0; k < kBoundaries; ++k) {
      const float boundary = channel.scaled_boundary[k];
#pragma unroll
      for (int i = 0; i < N; ++i) steps[i] += __saturatef(__fmaf_rn(values[i], 0x1p64f, boundary));
    }
    const Sum basis = static_cast<Sum>(channel.basis);
    magic_sum += Sum(0x4b000000u) * basis;
    const float half_width = static_cast<float>(channel.half_width);
    const float inverse = channel.inverse_half_width;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float digit = steps[i] - (kMagic + half_width);
      // digit / half_width: up to 8 levels the product has the bits of the quotient, beyond them
      // after one correction by its remainder. Tests compare all levels with the CPU's division.
      float code = digit * inverse;
      if constexpr (kBoundaries > 7) {
        code = __fmaf_rn(__fmaf_rn(-code, half_width, digit), inverse, code);
      }
      code = values[i] == values[i] ? code : values[i];
      add(i, static_cast<Sum>(float_to_bits(steps[i])) * basis, code);
      values[i] = code;
    }
  }

  // Indices of the first `count` tokens, of which the first has the place `first`.
  __device__ __forceinline__ void store_indices(Index* indices, int64_t first, int64_t step,
                                                int count) const {
    constexpr int kPerWord = N < 16 / static_cast<int>(sizeof(Index)) ? N : 16 / sizeof(Index);
    Index* target = indices + first * step;
    const bool is_vector = step == 1 && reinterpret_cast<uintptr_t>(indices) % 16 == 0;
    if (is_vector && first % kPerWord == 0 && count == N) {
#pragma unroll
      for (int begin = 0; begin < N; begin += kPerWord) {
        Vector<Index, kPerWord> word;
#pragma unroll
        for (int i = 0; i < kPerWord; ++i) word.values[i] = index(begin + i);
        store_vector(target + begin, word);
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < count) target[i * step] = index(i);
    }
  }

 private:
  static constexpr float kMagic = 8388608.0f;  // 2^23

  __device__ __forceinline__ Index index(int i) const {
    return code_sums[i] == code_sums[i] ? static_cast<Index>(sums[i] - magic_sum) : Index(-1);
  }

  __device__ __forceinline__ void add(int i, Sum share, float code) {
    sums[i] += share;
    code_sums[i] += code;
  }

  __device__ __forceinline__ void rotate(float (&values)[N], float last) {
    const Sum first_sum = sums[0];
    const float first_code_sum = code_sums[0];
#pragma unroll
    for (int i = 0; i + 1 < N; ++i) {
      values[i] = values[i + 1];
      sums[i] = sums[i + 1];
      code_sums[i] = code_sums[i + 1];
    }
    values[N - 1] = last;
    sums[N - 1] = first_sum;
    code_sums[N - 1] = first_code_sum;
  }
};

template <typename T, typename Index, int kWidth>
__global__ void __launch_bounds__(kThreads)
    fsq_forward_kernel(const FsqLayout layout,
                       const T* __restrict__ z,        // [tokens, D]
                       T* __restrict__ codes,          // [tokens, D]
                       Index* __restrict__ indices) {  // [tokens]
  using Word = Vector<T, kWidth>;
  constexpr bool kAsync = sizeof(Word) == 16;
  VTOK_DYNAMIC_SHARED(Word, tile);  // [D, kThreads], each thread its own column
  const int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kWidth;
  if (first >= layout.tokens.num_tokens) return;
  const Offsets at = offsets_of(layout.tokens, first);
  const T* own_z = z + at.z;
  T* own_codes = codes + at.code;
  Word* own_tile = tile + threadIdx.x;
  if constexpr (kAsync) {
    for (int d = 0; d < layout.channels; ++d) {
      cp_async<16>(own_tile + d * kThreads, own_z + d * layout.z_channel_stride, true);
    }
    cp_async_wait_all();
  }
  Tokens<Index, kWidth> tokens;
#pragma unroll 1
  for (int d = 0; d < layout.channels; ++d) {
    float values[kWidth];
    vector_to_floats(kAsync ? load_vector<Word>(own_tile + d * kThreads)
                            : load_vector<Word>(own_z + d * layout.z_channel_stride),
                     values);
    tokens.quantize(layout.channel[d], values);
    store_vector(own_codes, vector_from_floats<T>(values));
    own_codes += layout.code_channel_stride;
  }
  const int64_t step = layout.tokens.index_strides[layout.tokens.num_dims - 1];
  tokens.store_indices(indices + at.index, 0, step, kWidth);
}

// kBoundaries: 7 or 15, enough for every channel.
template <typename T, typename Index, int kChannels, int kBoundaries>
__global__ void __launch_bounds__(kThreads)
    fsq_forward_packed_kernel(const FsqLayout layout,
                              const T* __restrict__ z,        // [tokens, D]
                              T* __restrict__ codes,          // [tokens, D]
                              Index* __restrict__ indices) {  // [tokens]
  constexpr int kWidth = 16 / sizeof(T);
  constexpr int kElements = kTokens * kChannels;
  VTOK_SHARED(T, tile, kElements);
  const int64_t first_token = int64_t{blockIdx.x} * kTokens;
  const int64_t remaining = layout.tokens.num_tokens - first_token;
  const int num_tokens = remaining < kTokens ? static_cast<int>(remaining) : kTokens;
  const int num_elements = num_tokens * kChannels;
  const T* block_z = z + first_token * kChannels;
  T* block_codes = codes + first_token * kChannels;

  const int thread = static_cast<int>(threadIdx.x);
  const int num_whole = num_elements / kWidth * kWidth;  // in vectors of 16 bytes
#pragma unroll
  for (int turn = 0; turn < kElements; turn += kThreads * kWidth) {
    const int e = turn + thread * kWidth;
    if (e < num_whole) cp_async<16>(tile + e, block_z + e, true);
  }
  if (num_tokens < kTokens) {
#pragma unroll 1
    for (int e = num_whole + thread; e < kElements; e += kThreads) {
      tile[e] = e < num_elements ? block_z[e] : T{};
    }
  }
  cp_async_wait_all();
  __syncthreads();

  constexpr int kOwn = kTokensPerThread * kChannels;  // elements of a thread: whole tokens
  using Part = Vector<T, kTokensPerThread>;
  T* own = tile + thread * kOwn;
  float elements[kChannels][kTokensPerThread];  // vectors as they lie in memory
#pragma unroll
  for (int v = 0; v < kChannels; ++v) {
    vector_to_floats(load_vector<Part>(own + v * kTokensPerThread), elements[v]);
  }
  Tokens<Index, kTokensPerThread> tokens;
#pragma unroll
  for (int d = 0; d < kChannels; ++d) {
    float values[kTokensPerThread];
    const auto element = [&](int i) -> float& {
      const int e = i * kChannels + d;
      return elements[e / kTokensPerThread][e % kTokensPerThread];
    };
#pragma unroll
    for (int i = 0; i < kTokensPerThread; ++i) values[i] = element(i);
    tokens.template compare<kBoundaries>(layout.channel[d], values);
#pragma unroll
    for (int i = 0; i < kTokensPerThread; ++i) element(i) = values[i];
  }
#pragma unroll
  for (int v = 0; v < kChannels; ++v) {
    store_vector(own + v * kTokensPerThread, vector_from_floats<T>(elements[v]));
  }
  const int first_own = thread * kTokensPerThread;
  const int num_own = num_tokens - first_own;
  tokens.store_indices(indices, first_token + first_own, layout.tokens.index_strides[0],
                       num_own < kTokensPerThread ? num_own : kTokensPerThread);
  __syncthreads();

#pragma unroll
  for (int turn = 0; turn < kElements; turn += kThreads * kWidth) {
    const int e = turn + thread * kWidth;
    if (e < num_whole) store_vector(block_codes + e, load_vector<Vector<T, kWidth>>(tile + e));
  }
  if (num_tokens < kTokens) {
#pragma unroll 1
    for (int e = num_whole + thread; e < num_elements; e += kThreads) block_codes[e] = tile[e];
  }
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
    const int64_t grad_offset = at.code + d * layout.code_channel_stride;
    float values[kWidth], grads[kWidth];
    const auto z_vector = load_vector<Vector<T, kWidth>>(z + at.z + d * layout.z_channel_stride);
    vector_to_floats(load_vector<Vector<T, kWidth>>(grad_codes + grad_offset), grads);
    vector_to_floats(z_vector, values);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) grads[i] *= fsq_slope(values[i], c);
    store_vector(grad_z + grad_offset, vector_from_floats<T>(grads));
  }
}

// Packed: the channel of an element is its position modulo D, so no grouping by token is needed.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    fsq_backward_packed_kernel(const FsqLayout layout,
                               const T* __restrict__ z,  // [tokens, D]
                               const T* __restrict__ grad_codes, T* __restrict__ grad_z) {
  // Constants of consecutive elements from any channel on: lanes of a warp want different ones.
  VTOK_SHARED(FsqConstants<float>, constants, kFsqMaxChannels + kWidth - 1);
  const int thread = static_cast<int>(threadIdx.x), channels = layout.channels;
  if (thread < channels + kWidth - 1) {
    const unsigned channel = threadIdx.x % static_cast<unsigned>(channels);
    constants[thread] = fsq_constants<float>(layout.channel[channel]);
  }
  __syncthreads();
  constexpr int kTurn = kThreads * kWidth;
  const int64_t num_elements = layout.tokens.num_tokens * channels;
  const int64_t block_first = int64_t{blockIdx.x} * kTurn * kBackwardTurns;
  const int64_t first = block_first + thread * kWidth;
  VectorBits<Vector<T, kWidth>> z_bits[kBackwardTurns], grad_bits[kBackwardTurns];
#pragma unroll
  for (int turn = 0; turn < kBackwardTurns; ++turn) {
    if (first + turn * kTurn >= num_elements) continue;
    z_bits[turn].load(z + first + turn * kTurn);
    grad_bits[turn].load(grad_codes + first + turn * kTurn);
  }
  const unsigned block_channel =
      static_cast<unsigned>(block_first - quotient_of(block_first, channels) * channels);
  unsigned d = (block_channel + static_cast<unsigned>(thread * kWidth)) % channels;
  const unsigned step = static_cast<unsigned>(kTurn) % channels;
#pragma unroll
  for (int turn = 0; turn < kBackwardTurns; ++turn) {
    float values[kWidth], grads[kWidth];
    vector_to_floats(z_bits[turn].vector(), values);
    vector_to_floats(grad_bits[turn].vector(), grads);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) grads[i] *= fsq_slope(values[i], constants[d + i]);
    d = d + step >= static_cast<unsigned>(channels) ? d + step - channels : d + step;
    if (first + turn * kTurn >= num_elements) return;
    store_vector(grad_z + first + turn * kTurn, vector_from_floats<T>(grads));
  }
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

// Calls function(channels, boundaries), two integral constants, if the packed forward kernel serves
// the layout; returns whether it does. Other codebooks take the kernel for any strides.
template <typename Function>
bool dispatch_packed(const FsqLayout& layout, const Function& function) {
  using std::integral_constant;
  int most = 0;
  for (int d = 0; d < layout.channels; ++d) {
    most = layout.channel[d].levels > most ? layout.channel[d].levels : most;
  }
  if (!is_packed(layout) || most > kFsqMaxCompared) return false;
  const auto with_channels = [&](auto channels) {
    most <= 8 ? function(channels, integral_constant<int, 7>{})
              : function(channels, integral_constant<int, kFsqMaxCompared - 1>{});
    return true;
  };
  switch (layout.channels) {
    case 3: return with_channels(integral_constant<int, 3>{});
    case 4: return with_channels(integral_constant<int, 4>{});
    case 5: return with_channels(integral_constant<int, 5>{});
    case 6: return with_channels(integral_constant<int, 6>{});
    default: return false;
  }
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
      // Codebooks of more than 2^31 codes have more channels: no 64-bit instances.
      if constexpr (sizeof(Index) == 4) {
        const auto launch = [&](auto channels, auto boundaries) {
          constexpr int kChannels = decltype(channels)::value;
          constexpr int kBoundaries = decltype(boundaries)::value;
          VTOK_LAUNCH((fsq_forward_packed_kernel<T, Index, kChannels, kBoundaries>),
                      dim3(blocks_for("fsq", num_tokens, kTokens)), dim3(kThreads), 0, stream,
                      layout, z, codes, indices);
        };
        if (aligned && dispatch_packed(layout, launch)) return;
      }
      if (aligned && is_planar(layout, kWidth)) {
        VTOK_LAUNCH((fsq_forward_kernel<T, Index, kWidth>),
                    dim3(blocks_for("fsq", num_tokens, kThreads * kWidth)), dim3(kThreads),
                    layout.channels * kThreads * size_t{16}, stream, layout, z, codes, indices);
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
      VTOK_LAUNCH(
          (fsq_backward_packed_kernel<T, kWidth>),
          dim3(blocks_for("fsq backward", num_elements, kThreads * kWidth * kBackwardTurns)),
          dim3(kThreads), 0, stream, layout, z, grad_codes, grad_z);
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
