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
