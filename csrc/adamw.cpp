// adamw_step: AdamW on fp32 masters, their moving averages and their copies in the model's precision, in one pass and in place.
// P parameters, k averages. Rounded as torch's fused AdamW on a CPU rounds full vectors; torch sums the second moments of the last
// elements, which fill no vector, in another order.
#include "ops.h"
#include "parallel.h"

namespace fastdit::FASTDIT_ISA {

namespace {

constexpr int64_t BLOCK = 1024, NUMBERS = 7;  // as in kernels/adamw.py

INLINE Part fma(Part a, Part b, Part c) {
#if defined(__AVX512F__)
  return (Part)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Part)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

INLINE Part root(Part a) {
#if defined(__AVX512F__)
  return (Part)_mm512_sqrt_ps((__m512)a);
#elif defined(__AVX2__)
  return (Part)_mm256_sqrt_ps((__m256)a);
#else
  for (int i = 0; i < WIDTH; i++) a[i] = std::sqrt(a[i]);
  return a;
#endif
}

// A product that the compiler must round, and not fuse with an addition.
INLINE Part rounded(Part product) {
#if defined(__x86_64__)
  asm("" : "+x"(product));
#elif defined(__aarch64__)
  asm("" : "+w"(product));
#endif
  return product;
}

// a + weight·(b − a), with the smaller of weight and 1 − weight as the factor.
INLINE Part lerp(Part a, Part b, float weight) {
  return weight < 0.5f ? fma(weight - Part{}, b - a, a) : fma((weight - 1.0f) - Part{}, b - a, b);
}

// A number of a step: the bits of an fp32 in the lower half.
INLINE float number(const int64_t* changing, int64_t i) {
  float value;
  memcpy(&value, changing + i, sizeof value);
  return value;
}

// One block of a parameter. row: its column of the table, whose rows are P long.
template <class G, class C>
INLINE void update(const int64_t* row, int64_t P, int64_t first, const int64_t* changing, const G* gradient, float scale,
                   int64_t averages, int64_t weights) {
  const float decay = number(changing, 0), step = number(changing, 1), correction = number(changing, 2), eps = number(changing, 3),
              weight = number(changing, 4), beta2 = number(changing, 5), rest2 = number(changing, 6);
  float *master = (float*)row[0], *exp_avg = (float*)row[P], *exp_avg_sq = (float*)row[2 * P];
  C* copy = (C*)row[4 * P];
  const int64_t end = row[3 * P] < first + BLOCK ? row[3 * P] : first + BLOCK;
  for (int64_t i = first; i < end; i += LANES) {
    const int64_t left = end - i;
    const Floats g = load_some(gradient + i, left) / Floats(scale);
    Floats p = load_some(master + i, left), m = load_some(exp_avg + i, left), v = load_some(exp_avg_sq + i, left);
    for (int k = 0; k < PARTS; k++) {
      const Part gradients = g.part[k], scaled = gradients * rest2;
      m.part[k] = lerp(m.part[k], gradients, weight);
      v.part[k] = fma(scaled, gradients, v.part[k] * beta2);
      p.part[k] = rounded(p.part[k] * decay) - step * m.part[k] / (root(v.part[k]) / correction + eps);
    }
    store_some(exp_avg + i, m, left);
    store_some(exp_avg_sq + i, v, left);
    store_some(master + i, p, left);
    if (copy) store_some(copy + i, p, left);
    for (int64_t k = 0; k < averages; k++) {
      float* average = (float*)row[(5 + k) * P];
      Floats a = load_some(average + i, left);
      for (int part = 0; part < PARTS; part++) a.part[part] = lerp(a.part[part], p.part[part], number(changing, weights + k));
      store_some(average + i, a, left);
    }
  }
}

}  // namespace

void adamw_step(View blocks, View table, View changing, View gradient, View copy, View grad_scale, View found_inf,
                int64_t averages) {
  if (*pointer<float>(found_inf) != 0) return;
  const int64_t P = table.size[1], *addresses = pointer<int64_t>(table), *numbers = pointer<int64_t>(changing);
  const int64_t gradients = changing.size[0] - P;
  const int32_t* units = pointer<int32_t>(blocks);
  const float scale = *pointer<float>(grad_scale);
  with_type(gradient.type, [&](auto of_gradient) {
    with_type(copy.type, [&](auto of_copy) {
      using G = decltype(of_gradient);
      using C = decltype(of_copy);
      parallel(blocks.size[0], 16, [&](int64_t begin, int64_t end) {
        for (int64_t unit = begin; unit < end; unit++) {
          const int64_t parameter = units[2 * unit], first = units[2 * unit + 1] * BLOCK;
          update<G, C>(addresses + parameter, P, first, numbers, (const G*)numbers[gradients + parameter], scale, averages,
                       NUMBERS);
        }
      });
    });
  });
}

}  // namespace fastdit::FASTDIT_ISA
