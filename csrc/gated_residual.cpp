// gated_residual: r = x + gate·branch; dbranch = gate·dr, dgate = Σ_t dr·branch. B batch, T tokens, H width.
#include "ops.h"
#include "parallel.h"

namespace fastdit::FASTDIT_ISA {

void gated_residual_forward(View x, View branch, View gate, View r) {
  const int64_t B = x.size[0], T = x.size[1], H = x.size[2], V = vectors(H);
  parallel(B * T, ROWS, [&](int64_t begin, int64_t end) {
    Scratch scratch(3 * V);
    Floats *row = scratch.data(), *added = row + V, *gates = added + V;
    for (int64_t m = begin; m < end; m++) {
      const int64_t b = m / T, t = m % T;
      if (m == begin || t == 0) read(gate, gate.at(b), H, gates);
      read(x, x.at(b, t), H, row);
      read(branch, branch.at(b, t), H, added);
      for (int64_t i = 0; i < V; i++) row[i] += gates[i] * added[i];
      write(r, m * H, H, row);
    }
  });
}

void gated_residual_backward(View dr, View branch, View gate, View dbranch, View dgate) {
  const int64_t B = branch.size[0], T = branch.size[1], H = branch.size[2], V = vectors(H), parts = (T + ROWS - 1) / ROWS;
  Scratch partials(B * parts * V);
  parallel(B * parts, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(3 * V);
    Floats *grad = scratch.data(), *added = grad + V, *gates = added + V;
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t b = unit / parts, first = unit % parts * ROWS;
      Floats* sums = partials.data() + unit * V;
      read(gate, gate.at(b), H, gates);
      for (int64_t t = first; t < first + ROWS && t < T; t++) {
        read(dr, dr.at(b, t), H, grad);
        read(branch, branch.at(b, t), H, added);
        for (int64_t i = 0; i < V; i++) {
          sums[i] += grad[i] * added[i];
          grad[i] *= gates[i];
        }
        write(dbranch, (b * T + t) * H, H, grad);
      }
    }
  });
  reduce_partials(partials, B, parts, 1, H, dgate);
}

}  // namespace
