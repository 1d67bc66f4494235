// token_embed and its gradient on CUDA.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "arguments.h"

namespace dti_fast {
namespace {

constexpr unsigned kThreads = 128;

// One block per position.
__global__ void token_embed_kernel(
    const int64_t* ids,  // [N]
    Embeddings embedding,
    void* out,  // [N, D]
    ScalarType dtype,
    int64_t S,  // positions of a sample
    int64_t D) {
  const int64_t n = blockIdx.x, id = ids[n], sample = n / S;
  for (int64_t d = threadIdx.x; d < D; d += kThreads) store(out, dtype, n * D + d, embedding(sample, id, d));
}

// One thread per element of the gradient, which adds its positions, all or those of a sample, in their order.
__global__ void token_embed_backward_kernel(
    Row grad,            // [N, D]
    const int64_t* ids,  // [N]
    const float* magnitudes,
    int64_t magnitude_stride,
    float* out,  // [K, D] or [B, K, D]
    int64_t first_id,
    int64_t S,
    int64_t K,
    int64_t D) {
  const int64_t b = blockIdx.x / K, k = blockIdx.x % K, d = blockIdx.y * kThreads + threadIdx.x;
  if (d >= D) return;
  float sum = 0;
  for (int64_t n = b * S; n < (b + 1) * S; ++n)
    if (ids[n] == first_id + k) sum += grad[n * D + d];
  out[blockIdx.x * D + d] = magnitudes[k * magnitude_stride] * sum;
}

Tensor token_embed(
    Tensor ids,         // [...]
    Tensor vocabulary,  // [V, D]
    Tensor directions,  // [K, D], or [B, K, D]: each sample's own
    Tensor magnitudes,  // [K, 1]
    int64_t first_id) {
  const torch::stable::accelerator::DeviceGuard guard(vocabulary.get_device_index());
  const int64_t D = vocabulary.size(1), N = ids.numel();
  const Tensor positions = torch::stable::contiguous(ids);
  const Tensor out = empty_rows(vocabulary, ids, D);
  if (N * D == 0) return out;
  const int64_t S = directions.dim() == 3 ? N / directions.size(0) : N;
  token_embed_kernel<<<static_cast<unsigned>(N), kThreads, 0, current_stream(vocabulary)>>>(
      static_cast<const int64_t*>(positions.const_data_ptr()),
      embeddings(vocabulary, directions, magnitudes, first_id), out.mutable_data_ptr(), out.scalar_type(), S, D);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

Tensor token_embed_backward(
    Tensor grad,        // [..., D]
    Tensor ids,         // [...]
    Tensor magnitudes,  // [K, 1]
    int64_t first_id,
    bool per_sample) {
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  const int64_t K = magnitudes.size(0), D = grad.size(grad.dim() - 1), B = per_sample ? ids.size(0) : 1;
  const Tensor rows = torch::stable::contiguous(grad), positions = torch::stable::contiguous(ids);
  const Tensor out = empty_sums(magnitudes, ids, D, per_sample);
  if (B * K * D == 0) return out;
  const dim3 grid(static_cast<unsigned>(B * K), static_cast<unsigned>((D + kThreads - 1) / kThreads));
  token_embed_backward_kernel<<<grid, kThreads, 0, current_stream(grad)>>>(
      {rows.const_data_ptr(), 1, rows.scalar_type()}, static_cast<const int64_t*>(positions.const_data_ptr()),
      floats(magnitudes), magnitudes.stride(0), floats(out), first_id, ids.numel() / B, K, D);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dti_fast_C, CUDA, m) {
  m.impl("token_embed", TORCH_BOX(&token_embed));
  m.impl("token_embed_backward", TORCH_BOX(&token_embed_backward));
}

}  // namespace dti_fast
