"""timm as the tests' reference, imported as if torchvision were there.

timm asks for torchvision when it is imported, but neither its models nor its RandAugment call it; and torchvision's
binary loads only beside the very build of torch that it was made for.
"""

import sys
from collections.abc import MutableSequence
from enum import Enum
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_NAME = "torchvision"


class _Interpolation(Enum):
    """timm builds tables of these names at import."""

    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class _Hollow(ModuleType):
    """Has every class that is asked for; none can be made."""

    __path__: MutableSequence[str]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "InterpolationMode":
            return _Interpolation

        def refuse(*_: Any, **__: Any) -> None:
            raise NotImplementedError(f"{self.__name__}.{name}: the tests have no torchvision")

        made = type(name, (), {"__init__": refuse})
        setattr(self, name, made)
        return made


class _Hollows(MetaPathFinder, Loader):
    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        inside = fullname == _NAME or fullname.startswith(_NAME + ".")
        return ModuleSpec(fullname, self, is_package=True) if inside else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Hollow(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def load(module: str) -> Any:
    """A module of timm, say `timm.data.auto_augment`; `import_module` with hollow modules for torchvision's."""
    if not any(isinstance(finder, _Hollows) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Hollows())
    return import_module(module)
