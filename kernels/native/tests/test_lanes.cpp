// The functions around the products (lanes.h), for every instruction set of this CPU, and target_dot
// (unlearn_native.h), against plain loops in float64.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>

#include "../unlearn_native.h"
#include "check.h"
#include "tables.h"

using namespace check;
using unlearn_native::Head;
using unlearn_native::kBlockT;
using unlearn_native::kPanel;
using unlearn_native::Lanes;
using unlearn_native::Moments;
using unlearn_native::Rows;

namespace {

constexpr int64_t kCounts[] = {1, 15, 16, 17, 63, 64};
constexpr int64_t kWidths[] = {1, 31, 32, 33, 64, 100};
constexpr int64_t kTileV[] = {1, 2, 31, 32, 33, 64, 100, 255, 256};
// Quiet and signalling, payloads in the low half alone, and those that a carry of rounding would turn into a number.
constexpr uint32_t kNanPatterns[] = {
    0x7fc00000, 0xffc00000, 0x7f800001, 0x7fffffff, 0xffff8000, 0xff800001, 0x7fbfffff};
constexpr int64_t kVocab[] = {1, 2, 15, 16, 17, 31, 32, 33, 255, 256, 257, 300, 511, 512, 513, 1023, 1024, 1025, 1100};

int64_t round_up(int64_t count, int64_t step) {
  return (count + step - 1) / step * step;
}

// Every pattern of bits, NaN and infinity too: what is only moved must arrive as it was.
void fill_bits(Grid<bf16_bits>& rows, Random& random) {
  for (int64_t i = 0; i < rows.rows; ++i) {
    for (int64_t j = 0; j < rows.columns; ++j) {
      rows[i][j] = static_cast<bf16_bits>(random.below(0xffbf));  // not the canary, 0xffff, nor what becomes it
    }
  }
}

// Where the second operand of a product has row k of column j: panels of 32 columns, in each pairs of rows side by
// side.
int64_t panel_at(int64_t depth, int64_t k, int64_t j) {
  return ((j / kPanel * (depth / 2) + k / 2) * kPanel + j % kPanel) * 2 + k % 2;
}

// exp(x) as documented, within `slack` of itself
bool is_exp(double got, double x, double slack) {
  if (at_edge(x)) {
    return got == 0.0 || std::isinf(got) || close(got, std::exp(x), slack * std::exp(x));
  }
  const double want = exp_of(x);
  return want == 0.0 ? got == 0.0 : close(got, want, slack * want);
}

}  // namespace

// -- dispatch ------------------------------------------------------------------------------------------------------

TEST(the_best_table_is_chosen) {
  CHECK(&unlearn_native::lanes() == tables().back(), unlearn_native::lanes().isa, tables().back()->isa);
#ifdef UNLEARN_X86
  const char* const names[] = {"generic", "avx2", "avx512"};
#else
  const char* const names[] = {"generic"};
#endif
  for (size_t i = 0; i < tables().size(); ++i) {
    CHECK(std::strcmp(tables()[i]->isa, names[i]) == 0, tables()[i]->isa, names[i]);
    std::printf("table: %s\n", tables()[i]->isa);
  }
}

// -- packing -------------------------------------------------------------------------------------------------------

TEST(pack_tokens) {
  Random random(1);
  int64_t number = 0;
  for (const Lanes* lane : tables()) {
    for (const int64_t count : kCounts) {
      for (const int64_t width : kWidths) {
        ++number;
        const int64_t stride = width + number % 4;
        about("%s: count %ld, width %ld, stride %ld", lane->isa, count, width, stride);
        Grid<bf16_bits> rows(count, width, stride, number % 2);
        fill_bits(rows, random);
        const int64_t depth = round_up(width, 32);
        Buffer<bf16_bits> out(depth * kBlockT, number % 3);
        lane->pack_tokens(rows.data(), stride, count, width, out.data());
        for (int64_t k = 0; k < depth; ++k) {
          for (int64_t t = 0; t < kBlockT; ++t) {
            const bf16_bits got = out[panel_at(depth, k, t)], want = t < count && k < width ? rows[t][k] : 0;
            CHECK(got == want, t, k, got, want);
          }
        }
      }
    }
  }
}

TEST(pack_rows) {
  Random random(2);
  int64_t number = 0;
  for (const Lanes* lane : tables()) {
    for (const int64_t count : {1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130}) {
      for (const int64_t width : kWidths) {
        ++number;
        const int64_t stride = width + number % 4, out_width = round_up(width, 32);
        const bool scaled = number % 5 > 1;
        about("%s: count %ld, width %ld, stride %ld, factor %d", lane->isa, count, width, stride, scaled);
        Grid<bf16_bits> rows(count, width, stride, number % 2);
        Buffer<float> factor(count, number % 2);
        fill_bits(rows, random);
        for (int64_t i = 0; i < count; ++i) {
          factor[i] = i % 7 == 3 ? -0.0f : random.uniform(-3.0f, 3.0f);
        }
        const int64_t depth = round_up(count, 32);
        Buffer<bf16_bits> out(depth * out_width, number % 3);
        lane->pack_rows(rows.data(), stride, scaled ? factor.data() : nullptr, count, width, out.data());
        for (int64_t i = 0; i < depth; ++i) {
          for (int64_t j = 0; j < out_width; ++j) {
            const bf16_bits got = out[panel_at(depth, i, j)];
            if (i >= count || j >= width) {
              CHECK(value(got) == 0.0f, i, j, got);
            } else if (!scaled) {
              CHECK(got == rows[i][j], i, j, got, rows[i][j]);
            } else {
              const float product = value(rows[i][j]) * factor[i];
              const bf16_bits want = bf16(product);
              const bool same = std::isnan(product) ? std::isnan(value(got)) : got == want;
              CHECK(same && !unwritten(got), i, j, got, want, product);
            }
          }
        }
      }
    }
  }
}

TEST(transpose) {
  Random random(3);
  int64_t number = 0;
  for (const Lanes* lane : tables()) {
    for (const int64_t count : {1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130}) {
      for (const int64_t width : {1, 2, 15, 16, 17, 31, 32, 33, 100}) {
        ++number;
        const int64_t stride = width + number % 4, depth = round_up(count, 32), out_stride = depth + number % 5;
        about("%s: count %ld, width %ld, stride %ld, out_stride %ld", lane->isa, count, width, stride, out_stride);
        Grid<bf16_bits> rows(count, width, stride, number % 2);
        fill_bits(rows, random);
        Grid<bf16_bits> out(width, depth, out_stride, number % 3);
        lane->transpose(rows.data(), stride, count, width, out.data(), out_stride);
        for (int64_t v = 0; v < width; ++v) {
          for (int64_t t = 0; t < depth; ++t) {
            const bf16_bits want = t < count ? rows[t][v] : 0;
            CHECK(out[v][t] == want, v, t, out[v][t], want);
          }
        }
        out.check_gaps();
      }
    }
  }
}

