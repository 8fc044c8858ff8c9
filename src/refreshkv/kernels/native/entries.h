// Where entries lie: `Entries` of options.py. The one lookup that attention and rings share.

#pragma once

#include <cstdint>

extern "C" {

// From one to the next, in bytes.
struct Strides {
  int64_t row, head, token;
};

// What entries.py fills in, field by field.
struct Entries {
  const char *keys, *values;  // [R, Hkv, L, D], or pages [N, Hkv, P, D]; their own strides, values or null
  const int32_t* blocks;      // [B, M] contiguous
  const int32_t* positions;   // [listed, Hkv, n] contiguous
  const int32_t* rows;        // [B], or null
  int64_t kept, kv_heads, size;  // R or N, Hkv, L or P
  int64_t pages, listed, count;  // M or -1, rows of a list or -1, n
  Strides key, value;

  // Not whether there is an address: nothing has none.
  bool paged() const { return pages >= 0; }
  int64_t width() const { return paged() ? size * pages : size; }
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
      : entries_(entries), row_(entries.paged() ? -1 : entries.kept_row(row, entries.kept)), head_(head),
        blocks_(entries.paged() ? entries.blocks + row * entries.pages : nullptr), listed_(nullptr),
        there_(entries.paged() || row_ >= 0) {
    if (entries.listed < 0) return;
    const int64_t of_list = entries.kept_row(row, entries.listed);
    if (of_list < 0) there_ = false;
    else listed_ = entries.positions + (of_list * entries.kv_heads + head) * entries.count;
  }

  // Those of the same row and KV head at the positions of another list.
  Held(const Held& of, const int32_t* listed)
      : entries_(of.entries_), row_(of.row_), head_(of.head_), blocks_(of.blocks_), listed_(listed), there_(of.there_) {}

  bool there() const { return there_; }

  // Whether there are entries at all `n` positions from `first` on, which are within the width; without a list.
  bool whole(int64_t first, int64_t n) const {
    if (!there_ || !blocks_) return there_;
    for (int64_t page = first / entries_.size; page * entries_.size < first + n; ++page)
      if (blocks_[page] < 0 || blocks_[page] >= entries_.kept) return false;
    return true;
  }

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

  // The same of the `n` entries from `first` on, those that are visible (or null: all). Whether that is all of them.
  bool find(int64_t first, int64_t n, const uint8_t* visible, const char* none, const char** keys,
            const char** values) const {
    bool whole = true;
    if (blocks_ || listed_) {
      for (int64_t i = 0; i < n; ++i) {
        const int64_t position = listed_ ? listed_[first + i] : first + i;
        find(visible && !visible[i] ? -1 : position, none, keys[i], values[i]);
        whole &= keys[i] != none;
      }
      return whole;
    }
    const char* key = at(entries_.keys, entries_.key, row_, first);
    const char* value = entries_.values ? at(entries_.values, entries_.value, row_, first) : none;
    const int64_t next_value = entries_.values ? entries_.value.token : 0;
    for (int64_t i = 0; i < n; ++i) keys[i] = key + i * entries_.key.token;
    for (int64_t i = 0; i < n; ++i) values[i] = value + i * next_value;
    for (int64_t i = 0; visible && i < n; ++i)
      if (!visible[i]) {
        keys[i] = values[i] = none;
        whole = false;
      }
    return whole;
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
