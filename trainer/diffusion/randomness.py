"""Randomness as a function: the same (seed, purpose, index, stream) gives the same numbers on any machine layout.

A stateful generator ties a number to how many were drawn before it, hence to the batch, the rank and the number of workers.
Here a number is looked up instead: Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") maps

    key     = (seed low, seed high)
    counter = (block, index low, index high, purpose + 256 stream)        all words have 32 bits

to four words, so that element j of the example `index` is word j mod 4 of block j div 4. Training and sampling are therefore
the same on 1 or 64 workers, and nothing has to be saved to resume.

`index` is the position of an example in the run (training) or the number of an image (sampling), never the place of a stored
file: an image that comes back in the next epoch must meet fresh noise.

The arithmetic is int64 tensor arithmetic, on whatever device `index` is. Floating-point numbers are made in float64 from one word
each and rounded once to the asked dtype: float32 and float64 are the same stream, and the last-bit differences between the
logarithms and cosines of two devices or two vector widths are rounded away (all but about one float32 number in 1e8).
"""

import math
from enum import IntEnum

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MAX_STREAM = 1 << 24


class Purpose(IntEnum):
    """What a number is for. The values are part of every recorded result: add new ones, never renumber."""

    TRAIN_NOISE = 0  # epsilon of Algorithm 1
    TRAIN_LOGSNR = 1  # lambda of Algorithm 1
    TRAIN_DROP_CONDITION = 2  # whether Algorithm 1 drops the condition
    TRAIN_FLIP = 3  # horizontal flip
    DROPOUT = 4  # activations dropped inside a network; stream = layer
    SAMPLE_PRIOR = 5  # z_1 of Algorithm 2
    SAMPLE_STEP = 6  # noise of a transition of Algorithm 2; stream = step
    SAMPLE_LABEL = 7  # class of a generated image


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10: four counter words and two key words to four random words, all in int64 tensors of values below 2**32.

    The words may have different shapes that broadcast. int64 products wrap modulo 2**64, which keeps all 64 bits of a product
    of two 32-bit words; the published known answers hold this in the tests.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        # c1 and c3 keep the upper halves of their products: they only enter an exclusive or that is cut to 32 bits.
        c0, c1 = ((p1 >> 32) ^ c1 ^ k0) & _WORD, p1
        c2, c3 = ((p0 >> 32) ^ c3 ^ k1) & _WORD, p0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1 & _WORD, c2, c3 & _WORD


