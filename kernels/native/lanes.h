// What is written once and compiled for each instruction set: everything around the matrix products.
#pragma once

#include <cstdint>

namespace unlearn_native {

using bf16_bits = uint16_t;

// From a product to a logit: softcap(scale (product + bias)); softcap 0 is none.
struct Head {
  const float* bias;  // [V] or null
  float scale;
  float softcap;
};

constexpr int64_t kBlockT = 64;  // tokens of a tile of logits
constexpr int64_t kPanel = 32;   // columns of a panel of a product's second operand

// Of 64 tokens, over the columns seen so far: the largest logit and its lowest column; the logit of the target; and,
// over the columns but the target, the mass sum exp(z - base), mean and variance of z - base under it.
struct Moments {
  float maximum[kBlockT], target[kBlockT], base[kBlockT], mass[kBlockT], mean[kBlockT], variance[kBlockT];
  int32_t argmax[kBlockT];

  void clear() {
    for (int64_t t = 0; t < kBlockT; ++t) {
      maximum[t] = -__builtin_inff();
      target[t] = __builtin_nanf("");
      base[t] = mass[t] = mean[t] = variance[t] = 0.0f;
      argmax[t] = 0;
    }
  }
};

struct Lanes {
  const char* isa;

  // [count <= 64, width] bf16 rows, tokens, as the columns of a product's second operand: panels of 32 tokens, in each
  // pairs of k side by side: out[t / 32][k / 2][t % 32][k % 2]. The width is rounded up to 32; beyond it and count is 0.
  void (*pack_tokens)(const bf16_bits* rows, int64_t row_stride, int64_t count, int64_t width, bf16_bits* out);

  // [count, width] rows as those of a product's second operand: out[j / 32][i / 2][j % 32][i % 2] = factor_i rows[i][j];
  // count and width are rounded up to 32, beyond is 0. factor null: 1.
  void (*pack_rows)(
      const bf16_bits* rows, int64_t row_stride, const float* factor, int64_t count, int64_t width, bf16_bits* out);

  // out[v][t] = rows[t][v] for t < count and v < width; out's rows are out_stride apart and 0 up to count rounded up to
  // 32.
  void (*transpose)(
      const bf16_bits* rows, int64_t row_stride, int64_t count, int64_t width, bf16_bits* out, int64_t out_stride);

  // sums[t] += sum over v of exp(z - offset[t]) without v = target[t], for a tile of products [num_v, 64] whose first
  // column is `first`; e (may be null) gets those terms, times the softcap's slope, as bf16 e[t][v] for t < count.
  void (*exp_tile)(
      const float* tile, int64_t first, int64_t num_v, int64_t count, const Head& head, const float* offset,
      const int32_t* target, double* sums, bf16_bits* e, int64_t e_stride);

  // exp_tile for one row of products z[0:num_v], in place: z becomes E in float32; returns the sum.
  double (*exp_row)(float* z, int64_t first, int64_t num_v, const Head& head, float offset, int64_t target);

  // Adds a tile of products (overwritten) to the moments of its tokens, whose columns come in rising order.
  void (*stats_tile)(
      float* tile, int64_t first, int64_t num_v, int64_t count, const Head& head, const int32_t* target,
      Moments& moments);

  // Adds the moments of columns that all come after those of `sum`.
  void (*merge_moments)(Moments& sum, const Moments& more);

  // out[t][v] = logits of a tile of products, for t < count.
  void (*logit_rows)(
      const float* tile, int64_t first, int64_t num_v, int64_t count, const Head& head, float* out, int64_t out_stride);

  // KL(q || p) of one row of logits each, and (p - q) times the softcap's slope in g_bf16 or g_float, whichever is not
  // null. Overwrites both rows. Terms q (exp(u) - 1 - u) >= 0, u = log p - log q.
  double (*kl_row)(float* p, float* q, int64_t vocab, float softcap, bf16_bits* g_bf16, float* g_float);

  // out = a x + b y over `width` elements, without a null x or y, and added to what out holds if asked.
  void (*combine)(
      const bf16_bits* x, float a, const float* y, float b, bool accumulate, int64_t width, float* out);
  void (*combine_bf16)(
      const bf16_bits* x, float a, const float* y, float b, bool accumulate, int64_t width, bf16_bits* out);
};

// Those of this machine's best instruction set.
const Lanes& lanes();

// The copies that were compiled; UNLEARN_X86 is set where those for x86 were.
namespace generic {
extern const Lanes table;
}
#ifdef UNLEARN_X86
namespace avx2 {
extern const Lanes table;
}
namespace avx512 {
extern const Lanes table;
}
#endif

}  // namespace unlearn_native
