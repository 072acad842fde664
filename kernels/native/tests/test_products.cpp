// The products (products.h) against plain loops in float64, with one, two and three threads and every table of
// lanes.cpp.
#include <ATen/Parallel.h>

#include <algorithm>
#include <iterator>
#include <memory>

#include "../products.h"
#include "check.h"
#include "tables.h"
#if __has_include("../amx.h")
#include "../amx.h"
#define TEST_AMX
#endif

using namespace check;
using unlearn_native::Head;
using unlearn_native::Lanes;
using unlearn_native::LowRank;
using unlearn_native::Matrix;

namespace {

const Lanes* chosen = tables().back();

}  // namespace

// In place of dispatch.cpp, which test_lanes has.
const Lanes& unlearn_native::lanes() {
  return *chosen;
}

namespace {

constexpr int64_t kRows[] = {1, 15, 16, 17, 63, 64, 65, 130};
constexpr int64_t kWidths[] = {1, 31, 32, 33, 64, 100};
constexpr int64_t kVocab[] = {1, 2, 31, 32, 33, 255, 256, 257, 300};

// Exactly the bytes asked for, starting wherever.
class Scratch {
 public:
  Scratch(int64_t bytes, int64_t number) : memory_(bytes, number % 3 == 0 ? 0 : number % 3 == 1 ? 1 : 37) {}

  void* data() { return memory_.data(); }
  int64_t size() const { return memory_.size(); }

 private:
  Buffer<char> memory_;
};

// A bf16 matrix and the same numbers as float32, contiguous, for the loops here.
struct Operand {
  Grid<bf16_bits> stored;
  std::vector<float> plain;

  Operand(int64_t rows, int64_t columns, int64_t number)
      : stored(rows, columns, columns + number % 4, number / 4 % 2), plain(rows * columns) {}

  void set(int64_t row, int64_t column, float x) {
    stored[row][column] = bf16(x);
    plain[row * stored.columns + column] = value(stored[row][column]);
  }

  // Whole numbers up to `size`, of which sums of products are exact; or any.
  void fill(Random& random, bool whole, float size) {
    for (int64_t row = 0; row < stored.rows; ++row) {
      for (int64_t column = 0; column < stored.columns; ++column) {
        const int64_t limit = static_cast<int64_t>(size);
        set(row, column, whole ? static_cast<float>(random.between(-limit, limit)) : random.uniform(-size, size));
      }
    }
  }

  const float* row(int64_t i) const { return plain.data() + i * stored.columns; }
  Matrix matrix() { return {stored.data(), stored.rows, stored.columns, stored.stride}; }
};

struct Sizes {
  int64_t rows, width, vocab, rank = 0;
};

struct Options {
  int64_t number = 0;  // varies strides, alignment, targets
  int threads = 1;
  bool whole = true, biased = false, b_bf16 = true;
  float scale = 1.0f, softcap = 0.0f;
};

// A head and its logits in float64.
struct Problem {
  Sizes sizes;
  Options options;
  Operand hidden, weight;
  Buffer<float> low_hidden, bias;
  Operand b_bf16;
  Grid<float> b_float;
  Buffer<int64_t> target;
  Buffer<float> offset;
  Head head;
  std::vector<double> z, slack;  // [rows, vocab]

  Problem(const Sizes& s, const Options& o)
      : sizes(s),
        options(o),
        hidden(s.rows, s.width, o.number),
        weight(s.vocab, s.width, o.number / 3),
        low_hidden(s.rows * s.rank, o.number % 2),
        bias(s.vocab, o.number % 2),
        b_bf16(s.vocab, s.rank, o.number / 2),
        b_float(s.vocab, s.rank, s.rank + o.number % 3, o.number % 2),
        target(s.rows, o.number % 2),
        offset(s.rows, o.number % 2),
        head{o.biased ? bias.data() : nullptr, o.scale, o.softcap},
        z(s.rows * s.vocab),
        slack(s.rows * s.vocab) {
    Random random(static_cast<uint64_t>(o.number) + 100);
    hidden.fill(random, o.whole, 4.0f);
    weight.fill(random, o.whole, 4.0f);
    b_bf16.fill(random, o.whole, 3.0f);
    const auto number = [&](float size) {
      return o.whole ? static_cast<float>(random.between(-3, 3)) : random.uniform(-size, size);
    };
    for (int64_t i = 0; i < low_hidden.size(); ++i) {
      low_hidden[i] = number(3.0f);
    }
    for (int64_t v = 0; v < s.vocab; ++v) {
      bias[v] = number(3.0f);
      for (int64_t r = 0; r < s.rank; ++r) {
        b_float[v][r] = o.b_bf16 ? b_bf16.row(v)[r] : number(3.0f);
      }
    }
    for (int64_t t = 0; t < s.rows; ++t) {
      // in the columns, right outside, far outside
      target[t] = t % 8 == 5   ? -1
                  : t % 8 == 6 ? s.vocab
                  : t % 8 == 7 ? (t % 16 == 7 ? -100 : (int64_t{1} << 32) + 1)  // 1 in 32 bits
                  : t % 8 == 0 ? s.vocab - 1
                               : random.below(s.vocab);
      offset[t] = random.uniform(-1.0f, 3.0f);
    }
    compute();
  }

  void compute() {
    for (int64_t t = 0; t < sizes.rows; ++t) {
      const float* const h = hidden.row(t);
      const float* const low = low_hidden.data() + t * sizes.rank;
      for (int64_t v = 0; v < sizes.vocab; ++v) {
        const float *const w = weight.row(v), *const b = b_float[v];
        double sum = 0.0, size = 0.0;
        dot(h, w, sizes.width, sum, size);
        dot(low, b, sizes.rank, sum, size);
        size = options.whole ? 0.0 : size;  // exact
        z[t * sizes.vocab + v] = logit(sum, head, v);
        slack[t * sizes.vocab + v] = static_cast<double>(sizes.width + sizes.rank + 2) * 2 * kEps * size;
      }
    }
  }

