// swiglu: value·silu(gate) of packed rows (value | gate) plus a bias, and its gradient. M rows, F hidden width.
#include "ops.h"
#include "parallel.h"

namespace fastdit::FASTDIT_ISA {
namespace {

// The two halves of a bias [2F], each padded to full vectors; zeros without a bias.
struct Bias {
  Scratch scratch;
  Floats *value, *gate;

  Bias(const View& bias, int64_t F) : scratch(2 * vectors(F)), value(scratch.data()), gate(value + vectors(F)) {
    if (!bias.given()) return;
    read(bias, 0, F, value);
    read(bias, F, F, gate);
  }
};

INLINE Floats activation(const Floats& value, const Floats& gate, const Floats& sigmoid) { return value * gate * sigmoid; }

template <class T>
void forward(const View& packed, const View& bias, const View& out) {
  const int64_t M = packed.size[0], F = packed.size[1] / 2;
  const Bias added(bias, F);
  parallel(M, ROWS, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; m++) {
      const T *value = pointer<T>(packed, packed.at(m)), *gate = value + F;
      T* y = pointer<T>(out, m * F);
      for (int64_t i = 0, c = 0; c < F; i++, c += LANES) {
        const Floats v = load_some(value + c, F - c) + added.value[i], g = load_some(gate + c, F - c) + added.gate[i];
        store_some(y + c, activation(v, g, sigmoid(g)), F - c);
      }
    }
  });
}

// A unit is ROWS rows, so that the order of the sums does not depend on the number of threads.
template <class T>
void backward(const View& dout, const View& packed, const View& bias, const View& dpacked, const View& dbias, const View& out) {
  const int64_t M = packed.size[0], F = packed.size[1] / 2, V = vectors(F), parts = (M + ROWS - 1) / ROWS;
  const Bias added(bias, F);
  Scratch partials(bias.given() ? parts * 2 * V : 0);
  parallel(parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; unit++) {
      Floats* sums = bias.given() ? partials.data() + unit * 2 * V : nullptr;
      for (int64_t m = unit * ROWS; m < (unit + 1) * ROWS && m < M; m++) {
        const T *value = pointer<T>(packed, packed.at(m)), *gate = value + F, *dy = pointer<T>(dout, dout.at(m));
        T *dvalue = pointer<T>(dpacked, m * 2 * F), *dgate = dvalue + F, *y = out.given() ? pointer<T>(out, m * F) : nullptr;
        for (int64_t i = 0, c = 0; c < F; i++, c += LANES) {
          const int64_t n = F - c;
          const Floats v = load_some(value + c, n) + added.value[i], g = load_some(gate + c, n) + added.gate[i];
          const Floats s = sigmoid(g), ds = load_some(dy + c, n) * s;
          const Floats dv = ds * g, dg = ds * v * (Floats(1.0f) + g * (Floats(1.0f) - s));
          store_some(dvalue + c, dv, n);
          store_some(dgate + c, dg, n);
          if (y) store_some(y + c, activation(v, g, s), n);
          if (!sums) continue;
          sums[i] += dv;
          sums[V + i] += dg;
        }
      }
    }
  });
  if (bias.given()) reduce_partials(partials, 1, parts, 2, F, dbias);
}

}  // namespace

void swiglu_forward(View packed, View bias, View out) {
  with_type(packed.type, [&](auto type) { forward<decltype(type)>(packed, bias, out); });
}

void swiglu_backward(View dout, View packed, View bias, View dpacked, View dbias, View out) {
  with_type(packed.type, [&](auto type) { backward<decltype(type)>(dout, packed, bias, dpacked, dbias, out); });
}

}  // namespace fastdit::FASTDIT_ISA
