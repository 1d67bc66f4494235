// sphere_step_ on the CPU: rows in parallel, each in a scratch buffer that stays in the cache.
#include <algorithm>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "arguments.h"
#include "one_thread.h"

namespace dti_fast {
namespace {

void sphere_step_(
    Tensor p,                             // [K, D]
    Tensor grad,                          // [K, D]
    std::optional<Tensor> mu,             // [K, D]
    std::optional<Tensor> second_moment,  // [K, 1]
    Tensor step,
    Tensor lr,
    double kappa,
    double beta,
    double eps,
    double momentum,
    std::optional<Tensor> momentum_buffer,  // [K, D]
    std::optional<Tensor> grad_scale,
    std::optional<Tensor> found_inf) {
  if (found_inf && *floats(found_inf) != 0) return;
  const int64_t K = p.size(0), D = p.size(1);
  const SphereStep options(kappa, beta, eps, momentum);
  const float rate = *floats(lr);
  const float* const counts = floats(step);
  const float* const scales = floats(grad_scale);
  const int64_t count_stride = row_stride(step), scale_stride = scales ? row_stride(*grad_scale) : 0;
  const bool prior = mu && kappa != 0;
  const Row grad_row = first_row(grad), mu_row = prior ? first_row(*mu) : Row{};
  const int64_t p_stride = p.stride(0), p_column = p.stride(1), grad_stride = grad.stride(0);
  const int64_t mu_stride = prior ? mu->stride(0) : 0, nu_stride = second_moment ? second_moment->stride(0) : 0;
  float* const p_data = floats(p);
  float* const nu_data = second_moment ? floats(*second_moment) : nullptr;
  float* const past_data = momentum_buffer ? floats(*momentum_buffer) : nullptr;
  const int64_t past_stride = past_data ? momentum_buffer->stride(0) : 0;
  const int64_t past_column = past_data ? momentum_buffer->stride(1) : 0;

  const int64_t rows_at_once = std::max<int64_t>(1, 32768 / std::max<int64_t>(D, 1));
  torch::stable::parallel_for(0, K, rows_at_once, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(2 * D);
    float *const row = scratch.data(), *const g = row + D;
    const OneThread team{D};
    for (int64_t k = begin; k < end; ++k) {
      float* const home = p_data + k * p_stride;
      with_pointer({home, p_column, ScalarType::Float}, [&](auto from) {
        team.each([&](int64_t i) { row[i] = from[i]; });
      });
      with_pointer(grad_row.at(k, grad_stride), [&](auto from) {
        team.each([&](int64_t i) { g[i] = from[i]; });
      });
      float unused = 0;
      float& nu = nu_data ? nu_data[k * nu_stride] : unused;
      const auto past = [&](int64_t i) { return past_data + k * past_stride + i * past_column; };
      const float inverse_scale = scales ? 1 / scales[k * scale_stride] : 1.0f;
      bool moved = false;
      const auto step_along = [&](auto mean) {
        moved = sphere_step(team, row, g, mean, nu, past, options, inverse_scale, rate, counts[k * count_stride]);
      };
      if (prior)
        with_pointer(mu_row.at(k, mu_stride), [&](auto mean) { step_along([=](int64_t i) -> float { return mean[i]; }); });
      else
        step_along([](int64_t) { return 0.0f; });
      if (!moved) continue;
      if (p_column == 1)
        std::copy(row, row + D, home);
      else
        team.each([&](int64_t i) { home[i * p_column] = row[i]; });
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dti_fast_C, CPU, m) { m.impl("sphere_step_", TORCH_BOX(&sphere_step_)); }

}  // namespace dti_fast
