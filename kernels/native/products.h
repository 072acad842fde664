// The matrix products of a bf16 head on brgemm tiles, with everything else done while a tile is in the cache.
//
// Token blocks of 64 are packed once as the products' second operand; the weight's rows are the first as they lie in
// memory. So a tile of logits comes as [vocabulary, token]: sums over the vocabulary need no reduction across lanes, and
// the weight, the largest thing in sight, is never repacked.
#pragma once

#include <cstdint>

#include "lanes.h"

namespace unlearn_native {

// A row-major bf16 matrix whose rows are contiguous and `stride` apart.
struct Matrix {
  const bf16_bits* data;
  int64_t rows, columns, stride;
};

// LoRA's part of the logits: hidden [C, rank] float32 (s h A^T), b [V, rank] bf16 or float32; rank 0: none.
struct LowRank {
  const float* hidden;
  const bf16_bits* b_bf16;
  const float* b_float;
  int64_t b_stride, rank;
};

// Bytes of scratch for so many rows (col_grad: for so much width) at once.
int64_t exp_sums_bytes(int64_t num_rows, int64_t width, int64_t rank);
int64_t token_stats_bytes(int64_t num_rows, int64_t width, int64_t rank);
int64_t logits_bytes(int64_t num_rows, int64_t width, int64_t rank);
int64_t row_grad_bytes(int64_t num_rows, int64_t width);
int64_t col_grad_bytes(int64_t num_rows, int64_t width);

// sums[t] = sum over v != target[t] of exp(z_tv - offset[t]); e [C, V] (or null) those terms times the softcap's slope.
void exp_sums(
    Matrix hidden, Matrix weight, const Head& head, LowRank low_rank, const int64_t* target, const float* offset,
    float* sums, bf16_bits* e, int64_t e_stride, void* scratch, int64_t scratch_bytes);

// out [5, C]: z_y (NaN if y is no column), argmax (the lowest of equals), log of the mass, mean and variance of z, the
// last three over the columns but y.
void token_stats(
    Matrix hidden, Matrix weight, const Head& head, LowRank low_rank, const int64_t* target, double* out,
    int64_t out_stride, void* scratch, int64_t scratch_bytes);

// out [C, V] float32 = logits.
void logits(
    Matrix hidden, Matrix weight, const Head& head, LowRank low_rank, float* out, int64_t out_stride, void* scratch,
    int64_t scratch_bytes);

// out[t] (+)= target_coeff[t] matrix[target[t]] - e_coeff[t] (E matrix)[t]; target null: without the first term.
template <typename out_t>
void row_grad(
    Matrix e, Matrix matrix, const int64_t* target, const float* target_coeff, const float* e_coeff, bool accumulate,
    out_t* out, int64_t out_stride, void* scratch, int64_t scratch_bytes);

// out[v] (+)= sum over t with target[t] = v of target_coeff[t] rows[t] - sum over t of E[t][v] e_coeff[t] rows[t].
template <typename out_t>
void col_grad(
    Matrix e, Matrix rows, const int64_t* target, const float* target_coeff, const float* e_coeff, bool accumulate,
    out_t* out, int64_t out_stride, void* scratch, int64_t scratch_bytes);

// Whether this CPU multiplies bf16 tiles (AMX or AVX-512 BF16).
bool serves_bf16();

}  // namespace unlearn_native
