// Which entries are worth reading exactly: log-weights counted in buckets, `worth_reading` of policy/rounding.py.

#pragma once

#include "lanes.h"

namespace {

constexpr int kBuckets = 256;     // the last one has no end
constexpr float kSteps = 8;       // of them a nat
constexpr int64_t kCounters = 4;  // of each bucket, so that alike weights do not wait for each other

// The counters of one or more chunks, one chunk's after the other's.
struct Buckets {
  int32_t* counts;

  static constexpr int64_t size = kCounters * kBuckets;

  void add(int32_t bucket, int64_t turn) const { ++counts[turn % kCounters * kBuckets + bucket]; }

  // The buckets that hold no more than the budget together in `chunks` chunks, from the largest weights on.
  int fitting(int64_t chunks, int64_t budget) const {
    int64_t sum = 0;
    for (int bucket = 0; bucket < kBuckets; ++bucket) {
      for (int64_t c = 0; c < chunks * kCounters; ++c) sum += counts[c * kBuckets + bucket];
      if (sum > budget) return bucket;
    }
    return kBuckets;
  }
};

// Of a register of log-weights, those in the first `within` buckets: their positions, from `first` on, and buckets.
// How many; a whole register is written. NaN and -inf are in no bucket.
inline int64_t candidates(Floats weight, int within, int64_t first, int32_t* positions, int32_t* buckets) {
  const Floats deepest = all(within == kBuckets ? -kInfinity : static_cast<float>(within) / -kSteps);
  Floats depth = weight * -kSteps;
  depth = depth > 0.0f ? depth : Floats{};
  depth = depth < kBuckets - 1.0f ? depth : all(kBuckets - 1.0f);
  const Ints bucket = __builtin_convertvector(depth, Ints), kept = weight > deepest;
#ifdef __AVX512DQ__
  const __mmask16 mask = _mm512_movepi32_mask((__m512i)kept);
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i position = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(first)), lanes);
  _mm512_storeu_si512(positions, _mm512_maskz_compress_epi32(mask, position));
  _mm512_storeu_si512(buckets, _mm512_maskz_compress_epi32(mask, (__m512i)bucket));
  return __builtin_popcount(mask);
#else
  int64_t n = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    positions[n] = static_cast<int32_t>(first + lane);
    buckets[n] = bucket[lane];
    n -= kept[lane];
  }
  return n;
#endif
}

}  // namespace