// -- exp -----------------------------------------------------------------------------------------------------------

namespace {

struct ExpCase {
  int64_t first, num_v, count;
  float scale = 1.0f, softcap = 0.0f;
  bool biased = false, with_e = true;
  float reach = 4.0f;   // products are in [-reach, reach]
  int64_t target = -1;  // of every token, relative to `first`; -1: varies
};

void check_exp_tile(const Lanes& lane, const ExpCase& of, Random& random) {
  about(
      "%s: first %ld, num_v %ld, count %ld, scale %g, softcap %g, bias %d, e %d, reach %g, target %ld", lane.isa,
      of.first, of.num_v, of.count, of.scale, of.softcap, of.biased, of.with_e, of.reach, of.target);
  const int64_t columns = of.first + of.num_v, stride = of.num_v + random.below(4), tail = random.below(2);
  Buffer<float> tile(of.num_v * kBlockT, tail), bias(columns, tail), offset(kBlockT, tail);
  Buffer<int32_t> target(kBlockT, tail);
  Buffer<double> sums(kBlockT, tail);
  Grid<bf16_bits> e(of.count, of.num_v, stride, tail);
  const Head head{of.biased ? bias.data() : nullptr, of.scale, of.softcap};
  for (int64_t v = 0; v < columns; ++v) {
    bias[v] = v < of.first ? kNan : random.uniform(-1.0f, 1.0f);
  }
  for (int64_t t = 0; t < of.count; ++t) {  // NaN beyond: other tokens' lanes must not mix with these
    offset[t] = random.uniform(-2.0f, 2.0f);
    sums[t] = 0.25 * static_cast<double>(t);
    const int64_t anywhere = of.target == -1 ? random.between(-2, of.num_v + 1) : of.target;
    target[t] = static_cast<int32_t>(of.first + anywhere);
    for (int64_t v = 0; v < of.num_v; ++v) {
      tile[v * kBlockT + t] = random.uniform(-of.reach, of.reach);
    }
  }
  lane.exp_tile(
      tile.data(), of.first, of.num_v, of.count, head, offset.data(), target.data(), sums.data(),
      of.with_e ? e.data() : nullptr, of.with_e ? stride : 0);
  for (int64_t t = 0; t < of.count; ++t) {
    double sum = 0.25 * static_cast<double>(t), slack = 0.0;
    for (int64_t v = 0; v < of.num_v; ++v) {
      const double z = logit(tile[v * kBlockT + t], head, of.first + v), x = z - offset[t];
      const bool excluded = target[t] == of.first + v;
      const double term = excluded || at_edge(x) ? 0.0 : exp_of(x), own = term_slack(z, offset[t], head, 0.0);
      sum += term;
      slack += at_edge(x) && !excluded ? (x > 0.0 ? static_cast<double>(kInf) : 1e-37) : term == 0.0 ? 0.0 : own * term;
      if (of.with_e) {
        const double got = value(e[t][v]), bent = slope(z, head), want = term * bent;
        if (excluded) {
          CHECK(got == 0.0, t, v, got);
        } else if (!at_edge(x)) {
          const double bend = of.softcap == 0.0f ? 0.0 : term * 2e-6 + 1e-38;
          const double allowed = term == 0.0 ? 0.0 : (kBf16 + own) * std::fabs(want) + bend;
          CHECK(std::isinf(term) || close(got, want, allowed), t, v, got, want, z, offset[t]);
          CHECK(!std::isinf(term) || of.softcap != 0.0f || got == kInf, t, v, got, z, offset[t]);
        }
      }
    }
    CHECK(std::isinf(slack) || close(sums[t], sum, slack + 4e-6 * (sum - 0.25 * t)), t, sums[t], sum, slack);
  }
  if (of.with_e) {
    e.check_gaps();
  }
}

}  // namespace

TEST(exp_tile) {
  Random random(4);
  int64_t number = 0;
  for (const Lanes* lane : tables()) {
    for (const int64_t num_v : kTileV) {
      for (const int64_t count : kCounts) {
        ++number;
        ExpCase of{number % 3 * 37, num_v, count};
        of.softcap = number % 4 == 1 ? 3.0f : number % 4 == 3 ? 30.0f : 0.0f;
        of.scale = number % 5 == 0 ? -0.37f : 1.0f;
        of.biased = number % 3 != 1;
        of.with_e = number % 7 > 2;
        check_exp_tile(*lane, of, random);
      }
    }
  }
}

TEST(exp_tile_targets_in_every_position) {
  Random random(5);
  for (const Lanes* lane : tables()) {
    for (const int64_t num_v : {1, 2, 33, 64}) {
      for (int64_t target = -1; target <= num_v; ++target) {
        ExpCase of{target % 2 * 5 + 7, num_v, 17};
        of.target = target == -1 ? -8 : target;  // before `first`, in the tile, right behind it
        of.softcap = target % 3 == 0 ? 10.0f : 0.0f;
        of.with_e = target % 4 != 1;
        check_exp_tile(*lane, of, random);
      }
    }
  }
}

TEST(exp_tile_extreme_logits) {
  Random random(6);
  for (const Lanes* lane : tables()) {
    for (const int64_t num_v : {1, 31, 64}) {
      for (const float softcap : {0.0f, 50.0f, 150.0f, 1e6f}) {
        ExpCase of{3, num_v, 33};
        of.reach = 200.0f;
        of.softcap = softcap;
        check_exp_tile(*lane, of, random);
        of.reach = 87.5f;  // mostly finite, mostly no zero
        check_exp_tile(*lane, of, random);
        of.reach = 1e-6f;
        check_exp_tile(*lane, of, random);
      }
    }
  }
}

