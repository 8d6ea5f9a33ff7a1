"""Import of modules of one's own, also from the working directory.

Use it with names from configs and command lines only, never with one from an adapter file: importing runs code.
"""

import importlib
import os
import sys
from collections.abc import Callable
from types import ModuleType


def import_own(module: str, name: str) -> ModuleType:
    """Import a module that is in the working directory or in Python's path; messages begin with `name`.

    Raises:
        ValueError: there is no such module, or it imports one that does not exist.
    """
    if (folder := os.getcwd()) not in sys.path:
        sys.path.append(folder)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"{name}: {error}; put the file of the module into the working directory ({folder}) or its folder into "
            "PYTHONPATH"
        ) from error


def import_function(name: str) -> Callable:
    """Import the function that "module:function" names.

    Raises:
        ValueError: as `import_own` does; also if the module has no such function.
    """
    module, _, function = name.partition(":")
    found = getattr(import_own(module, repr(name)), function, None)
    if not callable(found):
        raise ValueError(f"{name!r}: the module {module} has no function {function!r}")
    return found
