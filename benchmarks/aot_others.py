"""What ``aot_vs_flex.py`` counts beside dense passes: decode steps against FlexAttention's, and kernels along selected blocks against dense
tiles of our own."""

from __future__ import annotations

from typing import Any

import flex_templates
from aot_cases import CASES, HEADS, KV_HEADS, LENGTH
from aot_kernels import DTYPE, KERNELS, Ours, counted, flex_job, loops_from, our_kernel

from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.tiles import classify
from sparsedsl.backends.triton.selected_configs import SelectedShape, config_of
from sparsedsl.backends.triton.selected_configs import job_of as selected_job
from sparsedsl.gpu.aot import job_of
from sparsedsl.gpu.configs import default_config
from sparsedsl.gpu.loop_cycles import cycles
from sparsedsl.gpu.targets import TARGETS

__all__ = ["DECODED", "SELECTED", "decode_records", "selected_records"]

DECODED = ("causal", "window", "sinks", "blocks")
# Kernel along lists -> the dense one that does as much for a pair.
SELECTED = {"selected_forward": "forward", "selected_grad_q": "grad_q", "selected_grad_kv": "grad_kv"}
CHUNK, PACKS = 64, (4, 8, 16)


def decode_records(name: str, head_dim: int, target: str) -> list[dict[str, Any]]:
    """One query a head after ``LENGTH`` keys, ours and FlexAttention's: keys that each key head reads for it, instructions for each 1,024
    of them (of one warp)."""
    case, arch = CASES[name], TARGETS[target].arch
    assert isinstance(arch, int)
    ours = Ours(case, head_dim)
    domain = Domain(1, LENGTH, q_offset=LENGTH - 1, heads=HEADS, tables=ours.tables)
    mask = ours.pattern.mask.expr

    def keys_at(side: int) -> float:
        lists = classify(mask, domain, (16, side))
        return (lists.full.total + lists.partial.total) * side / (lists.shape[0] * lists.shape[1])

    config = default_config("decode", ours.shape, TARGETS[target])
    found = counted(job_of(ours.source, ours.source.kernel("decode"), ours.shape, config, TARGETS[target]))
    mine = loops_from(found)[0]
    about = {"case": name, "target": target, "head_dim": head_dim, "kernel": "decode", "keys_seen": keys_at(1)}
    records = [
        about | {
            "side": "ours", "config": str(config), "keys_read": keys_at(config.block_n),
            "issue": round(mine.issued * config.warps * 1024 / config.block_n), "registers": found["needs"]["registers"],
        }
    ]  # fmt: skip
    shape = flex_templates.FlexShape(DTYPE, HEADS, KV_HEADS, 1, LENGTH, head_dim)
    written = flex_templates.decode(case.flex, shape, divmod(arch, 10), splits=8)
    other = counted(flex_job(written, target))
    full, block_n = loops_from(other)[-1], written.options["BLOCK_N"]
    return [
        *records,
        about | {
            "side": "flex", "config": f"16x{block_n}, {written.warps} warps, {written.stages} stages", "keys_read": keys_at(shape.block),
            "issue": round(full.issued * written.warps * 1024 / block_n), "registers": other["needs"]["registers"],
        },
    ]  # fmt: skip


def selected_records(head_dim: int, target: str) -> list[dict[str, Any]]:
    """Kernels along lists of 64-key blocks, for several heads side by side: instructions and cycles for each 128 x 128 pairs of a tile, and
    those of the full tiles of the dense kernel."""
    ours = Ours(CASES["causal"], head_dim)
    records = []
    for kernel, like in SELECTED.items():
        dense = our_kernel(ours, like, target).record(target, head_dim)["loops"]["full"]
        for pack in PACKS:
            for weighted in (False, True):
                chosen = SelectedShape(ours.shape, CHUNK, pack, weighted=weighted)
                config = config_of(kernel, chosen, TARGETS[target])
                flags: dict[str, Any] = {"SPLIT": False} if kernel == "selected_forward" else {}
                found = counted(selected_job(kernel, chosen, config, TARGETS[target], **flags))
                loop, pairs = loops_from(found)[0], config.block_m * config.block_n
                useful = KERNELS[like] * head_dim * pairs
                took = cycles(loop, config.warps, TARGETS[target])
                scale = 128**2 / pairs
                records.append({
                    "kernel": kernel, "target": target, "head_dim": head_dim, "pack": pack, "weighted": weighted, "config": str(config),
                    "issue": round(loop.issued * config.warps * scale),
                    "executed_over_useful": round(loop.products(config.warps) / useful, 2),
                    "exponentials_per_pair": round(loop.exponentials * 32 * config.warps / pairs, 2),
                    "serial": round(took.serial * scale), "overlapped": round(took.overlapped * scale),
                    "dense_serial": dense["serial"], "dense_overlapped": dense["overlapped"], "spills": found["needs"]["spills"],
                })  # fmt: skip
    return records