TEST(exp_tile_not_a_number_and_infinity) {
  for (const Lanes* lane : tables()) {
    for (int64_t variant = 0; variant < 14; ++variant) {
      const float softcap = variant % 2 == 0 ? 0.0f : 5.0f;
      const uint32_t pattern = kNanPatterns[variant / 2];
      float nan_of_input;
      std::memcpy(&nan_of_input, &pattern, sizeof pattern);
      about("%s: softcap %g, NaN %x", lane->isa, softcap, pattern);
      constexpr int64_t num_v = 37, count = 20;
      Buffer<float> tile(num_v * kBlockT), offset(kBlockT), bias(num_v);
      Buffer<int32_t> target(kBlockT);
      Buffer<double> sums(kBlockT);
      Grid<bf16_bits> e(count, num_v, num_v + 1);
      tile.fill(0.0f);
      offset.fill(0.0f);
      bias.fill(0.0f);
      target.fill(-1);
      sums.fill(0.0);
      tile[5 * kBlockT + 3] = nan_of_input;    // token 3
      tile[36 * kBlockT + 17] = nan_of_input;  // token 17, last column
      tile[0 * kBlockT + 4] = kInf;
      tile[36 * kBlockT + 5] = -kInf;
      tile[7 * kBlockT + 6] = kNan;  // token 6, at its target: no part of the sum
      target[6] = 7;
      const Head head{bias.data(), 1.0f, softcap};
      lane->exp_tile(tile.data(), 0, num_v, count, head, offset.data(), target.data(), sums.data(), e.data(), e.stride);
      const double high = softcap == 0.0f ? kInf : std::exp(5.0), low = softcap == 0.0f ? 0.0 : std::exp(-5.0);
      for (int64_t t = 0; t < count; ++t) {
        const double want = t == 3 || t == 17 ? kNan
                            : t == 4          ? 36.0 + high
                            : t == 5          ? 36.0 + low
                            : t == 6          ? 36.0
                                              : 37.0;
        CHECK(close(sums[t], want, 1e-5 * std::fabs(want)), t, sums[t], want);
        for (int64_t v = 0; v < num_v; ++v) {
          if (t == 6 && v == 7) {
            continue;  // 0, or NaN by the softcap's slope
          }
          const bool nan = (t == 3 && v == 5) || (t == 17 && v == 36);
          const bool top = t == 4 && v == 0, bottom = t == 5 && v == 36;
          const double term = nan ? kNan : top ? (softcap == 0.0f ? kInf : 0.0f) : bottom ? 0.0f : 1.0f;
          CHECK(close(value(e[t][v]), term, 0.0) && !unwritten(e[t][v]), t, v, value(e[t][v]), term);
        }
      }
      // a bias is added to every token
      bias[36] = kNan;
      sums.fill(0.0);
      lane->exp_tile(tile.data(), 0, num_v, count, head, offset.data(), target.data(), sums.data(), nullptr, 0);
      for (int64_t t = 0; t < count; ++t) {
        CHECK(std::isnan(sums[t]), t, sums[t]);
      }
    }
  }
}

TEST(exp_row) {
  Random random(7);
  int64_t number = 0;
  for (const Lanes* lane : tables()) {
    for (const int64_t num_v : kVocab) {
      for (int64_t variant = 0; variant < 6; ++variant) {
        ++number;
        const int64_t first = number % 2 * 11, tail = number % 3;
        const float softcap = variant % 3 == 1 ? 4.0f : 0.0f, scale = variant == 5 ? 0.5f : 1.0f;
        const float reach = variant == 4 ? 200.0f : 5.0f;
        const bool biased = number % 4 != 0;
        // the first, the last, around a vector's edge, outside on either side
        const int64_t places[] = {first,     first + num_v - 1, first + std::min<int64_t>(num_v - 1, 16),
                                  first - 1, first + num_v,     random.between(first, first + num_v - 1)};
        const int64_t target = places[variant];
        about(
            "%s: first %ld, num_v %ld, target %ld, softcap %g, bias %d", lane->isa, first, num_v, target, softcap,
            biased);
        Buffer<float> z(num_v, tail), bias(first + num_v, tail);
        std::vector<float> product(num_v);
        for (int64_t v = 0; v < first + num_v; ++v) {
          bias[v] = v < first ? kNan : random.uniform(-1.0f, 1.0f);
        }
        for (int64_t v = 0; v < num_v; ++v) {
          z[v] = product[v] = random.uniform(-reach, reach);
        }
        const float offset = random.uniform(-1.0f, 1.0f);
        const Head head{biased ? bias.data() : nullptr, scale, softcap};
        const double got = lane->exp_row(z.data(), first, num_v, head, offset, target);
        double sum = 0.0, slack = 0.0;
        bool unsure = false;
        for (int64_t v = 0; v < num_v; ++v) {
          const double logit_v = logit(product[v], head, first + v), x = logit_v - offset;
          const double own = term_slack(logit_v, offset, head, 0.0);
          if (first + v == target) {
            CHECK(z[v] == 0.0f, v, z[v]);
            continue;
          }
          unsure |= at_edge(x);
          const double term = exp_of(x);
          sum += term;
          slack += term == 0.0 ? 0.0 : own * term;
          if (softcap == 0.0f) {
            CHECK(is_exp(z[v], x, own), v, z[v], term, x);
          } else {
            const double want = term * slope(logit_v, head);
            CHECK(close(z[v], want, own * want + term * 2e-6), v, z[v], want, x);
          }
        }
        CHECK(unsure || close(got, sum, slack + 4e-6 * sum), got, sum);
      }
    }
  }
}

TEST(exp_row_targets_in_every_position) {
  for (const Lanes* lane : tables()) {
    for (int64_t num_v = 1; num_v <= 35; ++num_v) {
      for (int64_t target = -18; target <= num_v + 18; ++target) {
        about("%s: num_v %ld, target %ld", lane->isa, num_v, target);
        Buffer<float> z(num_v, num_v % 2);
        z.fill(0.0f);
        const bool inside = target >= 0 && target < num_v;
        const double sum = lane->exp_row(z.data(), 100, num_v, Head{nullptr, 1.0f, 0.0f}, 0.0f, 100 + target);
        CHECK(sum == static_cast<double>(num_v - inside), sum);
        for (int64_t v = 0; v < num_v; ++v) {
          CHECK(z[v] == (v == target ? 0.0f : 1.0f), v, z[v]);
        }
      }
    }
  }
}

TEST(exp_over_its_whole_range) {
  for (const Lanes* lane : tables()) {
    about("%s", lane->isa);
    constexpr int64_t count = 40000;
    Buffer<float> z(count + 9);
    std::vector<float> x(count + 9);
    for (int64_t i = 0; i < count; ++i) {
      x[i] = -100.0f + 0.005f * static_cast<float>(i);
    }
    const float special[] = {kNan, -kNan, kInf, -kInf, 0.0f, -0.0f, 3e38f, -3e38f, 1e-40f};
    std::copy(special, special + 9, x.begin() + count);
    std::copy(x.begin(), x.end(), z.data());
    const double sum = lane->exp_row(z.data(), 0, count + 9, Head{nullptr, 1.0f, 0.0f}, 0.0f, -1);
    CHECK(std::isnan(sum), sum);
    double worst = 0.0;
    for (int64_t i = 0; i < count + 9; ++i) {
      CHECK(is_exp(z[i], x[i], 1.5e-7), i, x[i], z[i]);
      if (std::fabs(x[i]) < 86.0f) {
        worst = std::max(worst, std::fabs(z[i] / std::exp(static_cast<double>(x[i])) - 1.0));
      }
    }
    std::printf("exp, %s: within %.2g\n", lane->isa, worst);
  }
}

// -- stats ---------------------------------------------------------------------------------------------------------

