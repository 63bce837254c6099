"""The training loop: steps, validation, log, checkpoints, and how it ends.

    OUT/recipe.yaml     the effective recipe
    OUT/log.jsonl       every step's loss terms, validations, checkpoints
    OUT/checkpoints/    see `checkpoint`
    OUT/samples/        see `sample_pictures`
    OUT/damaged.txt     videos that could not be read when their turn came, if there are any
    OUT/model/          the trained tokenizer, its moving averages if there are any

A run that was killed at any moment and is resumed gives, with the same number of processes and
threads, the very numbers of a run that was not.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from vtok_ext.data.atomic_output import output_file
from vtok_ext.data.clips import video_clips_of
from vtok_ext.models.failed_computation import FailedComputationError
from vtok_ext.training import checkpoint as checkpoints
from vtok_ext.training.clip_checks import check_first_step
from vtok_ext.training.clip_order import ClipOrder, buckets_of, small_buckets, step_batches
from vtok_ext.training.distributed import any_rank, on_rank_0, rank, wait_for_all, world_size
from vtok_ext.training.log_sinks import check_sinks, open_sinks
from vtok_ext.training.parallel import local
from vtok_ext.training.recipe import Recipe
from vtok_ext.training.resume_warnings import resume_warnings, sees_micro_batches
from vtok_ext.training.run_log import RunLog
from vtok_ext.training.sample_pictures import write_samples
from vtok_ext.training.sentinel import NonFiniteLossError, is_finite
from vtok_ext.training.setup import build_training
from vtok_ext.training.step import NonFiniteStep, Stepper
from vtok_ext.training.stop_request import StopRequest, stop_requests
from vtok_ext.training.validation import validate

RESUME = ("auto", "never")
_LOCK = ".lock"


@dataclass(frozen=True)
class TrainProgress:
    """State after a step, for whoever shows it: loss terms and clips per second over all ranks.

    `first_step` are the steps that were done before this call.
    """

    first_step: int
    step: int
    num_steps: int
    terms: dict[str, float]
    clips_per_s: float


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        step: steps done.
        resumed_from: steps that were done before, 0 for a new run.
        stopped_by: name of the signal that ended it early, else None.
        stop_wished: whether a signal came, also one too late to end it early: what would follow it
            should not begin.
        model: folder of the trained tokenizer, None if stopped early.
        checkpoint: folder of the last checkpoint.
        validation: `rec_loss` and `psnr` of the last validation, {} without one.
    """

    step: int
    resumed_from: int
    stopped_by: str | None
    model: Path | None
    checkpoint: Path
    validation: dict[str, float]
    stop_wished: bool = False


def train(
    recipe: Recipe,
    out: Path,
    *,
    device: torch.device | str = "cpu",
    resume: str = "never",
    warn: Callable[[str], None] = print,
    on_step: Callable[[TrainProgress], None] | None = None,
) -> TrainResult:
    """Returns how the run ended, after writing its folder; all processes call this together.

    SIGTERM or Ctrl-C end it after the present step, with a checkpoint.

    Args:
        recipe: all settings.
        out: folder of the run.
        device: where to train.
        resume: "auto" continues the newest undamaged checkpoint of `out`, if there is one;
            "never" wants a folder without checkpoints.
        warn: called with lines that the user should read.
        on_step: called after every logged step, on rank 0.

    Raises:
        NonFiniteLossError: a loss or gradient was NaN or infinite; says where first, and which
            checkpoint is good.
        ValueError, OSError: the recipe asks for what is not there, `out` holds another run, or
            all checkpoints are damaged.
    """
    if resume not in RESUME:
        raise ValueError(f"train: resume must be one of {RESUME}, got {resume!r}")
    with stop_requests() as request, claimed(out):
        run = _Run(recipe, out, torch.device(device), resume, warn if rank() == 0 else _nothing)
        try:
            return run.loop(request, on_step if rank() == 0 else None)
        finally:
            run.close()


def _nothing(line: str) -> None:
    """Returns None: what ranks other than 0 do with messages."""


