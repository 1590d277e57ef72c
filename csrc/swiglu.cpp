// swiglu: value·silu(gate) of packed rows (value | gate), and its gradient. M rows, F hidden width.
#include "ops.h"
#include "parallel.h"

namespace fastdit::FASTDIT_ISA {
namespace {

template <class T>
void forward(const View& packed, const View& out) {
  const int64_t M = packed.size[0], F = packed.size[1] / 2;
  parallel(M, ROWS, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; m++) {
      const T *value = (const T*)packed.data + packed.at(m), *gate = value + F;
      T* y = (T*)out.data + m * F;
      const auto step = [&](const Floats& v, const Floats& g) { return v * g * sigmoid(g); };
      int64_t c = 0;
      for (; c + LANES <= F; c += LANES) store(y + c, step(load(value + c), load(gate + c)));
      if (c < F) store(y + c, step(load(value + c, F - c), load(gate + c, F - c)), F - c);
    }
  });
}

template <class T>
void backward(const View& grad, const View& packed, const View& grad_packed) {
  const int64_t M = packed.size[0], F = packed.size[1] / 2;
  parallel(M, ROWS, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; m++) {
      const T *value = (const T*)packed.data + packed.at(m), *gate = value + F, *dy = (const T*)grad.data + grad.at(m);
      T *dvalue = (T*)grad_packed.data + m * 2 * F, *dgate = dvalue + F;
      const auto step = [](const Floats& d, const Floats& v, const Floats& g, Floats& dv, Floats& dg) {
        const Floats s = sigmoid(g), ds = d * s;
        dv = ds * g;
        dg = ds * v * (Floats(1.0f) + g * (Floats(1.0f) - s));
      };
      Floats dv, dg;
      int64_t c = 0;
      for (; c + LANES <= F; c += LANES) {
        step(load(dy + c), load(value + c), load(gate + c), dv, dg);
        store(dvalue + c, dv);
        store(dgate + c, dg);
      }
      if (c == F) continue;
      step(load(dy + c, F - c), load(value + c, F - c), load(gate + c, F - c), dv, dg);
      store(dvalue + c, dv, F - c);
      store(dgate + c, dg, F - c);
    }
  });
}

}  // namespace

void swiglu_forward(View packed, View out) {
  if (packed.type == Type::bf16) return forward<BFloat16>(packed, out);
  if (packed.type == Type::fp32) return forward<float>(packed, out);
  forward<_Float16>(packed, out);
}

void swiglu_backward(View grad, View packed, View grad_packed) {
  if (packed.type == Type::bf16) return backward<BFloat16>(grad, packed, grad_packed);
  if (packed.type == Type::fp32) return backward<float>(grad, packed, grad_packed);
  backward<_Float16>(grad, packed, grad_packed);
}

}  // namespace fastdit::FASTDIT_ISA
