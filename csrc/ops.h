// The kernels on plain memory, which ops.cpp registers with torch and the race test calls. Shapes as in kernels/<op>.py. Last
// dimensions are contiguous, tensors that are written are contiguous unless strides are said to be free.
#pragma once

#include "view.h"

// (name, parameters)
#define FASTDIT_KERNELS(KERNEL)                                                                                                  \
  KERNEL(adamw_step,                                                                                                             \
         (View blocks, View table, View changing, View gradient, View copy, View grad_scale, View found_inf, int64_t averages))  \
  KERNEL(modulate_forward, (View x, View shift, View scale, double eps, View y, View stats))                                     \
  KERNEL(modulate_backward, (View dy, View x, View stats, View scale, View dx, View dmodulation))                                \
  KERNEL(gated_residual_forward, (View x, View branch, View gate, View r))                                                       \
  KERNEL(gated_residual_backward, (View dr, View branch, View gate, View dbranch, View dgate))                                   \
  KERNEL(gated_residual_modulate_forward,                                                                                        \
         (View x, View branch, View gate, View shift, View scale, View bias, double eps, View r, View y, View stats))            \
  KERNEL(gated_residual_modulate_backward, (View dr, View dy, View r, View branch, View stats, View gate, View scale, View bias, \
                                            View dx, View dbranch, View dmodulation, View dbias))                                \
  KERNEL(qk_norm_rope_forward, (View qkv, View q_weight, View k_weight, View cos, View sin, double eps, View q, View k))         \
  KERNEL(qk_norm_rope_backward, (View dq, View dk, View dv, View qkv, View q_weight, View k_weight, View cos, View sin,          \
                                 double eps, View dqkv, View dweights))                                                          \
  KERNEL(dit_block_forward,                                                                                                      \
         (View x, View y, View gate1, View shift2, View scale2, View gate2, View next_shift, View next_scale, View qkv_weight,   \
          View q_weight, View k_weight, View cos, View sin, View out_weight, View up_weight, View up_bias, View down_weight,     \
          View down_bias, int64_t N, double eps, double qk_eps, View scratch, View r, View y_out))                               \
  KERNEL(swiglu_forward, (View packed, View bias, View out))                                                                     \
  KERNEL(swiglu_backward, (View dout, View packed, View bias, View dpacked, View dbias, View out))                               \
  KERNEL(flow_interpolate_forward, (View x0, View noise, View t, View out))                                                      \
  KERNEL(flow_interpolate_backward, (View dout, View t, View dx0, View dnoise))                                                  \
  KERNEL(flow_matching_loss_forward, (View v, View x0, View noise, View weight, View loss, View error))                          \
  KERNEL(flow_matching_loss_backward, (View dloss, View error, View weight, View dv))                                            \
  KERNEL(counter_random_forward, (View ids, int64_t key0, int64_t key1, int64_t stream, bool normal, View out))

#define DECLARE(name, parameters) void name parameters;
namespace fastdit::amx {
FASTDIT_KERNELS(DECLARE)
}
namespace fastdit::avx512 {
FASTDIT_KERNELS(DECLARE)
}
namespace fastdit::avx2 {
FASTDIT_KERNELS(DECLARE)
}
namespace fastdit::baseline {
FASTDIT_KERNELS(DECLARE)
}
#undef DECLARE
