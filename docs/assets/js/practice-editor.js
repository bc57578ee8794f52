/* 编辑框：真正的 <textarea>，上面叠一层着色的文字。
 *
 * 选 textarea 而不是整套代码编辑器：读屏软件、输入法、手机键盘、撤销、查找都是浏览器自带的，
 * 不用另外打包几百 KB。着色层与 textarea 用同样的字体、行高与内边距，逐字重合；
 * textarea 的字是透明的，只留光标与选区。
 *
 * 键盘：Tab 缩进，Shift+Tab 反缩进；按一次 Esc，下一次 Tab 就照常移到下一个控件（WCAG 2.1.2）。
 */
"use strict";

window.zhixing = window.zhixing || {};

zhixing.Editor = class {
  /**
   * @param {string} label 读屏软件念的名字
   * @param {string} hintId 说明文字的 id
   */
  constructor(label, hintId) {
    this.gutter = this._make("div", "zx-editor__gutter");
    this.paint = this._make("code", "zx-editor__paint");
    for (const layer of [this.gutter, this.paint]) layer.setAttribute("aria-hidden", "true");
    this.area = this._make("textarea", "zx-editor__area");
    Object.assign(this.area, { spellcheck: false, autocapitalize: "off", autocomplete: "off", wrap: "off" });
    this.area.setAttribute("autocorrect", "off");
    this.area.setAttribute("aria-label", label);
    this.area.setAttribute("aria-describedby", hintId);
    const stack = this._make("div", "zx-editor__stack");
    stack.append(this.paint, this.area);
    this.element = this._make("div", "zx-editor highlight");
    this.element.append(this.gutter, stack);

    this.onchange = () => {};
    this.onrun = () => {};
    this.leaving = false; // 按过 Esc，下一次 Tab 放行
    this.area.addEventListener("input", () => {
      this.mark(0);
      this._repaint();
      this.onchange();
    });
    this.area.addEventListener("keydown", (event) => this._onKey(event));
    this.area.addEventListener("beforeinput", (event) => this._onInput(event));
    this.area.addEventListener("blur", () => (this.leaving = false));
  }

  get value() {
    return this.area.value;
  }

  /** 换掉全文，不触发 onchange。 */
  set value(text) {
    this.area.value = text;
    this.mark(0);
    this._repaint();
  }

  /** 标出第几行有错；0 为不标。 */
  mark(line) {
    this.element.classList.toggle("zx-editor--marked", line > 0);
    this.element.style.setProperty("--zx-line", line - 1);
    this.area.setAttribute("aria-invalid", line > 0);
  }

  /** 光标移到某一行的开头并聚焦。 */
  goTo(line) {
    const at = this.value.split("\n").slice(0, line - 1).join("\n").length + (line > 1 ? 1 : 0);
    this.area.focus();
    this.area.setSelectionRange(at, at);
  }

  /** 选中的各行缩进（或反缩进）四格；没有选区时 Tab 补到下一个四的倍数。 */
  indent(back) {
    const { selectionStart: start, selectionEnd: end, value } = this.area;
    const first = value.lastIndexOf("\n", start - 1) + 1;
    if (!back && start === end) {
      this._replace(start, end, " ".repeat(4 - ((start - first) % 4)));
      return;
    }
    const last = end > start && value[end - 1] === "\n" ? end - 1 : end;
    const old = value.slice(first, last);
    const lines = old.split("\n").map((line) => (back ? line.replace(/^ {1,4}/, "") : line && "    " + line));
    const text = lines.join("\n");
    if (text === old) return;
    const moved = lines[0].length - old.split("\n")[0].length;
    this._replace(first, last, text);
    this.area.setSelectionRange(Math.max(first, start + moved), end + text.length - old.length);
  }

  _onKey(event) {
    const plain = !event.ctrlKey && !event.metaKey && !event.altKey && !event.isComposing;
    if (event.key === "Escape") this.leaving = true;
    else if (event.key === "Tab" && plain) {
      if (!this.leaving) {
        event.preventDefault();
        this.indent(event.shiftKey);
      }
    } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      this.onrun();
    } else if (event.key !== "Shift") this.leaving = false;
  }

  /** 回车带上缩进；在缩进里退格一次退四格。 */
  _onInput(event) {
    const { selectionStart: start, selectionEnd: end, value } = this.area;
    const before = value.slice(value.lastIndexOf("\n", start - 1) + 1, start);
    if (event.inputType === "insertLineBreak") {
      const deeper = /:\s*(#.*)?$/.test(before) ? "    " : "";
      event.preventDefault();
      this._replace(start, end, "\n" + before.match(/^ */)[0] + deeper);
    } else if (event.inputType === "deleteContentBackward" && start === end && /^( {4})+$/.test(before)) {
      event.preventDefault();
      this._replace(start - 4, start, "");
    }
  }

  /** 经浏览器的编辑命令替换一段，这样撤销（Ctrl+Z）认得。 */
  _replace(from, to, text) {
    this.area.focus();
    this.area.setSelectionRange(from, to);
    const done = text ? document.execCommand("insertText", false, text) : document.execCommand("delete");
    if (done) return;
    this.area.setRangeText(text, from, to, "end");
    this.area.dispatchEvent(new Event("input"));
  }

  _repaint() {
    const lines = this.value.split("\n").length;
    this.gutter.textContent = Array.from({ length: lines }, (_, i) => i + 1).join("\n");
    this.paint.replaceChildren(zhixing.highlight(this.value), "\n"); // 末尾的空行也占高度
  }

  _make(tag, className) {
    const element = document.createElement(tag);
    element.className = className;
    return element;
  }
};
