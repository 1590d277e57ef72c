// Registers the kernels with torch through its stable ABI: one binary for every torch from 2.11 on. kernels/<op>.py allocates what
// they write, and calls them as torch.ops.fastdit_cpp.<op>.
#include "ops.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "parallel.h"

namespace fastdit {

void parallel_for(int64_t units, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

namespace {

using torch::stable::Tensor;

View view(const std::optional<Tensor>& optional) {
  View out;
  if (!optional) return out;
  const Tensor& t = *optional;
  out.data = t.data_ptr();
  const auto type = t.scalar_type();
  out.type = type == torch::headeronly::ScalarType::BFloat16 ? Type::bf16
             : type == torch::headeronly::ScalarType::Half   ? Type::fp16
                                                             : Type::fp32;
  for (int64_t i = 0; i < t.dim(); i++) out.size[i] = t.size(i), out.stride[i] = t.stride(i);
  return out;
}

// What torch passes for a parameter of a kernel, and back.
template <class P> struct Given { using type = P; };
template <> struct Given<View> { using type = std::optional<Tensor>; };
View pass(const std::optional<Tensor>& t) { return view(t); }
double pass(double x) { return x; }
int64_t pass(int64_t x) { return x; }
bool pass(bool x) { return x; }

template <auto kernel> struct Op;
template <class... P, void (*kernel)(P...)> struct Op<kernel> {
  static void call(typename Given<P>::type... arguments) { kernel(pass(arguments)...); }
};

}  // namespace
}  // namespace fastdit

#define FASTDIT_OPS(OP)                                                                                                              \
  OP(modulate_forward, "Tensor? x, Tensor? shift, Tensor? scale, float eps, Tensor(a!)? y, Tensor(b!)? stats")                       \
  OP(modulate_backward, "Tensor? dy, Tensor? x, Tensor? stats, Tensor? scale, Tensor(a!)? dx, Tensor(b!)? dmodulation")              \
  OP(gated_residual_forward, "Tensor? x, Tensor? branch, Tensor? gate, Tensor(a!)? r")                                               \
  OP(gated_residual_backward, "Tensor? dr, Tensor? branch, Tensor? gate, Tensor(a!)? dbranch, Tensor(b!)? dgate")                    \
  OP(gated_residual_modulate_forward, "Tensor? x, Tensor? branch, Tensor? gate, Tensor? shift, Tensor? scale, float eps, "           \
                                      "Tensor(a!)? r, Tensor(b!)? y, Tensor(c!)? stats")                                             \
  OP(gated_residual_modulate_backward, "Tensor? dr, Tensor? dy, Tensor? r, Tensor? branch, Tensor? stats, Tensor? gate, "            \
                                       "Tensor? scale, Tensor(a!)? dx, Tensor(b!)? dbranch, Tensor(c!)? dmodulation")                \
  OP(qk_norm_rope_forward, "Tensor? qkv, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, float eps, "                  \
                           "Tensor(a!)? q, Tensor(b!)? k")                                                                           \
  OP(qk_norm_rope_backward, "Tensor? dq, Tensor? dk, Tensor? dv, Tensor? qkv, Tensor? q_weight, Tensor? k_weight, Tensor? cos, "     \
                            "Tensor? sin, float eps, Tensor(a!)? dqkv, Tensor(b!)? dweights")                                        \
  OP(swiglu_forward, "Tensor? packed, Tensor(a!)? out")                                                                              \
  OP(swiglu_backward, "Tensor? grad, Tensor? packed, Tensor(a!)? grad_packed")                                                       \
  OP(flow_interpolate_forward, "Tensor? x0, Tensor? noise, Tensor? t, Tensor(a!)? out")                                              \
  OP(flow_interpolate_backward, "Tensor? grad, Tensor? t, Tensor(a!)? grad_x0, Tensor(b!)? grad_noise")                              \
  OP(flow_matching_loss_forward, "Tensor? v, Tensor? x0, Tensor? noise, Tensor? weight, Tensor(a!)? loss, Tensor(b!)? error")        \
  OP(flow_matching_loss_backward, "Tensor? grad, Tensor? error, Tensor? weight, Tensor(a!)? grad_v")                                 \
  OP(counter_random_forward, "Tensor? ids, int key0, int key1, int stream, bool normal, Tensor(a!)? out")

STABLE_TORCH_LIBRARY(fastdit_cpp, m) {
#define DEFINE(name, arguments) m.def(#name "(" arguments ") -> ()");
  FASTDIT_OPS(DEFINE)
}

STABLE_TORCH_LIBRARY_IMPL(fastdit_cpp, CPU, m) {
#define IMPLEMENT(name, arguments) m.impl(#name, TORCH_BOX(&fastdit::Op<&fastdit::name>::call));
  FASTDIT_OPS(IMPLEMENT)
}
