"""A checksum changes with any element of an array, and depends on nothing except the elements."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.checkpoint import checksums as module
from gptjax.checkpoint.checksums import checksums


def checksum(array) -> int:
    return checksums({"a": array})["a"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint32", "int8", "bool"])
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4)])
def test_every_changed_bit_is_noticed(dtype, shape):
    array = np.asarray(jnp.arange(np.prod(shape, dtype=int)).reshape(shape) % 2, dtype=jnp.dtype(dtype))
    whole = checksum(array)
    bits = np.unpackbits(np.frombuffer(array.tobytes(), np.uint8))
    for i in range(len(bits)):
        flipped = bits.copy()
        flipped[i] ^= 1
        if dtype == "bool" and i % 8 != 7:
            continue  # not a bool any more
        damaged = np.frombuffer(np.packbits(flipped).tobytes(), array.dtype).reshape(shape)
        assert checksum(damaged) != whole


def test_lost_and_exchanged_parts_are_noticed():
    ones = np.ones((4, 8, 512), np.float32)  # a product with odd numbers, summed, would miss lost rows of ones
    sums = {checksum(ones)}
    for first, last in ((0, 1), (1, 2), (2, 4)):
        lost = ones.copy()
        lost[first:last] = 0
        sums.add(checksum(lost))
    assert len(sums) == 4
    rising = np.arange(32, dtype=np.float32).reshape(4, 8)
    assert checksum(rising) != checksum(rising[::-1])


def test_the_shape_and_the_library_do_not_count():
    array = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    assert checksum(array) == checksum(jnp.asarray(array)) == checksum(array.reshape(6, 4)) == checksum(array.ravel())


@pytest.mark.parametrize(
    ("dtype", "shape"), [("uint8", (7,)), ("uint16", ()), ("uint16", (5, 9)), ("uint32", (3, 40, 5)), ("uint8", (0, 2))]
)
def test_small_arrays_have_the_checksum_of_the_compiled_program(dtype, shape):
    bits = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)
    assert checksum(bits) == int(module._sum_of_few(bits)) == int(module._sum(bits))


def test_leaves_are_named_by_their_paths():
    assert list(checksums({"params": {"b": np.zeros(2, np.float32), "a": [np.ones(1, np.int32)]}})) == [
        "params/a/0",
        "params/b",
    ]


def test_arrays_in_host_memory_have_the_same_checksum():
    array = jnp.arange(24, dtype=jnp.float32).reshape(2, 3, 4)
    in_host = jax.device_put(array, array.sharding.with_memory_kind("pinned_host"))
    assert in_host.sharding.memory_kind == "pinned_host"
    assert checksums({"a": in_host, "b": array, "c": in_host[0]}) == checksums({"a": array, "b": array, "c": array[0]})
