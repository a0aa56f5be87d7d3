"""Checkpoints that are whole or absent: sharded with DCP, written beside, noted with their digests, renamed when complete.

A checkpoint is begun and finished. In between, with `background`, it is written from a copy in host memory by a thread of each
rank, over a process group of its own, while the training goes on.
"""

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter

from finetune.engine.parts import Part
from finetune.engine.weights.best import ranked
from finetune.engine.weights.failures import FAILURE, not_read, not_written, reason
from finetune.engine.weights.integrity import damage, digests, missing_bytes
from finetune.engine.weights.safe_reading import SafePlanner, SafeReader
from finetune.engine.weights.staging import HostCopy
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import LostPeer, UserError
from finetune.runtime.files import free_name, move_folder, remove_folder, sync_folder
from finetune.runtime.logging import say
from finetune.runtime.units import GIB

_STATE, _FACTS, _PARTIAL, _ASIDE = "state", "trainer.json", ".partial-", "set_aside"
_NAME = re.compile(r"step_(\d{8,})")
_FIRST_PARTS = ("model", "optimizer")  # of checkpoints that were written before they named their parts
_LONGEST_WRITE = timedelta(days=1)  # a rank with a slow disk may keep the others waiting


@dataclass(frozen=True)
class Pending:
    """A checkpoint that was begun: its step, the folder that it will be, and this rank's writing of it.

    `writing` gives the seconds that it took; it is None if the step had been saved before.
    """

    step: int
    folder: Path
    writing: Future[float] | None

    @property
    def is_written(self) -> bool:
        """Whether this rank has ended its writing, well or not. On rank 0, all ranks have."""
        return self.writing is None or self.writing.done()

    @property
    def has_failed(self) -> bool:
        """Whether this rank could not write."""
        return self.writing is not None and self.writing.done() and self.writing.exception() is not None

    @property
    def seconds(self) -> float:
        """How long the writing took, once it has ended well; 0 if there was none."""
        return self.writing.result() if self.writing else 0.0


