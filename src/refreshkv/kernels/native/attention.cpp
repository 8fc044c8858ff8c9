// Attention with its scores for bfloat16 on CPUs: `reference.attend_and_score` and `reference.verify`, reading every
// key and value once. Compiled where it runs (build.py); a plain C interface, no headers but the compiler's own.
//
// A row and KV head is a `Part`: M = G * T queries (GQA group times query positions) over its places. It is worked off
// in chunks of a fixed size with a softmax each, and a chunk in blocks, as in FlashAttention: logits, running maximum,
// weights, weights times values. The weights stay, in bfloat16 and with the maximum that they refer to, until the
// log-sum-exp is known; then they become the scores. Neither the batch nor the number of threads changes what a chunk
// is, nor any bit of the result.

#include <cmath>
#include <vector>

#ifndef _OPENMP
#error "OpenMP is needed: one thread alone would be slower than torch"
#endif
#include <omp.h>

#include "product.h"
#include "room.h"

namespace {
constexpr int64_t kChunk = 8192;  // tokens that share a softmax
}

extern "C" {

// What attention.py fills in, field by field; strides in elements. Null: not given, or not wanted.
struct Job {
  const bfloat16 *query, *keys, *values;  // [B, Hq, T, D], [B, Hkv, L, D], [B, Hkv, L, Dv] or null
  bfloat16* output;                       // [B, Hq, T, Dv], contiguous
  float *lse, *scores;                    // [B, Hq, T], [B, Hkv, L] or null, contiguous
  const uint8_t* visible;                 // [B, Hkv, L] by strides, or null
  const uint8_t* heads;                   // [B, Hkv] contiguous, or null
  const int64_t* lengths;                 // [B, Hkv] by strides, or null
  const int64_t *starts, *counts;         // [B], or null
  const float* sinks;                     // [Hq], or null
  int64_t rows, kv_heads, group, queries, length, dim, value_dim;
  int64_t query_row, query_head, query_token;
  int64_t key_row, key_head, key_token, value_row, value_head, value_token;
  int64_t visible_row, visible_head, lengths_row, lengths_head;
  int64_t window, mean, threads;
  double scale, softcap;  // softcap 0: none

  int64_t parts() const { return rows * kv_heads; }
  int64_t chunks() const { return (length + kChunk - 1) / kChunk; }
};
}

namespace {

// The queries of one row and KV head from place `start` on, and the places first .. end that any of them sees.
struct Part {
  int64_t row, head, first, end, start, voting;
  const uint8_t* visible;  // from place 0, or null

  Part(const Job& job, int64_t index)
      : row(index / job.kv_heads), head(index % job.kv_heads), first(0), end(job.length), start(0),
        voting(job.counts ? std::clamp<int64_t>(job.counts[row], 0, job.queries) : job.queries), visible(nullptr) {
    if (job.lengths)
      end = std::min(end, job.lengths[row * job.lengths_row + head * job.lengths_head]);
    if (job.starts) {
      start = std::clamp(job.starts[row], -job.queries, job.length);
      end = std::min(end, start + job.queries);
      if (job.window) first = std::max<int64_t>(0, start - job.window + 1);
    }
    if (job.visible) {
      visible = job.visible + row * job.visible_row + head * job.visible_head;
      // Padding on the left is left out: it costs nothing, and a row computes what it would alone.
      while (first < end && !visible[first]) ++first;
    }
    const bool unwanted = job.heads && !job.heads[row * job.kv_heads + head];
    if (voting == 0 || unwanted) end = first;
    end = std::max(end, first);
  }
  int64_t chunks() const { return (end - first + kChunk - 1) / kChunk; }
};

constexpr int64_t kRow = kBlock + kColumns;  // floats from one query's logits to the next: not a power of two
constexpr float kLowest = std::numeric_limits<float>::lowest() / 4;  // finite: -inf minus it is -inf

constexpr size_t kMostKept = size_t{256} << 20;  // bytes
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
struct Weights {
  bfloat16* rows;
  float* tops;
  int64_t stride;

  static size_t bytes(int64_t m, int64_t length) {
    return Room::bytes_of<bfloat16>(rows_for(m) * row(length)) + Room::bytes_of<float>(m * blocks(length));
  }
  static Weights take(int64_t m, int64_t length) {
    return {room.take<bfloat16>(rows_for(m) * row(length)), room.take<float>(m * blocks(length)), row(length)};
  }

