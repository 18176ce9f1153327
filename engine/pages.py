"""Pages of the key-value cache: who holds which, and which hold a prefix that others can use.

A page holds the entries of `page_size` consecutive positions, in all layers. Full pages are known by the
tokens up to their end: a request whose prompt begins like another's takes its pages and computes the rest.
Pages that nobody holds stay until room is needed, the longest unused first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

Prefix = tuple[int, tuple[int, ...]]
"""The page before (-1 for the first) and the page's own tokens: equal for equal prefixes, by induction."""


class PagePool:
    """Hands out pages 0 … n_pages - 1.

    Args:
        n_pages: how many there are.
        page_size: positions of a page.
        caching: whether prefixes are kept and found.
    """

    def __init__(self, n_pages: int, page_size: int, *, caching: bool = True) -> None:
        self.n_pages = n_pages
        self.page_size = page_size
        self._caching = caching
        self._free = list(range(n_pages - 1, -1, -1))
        self._holders = [0] * n_pages
        self._page_of: dict[Prefix, int] = {}
        self._prefix_of: dict[int, Prefix] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # nobody holds them, the longest unused first

    @property
    def available(self) -> int:
        """Pages that can be had now."""
        return len(self._free) + len(self._idle)

    @property
    def held(self) -> int:
        """Pages that requests hold."""
        return self.n_pages - self.available

    def pages_for(self, positions: int) -> int:
        """Pages that this many positions take."""
        return -(-positions // self.page_size)

    def take(self) -> int | None:
        """A page of one's own, or None when there is none."""
        if self._free:
            page = self._free.pop()
        elif self._idle:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
        else:
            return None
        self._holders[page] = 1
        return page

    def give_back(self, pages: Sequence[int]) -> None:
        """The holder of these pages, in the order of their positions, needs them no more."""
        # The last first: a page is of no use to anyone without those before it.
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._prefix_of:
                self._idle[page] = None
            else:
                self._free.append(page)

    def find(self, tokens: Sequence[int]) -> list[int]:
        """Hold and return the pages of the longest known prefix of full pages of these tokens."""
        found: list[int] = []
        before = -1
        for start in range(0, len(tokens) - self.page_size + 1, self.page_size):
            page = self._page_of.get((before, tuple(tokens[start : start + self.page_size])))
            if page is None:
                break
            found.append(page)
            before = page
        for page in found:
            self._holders[page] += 1
            self._idle.pop(page, None)
        return found

    def remember(self, pages: Sequence[int], tokens: Sequence[int], *, done: int) -> int:
        """Let others find the full pages of a request, its first `done` being known already.

        Args:
            pages: of the request, in order.
            tokens: whose entries the pages hold.

        Returns:
            How many of its pages are known now.
        """
        if not self._caching:
            return 0
        full = len(tokens) // self.page_size
        for index in range(done, full):
            page = pages[index]
            before = pages[index - 1] if index else -1
            prefix = (before, tuple(tokens[index * self.page_size : (index + 1) * self.page_size]))
            # Another request may have computed the same prefix at the same time; the first one is found.
            orphan = index > 0 and before not in self._prefix_of
            if orphan or page in self._prefix_of or prefix in self._page_of:
                return index
            self._page_of[prefix] = page
            self._prefix_of[page] = prefix
        return full

    def clear(self) -> None:
        """Forget all prefixes: the weights they were computed with are no more."""
        self._page_of.clear()
        self._prefix_of.clear()
        self._free.extend(self._idle)
        self._idle.clear()

    def _forget(self, page: int) -> None:
        del self._page_of[self._prefix_of.pop(page)]


__all__ = ["PagePool"]
