// What surrounds the rows of y on CUDA: frames of zeros or of state in front, zeros at the bottom
// and the right. A small part of y, written once in words of up to 16 bytes.
#include "norm_act_device.cuh"

namespace vtok {
namespace {

// Everything in words, whose number per row is `row_words`.
struct Surroundings {
  int64_t front, frames, height, width, bottom, right;
  int64_t row_words, num_words;  // num_words: of all rows that are filled
  bool fills_front;
};

// Rows of y that a frame in front, and any other frame, has to have filled.
VTOK_FUNCTION int64_t filled_rows(const Surroundings& s, bool is_front) {
  const int64_t all = (s.height + s.bottom) * (s.width + s.right);
  return is_front && s.fills_front ? all : all - s.height * s.width;
}

template <typename Word>
__global__ void __launch_bounds__(kThreads) norm_act_fill_kernel(
    const Surroundings s,
    const Word* __restrict__ state,  // [B, front, H, W, row_words] or null
    Word* __restrict__ y) {          // [B, front + T, H + bottom, W + right, row_words]
  const int64_t front_rows = filled_rows(s, true), other_rows = filled_rows(s, false);
  const int64_t clip_rows = s.front * front_rows + s.frames * other_rows;
  const int64_t line = s.width + s.right;
  const int64_t frame_rows = (s.height + s.bottom) * line;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < s.num_words; i += step) {
    const int64_t row = i / s.row_words, word = i % s.row_words;
    const int64_t batch = row / clip_rows, in_clip = row % clip_rows;
    const bool is_front = in_clip < s.front * front_rows;
    const int64_t rest = is_front ? in_clip : in_clip - s.front * front_rows;
    const int64_t per_frame = is_front ? front_rows : other_rows;
    const int64_t frame = rest / per_frame + (is_front ? 0 : s.front);
    int64_t position = rest % per_frame;  // of the row within its frame of y
    if (!(is_front && s.fills_front)) {  // only the border: right columns line by line, then bottom
      const int64_t in_right = s.height * s.right;
      position = position < in_right ? position / s.right * line + s.width + position % s.right
                                     : s.height * line + position - in_right;
    }
    Word value{};
    const int64_t h = position / line, w = position % line;
    if (state != nullptr && is_front && h < s.height && w < s.width) {
      const int64_t source = ((batch * s.front + frame) * s.height + h) * s.width + w;
      value = load_vector<Word>(state + source * s.row_words + word);
    }
    const int64_t target = (batch * (s.front + s.frames) + frame) * frame_rows + position;
    store_vector(y + target * s.row_words + word, value);
  }
}

template <int kBytes>
void launch_fill(const NormActForward& params, Surroundings s, int64_t row_bytes, Stream stream) {
  using Word = Vector<unsigned char, kBytes>;
  s.row_words = row_bytes / kBytes;
  s.num_words *= s.row_words;
  const int64_t needed = (s.num_words + kThreads - 1) / kThreads;
  const int64_t most = int64_t{8} * num_multiprocessors(params.x.device_index);
  VTOK_LAUNCH((norm_act_fill_kernel<Word>),
              dim3(static_cast<unsigned>(needed < most ? needed : most)), dim3(kThreads), 0, stream,
              s, static_cast<const Word*>(params.state.data), static_cast<Word*>(params.y.data));
}

}  // namespace

void launch_fill_surroundings(const NormActForward& params, Stream stream) {
  const NormActBuffer& buffer = params.layout.buffer;
  Surroundings s{buffer.front,
                 buffer.frames,
                 buffer.height,
                 buffer.width,
                 buffer.bottom,
                 buffer.right,
                 0,
                 0,
                 !buffer.replicate};
  s.num_words = buffer.batch *
                (s.front * filled_rows(s, true) + s.frames * filled_rows(s, false));  // rows so far
  if (s.num_words == 0) return;
  const int64_t row_bytes = params.layout.channels * static_cast<int64_t>(size_of(params.y.dtype));
  const uintptr_t bits = static_cast<uintptr_t>(row_bytes) |
                         reinterpret_cast<uintptr_t>(params.y.data) |
                         reinterpret_cast<uintptr_t>(params.state.data);
  if (bits % 16 == 0) return launch_fill<16>(params, s, row_bytes, stream);
  if (bits % 4 == 0) return launch_fill<4>(params, s, row_bytes, stream);
  launch_fill<2>(params, s, row_bytes, stream);
}

}  // namespace vtok
