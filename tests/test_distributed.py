"""换一个执行后端：在真实的两 worker dask 集群上，结果与本机相同，worker 被杀后任务重试成功。"""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from zhixing.engine import Engine
from zhixing.execute import connect
from zhixing.project import Project

distributed = pytest.importorskip("distributed", reason="可选依赖 distributed 没有安装")

PAGES = {
    "docs/a.md": "```python\nx = 2\nassert x == 2\nprint(x)\n```\n\n```text title=\"输出\"\n2\n```\n",
    "docs/b.md": "```bash\nexit 3\n```\n",
    "docs/c.md": "```python\nimport os\nos._exit(9)\n```\n",
    "docs/d.md": "```python timeout=\"1\"\nwhile True: pass\n```\n",
    "docs/slow.md": "```python\nimport time\ntime.sleep(3)\n```\n",
}


@pytest.fixture(scope="module")
def cluster():
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", silence_logs=50
    ) as running:
        yield running


@pytest.fixture
def root(tmp_path):
    (tmp_path / "mkdocs.yml").write_text("site_name: x\n")
    (tmp_path / "examples").mkdir()
    for name, text in PAGES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, "utf-8")
    return tmp_path


def check(root, executor=None):
    project = Project.load(root)
    engine = Engine(root, workers=2, cache=False, executor=executor)
    try:
        project.execute(engine)
    finally:
        engine.close()
    return {(p.file, p.line, p.code) for p in project.problems}


@pytest.mark.slow
def test_cluster_agrees_with_local(cluster, root):
    local = check(root)
    assert local == {("docs/b.md", 2, "R301"), ("docs/c.md", 2, "R305"), ("docs/d.md", 2, "R304")}
    assert check(root, connect(cluster.scheduler_address)) == local


@pytest.mark.slow
def test_products_travel_between_workers(cluster, root):
    """上游的产物在提交端与 worker 共用的目录里，下游在哪个 worker 上都读得到。"""
    for name in PAGES:
        (root / name).unlink()
    head = "# ---\n# zhixing:\n#   id: {0}\n#   title: {0}\n#   needs: [{1}]\n#   threads: 2\n# ---\n\n# %%\nimport zhixing\n"
    code = 'zhixing.output_path("w").write_text(str(zhixing.scratch_path().is_dir()))\n'
    (root / "examples/base.py").write_text(head.format("base", "") + code)
    for name in "ab":
        code = 'assert zhixing.input_path("base/w").read_text() == "True"\n'
        (root / f"examples/{name}.py").write_text(head.format(name, "base") + code)
    assert check(root, connect(cluster.scheduler_address)) == set()
    (root / "examples/base.py").write_text(head.format("base", "") + "1 / 0\n")
    assert check(root, connect(cluster.scheduler_address)) == {
        ("examples/base.py", 11, "R301"), ("examples/a.py", 5, "E603"), ("examples/b.py", 5, "E603")}  # fmt: skip


@pytest.mark.slow
def test_killed_worker_is_retried(cluster, root):
    for name in PAGES:
        if name != "docs/slow.md":
            (root / name).unlink()

    def kill_busy_worker() -> None:
        with distributed.Client(cluster.scheduler_address) as client:
            for _ in range(100):
                busy = [address for address, tasks in client.processing().items() if tasks]
                if busy:
                    (pid,) = client.run(os.getpid, workers=busy[:1]).values()
                    os.kill(pid, signal.SIGKILL)
                    return
                time.sleep(0.05)

    killer = threading.Thread(target=kill_busy_worker)
    killer.start()
    assert check(root, connect(cluster.scheduler_address)) == set()
    killer.join()
