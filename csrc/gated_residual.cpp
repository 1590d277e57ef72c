// gated_residual: r = x + gate·branch; dbranch = gate·dr, dgate = Σ_t dr·branch. B batch, T tokens, H width.
#include "ops.h"
#include "parallel.h"

namespace fastdit::FASTDIT_ISA {

void gated_residual_forward(View x, View branch, View gate, View r) {
  const int64_t B = x.size[0], T = x.size[1], H = x.size[2], V = vectors(H);
  with_type(x.type, [&](auto type) {
    using E = decltype(type);
    parallel(B * T, ROWS, [&](int64_t begin, int64_t end) {
      Scratch scratch(V);
      Floats* gates = scratch.data();
      for (int64_t m = begin; m < end; m++) {
        const int64_t b = m / T, t = m % T;
        if (m == begin || t == 0) read(gate, gate.at(b), H, gates);
        const E *stream = pointer<E>(x, x.at(b, t)), *added = pointer<E>(branch, branch.at(b, t));
        E* out = pointer<E>(r, m * H);
        for (int64_t i = 0, c = 0; c < H; i++, c += LANES)
          store_some(out + c, load_some(stream + c, H - c) + gates[i] * load_some(added + c, H - c), H - c);
      }
    });
  });
}

void gated_residual_backward(View dr, View branch, View gate, View dbranch, View dgate) {
  const int64_t B = branch.size[0], T = branch.size[1], H = branch.size[2], V = vectors(H), parts = (T + ROWS - 1) / ROWS;
  Scratch partials(B * parts * V);
  with_type(branch.type, [&](auto type) {
    using E = decltype(type);
    parallel(B * parts, 1, [&](int64_t begin, int64_t end) {
      Scratch scratch(V);
      Floats* gates = scratch.data();
      for (int64_t unit = begin; unit < end; unit++) {
        const int64_t b = unit / parts, first = unit % parts * ROWS;
        Floats* sums = partials.data() + unit * V;
        read(gate, gate.at(b), H, gates);
        for (int64_t t = first; t < first + ROWS && t < T; t++) {
          const E *grad = pointer<E>(dr, dr.at(b, t)), *added = pointer<E>(branch, branch.at(b, t));
          E* out = pointer<E>(dbranch, (b * T + t) * H);
          for (int64_t i = 0, c = 0; c < H; i++, c += LANES) {
            const Floats d = load_some(grad + c, H - c);
            sums[i] += d * load_some(added + c, H - c);
            store_some(out + c, d * gates[i], H - c);
          }
        }
      }
    });
  });
  reduce_partials(partials, B, parts, 1, H, dgate);
}

}  // namespace fastdit::FASTDIT_ISA
