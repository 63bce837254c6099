// FSQ entropy on the CPU. Threads share tokens; a token's work is vectorised over combinations of
// levels, the contiguous dimension of the factors.
#include "../core/dispatch.h"
#include "../core/isa.h"
#include "../core/parallel.h"
#include "fsq_entropy.h"
#include "fsq_entropy_clamped_cpu.h"
#include "fsq_entropy_lanes.h"
#include "fsq_entropy_math.h"

namespace vtok::VTOK_ISA {

// Tokens below which a second thread costs more than it gains (about 0.5 us of work each).
constexpr int64_t kGrain = 16;
// One token's distribution over the levels of each channel.
template <typename Real>
struct Assignment {
  alignas(64) Real weight[kFsqEntropyMaxLevelSum];  // probability of a level, at level_offset
  Real slope[kFsqMaxChannels];                      // logit difference of neighbouring levels
  Real mean[kFsqMaxChannels];                       // mean of level - peak
  int peak[kFsqMaxChannels];
  Real entropy;
};

template <typename T>
static void assign(const FsqEntropyLayout& layout, const T* z, int64_t channel_stride,
                   Assignment<real<T>>& a) {
  using Real = real<T>;
  for (int d = 0; d < layout.channels; ++d) {
    const Real value = load(z + d * channel_stride);
    a.peak[d] = fsq_entropy_peak(value, layout.channel[d]);
    a.slope[d] = static_cast<Real>(layout.slope_per_z[d]) * value;
    Real* weight = a.weight + layout.level_offset[d];
    for (int level = 0; level < layout.channel[d].levels; ++level) {
      weight[level] = a.slope[d] * static_cast<Real>(level - a.peak[d]);
    }
  }
  for (int i = 0; i < layout.level_sum; ++i) a.weight[i] = exp_accurate(a.weight[i]);
  a.entropy = 0;
  for (int d = 0; d < layout.channels; ++d) {
    Real* weight = a.weight + layout.level_offset[d];
    Real sum = 0, moment = 0;
    for (int level = 0; level < layout.channel[d].levels; ++level) {
      sum += weight[level];
      moment += weight[level] * static_cast<Real>(level - a.peak[d]);
    }
    for (int level = 0; level < layout.channel[d].levels; ++level) weight[level] /= sum;
    a.mean[d] = moment / sum;
    a.entropy += log_accurate(sum) - a.slope[d] * a.mean[d];
  }
}

// Khatri-Rao product of channels [first, last): the probabilities of all combinations.
template <typename Real>
static void khatri_rao(const FsqEntropyLayout& layout, int first, int last, const Real* weight,
                       Real* out) {
  int64_t size = 1;
  out[0] = 1;
  for (int d = first; d < last; ++d) {
    const Real* channel = weight + layout.level_offset[d];
    for (int level = layout.channel[d].levels - 1; level >= 0; --level) {  // level 0: in place
      const Real factor = channel[level];
      Real* target = out + level * size;
#pragma GCC ivdep
      for (int64_t i = 0; i < size; ++i) target[i] = factor * out[i];
    }
    size *= layout.channel[d].levels;
  }
}

// Calls function(codebook, token) for rows [begin, end) of [codebooks, tokens].
template <typename Function>
static void for_each_token(int64_t num_codebooks, int64_t num_tokens, int num_threads,
                           const Function& function) {
  parallel_for(num_codebooks * num_tokens, kGrain, num_threads, [&](int64_t begin, int64_t end) {
    auto run = function();  // a thread's buffers
    for (int64_t row = begin; row < end; ++row) run(row / num_tokens, row % num_tokens);
  });
}

template <typename T>
static int32_t nearest_code(const FsqEntropyLayout& layout, const T* z, int64_t channel_stride,
                            real<T>* squared_error) {
  using Real = real<T>;
  int32_t index = 0;
  Real squares = 0;
  for (int d = 0; d < layout.channels; ++d) {
    const FsqEntropyNearest<Real> nearest =
        fsq_entropy_nearest(load(z + d * channel_stride), layout.channel[d]);
    index += nearest.level * static_cast<int32_t>(layout.channel[d].basis);
    squares += nearest.error * nearest.error;
  }
  *squared_error = squares;
  return squares == squares ? index : -1;
}

void fsq_entropy_factors(const FsqEntropyFactors& params) {
  const FsqEntropyLayout& layout = params.layout;
  const FsqEntropyStrides z_strides = fsq_entropy_strides(params.z);
  dispatch_floating("fsq_entropy", "z", params.z.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using Real = real<T>;
    const auto at = [](const OutputView& view, int64_t codebook, int64_t token) {
      return view.data_as<Real>() + codebook * view.strides[0] + token * view.strides[1];
    };
    const auto run = [&](int64_t codebook, int64_t token) {
      const T* z = params.z.data_as<T>() + codebook * z_strides.codebook + token * z_strides.token;
      Assignment<Real> a;
      assign(layout, z, z_strides.channel, a);
      khatri_rao(layout, 0, layout.num_low, a.weight, at(params.low, codebook, token));
      khatri_rao(layout, layout.num_low, layout.channels, a.weight,
                 at(params.high, codebook, token));
      if (params.entropy.data) *at(params.entropy, codebook, token) = a.entropy;
      if (!params.indices.data && !params.commitment.data) return;
      Real squared_error;
      const int32_t index = nearest_code(layout, z, z_strides.channel, &squared_error);
      if (params.commitment.data) *at(params.commitment, codebook, token) = squared_error;
      if (params.indices.data) {
        params.indices.data_as<int32_t>()[codebook * params.indices.strides[0] +
                                          token * params.indices.strides[1]] = index;
      }
    };
    for_each_token(layout.num_codebooks, layout.num_tokens, params.num_threads,
                   [&] { return run; });
  });
}

