// dit_block: a DiT block for sampling, in bf16 and without gradients. What lies between two matmuls is computed on the fp32 sums of
// the first, mostly while its next sums are computed. M = B·T rows, H width, N heads, D head dim, F SwiGLU hidden width. Every size
// is a multiple of 32.
//
// One head of one sample: everything but y, the weight and out is in the thread's HeadMemory, which stays in its L2 cache.
//
//   y [T,H] · (rows of the head in the weight of qkv)ᵀ               project_head
//                        │
//                   qkv [T,3,D]
//          ┌─────────────┼──────────────────────┐
//          q             k                      v
//     norm, rotate  norm, rotate                │                   read_head
//     ·log2 e/√D    packed as [T,D]     packed as [D,T]             pack_keys_values
//          │             │                      │
//   queries [32,D] · keys [T,D]ᵀ                │                   attend, 32 queries at a time:
//                 │                             │
//        scores, 32 x 32 fp32 sums              │                   the largest of each row first, unless scores are bounded
//                 │                             │
//   probabilities [32,T] = 2^(score − largest)  │                   not yet divided by their sum
//                 └──────────────┬──────────────┘
//             out [32,D] = probabilities · v / sum                  in columns n·D .. of [M,H]
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

// a·Wᵀ of a [M,K] and packed W [N,K], 32 x 32 at a time. finish: see Blocks; each thread works on a copy. next: the weights of the
// matmul that follows, which are prefetched.
template <class Finish>
void multiply(const E* a, int64_t M, int64_t K, const E* weights, int64_t N, const Ahead& next, const Finish& finish) {
  const int64_t panels = N / BLOCK, steps = K / BLOCK;
  const int64_t group = std::max<int64_t>(1, GROUP_BYTES / (K * BLOCK * sizeof(E)) / 2) * 2;  // even: SwiGLU joins two panels
  parallel(M / BLOCK, 1, [&](int64_t begin, int64_t end) {
    Block block;
    const Finish copy = finish;
    Blocks blocks(block, copy);
    for (int64_t first = 0, last; first < panels; first = last) {
      last = std::min(first + group, panels);
      const int64_t more = std::min(group, panels - last);
      blocks.weights_ahead = more ? Ahead(weights + last * steps * PIECE, more * steps * PIECE * sizeof(E)) : next;
      for (int64_t m = begin * BLOCK; m < end * BLOCK; m += BLOCK)
        for (int64_t panel = first; panel < last; panel++)
          blocks.next(a + m * K, K, weights + panel * steps * PIECE, steps, m, panel * BLOCK);
    }
    blocks.finish();
  });
}

// r = x + gate·(a·Wᵀ + bias), rounded; y = LN(r)·(1 + scale) + shift. a [M,K]; x, r, y [B,T,H]; x may be r. bias may be missing.
// next: as in `multiply`.
void add_branch(const E* a, int64_t K, const View& weights, const View& bias, const View& x, const View& gate, const View& shift,
                const View& scale, float eps, const View& r, const View& y, const Ahead& next) {
  const int64_t T = x.size[1], H = x.size[2], V = vectors(H), steps = K / BLOCK;
  parallel(x.size[0] * T / BLOCK, 1, [&](int64_t first_unit, int64_t last_unit) {
    Block block;
    Scratch scratch(4 * V);
    Floats *gates = scratch.data(), *shifts = gates + V, *scales = shifts + V, *biases = scales + V;
    Floats totals[BLOCK];
    float means[BLOCK], rstds[BLOCK];
    if (bias.given()) read(bias, 0, H, biases);
    const auto add = [&](int64_t m, int64_t n, int64_t begin, int64_t end, const Sums& sums) INLINE_LAMBDA {
      const int64_t c = n / LANES, width = H;
      const E* source = pointer<E>(x, m * H + n);
      E* target = pointer<E>(r, m * H + n);
      const Floats gate1 = gates[c], gate2 = gates[c + 1], bias1 = biases[c], bias2 = biases[c + 1];
      sums.each_row(begin, end, [&](int64_t i, const Floats& left, const Floats& right) INLINE_LAMBDA {
        const E* in = source + i * width;
        E* out = target + i * width;
        store(out, load(in) + gate1 * (left + bias1), load(in + LANES) + gate2 * (right + bias2));
        totals[i] += load(out) + load(out + LANES);
      });
    };
    Blocks blocks(block, add);
    blocks.weights_ahead = next;
    for (int64_t unit = first_unit; unit < last_unit; unit++) {
      const int64_t first = unit * BLOCK, b = first / T;
      if (unit == first_unit || first % T == 0) {
        read(gate, gate.at(b), H, gates);
        read(shift, shift.at(b), H, shifts);
        read_scale(scale, b, H, scales);
      }
      if (unit + 1 < last_unit) {
        blocks.rows_ahead = Ahead(a + (first + BLOCK) * K, BLOCK * K * sizeof(E));
        blocks.stream_ahead = Ahead(pointer<E>(x, (first + BLOCK) * H), BLOCK * H * sizeof(E));
      }
      for (Floats& total : totals) total = Floats{};
      for (int64_t panel = 0; panel < H / BLOCK; panel++)
        blocks.next(a + first * K, K, pointer<E>(weights, panel * steps * PIECE), steps, first, panel * BLOCK);
      blocks.finish();
      // One step of all rows before the next: a row alone would wait for its own sums.
      const auto row = [&](int64_t i) INLINE_LAMBDA {
        return [out = pointer<E>(r, (first + i) * H)](int64_t v) INLINE_LAMBDA { return load(out + v * LANES); };
      };
      for (int64_t i = 0; i < BLOCK; i++) means[i] = sum(totals[i]) / H;
      for (int64_t i = 0; i < BLOCK; i++) rstds[i] = 1.0f / std::sqrt(squares(row(i), means[i], H) / H + eps);
      for (int64_t i = 0; i < BLOCK; i++) write_norm(row(i), means[i], rstds[i], H, scales, shifts, pointer<E>(y, (first + i) * H));
    }
  });
}

