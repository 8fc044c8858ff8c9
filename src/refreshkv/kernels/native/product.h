// The two products of attention, queries with keys and weights with values, of bfloat16 or float32, summed in float32.
//
// Both read a packed operand of words: two bfloat16 that are neighbours along the summed dimension, which is what AMX
// tiles and AVX512-BF16 want and what plain vectors take apart with a shift; or one float32.

#pragma once

#include "lanes.h"

#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

using Word = uint32_t;
template <typename A>
constexpr int kEach = sizeof(Word) / sizeof(A);  // numbers in a word

constexpr int64_t kBlock = 256;   // entries that are packed at a time
constexpr int64_t kColumns = 16;  // of a tile of a packed operand, which has 32 rows of numbers
template <typename A>
constexpr int64_t kTile = 32 / kEach<A> * kColumns;  // words in it

// What does not exist, or is not seen: a head dim is at most 512 (attention.py).
alignas(64) constexpr char kZeros[512 * sizeof(float)] = {};

// The cache lines that come next, asked for a few at a time while others are worked on: in a burst they would have to
// wait for each other, and between two bursts the memory would idle.
class Ahead {
 public:
  // Of each of `count` entries `bytes`.
  void begin(const char* const* entries, int64_t count, int64_t bytes) {
    entry_ = entries;
    last_ = entries + count;
    if (count > 0 && entries[count - 1] - entries[0] == (count - 1) * bytes) {  // as one, side by side
      last_ = entries + 1;
      bytes *= count;
    }
    bytes_ = bytes;
    at_ = end_ = nullptr;
  }
  void fetch(int lines) {
    for (; lines > 0; --lines, at_ += 64) {
      if (at_ >= end_) {
        if (entry_ == last_) return;
        end_ = *entry_ + bytes_;
        at_ = *entry_ - reinterpret_cast<uintptr_t>(*entry_) % 64;
        ++entry_;
      }
      __builtin_prefetch(at_, 0, 2);
    }
  }

 private:
  const char *const *entry_ = nullptr, *const *last_ = nullptr;
  const char *at_ = nullptr, *end_ = nullptr;
  int64_t bytes_ = 0;
};

// c [m, n] (+)= a [m, k] * b. Rows of a and c are lda and ldc apart. b is packed in tiles of 32 rows and 16 columns,
// `ldb` of them in a row of tiles; k and n are multiples of 32.
template <typename A>
struct Product {
  const A* a;
  int64_t lda;
  const Word* b;
  int64_t ldb;
  float* c;
  int64_t ldc, m, n, k;
  bool add;
  Ahead& ahead;

  const Word* tile(int64_t row, int64_t column) const { return b + (row / 32 * ldb + column / kColumns) * kTile<A>; }
};

inline Floats multiply_add(Floats c, const float* a, Words b) { return c + (Floats)b * *a; }
inline Floats multiply_add(Floats c, const bfloat16* a, Words b) {
  Word pair;
  std::memcpy(&pair, a, sizeof pair);
#ifdef __AVX512BF16__
  return (Floats)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32((int)pair), (__m512bh)b);
#else
  float low, high;
  const Word low_bits = pair << 16, high_bits = pair & 0xffff0000u;
  std::memcpy(&low, &low_bits, sizeof low);
  std::memcpy(&high, &high_bits, sizeof high);
  c += (Floats)(b << 16) * low;
  return c + (Floats)(b & 0xffff0000u) * high;
#endif
}

