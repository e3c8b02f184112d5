"""Small disks for the tests of what happens when they are full."""

import subprocess

import pytest


@pytest.fixture
def mount(tmp_path):
    """Returns a function: makes a disk of a size such as `600k`, or changes it by mount options; skipped where tests
    may not mount."""
    disk = tmp_path / "disk"

    def run(options: str):
        mounted = disk.is_dir()
        disk.mkdir(exist_ok=True)
        options = f"remount,{options}" if mounted else options
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], capture_output=True).returncode:
            pytest.skip("mounting a file system needs root")
        return disk

    yield run
    if disk.is_dir():
        subprocess.run(["umount", disk], check=False)
