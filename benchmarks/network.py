"""What does training ATUM send between nodes, and what does a slower network cost?

Fake nodes of two ranks each (benchmarks/namespaces.py: Linux network namespaces with capped links; root only) train the
same weights on the same batch, by

    zero3       DeepSpeed ZeRO-3 with Hugging Face's IdeficsForVisionText2Text: the stack of the first IDEFICS
    fsdp2       torch's FSDP2, everything sharded over all ranks
    hsdp        FSDP2 sharded inside a node and replicated across nodes: the modern rival
    tp2pp2 ...  this project: tensor ranks inside a node, pipeline stages or data-parallel ranks on different nodes

Bytes out of each node per step are read at its interface and compared with closed forms
(benchmarks/network_formulas.py). Step times are taken without a cap and at several, in turn; one of them gives the fake
node as many bytes per FLOP as an AWS p4d has. `x` is what ZeRO-3 sends out of a node in a step, divided by the cap, for
all schemes: the least time that its step can take. A slope is that of step time over x, and a slowdown is step time at
p4d's bytes per FLOP over step time without a cap.

    python benchmarks/network.py            # 2 and 4 nodes; one JSON object on the last line, and a plot
    python benchmarks/network.py --short    # 2 nodes, few steps

DeepSpeed gets an environment of its own, on first use (.venvs/deepspeed; torch and transformers are those of this
environment). Exit code 1 if losses differ, bytes are not the formula's or a link does not reach its cap; 2 without the
rights or programs that fake nodes take.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import math
import os
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

import torch

from benchmarks.namespaces import STOPPING, FakeNodes, fake_nodes, why_not
from benchmarks.network_formulas import Traffic, by_rows, by_values, full_shard, hybrid_shard, model_parallel
from benchmarks.network_rank import DEEPSPEED, IMAGES, MODEL, RANKS_PER_NODE, ROWS, Degrees, Ranks, started
from benchmarks.step import cpu_name
from megatron_atum.config.loader import preset
from megatron_atum.config.schema import ModelConfig
from megatron_atum.errors import ConfigError, RankFailure
from megatron_atum.flops import Work, model_flops
from megatron_atum.launch.own_environment import make_environment
from megatron_atum.parallel.device import hide_accelerators
from megatron_atum.training.plotting.drawing import PALETTE, load_matplotlib

SCHEMES = {  # by nodes
    2: ("zero3", "fsdp2", "hsdp", "tp2pp2", "tp2dp2"),
    4: ("zero3", "fsdp2", "hsdp", "tp2pp2dp2", "tp2dp4"),
}
ATUM = {2: "tp2pp2", 4: "tp2pp2dp2"}  # whose figures stand for this project
# p4d.24xlarge: 400 Gbit/s of network and 8 A100 of 312 TFLOP/s in bf16, of which good training reaches 45 %.
P4D_GPUS = 8
BYTES_PER_FLOP = 50e9 / (P4D_GPUS * 312e12 * 0.45)
LOSSES = 3  # steps whose losses are compared; they also warm up
AGREE = 1e-4  # largest relative difference of losses
FORMULA_ERROR = 0.03
LINK_USE = 0.8  # least share of its cap that a link must reach in an all-gather


@dataclass(frozen=True)
class Plan:
    caps: tuple[float, ...]  # multiples of the scaled cap; 1 is among them
    rounds: int  # over all caps
    steps: int  # of each scheme between two changes of the cap
    node_flops: float | None = None  # FLOP/s to take instead of measuring them


# Measuring ------------------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """One scheme. Step times are by cap in bytes/s, None without one."""

    losses: list[float]  # of the first steps
    sent: list[list[float]] = field(default_factory=list)  # bytes out of each node per step, by block
    seconds: dict[float | None, list[float]] = field(default_factory=dict)  # per step, by block

    @property
    def out(self) -> list[float]:
        """Bytes out of each node per step: the median, since what TCP sends twice in one block belongs to no scheme."""
        return [statistics.median(of_node) for of_node in zip(*self.sent, strict=True)]

    def add(self, cap: float | None, steps: int, seconds: float, sent: list[int]) -> None:
        """A block of steps."""
        self.seconds.setdefault(cap, []).append(seconds)
        self.sent.append([of_node / steps for of_node in sent])


@dataclass(frozen=True)
class Link:
    """What is measured once for a number of nodes."""

    node_flops: float  # FLOP/s of a node while all compute
    caps: tuple[float, ...]  # bytes/s
    use: dict[float, float]  # share of each cap that an all-gather reaches, the better of two

    @property
    def scaled_cap(self) -> float:
        return self.node_flops * BYTES_PER_FLOP

    @property
    def order(self) -> list[float | None]:
        """From no cap to the lowest one."""
        return [None, *sorted(self.caps, reverse=True)]


def measure(count: int, schemes: Sequence[str], plan: Plan) -> tuple[Link, dict[str, Measured]]:
    """All schemes on so many nodes. All have their ranks at the same time, but only one of them computes.

    Raises:
        RankFailure: a rank died or hangs.
    """
    with fake_nodes(count) as nodes, contextlib.ExitStack() as stack:
        found, running = {}, {}
        for number, scheme in enumerate(schemes):
            began = time.monotonic()
            running[scheme] = stack.enter_context(started(scheme, nodes, port=29500 + number))
            losses, _ = running[scheme].steps(LOSSES)
            found[scheme] = Measured(losses)
            print(f"{count} nodes: {scheme} is ready after {time.monotonic() - began:.0f} s", file=sys.stderr)
        link = measure_link(nodes, running[schemes[0]], plan)
        for turn in range(plan.rounds):
            began = time.monotonic()
            there = 1 if turn % 2 == 0 else -1  # and back again
            for cap in link.order[::there]:
                nodes.set_cap(cap)
                for scheme in schemes[::there]:
                    _block(nodes, running[scheme], found[scheme], cap, plan.steps)
            print(f"{count} nodes: round {turn} took {time.monotonic() - began:.0f} s", file=sys.stderr)
    return link, found


def measure_link(nodes: FakeNodes, ranks: Ranks, plan: Plan) -> Link:
    node_flops = plan.node_flops
    if node_flops is None:
        replies, _ = ranks.ask(do="gemm", seconds=2.0)
        node_flops = sum(reply["flops"] for reply in replies) / nodes.count
    caps = tuple(multiple * node_flops * BYTES_PER_FLOP for multiple in plan.caps)
    use = {}
    for cap in caps:
        nodes.set_cap(cap)
        use[cap] = max(_gathered(nodes, ranks, cap) for _ in range(2))
    return Link(node_flops, caps, use)


def _gathered(nodes: FakeNodes, ranks: Ranks, cap: float) -> float:
    """Share of the cap in an all-gather that takes a second on each link at best."""
    before = _bytes_out(nodes)
    _, seconds = ranks.ask(do="gather", bytes=round(cap / (nodes.count * RANKS_PER_NODE - 1)))
    return min(_since(before, nodes)) / seconds / cap


def _block(nodes: FakeNodes, ranks: Ranks, measured: Measured, cap: float | None, steps: int) -> None:
    before = _bytes_out(nodes)
    _, seconds = ranks.steps(steps)
    measured.add(cap, steps, seconds, _since(before, nodes))


def _bytes_out(nodes: FakeNodes) -> list[int]:
    return [nodes.bytes_out(node) for node in range(nodes.count)]


def _since(before: list[int], nodes: FakeNodes) -> list[int]:
    return [after - first for first, after in zip(before, _bytes_out(nodes), strict=True)]


# Judging --------------------------------------------------------------------------------------------------------------


def formula(scheme: str, count: int, batches: int = 1) -> list[Traffic]:
    """Closed form of the bytes out of each node in a step over so many of the batches."""
    model, ranks = MODEL.model(), count * RANKS_PER_NODE
    if scheme in ("zero3", "fsdp2"):
        return [full_shard(model, ranks, by_values if scheme == "zero3" else by_rows)] * count
    if scheme == "hsdp":
        return [hybrid_shard(model, count, RANKS_PER_NODE)] * count
    degrees = Degrees.of(scheme)
    own = replace(degrees.microbatches, number=batches * degrees.microbatches.number)
    return model_parallel(model, degrees.layout(), own, RANKS_PER_NODE)


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the line with the least squares through (x, y)."""
    xs, ys = zip(*points, strict=True)
    return statistics.linear_regression(xs, ys).slope


