"""A function of the user's own, named on the command line, as what an evaluation judges.

It is imported when it is named, and at no other time: whoever names it runs it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from maisi.data.preprocess import unwindow_ct, window_ct
from maisi.errors import MaisiError
from maisi.io.files import sha256
from maisi.volume import Volume


@dataclass(frozen=True)
class PythonReconstructor:
    """Makes a `Reconstructor` of a function `(Tensor 1 1 X Y Z in [0, 1]) -> Tensor` of the same shape.

    The tensor is float32, on the CPU, of a CT windowed from [-1000, 1000] HU; what comes back may be on any device, and
    is clipped to [0, 1].

    Attributes:
        name: as on the command line, for messages.
        function: the user's.
        source: the file that it stands in, if it has one.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    source: Path | None

    @classmethod
    def find(cls, name: str) -> PythonReconstructor:
        """Import `FILE.py:function` or `module:function`.

        Raises:
            MaisiError: it is not so named, cannot be imported, or is no function.
        """
        place, _, function_name = name.rpartition(":")
        if not place or not function_name.isidentifier():
            raise MaisiError(f"'{name}' names no function; write it as FILE.py:function or module:function.")
        module = _imported(place, name)
        function = getattr(module, function_name, None)
        if not callable(function):
            raise MaisiError(f"{place} has no function '{function_name}'; define it there, or name another.")
        source = getattr(module, "__file__", None)
        return cls(name, function, Path(source) if source else None)

    @cached_property
    def identity(self) -> dict[str, str | None]:
        """What is known of what decides the values: not the files that the function reads."""
        return {"python": self.name, "python_sha256": sha256(self.source) if self.source else None}

    def __call__(self, ct: Volume) -> Volume:
        """See `Reconstructor`.

        Raises:
            MaisiError: the function fails, or returns anything but a tensor of the same shape without gaps.
        """
        image = torch.from_numpy(window_ct(ct.array))[None, None]
        shape = tuple(image.shape)
        try:
            with torch.no_grad():
                made = self.function(image)
        except Exception as error:
            raise MaisiError(f"{self.name} failed on a tensor of {shape}: {_told(error)}; correct it there.") from error
        if not isinstance(made, Tensor) or tuple(made.shape) != shape:
            found = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise MaisiError(f"{self.name} made {found} of a tensor of {shape}; let it return a tensor of that shape.")
        values = made.detach().to("cpu", torch.float32)
        if not torch.isfinite(values).all():
            raise MaisiError(f"{self.name} returned values that are no numbers; correct it there.")
        return ct.with_array(unwindow_ct(values[0, 0].numpy()))


def _imported(place: str, name: str) -> ModuleType:
    path = Path(place)
    if path.suffix == ".py" and not path.is_file():
        raise MaisiError(f"{place} does not exist; name the file or module of the function.")
    try:
        return _of_file(path) if path.suffix == ".py" else importlib.import_module(place)
    except (Exception, SystemExit) as error:
        raise MaisiError(f"{name} cannot be imported: {_told(error)}; correct it there.") from error


def _of_file(path: Path) -> ModuleType:
    """Import a file, which may import its neighbours as a script may."""
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


def _told(error: BaseException) -> str:
    """The error in one line, with the place it was raised at."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<")]
    text = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {text} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"