// What the gradient of a half gives each of its channels: sum over combinations of
// probability * gradient * (level - mean), folding one channel after the other away.
template <typename Real>
static void fold_half(const FsqEntropyLayout& layout, int first, int last, int64_t size,
                      const Assignment<Real>& a, const Real* grad, Real* product, Real* moment,
                      Real* sums) {
  khatri_rao(layout, first, last, a.weight, product);
  for (int64_t i = 0; i < size; ++i) product[i] *= grad[i];
  for (int d = last - 1; d >= first; --d) {
    size /= layout.channel[d].levels;
    const Real origin = static_cast<Real>(-a.peak[d]) - a.mean[d];
    for (int64_t i = 0; i < size; ++i) moment[i] = origin * product[i];
    for (int level = 1; level < layout.channel[d].levels; ++level) {
      const Real from_mean = static_cast<Real>(level - a.peak[d]) - a.mean[d];
      const Real* row = product + level * size;
#pragma GCC ivdep
      for (int64_t i = 0; i < size; ++i) {
        moment[i] += from_mean * row[i];
        product[i] += row[i];
      }
    }
    sums[d] = static_cast<Real>(lane_sum<Real>(size, [&](int64_t i) { return moment[i]; }));
  }
}

template <typename Real>
static Real variance(const FsqEntropyLayout& layout, const Assignment<Real>& a, int d) {
  const Real* weight = a.weight + layout.level_offset[d];
  Real sum = 0;
  for (int level = 0; level < layout.channel[d].levels; ++level) {
    const Real from_mean = static_cast<Real>(level - a.peak[d]) - a.mean[d];
    sum += weight[level] * (from_mean * from_mean);
  }
  return sum;
}

void fsq_entropy_backward(const FsqEntropyBackward& params) {
  const FsqEntropyLayout& layout = params.layout;
  const FsqEntropyStrides z_strides = fsq_entropy_strides(params.z);
  const FsqEntropyStrides out_strides = fsq_entropy_strides(params.grad_z);
  dispatch_floating("fsq_entropy", "z", params.z.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using Real = real<T>;
    const auto scalar = [](const TensorView& view) {
      return view.data ? *view.data_as<Real>() : Real(0);
    };
    const Real grad_entropy = scalar(params.grad_entropy);
    const Real grad_commitment = scalar(params.grad_commitment);
    const auto row = [](const TensorView& view, int64_t codebook, int64_t token) {
      return view.data_as<Real>() + codebook * view.strides[0] + token * view.strides[1];
    };
    const int64_t longest = layout.low_size > layout.high_size ? layout.low_size : layout.high_size;
    const auto make_run = [&] {
      return [&, product = Buffer<Real>(longest), moment = Buffer<Real>(longest)](
                 int64_t codebook, int64_t token) mutable {
        const T* z =
            params.z.data_as<T>() + codebook * z_strides.codebook + token * z_strides.token;
        T* grad_z = params.grad_z.data_as<T>() + codebook * out_strides.codebook +
                    token * out_strides.token;
        Assignment<Real> a;
        assign(layout, z, z_strides.channel, a);
        Real sums[kFsqMaxChannels] = {};
        if (params.grad_low.data) {
          fold_half(layout, 0, layout.num_low, layout.low_size, a,
                    row(params.grad_low, codebook, token), product.data, moment.data, sums);
          fold_half(layout, layout.num_low, layout.channels, layout.high_size, a,
                    row(params.grad_high, codebook, token), product.data, moment.data, sums);
        }
        for (int d = 0; d < layout.channels; ++d) {
          Real grad = sums[d];
          if (params.grad_entropy.data)
            grad -= grad_entropy * (a.slope[d] * variance(layout, a, d));
          grad *= static_cast<Real>(layout.slope_per_z[d]);
          if (params.grad_commitment.data) {
            const Real value = load(z + d * z_strides.channel);
            grad += grad_commitment * (2 * fsq_entropy_nearest(value, layout.channel[d]).error);
          }
          store(grad_z + d * out_strides.channel, grad);
        }
      };
    };
    for_each_token(layout.num_codebooks, layout.num_tokens, params.num_threads, make_run);
  });
}

