// Memory for a call, many arrays in one piece.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

namespace {

constexpr size_t kMostKept = size_t{256} << 20;  // bytes

// Memory that a thread takes again in its next call: fresh memory costs a page fault for every 4 KiB.
class Room {
 public:
  // False where there is not so much.
  bool reserve(size_t bytes) {
    used_ = 0;
    if (bytes <= size_) return true;
    release();
    const size_t whole = (bytes + 4095) / 4096 * 4096;
    data_ = static_cast<char*>(std::aligned_alloc(4096, whole));
    size_ = data_ ? whole : 0;
    return data_ != nullptr;
  }
  template <typename T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(data_ + used_);
    used_ += bytes_of<T>(count);
    return taken;
  }
  template <typename T>
  static size_t bytes_of(int64_t count) {
    return (count * sizeof(T) + 63) / 64 * 64;
  }
  void release_beyond(size_t bytes) {
    if (size_ > bytes) release();
  }
  ~Room() { release(); }

 private:
  void release() {
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
  }
  char* data_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

}  // namespace
