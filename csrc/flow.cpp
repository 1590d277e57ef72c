// flow_interpolate and flow_matching_loss. B batch, W elements of a sample.
#include "ops.h"
#include "parallel.h"

namespace fastdit::FASTDIT_ISA {
namespace {

constexpr int64_t BLOCK = 1024;  // elements of a sample in a unit: 4 KB of scratch a tensor

INLINE int64_t length(int64_t W, int64_t c) { return W - c < BLOCK ? W - c : BLOCK; }

}  // namespace

void flow_interpolate_forward(View x0, View noise, View t, View out) {
  const int64_t B = x0.size[0], W = x0.size[1], blocks = (W + BLOCK - 1) / BLOCK;
  parallel(B * blocks, 8, [&](int64_t begin, int64_t end) {
    Floats x[BLOCK / LANES], z[BLOCK / LANES];
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t b = unit / blocks, c = unit % blocks * BLOCK, n = length(W, c);
      const float time = read_one(t, t.at(b));
      read(x0, x0.at(b) + c, n, x);
      read(noise, noise.at(b) + c, n, z);
      for (int64_t i = 0; i < vectors(n); i++) x[i] = (1.0f - time) * x[i] + time * z[i];
      write(out, b * W + c, n, x);
    }
  });
}

void flow_interpolate_backward(View dout, View t, View dx0, View dnoise) {
  const int64_t B = dout.size[0], W = dout.size[1], blocks = (W + BLOCK - 1) / BLOCK;
  parallel(B * blocks, 8, [&](int64_t begin, int64_t end) {
    Floats g[BLOCK / LANES], x[BLOCK / LANES];
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t b = unit / blocks, c = unit % blocks * BLOCK, n = length(W, c);
      const float time = read_one(t, t.at(b));
      read(dout, dout.at(b) + c, n, g);
      for (int64_t i = 0; i < vectors(n); i++) {
        x[i] = (1.0f - time) * g[i];
        g[i] *= time;
      }
      write(dx0, b * W + c, n, x);
      write(dnoise, b * W + c, n, g);
    }
  });
}

void flow_matching_loss_forward(View v, View x0, View noise, View weight, View loss, View error) {
  const int64_t B = v.size[0], W = v.size[1];
  parallel(B, 1, [&](int64_t begin, int64_t end) {
    Floats e[BLOCK / LANES], x[BLOCK / LANES], z[BLOCK / LANES];
    for (int64_t b = begin; b < end; b++) {
      Floats total = {};
      for (int64_t c = 0; c < W; c += BLOCK) {
        const int64_t n = length(W, c);
        read(v, v.at(b) + c, n, e);
        read(x0, x0.at(b) + c, n, x);
        read(noise, noise.at(b) + c, n, z);
        for (int64_t i = 0; i < vectors(n); i++) {
          e[i] -= z[i] - x[i];
          total += e[i] * e[i];
        }
        if (error.size[0]) write(error, b * W + c, n, e);
      }
      const float mean = sum(total) / W;
      ((float*)loss.data)[b] = weight.given() ? mean * read_one(weight, weight.at(b)) : mean;
    }
  });
}

void flow_matching_loss_backward(View dloss, View error, View weight, View dv) {
  const int64_t B = error.size[0], W = error.size[1], blocks = (W + BLOCK - 1) / BLOCK;
  parallel(B * blocks, 8, [&](int64_t begin, int64_t end) {
    Floats e[BLOCK / LANES];
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t b = unit / blocks, c = unit % blocks * BLOCK, n = length(W, c);
      float factor = read_one(dloss, dloss.at(b)) * (2.0f / W);
      if (weight.given()) factor *= read_one(weight, weight.at(b));
      read(error, b * W + c, n, e);
      for (int64_t i = 0; i < vectors(n); i++) e[i] *= factor;
      write(dv, b * W + c, n, e);
    }
  });
}

}  // namespace fastdit::FASTDIT_ISA
