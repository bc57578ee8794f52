"""找代码块：用站点渲染时同一套 superfences 语法静态扫描，行号精确到围栏那一行。

扫描不渲染、不执行，所以可以先于 MkDocs 开始；渲染时收集到的代码块必须与这里一致
（见 :mod:`zhixing.page`），两边各算一遍，谁漏了都会报错。
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import markdown
from pymdownx import superfences

from zhixing import practice
from zhixing.errors import ContentError, Problem

ALIASES = {"py": "python", "python3": "python", "sh": "bash", "shell": "bash", "txt": "text"}
EXECUTABLE = ("python", "bash", "console", "pycon")
DISPLAY_ONLY = frozenset(
    "text mermaid yaml toml json ini html css js diff latex makefile dockerfile sql c cpp".split()
)
HIGHLIGHT_OPTIONS = frozenset({"title", "hl_lines", "linenums"})
RUN_OPTIONS = frozenset({"raises", "skip", "timeout", "memory", "fig", "output", "practice", "solution"})
OUTPUT_TITLE = "输出"

DEFAULT_TIMEOUT = 30.0
DEFAULT_MEMORY = 4 << 30

_FENCE_LIKE = re.compile(r"^(?P<lead>[> \t]*(?P<marker>(?:[-*+]|\d+[.)])[ \t]+)*)(?:`{3,}(?!.*`)|~{3,})")
_INCLUDE = re.compile(r'^\s*-{2,}8<-{2,}\s+"(?P<path>[^":]+)(?::(?P<region>[\w.-]+))?"\s*$')
_COMMENT = re.compile(
    r"(?P<comment>^[> ]*<!--.*?-->|<!--(?:(?!-->|\n[> ]*\n).)*-->)|(?<!`)(?P<tick>`+)(?!`)(?:(?!\n[> ]*\n).)+?(?<!`)(?P=tick)(?!`)",
    re.S | re.M,
)
_MEMORY = re.compile(r"^(\d+(?:\.\d+)?)\s*(MiB|GiB)$")
_FRONT_MATTER = re.compile(r"\A---[ \t]*\n.*?^(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.S | re.M)


@dataclass(frozen=True)
class Expected:
    """紧跟在代码块后面的期望输出。"""

    text: str
    line: int
    end: int
    indent: str
    tol: float | None = None


@dataclass(frozen=True)
class Block:
    """一个可见的围栏代码块。

    Attributes:
        file: 相对项目根目录的路径。
        line: 围栏开头所在行（1 起）；代码从 ``line + 1`` 开始。
        end: 围栏结尾所在行。
        lang: 归一后的语言名。
        source: 去掉缩进、展开引入之后的代码。
        indent: 围栏前的空白与引用符号。
        practice: 练习的 ``starter`` 或 ``tests``（见 :mod:`zhixing.practice`）；空串是普通的块。
        solution: 练习测试的参考解在本页的名字。
        origin: 代码来自别的文件时，``(文件, 首行行号)``。
        bound: 它是前一块的期望输出。
    """

    file: str
    line: int
    end: int
    lang: str
    source: str
    indent: str = ""
    title: str = ""
    raises: str = ""
    skip: str = ""
    timeout: float = DEFAULT_TIMEOUT
    memory: int = DEFAULT_MEMORY
    fig: str = ""
    output: str = ""
    practice: str = ""
    solution: str = ""
    origin: tuple[str, int] | None = None
    expected: Expected | None = None
    bound: bool = False

    @property
    def runs(self) -> bool:
        """会被执行（可执行语言且没有跳过）。"""
        return self.lang in EXECUTABLE and not self.skip

    @property
    def code_start(self) -> tuple[str, int]:
        """代码第一行的 ``(文件, 行号)``：报错与回溯都指到这里。"""
        return self.origin or (self.file, self.line + 1)


@dataclass
class Scan:
    """一个文件的扫描结果；``problems`` 非空时 ``blocks`` 仍尽量完整。"""

    file: str
    text: str
    blocks: list[Block] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


@dataclass(frozen=True)
class _Raw:
    start: int  # 0 起的围栏行下标
    end: int
    lang: str
    options: dict[str, str]
    unrecognized: str
    source: str
    indent: str


class _Recorder(superfences.SuperFencesBlockPreprocessor):
    """superfences 的预处理器，只记录、不替换；任何选项都先收下，由我们自己校验。"""

    found: list[_Raw]
    at = opened = 0  # 正在看的行、最近一个围栏开头的行（0 起）

    def _accept(self, match: re.Match[str]) -> bool:
        self.options = {}
        self.classes = []
        groups = match.groupdict()
        options: dict[str, str] = {}
        lang = groups["lang"] or ""
        if groups["attrs"]:
            for key, value in superfences.get_attrs(groups["attrs"].replace("\t", "    ")):
                if key == ".":
                    self.classes.append(value)
                elif key != "id":
                    options[key] = value
            if not lang and self.classes:
                lang = self.classes.pop(0)
        elif groups["options"]:
            for option in superfences.RE_OPTIONS.finditer(groups["options"]):
                options[option["key"]] = option["key"] if option["value"] is None else option["value"]
        self.lang, self.opened = lang, self.at
        self._header = (lang, options, (groups["unrecognized"] or "").strip())
        return True

    parse_options = handle_attrs = handle_unrecognized = _accept

    def process_nested_block(self, ws: str, content: str, start: int, end: int) -> None:
        lang, options, unrecognized = self._header
        self.found.append(
            _Raw(start, end - 1, lang, options, unrecognized, self.rebuild_block(self.code), self.ws)
        )
        self.clear()

    def scan(self, lines: list[str]) -> tuple[list[_Raw], int | None]:
        """返回 ``(找到的块, 没闭合的围栏的行下标)``。"""

        def numbered() -> Iterator[str]:
            for self.at, line in enumerate(lines):
                yield line

        self.found = []
        self.clear()
        self.stack, self.disabled_indented, self.preserve_tabs = [], False, False
        self.search_nested(numbered())
        return self.found, None if self.fence is None else self.opened


def _recorder() -> _Recorder:
    md = markdown.Markdown(extensions=["pymdownx.highlight", "pymdownx.superfences"])
    original = md.preprocessors["fenced_code_block"]
    recorder = _Recorder(md)
    recorder.config, recorder.extension = original.config, original.extension
    recorder.get_hl_settings()
    return recorder


_RECORDER: _Recorder | None = None


def strip_front_matter(text: str) -> str:
    """把 front matter 换成同样多的空行，行号不变。"""
    end = front_matter_end(text)
    return "\n" * text.count("\n", 0, end) + text[end:]


def front_matter_end(text: str) -> int:
    """正文开始的下标；没有 front matter 时为 0。"""
    match = _FRONT_MATTER.match(text)
    return match.end() if match else 0


def read_text(path: Path, file: str) -> str:
    """读 UTF-8 文本；不是 UTF-8 时抛带行号的 :class:`ContentError`。"""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ContentError(
            [Problem(file, line, "L504", f"第 {error.start} 字节 0x{data[error.start]:02x} 不是合法的 UTF-8")]
        ) from None


def scan(path: Path, root: Path) -> Scan:
    """扫描一个 Markdown 文件。

    Args:
        path: 文件的绝对路径。
        root: 项目根目录；报错与引入都相对于它。

    Raises:
        ContentError: 文件不是 UTF-8。
    """
    file = path.relative_to(root).as_posix()
    return scan_text(read_text(path, file), file, root)


def scan_text(text: str, file: str, root: Path) -> Scan:
    """同 :func:`scan`，但文本已经在手里。"""
    global _RECORDER
    if _RECORDER is None:
        _RECORDER = _recorder()
    result = Scan(file, text)
    lines = strip_front_matter(text).expandtabs(4).split("\n")
    raws, dangling = _RECORDER.scan(lines)
    hidden = _comment_lines(lines, raws)
    for raw in raws:
        if raw.start in hidden:
            reason = "围栏写在 HTML 注释里，读者看不见也不会执行；暂时不要就删掉，要留着就移出注释"
            result.problems.append(Problem(file, raw.start + 1, "B211", reason))
    raws = [r for r in raws if r.start not in hidden]
    _check_strays(lines, raws, dangling, hidden, result)
    for raw in raws:
        result.blocks.append(_block(raw, file, root, result.problems))
    result.blocks = _bind_outputs(lines, raws, result)
    result.problems += practice.check(result.blocks)
    return result


def _comment_lines(lines: list[str], raws: list[_Raw]) -> set[int]:
    """HTML 注释占的行；围栏里面的与行内代码里的 ``<!--`` 不算。

    行首开始的注释可以含空行；段落中间开始的遇到空行就不再是注释（Python-Markdown 的规矩）。
    """
    masked = list(lines)
    for raw in raws:
        for i in range(raw.start, raw.end + 1):
            masked[i] = "x"
    hidden: set[int] = set()
    text = "\n".join(masked)
    for match in _COMMENT.finditer(text):
        if match["comment"]:
            first = text.count("\n", 0, match.start())
            hidden.update(range(first, first + match.group().count("\n") + 1))
    return hidden


def _check_strays(
    lines: list[str], raws: list[_Raw], dangling: int | None, hidden: set[int], result: Scan
) -> None:
    """任何看起来像围栏、却不属于已找到的块的行，都是错误，不能静默漏掉。"""
    inside = {i for raw in raws for i in range(raw.start, raw.end + 1)} | hidden
    after_marker = False
    for i, line in enumerate(lines):
        match = None if i in inside else _FENCE_LIKE.match(line)
        if not match:
            continue
        if after_marker and not line.strip(" \t>`~"):
            after_marker = False  # 列表标记那块的结尾，不重复报
        elif match["marker"]:
            after_marker = True
            result.problems.append(Problem(result.file, i + 1, "B205", "列表标记与围栏在同一行，这一块不会被识别"))
        else:
            result.problems.append(Problem(result.file, i + 1, "B201", "围栏没有对应的结尾（或缩进不一致）"))
        if i == dangling:
            break  # 之后的行都被它吞掉了，再报只是噪声


def _block(raw: _Raw, file: str, root: Path, problems: list[Problem]) -> Block:
    line = raw.start + 1

    def bad(code: str, reason: str) -> None:
        problems.append(Problem(file, line, code, reason))

    lang = ALIASES.get(raw.lang, raw.lang)
    if not lang:
        bad("B203", "代码块没写语言")
    elif lang not in EXECUTABLE and lang not in DISPLAY_ONLY:
        bad("B203", f"未知语言 {lang!r}")
    if raw.unrecognized:
        bad("B202", f"无法识别的写法 {raw.unrecognized!r}")

    allowed = set(HIGHLIGHT_OPTIONS)
    if lang in EXECUTABLE:
        allowed |= RUN_OPTIONS
    if lang == "text":
        allowed.add("tol")
    values: dict[str, object] = {}
    for key, value in raw.options.items():
        if key not in allowed:
            bad("B202", f"{lang or '未写语言的'}代码块不认识选项 {key!r}")
            continue
        try:
            values[key] = _option(key, value)
        except ValueError as error:
            bad("B204" if key == "skip" else "B209", str(error))
    source, origin = raw.source, None
    include = _INCLUDE.match(source)
    if include:
        try:
            source, first = read_region(root, include["path"], include["region"])
            origin = (include["path"], first)
        except LookupError as error:
            problems.append(Problem(file, line + 1, "B207", str(error.args[0])))
            source = ""
    fields = {k: values[k] for k in RUN_OPTIONS & values.keys()}
    return Block(
        file=file,
        line=line,
        end=raw.end + 1,
        lang=lang,
        source=source,
        indent=raw.indent,
        title=str(values.get("title", "")),
        origin=origin,
        expected=Expected(source, line, raw.end + 1, raw.indent, values.get("tol")) if lang == "text" else None,
        **fields,
    )


def _option(key: str, value: str) -> object:
    if key == "skip":
        if value in ("", "skip"):
            raise ValueError("skip 必须写理由")
        return value
    if key == "timeout":
        try:
            seconds = float(value)
        except ValueError:
            raise ValueError(f"timeout 应是秒数，得到 {value!r}") from None
        if not 0 < seconds <= 3600:
            raise ValueError(f"timeout 应在 0 到 3600 秒之间，得到 {value!r}")
        return seconds
    if key == "memory":
        match = _MEMORY.match(value)
        nbytes = int(float(match[1]) * (1 << 20 if match[2] == "MiB" else 1 << 30)) if match else 0
        if not 16 << 20 <= nbytes <= 1 << 40:
            raise ValueError(f'memory 应写成 "512MiB" 或 "2GiB"（16 MiB 到 1024 GiB），得到 {value!r}')
        return nbytes
    if key == "tol":
        try:
            tol = float(value)
        except ValueError:
            raise ValueError(f"tol 应是数字，得到 {value!r}") from None
        if not 0 < tol < 1:
            raise ValueError(f"tol 应在 0 与 1 之间，得到 {value!r}")
        return tol
    if key == "output":
        if value != "show":
            raise ValueError(f'output 只能是 "show"，得到 {value!r}')
        return value
    if key == "practice" and value not in (practice.STARTER, practice.TESTS):
        raise ValueError(f'practice 只能是 "starter" 或 "tests"，得到 {value!r}')
    if key == "solution" and (not value.isidentifier() or value == "solution"):
        raise ValueError(f"solution 应是本页定义过的函数或类的名字，得到 {value!r}")
    if key == "fig" and value in ("", "fig"):
        raise ValueError("fig 要写一句话：看什么")
    if key == "raises" and not re.match(r"^(exit \d+|[A-Za-z_][\w.]*(: .+)?)$", value):
        raise ValueError(f"raises 应是异常名或“异常名: 消息片段”，得到 {value!r}")
    return value


def read_region(root: Path, path: str, region: str | None) -> tuple[str, int]:
    """取出文件里 ``# --8<-- [start:region]`` 与 ``[end:region]`` 之间的代码。

    Returns:
        ``(去掉公共缩进的代码, 首行行号)``。

    Raises:
        LookupError: 文件不在项目里、不存在，或没有这个区段。
    """
    try:
        target = (root / path).resolve()
        if not target.is_relative_to(root.resolve()) or not target.is_file():
            raise LookupError(f"引入的文件 {path} 不存在")
        lines = read_text(target, path).split("\n")
    except (OSError, ValueError) as error:
        raise LookupError(f"引入的文件 {path[:80]!r} 读不了（{error}）") from None
    except ContentError as error:
        raise LookupError(f"{path}：{error.problems[0].reason}") from None
    first, last = 0, len(lines)
    if region:
        marks = {
            m[1]: i
            for i, ln in enumerate(lines)
            if (m := re.search(rf"-{{2,}}8<-{{2,}}\s+\[((?:start|end):{re.escape(region)})\]", ln))
        }
        if f"start:{region}" not in marks or f"end:{region}" not in marks:
            names = sorted(set(re.findall(r"8<-+\s+\[start:([\w.-]+)\]", "\n".join(lines))))
            raise LookupError(f"{path} 里没有区段 {region!r}，现有：{'、'.join(names) or '无'}")
        first, last = marks[f"start:{region}"] + 1, marks[f"end:{region}"]
    body = lines[first:last]
    margin = min((len(ln) - len(ln.lstrip()) for ln in body if ln.strip()), default=0)
    kept = ["" if "8<--" in ln else ln[margin:] for ln in body]
    return "\n".join(kept).rstrip("\n"), first + 1


def _bind_outputs(lines: list[str], raws: list[_Raw], result: Scan) -> list[Block]:
    """把 ``text title="输出"`` 绑到紧邻的上一块。"""
    from dataclasses import replace

    blocks: list[Block] = []
    for raw, block in zip(raws, result.blocks, strict=True):
        is_output = block.lang == "text" and block.title == OUTPUT_TITLE
        if not is_output:
            if block.lang == "text" and "tol" in raw.options:
                result.problems.append(Problem(block.file, block.line, "B202", f'tol 只用于 title="{OUTPUT_TITLE}"'))
            blocks.append(replace(block, expected=None))
            continue
        previous = blocks[-1] if blocks else None
        gap = "".join(lines[previous.end : raw.start]) if previous else ""
        if (
            previous is None
            or previous.lang not in ("python", "bash")
            or previous.practice
            or previous.indent != block.indent
            or gap.strip("> \t")
        ):
            result.problems.append(Problem(block.file, block.line, "B208", "这段期望输出没有对应的代码块"))
        else:
            if previous.runs:
                blocks[-1] = replace(previous, expected=block.expected)
            elif not previous.skip:
                result.problems.append(Problem(block.file, block.line, "B208", "对应的代码块不会执行"))
        blocks.append(replace(block, bound=True, expected=None))
    return blocks
