"""A process that restarts itself with another heap setting of the C library: the same process and arguments, once."""

import os
import subprocess
import sys

import pytest

from tutti.core.heap import _ACCELERATORS, _is_glibc

SCRIPT = """
import os, sys
from tutti.core.heap import restart_without_cache

restart_without_cache()
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), *sys.argv[1:])
"""

pytestmark = pytest.mark.skipif(
    not _is_glibc() or any(os.path.exists(f"/dev/{name}") for name in _ACCELERATORS), reason="there is nothing to set"
)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, "glibc.malloc.tcache_count=0"),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}, "glibc.malloc.hugetlb=1:glibc.malloc.tcache_count=0"),
        ({"GLIBC_TUNABLES": "glibc.malloc.tcache_count=3"}, "glibc.malloc.tcache_count=3"),
    ],
    ids=["unset", "beside another", "set by the user"],
)
def test_the_process_starts_anew_once_unless_the_user_has_set_the_cache(tmp_path, before, after):
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"} | before
    command = [sys.executable, str(tmp_path / "script.py"), "train", "train.lr=1e-3"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.communicate()[0] == f"{process.pid} {after} train train.lr=1e-3\n"


def test_a_process_with_other_words_than_its_own_goes_on(tmp_path):
    (tmp_path / "script.py").write_text("import sys\nsys.argv = ['tutti', 'train', 'a.yaml']\n" + SCRIPT)
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py")], env=environment, capture_output=True, text=True
    )
    assert done.stdout.split()[1:] == ["None", "train", "a.yaml"], done.stderr
