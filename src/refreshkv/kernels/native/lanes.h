// Sixteen numbers at a time, in the vector notation that GCC and Clang share: wide registers where there are any.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

using bfloat16 = uint16_t;

constexpr int64_t kLanes = 16;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2e = 1.44269504f;

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint16_t Row __attribute__((vector_size(64)));  // 32 bfloat16

// Lanes of two vectors, by their numbers; those of the second go on where the first ends.
#ifdef __clang__
#define REFRESHKV_LANES(Index, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define REFRESHKV_LANES(Index, a, b, ...) __builtin_shuffle(a, b, Index{__VA_ARGS__})
#endif

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
inline Floats all(float x) { return Floats{} + x; }
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// Over the lanes, half of them at a time.
template <typename Combine>
inline float folded(Floats v, Combine combine) {
  v = combine(v, REFRESHKV_LANES(Ints, v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  v = combine(v, REFRESHKV_LANES(Ints, v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  v = combine(v, REFRESHKV_LANES(Ints, v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  v = combine(v, REFRESHKV_LANES(Ints, v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
  return v[0];
}
inline float largest(Floats v) { return folded(v, larger); }
inline float sum(Floats v) {
  return folded(v, [](Floats a, Floats b) { return a + b; });
}

inline Floats widened(Halves v) {
  return (Floats)(__builtin_convertvector(v, Words) << 16);
}
// To the nearest, ties to even; no NaN reaches this but from NaN inputs.
inline Halves narrowed(Floats v) {
#ifdef __AVX512BF16__
  return (Halves)_mm512_cvtneps_pbh((__m512)v);
#else
  Words bits = (Words)v;
  bits += 0x7fff + ((bits >> 16) & 1);
  return __builtin_convertvector(bits >> 16, Halves);
#endif
}

// 2^x for x <= 0; 0 from -126 on, where bfloat16 has nothing left to tell.
inline Floats power_of_two(Floats x) {
#ifdef __AVX512F__
  x = larger(x, all(-200.0f));
  const Floats whole = (Floats)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Ints counts = x > -126.0f;
  x = larger(x, all(-126.0f));
  const Floats shifted = x + 12582912.0f;  // 1.5 * 2^23: the nearest integer is in the low bits
  const Floats whole = shifted - 12582912.0f;
#endif
  const Floats f = x - whole;
  Floats p = all(1.339887440e-3f);
  p = p * f + 9.618437357e-3f;
  p = p * f + 5.550332548e-2f;
  p = p * f + 2.402264791e-1f;
  p = p * f + 6.931472028e-1f;
  p = p * f + 1.0f;
#ifdef __AVX512F__
  return (Floats)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
  return (Floats)(((Ints)p + ((Ints)shifted << 23)) & counts);
#endif
}

}  // namespace