namespace {

void check_moments(const Moments& got, int64_t t, const Stats& want, const std::vector<double>& z, const Head& head) {
  double slack = 1e-30;
  for (const double x : z) {
    slack = std::isfinite(x) ? std::max(slack, logit_slack(x, head, 0.0)) : slack;
  }
  CHECK(close(got.maximum[t], want.maximum, slack), t, got.maximum[t], want.maximum);
  CHECK(close(got.target[t], want.target, slack), t, got.target[t], want.target);
  const int64_t argmax = got.argmax[t];
  CHECK(argmax == want.argmax || z[argmax] >= want.maximum - 2 * slack, t, argmax, want.argmax);
  const double log_mass = got.base[t] + std::log(static_cast<double>(got.mass[t]));
  const double mean = static_cast<double>(got.base[t]) + got.mean[t];
  CHECK(close(log_mass, want.log_mass, slack + 4e-6), t, log_mass, want.log_mass);
  if (std::isfinite(want.log_mass)) {
    const double deviation = std::sqrt(want.variance);
    CHECK(close(mean, want.mean, slack + 2e-5 * want.spread + 1e-6), t, mean, want.mean);
    const double allowed = 4e-5 * want.variance + 2 * slack * deviation + slack * slack;
    CHECK(close(got.variance[t], want.variance, allowed), t, got.variance[t], want.variance, allowed);
  }
}

}  // namespace

TEST(stats_tile_and_merge_moments) {
  Random random(8);
  int64_t number = 0;
  for (const Lanes* lane : tables()) {
    for (const int64_t count : {1, 16, 17, 64}) {
      for (const int64_t vocab : {1, 2, 31, 32, 33, 255, 256, 257, 300}) {
        for (const float reach : {0.001f, 4.0f, 200.0f}) {
          ++number;
          const int64_t step = number % 4 == 0 ? 7 : number % 4 == 1 ? 256 : number % 4 == 2 ? 32 : 100;
          const float softcap = number % 3 == 1 ? 20.0f : 0.0f;
          const bool biased = number % 2 == 0;
          about(
              "%s: count %ld, vocab %ld, tiles of %ld, reach %g, softcap %g, bias %d", lane->isa, count, vocab, step,
              reach, softcap, biased);
          Buffer<float> bias(vocab);
          std::vector<double> z(vocab * kBlockT);
          Buffer<int32_t> target(kBlockT, number % 2);
          for (int64_t v = 0; v < vocab; ++v) {
            bias[v] = number % 5 == 0 && v % 3 == 1 ? -kInf : random.uniform(-1.0f, 1.0f);
          }
          for (int64_t t = 0; t < count; ++t) {
            target[t] = static_cast<int32_t>(t % 5 == 4 ? vocab : random.below(vocab));
          }
          const Head head{biased ? bias.data() : nullptr, number % 7 == 0 ? 0.25f : 1.0f, softcap};
          // one chain of tiles, and two chains merged, as two threads have it
          Buffer<Moments> moments(3);
          for (int64_t i = 0; i < 3; ++i) {
            moments[i].clear();
          }
          const int64_t half = vocab / step / 2 * step;
          for (int64_t first = 0; first < vocab; first += step) {
            const int64_t num_v = std::min(step, vocab - first);
            Buffer<float> tile(num_v * kBlockT), again(num_v * kBlockT, 1);
            for (int64_t v = 0; v < num_v; ++v) {
              for (int64_t t = 0; t < count; ++t) {
                const float x =
                    random.uniform(-reach, reach) + (first + v == target[t] && t % 3 == 0 ? 3 * reach : 0.0f);
                tile[v * kBlockT + t] = again[v * kBlockT + t] = x;
                z[t * vocab + first + v] = logit(x, head, first + v);
              }
            }
            lane->stats_tile(tile.data(), first, num_v, count, head, target.data(), moments[0]);
            lane->stats_tile(again.data(), first, num_v, count, head, target.data(), moments[first < half ? 1 : 2]);
          }
          lane->merge_moments(moments[1], moments[2]);
          for (int64_t t = 0; t < count; ++t) {
            const std::vector<double> row(z.begin() + t * vocab, z.begin() + (t + 1) * vocab);
            const Stats want = stats_of(row, target[t]);
            check_moments(moments[0], t, want, row, head);
            check_moments(moments[1], t, want, row, head);
          }
        }
      }
    }
  }
}

TEST(stats_equal_maxima_and_empty_masses) {
  for (const Lanes* lane : tables()) {
    about("%s", lane->isa);
    constexpr int64_t num_v = 33;
    const Head head{nullptr, 1.0f, 0.0f};
    Buffer<int32_t> target(kBlockT);
    Buffer<Moments> moments(2);
    moments[0].clear();
    moments[1].clear();
    for (int64_t t = 0; t < kBlockT; ++t) {
      target[t] = static_cast<int32_t>(t);
    }
    Buffer<float> tile(num_v * kBlockT);
    tile.fill(-3.0f);
    for (int64_t t = 0; t < kBlockT; ++t) {  // the maximum twice in the first tile, again in the second
      tile[t % 16 * kBlockT + t] = tile[(t % 16 + 9) * kBlockT + t] = 5.0f;
    }
    Buffer<float> more(num_v * kBlockT);
    more.fill(5.0f);
    lane->stats_tile(tile.data(), 0, num_v, kBlockT, head, target.data(), moments[0]);
    lane->stats_tile(more.data(), num_v, num_v, kBlockT, head, target.data(), moments[1]);
    lane->merge_moments(moments[0], moments[1]);
    for (int64_t t = 0; t < kBlockT; ++t) {
      CHECK(moments[0].argmax[t] == t % 16, t, moments[0].argmax[t]);
      CHECK(moments[0].maximum[t] == 5.0f, t, moments[0].maximum[t]);
      CHECK(moments[0].target[t] == (t < 16 || t >= num_v ? 5.0f : -3.0f), t, moments[0].target[t]);
    }
    // nothing but the target, and nothing but masked columns beside it
    Buffer<float> lonely(kBlockT), masked(3 * kBlockT);
    lonely.fill(2.0f);
    masked.fill(-kInf);
    target.fill(0);
    for (int64_t i = 0; i < 2; ++i) {
      moments[0].clear();
      lane->stats_tile(lonely.data(), 0, 1, kBlockT, head, target.data(), moments[0]);
      if (i == 1) {
        lane->stats_tile(masked.data(), 1, 3, kBlockT, head, target.data(), moments[0]);
      }
      for (int64_t t = 0; t < kBlockT; ++t) {
        CHECK(moments[0].mass[t] == 0.0f && moments[0].target[t] == 2.0f, i, t, moments[0].mass[t]);
        CHECK(moments[0].mean[t] == 0.0f && moments[0].variance[t] == 0.0f, i, t, moments[0].mean[t]);
      }
      lonely.fill(2.0f);  // a tile is overwritten
    }
  }
}

