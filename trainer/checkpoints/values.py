"""The values that a checkpoint holds: ranged reads, each piece checked against its CRC-32."""

import math
import zlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from freeguide.configs.errors import CheckpointError
from freeguide.data_pipeline.store.base import MissingObject, Store
from freeguide.trainer.checkpoints.manifest import RESTORE, Checkpoint, Piece
from freeguide.trainer.checkpoints.search import KEPT

EMA = "ema"
_READ = 32 * 2**20  # bytes of one ranged read at most, unless one piece is larger


def load(store: Store, checkpoint: Checkpoint, kind: str = EMA) -> dict[str, Tensor]:
    """One kind of values by parameter name, fp32 on the CPU: an average, the weights ("master") or a moment. No process group."""
    pieces = [piece for piece in checkpoint.pieces if piece.kind == kind]
    held = dict.fromkeys(checkpoint.shapes, 0)
    for piece in pieces:
        held[piece.name] += piece.numel
    for name, count in held.items():
        if count != math.prod(checkpoint.shapes[name]):  # before anything is allocated
            raise CheckpointError(
                f"{store.uri}/{checkpoint.key}: holds {count} of {math.prod(checkpoint.shapes[name])} {kind} values of {name}; "
                f"{RESTORE}"
            )
    flat = {name: torch.zeros(math.prod(shape)) for name, shape in checkpoint.shapes.items()}
    try:
        for piece, values in read_pieces(store, pieces):
            flat[piece.name][piece.offset : piece.offset + piece.numel] = values
    except MissingObject as error:
        raise CheckpointError(f"{store.uri}/{checkpoint.key}: deleted while it was read; {KEPT}") from error
    return {name: values.view(checkpoint.shapes[name]) for name, values in flat.items()}


def read_pieces(store: Store, pieces: Iterable[Piece]) -> Iterator[tuple[Piece, Tensor]]:
    """The values of every piece, neighbours fetched together, each checked against its CRC-32."""
    run: list[Piece] = []
    for piece in [*sorted(pieces, key=lambda p: (p.file, p.begin)), None]:
        joins = piece is not None and run and piece.file == run[-1].file and piece.begin == run[-1].begin + 4 * run[-1].numel
        if piece is not None and joins and piece.begin + 4 * piece.numel - run[0].begin <= _READ:
            run.append(piece)
            continue
        if run:
            start, end = run[0].begin, run[-1].begin + 4 * run[-1].numel
            data = bytearray(store.get_range(run[0].file, start, end - start))
            for part in run:
                at = part.begin - start
                if zlib.crc32(memoryview(data)[at : at + 4 * part.numel]) != part.crc32:
                    raise CheckpointError(
                        f"{store.uri}/{part.file}: {part.kind} values of {part.name} at byte {part.begin} are damaged; {RESTORE}"
                    )
                yield part, torch.frombuffer(data, dtype=torch.float32, count=part.numel, offset=at)
        run = [piece] if piece is not None else []
