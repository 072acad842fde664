// The torch operators: argument checks, dtype dispatch and threads around the plain functions of unlearn_native.h.
#include "lanes.h"
#include "pool.h"
#include "products.h"
#include "unlearn_native.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>

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

// -- the steps of unlearn_kernels/backends.py ----------------------------------------------------------------------

using OptionalTensor = std::optional<at::Tensor>;

bool contiguous_rows(const at::Tensor& x) {
  return x.dim() == 2 && (x.size(1) <= 1 || x.stride(1) == 1);
}

Matrix matrix_of(const at::Tensor& x, const char* name) {
  TORCH_CHECK_VALUE(
      x.is_cpu() && x.scalar_type() == at::kBFloat16 && contiguous_rows(x), name,
      " must be a bfloat16 matrix on the CPU with contiguous rows, got ", x.scalar_type(), " ", x.sizes());
  return {static_cast<const bf16_bits*>(x.const_data_ptr()), x.size(0), x.size(1), x.stride(0)};
}

template <typename T>
T* vector_of(const at::Tensor& x, int64_t size, const char* name) {
  TORCH_CHECK_VALUE(
      x.is_cpu() && x.dim() == 1 && x.size(0) == size && x.is_contiguous() &&
          x.scalar_type() == c10::CppTypeToScalarType<T>::value,
      name, " must be ", c10::CppTypeToScalarType<T>::value, " [", size, "], got ", x.scalar_type(), " ", x.sizes());
  return static_cast<T*>(x.data_ptr());
}

// The most rows (at most `most`) that bytes(rows) <= available allows, a multiple of 64 unless all; 0 if not even 64.
template <typename Bytes>
int64_t rows_that_fit(int64_t most, int64_t available, const Bytes& bytes) {
  if (bytes(most) <= available) {
    return most;
  }
  int64_t low = 0, high = most / kBlockT + 1;  // in blocks: low fits, high does not
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (bytes(middle * kBlockT) <= available ? low : high) = middle;
  }
  return low * kBlockT;
}

Head head_of(const at::Tensor& bias, double logit_scale, double softcap) {
  return {
      bias.defined() ? bias.const_data_ptr<float>() : nullptr, static_cast<float>(logit_scale),
      static_cast<float>(softcap)};
}

// What logits are made of, checked, and whatever had to be copied for it.
struct LogitInputs {
  Matrix hidden, weight;
  at::Tensor bias_float, inner, b;
  Head head;
  LowRank low_rank{nullptr, nullptr, nullptr, 0, 0};

  LogitInputs(
      const at::Tensor& hidden_, const at::Tensor& weight_, const OptionalTensor& bias, const OptionalTensor& lora_hidden,
      const OptionalTensor& lora_b, double logit_scale, double softcap)
      : hidden(matrix_of(hidden_, "hidden")),
        weight(matrix_of(weight_, "weight")),
        bias_float(bias.has_value() ? bias->to(at::kFloat).contiguous() : at::Tensor()),
        head(head_of(bias_float, logit_scale, softcap)) {
    TORCH_CHECK_VALUE(
        hidden.columns == weight.columns, "hidden and weight must have the same width H, got ", hidden_.sizes(), " and ",
        weight_.sizes());
    if (lora_hidden.has_value() && lora_b.has_value()) {
      inner = lora_hidden->to(at::kFloat).contiguous();
      b = lora_b->scalar_type() == at::kBFloat16 ? *lora_b : lora_b->to(at::kFloat);
      b = contiguous_rows(b) ? b : b.contiguous();
      const bool is_bf16 = b.scalar_type() == at::kBFloat16;
      low_rank = {
          inner.const_data_ptr<float>(), is_bf16 ? static_cast<const bf16_bits*>(b.const_data_ptr()) : nullptr,
          is_bf16 ? nullptr : b.const_data_ptr<float>(), b.stride(0), b.size(1)};
    }
  }
};

LowRank from(LowRank all, int64_t t) {
  all.hidden = all.rank > 0 ? all.hidden + t * all.rank : nullptr;
  return all;
}

Matrix rows_of(const Matrix& all, int64_t t, int64_t count) {
  return {all.data + t * all.stride, count, all.columns, all.stride};
}

