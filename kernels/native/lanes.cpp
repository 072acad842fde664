// Compiled once per instruction set, UNLEARN_ISA naming it (CMakeLists.txt).
#include "lanes.h"
#include "vectors.h"

namespace unlearn_native::UNLEARN_ISA {
namespace {

int64_t round_up(int64_t count, int64_t step) {
  return (count + step - 1) / step * step;
}

// 16 rows of 32 bf16, zero beyond rows and columns.
UNLEARN_INLINE void load_block(
    words (&block)[16], const bf16_bits* rows, int64_t row_stride, int64_t num_rows, int64_t num_columns) {
  for (int64_t i = 0; i < 16; ++i) {
    if (i < num_rows && num_columns >= 32) {
      block[i] = load<words>(rows + i * row_stride);
    } else {
      bf16_bits part[32] = {};
      if (i < num_rows && num_columns > 0) {
        std::memcpy(part, rows + i * row_stride, num_columns * sizeof(bf16_bits));
      }
      block[i] = load<words>(part);
    }
  }
}

void pack_tokens(const bf16_bits* rows, int64_t row_stride, int64_t count, int64_t width, bf16_bits* out) {
  const int64_t panel = round_up(width, 32) * kPanel;
  for (int64_t t = 0; t < kBlockT; t += 16) {
    bf16_bits* const to = out + t / kPanel * panel + t % kPanel * 2;
    for (int64_t k = 0; k < width; k += 32) {
      words block[16];
      load_block(block, rows + t * row_stride + k, row_stride, count - t, width - k);
      transpose(block);
      for (int64_t pair = 0; pair < 16; ++pair) {
        store(to + (k / 2 + pair) * kPanel * 2, block[pair]);
      }
    }
  }
}

void pack_rows(
    const bf16_bits* rows, int64_t row_stride, const float* factor, int64_t count, int64_t width, bf16_bits* out) {
  const int64_t depth = round_up(count, 32), panel = depth * kPanel;
  for (int64_t i = 0; i < depth; i += 2) {
    const bool first = i < count, second = i + 1 < count;
    const bf16_bits* low_row = rows + i * row_stride;
    const bf16_bits* high_row = low_row + row_stride;
    // a row is about a page, where hardware prefetchers stop
    for (int64_t ahead = i + 8; ahead < i + 10 && ahead < count; ++ahead) {
      for (int64_t j = 0; j < width; j += 32) {
        __builtin_prefetch(rows + ahead * row_stride + j, 0, 2);
      }
    }
    for (int64_t j = 0; j < round_up(width, 32); j += kLanes) {
      halves low = {}, high = {};
      if (j + kLanes <= width) {
        low = first ? load<halves>(low_row + j) : low;
        high = second ? load<halves>(high_row + j) : high;
      } else if (j < width) {
        if (first) {
          std::memcpy(&low, low_row + j, (width - j) * sizeof(bf16_bits));
        }
        if (second) {
          std::memcpy(&high, high_row + j, (width - j) * sizeof(bf16_bits));
        }
      }
      words pair = __builtin_convertvector(low, words) | (__builtin_convertvector(high, words) << 16);
      if (factor != nullptr) {
        const float a = first ? factor[i] : 0.0f, b = second ? factor[i + 1] : 0.0f;
        pair = to_bf16(from_bf16(low) * a) | (to_bf16(from_bf16(high) * b) << 16);
      }
      store(out + j / kPanel * panel + (i / 2 * kPanel + j % kPanel) * 2, pair);
    }
  }
}

void transpose_rows(
    const bf16_bits* rows, int64_t row_stride, int64_t count, int64_t width, bf16_bits* out, int64_t out_stride) {
  for (int64_t t = 0; t < count; t += 32) {
    // rows are pages apart, where hardware prefetchers see nothing: the next 32
    for (int64_t ahead = t + 32; ahead < t + 64 && ahead < count; ++ahead) {
      for (int64_t v = 0; v < width; v += 32) {
        __builtin_prefetch(rows + ahead * row_stride + v, 0, 2);
      }
    }
    for (int64_t v = 0; v < width; v += 16) {
      const int64_t columns = width - v < 16 ? width - v : 16;
      words block[16];  // a pair of rows as words, 16 columns
      for (int64_t pair = 0; pair < 16; ++pair) {
        halves part[2] = {};
        for (int64_t odd = 0; odd < 2; ++odd) {
          const int64_t row = t + 2 * pair + odd;
          if (row < count && columns == 16) {
            part[odd] = load<halves>(rows + row * row_stride + v);
          } else if (row < count) {
            std::memcpy(&part[odd], rows + row * row_stride + v, columns * sizeof(bf16_bits));
          }
        }
        block[pair] = __builtin_convertvector(part[0], words) | (__builtin_convertvector(part[1], words) << 16);
      }
      transpose(block);
      for (int64_t i = 0; i < columns; ++i) {
        store(out + (v + i) * out_stride + t, block[i]);
      }
    }
  }
}

template <bool capped>
UNLEARN_INLINE floats logits(floats product, floats bias, const Head& head) {
  floats z = (product + bias) * head.scale;
  if constexpr (capped) {
    z = tanh(z / head.softcap) * head.softcap;
  }
  return z;
}

template <bool capped>
UNLEARN_INLINE floats slope(floats z, const Head& head) {
  const floats ratio = z / head.softcap;
  return 1.0f - ratio * ratio;
}

// 16 tokens against all columns of a tile. Lanes are tokens: sums need no reduction across lanes.
template <bool capped, bool store_e, bool has_target>
UNLEARN_INLINE void exp_block(
    const float* tile, int64_t first, int64_t num_v, int64_t count, const Head& head, floats offset, ints target,
    double* sums, bf16_bits* e, int64_t e_stride) {
  floats total = {};
  const auto term_and_e = [&](int64_t v, floats& term) __attribute__((always_inline)) {
    const floats bias = head.bias == nullptr ? floats{} : splat(head.bias[first + v]);
    const floats z = logits<capped>(load<floats>(tile + v * kBlockT), bias, head);
    term = exp(z - offset);
    if constexpr (has_target) {
      term = target == static_cast<int32_t>(first + v) ? floats{} : term;
    }
    if constexpr (capped) {
      return term * slope<capped>(z, head);
    } else {
      return term;
    }
  };
  for (int64_t v = 0; v < num_v; v += 32) {
    const int64_t columns = num_v - v < 32 ? num_v - v : 32;
    floats part = {};
    words pairs[16] = {};
    if (columns == 32) {
      for (int64_t pair = 0; pair < 16; ++pair) {
        floats low_term, high_term;
        const floats low = term_and_e(v + 2 * pair, low_term);
        const floats high = term_and_e(v + 2 * pair + 1, high_term);
        part += low_term + high_term;
        if constexpr (store_e) {
          pairs[pair] = bf16_pair(low, high);
        }
      }
    } else {
      for (int64_t i = 0; i < columns; ++i) {
        floats term;
        const floats value = term_and_e(v + i, term);
        part += term;
        if constexpr (store_e) {
          pairs[i / 2] |= to_bf16(value) << (i % 2 * 16);
        }
      }
    }
    total += part;
    if constexpr (store_e) {
      transpose(pairs);
      if (columns == 32 && count == kLanes) {
#pragma GCC unroll 16
        for (int64_t t = 0; t < kLanes; ++t) {
          store(e + t * e_stride + v, pairs[t]);
        }
      } else {
        for (int64_t t = 0; t < count; ++t) {
          std::memcpy(e + t * e_stride + v, &pairs[t], columns * sizeof(bf16_bits));
        }
      }
    }
  }
  for (int64_t t = 0; t < kLanes; ++t) {
    sums[t] += static_cast<double>(total[t]);
  }
}

void exp_tile(
    const float* tile, int64_t first, int64_t num_v, int64_t count, const Head& head, const float* offset,
    const int32_t* target, double* sums, bf16_bits* e, int64_t e_stride) {
  for (int64_t t = 0; t < count; t += kLanes) {
    const int64_t rows = count - t < kLanes ? count - t : kLanes;
    const floats m = load<floats>(offset + t);
    const ints y = load<ints>(target + t);
    const ints inside = (y >= static_cast<int32_t>(first)) & (y < static_cast<int32_t>(first + num_v));
    bool has_target = false;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      has_target |= inside[lane] != 0;
    }
    bf16_bits* to = e == nullptr ? nullptr : e + t * e_stride;
    const auto run = [&]<bool capped, bool store_e, bool target_here>() {
      exp_block<capped, store_e, target_here>(tile + t, first, num_v, rows, head, m, y, sums + t, to, e_stride);
    };
    const int kind = (head.softcap != 0.0f) * 4 + (e != nullptr) * 2 + has_target;
    switch (kind) {
      case 0: run.template operator()<false, false, false>(); break;
      case 1: run.template operator()<false, false, true>(); break;
      case 2: run.template operator()<false, true, false>(); break;
      case 3: run.template operator()<false, true, true>(); break;
      case 4: run.template operator()<true, false, false>(); break;
      case 5: run.template operator()<true, false, true>(); break;
      case 6: run.template operator()<true, true, false>(); break;
      default: run.template operator()<true, true, true>(); break;
    }
  }
}

template <bool capped>
double exp_one_row(float* z, int64_t first, int64_t num_v, const Head& head, float offset, int64_t target) {
  double sum = 0.0;
  for (int64_t v = 0; v < num_v; v += 512) {  // float32 sums of 32 terms a lane
    floats total = {};
    for (int64_t i = v; i < num_v && i < v + 512; i += kLanes) {
      const int64_t columns = num_v - i < kLanes ? num_v - i : kLanes;
      floats product = {}, bias = {};
      if (columns == kLanes) {
        product = load<floats>(z + i);
        if (head.bias != nullptr) {
          bias = load<floats>(head.bias + first + i);
        }
      } else {
        std::memcpy(&product, z + i, columns * sizeof(float));
        if (head.bias != nullptr) {
          std::memcpy(&bias, head.bias + first + i, columns * sizeof(float));
        }
      }
      const floats logit = logits<capped>(product, bias, head);
      floats term = exp(logit - offset);
      const int64_t at = target - first - i;
      for (int64_t lane = 0; lane < kLanes && at < kLanes && at >= 0; ++lane) {
        term[lane] = lane == at ? 0.0f : term[lane];
      }
      for (int64_t lane = columns; lane < kLanes; ++lane) {
        term[lane] = 0.0f;
      }
      total += term;
      const floats value = capped ? term * slope<true>(logit, head) : term;
      std::memcpy(z + i, &value, columns * sizeof(float));
    }
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      sum += static_cast<double>(total[lane]);
    }
  }
  return sum;
}

