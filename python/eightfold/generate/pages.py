"""Which pages of a `models.attention.PagedCache` are whose."""

from __future__ import annotations

from collections.abc import Sequence


class PagePool:
    """Hands out page numbers and counts their holders: sequences that share a prompt share its full pages."""

    def __init__(self, pages: int, order: Sequence[int] | None = None):
        """order: of all page numbers, in which they are handed out; default: from 0 on."""
        self._free = list(range(pages) if order is None else order)[::-1]
        self._holders = [0] * pages

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def take(self) -> int:
        """A page that nobody held. IndexError where there is none."""
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def share(self, page: int) -> int:
        """The same page, for one holder more."""
        self._holders[page] += 1
        return page

    def release(self, page: int) -> None:
        """One holder less; without any the page is free again."""
        self._holders[page] -= 1
        if self._holders[page] == 0:
            self._free.append(page)
        elif self._holders[page] < 0:
            raise ValueError(f"page: {page} has no holder to release it")
