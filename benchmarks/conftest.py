"""Settings of `pytest benchmarks`: one device, what the JSON keeps, and `--slow`."""

import importlib.metadata
import os
from pathlib import Path

import jax
import pytest

SETTINGS = Path(__file__).with_name("pytest.ini")
PACKAGES = ("sparsejax", "jax", "jaxlib", "numpy", "torch", "pytest-benchmark")
STATISTICS = ("min", "q1", "median", "q3", "max", "rounds")


def pytest_addoption(parser):
    """`--slow` includes what takes more than about a minute."""
    parser.addoption("--slow", action="store_true", help="include the peers left out at 200M")


def pytest_ignore_collect(config):
    """Nothing is collected from above (`pytest .`), where other settings rule."""
    return True if config.inipath != SETTINGS else None


@pytest.fixture(scope="session", autouse=True)
def one_device():
    """Refuses to measure one processor that is split into several devices."""
    if jax.device_count() != 1:
        pytest.exit(
            f"Benchmarks need exactly one JAX device, got {jax.device_count()}: run "
            "`pytest benchmarks` alone, without --xla_force_host_platform_device_count.",
            returncode=pytest.ExitCode.USAGE_ERROR,
        )


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info):
    """Keeps what figures depend on: processor, cores, versions."""
    cpu, python, system = (machine_info[key] for key in ("cpu", "python_version", "system"))
    machine_info.clear()
    machine_info |= {
        "cpu": cpu.get("brand_raw", "unknown"),
        "cpu_count": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": system,
        "device": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "python": python,
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(output_json):
    """Keeps a few figures of each measurement, so that two versions of the file compare well."""
    for measured in output_json["benchmarks"]:
        stats = {name: measured["stats"][name] for name in STATISTICS}
        kept = {name: measured[name] for name in ("group", "name", "extra_info")}
        measured.clear()
        measured |= kept | {"stats": stats}


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
