"""Triton kernels of packed causal attention (FlashAttention-2, arXiv 2307.08691): forward, dQ, and dK with dV.

Each token knows the first token of its sample and the one past its last, so the grid depends on T alone: no host reads
a length, and a tile may span many short samples. Both bounds never fall from token to token, which tells a tile from
its first and last row what it need not visit and what it need not mask.

Grouped-query attention: a program of dK and dV walks one flat loop over (query heads of its group, row blocks). So
each element of dK and dV is written once, by one program, in a fixed order: no atomics, the same bits in each run.

Head sizes that are no power of two are padded with zeros in registers. Scores are kept in base-2 units.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
HIDDEN = tl.constexpr(-1.0e30)  # the score of an invisible key; finite, so that no inf - inf arises


@triton.jit
def token_bounds_kernel(edges_ptr, start_ptr, end_ptr, T, samples, steps, BLOCK: tl.constexpr) -> None:
    """Each token's sample [start, end) by bisection; past the last boundary start = T and end = the token: no keys."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    left = tl.zeros((BLOCK,), tl.int32)
    right = left + samples + 1
    for _ in range(steps):
        middle = (left + right) // 2
        open_ = left < right
        edge = tl.load(edges_ptr + middle, mask=open_, other=0)
        after = open_ & (edge <= token)
        left = tl.where(after, middle + 1, left)
        right = tl.where(after, right, middle)
    inside = left <= samples
    start = tl.load(edges_ptr + left - 1, mask=inside, other=0)
    end = tl.load(edges_ptr + left, mask=inside, other=0)
    tl.store(start_ptr + token, tl.where(inside, start, T).to(tl.int32), mask=token < T)
    tl.store(end_ptr + token, tl.where(inside, end, token).to(tl.int32), mask=token < T)