// Each of those that return bool says whether the scratch was long enough; if not, nothing was written.
bool exp_sums_cpu(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets, const OptionalTensor& bias,
    const OptionalTensor& lora_hidden, const OptionalTensor& lora_b, double logit_scale, double softcap,
    const at::Tensor& offset, const at::Tensor& sums, const OptionalTensor& e, const at::Tensor& scratch) {
  const LogitInputs inputs(hidden, weight, bias, lora_hidden, lora_b, logit_scale, softcap);
  const int64_t num_rows = inputs.hidden.rows, available = scratch.numel() * scratch.element_size();
  const int64_t* target = vector_of<int64_t>(targets, num_rows, "targets");
  const float* m = vector_of<float>(offset, num_rows, "offset");
  float* out = vector_of<float>(sums, num_rows, "sums");
  bf16_bits* e_data = nullptr;
  int64_t e_stride = 0;
  if (e.has_value()) {
    const Matrix view = matrix_of(*e, "e");
    TORCH_CHECK_VALUE(view.rows == num_rows && view.columns == inputs.weight.rows, "e must be [C, V]");
    e_data = const_cast<bf16_bits*>(view.data);
    e_stride = view.stride;
  }
  const int64_t fit = rows_that_fit(num_rows, available, [&](int64_t rows) {
    return exp_sums_bytes(rows, inputs.hidden.columns, inputs.low_rank.rank);
  });
  for (int64_t t = 0; fit > 0 && t < num_rows; t += fit) {
    exp_sums(
        rows_of(inputs.hidden, t, std::min(fit, num_rows - t)), inputs.weight, inputs.head, from(inputs.low_rank, t),
        target + t, m + t, out + t, e_data == nullptr ? nullptr : e_data + t * e_stride, e_stride,
        scratch.mutable_data_ptr(), available);
  }
  return fit > 0;
}

// stats [5, C] float64: see products.h.
bool token_stats_cpu(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets, const OptionalTensor& bias,
    const OptionalTensor& lora_hidden, const OptionalTensor& lora_b, double logit_scale, double softcap,
    const at::Tensor& stats, const at::Tensor& scratch) {
  const LogitInputs inputs(hidden, weight, bias, lora_hidden, lora_b, logit_scale, softcap);
  const int64_t num_rows = inputs.hidden.rows, available = scratch.numel() * scratch.element_size();
  const int64_t* target = vector_of<int64_t>(targets, num_rows, "targets");
  TORCH_CHECK_VALUE(
      stats.scalar_type() == at::kDouble && stats.is_contiguous() && stats.size(0) == 5 && stats.size(1) == num_rows,
      "stats must be float64 [5, ", num_rows, "]");
  double* out = stats.mutable_data_ptr<double>();
  const int64_t fit = rows_that_fit(num_rows, available, [&](int64_t rows) {
    return token_stats_bytes(rows, inputs.hidden.columns, inputs.low_rank.rank);
  });
  for (int64_t t = 0; fit > 0 && t < num_rows; t += fit) {
    token_stats(
        rows_of(inputs.hidden, t, std::min(fit, num_rows - t)), inputs.weight, inputs.head, from(inputs.low_rank, t),
        target + t, out + t, num_rows, scratch.mutable_data_ptr(), available);
  }
  return fit > 0;
}

// out [C, V] float32 = logits.
bool logits_cpu(
    const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& lora_hidden,
    const OptionalTensor& lora_b, double logit_scale, double softcap, const at::Tensor& out, const at::Tensor& scratch) {
  const LogitInputs inputs(hidden, weight, bias, lora_hidden, lora_b, logit_scale, softcap);
  const int64_t num_rows = inputs.hidden.rows, available = scratch.numel() * scratch.element_size();
  TORCH_CHECK_VALUE(
      out.scalar_type() == at::kFloat && contiguous_rows(out) && out.size(0) == num_rows &&
          out.size(1) == inputs.weight.rows,
      "out must be float32 [C, V]");
  const int64_t fit = rows_that_fit(num_rows, available, [&](int64_t rows) {
    return logits_bytes(rows, inputs.hidden.columns, inputs.low_rank.rank);
  });
  for (int64_t t = 0; fit > 0 && t < num_rows; t += fit) {
    logits(
        rows_of(inputs.hidden, t, std::min(fit, num_rows - t)), inputs.weight, inputs.head, from(inputs.low_rank, t),
        out.mutable_data_ptr<float>() + t * out.stride(0), out.stride(0), scratch.mutable_data_ptr(), available);
  }
  return fit > 0;
}

