// Where entries lie: `Entries` of options.py. The one lookup that attention, `gather` and `insert` share.

#pragma once

#include <cstdint>

extern "C" {

// From one to the next, in bytes.
struct Strides {
  int64_t row, head, token;
};

// What entries.py fills in, field by field. Null: not given.
struct Entries {
  const char *keys, *values;  // [R, Hkv, L, D], or pages [N, Hkv, P, D]; their own strides, values or null
  const int32_t* blocks;      // [B, M] contiguous, or null
  const int32_t* positions;   // [listed, Hkv, n] contiguous, or null
  const int32_t* rows;        // [B], or null
  int64_t kept, kv_heads, size, pages, listed, count;  // R or N, Hkv, L or P, M (1 without pages), rows of a list, n
  Strides key, value;

  int64_t width() const { return size * pages; }
  // Where what is kept for a row lies among `among` such rows; -1 where it does not.
  int64_t kept_row(int64_t row, int64_t among) const {
    if (rows) row = rows[row];
    return row >= 0 && row < among ? row : -1;
  }
};
}

namespace {

// The entries of one row and KV head.
class Held {
 public:
  Held(const Entries& entries, int64_t row, int64_t head)
      : entries_(entries), row_(entries.blocks ? -1 : entries.kept_row(row, entries.kept)), head_(head),
        blocks_(entries.blocks ? entries.blocks + row * entries.pages : nullptr), listed_(nullptr),
        there_(entries.blocks || row_ >= 0) {
    if (!entries.positions) return;
    const int64_t of_list = entries.kept_row(row, entries.listed);
    if (of_list < 0) there_ = false;
    else listed_ = entries.positions + (of_list * entries.kv_heads + head) * entries.count;
  }

  bool there() const { return there_; }
  int64_t position(int64_t entry) const { return listed_ ? listed_[entry] : entry; }

  // Key and value at a position, `none` where there is none; the value `none` too where no values are given.
  void find(int64_t position, const char* none, const char*& key, const char*& value) const {
    key = value = none;
    if (!there_ || position < 0 || position >= entries_.width()) return;
    int64_t row = row_;
    if (blocks_) {
      const auto page = static_cast<uint32_t>(position) / static_cast<uint32_t>(entries_.size);
      row = blocks_[page];
      position -= page * entries_.size;
      if (row < 0 || row >= entries_.kept) return;
    }
    key = at(entries_.keys, entries_.key, row, position);
    if (entries_.values) value = at(entries_.values, entries_.value, row, position);
  }

 private:
  const char* at(const char* data, const Strides& strides, int64_t row, int64_t position) const {
    return data + row * strides.row + head_ * strides.head + position * strides.token;
  }

  const Entries& entries_;
  int64_t row_, head_;
  const int32_t *blocks_, *listed_;
  bool there_;
};

}  // namespace
