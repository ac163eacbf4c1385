"""One paper, one file. `build("gloria", ...)` imports `gloria_core.objectives.gloria` and makes its `GLoRIA`.

A new paper is one new module with one subclass of `Objective` in it; nothing here is edited.
"""

import importlib
import inspect
import pkgutil

from gloria_core.objectives.base import Objective

__all__ = ["Objective", "available", "build"]


def available() -> list[str]:
    """Names that `build` takes: the modules of this folder that hold an objective."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")


def objective_class(name: str) -> type[Objective]:
    """The one `Objective` subclass defined in `gloria_core.objectives.<name>`.

    Raises ValueError for an unknown name and TypeError where a module defines none or several.
    """
    if name not in available():
        raise ValueError(f"unknown objective {name!r}; available: {', '.join(available())}")
    module = importlib.import_module(f"{__name__}.{name}")
    found = [value for value in vars(module).values() if getattr(value, "__module__", "") == module.__name__]
    classes = [value for value in found if inspect.isclass(value) and issubclass(value, Objective)]
    if len(classes) != 1:
        raise TypeError(f"{module.__name__} must define exactly one Objective, it defines {len(classes)}")
    return classes[0]


def build(name: str, *, pooled_dim: int, region_dim: int, text_dim: int, **options: object) -> Objective:
    """Make objective `name` on encoders of these widths; an option that it does not have raises TypeError."""
    cls = objective_class(name)
    known = list(inspect.signature(cls).parameters)
    for option in options:
        if option not in known:
            raise TypeError(f"objective {name!r} has no option {option!r}; it has: {', '.join(known)}")
    return cls(pooled_dim=pooled_dim, region_dim=region_dim, text_dim=text_dim, **options)
