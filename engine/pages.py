"""Pages of the KV cache: allocation, and sharing of common prefixes.

A page holds the entries of `page_size` consecutive positions, in all layers. Full pages are indexed by the
tokens up to their end: a request whose prompt begins like that of another request uses its pages and computes
the rest. Pages without a holder keep their entries until the memory is needed; the least recently used page
is reused first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

Prefix = tuple[int, tuple[int, ...]]
"""The previous page (-1 for the first) and the page's own tokens; by induction, equal for equal prefixes."""


class PagePool:
    """Allocates pages 0 … n_pages - 1.

    Args:
        n_pages: Number of pages.
        page_size: Positions of a page.
        caching: Whether prefixes are kept and found.
    """

    def __init__(self, n_pages: int, page_size: int, *, caching: bool = True) -> None:
        self.n_pages = n_pages
        self.page_size = page_size
        self._caching = caching
        self._free = list(range(n_pages - 1, -1, -1))
        self._holders = [0] * n_pages
        self._page_of: dict[Prefix, int] = {}
        self._prefix_of: dict[int, Prefix] = {}
        self._idle: OrderedDict[int, None] = (
            OrderedDict()
        )  # pages without a holder, least recently used first

    @property
    def available(self) -> int:
        """Number of pages that can be allocated now."""
        return len(self._free) + len(self._idle)

    @property
    def held(self) -> int:
        """Number of pages that requests hold."""
        return self.n_pages - self.available

    def pages_for(self, positions: int) -> int:
        """Number of pages for this many positions."""
        return -(-positions // self.page_size)

    def take(self) -> int | None:
        """Allocate a page; None if no page is available."""
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
        """Release the pages of a holder, given in the order of their positions."""
        # The last page first, because a page is useless without the pages before it.
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._prefix_of:
                self._idle[page] = None
            else:
                self._free.append(page)

    def find(self, tokens: Sequence[int]) -> list[int]:
        """Pages of the longest cached prefix of these tokens, in full pages; the caller becomes a holder."""
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
        """Index the full pages of a request, so that other requests find them.

        Args:
            pages: Pages of the request, in order.
            tokens: Tokens whose entries the pages hold.
            done: Number of the request's pages that are indexed already.

        Returns:
            Number of the request's pages that are indexed now.
        """
        if not self._caching:
            return 0
        full = len(tokens) // self.page_size
        for index in range(done, full):
            page = pages[index]
            before = pages[index - 1] if index else -1
            prefix = (before, tuple(tokens[index * self.page_size : (index + 1) * self.page_size]))
            # Another request may have computed the same prefix at the same time; the first one is kept.
            orphan = index > 0 and before not in self._prefix_of
            if orphan or page in self._prefix_of or prefix in self._page_of:
                return index
            self._page_of[prefix] = page
            self._prefix_of[page] = prefix
        return full

    def clear(self) -> None:
        """Drop all prefixes, after a change of weights."""
        self._page_of.clear()
        self._prefix_of.clear()
        self._free.extend(self._idle)
        self._idle.clear()

    def _forget(self, page: int) -> None:
        del self._page_of[self._prefix_of.pop(page)]


__all__ = ["PagePool"]
