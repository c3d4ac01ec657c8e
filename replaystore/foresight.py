"""How to read files that are not in memory: by pages that are asked for ahead, or by huge pages."""

from collections.abc import Callable

from replaystore.files import HAS_HUGE_PAGES, HUGE_PAGE, memory_limit

ITEMS_A_WAIT = 256  # whose single pages would take about as long as one huge page


class Foresight:
    """Whether it pays to ask for pages ahead: it does while they come from disk, not from memory.

    `waits()` is how often the process has waited for the disk so far.
    """

    def __init__(self, waits: Callable[[], int]) -> None:
        self.is_on = False
        self._waits = waits
        self._before = waits()
        self._items, self._next = 0, 256

    def note(self, items: int) -> None:
        """Say that so many items were read; now and then this looks how many of them were waited for.

        Asking ahead begins when more than 16 items of the last 256, 512, 768 or 1,024 were waited for, and
        goes on as long as some waiting is left: for one in 64 of 4,096 items.
        """
        self._items += items
        if self._items < self._next:
            return
        waited = self._waits() - self._before
        is_much = waited > max(16, self._items // 64)
        if is_much or self._items >= 1024:
            self.is_on = is_much
            self._before, self._items = self._before + waited, 0
        self._next = 4096 if self.is_on else self._items + 256


class Patience:
    """Whether flat files are read in huge pages, as long as that is not in vain.

    They are if they take at most three quarters of the memory that the process may have. Each of their huge
    pages may be waited for once, and one more for every 256 items; if more is waited for, something
    else needs the memory, and a row is better read with the page around it alone.
    """

    def __init__(self, nbytes: int) -> None:
        self.is_left = HAS_HUGE_PAGES and nbytes <= memory_limit() * 3 // 4
        self._most = self._left = nbytes / HUGE_PAGE + 8

    def note(self, waits: int, items: int) -> None:
        """Say that reading so many items waited so often; once no patience is left, it stays so."""
        self._left = min(self._most, self._left + items / ITEMS_A_WAIT) - waits
        self.is_left &= self._left >= 0
