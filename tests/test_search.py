"""站内搜索：worker 在 QuickJS 里逐条核对；真实索引上的命中率与浏览器里的样子在 test_site.py。"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import quickjs
from hypothesis import given
from hypothesis import strategies as st

from zhixing import search
from zhixing.errors import Problem

WORKER = Path(__file__).resolve().parents[1] / "docs" / search.WORKER

DOCS = [
    ("a/cfg/", "CFG：无分类器引导", "<p>引导强度越大越听话 a &lt; b</p>", ["扩散模型"]),
    ("a/cfg/#scale", "guidance scale 7.5", "<p>有条件与无条件之差</p>", []),
    ("b/controlnet/", "ControlNet：零卷积", "<p>编码器副本</p>", []),
    ("b/ip-adapter/", "IP-Adapter：图像提示", "<p>解耦的交叉注意力</p>", []),
    ("c/attention/", "交叉注意力", "<p>Q 来自图，K、V 来自文字；top-k 与 C++</p>", []),
    ("d/long/", "长文", "<p>" + "无关的字。" * 80 + "这里才有反向传播" + "无关的字。" * 80 + "</p>", []),
    ("e/vqvae/", "VQVAE", "<p>CLIP 与码本</p>", []),
    ("e/norm/", "Group Norm", "<p>归一化</p>", []),
    ("f/apart/", "别处", "<p>梯度 度裁 裁剪 梯度 度裁 裁剪 梯度 度裁 裁剪</p>", []),
    ("f/whole/", "某处", "<p>训练大模型时常用的一招是把梯度裁剪到固定的长度</p>", []),
    ("g/one/", "蒸馏 蒸馏 蒸馏", "<p>蒸馏 蒸馏 蒸馏</p>", []),
    ("m/aside/", "旁及", "<p>提一句 DreamX 与欠拟合</p>", []),
    ("m/dreamx/", "DreamX：新主体", "<p>甲</p>", []),
    ("m/dreamx/#under", "欠拟合", "<p>欠拟合时看什么</p>", []),
    ("g/and/", "闲谈", "<p>蒸馏 与 蒸馏 与 蒸馏</p>", []),
    ("g/both/", "杂记", "<p>先说别的事，说了很久很久，再说蒸馏，最后才说量化，说完就结束了，没有别的</p>", []),
    ("h/some/", "反向排序 反向排序", "<p>反向排序</p>", []),
    ("questions/", "题目索引", "<p>无分类器引导是什么 零卷积 交叉注意力 权重衰减</p>", []),
    ("j/prose/", "散文", "<p>" + "说了许多别的。" * 30 + "权重衰减</p>", []),
    ("k/clipping/", "杂项", "<p>clipping</p>", []),
    *((f"k/clip{i}/", "某图", "<p>CLIP 的用法</p>", []) for i in range(3)),
    ("k/lone/", "A 墙 B", "", []),
    *((f"k/{at}", "别的", "<p>消融实验</p>", []) for at in ("once/#a", "more/#a", "more/#b")),
    ("l/other/", "甲", "<p>" + "ablation " * 10 + "</p>", []),
    ("l/ablation/", "甲", "", []),
    ("l/group/", "甲", "<p>" + "group norm " * 20 + "</p>", []),
    ("k/named/", "零样本：别的", "<p>甲</p>", []),
    ("k/longer/", "零样本 零样本", "<p>零样本</p>", []),
]
SYNONYMS = [["交叉注意力", "cross attention"], ["引导强度", "cfg scale"]]


def material(docs) -> dict:
    """Material 写出的样子：汉字之间有分词用的零宽字符。"""
    config = {"lang": ["zh"], "separator": r"\s+", "pipeline": [], "fields": {}}
    entries = [{"location": at, "title": title[0] + "\u200b" + title[1:], "text": text, "tags": tags} for at, title, text, tags in docs]
    return {"config": config, "docs": entries}


@pytest.fixture(scope="module")
def js():
    context = quickjs.Context()
    context.eval(WORKER.read_text("utf-8"))
    index = search.finish(material(DOCS), SYNONYMS)
    context.eval("(text) => { globalThis.ix = new Index(JSON.parse(text)) }")(json.dumps(index))
    return context


@pytest.fixture(scope="module")
def find(js):
    run = js.eval("(query) => JSON.stringify(ix.search(query))")
    return lambda query: json.loads(run(query))


def pages(found) -> list[str]:
    return [group[0]["location"].split("#")[0] for group in found["items"]]


# ── 构建这一半 ────────────────────────────────────────────────────────


def test_finish_keeps_what_the_interface_needs() -> None:
    index = search.finish(material(DOCS), SYNONYMS)
    assert set(index["config"]) == {"lang", "separator", "synonyms", "simplified"}
    assert "\u200b" not in json.dumps(index, ensure_ascii=False)
    assert index["docs"][0]["text"] == "引导强度越大越听话 a < b"  # 纯文字
    boosts = {d["location"]: d.get("boost") for d in index["docs"]}
    assert boosts["questions/"] < 1 and boosts["a/cfg/"] is None
    lighter = ("", "#x", "index.html", "examples/a/", "examples/a.html#b", "tags.html")
    assert all(d["boost"] < 1 for d in search.finish(material([(at, "甲乙", "", []) for at in lighter]), [])["docs"])
    assert "boost" not in search.finish(material([("tagsoup/", "甲乙", "", [])]), [])["docs"][0]
    pairs = index["config"]["simplified"]
    table = dict(zip(pairs[::2], pairs[1::2]))
    assert table["無"] == "无" and table["導"] == "导"
    used = {c for d in index["docs"] for c in d["title"] + d["text"]}
    assert set(table.values()) <= used and all(old != new for old, new in table.items())


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("# 注释\n\n只有一个词\n", 3, "至少两个词"),
        ("甲,\n", 1, "至少两个词"),
        ("甲, 乙\nＡ，乙\n", 2, "在第 1 行已经有了"),
    ],
)
def test_bad_synonyms_name_the_line(site, text, line, says) -> None:
    site.write(search.SYNONYMS, text)
    problems: list[Problem] = []
    search.load_synonyms(site.root, problems)
    assert [(p.file, p.line, p.code) for p in problems] == [(search.SYNONYMS, line, "S801")]
    assert says in problems[0].reason


def test_synonyms_are_optional_and_accept_both_commas(site) -> None:
    assert search.load_synonyms(site.root, []) == []
    site.write(search.SYNONYMS, "甲，乙, Cross Attention\n")
    assert search.load_synonyms(site.root, []) == [["甲", "乙", "Cross Attention"]]


def test_pages_load_our_worker() -> None:
    root = WORKER.parents[3]
    html = '{"search": "../assets/javascripts/workers/search.a7633da7.min.js"}'
    changed = search.use_worker(html, root)
    assert changed.startswith('{"search": "../assets/js/search-worker.js?') and "a7633da7" not in changed


# ── 找得到 ────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("query", "page"),
    [
        ("无分类器引导", "a/cfg/"),
        ("無分類器引導", "a/cfg/"),  # 繁体
        ("ＣＦＧ", "a/cfg/"),  # 全角
        ("cfg", "a/cfg/"),
        ("guidance", "a/cfg/"),
        ("IP-Adapter", "b/ip-adapter/"),
        ("ip adapter", "b/ip-adapter/"),
        ("IPAdapter", "b/ip-adapter/"),
        ("control net", "b/controlnet/"),
        ("contrlnet", "b/controlnet/"),  # 少一个字母
        ("conrtolnet", "b/controlnet/"),  # 相邻互换
        ("controlnet零卷积", "b/controlnet/"),  # 混排
        ("cross attention", "c/attention/"),  # 同义词
        ("交差注意力", "c/attention/"),  # 错一个字
        ("c++", "c/attention/"),
        ("topk", "c/attention/"),
        ("卷", "b/controlnet/"),  # 单字
        ("導", "a/cfg/"),
        ("vq-vae", "e/vqvae/"),  # 正文里连写
        ("vq vae", "e/vqvae/"),
        ("groupnorm", "e/norm/"),  # 正文里分写
        ("梯度裁剪", "f/whole/"),  # 连在一起的胜过散落的
        ("蒸馏 量化", "g/both/"),  # 两个词都有的胜过一个词很多的
        ("反向传播", "d/long/"),  # 整个都有的胜过只有一半的
        ("墙", "k/lone/"),  # 前后都没有汉字的单字
        ("消融实验", "k/more/"),  # 几个小节都讲的胜过只有一个小节讲的
        ("零样本", "k/named/"),  # 页名就是它的胜过说得多的
        ("蒸馏 与 量化", "g/both/"),  # 夹着的单字不算数
        ("dreamx 欠拟合", "m/dreamx/"),  # 页标题里有的词，小节不必再说
        ("gropu norm", "e/norm/"),  # 错字也认标题
        ("ablatio", "l/ablation/"),  # 没打完的页名
    ],
)
def test_finds(find, query, page) -> None:
    assert pages(find(query))[0] == page


def test_each_group_contains_the_page_itself(find) -> None:
    group = find("guidance scale")["items"][0]
    assert group[0]["location"] == "a/cfg/#scale"
    assert [hit["location"] for hit in group].count("a/cfg/") == 1


def test_words_start_at_word_boundaries(find) -> None:
    assert pages(find("net")) == []  # 不在词首
    (hit,) = [group[0] for group in find("码本 ip")["items"] if group[0]["location"] == "e/vqvae/"]
    assert hit["text"] == "CLIP 与<mark data-md-highlight>码本</mark>"  # 不在 CLIP 里标出 ip


def test_a_rare_longer_word_does_not_outrank_the_word_itself(find) -> None:
    found = pages(find("clip"))
    assert set(found[:4]) == {"e/vqvae/", "k/clip0/", "k/clip1/", "k/clip2/"} and found[-1] == "k/clipping/"


def test_lists_of_questions_come_last(find) -> None:
    assert pages(find("权重衰减")) == ["j/prose/", "questions/"]


def test_nothing_found_offers_something_near(find) -> None:
    near = find("力学")
    assert pages(near)[0] == "c/attention/"
    assert near["items"][0][0]["terms"] == {"力学": False}  # 界面会写“缺少：力学”
    near = find("contolnot")  # 错了两处
    assert pages(near)[0] == "b/controlnet/" and near["items"][0][0]["terms"] == {"contolnot": False}
    for nothing in ("", "  ", "!!!", "龘", "zzzzzz"):
        assert find(nothing)["items"] == []


def test_the_page_itself_is_scored_like_any_other(js) -> None:
    """列不下的小节里有这一页本身时，它照自己的分与命中的词显示，排在最后。"""
    docs = [("x/", "长页", "<p>零卷积</p>", []), *((f"x/#{i}", "零卷积", "<p>零卷积</p>", []) for i in range(8))]
    js.eval("(text) => { globalThis.long = new Index(JSON.parse(text)) }")(json.dumps(search.finish(material(docs), [])))
    (group,) = json.loads(js.eval("JSON.stringify(long.search('零卷积').items)"))
    assert [hit["location"] for hit in group] == [f"x/#{i}" for i in range(6)] + ["x/"]
    assert group[-1]["terms"] == {"零卷积": True} and "<mark" in group[-1]["text"]


def test_suggests_the_rest_of_the_word(find) -> None:
    assert find("contr")["suggest"] == ["controlnet"]
    assert find("交叉")["suggest"] == ["交叉注意力"]
    assert find("cfg contr")["suggest"] == ["controlnet"]


# ── 显示 ──────────────────────────────────────────────────────────────


def test_marks_the_original_text_and_escapes_the_rest(find) -> None:
    hit = find("引导强度")["items"][0][0]
    assert hit["text"] == "<mark data-md-highlight>引导强度</mark>越大越听话 a &lt; b"
    assert find("cross attention")["items"][0][0]["title"] == "<mark data-md-highlight>交叉注意力</mark>"
    assert find("ＣＯＮＴＲＯＬnet")["items"][0][0]["title"].startswith("<mark data-md-highlight>ControlNet</mark>")


def test_excerpt_shows_the_hit(find) -> None:
    text = find("反向传播")["items"][0][0]["text"]
    assert "<mark data-md-highlight>反向传播</mark>" in text and text.startswith("…") and text.endswith("…")
    assert len(text) < 260


def test_index_text_cannot_inject_markup(js) -> None:
    docs = [("x/", "&lt;img src=x onerror=alert(1)&gt;", "<p>&lt;script&gt;alert(1)&lt;/script&gt;</p>", [])]
    js.eval("(text) => { globalThis.evil = new Index(JSON.parse(text)) }")(json.dumps(search.finish(material(docs), [])))
    for query in ("img", "alert", "<script>", "onerror=alert(1)"):
        found = json.loads(js.eval("(query) => JSON.stringify(evil.search(query))")(query))
        shown = json.dumps(found).replace("<mark data-md-highlight>", "").replace("</mark>", "")
        assert "<" not in shown


# ── 性质 ──────────────────────────────────────────────────────────────

TEXT = st.text(st.sampled_from("aAbＢ交叉注意力無無ıİßé-+_. \u3000<&\"'0９"), max_size=12)


@given(TEXT)
def test_fold_keeps_the_length_and_settles(js, text) -> None:
    fold = js.eval("fold")
    units = len(text.encode("utf-16-le")) // 2
    folded = fold(text)
    assert len(folded.encode("utf-16-le")) // 2 == units
    assert fold(folded) == folded


@given(TEXT)
def test_any_query_is_answered(find, text) -> None:
    found = find(text)
    for group in found["items"]:
        assert group and all(hit["score"] >= 0 and hit["location"] for hit in group)
    assert found == find(text)  # 打分用的草稿纸用完都归零


def test_earlier_queries_leave_no_trace(js) -> None:
    queries = ["group", "norm", "group norm", "contrlnet", "交叉注意力", "力学", "卷", "clip"]
    once = js.eval("(text, q) => JSON.stringify(new Index(JSON.parse(text)).search(q))")
    again = js.eval("(q) => JSON.stringify(ix.search(q))")
    index = json.dumps(search.finish(material(DOCS), SYNONYMS))
    assert [again(q) for q in queries + queries[::-1]] == [once(index, q) for q in queries + queries[::-1]]


@given(st.text("abc", max_size=5), st.text("abc", max_size=5))
def test_one_edit_is_damerau_distance_one(js, a, b) -> None:
    def distance(a: str, b: str) -> int:  # 最优串对齐的编辑距离，教科书的动态规划
        d = {(i, 0): i for i in range(len(a) + 1)} | {(0, j): j for j in range(len(b) + 1)}
        for i in range(1, len(a) + 1):
            for j in range(1, len(b) + 1):
                d[i, j] = min(d[i - 1, j] + 1, d[i, j - 1] + 1, d[i - 1, j - 1] + (a[i - 1] != b[j - 1]))
                if i > 1 and j > 1 and a[i - 1] == b[j - 2] and a[i - 2] == b[j - 1]:
                    d[i, j] = min(d[i, j], d[i - 2, j - 2] + 1)
        return d[len(a), len(b)]

    assert js.eval("oneEdit")(a, b) == (distance(a, b) == 1)


def test_speaks_materials_protocol() -> None:
    context = quickjs.Context()
    context.eval("var said = []; var hear; var postMessage = (m) => said.push(m); globalThis.addEventListener = (_, f) => { hear = f }")
    context.eval(WORKER.read_text("utf-8"))
    index = json.dumps(search.finish(material(DOCS), SYNONYMS))
    context.eval("(text) => hear({data: {type: 0, data: JSON.parse(text)}})")(index)
    context.eval("hear({data: {type: 2, data: 'cfg'}})")
    while context.execute_pending_job():
        pass
    said = json.loads(context.eval("JSON.stringify(said)"))
    assert [message["type"] for message in said] == [1, 3]
    assert said[1]["data"]["items"][0][0]["location"] == "a/cfg/"


def test_lazy_index_is_taken_once_and_again_after_a_failure() -> None:
    """只说了索引在哪里：先答应着，查询来了才取；取不到不当作没有结果，下次再取。"""
    context = quickjs.Context()
    context.eval("""
        var said = [], taken = [], ok = false, hear
        var postMessage = (m) => said.push(m), location = "https://x.test/v1/assets/js/search-worker.js"
        var URL = function (path) { this.path = path }
        globalThis.addEventListener = (_, f) => { hear = f }
        var fetch = async (url) => { taken.push(url.path); return { ok, status: 503, json: async () => JSON.parse(text) } }
        var ask = () => { hear({ data: { type: 2, data: "cfg" } }).catch(() => {}) }
    """)
    context.set("text", json.dumps(search.finish(material(DOCS), SYNONYMS)))
    context.eval(WORKER.read_text("utf-8"))

    def run(code: str) -> list[int]:
        context.eval(code)
        while context.execute_pending_job():
            pass
        return [message["type"] for message in json.loads(context.eval("JSON.stringify(said)"))]

    assert run("hear({data: {type: 0, data: {config: {more: 'docs.json?1234'}, docs: []}}})") == [1]
    assert context.eval("taken.length") == 0
    assert run("hear({data: {type: 2, data: ''}})") == [1, 3] and context.eval("taken.length") == 0
    assert run("ask()") == [1, 3]                                  # 取不到
    assert run("ok = true; ask(); ask()") == [1, 3, 3, 3]
    assert json.loads(context.eval("JSON.stringify(taken)")) == ["../../search/docs.json?1234"] * 2
