"""Where the installed C++ library lies, for those who link it."""

from pathlib import Path

from longspan import _core


def get_cmake_dir() -> str:
    """The directory for `-Dlongspan_DIR=`, so that `find_package(longspan)` works.

    It lies beside the extension module, which in an editable install is not where the Python
    sources are.
    """
    return str(Path(_core.__file__).parent / "lib" / "cmake" / "longspan")


def get_include_dir() -> str:
    """The directory that holds `longspan/engine.h`."""
    return str(Path(_core.__file__).parent / "include")
