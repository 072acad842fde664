// The C library maps a large block anew for each allocation and unmaps it when it is freed, so that each use pays for page
// faults: a third of a second per GiB and more on a virtual machine, as long as a product of 1024 rows with the head whose
// gradient it is. Training asks for the same sizes in every step: E, and the gradient that the optimizer has dropped.
#include "pool.h"

#include <c10/core/Allocator.h>
#include <c10/core/impl/alloc_cpu.h>

#include <algorithm>
#include <mutex>
#include <vector>

namespace unlearn_native {
namespace {

struct Block {
  void* data;
  size_t size;
};

// In use and kept together never exceed the most that was in use at a time.
class Pool {
 public:
  Block take(size_t size) {
    const std::lock_guard<std::mutex> guard(mutex_);
    auto best = kept_.end();
    for (auto block = kept_.begin(); block != kept_.end(); ++block) {
      const bool fits = block->size >= size && block->size / 2 <= size;
      best = fits && (best == kept_.end() || block->size < best->size) ? block : best;
    }
    Block block{nullptr, size};
    if (best != kept_.end()) {
      block = *best;
      kept_.erase(best);
      kept_bytes_ -= block.size;
    } else {
      most_ = std::max(most_, used_bytes_ + size);
      while (used_bytes_ + kept_bytes_ + size > most_) {  // the longest unused first
        drop(kept_.front());
        kept_.erase(kept_.begin());
      }
      block.data = c10::alloc_cpu(size);
    }
    used_bytes_ += block.size;
    report(block, 1);
    return block;
  }

  void give(Block block) {
    const std::lock_guard<std::mutex> guard(mutex_);
    used_bytes_ -= block.size;
    kept_bytes_ += block.size;
    kept_.push_back(block);
    report(block, -1);
  }

  int64_t release() {
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto released = static_cast<int64_t>(kept_bytes_);
    while (!kept_.empty()) {
      drop(kept_.back());
      kept_.pop_back();
    }
    most_ = used_bytes_;
    return released;
  }

 private:
  void drop(Block block) {
    kept_bytes_ -= block.size;
    c10::free_cpu(block.data);
  }

  // As torch's own allocator: a profiler sees what is in use.
  void report(Block block, int64_t sign) const {
    const auto size = sign * static_cast<int64_t>(block.size);
    c10::reportMemoryUsageToProfiler(block.data, size, used_bytes_, 0, c10::Device(c10::DeviceType::CPU));
  }

  std::mutex mutex_;
  std::vector<Block> kept_;
  size_t used_bytes_ = 0, kept_bytes_ = 0, most_ = 0;
};

// Never destroyed: a tensor may outlive every static object.
Pool& pool() {
  static Pool* const instance = new Pool;
  return *instance;
}

}  // namespace

at::Tensor pooled_empty(at::IntArrayRef size, at::ScalarType dtype) {
  size_t bytes = at::elementSize(dtype);
  for (const int64_t count : size) {
    TORCH_CHECK(count >= 0, "size is ", size, "; accepted: no negative numbers");
    bytes *= static_cast<size_t>(count);
  }
  const Block block = pool().take(std::max<size_t>(bytes, 64));
  return at::from_blob(block.data, size, [block](void*) { pool().give(block); }, at::dtype(dtype));
}

int64_t release_memory() {
  return pool().release();
}

}  // namespace unlearn_native
