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

inline Embeddings embeddings(
    const Tensor& vocabulary, const Tensor& directions, const Tensor& magnitudes, int64_t first_id) {
  return {
      first_row(vocabulary), vocabulary.stride(0), vocabulary.size(0),
      floats(directions), directions.stride(0), directions.stride(1), directions.size(0),
      floats(magnitudes), magnitudes.stride(0), first_id};
}

// [..., D] for ids of [...]
inline Tensor empty_rows(const Tensor& like, const Tensor& ids, int64_t D) {
  std::vector<int64_t> shape(ids.sizes().begin(), ids.sizes().end());
  shape.push_back(D);
  return torch::stable::new_empty(like, shape);
}

#ifdef __CUDACC__
inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}
#endif

}  // namespace dti_fast
