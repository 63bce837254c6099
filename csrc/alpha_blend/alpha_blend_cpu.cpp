// alpha_blend on the CPU, forward and backward in one pass over the tensors each.
//
// The work is cut into units (group, block, slice of a run; Note [Groups, rows, runs]) that do not
// depend on the number of threads. A unit visits pieces of at most kSlice neighbouring values, for
// which alpha and 1 - alpha stand in a table, whether they change along the run or not: one set of
// loops serves every shape of the factor, and reading the tables from L1 costs nothing next to
// memory.
#include "../core/dispatch.h"
#include "../core/isa.h"
#include "../core/parallel.h"
#include "alpha_blend.h"
#include "alpha_blend_math.h"

namespace vtok::VTOK_ISA {

// Tables of alpha, 1 - alpha and running sums: 12 KB in float32, 24 KB in float64, within a 32 KB
// L1 cache.
constexpr int64_t kSlice = 1024;

// The factors of a slice and the running sums of g * (a - b), one per position in the slice.
template <typename Real>
struct SliceTables {
  alignas(64) Real alpha[kSlice];
  alignas(64) Real beta[kSlice];
  alignas(64) Real sum[kSlice];

  void set(const Real* factor, int64_t stride, int64_t count, bool is_logit) {
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) {
      alpha[i] = blend_alpha(factor[i * stride], is_logit);
      beta[i] = Real(1) - alpha[i];
    }
  }

  void clear_sums() {
    for (int64_t i = 0; i < kSlice; ++i) sum[i] = 0;
  }

  // All sums added pairwise, in an order that every instruction set shares.
  Real total() {
    for (int64_t width = kSlice / 2; width > 0; width /= 2) {
      for (int64_t i = 0; i < width; ++i) sum[i] += sum[i + width];
    }
    return sum[0];
  }
};

struct Unit {
  int64_t group, block;
  int64_t first, last;  // columns of the run when it has factors, else positions in the group
  int64_t first_row, last_row;  // when the run has factors
};

static int64_t slices_per_run(const BlendLayout& layout) {
  return layout.run_has_factors ? (layout.run.size + kSlice - 1) / kSlice : 1;
}

static Unit make_unit(const BlendLayout& layout, int64_t number) {
  const int64_t slices = slices_per_run(layout);
  const int64_t slice = number % slices;
  Unit unit{};
  unit.block = number / slices % layout.num_blocks;
  unit.group = number / slices / layout.num_blocks;
  if (layout.run_has_factors) {
    unit.first = slice * kSlice;
    unit.last = unit.first + kSlice < layout.run.size ? unit.first + kSlice : layout.run.size;
    unit.first_row = block_begin(layout.num_rows, layout.num_blocks, unit.block);
    unit.last_row = block_begin(layout.num_rows, layout.num_blocks, unit.block + 1);
  } else {
    const int64_t count = layout.num_rows * layout.run.size;
    unit.first = block_begin(count, layout.num_blocks, unit.block);
    unit.last = block_begin(count, layout.num_blocks, unit.block + 1);
  }
  return unit;
}

static void advance(const BlendLayout& layout, int64_t columns, BlendOffsets& offsets) {
  for (int tensor = 0; tensor < kNumBlendTensors; ++tensor) {
    offsets.of[tensor] += columns * layout.run.strides[tensor];
  }
}

// Calls function(offsets, count) for the pieces of a unit, each within one row and one slice.
template <typename Function>
static void for_each_piece(const BlendLayout& layout, const Unit& unit, const Function& function) {
  if (layout.run_has_factors) {
    for (int64_t row = unit.first_row; row < unit.last_row; ++row) {
      BlendOffsets offsets = row_offsets(layout, unit.group, row);
      advance(layout, unit.first, offsets);
      function(offsets, unit.last - unit.first);
    }
    return;
  }
  for (int64_t position = unit.first; position < unit.last;) {
    const int64_t row = position / layout.run.size;
    const int64_t row_end = (row + 1) * layout.run.size;
    const int64_t end = row_end < unit.last ? row_end : unit.last;
    BlendOffsets offsets = row_offsets(layout, unit.group, row);
    advance(layout, position - row * layout.run.size, offsets);
    while (position < end) {
      const int64_t count = end - position < kSlice ? end - position : kSlice;
      function(offsets, count);
      advance(layout, count, offsets);
      position += count;
    }
  }
}

