/* 练习：把页面上的起始代码换成编辑框，接上运行、停止、还原与结果。
 *
 * 页面原来的样子（没有 JavaScript 时读者看到的）：.zx-practice 是起始代码，
 * 其后最近的 .zx-tests 是折叠的测试。两处的代码都从页面上读，不另存一份。
 */
"use strict";

(() => {
  const settings = JSON.parse(document.getElementById("zx-practice-settings").textContent);
  for (const name of Object.keys(settings.files)) settings.files[name] = new URL(settings.files[name], new URL(settings.root + "/", location)).href;
  const runtime = new zhixing.Runtime(settings);
  const megabytes = (settings.bytes / 1e6).toFixed(1);

  /** make("p", "类名", 子节点或文字…)：文字一律经 textContent，不解析 HTML。 */
  function make(tag, className, ...children) {
    const element = document.createElement(tag);
    if (className) element.className = className;
    element.append(...children);
    return element;
  }

  function button(text, className, action) {
    const element = make("button", className, text);
    element.type = "button";
    element.addEventListener("click", action);
    return element;
  }

  const codeOf = (block) => block.querySelector("pre > code").textContent.replace(/\n$/, "");

  class Exercise {
    constructor(starter, tests) {
      this.entry = starter.dataset.entry;
      this.key = `${settings.page}/${this.entry}`;
      this.starter = codeOf(starter);
      this.tests = codeOf(tests);

      const hint = make("p", "zx-practice__hint", "Tab 缩进，Shift+Tab 反缩进；先按 Esc 再按 Tab 离开编辑框。Ctrl+Enter 运行。");
      hint.id = `zx-hint-${this.entry}`;
      this.editor = new zhixing.Editor(`${this.entry} 的代码`, hint.id);
      this.editor.onchange = () => this._save();
      this.editor.onrun = () => this.run();

      this.runButton = button("运行测试", "zx-button zx-button--main", () => this.run());
      this.stopButton = button("停止", "zx-button", () => runtime.stop());
      this.stopButton.hidden = true;
      const reset = button("还原", "zx-button", () => this._reset());
      // 手机键盘没有 Tab
      const deeper = button("缩进", "zx-button zx-button--touch", () => this.editor.indent(false));
      const shallower = button("反缩进", "zx-button zx-button--touch", () => this.editor.indent(true));
      this.state = make("span", "zx-practice__state");
      const toolbar = make("div", "zx-practice__toolbar", this.runButton, this.stopButton, reset, deeper, shallower, this.state);
      toolbar.setAttribute("role", "group");
      toolbar.setAttribute("aria-label", `${this.entry} 的练习`);

      this.bar = make("progress", "zx-practice__progress");
      this.bar.setAttribute("aria-label", "下载 Python 的进度");
      this.bar.hidden = true;
      this.result = make("div", "zx-practice__result");
      this.result.setAttribute("role", "status");
      this.result.setAttribute("aria-live", "polite");
      const versions = make(
        "p",
        "zx-practice__hint",
        `浏览器里是 Python ${settings.python}（Pyodide ${settings.pyodide}，第一次运行时从本站下载 ${megabytes} MB，只有标准库）；` +
          `构建时核对用的是 Python ${settings.built}。代码只存在这台设备上。`,
      );

      const original = starter.querySelector(".highlight");
      original.classList.add("zx-practice__original");
      original.after(this.editor.element, hint, toolbar, this.bar, this.result, versions);
      starter.classList.add("zx-practice--live");

      const saved = zhixing.progress.load(this.key);
      this.editor.value = saved.code ?? this.starter;
      this._paintPassed(saved.passed);
      runtime.addEventListener("change", () => this.runButton.setAttribute("aria-disabled", runtime.busy));
    }

    async run() {
      if (runtime.busy) return;
      const code = this.editor.value;
      this.editor.mark(0);
      this.output = "";
      this.stopButton.hidden = false;
      try {
        const result = await runtime.run({ code, tests: this.tests, entry: this.entry }, settings.limit, {
          stage: (stage) => this._showStage(stage),
          progress: (ratio) => (this.bar.value = ratio),
          output: (text) => (this.output += text),
        });
        this._showResult(result);
      } catch (error) {
        if (!(error instanceof zhixing.Interrupted)) {
          this._show("fail", `练习的脚本出错了，请刷新再试。（${error}）`);
          throw error;
        }
        this._showInterrupted(error);
      } finally {
        this.bar.hidden = true;
        if (document.activeElement === this.stopButton) this.runButton.focus();
        this.stopButton.hidden = true;
      }
    }

    // ---- 草稿与进度 ----

    _save() {
      const code = this.editor.value === this.starter ? undefined : this.editor.value;
      const saved = zhixing.progress.save(this.key, { code });
      if (!saved) this.state.textContent = "浏览器不让保存，离开本页前请自己留一份";
    }

    _reset() {
      const before = this.editor.value;
      if (before === this.starter) {
        this._show("info", "已经是起始代码。");
        return;
      }
      this.editor.value = this.starter;
      this._save();
      const undo = button("取回刚才的代码", "zx-button", () => {
        this.editor.value = before;
        this._save();
        this._show("info", "已取回。");
        this.editor.area.focus();
      });
      this._show("info", "已还原成起始代码。", undo);
    }

    _paintPassed(passed) {
      if (!passed) return;
      this.state.textContent = "✓ 已通过";
      this.state.title = `第一次通过：${new Date(passed).toLocaleString("zh-CN")}`;
    }

    // ---- 结果 ----

    _show(kind, headline, ...details) {
      const mark = { pass: "✓ ", fail: "✗ ", stop: "■ " }[kind] || "";
      this.result.className = `zx-practice__result zx-practice__result--${kind}`;
      this.result.replaceChildren(make("p", "zx-practice__headline", mark + headline), ...details);
    }

    _showStage(stage) {
      this.bar.hidden = stage !== "download";
      this.bar.value = 0;
      const text = {
        download: `正在下载 Python（${megabytes} MB，只需一次）……`,
        start: "正在启动 Python……",
        run: `正在运行测试……超过 ${settings.limit} 秒会自动停下。`,
      }[stage];
      this._show("info", text);
    }

    _showResult(result) {
      if (result.status === "pass") {
        const saved = zhixing.progress.load(this.key).passed || new Date().toISOString();
        zhixing.progress.save(this.key, { passed: saved });
        this._paintPassed(saved);
        this._show("pass", `全部通过：调用 ${result.calls} 次，${result.seconds.toFixed(2)} 秒。`, ...this._printed());
        return;
      }
      const { line, kind, message } = result;
      const said = message ? `：${message}` : "。";
      let headline = `答案不对${said}`;
      if (result.status === "error") {
        if (line) headline = `你的代码第 ${line} 行抛出 ${kind}${said}`;
        else headline = result.trace ? `测试里抛出 ${kind}${said}` : message;
      }
      const details = [this._case(result.case, result.status)];
      if (line) {
        this.editor.mark(line);
        details.unshift(button(`跳到第 ${line} 行`, "zx-button", () => this.editor.goTo(line)));
      }
      if (result.trace) {
        const trace = make("details", "zx-practice__trace", make("summary", "", "回溯"), make("pre", "", result.trace));
        details.push(trace);
      }
      this._show("fail", headline, ...details, ...this._printed());
    }

    _showInterrupted({ reason, message }) {
      const text = {
        stopped: "已停止。",
        late: `超过 ${settings.limit} 秒，已停下：多半是死循环，或者复杂度太高。`,
        start: `启动不了 Python：可能是浏览器太旧，或者设备内存不够。（${message}）`,
        crashed: `Python 崩溃了，下次运行会重新启动它：多半是内存用尽或递归太深。（${message}）`,
        download:
          location.protocol === "file:"
            ? "读不到浏览器用的 Python。直接打开文件只支持离线包；普通构建请用 make serve 预览。"
            : `没能下载 Python：请检查网络后再试，你的代码已经保存。（${message}）`,
      }[reason];
      this._show(reason === "stopped" || reason === "late" ? "stop" : "fail", text, ...this._printed());
    }

    /** 出问题的用例：输入、期望、实际。 */
    _case({ input, expected, actual }, status) {
      const list = make("dl", "zx-practice__case");
      const rows = [["输入", input], ["期望", expected], ["实际", status === "fail" || expected ? actual : ""]];
      for (const [label, text] of rows) {
        if (text) list.append(make("dt", "", label), make("dd", "", make("pre", "", text)));
      }
      return list;
    }

    _printed() {
      return this.output ? [make("p", "zx-practice__label", "打印的内容"), make("pre", "", this.output)] : [];
    }
  }

  const blocks = [...document.querySelectorAll(".zx-practice, .zx-tests")];
  blocks.forEach((block, i) => {
    if (block.matches(".zx-practice") && blocks[i + 1]?.matches(".zx-tests")) new Exercise(block, blocks[i + 1]);
  });
})();
