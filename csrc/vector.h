// Sixteen fp32 lanes, whatever the instruction set: one zmm, two ymm or four 128-bit registers. The order of every sum is that of
// these lanes. A kernel reads rows into fp32 lanes (in the L1 cache), computes, and rounds once when it writes them; the lanes past
// the end of a row are read as zeros. Each file of kernels is compiled once for each instruction set, in a namespace of its own.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "view.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

namespace fastdit::FASTDIT_ISA {

constexpr int64_t LANES = 16;

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
constexpr int PARTS = LANES / WIDTH;
typedef float Part __attribute__((vector_size(4 * WIDTH), may_alias));
typedef float UnalignedPart __attribute__((vector_size(4 * WIDTH), may_alias, aligned(4)));
typedef int32_t IntPart __attribute__((vector_size(4 * WIDTH), may_alias));
typedef uint32_t UIntPart __attribute__((vector_size(4 * WIDTH), may_alias));

struct BFloat16 {
  uint16_t bits;
};

struct Floats {
  Part part[PARTS];

  Floats() = default;
  INLINE Floats(float x) {
    for (Part& p : part) p = x - Part{};
  }
  // Part by part, here and in load and store: GCC 12 copies two ymm as four xmm by way of the stack, where loads wait for stores.
  INLINE Floats(const Floats& v) { *this = v; }
  INLINE Floats& operator=(const Floats& v) {
    for (int i = 0; i < PARTS; i++) part[i] = v.part[i];
    return *this;
  }
};

#define LANEWISE(symbol)                                                    \
  INLINE Floats operator symbol(Floats a, const Floats& b) {                \
    for (int i = 0; i < PARTS; i++) a.part[i] = a.part[i] symbol b.part[i]; \
    return a;                                                               \
  }                                                                         \
  INLINE Floats& operator symbol## = (Floats & a, const Floats& b) { return a = a symbol b; }
LANEWISE(+)
LANEWISE(-)
LANEWISE(*)
LANEWISE(/)
#undef LANEWISE

INLINE int64_t vectors(int64_t n) { return (n + LANES - 1) / LANES; }

// n vectors of zeros, aligned as vectors must be.
class Scratch {
 public:
  explicit Scratch(int64_t n) : data_((Floats*)std::aligned_alloc(sizeof(Floats), (n + 1) * sizeof(Floats))) {
    if (!data_) throw std::bad_alloc();
    memset((void*)data_, 0, n * sizeof(Floats));
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Floats* data() const { return data_; }

 private:
  Floats* data_;
};

INLINE Floats load(const float* p) {
  Floats v;
  for (int i = 0; i < PARTS; i++) v.part[i] = ((const UnalignedPart*)p)[i];
  return v;
}

INLINE void store(float* p, const Floats& v) {
  for (int i = 0; i < PARTS; i++) ((UnalignedPart*)p)[i] = v.part[i];
}

// bf16 is the upper half of an fp32. Stores round to nearest, ties to even, and keep NaN; the AVX-512 instruction takes numbers
// below 1.2e-38 as zero.
#if defined(__AVX512F__)
INLINE Floats load(const BFloat16* p) {
  Floats v;
  v.part[0] = (Part)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
  return v;
}
INLINE void store(BFloat16* p, const Floats& v) {
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v.part[0]));
}
INLINE Floats load(const _Float16* p) {
  Floats v;
  v.part[0] = (Part)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
  return v;
}
INLINE void store(_Float16* p, const Floats& v) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v.part[0], 0)); }
#elif defined(__AVX2__)
INLINE Floats load(const BFloat16* p) {
  Floats v;
  for (int i = 0; i < PARTS; i++)
    v.part[i] = (Part)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p + i)), 16);
  return v;
}
INLINE __m256i round_to_bf16(Part v) {
  const __m256i bits = (__m256i)v, odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i number = (__m256i)_mm256_cmp_ps((__m256)v, (__m256)v, _CMP_ORD_Q);
  return _mm256_srli_epi32(_mm256_blendv_epi8(quiet, rounded, number), 16);
}
INLINE void store(BFloat16* p, const Floats& v) {
  const __m256i packed = _mm256_packus_epi32(round_to_bf16(v.part[0]), round_to_bf16(v.part[1]));
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(packed, 0xd8));
}
INLINE Floats load(const _Float16* p) {
  Floats v;
  for (int i = 0; i < PARTS; i++) v.part[i] = (Part)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + i));
  return v;
}
INLINE void store(_Float16* p, const Floats& v) {
  for (int i = 0; i < PARTS; i++) _mm_storeu_si128((__m128i*)p + i, _mm256_cvtps_ph((__m256)v.part[i], 0));
}
#else
INLINE Floats load(const BFloat16* p) {
  uint32_t bits[LANES];
  for (int i = 0; i < LANES; i++) bits[i] = (uint32_t)p[i].bits << 16;
  Floats v;
  memcpy((void*)&v, bits, sizeof v);
  return v;
}
INLINE void store(BFloat16* p, const Floats& v) {
  uint32_t bits[LANES];
  memcpy(bits, &v, sizeof v);
  for (int i = 0; i < LANES; i++) {
    const bool number = (bits[i] & 0x7fffffff) <= 0x7f800000;
    p[i].bits = (number ? bits[i] + 0x7fff + ((bits[i] >> 16) & 1) : bits[i] | 0x400000) >> 16;
  }
}
INLINE Floats load(const _Float16* p) {
  float values[LANES];
  for (int i = 0; i < LANES; i++) values[i] = p[i];
  return load(values);
}
INLINE void store(_Float16* p, const Floats& v) {
  float values[LANES];
  store(values, v);
  for (int i = 0; i < LANES; i++) p[i] = values[i];
}
#endif

