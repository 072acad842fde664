#include "unlearn_native.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

namespace unlearn_native {
namespace {

// Independent partial sums: the compiler may then use vector instructions without -ffast-math, which would reorder a single
// sum and stop NaN from propagating. 16 lanes fill four SSE registers, enough to hide the latency of the addition.
constexpr int64_t kLanes = 16;

template <typename hidden_t, typename weight_t>
float dot(const hidden_t* hidden, const weight_t* weight, int64_t size) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] += static_cast<float>(hidden[i + lane]) * static_cast<float>(weight[i + lane]);
    }
  }
  for (int64_t lane = 0; i < size; ++i, ++lane) {
    lanes[lane] += static_cast<float>(hidden[i]) * static_cast<float>(weight[i]);
  }
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) {
      lanes[lane] += lanes[lane + half];
    }
  }
  return lanes[0];
}

}  // namespace

template <typename hidden_t, typename weight_t>
void target_dot(
    Rows<hidden_t> hidden,
    Rows<weight_t> weight,
    const int64_t* targets,
    float* out,
    int64_t begin,
    int64_t end,
    int64_t hidden_size) {
  for (int64_t t = begin; t < end; ++t) {
    out[t] = dot(hidden.data + t * hidden.row_stride, weight.data + targets[t] * weight.row_stride, hidden_size);
  }
}

#define UNLEARN_INSTANTIATE(hidden_t, weight_t)         \
  template void target_dot<hidden_t, weight_t>(         \
      Rows<hidden_t>, Rows<weight_t>, const int64_t*, float*, int64_t, int64_t, int64_t);
UNLEARN_INSTANTIATE(float, float)
UNLEARN_INSTANTIATE(c10::BFloat16, c10::BFloat16)
UNLEARN_INSTANTIATE(c10::Half, c10::Half)
UNLEARN_INSTANTIATE(c10::BFloat16, float)
UNLEARN_INSTANTIATE(c10::Half, float)
#undef UNLEARN_INSTANTIATE

}  // namespace unlearn_native
