#include "crc32c.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#elif defined(__aarch64__)
#include <arm_acle.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#endif

namespace llamahome {
namespace {

constexpr std::uint32_t kPolynomial = 0x82F63B78;  // Castagnoli, bits reflected

using Table = std::array<std::uint32_t, 256>;

// kSlices[k][b]: the register after byte b and k zero bytes ("slicing by 8").
constexpr std::array<Table, 8> make_slices() {
  std::array<Table, 8> slices{};
  for (std::uint32_t byte = 0; byte < 256; ++byte) {
    std::uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? kPolynomial : 0);
    slices[0][byte] = crc;
  }
  for (std::size_t k = 1; k < 8; ++k)
    for (std::size_t byte = 0; byte < 256; ++byte)
      slices[k][byte] = (slices[k - 1][byte] >> 8) ^ slices[0][slices[k - 1][byte] & 0xFF];
  return slices;
}
constexpr std::array<Table, 8> kSlices = make_slices();

std::uint64_t load64(const unsigned char* p) noexcept {
  std::uint64_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

#if defined(__x86_64__) || defined(__aarch64__)
#define LLAMAHOME_CRC_INSTRUCTION 1

#if defined(__x86_64__)
#define LLAMAHOME_CRC_TARGET __attribute__((target("sse4.2")))
#define LLAMAHOME_CRC64(crc, word) static_cast<std::uint32_t>(_mm_crc32_u64((crc), (word)))
#define LLAMAHOME_CRC8(crc, byte) _mm_crc32_u8((crc), (byte))
bool has_instruction() noexcept { return __builtin_cpu_supports("sse4.2"); }
#else
#if defined(__clang__)
#define LLAMAHOME_CRC_TARGET __attribute__((target("crc")))
#else
#define LLAMAHOME_CRC_TARGET __attribute__((target("+crc")))
#endif
#define LLAMAHOME_CRC64(crc, word) __crc32cd((crc), (word))
#define LLAMAHOME_CRC8(crc, byte) __crc32cb((crc), (byte))
bool has_instruction() noexcept {
#if defined(__linux__)
  constexpr unsigned long kHwcapCrc32 = 1UL << 7;
  return (getauxval(AT_HWCAP) & kHwcapCrc32) != 0;
#else
  return true;  // every 64-bit Apple processor has it
#endif
}
#endif

// The instruction takes 3 cycles and one can start each cycle, so three lanes run side by side. 3 x 1360 bytes fill a
// 4096-byte block of a token file but for 16 bytes.
constexpr std::size_t kLane = 1360;

// kShift[k][b]: what byte k of the register, of value b, becomes after kLane zero bytes.
constexpr std::array<Table, 4> make_shift() {
  std::array<Table, 4> shift{};
  for (std::size_t bit = 0; bit < 32; ++bit) {
    std::uint32_t crc = 1u << bit;
    for (std::size_t i = 0; i < kLane; ++i) crc = (crc >> 8) ^ kSlices[0][crc & 0xFF];
    for (std::size_t byte = 0; byte < 256; ++byte)
      if (byte >> (bit % 8) & 1) shift[bit / 8][byte] ^= crc;  // the register is linear over GF(2)
  }
  return shift;
}
constexpr std::array<Table, 4> kShift = make_shift();

std::uint32_t shift_lane(std::uint32_t crc) noexcept {
  return kShift[0][crc & 0xFF] ^ kShift[1][crc >> 8 & 0xFF] ^ kShift[2][crc >> 16 & 0xFF] ^ kShift[3][crc >> 24];
}

LLAMAHOME_CRC_TARGET std::uint32_t crc32c_instruction(const unsigned char* p, std::size_t size,
                                                      std::uint32_t crc) noexcept {
  crc = ~crc;
  for (; size >= 3 * kLane; p += 3 * kLane, size -= 3 * kLane) {
    std::uint32_t second = 0, third = 0;
    for (std::size_t i = 0; i < kLane; i += 8) {
      crc = LLAMAHOME_CRC64(crc, load64(p + i));
      second = LLAMAHOME_CRC64(second, load64(p + kLane + i));
      third = LLAMAHOME_CRC64(third, load64(p + 2 * kLane + i));
    }
    crc = shift_lane(shift_lane(crc) ^ second) ^ third;
  }
  for (; size >= 8; p += 8, size -= 8) crc = LLAMAHOME_CRC64(crc, load64(p));
  for (; size > 0; ++p, --size) crc = LLAMAHOME_CRC8(crc, *p);
  return ~crc;
}
#endif

}  // namespace

std::uint32_t crc32c_portable(const void* data, std::size_t size, std::uint32_t crc) noexcept {
  const auto* p = static_cast<const unsigned char*>(data);
  crc = ~crc;
  for (; size >= 8; p += 8, size -= 8) {
    const std::uint64_t word = load64(p) ^ crc;  // little-endian hosts only, see token_file.h
    crc = 0;
    for (std::size_t k = 0; k < 8; ++k) crc ^= kSlices[7 - k][word >> (8 * k) & 0xFF];
  }
  for (; size > 0; ++p, --size) crc = (crc >> 8) ^ kSlices[0][(crc ^ *p) & 0xFF];
  return ~crc;
}

std::uint32_t crc32c(const void* data, std::size_t size, std::uint32_t crc) noexcept {
#if defined(LLAMAHOME_CRC_INSTRUCTION)
  static const bool instruction = has_instruction();
  if (instruction) return crc32c_instruction(static_cast<const unsigned char*>(data), size, crc);
#endif
  return crc32c_portable(data, size, crc);
}

}  // namespace llamahome
