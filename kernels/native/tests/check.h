// What the two test programs share: CHECK, named tests, memory that notices a step over its edge, numbers.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <initializer_list>
#include <limits>
#include <type_traits>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

#include "../lanes.h"

namespace check {

using unlearn_native::bf16_bits;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr double kEps = 6e-8;          // half a float32's last bit, relative
constexpr double kBf16 = 1.0 / 256.0;  // half a bf16's last bit, relative: rounded to nearest, not cut off

// -- failures and tests --------------------------------------------------------------------------------------------

struct Test {
  const char* name;
  void (*run)();
};

struct Report {
  std::vector<Test> tests;
  int64_t checks = 0, failures = 0, shown = 0;
  char context[512] = "";
};

inline Report& report() {
  static Report one;
  return one;
}

struct Register {
  Register(const char* name, void (*run)()) { report().tests.push_back({name, run}); }
};

#define TEST(name)                                             \
  static void name();                                          \
  static const ::check::Register register_##name(#name, name); \
  static void name()

// What the failures that follow are about: printed with each.
template <typename... Args>
void about(const char* format, Args... args) {
  std::snprintf(report().context, sizeof report().context, format, args...);
}

inline void about(const char* text) {
  about("%s", text);
}

// A number or a text to print with a failure.
struct Value {
  enum { kNumber, kWhole, kText } kind;
  double number = 0.0;
  int64_t whole = 0;
  const char* text = "";

  Value(double x) : kind(kNumber), number(x) {}
  Value(const char* x) : kind(kText), text(x) {}
  template <typename T>
    requires std::is_integral_v<T>
  Value(T x) : kind(kWhole), whole(static_cast<int64_t>(x)) {}

  void print() const {
    kind == kText    ? std::printf(" %s", text)
    : kind == kWhole ? std::printf(" %lld", static_cast<long long>(whole))
                     : std::printf(" %.9g", number);
  }
};

[[gnu::cold, gnu::noinline]] inline void fail(
    const char* file, int line, const char* expression, const char* names, std::initializer_list<Value> values) {
  Report& all = report();
  ++all.failures;
  if (++all.shown > 12) {  // of one test
    return;
  }
  std::printf("%s:%d: CHECK(%s) failed", file, line, expression);
  if (names[0] != '\0') {
    std::printf("; %s =", names);
    for (const Value& value : values) {
      value.print();
    }
  }
  std::printf("%s%s\n", all.context[0] == '\0' ? "" : "; ", all.context);
}

// CHECK(condition, values to print...)
#define CHECK(expression, ...)                                                     \
  do {                                                                             \
    ++::check::report().checks;                                                    \
    if (!(expression)) {                                                           \
      ::check::fail(__FILE__, __LINE__, #expression, #__VA_ARGS__, {__VA_ARGS__}); \
    }                                                                              \
  } while (false)

// Within `slack` of what is wanted; equal where that is infinite, NaN where that is NaN.
inline bool close(double got, double want, double slack) {
  if (std::isnan(want)) {
    return std::isnan(got);
  }
  return std::isinf(want) ? got == want : std::fabs(got - want) <= slack;
}

// No arguments: every test. Otherwise those named; --list prints the names.
inline int main_of(int argc, char** argv) {
  Report& all = report();
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // what was printed before a sanitizer aborts must not be lost
  const auto is = [](const char* a, const char* b) { return std::strcmp(a, b) == 0; };
  for (int i = 1; i < argc; ++i) {
    bool known = is(argv[i], "--list");
    for (const Test& test : all.tests) {
      known |= is(argv[i], test.name);
      if (is(argv[i], "--list")) {
        std::printf("%s\n", test.name);
      }
    }
    if (!known) {
      std::printf("no test is named %s; --list prints the names\n", argv[i]);
      return 2;
    }
  }
  if (argc == 2 && is(argv[1], "--list")) {
    return 0;
  }
  for (const Test& test : all.tests) {
    bool wanted = argc == 1;
    for (int i = 1; i < argc; ++i) {
      wanted |= is(argv[i], test.name);
    }
    if (!wanted) {
      continue;
    }
    const int64_t checks = all.checks, failures = all.failures;
    all.shown = 0;
    about("");
    const std::clock_t start = std::clock();
    test.run();
    const double seconds = static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;
    std::printf(
        "%-48s %8lld checks, %lld failed, %.2f s\n", test.name, static_cast<long long>(all.checks - checks),
        static_cast<long long>(all.failures - failures), seconds);
  }
  std::printf("%s\n", all.failures == 0 ? "ok" : "FAILED");
  return all.failures == 0 ? 0 : 1;
}

// -- memory --------------------------------------------------------------------------------------------------------

// `count` elements, all bits set (NaN, or -1), and `tail` more of them right before an unreadable page: a step over the
// end is a fault even in code that no sanitizer has seen (brgemm's), or, with a tail, a changed canary. In front are a
// canary and memory that ASan refuses. The elements start wherever that puts them, in general at no multiple of 64
// bytes.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count, int64_t tail = 0) : count_(count), tail_(tail) {
    static const int64_t page = sysconf(_SC_PAGESIZE);
    const int64_t bytes = (count + tail) * static_cast<int64_t>(sizeof(T));
    const int64_t pages = (bytes + kFront + page - 1) / page;
    size_ = (pages + 1) * page;
    void* const at = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) {
      std::perror("mmap");
      std::abort();
    }
    map_ = static_cast<char*>(at);
    mprotect(map_ + pages * page, page, PROT_NONE);
    data_ = reinterpret_cast<T*>(map_ + pages * page - bytes);
    std::memset(front(), 0xff, kFront + bytes);
    ASAN_POISON_MEMORY_REGION(map_, front() + kFront - map_);
  }

  ~Buffer() {
    check_edges();
    ASAN_UNPOISON_MEMORY_REGION(map_, size_);
    munmap(map_, size_);
  }

  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }
  int64_t size() const { return count_; }

  void fill(T value) {
    for (int64_t i = 0; i < count_; ++i) {
      data_[i] = value;
    }
  }

  void check_edges() {
    ASAN_UNPOISON_MEMORY_REGION(front(), kFront);
    CHECK(untouched(front(), kFront), "before the first element");
    CHECK(untouched(data_ + count_, tail_ * sizeof(T)), "after the last element");
    ASAN_POISON_MEMORY_REGION(front(), kFront);
  }

  static bool untouched(const void* from, int64_t bytes) {
    const unsigned char* const at = static_cast<const unsigned char*>(from);
    for (int64_t i = 0; i < bytes; ++i) {
      if (at[i] != 0xff) {
        return false;
      }
    }
    return true;
  }

 private:
  static constexpr int64_t kFront = 256;

  char* front() { return reinterpret_cast<char*>(data_) - kFront; }

  int64_t count_, tail_, size_;
  char* map_;
  T* data_;
};

