// FSQ on the CPU: forward (codes and indices in one pass), straight-through backward, indices to
// codes.
//
// Three memory layouts, each vectorised along the contiguous direction:
//   planar   neighbouring tokens are neighbours in memory ([B, D, T, H, W] contiguous): vectors run
//   over tokens; packed   the D channels of a token are neighbours ([..., D], channels_last):
//   vectors run over all elements and the channel
//            constants are repeated in a table of kGroup tokens;
//   strided  anything else: as planar, with strided loads and stores.
#include "../core/dispatch.h"
#include "../core/isa.h"
#include "../core/parallel.h"
#include "fsq.h"
#include "fsq_math.h"

namespace vtok::VTOK_ISA {

// Tokens per pass over the channels: index sums (8 B) and NaN marks (4 B) of 512 tokens stay in a
// 32 KB L1 cache.
constexpr int kBlock = 512;
// Tokens per packed group: 16 * D elements are a whole number of vectors of any width up to 512
// bits.
constexpr int kGroup = 16;
// Elements (tokens x channels) below which a second thread costs more than it gains (about 5 us of
// work).
constexpr int64_t kGrainElements = 16384;

// The type of the arithmetic.
template <typename T>
using real = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
VTOK_FUNCTION real<T> load(const T* address) {
  if constexpr (std::is_same_v<T, double>) {
    return *address;
  } else {
    return to_float(*address);
  }
}

template <typename T>
VTOK_FUNCTION void store(T* address, real<T> value) {
  if constexpr (std::is_same_v<T, double>) {
    *address = value;
  } else {
    *address = from_float<T>(value);
  }
}

// Element offsets of a run of tokens along the innermost dimension.
struct Run {
  int64_t z, code, index;
  int count;
};

// Calls function(Run) for tokens [begin, end), split at rows and at kBlock.
template <typename Function>
static void for_each_run(const FsqTokens& tokens, int64_t begin, int64_t end,
                         const Function& function) {
  const int inner = tokens.num_dims - 1;
  while (begin < end) {
    const int64_t position = begin % tokens.sizes[inner];
    Run run{position * tokens.z_strides[inner], position * tokens.code_strides[inner],
            position * tokens.index_strides[inner], 0};
    int64_t row = begin / tokens.sizes[inner];
    for (int dim = inner - 1; dim >= 0; --dim) {
      const int64_t coordinate = row % tokens.sizes[dim];
      row /= tokens.sizes[dim];
      run.z += coordinate * tokens.z_strides[dim];
      run.code += coordinate * tokens.code_strides[dim];
      run.index += coordinate * tokens.index_strides[dim];
    }
    int64_t count = tokens.sizes[inner] - position;
    count = count < end - begin ? count : end - begin;
    run.count = static_cast<int>(count < kBlock ? count : kBlock);
    function(run);
    begin += run.count;
  }
}

static int64_t token_grain(const FsqLayout& layout) {
  const int64_t tokens = kGrainElements / layout.channels;
  return (tokens + kBlock - 1) / kBlock * kBlock;
}

static bool is_packed(const FsqLayout& layout) {
  const int inner = layout.tokens.num_dims - 1;
  return layout.z_channel_stride == 1 && layout.code_channel_stride == 1 &&
         layout.tokens.z_strides[inner] == layout.channels &&
         layout.tokens.code_strides[inner] == layout.channels;
}

// Channel constants of kGroup consecutive packed tokens, one entry per element.
template <typename Real>
struct PackedTable {
  Real shift[kGroup * kFsqMaxChannels], half[kGroup * kFsqMaxChannels];
  Real offset[kGroup * kFsqMaxChannels], half_width[kGroup * kFsqMaxChannels];
  int64_t basis[kGroup * kFsqMaxChannels];

  explicit PackedTable(const FsqLayout& layout) {
    for (int element = 0; element < kGroup * layout.channels; ++element) {
      const FsqChannel& channel = layout.channel[element % layout.channels];
      const FsqConstants<Real> c = fsq_constants<Real>(channel);
      shift[element] = c.shift;
      half[element] = c.half;
      offset[element] = c.offset;
      half_width[element] = c.half_width;
      basis[element] = channel.basis;
    }
  }

