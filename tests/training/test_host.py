"""What a run says about its machine."""

from __future__ import annotations

from llamahome.training.host import pages_and_nodes


def test_pages_and_nodes_are_read_from_the_kernel(tmp_path):
    assert pages_and_nodes(tmp_path) == {"huge_pages": None, "numa_nodes": None}
    pages = tmp_path / "kernel/mm/transparent_hugepage"
    pages.mkdir(parents=True)
    (pages / "enabled").write_text("always [madvise] never\n")
    for name in ("node0", "node1", "possible"):
        (tmp_path / "devices/system/node" / name).mkdir(parents=True)
    assert pages_and_nodes(tmp_path) == {"huge_pages": "madvise", "numa_nodes": 2}
