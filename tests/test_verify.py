"""判断：期望输出怎样算相符（性质），声明与事实不符时各报什么。"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from zhixing.blocks import Block, Expected
from zhixing.runner import outputs_match, parse_console
from zhixing.verify import verify

LINES = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"), max_size=20), max_size=6)
TEXT = LINES.map("\n".join)
NUMBER = st.floats(allow_nan=False, allow_infinity=False, width=32)


@given(TEXT, st.one_of(st.none(), st.floats(1e-9, 0.5)))
def test_output_matches_itself(text, tol) -> None:
    assert outputs_match(text, text, tol)


@given(LINES, st.lists(st.sampled_from(["", " ", "\t "]), min_size=6, max_size=6))
def test_trailing_blanks_and_outer_empty_lines_do_not_matter(lines, tails) -> None:
    padded = "\n".join(line + tail for line, tail in zip(lines, tails))
    assert outputs_match("\n".join(lines), f"\n\n{padded}\n\n")
    assert outputs_match(f"\n{padded}\n", "\n".join(lines))


@given(TEXT, TEXT)
def test_exact_mode_is_equality_up_to_blanks(a, b) -> None:
    assume("..." not in a and "..." not in b)

    def normal(text: str) -> str:
        return "\n".join(line.expandtabs(4).rstrip() for line in text.strip("\n").split("\n")).strip("\n")

    assert outputs_match(a, b) == (normal(a) == normal(b)) == outputs_match(b, a)


@given(TEXT, TEXT, TEXT)
def test_ellipsis_matches_anything_between(head, middle, tail) -> None:
    assume(not any("..." in text or "\t" in text for text in (head, tail)))
    assume(head == head.strip() and tail == tail.strip() and head and tail)
    expected = f"{head}<...>{tail}"
    assert outputs_match(expected, f"{head}<{middle}>{tail}")
    assert not outputs_match(expected, f"{head}({middle}){tail}")


def test_ellipsis_is_not_a_prefix_match() -> None:
    assert outputs_match("...", "") and outputs_match("...", "任意\n行")
    assert outputs_match("a\n...", "a\nb\nc") and outputs_match("...\nc", "a\nb\nc")
    assert not outputs_match("a...", "ba") and not outputs_match("...a", "ab")
    assert not outputs_match("a...b", "a")
    assert not outputs_match("a...b...c", "acb")


@given(NUMBER, st.floats(1e-6, 0.3), st.floats(-0.9, 0.9))
def test_within_tolerance(value, tol, part) -> None:
    near = value + part * tol * max(1.0, abs(value))
    assume(math.isfinite(near))
    assert outputs_match(f"loss {value!r}, n", f"loss {near!r}, n", tol)


@given(NUMBER, st.floats(1e-6, 0.3), st.floats(1.1, 5), st.sampled_from([-1, 1]))
def test_outside_tolerance(value, tol, factor, sign) -> None:
    far = value + sign * factor * tol * max(1.0, abs(value))
    assume(math.isfinite(far) and abs(far - value) > 1.05 * tol * max(1.0, abs(value)))
    assert not outputs_match(f"loss {value!r}", f"loss {far!r}", tol)


@given(st.lists(NUMBER, min_size=1, max_size=5))
def test_tolerance_needs_the_same_count_of_numbers(values) -> None:
    text = "[" + ", ".join(map(repr, values)) + "]"
    assert outputs_match(text, text, 1e-3)
    assert not outputs_match(text, text.replace("]", ", 0.0]"), 1e-3)


@pytest.mark.parametrize(
    ("expected", "got", "tol", "same"),
    [
        ("x=0.5", "x=0.5004", 1e-3, True),
        ("x=0.5", "x=0.502", 1e-3, False),
        ("1000", "1000.9", 1e-3, True),
        ("1000", "1002", 1e-3, False),
        ("-0.5", "0.5", 0.1, False),
        ("1e-8", "2e-8", 1e-3, True),
        ("1.", "1.0005", 1e-3, True),
        ("第 1 层：0.25", "第 1 层：0.2501", 1e-3, True),
        ("第 1 层：0.25", "第 2 层：0.25", 1e-3, False),
        ("tensor([0.1, 0.2])", "tensor([0.1001, 0.1999])", 1e-3, True),
        ("a 0.5\n... 尾 2.0", "a 0.5001\n随便 9.9 尾 2.0001", 1e-3, True),
        ("nan", "nan", 1e-3, True),
        ("nan", "1.0", 1e-3, False),
        ("inf", "-inf", 1e-3, False),
        ("2024-01-02", "2024-01-02", 1e-9, True),
        ("a\tb", "a   b", None, True),
        ("a\x00b 1", "a\x00b 1.0001", 1e-3, True),
        ("1.5", "1.5", 1e-3, True),
        ("", "", None, True),
        ("", "a", None, False),
    ],
)
def test_examples(expected, got, tol, same) -> None:
    assert outputs_match(expected, got, tol) == same


@given(TEXT, TEXT, st.one_of(st.none(), st.floats(1e-9, 0.5)))
def test_never_raises(a, b, tol) -> None:
    outputs_match(a, b, tol)


def test_many_ellipses_do_not_explode() -> None:
    assert not outputs_match("a...a...a...a...a...a...b", "a" * 200)
    assert not outputs_match("1...1...1...1...1...1...x", "1 " * 60, 1e-3)


# ── 声明与事实 ────────────────────────────────────────────────────────

BLOCK = Block("docs/a.md", 10, 14, "python", "x")
OK = {"out": "", "error": None, "seconds": 0.1, "figs": []}


def failed(code: str = "R301", kind: str = "ValueError", message: str = "秩", **more) -> dict:
    error = {"code": code, "type": kind, "message": message, "file": "docs/a.md", "line": 12, "detail": "回溯"}
    return OK | {"error": error | {"mro": [kind, "Exception"], "text": message} | more}


def test_error_points_to_where_it_happened() -> None:
    (problem,) = verify(BLOCK, failed())
    assert (problem.line, problem.code, problem.reason, problem.detail) == (12, "R301", "ValueError: 秩", "回溯")


@pytest.mark.parametrize("code", ["R302", "R304", "R305", "R308"])
def test_raises_only_excuses_exceptions(code) -> None:
    (problem,) = verify(replace(BLOCK, raises="ValueError"), failed(code))
    assert problem.code == code


@pytest.mark.parametrize(
    ("raises", "error", "passes"),
    [
        ("ValueError", failed(), True),
        ("Exception", failed(), True),
        ("ValueError: 秩", failed(message="秩必须为正"), True),
        ("ValueError: 正", failed(message="首行", text="首行\n秩必须为正"), True),
        ("mod.ValueError", failed(kind="mod.ValueError"), True),
        ("ValueError", failed(kind="mod.ValueError"), True),
        ("MemoryError", failed("R306", "MemoryError", ""), True),
        ("exit 3", failed(kind="exit 3", message="退出码 3"), True),
        ("exit 3", failed(kind="exit 4"), False),
        ("TypeError", failed(), False),
        ("Value", failed(), False),
        ("ValueError: 维", failed(), False),
        ("ValueError", OK, False),
    ],
)
def test_raises(raises, error, passes) -> None:
    problems = verify(replace(BLOCK, raises=raises), error)
    assert [(p.line, p.code) for p in problems] == ([] if passes else [(10, "R303")])


def test_first_differing_line_is_reported() -> None:
    expected = Expected("a\nb\nc", 20, 24, "")
    block = replace(BLOCK, expected=expected)
    assert verify(block, OK | {"out": "a\nb\nc\n"}) == []
    for out, line in (("x\nb\nc", 21), ("a\nx\nc", 22), ("a\nb", 23), ("a\nb\nc\nd", 23), ("", 21)):
        (problem,) = verify(block, OK | {"out": out})
        assert (problem.code, problem.line) == ("R302", line)
        assert "--- 期望" in problem.detail
    block = replace(BLOCK, expected=Expected("loss 0.5\n<... at 0x1>\nacc 1", 20, 24, "", 1e-2))
    (problem,) = verify(block, OK | {"out": "loss 0.501\n<f at 0x1>\nacc 2"})
    assert problem.line == 23


def test_long_difference_is_clipped() -> None:
    block = replace(BLOCK, expected=Expected("a", 20, 22, ""))
    (problem,) = verify(block, OK | {"out": "\n".join(map(str, range(1000)))})
    assert len(problem.detail.splitlines()) < 50 and "省略" in problem.detail


@pytest.mark.parametrize(
    ("fig", "figs", "declared", "passes"),
    [("", [], True, True), ("看", ["<svg/>"], True, True), ("看", [], True, False), ("", ["<svg/>"], True, False), ("", ["<svg/>"], False, True)],
)
def test_figures(fig, figs, declared, passes) -> None:
    problems = verify(replace(BLOCK, fig=fig), OK | {"figs": figs}, figures_declared=declared)
    assert [(p.line, p.code) for p in problems] == ([] if passes else [(10, "R307")])


def test_parse_console() -> None:
    text = "说明\n$ a \\\n> b\nout\n> 不是续行\n$ c\n\n$ d"
    assert parse_console(text) == [(1, "a \\\nb", "out\n> 不是续行"), (5, "c", ""), (7, "d", "")]
    assert parse_console("只有输出") == []
