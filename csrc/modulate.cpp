// modulate and gated_residual_modulate: the formulas are in kernels/modulate.py and kernels/gated_residual_modulate.py.
// B batch, T tokens, H width. A unit is ROWS tokens of one sample; its vectors of modulation are read once. Streams ([B,T,H]) are
// all of one type, the vectors of modulation of any.
#include "norm.h"
#include "ops.h"
#include "parallel.h"

namespace fastdit::FASTDIT_ISA {
namespace {

struct Rows {
  int64_t b, first, last;
};

INLINE Rows rows_of(int64_t unit, int64_t parts, int64_t T) {
  const int64_t b = unit / parts, first = unit % parts * ROWS;
  return {b, first, first + ROWS < T ? first + ROWS : T};
}

// d = rstd·(g − mean(g) − x̂·mean(g·x̂)) with g = dy·scale, one vector of d at a time to `use(i, d)`; adds to dshift and dscale. dy
// and x̂ are kept in `grad` and `normed`. Dead lanes: dy is 0 there, and so is every product.
template <class T, class F>
INLINE void norm_backward(const T* dy, const T* x, float mean, float rstd, const Floats* scale, int64_t H, Floats* grad,
                          Floats* normed, Floats* dshift, Floats* dscale, const F& use) {
  const int64_t V = vectors(H);
  Floats total{}, products{};
  for (int64_t i = 0; i < V; i++) {
    const Floats d = load_some(dy + i * LANES, H - i * LANES), n = (load_some(x + i * LANES, H - i * LANES) - mean) * rstd;
    const Floats g = d * scale[i];
    total += g;
    products += g * n;
    dshift[i] += d;
    dscale[i] += d * n;
    grad[i] = g;
    normed[i] = n;
  }
  const float mean_g = sum(total) / H, mean_gx = sum(products) / H;
  for (int64_t i = 0; i < V; i++) use(i, (grad[i] - mean_g - normed[i] * mean_gx) * rstd);
}

}  // namespace

void modulate_forward(View x, View shift, View scale, double eps, View y, View stats) {
  const int64_t B = x.size[0], T = x.size[1], H = x.size[2], V = vectors(H), parts = (T + ROWS - 1) / ROWS;
  float* means = pointer<float>(stats);
  with_type(x.type, [&](auto type) {
    using E = decltype(type);
    parallel(B * parts, 1, [&](int64_t begin, int64_t end) {
      Scratch scratch(3 * V);
      Floats *row = scratch.data(), *scales = row + V, *shifts = scales + V;
      for (int64_t unit = begin; unit < end; unit++) {
        const auto [b, first, last] = rows_of(unit, parts, T);
        read_scale(scale, b, H, scales);
        read(shift, shift.at(b), H, shifts);
        for (int64_t t = first; t < last; t++) {
          const int64_t m = b * T + t;
          const E* source = pointer<E>(x, x.at(b, t));
          const float total =
              sum_of(V, [&](int64_t i) INLINE_LAMBDA { return row[i] = load_some(source + i * LANES, H - i * LANES); });
          norm_forward(row, total, H, eps, scales, shifts, pointer<E>(y, m * H), means[m], means[B * T + m]);
        }
      }
    });
  });
}

void modulate_backward(View dy, View x, View stats, View scale, View dx, View dmodulation) {
  const int64_t B = x.size[0], T = x.size[1], H = x.size[2], V = vectors(H), parts = (T + ROWS - 1) / ROWS;
  const float* means = pointer<float>(stats);
  Scratch partials(B * parts * 2 * V);
  with_type(x.type, [&](auto type) {
    using E = decltype(type);
    parallel(B * parts, 1, [&](int64_t begin, int64_t end) {
      Scratch scratch(3 * V);
      Floats *grad = scratch.data(), *normed = grad + V, *scales = normed + V;
      for (int64_t unit = begin; unit < end; unit++) {
        const auto [b, first, last] = rows_of(unit, parts, T);
        Floats* sums = partials.data() + unit * 2 * V;
        read_scale(scale, b, H, scales);
        for (int64_t t = first; t < last; t++) {
          const int64_t m = b * T + t;
          E* out = pointer<E>(dx, m * H);
          norm_backward(pointer<E>(dy, dy.at(b, t)), pointer<E>(x, x.at(b, t)), means[m], means[B * T + m], scales, H, grad, normed,
                        sums, sums + V,
                        [&](int64_t i, const Floats& d) INLINE_LAMBDA { store_some(out + i * LANES, d, H - i * LANES); });
        }
      }
    });
  });
  reduce_partials(partials, B, parts, 2, H, dmodulation);
}

void gated_residual_modulate_forward(View x, View branch, View gate, View shift, View scale, View bias, double eps, View r, View y,
                                     View stats) {
  const int64_t B = x.size[0], T = x.size[1], H = x.size[2], V = vectors(H), parts = (T + ROWS - 1) / ROWS;
  float* means = pointer<float>(stats);
  with_type(x.type, [&](auto type) {
    using E = decltype(type);
    parallel(B * parts, 1, [&](int64_t begin, int64_t end) {
      Scratch scratch(5 * V);
      Floats *row = scratch.data(), *gates = row + V, *scales = gates + V, *shifts = scales + V, *biases = shifts + V;
      if (bias.given()) read(bias, 0, H, biases);
      for (int64_t unit = begin; unit < end; unit++) {
        const auto [b, first, last] = rows_of(unit, parts, T);
        read(gate, gate.at(b), H, gates);
        read_scale(scale, b, H, scales);
        read(shift, shift.at(b), H, shifts);
        for (int64_t t = first; t < last; t++) {
          const int64_t m = b * T + t;
          const E *stream = pointer<E>(x, x.at(b, t)), *added = pointer<E>(branch, branch.at(b, t));
          E* out = pointer<E>(r, m * H);
          const float total = sum_of(V, [&](int64_t i) INLINE_LAMBDA {
            const int64_t c = i * LANES, n = H - c;
            store_some(out + c, load_some(stream + c, n) + gates[i] * (load_some(added + c, n) + biases[i]), n);
            return row[i] = load_some(out + c, n);  // rounded: the backward reads the same numbers
          });
          norm_forward(row, total, H, eps, scales, shifts, pointer<E>(y, m * H), means[m], means[B * T + m]);
        }
      }
    });
  });
}

void gated_residual_modulate_backward(View dr, View dy, View r, View branch, View stats, View gate, View scale, View bias, View dx,
                                      View dbranch, View dmodulation, View dbias) {
  const int64_t B = r.size[0], T = r.size[1], H = r.size[2], V = vectors(H), parts = (T + ROWS - 1) / ROWS;
  const float* means = pointer<float>(stats);
  Scratch partials(B * parts * 3 * V);  // dgate, dshift, dscale
  Scratch of_bias(bias.given() ? B * parts * V : 0);
  with_type(r.type, [&](auto type) {
    using E = decltype(type);
    parallel(B * parts, 1, [&](int64_t begin, int64_t end) {
      Scratch scratch(5 * V);
      Floats *grad = scratch.data(), *normed = grad + V, *gates = normed + V, *scales = gates + V, *biases = scales + V;
      if (bias.given()) read(bias, 0, H, biases);
      for (int64_t unit = begin; unit < end; unit++) {
        const auto [b, first, last] = rows_of(unit, parts, T);
        Floats *sums = partials.data() + unit * 3 * V, *total = bias.given() ? of_bias.data() + unit * V : nullptr;
        read(gate, gate.at(b), H, gates);
        read_scale(scale, b, H, scales);
        for (int64_t t = first; t < last; t++) {
          const int64_t m = b * T + t;
          const E *added = pointer<E>(branch, branch.at(b, t)), *more = dr.given() ? pointer<E>(dr, dr.at(b, t)) : nullptr;
          E *out = pointer<E>(dx, m * H), *out_branch = pointer<E>(dbranch, m * H);
          norm_backward(pointer<E>(dy, dy.at(b, t)), pointer<E>(r, m * H), means[m], means[B * T + m], scales, H, grad, normed,
                        sums + V, sums + 2 * V, [&](int64_t i, Floats d) INLINE_LAMBDA {
                          const int64_t c = i * LANES, n = H - c;
                          if (more) d += load_some(more + c, n);
                          const Floats gated = d * gates[i];
                          sums[i] += d * (load_some(added + c, n) + biases[i]);
                          if (total) total[i] += gated;
                          store_some(out + c, d, n);
                          store_some(out_branch + c, gated, n);
                        });
        }
      }
    });
  });
  reduce_partials(partials, B, parts, 3, H, dmodulation);
  if (bias.given()) reduce_partials(of_bias, 1, B * parts, 1, H, dbias);
}

}  // namespace fastdit::FASTDIT_ISA