// The inputs of attention. y [B,T,H]; qkv: the packed weight; norms: the weights of the norms of q and k, or null.
struct Heads {
  const E *y, *qkv;
  const View &cos, &sin;
  const Half* norms[2];
  int64_t T, H, D;
  float eps;
};

// A thread's memory for one head of one sample.
struct HeadMemory {
  int64_t T, D;
  int64_t stride = T + BLOCK;  // of probabilities' rows: not a multiple of a page, or few sets of the cache would hold them all
  // In bf16, of which 2·LANES fill a vector of Scratch; every term is a multiple of 32.
  Scratch memory{(3 * T * D + T * D + T * D + BLOCK * D + BLOCK * stride) / (2 * LANES)};
  E* qkv = (E*)memory.data();              // [T,3,D]
  E* keys = qkv + 3 * T * D;               // packed [T,D]
  E* values = keys + T * D;                // packed [D,T]: vᵀ
  E* queries = values + T * D;             // [32,D]
  E* probabilities = queries + BLOCK * D;  // [32,T], rows `stride` apart

  // Where the packed keys, W [N,K] of tile.h with N = T and K = D, hold tokens t .. t+15 and elements d .. d+31: one tile.
  INLINE E* key_tile(int64_t t, int64_t d) const {
    return keys + t / BLOCK * (D * BLOCK) + d / BLOCK * PIECE + t % BLOCK / TILE * (PIECE / 2);
  }

  // Where the packed values, W [N,K] of tile.h with N = D and K = T, hold tokens t and t+1, t even, of elements d .. d+15: one row
  // of dwords of a tile.
  INLINE E* value_pair(int64_t t, int64_t d) const {
    return values + d / BLOCK * (T * BLOCK) + t / BLOCK * PIECE + d % BLOCK / TILE * (PIECE / 2) + t % BLOCK / 2 * (2 * TILE);
  }
};

// q (which = 0) or k (1) of token t, normed, rotated and q scaled, to out [D]. V vectors in half a head.
template <int64_t V>
INLINE void read_head(const Heads& heads, const E* qkv, int64_t which, int64_t t, E* out) {
  constexpr int64_t h = V * LANES, D = 2 * h;
  const E* source = qkv + (t * 3 + which) * D;
  Half x;
  read_halves(source, h, x);
  // Scores are q·kᵀ/√D, and e^score is 2^(score·log2 e).
  float factor = which == 0 ? 1.44269504f / std::sqrt((float)D) : 1.0f;
  const Half* norm = heads.norms[which];
  if (norm) factor *= rms(x, h, V, heads.eps);
  for (int64_t i = 0; i < V; i++) {
    x.first[i] *= norm ? norm->first[i] * factor : factor;
    x.second[i] *= norm ? norm->second[i] * factor : factor;
  }
  if (heads.cos.given()) {
    Floats cos[V], sin[V];
    for (int64_t i = 0; i < V; i++) {
      cos[i] = load(pointer<float>(heads.cos, t * h + i * LANES));
      sin[i] = load(pointer<float>(heads.sin, t * h + i * LANES));
    }
    rotate(x, cos, sin, 1, V);
  }
  const auto part = [&](int64_t i) INLINE_LAMBDA { return i < V ? x.first[i] : x.second[i - V]; };
  for (int64_t i = 0; i < 2 * V; i += 2) store(out + i * LANES, part(i), part(i + 1));
}

