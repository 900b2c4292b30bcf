"""Loss and gradient over a vocabulary split over ranks, against plain torch on all logits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_atum.batch import Batch
from megatron_atum.config.schema import ModelConfig, TrainingConfig
from megatron_atum.model.configs import decoder_config
from megatron_atum.model.vocabulary import DecoupledHead, log_sum_exp_and_target
from megatron_atum.parallel.gradients import sum_replicated
from megatron_atum.parallel.groups import ProcessGroups
from megatron_atum.training.loss import LossSettings, loss_function, loss_settings
from tests.distributed import run_distributed
from tests.layouts import Degrees, groups_of
from tests.training.losses import report_sums

VOCAB, H, B, S = 97, 8, 2, 12
ADDED = (0, 2, 3)
Z_WEIGHT = 0.05
SOURCES = ("web", "pairs", "unused")

# name: normalisation, which of the three microbatches have targets, whether the z-loss has positions
CASES: dict[str, tuple[str, tuple[bool, bool, bool], bool]] = {
    "token mean": ("tokens", (True, True, True), True),
    "mean of means": ("idefics", (True, True, True), True),
    "token mean, one microbatch without targets": ("tokens", (True, False, True), True),
    "mean of means, one microbatch without targets": ("idefics", (True, False, True), True),
    "no target at all": ("tokens", (False, False, False), True),
    "no target at all, mean of means": ("idefics", (False, False, False), True),
    "nothing counts": ("tokens", (False, False, False), False),
    "nothing counts, mean of means": ("idefics", (False, False, False), False),
}


def make_batches(added: int, targets: tuple[bool, ...], z: bool, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for number, has_targets in enumerate(targets):
        ids = torch.randint(0, VOCAB + added, (B, S), generator=generator)
        labels = torch.randint(0, VOCAB + added, (B, S), generator=generator)
        labels[:, :added] = VOCAB + torch.arange(added)  # every added token is a target
        labels[0, added], labels[1, added] = 0, VOCAB - 1  # and so are the ends of the base vocabulary
        mask = (torch.rand(B, S, generator=generator) < 0.3 + 0.2 * number).float()
        mask[:, : added + 1] = 1.0
        z_mask = (torch.rand(B, S, generator=generator) < 0.6).float()
        batches.append(
            Batch(
                input_ids=ids,
                labels=torch.where(mask > 0, labels, torch.where(ids % 2 == 0, -100, labels)),
                loss_mask=mask * has_targets,
                z_mask=z_mask * z,
                position_ids=torch.arange(S).repeat(B, 1),
                pixels=torch.zeros(0, 3, 4, 4),
                image_index=torch.full((B, S), -1),
                images_per_row=torch.tensor([number, 0]),
                source=("web", "pairs") if number else ("web", "web"),
                pack_ids=torch.arange(B),
            )
        )
    return batches


def parameters(added: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {
        "hidden": torch.randn(3, S, B, H, generator=generator) * 2,
        "base": torch.randn(VOCAB, H, generator=generator),
        "added": torch.randn(added, H, generator=generator),
    }


def plain(batches: list[Batch], added: int, normalization: str) -> dict[str, Any]:
    """The same in one process on all logits, in float64."""
    leaves = {name: tensor.double().requires_grad_() for name, tensor in parameters(added).items()}
    tokens = sum(float(batch.loss_mask.sum()) for batch in batches)
    z_tokens = sum(float(batch.z_mask.sum()) for batch in batches)
    loss, z_loss = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for hidden, batch in zip(leaves["hidden"], batches, strict=True):
        logits = hidden.transpose(0, 1) @ torch.cat((leaves["base"], leaves["added"])).t()
        nll = F.cross_entropy(logits.flatten(0, 1), batch.labels.clamp(min=0).flatten(), reduction="none")
        nll_sum = (nll * batch.loss_mask.flatten()).sum()
        z_sum = (logits.logsumexp(-1) ** 2 * batch.z_mask).sum()
        own, own_z = float(batch.loss_mask.sum()), float(batch.z_mask.sum())
        if normalization == "idefics":
            loss = loss + (nll_sum / own / len(batches) if own else 0.0)
            z_loss = z_loss + (z_sum / own_z / len(batches) if own_z else 0.0)
        else:
            loss = loss + (nll_sum / tokens if tokens else 0.0)
            z_loss = z_loss + (z_sum / z_tokens if z_tokens else 0.0)
    total = loss + Z_WEIGHT * z_loss
    if total.requires_grad:
        total.backward()
    gradients = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in leaves.items()}
    return {"loss": float(loss.detach()), "z_loss": float(z_loss.detach()), "gradients": gradients}


def split(rank: int, world_size: int) -> dict[tuple[str, int], dict[str, Any]]:
    """All cases on this rank's part of the vocabulary."""
    results = {}
    for added in ADDED:
        model = ModelConfig(vocab_size=VOCAB, additional_vocab_size=added, hidden_size=H, num_heads=4, num_layers=4)
        groups = groups_of(model, Degrees(tensor=world_size))
        for name, case in CASES.items():
            results[name, added] = split_one(model, groups, case)
    return results


