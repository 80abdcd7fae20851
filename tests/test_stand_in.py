"""Runs on_stand_in.py, the tests of the GPU path on a device that stands for a GPU, in a process of its own."""

import subprocess
import sys

import pytest
from torch.utils import backend_registration

from parts.files import ROOT

HAS_DEVICES_IN_PYTHON = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")


@pytest.mark.skipif(not HAS_DEVICES_IN_PYTHON, reason="this torch knows no devices written in Python")
def test_the_gpu_path_on_a_device_that_stands_for_a_gpu():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/on_stand_in.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
