// The native CPU kernels as plain functions: no tensor, no dispatcher, so that they can be tested without Python.
#pragma once

#include <cstdint>

namespace unlearn_native {

// A row-major matrix view whose rows are contiguous and row_stride elements apart.
template <typename scalar_t>
struct Rows {
  const scalar_t* data;
  int64_t row_stride;
};

// out[t] = dot(hidden[t, :], weight[targets[t], :]) for t in [begin, end), accumulated in float32.
// targets are in range; NaN and infinity propagate. Instantiated for (hidden_t, weight_t) =
// (float, float), (BFloat16, BFloat16), (Half, Half), (BFloat16, float), (Half, float).
template <typename hidden_t, typename weight_t>
void target_dot(
    Rows<hidden_t> hidden,
    Rows<weight_t> weight,
    const int64_t* targets,
    float* out,
    int64_t begin,
    int64_t end,
    int64_t hidden_size);

}  // namespace unlearn_native