double exp_row(float* z, int64_t first, int64_t num_v, const Head& head, float offset, int64_t target) {
  const auto one = head.softcap != 0.0f ? exp_one_row<true> : exp_one_row<false>;
  return one(z, first, num_v, head, offset, target);
}

// The moments of 16 of a block's tokens, in registers.
struct State {
  floats maximum, target, base, mass, mean, variance;
  ints argmax;

  UNLEARN_INLINE State(const Moments& from, int64_t t)
      : maximum(load<floats>(from.maximum + t)),
        target(load<floats>(from.target + t)),
        base(load<floats>(from.base + t)),
        mass(load<floats>(from.mass + t)),
        mean(load<floats>(from.mean + t)),
        variance(load<floats>(from.variance + t)),
        argmax(load<ints>(from.argmax + t)) {}

  UNLEARN_INLINE void keep(Moments& to, int64_t t) const {
    store(to.maximum + t, maximum);
    store(to.target + t, target);
    store(to.base + t, base);
    store(to.mass + t, mass);
    store(to.mean + t, mean);
    store(to.variance + t, variance);
    store(to.argmax + t, argmax);
  }

  // Columns of `more` come after: on equal maxima the earlier one stays. Chan et al. 1979.
  UNLEARN_INLINE void merge(const State& more) {
    argmax = more.maximum > maximum ? more.argmax : argmax;
    maximum = more.maximum > maximum ? more.maximum : maximum;
    target = more.target == more.target ? more.target : target;
    const ints none = mass == 0.0f, no_more = more.mass == 0.0f;
    const floats larger = more.base > base ? more.base : base;
    const floats offset = none ? more.base : no_more ? base : larger;
    const floats here = none ? floats{} : mass * exp(base - offset);
    const floats there = no_more ? floats{} : more.mass * exp(more.base - offset);
    const floats total = here + there;
    // both by division: 1 - share is 0 for a part of 1e-8, whose distance squared may still count
    const floats share = total == 0.0f ? floats{} : there / total, own_share = total == 0.0f ? floats{} : here / total;
    const floats own_mean = mean + (base - offset), delta = more.mean + (more.base - offset) - own_mean;
    const floats used_mean = none ? more.mean + (more.base - offset) : own_mean + share * delta;
    const floats spread = none ? floats{} : share * own_share * delta * delta;
    variance = own_share * variance + share * more.variance + spread;
    mean = used_mean;
    mass = total;
    base = offset;
  }
};