 private:
  static int64_t blocks(int64_t length) { return (length + kBlock - 1) / kBlock; }
  // One more cache line, or rows of a power of two would all fall on the same lines of the cache.
  static int64_t row(int64_t length) { return (length + 31) / 32 * 32 + 32; }
};

// What a thread works on.
struct Bench {
  bfloat16* queries;  // [m, dim]
  float* logits;      // [m, kRow]
  float* factors;     // [m]
  Pair* packed;       // keys, then values

  static size_t bytes(int64_t m, int64_t dim, int64_t value_dim) {
    return Room::bytes_of<bfloat16>(rows_for(m) * dim) + Room::bytes_of<float>(rows_for(m) * kRow) +
           Room::bytes_of<float>(m) + Room::bytes_of<Pair>(kBlock / 2 * std::max(dim, value_dim));
  }
  static Bench take(int64_t m, int64_t dim, int64_t value_dim) {
    return {room.take<bfloat16>(rows_for(m) * dim), room.take<float>(rows_for(m) * kRow), room.take<float>(m),
            room.take<Pair>(kBlock / 2 * std::max(dim, value_dim))};
  }
};

void copy_queries(const Job& job, const Part& part, bfloat16* queries) {
  for (int64_t g = 0; g < job.group; ++g)
    for (int64_t t = 0; t < job.queries; ++t, queries += job.dim)
      std::memcpy(queries,
                  job.query + part.row * job.query_row +
                      (part.head * job.group + g) * job.query_head + t * job.query_token,
                  job.dim * sizeof(bfloat16));
}

// logits [m, padded] of the places from `place` on: capped, and -inf where a query does not see a place.
void hide(const Job& job, const Part& part, int64_t place, int64_t n, int64_t padded, float* logits) {
  const float scale = static_cast<float>(job.scale), cap = static_cast<float>(job.softcap);
  const uint8_t* visible = part.visible ? part.visible + place : nullptr;
  if (visible && !std::memchr(visible, 0, n)) visible = nullptr;
  const bool all_earlier = !job.starts || place + n <= part.start + 1;
  if (!visible && n == padded && !job.window && all_earlier && cap == 0) return;
  for (int64_t i = 0; i < job.group * job.queries; ++i) {
    float* row = logits + i * kRow;
    for (int64_t x = 0; cap != 0 && x < padded; x += kLanes) {
      const Floats v = load<Floats>(row + x) * (scale / cap);
      const Floats e = power_of_two((v < 0 ? v : -v) * (2 * kLog2e));  // tanh by exp(-2 |v|)
      const Floats tanh = (1.0f - e) / (1.0f + e) * cap;
      store(row + x, v < 0 ? -tanh : tanh);
    }
    int64_t from = 0, to = n;
    if (job.starts) {
      const int64_t last = part.start + i % job.queries;
      to = std::clamp<int64_t>(last + 1 - place, 0, n);
      if (job.window) from = std::clamp<int64_t>(last - job.window + 1 - place, 0, n);
    }
    std::fill(row, row + from, -kInfinity);
    std::fill(row + to, row + padded, -kInfinity);
    for (int64_t x = 0; visible && x < n; ++x)
      if (!visible[x]) row[x] = -kInfinity;
  }
}

// Logits of a block become weights `2^(scale * logit - top)` in bfloat16; what was mixed so far adapts to a new top.
void weigh(const float* logits, float scale, int64_t padded, int64_t dim, bfloat16* weights, float& top, float& total,
           float* mixed, Ahead& ahead) {
  Floats most = all(-kInfinity);
  for (int64_t x = 0; x < padded; x += kLanes) most = larger(most, load<Floats>(logits + x));
  const float new_top = std::max(top, largest(most) * scale);
  Floats mass{};
  for (int64_t x = 0; x < padded; x += kLanes) {
    const Floats weight = power_of_two(load<Floats>(logits + x) * scale - new_top);
    mass += weight;
    ahead.fetch(1);
    store(weights + x, narrowed(weight));
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
void attend_chunk(const Job& job, const Part& part, const Bench& bench, int64_t chunk, const Weights& weights,
                  const Softmax& result) {
  const int64_t from = std::min(part.end, part.first + chunk * kChunk), to = std::min(part.end, from + kChunk);
  const int64_t m = job.group * job.queries;
  const int64_t rows = rows_for(m);
  const Tiles tiles(rows);
  const float scale = kLog2e * static_cast<float>(job.softcap != 0 ? 1 : job.scale);
  std::fill(result.top, result.top + m, kLowest);
  std::fill(result.total, result.total + m, 0.0f);
  std::fill(result.mixed, result.mixed + rows * job.value_dim, 0.0f);
  const bfloat16* keys = job.keys + part.row * job.key_row + part.head * job.key_head;
  const bfloat16* values = job.values ? job.values + part.row * job.value_row + part.head * job.value_head : nullptr;
  Ahead ahead;  // values while keys are worked on, then the next keys; nothing where tokens do not lie side by side
  const auto look_at = [&](const bfloat16* data, int64_t place, int64_t token, int64_t dim) {
    if (data && token == dim) ahead.begin(data + place * token, kBlock * dim * sizeof(bfloat16));
  };
  for (int64_t place = from; place < to; place += kBlock) {
    const int64_t n = std::min(kBlock, to - place), padded = (n + 31) / 32 * 32;
    look_at(values, place, job.value_token, job.value_dim);
    if (!values) look_at(keys, place + kBlock, job.key_token, job.dim);
    pack_keys(keys + place * job.key_token, job.key_token, n, job.dim, bench.packed, ahead);
    product({bench.queries, job.dim, bench.packed, kBlock / kColumns, bench.logits, kRow, rows, padded, job.dim, false,
             ahead});
    hide(job, part, place, n, padded, bench.logits);
    const int64_t offset = place - part.first;
    bfloat16* block = weights.rows + (job.scores ? offset : 0);
    for (int64_t i = 0; i < m; ++i) {
      float* mixed = values ? result.mixed + i * job.value_dim : nullptr;
      weigh(bench.logits + i * kRow, scale, padded, job.value_dim, block + i * weights.stride, result.top[i],
            result.total[i], mixed, ahead);
      if (job.scores) weights.tops[offset / kBlock * m + i] = result.top[i];
    }
    if (!values) continue;
    look_at(keys, place + kBlock, job.key_token, job.dim);
    pack_values(values + place * job.value_token, job.value_token, n, job.value_dim,
                part.visible ? part.visible + place : nullptr, bench.packed, ahead);
    product({block, weights.stride, bench.packed, job.value_dim / kColumns, result.mixed, job.value_dim, rows,
             job.value_dim, padded, true, ahead});
  }
}

void merge(const Job& job, const Softmax& into, const Softmax& chunk) {
  for (int64_t i = 0; i < job.group * job.queries; ++i) {
    const float top = std::max(into.top[i], chunk.top[i]);
    const float kept = std::exp2(into.top[i] - top), added = std::exp2(chunk.top[i] - top);
    into.top[i] = top;
    into.total[i] = into.total[i] * kept + chunk.total[i] * added;
    float *mixed = into.mixed + i * job.value_dim, *more = chunk.mixed + i * job.value_dim;
    for (int64_t d = 0; d < job.value_dim; ++d) mixed[d] = mixed[d] * kept + more[d] * added;
  }
}

// Output and log-sum-exp; afterwards `total` holds the factor that makes weights out of 2^(logit - top).
void finish_part(const Job& job, const Part& part, const Softmax& result) {
  for (int64_t i = 0; i < job.group * job.queries; ++i) {
    const int64_t head = part.head * job.group + i / job.queries, t = i % job.queries;
    const int64_t query = (part.row * job.kv_heads * job.group + head) * job.queries + t;
    const bool empty = result.total[i] == 0;  // and not where it is NaN
    const float lse = empty ? -kInfinity : (result.top[i] + std::log2(result.total[i])) / kLog2e;
    float share = empty ? 0 : 1 / result.total[i];
    if (job.sinks && !empty) share *= 1 / (1 + std::exp(job.sinks[head] - lse));
    job.lse[query] = lse;
    if (job.values) {
      const float* mixed = result.mixed + i * job.value_dim;
      bfloat16* output = job.output + query * job.value_dim;
      for (int64_t d = 0; d < job.value_dim; d += 2 * kLanes) {
        Floats low = load<Floats>(mixed + d), high = load<Floats>(mixed + d + kLanes);
        put_in_order(low, high);
        store(output + d, narrowed(low * share));
        store(output + d + kLanes, narrowed(high * share));
      }
    }
    result.total[i] = share;
  }
}

// The weights of the voting queries, reduced over the group and averaged; 0 for a place that no query sees.
void score_part(const Job& job, const Part& part, const Weights& weights, const Softmax& result, float* factors) {
  const int64_t m = job.group * job.queries;
  const float share = 1.0f / (part.voting * (job.mean ? job.group : 1));
  float* scores = job.scores + (part.row * job.kv_heads + part.head) * job.length;
  std::fill(scores, scores + part.first, 0.0f);
  std::fill(scores + part.end, scores + job.length, 0.0f);
  for (int64_t place = part.first; place < part.end; place += kBlock) {
    const int64_t n = std::min(kBlock, part.end - place), offset = place - part.first;
    float broken = 0;  // or NaN, which a maximum might not keep
    for (int64_t i = 0; i < m; ++i) {
      factors[i] = std::exp2(weights.tops[offset / kBlock * m + i] - result.top[i]) * result.total[i] * share;
      if (i % job.queries < part.voting) broken += factors[i] * 0;
    }
    for (int64_t x = 0; x < n; x += kLanes) {
      Floats votes = all(broken);
      for (int64_t t = 0; t < part.voting; ++t) {
        Floats reduced{};
        for (int64_t g = 0; g < job.group; ++g) {
          const int64_t i = g * job.queries + t;
          const Floats weight = widened(load<Halves>(weights.rows + i * weights.stride + offset + x)) * factors[i];
          reduced = job.mean ? reduced + weight : larger(reduced, weight);
        }
        votes += reduced;
      }
      if (x + kLanes <= n) {
        store(scores + place + x, votes);
      } else {
        for (int64_t lane = 0; x + lane < n; ++lane) scores[place + x + lane] = votes[lane];
      }
    }
  }
}

// All parts side by side, each as long as it takes.
void attend_parts(const Job& job, const Bench* benches, const Weights* weights, const Softmax* results) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(static_cast<int>(job.threads))
  for (int64_t index = 0; index < job.parts(); ++index) {
    const int thread = omp_get_thread_num();
    const Part part(job, index);
    const Bench& bench = benches[thread];
    const Softmax &result = results[2 * thread], &more = results[2 * thread + 1];
    copy_queries(job, part, bench.queries);
    attend_chunk(job, part, bench, 0, weights[thread], result);
    for (int64_t chunk = 1; chunk < part.chunks(); ++chunk) {
      attend_chunk(job, part, bench, chunk, weights[thread], more);
      merge(job, result, more);
    }
    finish_part(job, part, result);
    if (job.scores) score_part(job, part, weights[thread], result, bench.factors);
  }
}

// Fewer parts than threads: their chunks side by side, then what remains of each part.
void attend_chunks(const Job& job, const Bench* benches, const Weights* weights, const Softmax* results) {
  const int64_t chunks = job.chunks();
#pragma omp parallel num_threads(static_cast<int>(job.threads))
  {
    const int thread = omp_get_thread_num();
    const Bench& bench = benches[thread];
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < job.parts() * chunks; ++item) {
      const Part part(job, item / chunks);
      copy_queries(job, part, bench.queries);
      attend_chunk(job, part, bench, item % chunks, weights[job.scores ? item / chunks : thread], results[item]);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t index = 0; index < job.parts(); ++index) {
      const Part part(job, index);
      const Softmax& result = results[index * chunks];
      for (int64_t chunk = 1; chunk < part.chunks(); ++chunk) merge(job, result, results[index * chunks + chunk]);
      finish_part(job, part, result);
      if (job.scores) score_part(job, part, weights[index], result, bench.factors);
    }
  }
}

}  // namespace

