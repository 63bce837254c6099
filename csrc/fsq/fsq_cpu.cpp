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
#include "../core/stream_copy.h"
#include "fsq.h"
#include "fsq_math.h"

namespace vtok::VTOK_ISA {

// Tokens per pass over the channels: their index sums (4 or 8 B) stay in the L1 cache, and in
// planar memory a pass reads whole pages of each channel (measured: 10 % faster than with 512).
constexpr int kBlock = 1024;
// Tokens per packed group: 16 * D elements are a whole number of vectors of any width up to 512
// bits.
constexpr int kGroup = 16;
// Elements (tokens x channels) below which a second thread costs more than it gains (about 5 us of
// work).
constexpr int64_t kGrainElements = 16384;
// Bytes of codes or gradients from which planar runs go past the caches, which would not hold them
// together with what is read. Measured, two cores with 32 MB: float32 of 15.7 MB 1.5 times as fast
// forwards and 1.1 times with backward, of 63 MB 1.1 and 1.0; of 3.9 MB 0.8.
constexpr int64_t kStreamBytes = 8 << 20;

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

template <typename T>
static bool streams_planar(const FsqLayout& layout) {
  return layout.tokens.num_tokens * layout.channels * int64_t{sizeof(T)} >= kStreamBytes;
}

static bool is_packed(const FsqLayout& layout) {
  const int inner = layout.tokens.num_dims - 1;
  return layout.z_channel_stride == 1 && layout.code_channel_stride == 1 &&
         layout.tokens.z_strides[inner] == layout.channels &&
         layout.tokens.code_strides[inner] == layout.channels;
}

// How levels are found and codes made, the same for every channel of a kernel; see fsq_math.h.
template <int kBoundaryCount, bool kHalfWidthsArePowersOfTwo>
struct Method {
  static constexpr int kBoundaries = kBoundaryCount;
  static constexpr bool kPowerOfTwo = kHalfWidthsArePowersOfTwo;
};

// Calls function(Method<...>{}) for the cheapest method that serves channels [first, last).
template <typename Real, typename Function>
static void dispatch_method(const FsqLayout& layout, int first, int last,
                            const Function& function) {
  int levels = 2;
  bool powers = true;
  for (int d = first; d < last; ++d) {
    const FsqChannel& channel = layout.channel[d];
    levels = channel.levels > levels ? channel.levels : levels;
    powers = powers && (channel.half_width & (channel.half_width - 1)) == 0;
  }
  if constexpr (std::is_same_v<Real, double>) {
    return function(Method<0, false>{});
  } else {
    if (levels > kFsqMaxCompared) return function(Method<0, false>{});
    if (levels > 8) return powers ? function(Method<15, true>{}) : function(Method<15, false>{});
    return powers ? function(Method<7, true>{}) : function(Method<7, false>{});
  }
}

// Whether all channels find their levels in one way, which a packed pass needs. Comparing and tanh
// differ for a few numbers next to a boundary, and a channel's way must not depend on the layout.
template <typename Real>
static bool has_one_method(const FsqLayout& layout) {
  int compared = 0;
  for (int d = 0; d < layout.channels; ++d) {
    compared += layout.channel[d].levels <= kFsqMaxCompared ? 1 : 0;
  }
  return std::is_same_v<Real, double> || compared == 0 || compared == layout.channels;
}

// Channel constants of kGroup consecutive packed tokens, one entry per element.
template <typename Real>
struct PackedTable {
  static constexpr int kSize = kGroup * kFsqMaxChannels;
  Real shift[kSize], half[kSize], offset[kSize], half_width[kSize], slope[kSize];
  float boundary[kFsqMaxCompared - 1][kSize];
  int64_t basis[kSize];

  explicit PackedTable(const FsqLayout& layout) {
    for (int element = 0; element < kGroup * layout.channels; ++element) {
      const FsqChannel& channel = layout.channel[element % layout.channels];
      const FsqConstants<Real> c = fsq_constants<Real>(channel);
      shift[element] = c.shift;
      half[element] = c.half;
      offset[element] = c.offset;
      half_width[element] = c.half_width;
      slope[element] = c.slope;
      basis[element] = channel.basis;
      for (int k = 0; k < kFsqMaxCompared - 1; ++k) boundary[k][element] = channel.boundary[k];
    }
  }

