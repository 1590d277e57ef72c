// RMSNorm and rotation of a head of q or k. D head dim, h = D/2. The halves of a head lie in vectors of their own, padded with
// zeros: the rotation pairs element j with j + h.
#pragma once

#include "vector.h"

namespace fastdit::FASTDIT_ISA {

constexpr int64_t HALF = 8;  // vectors of half a head at most: D <= 256

struct Half {
  Floats first[HALF], second[HALF];
};

template <class T>
INLINE void read_halves(const T* p, int64_t h, Half& out) {
  for (int64_t i = 0, c = 0; c < h; i++, c += LANES) {
    out.first[i] = load_some(p + c, h - c);
    out.second[i] = load_some(p + h + c, h - c);
  }
}

template <class T>
INLINE void write_halves(T* p, int64_t h, const Half& in) {
  for (int64_t i = 0, c = 0; c < h; i++, c += LANES) {
    store_some(p + c, in.first[i], h - c);
    store_some(p + h + c, in.second[i], h - c);
  }
}

// The norm weights of q and k, of any type; one that is not given leaves its `out` as it is.
INLINE void read_weights(const View (&weights)[2], int64_t h, Half (&out)[2]) {
  for (int which = 0; which < 2; which++) {
    if (!weights[which].given()) continue;
    read(weights[which], 0, h, out[which].first);
    read(weights[which], h, h, out[which].second);
  }
}

// 1/√(mean(x²) + eps) of a head.
INLINE float rms(const Half& x, int64_t h, int64_t V, float eps) {
  Floats squares = {};
  for (int64_t i = 0; i < V; i++) squares += x.first[i] * x.first[i] + x.second[i] * x.second[i];
  return 1.0f / std::sqrt(sum(squares) / (2 * h) + eps);
}

// x1·cos − x2·sin | x2·cos + x1·sin; with `sign` −1 the inverse, which is the gradient's way back.
INLINE void rotate(Half& x, const Floats* cos, const Floats* sin, float sign, int64_t V) {
  for (int64_t i = 0; i < V; i++) {
    const Floats x1 = x.first[i], x2 = x.second[i], s = sin[i] * sign;
    x.first[i] = x1 * cos[i] - x2 * s;
    x.second[i] = x2 * cos[i] + x1 * s;
  }
}

}  // namespace fastdit::FASTDIT_ISA
