// The arithmetic of the ops on one row, compiled by the host compiler and by nvcc: what the CPU tests prove, CUDA runs.
//
// Letters: K vectors, D dimensions.
#pragma once

#include <cmath>
#include <cstdint>

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#ifdef __CUDACC__
#define DTI_HD __host__ __device__ __forceinline__
#else
#define DTI_HD inline
#endif

namespace dti_fast {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

// A row of float, BFloat16 or Half with any stride, read as float.
struct Row {
  const void* data;
  int64_t stride;  // in elements
  ScalarType dtype;

  DTI_HD float operator[](int64_t i) const {
    switch (dtype) {
      case ScalarType::BFloat16:
        return static_cast<float>(static_cast<const BFloat16*>(data)[i * stride]);
      case ScalarType::Half:
        return static_cast<float>(static_cast<const Half*>(data)[i * stride]);
      default:
        return static_cast<const float*>(data)[i * stride];
    }
  }

  // The row `k` of the matrix whose row 0 this is.
  DTI_HD Row at(int64_t k, int64_t row_stride) const {
    const int64_t bytes = k * row_stride * (dtype == ScalarType::Float ? 4 : 2);
    return {static_cast<const char*>(data) + bytes, stride, dtype};
  }
};

// Element `i` of a float, BFloat16 or Half tensor, rounded from a float.
DTI_HD void store(void* data, ScalarType dtype, int64_t i, float value) {
  switch (dtype) {
    case ScalarType::BFloat16:
      static_cast<BFloat16*>(data)[i] = BFloat16(value);
      break;
    case ScalarType::Half:
      static_cast<Half*>(data)[i] = Half(value);
      break;
    default:
      static_cast<float*>(data)[i] = value;
  }
}

struct SphereStep {
  float kappa, beta, one_minus_beta, log_beta, eps, momentum, one_minus_momentum;

  SphereStep(double kappa, double beta, double eps, double momentum)
      : kappa(static_cast<float>(kappa)),
        beta(static_cast<float>(beta)),
        one_minus_beta(static_cast<float>(1 - beta)),
        log_beta(beta > 0 ? static_cast<float>(std::log(beta)) : 0.0f),
        eps(static_cast<float>(eps)),
        momentum(static_cast<float>(momentum)),
        one_minus_momentum(static_cast<float>(1 - momentum)) {}
};

// Gradient of loss and prior.
DTI_HD float with_prior(float g, float inverse_scale, float kappa, float mu) { return g * inverse_scale - kappa * mu; }

// One Riemannian step of the row p, [D], for the loss gradient g, [D], which is overwritten:
//
//     g  = g inverse_scale - kappa mu
//     g  = momentum m + (1 - momentum) g
//     g  = g - (g . p) p,  m = g
//     nu = beta nu + (1 - beta) |g|^2,  nu_hat = nu / (1 - beta^step)
//     p  = normalise(p - lr g / (sqrt(nu_hat) + eps))
//
// `team` is whoever holds the row: sum(f) adds f(i) over all of it, each(f) visits the member's own part.  mu(i) is the
// prior's element, 0 without a prior; m(i) is where m's element lies, null beyond the row.  With beta 0 nu is not used,
// with momentum 0 m is not.  Returns false where p is to be left as it was, bit by bit: for a loss gradient that is zero
// throughout, which leaves nu and m too, and for a projected gradient of zero.
template <class Team, class Prior, class Momentum>
DTI_HD bool sphere_step(
    const Team& team, float* p, float* g, Prior mu, float& nu, Momentum m, const SphereStep& o, float inverse_scale,
    float lr, float step) {
  if (team.sum([&](int64_t i) { return g[i] != 0 ? 1.0f : 0.0f; }) == 0) return false;
  team.each([&](int64_t i) { g[i] = with_prior(g[i], inverse_scale, o.kappa, mu(i)); });
  if (o.momentum > 0)
    team.each([&](int64_t i) {
      const float* const past = m(i);
      g[i] = o.momentum * (past ? *past : 0.0f) + o.one_minus_momentum * g[i];
    });
  const float along = team.sum([&](int64_t i) { return g[i] * p[i]; });
  team.each([&](int64_t i) { g[i] -= along * p[i]; });
  if (o.momentum > 0)
    team.each([&](int64_t i) {
      if (float* const past = m(i)) *past = g[i];
    });
  const float norm_squared = team.sum([&](int64_t i) { return g[i] * g[i]; });
  float nu_hat = norm_squared;
  if (o.beta > 0) {
    nu = o.beta * nu + o.one_minus_beta * norm_squared;
    nu_hat = nu / -expm1f(step * o.log_beta);
  }
  const float pace = lr / (sqrtf(nu_hat) + o.eps);
  team.each([&](int64_t i) { p[i] -= pace * g[i]; });
  const float inverse_length = 1 / sqrtf(team.sum([&](int64_t i) { return p[i] * p[i]; }));
  team.each([&](int64_t i) { p[i] *= inverse_length; });
  return norm_squared != 0;
}

// Adds up unit tangents: of one sample's gradient g, [D], which is overwritten; p(i) is the row's element, and add(i, u)
// adds u to the sum's:
//
//     g   = g - (g . p) p
//     sum = sum + g / |g|
//
// Returns false, and adds nothing, where g is zero along the sphere.
template <class Team, class Point, class Add>
DTI_HD bool add_tangent(const Team& team, float* g, Point p, Add add) {
  const float along = team.sum([&](int64_t i) { return g[i] * p(i); });
  team.each([&](int64_t i) { g[i] -= along * p(i); });
  const float norm_squared = team.sum([&](int64_t i) { return g[i] * g[i]; });
  if (norm_squared == 0) return false;
  const float inverse_norm = 1 / sqrtf(norm_squared);
  team.each([&](int64_t i) { add(i, inverse_norm * g[i]); });
  return true;
}

// What token_embed reads from.
struct Embeddings {
  Row vocabulary;  // [V, D]
  int64_t vocabulary_stride, V;
  const float* directions;  // [K, D], or one such for each sample
  int64_t sample_stride, direction_stride, direction_column, K;
  const float* magnitudes;  // [K, 1]
  int64_t magnitude_stride;
  int64_t first_id;

  // Element d of the embedding of a sample's id: magnitude times direction, the vocabulary's, or NaN for neither.
  DTI_HD float operator()(int64_t sample, int64_t id, int64_t d) const {
    const int64_t k = id - first_id;
    if (k >= 0 && k < K)
      return magnitudes[k * magnitude_stride] * directions[sample * sample_stride + k * direction_stride + d * direction_column];
    if (id >= 0 && id < V) return vocabulary.at(id, vocabulary_stride)[d];
    return NAN;
  }
};

}  // namespace dti_fast