  LowRank low_rank() {
    LowRank part{low_hidden.data(), nullptr, nullptr, 0, sizes.rank};
    if (sizes.rank == 0) {
      return {nullptr, nullptr, nullptr, 0, 0};
    }
    if (options.b_bf16) {
      part.b_bf16 = b_bf16.stored.data();
      part.b_stride = b_bf16.stored.stride;
    } else {
      part.b_float = b_float.data();
      part.b_stride = b_float.stride;
    }
    return part;
  }

  std::vector<double> row(int64_t t) const {
    return std::vector<double>(z.begin() + t * sizes.vocab, z.begin() + (t + 1) * sizes.vocab);
  }

  void about_this(const char* what) const {
    about(
        "%s: rows %ld, width %ld, vocab %ld, rank %ld, %s, threads %d, number %ld, whole %d, bias %d, scale %g, "
        "softcap %g",
        what, sizes.rows, sizes.width, sizes.vocab, sizes.rank, chosen->isa, options.threads, options.number,
        options.whole, options.biased, options.scale, options.softcap);
  }
};

// -- what is run and what it must give -----------------------------------------------------------------------------

std::vector<float> run_logits(Problem& of) {
  of.about_this("logits");
  const Sizes& s = of.sizes;
  Scratch scratch(unlearn_native::logits_bytes(s.rows, s.width, s.rank), of.options.number);
  Grid<float> out(s.rows, s.vocab, s.vocab + of.options.number % 3, of.options.number % 2);
  unlearn_native::logits(
      of.hidden.matrix(), of.weight.matrix(), of.head, of.low_rank(), out.data(), out.stride, scratch.data(),
      scratch.size());
  out.check_gaps();
  std::vector<float> result;
  for (int64_t t = 0; t < s.rows; ++t) {
    result.insert(result.end(), out[t], out[t] + s.vocab);
  }
  return result;
}

void check_logits(Problem& of) {
  const std::vector<float> got = run_logits(of);
  for (size_t i = 0; i < got.size(); ++i) {
    const bool exact = of.options.whole && of.options.softcap == 0.0f;
    const double slack = exact ? 0.0 : logit_slack(of.z[i], of.head, of.slack[i]);
    CHECK(close(got[i], of.z[i], slack) && !unwritten(got[i]), i, got[i], of.z[i]);
  }
}

struct Sums {
  std::vector<float> sums;
  std::vector<bf16_bits> e;
};

Sums run_exp_sums(Problem& of, bool with_e) {
  of.about_this(with_e ? "exp_sums with e" : "exp_sums");
  const Sizes& s = of.sizes;
  Scratch scratch(unlearn_native::exp_sums_bytes(s.rows, s.width, s.rank), of.options.number);
  Buffer<float> sums(s.rows, of.options.number % 2);
  Grid<bf16_bits> e(s.rows, s.vocab, s.vocab + of.options.number % 5, of.options.number % 2);
  unlearn_native::exp_sums(
      of.hidden.matrix(), of.weight.matrix(), of.head, of.low_rank(), of.target.data(), of.offset.data(), sums.data(),
      with_e ? e.data() : nullptr, with_e ? e.stride : 0, scratch.data(), scratch.size());
  Sums result;
  result.sums.assign(sums.data(), sums.data() + s.rows);
  for (int64_t t = 0; t < s.rows && with_e; ++t) {
    result.e.insert(result.e.end(), e[t], e[t] + s.vocab);
  }
  if (with_e) {
    e.check_gaps();
  }
  return result;
}

void check_exp_sums(Problem& of, bool with_e) {
  const Sums got = run_exp_sums(of, with_e);
  for (int64_t t = 0; t < of.sizes.rows; ++t) {
    double sum = 0.0, slack = 1e-37;
    bool infinite = false;
    for (int64_t v = 0; v < of.sizes.vocab; ++v) {
      const int64_t at = t * of.sizes.vocab + v;
      const double z = of.z[at], x = z - of.offset[t], own = term_slack(z, of.offset[t], of.head, of.slack[at]);
      const bool excluded = of.target[t] == v;
      const double term = excluded ? 0.0 : exp_of(x);
      sum += term;
      infinite |= !excluded && x > 87.9;
      slack += term > 0.0 && !std::isinf(term) ? own * term : at_edge(x) ? 1e-37 : 0.0;
      if (with_e && !at_edge(x)) {
        const double e = value(got.e[at]), bent = slope(z, of.head), want = term * bent;
        const double bend = of.options.softcap == 0.0f ? 0.0 : term * 2e-6 + 1e-38;
        CHECK(std::isinf(term) || close(e, want, term == 0.0 ? 0.0 : (kBf16 + own) * want + bend), t, v, e, want, z);
        CHECK(!std::isinf(term) || e == kInf || of.options.softcap != 0.0f, t, v, e, z);
      }
    }
    const double most = std::numeric_limits<float>::max();
    const bool over = sum > most * (1.0 - 1e-6);  // of finite terms, in float32
    CHECK(over || (infinite ? got.sums[t] > 1e37f : close(got.sums[t], sum, slack + 4e-6 * sum)), t, got.sums[t], sum);
    CHECK(!unwritten(got.sums[t]), t);
    CHECK(!std::isinf(sum) || infinite == false || got.sums[t] == kInf || sum < kInf, t, got.sums[t], sum);
  }
}

std::vector<double> run_token_stats(Problem& of) {
  of.about_this("token_stats");
  const Sizes& s = of.sizes;
  Scratch scratch(unlearn_native::token_stats_bytes(s.rows, s.width, s.rank), of.options.number);
  Grid<double> out(5, s.rows, s.rows + of.options.number % 3, of.options.number % 2);
  unlearn_native::token_stats(
      of.hidden.matrix(), of.weight.matrix(), of.head, of.low_rank(), of.target.data(), out.data(), out.stride,
      scratch.data(), scratch.size());
  out.check_gaps();
  std::vector<double> result;
  for (int64_t i = 0; i < 5; ++i) {
    result.insert(result.end(), out[i], out[i] + s.rows);
  }
  return result;
}

void check_token_stats(Problem& of) {
  const std::vector<double> got = run_token_stats(of);
  const int64_t rows = of.sizes.rows;
  const bool exact = of.options.whole && of.options.softcap == 0.0f;
  for (int64_t t = 0; t < rows; ++t) {
    const std::vector<double> z = of.row(t);
    const Stats want = stats_of(z, of.target[t]);
    double slack = 1e-30;
    for (int64_t v = 0; v < of.sizes.vocab; ++v) {
      slack = std::max(slack, logit_slack(z[v], of.head, of.slack[t * of.sizes.vocab + v]));
    }
    const int64_t argmax = static_cast<int64_t>(got[rows + t]);
    CHECK(close(got[t], want.target, exact ? 0.0 : slack) && !unwritten(got[t]), t, got[t], want.target);
    CHECK(argmax >= 0 && argmax < of.sizes.vocab && got[rows + t] == static_cast<double>(argmax), t, argmax);
    CHECK(argmax == want.argmax || (!exact && z[argmax] >= want.maximum - 2 * slack), t, argmax, want.argmax);
    CHECK(close(got[2 * rows + t], want.log_mass, slack + 4e-6), t, got[2 * rows + t], want.log_mass);
    if (std::isfinite(want.log_mass)) {
      const double allowed = 4e-5 * want.variance + 2 * slack * std::sqrt(want.variance) + slack * slack;
      CHECK(close(got[3 * rows + t], want.mean, slack + 2e-5 * want.spread + 2e-6), t, got[3 * rows + t], want.mean);
      CHECK(close(got[4 * rows + t], want.variance, allowed), t, got[4 * rows + t], want.variance, allowed);
    }
  }
}

struct GradOptions {
  int64_t number = 0;
  int threads = 1;
  bool whole = true, with_target = true, accumulate = false;
  bool one_label = false;  // the same for every row
};

// E [rows, vocab] with either operand: the weight's rows for row_grad, the hidden rows for col_grad.
struct GradProblem {
  Sizes sizes;
  GradOptions options;
  Operand e, operand;
  Buffer<int64_t> target;
  Buffer<float> target_coeff, e_coeff;

