// Products of bf16 matrices in blocks of 32 x 32 fp32 sums: four tiles of 16 x 16, in AMX's tile registers where this is compiled
// for them. Elsewhere plain vectors do the same, for the tests: oneDNN is faster there.
//
// A packed matrix W [N,K] (kernels/dit_block.py packs it) is N/32 panels of K/32 pieces of 32 x 32: two tiles one after the other,
// for 16 of the panel's rows each, whose dword (i, j) is W's elements 2i and 2i+1 of row j. TDPBF16PS multiplies with this layout.
#pragma once

#include <algorithm>

#include "vector.h"

namespace fastdit::FASTDIT_ISA {

constexpr int64_t TILE = 16, BLOCK = 32, PIECE = BLOCK * BLOCK;

// The sums of a block in memory.
class Sums {
 public:
  // The tiles lie a page apart: a load waits for stores that are not yet in the cache and agree with its address in the lower 12
  // bits, and four tiles side by side would agree with every load.
  static constexpr int64_t APART = 4096 / sizeof(float);

  Sums() : data((float*)std::aligned_alloc(4096, 4 * APART * sizeof(float))) {
    if (!data) throw std::bad_alloc();
  }
  ~Sums() { std::free(data); }
  Sums(const Sums&) = delete;

  // f(i, columns 0 .. 15, columns 16 .. 31) for rows i.
  template <class F>
  INLINE void each_row(int64_t begin, int64_t end, const F& f) const {
    for (int64_t i = begin; i < end; i++) {
      const float* left = data + (i & TILE) * (2 * APART / TILE) + (i & (TILE - 1)) * TILE;
      f(i, load(left), load(left + APART));
    }
  }

  float* const data;
};

#if defined(__AMX_BF16__)

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
inline constexpr TileConfig TILE_CONFIG;

// A thread's block of sums, in registers and where they are stored. One at a time: the registers are the thread's.
class Block {
 public:
  // By hand: GCC 12's _tile_loadconfig is said to read 8 bytes, and the compiler may move the stores of the rest behind it.
  Block() { asm volatile("ldtilecfg %0" ::"m"(TILE_CONFIG)); }
  ~Block() { _tile_release(); }
  Block(const Block&) = delete;

  INLINE void zero() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }

  // Adds a·pieceᵀ. a: 32 rows of 32 elements, `stride` elements apart.
  INLINE void add(const BFloat16* a, int64_t stride, const BFloat16* piece) {
    // Not into L1: panels of W would push a's rows and the last sums out of it.
    _tile_stream_loadd(6, piece, 64);
    _tile_stream_loadd(7, piece + PIECE / 2, 64);
    _tile_loadd(4, a, 2 * stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + TILE * stride, 2 * stride);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }

  INLINE const Sums& store() const {
    _tile_stored(0, sums_.data, 4 * TILE);
    _tile_stored(1, sums_.data + Sums::APART, 4 * TILE);
    _tile_stored(2, sums_.data + 2 * Sums::APART, 4 * TILE);
    _tile_stored(3, sums_.data + 3 * Sums::APART, 4 * TILE);
    return sums_;
  }

 private:
  Sums sums_;
};

#else

class Block {
 public:
  Block() = default;
  Block(const Block&) = delete;

  INLINE void zero() {
    for (auto& tile : tiles_)
      for (Floats& row : tile) row = Floats{};
  }

  INLINE void add(const BFloat16* a, int64_t stride, const BFloat16* piece) {
    for (int tile = 0; tile < 4; tile++)
      for (int64_t k = 0; k < TILE; k++) {
        BFloat16 pairs[2][TILE];
        for (int64_t j = 0; j < TILE; j++)
          for (int64_t of = 0; of < 2; of++) pairs[of][j] = piece[tile % 2 * PIECE / 2 + k * BLOCK + 2 * j + of];
        const Floats even = load(pairs[0]), odd = load(pairs[1]);
        for (int64_t i = 0; i < TILE; i++) {
          const BFloat16* pair = a + (tile / 2 * TILE + i) * stride + 2 * k;
          tiles_[tile][i] += even * as_float(pair[0]) + odd * as_float(pair[1]);
        }
      }
  }

  INLINE const Sums& store() const {
    for (int64_t tile = 0; tile < 4; tile++)
      for (int64_t i = 0; i < TILE; i++) fastdit::FASTDIT_ISA::store(sums_.data + tile * Sums::APART + i * TILE, tiles_[tile][i]);
    return sums_;
  }

