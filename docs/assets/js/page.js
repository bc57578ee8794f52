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

// 主题给每块代码的按钮各套一个没有名字的 <nav>：它们不是导航，读屏软件不必列出来
new MutationObserver(() => document.querySelectorAll(".md-code__nav:not([role])").forEach((nav) => nav.setAttribute("role", "none"))).observe(
  document.body,
  { childList: true, subtree: true },
)

// 光标一进搜索框就让 worker 去取索引（search-worker.js），打字时多半已经到了
document.querySelector(".md-search__input")?.addEventListener("focus", () => new BroadcastChannel("zhixing-search").postMessage(0), { once: true })
