// The constants of one channel, computed on the host in double.
#pragma once

#include <cmath>
#include <limits>

#include "fsq.h"

namespace vtok {

inline FsqChannel fsq_channel(int64_t levels, int64_t basis) {
  const double half = (levels - 1) * (1.0 + 1e-3) / 2.0;
  const double offset = levels % 2 == 0 ? 0.5 : 0.0;
  const double shift = std::atanh(offset / half);
  const int64_t half_width = levels / 2;
  FsqChannel channel{};
  channel.shift = static_cast<float>(shift);
  channel.half = static_cast<float>(half);
  channel.offset = static_cast<float>(offset);
  channel.half_width = static_cast<int32_t>(half_width);
  channel.levels = static_cast<int32_t>(levels);
  channel.basis = basis;
  channel.inverse_half_width = 1.0f / static_cast<float>(half_width);
  channel.slope = channel.half / static_cast<float>(half_width);
  for (int k = 0; k < kFsqMaxCompared - 1; ++k) {
    const double bounded = k + 0.5 - half_width + offset;
    channel.boundary[k] = k < levels - 1 ? static_cast<float>(std::atanh(bounded / half) - shift)
                                         : std::numeric_limits<float>::infinity();
    channel.scaled_boundary[k] = -channel.boundary[k] * 0x1p64f;
  }
  return channel;
}

}  // namespace vtok
