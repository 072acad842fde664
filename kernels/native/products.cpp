#include "products.h"

#include "amx.h"

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

namespace unlearn_native {
namespace {

namespace cpublas = at::native::cpublas;

// Half a core's L2 on the machines that have tile products (2 MiB): what a thread's first operand may take.
constexpr int64_t kTileBytes = 1 << 20;
// Rows of a copied operand are this much longer than they need: strides of powers of two would share a few cache sets.
constexpr int64_t kSkew = 32;

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

int64_t round_up(int64_t count, int64_t step) {
  return ceil_div(count, step) * step;
}

// Pieces of the scratch, each at a multiple of 64 bytes.
class Arena {
 public:
  Arena(void* data, int64_t bytes) : next_(static_cast<char*>(data)), end_(next_ + bytes) {
    next_ += -reinterpret_cast<intptr_t>(next_) & 63;
  }

  template <typename T>
  T* take(int64_t count) {
    T* const piece = reinterpret_cast<T*>(next_);
    next_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    TORCH_INTERNAL_ASSERT(next_ <= end_, "the native kernels' scratch is too small");
    return piece;
  }

 private:
  char* next_;
  char* end_;
};

// fn(thread, begin, end) on contiguous shares of [0, count): the same for a given number of threads, so that sums are.
template <typename Function>
void on_threads(int64_t threads, int64_t count, const Function& fn) {
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; ++thread) {
      fn(thread, thread * count / threads, (thread + 1) * count / threads);
    }
    if (has_amx()) {
      amx_release();
    }
    cpublas::brgemm_release();
  });
}

// Copies rows, reading ahead: hardware prefetchers stop at the end of a page, and a row of a weight is about one.
void copy_rows(
    const bf16_bits* from, int64_t from_stride, int64_t count, int64_t width, int64_t padded, bf16_bits* to,
    int64_t to_stride) {
  constexpr int64_t kLine = 32, kAhead = 4;  // elements of a cache line; rows
  for (int64_t i = 0; i < count; ++i) {
    const bf16_bits* const row = from + i * from_stride;
    bf16_bits* const out = to + i * to_stride;
    if (i + kAhead < count) {
      const bf16_bits* const later = row + kAhead * from_stride;
      for (int64_t k = 0; k < width; k += kLine) {
        __builtin_prefetch(later + k, 0, 2);
      }
    }
    std::memcpy(out, row, width * sizeof(bf16_bits));
    std::fill(out + width, out + padded, bf16_bits{0});
  }
}

// c [m, n] (+)= a [m, k] b, all multiples of 32, b in panels (amx.h).
void product(
    int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldc, bool add, const bf16_bits* a, const bf16_bits* b,
    float* c) {
  if (has_amx()) {
    amx_product(m, n, k, lda, ldc, add, a, b, c);
    return;
  }
  for (int64_t column = 0; column < n; column += kPanel) {
    cpublas::brgemm(
        m, kPanel, k, lda, kPanel, ldc, add, reinterpret_cast<const at::BFloat16*>(a),
        reinterpret_cast<const at::BFloat16*>(b + column * k), c + column, true);
  }
}

// -- tiles of logits -----------------------------------------------------------------------------------------------

// Products of a block of 64 tokens with some rows of the weight, for all of both; thread by thread through the
// vocabulary.
struct TileSizes {
  int64_t blocks, depth, tile_v, threads, packed, weights, tile, low_rank, low_rank_b, rows;

  TileSizes(int64_t num_rows, int64_t width, int64_t rank)
      : blocks(ceil_div(num_rows, kBlockT)),
        depth(round_up(width, 32)),
        tile_v(std::clamp<int64_t>(kTileBytes / (2 * depth) / 32 * 32, 32, 256)),
        threads(at::get_num_threads()),
        packed(blocks * kBlockT * depth),
        weights(tile_v * (depth + kSkew)),
        tile(tile_v * kBlockT),
        low_rank(blocks * kBlockT * rank),
        low_rank_b(tile_v * rank),
        rows(blocks * kBlockT) {}

  int64_t bytes() const {
    const int64_t own = 2 * weights + 4 * tile + 4 * low_rank_b + 64 * 3;
    return 2 * packed + 4 * low_rank + 64 * 3 + threads * own;
  }
};

