"""Agreement of the processes of a run: each shares its facts or its failure before they depend on each other."""

import contextlib
import json
import logging
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from pisa_jax.runtime import key_value_store as store
from pisa_jax.runtime.failures import Failure, Refused, failure_of, join_reasons, publish

logger = logging.getLogger(__name__)

# Seconds for which a process waits for the others, which may have to download weights, and between two reports.
PATIENCE, INTERVAL = 3600.0, 60.0

# Calls of `gather` by name: the keys of a second call must be others.
_calls: Counter[str] = Counter()


def gather(name: str, value: Any) -> list[Any]:
    """Return the values (as JSON) of all processes, in their order; all call this equally often for a name.

    Raises:
        ConnectionError: the first process cannot be reached.
        TimeoutError: a process was not ready for an hour.
    """
    if not store.connected():
        return [value]
    folder, start = f"gathered/{name}_{_calls[name]}", time.monotonic()
    _calls[name] += 1
    store.put(f"{folder}/{store.process_index()}", json.dumps(value))
    found: list[Any] = []
    while len(found) < store.process_count():
        try:
            found.append(json.loads(store.wait_for(f"{folder}/{len(found)}", INTERVAL)))
        except TimeoutError:
            waited = time.monotonic() - start
            if waited > PATIENCE:
                raise TimeoutError(f"process {len(found)} was not ready after {waited / 60:.0f} minutes") from None
            logger.warning("waiting for process %d, which is not ready after %.0f seconds", len(found), waited)
    return found


@contextlib.contextmanager
def agreement() -> Iterator[dict[str, Any]]:
    """Run the body in every process; it enters into the dict what must be equal in all of them, as JSON.

    A failure is published at once, so that the other processes need not complete the body.

    Raises:
        Refused: the body failed in another process, or the facts differ.
    """
    facts: dict[str, Any] = {}
    try:
        yield facts
    except Exception as error:
        if not store.connected():
            raise
        failure = failure_of(error)
        publish(failure)
        _require(gather("agreement", _record(failure, facts)), error)
    _require(gather("agreement", _record(None, facts)))


def _record(failure: Failure | None, facts: Mapping[str, Any]) -> dict[str, Any]:
    return {"host": socket.gethostname(), "failure": failure and failure.message, "facts": facts}


def _require(records: list[dict[str, Any]], cause: Exception | None = None) -> None:
    """Raise Refused if a process failed, or if its facts are not those of the first process."""
    reasons = {index: record["failure"] for index, record in enumerate(records) if record["failure"] is not None}
    if not reasons:
        found = {index: _differences(records[0], record) for index, record in enumerate(records)}
        reasons = {index: differences for index, differences in found.items() if differences}
    if reasons:
        hosts = {index: (records[index]["host"], reason) for index, reason in reasons.items()}
        raise Refused(join_reasons(hosts)) from cause


def _differences(first: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Describe the facts of a process that are not those of the first process; empty if all are equal."""
    here, there = other["facts"], first["facts"]
    different = [name for name in here | there if here.get(name) != there.get(name)]
    return ", ".join(f"{name} is {here.get(name)!r} and in process 0 {there.get(name)!r}" for name in different)
