// LayerNorm of a row and its modulation, as modulate and the fused kernels compute it. H width.
#pragma once

#include "vector.h"

namespace fastdit::FASTDIT_ISA {

INLINE void read_scale(const View& scale, int64_t b, int64_t H, Floats* out) {
  read(scale, scale.at(b), H, out);
  for (int64_t i = 0; i < vectors(H); i++) out[i] += 1.0f;
}

// Σ f(i) over the vectors of a row, in two chains of adds, so that one does not wait for the other.
template <class F>
INLINE float sum_of(int64_t V, const F& f) {
  Floats even{}, odd{};
  int64_t i = 0;
  for (; i + 2 <= V; i += 2) {
    even += f(i);
    odd += f(i + 1);
  }
  if (i < V) even += f(i);
  return sum(even + odd);
}

// Σ (x − mean)² of a row, whose vector i is row(i).
template <class Row>
INLINE float squares(const Row& row, float mean, int64_t H) {
  const int64_t whole = H / LANES;
  float total = sum_of(whole, [&](int64_t i) INLINE_LAMBDA {
    const Floats c = row(i) - mean;
    return c * c;
  });
  if (whole < vectors(H)) {
    const Floats c = keep(row(whole) - mean, H - whole * LANES);
    total += sum(c * c);
  }
  return total;
}

// y = (x − mean)·rstd·scale + shift.
template <class Row, class T>
INLINE void write_norm(const Row& row, float mean, float rstd, int64_t H, const Floats* scale, const Floats* shift, T* y) {
  for (int64_t i = 0; i < vectors(H); i++) store_some(y + i * LANES, (row(i) - mean) * rstd * scale[i] + shift[i], H - i * LANES);
}

// LN(row)·scale + shift to y; mean and 1/σ of the row, in two steps: E[x²] − mean² would cancel. `total` is the row's sum.
template <class T>
INLINE void norm_forward(const Floats* row, float total, int64_t H, float eps, const Floats* scale, const Floats* shift, T* y,
                         float& mean, float& rstd) {
  const auto at = [&](int64_t i) INLINE_LAMBDA { return row[i]; };
  mean = total / H;
  rstd = 1.0f / std::sqrt(squares(at, mean, H) / H + eps);
  write_norm(at, mean, rstd, H, scale, shift, y);
}

}  // namespace fastdit::FASTDIT_ISA
