"""What was measured on this machine, remembered in a file of JSON."""

import json
import os
import platform
import threading
import warnings
from pathlib import Path
from typing import Any

from sparsejax import _files

_FORMAT = 1
_writing = threading.Lock()


def default_file() -> Path:
    """`crossover.json` in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(cache) / "sparsejax" / "crossover.json"


def recall(file: Path, machine: str) -> dict[str, float]:
    """What the file holds of a machine; nothing where there is none, or none that can be read.

    Warns:
      UserWarning: if the file is damaged.
    """
    return _read(file).get(machine, {})


def remember(file: Path, machine: str, product: str, speed_up: float) -> None:
    """Adds a figure to the file, where it can be written.

    Of two processes that write at once one may lose a figure, which is then measured again.
    """
    with _writing:
        known = _read(file)
        known.setdefault(machine, {})[product] = speed_up
        content = json.dumps({"format": _FORMAT, "speed_ups": known}, indent=1)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with _files.replacing(file) as f:
                f.write(content.encode())
        except OSError:
            pass  # A read-only home, a full disk: it is measured again next time.


def processor() -> str:
    """The processor's name, and how many of it this process may use."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as f:
            fields = [line.partition(":") for line in f]
    except OSError:
        fields = []
    # One name does for many models in virtual machines.
    words = ("vendor_id", "cpu family", "model", "model name", "stepping", "cache size")
    found = {key.strip(): value.strip() for key, _, value in fields if key.strip() in words}
    name = " ".join(found.values()) or name
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{count} x {name}"


def _read(file: Path) -> dict[str, dict[str, float]]:
    try:
        content = file.read_bytes()
    except OSError:
        return {}
    try:
        return _checked(json.loads(content))
    except ValueError as error:
        warnings.warn(
            f"the file of measured speed-ups, {str(file)!r}, is damaged ({error}); it is made "
            "anew.",
            stacklevel=2,
        )
        return {}


def _checked(content: Any) -> dict[str, dict[str, float]]:
    """What a file must hold: by machine and product, positive numbers."""
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"it is not of format {_FORMAT}")
    machines = content.get("speed_ups")
    tables = list(machines.values()) if isinstance(machines, dict) else [None]
    for table in tables:
        values = list(table.values()) if isinstance(table, dict) else [None]
        if not all(isinstance(x, float | int) and 0 <= x < float("inf") for x in values):
            raise ValueError("a speed-up in it is no positive number")
    return machines if isinstance(machines, dict) else {}
