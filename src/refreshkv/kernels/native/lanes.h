// A register full of numbers at a time, in the vector notation that GCC and Clang share.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2e = 1.44269504f;

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef uint16_t Row __attribute__((vector_size(4 * kLanes)));  // twice as many numbers of 16 bits as lanes

template <typename Vector, typename Element>
inline Vector load(const Element* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <typename Vector, typename Element>
inline void store(Element* to, Vector v) {
  std::memcpy(to, &v, sizeof v);
}

// The lanes of two vectors that `Order::at(0)`, `Order::at(1)`, ... name; those of the second go on after the first's.
template <typename Order, typename Vector, int... lane>
inline Vector rearranged(Vector a, Vector b, std::integer_sequence<int, lane...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, Order::at(lane)...);
#else
  using Index = std::conditional_t<sizeof a[0] == 2, Row, Words>;
  return __builtin_shuffle(a, b, Index{Order::at(lane)...});
#endif
}
template <typename Order, typename Vector>
inline Vector rearranged(Vector a, Vector b) {
  return rearranged<Order>(a, b, std::make_integer_sequence<int, sizeof(Vector) / sizeof a[0]>());
}

inline Floats all(float x) { return Floats{} + x; }
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// Over the lanes, half of them at a time.
template <int distance>
struct Across {
  static constexpr int at(int lane) { return lane ^ distance; }
};
template <int distance = kLanes / 2, typename Combine>
inline float folded(Floats v, Combine combine) {
  v = combine(v, rearranged<Across<distance>>(v, v));
  if constexpr (distance > 1) return folded<distance / 2>(v, combine);
  return v[0];
}
inline float largest(Floats v) { return folded(v, larger); }
inline float sum(Floats v) {
  return folded(v, [](Floats a, Floats b) { return a + b; });
}

// Register by register between float32 and what is kept: to the nearest, ties to even; a NaN stays one.
inline Floats widened(const float* from) { return load<Floats>(from); }
inline Floats widened(const bfloat16* from) {
  const Halves v = load<Halves>(from);
#ifdef __AVX512F__
  return (Floats)((Words)_mm512_cvtepu16_epi32((__m256i)v) << 16);
#else
  return (Floats)(__builtin_convertvector(v, Words) << 16);
#endif
}
inline Floats widened(const float16* from) {
  const Halves v = load<Halves>(from);
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps((__m256i)v);
#elif defined(__F16C__)
  return (Floats)_mm256_cvtph_ps((__m128i)v);
#else
  const Words bits = __builtin_convertvector(v, Words), size = (bits & 0x7fff) << 13;
  // An exponent that is 112 too small, by a number that subnormal ones need: as integers, which are exact.
  const Words exponent = bits & 0x7c00;
  const Floats subnormal = __builtin_convertvector((Ints)(bits & 0x3ff), Floats) * 0x1p-24f;
  const Words normal = exponent == 0x7c00 ? size | 0x7f800000 : size + (112u << 23);
  return (Floats)((exponent == 0 ? (Words)subnormal : normal) | (bits & 0x8000) << 16);
#endif
}
inline void narrow(float* to, Floats v) { store(to, v); }
inline void narrow(bfloat16* to, Floats v) {
#ifdef __AVX512BF16__
  store(to, (Halves)_mm512_cvtneps_pbh((__m512)v));
#else
  const Words bits = (Words)v, rounded = bits + 0x7fff + ((bits >> 16) & 1);
  store(to, __builtin_convertvector((v == v ? rounded : bits | 0x400000) >> 16, Halves));
#endif
}
inline void narrow(float16* to, Floats v) {
#if defined(__AVX512F__)
  store(to, (Halves)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  store(to, (Halves)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  const Words bits = (Words)v, size = bits & 0x7fffffff;
  const Words normal = (size + 0xfff + ((size >> 13) & 1) - (112u << 23)) >> 13;
  // Below 2^-14 the last bit is worth 2^-24: that of a float beside 0.5.
  const Words subnormal = (Words)((Floats)size + 0.5f) - 0x3f000000;
  const Words number = size >= 0x477ff000 ? Words{} + 0x7c00 : size < 0x38800000 ? subnormal : normal;
  store(to, __builtin_convertvector((v == v ? number : Words{} + 0x7e00) | ((bits >> 16) & 0x8000), Halves));
#endif
}

// 2^x for x <= 0, -inf included. A number becomes 0 below -126, if not later. A NaN stays one.
inline Floats power_of_two(Floats x) {
#ifdef __AVX512DQ__
  const Floats f = (Floats)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);  // x - floor(x); 0 for -inf
#else
  const Ints vanishes = x <= -126.0f;
  x = larger(all(-126.0f), x);  // in this order: the second, where either is NaN
  // 1.5 * 2^23 leaves the nearest integer in the low bits; half less is the floor.
  const Floats shifted = (x - 0.5f) + 12582912.0f;
  const Floats f = x - (shifted - 12582912.0f);
#endif
  Floats p = all(1.87623e-3f);  // fitted on 0 .. 1, relative error 8e-8
  p = p * f + 8.99258e-3f;
  p = p * f + 5.58236e-2f;
  p = p * f + 2.4015453e-1f;
  p = p * f + 6.9315297e-1f;
  p = p * f + 9.9999993e-1f;
#ifdef __AVX512DQ__
  return (Floats)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
  const Floats power = (Floats)(((Ints)p + ((Ints)shifted << 23)) & ~vanishes);
  return x == x ? power : x;
#endif
}

}  // namespace
