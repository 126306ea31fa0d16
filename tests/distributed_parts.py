"""What the configs of distributed tests name: samples that do not depend on the process, weights of each process."""

from __future__ import annotations

import os
import signal
import zlib

import torch
import torch.distributed as dist
from ignite.engine import Events

from medsegdiff_monai.objective import SegmentationDiffusionPrepareBatch


class PrepareBatchByCase(SegmentationDiffusionPrepareBatch):
    """Noise, timestep and own guess of a case follow from its name."""

    def __call__(self, batchdata, device=None, non_blocking=False, **kwargs):
        self.generators = [torch.Generator().manual_seed(zlib.crc32(case.encode())) for case in batchdata["case"]]
        return super().__call__(batchdata, device, non_blocking, **kwargs)

    def get_noise(self, images):
        masks = len(images) // len(self.generators)
        return torch.cat([torch.randn(masks, *images.shape[1:], generator=g) for g in self.generators])

    def get_timesteps(self, images):
        return torch.cat([torch.randint(0, self.num_train_timesteps, (1,), generator=g) for g in self.generators])

    def get_guessed(self, timesteps):
        return torch.cat([torch.rand(1, generator=g) < 0.5 for g in self.generators])


class Witness:
    """Write what this process has seen and learned to ``<folder>/rank<n>.pt``."""

    def __init__(self, model, folder):
        self.model, self.folder = model, folder
        self.seen = {"noise": [], "timesteps": [], "cases": [], "guesses": []}

    def attach(self, engine):
        engine.add_event_handler(Events.STARTED, self._watch)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _watch(self, engine):
        prepare = engine.prepare_batch

        def watch(batchdata, *args, **kwargs):
            prepared = prepare(batchdata, *args, **kwargs)
            self.seen["noise"].append(prepared[3]["noise"])
            self.seen["timesteps"].append(prepared[3]["timesteps"])
            self.seen["cases"].append(list(batchdata["case"]))
            return prepared

        engine.prepare_batch = watch
        engine.network.register_forward_pre_hook(
            lambda network, inputs: None if torch.is_grad_enabled() else self._guess(engine, len(inputs[0]))
        )

    def _guess(self, engine, items):
        self.seen["guesses"].append((engine.state.iteration, items))

    def _write(self, engine):
        rank = dist.get_rank() if dist.is_initialized() else 0
        os.makedirs(self.folder, exist_ok=True)
        torch.save({"weights": self.model.state_dict(), **self.seen}, os.path.join(self.folder, f"rank{rank}.pt"))


class Accident:
    """Send the second process a signal in an iteration."""

    def __init__(self, name, iteration):
        self.signal, self.iteration = getattr(signal, name), iteration

    def attach(self, engine):
        engine.add_event_handler(Events.ITERATION_STARTED(once=self.iteration), self._strike)

    def _strike(self):
        if dist.get_rank() == 1:
            os.kill(os.getpid(), self.signal)
