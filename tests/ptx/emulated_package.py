"""The package, led to believe that CPU tensors are on an emulated device.

Only the questions that fused.py asks about the device are answered here. The public functions with impl="fused", the
launchers and the kernels run as they are.
"""

from dataclasses import replace

from emulator import driver

SMALL = {
    # (major compute capability, bytes per element, whether loads are bulk copies): tiles, so that a few are enough for
    # every part of a kernel to run. Matmuls still run on the tensor cores where the shipped tiles do.
    (8, 2, False): {"block_n": 32, "block_v": 32, "block_d": 32, "num_warps": 2, "num_stages": 3},
    (8, 4, False): {"block_n": 16, "block_v": 32, "block_d": 16, "num_warps": 2, "num_stages": 3},
    (9, 2, False): {"block_n": 64, "block_v": 32, "block_d": 32, "num_warps": 4, "num_stages": 3},
    (9, 2, True): {"block_n": 64, "block_v": 64, "block_d": 64, "num_warps": 4, "num_stages": 3},
    (9, 4, False): {"block_n": 16, "block_v": 32, "block_d": 16, "num_warps": 2, "num_stages": 3},
}
BLOCK_V, NUM_WARPS = 128, 2  # of the logits kernels


class Package:
    def __init__(self, monkeypatch):
        self._monkeypatch = monkeypatch

    def on(self, arch: int, order="lockstep", *, rewrite=None, shipped: bool = False) -> driver.EmulatedDriver:
        """Emulate compute capability `arch` from now on: see EmulatedDriver. `shipped` keeps the package's tiles."""
        from endoreward_fast.kernels import config
        from endoreward_fast.vocab import fused

        patch = self._monkeypatch
        patch.setattr(fused, "interpreted", lambda: True)  # so CPU tensors are welcome
        patch.setattr(fused, "_arch", lambda device: arch // 10)
        for key, tiles in ({} if shipped else SMALL).items():
            patch.setitem(config.LINEAR_CONFIGS, key, replace(config.LINEAR_CONFIGS[key], **tiles))
        logits = config.LogitsConfig() if shipped else config.LogitsConfig(block_v=BLOCK_V, num_warps=NUM_WARPS)
        patch.setattr(fused, "_logits_config", lambda vocab: logits)
        return driver.use(patch, driver.EmulatedDriver(arch, order, rewrite))
