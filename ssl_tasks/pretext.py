"""Pretext tasks: a tower (backbone and heads), the loss of two views, BYOL's moving target."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

import hypergrad as hg
from ssl_tasks.encoders import projection_head
from ssl_tasks.losses import barlow_twins, byol, nt_xent, vicreg

PretextName = Literal["simclr", "byol", "barlow-twins", "vicreg"]


class Tower(nn.Module):
    """A backbone with the head of its task; BYOL's has a predictor too, the others' is the identity."""

    def __init__(self, encoder: nn.Module, head: nn.Module, predictor: nn.Module | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.predictor = nn.Identity() if predictor is None else predictor

    def forward(self, images: Tensor) -> Tensor:
        """Return the head's outputs on the backbone's features; the predictor is not applied."""
        return self.head(self.encoder(images))


@dataclass(frozen=True)
class Backbone:
    """A tower in training, and for BYOL the moving average of it that is its target."""

    tower: Tower
    target: Tower | None = None

    @property
    def encoder(self) -> nn.Module:
        """Return the backbone proper, without heads."""
        return self.tower.encoder


@dataclass(frozen=True, kw_only=True)
class Pretext:
    """A pretext loss on two views, by name.

    Attributes:
        loss: simclr: NT-Xent; byol: regression on a moving average of itself; barlow-twins: correlation of the views
            towards the identity; vicreg: variance, invariance, covariance.
        temperature: of NT-Xent.
        decay: of BYOL's moving average, at each step.
        off_diagonal: Barlow Twins' weight of the redundancy term.
        scale: factor of the loss; None makes one learning rate suit all: 1 for simclr and byol, 1/out for barlow-twins,
            1/25 for vicreg.
        hidden: width of the projector's hidden layer, and of BYOL's predictor.
        out: dimension of the embeddings.
    """

    loss: PretextName = "simclr"
    temperature: float = 0.5
    decay: float = 0.99
    off_diagonal: float = 0.0051
    scale: float | None = None
    hidden: int = 128
    out: int = 64

    def start(self, encoder: nn.Module, dim: int) -> Backbone:
        """Return `encoder` with freshly drawn heads (from the global generator), and BYOL's target at its beginning."""
        head = projection_head(dim, hidden=self.hidden, out=self.out)
        if self.loss != "byol":
            return Backbone(Tower(encoder, head))
        tower = Tower(encoder, head, projection_head(self.out, hidden=self.hidden, out=self.out))
        return Backbone(tower, copy.deepcopy(tower).requires_grad_(False).eval())

    def __call__(self, tower: Any, views: tuple[Tensor, Tensor], target: Tower | None = None) -> Tensor:
        """Return the loss of two views; all views pass the backbone in one batch.

        Args:
            tower: a `Tower`, or what a problem's loss sees of it (`models.name`).
            views: two views of each image.
            target: BYOL's moving average; a constant here.
        """
        own = {"barlow-twins": 1 / self.out, "vicreg": 1 / 25}.get(self.loss, 1.0)
        return (own if self.scale is None else self.scale) * self._loss(tower, views, target)

    def _loss(self, tower: Any, views: tuple[Tensor, Tensor], target: Tower | None) -> Tensor:
        both = torch.cat(views)
        z = tower(both)
        if self.loss == "byol":
            if target is None:
                raise ValueError("the byol pretext needs its target network: pass Backbone.target.")
            with torch.no_grad():
                other, one = target(both).chunk(2)
            first, second = tower.predictor(z).chunk(2)
            return (byol(first, one) + byol(second, other)) / 2
        first, second = z.chunk(2)
        if self.loss == "simclr":
            return nt_xent(first, second, temperature=self.temperature)
        if self.loss == "barlow-twins":
            return barlow_twins(first, second, off_diagonal=self.off_diagonal)
        return vicreg(first, second)

    @torch.no_grad()
    def follow(self, backbone: Backbone, *, steps: int = 1) -> None:
        """Move BYOL's target, target <- decay^steps target + (1 - decay^steps) tower; nothing for the others."""
        if backbone.target is None:
            return
        for behind, ahead in zip(backbone.target.parameters(), backbone.tower.parameters(), strict=True):
            behind.lerp_(ahead, 1 - self.decay**steps)
        for behind, ahead in zip(backbone.target.buffers(), backbone.tower.buffers(), strict=True):
            behind.copy_(ahead)


class FollowTarget(hg.callbacks.Callback):
    """Moves BYOL's target every n-th step of an engine, by as much as the steps taken since; nothing for others."""

    def __init__(self, pretext: Pretext, backbone: Backbone, *, every: int = 1, steps: int = 1) -> None:
        self.pretext, self.backbone, self.every, self.steps = pretext, backbone, every, steps

    def on_step(self, engine: Any, record: Any) -> None:  # noqa: ARG002
        """Move it if it is due."""
        if engine.num_steps % self.every == 0:
            self.pretext.follow(self.backbone, steps=self.steps)
