// residual_pool on the CPU. Forward: one thread per frame, one pass over its places with an online
// softmax; each row z lies in L1 while it is scored by every query and added to every sum. Then the
// projection, one thread per slice of its rows, so that a row of `weight` is read once for all
// frames.
//
// Backward: the same pass with the known softmax gives grad_frames, grad_query per frame and the
// two [Q, N] tables of each frame; a second pass over places sums grad_key and grad_position in the
// order of clips and frames. Sums do not depend on the number of threads.
#include <cmath>
#include <limits>

#include "../core/dispatch.h"
#include "../core/isa.h"
#include "../core/parallel.h"
#include "residual_pool.h"
#include "residual_pool_math.h"

namespace vtok::VTOK_ISA {

// Partial sums of a scalar product, so that it vectorises: two AVX-512 registers.
constexpr int kLanes = 32;

template <typename Real>
static Real dot(const Real* a, const Real* b, int64_t count) {
  alignas(64) Real lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += a[i + lane] * b[i + lane];
  }
  for (int lane = 0; i < count; ++i, ++lane) lanes[lane] += a[i] * b[i];
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

template <typename Real>
static void add_scaled(Real* sum, Real factor, const Real* row, int64_t count) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) sum[i] += factor * row[i];
}

// Uninitialised memory of a thread.
template <typename Element>
struct Scratch {
  explicit Scratch(int64_t size) : data(new Element[size]) {}
  ~Scratch() { delete[] data; }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  Element* data;
};

// Writes row z of place `place`; `frame` and `key` point at their first place.
template <typename T>
static void residual_row(const ResidualPoolLayout& layout, const T* frame, const T* key,
                         const real<T>* position, int64_t place, real<T>* z) {
  const T* x = frame + place * layout.frame_strides[2];
  const T* k = key + place * layout.key_strides[1];
  const real<T>* p = position + place * layout.channels;
  const int64_t x_step = layout.frame_strides[3];
  const int64_t k_step = layout.key_strides[2];
  if (x_step == 1 && k_step == 1) {
#pragma GCC ivdep
    for (int64_t c = 0; c < layout.channels; ++c) {
      z[c] = residual_value<real<T>>(load(x + c), load(k + c), p[c]);
    }
  } else {
    for (int64_t c = 0; c < layout.channels; ++c) {
      z[c] = residual_value<real<T>>(load(x + c * x_step), load(k + c * k_step), p[c]);
    }
  }
}

template <typename T>
static void pool_frame(const ResidualPoolForward& params, int64_t number, real<T>* z) {
  using Real = real<T>;
  const ResidualPoolLayout& layout = params.layout;
  const int64_t channels = layout.channels;
  const Real scale = Real(1) / std::sqrt(static_cast<Real>(channels));
  const T* frame = params.frames.data_as<T>() + frame_offset(layout, number);
  const T* key = params.key.data_as<T>() + key_offset(layout, number);
  const Real* query = params.query.data_as<Real>();
  Real* pooled = params.pooled.data_as<Real>() + number * layout.num_queries * channels;
  Real* log_sum = params.log_sum.data_as<Real>() + number * layout.num_queries;
  Real largest[kResidualPoolMaxQueries], total[kResidualPoolMaxQueries];
  for (int q = 0; q < layout.num_queries; ++q) {
    largest[q] = -std::numeric_limits<Real>::infinity();
    total[q] = 0;
  }
  for (int64_t i = 0; i < layout.num_queries * channels; ++i) pooled[i] = 0;
  for (int64_t place = 0; place < layout.places; ++place) {
    residual_row(layout, frame, key, params.position.data_as<Real>(), place, z);
    for (int q = 0; q < layout.num_queries; ++q) {
      Real* sum = pooled + q * channels;
      const Real score = scale * dot(query + q * channels, z, channels);
      if (score > largest[q]) {
        const Real factor = softmax_rescale(largest[q], score);
        total[q] *= factor;
        for (int64_t c = 0; c < channels; ++c) sum[c] *= factor;
        largest[q] = score;
      }
      const Real share = exp_accurate(score - largest[q]);
      total[q] += share;
      add_scaled(sum, share, z, channels);
    }
  }
  for (int q = 0; q < layout.num_queries; ++q) {
    const Real inverse = Real(1) / total[q];
    for (int64_t c = 0; c < channels; ++c) pooled[q * channels + c] *= inverse;
    log_sum[q] = largest[q] + std::log(total[q]);
  }
}