// use(thread, tile, first, num_v, t, count): the products [num_v, 64] of the weight's rows from `first` on with `count`
// tokens from t on. A thread sees its share of the vocabulary in order.
template <typename Use>
void for_each_tile(
    const TileSizes& size, const Matrix& hidden, const Matrix& weight, const LowRank& low_rank, Arena& arena,
    const Use& use) {
  const int64_t num_rows = hidden.rows, width = hidden.columns, vocab = weight.rows, rank = low_rank.rank;
  const Lanes& lane = lanes();
  const int64_t block_elements = kBlockT * size.depth;
  bf16_bits* const packed = arena.take<bf16_bits>(size.packed);
  float* const inner = arena.take<float>(size.low_rank);  // [block][rank][64]
  at::parallel_for(0, size.blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kBlockT, count = std::min(kBlockT, num_rows - first);
      lane.pack_tokens(
          hidden.data + first * hidden.stride, hidden.stride, count, width, packed + block * block_elements);
      for (int64_t i = 0; i < rank * kBlockT; ++i) {
        const int64_t r = i / kBlockT, t = i % kBlockT;
        inner[block * rank * kBlockT + i] = t < count ? low_rank.hidden[(first + t) * rank + r] : 0.0f;
      }
    }
  });
  std::vector<bf16_bits*> weights(size.threads);
  std::vector<float*> tiles(size.threads), low_rank_b(size.threads);
  for (int64_t thread = 0; thread < size.threads; ++thread) {
    weights[thread] = arena.take<bf16_bits>(size.weights);
    tiles[thread] = arena.take<float>(size.tile);
    low_rank_b[thread] = arena.take<float>(size.low_rank_b);
  }
  on_threads(size.threads, ceil_div(vocab, size.tile_v), [&](int64_t thread, int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t first = index * size.tile_v, num_v = std::min(size.tile_v, vocab - first);
      const int64_t stride = size.depth + kSkew;
      copy_rows(
          weight.data + first * weight.stride, weight.stride, num_v, width, size.depth, weights[thread], stride);
      for (int64_t v = 0; v < num_v && rank > 0; ++v) {
        float* const to = low_rank_b[thread] + v * rank;
        const int64_t at = (first + v) * low_rank.b_stride;
        if (low_rank.b_float != nullptr) {
          std::memcpy(to, low_rank.b_float + at, rank * sizeof(float));
        } else {
          lane.combine(low_rank.b_bf16 + at, 1.0f, nullptr, 0.0f, false, rank, to);
        }
      }
      float* const tile = tiles[thread];
      for (int64_t block = 0; block < size.blocks; ++block) {
        const int64_t t = block * kBlockT;
        product(
            round_up(num_v, 32), kBlockT, size.depth, stride, kBlockT, false, weights[thread],
            packed + block * block_elements, tile);
        if (rank > 0) {
          cpublas::brgemm(
              num_v, kBlockT, rank, rank, kBlockT, kBlockT, true, low_rank_b[thread], inner + block * rank * kBlockT,
              tile);
        }
        use(thread, tile, first, num_v, t, std::min(kBlockT, num_rows - t));
      }
    }
  });
}

// Targets as the lanes compare them, -1 (no column) beyond the last token and for one that 32 bits do not hold.
void fill_targets(const int64_t* target, int64_t num_rows, int64_t padded, int32_t* out) {
  for (int64_t t = 0; t < padded; ++t) {
    const bool is_column = t < num_rows && target[t] >= 0 && target[t] <= std::numeric_limits<int32_t>::max();
    out[t] = is_column ? static_cast<int32_t>(target[t]) : -1;
  }
}

}  // namespace

bool serves_bf16() {
  return cpublas::could_pack(at::kBFloat16);
}

// -- exp_sums ----------------------------------------------------------------------------------------------------------

int64_t exp_sums_bytes(int64_t num_rows, int64_t width, int64_t rank) {
  const TileSizes size(num_rows, width, rank);
  return size.bytes() + size.rows * (8 + 8 * size.threads) + 64 * (2 + size.threads);
}

