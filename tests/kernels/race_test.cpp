// Drives every C++ kernel on std::thread, for ThreadSanitizer: torch's own OpenMP pool reports races that are none. Odd shapes,
// more units than threads; the results of 1, 2 and 4 threads must be equal to the last bit. Built and run by launch/sanitize.sh
// with FASTDIT_ISA set to the namespace under test.
#include <cstdio>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#include <sys/syscall.h>
#include <unistd.h>

#include "../../csrc/ops.h"

namespace fastdit {

int threads = 1;

void parallel_for(int64_t units, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
  std::vector<std::thread> pool;
  for (int i = 0; i < threads; i++) pool.emplace_back([=] { body(units * i / threads, units * (i + 1) / threads, context); });
  for (std::thread& thread : pool) thread.join();
}

}  // namespace fastdit

using namespace fastdit;

namespace {

constexpr int64_t B = 3, T = 77, N = 3, D = 38, H = N * D, F = 83, W = 1027;

// A contiguous tensor that owns its memory, at its exact size, filled with numbers from -1 to 1.
struct Memory {
  std::vector<char> bytes;
  View view;

  Memory(Type type, std::vector<int64_t> sizes, int64_t item = 0) {
    view.type = type;
    int64_t count = 1;
    for (int i = (int)sizes.size() - 1; i >= 0; i--) view.size[i] = sizes[i], view.stride[i] = count, count *= sizes[i];
    item = item ? item : type == Type::fp32 ? 4 : 2;
    bytes.resize(count * item);
    view.data = bytes.data();
    for (int64_t i = 0; i < count; i++) {
      const float value = ((i * 7919) % 2000) / 1000.0f - 1;
      uint32_t bits;
      memcpy(&bits, &value, 4);
      if (item == 4) memcpy(&bytes[4 * i], &bits, 4);
      if (item == 8) memcpy(&bytes[8 * i], &i, 8);
      const uint16_t upper = bits >> 16;
      if (item == 2) memcpy(&bytes[2 * i], &upper, 2);
    }
  }
  operator View() const { return view; }
};

// What all kernels wrote, one after the other.
std::vector<char> run(Type E) {
  namespace ops = fastdit::FASTDIT_ISA;
  const Type S = Type::fp32;
  Memory x(E, {B, T, H}), branch(E, {B, T, H}), dy(E, {B, T, H}), gate(E, {B, H}), shift(E, {B, H}), scale(S, {B, H});
  Memory y(E, {B, T, H}), r(E, {B, T, H}), stats(S, {2, B, T}), dx(E, {B, T, H}), dbranch(E, {B, T, H});
  Memory bias(S, {H}), dbias(S, {H}), up_bias(E, {2 * F}), dup_bias(E, {2 * F}), again(E, {B * T, F});
  Memory sums1(E, {B, 1, H}), sums2(S, {B, 2, H}), sums3(S, {B, 3, H});
  Memory qkv(E, {B, T, 3 * H}), weight(E, {D}), cos(S, {T, D / 2}), sin(S, {T, D / 2}), q(E, {B, T, N, D}), k(E, {B, T, N, D});
  Memory dq(E, {B, N, T, D}), dqkv(E, {B, T, 3 * H}), dweights(E, {2, D});
  Memory packed(E, {B * T, 2 * F}), out(E, {B * T, F}), dout(E, {B * T, F}), dpacked(E, {B * T, 2 * F});
  Memory x0(E, {B, W}), noise(S, {B, W}), t(S, {B}), xt(E, {B, W}), dnoise(S, {B, W}), loss(S, {B}), error(E, {B, W}),
      dv(E, {B, W});
  Memory ids(S, {B}, 8), uniform(S, {B, W}), normal(S, {B, W});
  std::vector<char> all;
  const auto keep = [&](std::initializer_list<Memory*> written) {
    for (Memory* memory : written) all.insert(all.end(), memory->bytes.begin(), memory->bytes.end());
  };
  ops::modulate_forward(x, shift, scale, 1e-5, y, stats);
  ops::modulate_backward(dy, x, stats, scale, dx, sums2);
  keep({&y, &stats, &dx, &sums2});
  ops::gated_residual_forward(x, branch, gate, r);
  ops::gated_residual_backward(dy, branch, gate, dbranch, sums1);
  keep({&r, &dbranch, &sums1});
  ops::gated_residual_modulate_forward(x, branch, gate, shift, scale, bias, 1e-5, r, y, stats);
  ops::gated_residual_modulate_backward(dy, dy, r, branch, stats, gate, scale, bias, dx, dbranch, sums3, dbias);
  keep({&r, &y, &stats, &dx, &dbranch, &sums3, &dbias});
  ops::gated_residual_modulate_forward(x, branch, gate, shift, scale, View{}, 1e-5, r, y, stats);
  ops::gated_residual_modulate_backward(View{}, dy, r, branch, stats, gate, scale, View{}, dx, dbranch, sums3, View{});
  keep({&r, &y, &dx, &dbranch, &sums3});
  ops::qk_norm_rope_forward(qkv, weight, weight, cos, sin, 1e-6, q, k);
  ops::qk_norm_rope_backward(dq, dq, dq, qkv, weight, weight, cos, sin, 1e-6, dqkv, dweights);
  keep({&q, &k, &dqkv, &dweights});
  ops::swiglu_forward(packed, up_bias, out);
  ops::swiglu_backward(dout, packed, up_bias, dpacked, dup_bias, again);
  keep({&out, &dpacked, &dup_bias, &again});
  ops::swiglu_forward(packed, View{}, out);
  ops::swiglu_backward(dout, packed, View{}, dpacked, View{}, View{});
  keep({&out, &dpacked});
  ops::flow_interpolate_forward(x0, noise, t, xt);
  ops::flow_interpolate_backward(xt, t, dv, dnoise);
  keep({&xt, &dv, &dnoise});
  ops::flow_matching_loss_forward(xt, x0, noise, t, loss, error);
  ops::flow_matching_loss_backward(t, error, View{}, dv);
  keep({&loss, &error, &dv});
  {
    const int64_t P = 3, sizes[P] = {1, 5000, 20000}, averages = 1;
    std::vector<Memory> fields[6];  // master, moments, copy, average, gradient
    Memory table(S, {5 + averages, P}, 8), changing(S, {7 + averages + P}, 8), scale(S, {1}), found(S, {1});
    int64_t *addresses = (int64_t*)table.view.data, *numbers = (int64_t*)changing.view.data, n = 0;
    const float values[] = {0.99f, 1e-3f, 0.5f, 1e-8f, 0.1f, 0.95f, 0.05f, 0.3f};
    for (int i = 0; i < 8; i++) numbers[i] = 0, memcpy(&numbers[i], &values[i], 4);
    for (int64_t p = 0; p < P; p++) {
      for (int f = 0; f < 6; f++) fields[f].emplace_back(f == 3 || f == 5 ? E : S, std::vector<int64_t>{sizes[p]});
      const int rows[] = {0, 1, 2, 4, 5};
      for (int f = 0; f < 5; f++) addresses[rows[f] * P + p] = (int64_t)fields[f].back().view.data;
      addresses[3 * P + p] = sizes[p], numbers[8 + p] = (int64_t)fields[5].back().view.data, n += (sizes[p] + 1023) / 1024;
      float* square = (float*)fields[2].back().view.data;
      for (int64_t i = 0; i < sizes[p]; i++) square[i] = square[i] * square[i];
    }
    Memory blocks(S, {n, 2});
    int32_t* block = (int32_t*)blocks.view.data;
    for (int64_t p = 0; p < P; p++)
      for (int64_t i = 0; i * 1024 < sizes[p]; i++) *block++ = p, *block++ = i;
    *(float*)scale.view.data = 2, *(float*)found.view.data = 0;
    ops::adamw_step(blocks, table, changing, fields[5][0], fields[3][0], scale, found, averages);
    for (int f = 0; f < 5; f++)
      for (Memory& memory : fields[f]) keep({&memory});
  }
  if (E == Type::bf16) {
    const int64_t T = 160, N = 3, D = 32, H = N * D, F = 64;
    Memory x(E, {B, T, H}), y(E, {B, T, H}), vector(E, {B, H}), cos(S, {T, D / 2}), sin(S, {T, D / 2}), weight(E, {D});
    Memory qkv(E, {3 * H, H}), out(E, {H, H}), up(E, {2 * F, H}), up_bias(S, {2 * F}), down(E, {H, F}), down_bias(S, {H});
    Memory scratch(E, {B, T, std::max(H, F)}), r(E, {B, T, H}), y_out(E, {B, T, H});
    ops::dit_block_forward(x, y, vector, vector, vector, vector, vector, vector, qkv, weight, weight, cos, sin, out, up, up_bias,
                           down, down_bias, N, 1e-5, 1e-6, scratch, r, y_out);
    keep({&r, &y_out});
  }
  ops::counter_random_forward(ids, 1, 2, 3, false, uniform);
  ops::counter_random_forward(ids, 1, 2, 3, true, normal);
  keep({&uniform, &normal});
  return all;
}

}  // namespace

int main() {
#if defined(__AMX_BF16__)
  syscall(SYS_arch_prctl, 0x1023, 18);  // as ops.cpp asks for the tile registers
#endif
  for (const Type type : {Type::fp32, Type::bf16, Type::fp16}) {
    threads = 1;
    const std::vector<char> expected = run(type);
    for (const int count : {2, 4}) {
      threads = count;
      if (run(type) != expected) return fprintf(stderr, "type %d: %d threads give other bits than 1\n", (int)type, count), 1;
    }
  }
  printf("1, 2 and 4 threads: %s\n", "the same bits");
}