// Fills the tables of a unit: one value repeated, or the factors of its columns.
template <typename Real>
static void set_tables(const BlendLayout& layout, const Unit& unit, const Real* factor,
                       SliceTables<Real>& tables) {
  BlendOffsets offsets = row_offsets(layout, unit.group, 0);
  if (layout.run_has_factors) advance(layout, unit.first, offsets);
  const int64_t longest = layout.run_has_factors || layout.run.size > unit.last - unit.first
                              ? unit.last - unit.first
                              : layout.run.size;
  tables.set(factor + offsets.of[kBlendFactor],
             layout.run_has_factors ? layout.run.strides[kBlendFactor] : 0,
             longest < kSlice ? longest : kSlice, layout.is_logit);
}

// kUnit: every stride is 1.
template <bool kUnit, typename T>
static void blend_piece(const SliceTables<real<T>>& tables, const T* a, int64_t a_stride,
                        const T* b, int64_t b_stride, T* out, int64_t out_stride, int64_t count) {
  const int64_t a_step = kUnit ? 1 : a_stride;
  const int64_t b_step = kUnit ? 1 : b_stride;
  const int64_t out_step = kUnit ? 1 : out_stride;
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    store(out + i * out_step,
          tables.alpha[i] * load(a + i * a_step) + tables.beta[i] * load(b + i * b_step));
  }
}

// target = weight * grad
template <bool kUnit, typename T>
static void scale_piece(const real<T>* weight, const T* grad, int64_t grad_stride, T* target,
                        int64_t target_stride, int64_t count) {
  const int64_t grad_step = kUnit ? 1 : grad_stride;
  const int64_t target_step = kUnit ? 1 : target_stride;
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    store(target + i * target_step, weight[i] * load(grad + i * grad_step));
  }
}

// sum += grad * (a - b)
template <bool kUnit, typename T>
static void sum_piece(real<T>* sum, const T* grad, int64_t grad_stride, const T* a,
                      int64_t a_stride, const T* b, int64_t b_stride, int64_t count) {
  const int64_t grad_step = kUnit ? 1 : grad_stride;
  const int64_t a_step = kUnit ? 1 : a_stride;
  const int64_t b_step = kUnit ? 1 : b_stride;
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    sum[i] += load(grad + i * grad_step) * (load(a + i * a_step) - load(b + i * b_step));
  }
}

// Whether all tensors that the call uses have stride 1 along the run.
static bool is_unit(const BlendLayout& layout, std::initializer_list<int> tensors) {
  bool unit = true;
  for (const int tensor : tensors) unit = unit && layout.run.strides[tensor] == 1;
  return unit;
}

static int64_t num_units(const BlendLayout& layout) {
  return layout.num_groups * layout.num_blocks * slices_per_run(layout);
}

// Units that one thread should do at least: about 5 us of work.
static int64_t unit_grain(const BlendLayout& layout) {
  const int64_t elements = layout.num_groups * layout.num_rows * layout.run.size;
  const int64_t per_unit = elements / num_units(layout) + 1;
  return kBlendBlockElements / per_unit > 1 ? kBlendBlockElements / per_unit : 1;
}

template <bool kUnit, typename T>
static void forward_units(const BlendForward& params, int64_t begin, int64_t end) {
  const BlendLayout& layout = params.layout;
  const int64_t* strides = layout.run.strides;
  const T* a = params.a.data_as<T>();
  const T* b = params.b.data_as<T>();
  T* out = params.out.data_as<T>();
  SliceTables<real<T>> tables;
  for (int64_t number = begin; number < end; ++number) {
    const Unit unit = make_unit(layout, number);
    set_tables(layout, unit, params.factor.data_as<real<T>>(), tables);
    for_each_piece(layout, unit, [&](const BlendOffsets& at, int64_t count) {
      blend_piece<kUnit>(tables, a + at.of[kBlendA], strides[kBlendA], b + at.of[kBlendB],
                         strides[kBlendB], out + at.of[kBlendOut], strides[kBlendOut], count);
    });
  }
}

void alpha_blend_forward(const BlendForward& params) {
  const BlendLayout& layout = params.layout;
  const bool unit = is_unit(layout, {kBlendA, kBlendB, kBlendOut});
  dispatch_floating("alpha_blend", "a", params.a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel_for(num_units(layout), unit_grain(layout), params.num_threads,
                 [&](int64_t begin, int64_t end) {
                   unit ? forward_units<true, T>(params, begin, end)
                        : forward_units<false, T>(params, begin, end);
                 });
  });
}

// What a backward pass over one piece needs, with a null pointer for what is absent.
template <typename T>
struct BackwardPointers {
  const T* grad_out;
  const T* a;
  const T* b;
  T* grad_a;
  T* grad_b;