template <typename T>
static void forward_typed(const ResidualPoolForward& params) {
  using Real = real<T>;
  const ResidualPoolLayout& layout = params.layout;
  const int64_t width = layout.num_queries * layout.channels;
  parallel_for(layout.num_frames(), 1, params.num_threads, [&](int64_t begin, int64_t end) {
    const Scratch<Real> z(layout.channels);
    for (int64_t number = begin; number < end; ++number) pool_frame<T>(params, number, z.data);
  });
  const Real* pooled = params.pooled.data_as<Real>();
  const Real* weight = params.weight.data_as<Real>();
  const Real* bias = params.bias.data_as<Real>();
  T* out = params.out.data_as<T>();
  constexpr int64_t kRows = 16;  // enough work per thread for one OpenMP region
  parallel_for(layout.outputs, kRows, params.num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t d = begin; d < end; ++d) {
      for (int64_t number = 0; number < layout.num_frames(); ++number) {
        const Real value = dot(weight + d * width, pooled + number * width, width);
        store(out + number * layout.outputs + d, value + bias[d]);
      }
    }
  });
}

// Pointers of one frame of a backward call.
template <typename T>
struct BackwardFrame {
  using Real = real<T>;
  const T* frame;
  const T* key;
  const Real* grad_pooled;  // [Q, C]
  const Real* log_sum;      // [Q]
  const Real* mean_grad;    // [Q]
  Real* probability;        // [Q, N]
  Real* grad_score;         // [Q, N]
  Real* grad_query;         // [Q, C], null when not needed
  T* grad_frame;            // [N, C], null when not needed

  BackwardFrame(const ResidualPoolBackward& params, int64_t number) {
    const ResidualPoolLayout& layout = params.layout;
    const int64_t queries = layout.num_queries;
    frame = params.frames.data_as<T>() + frame_offset(layout, number);
    key = params.key.data_as<T>() + key_offset(layout, number);
    grad_pooled = params.grad_pooled.data_as<Real>() + number * queries * layout.channels;
    log_sum = params.log_sum.data_as<Real>() + number * queries;
    mean_grad = params.mean_grad.data_as<Real>() + number * queries;
    probability = params.attention.data_as<Real>() + number * queries * layout.places;
    grad_score = probability + layout.num_frames() * queries * layout.places;
    grad_query = params.grad_query.data == nullptr
                     ? nullptr
                     : params.partials.data_as<Real>() + number * queries * layout.channels;
    grad_frame = params.grad_frames.data == nullptr
                     ? nullptr
                     : params.grad_frames.data_as<T>() + number * layout.places * layout.channels;
  }
};

// `scratch`: [2, C].
template <typename T>
static void backward_frame(const ResidualPoolBackward& params, int64_t number, real<T>* scratch) {
  using Real = real<T>;
  const ResidualPoolLayout& layout = params.layout;
  const int64_t channels = layout.channels;
  const Real scale = Real(1) / std::sqrt(static_cast<Real>(channels));
  const Real* query = params.query.data_as<Real>();
  const BackwardFrame<T> at(params, number);
  Real* z = scratch;
  Real* grad_z = scratch + channels;
  if (at.grad_query != nullptr) {
    for (int64_t i = 0; i < layout.num_queries * channels; ++i) at.grad_query[i] = 0;
  }
  for (int64_t place = 0; place < layout.places; ++place) {
    residual_row(layout, at.frame, at.key, params.position.data_as<Real>(), place, z);
    if (at.grad_frame != nullptr) {
      for (int64_t c = 0; c < channels; ++c) grad_z[c] = 0;
    }
    for (int q = 0; q < layout.num_queries; ++q) {
      const Real score = scale * dot(query + q * channels, z, channels);
      const Real probability = exp_accurate(score - at.log_sum[q]);
      const Real along_z = dot(at.grad_pooled + q * channels, z, channels);
      const Real slope = scale * score_gradient(probability, along_z, at.mean_grad[q]);
      at.probability[q * layout.places + place] = probability;
      at.grad_score[q * layout.places + place] = slope;
      if (at.grad_query != nullptr) add_scaled(at.grad_query + q * channels, slope, z, channels);
      if (at.grad_frame != nullptr) {
        add_scaled(grad_z, probability, at.grad_pooled + q * channels, channels);
        add_scaled(grad_z, slope, query + q * channels, channels);
      }
    }
    if (at.grad_frame != nullptr) {
      T* row = at.grad_frame + place * channels;
      for (int64_t c = 0; c < channels; ++c) store(row + c, grad_z[c]);
    }
  }
}

