"""页脚的来历：最近更新与贡献者。"""

import os
import subprocess

from zhixing import history


def commit(root, author: str, date: str, *files: str) -> None:
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{author} {date}\n")
    identity = {f"GIT_{who}_{what}": value for who in ("AUTHOR", "COMMITTER") for what, value in (("NAME", author), ("EMAIL", "a@b"))}
    env = os.environ | identity | {"GIT_COMMITTER_DATE": f"{date}T12:00:00Z", "GIT_AUTHOR_DATE": f"{date}T12:00:00Z"}
    subprocess.run(["git", "add", "-A"], cwd=root, check=True)
    subprocess.run(["git", "commit", "-qm", "x"], cwd=root, check=True, env=env)


def test_reads_dates_and_authors_of_every_file(tmp_path) -> None:
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    commit(tmp_path, "甲", "2026-01-01", "docs/a/一.md", "examples/x.py", "other.txt")
    commit(tmp_path, "乙", "2026-02-01", "docs/a/一.md")
    commit(tmp_path, "甲", "2026-03-01", "docs/a/一.md")
    found = history.read(tmp_path)
    assert set(found) == {"docs/a/一.md", "examples/x.py"}
    assert found["docs/a/一.md"] == history.History("2026-03-01", ["甲", "乙"])
    assert found["examples/x.py"] == history.History("2026-01-01", ["甲"])
    commit_now = history.describe(tmp_path)
    assert commit_now and history.git(tmp_path, "rev-parse", "HEAD").startswith(commit_now)
    subprocess.run(["git", "tag", "v1"], cwd=tmp_path, check=True)
    assert (history.describe(tmp_path), history.describe(tmp_path, tags=True)) == (commit_now, "v1")
    (tmp_path / "other.txt").write_text("改")
    assert history.describe(tmp_path) == f"{commit_now}（有未提交的改动）"


def test_outside_git_there_is_no_history(tmp_path) -> None:
    assert history.read(tmp_path) == {} and history.describe(tmp_path) == ""
