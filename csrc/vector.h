// Sixteen fp32 lanes, whatever the instruction set: one zmm, two ymm or four xmm registers. The order of every sum is that of these
// lanes, so AVX2 and AVX-512 give the same bits. A kernel reads rows into fp32 lanes (in the L1 cache), computes, and rounds once
// when it writes them; the lanes past the end of a row are read as zeros.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#define INLINE inline __attribute__((always_inline))

namespace fastdit {

constexpr int64_t LANES = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Shorts __attribute__((vector_size(32)));
typedef _Float16 Halves __attribute__((vector_size(32)));

struct BFloat16 {
  uint16_t bits;
};

enum class Type { fp32, bf16, fp16 };

// A tensor: sizes and strides in elements. `data` is null for an optional one that is not given.
struct View {
  void* data = nullptr;
  Type type = Type::fp32;
  int64_t size[4] = {}, stride[4] = {};

  bool given() const { return data != nullptr; }
  int64_t at(int64_t i, int64_t j = 0, int64_t k = 0) const { return i * stride[0] + j * stride[1] + k * stride[2]; }
};

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

INLINE Floats splat(float value) { return value - Floats{}; }

INLINE Floats load(const float* p) {
  Floats v;
  memcpy(&v, p, sizeof v);
  return v;
}

INLINE Floats load(const BFloat16* p) {
  Shorts bits;
  memcpy(&bits, p, sizeof bits);
  return (Floats)(__builtin_convertvector(bits, Words) << 16);
}

INLINE Floats load(const _Float16* p) {
  Halves v;
  memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, Floats);
}

INLINE void store(float* p, Floats v) { memcpy(p, &v, sizeof v); }

// To nearest, ties to even; NaN stays NaN.
INLINE void store(BFloat16* p, Floats v) {
  Words bits = (Words)v;
  Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  rounded = v == v ? rounded : (bits >> 16) | 0x40;
  Shorts out = __builtin_convertvector(rounded, Shorts);
  memcpy(p, &out, sizeof out);
}

INLINE void store(_Float16* p, Floats v) {
  Halves out = __builtin_convertvector(v, Halves);
  memcpy(p, &out, sizeof out);
}

template <class T>
INLINE void read_as(const T* p, int64_t n, Floats* out) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) out[i / LANES] = load(p + i);
  if (i == n) return;
  T tail[LANES] = {};
  memcpy(tail, p + i, (n - i) * sizeof(T));
  out[i / LANES] = load(tail);
}

template <class T>
INLINE void write_as(T* p, int64_t n, const Floats* in) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(p + i, in[i / LANES]);
  if (i == n) return;
  T tail[LANES];
  store(tail, in[i / LANES]);
  memcpy(p + i, tail, (n - i) * sizeof(T));
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

INLINE float read_one(const View& t, int64_t offset) {
  Floats v;
  read(t, offset, 1, &v);
  return v[0];
}

INLINE float sum(Floats v) {
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) v[i] += v[i + half];
  return v[0];
}

// e^x within 2 units of the last place: 2^n times Taylor's polynomial on |r| <= ln(2)/2. Below -87.3 it stops at 1.2e-38; above
// 88.3 it is infinite.
INLINE Floats exp(Floats x) {
  const auto overflow = x > 88.3f;
  x = overflow ? splat(88.3f) : x;
  x = x < -87.3f ? splat(-87.3f) : x;
  Floats shifted = x * 1.44269504f + 12582912.0f;  // 1.5·2^23: the sum's low bits are the nearest integer n
  Floats n = shifted - 12582912.0f;
  Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  return overflow ? splat(INFINITY) : (Floats)((Ints)p + ((Ints)shifted << 23));
}

INLINE Floats sigmoid(Floats x) { return 1.0f / (1.0f + exp(-x)); }

}  // namespace fastdit