// Head n of y·Wᵀ for the tokens of sample b, to memory.qkv [T,3,D].
void project_head(const Heads& heads, int64_t b, int64_t n, Block& block, const HeadMemory& memory) {
  const int64_t T = heads.T, H = heads.H, D = heads.D, steps = H / BLOCK;
  const auto store_sums = [&](int64_t t, int64_t c, int64_t begin, int64_t end, const Sums& sums) INLINE_LAMBDA {
    E* target = memory.qkv + t * 3 * D + c;
    const int64_t stride = 3 * D;
    sums.each_row(begin, end, [&](int64_t i, const Floats& left, const Floats& right) INLINE_LAMBDA {
      store(target + i * stride, left, right);
    });
  };
  Blocks blocks(block, store_sums);
  for (int64_t t = 0; t < T; t += BLOCK)
    for (int64_t which = 0; which < 3; which++)
      for (int64_t d = 0; d < D; d += BLOCK)
        blocks.next(heads.y + (b * T + t) * H, H, heads.qkv + (which * H + n * D + d) * H, steps, t, which * D + d);
  blocks.finish();
}

// The keys [T,D] packed as a matrix of T rows, and the transposed values as one of D rows.
template <int64_t V>
void pack_keys_values(const Heads& heads, const HeadMemory& memory) {
  constexpr int64_t D = 2 * V * LANES;
  const int64_t T = heads.T;
  const auto value = [&](int64_t t) INLINE_LAMBDA { return memory.qkv + (t * 3 + 2) * D; };
  alignas(64) E tokens[TILE * D];
  for (int64_t t = 0; t < T; t += TILE) {
    for (int64_t i = 0; i < TILE; i++) read_head<V>(heads, memory.qkv, 1, t + i, tokens + i * D);
    for (int64_t d = 0; d < D; d += BLOCK) transpose((uint32_t*)(tokens + d), D / 2, (uint32_t*)memory.key_tile(t, d));
    for (int64_t i = 0; i < TILE; i += 2)
      for (int64_t d = 0; d < D; d += TILE) interleave(value(t + i) + d, value(t + i + 1) + d, memory.value_pair(t + i, d));
  }
}

// softmax(q·kᵀ/√D)·v of head n of sample b, into its columns of out [M,H]. BOUNDED: scores_are_bounded.
template <int64_t V, bool BOUNDED>
void attend(const Heads& heads, int64_t b, int64_t n, Block& block, const HeadMemory& memory, E* out) {
  constexpr int64_t D = 2 * V * LANES;
  const int64_t T = heads.T;
  project_head(heads, b, n, block, memory);
  pack_keys_values<V>(heads, memory);
  for (int64_t t = 0; t < T; t += BLOCK) {
    Floats largest[BLOCK], totals[BLOCK];
    float tops[BLOCK], inverses[BLOCK];
    for (int64_t i = 0; i < BLOCK; i++) {
      read_head<V>(heads, memory.qkv, 0, t + i, memory.queries + i * D);
      largest[i] = -INFINITY, totals[i] = Floats{};
    }
    const auto each_key = [&](const auto& finish) INLINE_LAMBDA {
      Blocks blocks(block, finish);
      for (int64_t key = 0; key < T; key += BLOCK) blocks.next(memory.queries, D, memory.keys + key * D, D / BLOCK, 0, key);
      blocks.finish();
    };
    if constexpr (!BOUNDED) {
      each_key([&](int64_t, int64_t, int64_t begin, int64_t end, const Sums& sums) INLINE_LAMBDA {
        sums.each_row(begin, end, [&](int64_t i, const Floats& left, const Floats& right) INLINE_LAMBDA {
          largest[i] = max(largest[i], max(left, right));
        });
      });
      for (int64_t i = 0; i < BLOCK; i++) tops[i] = max(largest[i]);
    }
    each_key([&](int64_t, int64_t key, int64_t begin, int64_t end, const Sums& sums) INLINE_LAMBDA {
      E* target = memory.probabilities + key;
      const int64_t stride = memory.stride;
      sums.each_row(begin, end, [&](int64_t i, const Floats& left, const Floats& right) INLINE_LAMBDA {
        const auto probability = [&](const Floats& score)
                                     INLINE_LAMBDA { return rough_exp2(BOUNDED ? score : max(score - tops[i], -126.0f)); };
        const Floats p1 = probability(left), p2 = probability(right);
        totals[i] += p1 + p2;
        store(target + i * stride, p1, p2);
      });
    });
    for (int64_t i = 0; i < BLOCK; i++) inverses[i] = 1.0f / sum(totals[i]);
    const auto divide = [&](int64_t row, int64_t d, int64_t begin, int64_t end, const Sums& sums) INLINE_LAMBDA {
      E* target = out + row * heads.H + n * D + d;
      const int64_t stride = heads.H;
      sums.each_row(begin, end, [&](int64_t i, const Floats& left, const Floats& right) INLINE_LAMBDA {
        store(target + i * stride, left * inverses[i], right * inverses[i]);
      });
    };
    Blocks blocks(block, divide);
    for (int64_t d = 0; d < D; d += BLOCK)
      blocks.next(memory.probabilities, memory.stride, memory.values + d * T, T / BLOCK, b * T + t, d);
    blocks.finish();
  }
}