  GradProblem(const Sizes& s, bool by_row, const GradOptions& o)
      : sizes(s),
        options(o),
        e(s.rows, s.vocab, o.number),
        operand(by_row ? s.vocab : s.rows, s.width, o.number / 3),
        target(s.rows, o.number % 2),
        target_coeff(s.rows, o.number % 2),
        e_coeff(s.rows, o.number % 2) {
    Random random(static_cast<uint64_t>(o.number) + 500);
    e.fill(random, o.whole, 4.0f);
    operand.fill(random, o.whole, 4.0f);
    for (int64_t t = 0; t < s.rows; ++t) {
      const float factors[] = {1.0f, -2.0f, 0.5f, 4.0f, 0.0f, -1.0f};
      const bool outside = t % 8 == 5 || t % 8 == 6;
      target[t] = t % 8 == 5    ? -100
                  : t % 8 == 6  ? s.vocab
                  : o.one_label ? s.vocab / 2
                                : random.below(std::min<int64_t>(s.vocab, 40));
      target[t] = t % 8 == 1 && !o.one_label ? s.vocab - 1 : target[t];
      e_coeff[t] = o.whole ? factors[random.below(6)] : random.uniform(-2.0f, 2.0f);
      // a row without a target has no part of one: by its factor, or, for col_grad, because no column is its label
      target_coeff[t] = outside && by_row ? 0.0f
                        : o.whole         ? static_cast<float>(random.between(-5, 5))
                                          : random.uniform(-2.0f, 2.0f);
    }
  }

  bool inside(int64_t t) const { return options.with_target && target[t] >= 0 && target[t] < sizes.vocab; }

