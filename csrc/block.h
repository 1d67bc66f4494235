// A block of threads as a `Team`.
#pragma once

#include <algorithm>
#include <cstdint>

namespace dti_fast {

// The threads of a block hold N elements of the row each, those with index thread, thread + blockDim.x, ...
template <int N>
struct Block {
  float* warps;  // [32] shared

  template <class F>
  __device__ float sum(F f) const {
    float total = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) total += f(i);
    for (int width = 16; width > 0; width /= 2) total += __shfl_xor_sync(~0u, total, width);
    __syncthreads();  // the sum before this one may still be read
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = total;
    __syncthreads();
    total = 0;
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) total += warps[warp];
    return total;
  }

  template <class F>
  __device__ void each(F f) const {
#pragma unroll
    for (int i = 0; i < N; ++i) f(i);
  }
};

// How many threads share a row of up to 8192: four elements each, or eight where that takes more than 1024.
inline unsigned threads_for(int64_t D) {
  return static_cast<unsigned>(std::clamp<int64_t>((D + 127) / 128 * 32, 32, 1024));
}

}  // namespace dti_fast