// Whether no score can pass ±40, so that e^score does not overflow and the largest score need not be subtracted: after the norm,
// |q| and |k| are at most √D·max|weight|, and a rotation does not change them.
bool scores_are_bounded(const Half* q, const Half* k, int64_t D) {
  if (!q || !k) return false;
  const auto largest_of = [&](const Half& w) {
    Floats largest{};
    for (int64_t i = 0; i < D / 2 / LANES; i++)
      for (const Floats& v : {w.first[i], w.second[i]}) largest = max(largest, max(v, Floats(0.0f) - v));
    return max(largest);
  };
  return std::sqrt((float)D) * largest_of(*q) * largest_of(*k) < 40;
}

// One head of one sample at a time, so that its q, k and v stay in the cache.
template <int64_t V>
void attention(const Heads& heads, int64_t B, E* out) {
  const int64_t N = heads.H / heads.D;
  const auto run = scores_are_bounded(heads.norms[0], heads.norms[1], heads.D) ? attend<V, true> : attend<V, false>;
  parallel(B * N, 1, [&](int64_t begin, int64_t end) {
    Block block;
    const HeadMemory memory{heads.T, heads.D};
    for (int64_t unit = begin; unit < end; unit++) run(heads, unit / N, unit % N, block, memory, out);
  });
}

// (value + bias)·silu(gate + bias) of sums whose left half are values and whose right half their gates, to out [M,F].
struct SwiGLU {
  const float* bias;
  E* out;
  int64_t F;
  mutable Floats before[BLOCK];  // results of the panel to the left: rows are written in whole cache lines

  INLINE void operator()(int64_t m, int64_t n, int64_t begin, int64_t end, const Sums& sums) const {
    const Floats value_bias = load(bias + n), gate_bias = load(bias + n + TILE);
    const bool first = n % (2 * BLOCK) == 0;
    E* target = out + m * F + n / 2 - (first ? 0 : TILE);
    const int64_t stride = F;
    sums.each_row(begin, end, [&](int64_t i, const Floats& value, const Floats& gate) INLINE_LAMBDA {
      const Floats y = (value + value_bias) * rough_silu(gate + gate_bias);
      if (first)
        before[i] = y;
      else
        store(target + i * stride, before[i], y);
    });
  }
};

}  // namespace

void dit_block_forward(View x, View y, View gate1, View shift2, View scale2, View gate2, View next_shift, View next_scale,
                       View qkv_weight, View q_weight, View k_weight, View cos, View sin, View out_weight, View up_weight,
                       View up_bias, View down_weight, View down_bias, int64_t N, double eps, double qk_eps, View scratch, View r,
                       View y_out) {
  const int64_t B = x.size[0], T = x.size[1], H = x.size[2], D = H / N, M = B * T, F = up_bias.size[0] / 2;
  Half norms[2];
  const View given[2] = {q_weight, k_weight};
  read_weights(given, D / 2, norms);
  const Half *q_norm = q_weight.given() ? norms : nullptr, *k_norm = k_weight.given() ? norms + 1 : nullptr;
  const Heads heads{pointer<E>(y), pointer<E>(qkv_weight), cos, sin, {q_norm, k_norm}, T, H, D, (float)qk_eps};
  const auto run = D == 32 ? attention<1> : D == 64 ? attention<2> : D == 96 ? attention<3> : attention<4>;
  E *attended = pointer<E>(scratch), *hidden = attended;
  run(heads, B, attended);
  add_branch(attended, H, out_weight, View{}, x, gate1, shift2, scale2, eps, r, y_out,
             Ahead(up_weight.data, std::min<int64_t>(GROUP_BYTES, 2 * F * H * sizeof(E))));

  multiply(pointer<E>(y_out), M, H, pointer<E>(up_weight), 2 * F, Ahead(down_weight.data, H * F * sizeof(E)),
           SwiGLU{pointer<float>(up_bias), hidden, F});
  add_branch(hidden, F, down_weight, down_bias, r, gate2, next_shift, next_scale, eps, r, y_out, Ahead());
}

}  // namespace fastdit::FASTDIT_ISA
