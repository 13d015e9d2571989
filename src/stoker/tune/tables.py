"""Optuna's tables in a database that may be away for a while: it is restarted, or the network is."""

from __future__ import annotations

import functools
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from stoker import redaction
from stoker.errors import StokerError
from stoker.words import first_line

log = logging.getLogger("stoker")
T = TypeVar("T")

PATIENCE = 300.0
"""Seconds to wait for a database that is away."""
_FIRST, _LONGEST = 0.5, 10.0  # seconds between tries
_TOKEN = "asked"
"""The trial attribute by which a controller recognises a trial that it has created."""
BY = "controller"
"""The trial attribute with the name of its controller."""


class DatabaseAway(StokerError):
    """The database did not answer for minutes."""


class Tables(RDBStorage):
    """Optuna's storage, which waits for its database as long as that does not answer.

    A statement is repeated without knowing whether it was executed: each has the same effect as one.

    Args:
        new: create the tables if they do not exist.
    """

    def __init__(self, url: str, *, new: bool = True) -> None:
        self._tried: set[str] = set()
        """The tokens of trials that may have been created."""
        super().__init__(url, engine_kwargs={"pool_pre_ping": True}, skip_table_creation=not new)

    def patiently(self, call: Callable[[], T]) -> T:
        """The result of a call, repeated while the database is away. Raises DatabaseAway."""
        begun, pause, said = time.monotonic(), _FIRST, False
        while True:
            try:
                found = call()
            except Exception as error:
                if not self._is_away(error):
                    raise
                cause = error.__cause__ if isinstance(error, StorageInternalError) else error
                reason = redaction.text(first_line(getattr(cause, "orig", cause) or error))
                if time.monotonic() - begun > PATIENCE:
                    raise DatabaseAway(
                        f"the database of the study does not answer ({reason}): run the same "
                        "command again once it does, and the search continues"
                    ) from error
                if not said:
                    log.warning("the database of the study does not answer (%s): waiting for it", reason)
                said = True
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST)
            else:
                if said:
                    log.info("the database of the study answers again")
                return found

    def _is_away(self, error: BaseException) -> bool:
        """Whether a repetition may succeed: the connection was lost or refused, or gave up on a lock."""
        from sqlalchemy.exc import InterfaceError, OperationalError

        cause = error.__cause__ if isinstance(error, StorageInternalError) else error
        lost = isinstance(cause, OperationalError | InterfaceError)
        return lost and self.engine.dialect.name != "sqlite"  # which has no connection to lose

    def _create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> FrozenTrial:
        made = template_trial or optuna.create_trial(state=TrialState.RUNNING)
        token = uuid.uuid4().hex
        made.system_attrs = {**made.system_attrs, _TOKEN: token}
        found: FrozenTrial = self.patiently(lambda: super(Tables, self)._create_new_trial(study_id, made))
        self._tried.discard(token)
        return found

    def _get_prepared_new_trial(self, study_id: int, template_trial: Any, session: Any) -> Any:
        """Called by Optuna within the transaction that creates a trial, for each try."""
        token = template_trial.system_attrs[_TOKEN]
        if token in self._tried:
            for trial in reversed(super()._get_trials(study_id, None, set(), -1)):
                if trial.system_attrs.get(_TOKEN) == token:
                    from optuna.storages._rdb.models import TrialModel

                    return TrialModel.find_or_raise_by_id(trial._trial_id, session)
        self._tried.add(token)
        return super()._get_prepared_new_trial(study_id, template_trial, session)

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        """See RDBStorage."""
        tries = 0

        def write() -> bool:
            nonlocal tries
            tries += 1
            try:
                written = super(Tables, self).set_trial_state_values(trial_id, state, values)
            except UpdateFinishedTrialError:
                if tries > 1 and super(Tables, self).get_trial(trial_id).state == state:
                    return True
                raise
            if written or tries == 1:
                return written
            now = super(Tables, self).get_trial(trial_id)  # another controller may have begun it
            return now.state == state and BY not in now.user_attrs

        return self.patiently(write)


def _patient(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def called(self: Tables, *args: Any, **kwargs: Any) -> Any:
        return self.patiently(lambda: method(self, *args, **kwargs))

    return called


for _name in (
    "create_new_study", "get_all_studies", "get_study_directions", "get_study_id_from_name",
    "get_study_name_from_id", "get_study_system_attrs", "get_study_user_attrs", "get_trial",
    "get_trial_id_from_study_id_trial_number", "set_study_system_attr", "set_study_user_attr",
    "set_trial_intermediate_value", "set_trial_system_attr", "set_trial_user_attr", "_get_best_trial_id",
    "_get_trials", "_set_trial_param",
):  # fmt: skip
    setattr(Tables, _name, _patient(getattr(RDBStorage, _name)))
