"""What ranks of several machines tell each other if their runs folder turns out to be several.

Ranks find each other by the run's directory (`rendezvous`). Where they share none, the others would wait for
rank 0, and rank 0 for them. torchrun's agents have a key-value store, at which its ranks form their process
group: rank 0 says there which run it has opened, and a rank that does not see it, why it cannot take part.
stoker's own launchers compare folders themselves, before they start ranks.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import platform
import time
from typing import Any

from stoker.run import rendezvous
from stoker.run.directory import RunDirectory
from stoker.world import World, agents_store

log = logging.getLogger("stoker")

SHARE = (
    "set --runs to a folder that they all share; for an object store, share its working copy, which is below "
    "STOKER_CACHE"
)
_SEEN_WITHIN = 60.0  # seconds in which a new folder is seen everywhere: as long as NFS keeps a listing
_ANSWERS_WITHIN = datetime.timedelta(seconds=5)
_OPENED, _REFUSED = "opened", "refused"


class LaunchStore:
    """Texts about a run, in the store of the agents that started its ranks.

    It stays empty for ranks of one machine, and where a launcher has no such store or it does not answer.
    """

    def __init__(self, world: World, run: RunDirectory) -> None:
        self._address = agents_store() if world.machines > 1 else None
        self._run, self._launch = run, world.launch
        self._store: Any = None
        self._since: float | None = None
        """When this rank said that it has opened the run, or was told so and did not see it."""

    def say_opened(self) -> None:
        """Say once that this rank, the first, has opened the run."""
        if self._since is None:
            self._since = time.monotonic()
            self._say(_OPENED, f"rank 0 on {platform.node()} has opened {self._run.path}")

    def say_closed(self) -> None:
        """Say that this rank has let go of the run: what others see of it from now on proves nothing."""
        if self._since is not None:
            self._say(_OPENED, "")

    def refuse_unshared(self) -> str:
        """Why this rank cannot take part in a run that it does not see; empty until that is certain.

        Then it is also said to rank 0.
        """
        for folder in (self._run.runs, self._run.path.parent):
            with contextlib.suppress(OSError):
                list(folder.iterdir())  # NFS then asks again what is there
        here, said = rendezvous.opened(self._run), self._text(_OPENED)
        if not said or (here is not None and here.launch == self._launch):
            return ""
        self._since = time.monotonic() if self._since is None else self._since
        if time.monotonic() - self._since < _SEEN_WITHIN:
            return ""
        said = f"{said}, which is not there on {platform.node()}: {SHARE}"
        self._say(_REFUSED, said)
        return said

    def refusal(self) -> str:
        """Why a rank cannot take part; empty if none has said so."""
        return self._text(_REFUSED)

    def _text(self, key: str) -> str:
        try:
            store = self._connected()
            name = self._name(key)
            return store.get(name).decode() if store is not None and store.check([name]) else ""
        except RuntimeError as error:
            self._is_away(error)
            return ""

    def _say(self, key: str, text: str) -> None:
        try:
            store = self._connected()
            if store is not None:
                store.set(self._name(key), text)
        except RuntimeError as error:
            self._is_away(error)

    def _name(self, key: str) -> str:
        return f"stoker/{self._launch}/{self._run.name}/{key}"

    def _connected(self) -> Any:
        """The store, or None where there is none. Raises RuntimeError if it does not answer."""
        if self._address is not None and self._store is None:
            from torch.distributed import TCPStore  # type: ignore[attr-defined]

            self._store = TCPStore(
                *self._address, is_master=False, timeout=_ANSWERS_WITHIN, wait_for_workers=False
            )
        return self._store

    def _is_away(self, error: RuntimeError) -> None:
        """Ask no more: torchrun's ranks do not outlive its store."""
        self._address, self._store = None, None
        log.debug("the store of the launcher does not answer: %s", error)
