// Attention over a chunk of entries, and how chunks become the result of a part.

#pragma once

#include <cmath>

#include "job.h"

namespace {

constexpr float kLowest = std::numeric_limits<float>::lowest() / 4;  // finite: -inf minus it is -inf

template <typename T>
void copy_queries(const Job& job, const Part& part, Operand<T>* queries) {
  const T* own = static_cast<const T*>(job.query) + part.row * job.query_row;
  for (int64_t g = 0; g < job.group; ++g)
    for (int64_t t = 0; t < job.queries; ++t, queries += padded(job.dim))
      pack_query(own + (part.head * job.group + g) * job.query_head + t * job.query_token, job.dim, queries);
}

// cap * tanh(v / cap): by exp(-2 |v|), which would leave a small number few digits.
inline Floats capped(Floats logits, float scale, float cap) {
  const Floats v = logits * (scale / cap), size = v < 0 ? -v : v, square = v * v;
  const Floats e = power_of_two(size * (-2 * kLog2e)), tanh = (1.0f - e) / (1.0f + e);
  const Floats higher = 2 / 15.0f - square * (17 / 315.0f - square * (62 / 2835.0f));
  const Floats series = 1.0f + square * (-1 / 3.0f + square * higher);
  return (size < 0.25f ? v * series : v < 0 ? -tanh : tanh) * cap;
}

// logits [m, kRow] of the `n` entries from `entry` on: capped, and -inf where a query does not see an entry.
void hide(const Job& job, const Part& part, int64_t entry, int64_t n, const Found& found, float* logits) {
  const float scale = static_cast<float>(job.scale), cap = static_cast<float>(job.softcap);
  const bool all_earlier = !job.starts || entry + n <= part.start + 1;
  if (found.whole && n == padded(n) && !job.window && all_earlier && cap == 0) return;
  for (int64_t i = 0; i < job.members(); ++i) {
    float* row = logits + i * kRow;
    for (int64_t x = 0; cap != 0 && x < n; x += kLanes) store(row + x, capped(load<Floats>(row + x), scale, cap));
    int64_t from = 0, to = n;
    if (job.starts) {
      const int64_t last = part.start + i % job.queries;
      to = std::clamp<int64_t>(last + 1 - entry, 0, n);
      if (job.window) from = std::clamp<int64_t>(last - job.window + 1 - entry, 0, n);
    }
    std::fill(row, row + from, -kInfinity);
    std::fill(row + to, row + padded(n), -kInfinity);
    for (int64_t x = 0; !found.whole && x < n; ++x)
      if (!found.seen(x)) row[x] = -kInfinity;
  }
}

// Logits of a block become weights `2^(scale * logit - top)`; what was mixed so far adapts to a new top.
template <typename A>
void weigh(const float* logits, float scale, int64_t n, int64_t dim, A* weights, float& top, float& total, float* mixed,
           Ahead& ahead) {
  Floats most = all(-kInfinity);
  for (int64_t x = 0; x < n; x += kLanes) most = larger(most, load<Floats>(logits + x));
  const float new_top = std::max(top, largest(most) * scale);
  Floats mass{};
  for (int64_t x = 0; x < n; x += kLanes) {
    const Floats weight = power_of_two(load<Floats>(logits + x) * scale - new_top);
    mass += weight;
    ahead.fetch(1);
    narrow(weights + x, weight);
  }
  if (new_top > top) {
    const float kept = std::exp2(top - new_top);
    total *= kept;
    for (int64_t d = 0; mixed && d < dim; d += kLanes) store(mixed + d, load<Floats>(mixed + d) * kept);
  }
  top = new_top;
  total += sum(mass);
}

// One chunk of a part. Where scores are wanted, the weights of all chunks remain.
template <typename T, typename A = Operand<T>>
void attend_chunk(const Job& job, const Part& part, const Bench<A>& bench, int64_t chunk, const Weights<A>& weights,
                  const Softmax& result) {
  const int64_t from = std::min(part.end, part.first + chunk * kChunk), to = std::min(part.end, from + kChunk);
  const int64_t m = job.members(), rows = rows_for(m), dim = padded(job.dim), value_dim = padded(job.value_dim);
  const Tiles tiles(rows);
  const float scale = kLog2e * static_cast<float>(job.softcap != 0 ? 1 : job.scale);
  std::fill(result.top, result.top + m, kLowest);
  std::fill(result.total, result.total + m, 0.0f);
  std::fill(result.mixed, result.mixed + rows * value_dim, 0.0f);
  const bool mixes = job.entries.values != nullptr;
  Found blocks[2];  // this and the next, which may be that of another chunk
  int64_t next = part.find(from, blocks[0]);
  Ahead ahead;  // values while keys are worked on, then the next keys
  for (int64_t entry = from, turn = 0; entry < to; entry += kBlock, turn ^= 1) {
    const Found &found = blocks[turn], &after = blocks[turn ^ 1];
    const int64_t n = std::min(next, to - entry), offset = entry - part.first;
    next = part.find(entry + kBlock, blocks[turn ^ 1]);
    const auto look_at_keys = [&] { ahead.begin(after.keys, next, job.dim * sizeof(T)); };
    if (mixes) ahead.begin(found.values, n, job.value_dim * sizeof(T));
    else look_at_keys();
    pack_keys<T>(found.keys, padded(n), job.dim, bench.packed, ahead);
    product(Product<A>{bench.queries, dim, bench.packed, kBlock / kColumns, bench.logits, kRow, rows, padded(n), dim,
                       false, ahead});
    hide(job, part, entry, n, found, bench.logits);
    A* block = weights.rows + (job.scores ? offset : 0);
    for (int64_t i = 0; i < m; ++i) {
      float* mixed = mixes ? result.mixed + i * value_dim : nullptr;
      weigh(bench.logits + i * kRow, scale, padded(n), value_dim, block + i * weights.stride, result.top[i],
            result.total[i], mixed, ahead);
      if (job.scores) weights.tops[offset / kBlock * m + i] = result.top[i];
    }
    if (!mixes) continue;
    look_at_keys();
    pack_values<T>(found.values, padded(n), job.value_dim, bench.packed, ahead);
    product(Product<A>{block, weights.stride, bench.packed, value_dim / kColumns, result.mixed, value_dim, rows,
                       value_dim, padded(n), true, ahead});
  }
}

void merge(const Job& job, const Softmax& into, const Softmax& chunk) {
  const int64_t dim = padded(job.value_dim);
  for (int64_t i = 0; i < job.members(); ++i) {
    const float top = std::max(into.top[i], chunk.top[i]);
    const float kept = std::exp2(into.top[i] - top), added = std::exp2(chunk.top[i] - top);
    into.top[i] = top;
    into.total[i] = into.total[i] * kept + chunk.total[i] * added;
    float *mixed = into.mixed + i * dim, *more = chunk.mixed + i * dim;
    for (int64_t d = 0; d < dim; ++d) mixed[d] = mixed[d] * kept + more[d] * added;
  }
}

// Output and log-sum-exp; afterwards `total` holds the factor that makes weights out of 2^(logit - top).
template <typename T>
void finish_part(const Job& job, const Part& part, const Softmax& result) {
  for (int64_t i = 0; i < job.members(); ++i) {
    const int64_t head = part.head * job.group + i / job.queries, t = i % job.queries;
    const int64_t query = (part.row * job.kv_heads() * job.group + head) * job.queries + t;
    const bool empty = result.total[i] == 0;  // and not where it is NaN
    const float lse = empty ? -kInfinity : (result.top[i] + std::log2(result.total[i])) / kLog2e;
    float share = empty ? 0 : 1 / result.total[i];
    if (job.sinks && !empty) share *= 1 / (1 + std::exp(job.sinks[head] - lse));
    job.lse[query] = lse;
    T* output = static_cast<T*>(job.output) + query * job.value_dim;
    if (job.entries.values) unpack(result.mixed + i * padded(job.value_dim), share, job.value_dim, output);
    result.total[i] = share;
  }
}

}  // namespace