// A row-major matrix whose rows are `stride` apart, `tail` elements before the unreadable page. All bits are set at
// first: an input's gaps are NaN, an output's a canary.
template <typename T>
class Grid {
 public:
  Grid(int64_t rows, int64_t columns, int64_t stride, int64_t tail = 0)
      : rows(rows), columns(columns), stride(stride), buffer_(rows == 0 ? 0 : (rows - 1) * stride + columns, tail) {}

  const int64_t rows, columns, stride;

  T* data() { return buffer_.data(); }
  T* operator[](int64_t row) { return buffer_.data() + row * stride; }
  const T* operator[](int64_t row) const { return buffer_.data() + row * stride; }

  // Of an output: whatever lies between the rows, and outside the columns [from, to) of a row, is as it was.
  void check_gaps(int64_t from, int64_t to) {
    for (int64_t row = 0; row < rows; ++row) {
      CHECK(Buffer<T>::untouched((*this)[row], from * sizeof(T)), row, "written before its columns", from);
      const int64_t end = row + 1 < rows ? stride : columns;
      CHECK(Buffer<T>::untouched((*this)[row] + to, (end - to) * sizeof(T)), row, "written beyond its columns", to);
    }
    buffer_.check_edges();
  }
  void check_gaps() { check_gaps(0, columns); }

 private:
  Buffer<T> buffer_;
};

// Still the canary: an output that nobody wrote. A NaN that was computed has other bits.
template <typename T>
bool unwritten(T x) {
  return Buffer<T>::untouched(&x, sizeof x);
}

// -- numbers -------------------------------------------------------------------------------------------------------

inline uint32_t bits(float x) {
  uint32_t word;
  std::memcpy(&word, &x, sizeof word);
  return word;
}

inline float value(bf16_bits x) {
  const uint32_t word = static_cast<uint32_t>(x) << 16;
  float result;
  std::memcpy(&result, &word, sizeof result);
  return result;
}

inline float value(float x) {
  return x;
}

// The nearest bf16, the even one of two; found by looking at both neighbours, unlike the code under test.
inline bf16_bits bf16(double x) {
  if (std::isnan(x)) {
    return 0x7fc0;
  }
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const double size = std::fabs(x);
  uint16_t low = static_cast<uint16_t>(bits(static_cast<float>(size)) >> 16);
  while (low > 0 && value(low) > size) {
    --low;  // the conversion to float32 had rounded up
  }
  if (low == 0x7f80) {
    return sign | low;
  }
  const uint16_t high = low + 1;
  const double above = high == 0x7f80 ? std::ldexp(1.0, 128) : value(high);
  const double below = size - value(low), over = above - size;
  const bool up = over < below || (over == below && (high & 1) == 0);
  return sign | (up ? high : low);
}

inline bf16_bits to_out(double x, bf16_bits) {
  return bf16(x);
}

inline float to_out(double x, float) {
  return static_cast<float>(x);
}

// xorshift64*: the same numbers everywhere
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 0x2545f4914f6cdd1du) { next(); }

  uint64_t next() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return (state_ * 0x2545f4914f6cdd1du) >> 16;
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
  int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }
  float uniform(float low, float high) {
    return low + (high - low) * static_cast<float>(next() & 0xffffff) * (1.0f / 16777216.0f);
  }

 private:
  uint64_t state_;
};

