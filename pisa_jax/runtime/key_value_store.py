"""Short texts that the processes of a run share: the key-value store of `jax.distributed`, in the first process."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import distributed  # the store has no public name, and collectives hang once a process has failed

PREFIX = "pisa_jax/"


def process_count() -> int:
    """Return the number of connected processes; unlike `jax.process_count`, this does not start the devices."""
    return distributed.global_state.num_processes if distributed.global_state.client is not None else 1


def process_index() -> int:
    """Return the number of this process, also without starting the devices."""
    return distributed.global_state.process_id


def connected() -> bool:
    """Return True if there are other processes."""
    return process_count() > 1


def put(key: str, text: str) -> None:
    """Store a text; an earlier one of the same key is replaced.

    Raises:
        ConnectionError: the first process cannot be reached.
    """
    with _errors():
        _client().key_value_set(PREFIX + key, text, allow_overwrite=True)


def wait_for(key: str, seconds: float) -> str:
    """Return the text of a key as soon as it is stored.

    Raises:
        TimeoutError: it was not stored in time.
        ConnectionError: the first process cannot be reached.
    """
    with _errors():
        return _client().blocking_key_value_get(PREFIX + key, max(1, int(1000 * seconds)))


def read_folder(folder: str) -> dict[str, str]:
    """Return name -> text of all keys `FOLDER/NAME`.

    Raises:
        ConnectionError: the first process cannot be reached.
    """
    with _errors():
        found = _client().key_value_dir_get(f"{PREFIX}{folder}/")
    return {key.rsplit("/", 1)[1]: text for key, text in found}


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" in str(error):
            raise TimeoutError(str(error)) from error
        raise ConnectionError(f"the first process of the run cannot be reached: {error}") from error


def _client() -> Any:
    if (client := distributed.global_state.client) is None:
        raise ConnectionError("this process is not connected to the other processes of the run")
    return client