class Checkpoints:
    """The checkpoints of one run, `step_00000100` and so on, in one folder that all ranks see."""

    def __init__(
        self,
        folder: Path,
        keep_last: int | None,
        runtime: Runtime,
        background: bool = False,
        verify: bool = True,
        keep_best: int = 0,
    ) -> None:
        """Collective.

        Args:
            keep_last: None keeps all.
            background: write while the training goes on, from a copy in host memory.
            verify: compare the digests of all files before a checkpoint is taken up.
            keep_best: keep so many besides, of those that note a held-out loss: the ones with the least.
        """
        self.folder, self.keep_last, self.runtime, self.verify = folder, keep_last, runtime, verify
        self.keep_best = keep_best
        # A run's folder that was there at first, and is not later, has been moved away.
        self._makes_parents = not folder.parent.is_dir()
        self.group = dist.new_group(backend="gloo", timeout=_LONGEST_WRITE)
        self._host = HostCopy(runtime.device) if background else None
        self._thread = ThreadPoolExecutor(1, "checkpoint", runtime.device.make_current)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending. What has another name is passed over."""
        names = (_NAME.fullmatch(path.parent.name) for path in self.folder.glob(f"step_*/{_FACTS}"))
        return sorted(int(name[1]) for name in names if name and self.path(int(name[1])).name == name[0])

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def path_aside(self, step: int) -> Path:
        """Where a checkpoint lies that was set aside, or the first of several."""
        return self.folder / _ASIDE / self.path(step).name

    # Writing

    def begin(
        self,
        step: int,
        parts: Sequence[Part],
        facts: dict[str, Any],
        export: Callable[[Path], None],
        aside: bool = False,
    ) -> Pending:
        """Write the state of all parts to a folder that is no checkpoint until all of it is there. Collective.

        The state is that of now, whatever is trained before `finish`. One checkpoint is pending at a time: finish it before the
        next is begun. A step that is saved is left alone.

        Args:
            facts: small JSON values, returned by `facts`.
            export: called on every rank with the unfinished folder, to add files of its own; fails on all ranks or on none.
            aside: write it among those that are set aside, from which no run resumes.
        Raises:
            UserError: on every rank, if any could not write; older checkpoints stay.
        """
        final, partial = self._places(step, aside)
        if partial is None:
            return Pending(step, final, None)
        names = [part.name for part in parts]
        facts = {"step": step, "processes": self.runtime.world_size, "parts": names, **facts}
        state = {part.name: part.state_dict() for part in parts}
        try:
            with self.runtime.together():
                if self._host:
                    state = self._host.of(state)
            export(partial)
        except Exception as error:
            self._give_up(step, partial, error)
        writing = self._thread.submit(self._write, step, partial, final, state, facts)
        if not self._host:
            wait([writing])
        return Pending(step, final, writing)

    def finish(self, pending: Pending) -> Path:
        """Wait until a begun checkpoint is complete; returns its folder. Collective; raises as `begin`."""
        if pending.writing:
            wait([pending.writing])  # all ranks end it together, so that none waits for a slow disk in what follows
        with self.runtime.together():
            if pending.writing:
                pending.writing.result()
        return pending.folder

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Leave the folder to another run once this rank's writing has ended; but do not wait for a rank that may be lost."""
        self._thread.shutdown(wait=kind is None or (issubclass(kind, UserError) and not issubclass(kind, LostPeer)))

    def _places(self, step: int, aside: bool) -> tuple[Path, Path | None]:
        """(the folder of a checkpoint, where it lies while it is written, or None if it is there). Collective."""
        final, partial = self.path(step), None
        with self.runtime.together():
            if self.runtime.is_main:
                for leftover in self.folder.glob(f"{_PARTIAL}*"):
                    remove_folder(leftover)
                if aside:
                    final = free_name(self.folder / _ASIDE / final.name)
                if not (final / _FACTS).exists():
                    if final.exists():  # half copied: it has no facts
                        self._set_aside(final, "it has no trainer.json")
                    partial = free_name(self.folder / f"{_PARTIAL}{final.name}")
                    try:
                        self.folder.mkdir(parents=self._makes_parents, exist_ok=True)
                        partial.mkdir()
                    except OSError as error:
                        raise not_written(error, step, self.folder, self.steps()) from None
        return self.runtime.from_main((final, partial))

    def _write(self, step: int, partial: Path, final: Path, state: dict[str, Any], facts: dict[str, Any]) -> float:
        """Write a state, and give its folder its name once all ranks have. Returns the seconds. Collective over `group`."""
        start = time.monotonic()
        try:
            # Without copies ahead, for which DCP would wait for the GPU's stream, though the state is in host memory.
            writer = FileSystemWriter(partial / _STATE, per_thread_copy_ahead=0)
            dcp.save(state, storage_writer=writer, process_group=self.group)
            outcome = [self._complete(partial, final, facts)]
            dist.broadcast_object_list(outcome, src=0, group=self.group)
            if outcome[0]:
                raise outcome[0]
        except FAILURE as error:
            self._give_up(step, partial, error)
        return time.monotonic() - start

    def _complete(self, partial: Path, final: Path, facts: dict[str, Any]) -> Exception | None:
        """Note the digests and give the folder its name, on rank 0; returns why it cannot. Collective over `group`."""
        shares: list[Any] = [None] * self.runtime.world_size if self.runtime.is_main else []
        dist.gather_object(digests(partial, self.runtime.rank), shares or None, dst=0, group=self.group)
        if not self.runtime.is_main:
            return None
        try:
            if failures := sorted({str(share) for share in shares if isinstance(share, OSError)}):
                raise OSError("; ".join(failures))
            found = {name: digest for share in shares for name, digest in share.items()}
            (partial / _FACTS).write_text(json.dumps({**facts, "files": found}, indent=1))
            sync_folder(partial)
            final.parent.mkdir(exist_ok=True)
            move_folder(partial, final)
            sync_folder(final.parent, deep=False)
            self._prune()
        except Exception as error:  # the others wait for it
            return error
        return None

    def _give_up(self, step: int, partial: Path, error: BaseException) -> NoReturn:
        """Remove what was written of a checkpoint, and raise what its failure means for the user."""
        if self.runtime.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        meaning = not_written(error, step, self.folder, self.steps())
        if meaning is error:
            raise error
        raise meaning from error

    def _prune(self) -> None:
        """Keep the newest `keep_last` and the best; a checkpoint loses its name before its files, so none is ever half there."""
        best = ranked(self.steps(), self.facts)[: self.keep_best] if self.keep_best else []
        for step in self.steps()[: -self.keep_last] if self.keep_last else []:
            if step in best:
                continue
            doomed = free_name(self.folder / f"{_PARTIAL}{self.path(step).name}")
            try:
                self.path(step).rename(doomed)
            except OSError as error:
                say(f"warning: an old checkpoint cannot be removed ({error})")
                continue
            remove_folder(doomed)

    # Taking up

    def newest(self) -> int | None:
        """The step of the newest checkpoint that is as it was written; what is passed over is said. None without any. Collective.

        Raises:
            UserError: there are checkpoints, and each is damaged.
        """
        self._say_strange_names()
        found: dict[int, list[str]] = {}
        for step in reversed(self.runtime.from_main(self.steps() if self.runtime.is_main else [])):
            found[step] = self.damage(step)
            if not found[step]:
                return step
            say(f"warning: the checkpoint of step {step} is damaged, and passed over ({_in_words(step, found[step])})")
        for step, wrong in found.items():
            if not any(line.startswith((f"{_STATE}/", _FACTS)) for line in wrong):
                say(
                    f"resuming from the checkpoint of step {step}: what is damaged is only the adapter that was exported with it"
                )
                return step
        if found:
            raise UserError(
                f"all checkpoints are damaged ({'; '.join(_in_words(*each) for each in found.items())})",
                f"put one back, from a copy or from {_ASIDE}, or move the folder away to start anew",
                str(self.folder),
            )
        return None

    def damage(self, step: int) -> list[str]:
        """What is wrong with a checkpoint, in words; empty if it is as it was written. One rank reads each file. Collective.

        Raises:
            UserError: a file that is there cannot be read, which says nothing of what is in it.
        """
        start = time.monotonic()
        wrong: list[str] = []
        files: dict[str, tuple[int, str]] = {}
        with self._reading(step):
            if self.runtime.is_main:
                wrong, files = self._look_at(step)
        wrong, files = self.runtime.from_main((wrong, files))
        if wrong or not self.verify:
            return wrong
        with self._reading(step):
            share = damage(self.path(step), files, self.runtime.rank, self.runtime.world_size)
        lines = [line for each in self.runtime.gather(share) for line in each]
        seconds, size = time.monotonic() - start, sum(size for size, _ in files.values())
        if seconds > 1:
            say(f"verified the checkpoint of step {step}: {size / GIB:.1f} GiB in {seconds:.1f} s")
        return lines

    @contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """What cannot be read on one rank is an error on all."""
        with self.runtime.together():
            try:
                yield
            except OSError as error:
                raise UserError(
                    f"the checkpoint cannot be read ({error})",
                    "run the same command again; if this comes back, move the folder away, and the run goes on from the one before",
                    str(self.path(step)),
                ) from error

    def _look_at(self, step: int) -> tuple[list[str], dict[str, tuple[int, str]]]:
        """(what is wrong with a checkpoint's small files and the sizes of the others, the noted digests)."""
        state, looked_at = self.path(step) / _STATE, _FACTS
        try:
            facts = self.facts(step)
            files = {name: (int(size), str(digest)) for name, (size, digest) in facts.get("files", {}).items()}
            looked_at = f"{_STATE}/.metadata"
            return missing_bytes(state, SafeReader(state).read_metadata()), files
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                raise
            return [f"{looked_at} is missing"], {}
        except Exception as error:  # whatever a damaged file's bytes make of it
            return [f"{looked_at}: {reason(error)}"], {}

    def facts(self, step: int) -> dict[str, Any]:
        """What was noted with a checkpoint. Raises OSError or ValueError if it cannot be read."""
        facts = json.loads((self.path(step) / _FACTS).read_text())
        if not isinstance(facts, dict) or facts.get("step") != step:
            raise ValueError(f"{_FACTS} does not belong to step {step}")
        return facts

    def load(self, step: int, parts: Sequence[Part]) -> None:
        """Restore all parts in place, on any number of ranks. Other state that the checkpoint holds is left there. Collective.

        Raises:
            UserError: the checkpoint cannot be read, or does not hold one of the parts. A part is not started anew in the
                middle of a run: the run would not be the one that was never interrupted.
        """
        with self.runtime.together():
            self._check_parts(step, parts)
        state = {part.name: part.state_dict() for part in parts}
        reader = SafeReader(self.path(step) / _STATE)
        try:
            dcp.load(state, storage_reader=reader, planner=SafePlanner(), process_group=self.runtime.control)
        except FAILURE as error:
            raise self._not_read(step, error) from error
        for part in parts:
            part.load_state_dict(state[part.name])

    def _check_parts(self, step: int, parts: Sequence[Part]) -> None:
        try:
            saved = self.facts(step).get("parts", _FIRST_PARTS)
        except (OSError, ValueError) as error:
            raise self._not_read(step, error) from error
        if missing := [part.name for part in parts if part.name not in saved]:
            raise UserError(
                f"the checkpoint has no state of {', '.join(missing)}: the run that saved it had no such part",
                "resume with the settings that the run was started with, or set `output` to a new folder for a new training",
                str(self.path(step)),
            )

    def _not_read(self, step: int, error: BaseException) -> UserError:
        older = [known for known in self.steps() if known < step]
        return not_read(error, self.path(step), older, self.runtime.world_size, lambda: self.facts(step)["processes"])

    # Setting aside

    def set_aside_after(self, step: int) -> None:
        """Move all checkpoints after a step out of the way, since the run will write these steps anew. Collective."""
        with self.runtime.together():
            if self.runtime.is_main:
                for newer in self.steps():
                    if newer > step:
                        self._set_aside(self.path(newer), f"the run goes on from step {step}")

    def _set_aside(self, folder: Path, why: str) -> None:
        """Move a checkpoint's folder among those from which no run resumes, and say so.

        Raises:
            UserError: it cannot be moved.
        """
        target = free_name(self.folder / _ASIDE / folder.name)
        try:
            target.parent.mkdir(exist_ok=True)
            move_folder(folder, target)
        except OSError as error:
            raise UserError(
                f"{folder.name} cannot be moved out of the way ({error})", "move it away by hand", str(folder)
            ) from error
        say(f"moved {folder.name} to {target}: {why}")

    def _say_strange_names(self) -> None:
        if not self.runtime.is_main or not self.folder.is_dir():
            return
        known = {self.path(step).name for step in self.steps()} | {_ASIDE}
        names = sorted(path.name for path in self.folder.iterdir() if not path.name.startswith("."))
        if strange := [name for name in names if name not in known]:
            say(f"passed over in {self.folder}, which are no whole checkpoints: {', '.join(strange)}")


def _in_words(step: int, wrong: Sequence[str]) -> str:
    return f"step {step}: {'; '.join(wrong[:3])}{'; ...' if len(wrong) > 3 else ''}"
