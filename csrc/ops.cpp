// Registers the kernels with torch through its stable ABI: one binary for every torch from 2.11 on. kernels/<op>.py allocates
// the tensors that they write, and calls them as torch.ops.fastdit_cpp.<op>.
#include "ops.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <optional>

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

// The type that torch passes for a kernel's parameter, and the conversion to it.
template <class P>
struct Given {
  using type = P;
};
template <>
struct Given<View> {
  using type = std::optional<Tensor>;
};
View pass(const std::optional<Tensor>& t) { return view(t); }
double pass(double x) { return x; }
int64_t pass(int64_t x) { return x; }
bool pass(bool x) { return x; }

enum class Isa { baseline, avx2, avx512, amx };
#if !defined(FASTDIT_ISAS)
#define FASTDIT_ISAS 1
#endif
// Whether this build has an instruction set: setup.py sets the bits.
bool built(Isa isa) { return FASTDIT_ISAS >> (int)isa & 1; }

// Linux gives a process AMX's registers when it asks for them.
bool may_use_tiles() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
  return false;
#endif
}

// The best instruction set here; FASTDIT_ISA=avx512, avx2 or baseline lowers it, for tests.
Isa isa() {
  static const Isa chosen = [] {
    Isa best = Isa::baseline;
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bf16");
    best = avx2 && avx512 ? may_use_tiles() ? Isa::amx : Isa::avx512 : avx2 ? Isa::avx2 : Isa::baseline;
#endif
    const char* limit = std::getenv("FASTDIT_ISA");
    if (limit && !strcmp(limit, "baseline")) best = Isa::baseline;
    if (limit && !strcmp(limit, "avx2")) best = std::min(best, Isa::avx2);
    if (limit && !strcmp(limit, "avx512")) best = std::min(best, Isa::avx512);
    while (!built(best)) best = (Isa)((int)best - 1);
    return best;
  }();
  return chosen;
}

// Its index in INSTRUCTION_SETS of kernels/library.py.
int64_t isa_number() { return (int64_t)isa(); }

// The same function for each instruction set, from the least one on.
template <auto first, auto... more>
struct Op;
template <class... P, void (*first)(P...), auto... more>
struct Op<first, more...> {
  static void call(typename Given<P>::type... arguments) {
    static constexpr decltype(first) kernels[] = {first, more...};
    kernels[std::min((size_t)isa(), sizeof...(more))](pass(arguments)...);
  }
};

}  // namespace
}  // namespace fastdit

STABLE_TORCH_LIBRARY(fastdit_cpp, m) {
  m.def(
      "adamw_step(Tensor? blocks, Tensor? table, Tensor? changing, Tensor? gradient, Tensor? copy, Tensor? grad_scale, Tensor? "
      "found_inf, int averages) -> ()");
  m.def("modulate_forward(Tensor? x, Tensor? shift, Tensor? scale, float eps, Tensor(a!)? y, Tensor(b!)? stats) -> ()");
  m.def("modulate_backward(Tensor? dy, Tensor? x, Tensor? stats, Tensor? scale, Tensor(a!)? dx, Tensor(b!)? dmodulation) -> ()");
  m.def("gated_residual_forward(Tensor? x, Tensor? branch, Tensor? gate, Tensor(a!)? r) -> ()");
  m.def("gated_residual_backward(Tensor? dr, Tensor? branch, Tensor? gate, Tensor(a!)? dbranch, Tensor(b!)? dgate) -> ()");
  m.def(
      "gated_residual_modulate_forward(Tensor? x, Tensor? branch, Tensor? gate, Tensor? shift, Tensor? scale, Tensor? bias, float "
      "eps, Tensor(a!)? r, Tensor(b!)? y, Tensor(c!)? stats) -> ()");
  m.def(
      "gated_residual_modulate_backward(Tensor? dr, Tensor? dy, Tensor? r, Tensor? branch, Tensor? stats, Tensor? gate, Tensor? "
      "scale, Tensor? bias, Tensor(a!)? dx, Tensor(b!)? dbranch, Tensor(c!)? dmodulation, Tensor(d!)? dbias) -> ()");
  m.def(
      "qk_norm_rope_forward(Tensor? qkv, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, float eps, Tensor(a!)? q, "
      "Tensor(b!)? k) -> ()");
  m.def(
      "qk_norm_rope_backward(Tensor? dq, Tensor? dk, Tensor? dv, Tensor? qkv, Tensor? q_weight, Tensor? k_weight, Tensor? cos, "
      "Tensor? sin, float eps, Tensor(a!)? dqkv, Tensor(b!)? dweights) -> ()");
  m.def(
      "dit_block_forward(Tensor? x, Tensor? y, Tensor? gate1, Tensor? shift2, Tensor? scale2, Tensor? gate2, Tensor? next_shift, "
      "Tensor? next_scale, Tensor? qkv_weight, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, Tensor? out_weight, "
      "Tensor? up_weight, Tensor? up_bias, Tensor? down_weight, Tensor? down_bias, int heads, float eps, float qk_eps, "
      "Tensor(a!)? scratch, Tensor(b!)? r, Tensor(c!)? y_out) -> ()");
  m.def("swiglu_forward(Tensor? packed, Tensor? bias, Tensor(a!)? out) -> ()");
  m.def(
      "swiglu_backward(Tensor? dout, Tensor? packed, Tensor? bias, Tensor(a!)? dpacked, Tensor(b!)? dbias, Tensor(c!)? "
      "out) -> ()");
  m.def("flow_interpolate_forward(Tensor? x0, Tensor? noise, Tensor? t, Tensor(a!)? out) -> ()");
  m.def("flow_interpolate_backward(Tensor? dout, Tensor? t, Tensor(a!)? dx0, Tensor(b!)? dnoise) -> ()");
  m.def(
      "flow_matching_loss_forward(Tensor? v, Tensor? x0, Tensor? noise, Tensor? weight, Tensor(a!)? loss, Tensor(b!)? error) -> "
      "()");
  m.def("flow_matching_loss_backward(Tensor? dloss, Tensor? error, Tensor? weight, Tensor(a!)? dv) -> ()");
  m.def("counter_random_forward(Tensor? ids, int key0, int key1, int stream, bool normal, Tensor(a!)? out) -> ()");
  m.def("isa() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(fastdit_cpp, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&fastdit::isa_number)); }

// Places of instruction sets that were not built: nothing asks for them.
#if !(FASTDIT_ISAS & 2)
#define avx2 baseline
#endif
#if !(FASTDIT_ISAS & 4)
#define avx512 baseline
#endif
#if !(FASTDIT_ISAS & 8)
#define amx baseline
#endif

STABLE_TORCH_LIBRARY_IMPL(fastdit_cpp, CPU, m) {
#define IMPLEMENT(name, parameters) \
  m.impl(#name,                     \
         TORCH_BOX(                 \
             (&fastdit::Op<&fastdit::baseline::name, &fastdit::avx2::name, &fastdit::avx512::name, &fastdit::amx::name>::call)));
  FASTDIT_KERNELS(IMPLEMENT)
}
