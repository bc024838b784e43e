"""A launch: the arguments of a kernel become parameters and memory, and its blocks run one after another."""

import itertools
import struct

from .faults import NotEmulated
from .hopper import Box
from .memory import GlobalMemory
from .parse import Program
from .schedule import Block

PACKING = {
    "i1": "<?", "i8": "<b", "i16": "<h", "i32": "<i", "i64": "<q", "u1": "<?", "u8": "<B", "u16": "<H", "u32": "<I",
    "u64": "<Q", "fp32": "<f", "f32": "<f", "fp64": "<d",
}  # fmt: skip


def launch(program: Program, grid, arguments: dict, signature: dict[str, str], metadata, order: str | int) -> None:
    """Run every block of the grid.

    arguments  by name: tensors, numbers, and tensor descriptors
    signature  the type of each that the kernel kept, as Triton writes it: "*bf16", "i32", "tensordesc<...>"
    metadata   Triton's, of the compiled kernel
    """
    if metadata.global_scratch_size or metadata.num_ctas > 1:
        raise NotEmulated("a kernel with scratch memory or with clusters")
    maps = iter(getattr(metadata, "tensordesc_meta", None) or ())
    tensors, values, boxes = {}, [], {}
    for name, type_ in signature.items():
        argument = arguments[name]
        if type_ == "constexpr":
            continue
        if type_.startswith("tensordesc"):
            map_ = next(maps)
            tensors[name] = argument.base
            boxes[len(values)] = _box(argument, map_ if isinstance(map_, dict) else vars(map_))
            values.append(bytes(128))
            values += [struct.pack("<i", n) for n in argument.shape]
            values += [struct.pack("<q", stride) for stride in argument.strides]
        elif type_.startswith("*"):
            tensors[name] = argument
            values.append(struct.pack("<Q", argument.data_ptr()))
        else:
            values.append(struct.pack(PACKING[type_], argument))
    missing = len(program.parameters) - len(values)  # Triton's own, for scratch memory
    if not 0 <= missing <= 2:
        raise NotEmulated(f"{program.name} takes {len(program.parameters)} parameters, and {len(values)} were given")
    values += [bytes(8)] * missing
    parameters = dict(zip(program.parameters, values, strict=True))
    memory = GlobalMemory(tensors)
    for z, y, x in itertools.product(*(range(n) for n in reversed(grid))):
        Block(program, memory, parameters, boxes, max(metadata.shared, 16), (x, y, z), grid).run(order)


def _box(descriptor, map_: dict) -> Box:
    if len(descriptor.shape) != 2 or descriptor.padding != "zero" or descriptor.strides[-1] != 1:
        raise NotEmulated("a tensor map of another form than a matrix with zeros around it")
    matrix = descriptor.base.as_strided(descriptor.shape, descriptor.strides)
    rows, columns = map_["block_size"]
    return Box(matrix, rows, columns, map_["swizzle"])
