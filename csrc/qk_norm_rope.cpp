// qk_norm_rope: RMSNorm of each head of q and k, then rotation of its halves. B batch, T tokens, N heads, D head dim, h = D/2.
// cos and sin are [B,T,h], with a stride of 0 over samples that share them.
#include "head.h"
#include "ops.h"
#include "parallel.h"

namespace fastdit::FASTDIT_ISA {

void qk_norm_rope_forward(View qkv, View q_weight, View k_weight, View cos, View sin, double eps, View q, View k) {
  const int64_t B = q.size[0], T = q.size[1], N = q.size[2], D = q.size[3], h = D / 2, V = vectors(h);
  const View weights[2] = {q_weight, k_weight}, outs[2] = {q, k};
  with_type(qkv.type, [&](auto type) {
    using E = decltype(type);
    parallel(B * T, ROWS, [&](int64_t begin, int64_t end) {
      Half x, weight[2];
      Floats c[HALF], s[HALF];
      read_weights(weights, h, weight);
      for (int64_t m = begin; m < end; m++) {
        const int64_t b = m / T, t = m % T;
        if (cos.given()) {
          read(cos, cos.at(b, t), h, c);
          read(sin, sin.at(b, t), h, s);
        }
        for (int which = 0; which < 2; which++)
          for (int64_t n = 0; n < N; n++) {
            read_halves(pointer<E>(qkv, qkv.at(b, t) + (which * N + n) * D), h, x);
            if (weights[which].given()) {
              const float r = rms(x, h, V, eps);
              for (int64_t i = 0; i < V; i++) {
                x.first[i] *= r * weight[which].first[i];
                x.second[i] *= r * weight[which].second[i];
              }
            }
            if (cos.given()) rotate(x, c, s, 1, V);
            write_halves(pointer<E>(outs[which], outs[which].at(b, t, n)), h, x);
          }
      }
    });
  });
}

void qk_norm_rope_backward(View dq, View dk, View dv, View qkv, View q_weight, View k_weight, View cos, View sin, double eps,
                           View dqkv, View dweights) {
  const int64_t B = dq.size[0], N = dq.size[1], T = dq.size[2], D = dq.size[3], h = D / 2, V = vectors(h);
  const int64_t M = B * T, parts = (M + ROWS - 1) / ROWS;
  const View weights[2] = {q_weight, k_weight}, grads[3] = {dq, dk, dv};
  Scratch partials(parts * 4 * V);  // of each part: the two halves of dq_weight, then of dk_weight
  with_type(qkv.type, [&](auto type) {
    using E = decltype(type);
    parallel(parts, 1, [&](int64_t begin, int64_t end) {
      Half x, g, weight[2];
      Floats c[HALF], s[HALF];
      read_weights(weights, h, weight);
      for (int64_t part = begin; part < end; part++)
        for (int64_t m = part * ROWS; m < (part + 1) * ROWS && m < M; m++) {
          const int64_t b = m / T, t = m % T;
          if (cos.given()) {
            read(cos, cos.at(b, t), h, c);
            read(sin, sin.at(b, t), h, s);
          }
          for (int which = 0; which < 3; which++)
            for (int64_t n = 0; n < N; n++) {
              const int64_t out = m * 3 * N * D + (which * N + n) * D;
              read_halves(pointer<E>(grads[which], grads[which].at(b, n, t)), h, g);
              if (which < 2) {
                if (cos.given()) rotate(g, c, s, -1, V);
                if (weights[which].given()) {
                  const Half& w = weight[which];
                  Floats *dw1 = partials.data() + (part * 2 + which) * 2 * V, *dw2 = dw1 + V, products = {};
                  read_halves(pointer<E>(qkv, qkv.at(b, t) + (which * N + n) * D), h, x);
                  const float r = rms(x, h, V, eps);
                  for (int64_t i = 0; i < V; i++) {
                    x.first[i] *= r;
                    x.second[i] *= r;
                    dw1[i] += g.first[i] * x.first[i];
                    dw2[i] += g.second[i] * x.second[i];
                    g.first[i] *= w.first[i];
                    g.second[i] *= w.second[i];
                    products += g.first[i] * x.first[i] + g.second[i] * x.second[i];
                  }
                  const float mean = sum(products) / D;
                  for (int64_t i = 0; i < V; i++) {
                    g.first[i] = r * (g.first[i] - x.first[i] * mean);
                    g.second[i] = r * (g.second[i] - x.second[i] * mean);
                  }
                }
              }
              write_halves(pointer<E>(dqkv, out), h, g);
            }
        }
    });
  });
  if (!dweights.size[0]) return;
  reduce_partials(partials, 1, parts, 4, h, dweights);
}

}  // namespace fastdit::FASTDIT_ISA