  FsqConstants<Real> at(int element) const {
    return {shift[element], half[element], offset[element], half_width[element]};
  }
};

// One digit's share of the index. A NaN digit counts as 0 here and is marked through `digit -
// digit` instead.
template <typename Index, typename Real>
VTOK_FUNCTION Index index_share(Real digit, Real half_width, Index basis) {
  return static_cast<Index>(static_cast<int32_t>(digit == digit ? digit + half_width : Real(0))) *
         basis;
}

// kUnit: z and codes have stride 1 along the run.
template <bool kUnit, typename T, typename Index>
static void forward_strided(const FsqLayout& layout, const T* z, T* codes, Index* indices,
                            int count) {
  using Real = real<T>;
  const int inner = layout.tokens.num_dims - 1;
  const int64_t z_stride = kUnit ? 1 : layout.tokens.z_strides[inner];
  const int64_t code_stride = kUnit ? 1 : layout.tokens.code_strides[inner];
  const int64_t index_stride = layout.tokens.index_strides[inner];
  alignas(64) Index sum[kBlock];
  alignas(64) Real nan_mark[kBlock];
  for (int i = 0; i < count; ++i) sum[i] = 0;
  for (int i = 0; i < count; ++i) nan_mark[i] = 0;
  for (int d = 0; d < layout.channels; ++d) {
    const FsqConstants<Real> c = fsq_constants<Real>(layout.channel[d]);
    const Index basis = static_cast<Index>(layout.channel[d].basis);
    const T* z_channel = z + d * layout.z_channel_stride;
    T* code_channel = codes + d * layout.code_channel_stride;
#pragma GCC ivdep
    for (int i = 0; i < count; ++i) {
      const Real digit = fsq_digit(load(z_channel + i * z_stride), c);
      store(code_channel + i * code_stride, digit / c.half_width);
      sum[i] += index_share<Index>(digit, c.half_width, basis);
      nan_mark[i] += digit - digit;
    }
  }
  for (int i = 0; i < count; ++i) indices[i * index_stride] = nan_mark[i] == 0 ? sum[i] : Index(-1);
}

template <typename T, typename Index>
static void forward_packed(const FsqLayout& layout, const PackedTable<real<T>>& table, const T* z,
                           T* codes, Index* indices, int count) {
  using Real = real<T>;
  const int64_t index_stride = layout.tokens.index_strides[layout.tokens.num_dims - 1];
  alignas(64) Index share[kGroup * kFsqMaxChannels];
  alignas(64) Real nan_mark[kGroup * kFsqMaxChannels];
  for (int first = 0; first < count; first += kGroup) {
    const int tokens = count - first < kGroup ? count - first : kGroup;
    const int elements = tokens * layout.channels;
    const T* z_group = z + int64_t{first} * layout.channels;
    T* code_group = codes + int64_t{first} * layout.channels;
#pragma GCC ivdep
    for (int e = 0; e < elements; ++e) {
      const FsqConstants<Real> c = table.at(e);
      const Real digit = fsq_digit(load(z_group + e), c);
      store(code_group + e, digit / c.half_width);
      share[e] = index_share<Index>(digit, c.half_width, static_cast<Index>(table.basis[e]));
      nan_mark[e] = digit - digit;
    }
    for (int i = 0; i < tokens; ++i) {
      Index sum = 0;
      Real mark = 0;
      for (int d = 0; d < layout.channels; ++d) {
        sum += share[i * layout.channels + d];
        mark += nan_mark[i * layout.channels + d];
      }
      indices[(first + i) * index_stride] = mark == 0 ? sum : Index(-1);
    }
  }
}

void fsq_forward(const FsqForward& params) {
  const FsqLayout& layout = params.layout;
  const int inner = layout.tokens.num_dims - 1;
  const bool packed = is_packed(layout);
  const bool unit = layout.tokens.z_strides[inner] == 1 && layout.tokens.code_strides[inner] == 1;
  dispatch_floating("fsq", "z", params.z.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    dispatch_index("fsq", "indices", params.indices.dtype, [&](auto index_type) {
      using Index = typename decltype(index_type)::type;
      const T* z = params.z.data_as<T>();
      T* codes = params.codes.data_as<T>();
      Index* indices = params.indices.data_as<Index>();
      const PackedTable<real<T>> table(layout);
      const auto run_forward = [&](const Run& run) {
        if (packed) {
          forward_packed(layout, table, z + run.z, codes + run.code, indices + run.index,
                         run.count);
        } else if (unit) {
          forward_strided<true>(layout, z + run.z, codes + run.code, indices + run.index,
                                run.count);
        } else {
          forward_strided<false>(layout, z + run.z, codes + run.code, indices + run.index,
                                 run.count);
        }
      };
      parallel_for(layout.tokens.num_tokens, token_grain(layout), params.num_threads,
                   [&](int64_t begin, int64_t end) {
                     for_each_run(layout.tokens, begin, end, run_forward);
                   });
    });
  });
}

