// modulate and gated_residual_modulate: the formulas are in kernels/modulate.py and kernels/gated_residual_modulate.py.
// B batch, T tokens, H width. A unit is ROWS tokens of one sample; its vectors of modulation are read once.
#include "ops.h"
#include "parallel.h"

namespace fastdit::FASTDIT_ISA {
namespace {

struct Rows {
  int64_t b, first, last;
};

INLINE Rows rows_of(int64_t unit, int64_t parts, int64_t T) {
  int64_t b = unit / parts, first = unit % parts * ROWS;
  return {b, first, first + ROWS < T ? first + ROWS : T};
}

INLINE void zero_dead_lanes(Floats* row, int64_t H) {
  for (int64_t i = H; i < vectors(H) * LANES; i++) ((float*)row)[i] = 0;
}

// Mean and 1/σ of a row, in two steps: E[x²] − mean² would cancel. The row is left centred.
INLINE void center(Floats* row, int64_t H, float eps, float& mean, float& rstd) {
  const int64_t V = vectors(H);
  Floats total = {}, squares = {};
  for (int64_t i = 0; i < V; i++) total += row[i];
  mean = sum(total) / H;
  for (int64_t i = 0; i < V; i++) row[i] -= mean;
  zero_dead_lanes(row, H);
  for (int64_t i = 0; i < V; i++) squares += row[i] * row[i];
  rstd = 1.0f / std::sqrt(sum(squares) / H + eps);
}

// y = row·rstd·scale + shift, written.
INLINE void write_modulated(const View& y, int64_t at, int64_t H, Floats* row, float rstd, const Floats* scale, const Floats* shift) {
  for (int64_t i = 0; i < vectors(H); i++) row[i] = row[i] * rstd * scale[i] + shift[i];
  write(y, at, H, row);
}

INLINE void read_scale(const View& scale, int64_t b, int64_t H, Floats* out) {
  read(scale, scale.at(b), H, out);
  for (int64_t i = 0; i < vectors(H); i++) out[i] += 1.0f;
}

// dy and x of a row become dy and d = rstd·(g − mean(g) − x̂·mean(g·x̂)) with g = dy·scale; the sums of the row are added.
INLINE void norm_backward(const Floats* dy, Floats* x, float mean, float rstd, const Floats* scale, int64_t H, Floats* dshift, Floats* dscale) {
  const int64_t V = vectors(H);
  Floats total = {}, products = {};
  for (int64_t i = 0; i < V; i++) {
    Floats normed = (x[i] - mean) * rstd, g = dy[i] * scale[i];  // dead lanes: dy is 0 there, and so is every product
    total += g;
    products += g * normed;
    dshift[i] += dy[i];
    dscale[i] += dy[i] * normed;
    x[i] = normed;
  }
  const float mean_g = sum(total) / H, mean_gx = sum(products) / H;
  for (int64_t i = 0; i < V; i++) x[i] = rstd * (dy[i] * scale[i] - mean_g - x[i] * mean_gx);
}

}  // namespace

void modulate_forward(View x, View shift, View scale, double eps, View y, View stats) {
  const int64_t B = x.size[0], T = x.size[1], H = x.size[2], V = vectors(H), parts = (T + ROWS - 1) / ROWS;
  float* means = (float*)stats.data;
  parallel(B * parts, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(3 * V);
    Floats *row = scratch.data(), *scales = row + V, *shifts = scales + V;
    for (int64_t unit = begin; unit < end; unit++) {
      const auto [b, first, last] = rows_of(unit, parts, T);
      read_scale(scale, b, H, scales);
      read(shift, shift.at(b), H, shifts);
      for (int64_t t = first; t < last; t++) {
        const int64_t m = b * T + t;
        float mean, rstd;
        read(x, x.at(b, t), H, row);
        center(row, H, eps, mean, rstd);
        means[m] = mean, means[B * T + m] = rstd;
        write_modulated(y, m * H, H, row, rstd, scales, shifts);
      }
    }
  });
}