  void about_this(const char* what, int64_t bytes) const {
    about(
        "%s: rows %ld, width %ld, vocab %ld, %s, threads %d, number %ld, whole %d, target %d, accumulate %d, %ld bytes",
        what, sizes.rows, sizes.width, sizes.vocab, chosen->isa, options.threads, options.number, options.whole,
        options.with_target, options.accumulate, bytes);
  }
};

template <typename out_t>
std::vector<out_t> contents(const Grid<out_t>& out) {
  std::vector<out_t> result;
  for (int64_t i = 0; i < out.rows; ++i) {
    result.insert(result.end(), out[i], out[i] + out.columns);
  }
  return result;
}

// What a gradient that accumulates finds there: small whole numbers.
double before(int64_t row, int64_t h) {
  return static_cast<double>((row * 7 + h) % 101 - 50);
}

template <typename out_t>
void fill_for_accumulation(const GradProblem& of, Grid<out_t>& out) {
  for (int64_t row = 0; row < out.rows && of.options.accumulate; ++row) {
    for (int64_t h = 0; h < out.columns; ++h) {
      out[row][h] = to_out(before(row, h), out_t{});
    }
  }
}

template <typename out_t>
std::vector<out_t> run_row_grad(GradProblem& of) {
  of.about_this("row_grad", sizeof(out_t));
  const Sizes& s = of.sizes;
  Scratch scratch(unlearn_native::row_grad_bytes(s.rows, s.width), of.options.number);
  Grid<out_t> out(s.rows, s.width, s.width + of.options.number % 3, of.options.number / 2 % 2);
  fill_for_accumulation(of, out);
  const bool with_target = of.options.with_target;
  unlearn_native::row_grad<out_t>(
      of.e.matrix(), of.operand.matrix(), with_target ? of.target.data() : nullptr,
      with_target ? of.target_coeff.data() : nullptr, of.e_coeff.data(), of.options.accumulate, out.data(), out.stride,
      scratch.data(), scratch.size());
  out.check_gaps();
  return contents(out);
}

template <typename out_t>
void check_row_grad(GradProblem& of) {
  const std::vector<out_t> got = run_row_grad<out_t>(of);
  const Sizes& s = of.sizes;
  std::vector<double> sum(s.width), size(s.width);
  for (int64_t t = 0; t < s.rows; ++t) {
    std::fill(sum.begin(), sum.end(), 0.0);
    std::fill(size.begin(), size.end(), 0.0);
    for (int64_t v = 0; v < s.vocab; ++v) {
      const double e = of.e.row(t)[v];
      add_row(e, std::fabs(e), of.operand.row(v), s.width, sum.data(), size.data());
    }
    for (int64_t h = 0; h < s.width; ++h) {
      const double of_target =
          of.inside(t) ? static_cast<double>(of.target_coeff[t]) * of.operand.row(of.target[t])[h] : 0.0;
      const double there = of.options.accumulate ? before(t, h) : 0.0;
      const double want = there + of_target - of.e_coeff[t] * sum[h];
      const out_t out = got[t * s.width + h];
      if (of.options.whole) {  // exact, so rounded once
        CHECK(value(out) == value(to_out(want, out_t{})), t, h, value(out), want);
      } else {
        const double slack =
            static_cast<double>(s.vocab + 4) * 2 * kEps * (std::fabs(of.e_coeff[t]) * size[h] + std::fabs(of_target) + std::fabs(there));
        CHECK(
            close(value(out), want, slack + (sizeof(out_t) == 2 ? kBf16 * std::fabs(want) : 0.0)), t, h, value(out),
            want);
      }
    }
  }
}

template <typename out_t>
std::vector<out_t> run_col_grad(GradProblem& of) {
  of.about_this("col_grad", sizeof(out_t));
  const Sizes& s = of.sizes;
  Scratch scratch(unlearn_native::col_grad_bytes(s.rows, s.width), of.options.number);
  Grid<out_t> out(s.vocab, s.width, s.width + of.options.number % 3, of.options.number / 2 % 2);
  fill_for_accumulation(of, out);
  const bool with_target = of.options.with_target;
  unlearn_native::col_grad<out_t>(
      of.e.matrix(), of.operand.matrix(), with_target ? of.target.data() : nullptr,
      with_target ? of.target_coeff.data() : nullptr, of.e_coeff.data(), of.options.accumulate, out.data(), out.stride,
      scratch.data(), scratch.size());
  out.check_gaps();
  return contents(out);
}

template <typename out_t>
void check_col_grad(GradProblem& of) {
  const std::vector<out_t> got = run_col_grad<out_t>(of);
  const Sizes& s = of.sizes;
  std::vector<double> sum(s.width), size(s.width);
  for (int64_t v = 0; v < s.vocab; ++v) {
    for (int64_t h = 0; h < s.width; ++h) {
      sum[h] = of.options.accumulate ? before(v, h) : 0.0;
      size[h] = std::fabs(sum[h]) * kEps * 512;
    }
    for (int64_t t = 0; t < s.rows; ++t) {
      const double of_e = -static_cast<double>(of.e_coeff[t]) * of.e.row(t)[v];
      const double of_target = of.inside(t) && of.target[t] == v ? of.target_coeff[t] : 0.0;
      // e_coeff rows is rounded to bf16 for the product
      const double error = std::fabs(of_e) * kBf16 + std::fabs(of_target) * 1e-5;
      add_row(of_e + of_target, error, of.operand.row(t), s.width, sum.data(), size.data());
    }
    for (int64_t h = 0; h < s.width; ++h) {
      const out_t out = got[v * s.width + h];
      if (of.options.whole) {
        CHECK(value(out) == value(to_out(sum[h], out_t{})), v, h, value(out), sum[h]);
      } else {
        const double rounding = sizeof(out_t) == 2 ? kBf16 * std::fabs(sum[h]) : 0.0;
        CHECK(close(value(out), sum[h], 1.01 * size[h] + rounding + 1e-6), v, h, value(out), sum[h]);
      }
    }
  }
}

// The table and the threads of a case.
void choose(int64_t number, int threads) {
  chosen = tables()[static_cast<size_t>(number) % tables().size()];
  at::set_num_threads(threads);
}

// Every pair of sizes, with every other one of the third.
template <typename Use>
void sweep(const Use& use) {
  int64_t number = 0;
  for (size_t i = 0; i < std::size(kRows); ++i) {
    for (size_t j = 0; j < std::size(kWidths); ++j) {
      for (size_t k = (i + j) % 2; k < std::size(kVocab); k += 2) {
        ++number;
        const int threads = 1 + static_cast<int>(number / 2 % 3);
        choose(number, threads);
        use(Sizes{kRows[i], kWidths[j], kVocab[k]}, number, threads);
      }
    }
  }
}

Options options_of(int64_t number, int threads) {
  Options options;
  options.number = number;
  options.threads = threads;
  options.biased = number % 3 != 0;
  options.b_bf16 = number % 2 == 0;
  options.scale = number % 4 == 3 ? -0.03125f : 0.0625f;
  options.softcap = number % 5 == 2 ? 3.0f : number % 5 == 4 ? 40.0f : 0.0f;
  return options;
}

}  // namespace