TEST(stats_not_a_number) {
  for (const Lanes* lane : tables()) {
    for (const bool merged : {false, true}) {
      about("%s, merged %d", lane->isa, merged);
      constexpr int64_t num_v = 5;
      const Head head{nullptr, 1.0f, 0.0f};
      Buffer<int32_t> target(kBlockT);
      target.fill(0);
      Buffer<Moments> moments(2);
      moments[0].clear();
      moments[1].clear();
      Buffer<float> tile(num_v * kBlockT), more(num_v * kBlockT);
      for (int64_t i = 0; i < num_v * kBlockT; ++i) {
        tile[i] = more[i] = static_cast<float>(i / kBlockT);
      }
      tile[3 * kBlockT + 18] = kNan;
      more[4 * kBlockT + 63] = kNan;
      tile[0 * kBlockT + 7] = kNan;  // the target: the rest stays
      lane->stats_tile(tile.data(), 0, num_v, kBlockT, head, target.data(), moments[0]);
      lane->stats_tile(more.data(), num_v, num_v, kBlockT, head, target.data(), moments[merged]);
      lane->merge_moments(moments[0], moments[1]);
      for (int64_t t = 0; t < kBlockT; ++t) {
        const bool nan = t == 18 || t == 63;
        CHECK(std::isnan(moments[0].mass[t]) == nan, t, moments[0].mass[t]);
        CHECK(std::isnan(moments[0].mean[t]) == nan, t, moments[0].mean[t]);
        CHECK(std::isnan(moments[0].variance[t]) == nan, t, moments[0].variance[t]);
        CHECK(std::isnan(moments[0].target[t]) == (t == 7), t, moments[0].target[t]);
      }
    }
  }
}

// -- logits --------------------------------------------------------------------------------------------------------

TEST(logit_rows) {
  Random random(9);
  int64_t number = 0;
  for (const Lanes* lane : tables()) {
    for (const int64_t num_v : kTileV) {
      for (const int64_t count : kCounts) {
        ++number;
        const int64_t first = number % 3 * 13, stride = num_v + number % 4;
        const float softcap = number % 3 == 2 ? 6.0f : 0.0f, scale = number % 5 == 1 ? -0.125f : 1.0f;
        const bool biased = number % 4 > 1;
        about(
            "%s: first %ld, num_v %ld, count %ld, stride %ld, scale %g, softcap %g, bias %d", lane->isa, first, num_v,
            count, stride, scale, softcap, biased);
        Buffer<float> tile(num_v * kBlockT, number % 2), bias(first + num_v);
        Grid<float> out(count, num_v, stride, number % 2);
        for (int64_t v = 0; v < first + num_v; ++v) {
          bias[v] = v < first ? kNan : static_cast<float>(random.between(-8, 8));
        }
        for (int64_t v = 0; v < num_v; ++v) {
          for (int64_t t = 0; t < count; ++t) {
            tile[v * kBlockT + t] = static_cast<float>(random.between(-50, 50));
          }
        }
        const Head head{biased ? bias.data() : nullptr, scale, softcap};
        lane->logit_rows(tile.data(), first, num_v, count, head, out.data(), stride);
        for (int64_t t = 0; t < count; ++t) {
          for (int64_t v = 0; v < num_v; ++v) {  // whole numbers: exact but for the softcap
            const double want = logit(tile[v * kBlockT + t], head, first + v);
            CHECK(close(out[t][v], want, softcap == 0.0f ? 0.0 : 1e-6 * std::fabs(want)), t, v, out[t][v], want);
          }
        }
        out.check_gaps();
      }
    }
  }
}

TEST(softcap_over_its_whole_range) {
  for (const Lanes* lane : tables()) {
    for (const float softcap : {1.0f, 30.0f, 1e6f}) {
      about("%s: softcap %g", lane->isa, softcap);
      constexpr int64_t num_v = 240;
      Buffer<float> tile(num_v * kBlockT);
      Grid<float> out(2, num_v, num_v);
      for (int64_t v = 0; v < num_v; ++v) {
        const float size = softcap * std::exp(-14.0f + 0.1f * static_cast<float>(v));
        tile[v * kBlockT] = v == 0 ? kNan : v == 1 ? kInf : size;
        tile[v * kBlockT + 1] = v == 0 ? 0.0f : v == 1 ? -kInf : -size;
      }
      const Head head{nullptr, 1.0f, softcap};
      lane->logit_rows(tile.data(), 0, num_v, 2, head, out.data(), num_v);
      double worst = 0.0;
      for (int64_t t = 0; t < 2; ++t) {
        for (int64_t v = 0; v < num_v; ++v) {
          const double want = logit(tile[v * kBlockT + t], head, v);
          CHECK(close(out[t][v], want, 6e-7 * std::fabs(want)), t, v, tile[v * kBlockT + t], out[t][v], want);
          worst = want == 0.0 || std::isnan(want) ? worst : std::max(worst, std::fabs(out[t][v] / want - 1.0));
        }
      }
      std::printf("softcap %g, %s: within %.2g\n", softcap, lane->isa, worst);
    }
  }
}

// -- KL ------------------------------------------------------------------------------------------------------------