void modulate_backward(View dy, View x, View stats, View scale, View dx, View dmodulation) {
  const int64_t B = x.size[0], T = x.size[1], H = x.size[2], V = vectors(H), parts = (T + ROWS - 1) / ROWS;
  const float* means = (const float*)stats.data;
  Scratch partials(B * parts * 2 * V);
  parallel(B * parts, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(3 * V);
    Floats *row = scratch.data(), *grad = row + V, *scales = grad + V;
    for (int64_t unit = begin; unit < end; unit++) {
      const auto [b, first, last] = rows_of(unit, parts, T);
      Floats* sums = partials.data() + unit * 2 * V;
      read_scale(scale, b, H, scales);
      for (int64_t t = first; t < last; t++) {
        const int64_t m = b * T + t;
        read(x, x.at(b, t), H, row);
        read(dy, dy.at(b, t), H, grad);
        norm_backward(grad, row, means[m], means[B * T + m], scales, H, sums, sums + V);
        write(dx, m * H, H, row);
      }
    }
  });
  reduce_partials(partials, B, parts, 2, H, dmodulation);
}

void gated_residual_modulate_forward(View x, View branch, View gate, View shift, View scale, double eps, View r, View y, View stats) {
  const int64_t B = x.size[0], T = x.size[1], H = x.size[2], V = vectors(H), parts = (T + ROWS - 1) / ROWS;
  float* means = (float*)stats.data;
  parallel(B * parts, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(5 * V);
    Floats *row = scratch.data(), *added = row + V, *gates = added + V, *scales = gates + V, *shifts = scales + V;
    for (int64_t unit = begin; unit < end; unit++) {
      const auto [b, first, last] = rows_of(unit, parts, T);
      read(gate, gate.at(b), H, gates);
      read_scale(scale, b, H, scales);
      read(shift, shift.at(b), H, shifts);
      for (int64_t t = first; t < last; t++) {
        const int64_t m = b * T + t;
        float mean, rstd;
        read(x, x.at(b, t), H, row);
        read(branch, branch.at(b, t), H, added);
        for (int64_t i = 0; i < V; i++) row[i] += gates[i] * added[i];
        write(r, m * H, H, row);
        read(r, m * H, H, row);  // rounded: the backward reads the same numbers
        center(row, H, eps, mean, rstd);
        means[m] = mean, means[B * T + m] = rstd;
        write_modulated(y, m * H, H, row, rstd, scales, shifts);
      }
    }
  });
}

void gated_residual_modulate_backward(
    View dr, View dy, View r, View branch, View stats, View gate, View scale, View dx, View dbranch, View dmodulation) {
  const int64_t B = r.size[0], T = r.size[1], H = r.size[2], V = vectors(H), parts = (T + ROWS - 1) / ROWS;
  const float* means = (const float*)stats.data;
  Scratch partials(B * parts * 3 * V);  // dgate, dshift, dscale
  parallel(B * parts, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(4 * V);
    Floats *row = scratch.data(), *other = row + V, *gates = other + V, *scales = gates + V;
    for (int64_t unit = begin; unit < end; unit++) {
      const auto [b, first, last] = rows_of(unit, parts, T);
      Floats* sums = partials.data() + unit * 3 * V;
      read(gate, gate.at(b), H, gates);
      read_scale(scale, b, H, scales);
      for (int64_t t = first; t < last; t++) {
        const int64_t m = b * T + t;
        read(r, m * H, H, row);
        read(dy, dy.at(b, t), H, other);
        norm_backward(other, row, means[m], means[B * T + m], scales, H, sums + V, sums + 2 * V);
        if (dr.given()) {
          read(dr, dr.at(b, t), H, other);
          for (int64_t i = 0; i < V; i++) row[i] += other[i];
        }
        write(dx, m * H, H, row);
        read(branch, branch.at(b, t), H, other);
        for (int64_t i = 0; i < V; i++) {
          sums[i] += row[i] * other[i];
          row[i] *= gates[i];
        }
        write(dbranch, m * H, H, row);
      }
    }
  });
  reduce_partials(partials, B, parts, 3, H, dmodulation);
}

}  // namespace
