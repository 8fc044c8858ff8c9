// What a call of attention is told, the parts that it is worked off in, and the memory for that.

#pragma once

#include "entries.h"
#include "pack.h"
#include "room.h"

extern "C" {

// What attention.py fills in, field by field; strides in elements. Null: not given, or not wanted.
struct Job {
  Entries entries;
  const void* query;               // [B, Hq, T, D]
  void* output;                    // [B, Hq, T, Dv], contiguous
  float *lse, *scores;             // [B, Hq, T], [B, Hkv, n] or null, contiguous
  const uint8_t* visible;          // [B, Hkv, n] by strides, or null
  const uint8_t* heads;            // [B, Hkv] contiguous, or null
  const int64_t* lengths;          // [B, Hkv] by strides, or null
  const int64_t *starts, *counts;  // [B], or null
  const float* sinks;              // [Hq], or null
  int64_t kind, rows, group, queries, dim, value_dim;  // kind: of the numbers, as in refreshkv_attend
  int64_t query_row, query_head, query_token;
  int64_t visible_row, visible_head, lengths_row, lengths_head;
  int64_t window, mean, threads;
  double scale, softcap;  // softcap 0: none

  int64_t kv_heads() const { return entries.kv_heads; }
  int64_t parts() const { return rows * entries.kv_heads; }
  int64_t members() const { return group * queries; }
};
}

namespace {

constexpr int64_t kChunk = 8192;             // entries that share a softmax
constexpr int64_t kRow = kBlock + kColumns;  // floats from one query's logits to the next: not a power of two

int64_t chunks_of(int64_t entries) { return (entries + kChunk - 1) / kChunk; }

// Keys and values of a block, zeros where nothing is to be seen, and up to a multiple of 32.
struct Found {
  const char *keys[kBlock], *values[kBlock];
  bool whole;  // nothing but what is seen

  bool seen(int64_t i) const { return keys[i] != kZeros; }
};

// The queries of one row and KV head from position `start` on, and the entries first .. end that any of them sees.
struct Part {
  int64_t row, head, first, end, start, voting;
  const uint8_t* visible;  // from entry 0, or null
  Held held;

  Part(const Job& job, int64_t index)
      : row(index / job.kv_heads()), head(index % job.kv_heads()), first(0), end(job.entries.count), start(0),
        voting(job.counts ? std::clamp<int64_t>(job.counts[row], 0, job.queries) : job.queries), visible(nullptr),
        held(job.entries, row, head) {
    if (job.lengths)
      end = std::min(end, job.lengths[row * job.lengths_row + head * job.lengths_head]);
    if (job.starts) {
      start = std::clamp(job.starts[row], -job.queries, job.entries.count);
      end = std::min(end, start + job.queries);
      if (job.window) first = std::max<int64_t>(0, start - job.window + 1);
    }
    if (job.visible) {
      visible = job.visible + row * job.visible_row + head * job.visible_head;
      // Padding on the left is left out: it costs nothing, and a row computes what it would alone.
      while (first < end && !visible[first]) ++first;
    }
    const bool unwanted = job.heads && !job.heads[row * job.kv_heads() + head];
    if (voting == 0 || unwanted || !held.there()) end = first;
    end = std::max(end, first);
  }
  // `count` entries of another part at the positions of a list, all of which are seen.
  Part(const Part& of, const int32_t* listed, int64_t count)
      : row(of.row), head(of.head), first(0), end(count), start(0), voting(of.voting), visible(nullptr),
        held(of.held, listed) {}
  int64_t chunks() const { return chunks_of(end - first); }

  // The block from `entry` on; how many it has.
  int64_t find(int64_t entry, Found& found) const {
    const int64_t n = std::clamp<int64_t>(end - entry, 0, kBlock);
    found.whole = held.find(entry, n, visible ? visible + entry : nullptr, kZeros, found.keys, found.values);
    std::fill(found.keys + n, found.keys + padded(n), kZeros);
    std::fill(found.values + n, found.values + padded(n), kZeros);
    return n;
  }
};

thread_local Room room;

// What a chunk leaves, in powers of two: per query the largest logit, the sum of weights and the weighted values.
struct Softmax {
  float *top, *total, *mixed;

  static size_t bytes(int64_t m, int64_t dim) {
    return 2 * Room::bytes_of<float>(m) + Room::bytes_of<float>(rows_for(m) * dim);
  }
  static Softmax take(int64_t m, int64_t dim) {
    return {room.take<float>(m), room.take<float>(m), room.take<float>(rows_for(m) * dim)};
  }
};

// The weights of a part `[m, stride]`, and to which maximum those of a block refer `[blocks, m]`.
template <typename A>
struct Weights {
  A* rows;
  float* tops;
  int64_t stride;

  static size_t bytes(int64_t m, int64_t length) {
    return Room::bytes_of<A>(rows_for(m) * row(length)) + Room::bytes_of<float>(m * blocks(length));
  }
  static Weights take(int64_t m, int64_t length) {
    return {room.take<A>(rows_for(m) * row(length)), room.take<float>(m * blocks(length)), row(length)};
  }

 private:
  static int64_t blocks(int64_t length) { return (length + kBlock - 1) / kBlock; }
  // One more cache line, or rows of a power of two would all fall on the same lines of the cache.
  static int64_t row(int64_t length) { return padded(length) + 32; }
};

// What a thread works on.
template <typename A>
struct Bench {
  A* queries;      // [m, dim]
  float* logits;   // [m, kRow]
  float* factors;  // [m]
  Word* packed;    // keys, then values

  static size_t bytes(int64_t m, int64_t dim, int64_t value_dim) {
    return Room::bytes_of<A>(rows_for(m) * dim) + Room::bytes_of<float>(rows_for(m) * kRow) +
           Room::bytes_of<float>(m) + Room::bytes_of<Word>(kBlock / kEach<A> * std::max(dim, value_dim));
  }
  static Bench take(int64_t m, int64_t dim, int64_t value_dim) {
    return {room.take<A>(rows_for(m) * dim), room.take<float>(rows_for(m) * kRow), room.take<float>(m),
            room.take<Word>(kBlock / kEach<A> * std::max(dim, value_dim))};
  }
};

}  // namespace