namespace {

double log_sum_exp(const std::vector<float>& x) {
  const double top = *std::max_element(x.begin(), x.end());
  double sum = 0.0;
  for (const float each : x) {
    sum += std::exp(each - top);
  }
  return top + std::log(sum);
}

template <typename g_t>
void check_kl(
    const Lanes& lane, const std::vector<float>& p_logits, const std::vector<float>& q_logits, float softcap) {
  const int64_t vocab = static_cast<int64_t>(p_logits.size());
  constexpr bool with_g = !std::is_same_v<g_t, char>;
  using stored_t = std::conditional_t<with_g, g_t, float>;
  Buffer<float> p(vocab, vocab % 2), q(vocab, vocab % 3);
  Buffer<stored_t> g(vocab, vocab % 2);
  std::copy(p_logits.begin(), p_logits.end(), p.data());
  std::copy(q_logits.begin(), q_logits.end(), q.data());
  double got;
  if constexpr (std::is_same_v<g_t, bf16_bits>) {
    got = lane.kl_row(p.data(), q.data(), vocab, softcap, g.data(), nullptr);
  } else {
    got =
        lane.kl_row(p.data(), q.data(), vocab, softcap, nullptr, with_g ? reinterpret_cast<float*>(g.data()) : nullptr);
  }
  const double log_p = log_sum_exp(p_logits), log_q = log_sum_exp(q_logits);
  const float top = *std::max_element(p_logits.begin(), p_logits.end());
  double kl = 0.0, slack = 1e-14;
  for (int64_t v = 0; v < vocab; ++v) {
    const double x = p_logits[v] - log_p, y = q_logits[v] - log_q;
    const double p_v = std::exp(x), q_v = std::exp(y), u = x - y;
    const bool neither = p_logits[v] == -kInf && q_logits[v] == -kInf;
    const double q_u = neither || q_v < 1e-38 ? 0.0 : q_v * u;  // the kernel's exp is 0 there
    kl -= q_u;
    // in float32: the distance to the maximum, then to the normalizer
    const double size = (std::isfinite(x) ? std::fabs(x) : 0.0) + (std::isfinite(y) ? std::fabs(y) : 0.0);
    const double u_slack = 3 * kEps * (size + std::fabs(log_p - top) + 16.0);
    const double difference = p_v - q_v, both = std::fabs(u) < 0.45 ? std::fabs(difference) : p_v + q_v;
    slack += std::isfinite(q_u) ? both * u_slack + 4e-7 * (std::fabs(difference) + std::fabs(q_u)) : 0.0;
    if constexpr (with_g) {
      const double ratio = softcap == 0.0f ? 0.0 : static_cast<double>(p_logits[v]) / softcap,
                   want = difference * (1.0 - ratio * ratio);
      double allowed = std::max(p_v, q_v) * u_slack + 4e-7 * (std::fabs(u) < 0.45 ? std::fabs(difference) : p_v + q_v);
      allowed += softcap == 0.0f ? 0.0 : std::fabs(difference) * (1e-6 + 8 * kEps * (size + std::fabs(top)) / softcap);
      allowed += std::is_same_v<stored_t, bf16_bits> ? kBf16 * std::fabs(want) : 0.0;
      CHECK(close(value(g[v]), want, allowed + 1e-37), v, value(g[v]), want, p_logits[v], q_logits[v]);
    }
  }
  CHECK(close(got, kl, slack), got, kl, slack);
  CHECK(got >= -1e-12, got);
  if constexpr (!with_g) {
    CHECK(Buffer<stored_t>::untouched(g.data(), vocab * sizeof(stored_t)), "g is not wanted");
  }
}

}  // namespace

TEST(kl_row) {
  Random random(10);
  for (const Lanes* lane : tables()) {
    for (const int64_t vocab : kVocab) {
      for (const float distance : {0.0f, 0.01f, 0.4f, 3.0f, 200.0f}) {
        std::vector<float> p(vocab), q(vocab);
        const float shift = random.uniform(-3.0f, 3.0f);  // of one alone: the same distribution
        for (int64_t v = 0; v < vocab; ++v) {
          p[v] = random.uniform(-6.0f, 6.0f);
          q[v] = p[v] + random.uniform(-distance, distance) + shift;
        }
        about("%s: vocab %ld, distance %g", lane->isa, vocab, distance);
        check_kl<float>(*lane, p, q, 0.0f);
        check_kl<bf16_bits>(*lane, p, q, 0.0f);
        check_kl<char>(*lane, p, q, 0.0f);
        about("%s: vocab %ld, distance %g, softcap", lane->isa, vocab, distance);
        check_kl<float>(*lane, p, q, 7.0f);
        check_kl<bf16_bits>(*lane, p, q, 6.5f);
      }
    }
  }
}

TEST(kl_row_masked_columns) {
  Random random(11);
  for (const Lanes* lane : tables()) {
    for (const int64_t vocab : {2, 16, 17, 33, 300, 1030}) {
      std::vector<float> p(vocab), q(vocab);
      for (int64_t v = 0; v < vocab; ++v) {
        p[v] = random.uniform(-6.0f, 6.0f);
        q[v] = random.uniform(-6.0f, 6.0f);
      }
      const int64_t at = vocab - 1;
      about("%s: vocab %ld, masked in both", lane->isa, vocab);
      p[at] = q[at] = -kInf;
      check_kl<float>(*lane, p, q, 0.0f);
      check_kl<bf16_bits>(*lane, p, q, 0.0f);
      about("%s: vocab %ld, masked in q: adds nothing", lane->isa, vocab);
      p[at] = 0.5f;
      check_kl<float>(*lane, p, q, 0.0f);
      about("%s: vocab %ld, masked in p: infinite", lane->isa, vocab);
      p[at] = -kInf;
      q[at] = 0.5f;
      check_kl<float>(*lane, p, q, 0.0f);
      check_kl<char>(*lane, p, q, 0.0f);
    }
  }
}

TEST(kl_row_not_a_number) {
  for (const Lanes* lane : tables()) {
    for (const int64_t vocab : {1, 16, 33, 1100}) {
      for (const int64_t at : {int64_t{0}, vocab / 2, vocab - 1}) {
        for (const int64_t which : {0, 1, 2}) {  // NaN in p, in q, infinity in p
          about("%s: vocab %ld, at %ld, which %ld", lane->isa, vocab, at, which);
          Buffer<float> p(vocab), q(vocab), g(vocab);
          p.fill(0.25f);
          q.fill(0.5f);
          (which == 1 ? q : p)[at] = which == 2 ? kInf : kNan;
          const double got = lane->kl_row(p.data(), q.data(), vocab, 0.0f, nullptr, g.data());
          CHECK(std::isnan(got), got);
          for (int64_t v = 0; v < vocab; ++v) {  // through the normalizer
            CHECK(std::isnan(g[v]) && !unwritten(g[v]), v, g[v]);
          }
        }
      }
    }
  }
}

// -- combine -------------------------------------------------------------------------------------------------------

namespace {

template <typename out_t>
void combine(
    const Lanes& lane, const bf16_bits* x, float a, const float* y, float b, bool accumulate, int64_t width,
    out_t* out) {
  if constexpr (std::is_same_v<out_t, float>) {
    lane.combine(x, a, y, b, accumulate, width, out);
  } else {
    lane.combine_bf16(x, a, y, b, accumulate, width, out);
  }
}

template <typename out_t>
void check_combine(
    const Lanes& lane, int64_t width, bool with_x, bool with_y, bool accumulate, bool whole, Random& random) {
  about(
      "%s: out of %ld bytes, width %ld, x %d, y %d, accumulate %d, whole %d", lane.isa,
      static_cast<int64_t>(sizeof(out_t)), width, with_x, with_y, accumulate, whole);
  const int64_t tail = random.below(2);
  Buffer<bf16_bits> x(width, random.below(2));
  Buffer<float> y(width, tail);
  Buffer<out_t> out(width, tail);
  std::vector<double> before(width, 0.0);
  for (int64_t i = 0; i < width; ++i) {
    x[i] = bf16(whole ? static_cast<double>(random.between(-100, 100)) : random.uniform(-2.0f, 2.0f));
    y[i] = whole ? static_cast<float>(random.between(-600, 600)) : random.uniform(-2.0f, 2.0f);
    if (accumulate) {
      out[i] = to_out(whole ? static_cast<double>(random.between(-100, 100)) : random.uniform(-2.0f, 2.0f), out_t{});
      before[i] = value(out[i]);
    }
  }
  const float a = !with_x ? kNan : whole ? 3.0f : random.uniform(-2.0f, 2.0f);
  const float b = !with_y ? kNan : whole ? -1.0f : random.uniform(-2.0f, 2.0f);
  combine(lane, with_x ? x.data() : nullptr, a, with_y ? y.data() : nullptr, b, accumulate, width, out.data());
  for (int64_t i = 0; i < width; ++i) {
    const double of_x = with_x ? static_cast<double>(value(x[i])) * a : 0.0;
    const double of_y = with_y ? static_cast<double>(y[i]) * b : 0.0, want = of_x + of_y + before[i];
    if (whole) {  // exact, so rounded once, to nearest even: ties are among these
      CHECK(value(out[i]) == value(to_out(want, out_t{})), i, value(out[i]), want);
    } else {
      const double slack = 4 * kEps * (std::fabs(of_x) + std::fabs(of_y) + std::fabs(before[i]));
      CHECK(
          close(value(out[i]), want, slack + (sizeof(out_t) == 2 ? kBf16 * std::fabs(want) : 0.0)), i, value(out[i]),
          want);
    }
  }
}

}  // namespace

