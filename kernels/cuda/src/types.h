// Codes become pairs of half or bfloat less their zero point, exactly: integers from -255 to 255. Scales come later, on
// sums.
//
// A small integer written into the mantissa of a large power of two is a float; subtracting the same power with the
// zero point in its mantissa leaves their difference. Zero points are counted like codes, from the lowest.
#pragma once

namespace quantspec {

constexpr uint32_t BOTH = 0x00010001;  // times 16 bits: a pair of them

struct Half {
  struct Zero {
    uint32_t low, high;  // 1024 + z, and -(64 + z), for nibbles in bits 4 to 7
  };
  __device__ static Zero zero(uint32_t z) { return {0x64006400 + z * BOTH, 0xD400D400 + z * 16 * BOTH}; }

  __device__ static uint16_t from_float(float value) { return half_of_float(value); }
  __device__ static void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                             uint32_t b1) {
    mma_half(c, a0, a1, a2, a3, b0, b1);
  }

  __device__ static void expand4(uint32_t word, const Zero& zero, uint32_t (&pairs)[4]) {
    constexpr uint32_t K1024 = 0x64006400, SIXTEENTH = 0x2C002C00;
#pragma unroll
    for (int i = 0; i < 4; i += 2, word >>= 8) {
      pairs[i] = half2_sub(and_or(word, 0x000F000F, K1024), zero.low);
      pairs[i + 1] = half2_fma(and_or(word, 0x00F000F0, K1024), SIXTEENTH, zero.high);  // (1024 + 16 q) / 16 - ...
    }
  }

  __device__ static void expand8(uint32_t low, uint32_t high, const Zero& zero, uint32_t (&pairs)[4]) {
    constexpr uint32_t BYTE = 0x64646464;
    pairs[0] = half2_sub(permute(low, BYTE, 0x4140), zero.low);
    pairs[1] = half2_sub(permute(low, BYTE, 0x4342), zero.low);
    pairs[2] = half2_sub(permute(high, BYTE, 0x4140), zero.low);
    pairs[3] = half2_sub(permute(high, BYTE, 0x4342), zero.low);
  }
};

struct BFloat {
  struct Zero {
    uint32_t pair;  // -(128 + z)
    float number;   // 2^23 + z
  };
  __device__ static Zero zero(uint32_t z) { return {0xC300C300 + z * BOTH, as_float(0x4B000000 + z)}; }

  __device__ static uint16_t from_float(float value) { return bfloat_of_float(value); }
  __device__ static void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                             uint32_t b1) {
    mma_bfloat(c, a0, a1, a2, a3, b0, b1);
  }

  __device__ static void expand4(uint32_t word, const Zero& zero, uint32_t (&pairs)[4]) {
    constexpr uint32_t K128 = 0x43004300, ONE = 0x3F803F80;
#pragma unroll
    for (int i = 0; i < 4; i++, word >>= 4) {  // seven bits of mantissa: every pair needs its own shift
      pairs[i] = bfloat2_fma(and_or(word, 0x000F000F, K128), ONE, zero.pair);
    }
  }

  __device__ static void expand8(uint32_t low, uint32_t high, const Zero& zero, uint32_t (&pairs)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {  // eight bits do not fit the mantissa: by way of fp32, 2^23 + code
      const uint32_t word = i < 2 ? low : high, selector = 0x7440 + i % 2 * 2;
      pairs[i] = bfloat2_of(number(word, selector) - zero.number, number(word, selector + 1) - zero.number);
    }
  }

 private:
  __device__ static float number(uint32_t word, uint32_t selector) {
    return as_float(permute(word, 0x4B000000, selector));
  }
};

}  // namespace quantspec
