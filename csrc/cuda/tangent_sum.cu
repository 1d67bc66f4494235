// tangent_sum on CUDA: one block per row, gradient and sum in registers; the row comes from the cache.
#include <algorithm>
#include <tuple>

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "arguments.h"
#include "block.h"

namespace dti_fast {
namespace {

template <int N>
__global__ void __launch_bounds__(1024) tangent_sum_kernel(
    const void* grads,  // [B, K, D] contiguous
    ScalarType dtype,
    const float* rows,  // [K, D] contiguous
    float* sums,        // [K, D]
    float* counts,      // [K, 1]
    int64_t B,
    int D) {
  __shared__ float warps[32];
  const int64_t k = blockIdx.x;
  float g[N], sum[N], count = 0;
  const Block<N> team{warps};
  const auto at = [&](int64_t i) { return static_cast<int>(threadIdx.x + i * blockDim.x); };
  const float* const row = rows + k * D;
  const auto p = [&](int64_t i) { return at(i) < D ? row[at(i)] : 0.0f; };
  team.each([&](int64_t i) { sum[i] = 0; });
  for (int64_t b = 0; b < B; ++b) {
    const Row grad = Row{grads, 1, dtype}.at(b * gridDim.x + k, D);
    team.each([&](int64_t i) { g[i] = at(i) < D ? grad[at(i)] : 0.0f; });
    if (add_tangent(team, g, p, [&](int64_t i, float u) { sum[i] += u; })) ++count;
  }
  team.each([&](int64_t i) {
    if (at(i) < D) sums[k * D + at(i)] = sum[i];
  });
  if (threadIdx.x == 0) counts[k] = count;
}

std::tuple<Tensor, Tensor> tangent_sum(
    Tensor grad,  // [B, K, D]
    Tensor p) {   // [K, D]
  const torch::stable::accelerator::DeviceGuard guard(p.get_device_index());
  const int64_t B = grad.size(0), K = p.size(0), D = p.size(1);
  STD_TORCH_CHECK(D <= 8192, "the native CUDA kernel of tangent_sum takes rows of up to 8192, got ", D);
  const Tensor grads = torch::stable::contiguous(grad), rows = torch::stable::contiguous(p);
  const Tensor sums = torch::stable::new_empty(p, {K, D}), counts = torch::stable::new_empty(p, {K, 1});
  if (K == 0) return {sums, counts};
  const unsigned threads = threads_for(D);
  const auto kernel = D <= 4 * threads ? tangent_sum_kernel<4> : tangent_sum_kernel<8>;
  kernel<<<static_cast<unsigned>(K), threads, 0, current_stream(p)>>>(
      grads.const_data_ptr(), grads.scalar_type(), floats(rows), floats(sums), floats(counts), B, static_cast<int>(D));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {sums, counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dti_fast_C, CUDA, m) { m.impl("tangent_sum", TORCH_BOX(&tangent_sum)); }

}  // namespace dti_fast
