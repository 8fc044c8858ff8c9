// Keys, values and queries, wherever they lie, as the operands of the products.

#pragma once

#include "product.h"

namespace {

// What a product multiplies: bfloat16 as it is kept, everything else in float32.
template <typename T>
using Operand = std::conditional_t<std::is_same_v<T, bfloat16>, bfloat16, float>;

// Rows that the products of m queries want to have: beyond 16, whole tiles. Numbers: whole tiles.
int64_t rows_for(int64_t m) { return m <= 16 ? m : (m + 15) / 16 * 16; }
int64_t padded(int64_t n) { return (n + 31) / 32 * 32; }

// A register of words from the numbers at `from` on, zeros behind the `left` that there are.
template <typename T>
constexpr int64_t kWords = kEach<Operand<T>> * kLanes;  // numbers in it
template <typename T>
inline Words words(const T* from) {
  if constexpr (std::is_same_v<T, float16>) return (Words)widened(from);
  else return load<Words>(from);
}
template <typename T>
inline Words words(const T* from, int64_t left) {
  if (left >= kWords<T>) return words(from);
  T some[kWords<T>] = {};
  if (left > 0) std::copy_n(from, left, some);
  return words(some);
}

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

// Keys of `dim` numbers -> the tiles of `[dim, kBlock]`; `n` of them, a multiple of 32.
template <typename T>
void pack_keys(const char* const* keys, int64_t n, int64_t dim, Word* packed, Ahead& ahead) {
  using A = Operand<T>;
  for (int64_t first = 0; first < n; first += kLanes)
    for (int64_t d = 0; d < padded(dim); d += kWords<T>) {
      Words rows[kLanes];
      const auto key = [&](int64_t r) { return reinterpret_cast<const T*>(keys[first + r]) + d; };
      if (d + kWords<T> <= dim)
        for (int64_t r = 0; r < kLanes; ++r) rows[r] = words(key(r));
      else
        for (int64_t r = 0; r < kLanes; ++r) rows[r] = words(key(r), dim - d);
      ahead.fetch(12);  // of 16 that were read
      transpose(rows);
      Word* tile = packed + (d / 32 * (kBlock / kColumns) + first / kColumns) * kTile<A>;
      Word* corner = tile + d % 32 / kEach<A> * kColumns + first % kColumns;
      for (int64_t r = 0; r < kLanes; ++r) store(corner + r * kColumns, rows[r]);
    }
}

// Interleaving two rows within 128 bits: four numbers of each, the first or the second four.
template <bool second>
struct Interleave {
  static constexpr int at(int lane) { return lane / 8 * 8 + second * 4 + lane % 8 / 2 + lane % 2 * 2 * kLanes; }
};

// Values of `dim` numbers -> the tiles of `[n, dim]`, n a multiple of 32. What is not seen is zeros, as a weight of 0
// would make a NaN of a NaN. The columns of a register of bfloat16 and the next are in the order that interleaving
// leaves; `put_in_order` undoes it in the result.
template <typename T>
void pack_values(const char* const* values, int64_t n, int64_t dim, Word* packed, Ahead& ahead) {
  using A = Operand<T>;
  const auto value = [&](int64_t i) { return reinterpret_cast<const T*>(values[i]); };
  for (int64_t i = 0; i < n; i += kEach<A>) {
    Word* to = packed + i / 32 * (padded(dim) / kColumns) * kTile<A> + i % 32 / kEach<A> * kColumns;
    const auto column = [&](int64_t d) { return to + d / kColumns * kTile<A> + d % kColumns; };
    for (int64_t d = 0; d < padded(dim); d += 2 * kLanes) {
      ahead.fetch(2);
      if constexpr (std::is_same_v<T, bfloat16>) {
        const Row a = (Row)words(value(i) + d, dim - d), b = (Row)words(value(i + 1) + d, dim - d);
        store(column(d), rearranged<Interleave<false>>(a, b));
        store(column(d + kLanes), rearranged<Interleave<true>>(a, b));
      } else {
        store(column(d), words(value(i) + d, dim - d));
        store(column(d + kLanes), words(value(i) + d + kLanes, dim - d - kLanes));
      }
    }
  }
}

// A query of `dim` numbers as the other operand, zeros behind it.
template <typename T>
void pack_query(const T* query, int64_t dim, Operand<T>* to) {
  for (int64_t d = 0; d < padded(dim); d += kWords<T>) store(to + d, words(query + d, dim - d));
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

// The inverse: columns in the order of packed values.
template <bool second>
struct OutOfOrder {
  static constexpr int at(int lane) { return lane / 4 * 8 + second * 4 + lane % 4; }
};
inline void put_out_of_order(float* columns) {
  const Floats a = load<Floats>(columns), b = load<Floats>(columns + kLanes);
  store(columns, rearranged<OutOfOrder<false>>(a, b));
  store(columns + kLanes, rearranged<OutOfOrder<true>>(a, b));
}

// `dim` numbers out of the columns of a product with packed values, times `share`.
template <typename T>
void unpack(const float* mixed, float share, int64_t dim, T* to) {
  for (int64_t d = 0; d < dim; d += 2 * kLanes) {
    Floats low = load<Floats>(mixed + d), high = load<Floats>(mixed + d + kLanes);
    if constexpr (std::is_same_v<T, bfloat16>) put_in_order(low, high);
    T some[2 * kLanes];
    narrow(some, low * share);
    narrow(some + kLanes, high * share);
    std::copy_n(some, std::min<int64_t>(2 * kLanes, dim - d), to + d);
  }
}

}  // namespace
