// swiglu: value·silu(gate) of packed rows (value | gate), and its gradient. M rows, F hidden width.
#include "ops.h"
#include "parallel.h"

namespace fastdit {
namespace {

constexpr int64_t COLUMNS = 512;  // of fp32 scratch a tensor: 2 KB, so that all of them stay in the L1 cache

}  // namespace

void swiglu_forward(View packed, View out) {
  const int64_t M = packed.size[0], F = packed.size[1] / 2;
  parallel(M, ROWS, KERNEL {
    Floats value[COLUMNS / LANES], gate[COLUMNS / LANES];
    for (int64_t m = begin; m < end; m++)
      for (int64_t c = 0; c < F; c += COLUMNS) {
        const int64_t n = F - c < COLUMNS ? F - c : COLUMNS;
        read(packed, packed.at(m) + c, n, value);
        read(packed, packed.at(m) + F + c, n, gate);
        for (int64_t i = 0; i < vectors(n); i++) value[i] *= gate[i] * sigmoid(gate[i]);
        write(out, m * F + c, n, value);
      }
  });
}

void swiglu_backward(View grad, View packed, View grad_packed) {
  const int64_t M = packed.size[0], F = packed.size[1] / 2;
  parallel(M, ROWS, KERNEL {
    Floats dy[COLUMNS / LANES], value[COLUMNS / LANES], gate[COLUMNS / LANES];
    for (int64_t m = begin; m < end; m++)
      for (int64_t c = 0; c < F; c += COLUMNS) {
        const int64_t n = F - c < COLUMNS ? F - c : COLUMNS;
        read(packed, packed.at(m) + c, n, value);
        read(packed, packed.at(m) + F + c, n, gate);
        read(grad, grad.at(m) + c, n, dy);
        for (int64_t i = 0; i < vectors(n); i++) {
          const Floats s = sigmoid(gate[i]), dys = dy[i] * s;
          const Floats dgate = dys * value[i] * (1.0f + gate[i] * (1.0f - s));
          value[i] = dys * gate[i];
          gate[i] = dgate;
        }
        write(grad_packed, m * 2 * F + c, n, value);
        write(grad_packed, m * 2 * F + F + c, n, gate);
      }
  });
}

}  // namespace fastdit
