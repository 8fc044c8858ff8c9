// Where codes lie: `Codes` of kernels/codes.py; and the product of numbers with them, as they lie.

#pragma once

#include "entries.h"
#include "pack.h"

extern "C" {

// From one row (or page), KV head and block to the next, in elements.
struct CodeStrides {
  int64_t row, head, block;
};

// What mixed.py fills in, field by field.
struct Codes {
  uint16_t *keys, *key_grids, *values, *value_grids;  // [R, Hkv, N, ...] or pages; their own strides
  const int32_t* blocks;                              // [B, M] contiguous
  int64_t kept, each, pages;                          // R or pages, blocks of one, M or -1
  int64_t bits, value_bits;
  CodeStrides key, key_grid, value, value_grid;
};
}

namespace {

constexpr int64_t kCoded = 64;   // tokens of a block of codes
constexpr int64_t kPlane = 32;   // numbers of 16 bits of a plane
constexpr int64_t kMostBits = 7;  // of a code: bfloat16 has no more behind the leading one

// The codes of one block, and the grids of its dims.
struct Coded {
  uint16_t *keys, *key_grid, *values, *value_grid;
};

// The codes of one row and KV head.
class Copy {
 public:
  Copy(const Codes& codes, const Entries& entries, int64_t row, int64_t head)
      : codes_(codes), row_(codes.pages >= 0 ? -1 : entries.kept_row(row, codes.kept)), head_(head),
        blocks_(codes.pages >= 0 ? codes.blocks + row * codes.pages : nullptr) {}

  // How many blocks there can be.
  int64_t room() const { return blocks_ ? codes_.each * codes_.pages : row_ >= 0 ? codes_.each : 0; }

  // Whether there is room for a block of these.
  bool find(int64_t block, Coded& found) const {
    int64_t row = row_;
    if (blocks_) {
      row = blocks_[block / codes_.each];
      block %= codes_.each;
    }
    if (row < 0 || row >= codes_.kept) return false;
    const auto at = [&](const CodeStrides& by) { return row * by.row + head_ * by.head + block * by.block; };
    found = {codes_.keys + at(codes_.key), codes_.key_grids + at(codes_.key_grid), codes_.values + at(codes_.value),
             codes_.value_grids + at(codes_.value_grid)};
    return true;
  }

 private:
  const Codes& codes_;
  int64_t row_, head_;
  const int32_t* blocks_;
};

// Grids as they are kept, and back: `policy.rounding.low_and_step`.
constexpr int32_t kStepBits = 7, kStepShift = 21, kStepBase = 107 << 2, kMostSteps = (1 << kStepBits) - 1;
constexpr float kQuarters = 4, kFurthest = 255;
inline Floats step_of(Ints kept) { return (Floats)(((kept & kMostSteps) + kStepBase) << kStepShift); }
inline Floats low_of(Ints kept, Floats step) {
  const Ints quarters = kept >> kStepBits;
  const Floats low = step * __builtin_convertvector(quarters, Floats) / kQuarters;
  return __builtin_convertvector(quarters, Floats) < -kFurthest ? all(std::numeric_limits<float>::quiet_NaN()) : low;
}

// What a code is multiplied as: where it lies in 16 bits, behind a leading one where that is bfloat16, whose mantissa
// has room for 7 bits. Row r of a tile, two numbers, lies `place` bits up: only every 8 - bits rows are shifted.
template <typename A>
constexpr uint16_t kLeading = std::is_same_v<A, bfloat16> ? 0x4300 : 0;  // 128
constexpr int rows_a_shift(int bits) { return kMostBits + 1 - bits; }
constexpr int place(int row, int bits) { return row % rows_a_shift(bits); }

// By what a number has to be multiplied to count once, and what it is in the middle of a grid; by the index along the
// summed dimension, modulo 32. The middle is an integer, or bfloat16 could not hold it.
template <typename A>
struct Places {
  float factor[32];
  A middle[32];

