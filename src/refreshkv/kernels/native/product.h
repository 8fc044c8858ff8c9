// The two products of attention, queries with keys and weights with values, for bfloat16 summed in float32.
//
// Both read a packed operand: neighbours along the summed dimension lie side by side in 32 bits. That is what AMX tiles
// and AVX512-BF16 want, and what plain vectors take apart with a shift.

#pragma once

#include "lanes.h"

#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

using Pair = uint32_t;  // two bfloat16, the first in the low half

constexpr int64_t kBlock = 128;         // tokens that are packed at a time
constexpr int64_t kTile = 16 * kLanes;  // pairs in a tile of a packed operand: 16 rows of 16

// c [m, n] (+)= a [m, k] * b. Rows of a and c are lda and ldc apart. b is packed in tiles of 32 rows and 16 columns, the
// tiles of a row of tiles `ldb` in number; k is a multiple of 32 and n one of 16.
struct Product {
  const bfloat16* a;
  int64_t lda;
  const Pair* b;
  int64_t ldb;
  float* c;
  int64_t ldc, m, n, k;
  bool add;

  const Pair* tile(int64_t row, int64_t column) const {
    return b + (row / 32 * ldb + column / kLanes) * kTile;
  }
};

inline Floats multiply_add(Floats c, Pair a, Words b) {
#ifdef __AVX512BF16__
  return (Floats)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
#else
  float low, high;
  const Pair low_bits = a << 16, high_bits = a & 0xffff0000u;
  std::memcpy(&low, &low_bits, sizeof low);
  std::memcpy(&high, &high_bits, sizeof high);
  c += (Floats)(b << 16) * low;
  return c + (Floats)(b & 0xffff0000u) * high;
#endif
}

template <int rows, int columns>
inline void vector_tile(const Product& x, int64_t i, int64_t j) {
  Floats c[rows][columns];
  for (int r = 0; r < rows; ++r)
    for (int q = 0; q < columns; ++q)
      c[r][q] = x.add ? load<Floats>(x.c + (i + r) * x.ldc + j + q * kLanes) : Floats{};
  for (int64_t p = 0; p < x.k; p += 32) {
    const Pair* tile = x.tile(p, j);
    for (int64_t pair = 0; pair < 16; ++pair) {
      Words b[columns];
      for (int q = 0; q < columns; ++q) b[q] = load<Words>(tile + q * kTile + pair * kLanes);
      for (int r = 0; r < rows; ++r) {
        Pair a;
        std::memcpy(&a, x.a + (i + r) * x.lda + p + 2 * pair, sizeof a);
        for (int q = 0; q < columns; ++q) c[r][q] = multiply_add(c[r][q], a, b[q]);
      }
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int q = 0; q < columns; ++q) store(x.c + (i + r) * x.ldc + j + q * kLanes, c[r][q]);
}

template <int rows>
inline void vector_rows(const Product& x, int64_t i) {
  int64_t j = 0;
  for (; j + 2 * kLanes <= x.n; j += 2 * kLanes) vector_tile<rows, 2>(x, i, j);
  for (; j < x.n; j += kLanes) vector_tile<rows, 1>(x, i, j);
}

void vector_product(const Product& x) {
  int64_t i = 0;
  for (; i + 4 <= x.m; i += 4) vector_rows<4>(x, i);
  for (; i < x.m; ++i) vector_rows<1>(x, i);
}

#if defined(__AMX_BF16__) && defined(__linux__)
// One row of tiles of c times up to four columns: tiles 0 - 3 hold c, 4 holds a, 5 and 6 hold b.
template <int columns>
inline void amx_row(const Product& x, int64_t i, int64_t j) {
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
    const Pair* b = x.tile(p, j);
    _tile_loadd(4, x.a + i * x.lda + p, x.lda * sizeof(bfloat16));
    _tile_loadd(5, b, 64);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (columns > 1) {
      _tile_loadd(6, b + kTile, 64);
      _tile_dpbf16ps(1, 4, 6);
    }
    if constexpr (columns > 2) {
      _tile_loadd(5, b + 2 * kTile, 64);
      _tile_dpbf16ps(2, 4, 5);
    }
    if constexpr (columns > 3) {
      _tile_loadd(6, b + 3 * kTile, 64);
      _tile_dpbf16ps(3, 4, 6);
    }
  }
  _tile_stored(0, c, stride);
  if constexpr (columns > 1) _tile_stored(1, c + 16, stride);
  if constexpr (columns > 2) _tile_stored(2, c + 32, stride);
  if constexpr (columns > 3) _tile_stored(3, c + 48, stride);
}