void fsq_entropy_clamped_forward(const FsqEntropyClampedForward& params) {
  dispatch_floating("fsq_entropy", "low", params.low.dtype, [&](auto type) {
    using Real = real<typename decltype(type)::type>;
    const auto make_run = [&] {
      return [&, halves = ActiveHalves<Real>(params.low_size, params.high_size)](
                 int64_t codebook, int64_t token) mutable {
        const auto row = [&](const TensorView& view) {
          return view.data_as<Real>() + codebook * view.strides[0] + token * view.strides[1];
        };
        halves.gather(row(params.low), params.low_size, row(params.high), params.high_size);
        params.entropy.data_as<Real>()[codebook * params.entropy.strides[0] +
                                       token * params.entropy.strides[1]] = clamped_entropy(halves);
      };
    };
    for_each_token(params.num_codebooks, params.num_tokens, params.num_threads, make_run);
  });
}

void fsq_entropy_clamped_backward(const FsqEntropyClampedBackward& params) {
  dispatch_floating("fsq_entropy", "low", params.low.dtype, [&](auto type) {
    using Real = real<typename decltype(type)::type>;
    const Real factor = -*params.grad_entropy.data_as<Real>();
    const auto make_run = [&] {
      return [&, halves = ActiveHalves<Real>(params.low_size, params.high_size)](
                 int64_t codebook, int64_t token) mutable {
        const auto row = [&](const auto& view) {
          return view.template data_as<Real>() + codebook * view.strides[0] +
                 token * view.strides[1];
        };
        const Active<Real>&low = halves.low, &high = halves.high;
        halves.gather(row(params.low), params.low_size, row(params.high), params.high_size);
        clamped_slopes(halves);
        scatter(low, high.sum + high.rest, factor, params.low_size, row(params.grad_low));
        scatter(high, low.sum + low.rest, factor, params.high_size, row(params.grad_high));
      };
    };
    for_each_token(params.num_codebooks, params.num_tokens, params.num_threads, make_run);
  });
}

void fsq_entropy_average_forward(const FsqEntropyAverageForward& params) {
  const int64_t size = params.average.num_elements();
  dispatch_floating("fsq_entropy", "average", params.average.dtype, [&](auto type) {
    using Real = real<typename decltype(type)::type>;
    const Real* average = params.average.data_as<Real>();
    Real* partial = params.partial_entropy.data_as<Real>();
    parallel_for((size + kFsqEntropyPartial - 1) / kFsqEntropyPartial, 4, params.num_threads,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t part = begin; part < end; ++part) {
                     const int64_t first = part * kFsqEntropyPartial;
                     const int64_t count =
                         size - first < kFsqEntropyPartial ? size - first : kFsqEntropyPartial;
                     partial[part] = static_cast<Real>(lane_sum<Real>(
                         count, [&](int64_t i) { return fsq_entropy_term(average[first + i]); }));
                   }
                 });
  });
}

void fsq_entropy_average_backward(const FsqEntropyAverageBackward& params) {
  const int64_t size = params.average.num_elements();
  dispatch_floating("fsq_entropy", "average", params.average.dtype, [&](auto type) {
    using Real = real<typename decltype(type)::type>;
    const Real grad = *params.grad_entropy.data_as<Real>();
    const Real* average = params.average.data_as<Real>();
    Real* grad_average = params.grad_average.data_as<Real>();
    parallel_for(size, 4 * kFsqEntropyPartial, params.num_threads, [&](int64_t begin, int64_t end) {
#pragma GCC ivdep
      for (int64_t i = begin; i < end; ++i) {
        grad_average[i] = grad * fsq_entropy_term_slope(average[i]);
      }
    });
  });
}

}  // namespace vtok::VTOK_ISA

VTOK_CPU_DISPATCH(fsq_entropy_factors, FsqEntropyFactors)
VTOK_CPU_DISPATCH(fsq_entropy_backward, FsqEntropyBackward)
VTOK_CPU_DISPATCH(fsq_entropy_clamped_forward, FsqEntropyClampedForward)
VTOK_CPU_DISPATCH(fsq_entropy_clamped_backward, FsqEntropyClampedBackward)
VTOK_CPU_DISPATCH(fsq_entropy_average_forward, FsqEntropyAverageForward)
VTOK_CPU_DISPATCH(fsq_entropy_average_backward, FsqEntropyAverageBackward)