// Rows of policy and reference logits [R, V] float32, overwritten; kl [R] float32; g [R, V] bf16 or float32 or nothing.
void kl_rows_cpu(
    const at::Tensor& policy, const at::Tensor& reference, double softcap, const at::Tensor& kl,
    const OptionalTensor& g) {
  const int64_t num_rows = policy.size(0), vocab = policy.size(1);
  TORCH_CHECK_VALUE(
      policy.scalar_type() == at::kFloat && reference.scalar_type() == at::kFloat && policy.is_contiguous() &&
          reference.is_contiguous() && policy.sizes() == reference.sizes(),
      "policy and reference must be float32 [R, V]");
  float* const out = vector_of<float>(kl, num_rows, "kl");
  float *p = policy.mutable_data_ptr<float>(), *q = reference.mutable_data_ptr<float>(), *g_float = nullptr;
  bf16_bits* g_bf16 = nullptr;
  int64_t g_stride = 0;
  if (g.has_value()) {
    TORCH_CHECK_VALUE(contiguous_rows(*g) && g->sizes() == policy.sizes(), "g must be [R, V]");
    g_stride = g->stride(0);
    if (g->scalar_type() == at::kFloat) {
      g_float = g->mutable_data_ptr<float>();
    } else {
      g_bf16 = const_cast<bf16_bits*>(matrix_of(*g, "g").data);
    }
  }
  at::parallel_for(0, num_rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      out[t] = static_cast<float>(lanes().kl_row(
          p + t * vocab, q + t * vocab, vocab, static_cast<float>(softcap),
          g_bf16 == nullptr ? nullptr : g_bf16 + t * g_stride, g_float == nullptr ? nullptr : g_float + t * g_stride));
    }
  });
}

struct Coefficients {
  const int64_t* target = nullptr;
  const float* of_target = nullptr;
  const float* of_e = nullptr;

  Coefficients(
      const OptionalTensor& targets, const OptionalTensor& target_coeff, const at::Tensor& e_coeff, int64_t num_rows)
      : of_e(vector_of<float>(e_coeff, num_rows, "e_coeff")) {
    if (targets.has_value() && target_coeff.has_value()) {
      target = vector_of<int64_t>(*targets, num_rows, "targets");
      of_target = vector_of<float>(*target_coeff, num_rows, "target_coeff");
    }
  }

  Coefficients from(int64_t t) const {
    Coefficients part = *this;
    part.of_e += t;
    if (target != nullptr) {
      part.target += t;
      part.of_target += t;
    }
    return part;
  }
};

bool row_grad_cpu(
    const at::Tensor& e, const at::Tensor& matrix, const OptionalTensor& targets, const OptionalTensor& target_coeff,
    const at::Tensor& e_coeff, bool accumulate, const at::Tensor& out, const at::Tensor& scratch) {
  const Matrix e_view = matrix_of(e, "e"), w = matrix_of(matrix, "matrix");
  const Coefficients coeff(targets, target_coeff, e_coeff, e_view.rows);
  TORCH_CHECK_VALUE(
      w.rows == e_view.columns && contiguous_rows(out) && out.size(0) == e_view.rows && out.size(1) == w.columns,
      "e [C, V], matrix [V, D] and out [C, D] do not fit together");
  const int64_t available = scratch.numel() * scratch.element_size();
  const int64_t fit =
      rows_that_fit(e_view.rows, available, [&](int64_t rows) { return row_grad_bytes(rows, w.columns); });
  for (int64_t t = 0; fit > 0 && t < e_view.rows; t += fit) {
    const Matrix part = rows_of(e_view, t, std::min(fit, e_view.rows - t));
    const Coefficients here = coeff.from(t);
    const auto run = [&](auto* data) {
      row_grad(
          part, w, here.target, here.of_target, here.of_e, accumulate, data + t * out.stride(0), out.stride(0),
          scratch.mutable_data_ptr(), available);
    };
    if (out.scalar_type() == at::kFloat) {
      run(out.mutable_data_ptr<float>());
    } else {
      TORCH_CHECK_VALUE(out.scalar_type() == at::kBFloat16, "out must be float32 or bfloat16, got ", out.scalar_type());
      run(static_cast<bf16_bits*>(out.mutable_data_ptr()));
    }
  }
  return fit > 0;
}

bool col_grad_cpu(
    const at::Tensor& e, const at::Tensor& rows, const OptionalTensor& targets, const OptionalTensor& target_coeff,
    const at::Tensor& e_coeff, bool accumulate, const at::Tensor& out, const at::Tensor& scratch) {
  const Matrix e_view = matrix_of(e, "e"), x = matrix_of(rows, "rows");
  const Coefficients coeff(targets, target_coeff, e_coeff, e_view.rows);
  TORCH_CHECK_VALUE(
      x.rows == e_view.rows && contiguous_rows(out) && out.size(0) == e_view.columns && out.size(1) == x.columns,
      "e [C, V], rows [C, D] and out [V, D] do not fit together");
  const int64_t available = scratch.numel() * scratch.element_size();
  // the width is cut, never the rows: each sum is rounded once
  const int64_t fit =
      rows_that_fit(x.columns, available, [&](int64_t width) { return col_grad_bytes(e_view.rows, width); });
  for (int64_t h = 0; fit > 0 && h < x.columns; h += fit) {
    const Matrix part{x.data + h, x.rows, std::min(fit, x.columns - h), x.stride};
    const auto run = [&](auto* data) {
      col_grad(
          e_view, part, coeff.target, coeff.of_target, coeff.of_e, accumulate, data + h, out.stride(0),
          scratch.mutable_data_ptr(), available);
    };
    if (out.scalar_type() == at::kFloat) {
      run(out.mutable_data_ptr<float>());
    } else {
      TORCH_CHECK_VALUE(out.scalar_type() == at::kBFloat16, "out must be float32 or bfloat16, got ", out.scalar_type());
      run(static_cast<bf16_bits*>(out.mutable_data_ptr()));
    }
  }
  return fit > 0;
}

