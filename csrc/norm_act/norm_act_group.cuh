// What the CUDA kernels of GroupNorm per frame share: how frames are cut into parts and parts into
// threads, and the constants of a channel vector.
//
// A block works on one part of a frame: neighbouring threads own neighbouring channel vectors, the
// others further rows. The number of parts follows from the shape alone, so that results are the
// same on every GPU.
#pragma once

#include "norm_act_device.cuh"

namespace vtok {
namespace {

constexpr int64_t kMaxPartsPerFrame = 64;  // 17 frames then make 1,088 blocks: 8 per multiprocessor
constexpr int64_t kMinRowsPerPart = 64;
constexpr int64_t kMaxChannels = 8192;  // 64 KB of shared memory at most

struct Parts {
  int64_t num_frames, per_frame, rows_per_part;
};

inline Parts make_parts(const NormActLayout& layout) {
  const int64_t rows = layout.rows_per_frame;
  const int64_t share = (rows + kMaxPartsPerFrame - 1) / kMaxPartsPerFrame;
  const int64_t per_part = share > kMinRowsPerPart ? share : kMinRowsPerPart;
  return {layout.buffer.batch * layout.buffer.frames, (rows + per_part - 1) / per_part, per_part};
}

// The rows of a block and the place of a thread in it.
template <int kWidth>
struct Place {
  int64_t frame;
  uint32_t begin, end;  // rows
  int num_vectors, threads_per_row, first_vector, line, num_lines;

  __device__ __forceinline__ Place(const KernelLayout& layout, const Parts& parts) {
    frame = blockIdx.x / parts.per_frame;
    const int64_t first = blockIdx.x % parts.per_frame * parts.rows_per_part;
    const int64_t last = first + parts.rows_per_part;
    begin = static_cast<uint32_t>(frame * layout.rows_per_frame + first);
    end = static_cast<uint32_t>(frame * layout.rows_per_frame +
                                (last < layout.rows_per_frame ? last : layout.rows_per_frame));
    num_vectors = layout.channels / kWidth;
    threads_per_row = num_vectors < kThreads ? num_vectors : kThreads;
    num_lines = kThreads / threads_per_row;
    first_vector = static_cast<int>(threadIdx.x) % threads_per_row;
    line = static_cast<int>(threadIdx.x) / threads_per_row;  // num_lines and above: idle
  }

  // Calls function(channel) for the vectors of this thread.
  template <typename Function>
  __device__ __forceinline__ void for_each_vector(const Function& function) const {
    if (line >= num_lines) return;
    for (int vector = first_vector; vector < num_vectors; vector += threads_per_row) {
      function(vector * kWidth);
    }
  }
};

// Entry `which` of [frames, groups, 2] values for the channels of a vector.
template <int kWidth>
__device__ __forceinline__ void load_group_values(const KernelLayout& layout, const float* values,
                                                  int64_t frame, int channel, int which,
                                                  float (&result)[kWidth]) {
  const int width = layout.channels / layout.num_groups;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    result[i] = values[(frame * layout.num_groups + (channel + i) / width) * 2 + which];
  }
}

// What normalises the channels of one vector of one frame.
template <int kWidth>
struct VectorConstants {
  float mean[kWidth], rstd[kWidth], factor[kWidth], summand[kWidth];

  __device__ __forceinline__ VectorConstants(const KernelLayout& layout, const float* stats,
                                             const AnyArray& weight, const AnyArray& bias,
                                             int64_t frame, int channel) {
    load_group_values(layout, stats, frame, channel, 0, mean);
    load_group_values(layout, stats, frame, channel, 1, rstd);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      factor[i] = load_float(weight, channel + i, 1.0f);
      summand[i] = load_float(bias, channel + i, 0.0f);
    }
  }
};

// Bytes of shared memory [2, lines, C] of a block whose threads own `width` channels.
inline unsigned shared_bytes(const NormActLayout& layout, int width) {
  const int64_t vectors = layout.channels / width;
  const int64_t lines = vectors < kThreads ? kThreads / vectors : 1;
  return static_cast<unsigned>(2 * lines * layout.channels * static_cast<int64_t>(sizeof(float)));
}

inline unsigned checked_grid(int64_t blocks) {
  VTOK_CHECK_VALUE(blocks <= 0x7fffffff, "norm_act: x has too many frames for one launch");
  return static_cast<unsigned>(blocks);
}

inline void check_channels(const NormActLayout& layout) {
  VTOK_CHECK_VALUE(layout.channels <= kMaxChannels, "norm_act: x must have at most ", kMaxChannels,
                   " channels for group norms on CUDA, got ", layout.channels);
}

// Calls function(width), an integral constant: the channels that a thread owns.
template <typename T, typename Function>
void dispatch_width(bool vectors, const Function& function) {
  if (vectors) return function(std::integral_constant<int, 16 / sizeof(T)>{});
  function(std::integral_constant<int, 1>{});
}

}  // namespace
}  // namespace vtok
