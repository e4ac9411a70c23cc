"""Classes made at run time for objects that exist: which class they were made of, and how such objects are pickled."""

from collections.abc import Callable

import torch

from cnn_ext.override import override


class Derived:
    """Mixed into a class made at run time: its objects are copied and pickled as what they were, and derived anew."""

    original: type
    derive: Callable[[type], type]  # a function that pickle finds by its name

    def __reduce_ex__(self, protocol):
        make, arguments, *state = super().__reduce_ex__(protocol)
        cls, derivations = type(self), []
        while issubclass(cls, Derived):
            cls, derivations = cls.original, [cls.derive, *derivations]
        arguments = tuple(cls if argument is type(self) else argument for argument in arguments)
        return _rebuild, (derivations, make, arguments), *state


def _rebuild(derivations: list[Callable[[type], type]], make: Callable, arguments: tuple):
    rebuilt = make(*arguments)
    for derive in derivations:
        rebuilt.__class__ = derive(type(rebuilt))
    return rebuilt


def derived_class(derive: Callable[[type], type], original: type, *bases: type) -> type:
    """A class with ``bases`` that goes by the name of ``original``."""
    names = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(original.__name__, bases, names | {"original": original, "derive": staticmethod(derive)})


class Overridden(Derived):
    """Mixed into the class of a model whose forward is to run under ``override()``."""

    def forward(self, *args, **kwargs):
        with override():
            return super().forward(*args, **kwargs)


_overridden: dict[type, type] = {}


def overridden(original: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """The class ``original`` with its forward under ``override()``."""
    if original not in _overridden:
        _overridden[original] = derived_class(overridden, original, Overridden, original)
    return _overridden[original]
