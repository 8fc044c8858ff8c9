// Attention with its scores on CPUs: `reference.attend_and_score` and `reference.verify`, reading every key and value
// once. Compiled where it runs (build.py); a plain C interface, no headers but the compiler's own.
//
// A row and KV head is a `Part`: M = G * T queries (GQA group times query positions) over its entries. It is worked off
// in chunks of a fixed size with a softmax each, and a chunk in blocks, as in FlashAttention: where its entries lie,
// logits, running maximum, weights, weights times values. The weights stay, in bfloat16 where the entries are and else
// in float32, and with the maximum that they refer to, until the log-sum-exp is known; then they become the scores.
// Neither the batch, nor the number of threads, nor where entries lie changes what a chunk is, or a bit of the result.

#include <vector>

#ifndef _OPENMP
#error "OpenMP is needed: one thread alone would be slower than torch"
#endif
#include <omp.h>

#include "chunk.h"

namespace {

// The weights of the voting queries, reduced over the group and averaged; 0 for an entry that no query sees.
template <typename A>
void score_part(const Job& job, const Part& part, const Weights<A>& weights, const Softmax& result, float* factors) {
  const int64_t m = job.members(), count = job.entries.count;
  const float share = 1.0f / (part.voting * (job.mean ? job.group : 1));
  float* scores = job.scores + (part.row * job.kv_heads() + part.head) * count;
  std::fill(scores, scores + part.first, 0.0f);
  std::fill(scores + part.end, scores + count, 0.0f);
  for (int64_t entry = part.first; entry < part.end; entry += kBlock) {
    const int64_t n = std::min(kBlock, part.end - entry), offset = entry - part.first;
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
          const Floats weight = widened(weights.rows + i * weights.stride + offset + x) * factors[i];
          reduced = job.mean ? reduced + weight : larger(reduced, weight);
        }
        votes += reduced;
      }
      if (x + kLanes <= n) {
        store(scores + entry + x, votes);
      } else {
        for (int64_t lane = 0; x + lane < n; ++lane) scores[entry + x + lane] = votes[lane];
      }
    }
  }
}

// All parts side by side, each as long as it takes.
template <typename T, typename A = Operand<T>>
void attend_parts(const Job& job, const Bench<A>* benches, const Weights<A>* weights, const Softmax* results) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(static_cast<int>(job.threads))
  for (int64_t index = 0; index < job.parts(); ++index) {
    const int thread = omp_get_thread_num();
    const Part part(job, index);
    const Bench<A>& bench = benches[thread];
    const Softmax &result = results[2 * thread], &more = results[2 * thread + 1];
    copy_queries<T>(job, part, bench.queries);
    attend_chunk<T>(job, part, bench, 0, weights[thread], result);
    for (int64_t chunk = 1; chunk < part.chunks(); ++chunk) {
      attend_chunk<T>(job, part, bench, chunk, weights[thread], more);
      merge(job, result, more);
    }
    finish_part<T>(job, part, result);
    if (job.scores) score_part(job, part, weights[thread], result, bench.factors);
  }
}

// Fewer parts than threads: their chunks side by side, then what remains of each part.
template <typename T, typename A = Operand<T>>
void attend_chunks(const Job& job, const Bench<A>* benches, const Weights<A>* weights, const Softmax* results) {
  const int64_t chunks = chunks_of(job.entries.count);
#pragma omp parallel num_threads(static_cast<int>(job.threads))
  {
    const int thread = omp_get_thread_num();
    const Bench<A>& bench = benches[thread];
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < job.parts() * chunks; ++item) {
      const Part part(job, item / chunks);
      copy_queries<T>(job, part, bench.queries);
      const Weights<A>& kept = weights[job.scores ? item / chunks : thread];
      attend_chunk<T>(job, part, bench, item % chunks, kept, results[item]);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t index = 0; index < job.parts(); ++index) {
      const Part part(job, index);
      const Softmax& result = results[index * chunks];
      for (int64_t chunk = 1; chunk < part.chunks(); ++chunk) merge(job, result, results[index * chunks + chunk]);
      finish_part<T>(job, part, result);
      if (job.scores) score_part(job, part, weights[index], result, bench.factors);
    }
  }
}

// False where there is not enough memory.
template <typename T, typename A = Operand<T>>
bool attend(const Job& job) {
  const int64_t m = job.members(), chunks = chunks_of(job.entries.count);
  const int64_t dim = padded(job.dim), value_dim = padded(job.value_dim);
  const bool split = job.parts() < job.threads && chunks > 1;
  // Weights are those of a part where they become scores, else those of a block.
  const int64_t kept = job.scores ? job.entries.count : kBlock;
  const int64_t weight_count = split && job.scores ? job.parts() : job.threads;
  const int64_t result_count = split ? job.parts() * chunks : 2 * job.threads;
  const size_t bytes = job.threads * Bench<A>::bytes(m, dim, value_dim) + weight_count * Weights<A>::bytes(m, kept) +
                       result_count * Softmax::bytes(m, value_dim);
  if (!room.reserve(bytes)) return false;
  std::vector<Bench<A>> benches;
  std::vector<Weights<A>> weights;
  std::vector<Softmax> results;
  for (int64_t i = 0; i < job.threads; ++i) benches.push_back(Bench<A>::take(m, dim, value_dim));
  for (int64_t i = 0; i < weight_count; ++i) weights.push_back(Weights<A>::take(m, kept));
  for (int64_t i = 0; i < result_count; ++i) results.push_back(Softmax::take(m, value_dim));
  (split ? attend_chunks<T> : attend_parts<T>)(job, benches.data(), weights.data(), results.data());
  room.release_beyond(kMostKept);
  return true;
}

}  // namespace

extern "C" {

// What the products are computed with on this machine.
const char* refreshkv_products() { return product_kind(); }

// 0, or 1 where there is not enough memory.
int refreshkv_attend(const Job* job) {
  if (job->kind == 0) return !attend<bfloat16>(*job);
  return job->kind == 1 ? !attend<float16>(*job) : !attend<float>(*job);
}
}
