"""Which machines train one run together, in rounds; decided at the machine where their launchers meet.

When all have joined, a round begins: ranks are started everywhere. When a rank fails, or a machine stops
reporting, the round is over, all ranks are ended, and the next round begins, as long as restarts are left.

If their number may change (`1:4`), a round begins with the machines that are available. A machine that
joins, or is told to stop, ends the round after a checkpoint; a machine that is lost ends it as soon as it
is missed. The next round has the others. None of this costs a restart. The machine at which they meet must
stay.

`nodes.py` carries the reports to this machine, and the answers back.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, TypeAlias

from stoker import __version__, machine, world
from stoker import config as configs
from stoker.errors import EXIT_FAILED, EXIT_PREEMPTED, BadInput
from stoker.launch.budget import Budget, RankFailed
from stoker.run import launch_store
from stoker.words import counted

log = logging.getLogger("stoker")

SILENCE = 10.0  # seconds without a message after which a machine counts as gone
COMING = 600.0  # seconds to wait for the others
LAST_CALL = 5.0  # seconds to wait for more machines than needed, before the first round
_COLLECT = 1.5  # seconds after a failure in which related failures may be reported
_COLLECT_ALL = 7.0  # the same, while a launcher may still end the ranks that lost the one it will report
_NAP = 5.0  # seconds without a look at the clock which mean that this process did not run

_NOT_SHARED = f"the runs folder of {{host}} is not the one that the other machines use: {launch_store.SHARE}"

_OTHER_RUN = (
    "{host} trains {run}, but {other.host}, which meets the others at the same address, {other.run}: "
    "give the same command on every machine, and another port to another run"
)
_OTHER_CODE = "the script on {host} is not the one on {other.host}: every machine needs the same version"
_OTHER_VERSION = "{host} has {one}, {other.host} {two}: every machine needs the same version"
_SAME = "give the same command on every machine"
_TOLD = "{host} was told to stop"


class Awake:
    """A clock that stands still while this process does, in seconds; looked at more than once a second.

    A scheduler can suspend all processes of a job and let them go on later: then no machine was silent.
    """

    def __init__(self) -> None:
        self._passed, self._looked = 0.0, time.monotonic()
        self._lock = threading.Lock()

    def __call__(self) -> float:
        with self._lock:
            now = time.monotonic()
            if now - self._looked < _NAP:
                self._passed += now - self._looked
            self._looked = now
            return self._passed


WAITING, RUNNING, FAILED, DONE, GONE = "waiting", "running", "failed", "done", "gone"


@dataclass(frozen=True)
class Machines:
    """The number of machines that train together: `2`, or from 1 to 4."""

    least: int = 1
    most: int = 1

    @classmethod
    def parsed(cls, given: object) -> Machines:
        """`2` or `1:4`. Raises BadInput."""
        text = str(given)
        least, colon, most = text.partition(":")
        most = most if colon else least
        if not (least.isdecimal() and most.isdecimal() and 1 <= int(least) <= int(most)):
            raise BadInput(f"--nodes {text}: give a number, such as 2, or a minimum and maximum, such as 1:4")
        return cls(int(least), int(most))

    @property
    def elastic(self) -> bool:
        """Whether their number may change."""
        return self.least < self.most

    def __str__(self) -> str:
        return str(self.most) if self.least == self.most else f"{self.least}:{self.most}"


ONE = Machines()


Work: TypeAlias = tuple[str, dict[str, Any], list[str], str]
"""What a launcher trains: `Report`'s `run`, `config`, `given` and `script`."""
NO_WORK: Work = ("", {}, [], "")


def versions() -> dict[str, str]:
    """The packages that must be the same on all machines; torch's builds for a CUDA or another may differ."""
    found = {"stoker": __version__}
    with contextlib.suppress(metadata.PackageNotFoundError):
        found["torch"] = metadata.version("torch").partition("+")[0]
    return found


