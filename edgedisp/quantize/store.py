"""Tensors of a bundle on disk: read one at a time, written one at a time to `model.onnx.data`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgedisp.core.errors import BuildFailed

GRAPH, DATA = "model.onnx", "model.onnx.data"
INLINE_BYTES = 1024  # smaller tensors stay inside the graph file
PAGE = 4096  # offsets of the others are multiples of it, so that a runtime can map them


def read(bundle: Path, tensor: TensorProto) -> NDArray[Any]:
    """The tensor's values, in memory of their own: the pages of a mapped file would count as resident."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return numpy_helper.to_array(tensor).copy()  # its own array is read-only
    place = {entry.key: entry.value for entry in tensor.external_data}
    path = bundle / place["location"]
    if path.parent.resolve() != bundle.resolve():
        outside = place["location"]
        raise BuildFailed(f"{bundle}: tensor {tensor.name} points outside the bundle, to {outside!r}")
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    count = int(np.prod(tensor.dims))
    values = np.fromfile(path, dtype, count, offset=int(place.get("offset", 0)))
    if len(values) != count:
        raise BuildFailed(f"{path}: ends before tensor {tensor.name} does; the file is truncated")
    return values.reshape(tuple(tensor.dims))


class TensorReader:
    """Reads the tensors of the bundle `source`."""

    def __init__(self, source: Path) -> None:
        self.source = source

    def read(self, tensor: TensorProto) -> NDArray[Any]:
        """The tensor's values in bundle `source`; see `read`."""
        return read(self.source, tensor)


class TensorStore(TensorReader):
    """Moves tensors from bundle `source` to bundle `out`; `tensors` are the initializers written so far."""

    def __init__(self, source: Path, out: Path) -> None:
        super().__init__(source)
        self.out = out
        self.tensors: list[TensorProto] = []
        self.written = 0  # bytes of the data file so far
        self._begin()

    def add(self, name: str, values: NDArray[Any]) -> str:
        """Write `values` under `name`: small ones into the graph, others to the file at a page's start."""
        array = np.ascontiguousarray(values)
        if array.nbytes <= INLINE_BYTES:
            self.tensors.append(numpy_helper.from_array(array, name))
            return name
        offset = self.written + -self.written % PAGE
        self._write(array, offset)
        self.written = offset + array.nbytes
        self.tensors.append(placed(name, array, offset))
        return name

    def _begin(self) -> None:
        (self.out / DATA).write_bytes(b"")  # also where every tensor is small

    def _write(self, array: NDArray[Any], offset: int) -> None:
        with (self.out / DATA).open("ab") as file:
            file.write(bytes(offset - file.tell()))
            array.tofile(file)

    def copy(self, tensor: TensorProto) -> None:
        """Take a tensor over unchanged."""
        self.add(tensor.name, self.read(tensor))


def placed(name: str, array: NDArray[Any], offset: int) -> TensorProto:
    """The entry of a tensor whose values lie at `offset` of the data file."""
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor = TensorProto(name=name, data_type=kind, dims=array.shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", DATA), ("offset", offset), ("length", array.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


class SizesOnly(TensorStore):
    """Lays tensors out as they would lie in the file, and writes none of them."""

    def __init__(self, source: Path) -> None:
        super().__init__(source, source)

    def _begin(self) -> None:
        pass

    def _write(self, array: NDArray[Any], offset: int) -> None:
        pass