// Two vectors one after the other.
INLINE void store(BFloat16* p, const Floats& first, const Floats& second) {
#if defined(__AVX512F__)
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)second.part[0], (__m512)first.part[0]));
#else
  store(p, first);
  store(p + LANES, second);
#endif
}

// The first n < LANES elements; the other lanes are zero.
template <class T>
INLINE Floats load(const T* p, int64_t n) {
  T all[LANES] = {};
  memcpy(all, p, n * sizeof(T));
  return load(all);
}

template <class T>
INLINE void store(T* p, const Floats& v, int64_t n) {
  T all[LANES];
  store(all, v);
  memcpy(p, all, n * sizeof(T));
}

// A full vector, or the rest of a row.
template <class T>
INLINE Floats load_some(const T* p, int64_t n) {
  return n >= LANES ? load(p) : load(p, n);
}

template <class T>
INLINE void store_some(T* p, const Floats& v, int64_t n) {
  n >= LANES ? store(p, v) : store(p, v, n);
}

template <class T>
INLINE void read_as(const T* p, int64_t n, Floats* out) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) out[i / LANES] = load(p + i);
  if (i < n) out[i / LANES] = load(p + i, n - i);
}

template <class T>
INLINE void write_as(T* p, int64_t n, const Floats* in) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(p + i, in[i / LANES]);
  if (i < n) store(p + i, in[i / LANES], n - i);
}

// n contiguous elements from element `offset` on.
INLINE void read(const View& t, int64_t offset, int64_t n, Floats* out) {
  if (t.type == Type::bf16) return read_as((const BFloat16*)t.data + offset, n, out);
  if (t.type == Type::fp32) return read_as((const float*)t.data + offset, n, out);
  read_as((const _Float16*)t.data + offset, n, out);
}

INLINE void write(const View& t, int64_t offset, int64_t n, const Floats* in) {
  if (t.type == Type::bf16) return write_as((BFloat16*)t.data + offset, n, in);
  if (t.type == Type::fp32) return write_as((float*)t.data + offset, n, in);
  write_as((_Float16*)t.data + offset, n, in);
}

// The elements of a tensor as T, from element `offset` on.
template <class T>
INLINE T* pointer(const View& t, int64_t offset = 0) {
  return (T*)t.data + offset;
}

// f(T{}) for the type T of the tensors, which must agree.
template <class F>
void with_type(Type type, const F& f) {
  if (type == Type::bf16) return f(BFloat16{});
  if (type == Type::fp32) return f(float{});
  f(_Float16{});
}

