"""随机故障注入（benchmarks/chaos.py）在测试里跑少量轮次；完整的 100 轮用脚本跑。"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import chaos  # noqa: E402

pytestmark = pytest.mark.slow


def test_rebuild_after_random_faults_equals_a_clean_build(tmp_path) -> None:
    counts = chaos.run(6, seed=1, work=tmp_path, say=print)
    assert sum(counts.values()) >= 6


def test_a_lying_cache_is_caught(tmp_path, monkeypatch) -> None:
    """比对本身要能红：结果里混进一个旧的输出，就算摘要也改对了，也要发现。"""
    import json

    from zhixing.cache import _digest

    def lie(root, rng, usual) -> str:
        code, text = chaos.finish(chaos.start(root))
        assert code == 0, text
        path = root / ".cache/zhixing/results/docs__p1.md.json"
        entry = json.loads(path.read_text("utf-8"))
        entry["payload"]["blocks"][0]["out"] = "旧的\n"
        entry["digest"] = _digest([entry["deps"], entry["packages"], entry["payload"]])
        path.write_text(json.dumps(entry), "utf-8")
        return "说谎"

    monkeypatch.setattr(chaos, "FAULTS", (lie,))
    with pytest.raises(AssertionError, match="docs__p1.md.json"):
        chaos.run(1, seed=0, work=tmp_path)