TEST(combine) {
  Random random(12);
  for (const Lanes* lane : tables()) {
    for (const int64_t width : {1, 2, 15, 16, 17, 31, 32, 33, 64, 100}) {
      for (int64_t variant = 0; variant < 16; ++variant) {
        const bool with_x = variant & 1, with_y = variant & 2, accumulate = variant & 4, whole = variant & 8;
        check_combine<float>(*lane, width, with_x, with_y, accumulate, whole, random);
        check_combine<bf16_bits>(*lane, width, with_x, with_y, accumulate, whole, random);
      }
    }
  }
}

TEST(combine_rounds_to_nearest_even) {
  const struct {
    float from;
    bf16_bits to;
  } cases[] = {
      {1.0f, 0x3f80},          {1.00390625f, 0x3f80},  // half way between 1 and the next: to 1, even
      {1.01171875f, 0x3f82},                           // half way between 1.0078125 and 1.015625: up, to even
      {1.00390637f, 0x3f81},                           // a bit more than half
      {1.01171863f, 0x3f81},                           // a bit less
      {-1.00390625f, 0xbf80},  {-1.01171875f, 0xbf82}, {257.0f, 0x4380},     {259.0f, 0x4382},
      {0.0f, 0x0000},          {-0.0f, 0x8000},        {1.9999999f, 0x4000},  // into the next power of two
      {3.4e38f, 0x7f80},                                                      // beyond the largest: infinity
      {3.3895314e38f, 0x7f7f},                                                // the largest
      {kInf, 0x7f80},          {-kInf, 0xff80},
  };
  constexpr int64_t count = sizeof cases / sizeof *cases;
  for (const Lanes* lane : tables()) {
    for (const int64_t shift : {0, 5}) {  // in the vectors and in what is left over
      about("%s, shift %ld", lane->isa, shift);
      Buffer<float> y(count + shift);
      Buffer<bf16_bits> out(count + shift);
      for (int64_t i = 0; i < count + shift; ++i) {
        y[i] = cases[(i + shift) % count].from;
      }
      lane->combine_bf16(nullptr, 0.0f, y.data(), 1.0f, false, count + shift, out.data());
      for (int64_t i = 0; i < count + shift; ++i) {
        const bf16_bits want = cases[(i + shift) % count].to;
        CHECK(out[i] == want, i, y[i], out[i], want);
      }
    }
  }
}

TEST(combine_not_a_number_and_infinity) {
  for (const Lanes* lane : tables()) {
    about("%s", lane->isa);
    for (const int64_t at : {0, 9, 15, 16, 20}) {
      for (const uint32_t pattern : kNanPatterns) {
        constexpr int64_t width = 21;
        Buffer<float> y(width), out(width);
        Buffer<bf16_bits> x(width), out_bf16(width);
        y.fill(1.0f);
        x.fill(bf16(1.0));
        std::memcpy(&y[at], &pattern, sizeof pattern);
        lane->combine(x.data(), 2.0f, y.data(), 1.0f, false, width, out.data());
        lane->combine_bf16(x.data(), 2.0f, y.data(), 1.0f, false, width, out_bf16.data());
        for (int64_t i = 0; i < width; ++i) {
          CHECK(i == at ? std::isnan(out[i]) : out[i] == 3.0f, i, at, out[i]);
          CHECK(i == at ? std::isnan(value(out_bf16[i])) : value(out_bf16[i]) == 3.0f, i, at, value(out_bf16[i]));
        }
        y[at] = 1.0f;
        x[at] = 0xff80;  // -infinity
        out[at] = kNan;
        lane->combine(x.data(), 2.0f, y.data(), 1.0f, false, width, out.data());
        CHECK(out[at] == -kInf, at, out[at]);
        out_bf16.fill(bf16(5.0));
        out_bf16[at] = 0x7fc1;  // NaN in what is added to stays
        lane->combine_bf16(nullptr, 0.0f, y.data(), 1.0f, true, width, out_bf16.data());
        for (int64_t i = 0; i < width; ++i) {
          CHECK(i == at ? std::isnan(value(out_bf16[i])) : value(out_bf16[i]) == 6.0f, i, at, value(out_bf16[i]));
        }
      }
    }
  }
}

// -- one table against another -------------------------------------------------------------------------------------

