// Attention over codes and a few exact entries on CPUs: `reference.attend_mixed`.
//
// A row and KV head is a `Part`, worked off in chunks of a fixed number of positions: logits of the codes, and exact
// ones where there are none; the buckets of their weights; which entries are exact; the others' values by their codes.
// Then attention over the list of the exact ones as anywhere else, and one softmax over both. Logits stay where they
// are made until they are weights. Neither the batch nor the number of threads changes what a chunk is, or a bit.

#include <omp.h>

#include "mixed.h"

namespace {

// One part, and everything that it takes.
template <typename T, typename A = Operand<T>>
class Work {
 public:
  Work(const Mixed& mixed, int64_t index, const Sheet& sheet, const Bench<A>& bench, const CodeBench<A>& codes)
      : mixed_(mixed), job_(mixed.job), index_(index), part_(mixed.job, index),
        copy_(mixed.codes, mixed.job.entries, part_.row, part_.head), span_(mixed, part_, copy_), sheet_(sheet),
        bench_(bench), own_(codes), dim_(padded(job_.dim)), value_dim_(padded(job_.value_dim)), m_(job_.members()) {}

  int64_t chunks() const { return span_.chunks; }

  // Logits of a chunk, -inf where nothing is to be seen or read.
  void measure(int64_t chunk) {
    const Places<A> places(mixed_.codes.bits);
    copy_queries<T>(job_, part_, bench_.queries);
    for (int64_t x = 0; x < m_ * dim_; x += kLanes)
      store(own_.queries + x, widened(bench_.queries + x) * static_cast<float>(job_.scale));
    const int64_t low = span_.low(chunk), high = span_.high(chunk), coded = span_.start + span_.blocks * kCoded;
    int32_t* list = sheet_.list + Sheet::list_of(chunk, span_);
    int64_t uncovered = 0;
    if (chunk == 0) skip(low, span_.start, list, uncovered);
    int64_t at = span_.start + chunk * kChunk;
    for (; at < high && at < coded; at += kCoded) {
      Coded block;
      if (copy_.find(block_at(at), block)) measure_block(block, at, places);
      else skip(at, at + kCoded, list, uncovered);
    }
    if (at < high) skip(at, high, list, uncovered);
    sheet_.uncovered[chunk] = uncovered;
    for (int64_t i = 0; i < m_; ++i) {
      float &top = sheet_.tops[chunk * m_ + i] = kLowest, &total = sheet_.totals[chunk * m_ + i] = 0;
      add_up(sheet_.logits_of(i, span_) + low, high - low, kLog2e, top, total);
    }
    measure_exactly(chunk);
  }

  // The buckets of a chunk's weights, counted into those of another; deeper ones than the budget has room for are left
  // out from when that is known.
  void count(int64_t chunk, int64_t into) {
    lse_of_all();
    const Buckets buckets{sheet_.buckets.counts + into * Buckets::size};
    if (chunk == into) std::fill(buckets.counts, buckets.counts + Buckets::size, 0);
    const int64_t begin = Sheet::list_of(chunk, span_) + sheet_.uncovered[chunk], high = span_.high(chunk);
    int64_t found = begin, counted = begin;
    for (int64_t x = span_.low(chunk); x < high;) {
      const int within = buckets.fitting(1, mixed_.budget[part_.row]);
      for (const int64_t end = std::min(high, x + kChunk / 8); x < end; x += kLanes) {
        Floats weight = all(-kInfinity);
        for (int64_t i = 0; i < m_; ++i)
          weight = larger(load<Floats>(sheet_.logits_of(i, span_) + x) - own_.against[i], weight);
        found += candidates(weight, within, x, sheet_.list + found, sheet_.marks + found);
      }
      for (; counted < found; ++counted) buckets.add(sheet_.marks[counted], counted);
    }
    sheet_.listed[chunk] = sheet_.uncovered[chunk] + found - begin;
  }

  // A chunk: attention over what is exact in it and over the codes of all others; `counted` chunks hold the counts.
  void mix(int64_t chunk, int64_t counted, const Weights<A>& weights, const Softmax& result) {
    choose(chunk, sheet_.buckets.fitting(counted, mixed_.budget[part_.row]));
    const Softmax own = result_of(chunk);
    mix_codes(chunk, own);
    copy_queries<T>(job_, part_, bench_.queries);  // another thread may have measured the chunk
    const Part listed = list_of(chunk, sheet_.listed[chunk]);
    for (int64_t c = 0; c < listed.chunks(); ++c) {
      attend_chunk<T>(job_, listed, bench_, c, weights, result);
      merge(job_, own, result);
    }
  }