def split_one(model: ModelConfig, groups: ProcessGroups, case: tuple[str, tuple[bool, ...], bool]) -> dict[str, Any]:
    normalization, targets, z = case
    added, cpu = model.additional_vocab_size, torch.device("cpu")
    batches = make_batches(added, targets, z)
    values = parameters(added)
    head = DecoupledHead(decoder_config(model, groups.layout, torch.float32), model, groups)
    share = head.share
    padded = F.pad(values["base"], (0, 0, 0, share * groups.layout.tensor - VOCAB), value=3.0)  # must not count
    head.base.weight.data.copy_(padded[share * groups.tensor_rank :][:share])
    if head.added is not None:
        head.added.weight.data.copy_(values["added"])
    hidden = values["hidden"].requires_grad_()
    config = TrainingConfig(loss_normalization=normalization, z_loss=Z_WEIGHT)
    settings = loss_settings(batches, config, groups, SOURCES, cpu)
    reports, total = [], torch.zeros(())
    for states, batch in zip(hidden, batches, strict=True):
        objective, report = loss_function(settings, batch)(output_of(head, states, batch, groups))
        total = total + objective / settings.averaged_over
        reports.append(report)
    total.backward()
    sum_replicated([head], groups.tensor)
    base: list[Any] = [None] * groups.layout.tensor
    dist.all_gather_object(base, head.base.weight.grad, group=groups.tensor)
    return {
        "losses": report_sums(reports, settings, groups, cpu),
        "total": float(total.detach()),
        "gradients": {
            "hidden": hidden.grad,
            "base": torch.cat(base)[:VOCAB],
            "added": torch.zeros(0, H) if head.added is None else head.added.weight.grad,
        },
        "padding": float(torch.cat(base)[VOCAB:].abs().sum()),
        "settings": (settings.tokens, settings.z_tokens, settings.images, settings.averaged_over),
    }


def output_of(head: DecoupledHead, states: Tensor, batch: Batch, groups: ProcessGroups) -> Tensor:
    """[2,b,S], as the last stage gives it."""
    logits = head(states)
    log_sum_exp, target = log_sum_exp_and_target(logits, head.target_columns(batch.labels.t()), groups.tensor)
    return torch.stack((log_sum_exp - target, log_sum_exp)).transpose(1, 2)


@pytest.fixture(scope="module", params=[1, 2, 4])
def ranks(request: pytest.FixtureRequest) -> list[dict[tuple[str, int], dict[str, Any]]]:
    return run_distributed(split, request.param)


