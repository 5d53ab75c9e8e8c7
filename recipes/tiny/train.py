"""Trains the demo checkpoint; run it as `python recipes/tiny/train.py`.

Everything is counted in steps and seeded by the step, so a run that was stopped continues from its
last checkpoint with the same data, and the stage table below describes the shipped checkpoint.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path

# Without this, idle OpenMP threads spin; on a shared machine that made steps 5-10 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from data import ANSWER, FIRST, TEXT, TrainingData  # noqa: E402
from export import export  # noqa: E402

from model import BF16, TinyConfig, TinyModel, cos_sin, init_parameters  # noqa: E402

TOKENS_PER_STEP = 8192


@dataclass(frozen=True)
class Stage:
    """One part of the curriculum.

    Attributes:
        length: Tokens of a sequence.
        theta: RoPE base. It rises with the length: with a small base induction appears earlier.
        steps: Optimiser steps.
        focus: Share of sequences with the demo's own task (many "magic numbers").
        official: Share of queries in the demo's own form.
        dense: More needles and queries, less filler.
        near_values: Values that begin alike, and more weight on the bytes that tell them apart.
        lr: Learning-rate factor at the first and after the last step.
        temperature: Range of the random factor of the attention logits (log-uniform in four of
            five steps), or None. The model must be sure of its keys at a low temperature and
            bear the s(n)^2 of DCA, which is 1.6 at 16 times and 2.0 at 64 times its length.
    """

    length: int
    theta: float
    steps: int
    focus: float = 0.0
    official: float = 0.3
    dense: bool = False
    near_values: bool = False
    lr: tuple[float, float] = (1.0, 1.0)
    temperature: tuple[float, float] | None = None


STAGES = (
    Stage(128, 1e4, 400),
    Stage(256, 2e4, 250),
    Stage(512, 4e4, 300, focus=0.4, temperature=(0.55, 1.6)),
    Stage(1024, 6e4, 150, focus=0.5, temperature=(0.55, 2.0)),
    Stage(2048, 1e5, 180, focus=0.6, lr=(1.0, 0.6), temperature=(0.5, 2.2)),
    Stage(2048, 1e5, 320, focus=0.7, dense=True, lr=(0.6, 0.01), temperature=(0.55, 2.2)),
    Stage(
        2048,
        1e5,
        300,
        focus=0.8,
        dense=True,
        near_values=True,
        lr=(0.4, 0.01),
        temperature=(0.55, 2.2),
    ),
    Stage(
        2048,
        1e5,
        400,
        focus=0.9,
        dense=True,
        near_values=True,
        lr=(0.4, 0.01),
        temperature=(0.7, 2.1),
    ),
    Stage(
        2048,
        1e5,
        750,
        focus=1.0,
        official=0.6,
        dense=True,
        near_values=True,
        lr=(0.7, 0.01),
        temperature=(0.6, 2.1),
    ),
)
WARMUP_STEPS = 60
MUON_LR, ADAM_LR = 0.02, 3e-3
TEXT_WEIGHT = 0.2  # of plain text beside answers: enough to keep the n-gram features healthy
FIRST_WEIGHT = 3.0  # more for the first byte of an answer, which is where retrieval fails


class Muon:
    """Muon: momentum whose update is orthogonalised, for all matrices but the embedding.

    Parameters of one shape are stacked, so that a few batched products serve all of them.
    """

    def __init__(self, params: list[torch.Tensor], momentum: float = 0.95) -> None:
        self.momentum = momentum
        self.groups: dict[tuple[int, ...], list[torch.Tensor]] = {}
        for param in params:
            self.groups.setdefault(tuple(param.shape), []).append(param)
        self.state = {s: torch.zeros(len(group), *s) for s, group in self.groups.items()}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for shape, group in self.groups.items():
            grad = torch.stack([param.grad for param in group])
            average = self.state[shape].lerp_(grad, 1 - self.momentum)
            update = grad.lerp(average, self.momentum)
            tall = shape[0] > shape[1]
            x = update.mT if tall else update
            x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-9)).to(BF16)
            for _ in range(5):  # Newton-Schulz iteration with the usual quintic coefficients
                a = x @ x.mT
                x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
            x = (x.mT if tall else x).float() * (lr * max(1.0, shape[0] / shape[1]) ** 0.5)
            for param, delta in zip(group, x, strict=True):
                param.sub_(delta)
                param.grad = None


class Trainer:
    """A run in an output folder.

    Args:
        out: Folder of log, checkpoints and exported models.
        seed: Seed of weights and data.
        compile: See TinyModel.
    """

    def __init__(self, out: Path, seed: int, *, compile: bool) -> None:
        self.out, self.seed = out, seed
        out.mkdir(parents=True, exist_ok=True)
        self.config = TinyConfig()
        self.params = init_parameters(self.config, seed)
        matrix = {n for n, p in self.params.items() if p.ndim == 2 and "embed" not in n}
        self.rest = [p for n, p in self.params.items() if n not in matrix]
        self.muon = Muon([p for n, p in self.params.items() if n in matrix])
        self.adam = torch.optim.Adam(self.rest, lr=ADAM_LR, betas=(0.9, 0.98))
        self.model = TinyModel(self.config, self.params, compile=compile)
        self.data = TrainingData(seed)
        self.step = 0  # steps done in all stages together

    def say(self, text: str) -> None:
        print(text, flush=True)
        with (self.out / "log.txt").open("a") as log:
            log.write(text + "\n")

    def save(self, name: str) -> None:
        """Saves weights and optimiser; a kill during the write leaves the old file intact."""
        state = {
            "step": self.step,
            "params": {name: param.detach() for name, param in self.params.items()},
            "muon": self.muon.state,
            "adam": self.adam.state_dict(),
        }
        torch.save(state, self.out / "writing.pt")
        os.replace(self.out / "writing.pt", self.out / name)

    def load(self, name: str) -> None:
        state = torch.load(self.out / name)
        self.step = state["step"]
        for key, value in state["params"].items():
            self.params[key].data.copy_(value)
        self.muon.state = state["muon"]
        self.adam.load_state_dict(state["adam"])

    def run(self, stage: Stage, begin: int, save_every: int) -> None:
        """Runs the rest of a stage that begins at step `begin`."""
        rows = TOKENS_PER_STEP // stage.length
        table = cos_sin(torch.arange(stage.length), self.config.head_dim, stage.theta)
        cos, sin = (t.repeat(rows, 1) for t in table)
        sums: list[tuple[float, ...]] = []
        start = time.monotonic()
        while self.step < begin + stage.steps:
            progress = (self.step - begin) / stage.steps
            lr = stage.lr[0] + (stage.lr[1] - stage.lr[0]) * progress
            lr *= min(1.0, (self.step + 1) / WARMUP_STEPS)
            sums.append(self._step(stage, rows, cos, sin, lr))
            self.step += 1
            if self.step % 20 == 0:
                answer, first, loss, text = np.mean(sums, 0)
                seconds = (time.monotonic() - start) / len(sums)
                self.say(
                    f"step {self.step} length {stage.length}: answer bytes {answer:.4f} first "
                    f"bytes {first:.4f} answer loss {loss:.4f} text loss {text:.3f} "
                    f"lr {lr:.3f} {seconds:.2f} s/step"
                )
                sums, start = [], time.monotonic()
            if self.step % save_every == 0:
                self.save("last.pt")

    def _step(
        self, stage: Stage, rows: int, cos: torch.Tensor, sin: torch.Tensor, lr: float
    ) -> tuple[float, ...]:
        """Does one step; returns accuracies of answer and first bytes, and both losses."""
        data, kinds = self.data.batch(
            self.step,
            rows,
            stage.length,
            focus=stage.focus,
            official=stage.official,
            dense=stage.dense,
            near_values=stage.near_values,
        )
        ids = torch.from_numpy(data[:, :-1].copy())
        labels = torch.from_numpy(data[:, 1:].copy()).reshape(-1)
        classes = torch.from_numpy(kinds.reshape(-1).copy())
        answer, first, text = classes >= ANSWER, classes == FIRST, classes == TEXT
        # With near values, the second and third byte of an answer are as hard as the first.
        hard = first | first.roll(1) | first.roll(2) if stage.near_values else first
        weights = (answer + FIRST_WEIGHT * hard) / answer.sum() + TEXT_WEIGHT * text / text.sum()
        temperature = 1.0
        rng = np.random.default_rng((self.seed, self.step))
        if stage.temperature is not None and rng.random() < 0.8:
            temperature = float(np.exp(rng.uniform(*np.log(stage.temperature))))
        loss, losses, hits = self.model.loss(ids, labels, weights, cos, sin, temperature)
        loss.backward()
        self.muon.step(MUON_LR * lr)
        torch.nn.utils.clip_grad_norm_(self.rest, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = ADAM_LR * lr
        self.adam.step()
        self.adam.zero_grad()
        losses = losses.detach()
        return (
            hits[answer].float().mean().item(),
            hits[first].float().mean().item(),
            losses[answer].mean().item(),
            losses[text].mean().item(),
        )


def average(checkpoints: list[Path]) -> dict[str, torch.Tensor]:
    """Mean of the weights of several checkpoints.

    The last two stages end at the same small learning rate and are equally good; what they get
    wrong differs, and their mean gets more right than either (README.md).
    """
    weights = [torch.load(path)["params"] for path in checkpoints]
    return {name: sum(w[name] for w in weights) / len(weights) for name in weights[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/tiny"), help="output folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--no-compile", action="store_true", help="run without a C++ compiler")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    trainer = Trainer(args.out, args.seed, compile=not args.no_compile)
    names = [f"stage{index}.pt" for index in range(len(STAGES))]
    resume = [name for name in ("last.pt", *reversed(names)) if (args.out / name).exists()]
    if resume:
        trainer.load(resume[0])
        trainer.say(f"resumed at step {trainer.step}")
    begin = 0
    for name, stage in zip(names, STAGES, strict=True):
        if trainer.step < begin + stage.steps:
            trainer.say(f"{stage}")
            trainer.run(stage, begin, args.save_every)
            trainer.save(name)
            export(trainer.params, trainer.config, stage.theta, args.out / Path(name).stem)
        begin += stage.steps
    params = average([args.out / name for name in names[-2:]])
    export(params, trainer.config, STAGES[-1].theta, args.out / "demo_model")
    trainer.say(f"done: {args.out / 'demo_model'}")


if __name__ == "__main__":
    main()