  FsqConstants<Real> at(int e) const {
    return {shift[e], half[e], offset[e], half_width[e], slope[e]};
  }
};

// A NaN counts as level 0 in the sums; tokens that hold one get the index -1 afterwards.
template <typename T, typename Index>
static void mark_nan(const FsqLayout& layout, const T* z, Index* indices, int count) {
  const int inner = layout.tokens.num_dims - 1;
  for (int i = 0; i < count; ++i) {
    for (int d = 0; d < layout.channels; ++d) {
      const real<T> value =
          load(z + i * layout.tokens.z_strides[inner] + d * layout.z_channel_stride);
      if (value != value) indices[i * layout.tokens.index_strides[inner]] = Index(-1);
    }
  }
}

// One channel of a run. Returns whether it holds a NaN. kUnit: z and codes have stride 1 along it.
template <typename M, bool kUnit, typename T, typename Index>
static bool forward_channel(const FsqChannel& channel, const T* z, int64_t z_stride, T* codes,
                            int64_t code_stride, Index* sum, int count) {
  using Real = real<T>;
  const FsqConstants<Real> c = fsq_constants<Real>(channel);
  const Index basis = static_cast<Index>(channel.basis);
  int has_nan = 0;
#pragma GCC ivdep
  for (int i = 0; i < count; ++i) {
    const Real value = load(z + i * (kUnit ? 1 : z_stride));
    const int32_t level = fsq_level<M::kBoundaries>(
        value, c, [&](int k) { return static_cast<Real>(channel.boundary[k]); });
    store(codes + i * (kUnit ? 1 : code_stride),
          fsq_code<M::kPowerOfTwo>(value, level, c.half_width));
    sum[i] += static_cast<Index>(level) * basis;
    has_nan |= value != value ? 1 : 0;
  }
  return has_nan != 0;
}

// Asks for the lines of a run that comes next: each channel of a planar run lies elsewhere, which
// the hardware notices only after several lines (measured: 10 % of a forward pass).
template <typename T>
static void prefetch_run(const T* run, int count) {
  constexpr int kLine = 64 / sizeof(T);
  for (int i = 0; i < count; i += kLine) __builtin_prefetch(run + i);
}

template <bool kUnit, typename T, typename Index>
static void forward_strided(const FsqLayout& layout, const T* z, T* codes, Index* indices,
                            int count) {
  const bool streams = kUnit && streams_planar<T>(layout);
  alignas(64) T staged[kBlock];
  const int inner = layout.tokens.num_dims - 1;
  const int64_t index_stride = layout.tokens.index_strides[inner];
  alignas(64) Index sum[kBlock];
  for (int i = 0; i < count; ++i) sum[i] = 0;
  bool has_nan = false;
  for (int d = 0; d < layout.channels; ++d) {
    if (kUnit && d + 1 < layout.channels) {
      prefetch_run(z + (d + 1) * layout.z_channel_stride, count);
    }
    dispatch_method<real<T>>(layout, d, d + 1, [&](auto method) {
      T* channel_codes = codes + d * layout.code_channel_stride;
      has_nan |= forward_channel<decltype(method), kUnit>(
          layout.channel[d], z + d * layout.z_channel_stride, layout.tokens.z_strides[inner],
          streams ? staged : channel_codes, layout.tokens.code_strides[inner], sum, count);
      if (streams) stream_copy(channel_codes, staged, count * int64_t{sizeof(T)});
    });
  }
  if (streams && index_stride == 1) {
    stream_copy(indices, sum, count * int64_t{sizeof(Index)});
  } else {
    for (int i = 0; i < count; ++i) indices[i * index_stride] = sum[i];
  }
  if (has_nan) mark_nan(layout, z, indices, count);
}

// kChannels: the channel count where it is a constant worth unrolling, else 0.
template <typename M, int kChannels, typename T, typename Index>
static void forward_packed(const FsqLayout& layout, const PackedTable<real<T>>& table, const T* z,
                           T* codes, Index* indices, int count) {
  using Real = real<T>;
  const int channels = kChannels > 0 ? kChannels : layout.channels;
  const int64_t index_stride = layout.tokens.index_strides[layout.tokens.num_dims - 1];
  alignas(64) Index share[kGroup * kFsqMaxChannels];
  int has_nan = 0;
  for (int first = 0; first < count; first += kGroup) {
    const int tokens = count - first < kGroup ? count - first : kGroup;
    const int elements = tokens * channels;
    const T* z_group = z + int64_t{first} * channels;
    T* code_group = codes + int64_t{first} * channels;
#pragma GCC ivdep
    for (int e = 0; e < elements; ++e) {
      const Real value = load(z_group + e);
      const int32_t level = fsq_level<M::kBoundaries>(
          value, table.at(e), [&](int k) { return static_cast<Real>(table.boundary[k][e]); });
      store(code_group + e, fsq_code<M::kPowerOfTwo>(value, level, table.half_width[e]));
      share[e] = static_cast<Index>(level) * static_cast<Index>(table.basis[e]);
      has_nan |= value != value ? 1 : 0;
    }
    for (int i = 0; i < tokens; ++i) {
      Index sum = 0;
      for (int d = 0; d < channels; ++d) sum += share[i * channels + d];
      indices[(first + i) * index_stride] = sum;
    }
  }
  if (has_nan != 0) mark_nan(layout, z, indices, count);
}

template <typename T, typename Index>
static void forward_run(const FsqLayout& layout, const PackedTable<real<T>>* table, const T* z,
                        T* codes, Index* indices, int count) {
  const int inner = layout.tokens.num_dims - 1;
  if (table != nullptr) {
    dispatch_method<real<T>>(layout, 0, layout.channels, [&](auto method) {
      using M = decltype(method);
      // Unrolled for the usual codebooks only: every instance is compiled for each instruction set.
      if constexpr (sizeof(Index) == 4 && !std::is_same_v<T, double>) {
        switch (layout.channels) {
          case 4: return forward_packed<M, 4>(layout, *table, z, codes, indices, count);
          case 5: return forward_packed<M, 5>(layout, *table, z, codes, indices, count);
          case 6: return forward_packed<M, 6>(layout, *table, z, codes, indices, count);
        }
      }
      return forward_packed<M, 0>(layout, *table, z, codes, indices, count);
    });
  } else if (layout.tokens.z_strides[inner] == 1 && layout.tokens.code_strides[inner] == 1) {
    forward_strided<true>(layout, z, codes, indices, count);
  } else {
    forward_strided<false>(layout, z, codes, indices, count);
  }
}

void fsq_forward(const FsqForward& params) {
  const FsqLayout& layout = params.layout;
  dispatch_floating("fsq", "z", params.z.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    dispatch_index("fsq", "indices", params.indices.dtype, [&](auto index_type) {
      using Index = typename decltype(index_type)::type;
      const T* z = params.z.data_as<T>();
      T* codes = params.codes.data_as<T>();
      Index* indices = params.indices.data_as<Index>();
      const PackedTable<real<T>> table(layout);
      const bool is_packed_run = is_packed(layout) && has_one_method<real<T>>(layout);
      const PackedTable<real<T>>* packed = is_packed_run ? &table : nullptr;
      const auto run_forward = [&](const Run& run) {
        forward_run(layout, packed, z + run.z, codes + run.code, indices + run.index, run.count);
      };
      parallel_for(layout.tokens.num_tokens, token_grain(layout), params.num_threads,
                   [&](int64_t begin, int64_t end) {
                     for_each_run(layout.tokens, begin, end, run_forward);
                     stream_copy_fence();
                   });
    });
  });
}

