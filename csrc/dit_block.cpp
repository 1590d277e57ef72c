// dit_block: a DiT block for sampling, in bf16: no gradients, so that what is between its matmuls happens on their fp32 sums, most of
// it while the next ones are computed. M = B·T rows, H width, N heads, D head dim, F SwiGLU hidden. Every size is a multiple of 32.
#include "head.h"
#include "norm.h"
#include "ops.h"
#include "parallel.h"
#include "tile.h"

#include <algorithm>

namespace fastdit::FASTDIT_ISA {
namespace {

using E = BFloat16;

// Weights of one thread that stay in its cache (2 MB of L2 on every CPU with AMX) while its rows pass.
constexpr int64_t GROUP_BYTES = 1 << 20;
constexpr int64_t QUERIES = 128;  // rows whose attention weights are kept at a time

// a·Wᵀ of a [M,K] and packed W [N,K], 32 x 32 at a time: `finish` as of Blocks.
template <class Finish>
void multiply(const E* a, int64_t M, int64_t K, const E* weights, int64_t N, const Finish& finish) {
  const int64_t panels = N / BLOCK, steps = K / BLOCK, group = std::max<int64_t>(1, GROUP_BYTES / (K * BLOCK * sizeof(E)));
  parallel(M / BLOCK, 1, [&](int64_t begin, int64_t end) {
    Block block;
    Blocks blocks(block, finish);
    for (int64_t first = 0; first < panels; first += group)
      for (int64_t m = begin * BLOCK; m < end * BLOCK; m += BLOCK)
        for (int64_t panel = first; panel < panels && panel < first + group; panel++)
          blocks.next(a + m * K, K, weights + panel * steps * PIECE, steps, m, panel * BLOCK);
    blocks.finish();
  });
}

// r = x + gate·(a·Wᵀ + bias), rounded; y = LN(r)·(1 + scale) + shift. a [M,K]; x, r, y [B,T,H]; x may be r. bias may be missing.
void add_branch(const E* a, int64_t K, const View& weights, const View& bias, const View& x, const View& gate, const View& shift,
                const View& scale, float eps, const View& r, const View& y) {
  const int64_t T = x.size[1], H = x.size[2], V = vectors(H), steps = K / BLOCK;
  parallel(x.size[0] * T / BLOCK, 1, [&](int64_t begin, int64_t end) {
    Block block;
    Scratch scratch((BLOCK + 4) * V);
    Floats *rows = scratch.data(), *gates = rows + BLOCK * V, *shifts = gates + V, *scales = shifts + V, *biases = scales + V;
    Floats totals[BLOCK];
    float means[BLOCK], rstds[BLOCK];
    if (bias.given()) read(bias, 0, H, biases);
    const auto add = [&](int64_t m, int64_t n, int64_t i, const Floats& left, const Floats& right) INLINE_LAMBDA {
      const int64_t at = (m + i) * H + n, c = n / LANES;
      E* out = pointer<E>(r, at);
      store(out, load(pointer<E>(x, at)) + gates[c] * (left + biases[c]),
            load(pointer<E>(x, at + LANES)) + gates[c + 1] * (right + biases[c + 1]));
      totals[i] += (rows[i * V + c] = load(out)) + (rows[i * V + c + 1] = load(out + LANES));
    };
    Blocks blocks(block, add);
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t first = unit * BLOCK, b = first / T;
      if (unit == begin || first % T == 0) {
        read(gate, gate.at(b), H, gates);
        read(shift, shift.at(b), H, shifts);
        read_scale(scale, b, H, scales);
      }
      for (Floats& total : totals) total = Floats{};
      for (int64_t panel = 0; panel < H / BLOCK; panel++)
        blocks.next(a + first * K, K, pointer<E>(weights, panel * steps * PIECE), steps, first, panel * BLOCK);
      blocks.finish();
      // One step of all rows before the next: a row alone would wait for its own sums.
      for (int64_t i = 0; i < BLOCK; i++) means[i] = sum(totals[i]) / H;
      for (int64_t i = 0; i < BLOCK; i++) rstds[i] = 1.0f / std::sqrt(squares(rows + i * V, means[i], H) / H + eps);
      for (int64_t i = 0; i < BLOCK; i++)
        write_norm(rows + i * V, means[i], rstds[i], H, scales, shifts, pointer<E>(y, (first + i) * H));
    }
  });
}

// What attention reads of each token of a head, and where from.
struct Heads {
  const View &qkv, &cos, &sin;
  const Half* weights[2];  // of q and k, or null
  int64_t T, H, D;
  float eps;
  bool bounded;  // scores_are_bounded
};

// Head n of token t of sample b of q (which = 0) or k (1), normed and rotated, to out [D]. V vectors in half a head.
template <int64_t V>
INLINE void read_head(const Heads& heads, int64_t which, int64_t b, int64_t t, int64_t n, E* out) {
  const int64_t h = heads.D / 2;
  const E* source = pointer<E>(heads.qkv, ((b * heads.T + t) * 3 + which) * heads.H + n * heads.D);
  Floats x1[V], x2[V], squares{};
  for (int64_t i = 0; i < V; i++) {
    x1[i] = load(source + i * LANES);
    x2[i] = load(source + h + i * LANES);
    squares += x1[i] * x1[i] + x2[i] * x2[i];
  }
  if (const Half* weight = heads.weights[which]) {
    const float r = 1.0f / std::sqrt(sum(squares) / heads.D + heads.eps);
    for (int64_t i = 0; i < V; i++) {
      x1[i] *= r * weight->first[i];
      x2[i] *= r * weight->second[i];
    }
  }
  for (int64_t i = 0; i < V; i++) {
    Floats y1 = x1[i], y2 = x2[i];
    if (heads.cos.given()) {
      const Floats c = load(pointer<float>(heads.cos, t * h + i * LANES)), s = load(pointer<float>(heads.sin, t * h + i * LANES));
      y1 = x1[i] * c - x2[i] * s;
      y2 = x2[i] * c + x1[i] * s;
    }
    store(out + i * LANES, y1);
    store(out + h + i * LANES, y2);
  }
}

// Packs the keys [T,D] as a matrix of T rows, and the transposed values as one of D rows.
template <int64_t V>
void pack_keys_values(const Heads& heads, int64_t b, int64_t n, E* keys, E* values) {
  const int64_t T = heads.T, D = heads.D;
  alignas(64) E tokens[TILE * 2 * V * LANES];
  for (int64_t t = 0; t < T; t += TILE) {
    for (int64_t i = 0; i < TILE; i++) read_head<V>(heads, 1, b, t + i, n, tokens + i * D);
    for (int64_t d = 0; d < D; d += BLOCK)
      transpose((uint32_t*)(tokens + d), D / 2, (uint32_t*)(keys + (t / BLOCK * D + d) * BLOCK + t % BLOCK * TILE * 2));
    const E* source = pointer<E>(heads.qkv, ((b * T + t) * 3 + 2) * heads.H + n * D);
    for (int64_t i = 0; i < TILE; i += 2, source += 6 * heads.H)
      for (int64_t d = 0; d < D; d += TILE)
        interleave(source + d, source + 3 * heads.H + d,
                   values + (d / BLOCK * T + t / BLOCK * BLOCK) * BLOCK + d % BLOCK * TILE * 2 + (t % BLOCK + i) / 2 * BLOCK);
  }
}

// softmax(q·kᵀ/√D)·v of head n of sample b, into its columns of out [M,H]. Exact softmax: all weights of QUERIES rows are kept.
template <int64_t V>
void attend(const Heads& heads, int64_t b, int64_t n, Block& block, E* memory, E* out) {
  const int64_t T = heads.T, D = heads.D, stride = T + BLOCK;  // not a multiple of a page, which would crowd the cache
  const float scale = 1.0f / std::sqrt((float)D);
  E *keys = memory, *values = keys + T * D, *queries = values + T * D, *weights = queries + QUERIES * D;
  Floats largest[QUERIES], totals[QUERIES];
  float tops[QUERIES], inverses[QUERIES];
  const auto each = [&](int64_t rows, const auto& finish) INLINE_LAMBDA {
    Blocks blocks(block, finish);
    for (int64_t q = 0; q < rows; q += BLOCK)
      for (int64_t key = 0; key < T; key += BLOCK) blocks.next(queries + q * D, D, keys + key * D, D / BLOCK, q, key);
    blocks.finish();
  };
  pack_keys_values<V>(heads, b, n, keys, values);
  for (int64_t t = 0; t < T; t += QUERIES) {
    const int64_t rows = std::min(QUERIES, T - t);
    for (int64_t i = 0; i < rows; i++) read_head<V>(heads, 0, b, t + i, n, queries + i * D);
    for (int64_t i = 0; i < rows; i++) largest[i] = -INFINITY, totals[i] = Floats{}, tops[i] = 0;
    if (!heads.bounded) {
      each(rows, [&](int64_t q, int64_t, int64_t i, const Floats& left, const Floats& right) INLINE_LAMBDA {
        largest[q + i] = max(largest[q + i], max(left, right));
      });
      for (int64_t i = 0; i < rows; i++) tops[i] = max(largest[i]) * scale;
    }
    each(rows, [&](int64_t q, int64_t key, int64_t i, const Floats& left, const Floats& right) INLINE_LAMBDA {
      const Floats a = exp(left * scale - tops[q + i]), b = exp(right * scale - tops[q + i]);
      totals[q + i] += a + b;
      store(weights + (q + i) * stride + key, a, b);
    });
    for (int64_t i = 0; i < rows; i++) inverses[i] = 1.0f / sum(totals[i]);
    const auto divide = [&](int64_t q, int64_t d, int64_t i, const Floats& left, const Floats& right) INLINE_LAMBDA {
      store(out + (b * T + t + q + i) * heads.H + n * D + d, left * inverses[q + i], right * inverses[q + i]);
    };
    Blocks blocks(block, divide);
    for (int64_t q = 0; q < rows; q += BLOCK)
      for (int64_t d = 0; d < D; d += BLOCK) blocks.next(weights + q * stride, stride, values + d * T, T / BLOCK, q, d);
    blocks.finish();
  }
}

template <int64_t V>
void attention(const Heads& heads, int64_t B, E* out) {
  const int64_t N = heads.H / heads.D, T = heads.T;
  parallel(B * N, 1, [&](int64_t begin, int64_t end) {
    Block block;
    Scratch memory((2 * T * heads.D + QUERIES * (heads.D + T + BLOCK)) / (2 * LANES));
    for (int64_t unit = begin; unit < end; unit++) attend<V>(heads, unit / N, unit % N, block, (E*)memory.data(), out);
  });
}

// Whether scores cannot pass ±40, so that e^score needs no largest one taken from it: |q| and |k| are √D·max|weight| at most.
bool scores_are_bounded(const Half* q, const Half* k, int64_t D) {
  if (!q || !k) return false;
  const auto largest = [&](const Half& w) {
    Floats found{};
    for (int64_t i = 0; i < D / 2 / LANES; i++)
      for (const Floats& v : {w.first[i], w.second[i]}) found = max(found, max(v, Floats(0.0f) - v));
    return max(found);
  };
  return std::sqrt((float)D) * largest(*q) * largest(*k) < 40;
}

}  // namespace