// Sums over frames for one place. `scratch`: [2, C].
template <typename T>
static void backward_place(const ResidualPoolBackward& params, int64_t place, real<T>* scratch) {
  using Real = real<T>;
  const ResidualPoolLayout& layout = params.layout;
  const int64_t channels = layout.channels;
  const Real* query = params.query.data_as<Real>();
  Real* of_clip = scratch;
  Real* of_all = scratch + channels;
  for (int64_t c = 0; c < channels; ++c) of_all[c] = 0;
  for (int64_t clip = 0; clip < layout.batch; ++clip) {
    for (int64_t c = 0; c < channels; ++c) of_clip[c] = 0;
    for (int64_t t = 0; t < layout.frames; ++t) {
      const BackwardFrame<T> at(params, clip * layout.frames + t);
      for (int q = 0; q < layout.num_queries; ++q) {
        const int64_t entry = q * layout.places + place;
        add_scaled(of_clip, at.probability[entry], at.grad_pooled + q * channels, channels);
        add_scaled(of_clip, at.grad_score[entry], query + q * channels, channels);
      }
    }
    if (params.grad_key.data != nullptr) {
      T* row = params.grad_key.data_as<T>() + (clip * layout.places + place) * channels;
      for (int64_t c = 0; c < channels; ++c) store(row + c, -of_clip[c]);
    }
    for (int64_t c = 0; c < channels; ++c) of_all[c] += of_clip[c];
  }
  if (params.grad_position.data == nullptr) return;
  Real* row = params.grad_position.data_as<Real>() + place * channels;
  for (int64_t c = 0; c < channels; ++c) row[c] = of_all[c];
}

template <typename T>
static void backward_typed(const ResidualPoolBackward& params) {
  using Real = real<T>;
  const ResidualPoolLayout& layout = params.layout;
  parallel_for(layout.num_frames(), 1, params.num_threads, [&](int64_t begin, int64_t end) {
    const Scratch<Real> scratch(2 * layout.channels);
    for (int64_t number = begin; number < end; ++number) {
      backward_frame<T>(params, number, scratch.data);
    }
  });
  if (params.grad_key.data != nullptr || params.grad_position.data != nullptr) {
    parallel_for(layout.places, 1, params.num_threads, [&](int64_t begin, int64_t end) {
      const Scratch<Real> scratch(2 * layout.channels);
      for (int64_t place = begin; place < end; ++place) {
        backward_place<T>(params, place, scratch.data);
      }
    });
  }
  if (params.grad_query.data == nullptr) return;
  const int64_t width = layout.num_queries * layout.channels;
  const Real* partials = params.partials.data_as<Real>();
  Real* grad_query = params.grad_query.data_as<Real>();
  for (int64_t i = 0; i < width; ++i) grad_query[i] = 0;
  for (int64_t number = 0; number < layout.num_frames(); ++number) {
    add_scaled(grad_query, Real(1), partials + number * width, width);
  }
}

void residual_pool_forward(const ResidualPoolForward& params) {
  dispatch_floating("residual_pool", "frames", params.frames.dtype,
                    [&](auto tag) { forward_typed<typename decltype(tag)::type>(params); });
}

void residual_pool_backward(const ResidualPoolBackward& params) {
  dispatch_floating("residual_pool backward", "frames", params.frames.dtype,
                    [&](auto tag) { backward_typed<typename decltype(tag)::type>(params); });
}

}  // namespace vtok::VTOK_ISA

VTOK_CPU_DISPATCH(residual_pool_forward, ResidualPoolForward)
VTOK_CPU_DISPATCH(residual_pool_backward, ResidualPoolBackward)
