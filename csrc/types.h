// The number formats, free of CUDA's headers: the host's compiler reads this, too.
#pragma once

#include <cstdint>

namespace fusedloss {

enum class DType : int { float32 = 0, float16 = 1, bfloat16 = 2 };

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

// What one instruction moves.
struct alignas(16) Vector16 {
  uint32_t word[4];
};

}  // namespace fusedloss