  explicit BackwardPointers(const BlendBackward& params)
      : grad_out(params.grad_out.data_as<T>()),
        a(params.a.data != nullptr ? params.a.data_as<T>() : nullptr),
        b(params.b.data != nullptr ? params.b.data_as<T>() : nullptr),
        grad_a(params.grad_a.data != nullptr ? params.grad_a.data_as<T>() : nullptr),
        grad_b(params.grad_b.data != nullptr ? params.grad_b.data_as<T>() : nullptr) {}
};

template <bool kUnit, typename T>
static void backward_piece(const BackwardPointers<T>& p, const int64_t* strides,
                           const BlendOffsets& at, SliceTables<real<T>>& tables, int64_t count) {
  const T* grad = p.grad_out + at.of[kBlendOut];
  if (p.grad_a != nullptr) {
    scale_piece<kUnit>(tables.alpha, grad, strides[kBlendOut], p.grad_a + at.of[kBlendGradA],
                       strides[kBlendGradA], count);
  }
  if (p.grad_b != nullptr) {
    scale_piece<kUnit>(tables.beta, grad, strides[kBlendOut], p.grad_b + at.of[kBlendGradB],
                       strides[kBlendGradB], count);
  }
  if (p.a != nullptr) {
    sum_piece<kUnit>(tables.sum, grad, strides[kBlendOut], p.a + at.of[kBlendA], strides[kBlendA],
                     p.b + at.of[kBlendB], strides[kBlendB], count);
  }
}

template <bool kUnit, typename T>
static void backward_units(const BlendBackward& params, int64_t begin, int64_t end) {
  using Real = real<T>;
  const BlendLayout& layout = params.layout;
  const BackwardPointers<T> pointers(params);
  const bool needs_sums = params.a.data != nullptr;
  Real* partials = needs_sums ? params.partials.data_as<Real>() : nullptr;
  SliceTables<Real> tables;
  for (int64_t number = begin; number < end; ++number) {
    const Unit unit = make_unit(layout, number);
    set_tables(layout, unit, params.factor.data_as<Real>(), tables);
    if (needs_sums) tables.clear_sums();
    for_each_piece(layout, unit, [&](const BlendOffsets& at, int64_t count) {
      backward_piece<kUnit>(pointers, layout.run.strides, at, tables, count);
    });
    const int64_t block = unit.group * layout.num_blocks + unit.block;
    if (needs_sums && layout.run_has_factors) {
      for (int64_t column = unit.first; column < unit.last; ++column) {
        partials[block * layout.run.size + column] = tables.sum[column - unit.first];
      }
    } else if (needs_sums) {
      partials[block] = tables.total();
    }
  }
}

// Adds the partial sums of every factor, in the order of the blocks.
template <typename Real>
static void finish_factors(const BlendBackward& params) {
  const BlendLayout& layout = params.layout;
  const int64_t columns = layout.run_has_factors ? layout.run.size : 1;
  const Real* partials = params.partials.data_as<Real>();
  const Real* factor = params.factor.data_as<Real>();
  Real* grad_factor = params.grad_factor.data_as<Real>();
  for (int64_t group = 0; group < layout.num_groups; ++group) {
    const int64_t start = row_offsets(layout, group, 0).of[kBlendFactor];
    for (int64_t column = 0; column < columns; ++column) {
      double sum = 0;
      for (int64_t block = 0; block < layout.num_blocks; ++block) {
        sum += partials[(group * layout.num_blocks + block) * columns + column];
      }
      const int64_t at = start + column * layout.run.strides[kBlendFactor];
      grad_factor[at] = static_cast<Real>(sum) * blend_slope(factor[at], layout.is_logit);
    }
  }
}

void alpha_blend_backward(const BlendBackward& params) {
  const BlendLayout& layout = params.layout;
  bool unit = layout.run.strides[kBlendOut] == 1;
  unit = unit && (params.grad_a.data == nullptr || layout.run.strides[kBlendGradA] == 1);
  unit = unit && (params.grad_b.data == nullptr || layout.run.strides[kBlendGradB] == 1);
  unit = unit && (params.a.data == nullptr || is_unit(layout, {kBlendA, kBlendB}));
  dispatch_floating("alpha_blend backward", "a", params.grad_out.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel_for(num_units(layout), unit_grain(layout), params.num_threads,
                 [&](int64_t begin, int64_t end) {
                   unit ? backward_units<true, T>(params, begin, end)
                        : backward_units<false, T>(params, begin, end);
                 });
    if (params.a.data != nullptr) finish_factors<real<T>>(params);
  });
}

}  // namespace vtok::VTOK_ISA

VTOK_CPU_DISPATCH(alpha_blend_forward, BlendForward)
VTOK_CPU_DISPATCH(alpha_blend_backward, BlendBackward)
