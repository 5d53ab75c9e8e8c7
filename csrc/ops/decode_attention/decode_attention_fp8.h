#pragma once
/// How a warp multiplies with keys and values in e4m3: as fp16, which holds them exactly, one
/// instruction for two numbers. The scales of the KV head are factors of all logits and of the
/// output.
///
/// A cache row of D dims is D bytes, for the copies a row of D / 2 numbers of two bytes. Fragments
/// come by ldmatrix, whose lane t of four then holds the dims 4 t to 4 t + 3 of a 16-byte chunk:
/// the sum over dims may run in any order, so that the queries are laid out to match. Of values a
/// transposed ldmatrix gives pairs of dims of neighbouring keys; their even and odd dims become two
/// products.

#include "arch/arch.h"
#include "common/attention/tile_rows.h"

namespace qwen1m {

/// As rotate_pair, to fp16.
Q1M_DEVICE void rotate_pair_f16(const arch::Vec16& cs, uint32_t& low, uint32_t& high) {
  const float c0 = arch::as_float(cs.word[0]), s0 = arch::as_float(cs.word[1]);
  const float c1 = arch::as_float(cs.word[2]), s1 = arch::as_float(cs.word[3]);
  const float x0 = arch::bf16_low(low), x1 = arch::bf16_high(low);
  const float y0 = arch::bf16_low(high), y1 = arch::bf16_high(high);
  low = arch::pack_f16(x0 * c0 - y0 * s0, x1 * c1 - y1 * s1);
  high = arch::pack_f16(y0 * c0 + x0 * s0, y1 * c1 + x1 * s1);
}

/// Stores dims [8 chunk, 8 chunk + 8) of a query row where the fragments of keys want them: of 16
/// dims, word w (dims 2 w and 2 w + 1) goes to word w / 2, or to 4 + w / 2 if w is odd.
template <typename Rows>
Q1M_DEVICE void store_query_f16(Rows to, int row, int chunk, const arch::Vec16& words) {
  Q1M_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int w = chunk % 2 * 4 + i;
    const uint32_t at =
        to.at(row, chunk / 2 * 2 + w % 2).address + static_cast<uint32_t>(w / 2) * 4;
    arch::shared_store(arch::Shared<uint32_t>{at}, words.word[i]);
  }
}

/// Two e4m3 of a register, the lower and the upper ones, as the B operand.
struct F16Pairs {
  uint32_t b[2];
  Q1M_DEVICE explicit F16Pairs(uint32_t four)
      : b{arch::e4m3_to_f16(four & 0xffffu), arch::e4m3_to_f16(four >> 16)} {}
};

template <int kHeadDim, int kRowTiles, int kKeys>
struct DecodeProductsFp8 {
  static constexpr int D = kHeadDim;
  template <int kCount>
  static Q1M_DEVICE float (&quad(float (&x)[kCount], int group))[4] {
    return reinterpret_cast<float (&)[4]>(x[4 * group]);
  }

  /// s += q k^T of two 16-dim steps, `step` and the next, of which `a` are the queries.
  template <typename Keys>
  static Q1M_DEVICE void multiply_qk(float (&s)[kRowTiles][kKeys / 2],
                                     const uint32_t (&a)[2][kRowTiles][4], Keys k, int step,
                                     int lane) {
    Q1M_UNROLL
    for (int j = 0; j < kKeys / 8; j += 2) {  // two groups of 8 keys
      uint32_t r[4];
      arch::ldmatrix_x4(r, k.at(8 * j + lane % 8 + lane / 16 * 8, step + lane / 8 % 2));
      Q1M_UNROLL
      for (int i = 0; i < 4; ++i) {
        const F16Pairs pairs(r[i]);
        Q1M_UNROLL
        for (int tile = 0; tile < kRowTiles; ++tile) {
          arch::mma_m16n8k16_f16(quad(s[tile], j + i / 2), a[i % 2][tile], pairs.b);
        }
      }
    }
  }

  static Q1M_DEVICE void pack_probabilities(uint32_t (&p)[kKeys / 16][4],
                                            const float (&s)[kKeys / 2]) {
    Q1M_UNROLL
    for (int step = 0; step < kKeys / 16; ++step) {
      Q1M_UNROLL
      for (int r = 0; r < 4; ++r) {
        p[step][r] = arch::pack_f16(s[8 * step + 2 * r], s[8 * step + 2 * r + 1]);
      }
    }
  }

  /// o += p v. Of the 16 dims of chunk c, quad 2 c holds the even ones and quad 2 c + 1 the odd.
  template <typename Keys>
  static Q1M_DEVICE void multiply_pv(float (&o)[kRowTiles][D / 2],
                                     const uint32_t (&p)[kRowTiles][kKeys / 16][4], Keys v,
                                     int lane) {
    Q1M_UNROLL
    for (int step = 0; step < kKeys / 16; ++step) {
      Q1M_UNROLL
      for (int c = 0; c < D / 16; c += 2) {
        uint32_t r[4];
        arch::ldmatrix_x4_transposed(r, v.at(step * 16 + lane % 16, c + lane / 16));
        Q1M_UNROLL
        for (int i = 0; i < 4; ++i) {
          // Chunk c + i / 2; bytes 0 and 2 of a register are the even dim of two keys.
          const uint32_t four =
              arch::permute_bytes(r[i / 2 * 2], r[i / 2 * 2 + 1], i % 2 == 0 ? 0x6420u : 0x7531u);
          const F16Pairs pairs(four);
          Q1M_UNROLL
          for (int tile = 0; tile < kRowTiles; ++tile) {
            arch::mma_m16n8k16_f16(quad(o[tile], 2 * c + i), p[tile][step], pairs.b);
          }
        }
      }
    }
  }
};

}  // namespace qwen1m
