// The tables of lanes.cpp that this program was linked with and this CPU can run, the plainest first.
#pragma once

#include <vector>

#include "../lanes.h"

namespace check {

inline const std::vector<const unlearn_native::Lanes*>& tables() {
  static const std::vector<const unlearn_native::Lanes*> all = [] {
    std::vector<const unlearn_native::Lanes*> list{&unlearn_native::generic::table};
#ifdef UNLEARN_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      list.push_back(&unlearn_native::avx2::table);
    }
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
      list.push_back(&unlearn_native::avx512::table);
    }
#endif
    return list;
  }();
  return all;
}

}  // namespace check