INLINE float as_float(BFloat16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

INLINE float read_one(const View& t, int64_t offset) {
  if (t.type == Type::bf16) return as_float(((const BFloat16*)t.data)[offset]);
  return t.type == Type::fp32 ? ((const float*)t.data)[offset] : (float)((const _Float16*)t.data)[offset];
}

// The first n lanes; the others zero.
INLINE Floats keep(const Floats& v, int64_t n) {
  float all[LANES] = {};
  memcpy(all, &v, n * sizeof(float));
  return load(all);
}

// Pairwise: lane i and i + 8, then 4, 2, 1.
INLINE float sum(const Floats& v) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const __m256 low = _mm512_castps512_ps256((__m512)v.part[0]);
  const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)v.part[0]), 1));
#else
  const __m256 low = (__m256)v.part[0], high = (__m256)v.part[1];
#endif
  const __m256 eight = _mm256_add_ps(low, high);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
#else
  float all[LANES];
  store(all, v);
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) all[i] += all[i + half];
  return all[0];
#endif
}

// A NaN of a stays NaN.
INLINE Floats max(Floats a, const Floats& b) {
  for (int i = 0; i < PARTS; i++) a.part[i] = b.part[i] > a.part[i] ? b.part[i] : a.part[i];
  return a;
}

INLINE Floats min(Floats a, const Floats& b) {
  for (int i = 0; i < PARTS; i++) a.part[i] = b.part[i] < a.part[i] ? b.part[i] : a.part[i];
  return a;
}

INLINE float max(const Floats& v) {
  float all[LANES];
  store(all, v);
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) all[i] = all[i] > all[i + half] ? all[i] : all[i + half];
  return all[0];
}

// e^x within 2 units in the last place: 2^n times Taylor's polynomial of 2^f, |f| <= 1/2. Infinite above 88.7; below -87.3 it is 0
// (AVX-512) or stops at 1.2e-38.
INLINE Floats exp(Floats x) {
  constexpr float LOG2E = 1.44269504f,
                  C[] = {1.5403530e-4f, 1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f};
  for (Part& part : x.part) {
#if defined(__AVX512F__)
    const Part n = (Part)_mm512_roundscale_ps((__m512)(part * LOG2E), 8);
    const Part f = part * LOG2E - n;
#else
    part = part < -87.3f ? -87.3f - Part{} : part;
    const Part high = part, limited = part > 88.0f ? 88.0f - Part{} : part;
    const Part shifted = limited * LOG2E + 12582912.0f;  // 1.5·2^23: the low bits of the sum are the nearest integer n
    const Part n = shifted - 12582912.0f, f = limited * LOG2E - n;
#endif
    Part p = C[0] - Part{};
    for (int i = 1; i < 7; i++) p = p * f + C[i];
#if defined(__AVX512F__)
    part = (Part)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    p = (Part)((IntPart)p + ((IntPart)shifted << 23));
    part = high > 88.7f ? INFINITY - Part{} : p;
#endif
  }
  return x;
}

// 2^x for x from -126 to 127, with a relative error of 1.1e-4: for results that are rounded to bf16, which errs by 2e-3.
INLINE Floats rough_exp2(Floats x) {
  // The polynomial of degree 3 with the least largest relative error on |f| <= 1/2.
  constexpr float C[] = {5.5009102e-2f, 2.4221098e-1f, 6.9328289e-1f, 1.0f};
  for (Part& part : x.part) {
    const Part shifted = part + 12582912.0f;  // 1.5·2^23: the low bits of the sum are the nearest integer
    const Part f = part - (shifted - 12582912.0f);
    Part p = C[0] - Part{};
    for (int i = 1; i < 4; i++) p = p * f + C[i];
    part = (Part)((IntPart)p + ((IntPart)shifted << 23));
  }
  return x;
}

// x·sigmoid(x) with a relative error of 2e-4, for the same results; x·2^-126 below -87.
INLINE Floats rough_silu(const Floats& x) {
  Floats denominator = Floats(1.0f) + rough_exp2(min(max(x * -1.44269504f, -126.0f), 126.0f));
#if defined(__AVX512F__)
  denominator.part[0] = (Part)_mm512_rcp14_ps((__m512)denominator.part[0]);
  return x * denominator;
#else
  return x / denominator;
#endif
}

INLINE Floats sigmoid(const Floats& x) { return Floats(1.0f) / (Floats(1.0f) + exp(Floats(0.0f) - x)); }

}  // namespace fastdit::FASTDIT_ISA
