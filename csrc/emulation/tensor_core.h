// ldmatrix and mma.sync of sm_80 on the host, with the register layouts of the PTX manual. Products
// and sums are float32; a tensor core rounds its sums differently, so a test compares with a
// tolerance on both.
#pragma once

#include <cstdint>

#include "execution.h"

namespace vtok::emulation {

enum class OperandType { kFloat16, kBFloat16, kTf32 };

// Loads `count` (1, 2 or 4) 8 x 8 matrices of 16-bit elements. Lane 8 m + r points to row r of
// matrix m; lane l receives elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 in registers[m], of
// column l / 4 if `transpose`.
void load_matrix(uint32_t* registers, int count, bool transpose, const void* row, const Site& site);

// d (16 x 8) += a (16 x depth) * b (depth x 8), over the registers of one warp.
// depth 16: a has 4 registers and b has 2; depth 8: 2 and 1 for 16-bit operands, 4 and 2 for tf32.
void multiply_accumulate(float* d, const uint32_t* a, const uint32_t* b, int depth,
                         OperandType type, const Site& site);

}  // namespace vtok::emulation