  // All chunks as one.
  void finish(const Softmax& result) {
    int64_t* counts = mixed_.counts + 2 * index_;
    counts[0] = counts[1] = 0;
    std::fill(result.top, result.top + m_, kLowest);
    std::fill(result.total, result.total + m_, 0.0f);
    std::fill(result.mixed, result.mixed + m_ * value_dim_, 0.0f);
    for (int64_t chunk = 0; chunk < chunks(); ++chunk) {
      merge(job_, result, result_of(chunk));
      counts[0] += sheet_.listed[chunk] - sheet_.uncovered[chunk];
      counts[1] += sheet_.blocks[chunk];
    }
    finish_part<T>(job_, part_, result);
  }

 private:
  Softmax result_of(int64_t chunk) const {
    return {sheet_.top + chunk * m_, sheet_.total + chunk * m_, sheet_.mixed + chunk * m_ * value_dim_};
  }
  Part list_of(int64_t chunk, int64_t n) const {
    return {part_, sheet_.list + Sheet::list_of(chunk, span_), n};
  }
  int64_t block_at(int64_t position) const { return span_.skipped + (position - span_.start) / kCoded; }
  bool seen(int64_t position) const {
    return position >= part_.first && position < part_.end && (!part_.visible || part_.visible[position]) &&
           part_.held.whole(position, 1);
  }
  bool all_seen(int64_t block) const {
    return block >= part_.first && block + kCoded <= part_.end && part_.held.whole(block, kCoded) &&
           (!part_.visible || !std::memchr(part_.visible + block, 0, kCoded));
  }

  // Positions without codes: -inf, up to a whole register, and remembered where they are seen.
  void skip(int64_t from, int64_t to, int32_t* list, int64_t& uncovered) {
    const int64_t whole = to + (kLanes - (to - span_.start) % kLanes) % kLanes;
    for (int64_t i = 0; i < m_; ++i) {
      float* row = sheet_.logits_of(i, span_);
      std::fill(row + from, row + whole, -kInfinity);
    }
    for (int64_t x = from; x < to; ++x)
      if (seen(x)) list[uncovered++] = static_cast<int32_t>(x);
  }

  // Codes and grids of the block after the next, fetched while this one is worked on; `from` has to live as long.
  void look_ahead(int64_t at, uint16_t* Coded::*planes, uint16_t* Coded::*grids, int64_t dim, int64_t bits,
                  const char*& from, Ahead& ahead) const {
    Coded next;
    if (!copy_.find(std::min(block_at(at) + 2, copy_.room() - 1), next)) return;
    from = reinterpret_cast<const char*>(next.*planes);
    ahead.begin(&from, 1, dim * kCoded / 8 * bits);
    const char* grid = reinterpret_cast<const char*>(next.*grids);
    for (int64_t d = 0; d < 2 * dim; d += 64) __builtin_prefetch(grid + d);
  }