// -- sizes ---------------------------------------------------------------------------------------------------------

TEST(logits_sizes) {
  sweep([](Sizes sizes, int64_t number, int threads) {
    sizes.rank = number % 7 < 3 ? 0 : number % 7 == 3 ? 1 : number % 7 == 4 ? 8 : number % 7 == 5 ? 17 : 33;
    Problem problem(sizes, options_of(number, threads));
    check_logits(problem);
  });
}

TEST(exp_sums_sizes) {
  sweep([](Sizes sizes, int64_t number, int threads) {
    sizes.rank = number % 5 == 1 ? 4 : 0;
    Problem problem(sizes, options_of(number, threads));
    check_exp_sums(problem, number % 4 != 0);
  });
}

TEST(token_stats_sizes) {
  sweep([](Sizes sizes, int64_t number, int threads) {
    sizes.rank = number % 5 == 3 ? 5 : 0;
    Problem problem(sizes, options_of(number, threads));
    check_token_stats(problem);
  });
}

TEST(row_grad_sizes) {
  sweep([](Sizes sizes, int64_t number, int threads) {
    GradOptions options{number, threads};
    options.with_target = number % 3 != 0;
    options.accumulate = number % 5 < 2;
    GradProblem problem(sizes, true, options);
    number % 2 == 0 ? check_row_grad<float>(problem) : check_row_grad<bf16_bits>(problem);
  });
}

TEST(col_grad_sizes) {
  sweep([](Sizes sizes, int64_t number, int threads) {
    GradOptions options{number, threads};
    options.with_target = number % 3 != 0;
    options.accumulate = number % 5 < 2;
    GradProblem problem(sizes, false, options);
    number % 2 == 0 ? check_col_grad<float>(problem) : check_col_grad<bf16_bits>(problem);
  });
}

// Beyond what one block of anything holds.
TEST(large_sizes) {
  int64_t number = 0;
  for (const int threads : {1, 2, 3}) {
    // many blocks of tokens; a weight that is copied or not; tiles of fewer rows, down to the smallest
    for (const Sizes& sizes :
         {Sizes{200, 64, 300}, Sizes{257, 33, 513}, Sizes{65, 96, 1100}, Sizes{3, 2100, 300}, Sizes{2, 17000, 70},
          Sizes{130, 512, 33}}) {
      ++number;
      choose(number, threads);
      Options options = options_of(number, threads);
      options.scale = 0.0078125f;
      Problem problem(sizes, options);
      check_logits(problem);
      check_exp_sums(problem, true);
      check_token_stats(problem);
    }
    // blocks of depth (512 columns), of width (1024), of rows (256); widths that threads share and that they do not
    for (const Sizes& sizes :
         {Sizes{17, 33, 1024}, Sizes{130, 64, 1025}, Sizes{33, 96, 2100}, Sizes{65, 513, 65}, Sizes{16, 1030, 40},
          Sizes{15, 800, 1030}, Sizes{257, 32, 100}, Sizes{300, 128, 64}, Sizes{5, 384, 64}}) {
      ++number;
      choose(number, threads);
      GradProblem problem(sizes, true, GradOptions{number, threads});
      number % 2 == 0 ? check_row_grad<float>(problem) : check_row_grad<bf16_bits>(problem);
    }
    // few columns at a time where there are many rows
    for (const Sizes& sizes :
         {Sizes{2100, 33, 300}, Sizes{257, 65, 1030}, Sizes{33, 1030, 65}, Sizes{33, 512, 600}, Sizes{17000, 2, 40}}) {
      ++number;
      choose(number, threads);
      GradOptions options{number, threads};
      options.accumulate = number % 2 == 0;
      GradProblem problem(sizes, false, options);
      number % 3 == 0 ? check_col_grad<float>(problem) : check_col_grad<bf16_bits>(problem);
    }
  }
}

// -- numbers -------------------------------------------------------------------------------------------------------

TEST(any_numbers) {
  int64_t number = 0;
  for (const Sizes& sizes : {Sizes{33, 100, 257, 0}, Sizes{70, 64, 300, 16}, Sizes{130, 33, 65, 3}}) {
    for (const int threads : {1, 3}) {
      for (const Lanes* lane : tables()) {
        ++number;
        at::set_num_threads(threads);
        chosen = lane;
        Options options = options_of(number, threads);
        options.whole = false;
        options.scale = 0.1f;
        Problem problem(sizes, options);
        check_logits(problem);
        check_exp_sums(problem, true);
        check_token_stats(problem);
        GradOptions grad{number, threads};
        grad.whole = false;
        grad.accumulate = number % 2 == 0;
        GradProblem by_row(sizes, true, grad), by_column(sizes, false, grad);
        check_row_grad<float>(by_row);
        check_row_grad<bf16_bits>(by_row);
        check_col_grad<float>(by_column);
        check_col_grad<bf16_bits>(by_column);
      }
    }
  }
}

