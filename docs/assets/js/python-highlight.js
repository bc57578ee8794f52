/* Python 代码着色：切成记号，类名与站点其余代码（Pygments）相同，颜色与亮暗由同一份样式决定。
 *
 * 只求看着对：f 字符串里的表达式不再细分。写到一半的代码也要能着色，没关上的字符串算到行尾，
 * 没关上的三引号算到文末。
 */
"use strict";

window.zhixing = window.zhixing || {};

(() => {
  const KEYWORDS = new Set(
    "as assert async await break class continue def del elif else except finally for global if lambda nonlocal pass raise return try while with yield".split(" "),
  );
  const BUILTINS = new Set(
    ("abs all any bin bool bytearray bytes callable chr classmethod dict dir divmod enumerate filter float format frozenset " +
      "getattr hasattr hash hex id input int isinstance issubclass iter len list map max min next object oct ord pow print " +
      "property range repr reversed round set setattr slice sorted staticmethod str sum super tuple type zip " +
      "ArithmeticError AssertionError Exception IndexError KeyError NotImplementedError RuntimeError StopIteration TypeError ValueError").split(" "),
  );
  const TOKEN = new RegExp(
    [
      /(?<comment>#.*)/,
      /(?<string>(?:[rbfu]|rb|br|rf|fr)?(?:"""(?:\\[^]|[^])*?(?:"""|$(?![^]))|'''(?:\\[^]|[^])*?(?:'''|$(?![^]))|"(?:\\.|[^"\\\n])*"?|'(?:\\.|[^'\\\n])*'?))/,
      /(?<decorator>(?<=^[ \t]*)@[\w.]+)/,
      /(?<number>\b(?:0[xob][\da-f_]+|(?:\d[\d_]*)?\.?\d[\d_]*(?:e[+-]?\d+)?j?)\b)/,
      /(?<word>[\p{L}_][\p{L}\p{N}_]*)/,
      /(?<operator>\/\/=?|\*\*=?|->|[-+*\/%@&|^~<>=!:]=?)/,
      /(?<punctuation>[()[\]{},.;])/,
    ]
      .map((part) => part.source)
      .join("|"),
    "gimu",
  );

  /** 一个单词的类名；前一个单词是 def、class 时它是函数名、类名。 */
  function wordClass(word, previous) {
    if (previous === "def") return "nf";
    if (previous === "class") return "nc";
    if (KEYWORDS.has(word)) return "k";
    if (word === "import" || word === "from") return "kn";
    if (["and", "in", "is", "not", "or"].includes(word)) return "ow";
    if (["True", "False", "None"].includes(word)) return "kc";
    if (word === "self" || word === "cls") return "bp";
    return BUILTINS.has(word) ? "nb" : "n";
  }

  /** 着好色的片段；全部经 textContent 写入，代码里的 < 与 & 原样显示。 */
  zhixing.highlight = (code) => {
    const fragment = document.createDocumentFragment();
    let [end, previous] = [0, ""];
    for (const match of code.matchAll(TOKEN)) {
      const { comment, string, decorator, number, word, operator } = match.groups;
      let kind = "p";
      if (comment) kind = "c1";
      else if (string) kind = "s2";
      else if (decorator) kind = "nd";
      else if (number) kind = "mi";
      else if (word) kind = wordClass(word, previous);
      else if (operator) kind = "o";
      fragment.append(code.slice(end, match.index));
      const span = document.createElement("span");
      span.className = kind;
      span.textContent = match[0];
      fragment.append(span);
      end = match.index + match[0].length;
      previous = word || "";
    }
    fragment.append(code.slice(end));
    return fragment;
  };
})();