def judge(count: int, link: Link, found: dict[str, Measured]) -> dict[str, Any]:
    """Figures of so many nodes."""
    base = "zero3" if "zero3" in found else "fsdp2"
    x = {cap: max(found[base].out) / cap if cap else 0.0 for cap in link.order}
    losses = found[base].losses
    return {
        "x_s": {_name(cap): round(seconds, 4) for cap, seconds in x.items()},
        "x_of": base,
        "node_gflops": round(link.node_flops / 1e9, 2),
        "scaled_cap_bytes_per_s": round(link.scaled_cap),
        "link_use": {_name(cap): round(use, 3) for cap, use in link.use.items()},
        "loss_difference": max(
            abs(a / b - 1) for one in found.values() for a, b in zip(one.losses, losses, strict=True)
        ),
        "schemes": {scheme: _judge_scheme(scheme, count, link, one, x) for scheme, one in found.items()},
    }


def _judge_scheme(scheme: str, count: int, link: Link, one: Measured, x: dict[float | None, float]) -> dict[str, Any]:
    forms = formula(scheme, count)
    times = {cap: statistics.median(one.seconds[cap]) for cap in link.order}
    busiest = max(range(count), key=lambda node: one.out[node])
    return {
        "bytes": round(one.out[busiest]),
        "bytes_by_node": [round(out) for out in one.out],
        "formula_by_node": [round(form.moved) for form in forms],
        "bytes_ring": round(one.out[busiest] - forms[busiest].moved + forms[busiest].ring),
        "formula_error": max(abs(out / form.moved - 1) for out, form in zip(one.out, forms, strict=True)),
        "step_s": {_name(cap): round(seconds, 4) for cap, seconds in times.items()},
        "step_s_by_round": {_name(cap): [round(s, 4) for s in seconds] for cap, seconds in one.seconds.items()},
        "slope": slope([(x[cap], seconds) for cap, seconds in times.items()]),
        "slowdown": times[link.scaled_cap] / times[None],
        "losses": one.losses,
    }


