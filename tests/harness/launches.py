"""What a GPU would be asked to do. A stand-in for the device records the launches; nothing runs.

test_launches.py runs this file, in a process where Triton is no interpreter.
"""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import endoreward_fast as er
from bench.kernel_report.stand_in import on_device, recorded
from endoreward_fast.kernels.config import LINEAR_CONFIGS, vocab_split
from endoreward_fast.vocab import fused, workspace
from endoreward_fast.vocab.rows import RowGrads, RowStats

MIB = 2**20
H100 = 132  # processors


class Peak(TorchDispatchMode):
    """Sums the bytes of the storages that operators make while they live."""

    def __init__(self):
        super().__init__()
        self.alive, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "endoreward_fast":
            with self:
                return torch._library.custom_ops.OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in (*args, *(kwargs or {}).values()) if isinstance(x, torch.Tensor)}
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in given:
                self.alive[StorageWeakRef(x.untyped_storage())] = x.untyped_storage().nbytes()
        self.alive = {ref: size for ref, size in self.alive.items() if not ref.expired()}
        self.most = max(self.most, sum(self.alive.values()))
        return out


def _head(n, dim, vocab, hidden=torch.bfloat16, weight=torch.bfloat16):
    return torch.empty(n, dim, dtype=hidden), torch.empty(vocab, dim, dtype=weight), torch.zeros(n, dtype=torch.long)


@pytest.mark.parametrize("dim", [70, 123, 300])
@pytest.mark.parametrize("masked", [False, True])
def test_bulk_copies_of_a_width_that_is_no_multiple_of_16_bytes(dim, masked):
    hidden, weight, targets = _head(9, dim, 400)
    weight = torch.empty(400, 512, dtype=torch.bfloat16)[:, :dim]  # bulk copies can read this weight
    mask = targets == 0 if masked else None
    with on_device("sm_90"), recorded() as launches:
        er.linear_vocab_stats(hidden, weight, targets, mask=mask, impl="fused")
    assert [x.constant("TMA") for x in launches if x.function == "linear_partials_kernel"] == [True]


@pytest.mark.parametrize("rows", [1, 7, 8, 4097])
def test_no_slice_of_rows_or_columns_compiles_a_kernel_again(rows):
    hidden, weight, targets = _head(rows, 64, 30000)
    with on_device("sm_90"), recorded() as launches:
        er.linear_vocab_stats(hidden, weight, targets, impl="chunked")
    found = {(x.function, str(x.signature), str(x.attributes)) for x in launches if "logits" in x.function}
    assert len(found) <= 2  # the last columns may be no multiple of 16


@pytest.mark.parametrize("hidden", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [8, 55, 1024, 8192])
def test_memory_is_bounded_for_wide_hidden_states(rows, hidden):
    """The workspace's forward and backward at D = 4096: under 256 MiB, beside the results."""
    args = _head(rows, 4096, 9000, hidden=hidden)
    head = {"bias": None, "logit_scale": 1.0, "softcap": None, "alpha": 1.0}
    one = torch.zeros(rows)
    stats = RowStats(one, one, one, one, one, one)
    with on_device("sm_90"), recorded():
        with Peak() as peak:
            workspace.linear_forward(*args, entropy=True, logit_mean=True, **head)
        assert peak.most < 160 * MIB
        with Peak() as peak:
            out = workspace.linear_backward(
                *args, stats, RowGrads(one, one, one, one), needs=(True, True, False), **head
            )
    results = sum(x.nbytes for x in out if x is not None)
    assert peak.most - results < 256 * MIB


def test_memory_of_the_fused_forward():
    args = _head(8192, 4096, 151936)
    head = {"bias": None, "logit_scale": 1.0, "softcap": None, "alpha": 1.0}
    with on_device("sm_90"), recorded(), Peak() as peak:
        fused.linear_forward(*args, entropy=True, logit_mean=True, **head)
    assert peak.most < 32 * MIB


@pytest.mark.parametrize("vocab", [32000, 50257, 128256, 151936, 262144])
@pytest.mark.parametrize("key", [key for key in LINEAR_CONFIGS if key[0] == 9 and key[1] == 2])
def test_one_tile_of_tokens_occupies_most_processors(vocab, key):
    block = LINEAR_CONFIGS[key].block_v
    split = vocab_split(vocab, block, H100)
    assert split % block == 0
    assert -(-vocab // split) >= (H100 if vocab // block >= 2 * H100 else 0.7 * H100) * 0.7


@pytest.mark.parametrize("rows", [1, 2, 100, 5000])
def test_the_split_does_not_depend_on_the_batch(rows):
    with on_device("sm_90"):
        launched = []
        for n in (rows, 77):
            with recorded() as launches:
                er.linear_vocab_stats(*_head(n, 64, 32000), impl="fused")
            launched.append([x for x in launches if x.function == "linear_partials_kernel"])
    first, second = launched
    assert [x.constants for x in first] == [x.constants for x in second]
