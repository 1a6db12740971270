"""Counter-based random numbers: a value depends on (seed, row, step, stream) and nothing else.

Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), in PyTorch's integer
arithmetic, on any device. `csrc/philox.h` is the same function for the kernels.
"""

import math

import torch

# Each kind of draw has a stream, the upper half of the counter's last word. The lower half numbers blocks of
# four words.
ACTION_STREAM, NOISE_STREAM, MEMBER_STREAM, BATCH_STREAM, NEXT_ACTION_STREAM, CRITIC_STREAM = range(6)

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def philox4x32(counter: Words, seed: int) -> Words:
    """Compute ten rounds on four 32-bit counter words, int64 tensors that broadcast; the seed is the key."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        # int64 overflows, but has the bits of the unsigned product once masked after the shift.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def random_words(
    rows: torch.Tensor, step: int | torch.Tensor, stream: int, count: int, seed: int
) -> torch.Tensor:
    """Return words in [0, 2^32), int64 [batch, count].

    Args:
        rows: int64 [batch], numbers of the rows.
        step: number of the step, for all rows or int64 [batch].
        stream: one of the streams above.
        count: number of words of each row.
        seed: unsigned 64 bits.
    """
    blocks = torch.arange((count + 3) // 4, device=rows.device)
    counter = (
        (rows & _MASK).unsqueeze(1),
        ((rows >> 32) & _MASK).unsqueeze(1),
        torch.as_tensor(step, device=rows.device).reshape(-1, 1),
        ((stream << 16) | blocks).unsqueeze(0),
    )
    words = torch.stack(torch.broadcast_tensors(*philox4x32(counter, seed)), dim=-1)
    return words.flatten(1)[:, :count]


def random_uniforms(
    rows: torch.Tensor,
    step: int | torch.Tensor,
    stream: int,
    count: int,
    seed: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return uniform numbers between 0 and 1 [batch, count]; see `random_words` for the arguments."""
    words = random_words(rows, step, stream, count, seed)
    # The upper 23 bits plus one half: every value is exact in float32, and none is 0 or 1.
    return ((words >> 9).to(dtype) + 0.5) * 2.0**-23


def random_normals(
    rows: torch.Tensor,
    step: int | torch.Tensor,
    stream: int,
    count: int,
    seed: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return standard normals [batch, count] by Box-Muller; see `random_words` for the arguments."""
    uniform = random_uniforms(rows, step, stream, (count + 1) // 2 * 2, seed, dtype)
    radius = torch.sqrt(-2.0 * torch.log(uniform[:, 0::2]))
    angle = (2.0 * math.pi) * uniform[:, 1::2]
    pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return pairs.flatten(1)[:, :count]


def random_choice(
    rows: torch.Tensor, step: int | torch.Tensor, stream: int, choices: int | torch.Tensor, seed: int
) -> torch.Tensor:
    """Return uniform indices in [0, choices), int64 [batch]; `choices` may differ by row, int64 [batch]."""
    return (random_words(rows, step, stream, 1, seed)[:, 0] * choices) >> 32


def random_subset(steps: torch.Tensor, stream: int, count: int, choices: int, seed: int) -> torch.Tensor:
    """Draw a subset of the numbers below `choices` for each step, every subset with the same probability.

    Source: selection sampling, Knuth, "The Art of Computer Programming", volume 2, 3.4.2, algorithm S.

    Args:
        steps: int64 [n], numbers of the steps.
        stream: one of the streams above.
        count: size of a subset, 1 to `choices`.
        choices: number of numbers to choose from.
        seed: unsigned 64 bits.

    Returns:
        int64 [n, count], ascending.
    """
    words = random_words(torch.zeros_like(steps), steps, stream, choices, seed)
    left, taken = torch.full_like(steps, count), []
    for number in range(choices):
        taken.append((words[:, number] * (choices - number)) >> 32 < left)
        left = left - taken[-1].to(left)
    # The numbers that are taken come first, in their order.
    return torch.stack(taken, 1).to(torch.int8).sort(dim=1, descending=True, stable=True).indices[:, :count]
