"""One training step: generator and discriminator on the same reconstructions.

Both gradients are computed before either optimiser moves, and are applied only if everything is
finite. This equals the published order, generator first: the discriminator sees reconstructions
that were made before, and the generator's gradient does not need the discriminator's new weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vtok_ext.training.checkpoint import random_generators, set_random_generators
from vtok_ext.training.distributed import is_distributed, mean_over_ranks
from vtok_ext.training.sentinel import first_bad_layer, is_finite, last_bad_gradient
from vtok_ext.training.setup import Training


class NonFiniteStep(Exception):
    """A step that was not taken: `where` says what was not finite first."""

    def __init__(self, where: str) -> None:
        super().__init__(where)
        self.where = where


class Stepper:
    """Takes training steps; with several processes gradients are averaged over them.

    Args:
        training: what is trained; changed in place.
    """

    def __init__(self, training: Training) -> None:
        self.training = training
        self.discriminator = training.loss.discriminator
        self.model: Any = training.model
        self.critic: Any = self.discriminator
        if is_distributed():
            # Buffers stay each process's own: real and fake pass before one backward.
            options: dict[str, Any] = {"broadcast_buffers": False}
            if training.device.type == "cuda":
                options["device_ids"] = [training.device]
            self.model = DistributedDataParallel(training.model, **options)
            if self.discriminator is not None:
                self.critic = DistributedDataParallel(self.discriminator, **options)

    def __call__(self, clips: list[Tensor]) -> dict[str, float]:
        """Returns the loss terms of a step, averaged over its micro-batches and all processes.

        Args:
            clips: micro-batches [B, 3, T, H, W] uint8.

        Raises:
            NonFiniteStep: something was NaN or infinite. Weights, optimisers, buffers and random
                generators are as they were before the step.
        """
        training = self.training
        training.train_mode()
        generators = random_generators(training.device)
        buffers = [(b, b.clone()) for b in self._buffers()]
        self._set_learning_rates()
        self._zero_gradients()
        terms = []
        for i, part in enumerate(clips):
            with self._gradients_shared(i == len(clips) - 1):
                terms.append(self._accumulate(to_video(part, training.device), 1 / len(clips)))
        norms = self._clip_gradients()
        mean = {name: torch.stack([t[name].float() for t in terms]).mean() for name in terms[0]}
        mean |= norms
        # One transfer for all numbers; a NaN of one process reaches all of them.
        values = mean_over_ranks(torch.stack(list(mean.values()))).tolist()
        if not all(map(math.isfinite, values)):
            names = [name for name, v in zip(mean, values, strict=True) if not math.isfinite(v)]
            _restore(buffers)
            where = self._search(clips, generators, names)
            _restore(buffers)
            set_random_generators(generators, training.device)
            self._zero_gradients()
            raise NonFiniteStep(where)
        self._apply()
        return dict(zip(mean, values, strict=True))

    def _accumulate(self, video: Tensor, share: float) -> dict[str, Tensor]:
        """Adds the gradients of one micro-batch; returns its loss terms."""
        loss, terms, reconstruction = self._generator(video)
        (loss * share).backward()
        if self.discriminator is not None:
            with self._autocast():
                d_loss, d_terms = self.training.loss.discriminator_terms(
                    video, reconstruction, self.training.step, self.critic
                )
            if d_loss.requires_grad:
                (d_loss * share).backward()
            terms |= d_terms
        return {"loss": loss.detach(), **terms}

    def _generator(self, video: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Returns the tokenizer's loss, its terms and the reconstruction."""
        training = self.training
        frozen = "encoder" in training.recipe.model.freeze
        with self._autocast(), _without_gradients(self.discriminator):
            output = self.model(video, step=training.step, compute_loss=not frozen)
            # Those of a frozen encoder are constants.
            regularization = {} if frozen else output.encoding.losses
            loss, terms = training.loss.generator_terms(
                video, output.reconstruction, regularization, training.last_weight, training.step
            )
        return loss, terms, output.reconstruction.detach()

    def _autocast(self):
        dtype = self.training.autocast_dtype
        return torch.autocast(self.training.device.type, dtype, enabled=dtype is not None)

    @contextmanager
    def _gradients_shared(self, last: bool) -> Iterator[None]:
        """Within it, gradients go to the other processes only for the last micro-batch."""
        with ExitStack() as stack:
            for network in (self.model, self.critic):
                if isinstance(network, DistributedDataParallel) and not last:
                    stack.enter_context(network.no_sync())
            yield

    def _buffers(self) -> Iterable[Tensor]:
        yield from self.training.model.buffers()
        yield from self.training.loss.buffers()

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        found = (self.training.optimizer, self.training.discriminator_optimizer)
        return [optimizer for optimizer in found if optimizer is not None]

    def _set_learning_rates(self) -> None:
        settings, run = self.training.recipe.optimizer, self.training.recipe.run
        scale = settings.scale(self.training.step, run.steps)
        tops = (settings.lr, settings.discriminator_lr)
        for optimizer, top in zip(self._optimizers(), tops, strict=False):
            for group in optimizer.param_groups:
                group["lr"] = scale * (settings.lr if top is None else top)

    def _zero_gradients(self) -> None:
        for optimizer in self._optimizers():
            optimizer.zero_grad(set_to_none=True)

    def _clip_gradients(self) -> dict[str, Tensor]:
        """Returns the norms before clipping."""
        loss, largest = self.training.loss, self.training.recipe.optimizer.clip
        if loss.logvar.grad is not None:  # it stands outside of DDP
            loss.logvar.grad.copy_(mean_over_ranks(loss.logvar.grad))
        norms = {}
        names = ("grad_norm", "d_grad_norm")
        for name, optimizer in zip(names, self._optimizers(), strict=False):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            if name == "d_grad_norm":
                # Before the start they are zero; Adam counts the step nevertheless, as published.
                for parameter in parameters:
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
            norms[name] = clip_gradients(parameters, largest)
        return norms

    def _apply(self) -> None:
        for optimizer in self._optimizers():
            optimizer.step()
        if self.training.averages is not None:
            self.training.averages.update()
        self.training.step += 1

    def _search(self, clips: list[Tensor], generators: dict[str, Any], names: list[str]) -> str:
        """Returns in words where the first value of a step was not finite."""
        training = self.training
        gradient = last_bad_gradient(training.model)
        set_random_generators(generators, training.device)
        networks = {"": training.model}
        if self.discriminator is not None:
            networks["discriminator"] = self.discriminator
        found = None
        for part in clips:
            video = to_video(part, training.device)
            found = found or first_bad_layer(networks, partial(self._forward_only, video))
        if found is not None:
            return f"layer {found}"
        if not is_finite(training.loss.logvar):
            return "the log variance"
        if gradient is not None:
            return f"the gradient of {gradient}, while all layers were finite"
        return f"{', '.join(names)}, while all layers of this process were finite"

    @torch.no_grad()
    def _forward_only(self, video: Tensor) -> None:
        """Runs all networks as `_accumulate` does, without anything that other processes see."""
        loss = self.training.loss
        quantizer = self.training.model.quantizer
        if quantizer is not None:
            quantizer.eval()
        with self._autocast():
            reconstruction = self.training.model(video, compute_loss=False).reconstruction
            if self.discriminator is not None and loss.is_adversarial(self.training.step):
                self.discriminator(loss.as_seen(reconstruction.float()))
        self.training.train_mode()


def to_video(
    clips: Tensor,  # [B, 3, T, H, W] uint8
    device: torch.device,
) -> Tensor:
    """Returns [B, 3, T, H, W] float32 in [-1, 1] on `device`."""
    return clips.to(device, non_blocking=True).float() / 127.5 - 1


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], largest: float) -> Tensor:
    """Returns the norm of all gradients, which are then scaled to a norm of at most `largest`.

    A norm that is not finite leaves them as they are, so that their origin can be found.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    scale = (largest / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, torch.where(torch.isfinite(norm), scale, 1.0))
    return norm


@contextmanager
def _without_gradients(network: nn.Module | None) -> Iterator[None]:
    """Within it the parameters of `network` get no gradients, what passes through it does."""
    if network is not None:
        network.requires_grad_(False)
    try:
        yield
    finally:
        if network is not None:
            network.requires_grad_(True)


@torch.no_grad()
def _restore(buffers: list[tuple[Tensor, Tensor]]) -> None:
    for buffer, value in buffers:
        buffer.copy_(value)
