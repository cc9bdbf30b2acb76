"""A stand-in for `torch.nn.attention.varlen.varlen_attn`, which has no CPU kernel: the same arguments, in float64."""

import math

import torch


def emulated(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """Causal with bottom-right alignment: the last query of a sequence sees its last key."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and enable_gqa and window_size[1] == 0
    assert (max_q, max_k) == tuple(cu.diff().max() for cu in (cu_seq_q, cu_seq_k))
    outputs, group = [], query.shape[1] // key.shape[1]
    for q0, q1, k0, k1 in zip(cu_seq_q, cu_seq_q[1:], cu_seq_k, cu_seq_k[1:], strict=False):
        q, k, v = (x.double().transpose(0, 1) for x in (query[q0:q1], key[k0:k1], value[k0:k1]))
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        distance = torch.arange(k1 - q1 + q0 - k0, k1 - k0)[:, None] - torch.arange(k1 - k0)
        seen = (distance >= 0) & ((distance <= window_size[0]) | (window_size[0] < 0))
        scores = (q @ k.transpose(1, 2) * (scale or q.shape[2] ** -0.5)).masked_fill(~seen, -math.inf)
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs).to(query.dtype)


def install(monkeypatch, attend=emulated) -> None:
    monkeypatch.setattr("rm.model.attention.varlen_attn", attend)
    monkeypatch.setattr("rm.model.attention.runs_varlen", lambda value: True)
