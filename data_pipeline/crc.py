"""The CRC-32 of a whole from the CRC-32 of its pieces: crc(ab) = crc(a) x^(8 |b|) + crc(b) modulo the CRC's polynomial."""

import numpy as np
import numpy.typing as npt

Uint32s = npt.NDArray[np.uint32]


def combine_crcs(crcs: Uint32s, lengths: npt.NDArray[np.int64], group: int) -> Uint32s:
    """CRC-32 of every `group` neighbouring pieces joined, from the CRC-32 and byte length of each piece; the last may be fewer."""
    shift = _power_of_x(lengths)
    joined = crcs[::group].copy()
    for i in range(1, group):
        piece = crcs[i::group]
        joined[: len(piece)] = _multiply(joined[: len(piece)], shift[i::group]) ^ piece
    return joined


def _multiply(a: Uint32s, b: Uint32s) -> Uint32s:
    """Product of polynomials over GF(2) modulo the CRC-32 polynomial; bit 31 is x^0, as in zlib."""
    product = np.zeros_like(a)
    b = b.copy()
    for bit in range(31, -1, -1):
        product ^= np.where((a >> np.uint32(bit)) & np.uint32(1), b, np.uint32(0))
        b = np.where(b & np.uint32(1), (b >> np.uint32(1)) ^ np.uint32(0xEDB88320), b >> np.uint32(1))
    return product


def _power_of_x(lengths: npt.NDArray[np.int64]) -> Uint32s:
    """x^(8 length) modulo the CRC-32 polynomial, by square and multiply."""
    power = np.full(len(lengths), 1 << 31, dtype=np.uint32)
    square = np.full(1, 1 << 23, dtype=np.uint32)  # x^8
    for bit in range(int(lengths.max(initial=0)).bit_length()):
        power = np.where((lengths >> bit) & 1, _multiply(power, np.broadcast_to(square, power.shape)), power)
        square = _multiply(square, square)
    return power
