// tangent_sum on the CPU: rows in parallel, the samples of each in their order.
#include <algorithm>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "arguments.h"
#include "one_thread.h"

namespace dti_fast {
namespace {

std::tuple<Tensor, Tensor> tangent_sum(
    Tensor grad,  // [B, K, D]
    Tensor p) {   // [K, D]
  const int64_t B = grad.size(0), K = p.size(0), D = p.size(1);
  const Tensor sums = torch::stable::new_empty(p, {K, D}), counts = torch::stable::new_empty(p, {K, 1});
  float *const sum_data = floats(sums), *const count_data = floats(counts);
  const Row grad_row{grad.const_data_ptr(), grad.stride(2), grad.scalar_type()}, p_row = first_row(p);
  const int64_t sample_stride = grad.stride(0), grad_stride = grad.stride(1), p_stride = p.stride(0);
  const int64_t rows_at_once = std::max<int64_t>(1, 32768 / std::max<int64_t>(B * D, 1));
  torch::stable::parallel_for(0, K, rows_at_once, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(2 * D);
    float *const row = scratch.data(), *const g = row + D;
    const OneThread team{D};
    for (int64_t k = begin; k < end; ++k) {
      with_pointer(p_row.at(k, p_stride), [&](auto from) { team.each([&](int64_t i) { row[i] = from[i]; }); });
      float* const sum = sum_data + k * D;
      std::fill(sum, sum + D, 0.0f);
      count_data[k] = 0;
      for (int64_t b = 0; b < B; ++b) {
        with_pointer(grad_row.at(b, sample_stride).at(k, grad_stride), [&](auto from) {
          team.each([&](int64_t i) { g[i] = from[i]; });
        });
        const auto point = [&](int64_t i) { return row[i]; };
        if (add_tangent(team, g, point, [&](int64_t i, float u) { sum[i] += u; })) ++count_data[k];
      }
    }
  });
  return {sums, counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dti_fast_C, CPU, m) { m.impl("tangent_sum", TORCH_BOX(&tangent_sum)); }

}  // namespace dti_fast