  void measure_block(const Coded& coded, int64_t at, const Places<A>& places) {
    const char* next;
    Ahead ahead;
    look_ahead(at, &Coded::keys, &Coded::key_grid, dim_, mixed_.codes.bits, next, ahead);
    const float center = Places<A>::center(mixed_.codes.bits);
    read_grid(coded.key_grid, job_.dim, places.factor, center, own_.unit, own_.middle);
    for (int64_t i = 0; i < m_; ++i) {
      Floats start{}, middle{};
      A* a = own_.a + i * own_.stride;
      for (int64_t d = 0; d < dim_; d += 2 * kLanes) {
        const float *query = own_.queries + i * dim_ + d, *unit = own_.unit + d, *grid = own_.middle + d;
        const Floats low = load<Floats>(query), high = load<Floats>(query + kLanes);
        start += low * load<Floats>(grid) + high * load<Floats>(grid + kLanes);
        middle = narrow_and_dot(middle, low * load<Floats>(unit), high * load<Floats>(unit + kLanes),
                                places.middle + d % 32, a + d);
      }
      start -= middle;
      own_.start[i] = sum(start);
    }
    code_product(CodeProduct<A>{own_.a, own_.stride, coded.keys, own_.fields, kCoded / kColumns, dim_, own_.start,
                                sheet_.logits_of(0, span_) + at, sheet_.stride, m_, false, ahead},
                 mixed_.codes.bits);
    const float cap = static_cast<float>(job_.softcap);
    const bool whole = all_seen(at);
    if (whole && cap == 0) return;
    alignas(64) int32_t shown[kCoded];
    for (int64_t x = 0; x < kCoded; ++x) shown[x] = whole || seen(at + x) ? -1 : 0;
    for (int64_t i = 0; i < m_; ++i) {
      float* row = sheet_.logits_of(i, span_) + at;
      for (int64_t x = 0; x < kCoded; x += kLanes) {
        const Floats logits = load<Floats>(row + x);
        store(row + x, load<Ints>(shown + x) ? (cap == 0 ? logits : capped(logits, 1, cap)) : all(-kInfinity));
      }
    }
  }

  // What the entries without codes add to the logits of a chunk.
  void measure_exactly(int64_t chunk) {
    const Part listed = list_of(chunk, sheet_.uncovered[chunk]);
    const int64_t rows = rows_for(m_);
    const float scale = kLog2e * static_cast<float>(job_.softcap != 0 ? 1 : job_.scale);
    Ahead ahead;
    for (int64_t entry = 0; entry < listed.end; entry += kBlock) {
      Found found;
      const int64_t some = listed.find(entry, found);
      pack_keys<T>(found.keys, padded(some), job_.dim, bench_.packed, ahead);
      const Tiles tiles(rows);
      product(Product<A>{bench_.queries, dim_, bench_.packed, kBlock / kColumns, bench_.logits, kRow, rows,
                         padded(some), dim_, false, ahead});
      hide(job_, listed, entry, some, found, bench_.logits);
      for (int64_t i = 0; i < m_; ++i)
        add_up(bench_.logits + i * kRow, padded(some), scale, sheet_.tops[chunk * m_ + i],
               sheet_.totals[chunk * m_ + i]);
    }
  }

  void top_of_all() {
    std::fill(own_.against, own_.against + m_, kLowest);
    for (int64_t c = 0; c < chunks(); ++c)
      for (int64_t i = 0; i < m_; ++i) own_.against[i] = std::max(own_.against[i], sheet_.tops[c * m_ + i]);
  }

  // What a logit is a weight to, with the sink: in `against`; infinity where no head of the group has weights to give.
  void lse_of_all() {
    top_of_all();
    bool broken = false;
    for (int64_t i = 0; i < m_; ++i) {
      float total = 0;
      for (int64_t c = 0; c < chunks(); ++c)
        total += sheet_.totals[c * m_ + i] * std::exp2(sheet_.tops[c * m_ + i] - own_.against[i]);
      float lse = (own_.against[i] + std::log2(total)) / kLog2e;
      if (job_.sinks) {
        const float sink = job_.sinks[part_.head * job_.group + i], most = std::max(lse, sink);
        const float both = std::exp(lse - most) + std::exp(sink - most);
        if (!(most == -kInfinity)) lse = std::isinf(most) ? most : most + std::log(both);
        if (sink != sink) lse = sink;
      }
      broken |= lse != lse;
      own_.against[i] = lse;
    }
    for (int64_t i = 0; i < m_; ++i)
      if (broken || own_.against[i] == -kInfinity) own_.against[i] = kInfinity;
  }

  // Of the candidates of a chunk those in the first `within` buckets, which have no weight in the background.
  void choose(int64_t chunk, int within) {
    const int64_t begin = Sheet::list_of(chunk, span_);
    int64_t kept = begin + sheet_.uncovered[chunk];
    for (int64_t k = kept; k < begin + sheet_.listed[chunk]; ++k)
      if (sheet_.marks[k] < within) {
        const int32_t position = sheet_.list[kept++] = sheet_.list[k];
        for (int64_t i = 0; i < m_; ++i) sheet_.logits_of(i, span_)[position] = -kInfinity;
      }
    sheet_.listed[chunk] = kept - begin;
  }

