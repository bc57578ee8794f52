"""一种错误格式走到底：``文件:行: 编号 原因（怎么改）``。

编号永不改变含义；``docs/rules.md`` 由这里的 :data:`RULES` 生成。
"""

from __future__ import annotations

from dataclasses import dataclass

RULES: dict[str, tuple[str, str]] = {
    # 编号: (含义, 怎么改)
    "F101": ("front matter 缺少必填字段", "补上字段；模板见贡献指南"),
    "F102": ("front matter 的值不在词表里或类型不对", "改成词表里的值"),
    "F103": ("id 重复", "id 全站唯一，与文件名一致"),
    "F104": ("questions 指向的锚点在正文里不存在", "给对应标题加 `{#锚点}`"),
    "F105": ("front matter 不是合法的 YAML", "检查缩进、冒号与引号；含冒号的文字加引号"),
    "F106": ("front matter 有未知字段", "删掉，或检查拼写"),
    "B201": ("代码块没有闭合", "补上结尾的 ```"),
    "B202": ("代码块写了未知选项", "检查拼写；可用选项见贡献指南"),
    "B203": ("代码块没写语言或语言未知", "可执行：python bash console pycon；只显示：text 等，见贡献指南"),
    "B204": ("skip 没有理由", '写成 skip="理由"'),
    "B205": ("代码块写在列表标记的同一行", "另起一行并缩进四格"),
    "B206": ("裸缩进代码块或原始 HTML 代码块不会被执行", "改用 ``` 围起来"),
    "B207": ("引入的文件或区段不存在", "检查路径与 # --8<-- [start:名字]"),
    "B208": ("期望输出前面没有可执行的代码块", '把 ```text title="输出" 紧跟在代码块之后'),
    "B209": ("选项的值不合法", "按贡献指南的写法改"),
    "B210": ("跳过的代码块超过全站上限", "让它跑起来，或删掉"),
    "B211": ("静态扫描、构建收集与最终页面看到的代码块不一致", "避免把代码块放在 HTML 注释或原始 HTML 里"),
    "R301": ("代码块抛出异常", "修代码，或用 raises 声明它应当抛出"),
    "R302": ("输出与期望不符", "修代码；确认新输出正确后用 zhixing update 改写"),
    "R303": ("没有抛出声明的异常", "修代码或 raises"),
    "R304": ("超过时限", '减小规模，或写 timeout="秒"'),
    "R305": ("进程意外结束（段错误、os._exit、被杀）", "检查 C 扩展、递归与子进程"),
    "R306": ("超过内存上限", '减小规模，或写 memory="2GiB"'),
    "R307": ("图与 fig 声明不一致", '画了图就写 fig="看什么"，写了 fig 就要画图'),
    "R308": ("输出太大", "只打印要给读者看的内容"),
    "R309": ("要了路径的产物文件没有写出来，或收不进缓存", "往 zhixing.output_path 给的路径写一个普通文件"),
    "M401": ("公式错误", "按 KaTeX 支持的语法改"),
    "M402": ("标题里有公式", "标题用文字，公式放正文"),
    "M403": ("Mermaid 图错误", "按提示的行改图的语法"),
    "M404": ("引用的数字不存在", "检查示例 id 与 zhixing.metric 的名字"),
    "M405": ("引用的图不存在", "检查示例 id 与 zhixing.figure 的名字"),
    "L501": ("死链", "检查目标路径（相对 Markdown 文件，写 .md）"),
    "L502": ("锚点不存在", "检查目标页的标题或 `{#锚点}`"),
    "L503": ("图片不存在", "检查路径"),
    "L504": ("文件不是 UTF-8 编码", "用编辑器另存为 UTF-8"),
    "L505": ("外部资源会被读者的浏览器请求", "改成站内文件"),
    "P701": ("练习的起始代码与测试没有配成对", "起始代码后面紧跟它的测试，中间不放别的代码块；一对写完再写下一对"),
    "P702": ("练习的写法不对", '写法见贡献指南：practice="starter" 与 practice="tests" solution="参考解的名字"'),
    "P703": ("练习的参考解没有通过测试", "修参考解或测试；测试看不到本页的变量，要自成一体"),
    "P704": ("练习的起始代码就通过了测试", "测试没有考到要读者写的东西，补上用例"),
    "P705": ("练习的测试太慢", "减小规模：浏览器里的 Python 慢几倍，写对的读者也会超时"),
    "S801": ("同义词表的行不合法", "一行一组，逗号隔开；同一个词只在一组里"),
    "E602": ("示例头部不合法", "按贡献指南写 # --- zhixing: 头部"),
    "E603": ("needs 里的上游没有成功，所以没有执行", "先修好上游示例"),
}


@dataclass(frozen=True, order=True)
class Problem:
    """一条指到行的错误。

    Attributes:
        file: 相对项目根目录的路径，``/`` 分隔。
        line: 1 起的行号；0 表示整个文件。
        code: :data:`RULES` 里的编号。
        reason: 具体原因，一行。
        detail: 可多行的补充（回溯、差异），打印时缩进。
    """

    file: str
    line: int
    code: str
    reason: str
    detail: str = ""

    def __post_init__(self) -> None:
        if self.code not in RULES:
            raise KeyError(f"未登记的规则编号 {self.code}")

    def __str__(self) -> str:
        head = f"{self.file}:{self.line or 1}: {self.code} {self.reason}（{RULES[self.code][1]}）"
        if not self.detail:
            return head
        return head + "\n" + "\n".join("    " + ln for ln in self.detail.rstrip().splitlines())


class ContentError(Exception):
    """内容有错，构建不能继续；``problems`` 已按文件与行排好。"""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = sorted(set(problems))
        super().__init__(f"{len(self.problems)} 处错误")