template <bool capped>
UNLEARN_INLINE void stats_block(
    float* tile, int64_t first, int64_t num_v, const Head& head, ints target, Moments& moments, int64_t t) {
  State sum(moments, t), here = sum;
  here.maximum = splat(-__builtin_inff());
  here.target = splat(__builtin_nanf(""));
  here.argmax = ints{} + static_cast<int32_t>(first);
  floats rest = here.maximum;
  for (int64_t v = 0; v < num_v; ++v) {
    const floats bias = head.bias == nullptr ? floats{} : splat(head.bias[first + v]);
    const floats z = logits<capped>(load<floats>(tile + v * kBlockT), bias, head);
    store(tile + v * kBlockT, z);
    here.argmax = z > here.maximum ? ints{} + static_cast<int32_t>(first + v) : here.argmax;
    here.maximum = z > here.maximum ? z : here.maximum;
    const ints is_target = target == static_cast<int32_t>(first + v);
    here.target = is_target ? z : here.target;
    // the target may lie far above the rest, whose mass must not vanish for that
    rest = ~is_target & (z > rest) ? z : rest;
  }
  const floats infinity = splat(__builtin_inff());
  here.base = (rest < infinity) & (rest > -infinity) ? rest : floats{};
  here.mass = here.mean = here.variance = floats{};
  // -1e4 stands for -inf, a masked column: its probability is 0 all the same, and 0 times 1e4 is not NaN
  const auto column = [&](int64_t v, floats& x) __attribute__((always_inline)) {
    x = load<floats>(tile + v * kBlockT) - here.base;
    x = x < -1e4f ? splat(-1e4f) : x;
    // the target's may be NaN or infinite: it leaves no trace but its logit
    const ints is_target = target == static_cast<int32_t>(first + v);
    x = is_target ? floats{} : x;
    const floats term = exp(x);
    return is_target ? floats{} : term;
  };
  floats x;
  for (int64_t v = 0; v < num_v; ++v) {
    const floats term = column(v, x);
    here.mass += term;
    here.mean += term * x;
  }
  here.mean = here.mass == 0.0f ? floats{} : here.mean / here.mass;
  for (int64_t v = 0; v < num_v; ++v) {
    const floats term = column(v, x);
    here.variance += term * ((x - here.mean) * (x - here.mean));
  }
  here.variance = here.mass == 0.0f ? floats{} : here.variance / here.mass;
  sum.merge(here);
  sum.keep(moments, t);
}