void exp_sums(
    Matrix hidden, Matrix weight, const Head& head, LowRank low_rank, const int64_t* target, const float* offset,
    float* sums, bf16_bits* e, int64_t e_stride, void* scratch, int64_t scratch_bytes) {
  const int64_t num_rows = hidden.rows;
  const TileSizes size(num_rows, hidden.columns, low_rank.rank);
  const Lanes& lane = lanes();
  Arena arena(scratch, scratch_bytes);
  float* const offsets = arena.take<float>(size.rows);
  int32_t* const targets = arena.take<int32_t>(size.rows);
  std::fill(std::copy(offset, offset + num_rows, offsets), offsets + size.rows, 0.0f);
  fill_targets(target, num_rows, size.rows, targets);
  std::vector<double*> partial(size.threads);
  for (double*& part : partial) {
    part = arena.take<double>(size.rows);
    std::fill(part, part + size.rows, 0.0);
  }
  for_each_tile(
      size, hidden, weight, low_rank, arena,
      [&](int64_t thread, float* tile, int64_t first, int64_t num_v, int64_t t, int64_t count) {
        lane.exp_tile(
            tile, first, num_v, count, head, offsets + t, targets + t, partial[thread] + t,
            e == nullptr ? nullptr : e + t * e_stride + first, e_stride);
      });
  for (int64_t t = 0; t < num_rows; ++t) {
    double sum = 0.0;
    for (const double* part : partial) {
      sum += part[t];
    }
    sums[t] = static_cast<float>(sum);
  }
}

// -- token_stats -------------------------------------------------------------------------------------------------------

int64_t token_stats_bytes(int64_t num_rows, int64_t width, int64_t rank) {
  const TileSizes size(num_rows, width, rank);
  const int64_t states = size.blocks * static_cast<int64_t>(sizeof(Moments));
  return size.bytes() + 4 * size.rows + size.threads * states + 64 * (1 + size.threads);
}

void token_stats(
    Matrix hidden, Matrix weight, const Head& head, LowRank low_rank, const int64_t* target, double* out,
    int64_t out_stride, void* scratch, int64_t scratch_bytes) {
  const int64_t num_rows = hidden.rows;
  const TileSizes size(num_rows, hidden.columns, low_rank.rank);
  const Lanes& lane = lanes();
  Arena arena(scratch, scratch_bytes);
  int32_t* const targets = arena.take<int32_t>(size.rows);
  fill_targets(target, num_rows, size.rows, targets);
  std::vector<Moments*> states(size.threads);
  for (Moments*& state : states) {
    state = arena.take<Moments>(size.blocks);
    std::for_each(state, state + size.blocks, [](Moments& each) { each.clear(); });
  }
  for_each_tile(
      size, hidden, weight, low_rank, arena,
      [&](int64_t thread, float* tile, int64_t first, int64_t num_v, int64_t t, int64_t count) {
        lane.stats_tile(tile, first, num_v, count, head, targets + t, states[thread][t / kBlockT]);
      });
  for (int64_t block = 0; block < size.blocks; ++block) {
    Moments& sum = states[0][block];
    for (int64_t thread = 1; thread < size.threads; ++thread) {
      lane.merge_moments(sum, states[thread][block]);
    }
    for (int64_t t = 0; t < kBlockT && block * kBlockT + t < num_rows; ++t) {
      double* const at = out + block * kBlockT + t;
      at[0] = sum.target[t];
      at[out_stride] = sum.argmax[t];
      at[2 * out_stride] = sum.base[t] + std::log(static_cast<double>(sum.mass[t]));
      at[3 * out_stride] = static_cast<double>(sum.base[t]) + sum.mean[t];
      at[4 * out_stride] = sum.variance[t];
    }
  }
}

// -- logits and KL -----------------------------------------------------------------------------------------------------

int64_t logits_bytes(int64_t num_rows, int64_t width, int64_t rank) {
  return TileSizes(num_rows, width, rank).bytes();
}

void logits(
    Matrix hidden, Matrix weight, const Head& head, LowRank low_rank, float* out, int64_t out_stride, void* scratch,
    int64_t scratch_bytes) {
  Arena arena(scratch, scratch_bytes);
  for_each_tile(
      TileSizes(hidden.rows, hidden.columns, low_rank.rank), hidden, weight, low_rank, arena,
      [&](int64_t, float* tile, int64_t first, int64_t num_v, int64_t t, int64_t count) {
        lanes().logit_rows(tile, first, num_v, count, head, out + t * out_stride + first, out_stride);
      });
}

// -- row_grad ----------------------------------------------------------------------------------------------------------

namespace {

constexpr int64_t kRowBlock = 256;     // tokens
constexpr int64_t kDepthBlock = 512;   // vocabulary columns of one product
constexpr int64_t kWidthBlock = 1024;

struct RowGradSizes {
  int64_t threads, across = 1, down, width_block, stride, sums, packed, rows;

