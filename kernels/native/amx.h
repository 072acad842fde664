// Products of bf16 panels on AMX tiles.
#pragma once

#include <cstdint>

#include "lanes.h"

namespace unlearn_native {

// Whether this CPU has bf16 tiles and the system lets this process use them.
bool has_amx();

// c [m, n] float32 (+)= a [m, k] b: m, n and k are multiples of 32, rows of a and c are lda and ldc apart, b lies in
// panels of 32 columns [n / 32][k / 2][32][2].
void amx_product(
    int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldc, bool add, const bf16_bits* a, const bf16_bits* b,
    float* c);

// Ends a thread's use of the tiles.
void amx_release();

}  // namespace unlearn_native
