"""TODO docstring."""

from minitune.memory.device_rates import DeviceRates
from minitune.memory.memory_model import NF4_BYTES, MemoryModel, _kept
from minitune.memory.plan import Candidate, Workload


def _seconds(sizes: MemoryModel, load: Workload, choice: Candidate, r: DeviceRates) -> float:
    """Of forward, loss and backward."""
    N, D, F, QKV, HK, b = (
        load.tokens,
        sizes.D,
        sizes.F,
        sizes.HK + 2 * sizes.GK,
        sizes.HK,
        sizes.itemsize,
    )
    T = min(choice.tile_rows or N, N)
    tiles = -(-N // T)
    rate = r.matmul * T / (T + 32)  # shorter matmuls reach less of it
    qkv, o, gate_up, down = (
        2 * N * D * QKV / rate,
        2 * N * HK * D / rate,
        4 * N * D * F / rate,
        2 * N * F * D / rate,
    )
    matmuls = qkv + o + gate_up + down
    attention = 2 * load.squared_lengths * HK / (r.matmul * (r.cudnn if choice.cudnn else r.attention))
    widths = (D + QKV, HK + D, D + 2 * F, F + D)  # of x and y of each projection
    adapted = sum(
        width
        for width, lora_columns in zip(widths, sizes.lora_columns, strict=True)
        if lora_columns
    )
    thin = 0.7 * N * adapted * b / r.copy  # a look at x or at dy
    dequantise = _dequantise(sizes, r)
    forward = matmuls + attention + dequantise + thin
    forward += N * (15 * D + 3 * F + 2 * QKV) * b / r.copy + (11 + 12 * tiles) * r.launch
    backward = matmuls + 3 * attention + dequantise + 3 * thin
    backward += N * (14 * D + 6 * F + 2 * QKV) * b / r.copy + (21 + 30 * tiles) * r.launch
    again = (qkv + attention + o + gate_up, qkv + o + gate_up, gate_up, 0.0)
    before = sizes.layers - choice.late_layers
    loss = 4 * load.loss_rows * (D + 256) * sizes.V / r.matmul  # a narrow head reaches less of it
    loss += 5 * load.loss_rows * sizes.V * b / r.copy
    far_backward = backward + again[choice.early.level]
    nothing = before - choice.early_saving_layers(sizes.layers)
    back = choice.late_layers * (backward + again[choice.late_level]) + nothing * forward
    if choice.early.offloaded:
        fetch = _kept(sizes, load, choice.early) / r.from_host
        far_backward = max(far_backward, fetch / choice.recompute_span)
        back += fetch if choice.late_layers == 0 else 0.0  # the first one, which runs beside nothing
    ahead = sizes.layers * forward + _waits(sizes, load, choice, forward, r)
    return r.start + ahead + loss + back + before * far_backward


def _waits(
    sizes: MemoryModel, load: Workload, choice: Candidate, forward: float, r: DeviceRates
) -> float:
    """Seconds that forward waits for copies to the host, with as many on their way as `Plan.in_flight_limit` lets.

    While layers run, what they keep falls behind, by whole layers as long as there is room; then each one waits; and
    what is left in the end is waited for, which may be as soon as the last layer.
    """
    keepers = choice.early_saving_layers(sizes.layers)
    if not choice.early.offloaded or not keepers:
        return 0.0
    far, near = _kept(sizes, load, choice.early), load.tokens * sizes.kept(choice.late_level)
    run = forward * r.to_host  # bytes that leave while a layer runs
    between = choice.recompute_span * run
    behind = keepers * max(far - between, 0.0) + min(
        far, between
    )  # when the last that goes to the host has run
    room = max((choice.late_layers - 1) * near, far) // far * far
    left = min(behind, room) - max(choice.late_layers - 1, min(choice.late_layers, 1)) * run
    return (max(behind - room, 0.0) + max(left, 0.0)) / r.to_host


def _dequantise(sizes: MemoryModel, r: DeviceRates) -> float:
    """Seconds for the weights of a layer."""
    return sizes.of_layer * (NF4_BYTES + sizes.itemsize) / r.copy