  RowGradSizes(int64_t num_rows, int64_t width) : threads(at::get_num_threads()) {
    // Threads that share the width pack a part of the matrix each and copy all of E; those that share the tokens the
    // other way round. Packing takes twice as long as copying.
    int64_t least = std::numeric_limits<int64_t>::max();
    for (int64_t parts = threads; parts > 0; --parts) {
      const int64_t cost = num_rows * parts / threads + 2 * width / parts;
      if (threads % parts == 0 && (parts == 1 || width / parts >= 128) && cost < least) {
        across = parts;
        least = cost;
      }
    }
    down = threads / across;
    const int64_t share = ceil_div(width, across);
    width_block = round_up(ceil_div(share, ceil_div(share, kWidthBlock)), 32);
    stride = width_block + kSkew / 2;
    sums = round_up(num_rows, 32) * stride;
    packed = kDepthBlock * width_block;
    rows = kRowBlock * (kDepthBlock + kSkew);
  }

  int64_t bytes() const {
    return 4 * across * sums + threads * (2 * packed + 2 * rows) + 64 * (1 + across + 2 * threads);
  }
};

}  // namespace

int64_t row_grad_bytes(int64_t num_rows, int64_t width) {
  return RowGradSizes(num_rows, width).bytes();
}

template <typename out_t>
void row_grad(
    Matrix e, Matrix matrix, const int64_t* target, const float* target_coeff, const float* e_coeff, bool accumulate,
    out_t* out, int64_t out_stride, void* scratch, int64_t scratch_bytes) {
  const int64_t num_rows = e.rows, vocab = e.columns, width = matrix.columns;
  const RowGradSizes size(num_rows, width);
  const Lanes& lane = lanes();
  Arena arena(scratch, scratch_bytes);
  std::vector<float*> sums(size.across);
  std::vector<bf16_bits*> packed(size.threads), rows(size.threads);
  for (float*& block : sums) {
    block = arena.take<float>(size.sums);
  }
  for (int64_t thread = 0; thread < size.threads; ++thread) {
    packed[thread] = arena.take<bf16_bits>(size.packed);
    rows[thread] = arena.take<bf16_bits>(size.rows);
  }
  const int64_t width_blocks = ceil_div(width, size.width_block), row_blocks = ceil_div(num_rows, kRowBlock);
  on_threads(size.threads, size.threads, [&](int64_t thread, int64_t, int64_t) {
    const int64_t column = thread % size.across, line = thread / size.across;
    const int64_t first_width = column * width_blocks / size.across;
    const int64_t last_width = (column + 1) * width_blocks / size.across;
    const int64_t first_row = line * row_blocks / size.down, last_row = (line + 1) * row_blocks / size.down;
    float* const block_sums = sums[column];
    for (int64_t h_block = first_width; h_block < last_width; ++h_block) {
      const int64_t h = h_block * size.width_block, num_h = std::min(size.width_block, width - h);
      for (int64_t v = 0; v < vocab; v += kDepthBlock) {
        const int64_t num_v = std::min(kDepthBlock, vocab - v), depth = round_up(num_v, 32);
        lane.pack_rows(matrix.data + v * matrix.stride + h, matrix.stride, nullptr, num_v, num_h, packed[thread]);
        for (int64_t block = first_row; block < last_row; ++block) {
          const int64_t t = block * kRowBlock, count = std::min(kRowBlock, num_rows - t);
          const int64_t stride = kDepthBlock + kSkew;
          copy_rows(e.data + t * e.stride + v, e.stride, count, num_v, depth, rows[thread], stride);
          product(
              round_up(count, 32), round_up(num_h, 32), depth, stride, size.stride, v > 0, rows[thread], packed[thread],
              block_sums + t * size.stride);
        }
      }
      for (int64_t t = first_row * kRowBlock; t < std::min(last_row * kRowBlock, num_rows); ++t) {
        const bf16_bits* picked = nullptr;
        float coeff = 0.0f;
        if (target != nullptr) {
          picked = matrix.data + std::clamp<int64_t>(target[t], 0, vocab - 1) * matrix.stride + h;
          coeff = target_coeff[t];
        }
        const float* const of_row = block_sums + t * size.stride;
        if constexpr (std::is_same_v<out_t, float>) {
          lane.combine(picked, coeff, of_row, -e_coeff[t], accumulate, num_h, out + t * out_stride + h);
        } else {
          lane.combine_bf16(picked, coeff, of_row, -e_coeff[t], accumulate, num_h, out + t * out_stride + h);
        }
      }
    }
  });
}

// -- col_grad ----------------------------------------------------------------------------------------------------------

namespace {

constexpr int64_t kWidthTile = 4 * kBlockT;  // of sums that are written together: runs of 512 bytes of bf16

struct ColGradSizes {
  int64_t threads, depth, tile_v, width_blocks, packed, columns, tile;