@dataclass
class Report:
    """What a launcher reports about itself."""

    node: str
    host: str
    nproc: int
    nodes: str
    folder: str = ""
    """The id of the folder that all machines must share."""
    run: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    """What it trains; without secrets."""
    given: list[str] = field(default_factory=list)
    """The keys of the config that it was given: defaults may depend on the machine."""
    script: str = ""
    """Its checksum."""
    first: bool = False
    """Whether they meet at this machine: it is machine 0, and its ranks find each other there too."""
    round: int = 0
    """The newest round that it knows."""
    phase: str = WAITING
    leaving: bool = False
    """Whether it was told to stop."""
    said: str = ""
    """How its ranks failed."""
    ago: float = 0.0
    """Seconds since then."""
    raised: bool = False
    """Whether it was an exception."""
    again: bool = True
    changed: bool = False
    """As in `StokerError`."""
    code: int = 0
    step: int = -1
    saved: int = -1
    versions: dict[str, str] = field(default_factory=dict)


@dataclass
class Answer:
    """What a launcher is told."""

    round: int = 0
    """The newest round; 0 before the first."""
    over: str = ""
    """Why that round is over, if it is."""
    number: int = 0
    """The number of this machine; -1 if it does not take part in the round."""
    machines: int = 1
    """The number of machines in the round; before the first, of those that have joined."""
    changes: str = ""
    """Why the round will be ended after a checkpoint."""
    port: int = 0
    """The port where the ranks of the round meet."""
    id: str = ""
    """The id of the round."""
    lost: str = ""
    """Which machines made the round before fail, and how: `a does not respond, b was told to stop`."""
    ended: bool = False
    """Whether everything is over."""
    error: str = ""
    code: int = 0


@dataclass
class _Member:
    report: Report
    heard: float
    number: int = -1
    """Its number in the newest round."""


@dataclass
class Round:
    """One round: what is known of it, and nothing of those before."""

    number: int = 0
    size: int = 0
    """Machines in it."""
    port: int = 0
    id: str = ""
    running: bool = True
    over: str = ""
    """Why it is over, if it is."""
    left: list[str] = field(default_factory=list)
    """Its machines that were told to stop and have ended."""
    changes: str = ""
    """Why it will be ended after a checkpoint, if it will."""
    failed_at: float | None = None
    failure: RankFailed | None = None
    final: bool = False
    """Whether that failure would only repeat itself."""


@dataclass
class Lost:
    """Which machines made a round fail, and how, in words."""

    gone: list[str] = field(default_factory=list)
    silent: dict[str, str] = field(default_factory=dict)
    """Those that were not heard of, by their nodes: they may have been slow, and report again."""

    def __bool__(self) -> bool:
        return bool(self.gone or self.silent)

    def __str__(self) -> str:
        return ", ".join([*self.gone, *self.silent.values()])


