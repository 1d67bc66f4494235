// token_embed and its gradient on the CPU.
#include <algorithm>

#include <torch/csrc/stable/library.h>

#include "arguments.h"

namespace dti_fast {
namespace {

Tensor token_embed(
    Tensor ids,         // [...]
    Tensor vocabulary,  // [V, D]
    Tensor directions,  // [K, D], or [B, K, D]: each sample's own
    Tensor magnitudes,  // [K, 1]
    int64_t first_id) {
  const int64_t D = vocabulary.size(1), N = ids.numel();
  const Tensor positions = torch::stable::contiguous(ids);
  const Tensor out = empty_rows(vocabulary, ids, D);
  const Embeddings embedding = embeddings(vocabulary, directions, magnitudes, first_id);
  const int64_t* const id = static_cast<const int64_t*>(positions.const_data_ptr());
  void* const to = out.mutable_data_ptr();
  const ScalarType dtype = out.scalar_type();
  if (N == 0) return out;
  const int64_t positions_of_a_sample = directions.dim() == 3 ? N / directions.size(0) : N;
  const int64_t rows_at_once = std::max<int64_t>(1, 32768 / std::max<int64_t>(D, 1));
  torch::stable::parallel_for(0, N, rows_at_once, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      for (int64_t d = 0; d < D; ++d) store(to, dtype, n * D + d, embedding(n / positions_of_a_sample, id[n], d));
  });
  return out;
}

Tensor token_embed_backward(
    Tensor grad,        // [..., D]
    Tensor ids,         // [...]
    Tensor magnitudes,  // [K, 1]
    int64_t first_id,
    bool per_sample) {
  const int64_t K = magnitudes.size(0), D = grad.size(grad.dim() - 1), B = per_sample ? ids.size(0) : 1;
  const Tensor rows = torch::stable::contiguous(grad), positions = torch::stable::contiguous(ids);
  const Tensor out = empty_sums(magnitudes, ids, D, per_sample);
  if (B == 0) return out;
  const int64_t S = ids.numel() / B;
  const Row row{rows.const_data_ptr(), 1, rows.scalar_type()};
  const int64_t* const id = static_cast<const int64_t*>(positions.const_data_ptr());
  const float* const magnitude = floats(magnitudes);
  const int64_t magnitude_stride = magnitudes.stride(0);
  float* const to = floats(out);
  const int64_t sums_at_once = std::max<int64_t>(1, 32768 / std::max<int64_t>(S, 1));
  torch::stable::parallel_for(0, B * K, sums_at_once, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / K, k = i % K;
      float* const sum = to + i * D;
      std::fill(sum, sum + D, 0.0f);
      for (int64_t n = b * S; n < (b + 1) * S; ++n) {
        if (id[n] != first_id + k) continue;
        const Row from = row.at(n, D);
        for (int64_t d = 0; d < D; ++d) sum[d] += from[d];
      }
      for (int64_t d = 0; d < D; ++d) sum[d] *= magnitude[k * magnitude_stride];
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dti_fast_C, CPU, m) {
  m.impl("token_embed", TORCH_BOX(&token_embed));
  m.impl("token_embed_backward", TORCH_BOX(&token_embed_backward));
}

}  // namespace dti_fast
