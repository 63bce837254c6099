// norm_act on the CPU: fills what surrounds the rows of y, then one pass (layer, rms) or two passes
// (group) over x. Results do not depend on the number of threads.
#include "norm_act_cpu_group.h"
#include "norm_act_cpu_layer.h"

namespace vtok::VTOK_ISA {

// Zeros below and to the right of rows [H, W] of one frame of y.
static void clear_border(const NormActBuffer& buffer, char* frame, int64_t row_bytes) {
  const int64_t line = (buffer.width + buffer.right) * row_bytes;
  if (buffer.right > 0) {
    for (int64_t h = 0; h < buffer.height; ++h) {
      memset(frame + h * line + buffer.width * row_bytes, 0,
             static_cast<size_t>(buffer.right * row_bytes));
    }
  }
  memset(frame + buffer.height * line, 0, static_cast<size_t>(buffer.bottom * line));
}

// Everything of y that no row of x is written to. Zero is all-zero bits in every floating type.
static void fill_surroundings(const NormActForward& params) {
  const NormActBuffer& buffer = params.layout.buffer;
  const int64_t row_bytes = params.layout.channels * static_cast<int64_t>(size_of(params.y.dtype));
  const int64_t line = (buffer.width + buffer.right) * row_bytes;
  const int64_t frame_bytes = (buffer.height + buffer.bottom) * line;
  const int64_t per_clip = buffer.front + buffer.frames;
  const bool has_border = buffer.bottom > 0 || buffer.right > 0;
  if (!has_border && (buffer.front == 0 || buffer.replicate)) return;
  char* y = static_cast<char*>(params.y.data);
  const char* state = static_cast<const char*>(params.state.data);
  parallel_for(buffer.batch * per_clip, 1, params.num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t frame = begin; frame < end; ++frame) {
      const int64_t t = frame % per_clip;
      char* target = y + frame * frame_bytes;
      if (t < buffer.front && state != nullptr) {
        const int64_t source_line = buffer.width * row_bytes;
        const char* source =
            state + (frame / per_clip * buffer.front + t) * buffer.height * source_line;
        for (int64_t h = 0; h < buffer.height; ++h) {
          memcpy(target + h * line, source + h * source_line, static_cast<size_t>(source_line));
        }
      } else if (t < buffer.front && !buffer.replicate) {
        memset(target, 0, static_cast<size_t>(frame_bytes));
        continue;
      }
      if (has_border) clear_border(buffer, target, row_bytes);
    }
  });
}

// Calls function(TypeTag<T>, TypeTag<O>) for the dtypes of x and y: equal, or any two below
// float64.
template <typename Function>
static void dispatch_dtypes(DType x, DType y, const Function& function) {
  dispatch_floating("norm_act", "x", x, [&](auto x_type) {
    using T = typename decltype(x_type)::type;
    dispatch_floating("norm_act", "dtype", y, [&](auto y_type) {
      using O = typename decltype(y_type)::type;
      if constexpr (std::is_same_v<T, double> == std::is_same_v<O, double>) {
        function(x_type, y_type);
      } else {
        VTOK_CHECK_TYPE(false, "norm_act: dtype must be float64 where x is, got ", name_of(y));
      }
    });
  });
}

void norm_act_forward(const NormActForward& params) {
  fill_surroundings(params);
  if (params.layout.rows.num_rows == 0) return;
  dispatch_dtypes(params.x.dtype, params.y.dtype, [&](auto x_type, auto y_type) {
    using T = typename decltype(x_type)::type;
    using O = typename decltype(y_type)::type;
    if (is_grouped(params.layout.kind)) {
      params.layout.act ? group_forward<true, T, O>(params) : group_forward<false, T, O>(params);
    } else {
      params.layout.act ? layer_forward<true, T, O>(params) : layer_forward<false, T, O>(params);
    }
  });
}

void norm_act_backward(const NormActBackward& params) {
  dispatch_dtypes(params.x.dtype, params.grad_y.dtype, [&](auto x_type, auto y_type) {
    using T = typename decltype(x_type)::type;
    using O = typename decltype(y_type)::type;
    if (is_grouped(params.layout.kind)) {
      params.layout.act ? group_backward<true, T, O>(params) : group_backward<false, T, O>(params);
    } else {
      params.layout.act ? layer_backward<true, T, O>(params) : layer_backward<false, T, O>(params);
    }
  });
}

int64_t norm_act_workspace(const NormActLayout& layout, bool backward) {
  constexpr int64_t kFloatsPerDouble = 2;
  if (!is_grouped(layout.kind)) {
    return backward ? layer_parts(layout.rows.num_rows) * 2 * layout.channels * kFloatsPerDouble
                    : 0;
  }
  const int64_t slices = num_frames(layout) * slices_per_frame(layout);
  if (!backward) return slices * layout.num_groups * 3 * kFloatsPerDouble;
  return (slices * 2 * layout.channels + num_frames(layout) * layout.num_groups * 2) *
         kFloatsPerDouble;
}

}  // namespace vtok::VTOK_ISA

VTOK_CPU_DISPATCH(norm_act_forward, NormActForward)
VTOK_CPU_DISPATCH(norm_act_backward, NormActBackward)

#ifdef VTOK_ISA_IS_BASELINE
namespace vtok {

int64_t norm_act_workspace_cpu(const NormActLayout& layout, bool backward) {
  return baseline::norm_act_workspace(layout, backward);
}

}  // namespace vtok
#endif