@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient(name: str, added: int, ranks: list[dict[tuple[str, int], dict[str, Any]]]) -> None:
    normalization, targets, z = CASES[name]
    batches = make_batches(added, targets, z)
    expected = plain(batches, added, normalization)
    for result in (rank[name, added] for rank in ranks):
        assert result["losses"]["loss"] == pytest.approx(expected["loss"], rel=1e-6, abs=0)
        assert result["losses"]["z_loss"] == pytest.approx(expected["z_loss"], rel=1e-6, abs=0)
        total = expected["loss"] + Z_WEIGHT * expected["z_loss"]
        assert result["total"] == pytest.approx(total, rel=1e-6, abs=0)
        assert result["padding"] == 0.0
        for weight, gradient in result["gradients"].items():
            theirs = expected["gradients"][weight].float()
            assert gradient.shape == theirs.shape
            assert torch.isfinite(gradient).all(), weight
            if not theirs.any():
                assert not gradient.any(), weight
            else:
                assert float((gradient - theirs).abs().max()) <= 2e-6 * float(theirs.abs().max()), weight


@pytest.mark.parametrize("added", ADDED)
def test_the_counts_and_sources_of_a_step(added: int, ranks: list[dict[tuple[str, int], dict[str, Any]]]) -> None:
    batches = make_batches(added, (True, True, True), True)
    counts = {source: 0.0 for source in SOURCES}
    for batch in batches:
        for row, source in enumerate(batch.source):
            counts[source] += float(batch.loss_mask[row].sum())
    tokens = sum(counts.values())
    for rank in ranks:
        result = rank["token mean", added]
        assert result["settings"] == (tokens, sum(float(b.z_mask.sum()) for b in batches), 3, 3)
        losses = result["losses"]
        assert set(losses) == {"loss", "z_loss", "loss/web", "loss/pairs"}  # nothing of a source without tokens
        by_source = sum(losses[f"loss/{source}"] * counts[source] for source in ("web", "pairs"))
        assert by_source / tokens == pytest.approx(losses["loss"], rel=1e-6)
        assert losses["loss/web"] != losses["loss/pairs"]


def share_of_data(rank: int, world_size: int) -> dict[str, Any]:
    """Two data-parallel ranks with different batches; rank 1's have few targets."""
    model = ModelConfig(vocab_size=VOCAB, additional_vocab_size=2, hidden_size=H, num_heads=4, num_layers=4)
    groups = groups_of(model, Degrees(data=2))
    batches = make_batches(2, (True, True, True) if rank == 0 else (True, False, False), rank == 0, seed=rank)
    settings = loss_settings(batches, TrainingConfig(z_loss=Z_WEIGHT), groups, SOURCES, torch.device("cpu"))
    reports, objectives, nll_sum = [], 0.0, 0.0
    for number, batch in enumerate(batches):
        nll = torch.rand(B, S, generator=torch.Generator().manual_seed(10 * rank + number)) * 5
        objective, report = loss_function(settings, stage_input(batch))(torch.stack((nll, nll)))
        objectives += float(objective)
        nll_sum += float((nll * batch.loss_mask).sum())
        reports.append(report)
    losses = report_sums(reports, settings, groups, torch.device("cpu"))
    return {"settings": settings, "losses": losses, "objectives": objectives, "nll_sum": nll_sum, "batches": batches}


def stage_input(batch: Batch) -> Any:
    return SimpleNamespace(loss_mask=batch.loss_mask, z_mask=batch.z_mask, source=batch.source)


def test_divisors_are_counts_over_all_data_parallel_ranks() -> None:
    ranks = run_distributed(share_of_data, 2)
    batches = [batch for rank in ranks for batch in rank["batches"]]
    tokens = sum(float(batch.loss_mask.sum()) for batch in batches)
    loss = sum(rank["nll_sum"] for rank in ranks) / tokens
    for rank in ranks:
        settings: LossSettings = rank["settings"]
        assert settings == ranks[0]["settings"]
        assert (settings.tokens, settings.images, settings.averaged_over) == (tokens, 6, 6)
        assert rank["losses"] == ranks[0]["losses"]
        assert rank["losses"]["loss"] == pytest.approx(loss, rel=1e-6)
    # What megatron-core makes of the objectives: their mean over microbatches and ranks is the loss of the step.
    mean = sum(rank["objectives"] for rank in ranks) / 6
    assert mean == pytest.approx(loss + Z_WEIGHT * ranks[0]["losses"]["z_loss"], rel=1e-6)