// The loops that most of the time goes to: not under test, so without the sanitizers' help.
#if defined(__GNUC__) && !defined(__clang__)
#define PLAIN_LOOP __attribute__((noinline, no_sanitize("address", "undefined"), optimize("O3")))
#else
#define PLAIN_LOOP __attribute__((noinline, no_sanitize("address", "undefined")))
#endif

// sum of a b, in float64, and of |a b|
PLAIN_LOOP inline void dot(const float* a, const float* b, int64_t size, double& sum, double& magnitude) {
  double sums[8] = {}, magnitudes[8] = {};
  int64_t i = 0;
  for (; i + 8 <= size; i += 8) {
    for (int64_t j = 0; j < 8; ++j) {
      const double product = static_cast<double>(a[i + j]) * static_cast<double>(b[i + j]);
      sums[j] += product;
      magnitudes[j] += std::fabs(product);
    }
  }
  for (int64_t j = 0; i < size; ++i, ++j) {
    const double product = static_cast<double>(a[i]) * static_cast<double>(b[i]);
    sums[j] += product;
    magnitudes[j] += std::fabs(product);
  }
  for (int64_t j = 0; j < 8; ++j) {
    sum += sums[j];
    magnitude += magnitudes[j];
  }
}

// sum[i] += a x[i] and magnitude[i] += b |x[i]|
PLAIN_LOOP inline void add_row(double a, double b, const float* x, int64_t size, double* sum, double* magnitude) {
  for (int64_t i = 0; i < size; ++i) {
    sum[i] += a * static_cast<double>(x[i]);
    magnitude[i] += b * std::fabs(static_cast<double>(x[i]));
  }
}

// -- what the kernels compute, in float64 --------------------------------------------------------------------------

inline double logit(double product, const unlearn_native::Head& head, int64_t v) {
  const double z = (product + (head.bias == nullptr ? 0.0 : static_cast<double>(head.bias[v]))) * head.scale;
  return head.softcap == 0.0f ? z : head.softcap * std::tanh(z / head.softcap);
}

// d logit / d (scale (product + bias)), of the logit
inline double slope(double z, const unlearn_native::Head& head) {
  const double ratio = head.softcap == 0.0f ? 0.0 : z / static_cast<double>(head.softcap);
  return 1.0 - ratio * ratio;
}

// exp as documented: 0 below -87, infinity above 88.
inline double exp_of(double x) {
  return x < -87.0 ? 0.0 : x > 88.0 ? static_cast<double>(kInf) : std::exp(x);
}

// How far a logit in float32 may be off, and then a term exp(z - offset), relative to it: 1e-7 of exp and the roundings
// of what it is given. `product_error`: of the product, absolute.
inline double logit_slack(double z, const unlearn_native::Head& head, double product_error) {
  return 1e-37 + std::fabs(head.scale) * product_error + (head.softcap == 0.0f ? 4 * kEps : 1e-6) * std::fabs(z);
}

inline double term_slack(double z, double offset, const unlearn_native::Head& head, double product_error) {
  return 3e-7 + logit_slack(z, head, product_error) + 2 * kEps * std::fabs(z - offset);
}

// x is so near exp's edges that either answer will do
inline bool at_edge(double x) {
  return std::fabs(x + 87.0) < 1e-3 || std::fabs(x - 88.0) < 1e-3;
}

// Of a row of logits: the target's, the largest and its lowest column; the others over the columns but the target.
struct Stats {
  double target = kNan, maximum = -kInf, log_mass = -kInf, mean = 0.0, variance = 0.0;
  int64_t argmax = 0;
  double spread = 0.0;  // mean of |z - mean|
  double top = -kInf;   // without the target
};

inline Stats stats_of(const std::vector<double>& z, int64_t target) {
  Stats result;
  for (size_t v = 0; v < z.size(); ++v) {
    const bool is_target = static_cast<int64_t>(v) == target;
    result.target = is_target ? z[v] : result.target;
    result.top = !is_target && z[v] > result.top ? z[v] : result.top;
    if (z[v] > result.maximum) {
      result.maximum = z[v];
      result.argmax = static_cast<int64_t>(v);
    }
  }
  double mass = 0.0, first = 0.0, second = 0.0;
  std::vector<double> terms(z.size());
  for (size_t v = 0; v < z.size(); ++v) {
    terms[v] = std::exp(z[v] - result.top);
  }
  const auto each = [&](auto use) {
    for (size_t v = 0; v < z.size(); ++v) {
      if (static_cast<int64_t>(v) != target && z[v] != -kInf) {
        use(terms[v], z[v]);
      }
    }
  };
  each([&](double p, double) { mass += p; });
  each([&](double p, double x) { first += p / mass * x; });
  each([&](double p, double x) { second += p / mass * (x - first) * (x - first); });
  each([&](double p, double x) {
    result.spread += p / mass * std::fabs(x - first);
  });
  result.log_mass = result.top + std::log(mass);
  result.mean = first;
  result.variance = second;
  return result;
}

}  // namespace check
