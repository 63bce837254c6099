// Building blocks of the CPU kernels of norm_act: one row or one channel vector at a time. Included
// by norm_act_cpu.cpp only, which is compiled once per instruction set.
//
// Sums run over 64 bytes of accumulators whatever the instruction set is, so that every CPU gives the
// same bits.
#pragma once

#include <cstring>
#include <vector>

#include "../core/dispatch.h"
#include "../core/isa.h"
#include "../core/parallel.h"
#include "norm_act_math.h"

namespace vtok::VTOK_ISA {

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

template <typename Real>
struct LanesOf {
  typedef Real type __attribute__((vector_size(64)));
  static constexpr int count = 64 / sizeof(Real);
};

template <typename Real>
using Lanes = typename LanesOf<Real>::type;

template <typename Real>
VTOK_FUNCTION Real sum_lanes(const Lanes<Real>& lanes) {
  constexpr int kCount = LanesOf<Real>::count;
  Real values[kCount];
  memcpy(values, &lanes, sizeof values);
  for (int width = kCount / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) values[i] += values[i + width];
  }
  return values[0];
}

// Sum over a row of term(lanes of values) (kLanes values at once), the rest padded with `padding`.
template <typename Real, typename Term>
VTOK_FUNCTION Real sum_row(int64_t count, const Term& term) {
  constexpr int kCount = LanesOf<Real>::count;
  Lanes<Real> even = {}, odd = {};  // two chains hide the latency of the additions
  int64_t c = 0;
  for (; c + 2 * kCount <= count; c += 2 * kCount) {
    term(c, kCount, even);
    term(c + kCount, kCount, odd);
  }
  if (c + kCount <= count) {
    term(c, kCount, even);
    c += kCount;
  }
  if (c < count) term(c, static_cast<int>(count - c), odd);
  even += odd;
  return sum_lanes<Real>(even);
}

// `size` values at `address` as lanes, the missing ones equal to `padding`.
template <typename Real>
VTOK_FUNCTION void load_lanes(const Real* address, int size, Real padding, Lanes<Real>& lanes) {
  constexpr int kCount = LanesOf<Real>::count;
  if (size == kCount) {
    memcpy(&lanes, address, sizeof lanes);
    return;
  }
  Real values[kCount];
  for (int i = 0; i < kCount; ++i) values[i] = i < size ? address[i] : padding;
  memcpy(&lanes, values, sizeof lanes);
}

template <typename Real>
VTOK_FUNCTION Real sum(const Real* row, int64_t count) {
  return sum_row<Real>(count, [row](int64_t c, int size, Lanes<Real>& total) {
    Lanes<Real> values;
    load_lanes(row + c, size, Real(0), values);
    total += values;
  });
}

template <typename Real>
VTOK_FUNCTION Real sum_squared_deviations(const Real* row, int64_t count, Real mean) {
  return sum_row<Real>(count, [row, mean](int64_t c, int size, Lanes<Real>& total) {
    Lanes<Real> values;
    load_lanes(row + c, size, mean, values);
    values -= mean;
    total += values * values;
  });
}

template <typename Real>
VTOK_FUNCTION Real dot(const Real* a, const Real* b, int64_t count) {
  return sum_row<Real>(count, [a, b](int64_t c, int size, Lanes<Real>& total) {
    Lanes<Real> left, right;
    load_lanes(a + c, size, Real(0), left);
    load_lanes(b + c, size, Real(0), right);
    total += left * right;
  });
}

// A channel vector [C] in the type of the arithmetic; `otherwise` where it is absent.
template <typename Real>
static std::vector<Real> channel_vector(const TensorView& view, int64_t channels, Real otherwise) {
  std::vector<Real> values(static_cast<size_t>(channels), otherwise);
  if (view.data == nullptr) return values;
  const int64_t step = channels == 1 ? 1 : view.strides[0];
  dispatch_floating("norm_act", "weight", view.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const T* data = view.data_as<T>();
    for (int64_t c = 0; c < channels; ++c) values[c] = static_cast<Real>(load(data + c * step));
  });
  return values;
}

static void store_channel_vector(const OutputView& view, const double* values, int64_t channels) {
  dispatch_floating("norm_act", "weight", view.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    T* data = view.data_as<T>();
    for (int64_t c = 0; c < channels; ++c) store(data + c, static_cast<real<T>>(values[c]));
  });
}

// `row` in the type of the arithmetic: itself, or converted into `scratch`.
template <typename T>
VTOK_FUNCTION const real<T>* as_real(const T* row, real<T>* scratch, int64_t channels) {
  if constexpr (std::is_same_v<T, real<T>>) {
    (void)scratch;
    (void)channels;
    return row;
  } else {
    for (int64_t c = 0; c < channels; ++c) scratch[c] = load(row + c);
    return scratch;
  }
}

// A run of rows with constant strides.
struct Run {
  int64_t x, y;
  int64_t x_stride, y_stride;
  int64_t first_row, count;
  bool is_first_frame;
};

// Calls function(Run) for rows [begin, end).
template <typename Function>
static void for_each_run(const NormActRows& rows, int64_t begin, int64_t end,
                         const Function& function) {
  const int inner = rows.num_dims - 1;
  while (begin < end) {
    const RowOffsets at = row_offsets(rows, static_cast<uint32_t>(begin));
    int64_t count = rows.sizes[inner] - begin % rows.sizes[inner];
    count = count < end - begin ? count : end - begin;
    function(Run{at.x, at.y, rows.x_strides[inner], rows.y_strides[inner], begin, count,
                 at.is_first_frame});
    begin += count;
  }
}

// Copies of frame 0 in front of it, if this row lies in frame 0 and y wants them.
template <typename O>
VTOK_FUNCTION void copy_to_front(const NormActBuffer& buffer, bool is_first_frame, O* y,
                                 int64_t channels) {
  if (!is_first_frame) return;
  for (int64_t k = 1; k <= buffer.front; ++k) {
    memcpy(y - k * buffer.frame_stride, y, static_cast<size_t>(channels) * sizeof(O));
  }
}

// The gradient of a row of x's normalised values: that of y, plus those of its copies in front.
template <typename O, typename Real>
VTOK_FUNCTION const Real* load_gradient(const NormActBuffer& buffer, bool is_first_frame,
                                        const O* grad_y, Real* scratch, int64_t channels) {
  if constexpr (std::is_same_v<O, Real>) {
    if (!is_first_frame) return grad_y;
  }
  for (int64_t c = 0; c < channels; ++c) scratch[c] = static_cast<Real>(load(grad_y + c));
  if (is_first_frame) {
    for (int64_t k = 1; k <= buffer.front; ++k) {
      const O* copy = grad_y - k * buffer.frame_stride;
      for (int64_t c = 0; c < channels; ++c) scratch[c] += static_cast<Real>(load(copy + c));
    }
  }
  return scratch;
}

}  // namespace vtok::VTOK_ISA