TEST(tables_agree) {
  const auto near = [](double a, double b, double slack) {
    return close(a, b, slack * std::max(std::fabs(a), std::fabs(b)) + 1e-30);
  };
  constexpr int64_t num_v = 203, count = 47;
  for (const float softcap : {0.0f, 12.0f}) {
    std::vector<double> all_sums[3];
    std::vector<float> all_e[3], rows[3], logits[3], kl_g[3], combined[3];
    std::vector<Moments> all_moments(3);
    double row_sums[3], kl[3];
    for (size_t i = 0; i < tables().size(); ++i) {
      const Lanes& lane = *tables()[i];
      Random random(13);  // the same for each
      Buffer<float> tile(num_v * kBlockT), bias(num_v), offset(kBlockT), row(num_v), p(num_v), q(num_v), g(num_v),
          y(num_v);
      Buffer<int32_t> target(kBlockT);
      Buffer<double> sums(kBlockT);
      Grid<bf16_bits> e(count, num_v, num_v);
      Grid<float> out(count, num_v, num_v);
      Buffer<bf16_bits> x(num_v);
      for (int64_t v = 0; v < num_v; ++v) {
        bias[v] = random.uniform(-1.0f, 1.0f);
        row[v] = random.uniform(-30.0f, 30.0f);
        p[v] = random.uniform(-8.0f, 8.0f);
        q[v] = p[v] + random.uniform(-1.0f, 1.0f);
        y[v] = random.uniform(-1.0f, 1.0f);
        x[v] = bf16(random.uniform(-1.0f, 1.0f));
        for (int64_t t = 0; t < kBlockT; ++t) {
          tile[v * kBlockT + t] = random.uniform(-10.0f, 10.0f);
        }
      }
      for (int64_t t = 0; t < kBlockT; ++t) {
        offset[t] = random.uniform(-5.0f, 5.0f);
        target[t] = static_cast<int32_t>(random.below(num_v));
        sums[t] = 0.0;
      }
      const Head head{bias.data(), 0.7f, softcap};
      lane.exp_tile(tile.data(), 0, num_v, count, head, offset.data(), target.data(), sums.data(), e.data(), num_v);
      lane.logit_rows(tile.data(), 0, num_v, count, head, out.data(), num_v);
      row_sums[i] = lane.exp_row(row.data(), 0, num_v, head, 0.5f, 77);
      kl[i] = lane.kl_row(p.data(), q.data(), num_v, softcap, nullptr, g.data());
      lane.combine(x.data(), 0.3f, y.data(), -1.7f, true, num_v, tile.data() + 1);
      for (int64_t t = 0; t < count; ++t) {
        all_sums[i].push_back(sums[t]);
        for (int64_t v = 0; v < num_v; ++v) {
          all_e[i].push_back(value(e[t][v]));
          logits[i].push_back(out[t][v]);
        }
      }
      for (int64_t v = 0; v < num_v; ++v) {
        rows[i].push_back(row[v]);
        kl_g[i].push_back(g[v]);
        combined[i].push_back(tile[1 + v]);
      }
      all_moments[i].clear();
      lane.stats_tile(tile.data(), 0, num_v, count, head, target.data(), all_moments[i]);
    }
    for (size_t i = 1; i < tables().size(); ++i) {
      about("%s against %s, softcap %g", tables()[i]->isa, tables()[0]->isa, softcap);
      CHECK(near(row_sums[i], row_sums[0], 1e-6), row_sums[i], row_sums[0]);
      CHECK(near(kl[i], kl[0], 1e-5), kl[i], kl[0]);
      for (size_t j = 0; j < all_e[0].size(); ++j) {
        CHECK(near(all_e[i][j], all_e[0][j], 0.008), j, all_e[i][j], all_e[0][j]);  // a last bit of bf16
        CHECK(near(logits[i][j], logits[0][j], 6e-7), j, logits[i][j], logits[0][j]);
      }
      for (int64_t v = 0; v < num_v; ++v) {
        CHECK(near(rows[i][v], rows[0][v], 2e-5), v, rows[i][v], rows[0][v]);
        CHECK(std::fabs(kl_g[i][v] - kl_g[0][v]) <= 1e-6f, v, kl_g[i][v], kl_g[0][v]);
        CHECK(std::fabs(combined[i][v] - combined[0][v]) <= 1e-6f, v, combined[i][v], combined[0][v]);
      }
      for (int64_t t = 0; t < count; ++t) {
        const Moments &a = all_moments[i], &b = all_moments[0];
        CHECK(near(all_sums[i][t], all_sums[0][t], 4e-6), t, all_sums[i][t], all_sums[0][t]);
        CHECK(a.argmax[t] == b.argmax[t] && near(a.maximum[t], b.maximum[t], 6e-7), t, a.argmax[t], b.argmax[t]);
        CHECK(near(a.base[t], b.base[t], 6e-7) && near(a.mass[t], b.mass[t], 1e-5), t, a.mass[t], b.mass[t]);
        CHECK(near(a.mean[t], b.mean[t], 1e-5) && near(a.variance[t], b.variance[t], 1e-5), t, a.mean[t], b.mean[t]);
      }
    }
  }
}

// -- target_dot ----------------------------------------------------------------------------------------------------

namespace {

template <typename hidden_t, typename weight_t>
void check_target_dot(const char* name, Random& random) {
  int64_t number = 0;
  for (const int64_t num_rows : {1, 15, 16, 17, 65}) {
    for (const int64_t width : {1, 15, 16, 17, 31, 32, 33, 100}) {
      ++number;
      constexpr int64_t vocab = 11;
      about("%s: rows %ld, width %ld", name, num_rows, width);
      Grid<hidden_t> hidden(num_rows, width, width + number % 3, number % 2);
      Grid<weight_t> weight(vocab, width, width + number % 4, number % 2);
      Buffer<int64_t> target(num_rows);
      Buffer<float> out(num_rows, number % 2);
      for (int64_t i = 0; i < num_rows * width; ++i) {
        hidden[i / width][i % width] = static_cast<hidden_t>(random.uniform(-2.0f, 2.0f));
      }
      for (int64_t i = 0; i < vocab * width; ++i) {
        weight[i / width][i % width] = static_cast<weight_t>(random.uniform(-2.0f, 2.0f));
      }
      for (int64_t t = 0; t < num_rows; ++t) {
        target[t] = t % 2 == 0 ? random.below(vocab) : vocab - 1;
      }
      if (num_rows > 15) {
        hidden[3][width - 1] = static_cast<hidden_t>(kNan);
        target[3] = 0;
        hidden[4][0] = static_cast<hidden_t>(kInf);
      }
      const int64_t begin = num_rows / 5, end = num_rows - num_rows / 7;
      unlearn_native::target_dot<hidden_t, weight_t>(
          Rows<hidden_t>{hidden.data(), hidden.stride}, Rows<weight_t>{weight.data(), weight.stride}, target.data(),
          out.data(), begin, end, width);
      for (int64_t t = 0; t < num_rows; ++t) {
        if (t < begin || t >= end) {
          CHECK(unwritten(out[t]), t, out[t]);
          continue;
        }
        double want = 0.0, size = 0.0;
        for (int64_t k = 0; k < width; ++k) {
          const double product = static_cast<double>(static_cast<float>(hidden[t][k])) *
                                 static_cast<double>(static_cast<float>(weight[target[t]][k]));
          want += product;
          size += std::fabs(product);
        }
        CHECK(close(out[t], want, static_cast<double>(width + 1) * 2 * kEps * size), t, out[t], want);
      }
    }
  }
}

}  // namespace

TEST(target_dot) {
  Random random(14);
  check_target_dot<float, float>("float, float", random);
  check_target_dot<c10::BFloat16, c10::BFloat16>("bf16, bf16", random);
  check_target_dot<c10::Half, c10::Half>("half, half", random);
  check_target_dot<c10::BFloat16, float>("bf16, float", random);
  check_target_dot<c10::Half, float>("half, float", random);
}

int main(int argc, char** argv) {
  return check::main_of(argc, argv);
}