class _Run:
    """One call of `train`."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        device: torch.device,
        resume: str,
        warn: Callable[[str], None],
    ) -> None:
        self.recipe, self.out, self.device, self.warn = recipe, out, device, warn
        self.folder = out / "checkpoints"
        self.writer = checkpoints.CheckpointWriter(self.folder, device)
        found = self._found(resume)
        on_rank_0(lambda: check_sinks(recipe.run.loggers))
        self.training = build_training(recipe, device)
        for line in self.training.task.notes():
            warn(line)
        self.clips, self.held_out = self.training.task.data(warn)
        if recipe.optimizer.warmup >= recipe.run.steps:
            warn(
                f"optimizer.warmup is {recipe.optimizer.warmup} and run.steps {recipe.run.steps}: "
                "the learning rate never gets to optimizer.lr"
            )
        if recipe.run.sample_every and not self.held_out:
            warn(
                f"run.sample_every is {recipe.run.sample_every}, but there are no held-out clips "
                "to show"
            )
        self.files = video_clips_of(self.clips)
        if self.files is not None and self.files.damage_log is None:
            self.files.damage_log = out / "damaged.txt"
        self.videos = self._videos()  # now: what turns out damaged later stays in the order
        self.validation: dict[str, float] = {}
        self.metric: float | None = None  # of the present step
        self.saved: Path | None = None
        if found is None:
            self.training.task.begin()
        else:
            self._load(found)
        self.first_step = self.training.step
        self._open_log()
        on_rank_0(self._write_recipe)
        self.step = Stepper(self.training)
        # After everything that draws random numbers: noise of this run begins or goes on here.
        if found is None or not checkpoints.restore_generators(found, device):
            torch.manual_seed(_noise_seed(recipe.run.seed, self.first_step))
            if found is not None:
                warn(
                    f"the checkpoint is of {found.world_size} processes and these are "
                    f"{world_size()}: samples and their noise stay the same, the global random "
                    "generators begin anew"
                )

    def _found(self, resume: str) -> checkpoints.Checkpoint | None:
        """Returns the checkpoint to continue."""
        if resume == "auto":
            return checkpoints.latest_checkpoint(self.folder, self.warn)
        if checkpoints.has_checkpoints(self.folder):
            raise ValueError(
                f"train: out must be a folder without checkpoints, got {self.out}; "
                "--resume auto continues its run"
            )
        return None

    def _videos(self) -> dict[str, Any] | None:
        """Returns how many video files there are, and a hash of their names in their order."""
        if self.files is None:
            return None
        names = "\n".join(video.name for video in self.files.videos)
        digest = hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()
        return {"count": len(self.files.videos), "names": digest}

    def _numbers(self) -> dict[str, Any]:
        return {**self.training.numbers(), "videos": self.videos}

    def _load(self, found: checkpoints.Checkpoint) -> None:
        numbers = checkpoints.read_numbers(found)
        self.training.task.check_facts(numbers.get("facts", {}))
        for line in resume_warnings(
            (numbers["recipe"], self.recipe.to_dict()),
            (found.world_size, world_size()),
            numbers["samples"],
            (numbers.get("videos"), self.videos),
            in_buckets=bool(buckets_of(self.clips)),
            of_micro_batches=sees_micro_batches(self.training.task),
        ):
            self.warn(line)
        into = self.training.destinations(checkpoints.read_shapes(found))
        checkpoints.read_tensors(found, into)
        self.training.adopt(into, numbers)
        self.saved = found.folder

    def _open_log(self) -> None:
        path = self.out / "log.jsonl"
        self.log = RunLog(path, self.first_step, active=False)

        def begin() -> None:
            names = self.recipe.run.loggers
            sinks = open_sinks(names, self.out, self.first_step, self.recipe.to_dict())
            self.log = RunLog(path, self.first_step, sinks=sinks, warn=self.warn)

        on_rank_0(begin)

    def _write_recipe(self) -> None:
        import yaml

        with output_file(self.out / "recipe.yaml", "train") as partial:
            text = yaml.safe_dump(self.recipe.to_dict(), sort_keys=False)
            partial.write_text(text, encoding="utf-8")

    def loop(
        self, request: StopRequest, on_step: Callable[[TrainProgress], None] | None
    ) -> TrainResult:
        """Returns how the run ended; an error, of a single process, loses no complete step."""
        try:
            return self._take_steps(request, on_step)
        except NonFiniteLossError:  # has saved what is good
            raise
        except Exception:
            # Saving takes all processes, of which others may go on.
            if world_size() == 1 and self.step.is_whole:
                self._rescue()
            raise

    def _take_steps(
        self, request: StopRequest, on_step: Callable[[TrainProgress], None] | None
    ) -> TrainResult:
        settings = self.recipe.run
        order = ClipOrder(
            len(self.clips),
            settings.batch_size,
            settings.accumulate,
            rank(),
            world_size(),
            settings.seed,
            self.first_step,
            self.training.samples,
            buckets_of(self.clips),
        )
        for line in small_buckets(self.clips, order):
            self.warn(line)
        batches = step_batches(
            self.clips, order, self.first_step, settings.steps, self.recipe.data.num_workers
        )
        clips_per_step = settings.batch_size * settings.accumulate * world_size()
        start, logged = time.monotonic(), self.first_step
        stopped = False
        for clips in batches:
            if self.training.step == self.first_step:
                for line in check_first_step(clips, resumed=self.first_step > 0):
                    self.warn(line)
            terms = self._take(clips)
            self.metric = None
            step = self.training.step
            if step % settings.log_every == 0 or step == settings.steps:
                now = time.monotonic()
                speed = (step - logged) * clips_per_step / max(now - start, 1e-9)
                start, logged = now, step
                main = next(iter(self.training.optimizers.values()))
                rates = {"lr": main.param_groups[0]["lr"]}
                self.log.write("train", step, **terms, **rates, clips_per_s=round(speed, 3))
                if on_step is not None:
                    on_step(TrainProgress(self.first_step, step, settings.steps, terms, speed))
            stopped = any_rank(request.signal_name is not None, self.device)
            self._mark(step, stopped)
            if stopped and step < settings.steps:
                break
        stopped = self.training.step < settings.steps
        model = None if stopped else self._write_model()
        assert self.saved is not None  # the last step is always saved
        return TrainResult(
            step=self.training.step,
            resumed_from=self.first_step,
            stopped_by=(request.signal_name or "another process") if stopped else None,
            model=model,
            checkpoint=self.saved,
            validation=self.validation,
            stop_wished=any_rank(request.signal_name is not None, self.device),
        )

    def close(self) -> None:
        """Ends what goes on in the background; after an error it may be what failed."""
        self._tell_damage()
        self.log.close()
        try:
            self.writer.wait()
        except (OSError, ValueError) as error:
            self.warn(str(error))

    def _tell_damage(self) -> None:
        """Says how many videos could not be read when their turn came."""
        path = None if self.files is None else self.files.damage_log
        if path is not None and path.is_file():
            damaged = set(path.read_text(encoding="utf-8").splitlines())  # every worker has a line
            self.warn(
                f"{len(damaged)} videos could not be read while training and others stood in for "
                f"them; {path} names them"
            )

    def _show(self, step: int) -> None:
        """Writes samples of held-out clips."""
        shown = self.held_out[: self.recipe.run.sample_clips]
        videos, failure = {}, ""
        with self.training.evaluating():
            try:
                videos = self.training.task.pictures(shown)
            except FailedComputationError as error:
                failure = str(error)
        if any_rank(bool(failure), self.device):
            self.warn(f"no samples after step {step}: {failure}; training goes on")
            return
        folder = self.out / "samples" / f"step-{step:08d}"

        def write() -> None:
            for name, picture in write_samples(folder, videos).items():
                self.log.picture(name, step, picture)

        on_rank_0(write)

    def _mark(self, step: int, stopped: bool) -> None:
        """Validates, shows and saves after a step, if it is time."""
        settings = self.recipe.run
        last = step == settings.steps
        saving = last or stopped or step % settings.checkpoint_every == 0
        # A process that was told to stop may have seconds only.
        if self.held_out and not (stopped and not last):
            if saving or step % settings.validate_every == 0:
                self.metric = self._validate(step)
            if settings.sample_every and (last or step % settings.sample_every == 0):
                self._show(step)
        if saving:
            self._save(last or stopped)

    def _rescue(self) -> None:
        """Saves on the way out; what hinders that must not hide why."""
        if self.training.step == self.first_step:
            return
        self._settle()  # a checkpoint of this very step may still fail in the background
        if self._is_saved():
            return
        try:
            self._save(last=True)
        except (OSError, ValueError) as error:
            self.warn(f"the steps since the last checkpoint could not be saved: {error}")

    def _is_saved(self) -> bool:
        """Returns whether the present step has a checkpoint."""
        return self.saved is not None and self.saved.name == f"step-{self.training.step:08d}"

    def _settle(self) -> bool:
        """Returns whether the checkpoint before was written, once that has ended."""
        try:
            self.writer.wait()
        except (OSError, ValueError) as error:
            self.saved = checkpoints.newest_checkpoint(self.folder)
            self.warn(f"a checkpoint could not be written, the next one is tried: {error}")
            return False
        return True

    def _validate(self, step: int) -> float | None:
        """Returns the metric of a validation, None if it is not finite."""
        self.validation = validate(self.training, self.held_out)
        self.log.write("validation", step, **self.validation)
        name = self.training.task.metric
        metric = self.validation[name]
        if math.isfinite(metric):
            return metric
        self.warn(f"{name} of the held-out clips is {metric} after step {step}; training goes on")
        return None

    def _save(self, last: bool) -> None:
        # After a failure not in the background: a second one ends the run here and now.
        settled = self._settle()
        self.saved = self.writer.save(
            self.training.step,
            self.training.tensors(),
            self._numbers(),
            metric=self.metric,
            keep_last=self.recipe.run.keep_last,
            background=self.recipe.run.background_checkpoints and settled and not last,
        )
        self.log.write("checkpoint", self.training.step, folder=self.saved.name)

    def _take(self, clips: list[torch.Tensor]) -> dict[str, float]:
        """Returns the loss terms of one step."""
        try:
            return self.step(clips)
        except NonFiniteStep as event:
            raise self._not_finite(event.where) from None

    def _not_finite(self, where: str) -> NonFiniteLossError:
        """Returns what to raise, after keeping the state before the bad step if it is good.

        It is when held-out clips still have a finite loss: then the batch was at fault, else the
        weights. Without held-out clips, finite weights must do.
        """
        number = self.training.step
        state = self.training.tensors()
        good = is_finite([local(tensor) for tensor in state.values()])
        if good and self.held_out:
            generators = checkpoints.random_generators(self.device)
            good = is_finite(torch.tensor(list(validate(self.training, self.held_out).values())))
            checkpoints.set_random_generators(generators, self.device)
        good = not any_rank(not good, self.device)
        self._settle()
        if good and not self._is_saved():
            # Nothing is removed for it: older states may be wanted now.
            try:
                self.saved = self.writer.save(number, state, self._numbers())
            except (OSError, ValueError) as error:
                self.warn(f"the state before the bad step could not be saved: {error}")
        wait_for_all()
        kept = f"is in {self.saved}" if self.saved else "is none: no checkpoint was written before"
        self.log.write("non_finite", number, where=where)
        return NonFiniteLossError(
            f"train: the loss of step {number + 1} must be finite, got NaN or inf first in "
            f"{where}; the last good state {kept}"
        )

    def _write_model(self) -> Path:
        folder, weights = self.out / "model", self.training.exported_weights()
        on_rank_0(lambda: self.training.task.export(folder, weights))
        return folder


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Within it no other process trains in folder `out`; all processes of a job enter together.

    Raises:
        ValueError: another job is in it.
        OSError: the folder cannot be made.
    """
    held: list[IO[str]] = []
    is_new = not out.exists()

    def claim() -> None:
        out.mkdir(parents=True, exist_ok=True)
        held.append(_locked(out))

    on_rank_0(claim)
    try:
        yield
    finally:
        for file in held:
            file.close()
            # Of a run that never began nothing stays behind.
            with suppress(OSError):
                if is_new and [path.name for path in out.iterdir()] == [_LOCK]:
                    (out / _LOCK).unlink()
                    out.rmdir()


def _locked(out: Path) -> IO[str]:
    """Returns a file whose lock says, until it is closed, that this process writes to folder `out`.

    Raises:
        ValueError: another process does.
    """
    file = open(out / _LOCK, "w")
    try:
        # Not flock: processes that read clips would share that, and outlive a run that was killed.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise ValueError(
            f"train: out must be a folder that no other process trains in now, got {out}"
        ) from None
    except OSError:
        pass  # a file system without locks
    return file


def _noise_seed(seed: int, first_step: int) -> int:
    """Returns another seed for every process and place of beginning."""
    return (seed * 1_000_003 + first_step * 1_009 + rank() + 1) % 2**63
