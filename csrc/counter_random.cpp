// counter_uniform and counter_normal: Philox-4x32-10, as kernels/counter_random.py has it, four counters at a time.
#include "ops.h"
#include "parallel.h"

namespace fastdit::FASTDIT_ISA {
namespace {

typedef uint32_t Words __attribute__((vector_size(16)));  // 4 counters: products of 64 bits are then 2 registers of SSE2
typedef uint64_t Longs __attribute__((vector_size(32)));
constexpr int64_t COUNTERS = 4;

INLINE void multiply(Words a, uint32_t m, Words& high, Words& low) {
  const Longs product = __builtin_convertvector(a, Longs) * (uint64_t)m;
  high = __builtin_convertvector(product >> 32, Words);
  low = __builtin_convertvector(product, Words);
}

INLINE void philox(Words c[4], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; round++) {
    Words high0, low0, high1, low1;
    multiply(c[0], 0xD2511F53, high0, low0);
    multiply(c[2], 0xCD9E8D57, high1, low1);
    const Words c1 = c[1], c3 = c[3];
    c[0] = high1 ^ c1 ^ key0, c[1] = low1, c[2] = high0 ^ c3 ^ key1, c[3] = low0;
    key0 += 0x9E3779B9, key1 += 0xBB67AE85;
  }
}

// The top 24 bits of a word, in [0, 1).
INLINE float unit_of(uint32_t word) { return (word >> 8) * 0x1p-24f; }

INLINE void normal_pair(uint32_t w0, uint32_t w1, float* out) {
  const float radius = std::sqrt(-2 * std::log(unit_of(w0) + 0x1p-24f)), angle = 6.283185307179586f * unit_of(w1);
  out[0] = radius * std::cos(angle);
  out[1] = radius * std::sin(angle);
}

}  // namespace

void counter_random_forward(View ids, int64_t key0, int64_t key1, int64_t stream, bool normal, View out) {
  const int64_t B = out.size[0], W = out.size[1], blocks = (W + 4 * COUNTERS - 1) / (4 * COUNTERS);
  parallel(B * blocks, 64, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t b = unit / blocks, block = unit % blocks;
      const uint64_t id = ((const int64_t*)ids.data)[ids.at(b)];
      const Words lanes = {0, 1, 2, 3};
      Words c[4] = {lanes + (uint32_t)(block * COUNTERS), Words{} + (uint32_t)stream, Words{} + (uint32_t)id,
                    Words{} + (uint32_t)(id >> 32)};
      philox(c, key0, key1);
      float values[4 * COUNTERS];
      for (int i = 0; i < COUNTERS; i++)
        for (int pair = 0; pair < 4; pair += 2) {
          float* at = values + 4 * i + pair;
          if (normal)
            normal_pair(c[pair][i], c[pair + 1][i], at);
          else
            at[0] = unit_of(c[pair][i]), at[1] = unit_of(c[pair + 1][i]);
        }
      const int64_t first = block * 4 * COUNTERS, n = W - first < 4 * COUNTERS ? W - first : 4 * COUNTERS;
      memcpy((float*)out.data + b * W + first, values, n * sizeof(float));
    }
  });
}

}  // namespace fastdit::FASTDIT_ISA