TEST(extreme_logits) {
  for (const int threads : {1, 2}) {
    for (const Lanes* lane : tables()) {
      for (const float softcap : {0.0f, 50.0f, 120.0f}) {
        at::set_num_threads(threads);
        chosen = lane;
        Options options;
        options.number = 3;
        options.threads = threads;
        options.biased = true;
        options.softcap = softcap;
        options.scale = 0.0625f;
        Problem problem(Sizes{20, 32, 401}, options);
        for (int64_t v = 0; v < 401; ++v) {
          problem.bias[v] = static_cast<float>((v - 200) * 16);  // differences of about -200 to 200
        }
        problem.compute();
        check_exp_sums(problem, true);
        check_token_stats(problem);
        // so far up that only the largest are more than 0, and so far that none is
        for (int64_t t = 0; t < 20; ++t) {
          problem.offset[t] = t < 10 ? 200.0f : 400.0f;
        }
        check_exp_sums(problem, true);
        if (softcap == 0.0f) {
          const Sums got = run_exp_sums(problem, true);
          for (int64_t t = 10; t < 20; ++t) {
            CHECK(got.sums[t] == 0.0f && got.e[t * 401] == 0, t, got.sums[t]);
          }
          problem.offset.fill(-5.0f);
          const Sums above = run_exp_sums(problem, true);
          for (int64_t t = 0; t < 20; ++t) {
            CHECK(
                above.sums[t] == kInf && value(above.e[t * 401 + 400 - (problem.target[t] == 400)]) == kInf, t,
                above.sums[t]);
            CHECK(above.e[t * 401] == 0, t, value(above.e[t * 401]));
          }
        }
      }
    }
  }
}

TEST(targets_in_every_position) {
  for (const int threads : {1, 3}) {
    choose(threads, threads);
    Options options;
    options.threads = threads;
    options.scale = 0.0625f;
    const Sizes sizes{300, 32, 290};
    Problem problem(sizes, options);
    GradOptions grad;
    grad.threads = threads;
    GradProblem by_row(sizes, true, grad), by_column(sizes, false, grad);
    for (int64_t t = 0; t < sizes.rows; ++t) {
      problem.target[t] = by_row.target[t] = by_column.target[t] = t - 5;
      by_row.target_coeff[t] = t < 5 || t - 5 >= sizes.vocab ? 0.0f : 3.0f;
    }
    check_exp_sums(problem, true);
    check_token_stats(problem);
    check_row_grad<float>(by_row);
    check_col_grad<float>(by_column);
  }
}

TEST(repeated_labels) {
  for (const int threads : {1, 2, 3}) {
    for (const bool accumulate : {false, true}) {
      choose(threads, threads);
      GradOptions options;
      options.number = threads;
      options.threads = threads;
      options.one_label = true;
      options.accumulate = accumulate;
      GradProblem problem(Sizes{130, 65, 300}, false, options);
      check_col_grad<float>(problem);
      check_col_grad<bf16_bits>(problem);
    }
  }
}

#ifdef TEST_AMX
TEST(amx_product) {
  if (!unlearn_native::has_amx()) {
    std::printf("no AMX here\n");
    return;
  }
  Random random(1);
  int64_t number = 0;
  for (const int64_t m : {32, 64, 96}) {
    for (const int64_t n : {32, 64, 96}) {
      for (const int64_t k : {32, 64, 480, 512, 544, 1056}) {
        for (const bool add : {false, true}) {
          ++number;
          const int64_t lda = k + number % 5, ldc = n + number % 3;
          about("m %ld, n %ld, k %ld, lda %ld, ldc %ld, add %d", m, n, k, lda, ldc, add);
          Grid<bf16_bits> a(m, k, lda, number % 2);
          Buffer<bf16_bits> b(k * n, number % 2);
          Grid<float> c(m, n, ldc, number % 2);
          std::vector<float> plain_a(m * k), plain_b(k * n);
          for (int64_t i = 0; i < m * k; ++i) {
            plain_a[i] = static_cast<float>(random.between(-4, 4));
            a[i / k][i % k] = bf16(plain_a[i]);
          }
          for (int64_t i = 0; i < k * n; ++i) {  // plain: [n, k]
            const int64_t j = i / k, depth = i % k;
            plain_b[i] = static_cast<float>(random.between(-4, 4));
            b[((j / 32 * (k / 2) + depth / 2) * 32 + j % 32) * 2 + depth % 2] = bf16(plain_b[i]);
          }
          for (int64_t i = 0; i < m * n && add; ++i) {
            c[i / n][i % n] = static_cast<float>(i % 13);
          }
          unlearn_native::amx_product(m, n, k, lda, ldc, add, a.data(), b.data(), c.data());
          unlearn_native::amx_release();
          for (int64_t i = 0; i < m; ++i) {
            for (int64_t j = 0; j < n; ++j) {
              double want = add ? static_cast<double>((i * n + j) % 13) : 0.0, magnitude = 0.0;
              dot(plain_a.data() + i * k, plain_b.data() + j * k, k, want, magnitude);
              CHECK(c[i][j] == want, i, j, c[i][j], want);
            }
          }
          c.check_gaps();
        }
      }
    }
  }
}
#endif

// -- NaN and infinity ----------------------------------------------------------------------------------------------

namespace {

const Sizes kSmall{70, 33, 65, 2};

Options small_options(int threads) {
  Options options;
  options.threads = threads;
  options.biased = true;
  options.scale = 0.0625f;
  return options;
}

// Every result of row t is NaN where nan(t), and finite elsewhere.
template <typename Nan>
void check_rows(Problem& of, const char* what, const Nan& nan) {
  const Sums sums = run_exp_sums(of, true);
  about("%s: exp_sums, %s, threads %d", what, chosen->isa, of.options.threads);
  for (int64_t t = 0; t < of.sizes.rows; ++t) {
    CHECK(std::isnan(sums.sums[t]) == nan(t) && std::isinf(sums.sums[t]) == false, t, sums.sums[t]);
    for (int64_t v = 0; v < of.sizes.vocab; ++v) {
      const float e = value(sums.e[t * of.sizes.vocab + v]);
      CHECK(v == of.target[t] ? e == 0.0f : std::isnan(e) == nan(t), t, v, e);
    }
  }
  const std::vector<float> logits = run_logits(of);
  const std::vector<double> stats = run_token_stats(of);
  about("%s: logits and token_stats, %s, threads %d", what, chosen->isa, of.options.threads);
  for (int64_t t = 0; t < of.sizes.rows; ++t) {
    for (int64_t v = 0; v < of.sizes.vocab; ++v) {
      CHECK(std::isnan(logits[t * of.sizes.vocab + v]) == nan(t), t, v, logits[t * of.sizes.vocab + v]);
    }
    const bool outside = of.target[t] < 0 || of.target[t] >= of.sizes.vocab;
    CHECK(std::isnan(stats[t]) == (nan(t) || outside), t, stats[t]);
    for (int64_t i = 2; i < 5; ++i) {
      CHECK(std::isnan(stats[i * of.sizes.rows + t]) == nan(t), t, i, stats[i * of.sizes.rows + t]);
    }
  }
}

}  // namespace