void stats_tile(
    float* tile, int64_t first, int64_t num_v, int64_t count, const Head& head, const int32_t* target,
    Moments& moments) {
  for (int64_t t = 0; t < count; t += kLanes) {
    const ints y = load<ints>(target + t);
    if (head.softcap != 0.0f) {
      stats_block<true>(tile + t, first, num_v, head, y, moments, t);
    } else {
      stats_block<false>(tile + t, first, num_v, head, y, moments, t);
    }
  }
}

void merge_moments(Moments& sum, const Moments& more) {
  for (int64_t t = 0; t < kBlockT; t += kLanes) {
    State state(sum, t);
    state.merge(State(more, t));
    state.keep(sum, t);
  }
}

template <bool capped>
void logit_block(
    const float* tile, int64_t first, int64_t num_v, int64_t count, const Head& head, float* out, int64_t out_stride) {
  for (int64_t v = 0; v < num_v; v += 16) {
    const int64_t columns = num_v - v < 16 ? num_v - v : 16;
    words block[16] = {};
    for (int64_t i = 0; i < columns; ++i) {
      const floats bias = head.bias == nullptr ? floats{} : splat(head.bias[first + v + i]);
      block[i] = bits_of(logits<capped>(load<floats>(tile + (v + i) * kBlockT), bias, head));
    }
    transpose(block);
    for (int64_t t = 0; t < count; ++t) {
      if (columns == 16) {
        store(out + t * out_stride + v, block[t]);
      } else {
        std::memcpy(out + t * out_stride + v, &block[t], columns * sizeof(float));
      }
    }
  }
}

