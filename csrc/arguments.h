// Views of torch's tensors; shapes, dtypes and devices were checked in Python.
#pragma once

#include <optional>
#include <vector>

#include <torch/csrc/stable/macros.h>  // torch 2.10's other headers leave it out
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "dti_math.h"

namespace dti_fast {

using torch::stable::Tensor;

inline Row first_row(const Tensor& matrix) { return {matrix.const_data_ptr(), matrix.stride(1), matrix.scalar_type()}; }

inline float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

inline const float* floats(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr;
}

// Between the numbers of two rows; 0 for one number that serves all.
inline int64_t row_stride(const Tensor& numbers) { return numbers.numel() > 1 ? numbers.stride(0) : 0; }

inline Embeddings embeddings(
    const Tensor& vocabulary, const Tensor& directions, const Tensor& magnitudes, int64_t first_id) {
  const int64_t row = directions.dim() - 2;
  return {
      first_row(vocabulary), vocabulary.stride(0), vocabulary.size(0),
      floats(directions), directions.dim() == 3 ? directions.stride(0) : 0, directions.stride(row),
      directions.stride(row + 1), directions.size(row),
      floats(magnitudes), magnitudes.stride(0), first_id};
}

// [..., D] for ids of [...]
inline Tensor empty_rows(const Tensor& like, const Tensor& ids, int64_t D) {
  std::vector<int64_t> shape(ids.sizes().begin(), ids.sizes().end());
  shape.push_back(D);
  return torch::stable::new_empty(like, shape);
}

// Gradient of directions, [K, D], or [B, K, D] for ids of [B, ...]
inline Tensor empty_sums(const Tensor& magnitudes, const Tensor& ids, int64_t D, bool per_sample) {
  std::vector<int64_t> shape{magnitudes.size(0), D};
  if (per_sample) shape.insert(shape.begin(), ids.size(0));
  return torch::stable::new_empty(magnitudes, shape);
}

#ifdef __CUDACC__
inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}
#endif

}  // namespace dti_fast