def bits(seed: int, purpose: Purpose, index: Tensor, shape: tuple[int, ...], stream: int = 0) -> Tensor:
    """Uniform 32-bit words as int64 in [0, 2**32): (B, *shape), on the device of `index`.

    Args:
        seed: 0 <= seed < 2**64.
        purpose: what the numbers are for; different purposes never share a number.
        index: (B,) int64, which examples.
        shape: shape of one example. Element j depends on j alone, so a longer example begins with the shorter one's numbers.
        stream: sub-stream of the purpose, 0 <= stream < 2**24 (the step of a sampler, the layer of dropout).

    Raises:
        ValueError: a seed or stream out of range, or an index that is not a vector of int64.
    """
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed is {seed}, but it must be a whole number from 0 to 2**64 - 1.")
    if not 0 <= stream < _MAX_STREAM:
        raise ValueError(f"stream is {stream}, but it must be a whole number from 0 to 2**24 - 1.")
    if index.ndim != 1 or index.dtype != torch.int64:
        raise ValueError(f"index has shape {tuple(index.shape)} and dtype {index.dtype}, but it must be a vector of int64.")
    count = math.prod(shape)
    block = torch.arange((count + 3) // 4, device=index.device)
    row = index[:, None]
    words = philox(
        (block, row & _WORD, (row >> 32) & _WORD, torch.full_like(block, int(purpose) + (stream << 8))),
        (seed & _WORD, seed >> 32),
    )
    return torch.stack(words, dim=-1).flatten(1)[:, :count].reshape(len(index), *shape)


def uniform(
    seed: int,
    purpose: Purpose,
    index: Tensor,
    shape: tuple[int, ...] = (),
    stream: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniform numbers in the open interval (0, 1): (B, *shape) in float32 or float64; arguments as for `bits`.

    A word k becomes (k + 1/2) / 2**32, which float64 holds exactly. The 128 largest would round to 1 in float32, where they
    become the largest float32 below 1.
    """
    _check_dtype(dtype)
    value = _unit(bits(seed, purpose, index, shape, stream)).to(dtype)
    return value if dtype == torch.float64 else value.clamp(max=1 - 2.0**-24)


def normal(
    seed: int,
    purpose: Purpose,
    index: Tensor,
    shape: tuple[int, ...] = (),
    stream: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal numbers: (B, *shape) in float32 or float64; arguments as for `bits`.

    Box-Muller in float64: words (k0, k1) give sqrt(-2 ln u0) (cos 2 pi u1, sin 2 pi u1). No number exceeds 6.77 in size, which
    cuts off a mass of 1.3e-11.
    """
    _check_dtype(dtype)
    count = math.prod(shape)
    pair = _unit(bits(seed, purpose, index, ((count + 1) // 2, 2), stream))
    radius = pair[..., 0].log().mul_(-2).sqrt_()
    angle = pair[..., 1] * (2 * math.pi)
    value = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)
    return value.flatten(1)[:, :count].reshape(len(index), *shape).to(dtype)


def integers(seed: int, purpose: Purpose, index: Tensor, high: int, shape: tuple[int, ...] = (), stream: int = 0) -> Tensor:
    """Whole numbers 0 .. high - 1: (B, *shape) int64; arguments as for `bits`. Probabilities differ from 1/high by below 2**-32.

    Raises:
        ValueError: high outside 1 .. 2**31.
    """
    if not 1 <= high <= 1 << 31:
        raise ValueError(f"high is {high}, but it must be a whole number from 1 to 2**31.")
    return (bits(seed, purpose, index, shape, stream) * high) >> 32


def mask_keys(seed: int, index: Tensor, streams: int) -> Tensor:
    """The two words that key `keep_mask` in each of the streams 0 .. streams - 1: (B, streams, 2) int32.

    All at once, because Philox is some hundred operations whatever it is asked for: on a GPU, a hundred launches for each layer.
    """
    stream, row = torch.arange(streams, device=index.device), index[:, None]
    counter = (torch.zeros_like(stream), row & _WORD, (row >> 32) & _WORD, int(Purpose.DROPOUT) + (stream << 8))
    return _signed(torch.stack(philox(counter, (seed & _WORD, seed >> 32))[:2], dim=-1))


def keep_mask(seed: int, index: Tensor, shape: tuple[int, ...], p: float, stream: int = 0, key: Tensor | None = None) -> Tensor:
    """Which activations dropout keeps, each with probability 1 - p: (B, *shape) bool. `stream` is the number of the layer.

    `key` (B, 2) is the stream's own of `mask_keys`, where that is there already.

    Dropout asks for a number per activation and layer, far more than the noise does, and needs far less of it. So Philox is
    called once per example and two of its words key a 32-bit integer hash of the element's number (the three-multiplication mixer
    of Wellons' hash-prospector, "triple32"): some fifteen int32 operations an element instead of the thirty of Philox on int64.
    The second word enters after the first multiplication, so that masks whose first words agree, or differ only in their low bits,
    are not copies or permutations of each other.

    Raises:
        ValueError: p outside [0, 1], or an argument that `bits` refuses.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p is {p}, but a dropout probability must be from 0 to 1.")
    key = _signed(bits(seed, Purpose.DROPOUT, index, (2,), stream)) if key is None else key
    x = torch.arange(math.prod(shape), dtype=torch.int32, device=index.device) ^ key[:, :1]
    x ^= (x >> 17) & 0x7FFF  # int32 shifts copy the sign; the masks make them logical
    x *= 0xED5AD4BB - (1 << 32)
    x ^= key[:, 1:]
    x ^= (x >> 11) & 0x1FFFFF
    x *= 0xAC4C1B51 - (1 << 32)
    x ^= (x >> 15) & 0x1FFFF
    x *= 0x31848BAB  # the mixer's last shift is left out: it only changes low bits, and the comparison looks at the high ones
    threshold = round((1 - p) * 2.0**32) - (1 << 31)
    return (x.long() < threshold if threshold == 1 << 31 else x < threshold).reshape(len(index), *shape)


def _unit(words: Tensor) -> Tensor:
    return words.double().add_(0.5).mul_(2.0**-32)


def _signed(words: Tensor) -> Tensor:
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype is {dtype}, but random numbers are made in float32 or float64.")
