"""One training run of a stand-in: loss, expert balance, optimizers, schedule, and a state that can be taken up again.

Knows the anatomy of a model and the lessons; knows nothing of files other than its own state, or of scores.

Shapes: B rows, T tokens, C vocabulary, E experts, N tokens of a batch.
"""

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lib.models.proxies.attention_supervision import guided
from lib.models.proxies.batches import ANSWER, REPEAT, SILENT, TEXT, Lesson, Lessons
from lib.models.proxies.config import Recipe
from lib.models.proxies.muon import Muon
from lib.models.structure.anatomy import Anatomy, anatomy

LOG = logging.getLogger(__name__)
GUIDE = -1  # beside the kinds of tokens: where heads look


@dataclass
class Balance:
    """Watches the routers of a model: the balance loss of a forward pass, and how many tokens each expert got."""

    view: Anatomy
    keep_N: torch.Tensor | None = None
    loss: torch.Tensor | float = 0.0
    counts: dict[int, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.blocks = [block for block in self.view.blocks if block.feed_forward.experts is not None]
        self.handles = [
            experts.router.register_forward_hook(self._watch(block.index, experts))
            for block in self.blocks
            for experts in [block.feed_forward.experts]
        ]

    def _watch(self, index: int, experts):
        def hook(_module, _inputs, output) -> None:
            logits_NE, _, chosen_NK = output
            if self.keep_N is not None:
                logits_NE, chosen_NK = logits_NE[self.keep_N], chosen_NK[self.keep_N]
            count_E = torch.bincount(chosen_NK.flatten(), minlength=experts.count).float()
            self.counts[index] = self.counts.get(index, 0) + count_E
            if torch.is_grad_enabled():
                sigmoid = experts.correction_bias is not None
                share_NE = logits_NE.float().sigmoid() if sigmoid else logits_NE.float().softmax(-1)
                mean_E = (share_NE / share_NE.sum(-1, keepdim=True)).mean(0)
                self.loss = self.loss + experts.count * (count_E / count_E.sum() * mean_E).sum() / len(self.blocks)

        return hook

    def reset(self) -> None:
        self.loss, self.counts = 0.0, {}

    def adjust(self, rate: float) -> None:
        """Raise the correction bias of experts below their fair share, lower the others' (Wang et al., 2024)."""
        for block in self.blocks:
            bias_E, count_E = block.feed_forward.experts.correction_bias, self.counts[block.index]
            if bias_E is not None:
                bias_E += rate * torch.sign(count_E.mean() - count_E)

    def shares(self) -> dict[int, list[float]]:
        """Return, per block, each expert's tokens over its fair share."""
        return {index: (count_E / count_E.mean()).tolist() for index, count_E in self.counts.items()}

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


def losses(model: nn.Module, lesson: Lesson, balance: Balance) -> dict[int, torch.Tensor]:
    """Return the mean loss of each kind of token in `lesson`, and of where heads look if that is known."""
    balance.keep_N = lesson.real_BT.flatten()
    if lesson.spans_B is None:
        logits_BTC, found = model(**lesson.inputs, use_cache=False).logits[:, :-1], {}
    else:
        logits_BTC, guide = guided(model, lesson.inputs, lesson.spans_B)
        logits_BTC, found = logits_BTC[:, :-1], {GUIDE: guide}
    targets_BT, kind_BT = lesson.inputs["input_ids"][:, 1:], lesson.kind_BT[:, 1:]
    wanted = kind_BT != SILENT
    loss_N, kind_N = cross_entropy(logits_BTC[wanted].float(), targets_BT[wanted], reduction="none"), kind_BT[wanted]
    if lesson.answers_BL is not None:
        log_BL = logits_BTC[kind_BT == ANSWER].float().log_softmax(-1)[:, lesson.labels_L]
        loss_N = loss_N.masked_scatter(kind_N == ANSWER, -(lesson.answers_BL * log_BL).sum(1))
    return found | {kind: loss_N[kind_N == kind].mean() for kind in (TEXT, ANSWER, REPEAT) if (kind_N == kind).any()}


def drop_parts(model: nn.Module, share: float) -> list:
    """Let every attention and feed-forward part drop a share of what it adds, in training; return the handles."""

    def drop(module, _inputs, output):
        return nn.functional.dropout(output, share, model.training)

    parts = [part for block in anatomy(model).blocks for part in (block.attention.output, block.feed_forward.module)]
    return [part.register_forward_hook(drop) for part in parts] if share else []


def optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the blocks, Adam for embeddings, head, routers, norms and convolutions."""
    view = anatomy(model)
    apart = {id(view.embeddings.weight), id(view.head.weight)}
    apart |= {id(b.feed_forward.experts.router.weight) for b in view.blocks if b.feed_forward.experts is not None}
    apart |= {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.ndim in (2, 3) and id(p) not in apart]
    chosen = {id(p) for p in matrices}
    rest = [p for p in parameters if id(p) not in chosen]
    return [
        Muon(matrices, lr=recipe.muon_rate, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(rest, lr=recipe.adam_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


@dataclass
class Run:
    """A training under way. `seconds` and `tokens` count what was spent, over all interruptions."""

    model: nn.Module
    lessons: Lessons
    recipe: Recipe
    identity: str
    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    plans: list[int] = field(default_factory=list)
    revised: list[int] = field(default_factory=list)  # steps from which a recipe other than before was followed
    before: list[dict] = field(default_factory=list)  # what the phases before this one tell of themselves

    def __post_init__(self) -> None:
        self.model.requires_grad_(True)
        self.optimizers = optimizers(self.model, self.recipe)
        self.rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        self.balance = Balance(anatomy(self.model))
        self.handles = drop_parts(self.model, self.recipe.dropout)
        self.average = {key: value.clone() for key, value in self.model.state_dict().items()}

    def advance(self) -> dict[str, float]:
        """Do one step; return the losses by name."""
        start = time.perf_counter()
        factor = self.recipe.rate(self.step)
        for optimizer, rate in zip(self.optimizers, self.rates):
            optimizer.param_groups[0]["lr"] = rate * factor
        self.model.train()
        self.balance.reset()
        torch.manual_seed(self.recipe.seed + self.step)  # what is dropped depends on the step alone
        seen = {}
        for lesson in self.lessons.at(self.step):
            seen |= self._learn(lesson)
        norm = nn.utils.clip_grad_norm_(self.optimizers[1].param_groups[0]["params"], 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.balance.adjust(self.recipe.balance_rate * factor)
        self.step += 1
        self._keep_average()
        self.seconds += time.perf_counter() - start
        return seen | {"norm": float(norm)}

    @torch.no_grad()
    def _keep_average(self) -> None:
        """Move the averaged weights towards the present ones; over all steps at first, then over the last ones."""
        keep = min(self.recipe.average, self.step / (self.step + 9))
        for key, value in self.model.state_dict().items():
            self.average[key].lerp_(value, 1 - keep) if value.is_floating_point() else self.average[key].copy_(value)

    def _learn(self, lesson: Lesson) -> dict[str, float]:
        """Add the gradients of one lesson."""
        recipe = self.recipe
        weights = {GUIDE: recipe.guide_weight, TEXT: 1.0, ANSWER: recipe.answer_weight, REPEAT: recipe.repeat_weight}
        self.balance.loss = 0.0
        found = losses(self.model, lesson, self.balance)
        total = sum(weights[kind] * loss for kind, loss in found.items())
        (lesson.weight * (total + recipe.balance_weight * self.balance.loss)).backward()
        self.tokens += lesson.inputs["input_ids"].numel()
        names = {GUIDE: "guide", TEXT: "text", ANSWER: "answer", REPEAT: "repeat"}
        return {names[kind]: loss.item() for kind, loss in found.items()}

    def settle(self) -> None:
        """End the training: put the averaged weights in place, take away what watched or changed the model."""
        self.model.load_state_dict(self.average)
        self.balance.close()
        for handle in self.handles:
            handle.remove()

    def told(self) -> dict:
        """Return how this phase went, as `training.json` keeps it."""
        recipe = self.recipe
        known = {key: getattr(self, key) for key in ("tokens", "plans", "revised")}
        about = {"seed": recipe.seed, "threads": recipe.threads, "start_from": recipe.start_from}
        kept = {"averaged": recipe.average > 0, "advised": recipe.advised > 0}
        return {"steps": self.step, "seconds": round(self.seconds)} | kept | known | about

    def save(self, path: Path) -> None:
        """Write the state beside `path`, then rename it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".part")
        state = {key: getattr(self, key) for key in ("identity", "step", "seconds", "tokens", "plans", "revised")}
        state |= {"model": self.model.state_dict(), "average": self.average}
        state |= {"optimizers": [o.state_dict() for o in self.optimizers]}
        torch.save(state, beside)
        beside.replace(path)

    def resume(self, path: Path) -> bool:
        """Take up the state in `path` if it belongs to the same model, recipe and data; return whether it did."""
        if not path.is_file():
            return False
        state = torch.load(path, weights_only=True)
        if state["identity"] != self.identity:
            return False
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        for key in ("step", "seconds", "tokens", "plans", "revised"):
            setattr(self, key, state.get(key, []))
        return True
