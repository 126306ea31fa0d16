"""Results of segmented cases, as a run writes them: files of each case, tables, and a report."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from torch import Tensor

from .cases import CaseResult, named_regions
from .distributed import gather, is_main
from .files import replacing, write_atomically
from .grading import ReliabilityCounts
from .journal import CaseJournal, JournalPart, csv_bytes
from .networks import TrainingRecord
from .outputs import FILES, OUTPUTS, check_outputs, output_files, result_file
from .report.page import write_report
from .report.summary import summary_lines
from .rows import SURFACE_TOLERANCE, near_contours
from .running import RunGuard
from .structures import COLUMNS

__all__ = ["CaseWriter"]

logger = logging.getLogger(__name__)

LARGE = 2**24  # voxels of a case that is not kept in memory while the next one is segmented


class CaseWriter:
    """Write the results of each case as soon as it is segmented.

    A thread does so, in order, while the next case is segmented; a case of more than ``LARGE`` voxels is waited for.

    In ``<output_dir>/<case>/``, as ``outputs`` names them: ``seg`` is ``<case>_seg.nii.gz`` (``_seg.png`` too where the
    input was PNG, JPEG or BMP), ``prob`` ``_prob.nii.gz``, ``uncertainty`` ``_uncertainty_entropy.nii.gz`` and
    ``_uncertainty_mi.nii.gz``, ``members`` ``_members.nii.gz`` (a label map of each along the fourth axis) and
    ``overlay`` ``_overlay.png``. A row in ``<output_dir>/cases.csv`` has the grade of the case (``flag``, expected
    Dice), members, sizes, uncertainty and seconds, and scores where there is a label (:mod:`medsegdiff_monai.rows`);
    ``structures.csv`` has a row for each connected component (:mod:`medsegdiff_monai.structures`). In the end the log
    sums up, and ``report.html`` shows all of it. Of several processes each writes the files of its cases, and notes
    them in a journal of its own; the first one writes the tables, its own rows at once, all in the end. Meanwhile no
    other run writes to ``output_dir``.

    Args:
        output_dir: folder to write to.
        num_classes: number of foreground classes.
        regions: see :class:`medsegdiff_monai.transforms.Regions`; by default the classes have the names that ``record``
            has.
        merge: whether the rows of cases that an earlier run has written are kept.
        outputs: what is written, see :func:`medsegdiff_monai.outputs.check_outputs`.
        record: what the network's training learnt about its results; without it, or where that is nothing, the expected
            Dice is the members' agreement, and flags look at the masks alone.
        surface_tolerance: distance between surfaces that NSD takes for none, in mm, or pixels of pictures.
        split: list that is scored; ``validation`` is the one that chose the weights.

    Raises:
        InputError: for ``outputs`` that there are not, or without ``seg``.
    """

    def __init__(
        self,
        output_dir: str,
        num_classes: int,
        regions: Mapping[str, Sequence[int]] | None = None,
        merge: bool = False,
        outputs: Sequence[str] | str = OUTPUTS,
        record: TrainingRecord | None = None,
        surface_tolerance: float = SURFACE_TOLERANCE,
        split: str | None = None,
    ) -> None:
        self.output_dir = Path(output_dir)
        self._named = num_classes, regions
        self.merge = merge
        self.outputs = check_outputs(outputs)
        self.record = record
        self.tolerance = float(surface_tolerance)
        self.split = split
        self.journal = CaseJournal(output_dir)
        self._began = 0.0
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future | None = None
        self._fresh: list[dict[str, Any]] = []  # lines of the journal of this run: case, row, structures
        states = ("before calibration", "after calibration")
        self._reliability = {state: ReliabilityCounts(num_classes) for state in states}

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        # before the folder is given free
        engine.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, error: wait(self._unfinished))
        RunGuard(self.output_dir, self._advice).attach(engine)
        engine.add_event_handler(Events.STARTED, lambda: self.open())
        engine.add_event_handler(Events.ITERATION_STARTED, self._begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._write)
        engine.add_event_handler(Events.COMPLETED, lambda: self.close())

    def _advice(self) -> str:
        """What to do after the run was stopped."""
        done = f"{len(self._fresh)} cases of this run are finished, in {self.output_dir}: the same command"
        return f"{done} continues with the others." if self.merge else f"{done} starts anew."

    def open(self) -> None:
        """Take up what an earlier run has left; no other run may write to the folder meanwhile."""
        self.regions = named_regions(*self._named, self.record)
        if is_main():
            self.journal = CaseJournal(self.output_dir)  # as it is now
            self.journal.open(self.merge)
        idist.barrier()
        if not is_main():
            self.journal = JournalPart(self.output_dir, idist.get_rank())
            self.journal.open(self.merge)

    def _begin(self, engine: Engine) -> None:
        self._began = time.perf_counter()

    def _write(self, engine: Engine) -> None:
        state: Any = engine.state  # lists of items, after MONAI's decollation
        seconds = (time.perf_counter() - self._began) / len(state.output)
        for item, output in zip(state.batch, state.output):
            self._finish()
            self._pending = self._thread.submit(self._write_case, item, output, seconds)
            if output["mask"].numel() > LARGE:
                self._finish()

    def _write_case(self, item: Mapping[str, Any], output: Mapping[str, Any], seconds: float) -> None:
        self.write(CaseResult(item, output, self.regions, self.record), seconds)

    @property
    def _unfinished(self) -> list[Future]:
        return [] if self._pending is None else [self._pending]

    def _finish(self) -> None:
        """Wait for the case that is being written, and raise what went wrong with it."""
        for case in self._unfinished:
            case.result()
            self._pending = None  # not before: where a signal ends the wait, it is still being written

    def close(self) -> None:
        """Write structures and report, and sum up in the log."""
        self._finish()
        self._fresh = gather(self._fresh)
        for counts in self._reliability.values():
            counts.counts = torch.as_tensor(idist.all_reduce(counts.counts))
        if not is_main():
            return
        if idist.get_world_size() > 1:
            self.journal.take_over(line["case"] for line in self._fresh)
        entries, names = self.journal.entries.values(), self.regions.names
        rows = [entry["row"] for entry in entries]
        found = [{"case": entry["case"], **one} for entry in entries for one in entry.get("structures", [])]
        write_atomically(self.output_dir / "structures.csv", csv_bytes(found, ["case", *COLUMNS]))
        chosen: dict[str, Any] = {"split": self.split, "chose_weights": self.split == "validation"}
        scored: dict[str, Any] = {"reliability": self._counted(), "tolerance": self.tolerance}
        report = write_report(rows, self.output_dir, names, structures=found, **scored, **chosen)
        for text in summary_lines([line["row"] for line in self._fresh], names, report=report, **chosen):
            logger.info(text)

    def _counted(self) -> dict[str, Tensor]:
        """The counts of probabilities near contours; those after calibration where there is one."""
        counts = {name: one.counts for name, one in self._reliability.items() if one.counts.any()}
        return counts if self._calibrated else dict(list(counts.items())[:1])

    @property
    def _calibrated(self) -> bool:
        return self.record is not None and bool(self.record.reliability.any())

    def write(self, result: CaseResult, seconds: float) -> None:
        """Write a case, and its row.

        Args:
            result: the case.
            seconds: what it took.
        """
        row = {**result.row(self.tolerance), "seconds": round(seconds, 3)}
        self._count(result)
        found = result.structures()
        self.journal.begin(result.name)
        files = self._write_files(result, row)
        self._remove_others(result.name)
        self._fresh.append({"case": result.name, "row": row, "structures": found})
        self.journal.add(result.name, row, files, json.loads(result.item.get("made_from", "null")), found)

    def _count(self, result: CaseResult) -> None:
        """Count the probabilities near the contours."""
        if result.label is None:
            return
        wanted = result.label if result.raters is None else result.raters.double().mean(0)
        box, band = near_contours(result.case.mask, result.label)
        for counts, probability in zip(self._reliability.values(), (result.output["mean"], result.case.probability)):
            counts.add(probability[box], wanted[box].nan_to_num(), band)

    def _write_files(self, result: CaseResult, row: Mapping[str, Any]) -> list[str]:
        """Write all files of a case, or, where the disk is full, none; returns their names.

        They take their places in reverse: where the mask, which is the first, is new, all are.
        """
        dice = [f"{name} {row[f'dice_{name}']:.3f}" for name in self.regions.names if f"dice_{name}" in row]
        title = result.name + (f"   Dice: {', '.join(dice)}" if dice else "")
        names = []
        with ExitStack() as stack:
            for name, content in result.contents(self.outputs, title):
                names.append(name)
                stack.enter_context(replacing(result_file(self.output_dir, result.name, name))).write_bytes(content)
        return names

    def _remove_others(self, case: str) -> None:
        """Remove results of an earlier run that this one does not write, and that do not belong to the new mask."""
        files = output_files(self.output_dir, case, [name for name in FILES if name not in self.outputs])
        for file in [file for file in files if file.is_file()]:
            file.unlink()
            logger.info(f"{file}: was removed because it belonged to an earlier mask.")
