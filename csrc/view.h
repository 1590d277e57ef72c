// The arguments of kernels: plain memory, no torch.
#pragma once

#include <cstdint>

namespace fastdit {

enum class Type { fp32, bf16, fp16 };

// A tensor: sizes and strides in elements. `data` is null if an optional tensor is not given.
struct View {
  void* data = nullptr;
  Type type = Type::fp32;
  int64_t size[4] = {}, stride[4] = {};

  bool given() const { return data != nullptr; }
  int64_t at(int64_t i, int64_t j = 0, int64_t k = 0) const { return i * stride[0] + j * stride[1] + k * stride[2]; }
};

// Defined by the host: calls body(begin, end, context) on disjoint ranges that cover 0 .. units, on the threads of torch's own pool
// (std::thread in the race test). grain: least number of units per thread.
void parallel_for(int64_t units, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);

}  // namespace fastdit