extern "C" {

// What the products are computed with on this machine.
const char* refreshkv_products() { return product_kind(); }

// 0, or 1 where there is not enough memory.
int refreshkv_attend(const Job* given) {
  const Job& job = *given;
  const int64_t m = job.group * job.queries;
  const bool split = job.parts() < job.threads && job.chunks() > 1;
  // Weights are those of a part where they become scores, else those of a block.
  const int64_t kept = job.scores ? job.length : kBlock;
  const int64_t weight_count = split && job.scores ? job.parts() : job.threads;
  const int64_t result_count = split ? job.parts() * job.chunks() : 2 * job.threads;
  const size_t bytes = job.threads * Bench::bytes(m, job.dim, job.value_dim) + weight_count * Weights::bytes(m, kept) +
                       result_count * Softmax::bytes(m, job.value_dim);
  if (!room.reserve(bytes)) return 1;
  std::vector<Bench> benches;
  std::vector<Weights> weights;
  std::vector<Softmax> results;
  for (int64_t i = 0; i < job.threads; ++i) benches.push_back(Bench::take(m, job.dim, job.value_dim));
  for (int64_t i = 0; i < weight_count; ++i) weights.push_back(Weights::take(m, kept));
  for (int64_t i = 0; i < result_count; ++i) results.push_back(Softmax::take(m, job.value_dim));
  (split ? attend_chunks : attend_parts)(job, benches.data(), weights.data(), results.data());
  room.release_beyond(kMostKept);
  return 0;
}
}
