"""Plays the FusedAdam of Apex and Transformer Engine, which need a GPU: the same arguments, state and counter."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron_atum.parallel import adam


class StandInAdam(torch.optim.Optimizer):
    """AdamW as theirs: one counter for each group, in the group, and moments that a first step makes."""

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, adam_w_mode: bool
    ) -> None:
        assert adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                first = state["exp_avg"] / (1 - beta1 ** group["step"])
                second = state["exp_avg_sq"] / (1 - beta2 ** group["step"])
                p.sub_(lr * (first / (second.sqrt() + group["eps"]) + group["weight_decay"] * p))


def install_stand_in(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let an import of the FusedAdam of kernels.adam=name give the stand-in."""
    module = ModuleType(adam._FUSED[name][0])
    module.FusedAdam = StandInAdam  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
