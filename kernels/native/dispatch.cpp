// Chooses among the copies of lanes.cpp.
#include "lanes.h"

namespace unlearn_native {
namespace {

const Lanes& choose() {
#ifdef UNLEARN_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    return avx512::table;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return avx2::table;
  }
#endif
  return generic::table;
}

}  // namespace

const Lanes& lanes() {
  static const Lanes& chosen = choose();
  return chosen;
}

}  // namespace unlearn_native
