"""The rollout in Triton: one kernel takes tiles of rows through all steps, another closes the gaps.

With factors of 16 bits and narrow layers, a tile's activations stay in registers from layer to layer.
Otherwise they pass through a scratch of the program, small enough for the second-level cache. Networks of any
size work. A layer's columns are cut into blocks, the last of them 64, 32 or 16 wide, so that a width between
two powers of two costs less than the larger one. The mathematics is that of csrc/spec.h, the random numbers
are those of backends/philox.py.

This module cannot be imported without Triton. If TRITON_INTERPRET=1 is set before Triton is first imported,
the kernels are interpreted.
"""

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from mopo_fast import config
from mopo_fast.backends import philox

INTERPRETED: bool = triton.knobs.runtime.interpret

_ACTION_STREAM = tl.constexpr(philox.ACTION_STREAM)
_NOISE_STREAM = tl.constexpr(philox.NOISE_STREAM)
_MEMBER_STREAM = tl.constexpr(philox.MEMBER_STREAM)
_HARDWARE = tl.constexpr(not INTERPRETED)
_NORM_EPSILON = tl.constexpr(config.LAYER_NORM_EPSILON)
# Dimensions of an observation or an action that are processed at a time.
_DIMS = tl.constexpr(16)


@triton.jit
def _at(matrix, row, column, stride):
    return matrix + row[:, None] * stride + column[None, :]


@triton.jit
def _tanh(x):
    size = tl.abs(x)
    decay = tl.exp(-2.0 * size)
    square = size * size
    # 1 - decay cancels near zero; the error of the series is at most 1e-8.
    series = 0.13333333333333333 + square * (-0.05396825396825397 + square * 0.021869488536155203)
    small = size + size * square * (-0.3333333333333333 + square * series)
    result = tl.where(size < 0.25, small, (1.0 - decay) / (1.0 + decay))
    return tl.where(x < 0.0, -result, result)


@triton.jit
def _silu(x, OPERANDS: tl.constexpr):
    if _HARDWARE and (OPERANDS == "float16" or OPERANDS == "bfloat16") and cuda_capability_geq(7, 5):
        # One instruction instead of two. The relative error of its tanh is at most 2^-11, which adds less to
        # the predictions' error than the rounding to float16 does; test_kernel_triton.py checks that.
        half = 0.5 * x
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [half], dtype=tl.float32, is_pure=True, pack=1
        )
        x = half + half * tanh
    else:
        x = x / (1.0 + tl.exp(-x))
    return x


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr, OPERANDS: tl.constexpr):
    if ACTIVATION == "silu":
        x = _silu(x, OPERANDS)
    elif ACTIVATION == "relu":
        # tl.maximum would drop a NaN.
        x = tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "tanh":
        x = _tanh(x)
    return x


@triton.jit
def _factor(x, DTYPE: tl.constexpr, OPERANDS: tl.constexpr):
    """Round x to a factor of a product, as `ensemble.round_factor` does."""
    if OPERANDS == "tfloat32":
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x0FFF + ((bits >> 13) & 1)) & 0xFFFFE000
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)


@triton.jit
def _store_factor(pointers, x, mask, OPERANDS: tl.constexpr):
    tl.store(pointers, _factor(x, pointers.dtype.element_ty, OPERANDS), mask)


