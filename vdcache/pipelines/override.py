"""Objects in an instance's dict that stand in front of a method of its class: nothing of the class is touched."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

__all__ = ["Override", "method_of"]


class Override:
    """Stands where a method of `owner` was. Copies and pickles of the owner get the method, never this.

    Args:
        owner: held weakly, because it holds this.
        name: of the method.
        before: what the owner's dict held under that name; None where the class's method was found.
    """

    __slots__ = ("__weakref__", "_owner", "before", "name")

    def __init__(self, owner: Any, name: str, before: Callable[..., Any] | None = None) -> None:
        self._owner, self.name, self.before = weakref.ref(owner), name, before

    @property
    def owner(self) -> Any:
        return self._owner()

    @property
    def plain(self) -> Callable[..., Any]:
        """What is behind this."""
        return self.before if self.before is not None else method_of(self.owner, self.name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.plain(*args, **kwargs)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return self.plain

    @property
    def __name__(self) -> str:
        return self.name

    def install(self) -> None:
        self.owner.__dict__[self.name] = self

    def uninstall(self) -> None:
        """Put back what was there. Where somebody has put something in front since, this stays behind it and does nothing."""
        held = self.owner.__dict__
        if held.get(self.name) is self:
            if self.before is None:
                del held[self.name]
            else:
                held[self.name] = self.before

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self.owner))
        return self if copied is None else method_of(copied, self.name)

    def __reduce__(self) -> Any:
        return getattr, (self.owner, self.name)


def method_of(owner: Any, name: str) -> Callable[..., Any]:
    """The method that the class of `owner` has."""
    return getattr(type(owner), name).__get__(owner)  # type: ignore[no-any-return]