def _name(cap: float | None) -> str:
    return "none" if cap is None else str(round(cap))


def report(judged: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """The figures of the fewest nodes first, then everything."""
    first = min(judged)
    schemes, ours = judged[first]["schemes"], ATUM[first]
    stands_for = {"zero3": judged[first]["x_of"], "hsdp": "hsdp", "atum": ours}
    over = {f"{name}_over_atum": scheme for name, scheme in stands_for.items() if name != "atum"}
    each = [row for one in judged.values() for row in one["schemes"].values()]
    return {
        "bytes_per_step": {scheme: row["bytes"] for scheme, row in schemes.items()},
        "bytes_per_step_ring": {scheme: row["bytes_ring"] for scheme, row in schemes.items()},
        "max_formula_error": round(max(row["formula_error"] for row in each), 4),
        **{f"bytes_{name}": round(schemes[one]["bytes"] / schemes[ours]["bytes"], 2) for name, one in over.items()},
        **{
            f"bytes_{name}_ring": round(schemes[one]["bytes_ring"] / schemes[ours]["bytes_ring"], 2)
            for name, one in over.items()
        },
        **{f"slope_{name}": round(schemes[one]["slope"], 3) for name, one in stands_for.items()},
        **{f"slowdown_{name}": round(schemes[one]["slowdown"], 3) for name, one in stands_for.items()},
        "stands_for": stands_for,
        "max_loss_difference": max(one["loss_difference"] for one in judged.values()),
        "min_link_use": min(use for one in judged.values() for use in one["link_use"].values()),
        **tokens(first, judged[first]["x_of"]),
        "nodes": {str(count): one for count, one in judged.items()},
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def tokens(count: int, base: str) -> dict[str, int]:
    """How far the figures reach. A pipeline's bytes grow with a step's tokens; those of sharded and replicated weights
    do not. All by the closed forms.

    break_even: tokens of a rank and step with which the arithmetic, at full speed, takes as long as ZeRO-3's bytes;
    below that a step is bound by the network even where everything overlaps. Here, and for the 80B model on 64 p4d in
    bf16, without recomputation.
    """
    step, ranks = ROWS * MODEL.length, count * RANKS_PER_NODE
    zero3, hsdp = (formula(scheme, count)[0].moved for scheme in (base, "hsdp"))
    once, twice = (max(out.moved for out in formula(ATUM[count], count, batches)) for batches in (1, 2))
    large = preset("atum-80b")
    zero3_80b = full_shard(large, 64 * P4D_GPUS, by_values).ring / 2  # in bf16
    here = zero3 / BYTES_PER_FLOP / RANKS_PER_NODE / _flops_per_token(MODEL.model(), MODEL.length)
    there = zero3_80b / BYTES_PER_FLOP / P4D_GPUS / _flops_per_token(large, 1024)
    return {
        "tokens_per_step": step,
        "tokens_per_step_with_bytes_of_hsdp": round(step * (1 + (hsdp - once) / (twice - once))),
        "tokens_per_rank": step // ranks,
        "break_even_tokens_per_rank": round(here),
        "break_even_tokens_per_gpu_80b": round(there),
    }


def _flops_per_token(model: ModelConfig, length: int) -> float:
    return model_flops(model, Work(1, length, IMAGES)).total / length


def complaints(result: dict[str, Any]) -> list[str]:
    """What makes the figures worthless."""
    found = []
    if result["max_loss_difference"] > AGREE:
        found.append(f"losses differ by {result['max_loss_difference']:.1e}: the schemes do not train alike")
    if result["max_formula_error"] > FORMULA_ERROR:
        found.append(f"bytes are off the closed form by {result['max_formula_error']:.1%}")
    if result["min_link_use"] < LINK_USE:
        found.append(f"a link reaches only {result['min_link_use']:.0%} of its cap: is the machine busy?")
    return found


# Showing --------------------------------------------------------------------------------------------------------------


def print_tables(judged: dict[int, dict[str, Any]]) -> None:
    for count, one in judged.items():
        cap = one["scaled_cap_bytes_per_s"] / 1e6
        print(f"\n{count} nodes x {RANKS_PER_NODE} ranks of {one['node_gflops']} GFLOP/s per node")
        print(f"at {cap:.2f} MB/s a node has p4d's bytes per FLOP")
        shares = ", ".join(f"{int(name) / 1e6:.2f} MB/s {use:.0%}" for name, use in one["link_use"].items())
        print(f"what an all-gather reaches of each cap: {shares}\n")
        print(f"{'':12}{'MB per node and step':^33}   step seconds by x")
        columns = "".join(f"{x:>8.2f}" for x in one["x_s"].values())
        print(f"{'':12}{'measured':>9}{'formula':>8}{'error':>8}{'ring':>8}   {columns}{'slope':>8}{'slowdown':>10}")
        for scheme, row in one["schemes"].items():
            measured, form, ring = (
                size / 1e6 for size in (row["bytes"], max(row["formula_by_node"]), row["bytes_ring"])
            )
            times = "".join(f"{seconds:>8.2f}" for seconds in row["step_s"].values())
            print(
                f"{scheme:12}{measured:>9.3f}{form:>8.3f}{row['formula_error']:>8.2%}{ring:>8.3f}   "
                f"{times}{row['slope']:>8.3f}{row['slowdown']:>10.2f}"
            )


def draw(judged: dict[int, dict[str, Any]], file: Path) -> None:
    """Step time over x, a panel for each number of nodes. After `load_matplotlib`.

    Raises:
        ConfigError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(judged), 4.2), layout="constrained")
    for number, (count, one) in enumerate(judged.items()):
        axes = figure.add_subplot(1, len(judged), number + 1)
        x = list(one["x_s"].values())
        for colour, (scheme, row) in zip(PALETTE, one["schemes"].items(), strict=False):
            axes.plot(x, list(row["step_s"].values()), "o", ls="-", ms=4, color=colour, label=scheme)
        axes.plot([0, max(x)], [0, max(x)], color="0.6", ls="--", lw=1, label="least time of ZeRO-3's bytes")
        bytes_out = one["schemes"][one["x_of"]]["bytes"]
        axes.axvline(bytes_out / one["scaled_cap_bytes_per_s"], color="0.6", ls=":", lw=1)
        axes.set(title=f"{count} nodes x {RANKS_PER_NODE} ranks", ylim=(0, None))
        axes.set(xlabel="bytes of ZeRO-3 per node and step / cap, s (dotted: p4d's bytes per FLOP)", ylabel="step, s")
        axes.legend()
        axes.grid(alpha=0.3)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=110)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot {file} cannot be written: {error}") from None


# DeepSpeed ------------------------------------------------------------------------------------------------------------

DEEPSPEED_PACKAGE = "deepspeed==0.19.8"


def make_deepspeed() -> None:
    """An environment with DeepSpeed, on top of the packages of this one, made once. Another run waits meanwhile.

    Raises:
        ConfigError: pip cannot install it.
    """
    try:
        make_environment(
            DEEPSPEED,
            [DEEPSPEED_PACKAGE],
            shared_site=Path(torch.__file__).parents[1],
            options=["--no-build-isolation"],
            variables={"DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"},
        )
    except ConfigError as error:
        raise ConfigError(f"no DeepSpeed, which --without deepspeed leaves out: {error}") from None


# The command ----------------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="2 nodes and fewer steps")
    parser.add_argument("--nodes", type=int, nargs="+", choices=sorted(SCHEMES), help="default: 2 4, short 2")
    parser.add_argument(
        "--caps", type=positive, nargs="+", help="multiples of the cap with p4d's bytes per FLOP; 1 always"
    )
    parser.add_argument("--rounds", type=counted, help="over all caps (default 3, short 2)")
    parser.add_argument("--steps", type=counted, default=1, help="of each scheme at each cap in a round (default 1)")
    parser.add_argument("--node-gflops", type=positive, help="GFLOP/s of a node; default: measured")
    parser.add_argument("--without", nargs="*", default=[], choices=["deepspeed"], help="what to leave out")
    parser.add_argument("--plot", type=Path, default=Path("runs/network.png"), help="default: %(default)s")
    return parser.parse_args()


def positive(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0: {text}")
    return number


def counted(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more: {text}")
    return number


def run(options: argparse.Namespace) -> int:
    load_matplotlib()  # what is missing is said before all the work
    if "deepspeed" in options.without:
        print("DeepSpeed is left out: FSDP2 stands for ZeRO-3 in all figures", file=sys.stderr)
    else:
        make_deepspeed()
    caps = {1.0, *(options.caps or ((2, 4, 8) if options.short else (0.75, 2, 4, 8)))}
    plan = Plan(
        caps=tuple(sorted(caps)),
        rounds=options.rounds or (2 if options.short else 3),
        steps=options.steps,
        node_flops=options.node_gflops and options.node_gflops * 1e9,
    )
    judged = {}
    gc.collect()
    gc.freeze()  # ranks share what is imported
    for count in sorted({*options.nodes} if options.nodes else ([2] if options.short else [2, 4])):
        schemes = [scheme for scheme in SCHEMES[count] if scheme != "zero3" or "deepspeed" not in options.without]
        judged[count] = judge(count, *measure(count, schemes, plan))
    result = report(judged)
    print_tables(judged)
    print(json.dumps(result), flush=True)  # before the plot, whose file may be at fault
    draw(judged, options.plot)
    print(f"\nwrote {options.plot}", file=sys.stderr)
    wrong = complaints(result)
    for line in wrong:
        print(f"network: {line}", file=sys.stderr)
    return 1 if wrong else 0


def main() -> int:
    options = parse_arguments()
    hide_accelerators()
    reason = why_not()
    if reason:
        print(f"network: NOTHING IS MEASURED: {reason}", file=sys.stderr)
        return 2
    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, _stop)  # so that the namespaces go
    try:
        return run(options)
    except (ConfigError, RankFailure) as error:
        print(f"network: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


def _stop(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