void logit_rows(
    const float* tile, int64_t first, int64_t num_v, int64_t count, const Head& head, float* out, int64_t out_stride) {
  const auto one = head.softcap != 0.0f ? logit_block<true> : logit_block<false>;
  for (int64_t t = 0; t < count; t += kLanes) {
    one(tile + t, first, num_v, count - t < kLanes ? count - t : kLanes, head, out + t * out_stride, out_stride);
  }
}

// 16 of a row's elements from i on, `beyond` past its end.
UNLEARN_INLINE floats load_part(const float* row, int64_t i, int64_t size, float beyond) {
  if (i + kLanes <= size) {
    return load<floats>(row + i);
  }
  floats x = splat(beyond);
  std::memcpy(&x, row + i, (size - i) * sizeof(float));
  return x;
}

UNLEARN_INLINE double sum_of(floats x) {
  double sum = 0.0;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    sum += static_cast<double>(x[lane]);
  }
  return sum;
}

// Subtracts the row's maximum; returns the log of sum exp of what is left.
double center(float* row, int64_t size) {
  floats top = splat(-__builtin_inff());
  for (int64_t i = 0; i < size; i += kLanes) {
    const floats x = load_part(row, i, size, -__builtin_inff());
    top = x > top ? x : top;
  }
  float maximum = top[0];
  for (int64_t lane = 1; lane < kLanes; ++lane) {
    maximum = top[lane] > maximum ? top[lane] : maximum;
  }
  double sum = 0.0;
  for (int64_t block = 0; block < size; block += 1024) {
    floats part = {};
    for (int64_t i = block; i < size && i < block + 1024; i += kLanes) {
      const floats x = load_part(row, i, size, -__builtin_inff()) - maximum;
      part += exp(x);
      std::memcpy(row + i, &x, (size - i < kLanes ? size - i : kLanes) * sizeof(float));
    }
    sum += sum_of(part);
  }
  return __builtin_log(sum);
}

// exp(x) - 1 where |x| < 0.5: its series, to float32's last bit or two.
UNLEARN_INLINE floats expm1_small(floats x) {
  floats p = x * 2.4801587e-5f + 1.9841270e-4f;
  p = p * x + 1.3888889e-3f;
  p = p * x + 8.3333333e-3f;
  p = p * x + 4.1666667e-2f;
  p = p * x + 1.6666667e-1f;
  p = p * x + 0.5f;
  return (p * x) * x + x;
}

UNLEARN_INLINE void store_floats(float* to, floats x);
UNLEARN_INLINE void store_floats(bf16_bits* to, floats x);

