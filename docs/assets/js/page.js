// 复制按钮：点了之后复制什么、怎样提示，由主题管（data-clipboard-target）。主题自己加按钮时每加一个就把整页重排一次，
// 长页上要多占半秒；这里一次加完
document.querySelectorAll("pre > code").forEach((code, i) => {
  code.id ||= `zx-code-${i}`
  const bar = Object.assign(document.createElement("div"), { className: "md-code__nav" })
  const button = Object.assign(document.createElement("button"), { className: "md-code__button", title: "复制", type: "button" })
  Object.assign(button.dataset, { clipboardTarget: `#${code.id}`, mdType: "copy" })
  bar.append(button)
  code.before(bar)
})

// 需要横向滚动的代码、表格、选项卡与图，用键盘也要滚得动
addEventListener("load", () => {
  const watch = new ResizeObserver((entries) => {
    for (const { target } of entries)
      if (target.scrollWidth > target.clientWidth) target.tabIndex = 0
      else target.removeAttribute("tabindex")
  })
  document
    .querySelectorAll("pre > code, .md-typeset__scrollwrap, .md-typeset__table table, .tabbed-labels, .zx-diagram")
    .forEach((e) => watch.observe(e))
})

// 光标一进搜索框就让 worker 去取索引（search-worker.js），打字时多半已经到了
document.querySelector(".md-search__input")?.addEventListener("focus", () => new BroadcastChannel("zhixing-search").postMessage(0), { once: true })
