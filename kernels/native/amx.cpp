// Compiled with AMX switched on where the compiler knows it (UNLEARN_AMX, CMakeLists.txt), else a refusal.
//
// A block of 32 x 32 results takes four tiles, its operands two each. 512 of the depth at a time: such a panel of b,
// 32 KiB, stays in the L1 cache while the rows of a stream past it from the L2, loaded with the hint that they are not
// wanted again: without it they push the panel out (a fifth slower). Over longer panels both operands come from the L2,
// and the tiles wait for it. The next panel is fetched into the L2 meanwhile (a tenth).
#include "amx.h"

#ifdef UNLEARN_AMX
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace unlearn_native {

#ifdef UNLEARN_AMX

namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

bool request_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kTileBf16 = 1u << 22, kTiles = 1u << 24;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kTileBf16) == 0 || (d & kTiles) == 0) {
    return false;
  }
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

constexpr int64_t kDepth = 512;

// Where the panel after this one begins; after the last, what follows b in memory: the next product's, or nothing of
// interest, which a prefetch may touch.
const bf16_bits* next_panel(int64_t n, int64_t k, int64_t first, int64_t column, const bf16_bits* b) {
  if (column + kPanel < n) {
    return b + (column + kPanel) * k + first * kPanel;
  }
  return first + kDepth < k ? b + (first + kDepth) * kPanel : b + n * k;
}

}  // namespace

bool has_amx() {
  static const bool answer = request_tiles();
  return answer;
}

void amx_product(
    int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldc, bool add, const bf16_bits* a, const bf16_bits* b,
    float* c) {
  static const TileConfig config;
  _tile_loadconfig(&config);
  const int64_t lines = m < 1024 ? 1024 / m : 1;  // of the next panel in each step of 32, until all of it is there
  for (int64_t first = 0; first < k; first += kDepth) {
    const int64_t depth = k - first < kDepth ? k - first : kDepth;
    for (int64_t column = 0; column < n; column += kPanel) {
      const bf16_bits* const panel = b + column * k + first * kPanel;
      const bf16_bits* ahead = next_panel(n, k, first, column, b);
      for (int64_t row = 0; row < m; row += 32) {
        const bf16_bits* const rows = a + row * lda + first;
        float* const out = c + row * ldc + column;
        if (first > 0 || add) {
          _tile_loadd(0, out, ldc * 4);
          _tile_loadd(1, out + 16, ldc * 4);
          _tile_loadd(2, out + 16 * ldc, ldc * 4);
          _tile_loadd(3, out + 16 * ldc + 16, ldc * 4);
        } else {
          _tile_zero(0);
          _tile_zero(1);
          _tile_zero(2);
          _tile_zero(3);
        }
        for (int64_t i = 0; i < depth; i += 32) {
          for (int64_t line = 0; line < lines; ++line, ahead += 32) {
            _mm_prefetch(ahead, _MM_HINT_T1);
          }
          _tile_loadd(6, panel + i * kPanel, 4 * kPanel);
          _tile_stream_loadd(4, rows + i, lda * 2);
          _tile_loadd(7, panel + i * kPanel + kPanel, 4 * kPanel);
          _tile_stream_loadd(5, rows + 16 * lda + i, lda * 2);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, out, ldc * 4);
        _tile_stored(1, out + 16, ldc * 4);
        _tile_stored(2, out + 16 * ldc, ldc * 4);
        _tile_stored(3, out + 16 * ldc + 16, ldc * 4);
      }
    }
  }
}

void amx_release() {
  _tile_release();
}

#else

bool has_amx() {
  return false;
}

void amx_product(
    int64_t, int64_t, int64_t, int64_t, int64_t, bool, const bf16_bits*, const bf16_bits*, float*) {
  __builtin_trap();  // has_amx() said no
}

void amx_release() {}

#endif

}  // namespace unlearn_native
