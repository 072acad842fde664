// The torch operators: argument checks, dtype dispatch and threads around the plain functions of unlearn_native.h.
#include "unlearn_native.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace unlearn_native {
namespace {

void check_shapes(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets) {
  TORCH_CHECK_VALUE(hidden.dim() == 2, "hidden must be [N, H], got ", hidden.sym_sizes());
  TORCH_CHECK_VALUE(weight.dim() == 2, "weight must be [V, H], got ", weight.sym_sizes());
  TORCH_CHECK_VALUE(targets.dim() == 1, "targets must be [N], got ", targets.sym_sizes());
  TORCH_CHECK_VALUE(
      hidden.sym_size(1) == weight.sym_size(1),
      "hidden and weight must have the same width H, got ", hidden.sym_sizes(), " and ", weight.sym_sizes());
  TORCH_CHECK_VALUE(
      hidden.sym_size(0) == targets.sym_size(0),
      "hidden and targets must have the same length N, got ", hidden.sym_sizes(), " and ", targets.sym_sizes());
  TORCH_CHECK_VALUE(targets.scalar_type() == at::kLong, "targets must be int64, got ", targets.scalar_type());
}

void check_targets(const at::Tensor& targets, int64_t vocab_size) {
  const int64_t* data = targets.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < targets.numel(); ++t) {
    TORCH_CHECK_VALUE(
        0 <= data[t] && data[t] < vocab_size,
        "targets must be in [0, ", vocab_size, "), got targets[", t, "] = ", data[t]);
  }
}

template <typename hidden_t, typename weight_t>
void run(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets, const at::Tensor& out) {
  const Rows<hidden_t> hidden_rows{hidden.const_data_ptr<hidden_t>(), hidden.stride(0)};
  const Rows<weight_t> weight_rows{weight.const_data_ptr<weight_t>(), weight.stride(0)};
  const int64_t* targets_data = targets.const_data_ptr<int64_t>();
  float* out_data = out.mutable_data_ptr<float>();
  const int64_t hidden_size = hidden.size(1);
  // 32768 products are about 10 us, what waking a thread costs
  const int64_t grain_size = 1 + 32768 / (1 + hidden_size);
  at::parallel_for(0, hidden.size(0), grain_size, [&](int64_t begin, int64_t end) {
    target_dot(hidden_rows, weight_rows, targets_data, out_data, begin, end, hidden_size);
  });
}

at::Tensor target_dot_cpu(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets) {
  check_shapes(hidden, weight, targets);
  TORCH_CHECK_VALUE(
      weight.is_cpu() && targets.is_cpu(),
      "all tensors must be on the CPU, got weight on ", weight.device(), " and targets on ", targets.device());
  TORCH_CHECK_VALUE(hidden.size(1) <= 1 || hidden.stride(1) == 1, "rows of hidden must be contiguous");
  TORCH_CHECK_VALUE(weight.size(1) <= 1 || weight.stride(1) == 1, "rows of weight must be contiguous");
  const at::Tensor targets_contiguous = targets.contiguous();
  check_targets(targets_contiguous, weight.size(0));
  at::Tensor out = at::empty({hidden.size(0)}, hidden.options().dtype(at::kFloat));

  const auto pair = std::make_pair(hidden.scalar_type(), weight.scalar_type());
  if (pair == std::make_pair(at::kFloat, at::kFloat)) {
    run<float, float>(hidden, weight, targets_contiguous, out);
  } else if (pair == std::make_pair(at::kBFloat16, at::kBFloat16)) {
    run<at::BFloat16, at::BFloat16>(hidden, weight, targets_contiguous, out);
  } else if (pair == std::make_pair(at::kHalf, at::kHalf)) {
    run<at::Half, at::Half>(hidden, weight, targets_contiguous, out);
  } else if (pair == std::make_pair(at::kBFloat16, at::kFloat)) {
    run<at::BFloat16, float>(hidden, weight, targets_contiguous, out);
  } else if (pair == std::make_pair(at::kHalf, at::kFloat)) {
    run<at::Half, float>(hidden, weight, targets_contiguous, out);
  } else {
    TORCH_CHECK_VALUE(
        false, "hidden and weight must be float32, bfloat16 or float16 and equal, or weight float32; got ",
        hidden.scalar_type(), " and ", weight.scalar_type());
  }
  return out;
}

// Shapes alone, for torch.compile and for memory accounting on meta tensors.
at::Tensor target_dot_meta(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets) {
  check_shapes(hidden, weight, targets);
  return at::empty_symint({hidden.sym_size(0)}, hidden.options().dtype(at::kFloat));
}

}  // namespace
}  // namespace unlearn_native

TORCH_LIBRARY(unlearn_native, m) {
  m.def(
      "target_dot(Tensor hidden, Tensor weight, Tensor targets) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(unlearn_native, CPU, m) {
  m.impl("target_dot", unlearn_native::target_dot_cpu);
}

TORCH_LIBRARY_IMPL(unlearn_native, Meta, m) {
  m.impl("target_dot", unlearn_native::target_dot_meta);
}