  void mix_codes(int64_t chunk, const Softmax& own) {
    lse_of_all();
    std::copy_n(own_.against, m_, own_.least);
    top_of_all();
    const float share = static_cast<float>(mixed_.skip) / std::max<int64_t>(1, mixed_.finished[part_.row]);
    for (int64_t i = 0; i < m_; ++i) own_.least[i] = share * std::exp2(own_.least[i] * kLog2e - own_.against[i]);
    sheet_.blocks[chunk] = 0;
    std::copy_n(own_.against, m_, own.top);
    std::fill(own.total, own.total + m_, 0.0f);
    std::fill(own.mixed, own.mixed + m_ * value_dim_, 0.0f);
    const Places<A> places(mixed_.codes.value_bits);
    const int64_t end = std::min(span_.high(chunk), span_.start + span_.blocks * kCoded);
    // What is exact is looked at meanwhile, an entry after the other: all at once would wait for their pages.
    const int32_t* list = sheet_.list + Sheet::list_of(chunk, span_);
    const int64_t listed = sheet_.listed[chunk], each = listed * kCoded / kChunk + 1;
    int64_t next = 0;
    for (int64_t at = span_.start + chunk * kChunk; at < end; at += kCoded) {
      Coded coded;
      for (int64_t k = 0; k < each && next < listed; ++k) look_at(list[next++]);
      if (copy_.find(block_at(at), coded))
        sheet_.blocks[chunk] += mix_block(coded, at, places, own);
    }
    for (int64_t d = 0; std::is_same_v<T, bfloat16> && d < m_ * value_dim_; d += 2 * kLanes)
      put_out_of_order(own.mixed + d);
  }

  void look_at(int64_t position) const {
    const char *key, *value;
    part_.held.find(position, kZeros, key, value);
    constexpr int64_t size = sizeof(T);
    for (int64_t b = 0; b < job_.dim * size; b += 64) __builtin_prefetch(key + b, 0, 2);
    for (int64_t b = 0; b < job_.value_dim * size; b += 64) __builtin_prefetch(value + b, 0, 2);
  }

  // Whether the values of the block were read.
  bool mix_block(const Coded& coded, int64_t at, const Places<A>& places, const Softmax& own) {
    const char* next;
    Ahead ahead;
    look_ahead(at, &Coded::values, &Coded::value_grid, value_dim_, mixed_.codes.value_bits, next, ahead);
    bool any = false;
    for (int64_t i = 0; i < m_; ++i) {
      const float* row = sheet_.logits_of(i, span_) + at;
      Floats mass{}, middle{};
      for (int64_t t = 0; t < kCoded; t += 2 * kLanes) {
        Floats weight[2];
        for (int half = 0; half < 2; ++half) {
          weight[half] = power_of_two(load<Floats>(row + t + half * kLanes) * kLog2e - own_.against[i]);
          mass += weight[half];
          weight[half] *= load<Floats>(places.factor + (t + half * kLanes) % 32);
        }
        middle = narrow_and_dot(middle, weight[0], weight[1], places.middle + t % 32, own_.a + i * own_.stride + t);
      }
      own_.start[i] = -sum(middle);
      own_.mass[i] = sum(mass);
      any |= own_.mass[i] != 0 && !(own_.mass[i] < own_.least[i]);
    }
    if (!any) return false;
    for (int64_t i = 0; i < m_; ++i) own.total[i] += own_.mass[i];
    const float center = Places<A>::center(mixed_.codes.value_bits);
    read_grid(coded.value_grid, job_.value_dim, nullptr, center, own_.unit, own_.middle);
    code_product(CodeProduct<A>{own_.a, own_.stride, coded.values, own_.fields, value_dim_ / kColumns, kCoded,
                                own_.start, own_.product, value_dim_, m_, false, ahead},
                 mixed_.codes.value_bits);
    for (int64_t i = 0; i < m_; ++i)
      for (int64_t d = 0; d < value_dim_; d += kLanes) {
        float* to = own.mixed + i * value_dim_ + d;
        const Floats codes = load<Floats>(own_.product + i * value_dim_ + d) * load<Floats>(own_.unit + d);
        store(to, load<Floats>(to) + codes + load<Floats>(own_.middle + d) * own_.mass[i]);
      }
    return true;
  }