 private:
  Floats tiles_[4][TILE];
  Sums sums_;
};

#endif

// Memory that a thread will read next, brought into its L2 cache a few lines at a time: from L3 a tile takes six times as long.
struct Ahead {
  const char *at = nullptr, *end = nullptr;

  Ahead() = default;
  Ahead(const void* data, int64_t bytes) : at((const char*)data), end(at + bytes) {}

  INLINE void step() {
    if (at >= end) return;
    for (int line = 0; line < 3; line++) __builtin_prefetch(at + 64 * line, 0, 2);
    at += 3 * 64;
  }
};

// Blocks of a·Wᵀ one after the other. finish(row, column, begin, end, sums) uses the sums of a block, rows begin .. end at a time,
// while the next block is computed.
template <class Finish>
class Blocks {
 public:
  Blocks(Block& block, const Finish& finish) : block_(block), finish_(finish) {}
  Blocks(const Blocks&) = delete;

  Ahead weights_ahead, rows_ahead, stream_ahead;

  // a: 32 rows, `stride` elements apart, of 32·steps columns; pieces: one panel of W. row, column: arguments of `finish`.
  INLINE void next(const BFloat16* a, int64_t stride, const BFloat16* pieces, int64_t steps, int64_t row, int64_t column) {
    const int64_t rows_a_step = (BLOCK + steps - 1) / steps;
    asm volatile("" ::: "memory");  // GCC does not know that tile loads read memory: stores to it must come first
    block_.zero();
    for (int64_t k = 0; k < steps; k++) {
      block_.add(a + k * BLOCK, stride, pieces + k * PIECE);
      weights_ahead.step();
      rows_ahead.step();
      stream_ahead.step();
      finish_rows(rows_a_step);
    }
    sums_ = &block_.store();
    row_ = row, column_ = column, done_ = 0;
  }

  // Finishes the last block.
  INLINE void finish() { finish_rows(BLOCK); }

 private:
  INLINE void finish_rows(int64_t count) {
    const int64_t end = std::min(done_ + count, BLOCK);
    if (done_ < end) finish_(row_, column_, done_, end, *sums_);
    done_ = end;
  }

  Block& block_;
  const Finish& finish_;
  const Sums* sums_ = nullptr;
  int64_t row_ = 0, column_ = 0, done_ = BLOCK;  // of the stored block
};

// The 16 x 16 dwords of rows `stride` dwords apart, transposed: rows become columns.
INLINE void transpose(const uint32_t* in, int64_t stride, uint32_t* out) {
#if defined(__clang__)
  for (int64_t i = 0; i < TILE; i++)
    for (int64_t j = 0; j < TILE; j++) memcpy(out + j * TILE + i, in + i * stride + j, 4);
#else
  typedef uint32_t Row __attribute__((vector_size(64), aligned(4), may_alias));
  Row rows[TILE];
  for (int64_t i = 0; i < TILE; i++) rows[i] = *(const Row*)(in + i * stride);
  // Swaps the upper right with the lower left quarter of every square of 2·SIDE rows.
  const auto swap = [&]<int SIDE>() INLINE_LAMBDA {
    Row low, high;
    for (int j = 0; j < TILE; j++) low[j] = j & SIDE ? TILE + j - SIDE : j, high[j] = j & SIDE ? TILE + j : j + SIDE;
    for (int i = 0; i < TILE; i++) {
      if (i & SIDE) continue;
      const Row a = rows[i], b = rows[i + SIDE];
      rows[i] = __builtin_shuffle(a, b, low);
      rows[i + SIDE] = __builtin_shuffle(a, b, high);
    }
  };
  swap.template operator()<8>();
  swap.template operator()<4>();
  swap.template operator()<2>();
  swap.template operator()<1>();
  for (int64_t i = 0; i < TILE; i++) *(Row*)(out + i * TILE) = rows[i];
#endif
}

// Two rows of 16 elements, taken in turns: even 0, odd 0, even 1, ..
INLINE void interleave(const BFloat16* even, const BFloat16* odd, BFloat16* out) {
  const Floats low = load(even), high = load(odd);  // bf16 is the upper half of these
  for (int i = 0; i < PARTS; i++) {
    const auto pairs = (UIntPart)high.part[i] | (UIntPart)low.part[i] >> 16;
    ((UnalignedPart*)out)[i] = (UnalignedPart)pairs;
  }
}

}  // namespace fastdit::FASTDIT_ISA