// `rows` rows of c and `columns` registers of a tile of b. What is there is added last: a sum of sums loses less.
template <int rows, int columns, typename A>
inline void vector_tile(const Product<A>& x, int64_t i, int64_t j) {
  Floats c[rows][columns] = {};
  for (int64_t p = 0; p < x.k; p += 32) {
    const Word* tile = x.tile(p, j) + j % kColumns;
    x.ahead.fetch(4 / kEach<A>);
    for (int64_t row = 0; row < 32 / kEach<A>; ++row) {
      Words b[columns];
      for (int q = 0; q < columns; ++q) b[q] = load<Words>(tile + row * kColumns + q * kLanes);
      for (int r = 0; r < rows; ++r)
        for (int q = 0; q < columns; ++q)
          c[r][q] = multiply_add(c[r][q], x.a + (i + r) * x.lda + p + kEach<A> * row, b[q]);
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int q = 0; q < columns; ++q) {
      float* to = x.c + (i + r) * x.ldc + j + q * kLanes;
      store(to, x.add ? load<Floats>(to) + c[r][q] : c[r][q]);
    }
}

template <typename A>
void vector_product(const Product<A>& x) {
  constexpr int columns = kLanes < kColumns ? 2 : 1;
  for (int64_t j = 0; j < x.n; j += columns * kLanes) {
    int64_t i = 0;
    for (; i + 8 <= x.m && kLanes == 16; i += 8) vector_tile<8, columns>(x, i, j);
    for (; i + 4 <= x.m; i += 4) vector_tile<4, columns>(x, i, j);
    for (; i < x.m; ++i) vector_tile<1, columns>(x, i, j);
  }
}

#if defined(__AMX_BF16__) && defined(__linux__)
// One row of tiles of c times up to four columns: tiles 0 - 3 hold c, 4 holds a, 5 and 6 hold b.
template <int columns>
inline void amx_row(const Product<bfloat16>& x, int64_t i, int64_t j) {
  float* c = x.c + i * x.ldc + j;
  const size_t stride = x.ldc * sizeof(float);
  if (x.add) {
    _tile_loadd(0, c, stride);
    if constexpr (columns > 1) _tile_loadd(1, c + 16, stride);
    if constexpr (columns > 2) _tile_loadd(2, c + 32, stride);
    if constexpr (columns > 3) _tile_loadd(3, c + 48, stride);
  } else {
    _tile_zero(0);
    if constexpr (columns > 1) _tile_zero(1);
    if constexpr (columns > 2) _tile_zero(2);
    if constexpr (columns > 3) _tile_zero(3);
  }
  for (int64_t p = 0; p < x.k; p += 32) {
    const Word* b = x.tile(p, j);
    x.ahead.fetch(8);
    _tile_loadd(4, x.a + i * x.lda + p, x.lda * sizeof(bfloat16));
    _tile_loadd(5, b, 64);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (columns > 1) {
      _tile_loadd(6, b + kTile<bfloat16>, 64);
      _tile_dpbf16ps(1, 4, 6);
    }
    if constexpr (columns > 2) {
      _tile_loadd(5, b + 2 * kTile<bfloat16>, 64);
      _tile_dpbf16ps(2, 4, 5);
    }
    if constexpr (columns > 3) {
      _tile_loadd(6, b + 3 * kTile<bfloat16>, 64);
      _tile_dpbf16ps(3, 4, 6);
    }
  }
  _tile_stored(0, c, stride);
  if constexpr (columns > 1) _tile_stored(1, c + 16, stride);
  if constexpr (columns > 2) _tile_stored(2, c + 32, stride);
  if constexpr (columns > 3) _tile_stored(3, c + 48, stride);
}

// Two rows of tiles and two columns: a load for every product.
inline void amx_square(const Product<bfloat16>& x, int64_t i, int64_t j) {
  float *c = x.c + i * x.ldc + j, *below = c + 16 * x.ldc;
  const size_t stride = x.ldc * sizeof(float);
  if (x.add) {
    _tile_loadd(0, c, stride);
    _tile_loadd(1, c + 16, stride);
    _tile_loadd(2, below, stride);
    _tile_loadd(3, below + 16, stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t p = 0; p < x.k; p += 32) {
    const Word* b = x.tile(p, j);
    const bfloat16* a = x.a + i * x.lda + p;
    x.ahead.fetch(4);
    _tile_loadd(4, a, x.lda * sizeof(bfloat16));
    _tile_loadd(5, b, 64);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(6, b + kTile<bfloat16>, 64);
    _tile_dpbf16ps(1, 4, 6);
    _tile_loadd(7, a + 16 * x.lda, x.lda * sizeof(bfloat16));
    _tile_dpbf16ps(2, 7, 5);
    _tile_dpbf16ps(3, 7, 6);
  }
  _tile_stored(0, c, stride);
  _tile_stored(1, c + 16, stride);
  _tile_stored(2, below, stride);
  _tile_stored(3, below + 16, stride);
}

// Linux gives the tile registers to a process that asks for them.
bool amx_allowed() {
  constexpr int request_permission = 0x1023, tile_data = 18;
  static const bool allowed = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  return allowed;
}

void amx_product(const Product<bfloat16>& x) {
  int64_t i = 0;
  for (; i + 32 <= x.m; i += 32)
    for (int64_t j = 0; j < x.n; j += 32) amx_square(x, i, j);
  for (; i < x.m; i += 16) {
    int64_t j = 0;
    for (; j + 64 <= x.n; j += 64) amx_row<4>(x, i, j);
    if (j < x.n) amx_row<2>(x, i, j);
  }
}

// The shapes of the tiles, for products of up to 16 rows or of a multiple of 16; until the end of the scope.
class Tiles {
 public:
  explicit Tiles(int64_t m) {
    if (!amx_allowed()) return;
    alignas(64) struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    for (int tile = 0; tile < 8; ++tile) {
      shapes.bytes[tile] = 64;
      shapes.rows[tile] = static_cast<uint8_t>(m < 16 && tile < 5 ? m : 16);  // c and a have the rows of the queries
    }
    _tile_loadconfig(&shapes);
  }
  ~Tiles() {
    if (amx_allowed()) _tile_release();
  }
};

void product(const Product<bfloat16>& x) { amx_allowed() ? amx_product(x) : vector_product(x); }
#else
struct Tiles {
  explicit Tiles(int64_t) {}
};
void product(const Product<bfloat16>& x) { vector_product(x); }
#endif
void product(const Product<float>& x) { vector_product(x); }

inline const char* product_kind() {
#if defined(__AMX_BF16__) && defined(__linux__)
  if (amx_allowed()) return "amx";
#endif
#ifdef __AVX512BF16__
  return "avx512-bf16";
#else
  return "vectors";
#endif
}

}  // namespace
