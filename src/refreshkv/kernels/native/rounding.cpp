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

// A float32 as bfloat16, subnormal ones as well, which the processor's own conversion takes for zero.
uint16_t rounded(float number) {
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  if (number != number) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
float as_float(uint16_t bits) {
  const uint32_t word = uint32_t{bits} << 16;
  float number;
  std::memcpy(&number, &word, sizeof number);
  return number;
}

// Low and step between the least and the greatest number.
struct Grid {
  uint16_t low, step;

  Grid(float least, float greatest, float most) : low(rounded(least)), step(rounded((greatest - least) / most)) {}
  float unit() const {
    const float number = as_float(step), least = std::numeric_limits<float>::min();
    return number < least ? least : number;
  }
};
// A number on it: to the nearest, ties to even; 0 for NaN.
inline Floats on_grid(Floats number, Floats low, Floats unit, float most) {
  Floats code = (number - low) / unit;
  code = code > 0.0f ? code : Floats{};
  code = code < most ? code : all(most);
  return (code + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23 leaves an integer
}

// Codes [summed, across] -> planes, tile by tile.
void pack_codes(const float* codes, int64_t summed, int64_t across, int64_t bits, uint16_t* planes) {
  for (int64_t row = 0; row < summed; row += 32)
    for (int64_t column = 0; column < across; column += kColumns, planes += bits * kPlane) {
      std::fill(planes, planes + bits * kPlane, uint16_t{0});
      for (int64_t r = 0; r < 32; ++r) {
        const float* from = codes + (row + r) * across + column;
        for (int64_t c = 0; c < kColumns; ++c) {
          const auto code = static_cast<uint32_t>(from[c]);
          for (int64_t bit = 0; bit < bits; ++bit)
            planes[bit * kPlane + 2 * c + r % 2] |= static_cast<uint16_t>(((code >> bit) & 1) << (r / 2));
        }
      }
    }
}

// What a thread works on: numbers of a block [kCoded, dim], codes of it in the order of their tiles.
struct CodingBench {
  alignas(64) float numbers[kCoded * kWidest], codes[kCoded * kWidest];
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

void code_keys(CodingBench& bench, int64_t dim, int64_t bits, const Coded& to) {
  const int64_t wide = padded(dim);
  const float most = static_cast<float>((1 << bits) - 1);
  for (int64_t d = 0; d < wide; ++d) {
    float least = kInfinity, greatest = -kInfinity;
    float column[kCoded];
    for (int64_t t = 0; t < kCoded; ++t) {
      const float x = column[t] = bench.numbers[t * wide + d];
      if (!bench.seen[t]) continue;
      least = x < least || x != x ? x : least;  // a NaN stays
      greatest = x > greatest || x != x ? x : greatest;
    }
    const Grid grid(least, greatest, most);
    if (d < dim) {
      to.key_grid[d] = grid.low;
      to.key_grid[dim + d] = grid.step;
    }
    float* codes = bench.codes + d * kCoded;
    for (int64_t t = 0; t < kCoded; t += kLanes) {
      store(codes + t, on_grid(load<Floats>(column + t), all(as_float(grid.low)), all(grid.unit()), most));
    }
    for (int64_t t = 0; t < kCoded; ++t)
      if (!bench.seen[t] || d >= dim) codes[t] = 0;
  }
  pack_codes(bench.codes, wide, kCoded, bits, to.keys);
}

void code_values(CodingBench& bench, int64_t dim, int64_t bits, const Coded& to) {
  const int64_t wide = padded(dim);
  const float most = static_cast<float>((1 << bits) - 1);
  for (int64_t t = 0; t < kCoded; ++t) {
    const float* row = bench.numbers + t * wide;
    float least = kInfinity, greatest = -kInfinity;
    for (int64_t d = 0; d < dim; ++d) {
      least = row[d] < least || row[d] != row[d] ? row[d] : least;
      greatest = row[d] > greatest || row[d] != row[d] ? row[d] : greatest;
    }
    const Grid grid(least, greatest, most);
    to.value_grid[t] = grid.low;
    to.value_grid[kCoded + t] = grid.step;
    float* codes = bench.codes + t * wide;
    for (int64_t d = 0; d < wide; d += kLanes)
      store(codes + d, on_grid(load<Floats>(row + d), all(as_float(grid.low)), all(grid.unit()), most));
    std::fill(codes + dim, codes + wide, 0.0f);
  }
  pack_codes(bench.codes, kCoded, wide, bits, to.values);
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
  code_keys(bench, job.dim, job.codes.bits, to);
  read_block<T>(values, bench.seen, job.value_dim, bench.numbers);
  code_values(bench, job.value_dim, job.codes.value_bits, to);
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
      const int64_t end = std::min({begin + most, job.end[row], copy.room()});
#pragma omp for schedule(dynamic, 4) nowait
      for (int64_t item = 0; item < std::max<int64_t>(0, end - first) * heads; ++item)
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
