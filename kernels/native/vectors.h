// Vectors of 16 lanes in the compiler's own vector extension: one source, compiled once per instruction set
// (lanes.cpp). No <ATen> here: an inline function of a header compiled for AVX-512 could be the one the linker keeps.
#pragma once

#include <cstdint>
#include <cstring>

namespace unlearn_native::UNLEARN_ISA {

constexpr int64_t kLanes = 16;
using floats = float __attribute__((vector_size(64)));
using ints = int32_t __attribute__((vector_size(64)));
using words = uint32_t __attribute__((vector_size(64)));
using longs = uint64_t __attribute__((vector_size(64)));
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
  return x != x ? splat(__builtin_nanf("")) : result;
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

// Two of them in a word, of numbers and the NaN that exp returns: rounding cannot carry into its sign.
UNLEARN_INLINE words bf16_pair(floats low, floats high) {
  const words a = bits_of(low), b = bits_of(high);
  return ((a + 0x7fffu + ((a >> 16) & 1u)) >> 16) | ((b + 0x7fffu + ((b >> 16) & 1u)) & 0xffff0000u);
}

UNLEARN_INLINE floats from_bf16(halves x) {
  return from_bits(__builtin_convertvector(x, words) << 16);
}

#ifdef __AVX512F__
// The shuffles of a 16 x 16 transposition, each one instruction of AVX-512 (which GCC finds from these patterns).
#if defined(__clang__) || __GNUC__ >= 12
#define UNLEARN_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define UNLEARN_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype(a){__VA_ARGS__})
#endif

UNLEARN_INLINE words low_words(words a, words b) {
  return UNLEARN_SHUFFLE(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
}

UNLEARN_INLINE words high_words(words a, words b) {
  return UNLEARN_SHUFFLE(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
}

UNLEARN_INLINE words low_pairs(words a, words b) {
  return reinterpret_cast<words>(
      UNLEARN_SHUFFLE(reinterpret_cast<longs>(a), reinterpret_cast<longs>(b), 0, 8, 2, 10, 4, 12, 6, 14));
}

UNLEARN_INLINE words high_pairs(words a, words b) {
  return reinterpret_cast<words>(
      UNLEARN_SHUFFLE(reinterpret_cast<longs>(a), reinterpret_cast<longs>(b), 1, 9, 3, 11, 5, 13, 7, 15));
}

UNLEARN_INLINE words even_quarters(words a, words b) {
  return UNLEARN_SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
}

UNLEARN_INLINE words odd_quarters(words a, words b) {
  return UNLEARN_SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}

// rows[i][j] and rows[j][i] change places.
UNLEARN_INLINE void transpose(words (&rows)[16]) {
  words part[16];  // 4 g + j: column 4 l + j of rows 4 g to 4 g + 3 in quarter l
#pragma GCC unroll 4
  for (int g = 0; g < 16; g += 4) {
    const words a = low_words(rows[g], rows[g + 1]), b = high_words(rows[g], rows[g + 1]);
    const words c = low_words(rows[g + 2], rows[g + 3]), d = high_words(rows[g + 2], rows[g + 3]);
    part[g] = low_pairs(a, c);
    part[g + 1] = high_pairs(a, c);
    part[g + 2] = low_pairs(b, d);
    part[g + 3] = high_pairs(b, d);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const words even_low = even_quarters(part[j], part[4 + j]), even_high = even_quarters(part[8 + j], part[12 + j]);
    const words odd_low = odd_quarters(part[j], part[4 + j]), odd_high = odd_quarters(part[8 + j], part[12 + j]);
    rows[j] = even_quarters(even_low, even_high);
    rows[8 + j] = odd_quarters(even_low, even_high);
    rows[4 + j] = even_quarters(odd_low, odd_high);
    rows[12 + j] = odd_quarters(odd_low, odd_high);
  }
}

#else

// Elsewhere shuffles of such vectors fall apart into single words, which takes a compiler minutes; and the fused kernels,
// whose transpositions must be fast, run where there is AVX-512.
UNLEARN_INLINE void transpose(words (&rows)[16]) {
  uint32_t block[16][16];
  std::memcpy(block, rows, sizeof block);
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < i; ++j) {
      const uint32_t other = block[i][j];
      block[i][j] = block[j][i];
      block[j][i] = other;
    }
  }
  std::memcpy(rows, block, sizeof block);
}

#endif

}  // namespace unlearn_native::UNLEARN_ISA