  explicit Places(int64_t bits) {
    for (int i = 0; i < 32; ++i) {
      const float unit = static_cast<float>(1 << place(i / 2, static_cast<int>(bits)));
      factor[i] = 1 / unit;
      const float middle_of = (kLeading<A> ? 128 : 0) + unit * center(bits);
      if constexpr (std::is_same_v<A, float>) {
        middle[i] = middle_of;
      } else {
        uint32_t word;
        std::memcpy(&word, &middle_of, sizeof word);
        middle[i] = {static_cast<uint16_t>(word >> 16)};
      }
    }
  }
  static float center(int64_t bits) { return static_cast<float>(1 << (bits - 1)); }
};

// Two registers of numbers become an operand, and their products with another are added lane by lane. They are not
// read back: a load that is wider than the stores before it would have to wait for them.
inline Floats narrow_and_dot(Floats c, Floats low, Floats high, const float* other, float* to) {
  store(to, low);
  store(to + kLanes, high);
  return c + low * load<Floats>(other) + high * load<Floats>(other + kLanes);
}
inline Floats narrow_and_dot(Floats c, Floats low, Floats high, const bfloat16* other, bfloat16* to) {
#ifdef __AVX512BF16__
  const __m512bh both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  store(to, both);
  return (Floats)_mm512_dpbf16_ps((__m512)c, both, load<__m512bh>(other));
#else
  narrow(to, low);
  narrow(to + kLanes, high);
  return c + widened(to) * widened(other) + widened(to + kLanes) * widened(other + kLanes);
#endif
}

// The codes of a tile, put together from their planes: registers of 16 bits in which a mask leaves those of a row,
// first those of the rows of one shift. So many planes' worth of memory:
constexpr int fields(int bits) { return std::min(bits, rows_a_shift(bits)); }
constexpr int field_of(int row, int bits) { return row / rows_a_shift(bits) * fields(bits) + place(row, bits) % bits; }
constexpr int fields_of_tile(int bits) { return (15 / rows_a_shift(bits) + 1) * fields(bits); }
constexpr int64_t kMostFields = fields_of_tile(5);

template <int fixed>
__attribute__((noinline)) void put_together(const uint16_t* planes, int given, int64_t tiles, uint16_t* to) {
  const int bits = fixed ? fixed : given;
  constexpr int64_t step = 2 * kLanes;
  for (int64_t tile = 0; tile < tiles; ++tile, planes += bits * kPlane)
    for (int first = 0; first < 16; first += rows_a_shift(bits))
      for (int field = 0; field < fields(bits); ++field, to += kPlane)
        for (int64_t lane = 0; lane < kPlane; lane += step) {
          Row whole{};
          for (int bit = 0; bit < bits; ++bit) {
            const Row plane = load<Row>(planes + bit * kPlane + lane);
            uint16_t places = 0;
            for (int at = (field + bit) % bits; at < 16; at += bits) places |= static_cast<uint16_t>(1 << at);
            const Row shifted = first >= bit ? plane >> static_cast<uint16_t>(first - bit)
                                             : plane << static_cast<uint16_t>(bit - first);
            whole |= shifted & places;
          }
          store(to + lane, whole);
        }
}

// c [m, 16 * across] = or += start[m] + a [m, summed] * what codes are multiplied as. Rows of a and c are lda and ldc
// apart; `summed` is a multiple of 32, `across` counts tiles and is even; `room` for all fields.
template <typename A>
struct CodeProduct {
  const A* a;
  int64_t lda;
  const uint16_t* planes;
  uint16_t* room;
  int64_t across, summed;
  const float* start;
  float* c;
  int64_t ldc, m;
  bool add;
  Ahead& ahead;
};

// Two rows of numbers times one register of each of their codes.
inline Floats multiply_codes(Floats c, const bfloat16* a, Row codes) { return multiply_add(c, a, (Words)codes); }
inline Floats multiply_codes(Floats c, const float* a, Row codes) {
  const auto number = [](Words w) { return (Words)__builtin_convertvector((Ints)w, Floats); };
  c = multiply_add(c, a, number((Words)codes & 0xffff));
  return multiply_add(c, a + 1, number((Words)codes >> 16));
}

// `rows` rows of c and `columns` registers of them from column `j` on. `given` bits where the code is not compiled for
// so many.
template <int rows, int columns, int fixed, typename A>
inline void code_tile(const CodeProduct<A>& x, int given, int64_t i, int64_t j) {
  const int bits = fixed ? fixed : given;
  Floats c[rows][columns];
  for (int r = 0; r < rows; ++r)
    for (int q = 0; q < columns; ++q) c[r][q] = all(x.start[i + r]);
  for (int64_t p = 0; p < x.summed; p += 32) {
    const uint16_t* from[columns];
    for (int q = 0; q < columns; ++q) {
      const int64_t column = j + q * kLanes, tile = p / 32 * x.across + column / kColumns;
      from[q] = x.room + tile * fields_of_tile(bits) * kPlane + column % kColumns * 2;
    }
    x.ahead.fetch(columns * bits);
#pragma GCC unroll 16
    for (int row = 0; row < 16; ++row) {
      const auto mask = static_cast<uint16_t>(((1 << bits) - 1) << place(row, bits));
      const A* a = x.a + i * x.lda + p + 2 * row;
      Row codes[columns];
      for (int q = 0; q < columns; ++q)
        codes[q] = (load<Row>(from[q] + field_of(row, bits) * kPlane) & mask) | kLeading<A>;
      for (int r = 0; r < rows; ++r)
        for (int q = 0; q < columns; ++q) c[r][q] = multiply_codes(c[r][q], a + r * x.lda, codes[q]);
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int q = 0; q < columns; ++q) {
      float* to = x.c + (i + r) * x.ldc + j + q * kLanes;
      store(to, x.add ? load<Floats>(to) + c[r][q] : c[r][q]);
    }
}

template <int fixed, typename A>
void code_columns(const CodeProduct<A>& x, int bits) {
  constexpr int most = kLanes == 16 ? 4 : 2;
  const int64_t width = x.across * kColumns;
  put_together<fixed>(x.planes, bits, x.summed / 32 * x.across, x.room);
  int64_t i = 0;
  const auto rows_of = [&](auto rows) {
    int64_t j = 0;
    for (; j + most * kLanes <= width; j += most * kLanes) code_tile<decltype(rows)::value, most, fixed>(x, bits, i, j);
    for (; j < width; j += 2 * kLanes) code_tile<decltype(rows)::value, 2, fixed>(x, bits, i, j);
    i += decltype(rows)::value;
  };
  while (i + 4 <= x.m) rows_of(std::integral_constant<int, 4>());
  if (i + 2 <= x.m) rows_of(std::integral_constant<int, 2>());
  if (i < x.m) rows_of(std::integral_constant<int, 1>());
}

template <typename A>
void code_product(const CodeProduct<A>& x, int64_t bits) {
  if (bits == 2) code_columns<2>(x, 2);
  else if (bits == 4) code_columns<4>(x, 4);
  else code_columns<0>(x, static_cast<int>(bits));
}

}  // namespace