TEST(not_a_number_in_a_hidden_row_stays_in_its_row) {
  for (const int threads : {1, 2, 3}) {
    for (const int64_t row : {0, 16, 63, 64, 69}) {
      for (const int64_t column : {0, 31, 32}) {
        choose(row, threads);
        Problem problem(kSmall, small_options(threads));
        problem.hidden.set(row, column, kNan);
        check_rows(problem, "hidden", [&](int64_t t) { return t == row; });
      }
      Problem problem(kSmall, small_options(threads));
      problem.low_hidden[row * kSmall.rank + 1] = kNan;
      check_rows(problem, "low-rank hidden", [&](int64_t t) { return t == row; });
    }
  }
}

TEST(not_a_number_in_a_weight_row_reaches_all_rows) {
  for (const int threads : {1, 2, 3}) {
    for (const int64_t label : {0, 31, 32, 64}) {
      for (const int64_t which : {0, 1, 2}) {  // in the weight, its low-rank part, its bias
        choose(label, threads);
        Problem problem(kSmall, small_options(threads));
        if (which == 0) {
          problem.weight.set(label, kSmall.width - 1, kNan);
        } else if (which == 1) {
          problem.b_bf16.set(label, 0, kNan);
        } else {
          problem.bias[label] = kNan;
        }
        const Sums sums = run_exp_sums(problem, true);
        const std::vector<float> logits = run_logits(problem);
        const std::vector<double> stats = run_token_stats(problem);
        about("NaN in part %ld of label %ld, %s, threads %d", which, label, chosen->isa, threads);
        for (int64_t t = 0; t < kSmall.rows; ++t) {
          const bool excluded = problem.target[t] == label;  // no part of the sum
          CHECK(std::isnan(sums.sums[t]) == !excluded && !unwritten(sums.sums[t]), t, sums.sums[t]);
          CHECK(std::isnan(stats[2 * kSmall.rows + t]) == !excluded, t, stats[2 * kSmall.rows + t]);
          for (int64_t v = 0; v < kSmall.vocab; ++v) {
            const int64_t at = t * kSmall.vocab + v;
            CHECK(std::isnan(logits[at]) == (v == label), t, v, logits[at]);
            CHECK(excluded || std::isnan(value(sums.e[at])) == (v == label), t, v, value(sums.e[at]));
          }
        }
      }
    }
  }
}

TEST(infinite_logits) {
  for (const int threads : {1, 3}) {
    for (const Lanes* lane : tables()) {
      at::set_num_threads(threads);
      chosen = lane;
      Problem problem(Sizes{20, 32, 65}, small_options(threads));
      for (int64_t t = 0; t < 20; ++t) {
        problem.target[t] = -1;
      }
      problem.bias[33] = -kInf;  // a masked column: nothing
      problem.compute();
      check_exp_sums(problem, true);
      check_token_stats(problem);
      check_logits(problem);
      for (int64_t v = 0; v < 65; ++v) {  // infinity in a hidden row: infinite logits, by the weight's sign
        problem.weight.set(v, 7, v % 2 == 0 ? 1.0f : -1.0f);
      }
      problem.bias[33] = 0.0f;
      problem.hidden.set(11, 7, kInf);
      problem.compute();
      check_logits(problem);
      const Sums sums = run_exp_sums(problem, true);
      about("infinity in a hidden row, %s, threads %d", lane->isa, threads);
      for (int64_t t = 0; t < 20; ++t) {
        CHECK(std::isinf(sums.sums[t]) == (t == 11), t, sums.sums[t]);
        for (int64_t v = 0; v < 65 && t == 11; ++v) {
          CHECK(value(sums.e[t * 65 + v]) == (v % 2 == 0 ? kInf : 0.0f), v, value(sums.e[t * 65 + v]));
        }
      }
    }
  }
}

