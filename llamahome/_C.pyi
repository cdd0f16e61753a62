"""Token store, sample order, packing and a CPU's attention in C++."""

from collections.abc import Sequence
from typing import Annotated, overload

import numpy
import numpy.typing
from numpy.typing import NDArray


class BatchReader:
    """Reads batches from the shards of a token store; thread-safe."""

    def __init__(self, paths: Sequence[object], mapped: bool = True) -> None: ...

    @property
    def num_documents(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def num_trained(self) -> int: ...

    def shards(self) -> list[tuple[int, int, int, int, int, int, int]]:
        """
        Per shard: documents, tokens, trained tokens, token width, largest id, bytes, checksum of the header.
        """

    def lengths(self, ids: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], out: Annotated[NDArray[numpy.uint32], dict(shape=(None,), order='C', device='cpu')]) -> None: ...

    def trained_counts(self, ids: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], out: Annotated[NDArray[numpy.uint32], dict(shape=(None,), order='C', device='cpu')]) -> None: ...

    def sources(self, ids: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], out: Annotated[NDArray[numpy.uint64], dict(shape=(None,), order='C', device='cpu')]) -> None: ...

    def pack(self, ids: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], input_ids: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu')], labels: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu')], position_ids: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu')], cu_seqlens: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu')]) -> int:
        """Lays documents end to end; returns the number of trained tokens."""

    def rows(self, rows: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], input_ids: Annotated[NDArray[numpy.int64], dict(shape=(None, None), order='C', device='cpu')], labels: Annotated[NDArray[numpy.int64], dict(shape=(None, None), order='C', device='cpu')]) -> int:
        """
        Fixed-width rows of the stream of all tokens; returns the number of trained tokens.
        """

    def prefetch(self, ids: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> None: ...

    def prefetch_rows(self, rows: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], width: int) -> None: ...

    def verify(self, shard: int) -> None:
        """Checks every byte of one shard."""

class TokenFileWriter:
    """Writes one shard of a token store."""

    def __init__(self, path: object, token_width: int) -> None: ...

    def append(self, ids: Annotated[NDArray[numpy.uint32], dict(shape=(None,), order='C', device='cpu', writable=False)], trained: Annotated[NDArray[numpy.bool_], dict(shape=(None,), order='C', device='cpu', writable=False)], lengths: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], sources: Annotated[NDArray[numpy.uint64], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> None:
        """Adds documents that lie end to end in `ids` and `trained`."""

    def finish(self) -> int:
        """Makes the file durable; returns the checksum of its header."""

    @property
    def num_documents(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def num_trained(self) -> int: ...

    @property
    def file_size(self) -> int: ...

    @property
    def index_bytes(self) -> int: ...

class SampleOrder:
    """
    The samples of an epoch, [0, size) in an order fixed by (seed, epoch), in O(1) memory.
    """

    def __init__(self, size: int, seed: int, epoch: int, shuffle: bool = True, block: int = 0) -> None: ...

    def fill(self, start: int, out: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu')]) -> None:
        """Writes the samples at positions start, start + 1, ..."""

def plan_packing(lengths: numpy.typing.NDArray[numpy.uint32], budget: int) -> tuple[numpy.typing.NDArray[numpy.int64], numpy.typing.NDArray[numpy.int64]]:
    """
    Best-fit rows of whole documents: (order, bounds); row r is order[bounds[r]:bounds[r + 1]].
    """

@overload
def attention_forward(query: Annotated[NDArray[numpy.uint16], dict(shape=(None, None, None), order='C', device='cpu', writable=False)], key: Annotated[NDArray[numpy.uint16], dict(shape=(None, None, None), order='C', device='cpu', writable=False)], value: Annotated[NDArray[numpy.uint16], dict(shape=(None, None, None), order='C', device='cpu', writable=False)], cu_seqlens: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], scale: float, threads: int, out: Annotated[NDArray[numpy.uint16], dict(shape=(None, None, None), order='C', device='cpu')], lse: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')]) -> None: ...

@overload
def attention_forward(query: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), order='C', device='cpu', writable=False)], key: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), order='C', device='cpu', writable=False)], value: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), order='C', device='cpu', writable=False)], cu_seqlens: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], scale: float, threads: int, out: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), order='C', device='cpu')], lse: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')]) -> None:
    """
    Causal attention of packed samples; arrays are [tokens, heads, size] in fp32 or of bf16's bits, lse [heads, tokens].
    """

@overload
def attention_backward(grad: Annotated[NDArray[numpy.uint16], dict(shape=(None, None, None), order='C', device='cpu', writable=False)], query: Annotated[NDArray[numpy.uint16], dict(shape=(None, None, None), order='C', device='cpu', writable=False)], key: Annotated[NDArray[numpy.uint16], dict(shape=(None, None, None), order='C', device='cpu', writable=False)], value: Annotated[NDArray[numpy.uint16], dict(shape=(None, None, None), order='C', device='cpu', writable=False)], out: Annotated[NDArray[numpy.uint16], dict(shape=(None, None, None), order='C', device='cpu', writable=False)], lse: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], cu_seqlens: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], scale: float, threads: int, d_query: Annotated[NDArray[numpy.uint16], dict(shape=(None, None, None), order='C', device='cpu')], d_key: Annotated[NDArray[numpy.uint16], dict(shape=(None, None, None), order='C', device='cpu')], d_value: Annotated[NDArray[numpy.uint16], dict(shape=(None, None, None), order='C', device='cpu')]) -> None: ...

@overload
def attention_backward(grad: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), order='C', device='cpu', writable=False)], query: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), order='C', device='cpu', writable=False)], key: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), order='C', device='cpu', writable=False)], value: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), order='C', device='cpu', writable=False)], out: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), order='C', device='cpu', writable=False)], lse: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], cu_seqlens: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], scale: float, threads: int, d_query: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), order='C', device='cpu')], d_key: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), order='C', device='cpu')], d_value: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), order='C', device='cpu')]) -> None:
    """The gradients of query, key and value from that of out."""

def sum_products(products: Sequence[tuple[tuple[int, int, bool], tuple[int, int, bool], int]], start: int | None, out: int, rows: int, columns: int, threads: int) -> None:
    """
    out [rows, columns] = start + the sum of left [rows, size] @ right [size, columns] over (left, right, size), added up in fp32 and rounded once. A matrix of bf16's bits is (address, stride, turned), start and out are addresses of whole rows; whoever calls answers for them.
    """

def cross_entropy(logits: Annotated[NDArray[numpy.uint16], dict(shape=(None, None), order='C', device='cpu')], labels: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], factor: float, gradient: bool, threads: int, losses: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu')]) -> None:
    """
    The loss of each row of logits, of bf16's bits; their gradient by `factor` replaces them if wanted.
    """

def has_avx512() -> bool:
    """
    Whether the processor has what attention in fp32 needs: AVX-512 with BW and VL.
    """

def has_avx512_bf16() -> bool:
    """Whether it has what attention in bf16 needs."""

def is_amd() -> bool:
    """Whether the processor is AMD's."""

def crc32c(data: bytes, portable: bool = False) -> int:
    """CRC-32C of bytes; `portable` avoids the processor's instruction."""
