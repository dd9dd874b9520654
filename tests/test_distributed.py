"""Ending a process group."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from conftest import ROOT

# With the long switch interval the thread of a collective asks for Python's lock only when the process gives it away.
ENDS = """
import os, sys
sys.path.insert(0, {root!r})
import torch
from torch.nn.parallel import DistributedDataParallel
from systems import distributed
sys.setswitchinterval(60)
with distributed.process_group() as device:
    model = DistributedDataParallel(torch.nn.Linear(2, 2))
    distributed.gather_objects(os.getpid())
    distributed.all_reduce([1.0] * 4000, device)
"""


def test_processes_end_while_ddp_holds_the_group(tmp_path: Path) -> None:
    """Each of the four aborts in about one of three runs where nothing waits for gloo's threads."""
    script = tmp_path / "ends.py"
    script.write_text(ENDS.format(root=str(ROOT)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4"]
    result = subprocess.run([*torchrun, str(script)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
