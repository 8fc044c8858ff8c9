// What surrounds attention, for one row and KV head after the other: `selection.select`, and `top_slots` of the
// reference. A plain C interface, called by selection.py.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "lanes.h"

namespace {

// The rule for scores: NaN and negative ones, -0 too, count as 0.
inline float counted(float score) { return score > 0 ? score : 0; }
// Non-negative floats order like their bits; what cannot be chosen is negative.
inline int32_t bits_of(float score) {
  int32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  return bits;
}
// Score over position: distinct, and the later token wins a tie.
inline int64_t key_of(float score, int64_t position) {
  return static_cast<int64_t>(bits_of(score)) * (int64_t{1} << 32) + position;
}

}  // namespace

extern "C" {

// What selection.py fills in, field by field; null: not given.
struct Choice {
  const float* scores;     // [B, Hkv, L] contiguous
  const int64_t* budget;   // [B]
  const uint8_t* visible;  // [B, L] contiguous, or null
  const uint8_t* heads;    // [B, Hkv] contiguous, or null
  const int64_t* recent;   // [B], or null
  const int32_t* anchors;  // [B, Hkv, A] contiguous, or null
  const int64_t* ends;     // [B], or null
  int32_t* positions;      // [B, Hkv, slots] contiguous, filled with -1
  int64_t* filled;         // [B, Hkv]
  int64_t rows, kv_heads, length, anchor_count, slots, pool_kernel, threads;
};
}

namespace {

constexpr float kAnchor = 2.0f, kRecent = 4.0f;  // as in selection.py: above every score

// Each token takes the best score of its neighbours; `own` and `pooled` have `reach` more on both sides.
void pool(const float* scores, const uint8_t* visible, int64_t length, int64_t reach, float* own, float* pooled) {
  std::fill(own, own + reach, 0.0f);
  std::fill(own + reach + length, own + length + 2 * reach + kLanes, 0.0f);
  for (int64_t i = 0; i < length; ++i) own[reach + i] = visible && !visible[i] ? 0.0f : counted(scores[i]);
  for (int64_t i = 0; i < length; i += kLanes) {
    Floats best = load<Floats>(own + i);
    for (int64_t back = 1; back <= 2 * reach; ++back) best = larger(best, load<Floats>(own + i + back));
    store(pooled + i, best);
  }
}

int64_t count_from(int32_t least, const float* scores, int64_t length) {
  Ints tally{};
  for (int64_t i = 0; i < length; i += kLanes) tally -= load<Ints>(scores + i) >= least;
  int64_t count = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) count += tally[lane];
  return count;
}

// The keys of the `count` >= 1 best, lowest first, at the end of `keys`. Lanes behind `length` are negative.
void best_keys(const float* scores, int64_t length, int64_t count, std::vector<int64_t>& keys) {
  // Bit by bit: a bound that enough scores reach, and few more.
  int32_t least = 0;
  for (int bit = 30; bit >= 0; --bit) {
    const int32_t higher = least | (1 << bit);
    const int64_t reaching = count_from(higher, scores, length);
    if (reaching >= count) least = higher;
    if (reaching >= count && reaching <= 2 * count) break;
  }
  keys.clear();
  for (int64_t i = 0; i < length; i += kLanes) {
    const Ints reaches = load<Ints>(scores + i) >= least;
    uint64_t any[sizeof reaches / 8], some = 0;
    std::memcpy(any, &reaches, sizeof any);
    for (const uint64_t two : any) some |= two;
    for (int64_t lane = 0; some && lane < kLanes; ++lane)
      if (reaches[lane]) keys.push_back(key_of(scores[i + lane], i + lane));
  }
  std::nth_element(keys.begin(), keys.end() - count, keys.end());
  std::sort(keys.end() - count, keys.end());
}

struct Shelf {
  std::vector<float> own, pooled;
  std::vector<int64_t> keys;
};

// Not inlined: it would look up where the shelf of its thread is, again and again.
__attribute__((noinline)) void choose(const Choice& job, int64_t row, int64_t head, Shelf& shelf) {
  const int64_t part = row * job.kv_heads + head, reach = job.pool_kernel / 2;
  const int64_t end = job.ends ? std::clamp<int64_t>(job.ends[row], 0, job.length) : job.length;
  const uint8_t* visible = job.visible ? job.visible + row * job.length : nullptr;
  int64_t there = end;
  if (visible) there = std::count_if(visible, visible + end, [](uint8_t shown) { return shown != 0; });
  const int64_t count = std::clamp<int64_t>(job.budget[row], 0, std::min(there, job.slots));
  job.filled[part] = count;
  if (count == 0 || (job.heads && !job.heads[part])) return;

  shelf.own.resize(end + 2 * reach + kLanes);
  shelf.pooled.resize(end + kLanes);
  float* ranked = shelf.pooled.data();
  pool(job.scores + part * job.length, visible, end, reach, shelf.own.data(), ranked);
  // In two rounds: an anchor that is named twice is lifted once.
  for (const float lift : {0.0f, kAnchor})
    for (int64_t i = 0; i < job.anchor_count; ++i) {
      const int64_t anchor = job.anchors[part * job.anchor_count + i];
      if (anchor < 0 || anchor >= end) continue;
      if (lift == 0) shelf.own[anchor] = ranked[anchor];
      else ranked[anchor] = shelf.own[anchor] + lift;
    }
  if (job.recent) std::fill(ranked + end - std::clamp<int64_t>(job.recent[row], 0, end), ranked + end, kRecent);
  for (int64_t i = 0; visible && i < end; ++i)
    if (!visible[i]) ranked[i] = -1.0f;

  std::fill(ranked + end, ranked + end + kLanes, -1.0f);
  best_keys(ranked, end, count, shelf.keys);
  const int64_t* best = shelf.keys.data() + shelf.keys.size() - count;
  for (int64_t i = 0; i < count; ++i) job.positions[part * job.slots + i] = static_cast<int32_t>(best[i]);
}

}  // namespace

extern "C" {

// 0, or 1 where there is not enough memory.
int refreshkv_select(const Choice* given) {
  const Choice& job = *given;
  bool failed = false;
#pragma omp parallel num_threads(static_cast<int>(job.threads)) reduction(|| : failed)
  {
    static thread_local Shelf shelf;  // kept: fresh memory costs its page faults
#pragma omp for schedule(dynamic, 1)
    for (int64_t part = 0; part < job.rows * job.kv_heads; ++part) {
      try {
        choose(job, part / job.kv_heads, part % job.kv_heads, shelf);
      } catch (const std::bad_alloc&) {
        failed = true;
      }
    }
  }
  return failed;
}

// The `count` <= K best of `scores` [parts, K], best first, the slot `newest` last of all; ties to the later slot.
void refreshkv_top_slots(const float* scores, const int64_t* newest, int64_t* best, int64_t parts, int64_t slots,
                         int64_t count) {
  std::vector<int64_t> keys(count + 1);
  for (int64_t part = 0; part < parts; ++part) {
    const float* row = scores + part * slots;
    int64_t kept = 0;
    for (int64_t slot = 0; count > 0 && slot < slots; ++slot) {
      const int64_t key = key_of(slot == newest[part] ? -1.0f : counted(row[slot]), slot);
      if (kept == count && key < keys[kept - 1]) continue;
      int64_t rank = kept;
      for (; rank > 0 && keys[rank - 1] < key; --rank) keys[rank] = keys[rank - 1];
      keys[rank] = key;
      kept = std::min(kept + 1, count);
    }
    for (int64_t i = 0; i < count; ++i) best[part * count + i] = keys[i] & 0xffffffff;
  }
}
}
