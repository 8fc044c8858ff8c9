// What a call of `attend_mixed` is told, which tokens of a part have codes, and the memory for that.

#pragma once

#include <vector>

#include "buckets.h"
#include "chunk.h"
#include "codes.h"

extern "C" {

// What mixed.py fills in, field by field.
struct Mixed {
  Job job;  // one query of a row, no list, no scores
  Codes codes;
  const int64_t *first, *finished, *budget;  // [B]
  int64_t* counts;                           // [B, Hkv, 2], contiguous
  double skip;
};
}

namespace {

// Positions of a part: from `start` on `blocks` blocks of codes, all of them from `lower` to `end`. Chunks are counted
// from `start` on, so that what lies before the first token of a row changes nothing.
struct Span {
  int64_t start, skipped, blocks, lower, end, chunks;

  Span(const Mixed& mixed, const Part& part, const Copy& copy)
      : start(part.first), skipped(0), blocks(0), end(part.end) {
    const int64_t first = mixed.first[part.row];
    const int64_t finished = std::clamp<int64_t>(mixed.finished[part.row], 0, copy.room());
    if (finished > 0 && first < end && first > -kCoded * finished) {
      skipped = first < 0 ? -first / kCoded : 0;
      start = first + kCoded * skipped;
      blocks = std::min(finished - skipped, (end - start + kCoded - 1) / kCoded);
    }
    lower = start - (std::max<int64_t>(0, start - part.first) + kLanes - 1) / kLanes * kLanes;
    chunks = end > part.first ? std::max<int64_t>(1, chunks_of(end - start)) : 0;
  }
  int64_t low(int64_t chunk) const { return chunk == 0 ? lower : start + chunk * kChunk; }
  int64_t high(int64_t chunk) const { return std::min(end, start + (chunk + 1) * kChunk); }
};

// A part by its positions, of which a few are before the first and behind the last; and what its chunks leave.
struct Sheet {
  float* logits;                   // [m, stride], -inf where there are no codes
  int32_t *list, *marks;           // positions, those of a chunk from `list_of` on; the buckets of candidates
  Buckets buckets;                 // [chunks]; all of a thread's own chunks in the first of them
  int64_t *uncovered, *listed;     // [chunks]: the first so many of a list have no codes, and how many there are
  int64_t* blocks;                 // [chunks]: whose values were read
  float *tops, *totals;            // [chunks, m], in powers of two: the largest logit, and the sum of weights
  float *top, *total, *mixed;      // [chunks, m (, value_dim)]: as in `Softmax`
  int64_t stride;

  static constexpr int64_t kMargin = 2 * kCoded;
  static int64_t chunks(int64_t n) { return chunks_of(n + kCoded); }
  static int64_t row(int64_t n) { return padded(n) + 2 * kMargin + 16; }
  static int64_t places(int64_t n) { return n + (chunks(n) + 1) * kLanes; }  // of all lists
  static size_t bytes(int64_t m, int64_t n, int64_t dim) {
    const int64_t all = chunks(n);
    return Room::bytes_of<float>(m * row(n)) + 2 * Room::bytes_of<int32_t>(places(n)) +
           Room::bytes_of<int32_t>(all * Buckets::size) + 3 * Room::bytes_of<int64_t>(all) +
           4 * Room::bytes_of<float>(all * m) + Room::bytes_of<float>(all * m * dim);
  }
  static Sheet take(Room& room, int64_t m, int64_t n, int64_t dim) {
    const int64_t all = chunks(n);
    return {room.take<float>(m * row(n)), room.take<int32_t>(places(n)), room.take<int32_t>(places(n)),
            {room.take<int32_t>(all * Buckets::size)},
            room.take<int64_t>(all), room.take<int64_t>(all), room.take<int64_t>(all),
            room.take<float>(all * m), room.take<float>(all * m), room.take<float>(all * m),
            room.take<float>(all * m), room.take<float>(all * m * dim), row(n)};
  }
  // Position 0, where blocks begin at whole registers.
  float* logits_of(int64_t i, const Span& span) const {
    return logits + i * stride + kMargin + (kLanes - (span.start % kLanes + kLanes) % kLanes) % kLanes;
  }
  // Where the list of a chunk begins: a register of places between two of them.
  static int64_t list_of(int64_t chunk, const Span& span) {
    return std::max<int64_t>(0, span.low(chunk)) + chunk * kLanes;
  }
};

// What a thread works on, beside the bench of the exact entries.
template <typename A>
struct CodeBench {
  A* a;            // [m, the larger of dim and a block]
  float* queries;  // [m, dim], scaled
  float *unit, *middle;    // of each dim
  float *start, *against;  // [m]: of a product; what logits are weights to
  float *mass, *least;     // [m]: weights of a block; so many it must have to be read
  float* product;          // [m, the larger of both dims]
  uint16_t* fields;        // of a block
  int64_t stride;

  static int64_t fields_of(int64_t dim) { return dim * kCoded / 512 * kMostFields * kPlane; }

  static int64_t row(int64_t dim) { return std::max(dim, kCoded); }
  // `wide`: the larger of both dims.
  static size_t bytes(int64_t m, int64_t dim, int64_t wide) {
    return Room::bytes_of<A>(m * row(dim)) + Room::bytes_of<float>(m * dim) + 2 * Room::bytes_of<float>(wide) +
           4 * Room::bytes_of<float>(m) + Room::bytes_of<float>(m * wide) +
           Room::bytes_of<uint16_t>(fields_of(wide));
  }
  static CodeBench take(Room& room, int64_t m, int64_t dim, int64_t wide) {
    return {room.take<A>(m * row(dim)), room.take<float>(m * dim), room.take<float>(wide),
            room.take<float>(wide), room.take<float>(m), room.take<float>(m),
            room.take<float>(m), room.take<float>(m), room.take<float>(m * wide),
            room.take<uint16_t>(fields_of(wide)), row(dim)};
  }
};

// What a call takes: for each thread, and a sheet for each part that is worked on.
template <typename A>
struct Desk {
  std::vector<Bench<A>> benches;
  std::vector<CodeBench<A>> codes;
  std::vector<Weights<A>> weights;
  std::vector<Softmax> results;
  std::vector<Sheet> sheets;
};

// Logits add to the largest, in powers of two, and the sum of their weights.
inline void add_up(const float* logits, int64_t n, float scale, float& top, float& total) {
  Floats most = all(-kInfinity), mass{};
  for (int64_t x = 0; x < n; x += kLanes) most = larger(most, load<Floats>(logits + x));
  const float new_top = std::max(top, largest(most) * scale);
  for (int64_t x = 0; x < n; x += kLanes) mass += power_of_two(load<Floats>(logits + x) * scale - new_top);
  total = total * std::exp2(top - new_top) + sum(mass);
  top = new_top;
}

// Steps of the grids of `n` dims, times `factor` by the dim modulo 32 (or null: 1), and their middles; zeros behind.
inline void read_grid(const uint16_t* grid, int64_t n, const float* factor, float center, float* unit, float* middle) {
  for (int64_t d = 0; d < padded(n); d += kLanes) {
    int16_t some[kLanes] = {};
    std::memcpy(some, grid + d, std::clamp<int64_t>(n - d, 0, kLanes) * sizeof *some);
    Ints kept;
    for (int lane = 0; lane < kLanes; ++lane) kept[lane] = some[lane];
    const Floats step = d < n ? step_of(kept) : Floats{}, middles = low_of(kept, step) + step * center;
    store(unit + d, factor ? step * load<Floats>(factor + d % 32) : step);
    store(middle + d, middles);
  }
}

}  // namespace