template <bool kUnit, typename T>
static void backward_strided(const FsqLayout& layout, const T* z, const T* grad_codes, T* grad_z,
                             int count) {
  using Real = real<T>;
  const int inner = layout.tokens.num_dims - 1;
  const bool streams = kUnit && streams_planar<T>(layout);
  alignas(64) T staged[kBlock];
  const int64_t z_stride = kUnit ? 1 : layout.tokens.z_strides[inner];
  const int64_t grad_stride = kUnit ? 1 : layout.tokens.code_strides[inner];
  for (int d = 0; d < layout.channels; ++d) {
    const FsqConstants<Real> c = fsq_constants<Real>(layout.channel[d]);
    const T* z_channel = z + d * layout.z_channel_stride;
    const T* grad_channel = grad_codes + d * layout.code_channel_stride;
    T* channel_grad_z = grad_z + d * layout.code_channel_stride;
    T* out_channel = streams ? staged : channel_grad_z;
#pragma GCC ivdep
    for (int i = 0; i < count; ++i) {
      const Real grad = load(grad_channel + i * grad_stride);
      store(out_channel + i * grad_stride, grad * fsq_slope(load(z_channel + i * z_stride), c));
    }
    if (streams) stream_copy(channel_grad_z, staged, count * int64_t{sizeof(T)});
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
    parallel_for(layout.tokens.num_tokens, token_grain(layout), params.num_threads,
                 [&](int64_t begin, int64_t end) {
                   for_each_run(layout.tokens, begin, end, run_backward);
                   stream_copy_fence();
                 });
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