template <bool kUnit, typename T>
static void backward_strided(const FsqLayout& layout, const T* z, const T* grad_codes, T* grad_z,
                             int count) {
  using Real = real<T>;
  const int inner = layout.tokens.num_dims - 1;
  const int64_t z_stride = kUnit ? 1 : layout.tokens.z_strides[inner];
  const int64_t grad_stride = kUnit ? 1 : layout.tokens.code_strides[inner];
  for (int d = 0; d < layout.channels; ++d) {
    const FsqConstants<Real> c = fsq_constants<Real>(layout.channel[d]);
    const T* z_channel = z + d * layout.z_channel_stride;
    const T* grad_channel = grad_codes + d * layout.code_channel_stride;
    T* out_channel = grad_z + d * layout.code_channel_stride;
#pragma GCC ivdep
    for (int i = 0; i < count; ++i) {
      const Real grad = load(grad_channel + i * grad_stride);
      store(out_channel + i * grad_stride, grad * fsq_slope(load(z_channel + i * z_stride), c));
    }
  }
}

template <typename T>
static void backward_packed(const FsqLayout& layout, const PackedTable<real<T>>& table, const T* z,
                            const T* grad_codes, T* grad_z, int count) {
  const int group = kGroup * layout.channels;
  const int total = count * layout.channels;
  for (int first = 0; first < total; first += group) {
    const int elements = total - first < group ? total - first : group;
#pragma GCC ivdep
    for (int e = 0; e < elements; ++e) {
      store(grad_z + first + e,
            load(grad_codes + first + e) * fsq_slope(load(z + first + e), table.at(e)));
    }
  }
}

void fsq_backward(const FsqBackward& params) {
  const FsqLayout& layout = params.layout;
  const int inner = layout.tokens.num_dims - 1;
  const bool packed = is_packed(layout);
  const bool unit = layout.tokens.z_strides[inner] == 1 && layout.tokens.code_strides[inner] == 1;
  dispatch_floating("fsq backward", "z", params.z.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const T* z = params.z.data_as<T>();
    const T* grad_codes = params.grad_codes.data_as<T>();
    T* grad_z = params.grad_z.data_as<T>();
    const PackedTable<real<T>> table(layout);
    const auto run_backward = [&](const Run& run) {
      if (packed) {
        backward_packed(layout, table, z + run.z, grad_codes + run.code, grad_z + run.code,
                        run.count);
      } else if (unit) {
        backward_strided<true>(layout, z + run.z, grad_codes + run.code, grad_z + run.code,
                               run.count);
      } else {
        backward_strided<false>(layout, z + run.z, grad_codes + run.code, grad_z + run.code,
                                run.count);
      }
    };
    parallel_for(
        layout.tokens.num_tokens, token_grain(layout), params.num_threads,
        [&](int64_t begin, int64_t end) { for_each_run(layout.tokens, begin, end, run_backward); });
  });
}

// Peels the digits off from the least significant channel on. Dividing by a run-time constant
// dominates, and this is not on a training path, so the loop stays scalar.
template <typename T, typename Index>
static void decode_run(const FsqLayout& layout, const Index* indices, T* codes, int count) {
  using Real = real<T>;
  const int inner = layout.tokens.num_dims - 1;
  for (int i = 0; i < count; ++i) {
    Index rest = indices[i * layout.tokens.index_strides[inner]];
    T* token_codes = codes + i * layout.tokens.code_strides[inner];
    for (int d = 0; d < layout.channels; ++d) {
      const FsqChannel& channel = layout.channel[d];
      const Index levels = static_cast<Index>(channel.levels);
      const Real digit = static_cast<Real>(rest % levels - channel.half_width);
      store(token_codes + d * layout.code_channel_stride,
            digit / static_cast<Real>(channel.half_width));
      rest /= levels;
    }
  }
}

void fsq_decode(const FsqDecode& params) {
  const FsqLayout& layout = params.layout;
  dispatch_floating("fsq_indices_to_codes", "codes", params.codes.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    dispatch_index("fsq_indices_to_codes", "indices", params.indices.dtype, [&](auto index_type) {
      using Index = typename decltype(index_type)::type;
      const Index* indices = params.indices.data_as<Index>();
      T* codes = params.codes.data_as<T>();
      parallel_for(layout.tokens.num_tokens, token_grain(layout), params.num_threads,
                   [&](int64_t begin, int64_t end) {
                     for_each_run(layout.tokens, begin, end, [&](const Run& run) {
                       decode_run(layout, indices + run.index, codes + run.code, run.count);
                     });
                   });
    });
  });
}

}  // namespace vtok::VTOK_ISA

VTOK_CPU_DISPATCH(fsq_forward, FsqForward)
VTOK_CPU_DISPATCH(fsq_backward, FsqBackward)
VTOK_CPU_DISPATCH(fsq_decode, FsqDecode)