void dit_block_forward(View x, View y, View gate1, View shift2, View scale2, View gate2, View next_shift, View next_scale,
                       View qkv_weight, View q_weight, View k_weight, View cos, View sin, View out_weight, View up_weight,
                       View up_bias, View down_weight, View down_bias, int64_t N, double eps, double qk_eps, View wide, View narrow,
                       View r, View y_out) {
  const int64_t B = x.size[0], T = x.size[1], H = x.size[2], D = H / N, M = B * T, F = up_bias.size[0] / 2;
  E *qkv = pointer<E>(wide), *hidden = qkv, *attended = pointer<E>(narrow);
  multiply(pointer<E>(y), M, H, pointer<E>(qkv_weight), 3 * H,
           [&](int64_t m, int64_t n, int64_t i, const Floats& left, const Floats& right)
               INLINE_LAMBDA { store(qkv + (m + i) * 3 * H + n, left, right); });

  Half norms[2];
  const View given[2] = {q_weight, k_weight};
  read_weights(given, D / 2, norms);
  const Half *q_norm = q_weight.given() ? norms : nullptr, *k_norm = k_weight.given() ? norms + 1 : nullptr;
  const Heads heads{wide, cos, sin, {q_norm, k_norm}, T, H, D, (float)qk_eps, scores_are_bounded(q_norm, k_norm, D)};
  const auto run = D == 32 ? attention<1> : D == 64 ? attention<2> : D == 96 ? attention<3> : attention<4>;
  run(heads, B, attended);
  add_branch(attended, H, out_weight, View{}, x, gate1, shift2, scale2, eps, r, y_out);

  // Columns n .. n+15 of the packed `up` are values, the next 16 their gates.
  const float* bias = pointer<float>(up_bias);
  multiply(pointer<E>(y_out), M, H, pointer<E>(up_weight), 2 * F,
           [&](int64_t m, int64_t n, int64_t i, const Floats& left, const Floats& right) INLINE_LAMBDA {
             const Floats gate = right + load(bias + n + TILE);
             store(hidden + (m + i) * F + n / 2, (left + load(bias + n)) * gate * sigmoid(gate));
           });
  add_branch(hidden, F, down_weight, down_bias, r, gate2, next_shift, next_scale, eps, r, y_out);
}

}  // namespace fastdit::FASTDIT_ISA
