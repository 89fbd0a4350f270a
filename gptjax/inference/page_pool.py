"""Allocation of the pages of the key-value cache, and the prefix cache: pages by the hash of all tokens up to them.

Pages are counted by the requests that use them. A page with a hash that no request uses is kept, and the least recently
used of those are given away when pages run out.
"""

import collections
import hashlib
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from gptjax.config import GPTConfig, UserError

Digest = bytes


def page_bytes(config: GPTConfig, page_size: int) -> int:
    """Memory of a page of `page_size` positions, in all layers."""
    values = 2 * config.num_layers * config.kv_heads * page_size * config.head_dim
    return values * jnp.dtype(config.dtype).itemsize


def page_digests(
    tokens: Sequence[int], page_size: int, adapter: str | None, images: Sequence[npt.NDArray[np.uint8]] = ()
) -> list[Digest]:
    """The hashes of the whole pages of a text: of the adapter, all images, and all tokens up to the page's end."""
    digests, digest = [], hashlib.blake2b(repr(adapter).encode(), digest_size=16).digest()
    for image_X in images:
        digest = hashlib.blake2b(digest + image_X.tobytes(), digest_size=16).digest()
    tokens_N = np.asarray(tokens, np.int32)
    for end in range(page_size, len(tokens_N) + 1, page_size):
        digest = hashlib.blake2b(digest + tokens_N[end - page_size : end].tobytes(), digest_size=16).digest()
        digests.append(digest)
    return digests


def affordable_pages(cache_bytes: int, page_bytes: int, page_size: int) -> int:
    """The pages that requests may have in a memory of `cache_bytes`; UserError if there are none."""
    if cache_bytes < 2 * page_bytes:
        raise UserError(
            f"cache_bytes={cache_bytes} is too small: a page of {page_size} positions has {page_bytes} "
            "bytes, and there must be two"
        )
    return cache_bytes // page_bytes - 1  # one is scratch space


class PagePool:
    """Pages 1 to `num_pages`; page 0 of the device's arrays is scratch space.

    Attributes:
      num_pages: pages that requests may have.
      evictions: pages of the prefix cache that were given away.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.evictions = 0
        self._free = list(range(num_pages, 0, -1))
        self._users = [0] * (num_pages + 1)
        self._digest: dict[int, Digest] = {}
        self._page: dict[Digest, int] = {}
        self._unused: collections.OrderedDict[int, None] = collections.OrderedDict()  # with a hash; the oldest first

    @property
    def available(self) -> int:
        """Pages that `allocate` can return."""
        return len(self._free) + len(self._unused)

    @property
    def in_use(self) -> int:
        """Pages that requests use."""
        return self.num_pages - self.available

    @property
    def cached(self) -> int:
        """Pages of the prefix cache that no request uses."""
        return len(self._unused)

    def find(self, digests: Sequence[Digest]) -> list[int]:
        """The pages of the longest known prefix of a text whose pages have these hashes."""
        pages = []
        for digest in digests:
            if digest not in self._page:
                break
            pages.append(self._page[digest])
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """Adds a user to pages that `find` returned."""
        for page in pages:
            self._users[page] += 1
            self._unused.pop(page, None)

    def allocate(self, number: int) -> list[int]:
        """Returns pages with one user each; at most `available`."""
        assert number <= self.available, "the caller checks what is available"
        pages = []
        for _ in range(number):
            if not self._free:
                page, _ = self._unused.popitem(last=False)
                del self._page[self._digest.pop(page)]
                self.evictions += 1
                self._free.append(page)
            page = self._free.pop()
            self._users[page] = 1
            pages.append(page)
        return pages

    def publish(self, page: int, digest: Digest) -> None:
        """Makes a page that is in use known under a hash, unless another page has that hash already."""
        if digest not in self._page and page not in self._digest:
            self._page[digest], self._digest[page] = page, digest

    def release(self, pages: Sequence[int]) -> None:
        """Removes a user of pages; the last page of a text is given away first."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page]:
                continue
            if page in self._digest:
                self._unused[page] = None
            else:
                self._free.append(page)
