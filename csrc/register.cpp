// Schemas of the native kernels.  The public ops live in the namespace dti_fast and are defined in Python.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(dti_fast_C, m) {
  m.def(
      "sphere_step_(Tensor(a!) p, Tensor grad, Tensor? mu, Tensor(b!)? second_moment, Tensor step, Tensor lr, *, "
      "float kappa, float beta, float eps, float momentum=0.0, Tensor(c!)? momentum_buffer=None, "
      "Tensor? grad_scale=None, Tensor? found_inf=None) -> ()");
  m.def("token_embed(Tensor ids, Tensor vocabulary, Tensor directions, Tensor magnitudes, int first_id) -> Tensor");
  m.def("token_embed_backward(Tensor grad, Tensor ids, Tensor magnitudes, int first_id, bool per_sample=False) -> Tensor");
  m.def("tangent_sum(Tensor grad, Tensor p) -> (Tensor, Tensor)");
}
