// Vectors of 16 lanes in the compiler's own vector extension: one source, compiled once per instruction set
// (lanes.cpp). No <ATen> here: an inline function of a header compiled for AVX-512 could be the one the linker keeps.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

namespace unlearn_native::UNLEARN_ISA {

constexpr int64_t kLanes = 16;
using floats = float __attribute__((vector_size(64)));
using ints = int32_t __attribute__((vector_size(64)));
using words = uint32_t __attribute__((vector_size(64)));
using doubles8 = double __attribute__((vector_size(64)));
using halves = uint16_t __attribute__((vector_size(32)));

#define UNLEARN_INLINE inline __attribute__((always_inline))

template <typename vector_t>
UNLEARN_INLINE vector_t load(const void* from) {
  vector_t x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

template <typename vector_t>
UNLEARN_INLINE void store(void* to, vector_t x) {
  std::memcpy(to, &x, sizeof x);
}

UNLEARN_INLINE floats splat(float x) {
  return floats{} + x;
}

UNLEARN_INLINE words bits_of(floats x) {
  return reinterpret_cast<words>(x);
}

UNLEARN_INLINE floats from_bits(words x) {
  return reinterpret_cast<floats>(x);
}

// exp(x), within 1e-7 of it, for the exponents of a row: 0 below -87 (denormals would slow every product that reads
// them), infinity above 88 (such a row is computed again with another offset), NaN for NaN.
UNLEARN_INLINE floats exp(floats x) {
  const floats rounded = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the nearest integer stands in the low bits
  const floats n = rounded - 12582912.0f;
  const floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  // a fit of (exp(r) - 1 - r) / r^2 on |r| <= ln(2) / 2 with least relative error, 3e-9
  floats p = r * 1.381459180e-3f + 8.368716575e-3f;
  p = p * r + 4.166838899e-2f;
  p = p * r + 1.666652113e-1f;
  p = p * r + 4.999999404e-1f;
  p = (p * r) * r + r + 1.0f;
  floats result = from_bits(bits_of(p) + (bits_of(rounded) << 23));
  result = x < -87.0f ? floats{} : result;
  result = x > 88.0f ? splat(__builtin_inff()) : result;
  return x != x ? x : result;
}

UNLEARN_INLINE floats tanh(floats x) {
  const floats size = x < 0.0f ? -x : x;
  const floats small = (((size * size * -0.053968254f + 0.133333333f) * (size * size) - 0.333333333f) * (size * size) + 1.0f) * size;
  const floats t = exp(size * -2.0f);
  const floats magnitude = size < 0.2f ? small : (1.0f - t) / (1.0f + t);
  return x < 0.0f ? -magnitude : magnitude;
}

// bf16 bits in the low half of each word, rounded to nearest even; NaN stays NaN.
UNLEARN_INLINE words to_bf16(floats x) {
  const words bits = bits_of(x);
  const words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return x != x ? (bits >> 16) | 0x40u : rounded;
}

UNLEARN_INLINE floats from_bf16(halves x) {
  return from_bits(__builtin_convertvector(x, words) << 16);
}

// One step of a 16 x 16 transposition: swaps the off-diagonal blocks of `step` lanes of rows i and i + step.
template <int step, int... lane>
UNLEARN_INLINE void exchange(words& low, words& high, std::integer_sequence<int, lane...>) {
  const words a = low, b = high;
#if defined(__clang__) || __GNUC__ >= 12
  low = __builtin_shufflevector(a, b, ((lane & step) ? 16 + lane - step : lane)...);
  high = __builtin_shufflevector(a, b, ((lane & step) ? 16 + lane : lane + step)...);
#else
  low = __builtin_shuffle(a, b, words{((lane & step) ? 16u + lane - step : lane)...});
  high = __builtin_shuffle(a, b, words{((lane & step) ? 16u + lane : lane + step)...});
#endif
}

template <int step>
UNLEARN_INLINE void exchange_rows(words (&rows)[16]) {
  for (int i = 0; i < 16; ++i) {
    if ((i & step) == 0) {
      exchange<step>(rows[i], rows[i + step], std::make_integer_sequence<int, 16>{});
    }
  }
}

UNLEARN_INLINE void transpose(words (&rows)[16]) {
  exchange_rows<1>(rows);
  exchange_rows<2>(rows);
  exchange_rows<4>(rows);
  exchange_rows<8>(rows);
}

}  // namespace unlearn_native::UNLEARN_ISA