template <typename g_t>
double kl_with(float* p_row, float* q_row, int64_t vocab, float softcap, g_t* g) {
  // the slope needs the logits as they were: kept as z / cap, from the distance to the maximum and the maximum
  float p_top = -__builtin_inff();
  for (int64_t i = 0; i < vocab; ++i) {
    p_top = p_row[i] > p_top ? p_row[i] : p_top;
  }
  const float log_p = static_cast<float>(center(p_row, vocab)), log_q = static_cast<float>(center(q_row, vocab));
  double sum = 0.0;
  for (int64_t block = 0; block < vocab; block += 1024) {
    floats part = {};
    for (int64_t i = block; i < vocab && i < block + 1024; i += kLanes) {
      const floats x = load_part(p_row, i, vocab, -__builtin_inff()), y = load_part(q_row, i, vocab, -__builtin_inff());
      const floats p = exp(x - log_p), q = exp(y - log_q);
      // NaN for a column that both rule out (-inf - -inf), where p - q and q are 0 and u is not used
      const floats u = (x - log_p) - (y - log_q);
      // p - q cancels where they are close; exp(u) - 1 overflows where they are not
      const floats difference = (u < 0.5f) & (u > -0.5f) ? expm1_small(u) * q : p - q;
      const floats weighted = q == 0.0f ? floats{} : u * q;
      part += difference - weighted;
      if (g != nullptr) {
        floats value = difference;
        if (softcap != 0.0f) {
          const floats ratio = (x + p_top) / softcap;
          value *= 1.0f - ratio * ratio;
        }
        if (i + kLanes <= vocab) {
          store_floats(g + i, value);
        } else {
          g_t last[kLanes];
          store_floats(last, value);
          std::memcpy(g + i, last, (vocab - i) * sizeof(g_t));
        }
      }
    }
    sum += sum_of(part);
  }
  return sum;
}

double kl_row(float* p, float* q, int64_t vocab, float softcap, bf16_bits* g_bf16, float* g_float) {
  return g_float != nullptr ? kl_with(p, q, vocab, softcap, g_float) : kl_with(p, q, vocab, softcap, g_bf16);
}

UNLEARN_INLINE float to_float(float x) {
  return x;
}

UNLEARN_INLINE float to_float(bf16_bits x) {
  return from_bits(words{} + (static_cast<uint32_t>(x) << 16))[0];
}

UNLEARN_INLINE floats load_floats(const float* from) {
  return load<floats>(from);
}

UNLEARN_INLINE floats load_floats(const bf16_bits* from) {
  return from_bf16(load<halves>(from));
}

UNLEARN_INLINE void store_floats(float* to, floats x) {
  store(to, x);
}

UNLEARN_INLINE void store_floats(bf16_bits* to, floats x) {
  store(to, __builtin_convertvector(to_bf16(x), halves));
}

UNLEARN_INLINE void store_one(float* to, float x) {
  *to = x;
}

UNLEARN_INLINE void store_one(bf16_bits* to, float x) {
  *to = static_cast<bf16_bits>(to_bf16(splat(x))[0]);
}

template <typename out_t>
void combine_rows(
    const bf16_bits* x, float a, const float* y, float b, bool accumulate, int64_t width, out_t* out) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    floats value = y == nullptr ? floats{} : load<floats>(y + i) * b;
    if (x != nullptr) {
      value += load_floats(x + i) * a;
    }
    if (accumulate) {
      value += load_floats(out + i);
    }
    store_floats(out + i, value);
  }
  for (; i < width; ++i) {
    float value = y == nullptr ? 0.0f : y[i] * b;
    if (x != nullptr) {
      value += to_float(x[i]) * a;
    }
    if (accumulate) {
      value += to_float(out[i]);
    }
    store_one(out + i, value);
  }
}

}  // namespace

extern const Lanes table;
const Lanes table = {
    UNLEARN_ISA_NAME, pack_tokens, pack_rows, transpose_rows, exp_tile, exp_row, stats_tile, merge_moments, logit_rows,
    kl_row, combine_rows<float>, combine_rows<bf16_bits>,
};

}  // namespace unlearn_native::UNLEARN_ISA
