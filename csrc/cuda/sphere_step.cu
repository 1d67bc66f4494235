// sphere_step_ on CUDA: one block per row, the row in registers, every tensor touched once.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "arguments.h"
#include "block.h"

namespace dti_fast {
namespace {

struct Arguments {
  float* p;  // [K, D]
  int64_t p_stride, p_column;
  Row grad;  // [K, D]
  int64_t grad_stride;
  Row mu;  // [K, D]; data is null without a prior
  int64_t mu_stride;
  float* nu;  // [K, 1] or null
  int64_t nu_stride;
  float* past;  // [K, D] or null
  int64_t past_stride, past_column;
  const float* step;  // one number or [K, 1]
  int64_t step_stride;
  const float* grad_scale;  // one number or [K, 1] or null
  int64_t scale_stride;
  const float *lr, *found_inf;  // the last may be null
  int64_t D;
  SphereStep options;
};

// Bounded, because 1024 threads with more than 64 registers each do not launch.
template <int N>
__global__ void __launch_bounds__(1024) sphere_step_kernel(const Arguments a) {
  if (a.found_inf && *a.found_inf != 0) return;
  __shared__ float warps[32];
  const int64_t k = blockIdx.x;
  float* const home = a.p + k * a.p_stride;
  const Row grad = a.grad.at(k, a.grad_stride), mu = a.mu.at(k, a.mu_stride);
  const float inverse_scale = a.grad_scale ? 1 / a.grad_scale[k * a.scale_stride] : 1.0f;
  float p[N], g[N];
  const Block<N> team{warps};
  team.each([&](int64_t i) {
    const int64_t d = threadIdx.x + i * blockDim.x;
    p[i] = d < a.D ? home[d * a.p_column] : 0.0f;
    g[i] = d < a.D ? grad[d] : 0.0f;
  });
  float nu = a.nu ? a.nu[k * a.nu_stride] : 0.0f;
  const auto mean = [&](int64_t i) {
    const int64_t d = threadIdx.x + i * blockDim.x;
    return a.mu.data && d < a.D ? mu[d] : 0.0f;
  };
  const auto past = [&](int64_t i) -> float* {
    const int64_t d = threadIdx.x + i * blockDim.x;
    return d < a.D ? a.past + k * a.past_stride + d * a.past_column : nullptr;
  };
  const float count = a.step[k * a.step_stride];
  const bool moved = sphere_step(team, p, g, mean, nu, past, a.options, inverse_scale, *a.lr, count);
  if (moved)
    team.each([&](int64_t i) {
      const int64_t d = threadIdx.x + i * blockDim.x;
      if (d < a.D) home[d * a.p_column] = p[i];
    });
  if (a.nu && threadIdx.x == 0) a.nu[k * a.nu_stride] = nu;
}

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
  const int64_t K = p.size(0), D = p.size(1);
  if (K == 0 || D == 0) return;
  STD_TORCH_CHECK(D <= 8192, "the native CUDA kernel of sphere_step_ takes rows of up to 8192, got ", D);
  const bool prior = mu && kappa != 0;
  const Arguments arguments{
      floats(p), p.stride(0), p.stride(1),
      first_row(grad), grad.stride(0),
      prior ? first_row(*mu) : Row{}, prior ? mu->stride(0) : 0,
      second_moment ? floats(*second_moment) : nullptr, second_moment ? second_moment->stride(0) : 0,
      momentum_buffer ? floats(*momentum_buffer) : nullptr,
      momentum_buffer ? momentum_buffer->stride(0) : 0, momentum_buffer ? momentum_buffer->stride(1) : 0,
      floats(step), row_stride(step), floats(grad_scale), grad_scale ? row_stride(*grad_scale) : 0,
      floats(lr), floats(found_inf), D, SphereStep(kappa, beta, eps, momentum)};

  const torch::stable::accelerator::DeviceGuard guard(p.get_device_index());
  const cudaStream_t stream = current_stream(p);
  const unsigned threads = threads_for(D);
  const auto kernel = D <= 4 * threads ? sphere_step_kernel<4> : sphere_step_kernel<8>;
  kernel<<<static_cast<unsigned>(K), threads, 0, stream>>>(arguments);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dti_fast_C, CUDA, m) { m.impl("sphere_step_", TORCH_BOX(&sphere_step_)); }

}  // namespace dti_fast