  ColGradSizes(int64_t num_rows, int64_t width)
      : threads(at::get_num_threads()),
        depth(round_up(num_rows, 32)),
        tile_v(std::clamp<int64_t>(kTileBytes / (2 * depth) / 32 * 32, 32, 256)),
        width_blocks(ceil_div(width, kBlockT)),
        packed(width_blocks * kBlockT * depth),
        columns(tile_v * (depth + kSkew)),
        tile(tile_v * kWidthTile) {}

  int64_t bytes() const {
    return 2 * packed + threads * (2 * columns + 4 * tile) + 64 * (2 + 2 * threads);
  }
};

}  // namespace

int64_t col_grad_bytes(int64_t num_rows, int64_t width) {
  return ColGradSizes(num_rows, width).bytes();
}

template <typename out_t>
void col_grad(
    Matrix e, Matrix rows, const int64_t* target, const float* target_coeff, const float* e_coeff, bool accumulate,
    out_t* out, int64_t out_stride, void* scratch, int64_t scratch_bytes) {
  const int64_t num_rows = e.rows, vocab = e.columns, width = rows.columns;
  const ColGradSizes size(num_rows, width);
  const Lanes& lane = lanes();
  Arena arena(scratch, scratch_bytes);
  bf16_bits* const packed = arena.take<bf16_bits>(size.packed);  // [width block][depth / 2][64][2]
  std::vector<bf16_bits*> columns(size.threads);
  std::vector<float*> tiles(size.threads);
  for (int64_t thread = 0; thread < size.threads; ++thread) {
    columns[thread] = arena.take<bf16_bits>(size.columns);
    tiles[thread] = arena.take<float>(size.tile);
  }
  at::parallel_for(0, size.width_blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t h = block * kBlockT;
      lane.pack_rows(
          rows.data + h, rows.stride, e_coeff, num_rows, std::min(kBlockT, width - h),
          packed + block * kBlockT * size.depth);
    }
  });
  // rows by label, in row order within one: the target terms join a tile's sums before these are rounded, once
  std::vector<int64_t> order;
  if (target != nullptr) {
    order.resize(num_rows);
    std::iota(order.begin(), order.end(), int64_t{0});
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return target[a] < target[b]; });
  }
  const auto first_of = [&](int64_t label) {
    return std::lower_bound(
        order.begin(), order.end(), label, [&](int64_t t, int64_t wanted) { return target[t] < wanted; });
  };
  on_threads(size.threads, ceil_div(vocab, size.tile_v), [&](int64_t thread, int64_t begin, int64_t end) {
    const int64_t stride = size.depth + kSkew;
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * size.tile_v, num_v = std::min(size.tile_v, vocab - first);
      lane.transpose(e.data + first, e.stride, num_rows, num_v, columns[thread], stride);
      const auto from = first_of(first), to = first_of(first + num_v);
      for (int64_t h = 0; h < width; h += kWidthTile) {
        const int64_t num_h = std::min(kWidthTile, width - h);
        float* const sums = tiles[thread];
        product(
            round_up(num_v, 32), round_up(num_h, 32), size.depth, stride, kWidthTile, false, columns[thread],
            packed + h * size.depth, sums);
        for (auto row = from; row != to; ++row) {
          // the tile is subtracted as a whole
          lane.combine(
              rows.data + *row * rows.stride + h, -target_coeff[*row], nullptr, 0.0f, true, num_h,
              sums + (target[*row] - first) * kWidthTile);
        }
        for (int64_t v = 0; v < num_v; ++v) {
          out_t* const line = out + (first + v) * out_stride + h;
          if constexpr (std::is_same_v<out_t, float>) {
            lane.combine(nullptr, 0.0f, sums + v * kWidthTile, -1.0f, accumulate, num_h, line);
          } else {
            lane.combine_bf16(nullptr, 0.0f, sums + v * kWidthTile, -1.0f, accumulate, num_h, line);
          }
        }
      }
    }
  });
}

#define UNLEARN_INSTANTIATE(out_t)                                                                                    \
  template void row_grad<out_t>(                                                                                      \
      Matrix, Matrix, const int64_t*, const float*, const float*, bool, out_t*, int64_t, void*, int64_t);             \
  template void col_grad<out_t>(                                                                                      \
      Matrix, Matrix, const int64_t*, const float*, const float*, bool, out_t*, int64_t, void*, int64_t);
UNLEARN_INSTANTIATE(float)
UNLEARN_INSTANTIATE(bf16_bits)
#undef UNLEARN_INSTANTIATE

}  // namespace unlearn_native