@triton.jit
def _uniform(word):
    return ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def _box_muller(a, b):
    radius = tl.sqrt_rn(-2.0 * tl.log(_uniform(a)))
    angle = 6.283185307179586 * _uniform(b)
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def random_words(number, step, STREAM: tl.constexpr, first, seed):
    """Draw words first .. first + 15 of each row as four [rows, 4]: words 0, 1, 2 and 3 of every block."""
    low, high = number.to(tl.uint32), (number >> 32).to(tl.uint32)
    block = (first // 4 + tl.arange(0, 4)).to(tl.uint32) + STREAM * 65536
    zero = tl.zeros([1, 4], tl.uint32)
    return tl.philox(seed, low[:, None] + zero, high[:, None] + zero, step, block[None, :])


@triton.jit
def _normals(number, step, STREAM: tl.constexpr, first, seed):
    """Draw standard normals first .. first + 15 of each row: [rows, 16]."""
    a, b, c, d = random_words(number, step, STREAM, first, seed)
    x0, x1 = _box_muller(a, b)
    x2, x3 = _box_muller(c, d)
    return tl.interleave(tl.interleave(x0, x2), tl.interleave(x1, x3))


@triton.constexpr_function
def _widths(size, widest):
    """Return the widths of the blocks that `size` columns are cut into."""
    rest = [width for width in (64, 32, 16) if size % widest & width]
    return [widest] * (size // widest) + rest


@triton.constexpr_function
def _blocks(size, widest):
    return len(_widths(size, widest))


@triton.constexpr_function
def _first(size, widest, block):
    return sum(_widths(size, widest)[:block])


@triton.constexpr_function
def _width(size, widest, block):
    return _widths(size, widest)[block]


@triton.constexpr_function
def _fits(sizes, held):
    """Tell whether activations stay in registers: equal hidden layers, and no layer wider than `held`."""
    return len(set(sizes[1:-1])) == 1 and max(sizes) <= held


@triton.constexpr_function
def _hidden_units(sizes):
    return sum(sizes[1:-1])


@triton.constexpr_function
def _integer(dtype):
    return tl.int16 if dtype.primitive_bitwidth == 16 else tl.int32


@triton.jit
def _bitcast(blocks, DTYPE: tl.constexpr):
    cast = ()
    for block in tl.static_range(len(blocks)):
        cast = cast + (blocks[block].to(DTYPE, bitcast=True),)
    return cast


@triton.jit
def _multiply(total, left, right, OPERANDS: tl.constexpr):
    return tl.dot(left, right, total, input_precision="tf32" if OPERANDS == "tfloat32" else "ieee")


@triton.jit
def _bias(bias, column, ROWS: tl.constexpr):
    return tl.broadcast_to(tl.load(bias + column)[None, :], [ROWS, column.shape[0]])


@triton.jit
def _load_blocks(matrix, stride, row, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Load rows of a matrix of SIZE columns as blocks of columns."""
    blocks = ()
    for block in tl.static_range(_blocks(SIZE, BLOCK)):
        column = _first(SIZE, BLOCK, block) + tl.arange(0, _width(SIZE, BLOCK, block))
        blocks = blocks + (tl.load(_at(matrix, row, column, stride)),)
    return blocks


@triton.jit
def _held_layer(
    x, weight, bias,
    K: tl.constexpr, N: tl.constexpr, ACTIVATION: tl.constexpr, OPERANDS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute activation(x @ weight + bias); the result and x are blocks of columns in registers."""
    # All loads come first, so that none waits for a product.
    rights = ()
    for k in tl.static_range(_blocks(K, BLOCK)):
        row = _first(K, BLOCK, k) + tl.arange(0, _width(K, BLOCK, k))
        rights = rights + (_load_blocks(weight, N, row, N, BLOCK),)
    blocks = ()
    for block in tl.static_range(_blocks(N, BLOCK)):
        column = _first(N, BLOCK, block) + tl.arange(0, _width(N, BLOCK, block))
        total = _bias(bias, column, ROWS)
        for k in tl.static_range(_blocks(K, BLOCK)):
            total = _multiply(total, x[k], rights[k][block], OPERANDS)
        if ACTIVATION != "linear":
            total = _factor(_activate(total, ACTIVATION, OPERANDS), weight.dtype.element_ty, OPERANDS)
        blocks = blocks + (total,)
    return blocks


@triton.jit
def _held_network(
    x, heads, weight, bias,
    SIZES: tl.constexpr, ACTIVATION: tl.constexpr, OPERANDS: tl.constexpr,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute `_network` with the activations in registers."""
    lane = tl.arange(0, ROWS)
    K: tl.constexpr = SIZES[0]
    N: tl.constexpr = SIZES[1]
    OUT: tl.constexpr = SIZES[len(SIZES) - 1]
    FACTOR: tl.constexpr = weight.dtype.element_ty
    BITS: tl.constexpr = _integer(FACTOR)
    x = _load_blocks(x, WIDTH, lane, K, BLOCK)
    x = _held_layer(x, weight, bias, K, N, ACTIVATION, OPERANDS, ROWS, BLOCK)
    weight += K * N
    bias += N
    # A loop lets Triton load a layer's weights during the layer before. It carries the activations as
    # integers: Triton multiplies from registers what the loop body computes, but not what the loop carries.
    carried = _bitcast(x, BITS)
    for _ in range(len(SIZES) - 3):
        x = _bitcast(carried, FACTOR)
        x = _held_layer(x, weight, bias, N, N, ACTIVATION, OPERANDS, ROWS, BLOCK)
        carried = _bitcast(x, BITS)
        weight += N * N
        bias += N
    x = _bitcast(carried, FACTOR)
    outputs = _held_layer(x, weight, bias, N, OUT, "linear", OPERANDS, ROWS, BLOCK)
    for block in tl.static_range(_blocks(OUT, BLOCK)):
        column = _first(OUT, BLOCK, block) + tl.arange(0, _width(OUT, BLOCK, block))
        tl.store(_at(heads, lane, column, HEADS), outputs[block])


@triton.jit
def _columns(
    x, x_stride, weight, bias, out, out_stride, first,
    K: tl.constexpr, N: tl.constexpr, ACTIVATION: tl.constexpr, OPERANDS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute out[:, first : first + COLUMNS] = activation(x @ weight + bias)."""
    lane = tl.arange(0, ROWS)
    column = first + tl.arange(0, COLUMNS)
    total = _bias(bias, column, ROWS)
    for k in range(0, K // BLOCK_K * BLOCK_K, BLOCK_K):
        row = k + tl.arange(0, BLOCK_K)
        left, right = tl.load(_at(x, lane, row, x_stride)), tl.load(_at(weight, row, column, N))
        total = _multiply(total, left, right, OPERANDS)
    for k in tl.static_range(K // BLOCK_K, _blocks(K, BLOCK_K)):
        row = _first(K, BLOCK_K, k) + tl.arange(0, _width(K, BLOCK_K, k))
        left, right = tl.load(_at(x, lane, row, x_stride)), tl.load(_at(weight, row, column, N))
        total = _multiply(total, left, right, OPERANDS)
    pointers = _at(out, lane, column, out_stride)
    if ACTIVATION == "linear":
        tl.store(pointers, total)
    else:
        _store_factor(pointers, _activate(total, ACTIVATION, OPERANDS), None, OPERANDS)


@triton.jit
def _layer(
    x, x_stride, weight, bias, out, out_stride,
    K: tl.constexpr, N: tl.constexpr, ACTIVATION: tl.constexpr, OPERANDS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute out = activation(x @ weight + bias) for a tile."""
    for first in range(0, N // BLOCK_N * BLOCK_N, BLOCK_N):
        _columns(x, x_stride, weight, bias, out, out_stride, first,
                 K, N, ACTIVATION, OPERANDS, ROWS, BLOCK_N, BLOCK_K)  # fmt: skip
    for block in tl.static_range(N // BLOCK_N, _blocks(N, BLOCK_N)):
        _columns(x, x_stride, weight, bias, out, out_stride, _first(N, BLOCK_N, block),
                 K, N, ACTIVATION, OPERANDS, ROWS, _width(N, BLOCK_N, block), BLOCK_K)  # fmt: skip
    # Threads read next what other threads have written.
    tl.debug_barrier()


@triton.jit
def _normalise(
    raw, out, stride, scale, shift,
    COUNT: tl.constexpr, N: tl.constexpr, ACTIVATION: tl.constexpr, OPERANDS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Compute out = activation(layer norm of raw) for a tile; COUNT of the N columns are no padding."""
    lane = tl.arange(0, ROWS)
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, N, _DIMS):
        column = first + tl.arange(0, _DIMS)
        total += tl.sum(tl.load(_at(raw, lane, column, stride), (column < COUNT)[None, :], 0.0), axis=1)
    mean = (total / COUNT)[:, None]
    squares = tl.zeros([ROWS], tl.float32)
    for first in range(0, N, _DIMS):
        column = first + tl.arange(0, _DIMS)
        inside = (column < COUNT)[None, :]
        distance = tl.where(inside, tl.load(_at(raw, lane, column, stride), inside, 0.0) - mean, 0.0)
        squares += tl.sum(distance * distance, axis=1)
    inverse_std = (1.0 / tl.sqrt_rn(squares / COUNT + _NORM_EPSILON))[:, None]
    for first in range(0, N, _DIMS):
        column = first + tl.arange(0, _DIMS)
        inside = (column < COUNT)[None, :]
        x = (tl.load(_at(raw, lane, column, stride), inside, 0.0) - mean) * inverse_std
        # Scale and shift are zeros in the padding, and so is the activation.
        x = tl.where(inside, x, 0.0) * tl.load(scale + column)[None, :] + tl.load(shift + column)[None, :]
        _store_factor(_at(out, lane, column, stride), _activate(x, ACTIVATION, OPERANDS), None, OPERANDS)
    # Threads read next what other threads have written.
    tl.debug_barrier()


@triton.jit
def _network(
    x, here, there, heads, weight, bias, raw, scale, shift,
    NORM_SIZES: tl.constexpr,
    SIZES: tl.constexpr, ACTIVATION: tl.constexpr, OPERANDS: tl.constexpr, WIDTH: tl.constexpr,
    HEADS: tl.constexpr, HELD: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute a perceptron's outputs, heads [ROWS, HEADS], for a tile x [ROWS, WIDTH].

    `here` and `there` are scratch for the activations; x may be `there`. NORM_SIZES are the hidden layers'
    sizes without padding where they have layer norms, else None; `raw` is scratch for their inputs.
    """
    if NORM_SIZES is None and _fits(SIZES, HELD):
        _held_network(x, heads, weight, bias, SIZES, ACTIVATION, OPERANDS, WIDTH, HEADS, ROWS, BLOCK_K)
    else:
        for layer in tl.static_range(len(SIZES) - 2):
            if NORM_SIZES is None:
                _layer(x, WIDTH, weight, bias, here, WIDTH, SIZES[layer], SIZES[layer + 1],
                       ACTIVATION, OPERANDS, ROWS, BLOCK_N, BLOCK_K)  # fmt: skip
            else:
                _layer(x, WIDTH, weight, bias, raw, WIDTH, SIZES[layer], SIZES[layer + 1],
                       "linear", OPERANDS, ROWS, BLOCK_N, BLOCK_K)  # fmt: skip
                _normalise(raw, here, WIDTH, scale, shift,
                           NORM_SIZES[layer], SIZES[layer + 1], ACTIVATION, OPERANDS, ROWS)  # fmt: skip
                scale += SIZES[layer + 1]
                shift += SIZES[layer + 1]
            weight += SIZES[layer] * SIZES[layer + 1]
            bias += SIZES[layer + 1]
            x = here
            here = there
            there = x
        _layer(x, WIDTH, weight, bias, heads, HEADS, SIZES[len(SIZES) - 2], SIZES[len(SIZES) - 1],
               "linear", OPERANDS, ROWS, BLOCK_N, BLOCK_K)  # fmt: skip
    # Threads read next what other threads have written.
    tl.debug_barrier()


@triton.jit
def _observe(
    state, inputs, policy_inputs, input_mean, input_std,
    POLICY: tl.constexpr, OBS: tl.constexpr, OPERANDS: tl.constexpr, WIDTH: tl.constexpr,
    HEADS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Copy observations to the policy's inputs, and standardised to the dynamics' inputs."""
    lane = tl.arange(0, ROWS)
    for first in range(0, OBS, _DIMS):
        column = first + tl.arange(0, _DIMS)
        inside = column < OBS
        x = tl.load(_at(state, lane, column, HEADS), inside[None, :], 0.0)
        if POLICY:
            _store_factor(_at(policy_inputs, lane, column, WIDTH), x, None, OPERANDS)
        mean, std = tl.load(input_mean + column, inside, 0.0), tl.load(input_std + column, inside, 1.0)
        _store_factor(_at(inputs, lane, column, WIDTH), (x - mean) / std, inside[None, :], OPERANDS)


@triton.jit
def _act(
    heads, actions, place, alive, number, step, seed, inputs, input_mean, input_std,
    log_std_min, log_std_max,
    POLICY: tl.constexpr, MEAN_ACTIONS: tl.constexpr, OBS: tl.constexpr, ACT: tl.constexpr,
    OPERANDS: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Draw actions from the policy's heads, or read the caller's; standardise them as dynamics' inputs."""
    lane = tl.arange(0, ROWS)
    for first in range(0, ACT, _DIMS):
        column = first + tl.arange(0, _DIMS)
        inside = column < ACT
        taken = alive[:, None] & inside[None, :]
        if POLICY:
            x = tl.load(_at(heads, lane, column, HEADS), inside[None, :], 0.0)
            if not MEAN_ACTIONS:
                log_std = tl.load(_at(heads + ACT, lane, column, HEADS), inside[None, :], 0.0)
                log_std = tl.where(log_std < log_std_min, log_std_min, log_std)
                log_std = tl.where(log_std > log_std_max, log_std_max, log_std)
                x += tl.exp(log_std) * _normals(number, step, _ACTION_STREAM, first, seed)
            x = _tanh(x)
            tl.store(_at(actions, place, column, ACT), x, taken)
        else:
            x = tl.load(_at(actions, place, column, ACT), taken, 0.0)
        mean = tl.load(input_mean + OBS + column, inside, 0.0)
        std = tl.load(input_std + OBS + column, inside, 1.0)
        _store_factor(_at(inputs + OBS, lane, column, WIDTH), (x - mean) / std, inside[None, :], OPERANDS)


@triton.jit
def _variance(logvar, bounds, column, inside, OBS: tl.constexpr, LOG_STD: tl.constexpr):
    """Load log-variances and return softly clamped variances; bounds [2, OBS + 1] are e^-max and e^min."""
    minus_max = tl.load(bounds + column, inside, 1.0)
    minimum = tl.load(bounds + OBS + 1 + column, inside, 0.0)
    bounded = minimum + 1.0 / (minus_max + tl.exp(-tl.load(logvar, inside[None, :], 0.0)))
    return bounded * bounded if LOG_STD else bounded


@triton.jit
def _own_variance(logvar, bounds, member, column, inside, OBS: tl.constexpr, LOG_STD: tl.constexpr):
    """Return `_variance` with the bounds [MEMBERS, 2, OBS + 1] of each row's `member` [ROWS]."""
    own = _at(bounds, member, column, 2 * (OBS + 1))
    minus_max = tl.load(own, inside[None, :], 1.0)
    minimum = tl.load(own + OBS + 1, inside[None, :], 0.0)
    bounded = minimum + 1.0 / (minus_max + tl.exp(-tl.load(logvar, inside[None, :], 0.0)))
    return bounded * bounded if LOG_STD else bounded


@triton.jit
def _nan_max(a, b):
    return tl.where((b > a) | (b != b), b, a)


@triton.jit
def _total_variance(
    heads, bounds, OBS: tl.constexpr, LOG_STD: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr
):
    """Sum the variances of a member's OBS + 1 dimensions: [ROWS]."""
    lane = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, _DIMS], tl.float32)
    for first in range(0, OBS + 1, _DIMS):
        column = first + tl.arange(0, _DIMS)
        inside = column <= OBS
        variance = _variance(_at(heads + OBS + 1, lane, column, HEADS), bounds, column, inside, OBS, LOG_STD)
        total += tl.where(inside[None, :], variance, 0.0)
    return tl.sum(total, axis=1)


@triton.jit
def _distance(heads, other, COUNT: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """Compute the squared distance of two means in their first COUNT dimensions: [ROWS]."""
    lane = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, _DIMS], tl.float32)
    for first in range(0, COUNT, _DIMS):
        column = first + tl.arange(0, _DIMS)
        inside = (column < COUNT)[None, :]
        left = tl.load(_at(heads, lane, column, HEADS), inside, 0.0)
        difference = left - tl.load(_at(other, lane, column, HEADS), inside, 0.0)
        total += difference * difference
    return tl.sum(total, axis=1)


@triton.jit
def _store_centre(
    predictions, chosen, centre,
    CHOSEN: tl.constexpr, OBS: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Store the mean of the chosen members' means in `centre`, laid out as a member's heads."""
    lane = tl.arange(0, ROWS)
    for first in range(0, OBS + 1, _DIMS):
        column = first + tl.arange(0, _DIMS)
        inside = (column <= OBS)[None, :]
        total = tl.zeros([ROWS, _DIMS], tl.float32)
        for i in range(CHOSEN):
            heads = predictions + tl.load(chosen + i) * (ROWS * HEADS)
            total += tl.load(_at(heads, lane, column, HEADS), inside, 0.0)
        tl.store(_at(centre, lane, column, HEADS), total / CHOSEN, inside)
    tl.debug_barrier()


@triton.jit
def _penalise(
    predictions, chosen, centre, bounds,
    CHOSEN: tl.constexpr, PENALTY: tl.constexpr, OBS: tl.constexpr, LOG_STD: tl.constexpr,
    OWN_BOUNDS: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Compute u(s, a) [ROWS] from the chosen members; see `reference.penalise`."""
    if PENALTY == "max_deviation" or PENALTY == "ensemble_std" or PENALTY == "mixture_std":
        _store_centre(predictions, chosen, centre, CHOSEN, OBS, HEADS, ROWS)
    u = tl.zeros([ROWS], tl.float32)
    for i in range(CHOSEN):
        heads = predictions + tl.load(chosen + i) * (ROWS * HEADS)
        own = bounds + tl.load(chosen + i) * (2 * (OBS + 1)) if OWN_BOUNDS else bounds
        if PENALTY == "max_aleatoric":
            u = _nan_max(u, _total_variance(heads, own, OBS, LOG_STD, HEADS, ROWS))
        elif PENALTY == "max_pairwise":
            for j in range(i):
                other = predictions + tl.load(chosen + j) * (ROWS * HEADS)
                u = _nan_max(u, _distance(heads, other, OBS, HEADS, ROWS))
        elif PENALTY == "max_deviation":
            u = _nan_max(u, _distance(heads, centre, OBS, HEADS, ROWS))
        elif PENALTY == "ensemble_std":
            u += _distance(heads, centre, OBS, HEADS, ROWS) / OBS
        elif PENALTY == "mixture_std":
            u += _distance(heads, centre, OBS + 1, HEADS, ROWS)
            u += _total_variance(heads, own, OBS, LOG_STD, HEADS, ROWS)
    if PENALTY == "ensemble_std" or PENALTY == "mixture_std":
        u = u / CHOSEN
    return tl.sqrt_rn(u)


@triton.jit
def _draw(
    elites, number, step, seed, DETERMINISTIC: tl.constexpr, ELITES: tl.constexpr, KEEP_MEMBER: tl.constexpr
):
    """Draw the member that each row is sampled from: int64 [rows], -1 for the mean of all."""
    low, high = number.to(tl.uint32), (number >> 32).to(tl.uint32)
    step = tl.zeros_like(step) if KEEP_MEMBER else step
    word, _, _, _ = tl.philox(seed, low, high, step, _MEMBER_STREAM * 65536)
    drawn = tl.load(elites + ((word.to(tl.int64) * ELITES) >> 32))
    return tl.zeros_like(drawn) - 1 if DETERMINISTIC else drawn


@triton.jit
def _sample(
    predictions, drawn, number, step, seed, bounds, first,
    DETERMINISTIC: tl.constexpr, MEMBERS: tl.constexpr, OBS: tl.constexpr, LOG_STD: tl.constexpr,
    OWN_BOUNDS: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sample dimensions first .. first + 15 of (delta obs, reward) from the drawn member, or take means."""
    lane = tl.arange(0, ROWS)
    column = first + tl.arange(0, _DIMS)
    inside = column <= OBS
    if DETERMINISTIC:
        total = tl.zeros([ROWS, _DIMS], tl.float32)
        for member in range(MEMBERS):
            heads = predictions + member * (ROWS * HEADS)
            total += tl.load(_at(heads, lane, column, HEADS), inside[None, :], 0.0)
        sample = total / MEMBERS
    else:
        heads = _at(predictions, drawn * ROWS + lane, column, HEADS)
        noise = _normals(number, step, _NOISE_STREAM, first, seed)
        if OWN_BOUNDS:
            variance = _own_variance(heads + OBS + 1, bounds, drawn, column, inside, OBS, LOG_STD)
        else:
            variance = _variance(heads + OBS + 1, bounds, column, inside, OBS, LOG_STD)
        std = tl.sqrt_rn(variance)
        sample = tl.load(heads, inside[None, :], 0.0) + std * noise
    return sample


@triton.jit
def _advance(
    predictions, drawn, number, step, seed, bounds, carry, low, high, state, next_observations, place, alive,
    DETERMINISTIC: tl.constexpr, MEMBERS: tl.constexpr, OBS: tl.constexpr, LOG_STD: tl.constexpr,
    OWN_BOUNDS: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Store the next observations in `state` and in the output.

    Returns:
        Raw rewards, whether all observations are finite, and whether they are in the box, each [ROWS].
    """
    lane = tl.arange(0, ROWS)
    raw_reward = tl.zeros([ROWS], tl.float32)
    finite, in_box = alive, alive
    for first in range(0, OBS + 1, _DIMS):
        column = first + tl.arange(0, _DIMS)
        inside = column < OBS
        observed = inside[None, :]
        sample = _sample(predictions, drawn, number, step, seed, bounds, first,
                         DETERMINISTIC, MEMBERS, OBS, LOG_STD, OWN_BOUNDS, HEADS, ROWS)  # fmt: skip
        raw_reward += tl.sum(tl.where((column == OBS)[None, :], sample, 0.0), axis=1)
        pointers = _at(state, lane, column, HEADS)
        x = tl.load(pointers, observed, 0.0)
        if carry is not None:
            x *= tl.load(carry + column, inside, 0.0)[None, :]
        x += sample
        tl.store(pointers, x, observed)
        tl.store(_at(next_observations, place, column, OBS), x, alive[:, None] & observed)
        least, most = tl.load(low + column, inside, 0.0), tl.load(high + column, inside, 0.0)
        finite &= _all((tl.abs(x) < float("inf")) | ~observed)
        in_box &= _all(((x >= least[None, :]) & (x <= most[None, :])) | ~observed)
    return raw_reward, finite, in_box


@triton.jit
def _all(condition):
    return tl.min(condition.to(tl.int32), axis=1) > 0


@triton.jit
def _store_distributions(
    predictions, bounds, mean, std, row, exists, batch,
    MEMBERS: tl.constexpr, OBS: tl.constexpr, LOG_STD: tl.constexpr, OWN_BOUNDS: tl.constexpr,
    HEADS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Store every member's mean and std in [members, batch, OBS + 1]."""
    lane = tl.arange(0, ROWS)
    for member in range(MEMBERS):
        heads = predictions + member * (ROWS * HEADS)
        own = bounds + member * (2 * (OBS + 1)) if OWN_BOUNDS else bounds
        for first in range(0, OBS + 1, _DIMS):
            column = first + tl.arange(0, _DIMS)
            inside = column <= OBS
            pointers = _at(heads, lane, column, HEADS)
            variance = _variance(pointers + OBS + 1, own, column, inside, OBS, LOG_STD)
            stored = exists[:, None] & inside[None, :]
            to = member * batch.to(tl.int64) + row
            tl.store(_at(mean, to, column, OBS + 1), tl.load(pointers, inside[None, :], 0.0), stored)
            tl.store(_at(std, to, column, OBS + 1), tl.sqrt_rn(variance), stored)


@triton.jit(do_not_specialize=["batch", "horizon", "first_step", "seed"])
def rollout_kernel(
    # Packed networks, with the elements between two members; the dynamics' constants (carry may be None).
    weights, biases, weights_stride, biases_stride, scales, shifts, policy_weights, policy_biases,
    input_mean, input_std, bounds, carry, elites, chosen, low, high,
    # Start states [batch, OBS] and the rows' numbers [batch].
    start, rows, batch, horizon, first_step: tl.uint32, seed: tl.uint64,
    penalty_coef, truncate_at, halt_reward, log_std_min, log_std_max,
    # Padded rollouts, [batch, horizon, ...]; actions are input without a policy. lengths and cut are [batch].
    actions, rewards, next_observations, terminals, raw_rewards, penalties, members, lengths, cut,
    # Output of the last step, [members, batch, OBS + 1], or None.
    mean, std,
    # Scratch of each program: activations [3, ROWS, WIDTH], zeros; predictions [MEMBERS + 2, ROWS, HEADS];
    # inputs of layer norms [ROWS, WIDTH]. It, scales and shifts (packed as biases) are None without them.
    activations, predictions, raw,
    OBS: tl.constexpr, ACT: tl.constexpr, MEMBERS: tl.constexpr, ELITES: tl.constexpr,
    LOG_STD: tl.constexpr, OWN_BOUNDS: tl.constexpr,
    CHOSEN: tl.constexpr, SIZES: tl.constexpr, POLICY_SIZES: tl.constexpr, ACTIVATION: tl.constexpr,
    POLICY_ACTIVATION: tl.constexpr, PENALTY: tl.constexpr, KEEP_MEMBER: tl.constexpr,
    NORM_SIZES: tl.constexpr, DETERMINISTIC: tl.constexpr, MEAN_ACTIONS: tl.constexpr,
    OPERANDS: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, HELD: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Make all steps of rollouts, tile after tile; POLICY_SIZES is None if the caller gives the actions."""
    POLICY: tl.constexpr = POLICY_SIZES is not None
    program = tl.program_id(0).to(tl.int64)
    inputs = activations + program * (3 * ROWS * WIDTH)
    here = inputs + ROWS * WIDTH
    there = here + ROWS * WIDTH
    predictions += program * ((MEMBERS + 2) * ROWS * HEADS)
    if NORM_SIZES is not None:
        raw += program * (ROWS * WIDTH)
    centre = predictions + MEMBERS * ROWS * HEADS
    state = centre + ROWS * HEADS
    lane = tl.arange(0, ROWS)
    # Loop invariants are computed again (disable_licm), since keeping them would take registers.
    for tile in tl.range(tl.program_id(0), tl.cdiv(batch, ROWS), tl.num_programs(0), disable_licm=True):
        row = tile * ROWS + lane.to(tl.int64)
        exists = row < batch
        number = tl.load(rows + row, exists, 0)
        for first in range(0, OBS, _DIMS):
            column = first + tl.arange(0, _DIMS)
            inside = exists[:, None] & (column < OBS)[None, :]
            x = tl.load(_at(start, row, column, OBS), inside, 0.0)
            tl.store(_at(state, lane, column, HEADS), x, (column < OBS)[None, :])
        alive = exists
        for t in tl.range(horizon, disable_licm=True):
            if tl.max(alive.to(tl.int32), axis=0) > 0:
                tl.debug_barrier()
                step = (first_step + t).to(tl.uint32)
                place = row * horizon + t
                _observe(state, inputs, there, input_mean, input_std,
                         POLICY, OBS, OPERANDS, WIDTH, HEADS, ROWS)  # fmt: skip
                tl.debug_barrier()
                if POLICY:
                    _network(there, here, there, predictions, policy_weights, policy_biases, None, None, None,
                             None, POLICY_SIZES, POLICY_ACTIVATION,
                             OPERANDS, WIDTH, HEADS, HELD, ROWS, BLOCK_N, BLOCK_K)  # fmt: skip
                _act(predictions, actions, place, alive, number, step, seed, inputs, input_mean, input_std,
                     log_std_min, log_std_max,
                     POLICY, MEAN_ACTIONS, OBS, ACT, OPERANDS, WIDTH, HEADS, ROWS)  # fmt: skip
                tl.debug_barrier()
                for member in tl.range(MEMBERS, num_stages=1, disable_licm=True):
                    if NORM_SIZES is not None:
                        scale = scales + member * _hidden_units(SIZES)
                        shift = shifts + member * _hidden_units(SIZES)
                    else:
                        scale, shift = None, None
                    _network(inputs, here, there, predictions + member * (ROWS * HEADS),
                             weights + member * weights_stride, biases + member * biases_stride,
                             raw, scale, shift, NORM_SIZES, SIZES, ACTIVATION,
                             OPERANDS, WIDTH, HEADS, HELD, ROWS, BLOCK_N, BLOCK_K)  # fmt: skip
                penalty = _penalise(predictions, chosen, centre, bounds,
                                    CHOSEN, PENALTY, OBS, LOG_STD, OWN_BOUNDS, HEADS, ROWS)  # fmt: skip
                # Loaded again, so that it takes no registers from the networks.
                number = tl.load(rows + row, exists, 0)
                drawn = _draw(elites, number, step, seed, DETERMINISTIC, ELITES, KEEP_MEMBER)
                raw_reward, finite, in_box = _advance(
                    predictions, drawn, number, step, seed, bounds, carry, low, high, state,
                    next_observations, place, alive,
                    DETERMINISTIC, MEMBERS, OBS, LOG_STD, OWN_BOUNDS, HEADS, ROWS)  # fmt: skip
                reward = raw_reward - penalty_coef * penalty
                finite &= tl.abs(reward) < float("inf")
                goes_on = finite & in_box
                terminal = ~goes_on
                end = (~finite).to(tl.int32)
                if truncate_at is not None:
                    truncated = finite & (penalty > truncate_at)
                    goes_on &= ~truncated
                    end += 2 * truncated.to(tl.int32)
                    if halt_reward is not None:
                        reward = tl.where(truncated, halt_reward, reward)
                        terminal |= truncated
                tl.store(rewards + place, reward, alive)
                tl.store(raw_rewards + place, raw_reward, alive)
                tl.store(penalties + place, penalty, alive)
                tl.store(terminals + place, terminal, alive)
                tl.store(members + place, drawn.to(tl.int32), alive)
                if mean is not None:
                    _store_distributions(predictions, bounds, mean, std, row, exists, batch,
                                         MEMBERS, OBS, LOG_STD, OWN_BOUNDS, HEADS, ROWS)  # fmt: skip
                tl.store(lengths + row, t + finite.to(tl.int32), alive)
                tl.store(cut + row, end, alive)
                alive = goes_on
        tl.debug_barrier()


@triton.jit
def _copy(source, target, mask, COUNT: tl.constexpr):
    """Copy COUNT numbers from each pointer of `source` [rows] to that of `target` [rows]."""
    for first in range(0, COUNT, _DIMS):
        column = first + tl.arange(0, _DIMS)
        inside = mask[:, None] & (column < COUNT)[None, :]
        x = tl.load(source[:, None] + column[None, :], inside)
        tl.store(target[:, None] + column[None, :], x, inside)


@triton.jit(do_not_specialize=["batch", "horizon", "head", "capacity"])
def compact_kernel(
    # Inputs and outputs of `rollout_kernel`; offsets [batch] count the transitions of the rollouts before.
    start, rows, actions, rewards, next_observations, terminals, raw_rewards, penalties, members, lengths,
    offsets, batch, horizon,
    # The ring's arrays, of which those after the terminals may be None; elements between two rows of each.
    to_observations, to_actions, to_rewards, to_next_observations, to_terminals, to_raw_rewards,
    to_penalties, to_members, to_rollout_index, to_step,
    observations_stride, actions_stride, rewards_stride, next_observations_stride, terminals_stride,
    raw_rewards_stride, penalties_stride, members_stride, rollout_index_stride, step_stride,
    head, capacity,
    OBS: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Copy the transitions that exist into the ring, ordered by start state, then by step."""
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rollout, t = place // horizon, place % horizon
    exists = rollout < batch
    exists &= t < tl.load(lengths + rollout, exists, 0)
    to = (head + tl.load(offsets + rollout, exists, 0) + t) % capacity
    before = tl.where(t == 0, start + rollout * OBS, next_observations + (place - 1) * OBS)
    _copy(before, to_observations + to * observations_stride, exists, OBS)
    _copy(actions + place * ACT, to_actions + to * actions_stride, exists, ACT)
    _copy(next_observations + place * OBS, to_next_observations + to * next_observations_stride, exists, OBS)
    tl.store(to_rewards + to * rewards_stride, tl.load(rewards + place, exists), exists)
    tl.store(to_terminals + to * terminals_stride, tl.load(terminals + place, exists), exists)
    if to_raw_rewards is not None:
        tl.store(to_raw_rewards + to * raw_rewards_stride, tl.load(raw_rewards + place, exists), exists)
    if to_penalties is not None:
        tl.store(to_penalties + to * penalties_stride, tl.load(penalties + place, exists), exists)
    if to_members is not None:
        tl.store(to_members + to * members_stride, tl.load(members + place, exists), exists)
    if to_rollout_index is not None:
        tl.store(to_rollout_index + to * rollout_index_stride, tl.load(rows + rollout, exists), exists)
    if to_step is not None:
        tl.store(to_step + to * step_stride, t.to(tl.int32), exists)