  const Mixed& mixed_;
  const Job& job_;
  int64_t index_;
  Part part_;
  Copy copy_;
  Span span_;
  const Sheet& sheet_;
  const Bench<A>& bench_;
  const CodeBench<A>& own_;
  int64_t dim_, value_dim_, m_;
};

// All parts side by side.
template <typename T, typename A = Operand<T>>
void attend_parts(const Mixed& mixed, const Desk<A>& desk) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(static_cast<int>(mixed.job.threads))
  for (int64_t index = 0; index < mixed.job.parts(); ++index) {
    const int t = omp_get_thread_num();
    Work<T> work(mixed, index, desk.sheets[t], desk.benches[t], desk.codes[t]);
    for (int64_t chunk = 0; chunk < work.chunks(); ++chunk) work.measure(chunk);
    for (int64_t chunk = 0; chunk < work.chunks(); ++chunk) work.count(chunk, 0);
    for (int64_t chunk = 0; chunk < work.chunks(); ++chunk) work.mix(chunk, 1, desk.weights[t], desk.results[t]);
    work.finish(desk.results[t]);
  }
}

// Fewer parts than threads: their chunks side by side.
template <typename T, typename A = Operand<T>>
void attend_chunks(const Mixed& mixed, const Desk<A>& desk) {
  const int64_t parts = mixed.job.parts(), chunks = Sheet::chunks(mixed.job.entries.count);
#pragma omp parallel num_threads(static_cast<int>(mixed.job.threads))
  {
    const int t = omp_get_thread_num();
    const auto work_of = [&](int64_t part) {
      return Work<T>(mixed, part, desk.sheets[part], desk.benches[t], desk.codes[t]);
    };
    const auto each_chunk = [&](auto step) {
#pragma omp for schedule(dynamic, 1)
      for (int64_t item = 0; item < parts * chunks; ++item) {
        Work<T> work = work_of(item / chunks);
        if (item % chunks < work.chunks()) step(work, item % chunks);
      }
    };
    each_chunk([](Work<T>& work, int64_t chunk) { work.measure(chunk); });
    each_chunk([](Work<T>& work, int64_t chunk) { work.count(chunk, chunk); });
    each_chunk([&](Work<T>& work, int64_t chunk) {
      work.mix(chunk, work.chunks(), desk.weights[t], desk.results[t]);
    });
#pragma omp for schedule(dynamic, 1)
    for (int64_t part = 0; part < parts; ++part) work_of(part).finish(desk.results[t]);
  }
}

// False where there is not enough memory.
template <typename T, typename A = Operand<T>>
bool attend(const Mixed& mixed) {
  const Job& job = mixed.job;
  const int64_t m = job.members(), n = job.entries.count, dim = padded(job.dim), value_dim = padded(job.value_dim);
  const int64_t wide = std::max(dim, value_dim);
  const bool split = job.parts() < job.threads && Sheet::chunks(n) > 1;
  const int64_t sheets = split ? job.parts() : job.threads;
  const size_t bytes = job.threads * (Bench<A>::bytes(m, dim, value_dim) + CodeBench<A>::bytes(m, dim, wide) +
                                      Weights<A>::bytes(m, kBlock) + Softmax::bytes(m, value_dim)) +
                       sheets * Sheet::bytes(m, n, value_dim);
  if (!room.reserve(bytes)) return false;
  Desk<A> desk;
  for (int64_t i = 0; i < job.threads; ++i) {
    desk.benches.push_back(Bench<A>::take(m, dim, value_dim));
    desk.codes.push_back(CodeBench<A>::take(room, m, dim, wide));
    desk.weights.push_back(Weights<A>::take(m, kBlock));
    desk.results.push_back(Softmax::take(m, value_dim));
  }
  for (int64_t i = 0; i < sheets; ++i) desk.sheets.push_back(Sheet::take(room, m, n, value_dim));
  (split ? attend_chunks<T> : attend_parts<T>)(mixed, desk);
  room.release_beyond(kMostKept);
  return true;
}

}  // namespace

extern "C" {

// 0, or 1 where there is not enough memory.
int refreshkv_attend_mixed(const Mixed* mixed) {
  if (mixed->job.kind == 0) return !attend<bfloat16>(*mixed);
  return mixed->job.kind == 1 ? !attend<float16>(*mixed) : !attend<float>(*mixed);
}
}
