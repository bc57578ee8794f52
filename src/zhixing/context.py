"""渲染一页时共享的上下文：哪个文件、站点根在哪、错误往哪里放。

Markdown 扩展拿不到“现在渲染的是哪一页”，由外层在渲染前设好 :data:`current`。
"""

from __future__ import annotations

import re
from collections import Counter
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from zhixing.errors import ContentError, Problem

if TYPE_CHECKING:
    from zhixing.artifacts import Artifacts

_FENCE = re.compile(r"[ \t>]*(`{3,}(?=[^`]*$)|~{3,})")
_INLINE_CODE_OR_COMMENT = re.compile(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)|<!--.*?-->", re.S)


@dataclass
class PageContext:
    """一页的渲染上下文；一次构建里每页新建一个。

    Attributes:
        file: 相对项目根的源文件路径，如 ``docs/diffusion/ddpm.md``。
        source: 源文件全文，含 front matter。
        url_root: 从本页 HTML 到站点根的相对前缀，如 ``../../``。
        problems: 渲染中发现的错误，追加在这里。
        artifacts: 全部示例的产物。
        for_print: 为 PDF 渲染：不依赖 CSS 变量与 foreignObject。
    """

    file: str
    source: str
    url_root: str
    problems: list[Problem]
    artifacts: Artifacts | None
    for_print: bool = False
    _seen: Counter[str] = field(default_factory=Counter, init=False, repr=False)

    def line_of(self, needle: str, start: int = 0) -> int:
        """``needle`` 在源文件里（从下标 ``start`` 起）首次出现的行号；找不到为 0。"""
        at = self.source.find(needle, start) if needle else -1
        return self._line_at(at) if at >= 0 else 0

    def locate(self, pattern: str) -> int:
        """同一个 ``pattern`` 第 k 次调用，返回正文里第 k 处匹配的行号；找不到为 0。

        代码块、行内代码与 HTML 注释不算正文。有名为 ``at`` 的分组时以它的开头为准。
        渲染得到的元素不带行号，但写法相同的两处要错都错，所以逐次领取行号就够了。
        """
        matches = list(re.finditer(pattern, self._prose, re.M))
        if not matches:
            return 0
        match = matches[self.ordinal(pattern) % len(matches)]
        return self._line_at(match.start("at" if "at" in match.re.groupindex else 0))

    def ordinal(self, key: str) -> int:
        """``key`` 在本页是第几次出现，从 0 数起。"""
        self._seen[key] += 1
        return self._seen[key] - 1

    def _line_at(self, offset: int) -> int:
        return self.source.count("\n", 0, offset) + 1

    @cached_property
    def _prose(self) -> str:
        """源文件，代码与注释换成等长空白，下标与行号不变。"""
        lines, fence = self.source.split("\n"), ""
        for i, line in enumerate(lines):
            marker = _FENCE.match(line)
            if not fence and marker is None:
                continue
            lines[i] = " " * len(line)
            if not fence:
                fence = marker[1]
            elif marker and marker[1].startswith(fence) and line.strip(" \t>") == marker[1]:
                fence = ""
        return _INLINE_CODE_OR_COMMENT.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), "\n".join(lines))


current: ContextVar[PageContext | None] = ContextVar("zhixing_page", default=None)


def report(
    code: str, reason: str, *, line: int = 0, detail: str = "", ctx: PageContext | None = None
) -> None:
    """登记一个错误。

    Raises:
        ContentError: 没有页面上下文可登记（别的工具直接用了这些扩展）。
    """
    ctx = ctx or current.get()
    problem = Problem(ctx.file if ctx else "<markdown>", line, code, reason, detail)
    if ctx is None:
        raise ContentError([problem])
    ctx.problems.append(problem)
