// Large blocks of memory, kept for the next call.
#pragma once

#include <ATen/ATen.h>

namespace unlearn_native {

// An uninitialised tensor whose memory comes from blocks that earlier tensors gave back, if one fits.
at::Tensor pooled_empty(at::IntArrayRef size, at::ScalarType dtype);

// Gives what is kept back to the system; tensors in use are not touched. Returns how many bytes that was.
int64_t release_memory();

}  // namespace unlearn_native