@dataclass
class Host:
    """The state of the machine at which the others meet. Its methods are called under its lock."""

    nodes: Machines
    budget: Budget
    sizes: frozenset[int]
    """The possible numbers of machines in a round."""
    members: dict[str, _Member] = field(default_factory=dict)
    now: Round = field(default_factory=lambda: Round(running=False, over="not begun"))
    """The newest round; number 0 before the first."""
    lost: Lost = field(default_factory=Lost)
    """Which machines made the last round fail that is over."""
    answer: Answer | None = None
    """How it ended."""
    told: set[str] = field(default_factory=set)
    """The nodes of the machines that were told how it ended."""
    refused: set[str] = field(default_factory=set)
    """The nodes of the machines that may not take part."""
    strangers: set[str] = field(default_factory=set)
    """The addresses from which came what is not understood."""
    knocked: dict[str, float] = field(default_factory=dict)
    """When machines for which there was no room reported first."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    clock: Awake = field(default_factory=Awake)
    """Looked at with each report, of which this machine makes two a second."""
    since: float = 0.0
    """When waiting for machines began, or the last one joined."""

    def hear(self, report: Report) -> Answer:
        """Process a report; returns what to do."""
        if report.first and report.node not in self.members:
            others = self.members.values()
            self.members = {m.report.node: m for m in others if not self._differs(m.report, report)}
        refused = self._refusal(report)
        if refused:
            if report.node not in self.refused:
                self.refused.add(report.node)
                log.warning("%s was refused: %s", report.host, refused)
            return Answer(ended=True, code=2, error=refused)
        now, known = self.clock(), self.members.get(report.node)
        if report.phase == GONE or (report.leaving and not self._plays(known)):
            self._let_go(report, now)
            return self.answer or Answer(ended=True, code=EXIT_PREEMPTED)
        if known is None and not (self._has_room(report) or self._make_room()):
            return self._without_room(report, now)
        if known is None:
            known = self._take_in(report, now)
        elif report.node in self.lost.silent:
            said = self.lost.silent.pop(report.node)
            self.lost.gone += [said] if now - known.heard > SILENCE else []
        known.report, known.heard = report, now
        self._judge(now)
        if self.answer is not None:
            self.told.add(report.node)
            return self.answer
        newest = self.now
        machines = newest.size if newest.number else len(self.members)
        of_it = newest.changes, newest.port, newest.id
        return Answer(newest.number, newest.over, known.number, machines, *of_it, lost=str(self.lost))

    def _refusal(self, report: Report) -> str:
        """Why a machine may not take part; empty if it may."""
        if report.nodes != str(self.nodes):
            return f"--nodes {report.nodes}: here it is --nodes {self.nodes}"
        others = (self._differs(report, member.report) for member in self.members.values())
        return next(filter(None, others), "")

    @staticmethod
    def _differs(report: Report, other: Report) -> str:
        """Why a machine cannot train with another one; empty if it can."""
        if other.folder != report.folder:
            return _NOT_SHARED.format(host=report.host)
        if other.run != report.run:
            return _OTHER_RUN.format(host=report.host, run=report.run, other=other)
        if changed := configs.drift(report.versions, other.versions):
            both = (report.versions, other.versions)
            one, two = (", ".join(f"{name} {of.get(name, '?')}" for name in changed) for of in both)
            return _OTHER_VERSION.format(host=report.host, one=one, two=two, other=other)
        if other.script != report.script:
            return _OTHER_CODE.format(host=report.host, other=other)
        return _differences(report, other)

    def _without_room(self, report: Report, now: float) -> Answer:
        """What to tell a machine for which there is no room: to wait, until it is known whether one is gone.

        A launcher that was killed and is started again at once comes before it is missed.
        """
        if self.answer is not None:
            return self.answer
        if now - self.knocked.setdefault(report.node, now) < SILENCE + 2 * _COLLECT:
            return Answer(self.now.number, "there is no room", number=-1)
        return Answer(ended=True, code=2, error=f"all {self.nodes.most} machines have already joined")

    def _plays(self, member: _Member | None) -> bool:
        """Whether a machine is part of the current round."""
        return self.now.running and member is not None and member.number >= 0

    def _let_go(self, report: Report, now: float) -> None:
        """Remove a machine that says that it is leaving."""
        known = self.members.pop(report.node, None)
        if not self._plays(known):
            return
        if report.leaving:
            self.now.left.append(report.host)
        if self.now.failure is None:
            said = (_TOLD if report.leaving else "{host} left").format(host=report.host)
            self.now.failure, self.now.final, self.now.failed_at = RankFailed(said), False, now
            if self.nodes.elastic:
                self._pause(said, Lost([said]))

    def _take_in(self, report: Report, now: float) -> _Member:
        self.members[report.node] = _Member(report, now)
        self.since = now
        log.info(
            "%s joined with %s: %d of %s",
            report.host, counted(report.nproc, "rank"), len(self.members), self.nodes,
        )  # fmt: skip
        return self.members[report.node]

    def _has_room(self, report: Report) -> bool:
        """Whether there is room, keeping a place for the rendezvous machine, which may report later."""
        others = sum(not member.report.first for member in self.members.values())
        return report.first or others < self.nodes.most - 1

    def _make_room(self) -> bool:
        """Remove a machine that is gone, and plays no part in a round, to make room for a new one."""
        now = self.clock()
        silent = {node: member for node, member in self.members.items() if now - member.heard > SILENCE}
        gone = [node for node, member in silent.items() if not self._plays(member)]
        if not gone:
            return False
        del self.members[gone[0]]
        return True

    def _judge(self, now: float) -> None:
        if self.answer is not None:
            return
        if self.now.running:
            self._judge_round(now)
        else:
            self._judge_waiting(now)

    def _judge_waiting(self, now: float) -> None:
        """Begin a round with the available machines, if there are enough."""
        heard = [member for member in self.members.values() if now - member.heard < SILENCE]
        here = [member for member in heard if member.report.phase == WAITING and not member.report.leaving]
        size = self._size(len(here))
        all_here = len(here) == self.nodes.most
        settled = len(here) == len(heard) and (self.now.number > 0 or now - self.since > LAST_CALL)
        if size and (all_here or settled) and any(member.report.first for member in here):
            self._begin(here, size)
        elif now - self.since > COMING:
            said = f"only {len(here)} of {self.nodes} machines joined within {COMING:.0f} s"
            said += f": {self.lost}" if self.lost else ""
            self._end(*waited(said, begun=self.now.number > 0))

    def _judge_round(self, now: float) -> None:
        playing = self._playing()
        self._look_for_failures(now, playing)
        done = all(member.report.phase == DONE for member in playing)
        failed_at, collect = self.now.failed_at, self._collecting(now, playing)
        if failed_at is not None and (self.now.final or now - failed_at > collect):
            self._over(now)
        elif len(playing) == self.now.size and done:
            self._ended(max(member.report.code for member in playing), playing)
        elif self.nodes.elastic and not self.now.changes:
            others = [member for member in self.members.values() if member.number < 0]
            ready = [member for member in others if now - member.heard < SILENCE]
            if self._size(self.now.size + len(ready)) > self.now.size:
                self.now.changes = f"{', '.join(member.report.host for member in ready)} joined"

    def _collecting(self, now: float, playing: list[_Member]) -> float:
        """Seconds after the failure in which what caused it may be reported.

        An exception may come of a rank's death elsewhere, whose launcher first ends the others there.
        """
        runs = [m for m in playing if m.report.phase == RUNNING and not m.report.leaving]
        heard = any(now - member.heard <= _COLLECT for member in runs)
        raised = self.now.failure is not None and self.now.failure.raised
        return _COLLECT_ALL if raised and heard else _COLLECT

    def _of_round(self) -> list[_Member]:
        """The machines of the newest round."""
        return [member for member in self.members.values() if member.number >= 0]

    def _playing(self) -> list[_Member]:
        """Those of the round that know about it."""
        return [member for member in self._of_round() if member.report.round == self.now.number]

    def _size(self, here: int) -> int:
        """The largest possible round with this many machines; 0 if there are too few."""
        return max((size for size in self.sizes if size <= here), default=0)

    def _ended(self, code: int, playing: list[_Member]) -> None:
        """All ranks ended by themselves; if only the set of machines changes, the next round begins."""
        leaving = [member for member in playing if member.report.leaving]
        staying = sum(not member.report.leaving for member in self.members.values())
        stays = not any(member.report.first for member in leaving)
        if code == EXIT_PREEMPTED and (leaving or self.now.changes) and stays and self._size(staying):
            gone = ", ".join(member.report.host for member in leaving)
            self._pause(f"{gone} left" if gone else self.now.changes)
        else:
            self._end(code, "")

    def _look_for_failures(self, now: float, playing: list[_Member]) -> None:
        newest = self.now
        failed = [member for member in playing if member.report.phase == FAILED]
        silent = [m.report.host for m in self._of_round() if now - m.heard > SILENCE]
        if failed:
            # What ended a rank from outside takes precedence over the errors that this caused in others.
            first = min(failed, key=lambda m: (m.report.again, m.report.raised, m.heard - m.report.ago))
            newest.failure, newest.final = RankFailed(first.report.said), not first.report.again
            newest.failure.raised, newest.failure.exit_code = first.report.raised, first.report.code or 1
            newest.failure.changed = first.report.changed
        elif silent:
            said = f"no message from {', '.join(silent)} for {SILENCE:.0f} s"
            newest.failure, newest.final = RankFailed(said), False
        if newest.failure is not None:
            newest.failed_at = now if newest.failed_at is None else newest.failed_at
            newest.failure.step = max((member.report.step for member in playing), default=-1)
            newest.failure.saved = max((member.report.saved for member in playing), default=-1)

    def _begin(self, here: list[_Member], size: int) -> None:
        for member in self.members.values():
            member.number = -1
        # The rendezvous machine is machine 0; machines that were together stay together.
        ordered = sorted(here, key=lambda member: (not member.report.first, -member.report.round))
        for number, member in enumerate(ordered[:size]):
            member.number = number
            log.info("%s is machine %d of %d", member.report.host, number, size)
        for member in ordered[size:]:
            log.info("%s is waiting: the work cannot be shared by %d machines", member.report.host, len(here))
        # Those that were in rounds of an earlier host, which is back since, wait for one after those.
        newest = 1 + max(self.now.number, *(member.report.round for member in here))
        self.now = Round(newest, size, port=machine.free_port(), id=uuid.uuid4().hex)

    def _over(self, now: float) -> None:
        """End the round; this costs a restart, unless it failed because of a machine that may be lost."""
        newest = self.now
        assert newest.failure is not None
        lost = Lost() if newest.final else self._to_blame(now)
        if self.nodes.elastic and lost:
            self._pause(str(lost), lost)
            return
        self._pause(str(newest.failure), lost, quiet=True)
        try:
            if newest.final:
                raise newest.failure
            self.budget.spend(newest.failure)
        except RankFailed as error:
            if lost:  # training itself did not fail: it can be started again
                said = without(str(lost))
                self._end(EXIT_PREEMPTED, said if str(error) in str(lost) else f"{said}.\n{error}")
            else:
                self._end(error.exit_code, str(error))
        else:
            log.warning("%s\nstarting again; restarts left: %d", newest.failure, self.budget.left)

    def _to_blame(self, now: float) -> Lost:
        """The machines of the round that were told to stop, or do not respond: ranks elsewhere then fail."""
        told = [member.report for member in self._of_round() if member.report.leaving]
        silent = [member.report for member in self._of_round() if now - member.heard > _COLLECT]
        return Lost(
            [_TOLD.format(host=host) for host in (*self.now.left, *(report.host for report in told))],
            {report.node: f"{report.host} does not respond" for report in silent if not report.leaving},
        )

    def _pause(self, why: str, lost: Lost | None = None, *, quiet: bool = False) -> None:
        """The round is over; the next one will follow.

        Args:
            lost: which machines made it fail, if any did.
        """
        self.now.running, self.now.over, self.since = False, why, self.clock()
        self.lost = lost or Lost()
        if not quiet:
            log.info("%s: continuing with the machines that are available", why)

    def end_with_host(self, host: str, *, told: bool) -> None:
        """The machine at which they meet ends before the others.

        Args:
            told: whether it was told to stop.
        """
        if self.answer is None and told:
            self._end(EXIT_PREEMPTED, without(_TOLD.format(host=f"{host}, the rendezvous machine,")))
        elif self.answer is None:
            self._end(EXIT_FAILED, f"{host}, the rendezvous machine, has ended")

    def _end(self, code: int, error: str) -> None:
        newest, lost = self.now, str(self.lost)
        self.answer = Answer(newest.number, newest.over, lost=lost, ended=True, code=code, error=error)


def _differences(one: Report, other: Report) -> str:
    """What two machines were told differently of one run; empty if nothing. A folder may be elsewhere."""
    found = [
        ", ".join(f"{key}={configs.shown(of.config.get(key))} on {of.host}" for of in (one, other))
        for key, values in configs.drift(one.config, other.config).items()
        if key in {*one.given, *other.given} and not configs.may_differ(key, *values)
    ]
    return f"{'; '.join(found)}: {_SAME}" if found else ""


def without(gone: str) -> str:
    """A message that says why machines end that could be started again."""
    return f"{gone}, so all machines have ended; once it is back, the same command resumes"


def waited(said: str, *, begun: bool) -> tuple[int, str]:
    """The exit code and the message of machines that have waited for others in vain.

    Args:
        begun: whether all of them were there before.
    """
    if world.comes_one_by_one():
        return EXIT_PREEMPTED, f"{said}; exit code {EXIT_PREEMPTED} asks for another try later"
    return EXIT_PREEMPTED if begun else EXIT_FAILED, said
