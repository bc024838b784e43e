"""Measures this machine: implementations against float64 and beside torch.mm, for `endoreward tune` and `doctor`.

`candidates` lists what could run, `measure` checks and times one of them in a process of its own (`child`), `search`
chooses. The choice is stored and looked up by vocab/tuned.py.
"""