// Two rows of tiles and two columns: a load for every product.
inline void amx_square(const Product& x, int64_t i, int64_t j) {
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
    const Pair* b = x.tile(p, j);
    const bfloat16* a = x.a + i * x.lda + p;
    _tile_loadd(4, a, x.lda * sizeof(bfloat16));
    _tile_loadd(5, b, 64);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(6, b + kTile, 64);
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

void amx_product(const Product& x) {
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

void product(const Product& x) { amx_allowed() ? amx_product(x) : vector_product(x); }
#else
struct Tiles {
  explicit Tiles(int64_t) {}
};
void product(const Product& x) { vector_product(x); }
#endif

// Rows that the products of m queries want to have: beyond 16, whole tiles.
int64_t rows_for(int64_t m) { return m <= 16 ? m : (m + 15) / 16 * 16; }

alignas(64) constexpr bfloat16 kZeros[512] = {};

// keys `[n, dim]` -> the tiles of `[dim, kBlock]`, zeros from n on to a multiple of 32.
void pack_keys(const bfloat16* keys, int64_t stride, int64_t n, int64_t dim, Pair* packed) {
  const int64_t padded = (n + 31) / 32 * 32;
  for (int64_t first = 0; first < padded; first += kLanes)
    for (int64_t d = 0; d < dim; d += 32) {
      Words rows[kLanes];
      for (int64_t r = 0; r < kLanes; ++r) {
        const bfloat16* key = (first + r < n ? keys + (first + r) * stride : kZeros) + d;
        __builtin_prefetch(key + kBlock * stride, 0, 2);
        rows[r] = load<Words>(key);
      }
      // A transposition: lanes and rows that differ in one bit change places, bit after bit.
#define REFRESHKV_SWAP(bit, low, high)                        \
  for (int r = 0; r < kLanes; ++r)                            \
    if (!(r & bit)) {                                         \
      const Words a = rows[r], b = rows[r + bit];             \
      rows[r] = REFRESHKV_LANES(Words, a, b, low);            \
      rows[r + bit] = REFRESHKV_LANES(Words, a, b, high);     \
    }
#define REFRESHKV_LIST(...) __VA_ARGS__
      REFRESHKV_SWAP(1, REFRESHKV_LIST(0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
                     REFRESHKV_LIST(1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))
      REFRESHKV_SWAP(2, REFRESHKV_LIST(0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
                     REFRESHKV_LIST(2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
      REFRESHKV_SWAP(4, REFRESHKV_LIST(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
                     REFRESHKV_LIST(4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))
      REFRESHKV_SWAP(8, REFRESHKV_LIST(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
                     REFRESHKV_LIST(8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
#undef REFRESHKV_SWAP
      Pair* tile = packed + (d / 32 * (kBlock / kLanes) + first / kLanes) * kTile;
      for (int64_t r = 0; r < kLanes; ++r) store(tile + r * kLanes, rows[r]);
    }
}

// values `[n, dim]` -> the tiles of `[n, dim]`, zeros from n on to a multiple of 32. The columns of every two tiles are in
// the order that interleaving within 128 bits leaves; `put_in_order` undoes it in the result.
void pack_values(const bfloat16* values, int64_t stride, int64_t n, int64_t dim, Pair* packed) {
  for (int64_t first = 0; first < n; first += 32)
    for (int64_t pair = 0; pair < 16; ++pair) {
      const int64_t r = first + 2 * pair;
      const bfloat16* low = r < n ? values + r * stride : kZeros;
      const bfloat16* high = r + 1 < n ? values + (r + 1) * stride : kZeros;
      Pair* to = packed + first / 32 * (dim / kLanes) * kTile + pair * kLanes;
      for (int64_t d = 0; d < dim; d += 32, to += 2 * kTile) {
        __builtin_prefetch(low + kBlock * stride + d, 0, 2);
        __builtin_prefetch(high + kBlock * stride + d, 0, 2);
        const Row a = load<Row>(low + d), b = load<Row>(high + d);
        store(to, REFRESHKV_LANES(Row, a, b, 0, 32, 1, 33, 2, 34, 3, 35, 8, 40, 9, 41, 10, 42, 11, 43, 16, 48, 17, 49,
                                  18, 50, 19, 51, 24, 56, 25, 57, 26, 58, 27, 59));
        store(to + kTile, REFRESHKV_LANES(Row, a, b, 4, 36, 5, 37, 6, 38, 7, 39, 12, 44, 13, 45, 14, 46, 15, 47, 20, 52,
                                          21, 53, 22, 54, 23, 55, 28, 60, 29, 61, 30, 62, 31, 63));
      }
    }
}

inline void put_in_order(Floats& a, Floats& b) {
  const Floats first = REFRESHKV_LANES(Ints, a, b, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  b = REFRESHKV_LANES(Ints, a, b, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  a = first;
}

const char* product_kind() {
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
