"""Runs a few lines of PTX, written by hand, on tensors."""

import re
from types import SimpleNamespace

import torch

from emulator.launch import launch
from emulator.parse import parse

MODULE = """
.visible .entry by_hand(
{parameters}
)
.reqntid {threads}
{{
.reg .pred %p<16>;
.reg .b16 %h<16>;
.reg .b32 %t, %r<200>;
.reg .b64 {bases}, %d<64>;
mov.u32 %t, %tid.x;
{loads}
{body}
ret;
}}
"""
OWN_ROW = """ld.param.b64 %{name}, [{parameter}];
mad.wide.u32 %{name}, %t, {pitch}, %{name};"""
TENSOR_MAP = "mov.b64 %{name}, {parameter};"


def run(body: str, *, threads: int = 32, shared: int = 0, order="lockstep", boxes=None, **tensors) -> None:
    """Run `body` in one block.

    Register %t holds the thread's number, and %NAME the address of the thread's own row of the tensor NAME. With
    boxes = {NAME: (rows, columns, swizzle)}, %NAME holds the address of a tensor map for that tensor instead.
    """
    boxes = boxes or {}
    parameters, loads, arguments, signature = [], [], {}, {}
    for name, tensor in tensors.items():
        parameter = f"by_hand_param_{len(parameters)}"
        parameters.append(f".param .u64 {parameter}")
        if name in boxes:
            parameters += [f".param .u64 by_hand_param_{len(parameters) + k}" for k in range(4)]
            loads.append(TENSOR_MAP.format(name=name, parameter=parameter))
            shape = {"shape": tensor.shape, "strides": tensor.stride(), "padding": "zero"}
            arguments[name], signature[name] = SimpleNamespace(base=tensor, **shape), "tensordesc"
        else:
            pitch = tensor.stride(0) * tensor.element_size()
            loads.append(OWN_ROW.format(name=name, parameter=parameter, pitch=pitch))
            arguments[name], signature[name] = tensor, "*"
    text = MODULE.format(
        parameters=",\n".join(parameters), threads=threads, bases=", ".join(f"%{n}" for n in tensors) or "%none",
        loads="\n".join(loads), body=body,
    )  # fmt: skip
    maps = [dict(zip(("block_size", "swizzle"), (box[:2], box[2]), strict=True)) for box in boxes.values()]
    metadata = SimpleNamespace(shared=shared, global_scratch_size=0, num_ctas=1, tensordesc_meta=maps)
    launch(parse(text), (1, 1, 1), arguments, signature, metadata, order)


def evaluate(instruction: str, *inputs, out: torch.dtype) -> torch.Tensor:
    """Return the result of one instruction on columns of inputs, one lane for each row.

    In the instruction, $0 is the result, and $1, $2, ... are the inputs, tensors of one length.
    """
    n = len(inputs[0])
    body, columns = [], {}
    registers = {2: "%h", 4: "%r", 8: "%d"}
    for k, x in enumerate(inputs, 1):
        size = x.element_size()
        columns[f"x{k}"] = torch.zeros(32, 1, dtype=x.dtype)
        columns[f"x{k}"][:n, 0] = x
        body.append(f"ld.global.b{8 * size} {registers[size]}{k}, [%x{k}];")
        instruction = instruction.replace(f"${k}", f"{registers[size]}{k}")
    result = torch.zeros(32, 1, dtype=out)
    size = result.element_size()
    instruction = re.sub(r"\$0\b", f"{registers[size]}0", instruction)
    run("\n".join([*body, instruction, f"st.global.b{8 * size} [%out], {registers[size]}0;"]), **columns, out=result)
    return result[:n, 0]