// z [R, K] float32: products in, E out; sums [R] float64 gain its rows' sums. Columns are those of the vocabulary from
// `first` on; bias [K] is cut already.
void exp_rows_cpu(
    const at::Tensor& z, const at::Tensor& targets, const OptionalTensor& bias, double logit_scale, double softcap,
    const at::Tensor& offset, int64_t first, const at::Tensor& sums) {
  TORCH_CHECK_VALUE(
      z.is_cpu() && z.scalar_type() == at::kFloat && contiguous_rows(z), "z must be a float32 matrix, contiguous rows");
  const int64_t num_rows = z.size(0), num_columns = z.size(1);
  const int64_t* target = vector_of<int64_t>(targets, num_rows, "targets");
  const float* m = vector_of<float>(offset, num_rows, "offset");
  double* total = vector_of<double>(sums, num_rows, "sums");
  const at::Tensor bias_float = bias.has_value() ? bias->to(at::kFloat).contiguous() : at::Tensor();
  const Head head = head_of(bias_float, logit_scale, softcap);
  float* const data = z.mutable_data_ptr<float>();
  const Lanes& lane = lanes();
  at::parallel_for(0, num_rows, 1 + 16384 / (1 + num_columns), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      total[t] += lane.exp_row(data + t * z.stride(0), 0, num_columns, head, m[t], target[t] - first);
    }
  });
}

std::string isa() {
  return lanes().isa;
}

}  // namespace
}  // namespace unlearn_native

TORCH_LIBRARY(unlearn_native, m) {
  m.def(
      "target_dot(Tensor hidden, Tensor weight, Tensor targets) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "exp_sums(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor? lora_hidden, Tensor? lora_b, "
      "float logit_scale, float softcap, Tensor offset, Tensor(a!) sums, Tensor(b!)? e, Tensor(c!) scratch) -> bool");
  m.def(
      "row_grad(Tensor e, Tensor matrix, Tensor? targets, Tensor? target_coeff, Tensor e_coeff, bool accumulate, "
      "Tensor(a!) out, Tensor(b!) scratch) -> bool");
  m.def(
      "col_grad(Tensor e, Tensor rows, Tensor? targets, Tensor? target_coeff, Tensor e_coeff, bool accumulate, "
      "Tensor(a!) out, Tensor(b!) scratch) -> bool");
  m.def(
      "exp_rows(Tensor(a!) z, Tensor targets, Tensor? bias, float logit_scale, float softcap, Tensor offset, int first, "
      "Tensor(b!) sums) -> ()");
  m.def(
      "token_stats(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor? lora_hidden, Tensor? lora_b, "
      "float logit_scale, float softcap, Tensor(a!) stats, Tensor(b!) scratch) -> bool");
  m.def(
      "logits(Tensor hidden, Tensor weight, Tensor? bias, Tensor? lora_hidden, Tensor? lora_b, float logit_scale, "
      "float softcap, Tensor(a!) out, Tensor(b!) scratch) -> bool");
  m.def(
      "kl_rows(Tensor(a!) policy, Tensor(b!) reference, float softcap, Tensor(c!) kl, Tensor(d!)? g) -> ()");
  m.def("pooled_empty(int[] size, ScalarType dtype) -> Tensor", unlearn_native::pooled_empty);
  m.def("release_memory() -> int", unlearn_native::release_memory);
  m.def("isa() -> str", unlearn_native::isa);
  m.def("serves_bf16() -> bool", unlearn_native::serves_bf16);
}

TORCH_LIBRARY_IMPL(unlearn_native, CPU, m) {
  m.impl("target_dot", unlearn_native::target_dot_cpu);
  m.impl("exp_sums", unlearn_native::exp_sums_cpu);
  m.impl("row_grad", unlearn_native::row_grad_cpu);
  m.impl("col_grad", unlearn_native::col_grad_cpu);
  m.impl("exp_rows", unlearn_native::exp_rows_cpu);
  m.impl("token_stats", unlearn_native::token_stats_cpu);
  m.impl("logits", unlearn_native::logits_cpu);
  m.impl("kl_rows", unlearn_native::kl_rows_cpu);
}

TORCH_LIBRARY_IMPL(unlearn_native, Meta, m) {
  m.impl("target_dot", unlearn_native::target_dot_meta);
}
