// What a decode step keeps: `write`, `push`, `fetch` and `refresh` of reference/rings.py. A plain C interface, called by
// rings.py; keys and values of any dtype are moved as bytes.

#include <algorithm>
#include <cstring>
#include <vector>

#include "entries.h"

namespace {

enum Counter { kFilled, kPushed, kSteps, kNewest, kUsed, kFetched };
enum Count { kFull, kStep, kRead, kRounded, kAvailable };

// Sums and differences that wrap around.
inline int64_t plus(int64_t a, int64_t b) { return static_cast<int64_t>(uint64_t(a) + uint64_t(b)); }
inline int64_t minus(int64_t a, int64_t b) { return static_cast<int64_t>(uint64_t(a) - uint64_t(b)); }

}  // namespace

extern "C" {

// The rings of all rows that are kept; the copies are null where a ring has positions alone.
struct Ring {
  char *keys, *values;    // [R, Hkv, C, D] by strides
  int32_t* positions;     // [R, Hkv, C] contiguous
  int64_t* state;         // [6, R, Hkv] contiguous
  const int64_t* budget;  // [R]
  int64_t kept, kv_heads, slots, key_bytes, value_bytes;  // R, Hkv, C, and those of an entry
  Strides key, value;

  void put(int64_t row, int64_t head, int64_t slot, const char* from_key, const char* from_value) const {
    if (!keys) return;
    std::memcpy(keys + row * key.row + head * key.head + slot * key.token, from_key, key_bytes);
    std::memcpy(values + row * value.row + head * value.head + slot * value.token, from_value, value_bytes);
  }
  int32_t* positions_of(int64_t row, int64_t head) const { return positions + (row * kv_heads + head) * slots; }
  int64_t& counter(Counter which, int64_t row, int64_t head) const {
    return state[(which * kept + row) * kv_heads + head];
  }
  int64_t room(int64_t row) const { return std::clamp<int64_t>(budget[row], 0, slots); }
  // The slot of the next entry; % of a negative number is negative or 0.
  int64_t next(int64_t row, int64_t head) const {
    const int64_t room = std::max<int64_t>(this->room(row), 1);
    return (held(row, head) % room + room) % room;
  }
  int64_t held(int64_t row, int64_t head) const {
    return plus(counter(kFilled, row, head), counter(kPushed, row, head));
  }
  void settle(int64_t row, int64_t head) const {
    counter(kUsed, row, head) = std::min(held(row, head), room(row));
  }
};

// `[B, Hkv, 5]` by strides, in elements, or null; and which rows count, or null.
struct Tally {
  int64_t* counts;
  const uint8_t* rows;
  int64_t row, head, count;

  void add(Count which, int64_t of_row, int64_t of_head, int64_t amount) const {
    if (!counts || (rows && !rows[of_row])) return;
    int64_t& sum = counts[of_row * row + of_head * head + which * count];
    sum = plus(sum, amount);
  }
};

// What `reference.write` does.
struct Write {
  Entries entries;
  Tally tally;
  const char *keys, *values;  // [B, Hkv, n, D] by strides
  const int64_t *starts, *hidden;  // [B]; or null
  int64_t rows, count, full, key_bytes, value_bytes;
  Strides key, value;
};

void refreshkv_write(const Write* given) {
  const Write& job = *given;
  for (int64_t part = 0; part < job.rows * job.entries.kv_heads; ++part) {
    const int64_t row = part / job.entries.kv_heads, head = part % job.entries.kv_heads;
    if (job.tally.counts) {
      const int64_t available = minus(plus(job.starts[row], job.count), job.hidden[row]);
      job.tally.add(kStep, row, head, 1);
      job.tally.add(kAvailable, row, head, available);
      if (job.full) job.tally.add(kFull, row, head, 1);
      if (job.full) job.tally.add(kRead, row, head, available);
    }
    const Held held(job.entries, row, head);
    const char* new_key = job.keys + row * job.key.row + head * job.key.head;
    const char* new_value = job.values + row * job.value.row + head * job.value.head;
    for (int64_t token = 0; token < job.count; ++token) {
      const char *key, *value;
      held.find(plus(job.starts[row], token), nullptr, key, value);
      if (!key) continue;
      std::memcpy(const_cast<char*>(key), new_key + token * job.key.token, job.key_bytes);
      std::memcpy(const_cast<char*>(value), new_value + token * job.value.token, job.value_bytes);
    }
  }
}

// What `reference.push` does.
struct Push {
  Entries entries;
  Ring ring;
  Tally tally;
  const int64_t* at;    // [B]
  const uint8_t* full;  // [B, Hkv] contiguous, or null
  int64_t rows, back;
};

void refreshkv_push(const Push* given) {
  const Push& job = *given;
  const Ring& ring = job.ring;
  for (int64_t part = 0; part < job.rows * ring.kv_heads; ++part) {
    const int64_t row = part / ring.kv_heads, head = part % ring.kv_heads;
    const int64_t into = job.entries.kept_row(row, ring.kept);
    if (into < 0) continue;
    const int64_t position = minus(job.at[row], job.back), slot = ring.next(into, head);
    const char *key = nullptr, *value = nullptr;
    if (ring.room(into) > 0) Held(job.entries, row, head).find(position, nullptr, key, value);
    if (key) {
      ring.put(into, head, slot, key, value);
      ring.positions_of(into, head)[slot] = static_cast<int32_t>(position);
      int64_t& pushed = ring.counter(kPushed, into, head);
      pushed = plus(pushed, 1);
    }
    int64_t& steps = ring.counter(kSteps, into, head);
    steps = plus(steps, 1);
    ring.counter(kNewest, into, head) = slot;
    ring.counter(kFetched, into, head) = 0;
    ring.settle(into, head);
    if (!job.full || !job.full[part]) job.tally.add(kRead, row, head, ring.counter(kUsed, into, head));
  }
}

// What `reference.fetch` does.
struct Fetch {
  Entries entries;
  Ring ring;
  Tally tally;
  const int64_t *best, *ends;  // [B, Hkv, m] contiguous; [B]
  const uint8_t* full;         // [B, Hkv] contiguous, or null
  int64_t rows, count;
};

void refreshkv_fetch(const Fetch* given) {
  const Fetch& job = *given;
  const Ring& ring = job.ring;
  struct Missing {
    int32_t position;
    const char *key, *value;
  };
  std::vector<Missing> missing;
  for (int64_t part = 0; part < job.rows * ring.kv_heads; ++part) {
    const int64_t row = part / ring.kv_heads, head = part % ring.kv_heads;
    const int64_t into = job.entries.kept_row(row, ring.kept);
    if (into < 0) continue;
    const Held held(job.entries, row, head);
    int32_t* positions = ring.positions_of(into, head);
    // What is there is looked at before anything enters.
    missing.clear();
    for (int64_t i = 0; ring.room(into) > 0 && i < job.count; ++i) {
      const int64_t slot = job.best[part * job.count + i];
      if (slot < 0 || slot >= ring.slots || positions[slot] < 0) continue;
      const int64_t after = int64_t{positions[slot]} + 1;
      Missing one{static_cast<int32_t>(after), nullptr, nullptr};
      if (after < job.ends[row]) held.find(after, nullptr, one.key, one.value);
      if (one.key && std::find(positions, positions + ring.slots, one.position) == positions + ring.slots)
        missing.push_back(one);
    }
    for (const Missing& one : missing) {
      const int64_t slot = ring.next(into, head);
      ring.put(into, head, slot, one.key, one.value);
      positions[slot] = one.position;
      int64_t& pushed = ring.counter(kPushed, into, head);
      pushed = plus(pushed, 1);
    }
    const auto entered = static_cast<int64_t>(missing.size());
    ring.counter(kFetched, into, head) = entered;
    ring.settle(into, head);
    if (!job.full || !job.full[part]) job.tally.add(kRead, row, head, entered);
  }
}

// What `reference.refresh` does.
struct Refresh {
  Entries entries;
  Ring ring;
  Tally tally;
  const int32_t* wanted;  // [B, Hkv, K] contiguous
  const int64_t* filled;  // [B, Hkv] contiguous
  const uint8_t* heads;   // [B, Hkv] contiguous, or null
  float* reference;       // [B, Hkv, X] contiguous, or null
  const float* summary;   // the same
  const int64_t *ends, *hidden;  // [B], or null
  int64_t rows, count, remembered, threads;
};

void refreshkv_refresh(const Refresh* given) {
  constexpr int64_t ahead = 16;
  const Refresh& job = *given;
  const Ring& ring = job.ring;
  const int64_t kv_heads = ring.kv_heads, count = std::min(job.count, ring.slots);
#pragma omp parallel for schedule(dynamic, 1) num_threads(static_cast<int>(job.threads))
  for (int64_t part = 0; part < job.rows * kv_heads; ++part) {
    const int64_t row = part / kv_heads, head = part % kv_heads;
    const int64_t into = job.entries.kept_row(row, ring.kept);
    if (into < 0 || (job.heads && !job.heads[part])) continue;
    const Held held(job.entries, row, head);
    const int32_t* wanted = job.wanted + part * job.count;
    const char *key, *value;
    for (int64_t slot = 0; ring.keys && slot < count; ++slot) {
      held.find(wanted[std::min(slot + ahead, count - 1)], nullptr, key, value);
      for (int64_t line = 0; key && line < ring.key_bytes; line += 64) __builtin_prefetch(key + line);
      for (int64_t line = 0; key && line < ring.value_bytes; line += 64) __builtin_prefetch(value + line);
      held.find(wanted[slot], nullptr, key, value);
      if (key) ring.put(into, head, slot, key, value);
    }
    int32_t* positions = ring.positions_of(into, head);
    std::copy_n(wanted, count, positions);
    std::fill(positions + count, positions + ring.slots, -1);
    for (const Counter counter : {kPushed, kSteps, kFetched}) ring.counter(counter, into, head) = 0;
    ring.counter(kFilled, into, head) = job.filled[part];
    ring.settle(into, head);
    const int64_t remembered = part * job.remembered;
    if (job.reference) std::copy_n(job.summary + remembered, job.remembered, job.reference + remembered);
    if (!job.tally.counts) continue;
    job.tally.add(kFull, row, head, 1);
    job.tally.add(kRead, row, head, minus(job.ends[row], job.hidden[row]));
  }
}
}
