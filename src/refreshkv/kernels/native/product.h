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

constexpr int64_t kBlock = 256;          // tokens that are packed at a time
constexpr int64_t kColumns = 16;         // of a tile of a packed operand
constexpr int64_t kTile = 16 * kColumns;  // pairs in it: 16 rows

// The cache lines that come next, asked for a few at a time while others are worked on: in a burst they would have to
// wait for each other, and between two bursts the memory would idle.
class Ahead {
 public:
  void begin(const void* from, int64_t bytes) {
    at_ = static_cast<const char*>(from);
    end_ = at_ + bytes;
  }
  void fetch(int lines) {
    for (; lines > 0 && at_ < end_; --lines, at_ += 64) __builtin_prefetch(at_, 0, 2);
  }

 private:
  const char *at_ = nullptr, *end_ = nullptr;
};

// c [m, n] (+)= a [m, k] * b. Rows of a and c are lda and ldc apart. b is packed in tiles of 32 rows and 16 columns,
// `ldb` of them in a row of tiles; k and n are multiples of 32.
struct Product {
  const bfloat16* a;
  int64_t lda;
  const Pair* b;
  int64_t ldb;
  float* c;
  int64_t ldc, m, n, k;
  bool add;
  Ahead& ahead;

  const Pair* tile(int64_t row, int64_t column) const {
    return b + (row / 32 * ldb + column / kColumns) * kTile;
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

// `rows` rows of c and `columns` registers of a tile of b.
template <int rows, int columns>
inline void vector_tile(const Product& x, int64_t i, int64_t j) {
  Floats c[rows][columns];
  for (int r = 0; r < rows; ++r)
    for (int q = 0; q < columns; ++q)
      c[r][q] = x.add ? load<Floats>(x.c + (i + r) * x.ldc + j + q * kLanes) : Floats{};
  for (int64_t p = 0; p < x.k; p += 32) {
    const Pair* tile = x.tile(p, j) + j % kColumns;
    x.ahead.fetch(2);
    for (int64_t pair = 0; pair < 16; ++pair) {
      Words b[columns];
      for (int q = 0; q < columns; ++q) b[q] = load<Words>(tile + pair * kColumns + q * kLanes);
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

void vector_product(const Product& x) {
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
    x.ahead.fetch(8);
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
    x.ahead.fetch(4);
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

alignas(64) constexpr bfloat16 kZeros[512] = {};  // a head dim is no larger (attention.py)

// Lanes and rows of a square that differ in one bit change places.
template <int bit, bool below>
struct Swap {
  static constexpr int at(int lane) {
    const int from = ((lane & bit) != 0) == below ? lane : lane ^ bit;
    return lane & bit ? kLanes + from : from;
  }
};
template <int bit = 1>
inline void transpose(Words (&rows)[kLanes]) {
  for (int r = 0; r < kLanes; ++r)
    if (!(r & bit)) {
      const Words a = rows[r], b = rows[r + bit];
      rows[r] = rearranged<Swap<bit, false>>(a, b);
      rows[r + bit] = rearranged<Swap<bit, true>>(a, b);
    }
  if constexpr (2 * bit < kLanes) transpose<2 * bit>(rows);
}

// keys `[n, dim]` -> the tiles of `[dim, kBlock]`, zeros from n on to a multiple of 32.
void pack_keys(const bfloat16* keys, int64_t stride, int64_t n, int64_t dim, Pair* packed, Ahead& ahead) {
  const int64_t padded = (n + 31) / 32 * 32;
  for (int64_t first = 0; first < padded; first += kLanes)
    for (int64_t d = 0; d < dim; d += 2 * kLanes) {
      Words rows[kLanes];
      for (int64_t r = 0; r < kLanes; ++r) {
        const bfloat16* key = (first + r < n ? keys + (first + r) * stride : kZeros) + d;
        rows[r] = load<Words>(key);
      }
      ahead.fetch(12);  // of 16 that were read
      transpose(rows);
      Pair* tile = packed + (d / 32 * (kBlock / kColumns) + first / kColumns) * kTile;
      Pair* corner = tile + d % 32 / 2 * kColumns + first % kColumns;
      for (int64_t r = 0; r < kLanes; ++r) store(corner + r * kColumns, rows[r]);
    }
}

// Interleaving two rows within 128 bits: four numbers of each, the first or the second four.
template <bool second>
struct Interleave {
  static constexpr int at(int lane) { return lane / 8 * 8 + second * 4 + lane % 8 / 2 + lane % 2 * 2 * kLanes; }
};

// values `[n, dim]` -> the tiles of `[n, dim]`, zeros from n on to a multiple of 32, and where `visible` (or null) is 0:
// a weight of 0 would make a NaN of a NaN. The columns of a register and the next are in the order that interleaving
// leaves; `put_in_order` undoes it in the result.
void pack_values(const bfloat16* values, int64_t stride, int64_t n, int64_t dim, const uint8_t* visible, Pair* packed,
                 Ahead& ahead) {
  const auto row = [&](int64_t r) { return r < n && (!visible || visible[r]) ? values + r * stride : kZeros; };
  for (int64_t first = 0; first < n; first += 32)
    for (int64_t pair = 0; pair < 16; ++pair) {
      const bfloat16 *low = row(first + 2 * pair), *high = row(first + 2 * pair + 1);
      Pair* to = packed + first / 32 * (dim / kColumns) * kTile + pair * kColumns;
      const auto column = [&](int64_t d) { return to + d / kColumns * kTile + d % kColumns; };
      for (int64_t d = 0; d < dim; d += 2 * kLanes) {
        ahead.fetch(2);
        const Row a = load<Row>(low + d), b = load<Row>(high + d);
        store(column(d), rearranged<Interleave<false>>(a, b));
        store(column(d + kLanes), rearranged<Interleave<true>>(a, b));
      }
    }
}

template <int begin>
struct InOrder {
  static constexpr int at(int lane) {
    const int d = begin + lane;
    return d / 8 * 4 + d % 4 + (d % 8 < 4 ? 0 : kLanes);
  }
};
inline void put_in_order(Floats& a, Floats& b) {
  const Floats first = rearranged<InOrder<0>>(a, b);
  b = rearranged<InOrder<kLanes>>(a, b);
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