TEST(not_a_number_in_gradients) {
  constexpr int64_t row = 66, label = 33, column = 32;
  for (const int threads : {1, 2, 3}) {
    for (const bool with_target : {false, true}) {
      for (const float bad : {kNan, kInf}) {
        choose(threads, threads);
        GradOptions options;
        options.threads = threads;
        options.with_target = with_target;
        const auto each = [](auto& got, int64_t width, const auto& bad_at) {
          for (size_t i = 0; i < got.size(); ++i) {
            const int64_t line = static_cast<int64_t>(i) / width, h = static_cast<int64_t>(i) % width;
            const float x = value(got[i]);
            CHECK(std::isfinite(x) == !bad_at(line, h) && !unwritten(got[i]), line, h, x);
          }
        };
        const auto both = [&](GradProblem& of, bool by_row, const auto& bad_at) {
          const std::vector<float> wide = by_row ? run_row_grad<float>(of) : run_col_grad<float>(of);
          each(wide, of.sizes.width, bad_at);
          const std::vector<bf16_bits> narrow = by_row ? run_row_grad<bf16_bits>(of) : run_col_grad<bf16_bits>(of);
          each(narrow, of.sizes.width, bad_at);
        };
        const auto prepared = [&](bool by_row) {  // no factor 0, of which infinity would make NaN elsewhere
          auto of = std::make_unique<GradProblem>(kSmall, by_row, options);
          of->e_coeff.fill(0.5f);
          return of;
        };
        auto of = prepared(true);
        of->e.set(row, label, bad);
        for (int64_t h = 0; h < kSmall.width; ++h) {
          of->operand.set(label, h, 2.0f);
        }
        both(*of, true, [&](int64_t t, int64_t) { return t == row; });
        of = prepared(true);
        of->operand.set(label, column, bad);  // in every row, times 0 too
        both(*of, true, [&](int64_t, int64_t h) { return h == column; });
        of = prepared(true);
        of->e_coeff[row] = bad;
        both(*of, true, [&](int64_t t, int64_t) { return t == row; });
        of = prepared(false);
        of->e.set(row, label, bad);
        for (int64_t h = 0; h < kSmall.width; ++h) {
          of->operand.set(row, h, 2.0f);
        }
        both(*of, false, [&](int64_t v, int64_t) { return v == label; });
        of = prepared(false);
        of->operand.set(row, column, bad);
        both(*of, false, [&](int64_t, int64_t h) { return h == column; });
        if (with_target) {
          of = prepared(false);
          of->target[row] = label;
          of->target_coeff[row] = bad;
          for (int64_t h = 0; h < kSmall.width; ++h) {
            of->operand.set(row, h, 2.0f);
          }
          both(*of, false, [&](int64_t v, int64_t) { return v == label; });
          of = prepared(true);
          of->target[row] = label;
          of->target_coeff[row] = bad;
          for (int64_t h = 0; h < kSmall.width; ++h) {
            of->operand.set(label, h, 2.0f);
          }
          both(*of, true, [&](int64_t t, int64_t) { return t == row; });
        }
      }
    }
  }
}

// -- threads and tables --------------------------------------------------------------------------------------------

TEST(the_same_again_and_nearly_the_same_otherwise) {
  const Sizes sizes{130, 100, 800, 4};
  Options options;
  options.whole = false;
  options.scale = 0.05f;
  GradOptions grad;
  grad.whole = false;
  grad.number = 2;
  struct Results {
    std::vector<float> logits, sums, row_grad, col_grad;
    std::vector<bf16_bits> e, row_grad_bf16, col_grad_bf16;
    std::vector<double> stats;
  };
  Results first;
  const auto near = [](const auto& a, const auto& b, double slack, const char* what) {
    CHECK(a.size() == b.size());
    double size = 0.0;
    for (const auto x : b) {
      size = std::max(size, std::fabs(static_cast<double>(x)));
    }
    for (size_t i = 0; i < a.size(); ++i) {
      CHECK(close(a[i], b[i], slack * size), what, i, a[i], b[i]);
    }
  };
  for (const Lanes* lane : tables()) {
    for (const int threads : {1, 2, 3}) {
      chosen = lane;
      at::set_num_threads(threads);
      options.threads = grad.threads = threads;
      Problem problem(sizes, options);
      std::replace_if(
          problem.target.data(), problem.target.data() + sizes.rows,
          [&](int64_t y) { return y < 0 || y >= sizes.vocab; }, 3);
      GradProblem by_row(sizes, true, grad), by_column(sizes, false, grad);
      const auto run = [&] {
        Results all;
        all.logits = run_logits(problem);
        Sums sums = run_exp_sums(problem, true);
        all.sums = sums.sums;
        all.e = sums.e;
        all.stats = run_token_stats(problem);
        all.row_grad = run_row_grad<float>(by_row);
        all.row_grad_bf16 = run_row_grad<bf16_bits>(by_row);
        all.col_grad = run_col_grad<float>(by_column);
        all.col_grad_bf16 = run_col_grad<bf16_bits>(by_column);
        return all;
      };
      const Results a = run(), b = run();
      about("again: %s, threads %d", lane->isa, threads);
      CHECK(a.logits == b.logits);
      CHECK(a.sums == b.sums);
      CHECK(a.e == b.e);
      CHECK(a.stats == b.stats);
      CHECK(a.row_grad == b.row_grad && a.row_grad_bf16 == b.row_grad_bf16);
      CHECK(a.col_grad == b.col_grad && a.col_grad_bf16 == b.col_grad_bf16);
      if (first.logits.empty()) {
        first = a;
      }
      about("%s with %d threads against generic with one", lane->isa, threads);
      near(a.logits, first.logits, 1e-5, "logits");
      near(a.sums, first.sums, 1e-5, "sums");
      near(a.row_grad, first.row_grad, 1e-5, "row_grad");
      near(a.col_grad, first.col_grad, 1e-5, "col_grad");
      near(a.stats, first.stats, 1e-5, "stats");
    }
  }
}

// A thread count of its own for each call, in no order: nothing may be left over from another.
TEST(threads_change_between_calls) {
  for (const int threads : {3, 1, 2, 1, 3}) {
    choose(threads, threads);
    Options options = options_of(17, threads);
    Problem problem(Sizes{65, 33, 300}, options);
    check_exp_sums(problem, true);
    GradProblem by_row(Sizes{65, 300, 33}, true, GradOptions{threads, threads});
    check_row_grad<float>(by_row);
  }
}

int main(int argc, char** argv) {
  if (!unlearn_native::serves_bf16()) {
    std::printf("SKIPPED: this CPU multiplies no bf16 tiles (neither AMX nor AVX-512 BF16)\n");
    return 77;
  }
#ifdef TEST_AMX
  std::printf("products: %s\n", unlearn_native::has_amx() ? "AMX tiles" : "brgemm");
#endif
  return check::main_of(argc, argv);
}