@triton.jit
def _load(
    x, row, head, row_stride, head_stride, T,
    ROWS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, TMA: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Tile [ROWS, BD] of one head; columns past D are zeros, and rows past T where BOUNDED (by descriptor always)."""
    if TMA:
        tile = x.load([row, head * D])
    else:
        i = tl.arange(0, ROWS)
        d = tl.arange(0, BD)
        first = tl.cast(row, tl.int64) * row_stride + tl.cast(head, tl.int64) * head_stride
        at = x + first + (i[:, None] * row_stride + d[None, :])
        if BOUNDED:
            tile = tl.load(at, mask=(row + i < T)[:, None] & (d < D)[None, :], other=0.0)
        elif BD != D:
            tile = tl.load(at, mask=(d < D)[None, :], other=0.0)
        else:
            tile = tl.load(at)
    return tile


@triton.jit
def _store(
    x, tile, row, head, row_stride, T,
    ROWS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Write a tile of a dense [T, H, D]; nothing past T or D is touched."""
    if TMA:
        x.store([row, head * D], tile.to(x.dtype))
    else:
        i = tl.arange(0, ROWS)
        d = tl.arange(0, BD)
        at = x + tl.cast(row, tl.int64) * row_stride + head * D + (i[:, None] * row_stride + d[None, :])
        tl.store(at, tile.to(x.dtype.element_ty), mask=(row + i < T)[:, None] & (d < D)[None, :])


@triton.jit
def _tanh(x):
    """To rounding in fp32: Cephes' polynomial near 0, where 1 - exp(-2x) would cancel."""
    z = x * x
    near = z * (2.06390887954e-2 - 5.70498872745e-3 * z) - 5.37397155531e-2
    near = x + x * z * (z * (z * near + 1.33314422036e-1) - 3.33332819422e-1)
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(z < 0.390625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def _key_span(start_ptr, row, T, window, BM: tl.constexpr, BN: tl.constexpr, WINDOW: tl.constexpr):
    """What the rows [row, row + BM) see: each row's first key, and the edges of the masked, full and masked spans."""
    r = row + tl.arange(0, BM)
    last = tl.minimum(row + BM, T) - 1
    first_key = tl.load(start_ptr + r, mask=r < T, other=0)
    begin = tl.load(start_ptr + row)
    all_see = tl.load(start_ptr + last)
    if WINDOW:
        first_key = tl.maximum(first_key, r - window + 1)
        begin = tl.maximum(begin, row - window + 1)
        all_see = tl.maximum(all_see, last - window + 1)
    end = last + 1
    full = begin + tl.cdiv(all_see - begin, BN) * BN
    full_end = full + tl.maximum(row + 1 - full, 0) // BN * BN
    full = tl.minimum(full, end)
    return first_key, begin, full, tl.maximum(tl.minimum(full_end, end), full), end


@triton.jit
def _forward_span(
    acc, total, peak, q, k_ptr, v_ptr, first_key, r, begin, end, head, k_row, k_head, v_row, v_head, T, qk_scale,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, SOFTCAP: tl.constexpr, TMA: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    for n in tl.range(begin, end, BN):
        k = _load(k_ptr, n, head, k_row, k_head, T, BN, D, BD, TMA, MASK)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
        if SOFTCAP > 0.0:
            s = _tanh(s * (1.0 / (SOFTCAP * LOG2E))) * (SOFTCAP * LOG2E)
        if MASK:
            c = n + tl.arange(0, BN)
            s = tl.where((c[None, :] >= first_key[:, None]) & (c[None, :] <= r[:, None]), s, HIDDEN)
        new_peak = tl.maximum(peak, tl.max(s, 1))
        p = tl.exp2(s - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(p, 1)
        v = _load(v_ptr, n, head, v_row, v_head, T, BN, D, BD, TMA, MASK)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        peak = new_peak
    return acc, total, peak


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, start_ptr, T, q_row, q_head, k_row, k_head, v_row, v_head, o_row,
    scale, group, window,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, TMA: tl.constexpr,
) -> None:  # fmt: skip
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM  # the rows with most keys first
    head = tl.program_id(1)
    kv_head = head // group
    r = row + tl.arange(0, BM)
    first_key, begin, full, full_end, end = _key_span(start_ptr, row, T, window, BM, BN, WINDOW)
    q = _load(q_ptr, row, head, q_row, q_head, T, BM, D, BD, TMA, True)
    qk_scale = tl.cast(scale, tl.float32) * LOG2E
    acc = tl.zeros((BM, BD), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    peak = tl.full((BM,), HIDDEN, tl.float32)
    acc, total, peak = _forward_span(
        acc, total, peak, q, k_ptr, v_ptr, first_key, r, begin, full, kv_head, k_row, k_head, v_row, v_head, T,
        qk_scale, D, BD, BN, SOFTCAP, TMA, True,
    )  # fmt: skip
    acc, total, peak = _forward_span(
        acc, total, peak, q, k_ptr, v_ptr, first_key, r, full, full_end, kv_head, k_row, k_head, v_row, v_head, T,
        qk_scale, D, BD, BN, SOFTCAP, TMA, False,
    )  # fmt: skip
    acc, total, peak = _forward_span(
        acc, total, peak, q, k_ptr, v_ptr, first_key, r, full_end, end, kv_head, k_row, k_head, v_row, v_head, T,
        qk_scale, D, BD, BN, SOFTCAP, TMA, True,
    )  # fmt: skip
    # A row without keys, past the last sample: its output is 0, and its log-sum-exp makes p = 0 in the backward pass.
    live = (first_key <= r) & (r < T)
    total = tl.where(live, total, 1.0)
    acc = tl.where(live[:, None], acc / total[:, None], 0.0)
    _store(o_ptr, acc, row, head, o_row, T, BM, D, BD, TMA)
    lse = tl.where(live, peak + tl.log2(total), -HIDDEN)
    tl.store(lse_ptr + tl.cast(head, tl.int64) * T + r, lse, mask=r < T)


@triton.jit
def _dq_span(
    dq, q, do, lse, delta, k_ptr, v_ptr, first_key, r, begin, end, head, k_row, k_head, v_row, v_head, T, qk_scale,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, SOFTCAP: tl.constexpr, TMA: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    for n in tl.range(begin, end, BN):
        k = _load(k_ptr, n, head, k_row, k_head, T, BN, D, BD, TMA, MASK)
        v = _load(v_ptr, n, head, v_row, v_head, T, BN, D, BD, TMA, MASK)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
        if SOFTCAP > 0.0:
            bent = _tanh(s * (1.0 / (SOFTCAP * LOG2E)))
            s = bent * (SOFTCAP * LOG2E)
        p = tl.exp2(s - lse[:, None])
        if MASK:
            c = n + tl.arange(0, BN)
            p = tl.where((c[None, :] >= first_key[:, None]) & (c[None, :] <= r[:, None]), p, 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        if SOFTCAP > 0.0:
            ds = ds * (1.0 - bent * bent)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit
def dq_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, dq_ptr, lse_ptr, delta_ptr, start_ptr, T,
    q_row, q_head, k_row, k_head, v_row, v_head, o_row, do_row, do_head, scale, group, window,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, TMA: tl.constexpr,
) -> None:  # fmt: skip
    """dQ, and in passing delta = sum(o * do) of each row, which the other kernel needs."""
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    head = tl.program_id(1)
    kv_head = head // group
    r = row + tl.arange(0, BM)
    first_key, begin, full, full_end, end = _key_span(start_ptr, row, T, window, BM, BN, WINDOW)
    do = _load(do_ptr, row, head, do_row, do_head, T, BM, D, BD, TMA, True)
    o = _load(o_ptr, row, head, o_row, D, T, BM, D, BD, TMA, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    at = tl.cast(head, tl.int64) * T + r
    tl.store(delta_ptr + at, delta, mask=r < T)
    lse = tl.load(lse_ptr + at, mask=r < T, other=-HIDDEN)
    q = _load(q_ptr, row, head, q_row, q_head, T, BM, D, BD, TMA, True)
    scale = tl.cast(scale, tl.float32)
    qk_scale = scale * LOG2E
    dq = tl.zeros((BM, BD), tl.float32)
    dq = _dq_span(
        dq, q, do, lse, delta, k_ptr, v_ptr, first_key, r, begin, full, kv_head, k_row, k_head, v_row, v_head, T,
        qk_scale, D, BD, BN, SOFTCAP, TMA, True,
    )  # fmt: skip
    dq = _dq_span(
        dq, q, do, lse, delta, k_ptr, v_ptr, first_key, r, full, full_end, kv_head, k_row, k_head, v_row, v_head, T,
        qk_scale, D, BD, BN, SOFTCAP, TMA, False,
    )  # fmt: skip
    dq = _dq_span(
        dq, q, do, lse, delta, k_ptr, v_ptr, first_key, r, full_end, end, kv_head, k_row, k_head, v_row, v_head, T,
        qk_scale, D, BD, BN, SOFTCAP, TMA, True,
    )  # fmt: skip
    _store(dq_ptr, dq * scale, row, head, o_row, T, BM, D, BD, TMA)


@triton.jit
def dkv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr, end_ptr, T,
    q_row, q_head, k_row, k_head, v_row, v_head, do_row, do_head, dk_row, scale, group, window,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, TMA: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
) -> None:  # fmt: skip
    """dK, dV or both of one key block. Key c is seen by the rows [c, end[c]).

    One loop, always masked, keeps both accumulators in registers; loops for masked and full spans spilled them.
    """
    first = tl.program_id(0) * BN
    kv_head = tl.program_id(1)
    c = first + tl.arange(0, BN)
    last = tl.minimum(first + BN, T) - 1
    seen_until = tl.load(end_ptr + c, mask=c < T, other=0)
    end = tl.load(end_ptr + last)
    if WINDOW:
        seen_until = tl.minimum(seen_until, c + window)
        end = tl.minimum(end, last + window)
    k = _load(k_ptr, first, kv_head, k_row, k_head, T, BN, D, BD, TMA, True)
    v = _load(v_ptr, first, kv_head, v_row, v_head, T, BN, D, BD, TMA, True)
    scale = tl.cast(scale, tl.float32)
    qk_scale = scale * LOG2E
    dk = tl.zeros((BN, BD), tl.float32)
    dv = tl.zeros((BN, BD), tl.float32)
    blocks = tl.cdiv(end - first, BM)
    for i in tl.range(0, blocks * group):
        head = kv_head * group + i // blocks
        row = first + i % blocks * BM
        r = row + tl.arange(0, BM)
        at = tl.cast(head, tl.int64) * T + r
        q = _load(q_ptr, row, head, q_row, q_head, T, BM, D, BD, TMA, True)
        lse = tl.load(lse_ptr + at, mask=r < T, other=-HIDDEN)
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * qk_scale
        if SOFTCAP > 0.0:
            bent = _tanh(s * (1.0 / (SOFTCAP * LOG2E)))
            s = bent * (SOFTCAP * LOG2E)
        p = tl.exp2(s - lse[None, :])
        p = tl.where((r[None, :] >= c[:, None]) & (r[None, :] < seen_until[:, None]), p, 0.0)
        do = _load(do_ptr, row, head, do_row, do_head, T, BM, D, BD, TMA, True)
        if DV:
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        if DK:
            delta = tl.load(delta_ptr + at, mask=r < T, other=0.0)
            dp = tl.dot(v, tl.trans(do), input_precision="ieee")
            ds = p * (dp - delta[None, :])
            if SOFTCAP > 0.0:
                ds = ds * (1.0 - bent * bent)
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    if DK:
        _store(dk_ptr, dk * scale, first, kv_head, dk_row, T, BN, D, BD, TMA)
    if DV:
        _store(dv_ptr, dv, first, kv_head, dk_row, T, BN, D, BD, TMA)
