#include "tensor_core.h"

#include <cstring>

#include "../core/half.h"
#include "shared_memory.h"

namespace vtok::emulation {
namespace {

constexpr uint32_t kFullWarp = 0xffffffffu;

struct LoadOperand {
  uint32_t* registers;
  int count;
  bool transpose;
  const char* row;
};

void complete_load(void* const* operands, uint32_t /*lanes*/) {
  const LoadOperand& first = *static_cast<const LoadOperand*>(operands[0]);
  for (int matrix = 0; matrix < first.count; ++matrix) {
    uint16_t elements[8][8];
    for (int row = 0; row < 8; ++row) {
      std::memcpy(elements[row], static_cast<const LoadOperand*>(operands[8 * matrix + row])->row,
                  16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int row = lane / 4, column = 2 * (lane % 4);
      const uint32_t low = first.transpose ? elements[column][row] : elements[row][column];
      const uint32_t high = first.transpose ? elements[column + 1][row] : elements[row][column + 1];
      static_cast<const LoadOperand*>(operands[lane])->registers[matrix] = low | high << 16;
    }
  }
}

struct MultiplyOperand {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
  int depth;
  OperandType type;
};

// tf32 keeps 10 bits of the mantissa; the hardware ignores the lower 13.
float decode_tf32(uint32_t bits) {
  return bits_to_float(bits & 0xffffe000u);
}

// Eight floats that g++ and clang keep in vector registers.
typedef float Row __attribute__((vector_size(32)));

struct Tile {
  float a[16][16];
  Row b[16];
};

// In each 8 x 4 sub-tile, lane l holds element (l / 4, l % 4) of a and (l % 4, l / 4) of b.
void gather_tf32(Tile& tile, void* const* operands, int depth) {
  for (int lane = 0; lane < 32; ++lane) {
    const MultiplyOperand& operand = *static_cast<const MultiplyOperand*>(operands[lane]);
    const int group = lane / 4, member = lane % 4;
    for (int k = member, index = 0; k < depth; k += 4, ++index) {
      tile.a[group][k] = decode_tf32(operand.a[2 * index]);
      tile.a[group + 8][k] = decode_tf32(operand.a[2 * index + 1]);
      tile.b[k][group] = decode_tf32(operand.b[index]);
    }
  }
}

// In each 8 x 8 sub-tile, lane l holds elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of a and
// of column l / 4 of b. Bits are gathered first and converted in one loop over the tile, which
// compilers vectorise.
template <typename T>
void gather_half(Tile& tile, void* const* operands, int depth) {
  uint16_t a[16][16] = {}, b[16][8] = {};
  for (int lane = 0; lane < 32; ++lane) {
    const MultiplyOperand& operand = *static_cast<const MultiplyOperand*>(operands[lane]);
    const int group = lane / 4;
    for (int k = 2 * (lane % 4), index = 0; k < depth; k += 8, ++index) {
      std::memcpy(&a[group][k], &operand.a[2 * index], 4);
      std::memcpy(&a[group + 8][k], &operand.a[2 * index + 1], 4);
      b[k][group] = static_cast<uint16_t>(operand.b[index]);
      b[k + 1][group] = static_cast<uint16_t>(operand.b[index] >> 16);
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) tile.a[row][k] = to_float(T{a[row][k]});
    for (int column = 0; column < 8; ++column) tile.b[row][column] = to_float(T{b[row][column]});
  }
}

void complete_multiply(void* const* operands, uint32_t /*lanes*/) {
  Tile tile;
  const MultiplyOperand& first = *static_cast<const MultiplyOperand*>(operands[0]);
  const int depth = first.depth;
  if (first.type == OperandType::kTf32) {
    gather_tf32(tile, operands, depth);
  } else if (first.type == OperandType::kFloat16) {
    gather_half<float16>(tile, operands, depth);
  } else {
    gather_half<bfloat16>(tile, operands, depth);
  }
  Row product[16];
  for (int row = 0; row < 16; ++row) {
    Row sum = {};  // not product[row]: it has to stay in registers
    for (int k = 0; k < depth; ++k) sum += tile.a[row][k] * tile.b[k];
    product[row] = sum;
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* d = static_cast<const MultiplyOperand*>(operands[lane])->d;
    const int row = lane / 4, column = 2 * (lane % 4);
    d[0] += product[row][column];
    d[1] += product[row][column + 1];
    d[2] += product[row + 8][column];
    d[3] += product[row + 8][column + 1];
  }
}

}  // namespace

void load_matrix(uint32_t* registers, int count, bool transpose, const void* row,
                 const Site& site) {
  const int lane = static_cast<int>(current_thread() % 32);
  if (lane < 8 * count) {  // the addresses of the other lanes are ignored
    check_alignment(row, 16, "ldmatrix row");
    check_shared(row, 16, "ldmatrix row");
  }
  LoadOperand operand{registers, count, transpose, static_cast<const char*>(row)};
  warp_collective(kFullWarp, &operand, site, complete_load);
}

void multiply_accumulate(float* d, const uint32_t* a, const uint32_t* b, int depth,
                         OperandType type, const Site& site) {
  MultiplyOperand operand{d, a, b, depth, type};
  warp_collective(kFullWarp, &operand, site, complete_multiply);
}

}  // namespace vtok::emulation
