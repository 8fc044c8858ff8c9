// Keys and values in a few bits on CPUs: `reference.encode`, bit for bit.

#include <omp.h>

#include "codes.h"

extern "C" {

// What mixed.py fills in, field by field.
struct Coding {
  Entries entries;
  Codes codes;
  const int64_t *first, *begin, *end;  // [B]
  const uint8_t* visible;              // [B, visible_count] by rows, or null
  int64_t kind, rows, most, dim, value_dim;
  int64_t visible_row, visible_count, threads;
};
}

namespace {

constexpr int64_t kWidest = 512;                // dims of a head
constexpr int64_t kFar = int64_t{1} << 40;      // beyond any block or position

// `kLanes` grids of as many dims, kept as `policy.rounding` keeps them.
struct Grids {
  Ints kept;
  Floats low, step;

  Grids(Floats from, Floats wanted, Ints broken) {
    const Floats reach = larger(wanted, (from < 0 ? -from : from) * (kQuarters / kFurthest));
    Ints steps = (((Ints)reach + (1 << (kStepShift - 1))) >> kStepShift) - kStepBase;
    broken |= ~(reach < kInfinity);
    steps = (broken | (steps < 0)) ? Ints{} : steps > kMostSteps ? Ints{} + kMostSteps : steps;
    step = step_of(steps);
    Floats quarters = from / step * kQuarters;
    quarters = quarters > -kFurthest ? quarters : all(-kFurthest);
    quarters = to_nearest(quarters < kFurthest ? quarters : all(kFurthest));
    quarters = broken ? all(-kFurthest - 1) : quarters;
    kept = (__builtin_convertvector(quarters, Ints) << kStepBits) | steps;
    low = low_of(kept, step);
  }
  // To the nearest, ties to even.
  static Floats to_nearest(Floats x) { return (x + 12582912.0f) - 12582912.0f; }  // 1.5 * 2^23 leaves an integer
  // Numbers on them; 0 for NaN.
  Floats codes_of(Floats numbers, float most) const {
    const Floats code = (numbers - low) / step;
    return to_nearest(code > 0.0f ? code < most ? code : all(most) : Floats{});
  }
};

// Codes -> planes, tile by tile; from one to the next along and across the summed dimension `along` and `beside`.
void pack_codes(const float* codes, int64_t summed, int64_t across, int64_t along, int64_t beside, int64_t bits,
                uint16_t* planes) {
  for (int64_t row = 0; row < summed; row += 32)
    for (int64_t column = 0; column < across; column += kColumns, planes += bits * kPlane) {
      std::fill(planes, planes + bits * kPlane, uint16_t{0});
      for (int64_t r = 0; r < 32; ++r) {
        const float* from = codes + (row + r) * along + column * beside;
        for (int64_t c = 0; c < kColumns; ++c) {
          const auto code = static_cast<uint32_t>(from[c * beside]);
          for (int64_t bit = 0; bit < bits; ++bit)
            planes[bit * kPlane + 2 * c + r % 2] |= static_cast<uint16_t>(((code >> bit) & 1) << (r / 2));
        }
      }
    }
}

// What a thread works on: numbers of a block [kCoded, dim], which become their codes.
struct CodingBench {
  alignas(64) float numbers[kCoded * kWidest];
  bool seen[kCoded];
};

// The rows of a block in float32, zeros for what is not seen and behind them.
template <typename T>
void read_block(const char* const* from, const bool* seen, int64_t dim, float* to) {
  for (int64_t t = 0; t < kCoded; ++t)
    for (int64_t d = 0; d < padded(dim); d += kLanes) {
      T some[kLanes] = {};
      if (seen[t]) std::copy_n(reinterpret_cast<const T*>(from[t]) + d, std::clamp<int64_t>(dim - d, 0, kLanes), some);
      store(to + t * padded(dim) + d, widened(some));
    }
}

// Numbers of a block become their codes, 0 for what is not seen and behind `dim`; the grids are kept.
void code_numbers(CodingBench& bench, int64_t dim, int64_t bits, uint16_t* grid) {
  const int64_t wide = padded(dim);
  const int64_t count = std::count(bench.seen, bench.seen + kCoded, true);
  for (int64_t d = 0; d < wide; d += kLanes) {
    const auto number = [&](int64_t t) { return load<Floats>(bench.numbers + t * wide + d); };
    Floats least = all(count ? kInfinity : 0), greatest = -least, sum{}, distance{};
    Ints broken{};
    for (int64_t t = 0; t < kCoded; ++t) {
      if (!bench.seen[t]) continue;
      const Floats x = number(t);
      least = x < least ? x : least;
      greatest = x > greatest ? x : greatest;
      sum += x;
      broken |= ~(x - x == 0.0f);
    }
    Floats step = (greatest - least) / static_cast<float>((1 << bits) - 1);
    if (bits == 1) {
      const auto among = static_cast<float>(std::max<int64_t>(count, 1));
      const Floats mean = sum / among;
      for (int64_t t = 0; t < kCoded; ++t) {
        const Floats off = number(t) - mean;
        if (bench.seen[t]) distance += off < 0 ? -off : off;
      }
      distance /= among;
      least = mean - distance;
      step = distance * 2;
    }
    const Grids grids(least, step, broken);
    for (int64_t lane = 0; lane < kLanes && d + lane < dim; ++lane)
      grid[d + lane] = static_cast<uint16_t>(grids.kept[lane]);
    for (int64_t t = 0; t < kCoded; ++t) {
      float* number = bench.numbers + t * wide + d;
      const Floats codes = grids.codes_of(load<Floats>(number), static_cast<float>((1 << bits) - 1));
      store(number, bench.seen[t] ? codes : Floats{});
      for (int64_t lane = std::max<int64_t>(0, dim - d); lane < kLanes; ++lane) number[lane] = 0;
    }
  }
}

template <typename T>
void code_block(const Coding& job, int64_t row, int64_t head, int64_t block, CodingBench& bench) {
  Coded to;
  if (!Copy(job.codes, job.entries, row, head).find(block, to)) return;
  const Held held(job.entries, row, head);
  const int64_t first = std::clamp(job.first[row], -kFar, kFar);
  const char *keys[kCoded], *values[kCoded];
  for (int64_t t = 0; t < kCoded; ++t) {
    const int64_t position = first + block * kCoded + t;
    held.find(position, kZeros, keys[t], values[t]);
    bench.seen[t] = keys[t] != kZeros;
    if (!bench.seen[t] || !job.visible) continue;
    bench.seen[t] = job.visible[row * job.visible_row + std::min(position, job.visible_count - 1)];
  }
  read_block<T>(keys, bench.seen, job.dim, bench.numbers);
  code_numbers(bench, job.dim, job.codes.bits, to.key_grid);
  const int64_t wide = padded(job.dim), value_wide = padded(job.value_dim);
  pack_codes(bench.numbers, wide, kCoded, 1, wide, job.codes.bits, to.keys);
  read_block<T>(values, bench.seen, job.value_dim, bench.numbers);
  code_numbers(bench, job.value_dim, job.codes.value_bits, to.value_grid);
  pack_codes(bench.numbers, kCoded, value_wide, value_wide, 1, job.codes.value_bits, to.values);
}

template <typename T>
void encode(const Coding& job) {
  const int64_t heads = job.entries.kv_heads, most = std::min(job.most, kFar);
#pragma omp parallel num_threads(static_cast<int>(job.threads))
  {
    static thread_local CodingBench bench;
    for (int64_t row = 0; row < job.rows; ++row) {
      const Copy copy(job.codes, job.entries, row, 0);
      const int64_t begin = std::clamp(job.begin[row], -kFar, kFar);
      const int64_t first = std::max<int64_t>(0, begin);
      const int64_t end = std::max(first, std::min({begin + most, job.end[row], copy.room()}));
#pragma omp for schedule(dynamic, 4) nowait
      for (int64_t item = 0; item < (end - first) * heads; ++item)
        code_block<T>(job, row, item % heads, first + item / heads, bench);
    }
  }
}

}  // namespace

extern "C" {

void refreshkv_encode(const Coding* job) {
  if (job->kind == 0) encode<bfloat16>(*job);
  else if (job->kind == 1) encode<float16>(*job);
  else encode<float>(*job);
}
}
