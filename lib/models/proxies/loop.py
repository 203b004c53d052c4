"""One training phase of a proxy model: losses, optimizers, schedule, and a state from which it resumes.

Uses the structure of a model and the batches; knows nothing of scores, or of files except its own state.

Shapes: B rows, T tokens, C vocabulary, L labels, N target tokens of a batch.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.hooks import RemovableHandle

from lib.models.proxies.attention_supervision import supervised_forward
from lib.models.proxies.config import TrainingConfig
from lib.models.proxies.muon import MatrixMuon
from lib.models.proxies.router_balance import RouterBalance
from lib.models.proxies.training_data.batches import ANSWER, IGNORED, REPEAT, TEXT, TrainingBatch, TrainingBatches
from lib.models.structure.anatomy import anatomy

ATTENTION = -1  # in addition to the kinds of tokens: the loss of the supervised heads
LOSS_NAMES = {ATTENTION: "attention", TEXT: "text", ANSWER: "answer", REPEAT: "repeat"}


def losses(model: nn.Module, batch: TrainingBatch, balance: RouterBalance) -> dict[int, torch.Tensor]:
    """Return the mean loss by kind of token in `batch`, and of the supervised heads for rows that repeat one span."""
    balance.keep_N = batch.real_BT.flatten()
    attention_loss = {}
    if batch.spans_B is None:
        logits_BTC = model(**batch.inputs, use_cache=False).logits[:, :-1]
    else:
        logits_BTC, attention_loss[ATTENTION] = supervised_forward(model, batch.inputs, batch.spans_B)
        logits_BTC = logits_BTC[:, :-1]
    targets_BT, kind_BT = batch.inputs["input_ids"][:, 1:], batch.kind_BT[:, 1:]
    target = kind_BT != IGNORED
    loss_N, kind_N = cross_entropy(logits_BTC[target].float(), targets_BT[target], reduction="none"), kind_BT[target]
    if batch.answers_BL is not None:
        log_BL = logits_BTC[kind_BT == ANSWER].float().log_softmax(-1)[:, batch.labels_L]
        loss_N = loss_N.masked_scatter(kind_N == ANSWER, -(batch.answers_BL * log_BL).sum(1))
    kinds = [kind for kind in (TEXT, ANSWER, REPEAT) if (kind_N == kind).any()]
    return attention_loss | {kind: loss_N[kind_N == kind].mean() for kind in kinds}


def add_dropout(model: nn.Module, share: float) -> list[RemovableHandle]:
    """Apply dropout to the outputs of all attention and feed-forward parts in training; return the hooks' handles."""

    def drop(module: nn.Module, _inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(output, share, model.training)

    parts = [part for block in anatomy(model).blocks for part in (block.attention.output, block.feed_forward.module)]
    return [part.register_forward_hook(drop) for part in parts] if share else []


def optimizers(model: nn.Module, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the blocks, Adam for embeddings, head, routers, norms and convolutions."""
    view = anatomy(model)
    apart = {id(view.embeddings.weight), id(view.head.weight)}
    apart |= {id(b.feed_forward.experts.router.weight) for b in view.blocks if b.feed_forward.experts is not None}
    apart |= {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.ndim in (2, 3) and id(p) not in apart]
    matrix_ids = {id(p) for p in matrices}
    rest = [p for p in parameters if id(p) not in matrix_ids]
    return [
        MatrixMuon(matrices, lr=config.muon_rate, weight_decay=config.weight_decay),
        torch.optim.AdamW(rest, lr=config.adam_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


@dataclass
class TrainingRun:
    """A phase in progress. `seconds` and `tokens`: totals so far, including before interruptions."""

    model: nn.Module
    batches: TrainingBatches
    config: TrainingConfig
    identity: str
    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    plans: list[int] = field(default_factory=list)  # the planned numbers of steps, in order of planning
    revised: list[int] = field(default_factory=list)  # steps at which the configuration changed
    earlier_phases: list[dict[str, Any]] = field(default_factory=list)  # their summaries

    def __post_init__(self) -> None:
        self.model.requires_grad_(True)
        self.optimizers = optimizers(self.model, self.config)
        self.rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        self.balance = RouterBalance(anatomy(self.model))
        self.handles = add_dropout(self.model, self.config.dropout)
        self.average = {key: value.clone() for key, value in self.model.state_dict().items()}

    def advance(self) -> dict[str, float]:
        """Take one step; return the losses by name, and `norm`, the norm of Adam's gradients."""
        start = time.perf_counter()
        factor = self.config.rate(self.step)
        for optimizer, rate in zip(self.optimizers, self.rates):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        self.model.train()
        self.balance.reset()
        torch.manual_seed(self.config.seed + self.step)  # so that dropout depends only on the step
        values: dict[str, float] = {}
        for batch in self.batches.at(self.step):
            values |= self._backward(batch)
        norm = nn.utils.clip_grad_norm_(self.optimizers[1].param_groups[0]["params"], 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.balance.adjust(self.config.balance_rate * factor)
        self.step += 1
        self._update_average()
        self.seconds += time.perf_counter() - start
        return values | {"norm": float(norm)}

    @torch.no_grad()
    def _update_average(self) -> None:
        """Move the averaged weights towards the current weights: an average over all steps at first, later over the
        last steps.
        """
        keep = min(self.config.average_decay, self.step / (self.step + 9))
        for key, value in self.model.state_dict().items():
            self.average[key].lerp_(value, 1 - keep) if value.is_floating_point() else self.average[key].copy_(value)

    def _backward(self, batch: TrainingBatch) -> dict[str, float]:
        """Add the gradients of one batch; return its losses by name."""
        config = self.config
        weights = {
            ATTENTION: config.attention_weight,
            TEXT: 1.0,
            ANSWER: config.answer_weight,
            REPEAT: config.repeat_weight,
        }
        self.balance.loss = 0.0
        by_kind = losses(self.model, batch, self.balance)
        total = sum(weights[kind] * loss for kind, loss in by_kind.items()) + config.balance_weight * self.balance.loss
        torch.as_tensor(batch.weight * total).backward()
        self.tokens += batch.inputs["input_ids"].numel()
        return {LOSS_NAMES[kind]: loss.item() for kind, loss in by_kind.items()}

    def finish(self) -> None:
        """End the training: load the averaged weights into the model and remove all hooks."""
        self.model.load_state_dict(self.average)
        self.balance.close()
        for handle in self.handles:
            handle.remove()

    def summary(self) -> dict[str, Any]:
        """Return the summary of this phase for `training.json`."""
        config = self.config
        return {
            "steps": self.step,
            "seconds": round(self.seconds),
            "averaged": config.average_decay > 0,
            "teacher": config.teacher_share > 0,
            "tokens": self.tokens,
            "plans": self.plans,
            "revised": self.revised,
            "seed": config.seed,
            "threads": config.threads,
            "start_from": config.start_from,
        }

    def save(self, path: Path) -> None:
        """Write the state to `path` atomically, through a temporary file next to it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part")
        state = {key: getattr(self, key) for key in ("identity", "step", "seconds", "tokens", "plans", "revised")}
        state |= {"model": self.model.state_dict(), "average": self.average}
        state |= {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}
        torch.save(state, temporary)
        temporary.replace(path)

    def resume(self, path: Path, below: int | None = None) -> bool:
        """Load the state in `path` if it has the same model, configuration and data, and fewer steps than `below`;
        return whether it was loaded.
        """
        if not path.is_file():
            return False
        state = torch.load(path, weights_only=True)
        if state["identity"] != self.identity or (below is not None and state["step"] >= below):
            return False
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        for key in ("step", "seconds", "tokens", "plans", "revised"):
            setattr(self, key, state[key])
        return True
